"""Compares the files that a run has written with those on the Hub, and knows whose the latter are."""

from __future__ import annotations

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

    @property
    def is_here(self) -> bool:
        """True if the repository has a file that this run has published."""
        return any(
            known.run == self.run_id and path in self._repository.entries for path, known in self._ledger.files.items()
        )

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
        digest = known.hash if known.signature == file.signature else content.hash(file)
        git_hash = "" if entry.hash else content.git_hash(file)
        if entry.hash == digest or (not entry.hash and entry.git_hash == git_hash):
            self._ledger.remember(file.path, Known(self.run_id, file.signature, digest, file.parts, git_hash))
            return True
        if entry.hash and entry.hash not in self._ledger.sent and not known.run.startswith("before "):
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
                due = [part for part in known.parts if self._spool.is_due(part)]
                if self._spool.name_of(path) and all(owner.get(part) in present for part in due):
                    found.append(path)
        return found

    def kept(self) -> dict[str, Known]:
        """Published files with parts that were deleted from the spool; call `Spool.files` before."""
        return self._spool.incomplete(self.run_id, self._spool.signatures)

    def confirmed(self) -> set[str]:
        """Files deleted from the spool whose content is on the Hub as it was published; call `Spool.files` before."""
        entries, here = self._repository.entries, self._spool.signatures
        return {
            part
            for path, known in self.kept().items()
            if path in entries and (known.hash or known.git_hash) and entries[path].is_of(known)
            for part in known.parts
            if part not in here
        }

    def faults(self) -> Iterator[str]:
        """What is wrong with files that cannot be made again, a line each; call `Spool.files` before."""
        address, signatures = self._repository.address, self._spool.signatures
        for path, known in self.kept().items():
            entry = self._repository.entries.get(path)
            gone = next(part for part in known.parts if part not in signatures)
            if entry is None or not entry.is_of(known):
                what = "is missing or was changed there"
                yield f"{address}: {path} {what}, and cannot be published again without {self._run.output.path(gone)}"
            sizes = known.signature.split()[::2]
            for part, size in zip(known.parts, sizes, strict=False):
                if signatures.get(part, size).split()[0] != size:
                    changed = f"{part} has changed since it was published in {path}"
                    yield f"{address}: {changed}, which cannot be made again without {self._run.output.path(gone)}"
        for name in self._spool.unknown:
            path = self._run.output.path(name)
            yield f"{address}: {path} is gone, and it is not known in which file it was published: restore it"

    def waiting(self) -> int:
        """How many files were written or changed since they were published, as far as the ledger knows."""
        self.identify_run()
        known = {path: file.signature for path, file in self._ledger.files.items() if file.run == self.run_id}
        return sum(known.get(file.path) != file.signature for file in self._spool.files().values())

    def committed(self, added: dict[HubFile, RemoteEntry], deleted: list[str]) -> None:
        """Take in a commit: the files that it added, and those that it deleted."""
        for file, entry in added.items():
            self._repository.entries[file.path] = entry
            known = Known(self.run_id, file.signature, entry.hash or "", file.parts, entry.git_hash)
            self._ledger.remember(file.path, known)
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
        yield from self.faults()
        kept = self.kept()
        for path in self._repository.entries:
            if (
                path not in files
                and path not in kept
                and (self._spool.name_of(path) or self._spool.is_loaded_with_ours(path))
            ):
                yield f"{address}: {path} does not belong to a finished chunk"
