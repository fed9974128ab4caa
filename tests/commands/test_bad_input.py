"""Mistakes of users, and failures: one clear line names the object and the way out, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, Hang, free_port, prompt_of
from running import ECHO, Job, documents, wait_until


@pytest.fixture
def silent_job(job: Job, server: FakeServer) -> Iterator[Job]:
    """A job that must end before it sends a request."""
    job.input(documents(3))
    yield job
    assert not server.requests
    assert not job.output.data()


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_file_is_named(silent_job: Job) -> None:
    finished = silent_job(input="nowhere.parquet")

    assert finished.rc == 1
    assert finished.says("nowhere.parquet", "no such file")


def test_an_empty_folder_is_named(silent_job: Job) -> None:
    (silent_job.folder / "hollow").mkdir()

    finished = silent_job(input="hollow")

    assert finished.rc in {1, 2}
    assert finished.says("hollow", "no files")


def test_a_glob_without_match_is_named(silent_job: Job) -> None:
    finished = silent_job(input="nowhere-*.parquet")

    assert finished.rc == 1
    assert finished.says("nowhere-*.parquet")


def test_an_unknown_suffix_is_named_with_the_known_ones(silent_job: Job) -> None:
    (silent_job.folder / "letters").mkdir()
    (silent_job.folder / "letters" / "a.docx").write_text("not for us")

    for letters in ("letters", "letters/a.docx"):
        finished = silent_job(input=letters)
        assert finished.rc in {1, 2}
        assert finished.says("letters", "parquet", "jsonl", "csv")


def test_a_missing_column_names_those_that_exist(silent_job: Job) -> None:
    finished = silent_job(prompt_column="txet")
    assert finished.rc == 1
    assert finished.says("txet", "id, text", "--prompt-column")

    finished = silent_job(id_column="uuid")
    assert finished.rc == 1
    assert finished.says("uuid", "id, text", "--id-column")


def test_a_truncated_parquet_file_is_named(silent_job: Job) -> None:
    path = silent_job.input(documents(1000))
    path.write_bytes(path.read_bytes()[:-20])

    finished = silent_job()

    assert finished.rc == 1
    assert finished.says("input.parquet")


def test_a_parquet_file_with_a_damaged_page_is_named_and_the_rest_is_kept(job: Job, server: FakeServer) -> None:
    path = job.input(documents(2000), row_group_size=500, compression="zstd")
    damaged = pq.ParquetFile(path).metadata.row_group(2).column(1)
    content = bytearray(path.read_bytes())
    start = damaged.data_page_offset
    content[start : start + damaged.total_compressed_size // 2] = b"\xff" * (damaged.total_compressed_size // 2)
    path.write_bytes(content)

    finished = job(records_per_chunk=500)

    assert finished.rc == 1
    assert finished.says("input.parquet")
    assert len(set(server.prompts)) == len(server.prompts)


def test_a_file_that_is_not_parquet_is_named(silent_job: Job) -> None:
    (silent_job.folder / "notes.parquet").write_text("dear diary")

    finished = silent_job(input="notes.parquet")

    assert finished.rc == 1
    assert finished.says("notes.parquet")


def test_an_empty_table_is_a_run_without_documents(job: Job, server: FakeServer) -> None:
    job.input(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}))

    output = job.succeed()

    assert output.rows() == []
    assert not server.requests
    assert job.verify().rc == 0


def test_an_input_with_a_results_column_asks_for_another_name(job: Job) -> None:
    job.input([{"id": "a", "text": "fine", "rollout_results": "old"}])

    finished = job()
    assert finished.rc in {1, 2}
    assert finished.says("rollout_results", "--results-column")

    (row,) = job.succeed(results_column="echoes").rows()
    assert row["rollout_results"] == "old"
    assert row["echoes"][0]["text"].startswith("answer ")


def test_names_that_are_not_utf8_are_refused_before_anything_is_sent(job: Job, server: FakeServer) -> None:
    name = os.fsdecode(b"odd\xff.jsonl")
    job.input([{"id": "a", "text": "a"}], name)
    folder = job.input([{"id": "a", "text": "a"}], "input.jsonl").parent

    for options in ({"input": name}, {"input": folder}, {"output": os.fsdecode(b"out\xff")}):
        refused = job(**options)
        assert refused.rc in {1, 2}
        assert refused.says("the name is not UTF-8: rename it")
    assert not server.requests


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_null_or_empty_text_fails_its_document_alone(job: Job, server: FakeServer) -> None:
    job.input([{"id": "null", "text": None}, {"id": "empty", "text": ""}, {"id": "fine", "text": "fine"}])

    output = job.succeed()

    assert output.ids() == ["fine"]
    assert {record["error_type"] for record in output.failures()} == {"BadDocument"}
    assert list(output.failed()) == ["null", "empty"]
    assert all("text" in record["error"] for record in output.failures())
    assert server.prompts == ["fine"]
    assert job.output.stats()["empty"] == 2


def test_empty_texts_have_a_count_of_their_own_and_do_not_count_for_the_failure_rate(job: Job) -> None:
    job.input([{"id": f"d{number}", "text": "" if number % 2 else f"text {number}"} for number in range(4)])

    finished = job(max_failure_rate=0, max_documents=3)
    assert finished.rc == 0
    assert "empty   1 document without a text in 'text'" in finished.stdout
    assert job(max_failure_rate=0).rc == 0  # the chunk grows
    again = job(max_failure_rate=0, retry_failed=True)  # they are as empty as before
    assert again.rc == 0
    assert {name: job.output.stats()[name] for name in ("rows", "failed", "empty")} == {
        "rows": 2,
        "failed": 2,
        "empty": 2,
    }
    assert job.sdg("show", "--output", job.output.path, "--failed").stdout.count("is empty") == 2
    assert job.verify().rc == 0
    job.documents("", " ")
    assert job(output="nothing", max_failure_rate=0.5).rc == 3  # the wrong column, perhaps


def test_a_column_that_is_not_text_is_named_with_its_type(job: Job, server: FakeServer) -> None:
    job.input([{"id": "a", "text": 5}, {"id": "b", "text": 6}])

    finished = job()

    assert not server.requests
    if finished.rc == 0:
        assert {record["error_type"] for record in job.output.failures()} == {"BadDocument"}
    else:
        assert finished.rc == 1
        assert finished.says("text", "int64", "--prompt-column")


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def test_a_wrong_message_fails_its_document_alone(job: Job, server: FakeServer) -> None:
    chats = {
        "null": None,
        "no messages": [],
        "no role": [{"role": None, "content": "hello"}],
        "no content": [{"role": "user", "content": None}],
        "null message": [None],
        "fine": [{"role": "user", "content": "fine"}],
    }
    job.input(pa.table({"id": list(chats), "chat": pa.array(chats.values(), MESSAGES)}))

    output = job.succeed(prompt_column="chat")

    assert output.ids() == ["fine"]
    assert list(output.failed()) == [name for name in chats if name != "fine"]
    assert {record["error_type"] for record in output.failures()} == {"BadDocument"}
    assert all(record["error"] for record in output.failures())
    assert server.prompts == ["fine"]


def test_messages_of_another_shape_are_named(job: Job, server: FakeServer) -> None:
    job.input([{"id": "a", "chat": [{"speaker": "human", "value": "hello"}]}])

    finished = job(prompt_column="chat")

    assert not server.requests
    if finished.rc == 0:
        (record,) = job.output.failures()
        said = record["error"]
    else:
        assert finished.rc == 1
        said = finished.message
    assert "chat" in said
    assert "role" in said
    assert "content" in said


JSONL = {
    "fine": b'{"text": "fine"}',
    "half": b'{"text": "half',
    "word": b"hello",
    "list": b'["a", "list"]',
    "number": b"5",
    "not utf-8": b'{"text": "caf\xe9"}',
    "control": b'{"text": "a\x01b"}',
    "two values": b'{"text": "one"} {"text": "two"}',
    "unicode": '{"text": "naïve ☃ 🎉 \u2028 line"}'.encode(),
    "nul": b'{"text": "nul \\u0000 here"}',
    "last": b'{"text": "last, without a newline"}',
}


def test_a_broken_line_fails_its_document_with_file_and_line(job: Job, server: FakeServer) -> None:
    (job.folder / "lines.jsonl").write_bytes(b"\n".join([*JSONL.values()]))
    job.options["input"] = "lines.jsonl"
    names = list(JSONL)

    output = job.succeed()

    good = {"fine", "unicode", "nul", "last"}
    assert [row["text"] for row in output.rows()] == [json.loads(JSONL[name])["text"] for name in names if name in good]
    assert [row["id"] for row in output.rows()] == [
        f"lines.jsonl/{number}" for number, name in enumerate(names) if name in good
    ]
    failed = output.failed()
    for number, name in enumerate(names):
        if name not in good:
            record = failed[f"lines.jsonl/{number}"]
            assert record["error_type"] == "BadRow", name
            assert "lines.jsonl" in record["error"], name
            assert str(number + 1) in record["error"], name
    assert len(failed) == len(names) - len(good)
    assert len(server.requests) == len(good)
    assert job.verify().rc == 0


def test_a_blank_line_is_not_a_row(job: Job) -> None:
    (job.folder / "lines.jsonl").write_bytes(b'\n{"text": "one"}\n\n  \n{"text": "two"}\r\n\n')

    output = job.succeed(input="lines.jsonl")

    assert [row["text"] for row in output.rows()] == ["one", "two"]
    assert not output.failures()


def test_a_lone_surrogate_harms_no_other_document(job: Job) -> None:
    (job.folder / "lines.jsonl").write_bytes(
        b'{"id": "fine", "text": "fine"}\n{"id": "lone", "text": "a \\ud800 word"}\n{"id": "last", "text": "last"}\n'
    )

    output = job.succeed(input="lines.jsonl")

    assert {"fine", "last"} <= set(output.ids())
    assert len(output.ids()) + len(output.failures()) == 3
    assert job.verify().rc == 0


def test_text_that_is_not_utf8_in_parquet_harms_no_other_document(job: Job) -> None:
    texts = pa.array([b"fine", b"caf\xe9", b"\xed\xa0\x80 surrogate", b"last"]).view(pa.string())
    job.input(pa.table({"id": ["fine", "latin", "surrogate", "last"], "text": texts}))

    output = job.succeed()

    assert output.table()["id"].to_pylist() == ["fine", "last"]
    assert sorted(output.failed()) == ["latin", "surrogate"]
    assert job.verify().rc == 0


def test_a_surrogate_in_an_answer_harms_no_other_document(job: Job, server: FakeServer) -> None:
    job.documents("fine", "odd", "nul")
    answers = {"fine": "fine", "odd": "half of a pair: \ud83c", "nul": "a \x00 in the answer"}
    server.behave(lambda payload, n: answers[prompt_of(payload)])

    output = job.succeed(max_retries=0)

    assert output.texts()["fine"] == ["fine"]
    assert output.texts()["nul"] == ["a \x00 in the answer"]
    assert len(output.ids()) + len(output.failures()) == 3


def test_nul_and_a_document_of_10_mb_pass_unchanged(job: Job, server: FakeServer) -> None:
    texts = {"nul": "a \x00 b", "long": "word " * 2_000_000, "fine": "fine"}
    job.input([{"id": name, "text": text} for name, text in texts.items()])

    output = job.succeed()

    assert {row["id"]: row["text"] for row in output.rows()} == texts
    assert set(server.prompts) == set(texts.values())


def test_a_long_document_in_jsonl_passes_unchanged(job: Job, server: FakeServer) -> None:
    job.input([{"id": "long", "text": "word " * 2_000_000}, {"id": "fine", "text": "fine"}], "input.jsonl")

    assert job.succeed().ids() == ["long", "fine"]
    assert {len(prompt) for prompt in server.prompts} == {10_000_000, 4}


def test_duplicate_ids_are_all_kept(job: Job, server: FakeServer) -> None:
    rows = [{"id": name, "text": text} for name, text in [("a", "one"), ("a", "two"), ("b", "three"), ("a", "one")]]
    job.input(rows)

    output = job.succeed(records_per_chunk=3)

    assert [{"id": row["id"], "text": row["text"]} for row in output.rows()] == rows
    assert all(len(row["rollout_results"]) == 1 for row in output.rows())
    assert output.stats()["documents"] == 4
    assert job.verify().rc == 0


def test_ids_that_are_numbers_or_null_are_accounted_for(job: Job) -> None:
    job.input(pa.table({"id": pa.array([7, None, 9]), "text": ["seven", "none", "nine"]}))

    output = job.succeed()

    assert len(output.table()) + len(output.failures()) == 3
    assert job.verify().rc == 0


# ── Disks and state ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unwritable_output_is_named(job: Job, server: FakeServer) -> None:
    (job.folder / "occupied").write_text("a file")
    job.input(documents(3))

    finished = job(output="occupied/output")

    assert finished.rc == 1
    assert finished.says("occupied")
    assert not server.requests


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root can mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


FULL_WHILE_READING = (
    ECHO
    + """
    import errno

    sdg.COMMIT_INTERVAL = 2.0  # so that the last commit, at the end, completes chunks

    from sdg_plugins.common import chunks

    class Full(chunks.OpenChunk):
        def __init__(self, chunk, *arguments):
            if chunk.index == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().__init__(chunk, *arguments)

    chunks.OpenChunk = Full
