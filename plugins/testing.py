"""Helpers for the tests of plugins: the engine itself runs a rollout, without a server.

    from sdg_plugins.testing import try_rollout

    def test_the_headline_is_requested():
        tried = try_rollout(headline, "A long text", answers="Short")
        assert tried.texts == ["Short"]
        assert "A long text" in tried.requests[0].prompt

`check_reader`, `check_writer` and `check_server` check that a plugin keeps the contracts of `sdg.Reader`, `sdg.Writer`
and `sdg.OpenServer`; a violation is an AssertionError or an `sdg.Error` that describes it. All of these also work in a
running event loop. Nothing is left on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

import sdg
from sdg_plugins.commands.run import Job, Servers, Stop, open_run
from sdg_plugins.common import checks
from sdg_plugins.common.chunks import OpenChunk, rows_of
from sdg_plugins.common.command_line import Config, as_arguments, parse_with
from sdg_plugins.common.notes import Exchange, Notes, Outcome
from sdg_plugins.common.results import base_fields, results_type
from sdg_plugins.common.state import lock_rank
from sdg_plugins.servers.client import Client
from sdg_plugins.servers.connecting import connect
from sdg_plugins.servers.pool import Pool

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Outcome", "Request", "Tried", "check_reader", "check_server", "check_writer", "document", "try_rollout"]

MODEL = "test-model"
PLACES = 8  # places in an input that are visited, for each size of pieces

Request = Exchange  # as tests call it
Answer = str | dict[str, Any] | sdg.Reply | Exception
Answers = Answer | Sequence[Answer] | Callable[[dict[str, Any]], Answer]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tried:
    """What came of a rollout: requests in the order in which they were sent, outcomes in that of the documents."""

    requests: list[Request]
    outcomes: list[Outcome]
    results_column: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows, as they are read from the file that the engine has written."""
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
    """Run a rollout on some documents, with answers that are given here instead of a model's.

    Args:
        rollout: the function; if its module has hooks their options and resources are there.
        documents: texts, or rows of the input as dicts (with the prompt in `text`, unless `options` say otherwise);
            one or a list of them.
        answers: one for all requests, a list that is used up, or a function of the payload. A str is the model's text;
            a dict is its JSON, or with `choices` the whole body of an answer; a `Reply` may have tool calls and the
            like; an exception is raised, such as `sdg.RequestFailed("400", "too long", status=400)`.
        options: by the names that they have in a file for `--config`.
        resources: stand-ins for resources, by their names.

    Raises:
        AssertionError: there are more requests than answers.
        sdg.Error: the plugin breaks a rule, or the rollout has raised it.
    """
    given = [documents] if isinstance(documents, str | Mapping) else list(documents)
    rows = [{"text": item} if isinstance(item, str) else dict(item) for item in given]

    def prepare(plugins: sdg.Plugins) -> str:
        known = [name for name, entry in plugins.rollouts.items() if entry.factory is rollout]
        name = known[0] if known else getattr(rollout, "__name__", "rollout")
        if not known:
            plugins.rollouts[name] = sdg.Entry(rollout, __name__, "")
        plugins.readers["rows"] = sdg.Entry(lambda run: Rows(rows), __name__, "")
        plugins.resources |= {name: stand_in(thing) for name, thing in (resources or {}).items()}
        return name

    async def attempt(config: Config) -> Tried:
        notes = Notes()
        notes.attach(config.plugins, config.options.rollout, config.options.writer)
        config.plugins.manager.register(Script(answers), "script")
        stop = Stop(lambda: None)

        @contextlib.asynccontextmanager
        async def noted(engine: sdg.Engine, _: Stop) -> AsyncIterator[None]:
            yield
            await notes.finish(engine)

        job = Job(config, stop, present=noted, connecting=offline)
        await job.prepare()
        await job.work([])
        if isinstance(job.problem, Unanswered):
            raise AssertionError(str(job.problem))
        if job.problem:
            raise job.problem
        return Tried(notes.requests, notes.outcomes, config.options.results_column)

    return attempted(rollout, {"input": "rows://", **(options or {})}, attempt, prepare)


