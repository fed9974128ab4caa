"""What a rank finds when it is started again: chunks that are not complete, and files that are gone."""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

import sdg
from sdg_plugins.common import recorded, resuming
from sdg_plugins.common.chunks import Outlet
from sdg_plugins.common.files import Place
from sdg_plugins.common.outputs import chunk_names, has_output, untouched
from sdg_plugins.common.resuming import known_chunks
from sdg_plugins.common.state import as_text

SIZE = 4  # documents in a chunk
CHUNKS = st.lists(
    st.fixed_dictionaries(
        {
            "count": st.sampled_from([SIZE, SIZE, SIZE, 2]),
            "written": st.sampled_from([True, True, True, False]),
            "filtered": st.sampled_from([(), (), (1,), (0, 1)]),
            "failed": st.sampled_from([(), (), (3,), (2, 3)]),
            "bookmark": st.none() | st.integers(0, 99).map(str),
            "file": st.sampled_from(["there", "there", "there", "gone", "empty"]),
            "size": st.sampled_from([None, 5]),
        }
    )
    | st.none(),
    max_size=12,
)


def run_of(folder: Path, **options: Any) -> sdg.Run:
    """A run as far as its chunks are concerned."""
    given = {"rank": 0, "world_size": 1, "records_per_chunk": SIZE, "max_documents": None, "retry_failed": False}
    given |= {"output": str(folder / "out"), "output_config": "data", "writer": "parquet"}
    given |= {"output_filename": "${rank}_${chunk_index}.parquet", **options}
    (folder / "out" / "data").mkdir(parents=True, exist_ok=True)
    plugins = sdg.Plugins()
    plugins.writers["parquet"] = sdg.Entry(Path, "parquet", "1", "sdg")
    return sdg.Run(Namespace(**given), plugins, Place(given["output"]), folder, lambda reason: None)


def record(run: sdg.Run, chunks: Iterable[sdg.Chunk]) -> None:
    """Record chunks in the state of a run's rank."""
    path = run.state / f"{run.options.rank:05d}.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(sdg.TABLES)
        columns = len(db.execute("PRAGMA table_info(chunks)").fetchall())
        marks = ",".join("?" * columns)
        db.executemany(f"INSERT INTO chunks VALUES ({marks})", [sdg._chunk_row(chunk)[:columns] for chunk in chunks])


@settings(max_examples=20, deadline=None)
@given(CHUNKS, st.integers(1, 3), st.booleans(), st.sampled_from([None, 1, 3]))
def test_what_is_left_to_do_is_the_same_as_one_chunk_at_a_time(
    drawn: list[dict[str, Any] | None], world: int, retry: bool, batch: int | None
) -> None:
    rank = world - 1
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(resuming, "BATCH", batch or resuming.BATCH)
        run = run_of(Path(name), rank=rank, world_size=world, retry_failed=retry)
        chunks, files = {}, {}
        for number, facts in enumerate(drawn):
            if facts is None:
                continue
            values = dict(facts)
            index, file = number * world + rank, values.pop("file")
            for kind in ("filtered", "failed"):
                values[kind] = tuple(i for i in values[kind] if i < values["count"]) if values["written"] else ()
            chunks[index] = chunk = sdg.Chunk(index, index * SIZE, **values)
            files[index] = file if chunk.written and chunk.rows else "there"
            if chunk.written and chunk.rows and file != "gone":
                Path(run.output.path(run.path_of(chunk))).write_bytes(b"12345" if file == "there" else b"")
        record(run, chunks.values())

        known = known_chunks(run)

        lost = [index for index, file in files.items() if file != "there"]
        every, expected = range(rank, (len(drawn) + 3) * world, world), []
        for index in every:
            chunk = chunks.get(index)
            done = chunk and chunk.written and index not in lost and chunk.count == SIZE
            if not (done and not (retry and chunk.failed)):
                expected.append(index)
        found = [index for index, _ in known.to_read(every)]
        assert known.lost == lost
        assert found == expected
        for index in found:
            recorded, now = chunks.get(index), known.get(index)
            assert (recorded is None) == (now is None)
            assert now is None or (now.count, now.written) == (recorded.count, recorded.written and index not in lost)


