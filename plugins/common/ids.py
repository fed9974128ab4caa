"""Ids that occur more than once: as hashes of eight bytes, so that millions of them fit into memory."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence

import xxhash

MOST = 10_000_000  # ids that are remembered: 80 MB


class SeenIds:
    """The ids that were seen so far.

    Their hashes are kept in sorted arrays. Arrays of similar length are merged, so each hash is sorted few times.
    Several threads may add ids.
    """

    def __init__(self) -> None:
        self._arrays: list[array[int]] = []
        self._lock = threading.Lock()

    def add(self, ids: Sequence[str]) -> int:
        """Add ids. Returns how many of them occur a second time, among themselves or among those added before."""
        own = array("Q", sorted({xxhash.xxh3_64_intdigest(id_.encode(errors="surrogatepass")) for id_ in ids}))
        with self._lock:
            known = sum(has(earlier, item) for earlier in self._arrays for item in own)
            if own and sum(map(len, self._arrays)) < MOST:
                self._arrays.append(own)
            while len(self._arrays) > 1 and 2 * len(self._arrays[-1]) >= len(self._arrays[-2]):
                self._arrays.append(array("Q", sorted(self._arrays.pop() + self._arrays.pop())))
        return len(ids) - len(own) + known


def has(items: array[int], item: int) -> bool:
    """True if a sorted array has an item."""
    place = bisect_left(items, item)
    return place < len(items) and items[place] == item