def document(source: str | Mapping[str, Any], prompt_column: str = "text") -> sdg.Document:
    """The document of a text or of a row, as rollouts get it. Raises BadDocument if it has no usable prompt."""
    row = {prompt_column: source} if isinstance(source, str) else dict(source)
    reader = Rows([row])
    chunk = OpenChunk(sdg.Chunk(0, 0), reader.read(1), reader.schema)
    ((_, made),) = chunk.documents(prompt_column, "id" if "id" in row else None)
    if isinstance(made, str):
        raise sdg.BadDocument(made)
    return made


# ── Contracts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_reader(open_reader: sdg.OpenReader, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """See that a reader gives the same rows however it is read: at once, in pieces, from any row on, by bookmarks.

    Args:
        open_reader: as it is registered.
        options: by the names that they have in a file for `--config`; `input` among them. A few dozen rows will do.

    Returns:
        The rows.
    """

    async def attempt(config: Config) -> list[dict[str, Any]]:
        with running(config) as run:
            whole = Reading(open_reader, run)
            rows = whole.rows(10**6)
            assert not whole.reader.read(1), "read() gives rows after the end"
            total = whole.reader.total()
            assert total is None or total == len(rows), f"after the end total() is {total}, there were {len(rows)} rows"
            again = Reading(open_reader, run)
            assert again.reader.identity == whole.reader.identity, "`identity` differs from one opening to the next"
            known = json.loads(json.dumps(dict(whole.reader.identity)))
            assert isinstance(whole.reader.continues(known), bool), "continues() gives no bool"
            check_pieces(open_reader, run, rows)
            return [row for _, row in rows]

    return attempted(open_reader, options, attempt)


def check_pieces(open_reader: sdg.OpenReader, run: sdg.Run, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """See that pieces of the input are as in the whole of it."""
    for size in sorted({1, 7, max(1, len(rows) // 2)}):
        straight, jumping = Reading(open_reader, run), Reading(open_reader, run)
        bookmarks: list[tuple[int, str | None]] = []
        for start in range(0, len(rows) + 1, size):
            bookmarks.append((start, straight.reader.tell()))
            wanted = rows[start : start + size]
            found = straight.rows(size)
            assert found == wanted, f"read({size}) at row {start} gave {found}; in one go there were {wanted}"
        some = bookmarks[:: max(1, len(bookmarks) // PLACES)]
        for start, bookmark in [*reversed(some), some[-1]]:  # back, then far ahead
            for reading, mark in ((jumping, None), (Reading(open_reader, run), bookmark)):
                reading.reader.seek(start, mark)
                found = reading.rows(size)
                assert found == rows[start : start + size], f"after seek({start}, {mark!r}) read({size}) gave {found}"
        if len(bookmarks) > 2:
            (_, earlier), (later, _) = bookmarks[1], bookmarks[-1]
            reading = Reading(open_reader, run)
            reading.reader.seek(later, earlier)
            found = reading.rows(size)
            assert found == rows[later:], f"after seek({later}, {earlier!r}), an earlier bookmark, read() gave {found}"


class Reading:
    """A reader, and its rows with the names that documents get by default."""

    def __init__(self, open_reader: sdg.OpenReader, run: sdg.Run) -> None:
        self.reader = open_reader(run)
        checks.check_reader(self.reader, "the reader")

    def rows(self, count: int) -> list[tuple[str, dict[str, Any]]]:
        """The next rows; a row that cannot be read is a dict with its reason."""
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
    """See that a writer gives back what it was given, and that a chunk may be written again, as after a crash.

    Args:
        open_writer: as it is registered.
        options: by the names that they have in a file for `--config`: an `output-filename` with the writer's suffix, or
            an `output` with its scheme.
    """
    import pyarrow as pa

    async def attempt(config: Config) -> None:
        with running(config) as run:
            writer = open_writer(run)
            checks.check_shape(writer, sdg.Writer, "the writer")
            first, second, empty = (sdg.Chunk(i, 3 * i, count=3 * (i < 2)) for i in range(3))
            assert writer.read(first) is None, "read() of a chunk that was never written should give None"
            results = results_type(base_fields())
            kinds = [("id", pa.string()), ("text", pa.string()), (run.options.results_column, results)]

            def rows_of(chunk: sdg.Chunk) -> pa.Table:
                names = [f"d{chunk.start + i}" for i in range(chunk.count)]
                columns = [names, [f"{name}: “text”\nof two lines" for name in names], [[{"text": n}] for n in names]]
                return pa.table(
                    [pa.array(column, kind) for column, (_, kind) in zip(columns, kinds, strict=True)], pa.schema(kinds)
                )

            for chunk in (first, second, empty, first):
                writer.write(chunk, rows_of(chunk))
            for chunk in (first, second, empty):
                found = writer.read(chunk)
                assert found is not None, f"read() gives None for chunk {chunk.index}, which was written"
                assert found.num_rows == chunk.rows, (
                    f"chunk {chunk.index} had {chunk.rows} rows, read() gives {found.num_rows}"
                )
                wanted = rows_of(chunk).to_pylist()
                shown = [{name: row.get(name) for name in ("id", "text")} for row in found.to_pylist()]
                assert shown == [{name: row[name] for name in ("id", "text")} for row in wanted], (
                    "read() gives other rows"
                )

    attempted(open_writer, options, attempt)


def check_server(
    open_server: sdg.OpenServer, options: Mapping[str, Any] | None = None, prompt: str = "Say hello."
) -> str:
    """See that a server comes up, answers the engine's own client, and leaves no task behind.

    Args:
        open_server: as it is registered.
        options: by the names that they have in a file for `--config`.
        prompt: what to ask it.

    Returns:
        The text of its answer.
    """

    async def attempt(config: Config) -> str:
        with running(config) as run:
            before = asyncio.all_tasks()
            async with open_server(run) as servers:
                checks.check_servers(servers, "the server")
                async with connect(run, list(servers)) as client:
                    payload = {
                        **sdg.sampling(run.options, run.model),
                        "messages": [{"role": "user", "content": prompt}],
                    }
                    reply, _ = await client.send(sdg.Request("/chat/completions", payload))
            left = asyncio.all_tasks() - before
            assert not left, f"tasks are left when the server has been left: {left}"
            return reply.text

    return attempted(open_server, options or {}, attempt)


# ── How it is done ───────────────────────────────────────────────────────────────────────────────────────────────────


def attempted(
    thing: Callable[..., Any],
    options: Mapping[str, Any],
    attempt: Callable[[Config], Coroutine[Any, Any, T]],
    prepare: Callable[[sdg.Plugins], str] = lambda plugins: "summarize",
) -> T:
    """Do something with a config of some options, in a folder that is gone afterwards.

    Args:
        thing: what is tried; its module is loaded as a plugin.
        options: by the names that they have in a file.
        attempt: what to do.
        prepare: changes what is registered, and names the rollout.
    """
    with tempfile.TemporaryDirectory(prefix="sdg-testing-") as folder, ThreadPoolExecutor(1) as pool:
        plugins, _ = sdg.Plugins.load([])
        plugins.quiet = True
        own: Any = sys.modules.get(getattr(thing, "__module__", ""))
        for module in (sys.modules[__name__], own):  # also this one: names that are added here are its own
            if isinstance(module, types.ModuleType):
                plugins.add(module, "")
        plugins.readers["rows"] = sdg.Entry(lambda run: Rows([]), __name__, "")
        rollout = prepare(plugins)
        common = {"output": f"{folder}/output", "state-dir": f"{folder}/state", "max-concurrent-documents": 1}
        argv = as_arguments({**common, "no-progress": True, **options}, [])
        try:
            config = parse_with(plugins, rollout, argv)
        except SystemExit as problem:
            raise sdg.UsageError("the options cannot be as they are: see standard error") from problem
        # In a thread of its own: the test may be running in an event loop.
        return pool.submit(asyncio.run, attempt(config)).result()


@contextlib.contextmanager
def running(config: Config) -> Iterator[sdg.Run]:
    """A run of a config; raises what stopped it."""
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


def stand_in(thing: Any) -> sdg.Entry:
    """A resource that is this thing."""
    return sdg.Entry(lambda run: contextlib.nullcontext(thing), __name__, "")


class Rows:
    """A reader of rows that are there."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        names = {name: None for row in rows for name in row}
        self._table = pa.table({name: [row.get(name) for row in rows] for name in names}).combine_chunks()
        self.schema = self._table.schema
        self.identity = {"rows": len(rows)}
        self._row = 0

    def seek(self, row: int, bookmark: str | None) -> None:
        self._row = row

    def tell(self) -> str | None:
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        start, some = self._row, self._table.slice(self._row, rows)
        self._row += some.num_rows
        return [sdg.Block(batch, "rows", start) for batch in some.to_batches()]

    def total(self) -> int | None:
        return int(self._table.num_rows)

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        return False


