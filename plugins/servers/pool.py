"""Which request goes to which server, and when: a limit for each server, and quarantine for suspicious requests."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from collections import deque
from collections.abc import Container, Coroutine, Iterable
from typing import Any, NamedTuple

import sdg
from sdg_plugins.servers.limit import Limit, Load

PATIENCE = 8  # failures in a row before a server is set aside
LONGEST_ASIDE = 30.0  # s that a server is set aside for its failures, unless it asks for more
SHORT_ASIDE, LATER_ASIDE = 2.0, 0.1  # s and, once an overload lasts longer than 20 s, the share of its duration
WORTH_SAYING = 30.0  # s of a pause that is reported on its own
SLACK = 4  # requests that a document's own server may have more in flight than another, and a quarter of those
NEAR = 64  # waiting requests, of which the first that belongs on a free server goes before the others
CONVICTING = 3  # crashes after which a request that was alone with its server is to blame


class Suspicion(NamedTuple):
    """A request was in flight when `upstream` crashed, `crashes` times; `share` requests may now be sent with it."""

    upstream: sdg.Upstream
    crashes: int
    share: int
    proved: bool = False


class Pace:
    """Requests and tokens per minute, evenly spread: no minute has more of them.

    Tokens are charged as estimated when a request is sent, and corrected when its usage is known.

    Args:
        requests: per minute; None for any number.
        tokens: of prompts and completions, per minute.
    """

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self._requests, self._tokens = requests, tokens
        self._free_at = self._tokens_free_at = 0.0  # loop times
        self._estimates: dict[int, float] = {}  # of requests in flight, by identity
        self._mean = 0.0  # tokens of a request, as far as is known

    @property
    def limited(self) -> bool:
        """True if there is a limit."""
        return bool(self._requests or self._tokens)

    @property
    def free_at(self) -> float:
        """Loop time at which the next request may be sent."""
        return max(self._free_at, self._tokens_free_at)

    def expect(self, request: sdg.Request) -> None:
        """Estimate the tokens of a request from the first one, until usage is known."""
        if self._tokens and not self._mean:
            self._mean = len(request.body) / 4 + (request.payload.get("max_tokens") or 0)

    def charge(self, now: float) -> None:
        """A request is sent."""
        if self._requests:
            self._free_at = max(now, self._free_at) + 60.0 / self._requests
        if self._tokens:
            self._tokens_free_at = max(now, self._tokens_free_at) + 60.0 * self._mean / self._tokens

    def note(self, request: sdg.Request) -> None:
        """Remember what a request was charged."""
        if self._tokens:
            self._estimates[id(request)] = self._mean

    def correct(self, request: sdg.Request, usage: sdg.Usage | None) -> None:
        """A request has ended; its usage is None if there was no response, or none was reported."""
        estimate = self._estimates.pop(id(request), None)
        if estimate is None or not self._tokens or not usage:
            return
        spent = sum(usage.get(name, 0) for name in sdg.TOKENS[:2])
        self._tokens_free_at += 60.0 * (spent - estimate) / self._tokens
        self._mean += 0.1 * (spent - self._mean)


class Quarantine:
    """The requests that were in flight when one server crashed: its suspects.

    They go back to that server and no other, before all other requests and separate from them. As many as a sixteenth
    of those that were in flight, the share of each, are sent at a time, up to four times as many when they are
    answered. So a request that crashes its server is soon alone with it and found out, and after a crash by chance the
    server is soon full again.

    Attributes:
        waiting: suspects that wait for a slot, with their shares.
        share: the smallest share of the suspects in flight; 0 if there are none.
        cleared: suspects that were answered since the server rose.
        together: the most requests in flight since there was none.
        doubts: broken-off requests for which it is not known yet whether the server has crashed.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, asyncio.Future[sdg.Upstream]]] = deque()
        self.share = self.cleared = self.together = self.doubts = 0

    def enqueue(self, suspicion: Suspicion, slot: asyncio.Future[sdg.Upstream]) -> None:
        """Add a suspect. One that was alone with the server goes first: what it is should be known soon."""
        first = suspicion.crashes > 1 and suspicion.share == 1
        (self.waiting.appendleft if first else self.waiting.append)((suspicion.share, slot))

    def admits(self, share: int, active: int) -> bool:
        """True if one more suspect of this share may be sent."""
        return active < (share if share == 1 else min(4 * share, share + self.cleared))


