"""`--processes N`: several processes of one machine work on a run like one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import textwrap
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Delay, FakeServer, Hang, Status
from launching import Launch
from running import ECHO, Job, Output, Started, documents, wait_until

from sdg_plugins.commands.turns import Turns

TEXTS = [row["text"] for row in documents(120)]


@pytest.fixture
def several(job: Job) -> Job:
    """A run of 120 documents in 24 chunks by two processes, which share 6 ranks."""
    job.input(documents(120))
    job.options |= {"processes": 2, "world_size": 6, "records_per_chunk": 5}
    return job


def children_of(started: Started) -> list[int]:
    """The processes that a run has started."""
    text = Path(f"/proc/{started.process.pid}/task/{started.process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_signal_ends_all_processes_gently_and_any_number_of_them_continues(several: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Hang() if n >= 40 else None)
    started = several.start(max_concurrent_generations=8)
    wait_until(lambda: len(server.requests) >= 48)
    children = children_of(started)
    started.send(signal.SIGTERM)
    server.release()  # what is in flight is still answered
    server.hold()
    interrupted = started.finish()

    assert interrupted.rc == 143
    assert interrupted.stderr.count("interrupted by SIGTERM") == 1
    assert interrupted.stdout.count(" filtered, ") == interrupted.stdout.count("run the same command again") == 1
    assert not any(map(is_alive, children))

    done = several.output.stats()["documents"]
    server.behave(lambda payload, n: None)
    server.release()
    server.forget()
    finished = several(processes=None)  # all ranks, because it is no run of one process

    assert finished.rc == 0, finished
    assert "120 documents: 120 rows" in finished.stdout
    assert not finished.stderr
    assert len(server.requests) == len(set(server.prompts)) == 120 - done
    assert sorted(several.output.ids()) == [row["id"] for row in documents(120)]
    assert several.verify().rc == 0
    assert several.output.stats()["documents"] == 120
    assert "120 rows" in (several.output.path / "README.md").read_text()
    recorded = json.loads((several.output.state / "run.json").read_text())["options"]
    assert (recorded["max_concurrent_generations"], recorded["max_failure_rate"]) == (500, 1)  # of all together


def test_killed_processes_are_started_again_and_a_killed_parent_leaves_none(several: Job, server: FakeServer) -> None:
    held = TEXTS[119]
    server.behave(lambda payload, n: Hang() if held in str(payload) else None)
    started = several.start()
    wait_until(lambda: len(server.requests) == 120 and len(several.output.written()) == 23)
    first = children_of(started)
    for pid in first:
        with contextlib.suppress(ProcessLookupError):  # it had found no free rank
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.prompts.count(held) == 2)
    children = set(children_of(started)) - set(first)
    started.send(signal.SIGKILL)
    killed = started.finish()
    server.behave(lambda payload, n: None)
    server.release()

    finished = several(processes=3)

    assert "was killed by SIGKILL" in killed.stderr
    assert children
    wait_until(lambda: not any(map(is_alive, children)), 5)
    assert finished.rc == 0, finished
    assert Counter(server.prompts) == {**dict.fromkeys(TEXTS, 1), held: 3}
    assert sorted(several.output.ids()) == [row["id"] for row in documents(120)]
    assert several.verify().rc == 0


@pytest.mark.slow
def test_several_machines_may_each_have_several_processes(several: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Delay(0.2))
    started = [several.start(rank="any", max_concurrent_generations=4) for _ in range(2)]

    ended = [each.finish() for each in started]
    assert [each.rc for each in ended] == [0, 0], ended
    assert Counter(server.prompts) == dict.fromkeys(TEXTS, 1)
    assert sorted(several.output.ids()) == [row["id"] for row in documents(120)]
    assert several.verify().rc == 0


@pytest.mark.slow
def test_failures_are_judged_over_all_processes(several: Job, server: FakeServer) -> None:
    bad = {*TEXTS[:5], *TEXTS[30:35]}  # chunks 0 and 6, both of rank 0: half of its documents
    server.behave(lambda payload, n: Status(400) if payload["messages"][0]["content"] in bad else None)

    assert several(max_failure_rate=0.1).rc == 0

    too_many = several(max_failure_rate=0.08)
    assert too_many.rc == 3
    assert too_many.stderr.count("10 of 120 documents failed") == 1
    server.forget()
    server.behave(lambda payload, n: Status(400) if payload["messages"][0]["content"] == TEXTS[0] else None)
    assert several(retry_failed=True, max_failure_rate=0.1).rc == 0
    assert Counter(server.prompts) == dict.fromkeys(bad, 1)

    server.forget()
    several.options["plugin"].write_text(textwrap.dedent(ECHO) + "# edited\n")
    several(retry_failed=True)  # only the failed one, and it fails again
    assert server.prompts == [TEXTS[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 1, "world_size": 4}, ["--processes 2", "--rank 1"]),
        ({"plugin": "nowhere"}, ["nowhere"]),
        ({"prompt_column": "body"}, ["--prompt-column body", "text"]),
        ({"base_url": "http://127.0.0.1:9"}, ["127.0.0.1:9"]),
    ],
)
def test_what_is_wrong_is_said_once(options: dict[str, object], words: list[str], several: Job) -> None:
    finished = several(**options)

    assert finished.rc in {1, 2}
    assert finished.says(*words)


def all_durable(output: Output) -> set[str]:
    """Texts of the documents that no crash can undo, in whatever rank."""
    found: set[int] = set()
    for path in output.state.glob("[0-9]*.sqlite3"):
        with contextlib.suppress(sqlite3.OperationalError):  # it has no tables yet
            found |= output.durable(int(path.name[:5]))
    return {row["text"] for row in documents(1000) if int(row["id"][1:]) in found}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_random_kills_of_processes_and_of_their_parent_lose_and_repeat_nothing(
    seed: int, job: Job, server: FakeServer
) -> None:
    chance = random.Random(seed)
    rows = documents(400)
    job.input(rows, name=chance.choice(["input.parquet", "input.jsonl"]))
    job.options |= {"records_per_chunk": 7, "max_concurrent_generations": chance.choice([3, 20, 100])}
    job.options["world_size"] = chance.choice([None, 5, 12])
    server.behave(lambda payload, n: Delay(chance.random() * 0.15))

    seen: list[tuple[set[str], int]] = []  # what was durable, and how many requests there had been by then
    for _ in range(chance.randrange(2, 6)):
        first = not (job.output.state / "run.json").exists()
        before = len(server.requests)
        started = job.start(processes=chance.choice([2, 3, 4] if first else [None, 1, 2, 3, 4]))
        for _ in range(chance.randrange(1, 5)):
            time.sleep(chance.random() * 1.2)
            victims = children_of(started) if started.running else []
            seen.append((all_durable(job.output), len(server.requests)))
            if not victims or chance.random() < 0.4:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
        if started.running:
            # While Python imports, SIGINT would print a traceback.
            gentle = [signal.SIGTERM, signal.SIGINT] if len(server.requests) > before else []
            started.send(chance.choice([signal.SIGKILL, signal.SIGKILL, *gentle]))
        started.finish()
        wait_until(lambda: not any(map(is_alive, victims)))  # noqa: B023 - called at once
        seen.append((all_durable(job.output), len(server.requests)))
    begun = (job.output.state / "run.json").exists()
    job.succeed(processes=chance.choice([None, 2]) if begun else 2)

    for kept, sent in seen:
        assert kept.isdisjoint(server.prompts[sent:])
    assert sorted(job.output.ids()) == [row["id"] for row in rows]
    assert job.verify().rc == 0


# ── Launched servers ─────────────────────────────────────────────────────────────────────────────────────────────────


def state(crashes: int, suspects: int) -> dict[str, int]:
    """What a process reports of a server."""
    return {"crashes": crashes, "suspects": suspects}


def test_after_a_crash_processes_have_the_server_one_after_the_other() -> None:
    server: Any = types.SimpleNamespace(crashes=0, up=asyncio.Event())
    server.up.set()
    turns: Turns[str] = Turns(server)
    work = {"a", "b"}

    def admitted() -> str:
        turns.look(["a", "b", "idle"], work.__contains__)
        return "".join(name for name in ("a", "b", "idle") if turns.admits(name))

    assert admitted() == "abidle"
    server.crashes = 1
    assert admitted() == "a"
    for report in (state(0, 0), state(1, 2), state(1, 0), state(1, 1), state(1, 0)):  # an old one, and calm only once
        turns.note("a", report)
    turns.note("b", state(1, 0))  # not its turn
    assert admitted() == "a"
    server.crashes = 2  # the cause is among those of a
    assert admitted() == "a"
    turns.note("a", state(2, 0))
    turns.note("a", state(2, 0))
    assert admitted() == "b"
    work.remove("b")  # it was killed
    assert admitted() == "abidle"


@pytest.fixture
def launch(tmp_path: Path, server: FakeServer) -> Iterator[Launch]:
    launch = Launch(tmp_path, server)
    launch.options |= {"processes": 2, "world_size": 4, "records_per_chunk": 5, "max_concurrent_generations": 32}
    yield launch
    launch.sdg.close()
    wait_until(lambda: not launch.processes(), 20)


@pytest.mark.slow
def test_a_document_that_kills_the_shared_server_is_the_only_one_that_fails(launch: Launch) -> None:
    rows = documents(60)
    rows[30]["text"] = "poison"
    launch.input(rows)

    finished = launch(faults="--slots 2 --seconds 0.3")  # others are in flight at each crash

    assert finished.rc == 0, finished
    assert list(launch.output.failed()) == ["d0030"]
    assert len(launch.starts) == 4


@pytest.mark.slow
def test_a_shared_server_that_dies_is_restarted_for_all_and_gone_after_a_kill_of_the_parent(launch: Launch) -> None:
    launch.input(documents(60))
    started = launch.start(faults="--crash-after 10 --seconds 0.2 --slots 4")
    wait_until(lambda: len(launch.starts) == 3)
    started.send(signal.SIGKILL)
    started.finish()
    wait_until(lambda: not launch.processes(), 20)

    finished = launch()

    assert finished.rc == 0, finished
    assert sorted(launch.output.ids()) == [row["id"] for row in documents(60)]
    assert len(launch.starts) == 4
