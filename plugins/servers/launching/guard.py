"""Run a command, and end everything that it started when its parent ends: `guard.py PARENT COMMAND…`.

The command and its descendants are ended, daemons with sessions of their own included, when

- standard input ends: the parent has closed it, or was killed;
- the process PARENT has ended, even if another process still holds that pipe open;
- SIGTERM, SIGINT or SIGHUP arrives.

They get SIGTERM and, after PATIENCE seconds, SIGKILL. On Linux this process is their "child subreaper" (prctl(2)): it
becomes the parent of orphans. The exit status is that of the command.

This file is also a program, so it imports only the standard library, and nothing of `sdg`.
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
    """Call prctl(2), which exists only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """In the child, before it becomes the command: have the kernel kill it if the guard is killed."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The child processes of `pid`, from /proc; empty on systems without it."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def descendants(pid: int) -> list[int]:
    """The child processes of `pid`, and all processes below them."""
    found = children(pid)
    return [*found, *(below for child in found for below in descendants(child))]


def reap(command: int) -> int | None:
    """Collect the children that have ended. Returns the command's exit code if it is one of them, else None."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == command:
                status = os.waitstatus_to_exitcode(ended[1])
    return status


def signal_all(command: int, signum: int) -> None:
    """Send a signal to the command's process group and to all descendants of this process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(command, signum)
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def end_all(command: int) -> int | None:
    """Terminate, then kill, until no descendant is left. Returns the command's exit code if it ended here."""
    status, began = None, time.monotonic()
    signal_all(command, signal.SIGTERM)
    while True:
        code = reap(command)
        status = code if code is not None else status
        if not children(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(command, signal.SIGKILL)  # for systems without /proc
            return status
        if time.monotonic() - began > PATIENCE:
            signal_all(command, signal.SIGKILL)
        time.sleep(0.02)


def main() -> int:
    """Run the command given in the arguments until it ends, or until the parent does. Returns the exit status."""
    parent, argv = int(sys.argv[1]), sys.argv[2:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # schedulers send it to all processes; the run handles it
    wake, awake = os.pipe()
    os.set_blocking(awake, False)
    signal.set_wakeup_fd(awake)
    ending: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda number, _: ending.append(number))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call of prctl
        return 1
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has no threads
        )
    except OSError as exc:
        print(f"{argv[0]}: {exc.strerror}", file=sys.stderr)
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
    if status is None:
        return 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