class Homes(dict[int, sdg.Upstream]):
    """The server of the last request of each document, by its index; of the documents that were asked about lately.

    Args:
        most: documents that are remembered.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def move(self, document: int, upstream: sdg.Upstream) -> None:
        """A request of a document is sent to a server."""
        self.pop(document, None)  # so that it is the youngest
        self[document] = upstream
        if len(self) > self._most:
            del self[next(iter(self))]

    def next(self, full: Container[sdg.Upstream], waiting: Iterable[tuple[int | None, asyncio.Future[Any]]]) -> int:
        """The position of the first request whose document's server is not full, if it is near the front; else 0."""
        for position, (document, slot) in enumerate(itertools.islice(waiting, NEAR)):
            home = None if document is None else self.get(document)
            if home not in full and not slot.done():
                return position
        return 0


class Pool:
    """Slots for requests: at most `limit` in flight in all, each on the least loaded server that is well.

    Jobs of a process that overlap share a pool: each has a `Lane` in it.

    A document's requests prefer the server that its last one was sent to, which has the document in its prefix cache,
    unless that has a few more in flight than the least loaded one.

    A server that fails several times in a row is set aside for increasing times, and comes back with one request at a
    time. `Limit` and `Quarantine` decide on the rest.

    Attributes:
        successes: responses so far.
        lost: loop time since which no server could be reached; None if one can.
    """

    def __init__(self, upstreams: Iterable[sdg.Upstream], limit: int, pace: Pace | None = None) -> None:
        self.limit, self.pace = limit, pace or Pace(None, None)
        self.upstreams = list(upstreams)
        for upstream in self.upstreams:
            upstream.limit, upstream.quarantine = Limit(limit), Quarantine()
            upstream.changed = functools.partial(self._changed, upstream)
        self.active = self.successes = 0
        self.lost: float | None = None
        self._waiting: deque[tuple[int | None, asyncio.Future[sdg.Upstream]]] = deque()
        self._homes = Homes(4 * limit + 1000)
        self._alarm: tuple[float, asyncio.Handle] | None = None  # uvloop's handles of short delays have no `when`
        self._loop = asyncio.get_running_loop()

    def acquire(
        self,
        suspicion: Suspicion | None = None,
        request: sdg.Request | None = None,
        waiting: set[asyncio.Future[Any]] | None = None,
    ) -> Coroutine[Any, Any, sdg.Upstream]:
        """Wait for a slot; a suspect waits for the server that it saw crash.

        Args:
            suspicion: that the request has crashed its server.
            request: the one that is sent.
            waiting: what is waited for is in this set meanwhile; when it is canceled, so is the request.
        """
        document = request.rollout.document.index if request and request.rollout and len(self.upstreams) > 1 else None
        if not request or not self.pace.limited:
            return self._acquire(suspicion, document, waiting)
        return self._acquire_paced(request, suspicion, document, waiting)

    async def _acquire_paced(
        self,
        request: sdg.Request,
        suspicion: Suspicion | None,
        document: int | None,
        waiting: set[asyncio.Future[Any]] | None,
    ) -> sdg.Upstream:
        self.pace.expect(request)
        upstream = await self._acquire(suspicion, document, waiting)
        self.pace.note(request)
        return upstream

    async def _acquire(
        self, suspicion: Suspicion | None, document: int | None, waiting: set[asyncio.Future[Any]] | None
    ) -> sdg.Upstream:
        if not suspicion and not self._waiting and (upstream := self._take(self._loop.time(), document)):
            return upstream
        slot: asyncio.Future[sdg.Upstream] = self._loop.create_future()
        if suspicion and not suspicion.upstream.gone:
            suspicion.upstream.quarantine.enqueue(suspicion, slot)
        else:
            self._waiting.append((document, slot))
        if waiting is not None:
            waiting.add(slot)
        self._wake()
        try:
            return await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.release(slot.result())
            self._wake()
            raise
        finally:
            if waiting is not None:
                waiting.discard(slot)

    def release(self, upstream: sdg.Upstream) -> None:
        """Give a slot back."""
        self.active -= 1
        upstream.active -= 1
        if not upstream.active:
            upstream.quarantine.share = upstream.quarantine.together = 0
        if self._waiting or self._suspects:
            self._wake()

    # What became of requests

    def succeeded(self, upstream: sdg.Upstream) -> None:
        """A response came."""
        self.successes += 1
        upstream.answers += 1
        upstream.progressed = now = self._loop.time()
        if upstream.failures or upstream.overloaded_at:
            upstream.failures, upstream.overloaded_at, upstream.until = 0, 0.0, 0.0
        upstream.limit.answered(now)

    def overloaded(self, upstream: sdg.Upstream, sent: float, asked: float | None, reason: str) -> None:
        """The server had no capacity for a request, or the account no quota: set the server aside, ever longer.

        Afterwards one request at a time is sent until one is answered.

        Args:
            upstream: the server.
            sent: loop time at which the request was sent: what was sent before the last overload is part of that.
            asked: seconds that the server asked to wait.
            reason: its words.
        """
        now = self._loop.time()
        pause = 0.0
        if sent >= upstream.limit.halved_at:
            upstream.limit.halve(upstream.active, now)
            upstream.overloaded_at = upstream.overloaded_at or now
            lasts = now - upstream.overloaded_at
            pause = max(0.5, min(SHORT_ASIDE, lasts), min(LONGEST_ASIDE, LATER_ASIDE * lasts))
            pause *= random.uniform(0.75, 1.25)
        self.set_aside(upstream, max(pause, asked or 0.0), reason)

    def set_aside(self, upstream: sdg.Upstream, seconds: float, reason: str = "") -> None:
        """Send nothing to a server for some time."""
        until = self._loop.time() + seconds
        if not seconds or until <= upstream.until:
            return
        if seconds >= WORTH_SAYING and reason and until > upstream.until + WORTH_SAYING:
            when = time.strftime("%H:%M", time.localtime(time.time() + seconds))
            sdg.say(f"nothing is sent to {sdg.redact(upstream.url)} until {when}: {reason}")
        upstream.until, upstream.reason = until, reason

    def failed(self, upstream: sdg.Upstream, sent: float, reason: str, patience: int = PATIENCE) -> None:
        """No usable response came. After `patience` failures in a row the server is set aside."""
        if sent < upstream.failed_at:
            return  # one crash breaks all requests in flight, and is one failure
        upstream.failures += 1
        upstream.failed_at = self._loop.time()
        if upstream.failures >= patience:
            pause = min(LONGEST_ASIDE, 0.5 * 2 ** min(upstream.failures - patience, 10))
            self.set_aside(upstream, pause, reason)

    def suspect(self, upstream: sdg.Upstream, earlier: Suspicion | None, together: int) -> Suspicion:
        """Suspect a request whose server has crashed with `together` requests in flight."""
        crashes = earlier.crashes + 1 if earlier else 1
        return Suspicion(upstream, crashes, max(1, together // 16), crashes >= CONVICTING and together <= 1)

    async def examine(self, upstream: sdg.Upstream, crashes: int) -> bool:
        """Find out whether a server has crashed. Suspects wait for that; otherwise they would be sent to a dead one."""
        assert upstream.examine
        try:
            return await upstream.examine(crashes)
        finally:
            upstream.quarantine.doubts -= 1
            self._wake()

    def adapt(self, upstream: sdg.Upstream, load: Load | None) -> None:
        """Take in a server's report of its load; None if it does not report."""
        known = upstream.limit.load
        if load and load.tokens and known and load.tokens > (known.tokens or 0):
            upstream.progressed = self._loop.time()
        upstream.limit.adapt(load, upstream.active)
        self._wake()

    # Figures

    def waiting(self) -> tuple[float, str] | None:
        """If no server takes requests now: for how many seconds, and why."""
        now = self._loop.time()
        up = [upstream for upstream in self.upstreams if upstream.up.is_set()]
        if not up or any(upstream.until <= now for upstream in up):
            return None
        first = min(up, key=lambda upstream: upstream.until)
        return first.until - now, first.reason

    # Slots

    @property
    def _suspects(self) -> bool:
        return any(upstream.quarantine.waiting for upstream in self.upstreams)

    def _take(self, now: float, document: int | None) -> sdg.Upstream | None:
        """Occupy a slot on the server that suits a document best; None if there is no free one."""
        if self.active >= self.limit or (self.pace.limited and self.pace.free_at > now):
            return None
        best: sdg.Upstream | None = None
        for upstream in self.upstreams:
            if self._free(upstream, now) and (not best or upstream.active < best.active):
                best = upstream
        if not best:
            return None
        if document is not None:
            home = self._homes.get(document, best)
            if home.active <= best.active + SLACK + best.active // 4 and self._free(home, now):
                best = home
            self._homes.move(document, best)
        self._occupy(best, now)
        return best

    def _free(self, upstream: sdg.Upstream, now: float) -> bool:
        """True if a request may be sent to a server."""
        quarantine = upstream.quarantine
        if upstream.until > now or not upstream.up.is_set() or quarantine.waiting or quarantine.share:
            return False
        allowed = 1 if upstream.failures >= 3 or upstream.overloaded_at else upstream.limit.value
        return upstream.active + 1 <= allowed

    def _occupy(self, upstream: sdg.Upstream, now: float) -> None:
        if self.pace.limited:
            self.pace.charge(now)
        if not upstream.active and not upstream.failures:
            upstream.progressed = now
        self.active += 1
        upstream.active += 1
        upstream.quarantine.together = max(upstream.quarantine.together, upstream.active)

    def _admit_suspects(self, upstream: sdg.Upstream, now: float) -> None:
        quarantine = upstream.quarantine
        if upstream.gone:
            self._waiting.extendleft((None, slot) for _, slot in reversed(quarantine.waiting))
            quarantine.waiting.clear()
        while quarantine.waiting:
            share, slot = quarantine.waiting[0]
            share = min(share, quarantine.share or share)
            if not slot.done():
                ready = upstream.up.is_set() and not quarantine.doubts and upstream.until <= now
                if not ready or self.active >= self.limit or not quarantine.admits(share, upstream.active):
                    break
                quarantine.share = share
                self._occupy(upstream, now)
                slot.set_result(upstream)
            quarantine.waiting.popleft()

    def _changed(self, upstream: sdg.Upstream, risen: bool) -> None:
        """A server is ready, or will not come back."""
        if risen:
            upstream.limit, upstream.quarantine.cleared = Limit(self.limit), 0
        self._wake()

    def _wake(self) -> None:
        """Hand out free slots, and set the alarm for the first server that has been set aside."""
        now = self._loop.time()  # once: what is set aside for `_take` must be so for the alarm, too
        if self._suspects:
            for upstream in self.upstreams:
                self._admit_suspects(upstream, now)
        while self._waiting:
            if self._waiting[0][1].done():
                self._waiting.popleft()
                continue
            position = self._next(now) if len(self.upstreams) > 1 and self.active < self.limit else 0
            document, slot = self._waiting[position]
            if not (free := self._take(now, document)):
                break
            del self._waiting[position]
            slot.set_result(free)
        if not (self._waiting or self._suspects) or self.active >= self.limit:  # the next response hands out a slot
            return
        later = [*(upstream.until for upstream in self.upstreams), self.pace.free_at]
        aside = min((moment for moment in later if moment > now), default=None)
        if aside and (not self._alarm or self._alarm[0] > aside):
            if self._alarm:
                self._alarm[1].cancel()
            self._alarm = aside, self._loop.call_at(aside, self._ring)

    def _next(self, now: float) -> int:
        """Which waiting request is next; none waits for a server that is down or set aside."""
        well = {upstream for upstream in self.upstreams if upstream.up.is_set() and upstream.until <= now}
        full = {upstream for upstream in well if upstream.active + 1 > upstream.limit.value}
        return self._homes.next(full, self._waiting) if any(self._free(upstream, now) for upstream in well) else 0

    def _ring(self) -> None:
        self._alarm = None
        self._wake()
