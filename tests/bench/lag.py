"""A plugin that measures how late the event loop of a run is: `--plugin tests/bench/lag.py`.

BENCH_LAG names the file that gets, at the end, a list of triples: when something was due, in seconds of the monotonic
clock, how much later its turn came, and the CPU time of the loop's thread meanwhile, whatever else runs.
"""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import sdg

PERIOD = 0.01  # s


@sdg.hookimpl
def observe() -> contextlib.AbstractAsyncContextManager[None]:
    """Measure from before the first document to after the last one."""
    return measuring(Path(os.environ["BENCH_LAG"]))


@contextlib.asynccontextmanager
async def measuring(path: Path) -> AsyncIterator[None]:
    """Write the file at the end."""
    samples: list[tuple[float, float, float]] = []

    async def look() -> None:
        while True:
            due, used = time.monotonic() + PERIOD, time.thread_time()
            await asyncio.sleep(PERIOD)
            samples.append((due, max(0.0, time.monotonic() - due), max(0.0, time.thread_time() - used - PERIOD)))

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        path.write_text(json.dumps(samples))
