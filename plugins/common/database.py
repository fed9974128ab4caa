"""How the database of a rank's state is kept on disk."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from sdg_plugins.common import files

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


def shrink(path: Path) -> None:
    """Give the space of a database back that is no longer used. One that another process reads stays as it is."""
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path, timeout=1)) as db:
        ((free,),) = db.execute("PRAGMA freelist_count")
        ((size,),) = db.execute("PRAGMA page_size")
        if free * size > SPARE:
            db.execute("VACUUM")
