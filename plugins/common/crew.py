"""The workers that run documents: tasks, and how they end, whatever rollouts do to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any

GRACE = 10.0  # s that rollouts have to end after SIGTERM: schedulers kill after 30
REMEMBERED = 1000  # documents that have ended
CUT_OFF = 3.0  # s that they have to end once they were canceled; those that ignore that are left behind


class Crew:
    """As many tasks as documents may be in flight, and their end. A task for each document would cost a tenth more.

    Attributes:
        begun: when each document in rollouts has begun, by its index; a monotonic time in s.
        ended: when each of the last documents ended, and how long it took, in s.
        cut_off: the rollouts were canceled: whatever they return from now on is void.
    """

    def __init__(self) -> None:
        self.begun: dict[int, float] = {}
        self.ended: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
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

    def at(self, index: int) -> Shift:
        """A context manager around the rollouts of a document."""
        return Shift(self, index)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._over.set()

    def end(self) -> None:
        """Give rollouts a moment to end, then cancel them."""
        self._ending = self._ending or asyncio.create_task(self._end())

    async def _end(self) -> None:
        deadline = time.monotonic() + GRACE
        while self.begun and time.monotonic() < deadline:  # noqa: ASYNC110 - an event for each document would be slow
            await asyncio.sleep(0.05)
        await self._cut_off()

    async def _cut_off(self) -> None:
        self.cut_off = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CUT_OFF)
        self._over.set()

    def left_by(self, task: asyncio.Task[Any]) -> bool:
        """A rollout has ended in a task. True if the task is to be canceled, perhaps because the rollout asked for it.

        A child that the rollout has forked ends here: it must not go on with the run.
        """
        if os.getpid() != self._pid:
            os._exit(0)
        return task.cancelling() > 0

    async def take_back_cancellation(self) -> None:
        """Undo a cancellation of its own task that a rollout has asked for: the task has more to do."""
        task = asyncio.current_task()
        while task and task.cancelling() and not self.cut_off:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            task.uncancel()


class Shift:
    """One document's time in rollouts."""

    __slots__ = ("_crew", "_index")

    def __init__(self, crew: Crew, index: int) -> None:
        self._crew, self._index = crew, index

    def __enter__(self) -> None:
        self._crew.begun[self._index] = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._crew.ended.append((now, now - self._crew.begun.pop(self._index)))