class Unanswered(sdg.Error):
    """There are more requests than answers."""


@contextlib.asynccontextmanager
async def offline(run: sdg.Run, servers: Servers) -> AsyncIterator[Client]:
    """A client without servers."""
    run.model = run.options.model or MODEL
    async with aiohttp.ClientSession() as session:
        yield Client(session, Pool([], 1), run)


class Script:
    """A plugin that takes the place of the servers: it gives the answers of a test."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._left = iter(answers) if isinstance(answers, Sequence) and not isinstance(answers, str) else None

    @sdg.hookimpl(trylast=True)
    def wrap_requests(self, run: sdg.Run) -> sdg.Send:
        """See the hook. It never sends anything."""

        async def scripted(request: sdg.Request) -> sdg.Response:
            run.counts["requests"] += 1
            answer = self._next(request.payload, run.counts["requests"])
            if isinstance(answer, Exception):
                raise answer
            body = json.dumps(body_of(answer, request.payload)).encode()
            return sdg.Response(Client.parse(body), body)

        return scripted

    def _next(self, payload: dict[str, Any], number: int) -> Any:
        if self._left is None:
            return self._answers(payload) if callable(self._answers) else self._answers
        answer = next(self._left, None)
        if answer is None:
            raise Unanswered(f"request {number} has no answer: `answers` has fewer")
        return answer


def body_of(answer: Any, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The body of an answer, as a server would have sent it."""
    if isinstance(answer, dict) and "choices" in answer:
        return answer
    reply = answer if isinstance(answer, sdg.Reply) else None
    if not isinstance(answer, str | dict | sdg.Reply):
        raise TypeError(f"answers are str, dict, Reply or exceptions, not {type(answer).__name__}")
    if reply is None:
        reply = sdg.Reply(answer if isinstance(answer, str) else json.dumps(answer))
    message = {"content": reply.text, "reasoning_content": reply.reasoning, "tool_calls": reply.tool_calls}
    choice: dict[str, Any] = {"finish_reason": reply.finish_reason or "stop", "logprobs": reply.logprobs}
    choice |= {"text": reply.text} if "prompt" in payload else {"message": message}
    choices = [{"index": i, **choice} for i in range(payload.get("n") or 1)]
    asked = len(str(payload.get("prompt") or payload["messages"]).split())
    spent = {"prompt_tokens": asked, "completion_tokens": len(reply.text.split()) * len(choices)}
    return {"choices": choices, "usage": reply.usage or {**spent, "total_tokens": sum(spent.values())}}
