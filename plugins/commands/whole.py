"""The processes of `--processes N` as one: what they report, summed up to what a single engine would show."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.paths import prompt_column_of
from sdg_plugins.common.statistics import statistics_of
from sdg_plugins.servers.limit import Limit, Load
from sdg_plugins.servers.models import Servers


class Together:
    """The pools of all processes for one model, as the display sees them; it is also the client that has the pool.

    Attributes:
        upstreams: the servers that the parent has launched.
        active: requests in flight.
    """

    def __init__(self, servers: Servers, limit: int) -> None:
        self.upstreams = [server for server in servers if isinstance(server, sdg.Upstream)]
        for upstream in self.upstreams:
            upstream.limit = Limit(limit)
        self.active = 0
        self._waiting: Sequence[Any] | None = None
        self._began: float | None = None

    @property
    def pool(self) -> Together:
        """This one."""
        return self

    @property
    def lane(self) -> Together:
        """This one."""
        return self

    @property
    def seconds(self) -> float:
        """Since the first request."""
        return time.monotonic() - self._began if self._began else 0.0

    def begin(self, report: Mapping[str, Any]) -> None:
        """Take in how long a process has sent requests."""
        if report["counts"].get("requests"):
            self._began = min(self._began or math.inf, time.monotonic() - report["seconds"])

    def waiting(self) -> tuple[float, str] | None:
        """If one of the processes waits for a server: for how many seconds, and why."""
        return (float(self._waiting[0]), str(self._waiting[1])) if self._waiting else None

    def take(self, reports: Sequence[Mapping[str, Any]], name: str) -> None:
        """Take in the last report of each process, as far as the model `name` is concerned."""
        self.active = sum(report["active"].get(name, 0) for report in reports)
        self._waiting = next((report["waiting"] for report in reports if report["waiting"]), None)
        states = [report["servers"].get(name, []) for report in reports]
        for number, upstream in enumerate(self.upstreams):
            every = [servers[number] for servers in states if number < len(servers)]
            upstream.active = sum(state["active"] for state in every)
            upstream.failures = max((state["failures"] for state in every), default=0)
            upstream.progressed = max([upstream.progressed, *(state["progressed"] for state in every)])
            for state in every:
                if state["load"]:
                    upstream.limit.load = Load(*state["load"])


class Whole:
    """The engines of all processes as one engine, as far as `progress` and `report` look at it.

    Args:
        run: of the parent.
        reader: of its input.
        servers: by the names of models.
        retrying: only documents that have failed are run.

    Attributes:
        stopping: the run ends early.
        failures: of all processes.
    """

    def __init__(self, run: sdg.Run, reader: sdg.Reader, servers: Mapping[str, Servers], retrying: bool) -> None:
        self.run, self.retrying, self.stopping = run, retrying, False
        self.prompt_column = prompt_column_of(run.options, reader.schema)
        self.crew = Crew()
        self.client = Together(servers.get("", []), run.options.max_concurrent_generations)
        self.models = {name: Together(servers.get(name, []), 1) for name in run.models}
        for name, model in run.models.items():
            model.client = self.models[name]  # type: ignore[assignment]  # the display asks for its pool
        self._reader = reader
        self._now: dict[tuple[int, int], dict[str, Any]] = {}  # reports of ranks at work, by process ID and rank
        self._past = Sum()  # of those that are not
        self._total = self._past
        self._finished_by: Counter[int] = Counter()
        self._seen: dict[tuple[int, str, int], Mapping[str, Any]] = {}  # what each process last said of each server
        self._read: int | None = None  # rows of the input, once a process has read to its end
        self._tallies: dict[int, Counter[str]] = {}
        for rank in range(run.options.world_size):
            figures = statistics_of(rank_file(run.state, rank, "stats.json"))
            rows, empty = figures.get("rows", 0), figures.get("empty", 0)
            known = {"filtered": figures.get("filtered", 0), "failed": figures.get("failed", 0) - empty, "empty": empty}
            self._tallies[rank] = Counter(row=rows, **known)
        self._sum()

    @property
    def intake(self) -> Whole:
        """This one: it knows the input."""
        return self

    @property
    def tally(self) -> Counter[str]:
        """How many documents of the run are final, by status."""
        return sum(self._tallies.values(), Counter())

    @property
    def finished(self) -> int:
        """Documents that were finished by these processes."""
        return self._total.finished

    def finished_by(self, process: int) -> int:
        """Documents that one process has finished."""
        now: int = sum(report["finished"] for (pid, _), report in self._now.items() if pid == process)
        return self._finished_by[process] + now

    def expected(self) -> int | None:
        """How many documents the run has, as far as the input or the processes know."""
        total = self._reader.total() or self._read
        return None if total is None else int(min(total, self.run.options.max_documents or total))

    def take(self, process: int, report: dict[str, Any]) -> None:
        """Take in where a process is with a rank."""
        rank = report["rank"]
        self._tallies[rank] = Counter(report["tally"])
        self._read = report["total"] or self._read
        self._now[process, rank] = report
        for name, pool in {"": self.client, **self.models}.items():
            self._note_answers(process, name, pool, report)
            pool.begin(report)
        if report["last"]:
            self._fold(process, rank)
        self._sum()

    def over(self, process: int) -> None:
        """A process has ended: nothing of it is in flight."""
        for pid, rank in list(self._now):
            if pid == process:
                self._fold(pid, rank)
        self._sum()

    def _fold(self, process: int, rank: int) -> None:
        report = self._now.pop((process, rank))
        self._past.add(report)
        self._finished_by[process] += report["finished"]

    def _sum(self) -> None:
        reports = list(self._now.values())
        self._total = Sum(self._past, reports)
        self.failures: sdg.Failures = self._total.failures
        self.run.counts.clear()
        self.run.counts.update(self._total.counts)
        self.crew.take(reports)
        for name, pool in {"": self.client, **self.models}.items():
            pool.take(reports, name)

    def _note_answers(self, process: int, name: str, pool: Together, report: Mapping[str, Any]) -> None:
        """Add what is new in a report to the numbers by which a launched server is watched."""
        for number, (upstream, now) in enumerate(zip(pool.upstreams, report["servers"].get(name, []), strict=False)):
            before = self._seen.get((process, name, number), {})
            self._seen[process, name, number] = now
            upstream.answers += now["answers"] - before.get("answers", 0)
            upstream.convicted += now["convicted"] - before.get("convicted", 0)

    def too_many_failures(self, at_end: bool = False) -> sdg.TooManyFailures | None:
        """The error if more documents fail than --max-failure-rate allows, by the rules of a single engine."""
        most, total = self.run.options.max_failure_rate, self._total
        if at_end:
            tally = self.tally
            failed = tally["failed"] + tally["empty"] * (not tally["row"])
            return self.failures.too_many(failed, tally.total(), "", most) if failed > most * tally.total() else None
        failed = total.failures.documents
        if total.finished >= 100 and failed > most * total.started:
            return self.failures.too_many(failed, total.started, "", most)
        recent = [sum(report["recent"][i] for report in self._now.values()) for i in (0, 1)]
        if recent[1] >= sdg.RECENT and recent[0] > most * recent[1]:
            return self.failures.too_many(recent[0], recent[1], "the last ", most)
        return None


class Sum:
    """The sum of some reports.

    Args:
        past: reports that are summed up already.
        reports: more of them.
    """

    def __init__(self, past: Sum | None = None, reports: Iterable[Mapping[str, Any]] = ()) -> None:
        self.counts: Counter[str] = Counter(past.counts if past else ())
        self.finished: int = past.finished if past else 0
        self.started: int = past.started if past else 0
        self.failures = sdg.Failures()
        if past:
            self.failures.documents = past.failures.documents
            self.failures.reasons.update(past.failures.reasons)
            self.failures.examples.update(past.failures.examples)
        for report in reports:
            self.add(report)

    def add(self, report: Mapping[str, Any]) -> None:
        """Add one."""
        self.counts.update(report["counts"])
        self.finished += report["finished"]
        self.started += report["started"]
        self.failures.documents += report["failed"]
        for kind, times, example in report["reasons"]:
            self.failures.reasons[kind] += times
            self.failures.examples.setdefault(kind, example)


class Crew:
    """The documents in flight in all processes, and those that have ended lately; see `crew.Crew`."""

    def __init__(self) -> None:
        self.begun: dict[int, float] = {}
        self.ended: deque[tuple[float, float]] = deque()

    def take(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Take in the last report of each process. A report may list some documents for all."""
        begun = [begin for report in reports for begin in report["begun"] for _ in range(report["weight"])]
        self.begun = dict(enumerate(begun))
        self.ended = deque(sorted((at, took) for report in reports for at, took in report["ended"]))
