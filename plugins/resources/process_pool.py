"""The resource `process_pool`, for rollouts that compute: one process per core."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import sdg

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

SHUTDOWN_GRACE = 5.0  # s that workers have to finish what they are doing


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("process_pool", process_pool)


@contextlib.asynccontextmanager
async def process_pool(run: sdg.Run) -> AsyncIterator[ProcessPoolExecutor]:
    """One process per core: `await asyncio.get_running_loop().run_in_executor(process_pool, function, argument)`."""
    from sdg_plugins.common.workers import WorkerPool

    pool = WorkerPool(run.options.plugin or [], run.options.part.of if run.options.part else 1)
    try:
        yield pool
    finally:
        shutdown = asyncio.create_task(asyncio.to_thread(pool.shutdown, cancel_futures=True))
        _, late = await asyncio.wait([shutdown], timeout=SHUTDOWN_GRACE)
        if late:  # a worker is busy for a rollout that was canceled
            pool.kill()
        await shutdown
