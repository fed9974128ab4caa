"""Files of the input that are fixed, added, removed or changed while a run is interrupted."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer
from running import Job

import sdg
from sdg_plugins.common import marks
from sdg_plugins.common.digests import digest_of
from sdg_plugins.common.inputs import InputFiles


def lines(start: int, end: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {n}"}).encode() + b"\n" for n in range(start, end))


def texts(job: Job) -> list[str]:
    return [row["text"] for row in job.output.rows()]


def test_a_damaged_file_is_named_and_its_replacement_goes_on(job: Job, server: FakeServer) -> None:
    folder = job.folder / "in"
    folder.mkdir()
    whole = gzip.compress(lines(20, 40), mtime=0)
    (folder / "a.jsonl").write_bytes(lines(0, 20))
    (folder / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jsonl").write_bytes(lines(40, 45))

    damaged = job(input="in", records_per_chunk=10)
    (folder / "b.jsonl.gz").write_bytes(whole)
    (folder / "d.jsonl").write_bytes(lines(45, 50))
    job.succeed(input="in", records_per_chunk=10)

    assert damaged.rc == 1
    assert "b.jsonl.gz cannot be read after line" in damaged.stderr
    assert texts(job) == [f"document {n}" for n in range(50)]
    assert sorted(server.prompts) == sorted(texts(job))
    assert job.verify().rc == 0


def test_files_behind_the_last_chunk_may_be_removed(job: Job, server: FakeServer) -> None:
    folder = job.folder / "in"
    folder.mkdir()
    for name, start in (("a", 0), ("b", 10), ("c", 20)):
        (folder / f"{name}.jsonl").write_bytes(lines(start, start + 10))
    job.succeed(input="in", records_per_chunk=5, max_documents=10)
    (folder / "b.jsonl").unlink()

    job.succeed(input="in", records_per_chunk=5, max_documents=None)

    assert texts(job) == [f"document {n}" for n in [*range(10), *range(20, 30)]]
    assert len(server.prompts) == 20


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_change_in_the_middle_of_a_file_is_noticed(suffix: str, job: Job) -> None:
    """The file keeps its size, and its ends."""
    path = job.folder / f"in{suffix}"
    rows: list[dict[str, Any]] = [{"text": f"document {n}", "x": f"{n:06}" * 3000} for n in range(20)]

    def write() -> None:
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False, row_group_size=5)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    before = os.path.getsize(path)
    job.succeed(input=path, records_per_chunk=10)
    rows[12]["x"] = rows[12]["x"][:9000] + "!" + rows[12]["x"][9001:]
    write()
    os.utime(path, ns=(0, 0))

    verified, resumed = job.verify(), job(input=path, records_per_chunk=10)

    assert os.path.getsize(path) == before
    assert verified.rc == 1
    assert f"rows 10 to 19 of the input ({path.name})" in verified.stderr
    assert resumed.rc == 1
    assert f"rows 10 to 19 of the input ({path.name})" in resumed.message


def test_rows_that_were_added_to_the_input_are_no_discrepancy(job: Job) -> None:
    path = job.folder / "in.jsonl"
    job.options |= {"input": path, "records_per_chunk": 10}
    path.write_bytes(lines(0, 25))
    output = job.succeed()
    path.write_bytes(lines(0, 28))

    verified = job.verify()

    assert verified.rc == 1
    assert "25 documents: 25 rows, 0 filtered, 0 failed; nothing is wrong" in verified.stdout
    assert "not finished: 1 chunk with 3 documents" in verified.stdout
    job.succeed()
    assert job.verify().rc == 0
    assert not list(output.state.glob("*.sqlite3-*"))  # journals, which nothing needs any more


def test_a_copy_of_the_input_is_the_same_input(job: Job, server: FakeServer) -> None:
    (job.folder / "in.jsonl").write_bytes(lines(0, 10))
    job.succeed(input="in.jsonl", records_per_chunk=5)
    os.utime(job.folder / "in.jsonl", ns=(0, 0))

    again = job(input="in.jsonl", records_per_chunk=5)
    once_more = job(input="in.jsonl", records_per_chunk=5)

    assert (again.rc, once_more.rc) == (0, 0)
    assert not again.stderr + once_more.stderr
    assert len(server.prompts) == 10


def test_a_broken_record_that_is_fixed_can_be_retried(job: Job, server: FakeServer) -> None:
    path = job.folder / "in.csv"
    good = 'text,n\n"document 0",0\n"document 1",1\n"document 2",2\n'
    path.write_text(good.replace('"document 1"', '"document "1"'))
    job.succeed(input=path, max_failure_rate=0.9)
    path.write_text(good)

    job.succeed(input=path, retry_failed=True)

    assert texts(job) == [f"document {n}" for n in range(3)]
    assert len(server.prompts) == 3
    assert job.verify().rc == 0


def test_a_digest_depends_on_values_and_not_on_how_they_were_read() -> None:
    rows = [
        {"s": "x" * (n % 3), "l": [n, None] if n % 4 else None, "d": {"a": None if n % 5 else n, "b": ["y"] * (n % 3)}}
        for n in range(40)
    ]
    whole = pa.Table.from_pylist(rows)
    alone = pa.Table.from_pylist(rows[7:30], schema=whole.schema)
    parts = pa.concat_tables([whole.slice(7, 4), whole.slice(11, 19)])
    kinds = pa.table({"c": pa.array(["a", "b", "a"]).dictionary_encode()})

    assert digest_of(whole.slice(7, 23), ()) == digest_of(alone, ()) == digest_of(parts, ())
    assert digest_of(whole.slice(8, 23), ()) != digest_of(alone, ())
    assert digest_of(whole.slice(7, 23), (3,)) == digest_of(parts, (3,)) != digest_of(parts, ())
    assert digest_of(kinds.slice(0, 1), ()) == digest_of(pa.table({"c": pa.array(["a"]).dictionary_encode()}), ())


def test_a_resume_opens_only_those_input_files_that_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "JUST_NOW", 0)
    opened: list[str] = []
    hashed = InputFiles._hash

    def noted(files: InputFiles, i: int, size: int) -> str:
        opened.append(files.names[i])
        return hashed(files, i, size)

    monkeypatch.setattr(InputFiles, "_hash", noted)
    folder, state = tmp_path / "in", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    for number in range(20):
        (folder / f"{number:02}.jsonl").write_text(f'{{"text": "document {number:02}"}}\n')
    run = cast("sdg.Run", SimpleNamespace(options=SimpleNamespace(input=str(folder)), state=state))

    def identity() -> dict[str, list[Any]]:
        opened.clear()
        return dict(InputFiles.of_run(run, "jsonl").identity)

    first = identity()
    assert len(opened) == 20
    assert identity() == first
    assert not opened
    changed = folder / "07.jsonl"
    times = changed.stat().st_atime_ns, changed.stat().st_mtime_ns
    changed.write_text('{"text": "document xx"}\n')
    os.utime(changed, ns=times)  # as a copy that keeps times
    assert identity() != first
    assert opened == ["07.jsonl"]
    (state / "marks.json").write_text("{")
    identity()
    assert len(opened) == 20