def test_the_nearest_bookmark_before_a_chunk_is_known(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    run.plugins.writers["parquet"] = sdg.Entry(Path, "parquet", "1", "another")  # its files are not looked at
    complete = functools.partial(sdg.Chunk, count=SIZE, written=True)
    record(run, [complete(i, i * SIZE, bookmark=f"at {i}") for i in (0, 1, 2, 5, 6)])

    assert [*known_chunks(run).to_read(range(9))] == [(3, "at 2"), (4, None), (7, "at 6"), (8, None)]


@pytest.mark.parametrize("remote", [False, True])
def test_files_of_another_size_are_refused_and_missing_ones_lost_wherever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], remote: bool
) -> None:
    run = run_of(tmp_path)
    if remote:
        run.output = Place(f"memory://{tmp_path.name}/out")  # a file system of fsspec, which is listed
    record(run, [sdg.Chunk(i, i * SIZE, SIZE, None, True, size=5) for i in range(6)])
    for i in (0, 1, 3, 5):
        run.output.write(run.path_of(sdg.Chunk(i, 0)), lambda file, i=i: file.write(b"" if i == 3 else b"12345"))

    known = known_chunks(run)
    assert known.lost == [index for index, _ in known.to_read(range(6))] == [2, 3, 4]
    assert "00000_00002.parquet and 2 more" in capsys.readouterr().err
    run.output.write(run.path_of(sdg.Chunk(5, 0)), lambda file: file.write(b"1234"))
    with pytest.raises(sdg.OutputError, match=r"00000_00005.parquet has 4 bytes, but 5 were written: restore it"):
        known_chunks(run)


def test_a_complete_chunk_costs_no_call_of_a_python_function(tmp_path: Path) -> None:
    """Of a million chunks, a call for each takes seconds, and an object of each hundreds of megabytes."""
    calls = {}
    for number in (50, 550):
        run = run_of(tmp_path / str(number))
        record(run, [sdg.Chunk(i, i * SIZE, SIZE, None, True, size=5) for i in range(number)])
        for name in chunk_names(run, range(number)):
            Path(run.output.path(name)).write_bytes(b"12345")
        seen: list[str] = []
        sys.setprofile(lambda frame, event, arg, seen=seen: seen.append(event) if event == "call" else None)
        try:
            known = known_chunks(run)
        finally:
            sys.setprofile(None)
        calls[number] = len(seen)
        assert next(known.to_read(range(number + 1)))[0] == number

    assert calls[550] < calls[50] + 10


def test_the_chunks_of_all_ranks_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "BATCH", 2)
    for rank in (0, 2):  # rank 1 has not begun
        run = run_of(tmp_path, rank=rank, world_size=3)
        record(run, [sdg.Chunk(i, i * SIZE, SIZE, written=i % 2 == 0) for i in range(rank, 24, 3)])

    every = [i for i in range(24) if i % 3 != 1]
    assert [chunk.index for chunk in recorded.chunks_of(run)] == every
    assert not [*recorded.chunks_of(run, "failed != '[]'")]
    assert [chunk.index for chunk in recorded.chunks_of(run, "written OR chunk = 3")] == [
        i for i in every if i % 2 == 0 or i == 3
    ]


def test_names_of_many_chunks_are_those_of_each(tmp_path: Path) -> None:
    for template in ("${rank}_${chunk_index}.parquet", "100%-$chunk_index-$${x}-${chunk_index}.parquet"):
        run = run_of(tmp_path, rank=2, world_size=5, output_config="some/100%", output_filename=template)
        indices = [2, 7, 1_000_002]
        assert chunk_names(run, indices) == [run.path_of(sdg.Chunk(index, 0)) for index in indices]


def test_hidden_files_and_folders_are_no_output(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (tmp_path / "out" / "data" / ".hidden").touch()
    (tmp_path / "out" / "data" / "folder").mkdir()
    assert not has_output(run)
    (tmp_path / "out" / "data" / "rows.parquet").touch()
    assert has_output(run)
    assert not has_output(run_of(tmp_path, output_config="another"))


@pytest.mark.parametrize("name", ["my%20run", "run #2", "who?"])
def test_what_was_paid_for_is_seen_in_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    other, run = (run_of(tmp_path / folder, processes=None) for folder in ("my run", name))
    record(other, [])
    record(run, [sdg.Chunk(0, 0, SIZE, written=True)])

    assert untouched(other)
    assert not untouched(run)


class Kept:
    """A writer that only remembers what it was given."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        self.written.append(chunk.index)


@pytest.mark.parametrize(("filtered", "written"), [((0, 1, 2, 3), [0]), ((0,), [])])
def test_a_file_without_rows_is_left_only_if_no_chunk_has_rows_whether_their_files_are_there_or_not(
    filtered: tuple[int, ...], written: list[int], tmp_path: Path
) -> None:
    run, other = (
        run_of(tmp_path, rank=rank, world_size=2, results_column="generated", rollout="mine") for rank in (0, 1)
    )
    record(run, [sdg.Chunk(0, 0, SIZE, written=True, filtered=(0, 1, 2, 3))])
    record(other, [sdg.Chunk(1, SIZE, SIZE, written=True, filtered=filtered)])
    (run.state / "schema.json").write_text(json.dumps({"arrow": as_text(pa.schema([("text", pa.string())]))}))
    run.schema = pa.schema([("id", pa.string())])
    writer = Kept()

    Outlet(run, writer).finish()

    assert writer.written == written
