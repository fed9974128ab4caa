"""How many requests one server may have in flight."""

from __future__ import annotations

import math
from typing import NamedTuple

FIRST_LIMIT = 64  # requests in flight on a server whose load is unknown: doubled each second while it copes
CAREFUL = 60.0  # s after an overload in which the limit grows slowly: quotas are counted by the minute


class Load(NamedTuple):
    """What a server reports: its requests, summed over its engines."""

    running: float
    waiting: float
    tokens: float | None  # prompt and completion tokens since it started; None if it does not report them
    sought: float | None = None  # prompt tokens looked up in its prefix cache since it started
    hits: float | None = None  # those of them that were there


class Limit:
    """How many requests one server may have in flight, adapted to what it bears.

    A server that reports its load gets as many requests as keep a short queue in it. Any other that responds 429 or
    503 gets half as many at a time, and one more for each limit's worth of responses, or many more once a minute has
    passed without (additive increase, multiplicative decrease; Chiu and Jain 1989).

    Attributes:
        value: requests in flight, at most.
        reports: whether the server reports its load; None until that is known.
        load: its last report.
        silent: looks at its load in a row that were not answered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.value: float = min(most, FIRST_LIMIT)
        self.reports: bool | None = None
        self.load: Load | None = None
        self.silent = 0
        self._growth = 2.0  # of the limit, each time that the server is found without a queue
        self.halved_at = -math.inf  # loop time

    def answered(self, now: float) -> None:
        """A response came."""
        if self.value < self._most and self.reports is False:
            step = 1.0 if now < self.halved_at + CAREFUL else max(1.0, self._most / 20)
            self.value = min(self._most, self.value + step / self.value)

    def halve(self, active: int, now: float) -> None:
        """The server has no capacity for as many requests as are in flight."""
        self.value = max(1.0, min(self.value, active) / 2)
        self.halved_at = now

    def adapt(self, load: Load | None, active: int) -> None:
        """Take in a report of the server's load, about once a second; None if it does not report.

        Without a queue the limit grows: twofold, or by an eighth once there was a queue, or if more requests were sent
        than run (the address may stand for several servers). It shrinks when more requests wait than an eighth of those
        that run. Requests of others count as well, so a server shared by many ranks is not flooded by all of them.
        """
        if load is None:
            if self.reports is None:  # only 429 and 503 are left to go by
                self.reports, self.value = False, self._most
            return
        self.reports, self.load = True, load
        queue = max(4.0, load.running / 8)
        if load.waiting:
            self._growth = 1.125
        if load.waiting > queue:
            self.value = max(1.0, min(self.value, active) - (load.waiting - queue) / 2)
        elif not load.waiting and active >= 0.8 * int(self.value):
            growth = self._growth if load.running >= 0.5 * active else 1.125
            self.value = min(self._most, max(self.value + 1, growth * self.value))
