"""The remaining time that a run shows, against runs that are played on a clock of their own."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from statistics import median

import pytest

from sdg_plugins.common.time_to_go import TimeToGo

TIMES: dict[str, Callable[[random.Random], float]] = {
    "alike": lambda chance: chance.lognormvariate(1.5, 0.4),
    "a fiftieth takes ten times as long": lambda c: c.lognormvariate(1.5, 0.4) * (10 if c.random() < 0.02 else 1),
    "a twentieth takes twenty times as long": lambda c: c.lognormvariate(1.5, 0.4) * (20 if c.random() < 0.05 else 1),
}


def played(documents: int, together: int, time_of: Callable[[random.Random], float], seed: int) -> list[float]:
    """What a run says at moments of it, as a share of what it was: 1.1 is a tenth too long."""
    chance, clock = random.Random(seed), TimeToGo()
    times = [time_of(chance) for _ in range(documents)]
    ends: list[tuple[float, int]] = []
    begun: dict[int, float] = {}
    ended: deque[tuple[float, float]] = deque(maxlen=1000)
    said: list[tuple[float, float]] = []
    now, looked = 0.0, 0.0
    clock.look(0, 0.0)
    for finished in range(documents):
        while len(begun) < together and finished + len(begun) < documents:
            number = finished + len(begun)
            begun[number] = now
            heapq.heappush(ends, (now + times[number], number))
        now, number = heapq.heappop(ends)
        if now > looked + 40:
            looked = now
            clock.look(finished, now)
            seconds = clock.seconds(documents - finished, list(begun.values()), list(ended))
            said.append((now, seconds or 0.0))
        ended.append((now, now - begun.pop(number)))
    return [seconds / (now - at) for at, seconds in said if 0.1 <= at / now <= 0.8]


@pytest.mark.parametrize("times", TIMES)
def test_the_time_to_go_is_right_from_a_tenth_on_though_some_documents_take_long(times: str) -> None:
    said = [share for seed in range(3) for share in played(8000, 64, TIMES[times], seed)]
    assert 0.9 <= median(said) <= 1.1
    assert median(abs(share - 1) for share in said) <= 0.15


def test_while_the_last_documents_run_the_time_to_go_is_that_of_the_slow_ones() -> None:
    clock = TimeToGo()
    clock.look(0, 0.0)
    clock.look(990, 1000.0)
    ended = [(float(at), 100.0 if at % 10 == 0 else 1.0) for at in range(100, 1000)]
    seconds = clock.seconds(3, [999.5, 998.0, 950.0], ended)
    assert seconds is not None
    assert 45 <= seconds <= 110


def test_the_time_that_a_server_loads_does_not_lower_the_rate() -> None:
    clock = TimeToGo()
    for moment in (0.0, 300.0, 600.0):
        clock.look(0, moment)
    clock.look(60, 660.0)
    assert clock.rate == 1


def test_nothing_is_said_before_anything_has_ended() -> None:
    clock = TimeToGo()
    clock.look(0, 0.0)
    assert clock.seconds(100, [0.0] * 10, []) is None
    assert clock.seconds(0, [], []) == 0
