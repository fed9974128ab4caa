"""Resources for rollouts that do more than ask: processes, a folder, and chance that can be repeated.

A rollout has them by naming a parameter `process_pool`, `temp_dir` or `rng`.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import sdg

PATIENCE = 5.0  # s that processes get to end by themselves
LONGEST_REST = 20.0  # s that one goes on after SIGTERM, which schedulers send to all: as long as the run may need


@sdg.hookimpl
def register_resources(register: sdg.Register) -> None:
    register("process_pool", process_pool)
    register("temp_dir", temp_dir)
    register("rng", rng)


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def process_pool(run: sdg.Run) -> AsyncIterator[ProcessPoolExecutor]:
    """A process for each core: `await asyncio.get_running_loop().run_in_executor(process_pool, function, argument)`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = Pool(
        cores,
        multiprocessing.get_context("spawn"),  # a fork would copy threads' locks and the event loop
        sdg.begin_process,
        (run.options.plugin or [], __name__, "begin"),
    )
    try:
        yield pool
    finally:
        workers = getattr(pool, "_processes", None) or {}
        ending = asyncio.create_task(asyncio.to_thread(pool.shutdown, cancel_futures=True))
        _, late = await asyncio.wait([ending], timeout=PATIENCE)
        for worker in list(workers.values()) if late else []:  # at work for a rollout that has been cancelled
            worker.kill()
        await ending


class Pool(ProcessPoolExecutor):
    """A pool whose loss ends the run: else all further documents would fail."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `concurrent.futures.Executor.submit`. Raises PluginError once a process has died."""
        try:
            return super().submit(fn, *args, **kwargs)
        except BrokenProcessPool as problem:
            message = "a process of the process_pool has died, of memory perhaps: mend that, and run again"
            raise sdg.PluginError(f"{message} with --retry-failed") from problem


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


# ── Other ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def temp_dir(run: sdg.Run) -> AsyncIterator[Path]:
    """A folder, as a Path, that is deleted when the run ends."""
    folder = tempfile.TemporaryDirectory(prefix="sdg-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.to_thread(folder.cleanup)


@contextlib.asynccontextmanager
async def rng(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """A random.Random that each rollout begins anew from --seed, the document's id and the rollout's number."""

    def make(document: sdg.Document, generate: sdg.Generate) -> random.Random:
        return random.Random(f"{run.options.seed} {generate.index} {document.id}".encode(errors="surrogatepass"))

    yield sdg.PerRollout(make)
