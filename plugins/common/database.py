"""The database of a rank's state: how it is kept on disk, and written to."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common import files

if TYPE_CHECKING:
    import aiosqlite

SPARE = 16 << 20  # bytes that are free in a database of a finished rank, before it is made smaller


def pragmas_for(path: Path) -> list[str]:
    """The settings of a connection that writes (https://sqlite.org/pragma.html).

    Responses are deleted as soon as their chunk is written. Where checkpoints are rare, most of them never get from the
    write-ahead log into the file, and they need not be overwritten with zeros there, which some systems do by default:
    for each byte of a response 1.7 bytes are written instead of 4.6.
    """
    local = files.file_system_of(path) in files.LOCAL_FILE_SYSTEMS
    mode = "WAL" if local else "TRUNCATE"  # WAL needs shared memory
    return [
        *(f"journal_mode={mode}", "synchronous=FULL", "cache_size=-8192"),
        *("secure_delete=OFF", "wal_autocheckpoint=16000"),
    ]


def create(path: Path, folder: Path) -> None:
    """Make the database of a rank with its tables, unless it exists: other processes see it whole, or not at all.

    Args:
        path: of the database.
        folder: where it is made; see `state.private_folder`.

    Raises:
        OSError, sqlite3.Error: it cannot be made.
    """
    if path.exists():
        return
    made = folder / f".{path.name}.new"
    for suffix in ("", "-journal"):
        Path(f"{made}{suffix}").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(made)) as db:
        db.executescript(f"BEGIN; {sdg.TABLES} PRAGMA user_version={sdg.STATE_VERSION}; COMMIT;")
    files.sync(made)
    os.rename(made, path)
    files.sync(path.parent)


def transact(
    db: aiosqlite.Connection,
    rows: Mapping[str, list[tuple[Any, ...]]],
    statements: Sequence[tuple[str, Sequence[Any]]] = (),
) -> Coroutine[Any, Any, None]:
    """Insert rows, then execute statements, and commit them: all or nothing.

    It is one message to the connection's thread and one back: each waits for its turn in a loop that may be busy for
    100 ms, in which hundreds of responses come.

    Args:
        db: an open connection that has no transaction.
        rows: by table, with all columns; those with the same primary key are replaced.
        statements: with their parameters.

    Raises:
        sqlite3.Error: nothing was changed.
    """

    def work() -> None:
        try:
            for table, some in rows.items():
                insert(db._conn, table, some)
            for statement, parameters in statements:
                db._conn.execute(statement, parameters)
            commit(db._conn)
        except BaseException:
            db._conn.rollback()
            raise

    run: Callable[[Callable[[], None]], Coroutine[Any, Any, None]] = db._execute  # all of aiosqlite goes through it
    return run(work)


def insert(db: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    """Insert with one statement for many rows: `executemany` reacquires the GIL for each row, up to 5 ms each."""
    size = sum(len(row[-1]) for row in rows if isinstance(row[-1], bytes))  # sqlite3 copies what it binds
    step = max(1, min(1000, sdg.PIECE_BYTES * len(rows) // max(1, size)))
    for i in range(0, len(rows), step):
        some = rows[i : i + step]
        marks = ",".join([f"({','.join('?' * len(some[0]))})"] * len(some))
        db.execute(f"INSERT OR REPLACE INTO {table} VALUES {marks}", [value for row in some for value in row])


def commit(db: sqlite3.Connection) -> None:
    """Commit. Here tests make it fail."""
    db.commit()


def shrink(path: Path) -> None:
    """Give the space of a database back that is no longer used. One that another process reads stays as it is."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path, timeout=1)) as db:
        ((free,),) = db.execute("PRAGMA freelist_count")
        ((size,),) = db.execute("PRAGMA page_size")
        if free * size > SPARE:
            db.execute("VACUUM")
