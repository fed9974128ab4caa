"""Publishes what a run has written to the Hugging Face Hub: many files and the card in one commit.

The Hub's head is what counts. Each round lists what is there, compares it with the files of the spool, and commits what
differs, on the condition that the head is still the one that was looked at. So a round can be broken off, be done
twice, or race with another publisher's, and every file is there once. What is remembered on disk (`published.sqlite3`)
only saves reading files again, and tells files of an earlier run from those that are not ours.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.publishing import card, hub
from sdg_plugins.publishing.front_matter import BrokenCard
from sdg_plugins.publishing.ledger import Known, Ledger
from sdg_plugins.publishing.spool import Content, Item, Spool, clear_scratch

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

HOUR = 3600.0  # s
COMMITS = 100  # an hour: of an account the Hub takes about 128 (users' reports), and people want some, too
FILES = 100  # of a commit, as the Hub advises…
MOST_FILES = 1000  # … unless there would have to be too many commits
MOST_CHUNKS = 95_000  # files of a repository: the Hub takes 100,000
LONGEST_WAIT = 600.0  # s between two attempts, unless the Hub asks for more
WORD = 600.0  # s between two words on a Hub that is away


class Entry(NamedTuple):
    """A file as it is on the Hub."""

    sha256: str | None  # of a large file…
    blob: str  # … of any other git's hash


class Publisher:
    """One look after the other at what is written and what is on the Hub; see the top of this module.

    Args:
        run: with an `hf://` output; its state is read only.
    """

    def __init__(self, run: sdg.Run) -> None:
        self.run = run
        self.address = hub.parse_address(run.options.output)
        if self.address.revision:
            raise sdg.UsageError(f"{run.options.output}: a run publishes to `main`, leave @{self.address.revision} out")
        self.api = hub.connect()
        run.state.mkdir(parents=True, exist_ok=True)
        clear_scratch(run.state)
        self._ledger = Ledger(run.state / "published.sqlite3")
        self._spool = Spool(run, self.address.folder, self._ledger)
        self._head = ""
        self._past: set[str] = set()  # heads that we have replaced: a replica may lag behind
        self._there: dict[str, Entry] = {}
        self._readme: bytes | None = None
        self._run_id = ""
        self.private = True
        self._prepared = False
        self._commits: deque[float] = deque()  # when, of the last hour
        self._files = FILES
        self.broken_card = ""  # why the card cannot be brought up to date
        self.published = 0  # files, by this process

    @property
    def url(self) -> str:
        """Where people look at the dataset."""
        return f"{self.api.endpoint}/datasets/{self.address.repo}"

    def close(self) -> None:
        """Close what is open."""
        self._ledger.close()

    # The repository

    def prepare(self, *, make: bool = True) -> None:
        """See that the repository is there, may be written, and has no rows but this run's where these belong.

        Args:
            make: the repository, if it is missing; False also means that nothing has begun: only look.

        Raises:
            UsageError: there is no token, or files of another size were begun with.
            OutputError: it has files of such a run.
            Exception: of the Hub's client.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import RepositoryNotFoundError

        hub.set_timeout()
        options, repo = self.run.options, self.address.repo
        if not hub.has_token():
            raise sdg.UsageError(f"--output {options.output}: there is no token; set HF_TOKEN, or run `hf auth login`")
        me = self.api.whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise sdg.OutputError(
                f"--output {options.output}: the token may only read; make one with the right to write"
            )
        try:
            self.private = bool(self.api.dataset_info(repo, expand=["sha", "private"], timeout=60).private)
        except RepositoryNotFoundError:
            self.private = not options.output_public
            if not make:
                self._check_owner(me)
                return
            self.api.create_repo(repo, repo_type="dataset", private=self.private, exist_ok=True)
        # Asks what kind of file this would be, which only those who may write get answered.
        self.api.preupload_lfs_files(repo, [CommitOperationAdd("README.md", b"\n")], repo_type="dataset")
        self._look()
        if make or not options.fresh:
            self._settle()
        self._claim_strangers(options.fresh, claim=make)
        if (files := self._spool.expected() if self._spool.begun else 0) > MOST_CHUNKS:
            sdg.say(
                f"this run makes about {files:,} files, and the Hub takes 100,000 of a repository: begin it anew "
                "with --max-file-size 500MB, or with more --records-per-chunk"
            )
        self._prepared = True

    def _check_owner(self, me: dict[str, Any]) -> None:
        """See that the repository can be made, later: a run that fails at once should leave none."""
        owners = [str(me.get("name")), *(str(org.get("name")) for org in me.get("orgs", []))]
        if self.address.repo.partition("/")[0] not in owners:
            raise sdg.OutputError(
                f"there is no {self.address}, or no right to it: HF_TOKEN can make datasets of {', '.join(owners)}"
            )

    def _claim_strangers(self, fresh: bool, claim: bool) -> None:
        """Refuse to mix with rows that are not this run's; --fresh is to delete those of an earlier run."""
        items = self._spool.items() if self._spool.begun else {}
        before = f"before {self._run_id}"
        strangers = []
        for path in self._there:
            name, known = self._spool.name_of(path), self._ledger.files.get(path)
            if known and known.run in {before, known.run.removeprefix("before ")}:
                continue
            if path in items:
                if fresh and claim:
                    self._ledger.put(path, Known(before))
                continue
            if name is None and self._spool.is_read_with_ours(path):
                raise sdg.OutputError(
                    f"{self.address} has {path}, which is not of sdg, and would be read together with this run's rows: "
                    "choose another --output-config or --output"
                )
            if name and claim and self._spool.has_chunk_of(name):  # ours, and forgotten
                self._ledger.put(path, Known(self._run_id, parts=(name,)))
            elif name and not (self._spool.begun and self._spool.has_chunk_of(name)):
                strangers.append(path)
        if strangers and not fresh:
            raise sdg.OutputError(
                f"{self.address} has {strangers[0]}, but no state of its run is here: choose another --output or "
                "--output-config, name the run's --state-dir, or --fresh, which deletes an earlier run's files"
            )
        for path in strangers if claim else []:
            self._ledger.put(path, Known(before))

    def _settle(self) -> None:
        """Learn which run this is, and keep to what its files were begun with."""
        if not self._spool.begun:
            return
        self._run_id = str(recorded.record_of(self.run.state)["run"])
        mine = self.run.options.max_file_size
        settled = self._ledger.setting(f"max_file_size of {self._run_id}", mine)
        if settled != mine:
            raise sdg.UsageError(
                f"--max-file-size {mine or 'is missing'}: the published files of this run were made with "
                f"{settled or 'none'}; take that, or --fresh to start over"
            )

    def _look(self) -> None:
        """Read the head, and if others have moved it what is there."""
        head = str(self.api.dataset_info(self.address.repo, revision="main", expand=["sha"], timeout=60).sha)
        if head == self._head or head in self._past:
            return
        entries = [hub.list_files(self.api, self.address.repo, folder, head) for folder in self._spool.folders]
        self._there = {file.path: entry_of(file) for files in entries for file in files}
        self._readme = hub.read_bytes(self.api, self.address.repo, card.NAME, head)
        self._head = head

    def waiting(self) -> int:
        """How many files have been written or changed since they were published, as far as is known here."""
        self._settle()
        known = {path: file.signature for path, file in self._ledger.files.items() if file.run == self._run_id}
        return sum(known.get(item.path) != item.signature for item in self._spool.items().values())

    # A round

    def publish(self, progress: str = "", *, card_too: bool = True) -> int:
        """Make one commit of what is missing, if anything is.

        Args:
            progress: markdown for the card.
            card_too: also if there is nothing but the card to bring up to date.

        Returns:
            Files that are still missing: another round is due.

        Raises:
            Exception: of the Hub's client. The next round finds out what has happened.
        """
        hub.set_timeout()
        if not self._prepared:
            self.prepare()
        self._look()
        self._settle()
        items = self._spool.items()
        with contextlib.closing(Content(self.run)) as content:
            with self._ledger.together():
                missing = [item for item in items.values() if not self._is_there(item, content)]
            foreign = [path for path in self._ledger.files if self._is_of_others(path, items)]
            most = self._most(len(missing) + len(foreign))
            batch = whole_groups(missing, max(0, most - len(foreign)))
            present = items.keys() - {item.path for item in missing} | {item.path for item in batch}
            gone = foreign[:most] + self._replaced(items, present)
            readme = self._card(progress) if missing or gone or card_too else None
            if missing or gone or readme is not None:
                self._commit(batch, gone, readme, content)
        return len(missing) - len(batch) + max(0, len(foreign) - most)

    def discrepancies(self) -> Iterator[str]:
        """What is not on the Hub as it was written here, a line each."""
        hub.patiently(self._look, self.address, self.run.stopping)
        self._settle()
        items = self._spool.items()
        with contextlib.closing(Content(self.run)) as content:
            for item in items.values():
                try:
                    there = self._is_there(item, content)
                except sdg.OutputError as problem:
                    yield str(problem)
                    continue
                if not there:
                    yield f"{self.address}: {item.path} is not there as it was written: `sdg.py card` publishes it"
        for path in self._there:
            if path not in items and (self._spool.name_of(path) or self._spool.is_read_with_ours(path)):
                yield f"{self.address}: {path} belongs to no finished chunk"

    def _is_there(self, item: Item, content: Content) -> bool:
        """Whether the Hub has the file as it should be.

        Raises:
            OutputError: it has one that was never sent from here.
        """
        entry, known = self._there.get(item.path), self._ledger.files.get(item.path, Known(""))
        if entry is None:
            return False
        digest = known.hash if known.signature == item.signature else content.sha256(item)
        if entry.sha256 == digest or (not entry.sha256 and entry.blob == content.git_hash(item)):
            self._ledger.put(item.path, Known(self._run_id, item.signature, digest, item.parts))
            return True
        if entry.sha256 and entry.sha256 not in self._ledger.sent and not known.run.startswith("before "):
            raise sdg.OutputError(
                f"{self.address}: {item.path} was written by somebody else, such as another run: give this one an "
                "--output-config or --output of its own, or delete the file there"
            )
        return False

    def _is_of_others(self, path: str, items: dict[str, Item]) -> bool:
        """Whether a file there is of an earlier run, in the place of which this one began with --fresh."""
        run = self._ledger.files[path].run
        earlier = run == f"before {self._run_id}" or (run != self._run_id and not run.startswith("before "))
        return earlier and path in self._there and path not in items

    def _replaced(self, items: dict[str, Item], present: set[str]) -> list[str]:
        """Files of this run that others have taken the place of: what they held is there, or was undone by the run."""
        owner = {part: item.path for item in items.values() for part in item.parts}
        found = []
        for path, known in self._ledger.files.items():
            if known.run == self._run_id and path in self._there and path not in items:
                left = [part for part in known.parts if os.path.exists(self.run.output.path(part))]
                name = self._spool.name_of(path)
                if all(owner.get(part) in present for part in left) and name and self._spool.has_chunk_of(name):
                    found.append(path)
        return found

    def _card(self, progress: str) -> str | None:
        """The card as it should be; None if it is so, or cannot be."""
        try:
            there = None if self._readme is None else self._readme.decode()
            text = card.render(there, self.run, progress, self.address.folder, self.address.repo)
        except (BrokenCard, UnicodeDecodeError) as problem:
            broken = isinstance(problem, BrokenCard)
            self._give_up_card(
                str(problem) if broken else f"{self.address} {card.NAME} is not UTF-8: it is left as it is"
            )
            return None
        self.broken_card = ""
        return text if text != there else None

    def _give_up_card(self, problem: str) -> None:
        if problem != self.broken_card:
            self.broken_card = problem
            sdg.say(f"{problem}")

    def _most(self, files: int) -> int:
        """How many files to put into a commit: more, if the commits that are left of this hour would not do."""
        now = time.monotonic()
        while self._commits and now - self._commits[0] > HOUR:
            self._commits.popleft()
        if self._files < FILES:  # the Hub had trouble with as many
            return self._files
        return min(MOST_FILES, max(FILES, math.ceil(files / max(1, COMMITS - len(self._commits)))))

    def quota_pause(self) -> float:
        """Seconds until the next commit is due, so that an hour has no more than the Hub takes."""
        return max(0.0, self._commits[0] + HOUR - time.monotonic()) if len(self._commits) >= COMMITS else 0.0

    def _commit(self, batch: list[Item], gone: list[str], readme: str | None, content: Content) -> None:
        """Upload, and commit on top of the head that was looked at."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        adds = [CommitOperationAdd(item.path, content.path(item)) for item in batch]
        operations: list[Any] = [*adds, *map(CommitOperationDelete, gone)]
        if readme is not None:
            operations.append(CommitOperationAdd(card.NAME, readme.encode()))
        if gone:
            sdg.say(f"{files(len(gone))} of an earlier run, or made otherwise now: deleted from {self.address}")
        done = [f"Add {files(len(batch))}"] * bool(batch) + [f"delete {files(len(gone))}"] * bool(gone)
        title = ", ".join(done).capitalize() or "Update the card"
        self._ledger.sending([add.upload_info.sha256.hex() for add in adds])
        try:
            commit = self.api.create_commit(
                self.address.repo, operations, repo_type="dataset", commit_message=title, parent_commit=self._head
            )
        except json.JSONDecodeError:
            raise  # an answer that was cut short
        except ValueError as problem:  # what the Hub's check of the card's front matter says
            if readme is None:
                raise sdg.OutputError(
                    f"{self.address} refuses the files: {' '.join(str(problem).split())}"
                ) from problem
            self._give_up_card(f"{self.address} refuses the card: {' '.join(str(problem).split())}")
            return self._commit(batch, gone, None, content) if batch or gone else None
        except Exception as problem:
            self._try_fewer(problem, len(batch) + len(gone))
            raise
        finally:  # not before: by the Hub's clock it is an hour from when it came there
            self._commits.append(time.monotonic())
        self._past.add(self._head)
        self._head = commit.oid
        self._files = min(FILES, 2 * self._files)
        self._readme = self._readme if readme is None else readme.encode()
        self._landed({item: add.upload_info.sha256.hex() for item, add in zip(batch, adds, strict=True)}, gone)
        return None

    def _landed(self, batch: dict[Item, str], gone: list[str]) -> None:
        """Remember what a commit has changed: files with their hashes, and files that it deleted."""
        for item, digest in batch.items():
            self._there[item.path] = Entry(digest, "")
            self._ledger.put(item.path, Known(self._run_id, item.signature, digest, item.parts))
        for path in gone:
            del self._there[path]
            self._ledger.forget(path)
        self.published += len(batch)

    def _try_fewer(self, problem: Exception, number: int) -> None:
        """After a failure that may be due to the size of a commit, make the next one smaller."""
        status = getattr(getattr(problem, "response", None), "status_code", 500)
        if status == 413 and number <= 1:
            message = f"{self.address}: even a commit of one file is too large: fewer --records-per-chunk"
            raise sdg.OutputError(message) from problem
        if status == 412:
            self._past.clear()  # somebody may have moved the branch back to one of them
        if status not in {409, 412, 429}:
            self._files = max(1, min(self._files, number) // 2)

    def finish(self, progress: Callable[[], str] = str) -> str:
        """Publish all there is, the card included, and return where people look at it.

        Raises:
            Error: the Hub refuses something; what is written stays where it is.
        """
        self.publish_all(progress)
        if self.broken_card:
            raise sdg.OutputError(f"all files are published on {self.url}, but not the card, as said above")
        return self.url

    def publish_all(self, progress: Callable[[], str] = str, *, card_too: bool = True) -> None:
        """Publish all there is, and wait as long as the Hub is away; gives up when the run is told to stop.

        Raises:
            Error: the Hub refuses; what is written stays where it is.
        """
        stopping, attempt, away, told = self.run.stopping, 0, time.monotonic(), -math.inf
        while not stopping.is_set():
            stopping.wait(self.quota_pause())
            try:
                if not self.publish(progress(), card_too=card_too):
                    return
                attempt, away = 0, time.monotonic()
            except Exception as problem:
                if isinstance(problem, sdg.Error):
                    raise
                if reason := hub.refusal(problem, self.address):
                    raise sdg.OutputError(reason) from problem
                if not hub.is_passing(problem):
                    raise
                now = time.monotonic()
                if now - away > hub.QUIET and now - told > WORD:
                    told = now
                    sdg.say(f"{hub.describe(problem)}; files wait in {self.run.output.root} and are published later")
                stopping.wait(hub.pause_after(problem, attempt, LONGEST_WAIT))
                attempt += 1


def files(number: int) -> str:
    """So many files."""
    return f"{number:,} file{'s' * (number != 1)}"


def whole_groups(items: list[Item], most: int) -> list[Item]:
    """The first groups that have at most so many files together, but at least one if any file is wanted."""
    batch: list[Item] = []
    for _, members in itertools.groupby(items, key=lambda item: item.group):
        group = list(members)
        if most <= 0 or (batch and len(batch) + len(group) > most):
            break
        batch += group
    return batch


def entry_of(file: RepoFile) -> Entry:
    """A file as a listing has it."""
    return Entry(file.lfs.sha256 if file.lfs else None, file.blob_id)
