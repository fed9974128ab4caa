"""JSON lines on standard input: `--input -`. They are kept in the state, to resume and verify the run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.streams import BLOCK

NAME = "stdin.jsonl"  # in the state


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("stdin", open_stdin)


def open_stdin(run: sdg.Run) -> Any:
    """Read JSON lines from standard input, which are kept in the state."""
    if run.options.world_size > 1 and (run.options.processes is None or run.options.any_rank) and not run.options.part:
        raise sdg.UsageError("--input -: several ranks cannot share standard input: write it to a file")
    path = run.state / NAME
    if not sys.stdin.isatty() and not run.options.part:
        keep(path, claimed=(run.state / "run.json").exists())
    if not path.exists():
        raise sdg.InputError("--input -: standard input is empty")
    run.options.input, run.options.reader = str(path.absolute()), "jsonl"
    return run.plugins.readers["jsonl"].factory(run)


def keep(path: Path, claimed: bool) -> None:
    """Copy standard input to a file. Nothing on standard input leaves what an earlier process of the run has copied.

    Args:
        path: of the file.
        claimed: there is a run which was made of the earlier content: only more may follow it.
    """
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
    if new.stat().st_size == 0 or not (claimed and path.exists()):
        if new.stat().st_size:
            os.replace(new, path)
        new.unlink(missing_ok=True)
        return
    with path.open("rb") as old, new.open("rb") as more:
        while block := old.read(BLOCK):
            if more.read(len(block)) != block:
                new.unlink()
                raise sdg.StateError(
                    f"standard input is not what this run was begun with, which is in {path}: "
                    "choose another --output, or start over with --fresh"
                )
    os.replace(new, path)
