"""Readers that are generators of dicts, and writers that are functions of a path and rows: the simplest that work."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson
import xxhash

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.common.values import plain

if TYPE_CHECKING:
    import pyarrow as pa

END = object()
FIRST = 1000  # rows from which the columns and the identity of an input are learned
READABLE = {"parquet", "orc", "csv", "arrow", "feather"}  # formats that pyarrow reads back


def adapted(kind: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory as registered, or one made of a generator of dicts (reader) or a function of path and rows (writer)."""
    if kind == "readers" and inspect.isgeneratorfunction(factory):
        return reader_from(factory)
    if kind == "writers" and inspect.isfunction(factory) and len(inspect.signature(factory).parameters) == 2:
        return writer_from(factory)
    return factory


def reader_from(function: Callable[..., Iterator[Mapping[str, Any]]]) -> sdg.OpenReader:
    """A reader from a generator function of the run, or of nothing, that yields rows as dicts."""

    @functools.wraps(function)
    def open_reader(run: sdg.Run) -> RowsReader:
        takes = inspect.signature(function).parameters
        return RowsReader(function, functools.partial(function, run) if takes else function)

    return open_reader


def writer_from(function: Callable[[str, pa.Table], object]) -> sdg.OpenWriter:
    """A writer from a function of a path and a table, which writes one file."""

    @functools.wraps(function)
    def open_writer(run: sdg.Run) -> FileWriter:
        return FileWriter(function, run)

    return open_writer


class RowsReader:
    """Reads what a generator yields; moving back starts it again.

    The first rows decide on the columns and their types. A later row with another column or type fails alone.
    """

    def __init__(self, function: Any, start: Callable[[], Iterator[Mapping[str, Any]]]) -> None:
        self.__wrapped__, self.__module__ = function, function.__module__  # messages name its file
        self._start, self._name, self._row = start, function.__name__, 0
        rows = iter(start())
        first = list(itertools.islice(rows, FIRST))
        self._rows: Iterator[Mapping[str, Any]] = itertools.chain(first, rows)
        self._total = len(first) if len(first) < FIRST else None
        self.schema = schema_of(first, f"the reader {self._name}{sdg.place_of(function)}")
        self._digests = [xxhash.xxh3_64_hexdigest(as_bytes(row)) for row in first]
        self.identity = self._identity(len(first))

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        if row < self._row:
            self._restart()
        while self._row < row and next(self._rows, END) is not END:
            self._row += 1

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        found = list(itertools.islice(self._rows, rows))
        start, self._row = self._row, self._row + len(found)
        if len(found) < rows:
            self._total = self._row
        return list(self._blocks(found, start))

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        return self._total

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        rows = earlier.get("rows", 0)
        return rows <= len(self._digests) and self._identity(rows) == dict(earlier)

    def _restart(self) -> None:
        self._rows, self._row = iter(self._start()), 0

    def _identity(self, rows: int) -> dict[str, Any]:
        digest = xxhash.xxh3_64_hexdigest("".join(self._digests[:rows]).encode())
        return {"reader": self._name, "rows": rows, "content": digest}

    def _blocks(self, rows: list[Mapping[str, Any]], start: int) -> Iterator[sdg.Block | sdg.BadRow]:
        """The rows as one block, or as one for each row if some do not have the columns of the first rows."""
        import pyarrow as pa

        try:
            if rows:
                yield sdg.Block(self._batch(rows), self._name, start)
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as exc:
            if len(rows) == 1:
                reason = f"row {start} of {self._name}: {sdg.one_line(exc)}"
                yield sdg.BadRow(self._name, start, reason, str(rows[0])[:2000])
                return
            for i, row in enumerate(rows):
                yield from self._blocks([row], start + i)

    def _batch(self, rows: list[Mapping[str, Any]]) -> pa.RecordBatch:
        import pyarrow as pa

        known = set(self.schema.names)
        for row in rows:
            if more := [name for name in row if name not in known]:
                raise ValueError(f"the column {more[0]!r} is not in the first {len(self._digests):,} rows")
        return pa.RecordBatch.from_pylist([dict(row) for row in rows], schema=self.schema)


def schema_of(rows: list[Any], what: str) -> pa.Schema:
    """The columns of some rows. Raises PluginError if they are not dicts, or a column has values of several types."""
    import pyarrow as pa

    if not rows:
        raise sdg.InputError(f"{what} yielded no rows")
    for row in rows:
        if not isinstance(row, Mapping):
            raise sdg.PluginError(f"{what} yielded a {type(row).__name__}, expected dicts")
    fields = []
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            kind = pa.array([row.get(name) for row in rows]).type
        except (pa.ArrowException, ValueError, OverflowError) as exc:
            message = f"{what}: the column {name!r} has values of several types, or an invalid one: {sdg.one_line(exc)}"
            raise sdg.PluginError(message) from exc
        fields.append((str(name), pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def as_bytes(row: Any) -> bytes:
    """A row for its digest."""
    return orjson.dumps(dict(row), default=plain, option=orjson.OPT_NON_STR_KEYS) if isinstance(row, Mapping) else b""


class FileWriter:
    """Writes each chunk by a function, to a file that appears in the output when it is whole."""

    def __init__(self, function: Any, run: sdg.Run) -> None:
        self.__wrapped__, self.__module__ = function, function.__module__  # messages name its file
        self._function, self._run = function, run

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        """See `sdg.Writer`."""
        path = self._run.path_of(chunk)
        with tempfile.TemporaryDirectory(dir=self._run.state, prefix=".writing-") as folder:
            local = os.path.join(folder, os.path.basename(path))
            self._function(local, rows)
            if not os.path.isfile(local):
                where = f"{self._function.__name__}{sdg.place_of(self._function)}"
                raise sdg.PluginError(f"the writer {where} has not written the file that it was given")
            with open(local, "rb") as file:
                self._run.output.write(path, lambda target: shutil.copyfileobj(file, target))

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`. Raises OutputError for formats that pyarrow does not read."""
        import pyarrow.dataset as pd

        path, run = self._run.path_of(chunk), self._run
        if path not in run.output.list(os.path.dirname(path)):
            return None
        if (kind := format_of(path)) not in READABLE:
            message = f"{run.output.path(path)} cannot be read back: its writer is a function"
            raise sdg.OutputError(f"{message}; register a class with `read`, as sdg.Writer describes")
        return pd.dataset(run.output.path(path), filesystem=run.output.fs, format=kind).to_table()
