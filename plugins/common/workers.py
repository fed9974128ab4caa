"""The workers of the resource `process_pool`: they know the plugins, and end with the run however it ends.

This is not in `plugins/resources/`, whose modules are all imported at every start: `concurrent.futures.process` is slow
to import, and few runs need it.
"""

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

SIGTERM_GRACE = 20.0  # s that a worker lives after SIGTERM, which schedulers send to all: the run may need as long


class WorkerFuture(Future[Any]):
    """The executor's future, except that the death of a worker ends the run.

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
        elif isinstance(exc := inner.exception(), BrokenProcessPool):
            self.set_exception(worker_died(exc))
        elif exc:
            self.set_exception(exc)
        else:
            self.set_result(inner.result())


class WorkerPool(ProcessPoolExecutor):
    """One worker per core. The death of one ends the run: otherwise this document and all later ones would fail.

    Args:
        plugins: what the run has loaded by --plugin, so that workers find the functions of these plugins.
        sharing: how many processes share the cores.
    """

    def __init__(self, plugins: list[str], sharing: int = 1) -> None:
        every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cores = max(1, (every or 1) // sharing)
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads, and the event loop
        super().__init__(cores, context, sdg.begin_process, (plugins, __name__, set_up_worker.__name__))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `concurrent.futures.Executor.submit`. It, or its future, raises PluginError once a worker has died."""
        try:
            return WorkerFuture(super().submit(fn, *args, **kwargs))
        except BrokenProcessPool as exc:
            raise worker_died(exc) from exc

    def kill(self) -> None:
        """Kill the workers that are still busy."""
        for process in list((getattr(self, "_processes", None) or {}).values()):  # Python 3.14 has `kill_workers`
            process.kill()


def worker_died(exc: BrokenProcessPool) -> sdg.PluginError:
    """The error that ends the run. Its documents stay unfinished, and their responses are kept."""
    message = "a process of the process_pool has died, perhaps out of memory: fix the cause, then run again"
    error = sdg.PluginError(message)
    error.__cause__ = exc
    return error


def set_up_worker() -> None:
    """Make this process end with the run and not before: the run handles signals that are sent to all processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(SIGTERM_GRACE, os._exit, [1]).start())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
