"""Parquet files as input, read row group by row group."""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sdg
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.unify import conformed, unified
from sdg_plugins.readers.partitions import partitioned

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER = 1 << 20  # bytes of a column chunk read at a time
EAGER = 2000  # footers read at the beginning, for the schema: with more files than this the total is an estimate
EAGER_REMOTE = 200  # of remote files: each takes a request, in each rank
SORT_OUT = "choose files with the same columns, or name one that has them all so that it comes among the first"
FOOTERS = 16  # footers read at the same time
AHEAD = 16  # row groups fetched before they are needed, if files are remote
AHEAD_BYTES = 128 << 20  # at most this much of them together


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("parquet", partitioned(open_files))


def open_files(run: sdg.Run) -> ParquetReader:
    """Read parquet files in the order of their names; columns that differ are unified."""
    files = InputFiles.of_run(run, "parquet")
    return ParquetReader(run, files, files.identity)


class Files(Protocol):
    """The files that the reader opens: `sdg.InputFiles`, or files of a dataset on the Hub."""

    names: list[str]
    sizes: list[int]  # bytes
    local: bool  # False: each access takes a network request

    def open(self, i: int) -> Any:
        """Open the file with index `i` for reading."""


class Piece(NamedTuple):
    """A row group, and where it lies in the input."""

    file: int  # index of the file
    group: int  # index of the row group in the file
    start: int  # its first row in the input
    rows: int
    in_file: int  # its first row in the file
    size: int  # bytes


class Group(NamedTuple):
    """What is kept of a row group's metadata: files may have thousands of row groups with hundreds of columns."""

    rows: int
    size: int  # bytes


