"""Accounting: every document is a row, filtered or failed exactly once, and `verify` finds every deviation."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import PROBE, Answer, FakeServer, Hang, Status, prompt_of
from running import Finished, Job, Output, documents

# The text of a document determines its outcome.
SORTING = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("sorting", sorting)

    async def sorting(document, generate):
        if "filter" in document.text:
            return None
        reply = await generate(document.text)
        if "raise" in document.text:
            raise KeyError("a mistake in the rollout")
        return reply
"""


def mixed(count: int) -> list[dict[str, str]]:
    """Documents that are kept, filtered, refused by the server and failed by the rollout, in turn."""
    kinds = ["keep", "filter", "reject", "keep", "raise", "keep"]
    return [{"id": f"d{number:04}", "text": f"{kinds[number % 6]} {number}"} for number in range(count)]


def ids_of(kind: str, rows: list[dict[str, str]]) -> list[str]:
    return [row["id"] for row in rows if row["text"].startswith(kind)]


def reject(payload: dict[str, Any], n: int) -> Any:
    return Status(400) if prompt_of(payload).startswith("reject") else None


@pytest.fixture
def sorting(job: Job, server: FakeServer) -> Job:
    """A job over 30 documents of all kinds."""
    job.options["plugin"] = job.plugin("sorting", SORTING)
    job.options["records_per_chunk"] = 4
    job.input(mixed(30))
    server.behave(reject)
    return job


def test_every_document_is_a_row_filtered_or_failed_exactly_once(sorting: Job, server: FakeServer) -> None:
    output = sorting.succeed()

    rows = mixed(30)
    assert output.ids() == ids_of("keep", rows)
    assert list(output.failed()) == sorted(ids_of("reject", rows) + ids_of("raise", rows))
    stats = output.stats()
    counted = {name: stats[name] for name in ("documents", "rows", "filtered", "failed", "requests", "cache_hits")}
    assert counted == {"documents": 30, "rows": 15, "filtered": 5, "failed": 10, "requests": 25, "cache_hits": 0}
    types = Counter(record["error_type"] for record in output.failures())
    assert types == {"RequestFailed": 5, "KeyError": 5}
    for record in output.failures():
        assert set(record) >= {"id", "error", "error_type", "attempts", "document"}
        assert rows[int(record["id"][1:])]["text"] in json.dumps(record["document"])
    assert sorting.verify().rc == 0


def test_files_are_named_by_rank_and_chunk(sorting: Job) -> None:
    output = sorting.succeed()

    expected = {f"data/00000_{chunk:05}.parquet" for chunk in range(8)}
    failed = {f"failed/00000_{chunk:05}.jsonl" for chunk in range(8)}
    assert set(output.data()) == expected
    assert {name for name in output.files() if name.startswith("failed/")} == failed


def test_a_chunk_without_failures_has_no_failed_file(job: Job) -> None:
    job.input(documents(4))

    output = job.succeed(records_per_chunk=2)

    assert not (output.path / "failed").exists() or not list((output.path / "failed").iterdir())


def test_a_chunk_of_filtered_documents_is_accounted_for(job: Job) -> None:
    job.options["plugin"] = job.plugin("sorting", SORTING)
    job.documents("filter 1", "filter 2", "keep 1", "filter 3")

    output = job.succeed(records_per_chunk=2)

    assert output.ids() == ["keep 1"]
    assert output.stats()["filtered"] == 3
    assert job.verify().rc == 0


def test_one_failed_rollout_leaves_its_siblings(job: Job, server: FakeServer) -> None:
    job.documents("partly", "fully", "fine")

    def fail_some(payload: dict[str, Any], n: int) -> Any:
        return Status(400) if (prompt_of(payload), n) in {("partly", 2), *[("fully", i) for i in range(9)]} else None

    server.behave(fail_some)

    output = job.succeed(rollouts_per_document=3)

    assert {document: len(texts) for document, texts in output.texts().items()} == {"partly": 2, "fine": 3}
    assert list(output.failed()) == ["fully"]
    assert Counter(server.prompts) == {"partly": 3, "fully": 3, "fine": 3}
    stats = output.stats()
    assert (stats["documents"], stats["rows"], stats["failed"]) == (3, 2, 1)
    assert stats["failed_rollouts"] == 1  # those of the failed document are counted with it
    assert job.verify().rc == 0


def test_too_many_failures_stop_the_run_early(job: Job, server: FakeServer) -> None:
    job.input(documents(400))
    server.behave(lambda payload, n: Status(400) if int(prompt_of(payload).split()[1]) % 4 == 0 else None)

    finished = job(max_failure_rate=0.2, max_concurrent_generations=4, records_per_chunk=10)

    assert finished.rc == 3
    assert finished.says("failed", "--max-failure-rate")
    assert 100 <= len(server.requests) < 200

    server.forget()
    output = job.succeed(max_failure_rate=0.3, records_per_chunk=10)
    assert len(server.requests) <= 300
    assert len(output.rows()) == 300
    assert len(output.failed()) == 100


