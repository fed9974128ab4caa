"""What `datasets` loads of an output with chunks without rows: the installed release, and the major version before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Rights
from fake_s3 import FakeS3
from running import Job, program

PARTS = {"everywhere": "..k.kk..", "compressed": ".k.k.", "lines": ".k.k."}
FORMATS = ("parquet", "jsonl.gz", "jsonl")
CHOOSING = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("choosing", choosing)

    async def choosing(document, generate):
        if "drop" in document.text:
            return None
        if "fail" in document.text:
            raise sdg.BadDocument("as asked")
        return {"text": "kept", "score": 1.5}
"""
LOAD = """
    import json, os, sys
    import datasets
    datasets.disable_progress_bars()
    for place in json.loads(sys.argv[1]):
        for streaming in (False, True):
            rows = datasets.load_dataset(*place[0], **place[1], split="train", streaming=streaming)
            print(json.dumps([row["id"] for row in rows]))
"""


def load(folder: Path, *places: Any, env: dict[str, str] | None = None, library: str = "") -> list[list[str]]:
    """The ids that `datasets` reads, not streaming and streaming, from each place: arguments of `load_dataset`."""
    environment = {**os.environ, "HF_HOME": str(folder / "loading"), "HF_UPDATE_DOWNLOAD_COUNTS": "0", **(env or {})}
    environment |= {"PYTHONPATH": library, "HF_HUB_OFFLINE": "0" if env else "1"}
    script = [*program(LOAD), json.dumps(places)]
    answer = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def ask_for(job: Job, layout: str) -> list[str]:
    """Make an input of chunks of two documents, with rows (k) or without; returns the ids of the rows."""
    job.options["plugin"] = job.plugin("choosing", CHOOSING)
    job.options["records_per_chunk"] = 2
    texts = [(("keep", "drop"), ("drop", "fail"))[part != "k"] for part in layout]
    rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(text for pair in texts for text in pair)]
    job.input(rows)
    return [row["id"] for row in rows if row["text"] == "keep"]


@pytest.fixture(scope="session")
def previous_datasets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the newest release of the major version before the installed one."""
    import datasets

    folder = tmp_path_factory.mktemp("previous")
    wanted = f"datasets<{datasets.__version__.split('.')[0]}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), wanted]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"{wanted} cannot be installed here: {installed.stderr[-300:]}")
    return str(folder)


def check_local_outputs(job: Job, library: str = "") -> None:
    places, expected = [], []
    for number, (name, layout) in enumerate(PARTS.items()):
        file_format = FORMATS[number % len(FORMATS)]
        ids = ask_for(job, layout)
        output = job.succeed(output=name, output_filename=f"${{rank}}_${{chunk_index}}.{file_format}").path
        builder = "parquet" if file_format == "parquet" else "json"
        places += [[[str(output)], {}], [[builder], {"data_files": f"{output}/data/*.{file_format}"}]]
        expected += [ids] * 4
        assert len(list((output / "data").iterdir())) == layout.count("k")
        assert job.verify(output=name).rc == 0
    assert load(job.folder, *places, library=library) == expected


def test_outputs_with_chunks_without_rows_load(job: Job) -> None:
    check_local_outputs(job)


def check_an_output_without_rows(job: Job, library: str = "") -> None:
    ids = ask_for(job, "..kk")
    output = job.succeed(max_documents=4)
    assert list(output.data()) == ["data/00000_00000.parquet"]
    script = f"import datasets; rows = datasets.load_dataset({str(output.path)!r}, split='train', streaming=True); "
    script += "print(list(rows), list(rows.features))"
    environment = {**os.environ, "PYTHONPATH": library, "HF_HUB_OFFLINE": "1", "HF_HOME": str(job.folder / "loading")}
    answer = subprocess.run(program(script), env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[] ['id', 'text', 'rollout_results']"
    assert job.verify().rc == 0

    output = job.succeed()
    assert list(output.data()) == ["data/00000_00002.parquet", "data/00000_00003.parquet"]
    assert load(job.folder, [[str(output.path)], {}], library=library) == [ids, ids]
    assert job.verify().rc == 0


def test_an_output_without_any_row_names_its_columns_until_there_are_rows(job: Job) -> None:
    check_an_output_without_rows(job)


@pytest.mark.slow
def test_outputs_with_chunks_without_rows_load_in_the_previous_client(job: Job, previous_datasets: str) -> None:
    check_local_outputs(job, previous_datasets)
    check_an_output_without_rows(job, previous_datasets)


def test_a_config_without_files_leaves_the_others_loadable(job: Job) -> None:
    ids = ask_for(job, "k")
    output = job.succeed()
    state = job.folder / "state-of-other"
    assert job(output_config="other", state_dir=state).rc == 0
    for file in (output.path / "other").iterdir():
        file.unlink()
    card = ("card", "--output", "output", "--output-config", "other", "--state-dir", state)
    assert job.sdg(*card).rc == 0
    assert load(job.folder, [[str(output.path)], {}]) == [ids, ids]


@pytest.fixture(scope="module")
def s3() -> Iterator[FakeS3]:
    with FakeS3() as s3:
        s3.begin()
        yield s3


@pytest.mark.slow
def test_objects_of_chunks_without_rows_load(job: Job, s3: FakeS3) -> None:
    variables = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    job.env = {"AWS_ENDPOINT_URL_S3": s3.url, **dict.fromkeys(variables, "tester")}
    ids = ask_for(job, ".k.k.")
    assert job(output=s3.uri("loading")).rc == 0
    output = s3.output("loading", job.folder)
    assert load(job.folder, [["parquet"], {"data_files": f"{output.path}/data/*.parquet"}]) == [ids, ids]


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_datasets_of_chunks_without_rows_load_from_the_hub(job: Job, hub: FakeHub, merged: bool) -> None:
    hub.tokens = {"hf_write": Rights("alice")}
    job.env = hub.environment(job.folder, "hf_write")
    ids = ask_for(job, "..k.kk..k.")
    size = {"max_file_size": "8kB"} if merged else {}
    assert job(output="hf://datasets/alice/out", **size).rc == 0
    assert load(job.folder, [["alice/out"], {}], env=job.env) == [ids, ids]
    assert job.sdg("verify", "--output", "hf://datasets/alice/out", **job.env).rc == 0
