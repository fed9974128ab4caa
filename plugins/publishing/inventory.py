"""Compares the files that a run has written with those on the Hub, and knows whose the latter are."""

from __future__ import annotations

import os
from collections.abc import Iterator

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.publishing.ledger import Known, Ledger
from sdg_plugins.publishing.repository import RemoteEntry, Repository
from sdg_plugins.publishing.spool import Content, HubFile, Spool


class Inventory:
    """Which files of a run are on the Hub, and which files there are of an earlier run, or of someone else.

    Attributes:
        run_id: ID of the run, "" until it has begun.
    """

    def __init__(self, run: sdg.Run, repository: Repository, spool: Spool, ledger: Ledger) -> None:
        self._run, self._repository, self._spool, self._ledger = run, repository, spool, ledger
        self.run_id = ""

    @property
    def _to_delete(self) -> str:
        """The mark in the ledger of an earlier run's files, which this one deletes."""
        return f"before {self.run_id}"

    def identify_run(self) -> None:
        """Read which run this is. Raises UsageError if its published files have another --max-file-size."""
        if not self._spool.begun:
            return
        self.run_id = recorded.run_id(self._run.state)
        size = self._run.options.max_file_size
        first = self._ledger.setting(f"max_file_size of {self.run_id}", size)
        if first != size:
            raise sdg.UsageError(
                f"--max-file-size {size or 'is missing'}: the published files of this run were made with "
                f"{first or 'none'}: use the same, or start over with --fresh"
            )

    def claim(self, *, fresh: bool, record: bool) -> None:
        """Decide which files in the repository belong to this run.

        Args:
            fresh: files of an earlier run are to be deleted.
            record: remember the decision; otherwise only check.

        Raises:
            OutputError: files of another run, or of someone else, would be read together with those of this run.
        """
        files = self._spool.files() if self._spool.begun else {}
        earlier = []
        for path in self._repository.entries:
            name, known = self._spool.name_of(path), self._ledger.files.get(path)
            if known and known.run in {self._to_delete, known.run.removeprefix("before ")}:
                continue
            if path in files:
                if fresh and record:
                    self._ledger.remember(path, Known(self._to_delete))
                continue
            if name is None and self._spool.is_loaded_with_ours(path):
                raise sdg.OutputError(
                    f"{self._repository.address} has {path}, which sdg did not write, and which would be loaded "
                    "together with the rows of this run: choose another --output-config or --output"
                )
            if name and record and self._spool.has_chunk_of(name):  # ours, but the ledger was lost
                self._ledger.remember(path, Known(self.run_id, parts=(name,)))
            elif name and not (self._spool.begun and self._spool.has_chunk_of(name)):
                earlier.append(path)
        if earlier and not fresh:
            raise sdg.OutputError(
                f"{self._repository.address} has {earlier[0]}, but the state of its run is not here: choose another "
                "--output or --output-config, set --state-dir to that of the run, or delete its files with --fresh"
            )
        for path in earlier if record else []:
            self._ledger.remember(path, Known(self._to_delete))

    def missing(self, files: dict[str, HubFile], content: Content) -> list[HubFile]:
        """The files that are not on the Hub as they should be. Raises OutputError as `has` does."""
        with self._ledger.transaction():
            return [file for file in files.values() if not self._has(file, content)]

    def _has(self, file: HubFile, content: Content) -> bool:
        """True if the Hub has a file as it should be.

        Raises:
            OutputError: it has a file of that name which was not sent from here.
        """
        entry, known = self._repository.entries.get(file.path), self._ledger.files.get(file.path, Known(""))
        if entry is None:
            return False
        digest = known.hash if known.signature == file.signature else content.sha256(file)
        if entry.sha256 == digest or (not entry.sha256 and entry.git_hash == content.git_hash(file)):
            self._ledger.remember(file.path, Known(self.run_id, file.signature, digest, file.parts))
            return True
        if entry.sha256 and entry.sha256 not in self._ledger.sent and not known.run.startswith("before "):
            raise sdg.OutputError(
                f"{self._repository.address}: {file.path} was written by someone else, such as another run: choose "
                "another --output-config or --output, or delete the file there"
            )
        return False

    def of_earlier_runs(self, files: dict[str, HubFile]) -> list[str]:
        """Files on the Hub of the earlier runs that this one replaces with --fresh, unless it has one of that name."""

        def is_earlier(run: str) -> bool:
            return run == self._to_delete or (run != self.run_id and not run.startswith("before "))

        return [
            path
            for path, known in self._ledger.files.items()
            if is_earlier(known.run) and path in self._repository.entries and path not in files
        ]

    def superseded(self, files: dict[str, HubFile], present: set[str]) -> list[str]:
        """Files of this run on the Hub whose content is in other files by now, or was removed by the run.

        Args:
            files: what should be on the Hub.
            present: paths of those that are there, or will be with the next commit.
        """
        owner = {part: file.path for file in files.values() for part in file.parts}
        found = []
        for path, known in self._ledger.files.items():
            if known.run == self.run_id and path in self._repository.entries and path not in files:
                left = [part for part in known.parts if os.path.exists(self._run.output.path(part))]
                name = self._spool.name_of(path)
                if all(owner.get(part) in present for part in left) and name and self._spool.has_chunk_of(name):
                    found.append(path)
        return found

    def waiting(self) -> int:
        """How many files were written or changed since they were published, as far as the ledger knows."""
        self.identify_run()
        known = {path: file.signature for path, file in self._ledger.files.items() if file.run == self.run_id}
        return sum(known.get(file.path) != file.signature for file in self._spool.files().values())

    def committed(self, added: dict[HubFile, str], deleted: list[str]) -> None:
        """Take in a commit: the files that it added, with their SHA-256 hashes, and those that it deleted."""
        for file, digest in added.items():
            self._repository.entries[file.path] = RemoteEntry(digest, "")
            self._ledger.remember(file.path, Known(self.run_id, file.signature, digest, file.parts))
        for path in deleted:
            del self._repository.entries[path]
            self._ledger.forget(path)

    def discrepancies(self, content: Content) -> Iterator[str]:
        """All differences between what was written and what is on the Hub, a line each."""
        files, address = self._spool.files(), self._repository.address
        for file in files.values():
            try:
                there = self._has(file, content)
            except sdg.OutputError as exc:
                yield str(exc)
                continue
            if not there:
                yield f"{address}: {file.path} is missing or differs: `sdg.py card` publishes it"
        for path in self._repository.entries:
            if path not in files and (self._spool.name_of(path) or self._spool.is_loaded_with_ours(path)):
                yield f"{address}: {path} does not belong to a finished chunk"
