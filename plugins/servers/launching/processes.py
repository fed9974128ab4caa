"""The processes of launched servers: how one is started, its log, and its end, so that none outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.servers.launching import guard

PORTS = range(30_000, 32_768)  # below those that Linux gives to outgoing connections, above SGLang's defaults
LOG_BYTES = 64 << 20  # size at which a server's log is rotated; one older log is kept
LONGEST_LINE = 8 << 10  # bytes at the end of a log line that are examined
LAST_WAIT = 15.0  # s that the guard has to end everything
USAGE_STATUSES = {2, 126, 127}  # invalid arguments, as argparse has it; a command that cannot run, or does not exist
# Fatal lines that concern the machine: the options may be right
MACHINE_FAULTS = (r"Free memory on device .* less than", r"[Aa]ddress already in use", r"invalid device ordinal")
PORT_TAKEN = re.compile("address already in use", re.IGNORECASE)  # strerror(EADDRINUSE), as all servers log it
MARK = "SDG_SERVER"  # environment variable of all processes of a server: distinguishes them from all others
GUARD = str(Path(__file__).with_name("guard.py"))
OUT_OF_MEMORY = "out of memory: a process of the job was killed; give the job more (with Slurm: --mem)"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one process of a server runs.

    Attributes:
        port: the HTTP server's, on loopback.
        rendezvous_port: on node 0, where the processes of one server find each other.
        node: number of this node.
        nodes: how many nodes the server spans.
        head: host name or address of node 0.
    """

    port: int
    rendezvous_port: int
    node: int = 0
    nodes: int = 1
    head: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of server.

    Attributes:
        name: for messages and log files.
        command: returns the command line of its process at a placement.
        model: the name under which it serves the model; None if it has to be asked.
        phases: log lines that mark the phases of its start, as (regular expression, phase).
        fatal: log lines after which it cannot start, as (regular expression, hint); the most informative come first.
        version: of the package; together with the command it identifies compiled graphs.
        cache: folder of compiled graphs; None if the server compiles nothing.
        environment: variables that it needs.
        lists_model: its list of models is reliable.
    """

    name: str
    command: Callable[[Placement], list[str]]
    model: str | None
    phases: tuple[tuple[str, str], ...] = ()
    fatal: tuple[tuple[str, str], ...] = ()
    version: str = ""
    cache: Path | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists_model: bool = True


class ServerDied(Exception):
    """A server has ended, hangs, or failed to start; the message says why.

    Attributes:
        port_taken: it could not start because another process has its port.
        by_options: it would end in the same way on another machine.
        out_of_memory: the kernel killed a process, because the job had used up its memory.
        node: host on which it did; None for this one.
    """

    def __init__(
        self,
        message: str,
        port_taken: bool = False,
        *,
        by_options: bool = False,
        out_of_memory: bool = False,
        node: str | None = None,
    ) -> None:
        super().__init__(message)
        self.port_taken, self.by_options, self.out_of_memory = port_taken, by_options, out_of_memory
        self.node = node

    def final(self, message: str) -> sdg.ServerError:
        """The error to end the run with, if the server is not started again."""
        if self.by_options:
            return InvalidServerOptions(message)
        return (OutOfMemory if self.out_of_memory else NodeFailure)(message, self.node)


class InvalidServerOptions(sdg.ServerError):
    """A launched server refuses its options, on whatever machine."""


class NodeFailure(sdg.ServerError):
    """A launched server cannot be kept running here; on another machine it may be.

    Attributes:
        node: host on which it failed; None for this one.
    """

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class OutOfMemory(NodeFailure):
    """A launched server needs more memory than the job has, on whatever machine."""


class Process:
    """A running process tree and its log. Leaving the context ends it.

    Attributes:
        phase: the phase of the start that its log has reached.
        line: the last line of its log, without time stamps.
        fatal_at: loop time of the first line that matches one of `Program.fatal`; None if there was none.
        port_taken: a line says that another process has its port.
        out_of_memory: when it ended, the kernel had killed a process of this job for memory since its start.
        exited: the exit status, once the process has ended and its log has been read.
    """

    def __init__(self, program: Program, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.program, self.log = program, log
        self.phase, self.line = "starting", ""
        self.fatal_at: float | None = None
        self.port_taken = self.out_of_memory = False
        self._killed_before = killed_for_memory()
        self._fatal: tuple[int, str] | None = None  # index of the pattern, and the line
        self._error_line = ""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._mark = uuid.uuid4().hex
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, str(os.getpid()), *argv],
            stdin=subprocess.PIPE,  # stays open: the guard ends everything when it is closed
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, MARK: self._mark},
            start_new_session=True,  # Ctrl-C in the terminal must reach only the run
        )
        reader = threading.Thread(target=self._read_output, args=[shlex.join(argv)], name="sdg-log", daemon=True)
        reader.start()
        threading.Thread(target=self._wait, args=[reader], name="sdg-wait", daemon=True).start()

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        """Have the guard end the process tree, and wait until it has."""
        assert self._popen.stdin
        self._popen.stdin.close()
        self._popen.terminate()  # a process forked by a plugin may hold the pipe open
        await asyncio.wait([self.exited], timeout=LAST_WAIT)

    @property
    def reason(self) -> str:
        """Why it ended, or cannot start, in one line."""
        if self.out_of_memory:
            return f"{OUT_OF_MEMORY} (log: {self.log})"
        if self._fatal:
            hint = self.program.fatal[self._fatal[0]][1]
            return f"{self._fatal[1]}{f'; {hint}' if hint else ''} (log: {self.log})"
        status = [f"exited with status {self.exited.result()}"] if self.exited.done() else []
        said = self._error_line or self.line
        return f"{'; '.join([*status, f'last output: {said}' if said else 'no output'])} (log: {self.log})"

    @property
    def by_options(self) -> bool:
        """True if its exit status, or a line of its log, says that it cannot start with these options."""
        if self.exited.done() and self.exited.result() in USAGE_STATUSES:
            return True
        if self._fatal is None or self.out_of_memory:
            return False
        index, line = self._fatal
        return bool(self.program.fatal[index][1]) and not any(re.search(fault, line) for fault in MACHINE_FAULTS)

    def death(self, reason: str = "") -> ServerDied:
        """The exception for its end, or for a start that failed."""
        message, memory = reason or self.reason, self.out_of_memory
        return ServerDied(message, self.port_taken, by_options=self.by_options, out_of_memory=memory)

    def _read_output(self, command: str) -> None:
        """Copy the output to the log and examine its lines. Runs in a thread until all writers have ended."""
        pipe = self._popen.stdout
        assert isinstance(pipe, io.BufferedReader)
        rest = b""
        with contextlib.closing(Log(self.log, command)) as log:
            while chunk := pipe.read1(1 << 16):
                log.write(chunk)
                *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
                rest = rest[-LONGEST_LINE:]
                for line in lines:
                    self._examine(line)
            self._examine(rest)
        pipe.close()

    def _wait(self, reader: threading.Thread) -> None:
        """Set `exited` after the last line of the log was examined, so that `reason` is complete by then."""
        status = self._popen.wait()
        self.out_of_memory = killed_for_memory() > self._killed_before
        if status < 0:  # the guard was killed
            kill_orphans(self._mark)
        reader.join()
        with contextlib.suppress(RuntimeError):  # the loop is closed: no one waits any more
            self._loop.call_soon_threadsafe(self._set_exited, status)

    def _set_exited(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)

    def _examine(self, raw: bytes) -> None:
        """Note what a log line says about the phase, or about the end."""
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw[-LONGEST_LINE:].decode(errors="replace")).strip()
        line = re.sub(r"^(\([^)]*pid=\d+\) *)?([A-Z]+ [\d:. -]+\[[^]]*\] *)?(\[[\d: -]+[^]]*\] *)?", "", line)[:300]
        line = sdg.one_line(line)
        if not line:
            return
        self.line = line
        self.port_taken |= PORT_TAKEN.search(line) is not None
        for pattern, phase in self.program.phases:
            if re.search(pattern, line):
                self.phase = phase
        if re.match(r"([\w.]+(Error|Exception)\b|error\b|fatal\b|[\w.-]+: error: )", line, re.IGNORECASE):
            self._error_line = line
        for index, (pattern, _) in enumerate(self.program.fatal):
            if re.search(pattern, line):
                if self._fatal is None or index < self._fatal[0]:
                    self._fatal = index, line
                self.fatal_at = self.fatal_at or self._loop.time()
                break


def killed_for_memory(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed because this one's control group had used up its memory.

    Args:
        groups: names the groups of this process.
        root: where control groups are mounted.
    """
    with contextlib.suppress(OSError):  # not Linux
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            name = {"memory": "memory/{}/memory.oom_control", "": "{}/memory.events"}.get(controllers)
            # In a container, the path may be that on the host, and the group itself is mounted.
            for place in [root / name.format(at).lstrip("/") for at in (path.strip("/"), "")] if name else ():
                with contextlib.suppress(OSError):
                    if found := re.search(r"^oom_kill (\d+)$", place.read_text(), re.MULTILINE):
                        return int(found[1])
    return 0


