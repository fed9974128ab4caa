"""The files of a run: their names in its output, which of those there it can have written, and whether it has any."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.files import access_errors, rank_file
from sdg_plugins.common.kinds import parse_json
from sdg_plugins.common.streams import BROKEN, Stream

if TYPE_CHECKING:
    import pyarrow as pa

MARKS = {"reasoning", "finish_reason", "usage", "truncated", "extra"}  # fields of every result


def output_files(run: sdg.Run) -> list[str]:
    """All files in the folder of the run's chunks, except hidden ones."""
    files = run.output.list(os.path.dirname(run.path_of(sdg.Chunk(0, 0))))
    return [file for file in files if not os.path.basename(file).startswith(".")]


def has_output(run: sdg.Run) -> bool:
    """True if there are such files. In a local folder of a million the first one is enough."""
    if not run.output.local:
        return bool(output_files(run))
    folder, gone = run.output.path(run.options.output_config), contextlib.suppress(FileNotFoundError)
    with access_errors(run.output.uri, sdg.OutputError), gone, os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") and entry.is_file() for entry in entries)
    return False


def read_rows(run: sdg.Run, writer: sdg.Writer, chunk: sdg.Chunk) -> pa.Table | None:
    """The rows of a chunk from its file; None if that is gone. Raises OutputError if it cannot be read."""
    try:
        return writer.read(chunk)
    except (OSError, ValueError) as exc:  # those of Arrow are among them
        raise sdg.OutputError(f"{run.output.path(run.path_of(chunk))} cannot be read: {sdg.one_line(exc)}") from exc


def chunk_names(run: sdg.Run, indices: Iterable[int]) -> list[str]:
    """The names of a rank's chunks, as `Run.path_of` has them, in a quarter of the time."""
    options, mark = run.options, "\0"
    name = string.Template(options.output_filename).substitute(rank=f"{options.rank:05d}", chunk_index=mark)
    parts = f"{options.output_config}/{name}".split(mark)
    return [f"{index:05d}".join(parts) for index in indices]


def untouched(run: sdg.Run) -> bool:
    """True if the state holds nothing that was paid for, and no other rank has begun, unless it was this run's, too."""
    mine = {rank_file(run.state, run.options.rank, "sqlite3").stem}
    ranks = {path.stem for pattern in ("*.lock", "*.sqlite3") for path in run.state.glob(f"[0-9]{pattern}")}
    if (ranks != mine and not run.options.processes) or has_output(run):
        return False
    for path in run.state.glob("[0-9]*.sqlite3"):
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
            tables = ("documents", "requests", "chunks WHERE written")
            if any(db.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0] for table in tables):
                return False
    return True


def chunk_of(file: str, config: str, template: str) -> int | None:
    """The index of the chunk that a file of the output, or of its `failed`, belongs to; None for any other file.

    Args:
        file: its path, relative to the output.
        config: --output-config of the run.
        template: its --output-filename.
    """
    data, failed = file_patterns(config, template)
    found = data.fullmatch(file) or failed.fullmatch(file)
    return int(found[1]) if found else None


@functools.cache
def file_patterns(config: str, template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of the files with a run's rows and its failed documents; the group is the index of the chunk."""
    data = re.escape(f"{config}/{template}").replace(re.escape("${rank}"), r"\d{5,}")
    data = data.replace(re.escape("${chunk_index}"), r"(\d{5,})")
    return re.compile(data), re.compile(rf"{re.escape(failed_folder(config))}/\d{{5,}}_(\d{{5,}})\.jsonl")


def failed_folder(config: str) -> str:
    """The folder of a config's failed documents, relative to the output."""
    return os.path.dirname(sdg.failed_path(config, 0, 0))


def chunk_files(run: sdg.Run, config: str, template: str) -> list[str]:
    """Files in the output, and in its `failed`, that a run with these options can have written."""
    found = [file for folder in (config, failed_folder(config)) for file in run.output.list(folder)]
    return [file for file in found if chunk_of(file, config, template) is not None]


def refuse_others(run: sdg.Run, ours: set[str]) -> None:
    """Raise OutputError if there are files beside those of a run: `load_dataset` would take them for rows."""
    if others := [file for file in output_files(run) if file not in ours]:
        raise sdg.OutputError(
            f"{run.output.path(others[0])} was not written by a run: move it away, or choose another --output or "
            "--output-config"
        )


def written_by_run(file: Any, format: str) -> bool:
    """True if a run has written a file: by the metadata of parquet, or by the first result in JSON lines.

    Args:
        file: open, at its start.
        format: parquet or jsonl; files of others are not written.
    """
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return b"sdg.fingerprint" in (pq.read_metadata(file).metadata or {})
        except pa.ArrowException:  # reported when it is read
            return False
    if format != "jsonl":
        return False
    try:
        row = parse_json(Stream(file).head.partition(b"\n")[0])
    except (*BROKEN, ValueError):
        return False
    if not isinstance(row, dict):
        return False
    results = (value[0] for value in row.values() if isinstance(value, list) and value)
    return any(isinstance(item, dict) and item.keys() >= MARKS for item in (row, *results))


def read_failed(run: sdg.Run, chunk: sdg.Chunk) -> list[dict[str, Any]]:
    """The records of a chunk's failed documents, in order."""
    try:
        with run.output.open(run.failed_path_of(chunk)) as file:
            return [parse_json(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        return []
