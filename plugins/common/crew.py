"""The workers that run documents: tasks, and how they end, whatever rollouts do to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdg_plugins.common.interleaving import Abreast

GRACE = 10.0  # s that rollouts have to end after SIGTERM: schedulers kill after 30
REMEMBERED = 1000  # documents that have ended
CUT_OFF = 3.0  # s that they have to end once they were canceled; those that ignore that are left behind


class Places:
    """The places of workers, which the jobs of a process share: as many as documents may be in flight.

    Attributes:
        taken: by workers.
        changed: set when a place is free again, or a crew looks for no more.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.changed = asyncio.Event()


class Crew:
    """As many tasks as documents may be in flight, and their end. A task for each document would cost a tenth more.

    Args:
        most: documents in flight.
        places: those of all jobs of the process.
        begun_all: set when all documents have begun, or no further one begins.
        abreast: decides on the order of documents, if other jobs have the same; then it counts them.

    Attributes:
        begun: when each document in rollouts has begun, by its index; a monotonic time in s.
        ended: when each of the last documents ended, and how long it took, in s.
        cut_off: the rollouts were canceled: whatever they return from now on is void.
    """

    def __init__(self, most: int, places: Places, begun_all: asyncio.Event, abreast: Abreast | None = None) -> None:
        self._most, self._places, self._begun_all = most, Places() if abreast else places, begun_all
        self.abreast = abreast
        self._turns: set[asyncio.Future[Any]] = set()  # that documents wait for
        self.begun: dict[int, float] = {}
        self.ended: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self.cut_off = False
        self._pid = os.getpid()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    async def work(self, workers: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run workers until all of them have ended, or were cut off."""
        try:
            await self._begin(iter(workers))
            await self._over.wait()
        except asyncio.CancelledError:
            await self._cut_off()
            raise

    async def _begin(self, workers: Iterator[Coroutine[Any, Any, None]]) -> None:
        """Begin workers while there are places, until one of them finds no further document."""
        places = self._places
        while not self._begun_all.is_set():
            if places.taken >= self._most:
                places.changed.clear()
                await places.changed.wait()
            elif worker := next(workers, None):
                places.taken += 1
                self._tasks.add(task := asyncio.create_task(worker))
                task.add_done_callback(self._ended)
            else:
                return

    async def turn(self, index: int) -> None:
        """Wait until a document may begin. Canceled when the run stops."""
        if self.abreast:
            await self.abreast.turn(self._begun_all, index, self._turns)

    def at(self, index: int) -> Shift:
        """A context manager around the rollouts of a document."""
        return Shift(self, index)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._places.taken -= 1
        self._leave_places()
        if not self._tasks:
            self._over.set()

    def _leave_places(self) -> None:
        """Look for no further places."""
        self._begun_all.set()
        self._places.changed.set()
        if self.abreast:
            self.abreast.leave(self._begun_all)

    def end(self) -> None:
        """Give rollouts a moment to end, then cancel them."""
        self._leave_places()
        for turn in list(self._turns):
            turn.cancel()
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
        for stubborn in self._tasks:  # they are left behind, but other jobs go on
            stubborn.remove_done_callback(self._ended)
            self._places.taken -= 1
        self._tasks.clear()
        self._places.changed.set()
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
        if self._crew.abreast:
            self._crew.abreast.over()
