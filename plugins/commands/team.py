"""The processes of `--processes N`: how their parent starts them, hears from them, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import sdg
from sdg_plugins.commands.part import as_message, as_problem
from sdg_plugins.commands.turns import Turns
from sdg_plugins.commands.whole import Whole
from sdg_plugins.common.processes import PART, Part
from sdg_plugins.servers.models import Servers

DEATHS = 3  # of a process in a row, none of which has finished a document, that end the run
PATIENCE = 15.0  # s that processes have to end after a signal: schedulers kill after 20 to 30
HURRY = 4.0  # s after a second one
LOOK = 0.1  # s between two looks at launched servers
LONGEST_LINE = 1 << 26  # bytes of a report
PIECE = 1 << 16  # bytes of standard error that are read at a time, and printed even without the end of a line
REMEMBERED = 1000  # lines


class Process:
    """One process, and the connection to it.

    Attributes:
        ended: what it said at its end: None if all went well; missing if it has said nothing.
        told: where the servers are, as it was told at last.
        ranks: on which it works.
    """

    def __init__(self, popen: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
        self.pid, self.popen, self._writer = popen.pid, popen, writer
        self.ended: list[dict[str, Any] | None] = []
        self.told: dict[str, list[Any]] = {}
        self.ranks: set[int] = set()

    def tell(self, servers: dict[str, list[Any]], **more: Any) -> None:
        """Tell it where the servers are, unless it knows and there is nothing more to tell."""
        if servers != self.told or more:
            self.told = servers
            self.send({"servers": servers, **more})

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a message, unless it has ended."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def kill(self) -> None:
        """Kill it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def end(self, seconds: float) -> None:
        """Wait some seconds for its end, then kill it."""
        try:
            async with asyncio.timeout(seconds):
                await self.popen.wait()
        except TimeoutError:
            self.kill()
            await self.popen.wait()


