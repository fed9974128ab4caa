"""Writers of plugins: chosen by name or suffix, and known to every command that looks at files."""

from __future__ import annotations

import datetime as dt
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from running import Job, documents, rollout

import sdg
from sdg_plugins.commands import export
from sdg_plugins.commands.verify import discrepancies_of_chunk
from sdg_plugins.common.files import Place
from sdg_plugins.common.rows import empty_rows
from sdg_plugins.common.state import settle_fields
from sdg_plugins.common.values import null_row, rows_of
from sdg_plugins.writers.jsonl import JsonlWriter
from sdg_plugins.writers.parquet import ParquetWriter

SHELF = """
    import io
    import sdg
    import pyarrow.parquet as pq

    @sdg.hookimpl
    def register_writers(register):
        register("shelf", Shelf)

    @sdg.hookimpl
    def register_rollouts(register):
        register("echo", echo)

    async def echo(document, generate):
        return await generate(document.text)

    class Shelf:
        \"\"\"Write files that only this plugin reads.\"\"\"

        suffix = ".shf"

        def __init__(self, run):
            self.run = run

        def write(self, chunk, rows):
            content = io.BytesIO()
            pq.write_table(rows, content)
            path = self.run.path_of(chunk)
            self.run.output.write(path, lambda file: file.write(b"SHELF" + content.getvalue()))

        def read(self, chunk):
            import pyarrow as pa
            try:
                with self.run.output.open(self.run.path_of(chunk)) as file:
                    return pq.read_table(pa.BufferReader(file.read()[5:]))
            except FileNotFoundError:
                return None
"""


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"writer": "shelf"}, "00000_00000.shf"),
        ({"writer": "shelf", "output_filename": "part-${chunk_index}.bin"}, "part-00000.bin"),
        ({"output_filename": "${chunk_index}.shelf"}, "00000.shelf"),
    ],
)
def test_a_writer_of_a_plugin_is_known_to_all_commands(job: Job, options: dict[str, str], name: str) -> None:
    job.options["plugin"] = job.plugin("shelf", SHELF)
    job.input(documents(3))

    output = job.succeed(**options)

    assert (output.path / "data" / name).read_bytes().startswith(b"SHELF")
    assert job.succeed(**options).written() == [f"data/{name}"]
    assert job.verify().rc == 0
    assert "document 0" in (output.path / "README.md").read_text()
    shown = job.sdg("show", "--output", output.path)
    assert "document 0" in shown.stdout
    exported = job.sdg("export", "--output", output.path, "--format", "messages", "--to", "chats.jsonl")
    assert exported.rc == 0, exported


def test_an_unknown_writer_is_named(job: Job) -> None:
    job.input(documents(1))

    finished = job(writer="parkett")

    assert finished.rc == 2
    assert finished.says("unknown writer 'parkett'", "did you mean parquet")


def test_exported_lines_hold_binary_values_and_large_integers_without_a_loss() -> None:
    numbers = pa.array(["123456789012345678901"], pa.string()).cast(pa.json_(pa.string()))
    table = pa.table({"image": [b"\xff\x00"], "number": numbers})

    assert json.loads(export.lines_of(table)) == {"image": "/wA=", "number": 123456789012345678901}


KINDS = """
if document.text == 'drop':
    return None
if document.text == 'fail':
    return 1 / 0
return document.id
"""


@pytest.mark.parametrize("name", ["${rank}_${chunk_index}.parquet", "${rank}_${chunk_index}.jsonl.gz"])
def test_chunks_that_are_written_in_pieces_hold_the_same_rows(job: Job, name: str) -> None:
    kinds = ["keep", "drop", "fail", "keep"] * 3 + ["fail"] * 4
    job.input([{"id": f"d{i}", "text": kind} for i, kind in enumerate(kinds)])
    job.options |= {"records_per_chunk": 4, "output_filename": name}
    job.options["plugin"] = job.plugin("mine", rollout(KINDS))
    whole = job.succeed()

    small = "import sdg\nsdg.LARGE_CHUNK, sdg.PIECE_BYTES = 0, 1\n"
    pieces = job.succeed(output="pieces", plugin=job.plugin("small", small + rollout(KINDS)))

    assert pieces.written() == whole.written() == [f"data/00000_0000{i}{name[22:]}" for i in range(3)]
    assert pieces.failed().keys() == whole.failed().keys()
    if name.endswith("parquet"):
        assert pieces.rows() == whole.rows()
        assert pieces.table().schema.equals(whole.table().schema)
    else:
        assert pieces.data() == whole.data()
    assert job.verify(output="pieces").rc == 0


