"""How often to commit to the Hub, and how many files at a time."""

from __future__ import annotations

import math
import time
from collections import deque

HOUR = 3600.0  # s
COMMITS = 100  # per hour: the Hub accepts about 128 per account (as users report), and others may need some of them
FILES = 100  # per commit, as the Hub recommends…
MOST_FILES = 1000  # … unless that takes more commits than are left of this hour


class CommitQuota:
    """Paces commits so that the Hub's limits hold, and adapts their size to what it copes with.

    Attributes:
        files: files in the next commit, at most; fewer after failures.
    """

    def __init__(self) -> None:
        self.files = FILES
        self._times: deque[float] = deque()  # of the commits of the last hour

    def pause(self) -> float:
        """Seconds until the next commit is allowed."""
        return max(0.0, self._times[0] + HOUR - time.monotonic()) if len(self._times) >= COMMITS else 0.0

    def files_for(self, waiting: int) -> int:
        """How many of the files that wait to put into the next commit."""
        now = time.monotonic()
        while self._times and now - self._times[0] > HOUR:
            self._times.popleft()
        if self.files < FILES:
            return self.files
        return min(MOST_FILES, max(FILES, math.ceil(waiting / max(1, COMMITS - len(self._times)))))

    def record_commit(self) -> None:
        """Count a commit when it is over: the Hub counts the hour from when the request arrived there."""
        self._times.append(time.monotonic())

    def grow(self) -> None:
        """Allow larger commits again after a success."""
        self.files = min(FILES, 2 * self.files)

    def shrink(self, files: int) -> None:
        """Make the next commit smaller than one of some files, which failed."""
        self.files = max(1, min(self.files, files) // 2)
