"""Regression tests for defects that reviews and trials have found."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import sqlite3
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import Delay, FakeServer, Hang, Raw, Status, prompt_of
from running import Job, documents, wait_until

import sdg
from sdg_plugins.common.waiting import retry_after

KEY = "sk-VERYSECRETKEY0123456789"


def rollout(body: str) -> str:
    """A plugin with one rollout."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return (
        "import asyncio\nimport sdg\n\n@sdg.hookimpl\ndef register_rollouts(register):\n    register('mine', mine)\n\n"
        f"async def mine(document, generate):\n    '''Mine.'''\n{lines}"
    )


def test_a_task_that_a_rollout_cancels_itself_fails_only_its_document(job: Job) -> None:
    job.input(documents(20))
    body = (
        "if document.id in ('d0003', 'd0017'):\n    task = asyncio.ensure_future(asyncio.sleep(9))\n"
        "    task.cancel()\n    await task\nreturn await generate(document.text)"
    )
    output = job.succeed(plugin=job.plugin("mine", rollout(body)), records_per_chunk=5)
    assert len(output.rows()) == 18
    assert {record["error_type"] for record in output.failures()} == {"CancelledError"}
    assert job.verify().rc == 0


def test_an_interruption_that_a_rollout_swallows_is_not_a_failure(job: Job, server: FakeServer) -> None:
    job.input(documents(12))
    server.behave(lambda payload, n: Hang() if n == 1 else None)
    body = (
        "replies = await asyncio.gather(generate('a' + document.text), generate('b'), return_exceptions=True)\n"
        "return replies[0].text"
    )
    options = {"plugin": job.plugin("mine", rollout(body)), "max_concurrent_generations": 8}
    started = job.start(**options)
    while len(server.requests) < 8:
        time.sleep(0.02)
    started.send(signal.SIGTERM)
    time.sleep(0.3)
    started.send(signal.SIGTERM)
    assert started.finish().rc == 143
    server.behave(lambda payload, n: None)
    output = job.succeed(**options)
    assert len(output.rows()) == 12
    assert not output.failures()


def test_fresh_deletes_only_what_a_run_has_written(job: Job) -> None:
    job.documents("one", "two")
    output = job.succeed(state_dir=".")
    strangers = ["package.json", "other.arrow", "output/failed/notes.txt", "output/data/mine.parquet"]
    (output.path / "failed").mkdir(exist_ok=True)
    for name in strangers:
        (job.folder / name).write_text("mine")
    assert job(state_dir=".", fresh=True, output_filename="${chunk_index}.parquet").rc == 1  # because of mine.parquet
    (job.folder / "output/data/mine.parquet").unlink()
    job.succeed(state_dir=".", fresh=True, output_filename="${chunk_index}.parquet")
    assert [path.name for path in (output.path / "data").iterdir()] == ["00000.parquet"]
    for name in strangers[:3]:
        assert (job.folder / name).read_text() == "mine"


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_that_a_server_echoes_is_written_nowhere(job: Job, server: FakeServer, status: int) -> None:
    job.documents("one", "two")
    text = f"{'x' * 285} bad key {KEY}"
    body = json.dumps({"error": {"message": text}}).encode()
    server.behave(lambda payload, n: Raw(body) if status == 200 else Status(status, message=text))
    finished = job(env={"OPENAI_API_KEY": KEY}, max_retries=0)
    written = finished.stdout + finished.stderr
    written += "".join(path.read_bytes().decode("latin1") for path in job.output.path.rglob("*") if path.is_file())
    assert KEY[:8] not in written


def test_early_failures_count_at_the_end(job: Job, server: FakeServer) -> None:
    job.input(documents(200))
    server.behave(lambda payload, n: Status(400) if int(prompt_of(payload).split()[1]) < 50 else None)
    finished = job(max_concurrent_generations=5, max_failure_rate=0.1)
    assert finished.rc == 3
    assert finished.says("50 of", "--max-failure-rate", "--retry-failed")
    again = job(max_concurrent_generations=5, max_failure_rate=0.1)
    assert again.rc == 3, "a rerun does not turn failures into success"


