"""How documents reach workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import sdg


def feed_of(*sizes: int, fails: bool = False) -> sdg.Feed:
    """A feed of batches, each of which is read only after a moment; documents are numbers."""

    async def batches() -> AsyncIterator[Iterator[Any]]:
        begin = 1
        for size in sizes:
            await asyncio.sleep(0.001)
            yield iter([(None, number) for number in range(begin, begin + size)])
            begin += size
        if fails:
            raise sdg.InputError("unreadable")

    return sdg.Feed(batches())


async def taken_by(workers: int, feed: sdg.Feed) -> list[Any]:
    """What some workers get, until nothing is left."""
    got: list[Any] = []

    async def work() -> None:
        while taken := await feed.take():
            got.append(taken[1])
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(workers):
            group.create_task(work())
    return got


async def first_of_each(workers: int, *sizes: int) -> Counter[int]:
    """How many workers that slept begin in each turn of the loop: each takes a single document, and keeps it."""
    feed, turns, turn = feed_of(*sizes), Counter[int](), 0
    done = asyncio.Event()

    async def work() -> None:
        if await feed.take():
            turns[turn] += 1
        await done.wait()

    tasks = [asyncio.create_task(work()) for _ in range(workers)]
    while turns.total() < min(workers, sum(sizes)):
        turn += 1
        await asyncio.sleep(0)
    done.set()
    await asyncio.gather(*tasks)
    return turns


@pytest.mark.parametrize("sizes", [(1000,), (1,) * 300, (3, 2000, 1, 0, 500)])
@pytest.mark.parametrize("workers", [1, 2, 700])
def test_every_document_is_taken_once_and_every_worker_ends(sizes: tuple[int, ...], workers: int) -> None:
    got = asyncio.run(taken_by(workers, feed_of(*sizes)))

    assert sorted(got) == list(range(1, sum(sizes) + 1))


def test_thousands_of_documents_do_not_begin_in_one_turn_of_the_loop() -> None:
    turns = asyncio.run(first_of_each(4000, 4000))

    assert turns.total() == 4000
    assert max(turns.values()) <= sdg.AT_ONCE + 1  # and the one that has read


def test_what_cannot_be_read_reaches_one_worker_and_the_others_end() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(taken_by(200, feed_of(50, fails=True)))

    assert [str(error) for error in caught.value.exceptions] == ["unreadable"]


def test_a_worker_that_is_cancelled_in_its_sleep_keeps_no_other_from_waking() -> None:
    async def some_go() -> list[Any]:
        feed, got = feed_of(500), []

        async def work() -> None:
            while taken := await feed.take():
                got.append(taken[1])

        tasks = [asyncio.create_task(work()) for _ in range(300)]
        await asyncio.sleep(0)
        for task in tasks[1::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return got

    assert sorted(asyncio.run(some_go())) == list(range(1, 501))