"""
)


def test_chunks_that_are_complete_when_the_disk_is_full_are_written_by_the_next_run(
    job: Job, server: FakeServer
) -> None:
    job.input(documents(20))
    echo = job.options["plugin"]
    source = echo.read_text()
    job.plugin(echo.stem, FULL_WHILE_READING)

    finished = job(records_per_chunk=5, max_concurrent_documents=5)

    assert finished.rc == 1
    assert finished.says("disk is full")
    answered = set(server.prompts)
    echo.write_text(source)
    server.forget()
    output = job.succeed(records_per_chunk=5, accept_edited_plugin=True)
    assert output.ids() == [row["id"] for row in documents(20)]
    assert not answered & set(server.prompts)


if os.geteuid() == 0:  # the others have test_a_full_disk_at_any_durable_step_loses_and_duplicates_nothing

    def test_a_full_disk_stops_the_run_and_loses_nothing(job: Job, server: FakeServer, small_disk: Path) -> None:
        rows = [{"id": f"d{number:04}", "text": os.urandom(40_000).hex()} for number in range(150)]  # 6 MB in files
        job.input(rows)
        options = {"records_per_chunk": 5, "max_concurrent_generations": 4}
        expected = job.succeed(output="undisturbed", **options).data()
        server.forget()

        finished = job(output="disk/output", **options)
        assert finished.rc == 1
        assert "the disk is full" in finished.message  # there may be a second line, if not even the card can be written
        on_the_way = job.output_of(output="disk/output")
        written = on_the_way.ids()
        assert len(written) < 150
        kept = {row["text"] for row in rows if row["id"] in set(written)}

        server.forget()
        again = job(output="disk/output", **options)
        assert again.rc == 1
        assert "the disk is full" in again.message

        grow(small_disk)
        output = job.succeed(output="disk/output", **options)

        assert output.data() == expected
        assert not kept & set(server.prompts)
        assert {path.name[0] for path in (output.path / "data").iterdir()} == {"0"}

    def test_verify_works_on_a_read_only_disk(job: Job, server: FakeServer, small_disk: Path) -> None:
        job.input(documents(8))
        server.behave(lambda payload, n: Hang() if server.prompts[-1] == "document 7" else None)
        running = job.start(output="disk/output", records_per_chunk=2)
        state = job.output_of(output="disk/output").state / "00000.sqlite3"
        wait_until(lambda: len(job.output_of(output="disk/output").written()) == 3)
        with contextlib.closing(sqlite3.connect(state, timeout=30)) as db:
            wait_until(lambda: db.execute("SELECT count(*) FROM chunks WHERE written").fetchone() == (3,))
        running.process.kill()  # leaves a write-ahead log
        running.finish()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

        verified = job.verify(output="disk/output")

        assert verified.rc == 1
        assert "6 documents: 6 rows, 0 filtered, 0 failed" in verified.stdout
        assert "not finished: 1 chunk with 2 documents" in verified.stdout

    def test_a_read_only_output_is_named(job: Job, server: FakeServer, small_disk: Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        job.input(documents(3))

        finished = job(output="disk/output")

        assert finished.rc == 1
        assert finished.says("disk", "read-only")
        assert not server.requests


def test_a_corrupt_state_is_named_with_the_way_out(job: Job, server: FakeServer) -> None:
    job.input(documents(50))
    before = job.succeed(records_per_chunk=5).data()
    state = next(job.output.state.glob("*.sqlite3"))
    content = state.read_bytes()
    server.forget()

    for damage in (b"garbage " * 1000, content[:5000], content[:100] + b"\xff" * 3000 + content[3100:]):
        state.write_bytes(damage)
        finished = job(records_per_chunk=5)
        assert finished.rc == 1, damage[:20]
        assert finished.says(".sdg", "--fresh")
    assert not server.requests
    assert job.output.data() == before

    assert len(job.succeed(records_per_chunk=5, fresh=True).rows()) == 50


def test_a_corrupt_run_json_is_named(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed()
    server.forget()

    for damage in ("{", "[]", "{}", ""):
        (job.output.state / "run.json").write_text(damage)
        finished = job()
        assert finished.rc == 1, damage
        assert finished.says("run.json", "--fresh")
    assert not server.requests


def test_state_of_another_version_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed()
    server.forget()
    state = sqlite3.connect(next(job.output.state.glob("*.sqlite3")))
    state.execute("PRAGMA user_version=999")
    state.commit()
    state.close()

    finished = job()

    assert finished.rc == 1
    assert finished.says("version 999", "--fresh")
    assert not server.requests


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_connection_is_named(job: Job) -> None:
    job.input(documents(3))
    port = free_port()

    finished = job(base_url=f"http://127.0.0.1:{port}/v1")

    assert finished.rc == 1
    assert finished.says(f"127.0.0.1:{port}", "--base-url")


def test_an_address_without_http_is_named(job: Job) -> None:
    job.input(documents(3))

    finished = job(base_url="localhost:8000")

    assert finished.rc in {1, 2}
    assert finished.says("localhost:8000", "--base-url")


def test_an_endpoint_without_address_asks_for_one(silent_job: Job) -> None:
    finished = silent_job(base_url=None, server="endpoint")

    assert finished.rc in {1, 2}
    assert finished.says("--base-url")


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_of_one_name_are_refused_unless_rows_do_without_them(job: Job, server: FakeServer) -> None:
    job.input(pa.table([["one"], ["two"], ["three"]], names=["text", "x", "x"]))
    refused = job()
    assert refused.rc == 1
    assert refused.says("the input has 2 columns x", "--drop-columns x")
    assert job.succeed(drop_columns="x").rows()[0].keys() == {"text", "id", "rollout_results"}
    job.input(pa.table([["one"], ["two"]], names=["text", "text"]))
    assert job(output="other").says("--prompt-column text", "2 columns of this name")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_filename": "all.parquet"}, ["--output-filename", "${chunk_index}"]),
        ({"records_per_chunk": 0}, ["--records-per-chunk"]),
        ({"rank": 2, "world_size": 2}, ["--rank", "--world-size"]),
        ({"generation": "{"}, ["--generation", "JSON"]),
        ({"generation": '{"messages": []}'}, ["--generation", "`messages` comes from the rollout"]),
        ({"generation": '{"model": "other"}'}, ["--generation", "`model` comes from --model"]),
        ({"output": "rows.jsonl"}, ["rows.jsonl: the output is a folder", "--output-filename"]),
        ({"prompt_template": "@nowhere.txt", "plugin": "prompt"}, ["--prompt-template", "nowhere.txt"]),
        ({"max_failure_rate": 2}, ["--max-failure-rate"]),
        ({"max_concurrent_generation": 5}, ["--max-concurrent-generation"]),
        ({"config": "nowhere.toml"}, ["nowhere.toml"]),
        ({"server": "vlmm"}, ["vlmm", "did you mean vllm?"]),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_an_invalid_option_is_a_usage_error(options: dict[str, Any], words: list[str], silent_job: Job) -> None:
    finished = silent_job(**options)

    assert finished.rc == 2
    assert finished.says(*words)


def test_an_unknown_option_in_the_config_is_named(silent_job: Job) -> None:
    (silent_job.folder / "run.toml").write_text("records_per_chonk = 5\n")

    finished = silent_job(config="run.toml")

    assert finished.rc == 2
    assert finished.says("records-per-chonk")


# ── Plugins ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PLUGIN = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("mine", mine)

    async def mine(document, generate):
        return await generate(document.text)
"""