def test_chunks_of_json_lines_come_back_with_the_same_types(tmp_path: Path) -> None:
    options = Namespace(rank=0, world_size=1, output_config="data", output_filename="${chunk_index}.jsonl")
    options.flat, options.keep_messages, options.rollouts_per_document = True, False, 1
    run = sdg.Run(options, sdg.Plugins(), Place(str(tmp_path)), tmp_path, lambda reason: None)
    kinds: dict[str, pa.DataType] = {
        "id": pa.string(),
        "note": pa.large_string(),
        "meta": pa.struct([("a", pa.int8()), ("b", pa.list_(pa.float64()))]),
        "any": pa.json_(pa.string()),
        "category": pa.dictionary(pa.int8(), pa.string()),
        "when": pa.timestamp("us"),
        "blob": pa.binary(),
    }
    run.source_schema = pa.schema(list(kinds.items()))
    fields = settle_fields(run, {"score": pa.float64(), "own": pa.list_(pa.int64())})
    assert fields
    writer, empty = JsonlWriter(run), empty_rows(options, run.source_schema, fields)
    full = pa.Table.from_batches([pa.RecordBatch.from_pylist([FULL], schema=empty.schema)])
    nulls = pa.Table.from_batches([null_row(empty.schema)])
    tables = []
    for index, rows in enumerate((full, nulls)):
        writer.write(sdg.Chunk(index, index), rows)
        tables.append(read := writer.read(sdg.Chunk(index, index)))
        assert read

    assert tables[0].schema.equals(tables[1].schema)
    (row,) = rows_of(tables[0])
    assert row == {**dict.fromkeys(empty.schema.names), **FULL, "when": "2024-01-01T00:00:00", "blob": "/w=="}
    (tmp_path / "data/00001.jsonl").write_text('{"id": "x", "meta": {"a": 1, "new": 2}}')
    edited = writer.read(sdg.Chunk(1, 1))
    assert edited
    assert rows_of(edited) == [{"id": "x", "meta": {"a": 1, "new": 2}}]  # nothing is lost


FULL: dict[str, Any] = {
    "id": "x",
    "note": "n",
    "meta": {"a": 1, "b": [0.5]},
    "any": None,
    "category": "c",
    "when": dt.datetime(2024, 1, 1),
    "blob": b"\xff",
    "score": 1.0,
    "own": [1],
}


class NeverWhole(ParquetWriter):
    """Reads no file as a whole."""

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`."""
        raise OSError("read as a whole")


def test_of_a_file_with_the_right_hash_verify_reads_only_the_ids(tmp_path: Path) -> None:
    options = Namespace(rank=0, world_size=1, output_config="data", output_filename="${chunk_index}.parquet")
    options.id_column, options.flat = None, False
    run = sdg.Run(options, sdg.Plugins(), Place(str(tmp_path)), tmp_path, lambda reason: None)
    chunk, writer = sdg.Chunk(0, 0, 2, written=True), NeverWhole(run)
    writer.write(chunk, pa.table({"id": ["a", "b"], "text": ["long", "longer"]}))
    chunk.size, chunk.hash = run.output.stamps[run.path_of(chunk)]

    assert not [*discrepancies_of_chunk(run, chunk, ["a", "b"], writer, set())]
    (other,) = discrepancies_of_chunk(run, chunk, ["a", "c"], writer, set())
    assert "row 1 is document 'b', expected 'c'" in other
    with open(run.output.path(run.path_of(chunk)), "ab") as file:
        file.write(b"more")
    changed, whole = discrepancies_of_chunk(run, chunk, ["a", "b"], writer, set())
    assert "has changed since it was written" in changed
    assert "read as a whole" in whole
