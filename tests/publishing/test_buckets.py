"""Buckets of the Hub as output and input: the real client and the real Xet library, against a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_xet
import pytest
from fake_hub import FakeHub, Rights
from fake_xet import Bucket
from running import Job, documents, program

BUCKET = "alice/store"
URI = f"hf://buckets/{BUCKET}"


@pytest.fixture
def job(tmp_path: Path, server: Any, hub: FakeHub) -> Iterator[Job]:
    hub.tokens = {"hf_write": Rights("alice"), "hf_read": Rights("alice", write=False)}
    job = Job(tmp_path, server)
    job.env = hub.environment(tmp_path, "hf_write")
    job.options |= {"output": URI, "publish_interval": 0.5, "records_per_chunk": 5}
    job.input(documents(12))
    yield job
    job.sdg.close()


def spool(job: Job) -> dict[str, str]:
    """The Xet hashes of the files that the run has written, by name."""
    folder = job.folder / ".sdg" / "buckets-alice-store" / "spool"
    files = [path for path in folder.rglob("[!.]*.*") if path.is_file()]
    hashes = hf_xet.hash_files([str(path) for path in files])
    return {str(path.relative_to(folder)): found.hash for path, found in zip(files, hashes, strict=True)}


def there(hub: FakeHub) -> dict[str, str]:
    return {path: file.xet_hash for path, file in hub.buckets[BUCKET].files.items() if path != "README.md"}


def test_rows_and_the_card_are_published_to_a_bucket(job: Job, hub: FakeHub) -> None:
    finished = job()
    assert finished.rc == 0, finished
    assert finished.stdout.splitlines()[-1] == f"published {hub.url}/buckets/{BUCKET}"
    assert hub.buckets[BUCKET].private
    assert there(hub) == spool(job)
    assert len(there(hub)) == 3
    card = hub.buckets[BUCKET].files["README.md"].content.decode()
    assert f"{URI}/data/**/*.parquet" in card
    assert "being generated" not in card
    assert hub.buckets[BUCKET].files["data/00000_00000.parquet"].content.startswith(b"PAR1")

    batches = hub.counts["bucket_batch"]
    assert job().rc == 0
    assert hub.counts["bucket_batch"] == batches
    assert job.sdg("verify", "--output", URI, **job.env).rc == 0
    hub.buckets[BUCKET].files.pop("data/00000_00001.parquet")
    assert job.sdg("verify", "--output", URI, **job.env).rc == 1
    assert job().rc == 0
    assert there(hub) == spool(job)


LOAD = """
    import json, sys
    import datasets
    datasets.disable_progress_bars()
    for streaming in (False, True):
        rows = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train", streaming=streaming)
        print(json.dumps([row["id"] for row in rows]))
"""


@pytest.mark.slow
def test_datasets_loads_a_bucket_as_the_readme_says(job: Job) -> None:
    output = f"{URI}/run-1"
    assert job(output=output).rc == 0
    script = [*program(LOAD), f"{output}/data/**/*.parquet"]
    answer = subprocess.run(script, env={**os.environ, **job.env}, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert [json.loads(line) for line in answer.stdout.splitlines()] == [[row["id"] for row in documents(12)]] * 2


def test_a_bucket_with_rows_of_others_or_without_write_access_is_refused_before_the_run(job: Job, hub: FakeHub) -> None:
    hub.buckets[BUCKET] = Bucket(BUCKET)
    hub.buckets[BUCKET].push(hub.xet, "data/other.parquet", b"?")
    assert job().says("bucket alice/store has data/other.parquet", "--output-config")
    hub.buckets[BUCKET].files.clear()
    assert job(env={"HF_TOKEN": "hf_read"}).says("read-only")
    assert job(output="hf://buckets/bob/store").says("bucket bob/store does not exist", "alice")
    assert job(output="hf://buckets/alice").says("hf://buckets/OWNER/NAME")
    assert not job.server.requests


def test_an_outage_in_the_middle_of_an_upload_costs_nothing(job: Job, hub: FakeHub) -> None:
    hub.fail("bucket_batch", status=500, times=7, landed=True)
    assert job().rc == 0
    assert there(hub) == spool(job)


def test_files_of_a_bucket_are_an_input(job: Job, hub: FakeHub) -> None:
    hub.buckets[BUCKET] = Bucket(BUCKET, private=True)
    for number in range(3):
        lines = "".join(f'{{"id": "d{number}-{line}", "text": "line {line}"}}\n' for line in range(4))
        hub.buckets[BUCKET].push(hub.xet, f"docs/{number}.jsonl", lines.encode())
    hub.fail("bucket_resolve", status=503, times=2)
    job.options["publish_interval"] = None
    output = job.succeed(input=f"{URI}/docs", output="output")
    assert output.ids() == [f"d{number}-{line}" for number in range(3) for line in range(4)]
    assert job.succeed(input=f"{URI}/docs/*2.jsonl", output="one").ids() == [f"d2-{line}" for line in range(4)]
    assert job(input=f"{URI}/nothing", output="two").says(f"{URI}/nothing")
    assert job(input="hf://buckets/alice/missing", output="three").says("bucket alice/missing does not exist")