WRONG_PLUGINS = {
    "no_import": ("import nonexistent_module\n", ["no_import.py:1", "nonexistent_module"]),
    "no_syntax": ("import sdg\n\ndef broken(:\n    pass\n", ["no_syntax", "3"]),
    "raises": ("import sdg\n\nraise RuntimeError('not today')\n", ["raises", "not today", "3"]),
    "misspelled": (PLUGIN.replace("register_rollouts", "register_rolouts"), ["register_rolouts", "register_rollouts"]),
    "wrong_argument": (PLUGIN.replace("(register)", "(registry)"), ["wrong_argument", "registry"]),
    "no_rollout": ("import sdg\n", ["no_rollout", "rollout"]),
    "bad_hook": (PLUGIN.replace("mine)", "unknown_name)", 1), ["bad_hook", "unknown_name"]),
    "not_callable": (PLUGIN.replace('"mine", mine', '"mine", "mine"'), ["not_callable", "mine"]),
    "taken_name": (PLUGIN.replace('"mine"', '"summarize"'), ["taken_name", "summarize"]),
}


@pytest.mark.parametrize("name", WRONG_PLUGINS)
def test_a_wrong_plugin_file_is_named_with_its_mistake(name: str, silent_job: Job) -> None:
    source, words = WRONG_PLUGINS[name]

    finished = silent_job(plugin=silent_job.plugin(name, source))

    assert finished.rc in {1, 2}
    assert finished.says(*words)


