"""Runs of `sdg.py` that begin as forks of a process that has imported what they import.

An interpreter that starts, and imports sdg and Arrow, takes four tenths of a second of CPU, and the tests start more
than two thousand: forks take a tenth of it. From then on all is as ever: a process with its own environment, folder,
standard streams, signals and end. What only a new interpreter can show is started as one; see `needs_interpreter`.

As a program, this is the process that forks: `forking.py FD sdg.py`, with a Unix socket that brings what to run.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "sdg.py")
# What an interpreter, a library or the linker looks at only once.
READ_AT_THE_START = ("PYTHON", "LANG", "LC_", "LD_", "MALLOC_", "ARROW_", "TZ")
# Besides plugins: what runs import, and dateutil, which Arrow does.
IMPORTED = (
    *("sdg", "sdg_plugins.commands.jobs", "sdg_plugins.commands.preview", "sdg_plugins.truncation.fitting"),
    *("aiosqlite", "dateutil.relativedelta", "filelock", "uvloop", "yaml"),
    *("pyarrow.fs", "pyarrow.parquet", "huggingface_hub.hf_api"),
)

_runs = itertools.count()
seconds = 0.0  # of CPU that the forks have used which have ended


def needs_interpreter(env: Mapping[str, str], usual: Mapping[str, str]) -> bool:
    """True if a run is to be started as a new interpreter: SDG_TEST_START=interpreter is for one run, or for all."""
    if "interpreter" in {os.environ.get("SDG_TEST_START"), env.get("SDG_TEST_START")} or not hasattr(os, "pidfd_open"):
        return True
    names = {name for name in {*env, *usual} if name.startswith(READ_AT_THE_START)}
    return any(env.get(name) != usual.get(name) for name in names)


class Fork(subprocess.Popen[str]):
    """Like `Popen([sys.executable, "sdg.py", *arguments])`, but for where the process comes from.

    Its parent is the process that forks, and so its end is learned from that: the two methods of `Popen` that would
    wait for a child of this process are replaced, and the one that makes it.
    """

    def _execute_child(self, args: Any, *rest: Any) -> None:  # in the order of the standard library
        (_, _, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_) = rest
        self._ending, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_forker(next(_runs) % 2), [b"."], [theirs.fileno(), p2cread, c2pwrite, errwrite])
        self._ending.sendall(json.dumps([args, str(cwd), env]).encode() + b"\n")
        self._lines = self._ending.makefile()
        self.pid = int(self._lines.readline())
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        global seconds
        if wait_flags & os.WNOHANG and not select.select([self._ending], [], [], 0)[0]:
            return 0, 0
        status, used = self._lines.readline().split()
        seconds += float(used)
        self._lines.close()
        self._ending.close()
        return self.pid, int(status)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@functools.cache
def _forker(_: int) -> socket.socket:
    """The socket of a process that forks, which ends when this one does.

    There are two, which take turns: a run and the one that resumes it hash strings differently, as they always do.
    """
    from running import usual_environment

    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno()), PROGRAM]  # tests look for its name in command lines
        env = {**usual_environment(), "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # forks would be without it
        forker = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], cwd="/")

    def end() -> None:
        ours.close()
        forker.wait()

    atexit.register(end)
    return ours


# ── The process that forks ───────────────────────────────────────────────────────────────────────────────────────────


def prepare() -> None:
    """Import what runs import."""
    sys.path[0] = str(ROOT)
    sys.modules["__main__"].__file__ = PROGRAM  # what processes of a pool import
    for name in IMPORTED:
        importlib.import_module(name)
    importlib.import_module("sdg").Plugins.load([])
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]  # it reads the environment when it is imported; what it imports stays
    gc.collect()
    gc.freeze()  # pages that no fork writes to are copied for none
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"


def serve(requests: socket.socket) -> socket.socket | None:
    """Fork for each request, and report each end. Returns in the forks, with the socket that says what to run."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    while True:
        for ready in select.select([requests, *running], [], [])[0]:
            if ready is requests:
                _, fds, _, _ = socket.recv_fds(requests, 1, 4)
                if not fds:
                    return None
                connection = socket.socket(fileno=fds[0])
                pid = os.fork()
                if not pid:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    for pidfd, (_, other) in running.items():
                        os.close(pidfd)
                        other.close()
                    for number, fd in enumerate(fds[1:]):
                        os.dup2(fd, number)
                        os.close(fd)
                    return connection
                for fd in fds[1:]:
                    os.close(fd)
                connection.sendall(f"{pid}\n".encode())
                running[os.pidfd_open(pid)] = pid, connection
            else:
                pid, connection = running.pop(ready)
                os.close(ready)
                _, status, used = os.wait4(pid, 0)
                with connection, contextlib.suppress(OSError):  # no one waits for it
                    connection.sendall(f"{status} {used.ru_utime + used.ru_stime}\n".encode())


def main() -> None:
    """Serve; in a fork, become what was asked for."""
    prepare()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they end this process
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        connection = serve(requests)
    if connection is None:
        return
    with connection, connection.makefile() as lines:
        sys.argv, folder, env = json.loads(lines.readline())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    import sdg

    sdg.script()


if __name__ == "__main__":
    main()
