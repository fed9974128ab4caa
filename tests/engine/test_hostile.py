"""Rollouts that misbehave, and ends of a run of any kind: no document is lost, doubled, or finished by a stop."""

from __future__ import annotations

import argparse
import asyncio
import base64
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fake_server import Delay, FakeServer
from running import ECHO, ROOT, Job, documents, wait_until

import sdg
from sdg_plugins.commands.stop import explained
from sdg_plugins.common import database

HOSTILE = """
    import asyncio, os, sys, tempfile, time
    import sdg

    class PanicException(BaseException):  # as libraries in Rust raise it
        pass

    @sdg.hookimpl
    def register_rollouts(register):
        register("hostile", hostile)

    async def stubborn():
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                pass

    async def late():
        asyncio.current_task().cancel()
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            return "too slow"

    async def raising(exc):
        raise exc

    async def hostile(document, generate):
        reply = await generate(document.text)
        match document.id:
            case "panic": raise PanicException("index out of bounds")
            case "interrupt": raise KeyboardInterrupt
            case "interrupt in a task": await asyncio.gather(raising(KeyboardInterrupt()))
            case "generator exit": raise GeneratorExit
            case "exit": sys.exit(3)
            case "exit in a task": await asyncio.create_task(raising(SystemExit(3)))
            case "cancelled error": raise asyncio.CancelledError
            case "cancels itself": asyncio.current_task().cancel(); await asyncio.sleep(1)
            case "cancels itself, catches it": return await late()
            case "cancels itself at last": asyncio.current_task().cancel()
            case "closes standard output": sys.stdout.close()
            case "closes standard error": sys.stderr.close()
            case "changes the folder": os.chdir(folder := tempfile.mkdtemp()); os.rmdir(folder)
            case "stops the loop": asyncio.get_running_loop().stop()
            case "leaves a thread": asyncio.get_running_loop().run_in_executor(None, time.sleep, 10**6)
            case "leaves a task": asyncio.create_task(stubborn())
            case "forks": os.fork()
        return reply
"""
FAILING = {
    "panic": "PanicException",
    "interrupt": "KeyboardInterrupt",
    "interrupt in a task": "KeyboardInterrupt",
    "generator exit": "GeneratorExit",
    "exit": "SystemExit",
    "exit in a task": "SystemExit",
    "cancelled error": "CancelledError",
    "cancels itself": "CancelledError",
}
HARMLESS = [
    "cancels itself, catches it",
    "cancels itself at last",
    "closes standard output",
    "closes standard error",
    "changes the folder",
    "stops the loop",
    "leaves a thread",
    "leaves a task",
    "forks",
]


@pytest.mark.parametrize("rollouts", [1, 2])
def test_one_hostile_document_fails_alone_and_blocks_nothing(job: Job, rollouts: int) -> None:
    job.documents(*(name for pair in zip([*FAILING, "good"], HARMLESS, strict=True) for name in pair), "last")
    options = {"plugin": job.plugin("hostile", HOSTILE), "max_concurrent_documents": 2, "records_per_chunk": 4}

    finished = job(rollouts_per_document=rollouts, no_progress=None, **options)

    assert finished.rc == 0, finished
    assert "documents: 11 rows, 0 filtered, 8 failed" in finished.stdout
    assert {name: record["error_type"] for name, record in job.output.failed().items()} == FAILING
    assert sorted(job.output.ids()) == sorted([*HARMLESS, "good", "last"])
    assert job.verify().rc == 0


TOOL = """
    import asyncio, os
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("tool", tool)

    async def tool(document, generate):
        reply = await generate(document.text)
        try:
            await asyncio.sleep(float(os.environ["SECONDS"]))
        except:
            return "TOOL FAILED"
        return f"tool ok: {reply}"
"""


def test_a_stop_leaves_no_fallback_of_a_canceled_tool_as_a_row(job: Job, server: FakeServer) -> None:
    job.input(documents(100))
    options = {"plugin": job.plugin("tool", TOOL), "records_per_chunk": 10}

    running = job.start(env={"SECONDS": "3600"}, **options)
    wait_until(lambda: len(server.answered) == 100)
    for _ in range(2):
        running.send(signal.SIGINT)
        time.sleep(0.3)
    finished = running.finish()

    assert finished.rc == 130
    assert "interrupt again" in finished.stderr
    assert not job.output.data()
    server.forget()
    finished = job(env={"SECONDS": "0"}, **options)
    assert finished.rc == 0, finished
    output = job.output
    assert all(text.startswith("tool ok") for texts in output.texts().values() for text in texts)
    assert len(output.rows()) == 100
    assert not server.requests


