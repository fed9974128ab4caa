"""Publishes what a run has written to the Hugging Face Hub: many files and the card in one commit.

Only the head of the repository counts. Each round lists the files there, compares them with those of the spool, and
commits the difference, on condition that the head has not moved since. So a round can be interrupted, repeated, or
race with that of another publisher, and each file is published once. The first commit of a run always has that
condition: of two runs that begin at the same time one finds the files of the other, and ends. What is remembered on
disk (`published.sqlite3`) saves reading files again, and distinguishes files of earlier runs from those of others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.published import record
from sdg_plugins.publishing import card
from sdg_plugins.publishing.bucket import open_repository
from sdg_plugins.publishing.front_matter import BrokenCard
from sdg_plugins.publishing.inventory import Inventory
from sdg_plugins.publishing.ledger import Ledger
from sdg_plugins.publishing.quota import CommitQuota
from sdg_plugins.publishing.repository import RemoteEntry, Upload
from sdg_plugins.publishing.spool import Content, HubFile, Spool, clear_scratch

MOST_CHUNKS = 95_000  # files of a run without a warning: the Hub accepts 100,000 in a repository
CONFLICTS = 10  # commits of others that overtake ours before a longer wait
LONGEST_WAIT = 600.0  # s between two attempts, unless the Hub asks for more
QUICK_WAIT = 10.0  # s between two attempts after conflicts with commits of others
SOON = 5.0  # s without success after which an outage is reported
REMINDER = 600.0  # s between two messages about an outage


class Plan(NamedTuple):
    """What the next commit does."""

    batch: list[HubFile]  # added, or replaced
    gone: list[str]  # deleted
    readme: str | None  # the card, if it changes
    left: int  # files for later commits
    is_new: bool  # only files are added that do not exist: nothing of others can be overwritten


class Publisher:
    """Publishes in rounds, each of which makes one commit; see the top of this module.

    Args:
        run: with an `hf://` output; of its state, only `published.sqlite3` is written.

    Raises:
        UsageError: the output is not an address to which a run can publish.
    """

    def __init__(self, run: sdg.Run) -> None:
        self.run = run
        self.repository = open_repository(run.options.output)
        self.address = self.repository.address
        self.quota = CommitQuota()
        run.state.mkdir(parents=True, exist_ok=True)
        clear_scratch(run.state)
        self._ledger = Ledger(run.state / "published.sqlite3")
        self._spool = Spool(run, self.address.folder, self._ledger)
        self._inventory = Inventory(run, self.repository, self._spool, self._ledger)
        self._prepared = False
        self._card_problem = ""  # why the card cannot be brought up to date
        self._said = -math.inf  # time of the last message about an outage
        self._kept = ""  # what was said of files whose parts were deleted from the spool

    @property
    def url(self) -> str:
        """The web page of the dataset or bucket."""
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
        if not make and (options.fresh or not self._spool.begun):
            card.check_others((self.repository.card or b"").decode(errors="replace"), self.run, self.address.folder)
        if (files := self._spool.expected() if self._spool.begun else 0) > MOST_CHUNKS:
            sdg.say(
                f"this run makes about {files:,} files, and the Hub accepts 100,000 in a repository: "
                "start over with --max-file-size 500MB, or with a larger --records-per-chunk"
            )
        self._prepared = True

    def waiting(self) -> int:
        """How many files were written or changed since they were published, as far as is known without the Hub."""
        return self._inventory.waiting()

    def reconcile(self) -> tuple[list[str], set[str]]:
        """Compare what was written with what is on the Hub.

        Returns:
            All differences, a line each, and the files that were deleted from the spool and are on the Hub unchanged.
        """
        hub.patiently(lambda: self.repository.refresh(self._spool.folders), self.address, self.run.stopping)
        self._inventory.identify_run()
        with contextlib.closing(Content(self.run, self.repository.hash_of)) as content:
            return list(self._inventory.discrepancies(content)), self._inventory.confirmed()

    # A round

    def publish(self, progress: str | None = "") -> int:
        """Commit files that are missing on the Hub, delete those that have been replaced, and update the card.

        Files are merged, hashed and uploaded first, so that little time passes between the last look at the repository
        and the commit. After a conflict only these two are repeated.

        Args:
            progress: markdown for the card; None leaves the card as it is.

        Returns:
            The number of files left for further rounds.

        Raises:
            Exception: of the Hub's client. The next round finds out whether the commit was made.
        """
        hub.set_timeout()
        if not self._prepared:
            self.prepare()
        self._inventory.identify_run()
        files = self._spool.files()
        uploads: dict[str, Upload] = {}
        conflicts = 0
        with contextlib.closing(Content(self.run, self.repository.hash_of)) as content:
            while plan := self._plan(files, content, progress):
                if new := [file for file in plan.batch if file.path not in uploads]:
                    uploads |= self._upload(new, content)
                    continue
                alone = conflicts > 0 and plan.is_new and self._inventory.is_here
                try:
                    self._commit(plan._replace(readme=None) if alone else plan, uploads, content, onto_any_head=alone)
                except Exception as exc:
                    conflicts += 1
                    if hub.http_status(exc) not in {409, 412} or conflicts > CONFLICTS or self.run.stopping.is_set():
                        raise
                    self.run.stopping.wait(random.uniform(0, min(5.0, 0.1 * 2**conflicts)))
                    continue
                return plan.left + alone  # what is left includes the card
        return 0

    def _plan(self, files: dict[str, HubFile], content: Content, progress: str | None) -> Plan | None:
        """Look at the repository, and decide what to commit; None if there is nothing."""
        self.repository.refresh(self._spool.folders)
        if not self._inventory.is_here:  # another run may have begun since `prepare`
            self._inventory.claim(fresh=False, record=False)
        missing = self._inventory.missing(files, content)
        earlier = self._inventory.of_earlier_runs(files)
        most = self.quota.files_for(len(missing) + len(earlier))
        batch = whole_groups(missing, max(0, most - len(earlier)))
        present = files.keys() - {file.path for file in missing} | {file.path for file in batch}
        gone = earlier[:most] + self._inventory.superseded(files, present)
        there = self.repository.entries
        data = any(map(self._spool.is_loaded_with_ours, {*there, *present}.difference(gone)))
        readme = self._updated_card(progress, data)
        if not (missing or gone or readme is not None):
            return None
        left = len(missing) - len(batch) + max(0, len(earlier) - most)
        is_new = bool(batch) and not gone and all(file.path not in there for file in batch)
        return Plan(batch, gone, readme, left, is_new)

    def _upload(self, files: list[HubFile], content: Content) -> dict[str, Upload]:
        """Upload the content of files; returns the uploads by path."""
        try:
            return self.repository.upload({file.path: content.path(file) for file in files})
        except Exception as exc:
            self._shrink(exc, len(files))
            raise

    def _report_kept(self) -> None:
        """Report once which files on the Hub can no longer be compared with the spool, or made again."""
        if kept := self._inventory.kept():
            said = f"{counted(len(kept), 'file')} of {self.address}, such as {next(iter(kept))}"
            if said != self._kept:
                self._kept = said
                sdg.say(f"{said}, had parts that are no longer in {self.run.output.root}: they stay as they are")

    def _updated_card(self, progress: str | None, data: bool) -> str | None:
        """The card as it should be with or without data files; None if it is so already, or cannot be updated."""
        if progress is None:
            return None
        try:
            before = None if self.repository.card is None else self.repository.card.decode()
            name = f"buckets/{self.address.repo}" if self.address.kind == "bucket" else self.address.repo
            after = card.render(before, self.run, progress, self.address.folder, name, data)
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

    def _commit(self, plan: Plan, uploads: dict[str, Upload], content: Content, *, onto_any_head: bool) -> None:
        """Commit uploaded files, deletions and the card; without the card if the Hub refuses that."""
        batch, gone, readme = plan.batch, plan.gone, plan.readme
        added, deleted = counted(len(batch), "file"), counted(len(gone), "file")
        if gone:
            sdg.say(f"deleting {deleted} from {self.address}: an earlier run wrote them, or others replace them")
        done = [f"add {added}"] * bool(batch) + [f"delete {deleted}"] * bool(gone)
        title = ", ".join(done).capitalize() or "Update the card"
        entries = {file: RemoteEntry(uploads[file.path].hash, content.git_hash(file)) for file in batch}
        self._ledger.remember_sent([str(entry.hash) for entry in entries.values()])
        try:
            ready = [uploads[file.path] for file in batch]
            self.repository.commit(ready, gone, readme, title, onto_any_head=onto_any_head)
        except json.JSONDecodeError:
            raise  # a response that was cut short
        except ValueError as exc:  # the Hub rejects the card's front matter
            if readme is None:
                raise sdg.OutputError(f"{self.address} refuses the commit: {sdg.one_line(exc)}") from exc
            if batch or gone:  # fails if the card was not the reason
                self._commit(plan._replace(readme=None), uploads, content, onto_any_head=onto_any_head)
            self._report_card(f"{self.address} refuses the card: {sdg.one_line(exc)}")
            return
        except Exception as exc:
            self._shrink(exc, len(batch) + len(gone))
            raise
        finally:
            self.quota.record_commit()
        self.quota.grow()
        self._inventory.committed(entries, gone)

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
        if self.run.stopping.is_set():
            return self.url
        self._report_kept()
        if faults := list(self._inventory.faults()):
            more = f" (and {len(faults) - 1:,} more: see `sdg.py verify`)" if len(faults) > 1 else ""
            raise sdg.OutputError(f"{faults[0]}{more}")
        if self._card_problem:
            raise sdg.OutputError(f"all files are published on {self.url}, but not the card, as reported above")
        return self.url

    def publish_all(self, progress: Callable[[], str | None] = str) -> None:
        """Publish until nothing is left, and retry while the Hub is away; return early if the run is to stop.

        Raises:
            Error: a permanent error of the Hub; the files stay in the spool.
        """
        stopping, attempt, since = self.run.stopping, 0, time.monotonic()
        while not stopping.is_set():
            if pause := self.quota.pause():
                self._wait(pause, "all commits of this hour are used up", since=-math.inf)
            try:
                if not self.publish(progress()):
                    record(self.run.state, interval=self.run.options.publish_interval)
                    return
                attempt, since, self._said = 0, time.monotonic(), -math.inf
            except Exception as exc:
                if isinstance(exc, sdg.Error):
                    raise
                if reason := hub.refusal(exc, self.address):
                    raise sdg.OutputError(reason) from exc
                if not hub.is_transient(exc):
                    raise
                pause = hub.pause_after(exc, attempt, QUICK_WAIT if hub.is_conflict(exc) else LONGEST_WAIT)
                self._wait(pause, hub.transient_message(exc), since)
                attempt += 1

    def _wait(self, pause: float, problem: str, since: float) -> None:
        """Wait; say so, and record it, unless it is over within seconds.

        Args:
            pause: in s.
            problem: why.
            since: time of the first failure.
        """
        now = time.monotonic()
        if now + pause - since > SOON:
            until = time.time() + pause
            record(self.run.state, problem=problem, until=until)
            if now - self._said > REMINDER:
                self._said = now
                when = time.strftime("%H:%M:%S", time.localtime(until))
                sdg.say(f"{problem}; files wait in {self.run.output.root}, and are published later: next try at {when}")
        self.run.stopping.wait(pause)


def whole_groups(files: list[HubFile], most: int) -> list[HubFile]:
    """The first groups that have at most `most` files together; at least one group if `most` is positive."""
    batch: list[HubFile] = []
    for _, members in itertools.groupby(files, key=lambda file: file.group):
        group = list(members)
        if most <= 0 or (batch and len(batch) + len(group) > most):
            break
        batch += group
    return batch
