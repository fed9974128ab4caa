"""The order in which the jobs of a process work.

The next one begins when the last document of the one before has begun, so that the servers never run dry between two
ranks, or two configs. What overlaps shares the limit of requests in flight.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from sdg_plugins.servers.models import Servers

MOST = 8  # jobs at a time: each has threads and open files


class Runner(Protocol):
    """What a relay knows of a job."""

    problem: BaseException | None
    begun_all: asyncio.Event

    async def work(self, servers: Mapping[str, Servers]) -> None:
        """Run to the end, or as far as it gets."""

    async def following(self, at_the_end: bool) -> Self | None:
        """The job to do next with the same config, if there is one; asked before this one has ended, and then again."""

    async def end(self) -> None:
        """Called when its work has ended."""

    def may_overlap(self, before: Self) -> bool:
        """True if it may begin now, while the job before it still has documents in flight."""

    @property
    def is_step(self) -> bool:
        """True if it works on what the job before it has written."""


class Relay:
    """Jobs that take turns.

    Args:
        jobs: in order; those that follow are added.
        servers: of each model.
        reason: returns what has stopped all jobs, if something has.
    """

    def __init__(
        self, jobs: list[Any], servers: Mapping[str, Servers], reason: Callable[[], BaseException | None]
    ) -> None:
        self._jobs, self._servers, self._reason = jobs, servers, reason
        self._waiting: deque[Runner] = deque(jobs)
        self._most = max(MOST, sum(job.abreast is not None for job in jobs))
        self._working: dict[asyncio.Task[None], Runner] = {}
        self._last: Runner | None = None  # that has begun
        self._asked: tuple[Runner, bool] | None = None  # which job was asked for the next one, and whether at the end
        self._problem: Exception | None = None  # of a job that could not begin

    async def run(self) -> None:
        """Have all jobs work, until something stops them. Raises what kept one of them from beginning."""
        try:
            while True:
                await self._find_following()
                if self._waiting and self._may_begin(self._waiting[0]):
                    self._begin(self._waiting.popleft())
                elif self._working:
                    await self._wait()
                else:
                    break
        except asyncio.CancelledError:
            await self._cancel()
            task = asyncio.current_task()
            if self._reason() is None or task is None:
                raise
            task.uncancel()
        if self._problem:
            raise self._problem

    def _begin(self, job: Runner) -> None:
        self._last = job
        self._working[asyncio.create_task(job.work(self._servers))] = job

    def _may_begin(self, job: Runner) -> bool:
        last = self._last
        if self._reason():
            return False
        if not self._working or last is None:
            return True
        return len(self._working) < self._most and job.may_overlap(last)

    async def _find_following(self) -> None:
        """Find the job that follows on the last one, when all of its documents have begun, and again at its end."""
        last, at_the_end = self._last, not self._working
        if last is None or self._reason() or self._problem or self._asked in {(last, True), (last, at_the_end)}:
            return
        if not at_the_end and not (last.begun_all.is_set() and len(self._working) < self._most):
            return
        self._asked = last, at_the_end
        try:
            following = await last.following(at_the_end)
        except Exception as exc:  # noqa: BLE001 - what is in flight is worth the wait
            self._problem = exc
            self._waiting.clear()
            return
        if following is not None:
            self._asked = last, True
            self._jobs.append(following)
            self._waiting.appendleft(following)

    async def _wait(self) -> None:
        """Wait until a job has ended, or the last one has begun all of its documents."""
        tasks: set[asyncio.Task[Any]] = set(self._working)
        begun_all: asyncio.Task[Any] | None = None
        if self._last and not self._last.begun_all.is_set():
            tasks.add(begun_all := asyncio.create_task(self._last.begun_all.wait()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if begun_all:
                begun_all.cancel()
        for task in done - {begun_all}:
            job = self._working.pop(task)
            task.result()
            await job.end()
            if job.problem and self._waiting and self._waiting[0].is_step:
                self._waiting.clear()  # the following steps would work on a part of the rows

    async def _cancel(self) -> None:
        for task in self._working:
            task.cancel()
        if self._working:
            await asyncio.wait(self._working)
