"""The workers that run documents: tasks, and how they end, whatever rollouts do to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine, Iterable
from typing import Any

GRACE = 10.0  # s that rollouts have to end after SIGTERM: schedulers kill after 30
CUT_OFF = 3.0  # s that they have to end once they were canceled; those that ignore that are left behind


class Crew:
    """As many tasks as documents may be in flight, and their end. A task for each document would cost a tenth more.

    Attributes:
        busy: documents in rollouts.
        cut_off: the rollouts were canceled: whatever they return from now on is void.
    """

    def __init__(self) -> None:
        self.busy = 0
        self.cut_off = False
        self._pid = os.getpid()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    async def work(self, workers: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run workers until all of them have ended, or were cut off."""
        self._tasks = {asyncio.create_task(worker) for worker in workers}
        for task in self._tasks.copy():
            task.add_done_callback(self._ended)
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            await self._cut_off()
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._over.set()

    def end(self) -> None:
        """Give rollouts a moment to end, then cancel them."""
        self._ending = self._ending or asyncio.create_task(self._end())

    async def _end(self) -> None:
        deadline = time.monotonic() + GRACE
        while self.busy and time.monotonic() < deadline:  # noqa: ASYNC110 - an event for each document would be slow
            await asyncio.sleep(0.05)
        await self._cut_off()

    async def _cut_off(self) -> None:
        self.cut_off = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CUT_OFF)
        self._over.set()

    async def take_back_cancellation(self) -> None:
        """A rollout has ended. Undo a cancellation of its own task that it has asked for: the task has more to do."""
        if os.getpid() != self._pid:  # a child that the rollout has forked, and that must not go on with the run
            os._exit(0)
        task = asyncio.current_task()
        while task and task.cancelling() and not self.cut_off:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            task.uncancel()
