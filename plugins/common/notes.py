"""Record what an engine sends and writes, for `--preview` and for the tests of plugins."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.outputs import read_failed, read_rows
from sdg_plugins.common.rows import shape_of
from sdg_plugins.common.values import id_text, rows_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass
class Exchange:
    """One request of a rollout and its result.

    Attributes:
        path: below the API root.
        payload: as it was sent.
        reply: None if there was none.
        error: why the request failed.
        to: the name of a further model; "" for the run's own.
    """

    path: str
    payload: dict[str, Any]
    reply: sdg.Reply | None = None
    error: str = ""
    to: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last message, or the prompt of a completion; other payloads as JSON."""
        if "prompt" in self.payload:
            return str(self.payload["prompt"])
        if "messages" not in self.payload:
            return orjson.dumps(self.payload).decode()
        content = self.payload["messages"][-1].get("content")
        return content if isinstance(content, str) else orjson.dumps(content).decode()


@dataclasses.dataclass
class DocumentRecord:
    """The outcome of a document.

    Attributes:
        id: of the document.
        status: row, filtered or failed; "" if it was not finished.
        row: as it was written.
        failure: the record in `failed/`.
        rollouts: the requests of each rollout.
    """

    id: str
    status: str
    row: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    rollouts: list[list[Exchange]] = dataclasses.field(default_factory=list)


class Notes:
    """A plugin that records what happens in a run. For this it wraps the rollout and the writer in use.

    Attributes:
        requests: all requests, in the order in which they were sent.
        outcomes: of all documents, in order; set by `finish`.
        schema: of the rows.
    """

    def __init__(self) -> None:
        self.requests: list[Exchange] = []
        self.outcomes: list[DocumentRecord] = []
        self.schema: pa.Schema | None = None
        self._documents: dict[int, tuple[str, list[list[Exchange]]]] = {}
        self._rollouts: dict[object, list[Exchange]] = {}
        self._tables: dict[int, pa.Table] = {}

    def attach(self, plugins: sdg.Plugins, rollout: str, writer: str) -> None:
        """Record all requests, and what the rollout and the writer of these names do."""
        plugins.manager.register(self, f"notes {id(self)}")
        entry = plugins.rollouts[rollout]
        plugins.rollouts[rollout] = entry._replace(factory=self._noting_rollout(entry.factory))
        entry = plugins.writers[writer]
        plugins.writers[writer] = entry._replace(factory=self._noting_writer(entry.factory))

    @sdg.hookimpl(trylast=True)  # nearest to the server: payloads are recorded as they are sent
    def wrap_requests(self, run: sdg.Run, send: sdg.Send) -> sdg.Send:
        """See `sdg.Hooks`."""

        async def noted(request: sdg.Request) -> sdg.Response:
            exchange = Exchange(request.path, request.payload, to=request.to)
            self.requests.append(exchange)
            if request.rollout in self._rollouts:
                self._rollouts[request.rollout].append(exchange)
            try:
                response = await send(request)
            except sdg.RequestFailed as exc:
                exchange.error = str(exc)
                raise
            exchange.reply = response.reply
            return response

        return noted

    def _noting_rollout(self, rollout: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(rollout)
        async def noted(document: sdg.Document, generate: sdg.Generate, **resources: Any) -> Any:
            self._rollouts[generate] = []
            self._documents.setdefault(document.index, (document.id, []))[1].append(self._rollouts[generate])
            return await rollout(document, generate, **resources)

        return noted

    def _noting_writer(self, open_writer: sdg.OpenWriter) -> sdg.OpenWriter:
        return lambda run: NotingWriter(open_writer(run), self._tables)

    async def finish(self, engine: sdg.Engine) -> None:
        """Collect the outcomes of an engine that has finished its work."""
        for chunk in (await engine.store.chunks()).values():
            self.outcomes.extend(self._of_chunk(engine, chunk))

    def _of_chunk(self, engine: sdg.Engine, chunk: sdg.Chunk) -> Iterator[DocumentRecord]:
        rows: Iterator[dict[str, Any]] = iter(())
        failures: Iterator[dict[str, Any]] = iter(())
        if chunk.written:
            table = read_rows(engine.run, engine.outlet.writer, chunk)
            table = self._tables.get(chunk.index) if table is None else table  # some writers cannot read
            if table is not None:  # a chunk without rows is not written
                self.schema, rows = self.schema or table.schema, iter(rows_of_documents(engine.run, table))
            failures = iter(read_failed(engine.run, chunk))
        for position in range(chunk.count):
            id_, rollouts = self._documents.get(chunk.start + position, ("", []))
            if not chunk.written:
                yield DocumentRecord(id_, "", rollouts=rollouts)
            elif position in chunk.failed:
                failure = next(failures)
                yield DocumentRecord(id_text(failure["id"]), "failed", failure=failure, rollouts=rollouts)
            elif position in chunk.filtered:
                yield DocumentRecord(id_, "filtered", rollouts=rollouts)
            else:
                yield DocumentRecord(id_, "row", row=next(rows), rollouts=rollouts)


def rows_of_documents(run: sdg.Run, table: pa.Table) -> list[dict[str, Any]]:
    """A row for each document; of several flat rows all, by their numbers."""
    rows = rows_of(table)
    firsts = [*shape_of(run.options).firsts(table), len(rows)]
    groups = [rows[start:end] for start, end in itertools.pairwise(firsts)]
    return [group[0] if len(group) == 1 else {f"row {i}": row for i, row in enumerate(group)} for group in groups]


class NotingWriter:
    """A writer that keeps the tables that it passes to another one."""

    def __init__(self, writer: sdg.Writer, tables: dict[int, pa.Table]) -> None:
        self._writer, self._tables = writer, tables

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        """See `sdg.Writer`."""
        self._writer.write(chunk, rows)
        self._tables[chunk.index] = rows

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`."""
        try:
            return self._writer.read(chunk)
        except sdg.OutputError:  # a writer that cannot read
            return self._tables.get(chunk.index)
