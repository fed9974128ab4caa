"""The command `verify`: checks that each document of the input is a row, filtered or failed, and nothing is left over.

It reads input, state and output again, and compares published files with those on the Hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
from collections.abc import Iterator

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.checks import reading
from sdg_plugins.common.chunks import OpenChunk, id_column_of, read_failed
from sdg_plugins.common.files import format_of
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import Parser
from sdg_plugins.common.rows import shape_of
from sdg_plugins.common.state import output_files
from sdg_plugins.publishing.publisher import Publisher
from sdg_plugins.publishing.spool import uses_spool


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("verify", verify)


def verify(argv: list[str]) -> int:
    """Reconcile input, state and output; report each discrepancy, and exit with 1 if there are any."""
    parser = Parser(prog="sdg.py verify", description=verify.__doc__)
    recorded.add_run_options(parser)
    run = recorded.load_run(parser.parse_args(argv))
    found, counts = 0, {"rows": 0, "filtered": 0, "failed": 0}
    for discrepancy in discrepancies(run, counts):
        found += 1
        print(discrepancy, file=sys.stderr)
    figures = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    result = f"{found:,} discrepanc{'y' if found == 1 else 'ies'}" if found else "all accounted for"
    print(f"{counted(sum(counts.values()), 'document')}: {figures}; {result}")
    return 1 if found else 0


def discrepancies(run: sdg.Run, counts: dict[str, int]) -> Iterator[str]:
    """All discrepancies, a line each; adds the documents that are accounted for to `counts`."""
    options = run.options
    with reading(options.input):
        reader = run.plugins.readers[options.reader].factory(run)
    writer = run.plugins.writers[format_of(options.output_filename)].factory(run)
    known = {}
    for rank in range(options.world_size):
        path = run.state / f"{rank:05d}.sqlite3"
        if path.exists():
            known.update(asyncio.run(read_chunks(path.absolute().as_uri())))
        else:
            yield f"rank {rank} has not run: {path} is missing"
    expected = set()
    for opened in all_chunks(run, reader):
        chunk = known.pop(opened.chunk.index, None)
        rows = f"rows {opened.chunk.start:,} to {opened.chunk.start + opened.chunk.count - 1:,} of the input"
        if chunk is None or not chunk.written:
            yield f"chunk {opened.chunk.index} ({rows}) is not finished: run the same command again"
        elif chunk.count != opened.chunk.count:
            yield f"chunk {chunk.index} ({rows}) was written with {counted(chunk.count, 'document')}"
        else:
            expected |= {run.path_of(chunk), *([run.failed_path_of(chunk)] if chunk.failed else [])}
            yield from discrepancies_of_chunk(run, chunk, opened.ids(id_column_of(options, reader.schema)), writer)
            counts["rows"] += chunk.rows
            counts["filtered"] += len(chunk.filtered)
            counts["failed"] += len(chunk.failed)
    for index in known:
        yield f"chunk {index} is recorded, but the input no longer has its rows"
    for file in output_files(run):
        if file not in expected:
            yield f"{run.output.path(file)} does not belong to a finished chunk"
    if uses_spool(run):
        with contextlib.closing(Publisher(run)) as publisher:
            yield from publisher.discrepancies()


def all_chunks(run: sdg.Run, reader: sdg.Reader) -> Iterator[OpenChunk]:
    """The chunks of the input, those of all ranks."""
    size, most = run.options.records_per_chunk, run.options.max_documents or sys.maxsize
    for index in range(sys.maxsize):
        count = min(size, most - index * size)
        if count <= 0:
            return
        with reading(run.options.input):
            parts = reader.read(count)
        if parts:
            yield OpenChunk(sdg.Chunk(index, index * size), parts, reader.schema)
        if sum(1 if isinstance(part, sdg.BadRow) else part.batch.num_rows for part in parts) < count:
            return


async def read_chunks(uri: str) -> dict[int, sdg.Chunk]:
    """The chunks that a rank has recorded in its database, which `uri` names."""
    import aiosqlite

    try:
        async with aiosqlite.connect(f"{uri}?mode=ro", uri=True) as db:
            return await sdg.recorded_chunks(db)
    except sqlite3.Error as exc:
        raise sdg.StateError(f"state {uri} cannot be read: {exc}") from exc


def discrepancies_of_chunk(run: sdg.Run, chunk: sdg.Chunk, ids: list[str], writer: sdg.Writer) -> Iterator[str]:
    """The discrepancies in the files of one finished chunk; `ids` are those of its documents, in order."""
    path = run.output.path(run.path_of(chunk))
    gone = {*chunk.filtered, *chunk.failed}
    expected = [ids[position] for position in range(chunk.count) if position not in gone]
    try:
        table = writer.read(chunk)
        failed = [record["id"] for record in read_failed(run, chunk)]
    except (OSError, ValueError, KeyError) as exc:
        yield f"{path} or its failed records cannot be read: {exc}"
        return
    if table is None:
        yield f"{path} is gone: it had {counted(chunk.rows, 'row')}"
    elif len(firsts := shape_of(run.options).firsts(table)) != chunk.rows:
        yield f"{path} has {counted(len(firsts), 'row')}, expected {chunk.rows:,}"
    elif chunk.rows:
        column = run.options.id_column if run.options.id_column in table.column_names else "id"
        values = table.column(column).to_pylist()
        found = [values[position] for position in firsts]
        for row, (id_, expected_id) in enumerate(zip(found, expected, strict=True)):
            if id_ is not None and str(id_) != expected_id:
                yield f"{path} row {row} is document {id_!r}, expected {expected_id!r}"
                return
    if failed != [ids[position] for position in chunk.failed]:
        documents = counted(len(chunk.failed), "failed document")
        yield f"{run.output.path(run.failed_path_of(chunk))} does not list its {documents}"
