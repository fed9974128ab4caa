"""A resource for rollouts that compute: a process for each core."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import sdg

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

PATIENCE = 5.0  # s that processes get to finish what they are at


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("process_pool", process_pool)


@contextlib.asynccontextmanager
async def process_pool(run: sdg.Run) -> AsyncIterator[ProcessPoolExecutor]:
    """A process for each core: `await asyncio.get_running_loop().run_in_executor(process_pool, function, argument)`."""
    from sdg_plugins.common.workers import Pool

    pool = Pool(run.options.plugin or [])
    try:
        yield pool
    finally:
        ending = asyncio.create_task(asyncio.to_thread(pool.shutdown, cancel_futures=True))
        _, late = await asyncio.wait([ending], timeout=PATIENCE)
        if late:  # at work for a rollout that was cancelled
            pool.kill()
        await ending
