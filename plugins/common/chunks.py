"""A chunk's way from the reader to its file: the intake reads chunks, the outlet writes them."""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.checks import check_blocks, reading
from sdg_plugins.common.claims import check_claim
from sdg_plugins.common.digests import digest_of, same_rows
from sdg_plugins.common.features import described
from sdg_plugins.common.identity import edited, provenance
from sdg_plugins.common.ids import SeenIds
from sdg_plugins.common.kinds import decoder, has_nan, parse_json, relaxed
from sdg_plugins.common.outputs import output_files, read_failed, read_rows
from sdg_plugins.common.paths import follow, parse_path, prompt_column_of
from sdg_plugins.common.recorded import chunks_in, chunks_of
from sdg_plugins.common.results import infer_fields
from sdg_plugins.common.resuming import ROWS, Known, known_chunks
from sdg_plugins.common.returned import no_prompt, results_of, status_of
from sdg_plugins.common.rows import NUMBER, empty_rows, numbered, shape_of, with_messages
from sdg_plugins.common.state import fixed_fields, promised_fields, recorded_fields, settle_fields, spool_folder
from sdg_plugins.common.tasks import read_ahead
from sdg_plugins.common.unify import conformed
from sdg_plugins.common.values import (
    EmptyDocument,
    id_column_of,
    id_text,
    json_id,
    json_line,
    null_row,
    parse_prompt,
    pick,
    prune,
    rows_of,
    values_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

STEP = 256  # documents that are converted to Python at a time
GONE = {"error": "its record is gone; it was about to be retried", "error_type": "Unknown", "attempts": 0}
EXTRA = "source_extra"  # the column in which readers of JSON keep what does not fit the others


class OpenChunk:
    """A chunk between reading and writing. Its rows wait in an Arrow file, so memory does not grow with stragglers.

    Attributes:
        bad: the rows that could not be read, by position.
        remaining: documents that this process has to finish.
        whole: the chunk is then complete, because no others are left.
        weight: documents that count for the engine's window.
        resumed: an earlier process has begun it.
        only: positions of the documents that are run; None for all.
    """

    def __init__(
        self, chunk: sdg.Chunk, parts: list[sdg.Block | sdg.BadRow], schema: pa.Schema, spool: Path | None = None
    ) -> None:
        import pyarrow as pa

        self.chunk = chunk
        self.bad: dict[int, sdg.BadRow] = {}
        self.remaining = self.weight = 0
        self.whole = True
        self.resumed = False
        self.only: frozenset[int] | None = None
        self._origins: list[tuple[int, str, int]] = []  # (position, file, row there)
        self._spool = spool
        batches = []
        schema = pa.schema([relaxed(field) for field in schema], schema.metadata)
        for part in parts:
            self._origins.append((chunk.count, part.file, part.row))
            if isinstance(part, sdg.BadRow):
                self.bad[chunk.count] = part
            batches.append(null_row(schema) if isinstance(part, sdg.BadRow) else conformed(part.batch, schema))
            chunk.count += batches[-1].num_rows
        self.table = pa.Table.from_batches(batches, schema).unify_dictionaries()
        chunk.digest = digest_of(self.table, tuple(self.bad))
        if spool:
            with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
                file.write_table(self.table)
            self.table = pa.ipc.open_file(pa.memory_map(str(spool))).read_all()

    def expect(self, final: Mapping[int, str], resumed: bool) -> None:
        """Learn which documents are final already."""
        self.resumed = resumed
        left = self.chunk.count - len(final)
        self.remaining = left if self.only is None else len(self.only - final.keys())
        self.whole = self.remaining == left
        self.weight = self.chunk.count if self.whole else self.remaining

    @property
    def files(self) -> list[str]:
        """The files that the rows come from."""
        return list(dict.fromkeys(file for _, file, _ in self._origins))

    def row(self, position: int) -> dict[str, Any]:
        """One row as Python values."""
        return rows_of(self.table.slice(position, 1))[0]

    def ids(self, column: str | None) -> list[str]:
        """The documents' ids as text; see `own_ids`."""
        return list(map(id_text, self.own_ids(column)))

    def own_ids(self, column: str | None) -> list[Any]:
        """The documents' ids: the column's values as they are, or `<file>/<row>` where there is none."""
        ends = [position for position, _, _ in self._origins[1:]] + [self.chunk.count]
        names = [
            f"{file}/{row + i}"
            for (start, file, row), end in zip(self._origins, ends, strict=True)
            for i in range(end - start)
        ]
        if column is None:
            return names
        own = values_of(self.table.column(column))
        extra = self._extra(column)
        own = [extra(position) if value is None else value for position, value in enumerate(own)]
        return [name if value is None else value for name, value in zip(names, own, strict=True)]

    def _extra(self, column: str) -> Callable[[int], Any]:
        """The value of a row that does not fit its column: readers of JSON keep it in the column `source_extra`."""
        if EXTRA not in self.table.column_names:
            return lambda position: None
        kept = self.table.column(EXTRA)
        decode = decoder(kept.type) or (lambda value: parse_json(value.encode()) if value else None)

        def extra(position: int) -> Any:
            value = decode(kept[position].as_py())
            return value.get(column) if isinstance(value, dict) else None

        return extra

    def prompts(self, path: str | None) -> Iterator[Any]:
        """The value at a path in each row; without a path the row's columns as text."""
        if path is None:
            for start in range(0, self.chunk.count, STEP):
                rows = rows_of(self.table.slice(start, STEP))
                yield from ("\n".join(f"{name}: {value}" for name, value in row.items()) for row in rows)
            return
        root, steps = parse_path(path, self.table.column_names)
        column = self.table.column(root)
        clean, extra = prune(column.type) or (lambda value: value), self._extra(root)
        for start in range(0, self.chunk.count, STEP):
            for position, value in enumerate(values_of(column.slice(start, STEP)), start):
                whole = extra(position) if value is None else clean(value)
                yield follow(whole, steps) if steps else whole

    def documents(
        self, prompt_column: str | None, id_column: str | None
    ) -> Iterator[tuple[int, sdg.Document | dict[str, Any]]]:
        """Position and document of each row in order; instead of one without a usable prompt its failure."""
        ids = self.ids(id_column)
        skipped = set[int]() if self.only is None else set(range(self.chunk.count)) - self.only
        for position, value in enumerate(self.prompts(prompt_column)):
            if position in skipped:
                continue
            if position in self.bad:
                yield position, no_prompt("BadRow", self.bad[position].reason)
                continue
            try:
                text, messages = parse_prompt(value)
            except sdg.BadDocument as exc:
                yield position, no_prompt("BadDocument", f"column {prompt_column!r} {exc}", type(exc) is EmptyDocument)
                continue
            index = self.chunk.start + position
            yield (
                position,
                sdg.Document(ids[position], text, messages, index, functools.partial(self.row, position)),
            )

    def close(self) -> None:
        """Drop the rows."""
        del self.table
        if self._spool:
            self._spool.unlink(missing_ok=True)


class Intake:
    """Reads this rank's chunks, in a thread of its own and one chunk ahead.

    Attributes:
        chosen: positions of the documents that are run, by the index of their chunk. None for all.
        retrying: these are the failed ones of a run, not a sample.
        on_first: called when the first chunk has been read; not at all if there is nothing to do.
    """

    def __init__(self, run: sdg.Run, reader: sdg.Reader) -> None:
        self._run, self.reader = run, reader
        self.prompt_column = prompt_column_of(run.options, reader.schema)
        self.id_column = id_column_of(run.options, reader.schema)
        self.chosen: Mapping[int, frozenset[int]] | None = None
        self.retrying = False
        self.on_first: Callable[[], None] = lambda: None
        self._thread = ThreadPoolExecutor(1, "sdg-reader")
        self._clear_leftovers()

    def __enter__(self) -> None:
        self._thread.__enter__()

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete what a killed process of this rank has left in the state."""
        folder = self._run.state / "open"
        folder.mkdir(exist_ok=True)
        rank = f"{self._run.options.rank:05d}"
        for leftover in [*folder.glob(f"{rank}_*"), *self._run.state.glob(f".{rank}.*.tmp")]:
            leftover.unlink(missing_ok=True)  # a heartbeat may be using it

    def expected(self) -> int | None:
        """How many documents belong to this rank, as far as the reader knows."""
        if self.chosen is not None and not self.retrying:
            return sum(map(len, self.chosen.values()))
        options, total = self._run.options, self.reader.total()
        if total is None:
            return None
        full, rest = divmod(min(total, options.max_documents or total), options.records_per_chunk)
        mine = len(range(options.rank, full, options.world_size)) * options.records_per_chunk
        return int(mine + (rest if full % options.world_size == options.rank else 0))

    def known(self) -> Known:
        """The chunks that earlier processes of this rank have read. Raises OutputError and StateError."""
        return known_chunks(self._run)

    def chunks(self, known: Known) -> AsyncGenerator[OpenChunk, None]:
        """This rank's chunks that are not written, and those that may have to be reopened.

        Args:
            known: the chunks that earlier processes have read.
        """
        options = self._run.options
        number = 1 + min(7, options.max_concurrent_generations // options.records_per_chunk // 2)
        return read_ahead(self._thread, self._read(known), number)

    def _read(self, known: Known) -> Iterator[OpenChunk]:
        options = self._run.options
        size, most = options.records_per_chunk, options.max_documents or sys.maxsize
        indices = range(options.rank, sys.maxsize, options.world_size)
        bookmark, begun = None, False
        for index, nearer in known.to_read(indices if self.chosen is None else sorted(self.chosen)):
            start, bookmark, chunk = index * size, nearer or bookmark, known.get(index)
            count = min(size, most - start)
            if chunk:
                count = max(count, chunk.count)  # what was begun with a larger --max-documents is finished
            if count <= 0:
                return
            with reading(options.input, self.reader):
                self.reader.seek(start, bookmark)
                bookmark = self.reader.tell()
                parts = self.reader.read(count)
                check_blocks(parts, count, self.reader)
            if not parts:
                return
            spool = spool_folder(self._run) / f"{options.rank:05d}_{index:05d}.arrow"
            opened = OpenChunk(sdg.Chunk(index, start, bookmark=bookmark), parts, self.reader.schema, spool)
            if chunk and not same_rows(opened, chunk):
                raise sdg.InputError(
                    f"--input {options.input}: {', '.join(opened.files)} has changed since chunk {index} was begun: "
                    "restore it, or start over with --fresh"
                )
            if (
                chunk
                and chunk.written
                and chunk.count == opened.chunk.count
                and not (options.retry_failed and chunk.failed)
            ):
                opened.close()  # the last one, and nothing was added to the input
                return
            if not begun:
                begun = True
                self.on_first()
            opened.only = None if self.chosen is None else self.chosen[index]
            yield opened
            if opened.chunk.count < count:
                return


class Outlet:
    """Writes the rows and failures of complete chunks, and reads them back.

    Attributes:
        fields: Arrow types of the fields of results; None until they are settled for all ranks of the run.
    """

    status_of, results_in = staticmethod(status_of), staticmethod(results_of)

    def __init__(self, run: sdg.Run, writer: sdg.Writer) -> None:
        self._run, self.writer, self._shape = run, writer, shape_of(run.options)
        self._ids = SeenIds()
        self._doubled = False  # ids; that was said
        self.fields = recorded_fields(run.state) or settle_fields(run, promised_fields(run))

    def settle(self, outcomes: Iterable[bytes]) -> None:
        """Learn the fields of results from a chunk's outcomes, if there are results in it."""
        rows = (body for _, status, body in _each(outcomes) if status == "row")
        # The type of a text does not depend on its length, but the memory that all of them take does.
        results = [
            {name: "" if isinstance(value, str) else value for name, value in result.items() if name != NUMBER}
            for body in rows
            for result in body
        ]
        own = settle_fields(self._run, infer_fields(results)) if results else None
        self.fields = own or recorded_fields(self._run.state)  # another rank's

    @staticmethod
    def stored(outcome: Any) -> bytes:
        """An outcome as JSON for the store, with NaN and infinities, which orjson makes null. Raises TypeError."""
        body = orjson.dumps(outcome, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
        if b"null" not in body or not has_nan(outcome):
            return body
        return json.dumps(outcome, default=lambda value: orjson.loads(Outlet.stored(value))).encode()

    def settle_without_results(self) -> None:
        """There is no result at all: the files are empty."""
        self.fields = recorded_fields(self._run.state) or fixed_fields(self._run.options)

    def results_of(self, outcomes: Sequence[sdg.Outcome]) -> list[dict[str, Any]]:
        """The results of a document, from the outcomes of its rollouts."""
        if self._run.options.flat:
            return numbered(outcomes)
        if len(outcomes) == 1:
            return outcomes[0] if isinstance(outcomes[0], list) else []
        made = [(number, outcome) for number, outcome in enumerate(outcomes) if isinstance(outcome, list)]
        return [{"rollout": number, **result} for number, outcome in made for result in outcome]

    def with_messages(self, results: list[dict[str, Any]], asked: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """Results as they are stored: with their messages (--keep-messages), and the code that has made them."""
        results = edited(self._run, results)
        return with_messages(results, asked) if self._run.options.keep_messages else results

    def write(self, opened: OpenChunk, outcomes: Iterable[bytes], id_column: str | None) -> None:
        """Write a chunk's rows and failures; sets which of its documents were filtered and failed."""
        assert self.fields is not None
        run, chunk = self._run, opened.chunk
        statuses: dict[str, list[int]] = {"row": [], "filtered": [], "failed": [], "empty": []}
        failures: list[Any] = []
        own_ids = opened.own_ids(id_column)
        ids = list(map(id_text, own_ids))
        tables = (
            self._shape.table(pick(opened.table, positions), [ids[i] for i in positions], bodies, self.fields or {})
            for positions, bodies in self._rows(opened, outcomes, statuses, failures)
        )
        check_claim(run)
        head = next(tables)  # without rows: it names the columns
        self._write_tables(chunk, head, tables, large=not isinstance(outcomes, list))
        chunk.filtered, chunk.empty = tuple(statuses["filtered"]), len(statuses["empty"])
        chunk.failed = tuple(sorted(statuses["failed"] + statuses["empty"]))
        if id_column is not None and not self._doubled and (double := self._ids.add(ids)):
            self._doubled = True
            sdg.say(f"{double:,} of {len(ids):,} ids in {run.path_of(chunk)} occur twice: see --id-column")
        self._write_failed(opened, own_ids, failures)
        stamp, failed = (run.output.stamps.pop(path(chunk), None) for path in (run.path_of, run.failed_path_of))
        chunk.size, chunk.hash = stamp or (None, None)  # a third-party writer may write by itself
        chunk.failed_hash = failed and failed.hash

    def _rows(
        self, opened: OpenChunk, outcomes: Iterable[bytes], statuses: dict[str, list[int]], failures: list[Any]
    ) -> Iterator[tuple[list[int], list[Any]]]:
        """Positions and results of PIECE rows at a time; adds to the positions by status, and to the failures."""
        yield [], []  # names the columns
        for text in outcomes:
            rows: list[tuple[int, Any]] = []
            for position, status, body in parse_json(text, exact=False):
                if position >= opened.chunk.count:
                    raise mismatch(opened.chunk)
                statuses[status].append(position)
                if status in {"failed", "empty"}:
                    failures.append(body)
                elif status == "row":
                    rows.append((position, body))
            for start in range(0, len(rows), sdg.PIECE):
                some = rows[start : start + sdg.PIECE]
                yield [position for position, _ in some], [body for _, body in some]
        if sorted(position for each in statuses.values() for position in each) != list(range(opened.chunk.count)):
            raise mismatch(opened.chunk)

    def _write_tables(self, chunk: sdg.Chunk, head: pa.Table, tables: Iterator[pa.Table], large: bool) -> None:
        """Write a chunk's rows, if there are any; those of a large one table by table, where the writer can do that."""
        import pyarrow as pa

        metadata, write = self._metadata(head.schema), getattr(self.writer, "write_pieces", None)
        if not (large and write):
            rows = pa.concat_tables([head, *tables]).replace_schema_metadata(metadata)
            if rows.num_rows:
                self._write_rows(chunk, rows)
        elif first := next((table for table in tables if table.num_rows), None):
            with sdg.at_work(f"the writer of {self._run.output.path(self._run.path_of(chunk))}", self.writer):
                write(chunk, head.schema.with_metadata(metadata), itertools.chain([first], tables))

    def _write_rows(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        with sdg.at_work(f"the writer of {self._run.output.path(self._run.path_of(chunk))}", self.writer):
            self.writer.write(chunk, rows)

    def finish(self) -> None:
        """Leave a file without rows if the run has no rows at all: it names the columns.

        All other chunks without rows have no file, because one such file among others makes the whole dataset
        unloadable in some versions of `datasets`: 4.8 stumbles over any file without rows that is not the last one.
        """
        run, first = self._run, sdg.Chunk(0, 0)
        state = run.state / "00000.sqlite3"  # of the rank that has written it
        chunk = chunks_in(state, "WHERE chunk = ?", 0).get(0) if state.exists() else None
        if chunk is None or not chunk.written or chunk.rows:
            return
        path, files = run.path_of(first), output_files(run)
        if path in files and len(files) > 1:
            self._delete(path)
        elif not files and not run.options.rank and not next(chunks_of(run, f"written AND ({ROWS})"), None):
            self._write_rows(first, self._no_rows(run.schema))

    def _delete(self, path: str) -> None:
        """Delete a file without rows. Where that is not permitted, it stays, and the run goes on."""
        try:
            self._run.output.delete(path)
        except sdg.OutputError as exc:
            if self._run.output.local:
                raise
            sdg.say(f"{exc}. This file has no rows: `datasets` may fail to load the output until you delete it")

    def check(self, schema: pa.Schema) -> None:
        """Have the writer prove that it can write rows of this input: before a request is paid for."""
        if not hasattr(self.writer, "check"):
            return
        self.writer.check(self._no_rows(schema).schema)

    def _no_rows(self, source: pa.Schema | None) -> pa.Table:
        """The columns of the rows that are made of an input with some schema."""
        assert source is not None
        rows = empty_rows(self._run.options, source, self.fields or fixed_fields(self._run.options))
        return rows.replace_schema_metadata(self._metadata(rows.schema))

    def _metadata(self, schema: pa.Schema) -> dict[Any, Any]:
        """Key-value metadata for files of rows with this schema."""
        return {**described(schema, self._run.schema), **provenance(self._run)}

    def _write_failed(self, opened: OpenChunk, ids: list[Any], failures: list[dict[str, Any]]) -> None:
        path = self._run.failed_path_of(opened.chunk)
        if not failures:
            self._run.output.clear(path)
            return
        lines = []
        for position, failure in zip(opened.chunk.failed, failures, strict=True):
            bad = opened.bad.get(position)
            row = bad._asdict() if bad else opened.row(position)
            lines.append(json_line({"id": json_id(ids[position]), **failure, "document": row}))
        self._run.output.write(path, lambda file: file.write(b"".join(lines)))

    def outcomes(self, chunk: sdg.Chunk) -> list[tuple[int, str, bytes]]:
        """The documents of a written chunk as the store would have them, from its files."""
        run, gone = self._run, set(chunk.filtered) | set(chunk.failed)
        table = read_rows(run, self.writer, chunk) if chunk.rows else None
        if chunk.rows and (table is None or len(self._shape.firsts(table)) != chunk.rows):
            path = run.output.path(run.path_of(chunk))
            raise sdg.OutputError(f"{path} is not as it was written: restore it, or use --fresh")
        rows = self._shape.results(table, self.fields or {}) if table is not None else []
        kept = [position for position in range(chunk.count) if position not in gone]
        outcomes = [(position, "row", self.stored(results)) for position, results in zip(kept, rows, strict=True)]
        outcomes += [(position, "filtered", b"null") for position in chunk.filtered]
        try:
            failures = read_failed(run, chunk)
        except ValueError:
            failures = []
        if len(failures) != len(chunk.failed) and run.options.retry_failed:  # they are replaced soon
            failures = [dict(GONE) for _ in chunk.failed]
        if len(failures) != len(chunk.failed):
            raise sdg.OutputError(f"{run.output.path(run.failed_path_of(chunk))} is not as it was written")
        for position, record in zip(chunk.failed, failures, strict=True):
            body = {name: value for name, value in record.items() if name not in {"id", "document"}}
            outcomes.append((position, status_of(body), orjson.dumps(body)))
        return outcomes


def mismatch(chunk: sdg.Chunk) -> sdg.StateError:
    """The error for a chunk whose documents in the state are not those of the input."""
    return sdg.StateError(f"state of chunk {chunk.index} does not match its input: start over with --fresh")


def _each(outcomes: Iterable[bytes]) -> Iterator[tuple[int, str, Any]]:
    """Position, status and body of each document in lists from `Store.outcomes_of`."""
    for text in outcomes:
        yield from parse_json(text, exact=False)