def test_tools_have_as_long_as_requests_to_end_after_a_signal(job: Job, server: FakeServer) -> None:
    job.input(documents(5))

    running = job.start(env={"SECONDS": "2"}, plugin=job.plugin("tool", TOOL), records_per_chunk=5)
    wait_until(lambda: len(server.answered) == 5)
    running.send(signal.SIGTERM)

    assert running.finish().rc == 143
    assert [texts[0][:7] for texts in job.output.texts().values()] == ["tool ok"] * 5


FAILING_READER = """
    import errno
    import os
    import time
    import sdg
    from sdg_plugins.common import chunks

    @sdg.hookimpl
    def register_rollouts(register):
        register("echo", echo)

    async def echo(document, generate):
        return await generate(document.text)

    class Failing(chunks.OpenChunk):
        def __init__(self, chunk, *arguments):
            if chunk.index == 2:
                while not os.path.exists("go"):
                    time.sleep(0.01)
                raise OSError(errno.EIO, "Input/output error")
            super().__init__(chunk, *arguments)

    chunks.OpenChunk = Failing
"""


def test_what_is_in_flight_when_the_input_fails_is_answered_and_kept(job: Job, server: FakeServer) -> None:
    job.input(documents(15))
    server.behave(lambda payload, n: Delay(1.5))
    echo = job.options["plugin"]
    source = echo.read_text()
    job.plugin("echo", FAILING_READER)

    running = job.start(records_per_chunk=5, max_concurrent_documents=12)
    wait_until(lambda: server.prompts)
    (job.folder / "go").touch()
    finished = running.finish()

    assert finished.rc == 1
    assert finished.says("Input/output error")
    asked = set(server.prompts)
    assert asked
    assert asked <= {f"document {i}" for i in range(10)}
    server.behave(lambda payload, n: None)
    server.forget()
    echo.write_text(source)
    output = job.succeed(records_per_chunk=5, accept_edited_plugin=True)
    assert output.ids() == [row["id"] for row in documents(15)]
    assert Counter(server.prompts) == Counter({f"document {i}" for i in range(15)} - asked)


FAILING_WRITER = """
    import errno, os
    import sdg
    from sdg_plugins.common.chunks import Outlet

    @sdg.hookimpl
    def register_rollouts(register):
        register("echo", echo)

    async def echo(document, generate):
        return await generate(document.text)

    write = Outlet.write
    def failing(self, opened, *arguments):
        if opened.chunk.index == 0 and "FAIL" in os.environ:
            raise OSError(errno.EIO, "Input/output error")
        write(self, opened, *arguments)
    Outlet.write = failing
"""


def test_what_is_in_flight_when_the_output_fails_is_answered_and_kept(job: Job, server: FakeServer) -> None:
    job.input(documents(15))
    job.options["plugin"] = job.plugin("echo", FAILING_WRITER)
    server.behave(lambda payload, n: None if server.prompts[-1] in {f"document {i}" for i in range(5)} else Delay(1.5))

    finished = job(env={"FAIL": "1"}, records_per_chunk=5, max_concurrent_documents=15)

    assert finished.rc == 1
    assert finished.says("Input/output error")
    assert len(server.requests) == 15
    server.forget()
    assert len(job.succeed(records_per_chunk=5).rows()) == 15
    assert not server.requests