def test_unusual_line_ends_in_a_failed_document_can_be_retried(job: Job, server: FakeServer) -> None:
    job.documents("a\u2028b\u0085c\x0cd", "fine")
    server.behave(lambda payload, n: Status(400) if n == 1 and "fine" not in prompt_of(payload) else None)
    job.succeed()
    assert job.verify().rc == 0
    output = job.succeed(retry_failed=True)
    assert len(output.rows()) == 2


def test_a_fixed_plugin_may_retry_failed_documents(job: Job) -> None:
    job.documents("one", "two")
    job.succeed(plugin=job.plugin("mine", rollout("return 1 / 0 if document.id == 'one' else 'fine'")))
    fixed = job.plugin("mine", rollout("return 'fixed'"))
    assert job(plugin=fixed).rc == 1
    output = job.succeed(plugin=fixed, retry_failed=True)
    assert output.texts() == {"one": ["fixed"], "two": ["fine"]}


def test_categories_and_views_pass_unchanged(job: Job) -> None:
    categories = pa.array(["a", "b", "a", "c"]).dictionary_encode()
    views = pa.array(["w", "x", "y", "z"], pa.string_view())
    table = pa.table({"text": pa.array(["1", "2", "3", "4"]), "category": categories, "view": views})
    path = job.input(table, row_group_size=2)
    output = job.succeed()
    assert output.table().column("category").to_pylist() == ["a", "b", "a", "c"]
    assert output.table().column("view").to_pylist() == pq.read_table(path).column("view").to_pylist()


def test_a_folder_of_several_formats_is_refused_and_backups_are_not_read(job: Job, server: FakeServer) -> None:
    folder = job.folder / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "a.jsonl.bak").write_text('{"text": "a"}\n')
    job.options["input"] = folder
    assert len(job.succeed().rows()) == 1
    (folder / "b.csv").write_text("text\nb\n")
    finished = job(output="other")
    assert finished.rc == 2
    assert finished.says("csv", "jsonl")


def test_output_named_gz_is_compressed(job: Job) -> None:
    job.documents("one", "two")
    name = "${rank}_${chunk_index}.jsonl.gz"
    output = job.succeed(output_filename=name)
    lines = gzip.decompress((output.path / "data" / "00000_00000.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["one", "two"]
    assert job.verify().rc == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("inf", None), ("nan", None), ("3e6", 86_400), ("-5", 0), ("2.5", 2.5), ("soon", None), ("", None)],
)
def test_any_retry_after_is_a_bounded_pause_or_none(value: str, seconds: float | None) -> None:
    assert retry_after({} if value is None else {"Retry-After": value}) == seconds


def test_servers_with_different_models_are_refused(job: Job, servers: Any) -> None:
    job.documents("one")
    other = servers()
    other.models = ["another"]
    finished = job(base_url=[job.server.url, other.url], model=job.server.models[0])
    assert finished.rc == 1
    assert finished.says("another", job.server.models[0])


def test_a_run_starts_without_one_dead_server_of_two(job: Job) -> None:
    job.documents("one", "two", "three")
    finished = job(base_url=["http://127.0.0.1:9", job.server.url])
    assert finished.rc == 0
    assert "127.0.0.1:9" in finished.stderr
    assert len(job.output.rows()) == 3


def test_a_csv_header_with_a_duplicate_name_is_refused(job: Job) -> None:
    (job.folder / "twice.csv").write_text("text,a,a\nx,1,2\n")
    finished = job(input="twice.csv")
    assert finished.rc == 1
    assert finished.says("twice.csv", "twice")


def test_a_resource_that_fails_is_named(job: Job) -> None:
    code = rollout("return ''").replace("(document, generate)", "(document, generate, broken)") + (
        "\n@sdg.hookimpl\ndef register_resources(register):\n    register('broken', broken)\n\n"
        "def broken(run):\n    '''Broken.'''\n    raise ValueError('no such thing')\n"
    )
    job.documents("one")
    finished = job(plugin=job.plugin("mine", code))
    assert finished.rc == 1
    assert finished.says("broken", "no such thing", "mine.py")


def test_a_plugin_that_blocks_cannot_delay_the_end_of_the_run(job: Job, server: FakeServer) -> None:
    job.documents("one", "two")
    body = "await asyncio.to_thread(__import__('time').sleep, 60)\nreturn 'x'"
    started = job.start(plugin=job.plugin("mine", rollout(body)))
    while not (job.output.state / "00000.sqlite3").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.finish().rc == 143
    assert time.monotonic() - began < 20