class ParquetReader:
    """Reads row group by row group; the next ones of remote files are fetched in the background.

    Footers are read as they are needed. Those that are known belong to consecutive files: `_first` is the index of the
    first one, `_groups` holds the row groups of each, `_starts` the first row of each in the input, then the row after
    the last one. A bookmark is JSON: index and first row of a file.
    """

    def __init__(self, run: sdg.Run, files: Files, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.source: dict[str, Any] = {}
        self.schema: pa.Schema = None
        self.files, self._run = files, run
        self._cached_footer = functools.lru_cache(8)(self._read_footer)
        self._footer_locks = [threading.Lock() for _ in range(FOOTERS)]
        self._pool = ThreadPoolExecutor(max(FOOTERS, AHEAD), "sdg-parquet")
        self._ahead: OrderedDict[Piece, Future[Iterator[pa.RecordBatch]]] = OrderedDict()
        self._schemas: dict[str, pa.Schema] = {}
        self._restart_at(0, 0)
        self._add_footers(EAGER if files.local else EAGER_REMOTE)
        if (known := len(self._groups)) < len(files.names):
            sdg.say(f"--input: the columns are those of the first {known:,} of {len(files.names):,} files")
        self.schema = self._unified()
        self._row = 0
        self._piece: Piece | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._batch_start = 0  # row of the input that `_batch` begins with

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        known = self._first + len(self._groups)
        if known == len(self.files.names):
            return self._starts[-1]
        return round(self._starts[-1] * sum(self.files.sizes) / max(1, sum(self.files.sizes[:known])))

    def stamp(self, count: int) -> list[Any] | None:
        """See `InputFiles`; None if the files cannot change."""
        return self.files.stamp(count) if isinstance(self.files, InputFiles) else None

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        # A parquet file cannot grow: known files must be unchanged, new ones may follow.
        return list(self.identity.items())[: len(earlier)] == list(earlier.items())

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        self._row = row
        file, start = json.loads(bookmark) if bookmark else (0, 0)
        known = self._starts[-1] > row or file < self._first + len(self._groups)
        if row < self._starts[0] or not known:
            self._restart_at(file, start)

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        piece = self._piece_at(self._row)
        return json.dumps([piece.file, piece.start - piece.in_file]) if piece else None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        found: list[sdg.Block | sdg.BadRow] = []
        while rows and (piece := self._load(self._row)):
            assert self._batch is not None
            part = self._batch.slice(self._row - self._batch_start, rows)
            in_file = self._row - piece.start + piece.in_file
            name = self.files.names[piece.file]
            found.append(sdg.Block(self._conform(part, name), name, in_file))
            self._row += part.num_rows
            rows -= part.num_rows
        return found

    # Locating rows

    def _restart_at(self, file: int, start: int) -> None:
        """Forget all footers; the one thing known is that this file begins with row `start` of the input."""
        self._first = file
        self._starts = [start]
        self._groups: list[list[Group]] = []

    def _add_footers(self, count: int) -> None:
        """Read the footers of the next `count` files."""
        known = self._first + len(self._groups)
        for footer, schema in self._pool.map(self._footer, range(known, min(known + count, len(self.files.names)))):
            self._check(self.files.names[self._first + len(self._groups)], schema)
            groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
            self._groups.append([Group(group.num_rows, group.total_byte_size) for group in groups])
            self._starts.append(self._starts[-1] + footer.num_rows)

    def _check(self, name: str, schema: pa.Schema) -> None:
        """Take the columns of a file into account; those of files that are met later must fit the schema."""
        if self.schema is None:
            self._schemas.setdefault(name, schema)
        elif not schema.equals(self.schema):
            both = [(self.files.names[0], self.schema), (name, schema)]
            if not unified(both, self._run.options.prompt_column).equals(self.schema):
                added = sorted(set(schema.names) - set(self.schema.names))
                what = ", ".join(added) or "other types"
                raise sdg.InputError(f"{name} has different columns than {self.files.names[0]} ({what}): {SORT_OUT}")

    def _unified(self) -> pa.Schema:
        """The schema of the files that are known, or the one that an earlier process has recorded if it holds them."""
        known = self._run.source_schema
        prompt = self._run.options.prompt_column
        found = unified(self._schemas.items(), prompt)
        if known and found.names == known.names[: len(found.names)]:
            with contextlib.suppress(sdg.InputError):
                both = unified([("", known), *self._schemas.items()], prompt)
                found = known if both.equals(known) else found
        self._schemas.clear()
        return found

    def _conform(self, batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
        """Rows of the file `name`, with the schema of all files."""
        import pyarrow as pa

        try:
            return conformed(batch, self.schema)
        except pa.ArrowException as exc:
            raise no_fit(name, exc) from exc

    def _footer(self, i: int) -> tuple[pa.parquet.FileMetaData, pa.Schema]:
        """A file's footer, and the schema of its batches. One thread reads it; others that need it meanwhile wait."""
        with self._footer_locks[i % FOOTERS]:
            return self._cached_footer(i)

    def _read_footer(self, i: int) -> tuple[pa.parquet.FileMetaData, pa.Schema]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self.files.open(i) as file:
                parquet = pq.ParquetFile(file)
                return parquet.metadata, parquet.schema_arrow
        except pa.ArrowNotImplementedError as exc:
            raise no_reader(self.files.names[i], exc) from exc
        except (pa.ArrowException, OSError) as exc:
            raise sdg.InputError(f"{self.files.names[i]} is not a complete parquet file: {sdg.one_line(exc)}") from exc

    def _piece_at(self, row: int) -> Piece | None:
        """The row group with a row of the input; None after the last row."""
        while self._starts[-1] <= row:
            if self._first + len(self._groups) == len(self.files.names):
                return None
            self._add_footers(FOOTERS)
        i = bisect.bisect_right(self._starts, row) - 1
        before = 0
        for g, group in enumerate(self._groups[i]):
            if row < self._starts[i] + before + group.rows:
                return Piece(self._first + i, g, self._starts[i] + before, group.rows, before, group.size)
            before += group.rows
        raise AssertionError("unreachable: the file has this row")

    # Reading

    def _load(self, row: int) -> Piece | None:
        """Load the batch with a row of the input. Returns its row group; None after the last row."""
        piece = self._piece_at(row)
        if piece is None:
            return None
        if piece != self._piece or row < self._batch_start:
            self._piece, self._batch = piece, None
            self._batches, self._batch_start = self._fetch(piece), piece.start
        while self._batch is None or row >= self._batch_start + self._batch.num_rows:
            self._batch_start += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches)
        return piece

    def _fetch(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The batches of a row group, which may have been fetched already; starts to fetch the next ones."""
        if self.files.local:
            return self._open(piece)
        coming = self._ahead.pop(piece, None) or self._pool.submit(self._open, piece)
        upcoming = self._upcoming(piece)
        for stale in [known for known in self._ahead if known not in upcoming]:
            self._ahead.pop(stale).cancel()
        for later in upcoming:
            if later not in self._ahead:
                self._ahead[later] = self._pool.submit(self._open, later)
        return coming.result()

    def _upcoming(self, piece: Piece) -> list[Piece]:
        """The next row groups with chunks of this rank, within the limits of AHEAD and AHEAD_BYTES."""
        size, world, rank = (getattr(self._run.options, n) for n in ("records_per_chunk", "world_size", "rank"))
        most = self._run.options.max_documents or sys.maxsize
        found: list[Piece] = []
        row = piece.start + piece.rows
        while len(found) < AHEAD:
            chunk = row // size
            if chunk % world != rank:  # this rank's next chunk
                row = (chunk + (rank - chunk) % world) * size
            if row >= min(self._starts[-1], most) or (later := self._piece_at(row)) is None:
                break
            if found and sum(known.size for known in found) + later.size > AHEAD_BYTES:
                break
            found.append(later)
            row = later.start + later.rows
        return found

    def _open(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The batches of a row group. Those of a remote file are being fetched when this returns."""
        import pyarrow.parquet as pq

        (footer, _), local = self._footer(piece.file), self.files.local
        # For local files, pre-buffering would keep everything read until the file is closed; without a buffer size,
        # pyarrow would read the whole row group at once.
        how = {"pre_buffer": False, "buffer_size": BUFFER} if local else {"pre_buffer": True}
        file = pq.ParquetFile(self.files.open(piece.file), metadata=footer, **how)
        batches = file.iter_batches(1024, row_groups=[piece.group])
        first = None if local else next(batches, None)
        return self._then_close(file, batches, first)

    def _then_close(self, file: Any, batches: Iterator[pa.RecordBatch], first: Any) -> Iterator[pa.RecordBatch]:
        """`first` if it was read already, then the remaining batches; closes the file."""
        with file:
            if first is not None:
                yield first
            yield from batches


def no_fit(name: str, exc: Exception) -> sdg.InputError:
    """The error for a file whose values do not fit the columns of all files."""
    return sdg.InputError(f"{name} has values that do not fit the columns of the other files: {sdg.one_line(exc)}")


def no_reader(name: str, exc: Exception) -> sdg.InputError:
    """The error for a file with a type that pyarrow does not have."""
    hint = "convert the column to a type that pyarrow reads"
    return sdg.InputError(f"{name} cannot be read: {sdg.one_line(exc)}; {hint}")
