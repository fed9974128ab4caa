"""The processes of launched servers: what is started, its log, and its guard, so that nothing outlives the run."""

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.servers.launching import guard

PORTS = range(30_000, 32_768)  # below those that Linux gives to outgoing connections, above SGLang's own choice
LOG_BYTES = 64 << 20  # of a server's log, before it is moved aside; two are kept
LONGEST_LINE = 8 << 10  # bytes of a log line that are looked at
LAST_WAIT = 15.0  # s for the guard to end everything
GUARD = str(Path(__file__).with_name("guard.py"))


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where one process of a server runs."""

    port: int  # of the HTTP server, on loopback
    meeting_port: int  # where the processes of one server find each other, on the first node
    node: int = 0
    nodes: int = 1
    head: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of server.

    Attributes:
        command: the arguments of its process at a spot.
        model: the name under which it serves the model; None if it has to be asked.
        phases: what log lines tell of its start, as (regular expression, phase).
        fatal: lines after which it cannot start, as (regular expression, hint): what tells most comes first.
        version: of the package; with the command it names the compiled graphs.
        cache: where compiled graphs lie; None if there is nothing to compile.
        environment: variables that it needs.
        lists_model: whether its list of models can be relied on.
    """

    name: str
    command: Callable[[Spot], list[str]]
    model: str | None
    phases: tuple[tuple[str, str], ...] = ()
    fatal: tuple[tuple[str, str], ...] = ()
    version: str = ""
    cache: Path | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists_model: bool = True


class Died(Exception):
    """A server is not there any more, or never came up; the message says why."""


class Process:
    """A running process tree and its log. Leave the context, and it is gone."""

    def __init__(self, program: Program, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.program, self.log = program, log
        self.phase, self.line = "starting", ""
        self.fatal_at: float | None = None
        self._fatal: tuple[int, str] | None = None  # rank of the pattern, what was said
        self._complaint = ""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        adopt_orphans()
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, str(os.getpid()), *argv],
            stdin=subprocess.PIPE,  # held open: its end is the guard's sign to end
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is the run's to handle
        )
        pump = threading.Thread(target=self._pump, args=[shlex.join(argv)], name="sdg-log", daemon=True)
        pump.start()
        threading.Thread(target=self._wait, args=[pump], name="sdg-wait", daemon=True).start()

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._popen.stdin
        self._popen.stdin.close()
        self._popen.terminate()  # a process forked by a plugin may hold the life line open
        await asyncio.wait([self.exited], timeout=LAST_WAIT)

    @property
    def reason(self) -> str:
        """Why it ended, or cannot go on, in one line."""
        if self._fatal:
            hint = self.program.fatal[self._fatal[0]][1]
            return f"{self._fatal[1]}{f'; {hint}' if hint else ''} (log: {self.log})"
        status = f"it ended with status {self.exited.result()}" if self.exited.done() else "it gave no reason"
        said = self._complaint or self.line
        return f"{status}{f', its last words: {said}' if said else ', and without a word'} (log: {self.log})"

    def _pump(self, command: str) -> None:
        """Copy the output to the log, and look at its lines; in a thread, until all who could write are gone."""
        pipe = self._popen.stdout
        assert isinstance(pipe, io.BufferedReader)
        rest = b""
        with contextlib.closing(Log(self.log, command)) as log:
            while chunk := pipe.read1(1 << 16):
                log.write(chunk)
                *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
                rest = rest[-LONGEST_LINE:]
                for line in lines:
                    self._notice(line)
            self._notice(rest)
        pipe.close()

    def _wait(self, pump: threading.Thread) -> None:
        """Tell of the end, after all lines of the log: whoever hears of it knows the reason."""
        status = self._popen.wait()
        if status < 0:  # somebody has killed the guard: what it was to end has fallen to us
            end_orphans()
        pump.join()
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            self._loop.call_soon_threadsafe(self._end, status)

    def _end(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)

    def _notice(self, raw: bytes) -> None:
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw[-LONGEST_LINE:].decode(errors="replace")).strip()
        line = re.sub(r"^(\([^)]*pid=\d+\) *)?([A-Z]+ [\d:. -]+\[[^]]*\] *)?(\[[\d: -]+[^]]*\] *)?", "", line)[:300]
        line = " ".join(line.split())
        if not line:
            return
        self.line = line
        for pattern, phase in self.program.phases:
            if re.search(pattern, line):
                self.phase = phase
        if re.match(r"([\w.]+(Error|Exception)\b|error\b|fatal\b|[\w.-]+: error: )", line, re.IGNORECASE):
            self._complaint = line
        for rank, (pattern, _) in enumerate(self.program.fatal):
            if re.search(pattern, line):
                if self._fatal is None or rank < self._fatal[0]:
                    self._fatal = rank, line
                self.fatal_at = self.fatal_at or self._loop.time()
                break


def adopt_orphans() -> None:
    """Have the server's processes fall to this process if their guard is killed."""
    guard.prctl(guard.PR_SET_CHILD_SUBREAPER, 1)


def end_orphans() -> None:
    """Kill the processes that a killed guard has left to this one, and all below them.

    Guards and what they start have sessions of their own; other children of this process are left alone.
    """
    mine = os.getpid()
    for _ in range(100):
        orphans = [pid for pid in guard.children(mine, deep=False) if is_orphan(pid)]
        if not orphans:
            return
        for pid in [*orphans, *(below for orphan in orphans for below in guard.children(orphan))]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def is_orphan(pid: int) -> bool:
    """Whether a child of this process came from a server: it has another session, and is no guard."""
    try:
        return os.getsid(pid) != os.getsid(0) and GUARD.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ProcessLookupError):
        return False


class Log:
    """A log file that stays within bounds. A disk that is full loses lines of it, not the run."""

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
        """Add to the end."""
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


@contextlib.contextmanager
def free_port(wanted: str | None = None) -> Iterator[int]:
    """A port that nothing listens on and that no other run on this machine takes meanwhile; or the one that is wanted.

    Raises:
        ServerError: the port that is wanted is taken; another server there would be mistaken for ours.
    """
    import filelock

    if wanted is not None:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections don't count
            try:
                trial.bind(("127.0.0.1", int(wanted)))
            except (OSError, OverflowError, ValueError) as problem:
                hint = "leave out --server-arg port, and a free one is found"
                raise sdg.ServerError(f"port {wanted}: {getattr(problem, 'strerror', problem)}; {hint}") from problem
        yield int(wanted)
        return

    folder = Path(tempfile.gettempdir()) / f"sdg-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
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