# ── Found by new users ──────────────────────────────────────────────────────────────────────────────────────────────


def test_fresh_deletes_nothing_if_a_file_does_not_belong_to_a_run(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed()
    before = job.output.files()
    (job.output.path / "data" / "mine.parquet").write_bytes(b"mine")

    refused = job(fresh=True)

    assert refused.rc == 1
    assert refused.says("mine.parquet", "move it away")
    assert job.output.files() == before | {"data/mine.parquet": b"mine"}
    assert len(server.requests) == 5


def test_a_file_that_was_deleted_is_written_again(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    before = job.succeed(records_per_chunk=10).data()
    (job.output.path / "data" / "00000_00001.parquet").unlink()
    server.forget()

    again = job(records_per_chunk=10)

    assert again.rc == 0
    assert "00000_00001.parquet" in again.stderr
    assert job.output.data() == before
    assert sorted(server.prompts) == [f"document {number}" for number in range(10, 20)]
    assert job.output.stats()["rows"] == 30
    assert job.verify().rc == 0


def test_the_state_of_one_output_is_not_taken_for_another(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed(state_dir="state")

    other = job(state_dir="state", output="other")
    job.output.path.rename(job.folder / "moved")
    moved = job(state_dir="state", output="moved")

    assert other.rc == 1
    assert other.says("state", "belongs to the output output")
    assert moved.rc == 0
    assert len(server.requests) == 5


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(job: Job, tmp_path: Path) -> None:
    job.input(documents(3))
    home = tmp_path / "home"
    home.mkdir()
    (home / "echo.py").write_text((job.folder / "echo.py").read_text())
    env = {"HOME": str(home)}

    finished = job(env=env, plugin="~/echo.py", output="~/out", state_dir="~/state")

    assert finished.rc == 0, finished
    assert (home / "out" / "data" / "00000_00000.parquet").exists()
    assert (home / "state" / "run.json").exists()
    assert not list(tmp_path.glob("*~*"))
    assert job.sdg("verify", "--output", "~/out", "--state-dir", "~/state", **env).rc == 0


def test_hidden_folders_and_outputs_of_runs_are_not_read(job: Job, server: FakeServer) -> None:
    folder = job.folder / "project"
    for name in ("", ".ipynb_checkpoints", "_temporary"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "docs.jsonl").write_text('{"text": "document"}\n')
    options = {"input": "project", "output": "project/output/x", "output_filename": "${chunk_index}.jsonl"}

    job.succeed(**options)
    again = job(**options)

    assert again.rc == 0, again
    assert server.prompts == ["document"]


@pytest.mark.parametrize("option", ["input", "output", "state_dir"])
def test_an_empty_option_is_not_the_default(job: Job, option: str) -> None:
    job.input(documents(3))
    finished = job(**{option: ""})
    assert finished.rc == 2
    assert finished.says(f"--{option.replace('_', '-')} is empty")


def test_retry_failed_without_a_run_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    finished = job(retry_failed=True)
    assert finished.rc == 1
    assert finished.says("there is no run", "--retry-failed", "--output")
    assert not server.requests


@pytest.mark.parametrize("name", ["../${chunk_index}.jsonl", "/tmp/${chunk_index}.jsonl"])
def test_files_are_not_written_outside_the_output(job: Job, name: str) -> None:
    job.input(documents(3))
    finished = job(output_filename=name)
    assert finished.rc == 2
    assert finished.says("--output-filename", "must not contain a folder")


@pytest.mark.parametrize("path", ["/chat/completions", "/completions/"])
def test_a_base_url_may_be_the_url_of_an_endpoint(job: Job, server: FakeServer, path: str) -> None:
    job.input(documents(3))
    job.succeed(base_url=server.url + path)
    assert len(server.answered) == 3


@pytest.mark.parametrize("odd", ["plain text", [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]])
def test_an_unusual_chat_among_others_fails_alone(job: Job, odd: object) -> None:
    chats: list[object] = [[{"role": "user", "content": f"hello {number}"}] for number in range(20)]
    chats[0], chats[7] = odd, [{"role": "user", "content": "hello", "name": 3}]
    chats[8] = [{"role": "user", "content": "hello", "name": "x"}]
    job.input([{"id": f"{number}", "messages": chat} for number, chat in enumerate(chats)], "chats.jsonl")

    output = job.succeed(prompt_column="messages")

    assert len(output.rows()) == 18
    assert {record["document"]["row"] for record in output.failures()} <= {0, 7, 8}
    assert all("messages" in record["error"] for record in output.failures())


def test_columns_of_any_type_can_be_verified_and_completed_as_jsonl(job: Job, server: FakeServer) -> None:
    maps = pa.array([[("k", 1)], [], None, [("a", 2)]], pa.map_(pa.string(), pa.int64()))
    job.input(pa.table({"text": ["a", "b", "reject", "d"], "map": maps, "binary": [b"\xff", b"", None, b"x"]}))
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) == "reject" else None)
    options = {"output_filename": "${chunk_index}.jsonl", "records_per_chunk": 2}
    job.succeed(**options)
    assert job.verify().rc == 0
    server.behave(lambda payload, n: None)

    job.succeed(retry_failed=True, **options)

    assert job.verify().rc == 0
    lines = [json.loads(line) for file in job.output.data().values() for line in file.splitlines()]
    assert [line["text"] for line in lines] == ["a", "b", "reject", "d"]


@pytest.mark.parametrize("how", ["failures", "signal"])
def test_the_card_of_a_run_that_ended_early_says_so_and_names_no_machine(
    job: Job, server: FakeServer, how: str
) -> None:
    job.options["plugin"] = job.plugin(
        "broken",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("broken", broken)

        async def broken(document, generate):
            reply = await generate(document.text)
            if document.text.endswith(("3", "7")):
                raise ValueError("no http://gpu-7.cluster:8000/v1 for /scratch/me/data on host gpu-7:8000, 10.0.0.7")
            return reply
        """,
    )
    job.input(documents(300))
    server.behave(lambda payload, n: Hang() if how == "signal" and prompt_of(payload) > "document 2" else None)
    started = job.start(records_per_chunk=10, max_concurrent_documents=20, max_failure_rate=0.1)
    if how == "signal":
        wait_until(lambda: job.output.written())
        started.send(signal.SIGTERM)

    assert started.finish().rc == {"failures": 3, "signal": 143}[how]

    card = (job.output.path / "README.md").read_text()
    assert "**Ended early**" in card
    assert not [word for word in ("gpu-7", "scratch", "10.0.0.7", str(job.folder)) if word in card]


# ── Found by hostile tests ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupt_works_when_standard_error_is_closed(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    server.behave(lambda payload, n: Delay(0.5))
    started = job.start(max_concurrent_generations=1)
    wait_until(lambda: server.answered)
    assert started.process.stderr is not None
    started.process.stderr.close()
    started.process.stderr = None

    started.send(signal.SIGINT)

    assert started.process.wait(20) == 130
    assert len(server.requests) < 10


@pytest.mark.parametrize(
    "name", ["${rank}/${chunk_index}.parquet", "$rank-${chunk_index}.parquet", "a$$${chunk_index}"]
)
def test_file_names_that_could_not_be_found_again_are_refused(job: Job, name: str) -> None:
    job.input(documents(3))
    finished = job(output_filename=name)
    assert finished.rc == 2
    assert finished.says("--output-filename")


@pytest.mark.parametrize("tokens", [2**64 - 1, 2**62, -5, True, None, "7", {}])
def test_absurd_token_counts_are_ignored(job: Job, server: FakeServer, tokens: object) -> None:
    job.input(documents(5))
    body = {"choices": [{"message": {"content": "fine"}}], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}
    server.behave(lambda payload, n: Raw(json.dumps(body).encode()))
    output = job.succeed()
    assert output.stats()["completion_tokens"] == 5
    assert output.stats()["prompt_tokens"] in {0, 5}


def test_dates_beyond_pythons_range_do_not_block_failed_documents(job: Job) -> None:
    far = pa.array([2**62, 0, -(2**62)], pa.timestamp("us", tz="Asia/Tokyo"))
    job.input(pa.table({"text": ["a", None, "c"], "when": far, "day": pa.array([2**30, 1, 2], pa.date32())}))

    for filename in ("${chunk_index}.parquet", "${chunk_index}.jsonl"):
        output = job.succeed(output=filename[-5:], output_filename=filename)
        assert output.stats()["rows"] == 2
        assert len(output.failures()) == 1


@pytest.mark.parametrize("form", ["slash", "unicode", "reason"])
def test_a_key_that_comes_back_in_another_form_is_written_nowhere(job: Job, server: FakeServer, form: str) -> None:
    key = "sk-se/cret-0123456789abcdef"
    job.input(documents(3))
    written = {"slash": key.replace("/", "\\/"), "unicode": "".join(f"\\u{ord(c):04x}" for c in key), "reason": key}[
        form
    ]
    server.behave(lambda payload, n: Raw(f'{{"error": {{"message": "bad key {written}"}}}}'.encode(), 400))

    finished = job(env={"OPENAI_API_KEY": key}, api_key_env="OPENAI_API_KEY")

    everything = finished.stdout + finished.stderr + json.dumps(job.output.failures())
    assert "bad key ***" in everything
    assert key not in everything


BREAKING = """
    import contextlib
    import sdg

    @sdg.hookimpl
    def register_readers(register):
        register("stop", lambda run: next(iter(())))

    @sdg.hookimpl
    def register_resources(register):
        register("leaving", leaving)

    @sdg.hookimpl
    def register_rollouts(register):
        register("breaking", breaking)
        register("with_resource", with_resource)

    @contextlib.asynccontextmanager
    async def leaving(run):
        raise SystemExit(0)
        yield

    class Speechless(Exception):
        def __str__(self):
            raise ValueError("no words")

    async def breaking(document, generate):
        if document.text == "document 1":
            raise Speechless
        return await generate(document.text)

    async def with_resource(document, generate, leaving):
        return "never"

    @sdg.hookimpl
    def chunk_written(run, chunk):
        raise SystemExit("bye")
"""


def test_exits_in_plugins_are_reported_and_end_no_more_than_they_must(job: Job) -> None:
    file = job.plugin("breaking", BREAKING)
    job.input(documents(5))

    output = job.succeed(plugin=f"{file}:breaking")
    leaving = job(plugin=f"{file}:with_resource", output="leaving")
    reader = job(plugin=f"{file}:breaking", input="stop://x", output="stop")

    assert len(output.rows()) == 4
    assert [record["error_type"] for record in output.failures()] == ["Speechless"]
    assert leaving.rc == 1
    assert "SystemExit" in leaving.message
    assert reader.rc == 1
    assert "StopIteration" in reader.message


def test_an_error_with_half_a_character_is_retried(job: Job, server: FakeServer) -> None:
    job.input(documents(2))
    body = rb'{"error": {"message": "bad \ud800 x"}}'
    server.behave(lambda payload, n: Raw(body, 503) if n == 1 else None)
    assert len(job.succeed().rows()) == 2


def test_results_of_more_than_a_gigabyte_are_written_in_pieces(tmp_path: Path) -> None:
    async def outcomes() -> tuple[list[bytes], int]:
        async with sdg.Store.open(tmp_path / "state.sqlite3", Counter()) as store:
            limit = store._db._conn.setlimit  # must be called in the connection's thread
            await store._db._execute(limit, sqlite3.SQLITE_LIMIT_LENGTH, 5000)  # the real one is too large for a test
            chunk = sdg.Chunk(1, 0, 100)
            for position in range(100):
                store.finished(1 << 32 | position, "row", b'"%s"' % (b"x" * 500))
            await store.flush()
            lists = await store.outcomes_of(chunk)
            return lists, len(await store.finished_in(chunk))

    lists, count = asyncio.run(outcomes())

    assert count == 100
    assert [position for part in lists for position, _, _ in json.loads(part)] == list(range(100))


def test_nan_is_not_json(job: Job) -> None:
    job.input(documents(2))
    finished = job(generation='{"n": NaN}')
    assert finished.rc == 2
    assert finished.says("--generation", "invalid JSON")


def test_say_works_while_tqdm_is_being_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))  # as a signal during its import finds it
    sdg.say("interrupted")
    assert capsys.readouterr().err == "sdg: interrupted\n"