@pytest.mark.parametrize(("failing", "rate", "code"), [(20, 0.1, 3), (2, 0.1, 0), (3, 0.1, 3), (1, 0, 3), (0, 0, 0)])
def test_the_failure_rate_of_few_documents_is_judged_at_the_end(
    job: Job, server: FakeServer, failing: int, rate: float, code: int
) -> None:
    rows = documents(20)
    job.input(rows)
    bad = {row["text"] for row in rows[:failing]}
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) in bad else None)

    assert job(max_failure_rate=rate).rc == code

    assert len(job.output.failed()) == failing
    assert len(job.output.rows()) == 20 - failing
    assert job.verify().rc == 0


def test_retry_failed_runs_only_the_failed_again(sorting: Job, server: FakeServer) -> None:
    sorting.succeed()
    before = sorting.output.stats()
    server.behave(lambda payload, n: None)
    server.forget()
    rows = mixed(30)

    output = sorting.succeed(retry_failed=True)

    assert sorted(server.prompts) == sorted(row["text"] for row in rows if row["text"].startswith(("reject", "raise")))
    assert output.ids() == sorted(ids_of("keep", rows) + ids_of("reject", rows))
    assert sorted(output.failed()) == ids_of("raise", rows)
    stats = output.stats()
    assert (stats["documents"], stats["rows"], stats["filtered"], stats["failed"]) == (30, 20, 5, 5)
    assert stats["requests"] == before["requests"] + 10
    assert sorting.verify().rc == 0


def test_files_completed_by_retry_failed_equal_those_of_a_clean_run(job: Job, server: FakeServer) -> None:
    job.input(mixed(30))
    server.behave(reject)
    job.succeed(records_per_chunk=4)
    assert len(job.output.failed()) == 5
    server.behave(lambda payload, n: None)

    healed = job.succeed(records_per_chunk=4, retry_failed=True)
    clean = job.succeed(records_per_chunk=4, output="clean")

    assert healed.data() == clean.data()
    assert not healed.failures()
    assert {name for name in healed.files() if "failed" in name} == set()


def test_a_plain_rerun_does_not_retry_failed_documents(sorting: Job, server: FakeServer) -> None:
    sorting.succeed()
    server.behave(lambda payload, n: None)
    server.forget()

    output = sorting.succeed()

    assert not server.requests
    assert len(output.failed()) == 10


def test_statistics_sum_over_all_attempts(job: Job, server: FakeServer) -> None:
    job.documents(*[f"fine {number}" for number in range(6)])
    sent: list[str] = []

    def answer(payload: dict[str, Any], n: int) -> Any:
        prompt = prompt_of(payload)
        sent.append(prompt)
        if prompt == "fine 1" and sent.count(prompt) == 1:
            return Status(500)
        if prompt == "fine 2" and sent.count(prompt) == 1:
            return Answer("")
        if prompt == "fine 3" and sent.count(prompt) == 1:
            return Status(400)
        return "three words long"

    server.behave(answer)
    job.succeed()
    first = job.output.stats()
    output = job.succeed(retry_failed=True)

    stats = output.stats()
    assert (stats["documents"], stats["rows"], stats["failed"]) == (6, 6, 0)
    assert stats["requests"] == len(server.requests) == 9
    assert stats["retries"] == {"500": 1, "empty": 1}
    assert stats["completion_tokens"] == 3 * 6
    assert stats["prompt_tokens"] == 2 * len(server.answered) == 2 * 7
    assert stats["seconds"] >= first["seconds"] > 0
    assert stats["tokens_per_second"] > 0
    assert stats["mean_in_flight"] >= 0


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished_output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """The output of one run over documents of all kinds, for tests that damage a copy of it."""
    folder = tmp_path_factory.mktemp("finished")
    with FakeServer() as server:
        job = Job(folder, server)
        server.behave(reject)
        job.options["plugin"] = job.plugin("sorting", SORTING)
        job.input(mixed(30))
        output = job.succeed(records_per_chunk=4)
        job.sdg.close()
    return output


def a_file_is_gone(output: Output) -> str:
    (output.path / "data/00000_00002.parquet").unlink()
    return "00000_00002"


def a_row_is_gone(output: Output) -> str:
    path = output.path / "data/00000_00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    return "00000_00001"


def a_row_is_doubled(output: Output) -> str:
    path = output.path / "data/00000_00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([0] * table.num_rows), path)
    return "00000_00001"


def a_file_is_doubled(output: Output) -> str:
    shutil.copy(output.path / "data/00000_00001.parquet", output.path / "data/00000_00099.parquet")
    return "00000_00099"


def a_file_is_truncated(output: Output) -> str:
    path = output.path / "data/00000_00003.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    return "00000_00003"


