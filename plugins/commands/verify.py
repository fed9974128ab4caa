"""The command `verify`: is every document of the input a row, filtered, or failed, and nothing else there?"""

from __future__ import annotations

import argparse
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
from sdg_plugins.common.state import output_files
from sdg_plugins.publishing import card
from sdg_plugins.publishing.publisher import Publisher


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("verify", verify)


def verify(argv: list[str]) -> int:
    """Reconcile input, state and output; exit 1 names what does not match."""
    parser = argparse.ArgumentParser(prog="sdg.py verify", description=verify.__doc__)
    recorded.add_options(parser)
    run = recorded.open_run(parser.parse_args(argv))
    problems, counts = [], {"rows": 0, "filtered": 0, "failed": 0}
    for problem in check(run, counts):
        problems.append(problem)
        print(problem, file=sys.stderr)
    total = sum(counts.values())
    figures = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    print(f"{total:,} documents: {figures}; " + (f"{len(problems)} discrepancies" if problems else "all accounted for"))
    return 1 if problems else 0


def check(run: sdg.Run, counts: dict[str, int]) -> Iterator[str]:
    """Every discrepancy, a line each; `counts` is filled with what is accounted for."""
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
            yield f"chunk {opened.chunk.index} ({rows}) is not finished: run again"
        elif chunk.count != opened.chunk.count:
            yield f"chunk {chunk.index} ({rows}) was made of {chunk.count} documents"
        else:
            expected |= {run.path_of(chunk), *([run.failed_path_of(chunk)] if chunk.failed else [])}
            yield from check_chunk(run, chunk, opened.ids(id_column_of(options, reader.schema)), writer)
            counts["rows"] += chunk.rows
            counts["filtered"] += len(chunk.filtered)
            counts["failed"] += len(chunk.failed)
    for index in known:
        yield f"chunk {index} is recorded, but the input has no such rows any more"
    for file in output_files(run):
        if file not in expected:
            yield f"{run.output.path(file)} belongs to no finished chunk"
    if card.spooled(run):
        with contextlib.closing(Publisher(run)) as publisher:
            yield from publisher.discrepancies()


def all_chunks(run: sdg.Run, reader: sdg.Reader) -> Iterator[OpenChunk]:
    """The chunks that the input is made of, for all ranks."""
    size, most = run.options.records_per_chunk, run.options.max_documents or sys.maxsize
    for index in range(sys.maxsize):
        wanted = min(size, most - index * size)
        if wanted <= 0:
            return
        with reading(run.options.input):
            parts = reader.read(wanted)
        if parts:
            yield OpenChunk(sdg.Chunk(index, index * size), parts, reader.schema)
        if sum(1 if isinstance(part, sdg.BadRow) else part.batch.num_rows for part in parts) < wanted:
            return


async def read_chunks(uri: str) -> dict[int, sdg.Chunk]:
    """The chunks that a rank has recorded in the file of this URI."""
    import aiosqlite

    try:
        async with aiosqlite.connect(f"{uri}?mode=ro", uri=True) as db:
            return await sdg.recorded_chunks(db)
    except sqlite3.Error as problem:
        raise sdg.StateError(f"state {uri} cannot be read: {problem}") from problem


def check_chunk(run: sdg.Run, chunk: sdg.Chunk, ids: list[str], writer: sdg.Writer) -> Iterator[str]:
    """What is wrong with the files of one finished chunk."""
    path = run.output.path(run.path_of(chunk))
    gone = {*chunk.filtered, *chunk.failed}
    wanted = [ids[position] for position in range(chunk.count) if position not in gone]
    try:
        table = writer.read(chunk)
        failed = [record["id"] for record in read_failed(run, chunk)]
    except (OSError, ValueError, KeyError) as problem:
        yield f"{path} or its failed records cannot be read: {problem}"
        return
    if table is None:
        yield f"{path} is gone: it had {chunk.rows} rows"
    elif table.num_rows != chunk.rows:
        yield f"{path} has {table.num_rows} rows, {chunk.rows} were written"
    elif chunk.rows:
        column = run.options.id_column if run.options.id_column in table.column_names else "id"
        found = table.column(column).to_pylist()
        for row, (is_, should_be) in enumerate(zip(found, wanted, strict=True)):
            if is_ is not None and str(is_) != should_be:
                yield f"{path} row {row} is document {is_!r}; {should_be!r} was written"
                return
    if failed != [ids[position] for position in chunk.failed]:
        yield f"{run.output.path(run.failed_path_of(chunk))} does not name the {len(chunk.failed)} failed documents"
