"""Helpers for the tests of plugins: run a rollout by the engine itself, without a server.

    from sdg_plugins.testing import try_rollout

    def test_the_headline_is_requested():
        tried = try_rollout(headline, "A long text", answers="Short")
        assert tried.texts == ["Short"]
        assert "A long text" in tried.requests[0].prompt

`check_reader`, `check_writer` and `check_server` check that a plugin keeps the contracts of `sdg.Reader`, `sdg.Writer`
and `sdg.OpenServer`. A violation raises an AssertionError or an `sdg.Error` that describes it. All helpers also work in
a running event loop, and leave nothing on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import sdg
from sdg_plugins.commands.jobs import Job, open_run
from sdg_plugins.commands.stop import Stop
from sdg_plugins.common import checks
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.command_line import Config, as_arguments, parse_with
from sdg_plugins.common.locks import lock_rank
from sdg_plugins.common.notes import DocumentRecord, Exchange, Notes
from sdg_plugins.common.results import base_fields, results_type
from sdg_plugins.common.tables import TableReader
from sdg_plugins.common.values import rows_of
from sdg_plugins.servers.client import Client
from sdg_plugins.servers.connecting import connect
from sdg_plugins.servers.models import Servers
from sdg_plugins.servers.pool import Pool
from sdg_plugins.servers.responses import parse_reply
from sdg_plugins.servers.transport import Transport

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "DocumentRecord",
    "Request",
    "Tried",
    "check_reader",
    "check_server",
    "check_writer",
    "document",
    "try_rollout",
]

MODEL = "test-model"
POSITIONS = 8  # in an input, to which a reader is moved for each size of pieces

Request = Exchange  # the name that tests use
Answer = str | dict[str, Any] | sdg.Reply | Exception
Answers = Answer | Sequence[Answer] | Callable[[dict[str, Any]], Answer]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a rollout did.

    Attributes:
        requests: in the order in which they were sent.
        outcomes: of the documents, in their order.
        results_column: the column of the rows that holds the results.
    """

    requests: list[Request]
    outcomes: list[DocumentRecord]
    results_column: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, read from the file that the engine has written."""
        return [outcome.row for outcome in self.outcomes if outcome.row is not None]

    @property
    def results(self) -> list[dict[str, Any]]:
        """All results in the rows."""
        return [result for row in self.rows for result in row[self.results_column]]

    @property
    def texts(self) -> list[str]:
        """The texts of all results."""
        return [result["text"] for result in self.results]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The records of `failed/`: `{"id", "error", "error_type", "attempts", "document"}`."""
        return [outcome.failure for outcome in self.outcomes if outcome.failure is not None]

    @property
    def filtered(self) -> list[str]:
        """Ids of the documents for which the rollout returned nothing."""
        return [outcome.id for outcome in self.outcomes if outcome.status == "filtered"]


