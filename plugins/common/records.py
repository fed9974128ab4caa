"""What a run has made so far, document by document: rows in files, failures, and what still waits in the state."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.checks import reading
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.files import access_errors, file_writer, rank_file
from sdg_plugins.common.outputs import read_failed, read_rows
from sdg_plugins.common.results import infer_fields
from sdg_plugins.common.rows import NUMBER, shape_of
from sdg_plugins.common.state import fixed_fields, recorded_fields
from sdg_plugins.common.values import id_column_of, id_text, pick, rows_of

if TYPE_CHECKING:
    import pyarrow as pa


class Record(NamedTuple):
    """A document and what became of it.

    Attributes:
        id: of the document.
        status: row, failed, filtered or unfinished.
        row: as it is written, or will be; None for other statuses.
        failure: the record in `failed/`, without the id; None for other statuses.
        place: the file that holds it; "" if it is not in a file yet.
    """

    id: str
    status: str
    row: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    place: str = ""


class View(NamedTuple):
    """A document as it is shown.

    Attributes:
        note: on its status, "" for a row in a file.
        prompt: the name of the prompt column.
        source: the prompt column by its name, with all columns of the source if they were asked for.
        results: the fields of each result that are neither null nor nested.
        error: what failed.
        left_out: columns that are not shown.
    """

    id: str
    note: str
    prompt: str
    source: dict[str, Any]
    results: list[dict[str, Any]]
    error: dict[str, Any]
    left_out: list[str]


class Records:
    """The documents of a run, read from its files and its state; the run may still be going on.

    Args:
        run: from `recorded.load_run`, or one that has ended.
    """

    def __init__(self, run: sdg.Run) -> None:
        self.run = run
        self._writer: sdg.Writer = run.plugins.find("writers", file_writer(run.options)).factory(run)

    @property
    def written(self) -> Iterator[sdg.Chunk]:
        """The chunks that are in files, in order."""
        return recorded.chunks_of(self.run, "written")

    def tables(self, chunks: Iterable[sdg.Chunk] | None = None) -> Iterator[tuple[sdg.Chunk, pa.Table]]:
        """The rows of each chunk that has any and whose file is here, in order.

        Args:
            chunks: that are in files; None for all.
        """
        for chunk in self.written if chunks is None else chunks:
            if chunk.rows and (table := read_rows(self.run, self._writer, chunk)) is not None:
                yield chunk, table

    def waiting(self) -> Iterator[tuple[sdg.Chunk, pa.Table]]:
        """The rows of documents whose chunk is not in a file yet, as they will be written."""
        options = self.run.options
        shape, fields = shape_of(options), recorded_fields(self.run.state)
        for chunk in recorded.chunks_of(self.run, "NOT written"):
            found = dict(finished_in(self.run, chunk, "row"))
            if not found:
                continue
            opened = self._open(chunk)
            ids = self._ids(opened)
            if fields is None:
                own, fixed = infer_fields(result for body in found.values() for result in body), fixed_fields(options)
                fields = fixed | {name: kind for name, kind in own.items() if name not in {*fixed, NUMBER, "extra"}}
            rows = pick(opened.table, list(found))
            yield chunk, shape.table(rows, [ids[position] for position in found], list(found.values()), fields)

    def rows(self, limit: int) -> Iterator[Record]:
        """The first rows, at most `limit`: those in files, then those that wait for the rest of their chunk."""
        for chunk, table in self.tables():
            yield from self._records(chunk, table.slice(0, limit))
            limit -= min(limit, table.num_rows)
            if not limit:
                return
        for record in self._waiting("row"):
            if not limit:
                return
            limit -= 1
            yield record

    def failed(self) -> Iterator[Record]:
        """The failed documents."""
        for chunk in recorded.chunks_of(self.run, "written AND failed != '[]'"):
            path = self.run.output.path(self.run.failed_path_of(chunk))
            for failure in read_failed(self.run, chunk):
                yield Record(id_text(failure.pop("id")), "failed", failure=failure, place=path)
        yield from self._waiting("failed")

    def find(self, id_: str) -> Record | None:
        """The document with an id; None if the run has none, or has not read it yet."""
        for chunk, table in self._tables_with(id_):
            for record in self._records(chunk, table):
                if record.id == id_:
                    return record
        failures = (record for record in self.failed() if record.id == id_)
        return next(failures, None) or self._find_in_input(id_)

    def _records(self, chunk: sdg.Chunk, table: pa.Table) -> Iterator[Record]:
        column = self.run.options.id_column if self.run.options.id_column in table.column_names else "id"
        for row in rows_of(table):
            yield Record(str(row.get(column)), "row", row, place=self.run.output.path(self.run.path_of(chunk)))

    def _tables_with(self, id_: str) -> Iterator[tuple[sdg.Chunk, pa.Table]]:
        """The tables that may have the row with an id. Of parquet files only the ids are read."""
        import pyarrow as pa
        import pyarrow.dataset

        run, chunks = self.run, {self.run.output.path(self.run.path_of(chunk)): chunk for chunk in self.written}
        if file_writer(run.options) != "parquet" or not chunks:
            yield from self.tables()
            return
        here = {run.output.path(name) for name in run.output.list(run.options.output_config)}
        files = [path for path, chunk in chunks.items() if chunk.rows and path in here]
        with access_errors(run.output.path(run.options.output_config), sdg.OutputError):
            data = pyarrow.dataset.dataset(files, filesystem=run.output.fs, format="parquet")
            column = run.options.id_column if run.options.id_column in data.schema.names else "id"
            same = pyarrow.dataset.field(column).cast(pa.string()) == id_
            found = data.to_table(columns=["__filename"], filter=same) if files else None
        for path in found.column(0).unique().to_pylist() if found else ():
            table = read_rows(self.run, self._writer, chunks[path])
            if table is not None:
                yield chunks[path], table

    # What only the state and the input have

    @functools.cached_property
    def _reader(self) -> sdg.Reader:
        """The input."""
        return recorded.reader_of(self.run)

    def _open(self, chunk: sdg.Chunk) -> OpenChunk:
        with reading(self.run.options.input, self._reader):
            self._reader.seek(chunk.start, chunk.bookmark)
            return OpenChunk(sdg.Chunk(chunk.index, chunk.start), self._reader.read(chunk.count), self._reader.schema)

    def _ids(self, opened: OpenChunk) -> list[str]:
        return opened.ids(id_column_of(self.run.options, self._reader.schema))

    def _waiting(self, status: str) -> Iterator[Record]:
        """The documents of a status that are final, but whose chunk is not."""
        for chunk in recorded.chunks_of(self.run, "NOT written"):
            if not (found := list(finished_in(self.run, chunk, status))):
                continue
            opened = self._open(chunk)
            ids = self._ids(opened)
            for position, body in found:
                if position < len(ids):
                    yield self._record(status, ids[position], opened, position, body)

    def _record(self, status: str, id_: str, opened: OpenChunk, position: int, body: Any) -> Record:
        bad = opened.bad.get(position)
        source = bad._asdict() if bad else opened.row(position)
        if status == "row":
            return Record(id_, status, {**source, "id": source.get("id", id_), self.run.options.results_column: body})
        return Record(id_, status, failure={**body, "document": source} if status == "failed" else None)

    def _find_in_input(self, id_: str) -> Record | None:
        """A document that is in no file: waiting for its chunk, filtered, or not finished."""
        for chunk in recorded.chunks_of(self.run, "NOT written OR filtered != '[]'"):
            opened = self._open(chunk)
            if id_ not in (ids := self._ids(opened)):
                continue
            position = ids.index(id_)
            if chunk.written:
                return Record(id_, "filtered") if position in chunk.filtered else None
            for status in ("row", "failed", "filtered"):
                for known, body in finished_in(self.run, chunk, status):
                    if known == position:
                        return self._record(status, id_, opened, position, body)
            return Record(id_, "unfinished")
        return None


def finished_in(run: sdg.Run, chunk: sdg.Chunk, status: str) -> Iterator[tuple[int, Any]]:
    """Position and outcome of each document of a status in an open chunk. Raises StateError."""
    path = rank_file(run.state, chunk.index % run.options.world_size, "sqlite3")
    sql = "SELECT id & 0xffffffff, body FROM documents WHERE id >= ? AND id < ? AND status IN (?, ?) ORDER BY id"
    span = (chunk.index << 32, (chunk.index + 1) << 32, status, "empty" if status == "failed" else status)
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as state:
            yield from ((position, orjson.loads(body)) for position, body in state.execute(sql, span))
    except sqlite3.Error as exc:
        raise sdg.StateError(f"state {path} cannot be read: {exc}") from exc
