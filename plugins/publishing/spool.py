"""The files that a run has written for the Hub: they wait in the folder `spool` of its state, and may be merged."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.outputs import chunk_files, chunk_of, file_patterns
from sdg_plugins.common.statistics import statistics_of
from sdg_plugins.publishing.ledger import Known, Ledger

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = 9000  # chunks per folder: the Hub accepts 10,000 files in one
SCRATCH = f"publishing-{platform.node()}-"  # prefix of folders for merged files, before the ID of their process
FRESH = 1.0  # s for which the chunks that a rank has recorded are not read again
ROW_GROUP = 128 << 20  # bytes of a row group in merged files, as Arrow counts them


class HubFile(NamedTuple):
    """A file as it should be on the Hub: one of the spool, or several of them merged."""

    path: str  # in the repository
    parts: tuple[str, ...]  # names in the spool
    signature: str  # sizes and times of the parts: changes when their content does
    group: str  # files of a group share chunks, so they are committed together or not at all


class Spool:
    """The files that a run has written, and the files that they should become on the Hub.

    Attributes:
        signatures: size and time of each file that is here; set by `files`.
        unknown: files that were written, and are neither here nor in a file known to be published; set by `files`.
    """

    def __init__(self, run: sdg.Run, folder: str, ledger: Ledger) -> None:
        self.run, self.folder, self._ledger = run, folder, ledger
        self._size = run.options.max_file_size
        self._chunks: dict[int, tuple[float, dict[int, sdg.Chunk]]] = {}  # by rank, with the time when they were read
        self.signatures: dict[str, str] = {}
        self.unknown: list[str] = []

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
        """True if the run has written the chunk to which a file belongs."""
        index = self._index(name) or 0
        return self.is_here(self.run.path_of(sdg.Chunk(index, 0))) or self._is_written(index)

    def is_here(self, name: str) -> bool:
        """True if the spool has this file."""
        return os.path.exists(self.run.output.path(name))

    def is_due(self, name: str) -> bool:
        """True if a file belongs to the run's output. Published files may be deleted from the spool, and still do."""
        index = self._index(name)
        if self.is_here(name) or index is None:
            return index is not None
        chunk = self._recorded(index)
        if chunk is None or not chunk.written:  # as far as we know, it will be written again
            return True
        _, failed = file_patterns(self.run.options.output_config, self.run.options.output_filename)
        return bool(chunk.failed if failed.fullmatch(name) else chunk.rows)

    def _is_written(self, index: int) -> bool:
        chunk = self._recorded(index)
        return chunk is not None and chunk.written

    def _recorded(self, index: int) -> sdg.Chunk | None:
        """A chunk as its rank has recorded it; None if it has not, or its database cannot be read now."""
        rank, now = index % self.run.options.world_size, time.monotonic()
        read, chunks = self._chunks.get(rank, (-math.inf, {}))
        if now - read > FRESH:
            with contextlib.suppress(sdg.StateError):  # it is being written: what was read before still holds
                path = rank_file(self.run.state, rank, "sqlite3")
                chunks = recorded.chunks_in(path) if path.exists() else chunks
            self._chunks[rank] = (now, chunks)
        return chunks.get(index)

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
        """All files that can be made from the spool by now, by path; sets `signatures` and `unknown`."""
        self.unknown = []
        # What was read before a file was replaced or removed would contradict the files: it is read again, if possible.
        self._chunks = {rank: (-math.inf, chunks) for rank, (_, chunks) in self._chunks.items()}
        self.signatures = signatures = {}
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
        sizes of the first chunks and is kept in the ledger, so that a rerun makes the same files. Published files stay
        as they are once the spool has lost one of their parts, and so does a range with a part that no file is known
        to contain.
        """
        sizes = {index: int(signatures[name].partition(" ")[0]) for index, name in data.items()}
        if not sizes:
            return
        world, run = self.run.options.world_size, recorded.run_id(self.run.state)
        mean = sum(sizes.values()) / len(sizes)
        width = self._ledger.setting(f"chunks_of_a_file of {run}", max(1, int(0.8 * self._size / max(1, mean))))
        over = {number for number, record in enumerate(self._records()) if record.get("status") == "finished"}
        rows, _ = file_patterns(self.run.options.output_config, self.run.options.output_filename)
        gone = [part for known in self.incomplete(run, signatures).values() for part in known.parts]
        fixed = {self._index(part) for part in gone if rows.fullmatch(part)}  # a record of failures fixes no rows
        ranges: dict[tuple[int, int], list[int]] = {}
        for index in sorted(data):
            ranges.setdefault((index % world, index // world // width), []).append(index)
        last = {rank: number for rank, number in ranges}  # in order: the highest number of each rank
        for (rank, number), chunks in ranges.items():
            first = number * width * world + rank
            holes = {*range(first, first + width * world, world)}.difference(chunks, fixed)
            if holes and not (rank in over or number < last[rank]):
                continue  # it is being written
            unknown = [
                index for index in sorted(holes) if (chunk := self._recorded(index)) and chunk.written and chunk.rows
            ]
            self.unknown += [self.run.path_of(sdg.Chunk(index, 0)) for index in unknown]
            complete = rank in over or all(self._is_written(index) for index in holes)
            if complete and not unknown and (free := [index for index in chunks if index not in fixed]):
                yield from ((f"{rank} {number}", parts) for parts in self._packed(free, data, sizes))

    def incomplete(self, run: str, here: Container[str]) -> dict[str, Known]:
        """Published files of a run that cannot be made again, because some of their parts are not here any more."""
        return {
            path: known
            for path, known in self._ledger.files.items()
            if known.run == run and any(part not in here and self.is_due(part) for part in known.parts)
        }

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
    """The content of the files of one round: merges those that have several parts, into a scratch folder.

    Args:
        run: whose output it is.
        hash_of: the hash of a local file by which the Hub identifies large files.
    """

    def __init__(self, run: sdg.Run, hash_of: Callable[[str], str]) -> None:
        self._run, self._hash_of = run, hash_of
        self._hashes: dict[HubFile, str] = {}
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

    def hash(self, file: HubFile) -> str:
        """The hash by which the Hub identifies large files."""
        if file not in self._hashes:
            self._hashes[file] = self._hash_of(self.path(file))
        return self._hashes[file]

    def git_hash(self, file: HubFile) -> str:
        """The hash by which git, and so the Hub, identifies all other files."""
        digest = hashlib.sha1(usedforsecurity=False)
        with open(self.path(file), "rb") as content:
            digest.update(b"blob %d\0" % os.fstat(content.fileno()).st_size)
            while block := content.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


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
