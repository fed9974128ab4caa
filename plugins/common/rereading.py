"""Whether the input still holds the rows that chunks were made of.

The digest of each chunk's rows is kept in the state. Rows that could not be read are not part of it, so they may be
fixed; files behind the last chunk may be fixed, added and removed.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import sdg
from sdg_plugins.common.checks import reading
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.digests import same_rows

MANY = 100  # chunks that take long enough to be worth a word


def changed_rows(run: sdg.Run, reader: sdg.Reader) -> str | None:
    """Read all rows again that chunks of any rank were made of. Returns which have changed; None if none has.

    If none has, the state is made ready for other files: bookmarks, which name places in files, are dropped.
    """
    paths = sorted(run.state.glob("[0-9]*.sqlite3"))
    chunks = sorted((chunk for path in paths for chunk in _begun(path)), key=lambda chunk: chunk.index)
    if len(chunks) > MANY:
        sdg.say(f"the input's files have changed: reading what {len(chunks):,} chunks were made of again, to compare")
    for chunk in chunks:
        where = f"rows {chunk.start:,} to {chunk.start + chunk.count - 1:,} of the input"
        with reading(run.options.input, reader):
            reader.seek(chunk.start, None)
            parts = reader.read(chunk.count)
        opened = OpenChunk(sdg.Chunk(chunk.index, chunk.start), parts, reader.schema)
        if chunk.digest is None or not same_rows(opened, chunk):
            files = ", ".join(opened.files) or "which are gone"
            return f"{where} ({files}) are not those that chunk {chunk.index} was made of"
    for path in paths:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as db, db:
            db.execute(f"DELETE FROM chunks WHERE NOT written AND NOT ({BEGUN})")
            db.execute("UPDATE chunks SET bookmark = NULL")
    with reading(run.options.input, reader):
        reader.seek(0, None)
    return None


# Of an open chunk something was paid for.
BEGUN = """EXISTS (SELECT 1 FROM documents WHERE id >= chunk << 32 AND id < (chunk + 1) << 32)
    OR EXISTS (SELECT 1 FROM requests WHERE document >= chunk << 32 AND document < (chunk + 1) << 32)"""


def _begun(path: Path) -> list[sdg.Chunk]:
    """The chunks of a rank that are written, or of which something was paid for."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
        return [sdg.chunk_of(row) for row in db.execute(f"SELECT * FROM chunks WHERE written OR {BEGUN}")]
