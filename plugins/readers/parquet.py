"""Parquet files: read by row group, written with zstd."""

from __future__ import annotations

import bisect
import functools
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sdg
from sdg_plugins.common.files import InputFiles

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER = 1 << 20  # bytes of a column chunk read at a time
EAGER = 200  # footers that are read at the beginning: the number of rows is exact if there are not more
FOOTERS = 16  # footers read at a time
AHEAD = 16  # row groups fetched before they are needed, from afar…
AHEAD_BYTES = 128 << 20  # … if they are not larger than this together


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("parquet", open_files)


def open_files(run: sdg.Run) -> ParquetReader:
    """Read parquet files in the order of their names; all must have one schema."""
    files = InputFiles(run.options.input, "parquet")
    return ParquetReader(run, files, files.identity)


class Files(Protocol):
    """What the reader wants of files, wherever they are: see `sdg.InputFiles`."""

    names: list[str]
    sizes: list[int]  # bytes
    local: bool  # else each access takes its time

    def open(self, i: int) -> Any: ...


class Piece(NamedTuple):
    """A row group: the rows of the input from `start` on."""

    file: int
    group: int
    start: int
    rows: int
    in_file: int  # rows of the file before it
    size: int  # bytes


class Group(NamedTuple):
    """What is kept of a footer: a file may have thousands of row groups with hundreds of columns."""

    rows: int
    size: int


