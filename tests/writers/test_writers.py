"""Writers of plugins: chosen by name or suffix, and known to every command that looks at files."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pytest
from running import Job, documents, rollout

import sdg
from sdg_plugins.commands import export
from sdg_plugins.commands.verify import discrepancies_of_chunk
from sdg_plugins.common.files import Place
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
