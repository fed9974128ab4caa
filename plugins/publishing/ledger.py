from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg

if TYPE_CHECKING:
    pass


class Known(NamedTuple):
    """What is remembered of a file on the Hub."""

    run: str  # that it is of; `before RUN`: it was there, and that run was to delete it
    signature: str = ""
    hash: str = ""
    parts: tuple[str, ...] = ()


class Ledger:
    """What is remembered of published files, and all hashes that were ever sent: what has none of them is not ours."""

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            for table in (
                "files (path TEXT PRIMARY KEY, run TEXT, signature TEXT, hash TEXT, parts TEXT)",
                "sent (hash TEXT PRIMARY KEY)",
                "settings (name TEXT PRIMARY KEY, value TEXT)",
            ):
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            rows = self._db.execute("SELECT path, run, signature, hash, parts FROM files").fetchall()
            self.files = {
                path: Known(run, mark, hash_, tuple(json.loads(parts))) for path, run, mark, hash_, parts in rows
            }
            self.sent = {hash_ for (hash_,) in self._db.execute("SELECT hash FROM sent")}
        except sqlite3.OperationalError:
            raise  # locked, or the disk is full
        except sqlite3.DatabaseError as problem:
            raise sdg.StateError(f"{path} is broken: delete it, and what is on the Hub is looked at anew") from problem

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make what is remembered in the body durable at once: each statement by itself would wait for the disk."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")  # each is true by itself

    def put(self, path: str, known: Known) -> None:
        """Remember a file."""
        if self.files.get(path) != known:
            self.files[path] = known
            row = (path, *known[:3], json.dumps(known.parts))
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)

    def sending(self, hashes: list[str]) -> None:
        """Remember what is about to be sent."""
        with self.together():
            self._db.executemany("INSERT OR IGNORE INTO sent VALUES (?)", [(hash_,) for hash_ in hashes])
        self.sent.update(hashes)

    def forget(self, path: str) -> None:
        """A file is no longer there."""
        if self.files.pop(path, None):
            self._db.execute("DELETE FROM files WHERE path = ?", (path,))

    def setting(self, name: str, value: Any) -> Any:
        """A setting of the run: what was put there first."""
        self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, json.dumps(value)))
        return json.loads(self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()
