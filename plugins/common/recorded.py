"""What `card`, `monitor`, `status` and `verify` share: options that select a run, and loading it from its state."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.checks import reading
from sdg_plugins.common.command_line import CORE
from sdg_plugins.common.files import default_state_dir, expanded, output_place, rank_file, split_uri
from sdg_plugins.common.ranks import why_not_begun
from sdg_plugins.common.state import parse_run, remember_source

BATCH = 500  # chunks that are read at a time
MEMORY = "memory"  # scheme of an input that was given to `sdg.run` as values


def add_run_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the options that select a run. Without --output it is the latest one that is found; see `latest_output`."""
    text = "output of the run" if required else "output of the run; default: the latest run below ./output"
    parser.add_argument("--output", required=required, type=expanded, metavar="URI", help=text)
    parser.add_argument("--output-config", default="data", metavar="NAME", help="--output-config of the run [data]")
    parser.add_argument("--state-dir", type=expanded, metavar="D", help="--state-dir of the run, if it had one")


def latest_output(state_dir: str | None) -> str:
    """The output of the latest run that has its default place, or of the one in a state folder.

    Raises:
        StateError: there is none.
    """
    if state_dir:
        first = next(iter([Path(state_dir), *(Path(state_dir) / name for name in configs_in(Path(state_dir)))]))
        return str(load_record(first)["options"]["output"])
    found: dict[str, float] = {}
    for path in states_here():
        output = path.parts[1] if path.parts[0] == "output" else ""
        name = f"output/{output}" if output else str(parse_run(path, path.read_bytes())["options"]["output"])
        last = max(file.stat().st_mtime for file in [path, *path.parent.glob("*.stats.json")])
        found[name] = max(last, found.get(name, 0.0))
    if not found:
        raise sdg.StateError("there is no run below ./output or ./.sdg: name its output with --output")
    latest = max(found, key=found.__getitem__)
    which = f"the latest of {len(found)} runs here" if len(found) > 1 else "the only run here"
    sdg.say(f"this is {latest}, {which}; --output selects another one")
    return latest


def states_here() -> Iterator[Path]:
    """The `run.json` of each run whose output and state have their default places below the working directory."""
    for pattern in ("output/*/.sdg/run.json", "output/*/.sdg/*/run.json", ".sdg/*/run.json", ".sdg/*/*/run.json"):
        yield from Path().glob(pattern)


def load_run(args: argparse.Namespace) -> sdg.Run:
    """Load the run that the options of `add_run_options` select, with its model, fingerprint and source.

    Raises:
        StateError: no such run exists, or its state is broken.
    """
    state = state_folder(args)
    record = load_record(state)
    # What an older sdg has not recorded had its default.
    options = argparse.Namespace(**{**{option.dest: option.default for option in CORE}, **record["options"]})
    options.output, options.state_dir = args.output, str(state)
    try:
        plugins, _ = sdg.Plugins.load(options.plugin or [])
    except (sdg.PluginError, sdg.UsageError) as exc:  # the plugin may exist only on the machines of the ranks
        sdg.say(f"{exc}; continuing without this plugin")
        plugins, _ = sdg.Plugins.load([])
    run = sdg.Run(options, plugins, output_place(options, state), state, lambda reason: None)
    remember_source(run)
    run.model, run.fingerprint = record["identity"]["model"], record["fingerprint"]
    return run


def state_folder(args: argparse.Namespace) -> Path:
    """The folder of the run's state: a sub-folder of --state-dir if the process of the run had several configs.

    Sets `args.output` if it was not given.
    """
    args.output = args.output or latest_output(args.state_dir)
    if not args.state_dir:
        return Path(default_state_dir(args.output, args.output_config))
    below = Path(args.state_dir) / args.output_config
    return below if (below / "run.json").exists() else Path(args.state_dir)


