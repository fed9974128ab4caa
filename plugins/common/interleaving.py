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


class Abreast:
    """Lets documents of several jobs over one input begin in the order of the input, whichever job they belong to.

    Args:
        jobs: what stands for each job; nothing begins until all of them have joined, or have ended.
        most: documents in flight, of all jobs.
    """

    def __init__(self, jobs: Sequence[object], most: int) -> None:
        self._missing, self._most = set(jobs), most
        self._active = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._number = itertools.count()

    def join(self, job: object) -> None:
        """A job has documents that wait, or will have none."""
        self._missing.discard(job)
        self._grant()

    async def turn(self, job: object, index: int, waiting: set[asyncio.Future[Any]]) -> None:
        """Wait until a document may begin; call `over` at its end.

        Args:
            job: whose document it is.
            index: of the document in the input.
            waiting: what is waited for is in this set meanwhile; it may be canceled.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (index, next(self._number), future))
        waiting.add(future)
        self.join(job)
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
        while self._waiting and not self._missing and self._active < self._most:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():
                self._active += 1
                future.set_result(None)


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