def kill_orphans(mark: str) -> None:
    """Kill the processes that a killed guard has left, and all below them.

    They have a mark in their environment; the tools that rollouts start, and the processes of other servers, do not.
    """
    quiet = 0
    for _ in range(100):
        orphans = marked(mark)
        quiet = 0 if orphans else quiet + 1
        if quiet == 2:  # one that is killed while we look may have started another one
            return
        for pid in [*orphans, *(below for orphan in orphans for below in guard.descendants(orphan))]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """The living processes with a mark in their environment; none on systems without /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of another user, or it has ended
            if f"{MARK}={mark}".encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


class Log:
    """A log file of bounded size. When the disk is full, lines are lost, but the run goes on."""

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        self.write(f"$ {title}\n".encode())

    def _open(self) -> Any:
        try:
            return open(self._path, "ab", buffering=0)
        except OSError:
            return open(os.devnull, "wb", buffering=0)

    def write(self, chunk: bytes) -> None:
        """Append to the log; rotate it when it is too large."""
        with contextlib.suppress(OSError):
            if self._file.tell() > LOG_BYTES:
                self._file.close()
                try:
                    os.replace(self._path, f"{self._path}.1")
                finally:
                    self._file = self._open()
            self._file.write(chunk)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_port(port: str) -> int:
    """Return a port's number if nothing listens on it; another server there would be mistaken for ours.

    Raises:
        ServerError: the port is taken, or not a port.
    """
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections do not count
        try:
            trial.bind(("127.0.0.1", int(port)))
        except (OSError, OverflowError, ValueError) as exc:
            reason = getattr(exc, "strerror", exc)
            message = f"port {port}: {reason}; omit --server-arg port to use a free port"
            raise sdg.ServerError(message) from exc
    return int(port)


def own_folder() -> Path:
    """A folder for locks of ports, shared by all runs of this user; not one that another user has put in its place."""
    for number in range(100):
        folder = Path(tempfile.gettempdir()) / f"sdg-ports-{os.getuid()}{f'-{number}' if number else ''}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat(follow_symlinks=False).st_uid == os.getuid():
                return folder
    raise sdg.ServerError(f"{folder} and others like it belong to other users: set TMPDIR")


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """Reserve a port that nothing listens on, so that no other run on this machine takes it meanwhile."""
    import filelock

    folder = own_folder()
    start = random.randrange(len(PORTS))
    for port in [*PORTS[start:], *PORTS[:start]]:
        lock = filelock.FileLock(folder / f"{port}.lock")
        try:
            lock.acquire(timeout=0)
            with socket.socket() as trial:
                trial.bind(("", port))
            break
        except (filelock.Timeout, OSError):
            lock.release()
    else:
        raise sdg.ServerError(f"no free port between {PORTS[0]} and {PORTS[-1]}")
    try:
        yield port
    finally:
        lock.release()