def test_a_commit_that_fails_is_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = []
    insert, broken = database.insert, True

    def failing(db: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
        if broken and table == "totals":
            raise sqlite3.OperationalError("database or disk is full")
        insert(db, table, rows)

    monkeypatch.setattr(database, "insert", failing)

    async def work() -> None:
        nonlocal broken
        async with sdg.Store.open(tmp_path / "state.sqlite3", Counter()) as store:
            store.on_failure = failures.append
            store.answered(1, b"key", b"{}")
            store.answered(2, b"key", b"{}")
            store.finished(2, "row", b"[]")
            with pytest.raises(sqlite3.OperationalError):
                await store.flush()
            store.answered(1, b"other", b"{}")
            broken = False
            await asyncio.sleep(0)
            while store._problem:
                await asyncio.sleep(0.05)
            await store.flush()
            assert await store.answers_to(1) == {b"key": b"{}", b"other": b"{}"}
            assert await store.tally() == {"row": 1}

    asyncio.run(work())
    assert failures


FULL_UNTIL_THE_END = (
    ECHO
    + """
    import os
    import sqlite3
    import traceback

    save, commit = sdg.Store._save, sdg.Store._commit

    async def full(store, rows, *statements):
        if rows.get("documents") and not store._closing:
            raise sqlite3.OperationalError("database or disk is full")
        await save(store, rows, *statements)

    async def told(store):
        try:
            await commit(store)
        except RuntimeError:
            traceback.print_exc()
            raise

    sdg.Store._commit = told
    if os.environ.get("FULL"):
        sdg.Store._save = full
"""
)


def test_documents_that_only_the_last_commit_saves_are_written_by_the_next_run(job: Job, server: FakeServer) -> None:
    job.input(documents(6))
    job.options["plugin"] = job.plugin("echo", FULL_UNTIL_THE_END)

    finished = job(env={"FULL": "1"}, records_per_chunk=2)

    assert finished.rc == 1
    assert finished.says("disk is full")
    answered = set(server.prompts)
    assert answered
    server.forget()
    assert len(job.succeed(records_per_chunk=2).rows()) == 6
    assert not answered & set(server.prompts)


BLOCKING = """
    import time
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("blocking", blocking)

    async def blocking(document, generate):
        reply = await generate(document.text)
        if document.id == "d0007":
            time.sleep(600)
        return reply
"""


def test_a_second_signal_ends_a_process_that_a_rollout_blocks(job: Job, server: FakeServer) -> None:
    job.input(documents(8))
    running = job.start(plugin=job.plugin("blocking", BLOCKING), max_concurrent_documents=1, records_per_chunk=2)
    wait_until(lambda: len(server.answered) == 8)
    time.sleep(0.5)

    running.send(signal.SIGTERM)
    time.sleep(0.2)
    assert running.running
    running.send(signal.SIGTERM)

    assert running.finish(timeout=5).rc == 143


@pytest.mark.slow
def test_a_signal_ends_a_process_that_a_rollout_blocks_within_20_seconds(job: Job, server: FakeServer) -> None:
    job.input(documents(8))
    running = job.start(plugin=job.plugin("blocking", BLOCKING), max_concurrent_documents=1)
    wait_until(lambda: len(server.answered) == 8)
    time.sleep(0.5)

    running.send(signal.SIGUSR1)
    finished = running.finish(timeout=25)

    assert finished.rc == 143
    assert finished.says("SIGUSR1", "blocks the process", "interrupt again")


LEAKING = """
    import base64, os
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("leaking", leaking)

    async def leaking(document, generate):
        key = os.environ["OPENAI_API_KEY"]
        reply = await generate(document.text)
        if document.id == "url":
            raise RuntimeError(f"403 for url: https://search.example/q?api_key={key}")
        if document.id == "quoted":
            raise KeyError(base64.b64encode(f"user:{key}".encode()))
        if document.id == "result":
            return {"text": reply.text, "tool": f"curl -H 'Authorization: Bearer {key}'"}
        return reply
"""


def test_a_key_in_an_exception_or_a_result_of_a_rollout_is_written_nowhere(job: Job, server: FakeServer) -> None:
    key = "sk-VERY/SECRET+KEY'0123456789"
    server.api_key = key
    job.documents("url", "quoted", "result", "fine")

    finished = job(plugin=job.plugin("leaking", LEAKING), env={"OPENAI_API_KEY": key})

    assert finished.rc == 0, finished
    assert "api_key=***" in job.output.failed()["url"]["error"]
    assert job.output.rows()[0]["rollout_results"][0]["tool"] == "curl -H 'Authorization: Bearer ***'"
    written = b"".join(path.read_bytes() for path in job.output.path.rglob("*") if path.is_file())
    for text in (written, finished.stdout.encode(), finished.stderr.encode()):
        assert b"SECRET" not in text
        assert base64.b64encode(b"\0\0" + key.encode())[4:-8] not in text


IDLE = """
    import atexit
    from concurrent.futures import ThreadPoolExecutor
    import sdg

    POOL = ThreadPoolExecutor(1)
    POOL.submit(int).result()
    atexit.register(print, "the interpreter has ended")

    @sdg.hookimpl
    def register_rollouts(register):
        register("idle", idle)

    async def idle(document, generate):
        return await generate(document.text)
"""


def test_the_process_does_not_wait_for_idle_threads_of_pools(job: Job) -> None:
    job.input(documents(2))
    job.env["SDG_TEST_START"] = "interpreter"

    finished = job(plugin=job.plugin("idle", IDLE))

    assert "the interpreter has ended" in finished.stdout  # otherwise the process was cut off after a while


HANGING = """
import atexit, sys, time
import sdg
from sdg_plugins.common.ending import run_program

def hang():
    print("hangs", flush=True)
    time.sleep(1000)

atexit.register(hang)
run_program(lambda: 3)
"""


def test_a_signal_ends_a_process_whose_interpreter_does_not_come_to_its_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"hangs\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 3  # that of the run, which was complete


def test_a_journal_that_cannot_be_written_because_the_disk_is_full_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = argparse.Namespace(state=tmp_path, options=argparse.Namespace(state_dir="state"))
    broken = sqlite3.OperationalError("disk I/O error")
    broken.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE

    assert "state state: disk I/O error; check the disk's space, quota" in str(explained(broken, run))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=0))
    assert str(explained(broken, run)) == "state state: the disk is full: make room, then run the same command again"
