"""Who may send requests to a launched server that has crashed: one process of several at a time.

A request that crashes its server is found by sending suspects in ever smaller groups, at last alone. A process knows
only its own requests, so a suspect of another one, which happens to be in flight each time, would be found guilty, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import sdg

CALM = 2  # reports in a row without a suspect, after which the next process has the server

P = TypeVar("P")


class Turns(Generic[P]):
    """The turns of processes after a crash of one server; before the first one all of them may use it.

    Args:
        upstream: the server.
    """

    def __init__(self, upstream: sdg.Upstream) -> None:
        self._upstream, self._crashes = upstream, upstream.crashes
        self._queue: list[P] = []
        self._calm = 0

    def look(self, processes: Iterable[P], works: Callable[[P], bool]) -> None:
        """Notice a crash, and which processes have ended or have no rank just now."""
        if self._upstream.crashes > self._crashes:
            self._crashes, self._calm = self._upstream.crashes, 0
            present = self._queue[:1]  # has not found the cause yet
            self._queue = [*present, *(process for process in processes if process not in present)]
        while self._queue and not works(self._queue[0]):
            self._next()

    def note(self, process: P, state: Mapping[str, Any]) -> None:
        """Take in what a process reports of the server."""
        known = self._upstream.up.is_set() and state["crashes"] == self._crashes
        if self._queue and self._queue[0] is process and known:
            self._calm = 0 if state["suspects"] else self._calm + 1
            if self._calm >= CALM:
                self._next()

    def admits(self, process: P) -> bool:
        """True if a process may send requests."""
        return not self._queue or self._queue[0] is process

    def _next(self) -> None:
        self._queue.pop(0)
        self._calm = 0
