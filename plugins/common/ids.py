"""Ids that occur more than once: as hashes of eight bytes, so that millions of them fit into memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import numpy as np

MOST = 10_000_000  # ids that are remembered: 80 MB


class SeenIds:
    """The ids that were seen so far.

    Their hashes are kept in sorted arrays. Arrays of similar length are merged, so each hash is sorted few times.
    Several threads may add ids.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._lock = threading.Lock()

    def add(self, ids: Sequence[str]) -> int:
        """Add ids. Returns how many of them occur a second time, among themselves or among those added before."""
        import numpy as np

        hashes = [xxhash.xxh3_64_intdigest(id_.encode(errors="surrogatepass")) for id_ in ids]
        own = np.unique(np.array(hashes, np.uint64))
        with self._lock:
            return len(ids) - len(own) + self._merge(own)

    def _merge(self, own: np.ndarray[Any, Any]) -> int:
        """Add sorted hashes. Returns how many of them were there before."""
        import numpy as np

        repeated = 0
        for array in self._arrays:
            places = np.minimum(np.searchsorted(array, own), len(array) - 1)
            repeated += int((array[places] == own).sum())
        if len(own) and sum(map(len, self._arrays)) < MOST:
            self._arrays.append(own)
        while len(self._arrays) > 1 and 2 * len(self._arrays[-1]) >= len(self._arrays[-2]):
            self._arrays.append(np.union1d(self._arrays.pop(), self._arrays.pop()))
        return repeated
