"""One of the processes of `--processes N`: takes ranks like `--rank any`, and does what its parent says.

Parent and process talk through a Unix socket, in lines of JSON. The process has nothing else from its parent: no key
and no URL is in its command line or environment. When the socket is closed, because the parent was killed, the process
kills itself together with all that it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
import signal
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any

import sdg
from sdg_plugins.commands.jobs import record_end, run_all
from sdg_plugins.commands.stop import Stop
from sdg_plugins.common.command_line import parse_configs
from sdg_plugins.common.ending import HANDLED, run_to_the_end
from sdg_plugins.common.options import refusing
from sdg_plugins.common.processes import PART, Part, shared
from sdg_plugins.common.statistics import heartbeat
from sdg_plugins.servers.client import Client
from sdg_plugins.servers.launching.guard import PR_SET_PDEATHSIG, prctl
from sdg_plugins.servers.models import Servers

INTERVAL = 0.25  # s between two reports to the parent
SAMPLE = 200  # documents in flight that a report lists
ERRORS = (
    *(sdg.Error, sdg.UsageError, sdg.InputError, sdg.PluginError, sdg.StateError, sdg.OutputError),
    *(sdg.ServerError, sdg.Unreachable, sdg.TooManyFailures, sdg.BudgetSpent),
)
PROBLEMS: dict[str, type[sdg.Error]] = {kind.__name__: kind for kind in ERRORS}


def as_message(problem: BaseException) -> dict[str, Any]:
    """An exception for the other side of the socket."""
    if isinstance(problem, sdg.Interrupted):
        return {"signal": signal.SIGINT if problem.exit_code == 130 else signal.SIGTERM}
    kind = next((kind.__name__ for kind in type(problem).__mro__ if kind.__name__ in PROBLEMS), "")
    return {"kind": kind or "Error", "text": str(problem) if kind else sdg.describe(problem)}


def as_problem(message: Mapping[str, Any]) -> sdg.Error:
    """The exception that `as_message` was given."""
    if "signal" in message:
        return sdg.Interrupted(signal.Signals(message["signal"]))
    return PROBLEMS[message["kind"]](message["text"])


def work(argv: list[str]) -> int:
    """Take ranks until none is free. Returns the exit code; the parent reports the problem."""
    number, _, parent = os.environ.pop(PART).partition(":")  # what a rollout starts is not one
    line = Line(socket.socket(fileno=int(number)), int(parent))
    for signum in HANDLED:  # the parent passes them on, however many processes a scheduler signals; see `Line.begin`
        signal.signal(signum, lambda *_: None)
    part = Part(**line.order["part"])
    try:
        with refusing():
            config = next(config for config in parse_configs(argv) if config.name == part.config)
        config = config._replace(options=shared(config.options, part))
        run_to_the_end(run_all([config], line.present, line.begin, starting=line.servers))
    except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - the parent reports it
        problem = sdg.first_cause(exc)
        if os.environ.get("SDG_TRACEBACK"):
            traceback.print_exception(exc)
        line.send({"ended": as_message(problem)})
        return int(getattr(problem, "exit_code", 1))
    line.send({"ended": None})
    return 0


class Line:
    """The connection to the parent.

    Args:
        connection: the socket.
        parent: its process ID.

    Attributes:
        order: what the parent says at first.
    """

    def __init__(self, connection: socket.socket, parent: int) -> None:
        connection.set_inheritable(False)
        self._socket = connection
        self._file = connection.makefile("rb")
        self._sending = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Stop | None = None
        self._servers: dict[str, Servers] = {}
        self._examined: dict[int, asyncio.Future[bool]] = {}
        self._questions = 0
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # also if a plugin keeps the thread below from running
        if os.getppid() != parent:
            end_all()
        self.order: dict[str, Any] = self._receive()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the parent."""
        with self._sending, contextlib.suppress(OSError):  # it is gone, and so will be this process
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self) -> dict[str, Any]:
        raw = b""
        with contextlib.suppress(OSError):
            raw = self._file.readline()
        if not raw.endswith(b"\n"):
            end_all()
        message: dict[str, Any] = json.loads(raw)
        return message

    def begin(self, stop: Stop) -> None:
        """Do what the parent says from now on; called in the event loop with what stops all jobs."""
        self._loop, self._stop = asyncio.get_running_loop(), stop
        threading.Thread(target=self._listen, name="sdg-parent", daemon=True).start()

    def _listen(self) -> None:
        assert self._loop
        while True:
            message = self._receive()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
                self._loop.call_soon_threadsafe(self._obey, message)

    def _obey(self, message: dict[str, Any]) -> None:
        if "stop" in message and self._stop:
            self._stop(as_problem(message["stop"]))
        self.order["servers"] = message.get("servers", self.order["servers"])  # for jobs that have not begun
        for name, states in message.get("servers", {}).items():
            for server, state in zip(self._servers.get(name, []), states, strict=False):
                if isinstance(server, sdg.Upstream):
                    follow(server, state)
        if "examined" in message and (waiting := self._examined.pop(message["examined"], None)):
            waiting.set_result(message["crashed"])

    # Servers

    async def servers(self, run: sdg.Run, stack: contextlib.AsyncExitStack) -> Mapping[str, Servers]:
        """The servers of the parent: URLs, or for those that it has launched, `Upstream`s that follow its own."""
        found: dict[str, Servers] = {}
        for name, states in self.order["servers"].items():
            found[name] = self._servers[name] = [
                state if isinstance(state, str) else self._upstream(name, number, state)
                for number, state in enumerate(states)
            ]
        return found

    def _upstream(self, name: str, number: int, state: Mapping[str, Any]) -> sdg.Upstream:
        examine = functools.partial(self._examine, name, number)
        upstream = sdg.Upstream(state["url"], examine if state["launched"] else None, state["model"])
        follow(upstream, state)
        return upstream

    async def _examine(self, name: str, number: int, crashes: int) -> bool:
        """Ask the parent whether a request failed because the server crashed."""
        self._questions += 1
        answer = self._examined[self._questions] = asyncio.get_running_loop().create_future()
        self.send({"examine": [name, number, crashes], "question": self._questions})
        return bool(await answer)

    # Reports

    @contextlib.asynccontextmanager
    async def present(self, engine: sdg.Engine, stop: Stop) -> AsyncIterator[None]:
        """Keep a rank's figures in the state, and report to the parent, while an engine works."""

        async def report() -> None:
            while True:
                self._report(engine)
                await asyncio.sleep(INTERVAL)

        async with heartbeat(engine), sdg.background(report()):
            yield
        await record_end(engine, stop)
        self._report(engine, last=True)

    def _report(self, engine: sdg.Engine, last: bool = False) -> None:
        """Report where an engine is; if the parent does not read, only what it must not miss."""
        if last or select.select([], [self._socket], [], 0)[1]:
            self.send({**report_of(engine), "last": last})


