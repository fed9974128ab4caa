"""What a publisher remembers of the files on the Hub, in `published.sqlite3` of the state."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sdg


class Known(NamedTuple):
    """What is remembered of a file on the Hub."""

    run: str  # ID of the run that wrote it; `before ID` for a file that run ID, started with --fresh, will delete
    signature: str = ""
    hash: str = ""  # SHA-256
    parts: tuple[str, ...] = ()
    git_hash: str = ""  # of a file that is not stored as a large one; "" if unknown


BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def problem_with(exc: sqlite3.Error) -> str:
    """What an error says about a ledger, with the way out."""
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None or code & 0xFF in BROKEN:  # the lowest byte of an extended code is the code itself
        return f" is broken ({exc}): delete it; it is rebuilt from the files on the Hub"
    if code & 0xFF in BUSY:
        return f" has been locked by another process for a minute ({exc}): wait for it, or stop it, then run again"
    return f": {sdg.reason_of(exc)}"


class Ledger:
    """Published files, and the hashes of all files ever sent: a large file with another hash was not sent from here.

    Args:
        path: the SQLite database.

    Attributes:
        files: what is remembered, by path in the repository.
        sent: SHA-256 hashes.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            if not self._has_git_hashes():
                with self.transaction():  # ranks that begin at the same time share the file
                    self._create()
            rows = self._db.execute("SELECT path, run, signature, hash, parts, git_hash FROM files").fetchall()
            self.files = {
                path: Known(run, signature, hash_, tuple(json.loads(parts)), git_hash)
                for path, run, signature, hash_, parts, git_hash in rows
            }
            self.sent = {hash_ for (hash_,) in self._db.execute("SELECT hash FROM sent")}
        except sqlite3.Error as exc:
            raise sdg.StateError(f"{path}{problem_with(exc)}") from exc

    def _has_git_hashes(self) -> bool:
        """True if the tables are there, in their newest form."""
        return "git_hash" in {row[1] for row in self._db.execute("PRAGMA table_info(files)")}

    def _create(self) -> None:
        for table in (
            "files (path TEXT PRIMARY KEY, run TEXT, signature TEXT, hash TEXT, parts TEXT, git_hash TEXT DEFAULT '')",
            "sent (hash TEXT PRIMARY KEY)",
            "settings (name TEXT PRIMARY KEY, value TEXT)",
        ):
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        if not self._has_git_hashes():  # of an earlier sdg
            self._db.execute("ALTER TABLE files ADD COLUMN git_hash TEXT DEFAULT ''")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit the changes of the body at once: one by one, each would wait for the disk."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            self._db.execute("COMMIT")  # after an exception, too: each change is right by itself

    def remember(self, path: str, known: Known) -> None:
        """Remember a file."""
        if self.files.get(path) != known:
            self.files[path] = known
            row = (path, *known[:3], json.dumps(known.parts), known.git_hash)
            self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)

    def remember_sent(self, hashes: list[str]) -> None:
        """Remember the hashes of files that are about to be sent."""
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO sent VALUES (?)", [(hash_,) for hash_ in hashes])
        self.sent.update(hashes)

    def forget(self, path: str) -> None:
        """Forget a file that was deleted."""
        if self.files.pop(path, None):
            self._db.execute("DELETE FROM files WHERE path = ?", (path,))

    def setting(self, name: str, value: Any) -> Any:
        """The value of a setting; it is `value` if it was not set before."""
        self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, json.dumps(value)))
        return json.loads(self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0])

    def close(self) -> None:
        """Close the database."""
        self._db.close()
