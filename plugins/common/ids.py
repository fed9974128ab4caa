"""Ids that occur more than once: as hashes of eight bytes, so that millions of them fit into memory."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import pyarrow as pa

MOST = 10_000_000  # ids that are remembered: 80 MB
RECENT = 50_000  # that are kept in a set, where they are found soonest


class SeenIds:
    """The ids that were seen so far.

    The hashes of all but the most recent ones are kept in sorted arrays. Arrays of similar length are merged, so each
    hash is sorted few times. Arrow sorts without the GIL: Python's `sorted` would block the event loop for a second.
    Several threads may add ids.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._arrays: list[pa.UInt64Array] = []
        self._lock = threading.Lock()

    def add(self, ids: Sequence[str]) -> int:
        """Add ids. Returns how many of them occur a second time, among themselves or among those added before."""
        own = {xxhash.xxh3_64_intdigest(id_.encode(errors="surrogatepass")) for id_ in ids}
        with self._lock:
            views = list(map(view_of, self._arrays))
            new = {item for item in own - self._recent if not any(has(view, item) for view in views)}
            if len(self._recent) + sum(map(len, self._arrays)) < MOST:
                self._recent |= new
            if len(self._recent) >= RECENT:
                self._sort_recent()
        return len(ids) - len(new)

    def _sort_recent(self) -> None:
        import pyarrow as pa

        self._arrays.append(in_order(pa.array(self._recent, pa.uint64())))
        self._recent = set()
        while len(self._arrays) > 1 and 2 * len(self._arrays[-1]) >= len(self._arrays[-2]):
            self._arrays.append(in_order(pa.concat_arrays([self._arrays.pop(), self._arrays.pop()])))


def in_order(items: pa.UInt64Array) -> pa.UInt64Array:
    """An array, sorted."""
    import pyarrow.compute as pc

    return items.take(pc.sort_indices(items))


def view_of(items: pa.UInt64Array) -> memoryview:
    """The items of an array that begins where its buffer does."""
    return memoryview(items.buffers()[1]).cast("B").cast("Q")[: len(items)]


def has(items: memoryview, item: int) -> bool:
    """True if sorted items have an item."""
    place = bisect_left(items, item)
    return place < len(items) and items[place] == item
