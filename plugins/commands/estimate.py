"""The command `estimate`: runs a sample of the input, keeps its responses for the run, and says what the run will take.

The sample is run by the same engine on the run's own state, so nothing is sent again later. Its first requests are sent
with few others in flight, and the rest with as many as the run may have: from the difference follows whether a request
takes longer the more of them there are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import forecast
from sdg_plugins.common.checks import reading
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.command_line import parse_configs
from sdg_plugins.common.forecast import Pace, Range, Takes
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import Parser, number
from sdg_plugins.common.prices import Tokens, cost_of, estimated_tokens, in_money, tokens_of
from sdg_plugins.common.progress import progress
from sdg_plugins.common.recorded import run_id
from sdg_plugins.common.state import documents_in, replace_file

if TYPE_CHECKING:
    from sdg_plugins.commands.stop import Stop

CHUNKS = 40  # that a sample is taken from, at most: each is read as a whole
NARROW = 40  # requests that are sent with few others in flight
FILE = "estimate.json"


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("estimate", estimate)


def estimate(argv: list[str]) -> int:
    """Run a sample of the input, keep its responses for the run, and forecast tokens, time, cost and failures."""
    import uvloop

    from sdg_plugins.commands.jobs import run_all

    usage = "sdg.py estimate [--sample N] [--json] [OPTIONS of run]"
    example = "example: sdg.py estimate --sample 100 --input docs/ --base-url http://localhost:8000"
    parser = Parser(prog="sdg.py estimate", usage=usage, description=estimate.__doc__, epilog=example)
    parser.add_argument("--sample", type=number(int, 1), default=200, metavar="N", help="documents to run [200]")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the forecast as JSON, for programs: one object, or one on a line for each config",
    )
    own, rest = parser.parse_known_args(argv)
    configs = parse_configs(rest)
    meters = {config.name: Meter(config.options, own.sample) for config in configs}
    found: dict[str, Forecast] = {}
    for config in configs:
        config.options.sample, config.options.max_failure_rate, config.plugins.quiet = own.sample, 1.0, True
        if config.options.any_rank:
            config.options.any_rank, config.options.rank = False, 0
        config.plugins.manager.register(meters[config.name], "estimate")

    @contextlib.asynccontextmanager
    async def sampled(engine: sdg.Engine, stop: Stop) -> AsyncIterator[None]:
        name = engine.run.options.output_config
        documents = await asyncio.to_thread(documents_in, engine.intake.reader)
        engine.intake.chosen = chosen_rows(engine.run.options, documents, own.sample)
        await meters[name].begin(engine)
        try:
            async with progress(engine):
                yield
        finally:
            meters[name].keep()
        if stop.reason is None:
            found[name] = await meters[name].forecast(engine)

    try:
        uvloop.run(run_all(configs, sampled))
    finally:  # the run has ended well even if this is not read to its end, as with `| head`
        show(found, own.json, len(configs) > 1)
    return 0


def show(found: Mapping[str, Forecast], as_json: bool, named: bool) -> None:
    """Print forecasts by the names of their configs; of several, the JSON of each is one line."""
    for name, result in found.items():
        if not as_json:
            print(f"config  {name}\n{result.text()}" if named else result.text())
        elif named:
            print(json.dumps({"config": name, **result.as_json()}))
        else:
            print(json.dumps(result.as_json(), indent=2))
    sys.stdout.flush()


def chosen_rows(options: argparse.Namespace, documents: int | None, sample: int) -> dict[int, frozenset[int]]:
    """Positions of sampled documents by the index of their chunk, evenly spread over a rank's part of the input."""
    size = options.records_per_chunk
    if documents is None:  # nothing is known of what follows the first chunk
        return {options.rank: frozenset(range(min(size, sample)))}
    documents = min(documents, options.max_documents or documents)
    mine = range(options.rank, -(-documents // size), options.world_size)
    counts = [min(size, documents - index * size) for index in mine]
    total = sum(counts)
    if sample >= total:
        return {index: frozenset(range(count)) for index, count in zip(mine, counts, strict=True)}
    some = min(CHUNKS, len(mine), sample)
    found: dict[int, frozenset[int]] = {}
    for k in range(some):
        i = int((k + 0.5) * len(mine) / some)
        take = min(counts[i], (k + 1) * sample // some - k * sample // some)
        found[mine[i]] = frozenset(int((j + 0.5) * counts[i] / take) for j in range(take))
    return found


class Meter:
    """A plugin that measures the requests of a sample, and sends the first of them with few others in flight."""

    def __init__(self, options: argparse.Namespace, sample: int) -> None:
        self.documents: dict[int, dict[str, list[float]]] = {}
        self.unmeasured: set[int] = set()  # sampled documents that an earlier process has finished without a record
        self._known: dict[str, Any] = {}  # what earlier estimates of the run have recorded
        self._narrow = asyncio.Semaphore(max(1, min(options.max_concurrent_generations, sample) // 8))
        self._left = min(NARROW, sample // 5)  # requests that are still sent with few others
        self._wide = asyncio.Event()
        self._took: dict[str, list[tuple[float, float]]] = {}  # tokens and seconds of the first requests
        self._start: dict[str, Look] = {}
        self._middle: dict[str, Look] = {}

    @sdg.hookimpl(trylast=True)
    def wrap_requests(self, run: sdg.Run, send: sdg.Send) -> sdg.Send:
        """See `sdg.Hooks`."""

        async def measured(request: sdg.Request) -> sdg.Response:
            if not self._wide.is_set():
                await self._narrow.acquire()
            narrow, began = not self._wide.is_set(), time.monotonic()
            try:
                response = await send(request)
            finally:
                self._ended()
            tokens = self._note(request, response.reply)
            if narrow:
                self._took.setdefault(request.to, []).append((tokens, time.monotonic() - began))
            return response

        return measured

    async def begin(self, engine: sdg.Engine) -> None:
        """The sample begins."""
        self._engine, path = engine, engine.run.state / FILE
        known = json.loads(path.read_bytes()) if path.exists() else {}
        if known.get("run") == run_id(engine.run.state):  # its documents are not run again
            self._known = known
            self.documents = {int(index): of for index, of in known["documents"].items()}
        chunks, size = await engine.store.chunks(), engine.run.options.records_per_chunk
        for index, positions in (engine.intake.chosen or {}).items():
            if chunk := chunks.get(index):
                final = positions if chunk.written else positions & (await engine.store.finished_in(chunk)).keys()
                self.unmeasured |= {index * size + position for position in final}
        self.unmeasured -= self.documents.keys()
        # The seconds of a pool begin with its first request.
        self._start = self._middle = {
            name: look._replace(seconds=0.0, area=0.0) for name, look in self._snapshot().items()
        }

    def _ended(self) -> None:
        """A request has ended. After the first ones all others may go."""
        self._narrow.release()
        self._left -= 1
        if self._left <= 0 and not self._wide.is_set():
            self._middle = self._snapshot()
            self._wide.set()
            for _ in range(100_000):  # those that wait for their turn
                self._narrow.release()

    def _note(self, request: sdg.Request, reply: sdg.Reply) -> float:
        """Add a request to those of its document. Returns its completion tokens."""
        usage = reply.usage or {}
        tokens = Tokens(*(float(usage.get(name, 0)) for name in sdg.TOKENS[:2]))
        if not reply.usage:
            tokens = estimated_tokens(request, reply)
        if request.rollout is not None:
            of = self.documents.setdefault(request.rollout.document.index, {})
            known = of.setdefault(request.to, [0.0, 0.0, 0.0])
            more = (tokens.prompt, tokens.completion, 1.0)
            of[request.to] = [before + one for before, one in zip(known, more, strict=True)]
        return tokens.completion

    def _snapshot(self) -> dict[str, Look]:
        """How far each model is; "" is the run's own."""
        run, found = self._engine.run, {}
        tokens = tokens_of(run.counts, run.models)
        for name, of in {"": run, **run.models}.items():
            assert of.client
            lane, requests = of.client.lane, of.counts["requests"]
            if not name:  # its counts are those of all models
                requests -= sum(model.counts["requests"] for model in run.models.values())
            completion = float(tokens[name].completion)
            found[name] = Look(float(requests), completion, lane.seconds, lane.mean_in_flight * lane.seconds)
        return found

    async def forecast(self, engine: sdg.Engine) -> Forecast:
        """What follows from the sample, which is kept for the next estimate."""
        end = self._snapshot()
        took = {name: self._took.get(name, []) for name in end}
        takes = {name: forecast.takes_of(of) for name, of in took.items()}
        looks = {name: (self._start[name], self._middle[name], look) for name, look in end.items()}
        paces = {name: paces_of(looks[name], took[name], takes[name]) for name in end}
        if "paces" in self._known and not any(pace.work for both in paces.values() for pace in both):  # all was known
            paces = {name: (Pace(*narrow), Pace(*wide)) for name, (narrow, wide) in self._known["paces"].items()}
            takes = {name: Takes(*took) for name, took in self._known["takes"].items()}
        lengths = await asyncio.to_thread(lengths_of, engine)
        for row in sorted(lengths.each.keys() - self.documents.keys() - self.unmeasured):
            self.documents[row] = {}  # it has sent no request
        self._known |= {"paces": paces, "takes": takes}
        self.keep()
        return Forecast(engine, self.documents, paces, takes, lengths)

    def keep(self) -> None:
        """Record what is known, for the next estimate of the run."""
        run = self._engine.run
        self._known |= {"run": run_id(run.state), "documents": {str(index): of for index, of in self.documents.items()}}
        replace_file(run, FILE, json.dumps(self._known).encode())


class Look(NamedTuple):
    """How far a model is.

    Attributes:
        requests: that were answered.
        tokens: of their completions.
        seconds: since the first one.
        area: requests in flight, integrated over this time, in s.
    """

    requests: float
    tokens: float
    seconds: float
    area: float

    def since(self, earlier: Look) -> Look:
        """What has happened since an earlier look."""
        return Look(*(after - before for after, before in zip(self, earlier, strict=True)))


def paces_of(looks: tuple[Look, Look, Look], took: list[tuple[float, float]], takes: Takes) -> tuple[Pace, Pace]:
    """How fast it went with few requests in flight, and with many.

    Args:
        looks: at the beginning, when the limit was lifted, and at the end.
        took: completion tokens and seconds of the requests sent with few others; some ended with many.
        takes: what follows from them.
    """
    start, middle, end = looks
    whole, few, many = end.since(start), middle.since(start), end.since(middle)
    tokens, seconds = (sum(each[i] for each in took) for i in (0, 1))
    alone = whole.requests <= len(took) or whole.area <= seconds  # too few to tell them apart
    few = whole if alone else few
    narrow = Pace(few.area * takes.work(len(took), tokens) / max(seconds, 1e-9), few.seconds, few.area)
    if alone:
        return narrow, Pace(0.0, 0.0, 0.0)
    rest = takes.work(whole.requests - len(took), whole.tokens - tokens)
    return narrow, Pace(many.area * rest / (whole.area - seconds), many.seconds, many.area)


class Lengths(NamedTuple):
    """What the chunks of a sample say of the whole input.

    Attributes:
        total: documents in the input; None if unknown.
        mean: characters of the prompt column, of all documents in the chunks; None if it does not hold texts.
        each: the same of each sampled document, by its row.
    """

    total: int | None
    mean: float | None
    each: dict[int, float]


def lengths_of(engine: sdg.Engine) -> Lengths:
    """The lengths of the documents in the chunks of a sample. After reading them the reader knows the total better."""
    import pyarrow as pa
    import pyarrow.compute as pc

    run, reader, size = engine.run, engine.intake.reader, engine.run.options.records_per_chunk
    each: dict[int, float] = {}
    mean, found, column = None, [], run.options.prompt_column
    most = run.options.max_documents or sys.maxsize
    for index, positions in sorted((engine.intake.chosen or {}).items()):
        with reading(run.options.input, reader):
            reader.seek(index * size, None)
            parts = reader.read(min(size, most - index * size))
        opened = OpenChunk(sdg.Chunk(index, index * size), parts, reader.schema)
        if opened.chunk.count and column in opened.table.column_names:
            texts = opened.table.column(column)
            if pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type):
                lengths = pc.fill_null(pc.utf8_length(texts), 0).to_pylist()
                found += lengths
                each |= {index * size + i: float(lengths[i]) for i in positions if i < len(lengths)}
    if found:
        mean = sum(found) / len(found)
    total = reader.total()
    return Lengths(None if total is None else min(total, most), mean, each)


class Forecast:
    """What a run will take."""

    def __init__(
        self,
        engine: sdg.Engine,
        documents: Mapping[int, Mapping[str, list[float]]],
        paces: Mapping[str, tuple[Pace, Pace]],
        takes: Mapping[str, Takes],
        lengths: Lengths,
    ) -> None:
        run, self.options = engine.run, engine.run.options
        tally = engine.tally
        self.sample, self.total = sum(tally.values()), lengths.total
        if not self.sample:
            raise sdg.StateError("no document of the sample has an outcome: run the same command again")
        self.population = population = self.sample if self.total is None else max(self.total, self.sample)
        if not documents:
            raise sdg.StateError("all documents of the sample were finished by an earlier run: give a larger --sample")
        sent = list(documents.values())
        known = lengths.mean is not None and all(row in lengths.each for row in documents)
        sizes = [lengths.each[row] for row in documents] if known else None
        self.models = {
            name: [
                forecast.mean_of(forecast.per_document(sent, name, kind), population, sizes, lengths.mean)
                for kind in (0, 1, 2)
            ]
            for name in ("", *run.models)
        }
        shares = {"failed": tally["failed"], "filtered": tally["filtered"]}
        shares["cut"] = int(engine.store.totals()["truncated"])
        self.shares = {name: forecast.share_of(found, self.sample, population) for name, found in shares.items()}
        self.seconds = self._seconds(paces, takes)

    @property
    def _ranks(self) -> int:
        """Ranks that have servers of their own: those of --processes share them."""
        return 1 if self.options.processes else int(self.options.world_size)

    def _seconds(self, paces: Mapping[str, tuple[Pace, Pace]], takes: Mapping[str, Takes]) -> Range:
        """How long the run takes if each rank has servers like this one's: as long as its slowest model needs."""
        longest = Range(0.0, 0.0, 0.0)
        for name, (narrow, wide) in paces.items():
            options = self.options.models.get(name, self.options)
            documents = self.population / self._ranks
            prompt, completion, requests = self.models[name]
            each = Range(*(takes[name].work(*both) for both in zip(requests, completion, strict=True)))
            alone = (narrow if narrow.work else wide).each * each.value
            took = forecast.duration(each.times(documents), narrow, wide, options.max_concurrent_generations, alone)
            paced = 0.0
            if options.tokens_per_minute:
                paced = 60 * documents * (prompt.value + completion.value) / options.tokens_per_minute
            longest = Range(*(max(amount, other, paced) for amount, other in zip(took, longest, strict=True)))
        return longest

    def tokens(self, model: str) -> list[Range]:
        """Prompt and completion tokens of the whole run at a model."""
        return [mean.times(self.population) for mean in self.models[model][:2]]

    @property
    def cost(self) -> Range | None:
        """What the whole run costs; None without prices."""
        bounds = [
            cost_of(self.options, {name: Tokens(*(r[i] for r in self.tokens(name))) for name in self.models})
            for i in range(3)
        ]
        return None if bounds[0] is None else Range(*(bound or 0.0 for bound in bounds))

    def as_json(self) -> dict[str, Any]:
        """For programs; ranges hold in 95 of 100 samples."""
        both = {}
        for name in self.models:
            prompt, completion = self.tokens(name)
            kinds = {"prompt_tokens": prompt, "completion_tokens": completion}
            both[name or "model"] = forecast.as_json(kinds)
        figures = {"seconds": self.seconds, **({"cost": self.cost} if self.cost else {}), **self.shares}
        return {"documents": self.total, "sample": self.sample, "tokens": both, **forecast.as_json(figures)}

    def text(self) -> str:
        """For people."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        of = "an unknown number of documents" if self.total is None else counted(self.total, "document")
        spread = "the first" if self.total is None else "all" if self.sample >= self.total else "evenly spread"
        yield f"{of}, estimated from {self.sample:,} ({spread}); 95 % ranges"
        for name in self.models:
            whole = self.tokens(name)
            at = f" at the model {name}" if name else ""
            yield f"tokens  {rounded(whole[0])} prompt, {rounded(whole[1])} completion{at}"
        prompt, completion = (sum(means[kind].value for means in self.models.values()) for kind in (0, 1))
        yield f"        {prompt:,.1f} prompt and {completion:,.1f} completion tokens for each document"
        if cost := self.cost:
            yield f"cost    {in_money(cost.value)} ({in_money(cost.low)} to {in_money(cost.high)})"
        else:
            yield "cost    unknown: give --price-input and --price-output, for a million tokens"
        time = [forecast.in_words(seconds) for seconds in self.seconds]
        ranks = f" on each of {self._ranks} ranks" if self._ranks > 1 else ""
        flight = counted(self.options.max_concurrent_generations, "request")
        yield f"time    {time[0]} ({time[1]} to {time[2]}) with up to {flight} in flight{ranks}, once the server is up"
        for name, share in self.shares.items():
            if share.value or name == "failed":
                low, high = f"{100 * share.low:.2g}", f"{100 * share.high:.2g}"
                yield f"{name:<8}{100 * share.value:.2g} % ({low} to {high} %) of the documents"
        yield "kept    the sample's responses belong to the run: the same options without `estimate` start it"


def rounded(amount: Range) -> str:
    """A number of tokens, and its range."""
    return f"{amount.value:,.0f} ({amount.low:,.0f} to {amount.high:,.0f})"
