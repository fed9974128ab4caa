"""How long a run still takes: what waits, at the present rate, and then the documents that are last to end."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

SHARE = 0.3  # of the time so far, over which the rate is taken
LONGEST = 600.0  # s over which it is taken at the most
PAUSE = 2.0  # s between two looks: they take milliseconds
SAMPLE = 200  # documents in flight that are looked at
SOON = 0.1  # of the longest time seen: what has taken longest is expected to end within that


class Stay(NamedTuple):
    """How long a document took, or has been in flight, in s; and how much of that is before the period looked at."""

    time: float
    before: float


class Survival:
    """How likely a document takes longer than some time: the estimate of Kaplan and Meier (1958) from one period.

    Documents in flight count with the time that they have taken so far: from those that have ended alone, the slow ones
    would be missing for a long time.

    Args:
        ended: documents that ended in the period.
        flying: documents in flight.
        weight: how many documents each of `flying` stands for.

    Attributes:
        longest: the longest time seen, in s.
    """

    def __init__(self, ended: Sequence[Stay], flying: Sequence[Stay], weight: int) -> None:
        weighted = [(stay, 1) for stay in ended] + [(stay, weight) for stay in flying]
        joined = sorted((stay.before, number) for stay, number in weighted)
        left = sorted((stay.time, number) for stay, number in weighted)
        joined_by = [0, *accumulate(number for _, number in joined)]
        left_by = [0, *accumulate(number for _, number in left)]
        self._times = sorted(stay.time for stay in ended)
        self._longer: list[float] = []  # the probability after each of them
        probability = 1.0
        for moment in self._times:
            there = joined_by[bisect_right(joined, (moment, math.inf))] - left_by[bisect_left(left, (moment, 0))]
            probability *= 1 - 1 / max(there, 2)
            self._longer.append(probability)
        self.longest = left[-1][0]

    def __call__(self, seconds: float) -> float:
        """The probability that a document takes longer."""
        if seconds > (1 + SOON) * self.longest:
            return 0.0
        position = bisect_right(self._times, seconds)
        return self._longer[position - 1] if position else 1.0

    @property
    def mean(self) -> float:
        """How long a document takes on average, in s."""
        ends = [*self._times, (1 + SOON) * self.longest]
        widths = [end - begin for begin, end in zip([0.0, *self._times], ends, strict=True)]
        return sum(width * longer for width, longer in zip(widths, [1.0, *self._longer], strict=True))


class Work(Protocol):
    """What is being done."""

    @property
    def finished(self) -> int:
        """Documents that this process has finished."""

    @property
    def begun(self) -> list[float]:
        """When each document in flight has begun, on the monotonic clock."""

    @property
    def ended(self) -> list[tuple[float, float]]:
        """When each of the last documents has ended, and how long it took, in s."""


class TimeToGo:
    """The remaining time of a run, from what has ended and what is in flight."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int]] = deque(maxlen=1000)
        self._told: tuple[float, float | None] | None = None  # when, and what

    def of(self, work: Work, remaining: int | None) -> float | None:
        """The remaining time of what is at work, in s; None if it is not known.

        Args:
            work: that is done.
            remaining: documents that are not final, also those that follow in other configs; None if not known.
        """
        now = time.monotonic()
        if not self._told or now - self._told[0] >= PAUSE:
            self.look(work.finished)
            self._told = now, None if remaining is None else self.seconds(max(0, remaining), work.begun, work.ended)
        at, seconds = self._told
        return seconds and max(0.0, seconds - (now - at))

    def look(self, finished: int, now: float | None = None) -> None:
        """Note how many documents this process has finished. The time before the first one says nothing of the rate."""
        if not finished:
            self._looks.clear()
        self._looks.append((time.monotonic() if now is None else now, finished))

    @property
    def rate(self) -> float:
        """Documents per second, recently; 0 if that is not known."""
        if len(self._looks) < 2:
            return 0.0
        now, finished = self._looks[-1]
        window = min(LONGEST, SHARE * (now - self._looks[0][0]))
        since, before = next(look for look in self._looks if now - look[0] <= window or look is self._looks[-2])
        return (finished - before) / max(now - since, 1e-9)

    def seconds(self, remaining: int, begun: Sequence[float], ended: Sequence[tuple[float, float]]) -> float | None:
        """The remaining time in s, as of the last look; None if there is nothing to go by.

        Args:
            remaining: documents that are not final, those in flight among them.
            begun: when each document in flight has begun, on the clock of the looks.
            ended: when each of the last documents ended, and how long it took, in order.
        """
        if not ended or not self._looks or not remaining:
            return 0.0 if not remaining else None
        now, since = self._looks[-1][0], max(self._looks[0][0], ended[0][0] - ended[0][1])
        weight = math.ceil(len(begun) / SAMPLE) or 1
        some = sorted(begun)[::weight]
        flying = [Stay(now - start, max(0.0, since - start)) for start in some]
        survival = Survival([Stay(took, max(0.0, since - (at - took))) for at, took in ended], flying, weight)
        possible = len(begun) / max(survival.mean, 1e-9)  # slow documents gather before the rate shows it
        rate = min(self.rate or math.inf, possible or math.inf)
        waiting = max(0, remaining - len(begun))
        return waiting / rate + time_of_the_last([stay.time for stay in flying], weight, survival)


def time_of_the_last(ages: Sequence[float], weight: int, survival: Survival) -> float:
    """In how many s the last document in flight ends, as likely later as sooner.

    The probability that all have ended by some time is the product of theirs, each given the age that it has reached.

    Args:
        ages: how long documents have been in flight, in s.
        weight: how many documents each of them stands for.
        survival: of documents.
    """

    def ended_by(seconds: float) -> float:
        total = 0.0
        for age in ages:
            ended = 1 - survival(age + seconds) / max(survival(age), 1e-300)
            if ended <= 0:
                return -math.inf
            total += weight * math.log(ended)
        return total

    if not ages:
        return 0.0
    sooner, later = 0.0, (1 + SOON) * survival.longest
    for _ in range(24):
        middle = (sooner + later) / 2
        sooner, later = (sooner, middle) if ended_by(middle) >= math.log(0.5) else (middle, later)
    return later