def report_of(engine: sdg.Engine) -> dict[str, Any]:
    """Where an engine is, for its parent. Times are of the clock that all processes of a machine share."""
    begun, clients = sorted(engine.crew.begun.values()), clients_of(engine)
    weight = -(-len(begun) // SAMPLE) or 1
    failures = engine.failures
    return {
        "rank": engine.run.options.rank,
        "tally": dict(engine.tally),
        "started": engine.started,
        "finished": engine.finished,
        "total": engine.intake.reader.total(),
        "counts": dict(engine.run.counts),
        "failed": failures.documents,
        "recent": [sum(failures.recent), len(failures.recent)],
        "reasons": [[kind, times, failures.examples[kind]] for kind, times in failures.reasons.most_common(20)],
        "begun": begun[::weight],
        "weight": weight,
        "ended": list(engine.crew.ended)[-SAMPLE:],
        "active": {name: client.lane.active for name, client in clients.items()},
        "seconds": engine.client.lane.seconds,
        "waiting": engine.client.pool.waiting(),
        "servers": {name: list(map(state_of, client.pool.upstreams)) for name, client in clients.items()},
    }


def clients_of(engine: sdg.Engine) -> dict[str, Client]:
    """The clients of an engine by the names of its models; "" is the run's own."""
    runs = {"": engine.run, **engine.run.models}
    return {name: run.client for name, run in runs.items() if run.client}


def state_of(upstream: sdg.Upstream) -> dict[str, Any]:
    """What the parent must know of one server to watch it."""
    quarantine, names = upstream.quarantine, ("active", "answers", "failures", "convicted", "progressed", "crashes")
    suspects = len(quarantine.waiting) + bool(quarantine.share) + quarantine.doubts
    return {**{name: getattr(upstream, name) for name in names}, "load": upstream.limit.load, "suspects": suspects}


def follow(upstream: sdg.Upstream, state: Mapping[str, Any]) -> None:
    """Bring a server to the state that the parent reports."""
    upstream.url, upstream.status = state["url"], state["status"]
    crashed = state["crashes"] > upstream.crashes
    if crashed or not state["up"]:
        upstream.fall(crashed=crashed)
        upstream.crashes = state["crashes"]
    if state["gone"] and not upstream.gone:
        upstream.give_up()
    if state["up"] and not upstream.up.is_set():
        upstream.rise()


def end_all() -> None:
    """The parent has ended: end this process, and all of its group, at once. A rerun finds all that was durable."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