def a_file_is_empty(output: Output) -> str:
    (output.path / "data/00000_00003.parquet").write_bytes(b"")
    return "00000_00003"


def a_text_is_edited(output: Output) -> str:
    path = output.path / "data/00000_00001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["rollout_results"][0]["text"] = "another text"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return "00000_00001.parquet has changed since it was written"


def a_failure_is_edited(output: Output) -> str:
    path = output.path / "failed/00000_00000.jsonl"
    path.write_text(path.read_text().replace("error", "errer", 1))
    return "00000_00000"


def a_foreign_failure(output: Output) -> str:
    shutil.copy(output.path / "failed/00000_00000.jsonl", output.path / "failed/00000_00099.jsonl")
    return "failed/00000_00099.jsonl does not belong"


def a_file_of_another_run(output: Output) -> str:
    path = output.path / "data/00000_00001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"sdg.fingerprint": b"0123"}), path)
    with sqlite3.connect(output.state / "00000.sqlite3") as state:  # as an older sdg has written it
        state.execute("UPDATE chunks SET hash = NULL, size = NULL")
    state.close()
    return "belongs to a different run"


def failures_are_gone(output: Output) -> str:
    (output.path / "failed/00000_00000.jsonl").unlink()
    return "00000_00000"


def a_failure_is_gone(output: Output) -> str:
    path = next(path for path in sorted((output.path / "failed").iterdir()) if path.read_text().count("\n") > 1)
    path.write_text(path.read_text().partition("\n")[2])
    return path.stem


def the_state_forgets_a_chunk(output: Output) -> str:
    with sqlite3.connect(next(output.state.glob("*.sqlite3"))) as state:
        columns = [column for _, column, *_ in state.execute("PRAGMA table_info(chunks)")]
        state.execute(f"DELETE FROM chunks WHERE {columns[0]} = 2")
        assert state.total_changes == 1
    state.close()
    return "00000_00002"


def the_state_is_gone(output: Output) -> str:
    next(output.state.glob("*.sqlite3")).unlink()
    return "rank 0 has not begun"


DAMAGES = [
    a_file_is_gone,
    a_row_is_gone,
    a_row_is_doubled,
    a_file_is_doubled,
    a_file_is_truncated,
    a_file_is_empty,
    a_file_of_another_run,
    a_text_is_edited,
    a_failure_is_edited,
    a_foreign_failure,
    failures_are_gone,
    a_failure_is_gone,
    the_state_forgets_a_chunk,
    the_state_is_gone,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_names_what_is_not_accounted_for(
    damage: Callable[[Output], str], finished_output: Output, job: Job
) -> None:
    shutil.copytree(finished_output.path, job.output.path)
    culprit = damage(job.output)

    verified = job.verify()

    assert verified.rc == 1
    assert culprit in verified.stdout + verified.stderr


def test_verify_accepts_what_is_complete_and_changes_nothing(finished_output: Output, job: Job) -> None:
    shutil.copytree(finished_output.path, job.output.path)
    before = job.output.files()

    verified = job.verify()

    assert verified.rc == 0
    assert "30" in verified.stdout
    assert job.output.files() == before


def test_verify_reports_the_documents_that_an_interrupted_run_left(job: Job, server: FakeServer) -> None:
    job.input(documents(10))
    server.behave(lambda payload, n: Status(401) if prompt_of(payload) in {"document 5", PROBE} else None)
    assert job(records_per_chunk=2, max_concurrent_generations=1).rc == 1

    verified = job.verify()

    assert verified.rc == 1
    assert verified.lines or verified.stdout


def test_verify_reports_that_there_is_no_run(job: Job) -> None:
    verified: Finished = job.sdg("verify", "--output", "nowhere")

    assert verified.rc == 1
    assert verified.says("nowhere")


def test_verify_needs_no_server(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    job.succeed()
    server.behave(lambda payload, n: Hang())
    server.stop()

    assert job.verify().rc == 0


def test_verify_reports_an_edited_input(job: Job) -> None:
    job.input(documents(4))
    job.succeed()
    job.input([{**row, "text": row["text"].replace("document 2", "documemt 2")} for row in documents(4)])

    verified = job.verify()

    assert verified.rc == 1
    assert "the input has changed since the run" in verified.stderr


def test_early_failures_count_at_the_end(job: Job, server: FakeServer) -> None:
    job.input(documents(200))
    server.behave(lambda payload, n: Status(400) if int(prompt_of(payload).split()[1]) < 50 else None)
    finished = job(max_concurrent_generations=5, max_failure_rate=0.1)
    assert finished.rc == 3
    assert finished.says("50 of", "--max-failure-rate", "--retry-failed")
    again = job(max_concurrent_generations=5, max_failure_rate=0.1)
    assert again.rc == 3, "a rerun does not turn failures into success"
