"""One job's part of a pool of servers, which it may share with the job before it and the one after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    from sdg_plugins.servers.pool import Pool, Suspicion


class Lane:
    """The requests of one job: they take slots of a pool, are counted, and end with the job.

    Args:
        pool: of the servers.

    Attributes:
        active: requests in flight.
        stopped: no further request begins.
    """

    def __init__(self, pool: Pool) -> None:
        self.active, self.stopped = 0, False
        self._pool, self._loop = pool, asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[Any]] = set()  # for slots, or for the end of a pause
        self._area = 0.0  # integral of `active` over time
        self._since = self._began = self._loop.time()

    async def acquire(self, suspicion: Suspicion | None = None, request: sdg.Request | None = None) -> sdg.Upstream:
        """Wait for a slot; see `Pool.acquire`. Canceled when the job stops."""
        if self.stopped:
            raise asyncio.CancelledError
        upstream = await self._pool.acquire(suspicion, request, self._waiting)
        if not self._area and not self.active:
            self._began = self._since = self._loop.time()
        self._measure()
        self.active += 1
        return upstream

    def release(self, upstream: sdg.Upstream) -> None:
        """Give a slot back."""
        self._measure()
        self.active -= 1
        self._pool.release(upstream)

    async def pause(self, seconds: float) -> None:
        """Sleep; canceled when the job stops."""
        if self.stopped:
            raise asyncio.CancelledError
        over: asyncio.Future[bool] = self._loop.create_future()
        alarm = self._loop.call_later(seconds, lambda: None if over.done() else over.set_result(True))
        self._waiting.add(over)
        try:
            await over
        finally:
            alarm.cancel()
            self._waiting.discard(over)

    def stop(self) -> None:
        """Let no further request begin."""
        self.stopped = True
        for future in list(self._waiting):
            future.cancel()

    @property
    def seconds(self) -> float:
        """Since the first request: a launched server may load for a long time before that."""
        return self._loop.time() - self._began

    @property
    def mean_in_flight(self) -> float:
        """Requests in flight, averaged over the time since the first one."""
        self._measure()
        return self._area / max(self._since - self._began, 1e-9)

    def _measure(self) -> None:
        now = self._loop.time()
        self._area += self.active * (now - self._since)
        self._since = now
