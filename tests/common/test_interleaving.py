"""The order in which jobs over one input take their documents."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

import sdg  # noqa: F401 - makes its plugins importable
from sdg_plugins.common import interleaving
from sdg_plugins.common.interleaving import Abreast


class Jobs:
    """Jobs whose documents begin one at a time, in an order that is written down."""

    def __init__(self, *names: str) -> None:
        self.abreast = Abreast(names, 1)
        self.begun: list[str] = []
        self.tasks = asyncio.TaskGroup()

    async def take(self, name: str, *indices: int, pause: Coroutine[Any, Any, object] | None = None) -> None:
        """Let a job's documents begin, one after the other; it reads on only after a pause."""
        for number, index in enumerate(indices):
            if number == 1 and pause:
                await pause
            await self.abreast.turn(name, index, set())
            self.begun.append(f"{name}{index}")
            await asyncio.sleep(0)
            self.abreast.over()
        self.abreast.leave(name)


def test_a_job_that_reads_slowly_is_waited_for() -> None:
    async def both() -> list[str]:
        jobs = Jobs("a", "b")
        async with jobs.tasks as tasks:
            tasks.create_task(jobs.take("a", 0, 1, 2, 3))
            tasks.create_task(jobs.take("b", 0, 1, 2, 3, pause=asyncio.sleep(0.05)))
        return jobs.begun

    assert asyncio.run(both()) == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_a_job_without_further_documents_is_not_waited_for() -> None:
    async def three() -> list[str]:
        jobs = Jobs("a", "b", "c")
        async with jobs.tasks as tasks:
            tasks.create_task(jobs.take("a", 0, 4, 5))
            tasks.create_task(jobs.take("b", 0))
            tasks.create_task(jobs.take("c"))
        return jobs.begun

    assert asyncio.run(three()) == ["a0", "b0", "a4", "a5"]


def test_a_job_whose_next_document_does_not_come_holds_the_others_only_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interleaving, "PATIENCE", 0.05)

    async def both() -> list[str]:
        jobs, first_done = Jobs("a", "b"), asyncio.Event()

        async def first() -> None:
            await jobs.take("a", 0, 1, 2)
            first_done.set()

        async with jobs.tasks as tasks:
            tasks.create_task(first())
            tasks.create_task(jobs.take("b", 0, 1, 2, pause=first_done.wait()))
        return jobs.begun

    assert asyncio.run(both()) == ["a0", "b0", "a1", "a2", "b1", "b2"]