def load_record(state: Path) -> dict[str, Any]:
    """The content of a state's `run.json`. Raises StateError."""
    path = state / "run.json"
    if not path.exists() and (configs := configs_in(state)):
        message = f"{state} has no run of its own, but runs of the configs {', '.join(configs)}"
        raise sdg.StateError(f"{message}: choose one with --output-config")
    if not path.exists() and (why := why_not_begun(state)):
        raise sdg.StateError(f"the run in {state} has no rows yet: {why}")
    if not path.exists():
        raise sdg.StateError(f"{state} has no run.json: is --output correct, and --state-dir if the run had one?")
    return parse_run(path, path.read_bytes())


def run_id(state: Path) -> str:
    """The ID that a run gets when it is started, or started over. Raises StateError."""
    return str(load_record(state)["run"])


def configs_in(state: Path) -> list[str]:
    """The configs whose states are sub-folders of a state folder."""
    return sorted(path.parent.name for path in state.glob("*/run.json"))


def reader_of(run: sdg.Run) -> sdg.Reader:
    """Open the input of a run. Raises InputError, or StateError if the input was in the memory of another process."""
    if run.options.input and split_uri(run.options.input)[0] == MEMORY and MEMORY not in run.plugins.readers:
        raise sdg.StateError("the input of this run was given in Python, in memory: it cannot be read again")
    entry = run.plugins.find("readers", run.options.reader)
    with reading(run.options.input, entry.factory):
        reader: sdg.Reader = entry.factory(run)
    return reader


def chunks_of(run: sdg.Run, which: str = "TRUE") -> Iterator[sdg.Chunk]:
    """The chunks that all ranks of a run have recorded, in order, and read by and by. Raises StateError.

    Args:
        run: whose.
        which: a condition in SQL.
    """
    paths = [rank_file(run.state, rank, "sqlite3") for rank in range(run.options.world_size)]
    ranks = [_chunks_from(path, which) for path in paths if path.exists()]
    return heapq.merge(*ranks, key=lambda chunk: chunk.index)


def _chunks_from(path: Path, which: str) -> Iterator[sdg.Chunk]:
    """A rank's chunks. The database is closed in between: its process may need it for itself."""
    limit = BATCH if os.access(path.parent, os.W_OK) else -1  # otherwise it is copied each time; see `readable`
    sql, last, found = f"WHERE ({which}) AND chunk > ? ORDER BY chunk LIMIT {limit}", -1, dict[int, sdg.Chunk]()
    while last < 0 or len(found) == limit:
        found = chunks_in(path, sql, last)
        yield from found.values()
        last = max(found, default=0)


def chunks_in(path: Path, which: str = "ORDER BY chunk", *values: int) -> dict[int, sdg.Chunk]:
    """The chunks that a rank has recorded in its database, by index. Raises StateError.

    Args:
        path: of the database.
        which: SQL that selects some of them.
        values: for the question marks in it.
    """
    with state_of(path) as state:
        return {row[0]: sdg.chunk_of(row) for row in state.execute(f"SELECT * FROM chunks {which}", values)}


@contextlib.contextmanager
def state_of(path: Path) -> Iterator[sqlite3.Connection]:
    """The database of a rank, for reading. Raises StateError."""
    try:
        with readable(path) as uri, contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as state:
            yield state
    except sqlite3.Error as exc:
        raise sdg.StateError(f"state {path} cannot be read: {exc}") from exc


@contextlib.contextmanager
def readable(path: Path) -> Iterator[str]:
    """The URI of a database, or of a copy if its folder is read-only: SQLite has to write beside it."""
    if os.access(path.parent, os.W_OK):
        writable = os.access(path, os.W_OK)  # the last one that closes it deletes its journal
        yield f"{path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
        return
    with tempfile.TemporaryDirectory(prefix="sdg-state-") as folder:
        for suffix in ("", "-wal", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}{suffix}", f"{folder}/{path.name}{suffix}")
        yield (Path(folder) / path.name).as_uri()
