"""Hashes of local input files, kept in the state: a resume opens only the files that have changed since then."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

MARKS = "marks.json"  # in the state
JUST_NOW = 2e9  # ns: a file that is so young may be written again without another time


class Marks:
    """The hashes of some files, as far as the files are as they were.

    Args:
        files: what changes when a file does, by its path: size in bytes, and times in ns.

    Attributes:
        path: of the file that has the hashes; None if they are not kept.
    """

    def __init__(self, files: Mapping[str, Sequence[int]]) -> None:
        self._files = files
        self.path: Path | None = None

    def read(self) -> dict[str, str]:
        """The hashes that are known, by the paths of their files."""
        if self.path is None:
            return {}
        try:
            kept = orjson.loads(self.path.read_bytes())
            marks = ((path, kept.get(path)) for path in self._files)
            return {path: mark[-1] for path, mark in marks if mark and mark[:-1] == [*self._files[path]]}
        except (OSError, ValueError, TypeError, AttributeError, LookupError):  # a broken file only costs time
            return {}

    def keep(self, hashes: Mapping[str, str]) -> None:
        """Keep hashes, by the paths of their files."""
        before = time.time_ns() - JUST_NOW
        kept = {path: [*marks, hashes[path]] for path, marks in self._files.items() if max(marks[1:]) < before}
        if not kept or self.path is None or not self.path.parent.is_dir():
            return
        temporary = self.path.with_name(f".{uuid.uuid4().hex}.{MARKS}.tmp")
        with contextlib.suppress(OSError):  # a full disk, or one that is read-only
            for left in self.path.parent.glob(f".*.{MARKS}.tmp"):  # by a process that was killed
                if left.stat().st_mtime < time.time() - 60:
                    left.unlink()
            temporary.write_bytes(orjson.dumps(kept))
            os.replace(temporary, self.path)