class Team:
    """Starts processes, and starts those again that are killed, until all have ended.

    Args:
        command: the options of the run.
        part: what the processes are told; their numbers are filled in.
        servers: by the names of models.
        whole: takes in what they report.
        stop: ends the run for a reason.

    Attributes:
        spent: the message of a process that has used up the budget.
    """

    def __init__(
        self,
        command: list[str],
        part: Part,
        servers: Mapping[str, Servers],
        whole: Whole,
        stop: Callable[[BaseException], object],
    ) -> None:
        self._command, self._part, self._servers, self._whole, self._stop = command, part, servers, whole, stop
        self._processes: set[Process] = set()
        self._said: dict[str, int] = {}  # lines on standard error, and the process that was first
        self._questions: set[asyncio.Task[None]] = set()
        self._reason: BaseException | None = None
        self._turns: dict[sdg.Upstream, Turns[Process]] = {
            server: Turns(server) for some in servers.values() for server in some if isinstance(server, sdg.Upstream)
        }
        self.spent: sdg.Error | None = None

    async def work(self) -> None:
        """Run until all processes have ended."""
        async with sdg.background(self._watch_servers()), asyncio.TaskGroup() as group:
            for number in range(self._part.of):
                group.create_task(self._keep(number))

    def end(self, reason: BaseException) -> None:
        """End all processes gently."""
        self._whole.stopping, self._reason = True, reason
        for process in self._processes:
            self._end(process)

    def _end(self, process: Process) -> None:
        assert self._reason
        process.send({"stop": as_message(self._reason)})
        asyncio.get_running_loop().call_later(PATIENCE, self._kill, process)

    def _kill(self, process: Process) -> None:
        if process in self._processes:
            process.kill()

    async def _keep(self, number: int) -> None:
        """Keep one of the processes running until it has no more to do."""
        deaths = 0
        while not self._whole.stopping:
            process = await self._run(number)
            if process.ended:
                if process.ended[0] is not None and not self._whole.stopping:
                    self._take_problem(as_problem(process.ended[0]))
                return
            if self._whole.stopping:
                return
            deaths = 1 if self._whole.finished_by(process.pid) else deaths + 1
            how = how_it_ended(process.popen.returncode or 0)
            if deaths > DEATHS:
                self._stop(sdg.Error(f"process {number} {how}, {deaths} times in a row without a finished document"))
                return
            sdg.say(f"process {number} {how}: it is started again, and continues from what was stored")

    def _take_problem(self, problem: sdg.Error) -> None:
        """One of the processes has ended early: so do the others, unless they may still have a part of a budget."""
        if isinstance(problem, sdg.BudgetSpent):
            self.spent = problem
        else:
            self._stop(problem)

    async def _run(self, number: int) -> Process:
        """Start a process, and wait for its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            popen = await asyncio.create_subprocess_exec(
                *(sys.executable, str(sdg.__file__), "run", *self._command),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, PART: f"{theirs.fileno()}:{os.getpid()}"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal must reach only the parent
                limit=LONGEST_LINE,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        process = Process(popen, writer)
        self._processes.add(process)
        try:
            process.tell(self._states(process), part=self._part._replace(number=number)._asdict())
            if self._reason:  # it came while the process was started
                self._end(process)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(process, reader))
                group.create_task(self._relay(process))
            await popen.wait()
        finally:
            if popen.returncode is None:  # a second signal
                process.send({"stop": {"signal": signal.SIGTERM}})
                await process.end(HURRY)
            self._processes.discard(process)
            self._whole.over(process.pid)
            writer.close()
        return process

    async def _listen(self, process: Process, reader: asyncio.StreamReader) -> None:
        """Take in what a process reports."""
        with contextlib.suppress(ConnectionError):
            while raw := await reader.readline():
                message = json.loads(raw)
                if "rank" in message:
                    self._take_report(process, message)
                elif "ended" in message:
                    process.ended.append(message["ended"])
                elif "examine" in message:
                    task = asyncio.create_task(self._examine(process, message))
                    self._questions.add(task)
                    task.add_done_callback(self._questions.discard)

    def _take_report(self, process: Process, report: dict[str, Any]) -> None:
        """Take in where a process is with a rank."""
        (process.ranks.discard if report["last"] else process.ranks.add)(report["rank"])
        for name, states in report["servers"].items():
            for server, state in zip(self._servers[name], states, strict=False):
                if isinstance(server, sdg.Upstream):
                    self._turns[server].note(process, state)
        self._whole.take(process.pid, report)
        if not self._whole.stopping and (problem := self._whole.too_many_failures()):
            self._stop(problem)

    async def _relay(self, process: Process) -> None:
        """Print what a process says on standard error, once if several say the same."""
        assert process.popen.stderr
        rest = b""
        while raw := await process.popen.stderr.read(PIECE):
            *lines, rest = (rest + raw).split(b"\n")
            if len(rest) > PIECE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._print(process, line.decode(errors="replace"))
        if rest:
            self._print(process, rest.decode(errors="replace"))

    def _print(self, process: Process, line: str) -> None:
        if not line.startswith("sdg: "):
            print_line(line)
        elif self._said.setdefault(line, process.pid) == process.pid:
            sdg.say(line[5:])
        if len(self._said) > REMEMBERED:
            del self._said[next(iter(self._said))]

    # Servers

    def _states(self, process: Process) -> dict[str, list[Any]]:
        """Where the servers are, as a process is told."""
        return {name: [self._state(server, process) for server in some] for name, some in self._servers.items()}

    def _state(self, server: str | sdg.Upstream, process: Process) -> str | dict[str, Any]:
        """What a process must know of a server: its URL, or the state of one that was launched."""
        if isinstance(server, str):
            return server
        known = {name: getattr(server, name) for name in ("url", "model", "status", "crashes", "gone")}
        up = server.up.is_set() and self._turns[server].admits(process)
        return {**known, "up": up, "launched": server.examine is not None}

    async def _watch_servers(self) -> None:
        """Tell all processes when a launched server rises or falls."""
        while self._turns:
            await asyncio.sleep(LOOK)
            for turns in self._turns.values():
                turns.look(self._processes, self._is_at_work)
            for process in self._processes:
                process.tell(self._states(process))

    def _is_at_work(self, process: Process) -> bool:
        return process in self._processes and bool(process.ranks)

    async def _examine(self, process: Process, message: Mapping[str, Any]) -> None:
        """Answer whether a process's request failed because the server crashed."""
        name, number, crashes = message["examine"]
        server = self._servers[name][number]
        assert isinstance(server, sdg.Upstream)
        assert server.examine
        crashed = await server.examine(crashes)
        self._turns[server].look(self._processes, self._is_at_work)
        process.tell(self._states(process), examined=message["question"], crashed=crashed)


def how_it_ended(code: int) -> str:
    """What is said of a process that has ended without saying why."""
    if code >= 0:
        return f"ended with exit status {code}"
    memory = " (perhaps by the kernel, for memory)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def print_line(line: str) -> None:
    """Print a line on standard error without tearing a progress bar."""
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.suppress(OSError, ValueError):  # the reader is gone
        if getattr(tqdm, "_instances", None):
            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)
