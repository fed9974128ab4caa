"""What the publisher of a run is doing, in `publishing.json` of the state: for `status` and the progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

from sdg_plugins.common.markdown import counted, short_line
from sdg_plugins.common.outputs import failed_folder

NAME = "publishing.json"
SILENT = 120.0  # s beyond its interval without a sign of life, after which a publisher counts as gone


def record(state: Path, *, problem: str = "", until: float = 0.0, interval: float = 0.0) -> None:
    """Record that the publisher of a run is at work.

    Args:
        state: of the run.
        problem: why it waits, "" if it does not.
        until: when it goes on, in s since the epoch; 0 if it does not wait.
        interval: s until the next record, at most, if it does not wait.
    """
    content = {"updated": time.time(), "problem": problem, "until": until, "interval": interval, "pid": os.getpid()}
    temporary = state / f".{NAME}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a full disk is reported by what else is written
        temporary.write_text(json.dumps(content))
        os.replace(temporary, state / NAME)


class Publishing(NamedTuple):
    """How far the publication of a run is."""

    written: int  # files of chunks
    published: int
    seen: float | None  # time of the publisher's last sign of life, in s since the epoch
    problem: str
    until: float
    interval: float

    @property
    def waiting(self) -> int:
        """Files that are not published yet."""
        return self.written - self.published

    @property
    def gone(self) -> bool:
        """True if there was a publisher, and there is none now."""
        due = max((self.seen or 0.0) + self.interval, self.until)
        return self.seen is not None and time.time() > due + SILENT

    def needs_attention(self, finished: bool) -> bool:
        """True if files wait that no process will publish; `finished`: the run is."""
        return self.waiting > 0 and (self.gone or (finished and self.seen is None))

    def line(self) -> str:
        """In one line."""
        if not self.waiting:
            return f"{counted(self.written, 'file')}: all published"
        text = f"{self.published:,} of {counted(self.written, 'file')} published"
        if self.seen is None:
            return f"{text}; no publisher has begun: `sdg.py monitor` publishes them"
        if self.gone:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.seen))
            return f"{text}; the publisher is gone since {when}: `sdg.py monitor` publishes the rest"
        if self.problem:
            return f"{text}; {self.waits()}"
        when = time.strftime("%H:%M", time.localtime(self.seen + self.interval))
        return f"{text}, next commit at {when}" if self.interval else text

    def waits(self) -> str:
        """Why it waits, and until when; "" if it does not."""
        until = f"until {time.strftime('%H:%M:%S', time.localtime(self.until))}, " if self.until > time.time() else ""
        return f"publishing waits {until}{short_line(self.problem)}" if self.problem else ""


def publishing_of(state: Path, options: dict[str, Any]) -> Publishing | None:
    """How far the publication of a run is; None if it does not publish.

    Args:
        state: of the run.
        options: as recorded.
    """
    if options.get("writer") != "hf":
        return None
    config, spool = options["output_config"], state / "spool"
    here = {
        f"{folder}/{path.name}"
        for folder in (config, failed_folder(config))
        for path in (spool / folder).glob("[!.]*.*")
        if path.is_file()
    }
    published = _published_parts(state)
    seen = last_record(state)
    return Publishing(
        len(here | published),
        len(published),
        seen.get("updated"),
        str(seen.get("problem", "")),
        float(seen.get("until", 0.0)),
        float(seen.get("interval", 0.0)),
    )


def last_record(state: Path) -> dict[str, Any]:
    """What the publisher has recorded last; {} if nothing."""
    try:
        found: dict[str, Any] = json.loads((state / NAME).read_text())
        return found
    except (OSError, ValueError):
        return {}


def waits(state: Path) -> str:
    """Why the publisher of a run waits; "" if it does not."""
    seen = last_record(state)
    until = float(seen.get("until", 0.0))
    return Publishing(0, 0, seen.get("updated"), seen["problem"], until, 0.0).waits() if seen.get("problem") else ""


def _published_parts(state: Path) -> set[str]:
    """The files of the spool that are published, according to the ledger."""
    path = state / "published.sqlite3"
    if not path.exists():
        return set()
    with contextlib.suppress(sqlite3.Error, ValueError, OSError):
        run = json.loads((state / "run.json").read_text())["run"]
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as ledger:
            rows = ledger.execute("SELECT parts FROM files WHERE run = ?", (run,)).fetchall()
        return {part for (parts,) in rows for part in json.loads(parts)}
    return set()
