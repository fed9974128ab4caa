"""Tasks that run beside others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run something beside the body, and cancel it at its end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def read_ahead(thread: Executor, items: Iterator[T], number: int) -> AsyncGenerator[T, None]:
    """Iterate in a thread, some items ahead.

    Each item takes a turn of the event loop, which thousands of requests in flight make long.
    """
    loop = asyncio.get_running_loop()
    end: Any = object()
    ahead = deque(loop.run_in_executor(thread, next, items, end) for _ in range(number))
    try:
        while (item := await ahead.popleft()) is not end:
            ahead.append(loop.run_in_executor(thread, next, items, end))
            yield item
    finally:
        for future in ahead:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