class ParquetReader:
    """Reads row group by row group, and fetches the next ones meanwhile if they are far away."""

    def __init__(self, run: sdg.Run, files: Files, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        self.source: dict[str, Any] = {}
        self._files, self._run = files, run
        self._cached_footer = functools.lru_cache(8)(self._read_footer)
        self._reading = [threading.Lock() for _ in range(FOOTERS)]
        self._pool = ThreadPoolExecutor(max(FOOTERS, AHEAD), "sdg-parquet")
        self._ahead: OrderedDict[Piece, Future[Iterator[pa.RecordBatch]]] = OrderedDict()
        self.schema = self._footer(0).schema.to_arrow_schema().remove_metadata()
        self._begin(0, 0)
        self._learn(EAGER)
        self._row = 0
        self._piece: Piece | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._at = 0  # row of the input that `_batch` begins with

    def total(self) -> int | None:
        known = self._first + len(self._groups)
        if known == len(self._files.names):
            return self._starts[-1]
        return round(self._starts[-1] * sum(self._files.sizes) / max(1, sum(self._files.sizes[:known])))

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        # A parquet file cannot grow: what is known must be there unchanged, new files may follow.
        return list(self.identity.items())[: len(earlier)] == list(earlier.items())

    def seek(self, row: int, bookmark: str | None) -> None:
        self._row = row
        file, start = json.loads(bookmark) if bookmark else (0, 0)
        known = self._starts[-1] > row or file < self._first + len(self._groups)
        if row < self._starts[0] or not known:
            self._begin(file, start)

    def tell(self) -> str | None:
        piece = self._piece_at(self._row)
        return json.dumps([piece.file, piece.start - piece.in_file]) if piece else None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        found: list[sdg.Block | sdg.BadRow] = []
        while rows and (piece := self._enter(self._row)):
            assert self._batch is not None
            part = self._batch.slice(self._row - self._at, rows)
            in_file = self._row - piece.start + piece.in_file
            name = self._files.names[piece.file]
            found.append(sdg.Block(self._as_first(part, name), name, in_file))
            self._row += part.num_rows
            rows -= part.num_rows
        return found

    # Where rows are

    def _begin(self, file: int, start: int) -> None:
        """Know nothing but that this file begins with row `start`."""
        self._first = file
        self._starts = [start]  # of the files from `_first` on, and the end of the last one that is known
        self._groups: list[list[Group]] = []

    def _learn(self, files: int) -> None:
        """Read the footers of some more files."""
        known = self._first + len(self._groups)
        for footer in self._pool.map(self._footer, range(known, min(known + files, len(self._files.names)))):
            name = self._files.names[self._first + len(self._groups)]
            if differing := self._differing(footer.schema.to_arrow_schema()):
                first = self._files.names[0]
                raise sdg.InputError(f"{name} has other columns than {first} ({differing}): name those of one kind")
            groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
            self._groups.append([Group(group.num_rows, group.total_byte_size) for group in groups])
            self._starts.append(self._starts[-1] + footer.num_rows)

    def _differing(self, schema: pa.Schema) -> str:
        """The columns that keep a file from being read as the first one; "" if it can, as in `datasets`.

        Types are cast, and columns that a file lacks are null, but not that of the prompts.
        """
        import pyarrow as pa

        names = {field.name for field in schema}
        differing = sorted(names - set(self.schema.names))
        if self._run.options.prompt_column in set(self.schema.names) - names:
            differing.append(self._run.options.prompt_column)
        for field in self.schema if not differing else []:
            if field.name in names and not schema.field(field.name).type.equals(field.type):
                try:
                    if has_more(schema.field(field.name).type, field.type):
                        raise pa.ArrowInvalid("a cast would drop fields")
                    pa.nulls(0, schema.field(field.name).type).cast(field.type)
                except pa.ArrowException:
                    differing.append(f"{field.name}: {schema.field(field.name).type} instead of {field.type}")
        return ", ".join(differing)

    def _as_first(self, batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
        """A file's rows with the columns of the first file."""
        import pyarrow as pa

        if batch.schema.equals(self.schema):
            return pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)
        there = set(batch.schema.names)
        try:
            columns = [
                batch.column(field.name).cast(field.type) if field.name in there else pa.nulls(len(batch), field.type)
                for field in self.schema
            ]
        except pa.ArrowException as problem:
            first = self._files.names[0]
            reason = " ".join(str(problem).split())
            raise sdg.InputError(f"{name} has values that do not fit the columns of {first}: {reason}") from problem
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _footer(self, i: int) -> pa.parquet.FileMetaData:
        """A file's footer; one thread reads it, others that want it meanwhile wait."""
        with self._reading[i % FOOTERS]:
            return self._cached_footer(i)

    def _read_footer(self, i: int) -> pa.parquet.FileMetaData:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._files.open(i) as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError) as problem:
            reason = " ".join(str(problem).split())
            raise sdg.InputError(f"{self._files.names[i]} is no whole parquet file: {reason}") from problem

    def _piece_at(self, row: int) -> Piece | None:
        """The row group that holds a row of the input; None after the last one."""
        while self._starts[-1] <= row:
            if self._first + len(self._groups) == len(self._files.names):
                return None
            self._learn(FOOTERS)
        i = bisect.bisect_right(self._starts, row) - 1
        before = 0
        for g, group in enumerate(self._groups[i]):
            if row < self._starts[i] + before + group.rows:
                return Piece(self._first + i, g, self._starts[i] + before, group.rows, before, group.size)
            before += group.rows
        raise AssertionError("unreachable: the file has this row")

    # Reading

    def _enter(self, row: int) -> Piece | None:
        """Have the batch with this row at hand; None after the last row."""
        piece = self._piece_at(row)
        if piece is None:
            return None
        if piece != self._piece or row < self._at:
            self._piece, self._batch = piece, None
            self._batches, self._at = self._take(piece), piece.start
        while self._batch is None or row >= self._at + self._batch.num_rows:
            self._at += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches)
        return piece

    def _take(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """A row group's batches, fetched ahead if that was foreseen; the next ones are fetched from now on."""
        if self._files.local:
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
        """The next row groups that this rank has chunks in."""
        size, world, rank = (getattr(self._run.options, n) for n in ("records_per_chunk", "world_size", "rank"))
        most = self._run.options.max_documents or sys.maxsize
        found: list[Piece] = []
        row = piece.start + piece.rows
        while len(found) < AHEAD:
            chunk = row // size
            if chunk % world != rank:  # the beginning of our next chunk
                row = (chunk + (rank - chunk) % world) * size
            if row >= min(self._starts[-1], most) or (later := self._piece_at(row)) is None:
                break
            if found and sum(known.size for known in found) + later.size > AHEAD_BYTES:
                break
            found.append(later)
            row = later.start + later.rows
        return found

    def _open(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """The batches of a row group; from afar its columns are on their way as soon as this returns."""
        import pyarrow.parquet as pq

        footer, local = self._footer(piece.file), self._files.local
        # Locally pre-buffering would keep what was read until the file is closed, and no buffer the whole row group.
        how = {"pre_buffer": False, "buffer_size": BUFFER} if local else {"pre_buffer": True}
        file = pq.ParquetFile(self._files.open(piece.file), metadata=footer, **how)
        batches = file.iter_batches(1024, row_groups=[piece.group])
        first = None if local else next(batches, None)
        return self._batches_of(file, batches, first)

    def _batches_of(self, file: Any, batches: Iterator[pa.RecordBatch], first: Any) -> Iterator[pa.RecordBatch]:
        with file:
            if first is not None:
                yield first
            yield from batches


def has_more(kind: pa.DataType, other: pa.DataType) -> bool:
    """Whether a type has fields, at any depth, that another one lacks: Arrow's cast drops them without a word."""
    import pyarrow.types as t

    if t.is_struct(kind) and t.is_struct(other):
        known = {field.name: field.type for field in other}
        return any(field.name not in known or has_more(field.type, known[field.name]) for field in kind)
    if kind.num_fields and kind.num_fields == other.num_fields:
        return any(has_more(kind.field(i).type, other.field(i).type) for i in range(kind.num_fields))
    return False
