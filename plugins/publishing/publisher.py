"""Publishes what a run has written to the Hugging Face Hub: many files and the card in one commit.

Only the head of the repository counts. Each round lists the files there, compares them with those of the spool, and
commits the difference, on condition that the head has not moved since. So a round can be interrupted, repeated, or
race with that of another publisher, and each file is published once. What is remembered on disk (`published.sqlite3`)
saves reading files again, and distinguishes files of earlier runs from those of someone else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.markdown import counted
from sdg_plugins.publishing import card
from sdg_plugins.publishing.front_matter import BrokenCard
from sdg_plugins.publishing.inventory import Inventory
from sdg_plugins.publishing.ledger import Ledger
from sdg_plugins.publishing.quota import CommitQuota
from sdg_plugins.publishing.repository import Repository
from sdg_plugins.publishing.spool import Content, HubFile, Spool, clear_scratch

MOST_CHUNKS = 95_000  # files of a run without a warning: the Hub accepts 100,000 in a repository
LONGEST_WAIT = 600.0  # s between two attempts, unless the Hub asks for more
REMINDER = 600.0  # s between two messages about an outage


class Publisher:
    """Publishes in rounds, each of which makes one commit; see the top of this module.

    Args:
        run: with an `hf://` output; of its state, only `published.sqlite3` is written.

    Raises:
        UsageError: the output is not an address to which a run can publish.
    """

    def __init__(self, run: sdg.Run) -> None:
        self.run = run
        self.repository = Repository(run.options.output)
        self.address = self.repository.address
        self.quota = CommitQuota()
        run.state.mkdir(parents=True, exist_ok=True)
        clear_scratch(run.state)
        self._ledger = Ledger(run.state / "published.sqlite3")
        self._spool = Spool(run, self.address.folder, self._ledger)
        self._inventory = Inventory(run, self.repository, self._spool, self._ledger)
        self._prepared = False
        self._card_problem = ""  # why the card cannot be brought up to date

    @property
    def url(self) -> str:
        """The web page of the dataset."""
        return self.repository.url

    @property
    def private(self) -> bool:
        """True if the repository is private, or will be created as such."""
        return self.repository.private

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()

    def prepare(self, *, make: bool = True) -> None:
        """Check that the repository can be written, and has no other rows in the folders of this run.

        Args:
            make: create the repository if it does not exist; False before the run has begun, to check only.

        Raises:
            UsageError: there is no token, or the published files have another --max-file-size.
            OutputError: the token has no write access, or the repository has other rows in these folders.
            Exception: of the Hub's client.
        """
        hub.set_timeout()
        options = self.run.options
        if not self.repository.ensure_writable(create=make, public=options.output_public):
            return
        self.repository.refresh(self._spool.folders)
        if make or not options.fresh:
            self._inventory.identify_run()
        self._inventory.claim(fresh=options.fresh, record=make)
        if (files := self._spool.expected() if self._spool.begun else 0) > MOST_CHUNKS:
            sdg.say(
                f"this run makes about {files:,} files, and the Hub accepts 100,000 in a repository: "
                "start over with --max-file-size 500MB, or with a larger --records-per-chunk"
            )
        self._prepared = True

    def waiting(self) -> int:
        """How many files were written or changed since they were published, as far as is known without the Hub."""
        return self._inventory.waiting()

    def discrepancies(self) -> Iterator[str]:
        """All differences between what was written and what is on the Hub, a line each."""
        hub.patiently(lambda: self.repository.refresh(self._spool.folders), self.address, self.run.stopping)
        self._inventory.identify_run()
        with contextlib.closing(Content(self.run)) as content:
            yield from self._inventory.discrepancies(content)

    # A round

    def publish(self, progress: str = "") -> int:
        """Commit files that are missing on the Hub, delete those that have been replaced, and update the card.

        Args:
            progress: markdown for the card.

        Returns:
            The number of files left for further rounds.

        Raises:
            Exception: of the Hub's client. The next round finds out whether the commit was made.
        """
        hub.set_timeout()
        if not self._prepared:
            self.prepare()
        self.repository.refresh(self._spool.folders)
        self._inventory.identify_run()
        files = self._spool.files()
        with contextlib.closing(Content(self.run)) as content:
            missing = self._inventory.missing(files, content)
            earlier = self._inventory.of_earlier_runs(files)
            most = self.quota.files_for(len(missing) + len(earlier))
            batch = whole_groups(missing, max(0, most - len(earlier)))
            present = files.keys() - {file.path for file in missing} | {file.path for file in batch}
            gone = earlier[:most] + self._inventory.superseded(files, present)
            data = any(map(self._spool.is_loaded_with_ours, {*self.repository.entries, *present}.difference(gone)))
            readme = self._updated_card(progress, data)
            if missing or gone or readme is not None:
                self._commit(batch, gone, readme, content)
        return len(missing) - len(batch) + max(0, len(earlier) - most)

    def _updated_card(self, progress: str, data: bool) -> str | None:
        """The card as it should be with or without data files; None if it is so already, or cannot be updated."""
        try:
            before = None if self.repository.card is None else self.repository.card.decode()
            after = card.render(before, self.run, progress, self.address.folder, self.address.repo, data)
        except BrokenCard as exc:
            self._report_card(str(exc))
            return None
        except UnicodeDecodeError:
            self._report_card(f"{self.address} {card.NAME} is not UTF-8: it is left unchanged")
            return None
        self._card_problem = ""
        return after if after != before else None

    def _report_card(self, problem: str) -> None:
        """Report once why the card cannot be updated."""
        if problem != self._card_problem:
            self._card_problem = problem
            sdg.say(problem)

    def _commit(self, batch: list[HubFile], gone: list[str], readme: str | None, content: Content) -> None:
        """Upload and commit files, deletions and the card; without the card if the Hub refuses that."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added, deleted = counted(len(batch), "file"), counted(len(gone), "file")
        adds = [CommitOperationAdd(file.path, content.path(file)) for file in batch]
        operations: list[Any] = [*adds, *map(CommitOperationDelete, gone)]
        if readme is not None:
            operations.append(CommitOperationAdd(card.NAME, readme.encode()))
        if gone:
            sdg.say(f"deleting {deleted} from {self.address}: an earlier run wrote them, or others replace them")
        done = [f"add {added}"] * bool(batch) + [f"delete {deleted}"] * bool(gone)
        title = ", ".join(done).capitalize() or "Update the card"
        hashes = [add.upload_info.sha256.hex() for add in adds]
        self._ledger.remember_sent(hashes)
        try:
            self.repository.commit(operations, title)
        except json.JSONDecodeError:
            raise  # a response that was cut short
        except ValueError as exc:  # the Hub rejects the card's front matter
            if readme is None:
                raise sdg.OutputError(f"{self.address} refuses the files: {sdg.one_line(exc)}") from exc
            self._report_card(f"{self.address} refuses the card: {sdg.one_line(exc)}")
            if batch or gone:
                self._commit(batch, gone, None, content)
            return
        except Exception as exc:
            self._shrink(exc, len(batch) + len(gone))
            raise
        finally:
            self.quota.record_commit()
        self.quota.grow()
        if readme is not None:
            self.repository.card = readme.encode()
        self._inventory.committed(dict(zip(batch, hashes, strict=True)), gone)

    def _shrink(self, exc: Exception, files: int) -> None:
        """Make the next commit smaller if the failure may be due to the size of this one."""
        status = hub.http_status(exc)
        if status == 413 and files <= 1:
            message = f"{self.address}: even a commit of one file is too large: use a smaller --records-per-chunk"
            raise sdg.OutputError(message) from exc
        if status not in {409, 412, 429}:
            self.quota.shrink(files)

    # Rounds

    def finish(self, progress: Callable[[], str] = str) -> str:
        """Publish everything, the card included, and return the web page of the dataset.

        Raises:
            Error: a permanent error of the Hub; the files stay in the spool.
        """
        self.publish_all(progress)
        if self._card_problem:
            raise sdg.OutputError(f"all files are published on {self.url}, but not the card, as reported above")
        return self.url

    def publish_all(self, progress: Callable[[], str] = str) -> None:
        """Publish until nothing is left, and retry while the Hub is away; return early if the run is to stop.

        Raises:
            Error: a permanent error of the Hub; the files stay in the spool.
        """
        stopping, attempt, since, said = self.run.stopping, 0, time.monotonic(), -math.inf
        while not stopping.is_set():
            stopping.wait(self.quota.pause())
            try:
                if not self.publish(progress()):
                    return
                attempt, since = 0, time.monotonic()
            except Exception as exc:
                if isinstance(exc, sdg.Error):
                    raise
                if reason := hub.refusal(exc, self.address):
                    raise sdg.OutputError(reason) from exc
                if not hub.is_transient(exc):
                    raise
                now = time.monotonic()
                if now - since > hub.QUIET and now - said > REMINDER:
                    said = now
                    message = f"{hub.transient_message(exc)}; files wait in {self.run.output.root}"
                    sdg.say(f"{message} and are published later")
                stopping.wait(hub.pause_after(exc, attempt, LONGEST_WAIT))
                attempt += 1


def whole_groups(files: list[HubFile], most: int) -> list[HubFile]:
    """The first groups that have at most `most` files together; at least one group if `most` is positive."""
    batch: list[HubFile] = []
    for _, members in itertools.groupby(files, key=lambda file: file.group):
        group = list(members)
        if most <= 0 or (batch and len(batch) + len(group) > most):
            break
        batch += group
    return batch
