"""The files that a run has written for the Hub: they wait in the folder `spool` of its state, and may be merged."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.state import chunk_files, chunk_of, file_patterns
from sdg_plugins.common.statistics import statistics_of
from sdg_plugins.publishing.ledger import Ledger

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = 9000  # chunks per folder: the Hub accepts 10,000 files in one
SCRATCH = f"publishing-{platform.node()}-"  # prefix of folders for merged files, before the ID of their process
ROW_GROUP = 128 << 20  # bytes of a row group in merged files, as Arrow counts them


class HubFile(NamedTuple):
    """A file as it should be on the Hub: one of the spool, or several of them merged."""

    path: str  # in the repository
    parts: tuple[str, ...]  # names in the spool
    signature: str  # sizes and times of the parts: changes when their content does
    group: str  # files of a group share chunks, so they are committed together or not at all


class Spool:
    """The files that a run has written, and the files that they should become on the Hub."""

    def __init__(self, run: sdg.Run, folder: str, ledger: Ledger) -> None:
        self.run, self.folder, self._ledger = run, folder, ledger
        self._size = run.options.max_file_size

    @property
    def begun(self) -> bool:
        """True if the run has begun."""
        return (self.run.state / "run.json").exists()

    @property
    def folders(self) -> list[str]:
        """The folders of the repository to which the run's files belong."""
        paths = (self.run.path_of(sdg.Chunk(0, 0)), self.run.failed_path_of(sdg.Chunk(0, 0)))
        return [self._in_folder(os.path.dirname(path)) for path in paths]

    def is_loaded_with_ours(self, path: str) -> bool:
        """True if `load_dataset` would take a file of the repository for one of this config."""
        inside = self._inside(path)
        config, suffix = f"{self.run.options.output_config}/", os.path.splitext(self.run.options.output_filename)[1]
        return inside.startswith(config) and inside.endswith(suffix)

    def name_of(self, path: str) -> str | None:
        """The name in the spool of a file in the repository (of its first part if it is merged); None for any other."""
        inside = self._inside(path)
        for name in (inside, re.sub(r"/\d{5}/([^/]+)$", r"/\1", inside)):
            if self._index(name) is not None and self._path(name) == path:
                return name
        return None

    def has_chunk_of(self, name: str) -> bool:
        """True if the spool has the chunk to which a file belongs."""
        return os.path.exists(self.run.output.path(self.run.path_of(sdg.Chunk(self._index(name) or 0, 0))))

    def _index(self, name: str) -> int | None:
        """The index of the chunk to which a file of the spool belongs; None for any other file."""
        return chunk_of(name, self.run.options.output_config, self.run.options.output_filename)

    def _path(self, name: str) -> str:
        """The path in the repository for a file of the spool: many chunks are spread over several folders."""
        part = (self._index(name) or 0) // FOLDER
        folder, _, base = name.rpartition("/")
        return self._in_folder(f"{folder}/{part:05d}/{base}" if part else name)

    def _in_folder(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _inside(self, path: str) -> str:
        return path.removeprefix(f"{self.folder}/") if self.folder else path

    def files(self) -> dict[str, HubFile]:
        """All files that should be on the Hub by now, by path."""
        signatures: dict[str, str] = {}
        data: dict[int, str] = {}
        grouped: list[tuple[str, tuple[str, ...]]] = []
        config, template = self.run.options.output_config, self.run.options.output_filename
        rows, _ = file_patterns(config, template)
        for name in chunk_files(self.run, config, template):
            status = os.stat(self.run.output.path(name))
            signatures[name] = f"{status.st_size} {status.st_mtime_ns}"
            if found := rows.fullmatch(name):
                data[int(found[1])] = name
            else:
                grouped.append((name, (name,)))
        if self._size:
            grouped += self._merged(data, signatures)
        else:
            grouped += ((data[index], (data[index],)) for index in sorted(data))
        files = [
            HubFile(self._path(parts[0]), parts, " ".join(signatures[part] for part in parts), group)
            for group, parts in grouped
        ]
        return {file.path: file for file in files}

    def _merged(self, data: dict[int, str], signatures: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Groups, each a range of a rank's chunks, and the parts of each file of a group, of at most --max-file-size.

        A range is published when all its chunks are written, or its rank has finished. Its width follows from the
        sizes of the first chunks and is kept in the ledger, so that a rerun makes the same files.
        """
        world = self.run.options.world_size
        sizes = {index: int(signatures[name].partition(" ")[0]) for index, name in data.items()}
        if not sizes:
            return
        mean = sum(sizes.values()) / len(sizes)
        run = recorded.run_id(self.run.state)
        width = self._ledger.setting(f"chunks_of_a_file of {run}", max(1, int(0.8 * self._size / max(1, mean))))
        over = {number for number, record in enumerate(self._records()) if record.get("status") == "finished"}
        ranges: dict[tuple[int, int], list[int]] = {}
        for index in sorted(data):
            ranges.setdefault((index % world, index // world // width), []).append(index)
        for (rank, number), chunks in ranges.items():
            if len(chunks) == width or rank in over:
                yield from ((f"{rank} {number}", parts) for parts in self._packed(chunks, data, sizes))

    def _packed(self, chunks: list[int], data: dict[int, str], sizes: dict[int, int]) -> Iterator[tuple[str, ...]]:
        """The parts of each file: as many chunks in order as fit into --max-file-size, but at least one."""
        begun: list[int] = []
        for index in chunks:
            if begun and sum(sizes[known] for known in begun) + sizes[index] > self._size:
                yield tuple(data[known] for known in begun)
                begun = []
            begun.append(index)
        yield tuple(data[known] for known in begun)

    def expected(self) -> int:
        """Roughly how many files the run makes, as far as its ranks know; 0 if they are merged."""
        documents = sum(record.get("expected") or 0 for record in self._records())
        return 0 if self._size else int(documents / (self.run.options.records_per_chunk or 1000))

    def _records(self) -> list[dict[str, Any]]:
        """The record of each rank, in order; {} for ranks that have not begun, or whose figures are broken."""
        records = []
        for rank in range(self.run.options.world_size):
            try:
                records.append(statistics_of(rank_file(self.run.state, rank, "stats.json")).get("rank", {}))
            except sdg.StateError:  # files can be published; the card cannot be made, and reports this error
                records.append({})
        return records


class Content:
    """The content of the files of one round: merges those that have several parts, into a scratch folder."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run
        self._scratch: Path | None = None
        self._merged: dict[str, str] = {}

    def close(self) -> None:
        """Delete the scratch folder."""
        if self._scratch:
            shutil.rmtree(self._scratch)

    def path(self, file: HubFile) -> str:
        """A local file with the content of a file for the Hub."""
        parts = [self._run.output.path(part) for part in file.parts]
        if len(parts) == 1:
            return parts[0]
        if file.path not in self._merged:
            self._scratch = self._scratch or Path(
                tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=self._run.state)
            )
            target = str(self._scratch / f"{len(self._merged)}{Path(parts[0]).suffix}")
            merge(parts, target)
            self._merged[file.path] = target
        return self._merged[file.path]

    def sha256(self, file: HubFile) -> str:
        """The hash by which the Hub identifies large files."""
        with open(self.path(file), "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def git_hash(self, file: HubFile) -> str:
        """The hash by which git, and so the Hub, identifies all other files."""
        content = Path(self.path(file)).read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def clear_scratch(state: Path) -> None:
    """Delete the scratch folders of publishers on this machine that were killed."""
    for folder in state.glob(f"{SCRATCH}*"):
        pid = re.fullmatch(rf"{re.escape(SCRATCH)}(\d+)-\w+", folder.name)
        try:
            os.kill(int(pid[1]) if pid else os.getpid(), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue  # a process of another user, still alive


def merge(parts: list[str], target: str) -> None:
    """Make one file with the rows of several; the same parts give the same bytes."""
    if not target.endswith(".parquet"):  # JSON lines, plain or compressed: both may be concatenated
        with open(target, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = {"compression": "zstd", "write_page_index": True}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(target, pq.read_schema(parts[0]), **settings))
        begun: list[pa.Table] = []
        for number, part in enumerate(parts, 1):
            begun.append(pq.read_table(part))
            whole = number == len(parts) or sum(table.nbytes for table in begun) >= ROW_GROUP
            if whole and any(table.num_rows for table in begun):  # `datasets` cannot read row groups without rows
                writer.write_table(pa.concat_tables(begun), row_group_size=1 << 30)
                begun = []
