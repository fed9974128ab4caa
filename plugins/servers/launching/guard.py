"""Runs a command so that nothing of it outlives the process that started this one: `guard.py PARENT COMMAND…`.

Its standard input is the life line. When that ends (its parent has closed it, or was killed), when the process PARENT
has ended though others hold the line, or on SIGTERM, all that the command has started is terminated, and killed after a
moment, daemons with sessions of their own included: on Linux this process is the "child subreaper" that orphans fall to
(prctl(2)). The exit status is the command's.

A program of its own that imports nothing heavy and nothing of `sdg`.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PATIENCE = 3.0  # s between SIGTERM and SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    """Call prctl(2) where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """In the child, before it becomes the command: if this process is killed, it goes, too."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int, *, deep: bool = True) -> list[int]:
    """The processes below `pid`, as far as the system tells: /proc has them on Linux. Not `deep`: only its own."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return [*found, *(below for child in found for below in children(child))] if deep else found


def reap(command: int) -> int | None:
    """Collect what has ended; return the command's status if it is among that."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == command:
                status = os.waitstatus_to_exitcode(ended[1])
    return status


def signal_all(command: int, signum: int) -> None:
    """Send a signal to the command's process group and to all that descends from it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(command, signum)
    for pid in children(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def end_all(command: int) -> int | None:
    """Terminate, then kill, until nothing is left; return the command's status if that ended here."""
    status, began = None, time.monotonic()
    signal_all(command, signal.SIGTERM)
    while True:
        code = reap(command)
        status = code if code is not None else status
        if not children(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(command, signal.SIGKILL)  # where /proc does not tell
            return status
        if time.monotonic() - began > PATIENCE:
            signal_all(command, signal.SIGKILL)
        time.sleep(0.02)


def main() -> int:
    """Run the command of the arguments to its end, or to that of standard input."""
    parent, argv = int(sys.argv[1]), sys.argv[2:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the run's to handle, where a scheduler sends it to all processes
    wake, awake = os.pipe()
    os.set_blocking(awake, False)
    signal.set_wakeup_fd(awake)
    ending: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, _: ending.append(number))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended meanwhile
        return 1
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads here
        )
    except OSError as problem:
        print(f"{argv[0]}: {problem.strerror}", file=sys.stderr)
        return 127
    status = None
    while status is None and not ending:
        ready, _, _ = select.select([0, wake], [], [])
        if 0 in ready and not os.read(0, 1024):
            break
        if wake in ready:
            os.read(wake, 1024)
        status = reap(process.pid)
    left = end_all(process.pid)
    status = process.returncode = left if status is None else status
    return 0 if status is None else status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
