"""The processes of the resource `process_pool`: they know the plugins, and end with the run, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import sdg

LONGEST_REST = 20.0  # s that a process goes on after SIGTERM, which schedulers send to all: as long as the run may need


class Work(Future[Any]):
    """What a process of the pool is at: as the executor's own future but that the loss of a process ends the run.

    Args:
        inner: the executor's future.
    """

    def __init__(self, inner: Future[Any]) -> None:
        super().__init__()
        self._inner = inner
        inner.add_done_callback(self._settle)

    def cancel(self) -> bool:
        """See `concurrent.futures.Future.cancel`."""
        return self._inner.cancel()

    def running(self) -> bool:
        """See `concurrent.futures.Future.running`."""
        return self._inner.running()

    def _settle(self, inner: Future[Any]) -> None:
        if inner.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif isinstance(problem := inner.exception(), BrokenProcessPool):
            self.set_exception(lost(problem))
        elif problem:
            self.set_exception(problem)
        else:
            self.set_result(inner.result())


class Pool(ProcessPoolExecutor):
    """A pool of a process for each core, whose loss ends the run: else documents would fail, and all further ones.

    Args:
        plugins: what the run has loaded by --plugin, so that the processes find functions of these, too.
    """

    def __init__(self, plugins: list[str]) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads, and the event loop
        super().__init__(cores, context, sdg.begin_process, (plugins, __name__, "begin"))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `concurrent.futures.Executor.submit`. It, or its future, raises PluginError once a process has died."""
        try:
            return Work(super().submit(fn, *args, **kwargs))
        except BrokenProcessPool as problem:
            raise lost(problem) from problem

    def kill(self) -> None:
        """End the processes that are still at work."""
        for process in list((getattr(self, "_processes", None) or {}).values()):  # `kill_workers` comes with 3.14
            process.kill()


def lost(problem: BrokenProcessPool) -> sdg.PluginError:
    """What ends the run: its documents stay unfinished, and their answers are kept."""
    ended = sdg.PluginError("a process of the process_pool has died, of memory perhaps: mend that, and run again")
    ended.__cause__ = problem
    return ended


def begin() -> None:
    """Have this process, one of the pool, end with the run, and not before: signals to all are the run's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(LONGEST_REST, os._exit, [1]).start())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