def test_a_misspelled_plugin_suggests_near_names(silent_job: Job) -> None:
    finished = silent_job(plugin="sumarize")

    assert finished.rc in {1, 2}
    assert finished.says("sumarize", "summarize")


def test_a_missing_plugin_file_or_module_is_named(silent_job: Job) -> None:
    for plugin in ("./nowhere.py", "nowhere.module:name"):
        finished = silent_job(plugin=plugin)
        assert finished.rc in {1, 2}
        assert finished.says("nowhere")


def test_an_unknown_rollout_of_a_plugin_suggests_its_own(silent_job: Job) -> None:
    finished = silent_job(plugin=f"{silent_job.plugin('plugins', PLUGIN)}:mime")

    assert finished.rc in {1, 2}
    assert finished.says("mime", "mine")


def test_a_rollout_that_raises_fails_its_document_with_file_and_line(job: Job) -> None:
    job.options["plugin"] = job.plugin(
        "clumsy",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("clumsy", clumsy)

        async def clumsy(document, generate):
            reply = await generate(document.text)
            if document.text == "trips":
                raise ValueError("fell over the carpet")
            if document.text == "returns a set":
                return {5}
            return reply
        """,
    )
    job.documents("fine", "trips", "returns a set", "last")

    output = job.succeed()

    assert output.ids() == ["fine", "last"]
    failed = output.failed()
    assert failed["trips"]["error_type"] == "ValueError"
    assert "fell over the carpet" in failed["trips"]["error"]
    assert "clumsy.py" in failed["trips"]["error"]
    assert "11" in failed["trips"]["error"]
    assert "set" in failed["returns a set"]["error"]


def test_a_hook_that_raises_after_a_chunk_is_reported_and_harms_nothing(job: Job) -> None:
    observer = job.plugin(
        "grumpy",
        """
        import sdg

        @sdg.hookimpl
        def chunk_written(run, chunk):
            raise RuntimeError(f"no thanks for chunk {chunk.index}")
        """,
    )
    job.options["plugin"] = [observer, job.options["plugin"]]
    job.input(documents(4))

    finished = job(records_per_chunk=2)

    assert finished.rc == 0
    assert "no thanks for chunk 0" in finished.stderr
    assert "grumpy" in finished.stderr
    assert len(job.output.rows()) == 4


def test_an_interrupted_start_is_clean(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    server.behave(lambda payload, n: Hang())
    running = job.start()
    wait_until(lambda: server.model_requests)
    running.send(signal.SIGINT)
    server.release()

    assert running.finish().rc in {0, 130}


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


@pytest.mark.parametrize(
    "name", ["${rank}/${chunk_index}.parquet", "$rank-${chunk_index}.parquet", "a$$${chunk_index}"]
)
def test_file_names_that_could_not_be_found_again_are_refused(job: Job, name: str) -> None:
    job.input(documents(3))
    finished = job(output_filename=name)
    assert finished.rc == 2
    assert finished.says("--output-filename")


def test_nan_is_not_json(job: Job) -> None:
    job.input(documents(2))
    finished = job(generation='{"n": NaN}')
    assert finished.rc == 2
    assert finished.says("--generation", "invalid JSON")