def try_rollout(
    rollout: sdg.Rollout,
    documents: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    answers: Answers = "an answer",
    *,
    options: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Tried:
    """Run a rollout on some documents, with the given answers instead of a model's.

    Args:
        rollout: the function. If its module has hooks, its options and resources are available.
        documents: a text, a row of the input as a dict, or a list of those. The prompt of a row is in `text`, unless
            `options` name another column.
        answers: one for all requests, a list with one for each request, or a function of the payload. A str is the
            model's text; a dict is its JSON, or a whole response if it has `choices`; a `Reply` may have tool calls and
            the like; an exception is raised, such as `sdg.RequestFailed("400", "too long", status=400)`.
        options: by their names in a `--config` file.
        resources: replacements for resources, by their names.

    Raises:
        AssertionError: there are more requests than answers.
        sdg.Error: the plugin breaks a rule, or the rollout has raised it.
    """
    given = [documents] if isinstance(documents, str | Mapping) else list(documents)
    rows = [{"text": item} if isinstance(item, str) else dict(item) for item in given]

    def register(plugins: sdg.Plugins) -> str:
        known = [name for name, entry in plugins.rollouts.items() if entry.factory is rollout]
        name = known[0] if known else getattr(rollout, "__name__", "rollout")
        if not known:
            plugins.rollouts[name] = sdg.Entry(rollout, __name__, "")
        plugins.readers["rows"] = sdg.Entry(lambda run: reader_of(rows), __name__, "")
        plugins.resources |= {name: constant_resource(value) for name, value in (resources or {}).items()}
        return name

    work = functools.partial(_run_scripted, answers)
    return with_config(rollout, {"input": "rows://", **(options or {})}, work, register)


async def _run_scripted(answers: Answers, config: Config) -> Tried:
    """Run a config with scripted answers, and note what happens."""
    notes = Notes()
    notes.attach(config.plugins, config.options.rollout, config.options.writer)
    config.plugins.manager.register(ScriptedServer(answers), "script")

    @contextlib.asynccontextmanager
    async def noted(engine: sdg.Engine, _: Stop) -> AsyncIterator[None]:
        yield
        await notes.finish(engine)

    job = Job(config, Stop(lambda: None), present=noted, connecting=connect_offline)
    await job.prepare()
    await job.work({"": []})
    if isinstance(job.problem, TooFewAnswers):
        raise AssertionError(str(job.problem))
    if job.problem:
        raise job.problem
    return Tried(notes.requests, notes.outcomes, config.options.results_column)


def document(source: str | Mapping[str, Any], prompt_column: str = "text") -> sdg.Document:
    """Make the document that rollouts get for a text or a row. Raises BadDocument if it has no usable prompt."""
    row = {prompt_column: source} if isinstance(source, str) else dict(source)
    reader = reader_of([row])
    chunk = OpenChunk(sdg.Chunk(0, 0), reader.read(1), reader.schema)
    ((_, found),) = chunk.documents(prompt_column, "id" if "id" in row else None)
    if isinstance(found, dict):
        raise sdg.BadDocument(found["error"])
    return found


# ── Contracts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_reader(open_reader: sdg.OpenReader, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check that a reader returns the same rows however it is read: at once, in pieces, from any row, by bookmarks.

    Args:
        open_reader: the registered function or class.
        options: by their names in a `--config` file, `input` among them. A few dozen rows are enough.

    Returns:
        The rows.
    """

    async def check(config: Config) -> list[dict[str, Any]]:
        with locked_run(config) as run:
            whole = CheckedReader(open_reader, run)
            rows = whole.rows(10**6)
            assert not whole.reader.read(1), "read() returned rows after the end"
            total = whole.reader.total()
            assert total is None or total == len(rows), f"after the end total() is {total}, but read() gave {len(rows)}"
            again = CheckedReader(open_reader, run)
            assert again.reader.identity == whole.reader.identity, "`identity` differs when the input is opened again"
            known = json.loads(json.dumps(dict(whole.reader.identity)))
            assert isinstance(whole.reader.continues(known), bool), "continues() did not return a bool"
            check_pieces(open_reader, run, rows)
            return [row for _, row in rows]

    return with_config(open_reader, options, check)


def check_pieces(open_reader: sdg.OpenReader, run: sdg.Run, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Check that pieces of an input have the same rows as the whole."""
    for size in sorted({1, 7, max(1, len(rows) // 2)}):
        straight, jumping = CheckedReader(open_reader, run), CheckedReader(open_reader, run)
        bookmarks: list[tuple[int, str | None]] = []
        for start in range(0, len(rows) + 1, size):
            bookmarks.append((start, straight.reader.tell()))
            expected = rows[start : start + size]
            found = straight.rows(size)
            assert found == expected, f"read({size}) at row {start} returned {found}; reading all gave {expected}"
        some = bookmarks[:: max(1, len(bookmarks) // POSITIONS)]
        for start, bookmark in [*reversed(some), some[-1]]:  # backward, then far forward
            for reading, mark in ((jumping, None), (CheckedReader(open_reader, run), bookmark)):
                reading.reader.seek(start, mark)
                found = reading.rows(size)
                after = f"after seek({start}, {mark!r})"
                assert found == rows[start : start + size], f"{after} read({size}) returned {found}"
        if len(bookmarks) > 2:
            (_, earlier), (later, _) = bookmarks[1], bookmarks[-1]
            reading = CheckedReader(open_reader, run)
            reading.reader.seek(later, earlier)
            found = reading.rows(size)
            after = f"after seek({later}, {earlier!r}), an earlier bookmark,"
            assert found == rows[later:], f"{after} read({size}) returned {found}"


class CheckedReader:
    """A reader whose blocks are checked, and its rows with the names that documents get by default."""

    def __init__(self, open_reader: sdg.OpenReader, run: sdg.Run) -> None:
        self.reader = open_reader(run)
        checks.check_reader(self.reader, "the reader")

    def rows(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The next rows. A row that cannot be read is a dict with the reason."""
        parts = self.reader.read(count)
        checks.check_blocks(parts, count, self.reader)
        found: list[tuple[str, dict[str, Any]]] = []
        for part in parts:
            if isinstance(part, sdg.BadRow):
                found.append((f"{part.file}/{part.row}", {"reason": part.reason}))
                continue
            found += [(f"{part.file}/{part.row + i}", row) for i, row in enumerate(rows_of(part.batch))]
        return found


def check_writer(open_writer: sdg.OpenWriter, options: Mapping[str, Any]) -> None:
    """Check that a writer reads what it has written, and can write a chunk again as after a crash.

    Args:
        open_writer: the registered function or class.
        options: by their names in a `--config` file: an `output-filename` with the writer's suffix, or an `output` with
            its scheme.
    """

    async def check(config: Config) -> None:
        with locked_run(config) as run:
            writer = open_writer(run)
            checks.check_shape(writer, sdg.Writer, "the writer")
            first, second, empty = (sdg.Chunk(i, 3 * i, count=3 * (i < 2)) for i in range(3))
            assert writer.read(first) is None, "read() of a chunk that was never written must return None"
            for chunk in (first, second, empty, first):
                writer.write(chunk, table_for(chunk, run.options.results_column))
            for chunk in (first, second, empty):
                found = writer.read(chunk)
                assert found is not None, f"read() returned None for chunk {chunk.index}, which was written"
                rows = f"chunk {chunk.index} has {chunk.rows} rows"
                assert found.num_rows == chunk.rows, f"{rows}, read() returned {found.num_rows}"
                names = ("id", "text")
                expected = table_for(chunk, run.options.results_column).select(names).to_pylist()
                shown = [{name: row.get(name) for name in names} for row in found.to_pylist()]
                assert shown == expected, f"read() returned other rows for chunk {chunk.index}"

    with_config(open_writer, options, check)


def table_for(chunk: sdg.Chunk, results_column: str) -> pa.Table:
    """Rows for a chunk, as the engine hands them to a writer."""
    import pyarrow as pa

    ids = [f"d{chunk.start + i}" for i in range(chunk.count)]
    columns = {
        "id": pa.array(ids, pa.string()),
        "text": pa.array([f"{name}: “text”\nof two lines" for name in ids], pa.string()),
        results_column: pa.array([[{"text": name}] for name in ids], results_type(base_fields())),
    }
    return pa.table(columns)


def check_server(
    open_server: sdg.OpenServer, options: Mapping[str, Any] | None = None, prompt: str = "Say hello."
) -> str:
    """Check that a server starts, responds to the engine's own client, and leaves no task behind.

    Args:
        open_server: the registered function.
        options: by their names in a `--config` file.
        prompt: what to send to it.

    Returns:
        The text of its response.
    """

    async def check(config: Config) -> str:
        with locked_run(config) as run:
            before = asyncio.all_tasks()
            async with open_server(run) as servers:
                checks.check_servers(servers, "the server")
                async with connect(run, list(servers)) as client:
                    payload = sdg.sampling(run.options, run.model) | {"messages": [{"role": "user", "content": prompt}]}
                    reply, _ = await client.send(sdg.Request("/chat/completions", payload))
            left = asyncio.all_tasks() - before
            assert not left, f"the server has ended, but its tasks are left: {left}"
            return reply.text

    return with_config(open_server, options or {}, check)


# ── Runs without a server ────────────────────────────────────────────────────────────────────────────────────────────


def with_config(
    thing: Callable[..., Any],
    options: Mapping[str, Any],
    work: Callable[[Config], Coroutine[Any, Any, T]],
    register: Callable[[sdg.Plugins], str] = lambda plugins: "summarize",
) -> T:
    """Do some work with a config made of options; its output and state are deleted afterwards.

    Args:
        thing: the function or class under test; its module is loaded as a plugin.
        options: by their names in a `--config` file.
        work: what to do.
        register: changes what is registered, and returns the name of the rollout.
    """
    with tempfile.TemporaryDirectory(prefix="sdg-testing-") as folder, ThreadPoolExecutor(1) as pool:
        plugins, _ = sdg.Plugins.load([])
        plugins.quiet = True
        own: Any = sys.modules.get(getattr(thing, "__module__", ""))
        for module in (sys.modules[__name__], own):  # this one, too: what is registered here belongs to it
            if isinstance(module, types.ModuleType):
                plugins.add(module, "")
        plugins.readers["rows"] = sdg.Entry(lambda run: reader_of([]), __name__, "")
        rollout = register(plugins)
        common: dict[str, Any] = {"output": f"{folder}/output", "state-dir": f"{folder}/state"}
        common |= {"max-concurrent-documents": 1, "max-failure-rate": 1}  # failures are results, too
        argv = as_arguments({**common, "no-progress": True, **options}, [])
        try:
            config = parse_with(plugins, rollout, argv)
        except SystemExit as exc:
            raise sdg.UsageError("the options are invalid: see standard error") from exc
        # In a thread of its own, because the test may be running in an event loop.
        return pool.submit(asyncio.run, work(config)).result()


@contextlib.contextmanager
def locked_run(config: Config) -> Iterator[sdg.Run]:
    """The run of a config, with its rank locked. Raises what stopped it."""
    task = asyncio.current_task()
    assert task is not None
    stop = Stop(task.cancel)
    try:
        with lock_rank(run := open_run(config, stop)):
            yield run
    except asyncio.CancelledError:
        if stop.reason is None:
            raise
    if stop.reason:
        raise stop.reason


def constant_resource(value: Any) -> sdg.Entry:
    """A resource that yields the same value in every run."""
    return sdg.Entry(lambda run: contextlib.nullcontext(value), __name__, "")


def reader_of(rows: list[dict[str, Any]]) -> TableReader:
    """A reader of rows that are given as dicts."""
    import pyarrow as pa

    names = {name: None for row in rows for name in row}
    return TableReader(pa.table({name: [row.get(name) for row in rows] for name in names}).combine_chunks())


class TooFewAnswers(sdg.Error):
    """There are more requests than answers."""


@contextlib.asynccontextmanager
async def connect_offline(run: sdg.Run, servers: Servers) -> AsyncIterator[Client]:
    """A client without servers."""
    run.model = run.options.model or MODEL
    yield Client(Transport({}, run.options.request_timeout), Pool([], 1), run)


class ScriptedServer:
    """A plugin that takes the place of the servers, and responds with the answers of a test."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._left = iter(answers) if isinstance(answers, Sequence) and not isinstance(answers, str) else None

    @sdg.hookimpl(trylast=True)
    def wrap_requests(self, run: sdg.Run) -> sdg.Send:
        """See `sdg.Hooks`. Nothing is ever sent."""

        async def scripted(request: sdg.Request) -> sdg.Response:
            run.counts["requests"] += 1
            answer = self._next(request.payload, run.counts["requests"])
            if isinstance(answer, Exception):
                raise answer
            body = json.dumps(response_body(answer, request.payload)).encode()
            return sdg.Response(parse_reply(json.loads(body)), body)

        return scripted

    def _next(self, payload: dict[str, Any], number: int) -> Any:
        if self._left is None:
            return self._answers(payload) if callable(self._answers) else self._answers
        answer = next(self._left, None)
        if answer is None:
            raise TooFewAnswers(f"request {number} has no answer: `answers` has only {number - 1}")
        return answer


def response_body(answer: Any, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON that a server would have sent for an answer."""
    if isinstance(answer, dict) and "choices" in answer:
        return answer
    reply = answer if isinstance(answer, sdg.Reply) else None
    if not isinstance(answer, str | dict | sdg.Reply):
        raise TypeError(f"an answer is a {type(answer).__name__}, expected a str, dict, Reply or exception")
    if reply is None:
        reply = sdg.Reply(answer if isinstance(answer, str) else json.dumps(answer))
    message = {"content": reply.text, "reasoning_content": reply.reasoning, "tool_calls": reply.tool_calls}
    choice: dict[str, Any] = {"finish_reason": reply.finish_reason or "stop", "logprobs": reply.logprobs}
    choice |= {"text": reply.text} if "prompt" in payload else {"message": message}
    choices = [{"index": i, **choice} for i in range(payload.get("n") or 1)]
    words = len(str(payload.get("prompt") or payload["messages"]).split())
    usage = {"prompt_tokens": words, "completion_tokens": len(reply.text.split()) * len(choices)}
    return {"choices": choices, "usage": reply.usage or {**usage, "total_tokens": sum(usage.values())}}
