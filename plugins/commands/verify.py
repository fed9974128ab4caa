"""The command `verify`: checks that each document of the input is a row, filtered or failed, and nothing is left over.

It reads input, state and output again, and compares published files with those on the Hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.checks import reading
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.digests import same_rows
from sdg_plugins.common.files import file_writer, rank_file, uses_spool
from sdg_plugins.common.identity import differences
from sdg_plugins.common.ids import SeenIds
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import Parser
from sdg_plugins.common.outputs import output_files, read_failed
from sdg_plugins.common.rows import NUMBERS, shape_of
from sdg_plugins.common.state import parse_run
from sdg_plugins.common.values import id_column_of, id_text, same_id, values_of
from sdg_plugins.publishing.publisher import Publisher


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("verify", verify)


def verify(argv: list[str]) -> int:
    """Reconcile input, state and output; report each discrepancy, and exit with 1 if there are any."""
    parser = Parser(
        prog="sdg.py verify", description=verify.__doc__, epilog="example: sdg.py verify --output ./summaries"
    )
    recorded.add_run_options(parser)
    run = recorded.load_run(parser.parse_args(argv))
    found, counts, unfinished = 0, Counter({"rows": 0, "filtered": 0, "failed": 0}), Counter[str]()
    for discrepancy in discrepancies(run, counts, unfinished):
        found += 1
        print(discrepancy, file=sys.stderr)
    figures = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    result = (
        f"{found:,} discrepanc{'y' if found == 1 else 'ies'}" if found else "nothing is wrong" if unfinished else ""
    )
    print(f"{counted(counts.total(), 'document')}: {figures}; {result or 'all accounted for'}")
    if unfinished:
        chunks = f"{counted(unfinished['chunks'], 'chunk')} with {counted(unfinished['documents'], 'document')}"
        print(f"not finished: {chunks}{ranks_not_begun(run)}; run the same command again to go on")
    return 1 if found or unfinished else 0


def ranks_not_begun(run: sdg.Run) -> str:
    """The ranks that have not begun, for the summary."""
    missing = [rank for rank in range(run.options.world_size) if not rank_file(run.state, rank, "sqlite3").exists()]
    shown = ", ".join(map(str, missing[:10])) + "…" * (len(missing) > 10)
    return f"; rank {shown} {'have' if len(missing) > 1 else 'has'} not begun" if missing else ""


def discrepancies(run: sdg.Run, counts: Counter[str], unfinished: Counter[str]) -> Iterator[str]:
    """All discrepancies, a line each.

    Args:
        run: whose.
        counts: the documents that are accounted for are added to it.
        unfinished: the chunks that are still to be written, and their documents, are added to it.
    """
    options = run.options
    reader = recorded.reader_of(run)
    yield from discrepancies_of_input(run, reader)
    writer = run.plugins.writers[file_writer(options)].factory(run)
    on_hub, published = reconcile_with_hub(run)
    files = files_of(run)  # before the records: a run that is at work adds to both
    expected, seen, doubled = set(), SeenIds(), 0
    for opened, chunk in with_records(run, all_chunks(run, reader)):
        if opened is None:
            assert chunk
            yield f"chunk {chunk.index} is recorded, but the input no longer has its rows"
            continue
        rows = f"rows {opened.chunk.start:,} to {opened.chunk.start + opened.chunk.count - 1:,} of the input"
        if chunk is None or not chunk.written:
            unfinished.update(chunks=1, documents=opened.chunk.count)
            if chunk:  # written before, and open again for what was added or failed
                expected |= {run.path_of(chunk), run.failed_path_of(chunk)}
        elif chunk.count > opened.chunk.count:
            yield f"chunk {chunk.index} ({rows}) was written with {counted(chunk.count, 'document')}"
        else:
            added = opened.chunk.count - chunk.count  # to the input, since its last chunk was written
            unfinished += Counter(chunks=int(added > 0), documents=added)  # without what is 0
            expected |= {run.path_of(chunk), *([run.failed_path_of(chunk)] if chunk.failed else [])}
            if not same_rows(opened, chunk):
                yield f"{rows} ({', '.join(opened.files)}) have changed since chunk {chunk.index} was made of them"
            ids = opened.own_ids(id_column := id_column_of(options, reader.schema))[: chunk.count]
            doubled += seen.add(list(map(id_text, ids))) if id_column else 0
            yield from discrepancies_of_chunk(run, chunk, ids, writer, published)
            counts["rows"] += chunk.rows
            counts["filtered"] += len(chunk.filtered)
            counts["failed"] += len(chunk.failed)
    if doubled:  # every document is accounted for nevertheless
        sdg.say(f"{counted(doubled, 'document')} have the id of an earlier one: see --id-column")
    for file in files:
        if file not in expected:
            yield f"{run.output.path(file)} does not belong to a finished chunk"
    yield from on_hub


def files_of(run: sdg.Run) -> list[str]:
    """The files of rows and of failed documents in the output, without those that a run is just writing."""
    sizes = run.output.sizes(os.path.dirname(run.failed_path_of(sdg.Chunk(0, 0))))
    failed = [file for file, size in sizes.items() if size and not os.path.basename(file).startswith(".")]
    return [*output_files(run), *failed]  # empty ones could not be deleted


def reconcile_with_hub(run: sdg.Run) -> tuple[list[str], set[str]]:
    """Discrepancies between the spool and the Hub, and the files that were deleted from the spool once published."""
    if not uses_spool(run.options):
        return [], set()
    with contextlib.closing(Publisher(run)) as publisher:
        found, published = publisher.reconcile()
    if published:
        example = run.output.path(min(published))
        sdg.say(f"{counted(len(published), 'published file')}, such as {example}, can only be compared by hash")
    return found, published


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


def with_records(run: sdg.Run, chunks: Iterable[OpenChunk]) -> Iterator[tuple[OpenChunk | None, sdg.Chunk | None]]:
    """The chunks of the input with what is recorded of each, if it is, then what else is recorded; in order."""
    recorded_chunks = recorded.chunks_of(run)
    known = next(recorded_chunks, None)
    for opened in chunks:
        if known and known.index == opened.chunk.index:
            yield opened, known
            known = next(recorded_chunks, None)
        else:
            yield opened, None
    yield from ((None, chunk) for chunk in ([known, *recorded_chunks] if known else []))


def discrepancies_of_input(run: sdg.Run, reader: sdg.Reader) -> Iterator[str]:
    """The differences between the input and what it was when the run began, beside rows that were added."""
    recorded_input = parse_run(run.state / "run.json", (run.state / "run.json").read_bytes())["identity"]["input"]
    identity = json.loads(json.dumps(dict(reader.identity)))
    if identity != recorded_input and not reader.continues(recorded_input):
        for difference in list(differences(recorded_input, identity))[:10]:
            yield f"the input has changed since the run: {difference}"


def discrepancies_of_chunk(
    run: sdg.Run, chunk: sdg.Chunk, ids: list[Any], writer: sdg.Writer, published: set[str]
) -> Iterator[str]:
    """The discrepancies in the files of one finished chunk.

    Args:
        run: the run.
        chunk: as it is recorded.
        ids: of its documents, in order.
        writer: reads its rows.
        published: files that were deleted once they were on the Hub.
    """
    path = run.output.path(run.path_of(chunk))
    gone = {*chunk.filtered, *chunk.failed}
    expected = [ids[position] for position in range(chunk.count) if position not in gone]
    try:
        changed = list(changed_files(run, chunk))
        yield from changed
        table = read_ids(run, writer, chunk) if chunk.hash and not changed else writer.read(chunk)
        failed = [id_text(record["id"]) for record in read_failed(run, chunk)]
    except (OSError, ValueError, KeyError) as exc:
        yield f"{path} or its failed records cannot be read: {exc}"
        return
    fingerprint = (table.schema.metadata or {}).get(b"sdg.fingerprint") if table is not None else None
    if table is None and (not chunk.rows or run.path_of(chunk) in published):
        pass  # a chunk without rows has no file
    elif table is None:
        yield f"{path} is gone: it had {counted(chunk.rows, 'row')}"
    elif fingerprint and fingerprint.decode() != run.fingerprint:
        yield f"{path} belongs to a different run: its fingerprint is {fingerprint.decode()}, not {run.fingerprint}"
    elif len(firsts := shape_of(run.options).firsts(table)) != chunk.rows:
        yield f"{path} has {counted(len(firsts), 'row')}, expected {chunk.rows:,}"
    elif chunk.rows:
        column = run.options.id_column if run.options.id_column in table.column_names else "id"
        values = values_of(table.column(column))
        found = [values[position] for position in firsts]
        for row, (id_, expected_id) in enumerate(zip(found, expected, strict=True)):
            if id_ is not None and not same_id(id_, expected_id):
                yield f"{path} row {row} is document {id_!r}, expected {id_text(expected_id)!r}"
                return
    if failed != [id_text(ids[position]) for position in chunk.failed] and run.failed_path_of(chunk) not in published:
        documents = counted(len(chunk.failed), "failed document")
        yield f"{run.output.path(run.failed_path_of(chunk))} does not list its {documents}"


def read_ids(run: sdg.Run, writer: sdg.Writer, chunk: sdg.Chunk) -> Any:
    """The rows of a chunk whose file has the hash that it was written with: only what names them, if that will do."""
    read_columns = getattr(writer, "read_columns", None)
    names = {run.options.id_column, "id", NUMBERS[1]} - {None}
    return read_columns(chunk, names) if read_columns else writer.read(chunk)


def changed_files(run: sdg.Run, chunk: sdg.Chunk) -> Iterator[str]:
    """The files of a chunk whose content is not the one that was written; a file that is gone is reported elsewhere."""
    for name, expected in ((run.path_of(chunk), chunk.hash), (run.failed_path_of(chunk), chunk.failed_hash)):
        stamp = run.output.stamp(name) if expected else None
        if stamp and stamp.hash != expected:
            yield f"{run.output.path(name)} has changed since it was written"
