from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.state import chunk_files
from sdg_plugins.common.statistics import statistics_of
from sdg_plugins.publishing.ledger import Ledger

if TYPE_CHECKING:
    pass

FOLDER = 9000  # chunks of one folder: the Hub takes 10,000 files
SCRATCH = f"publishing-{platform.node()}-"  # folders for merged files, with the process that they are of
ROW_GROUP = 128 << 20  # bytes of a merged file's row groups, as Arrow has them


class Item(NamedTuple):
    """A file as it should be on the Hub: one of the spool, or some of them merged."""

    path: str  # in the repository
    parts: tuple[str, ...]  # names in the spool
    signature: str  # changes when their content does
    group: str  # what is committed together or not at all: files that share their chunks out among them


class Spool:
    """The files that a run has written, and what they should be called on the Hub."""

    def __init__(self, run: sdg.Run, folder: str, ledger: Ledger) -> None:
        self.run, self.folder, self._ledger = run, folder, ledger
        options = run.options
        names = string.Template(re.escape(options.output_filename).replace(r"\$\{", "${").replace(r"\}", "}"))
        data = names.safe_substitute(rank=r"\d{5,}", chunk_index=r"(\d{5,})")
        failed = os.path.dirname(run.failed_path_of(sdg.Chunk(0, 0)))
        self._data = re.compile(f"{re.escape(options.output_config)}/{data}")
        self._failed = re.compile(rf"{re.escape(failed)}/\d{{5,}}_(\d{{5,}})\.jsonl")
        # Merged files hold chunks of a range that is as wide for the whole run: a rerun makes the same files.
        self._size = options.max_file_size

    @property
    def begun(self) -> bool:
        """Whether the run has begun."""
        return (self.run.state / "run.json").exists()

    @property
    def folders(self) -> list[str]:
        """The folders of the repository that hold nothing but what runs have written."""
        return [self._placed(os.path.dirname(p(sdg.Chunk(0, 0)))) for p in (self.run.path_of, self.run.failed_path_of)]

    def is_read_with_ours(self, path: str) -> bool:
        """Whether `load_dataset` would take a file of the repository for one of this config."""
        inside = path.removeprefix(f"{self.folder}/") if self.folder else path
        config, suffix = f"{self.run.options.output_config}/", os.path.splitext(self.run.options.output_filename)[1]
        return inside.startswith(config) and inside.endswith(suffix)

    def name_of(self, path: str) -> str | None:
        """The spool's name of a file in the repository: for a merged one of its first part. None for people's files."""
        inside = path.removeprefix(f"{self.folder}/") if self.folder else path
        for name in (inside, re.sub(r"/\d{5}/([^/]+)$", r"/\1", inside)):
            if self._index(name) is not None and self._path(name) == path:
                return name
        return None

    def has_chunk_of(self, name: str) -> bool:
        """Whether the chunk that a file of the spool belongs to is there, in its present form."""
        return os.path.exists(self.run.output.path(self.run.path_of(sdg.Chunk(self._index(name) or 0, 0))))

    def _index(self, name: str) -> int | None:
        found = self._data.fullmatch(name) or self._failed.fullmatch(name)
        return int(found[1]) if found else None

    def items(self) -> dict[str, Item]:
        """All that should be on the Hub by now, by path."""
        signatures: dict[str, str] = {}
        data: dict[int, str] = {}
        grouped: list[tuple[str, tuple[str, ...]]] = []
        for name in chunk_files(self.run, self.run.options.output_config, self.run.options.output_filename):
            status = os.stat(self.run.output.path(name))
            signatures[name] = f"{status.st_size} {status.st_mtime_ns}"
            if found := self._data.fullmatch(name):
                data[int(found[1])] = name
            else:
                grouped.append((name, (name,)))
        merged = (
            self._merged(data, signatures) if self._size else ((data[index], (data[index],)) for index in sorted(data))
        )
        grouped += merged
        marks = [" ".join(signatures[part] for part in parts) for _, parts in grouped]
        made = [
            Item(self._path(parts[0]), parts, mark, group) for (group, parts), mark in zip(grouped, marks, strict=True)
        ]
        return {item.path: item for item in made}

    def _path(self, name: str) -> str:
        """Where a file of the spool belongs in the repository: no folder may have too many files."""
        part = (self._index(name) or 0) // FOLDER
        folder, _, base = name.rpartition("/")
        return self._placed(f"{folder}/{part:05d}/{base}" if part else name)

    def _placed(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _merged(self, data: dict[int, str], signatures: dict[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Ranges of a rank's chunks and, for each, chunks in order that make a file of at most --max-file-size.

        As the run goes on, a range of a rank's chunks is complete, or the rank has ended: before that none of it is
        published. How wide the range is depends on the first chunks that were written; the ledger keeps it.
        """
        world = self.run.options.world_size
        sizes = {index: int(signatures[name].partition(" ")[0]) for index, name in data.items()}
        if not sizes:
            return
        mean = sum(sizes.values()) / len(sizes)
        run = recorded.record_of(self.run.state)["run"]
        width = self._ledger.setting(f"chunks_of_a_file of {run}", max(1, int(0.8 * self._size / max(1, mean))))
        over = {i for i, rank in enumerate(self._ranks()) if rank.get("status") == "finished"}
        ranges: dict[tuple[int, int], list[int]] = {}
        for index in sorted(data):
            ranges.setdefault((index % world, index // world // width), []).append(index)
        for (rank, number), chunks in ranges.items():
            if len(chunks) == width or rank in over:
                yield from ((f"{rank} {number}", parts) for parts in self._packed(chunks, data, sizes))

    def _packed(self, chunks: list[int], data: dict[int, str], sizes: dict[int, int]) -> Iterator[tuple[str, ...]]:
        begun: list[int] = []
        for index in chunks:
            if begun and sum(sizes[known] for known in begun) + sizes[index] > self._size:
                yield tuple(data[known] for known in begun)
                begun = []
            begun.append(index)
        yield tuple(data[known] for known in begun)

    def expected(self) -> int:
        """About how many files the run makes, as far as its ranks know."""
        documents = sum(rank.get("expected") or 0 for rank in self._ranks())
        return 0 if self._size else int(documents / self.run.options.records_per_chunk)

    def _ranks(self) -> list[dict[str, Any]]:
        """How each rank is doing, by its number; {} for those that have not begun, or whose figures are broken."""
        found = []
        for rank in range(self.run.options.world_size):
            try:
                found.append(statistics_of(self.run.state / f"{rank:05d}.stats.json").get("rank", {}))
            except sdg.StateError:  # the card cannot be made either, and says why; files can be published
                found.append({})
        return found


class Content:
    """The files of one round: merged into a folder where need be, hashed once."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run
        self._scratch: Path | None = None
        self._merged: dict[str, str] = {}

    def close(self) -> None:
        """Delete what was made for this round."""
        if self._scratch:
            shutil.rmtree(self._scratch)

    def path(self, item: Item) -> str:
        """A local file with the content that it should have."""
        parts = [self._run.output.path(part) for part in item.parts]
        if len(parts) == 1:
            return parts[0]
        if item.path not in self._merged:
            self._scratch = self._scratch or Path(
                tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=self._run.state)
            )
            target = str(self._scratch / f"{len(self._merged)}{Path(parts[0]).suffix}")
            merge(parts, target)
            self._merged[item.path] = target
        return self._merged[item.path]

    def sha256(self, item: Item) -> str:
        """The hash that the Hub knows large files by."""
        with open(self.path(item), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def git_hash(self, item: Item) -> str:
        """The hash that git, and so the Hub, knows all other files by."""
        content = Path(self.path(item)).read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def clear_scratch(state: Path) -> None:
    """Delete what publishers on this machine left behind that were killed."""
    for folder in state.glob(f"{SCRATCH}*"):
        pid = re.fullmatch(rf"{re.escape(SCRATCH)}(\d+)-\w+", folder.name)
        try:
            os.kill(int(pid[1]) if pid else os.getpid(), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            continue  # somebody else's, and alive


def merge(parts: list[str], target: str) -> None:
    """Make one file of the rows of several: the same parts give the same bytes."""
    if not target.endswith(".parquet"):  # lines, plain or compressed: both can be strung together
        with open(target, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    how = {"compression": "zstd", "write_page_index": True}
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(pq.ParquetWriter(target, pq.read_schema(parts[0]), **how))
        begun: list[pa.Table] = []
        for number, part in enumerate(parts, 1):
            begun.append(pq.read_table(part))
            if number == len(parts) or sum(table.nbytes for table in begun) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(begun), row_group_size=1 << 30)
                begun = []
