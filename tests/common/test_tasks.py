"""Reading ahead in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdg_plugins.common.tasks import read_ahead


@pytest.mark.parametrize("number", [1, 3, 20])
def test_items_come_in_order_and_only_so_many_are_read_ahead(number: int) -> None:
    read: list[int] = []
    beyond: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            read.append(item)
            yield item

    async def take() -> list[int]:
        taken: list[int] = []
        with ThreadPoolExecutor(1) as thread:
            async for item in read_ahead(thread, items(), number):
                taken.append(item)
                beyond.append(len(read) - len(taken))
        return taken

    assert asyncio.run(take()) == list(range(10))
    assert max(beyond) <= number


def test_what_reading_raises_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("gone")

    async def take() -> list[int | str]:
        taken: list[int | str] = []
        with ThreadPoolExecutor(1) as thread:
            try:
                async for item in read_ahead(thread, items(), 5):
                    taken.append(item)
            except OSError as exc:
                taken.append(str(exc))
        return taken

    assert asyncio.run(take()) == [1, 2, "gone"]
