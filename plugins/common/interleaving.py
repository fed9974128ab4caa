"""`--interleave-configs`: the configs of a file take their documents in one order, so that they share prefixes."""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import sdg

SAME = (
    *("input", "input_config", "input_split", "input_encoding", "vary"),
    *("max_concurrent_generations", "max_concurrent_documents"),
    *("requests_per_minute", "tokens_per_minute", "request_timeout"),
)

PATIENCE = 5.0  # s that jobs wait for the next document of another one, which may wait for a document that takes long


class Abreast:
    """Lets documents of several jobs over one input begin in the order of the input, whichever job they belong to.

    Args:
        jobs: what stands for each job; nothing begins until all of them have joined, or have ended.
        most: documents in flight, of all jobs.
    """

    def __init__(self, jobs: Sequence[object], most: int) -> None:
        self._most, self._active = most, 0
        self._waiting: list[tuple[int, int, object, asyncio.Future[None]]] = []
        self._waits = dict.fromkeys(jobs, 0)  # documents of each job that wait
        self._awaited = set(jobs)  # jobs that have further documents
        self._joined: set[object] = set()
        self._overdue: set[object] = set()  # jobs whose next document the others have waited for, in vain
        self._number = itertools.count()
        self._patience: asyncio.TimerHandle | None = None

    def leave(self, job: object) -> None:
        """A job has no further documents."""
        self._awaited.discard(job)
        self._grant()

    async def turn(self, job: object, index: int, waiting: set[asyncio.Future[Any]]) -> None:
        """Wait until a document may begin; call `over` at its end.

        Args:
            job: whose document it is.
            index: of the document in the input.
            waiting: what is waited for is in this set meanwhile; it may be canceled.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (index, next(self._number), job, future))
        self._waits[job] += 1
        waiting.add(future)
        self._joined.add(job)
        self._overdue.discard(job)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.over()
            raise
        finally:
            waiting.discard(future)

    def over(self) -> None:
        """A document has ended."""
        self._active -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._active < self._most and not self._must_wait():
            _, _, job, future = heapq.heappop(self._waiting)
            self._waits[job] -= 1
            if not future.done():
                self._active += 1
                future.set_result(None)

    def _must_wait(self) -> bool:
        """True if the next document of a job is not known yet: it may be an earlier one."""
        late = self._late()
        if self._patience and not late:
            self._patience.cancel()
            self._patience = None
        elif late and not self._patience and late <= self._joined:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE, self._go_on)
        return bool(late)

    def _late(self) -> set[object]:
        return {job for job in self._awaited - self._overdue if not self._waits[job]}

    def _go_on(self) -> None:
        """Wait no longer for the documents that are late."""
        self._patience = None
        self._overdue |= self._late()
        self._grant()


def check_interleaved(every: Sequence[argparse.Namespace]) -> None:
    """Raise UsageError if `--interleave-configs` is given, and the configs are not of one input, or not of one kind.

    Args:
        every: the options of each config.
    """
    first = every[0]
    if not first.interleave_configs:
        return
    if first.any_rank or first.processes:
        option = "--rank any" if first.any_rank else "--processes"
        raise sdg.UsageError(f"--interleave-configs requires that the configs have the same rank: leave out {option}")
    for options in every:
        for name in SAME:
            if (mine := getattr(options, name, None)) != (other := getattr(first, name, None)):
                flag = name.replace("_", "-")
                raise sdg.UsageError(
                    f"--interleave-configs: {flag} is {other or 'the default'} in [configs.{first.output_config}] and "
                    f"{mine or 'the default'} in [configs.{options.output_config}]: write {flag} above the tables"
                )
