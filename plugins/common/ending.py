"""How a process ends: at a signal even if a plugin blocks it, and without waiting for what plugins leave behind."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NoReturn, TypeVar

import sdg

LAST_RESORT = 18.0  # s after a signal at which the process ends even if a plugin blocks it: responses are durable
UNHEARD = 2.0  # s after which a signal is reported that the event loop has not seen
LEFT_BEHIND = 1.0  # s that tasks and threads of plugins have to end when the run is over
END = b"\0"  # ends the watchdog; no signal has the number 0
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

T = TypeVar("T")


# ── Signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watchdog:
    """A thread that sees signals while the event loop is blocked, and ends the process if that takes too long.

    The interpreter writes the number of each signal to a pipe as soon as it arrives (`signal.set_wakeup_fd`). Event
    loops have such a pipe as well, so the numbers are passed on to it.

    Attributes:
        heard: how many signals the event loop has seen.
    """

    def __init__(self) -> None:
        self._awake, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._loops = -1  # the event loop's pipe
        self.heard = 0
        self._thread = threading.Thread(target=self._listen, name="sdg-watchdog", daemon=True)
        self._thread.start()

    def arm(self) -> None:
        """Receive signals from now on. Called whenever the event loop has begun to run, in the main thread."""
        before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        if before != self._wake:
            self._loops = before

    def close(self) -> None:
        """Leave signals to the event loop."""
        signal.set_wakeup_fd(self._loops, warn_on_full_buffer=False)
        os.write(self._wake, END)  # closing it is not enough: a forked process of a plugin may hold it open
        self._thread.join()
        os.close(self._wake)
        os.close(self._awake)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # a plugin has closed the pipe
            self._watch()

    def _watch(self) -> None:
        received: list[signal.Signals] = []
        began, reported = math.inf, False
        while True:
            patience = LAST_RESORT if self.heard or reported else UNHEARD
            timeout = max(0.0, began + patience - time.monotonic()) if received else None
            if select.select([self._awake], [], [], timeout)[0]:
                if END in (numbers := os.read(self._awake, 1024)):
                    return
                with contextlib.suppress(OSError):  # the loop is being closed
                    os.write(self._loops, numbers)
                received += [signum for signum in HANDLED for _ in range(numbers.count(signum))]
                began = min(began, time.monotonic()) if received else began
                hurried = len(received) > (2 if self.heard else 1)
            else:
                hurried = time.monotonic() >= began + LAST_RESORT
            if hurried:
                os._exit(sdg.Interrupted(received[0]).exit_code)
            if not self.heard and not reported and time.monotonic() >= began + UNHEARD:
                reported = True
                name, left = received[0].name, LAST_RESORT - UNHEARD
                sdg.say(
                    f"{name}: a plugin blocks the process, which ends in {left:.0f} s; interrupt again to end it now"
                )


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def signals(stop: Callable[[BaseException], object]) -> Iterator[None]:
    """Stop the run on SIGINT, SIGTERM, and SIGUSR1 (which Slurm can send before the time limit).

    The second signal does not wait for what is in flight, the third ends the process at once.
    """
    global _watchdog  # noqa: PLW0603 - signals belong to the whole process
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, watchdog = asyncio.get_running_loop(), Watchdog()

    def handle(signum: signal.Signals) -> None:
        watchdog.heard += 1
        stop(sdg.Interrupted(signum))

    for signum in HANDLED:
        loop.add_signal_handler(signum, handle, signum)
    _watchdog = watchdog
    watchdog.arm()
    try:
        yield
    finally:
        _watchdog = None
        watchdog.close()
        for signum in HANDLED:
            loop.remove_signal_handler(signum)
            if watchdog.heard:  # the process is about to end, and still records how
                signal.signal(signum, signal.SIG_IGN)


# ── The event loop ───────────────────────────────────────────────────────────────────────────────────────────────────


def run_to_the_end(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in an event loop of its own until it has ended, whatever plugins do to the loop and the process.

    A task that raises KeyboardInterrupt or SystemExit stops a loop, as `loop.stop()` does: here the loop goes on, and
    what awaits the task gets the exception. Tasks and threads that do not end are left behind.
    """
    import uvloop

    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    with unclosable_streams():
        try:
            task = loop.create_task(main)
            task.add_done_callback(lambda _: loop.stop())
            while not task.done():
                if _watchdog:
                    loop.call_soon(_watchdog.arm)  # a loop sets its own pipe when it begins to run
                try:
                    loop.run_forever()
                except (KeyboardInterrupt, SystemExit):
                    if not _watchdog and threading.current_thread() is threading.main_thread():  # a signal's
                        if task.done() and not task.cancelled():
                            task.exception()  # it is this one
                        raise
            return task.result()
        finally:
            _close(loop)


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel all tasks of a loop, wait for them a moment, and close the loop unless some of them do not end."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    for last in (asyncio.wait([*left, loop.create_task(asyncio.sleep(0))]), loop.shutdown_asyncgens()):
        with contextlib.suppress(RuntimeError, KeyboardInterrupt, SystemExit, TimeoutError):  # as in `run_to_the_end`
            loop.run_until_complete(asyncio.wait_for(last, LEFT_BEHIND))
    asyncio.set_event_loop(None)
    if stubborn := [task for task in left if not task.done()]:
        sdg.left_behind.extend([loop, *stubborn])
    else:
        loop.close()


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run `main`, and end the process: no upload that hangs, and no task or thread of a plugin, keeps it from ending.

    The interpreter would wait for threads, and unload libraries that the publisher's threads use: they crash.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # none, or not a usual one
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # a terminal may be in Latin-1
    try:
        code = main()
        handle(signal.SIG_IGN)  # all work is done: a second Ctrl-C has nothing to hurry
    except KeyboardInterrupt:  # between those two lines
        code = 130
    dismiss_pools()
    deadline = time.monotonic() + 0.5
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    for thread in others:
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    waits = any(thread.name == sdg.PUBLISHER or (thread.is_alive() and not thread.daemon) for thread in others)
    if sdg.left_behind or waits:
        import multiprocessing

        for child in multiprocessing.active_children():  # of a plugin's pool; forked ones ignore SIGTERM as we do
            child.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    handle(lambda *_: os._exit(code))  # the callback of a plugin, or of a library, may hang
    atexit._run_exitfuncs()
    handle(signal.SIG_IGN)  # the interpreter would restore the default, which kills
    sys.exit(code)


def handle(action: Any) -> None:
    """Set what is done at the signals that end a run."""
    for signum in HANDLED:
        signal.signal(signum, action)


def dismiss_pools() -> None:
    """Have the idle threads of all pools end, as the interpreter does before it waits for them at its end."""
    from concurrent.futures import thread

    thread._shutdown = True
    for queue in [*thread._threads_queues.values()]:
        queue.put(None)


# ── Other things of the whole process ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def unclosable_streams() -> Iterator[None]:
    """Keep plugins from closing standard output and standard error: the run has more to say."""
    streams: list[Any] = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "__dict__")]
    for stream in streams:
        stream.close = lambda: None
    try:
        yield
    finally:
        for stream in streams:
            with contextlib.suppress(AttributeError):
                del stream.close


@contextlib.contextmanager
def same_folder() -> Iterator[None]:
    """Return to the working directory at the end: plugins may have left it, and even deleted the new one."""
    folder = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)
