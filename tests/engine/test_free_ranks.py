"""`--rank any`: processes that come and go share the ranks of a run."""

from __future__ import annotations

import signal
from collections import Counter

import pytest
from fake_server import FakeServer, Hang, Status
from running import Job, documents, wait_until


@pytest.fixture
def shared(job: Job) -> Job:
    """A run of 6 ranks with 20 documents each, for any process to take."""
    job.input(documents(120))
    job.options |= {"rank": "any", "world_size": 6, "records_per_chunk": 5}
    return job


def test_processes_take_ranks_until_none_is_left(shared: Job, server: FakeServer) -> None:
    processes = [shared.start() for _ in range(3)]

    assert [process.finish().rc for process in processes] == [0, 0, 0]
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(120)]
    assert Counter(server.prompts) == {row["text"]: 1 for row in documents(120)}
    assert shared.verify().rc == 0


def test_a_finished_run_has_no_free_rank_until_its_input_grows(shared: Job, server: FakeServer) -> None:
    shared.succeed(max_documents=60)
    server.forget()

    again = shared(max_documents=60)

    assert again.rc == 0
    assert "no rank is free: 6 of 6 have finished" in again.stderr
    assert not server.requests

    shared.succeed()

    assert set(server.prompts) == {row["text"] for row in documents(120)[60:]}
    assert shared.verify().rc == 0


def test_the_rank_of_a_killed_process_is_taken_by_another(shared: Job, server: FakeServer) -> None:
    answered = documents(120)[2]["text"]
    server.behave(lambda payload, n: None if answered in str(payload) else Hang())
    killed = shared.start()
    wait_until(lambda: len(server.requests) == 20 and 2 in shared.output.durable())
    killed.send(signal.SIGKILL)
    killed.finish()
    server.release()
    server.behave(lambda payload, n: None)
    server.forget()

    shared.succeed()

    assert answered not in server.prompts
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(120)]
    assert shared.verify().rc == 0


def test_a_rank_in_the_hands_of_another_process_is_left_alone(shared: Job, server: FakeServer) -> None:
    held = documents(120)[0]["text"]
    server.behave(lambda payload, n: Hang() if held in str(payload) else None)
    first = shared.start()
    wait_until(lambda: held in server.prompts)

    second = shared()
    server.release()

    assert second.rc == 0
    assert "no rank is free: 5 of 6 have finished" in second.stderr
    assert first.finish().rc == 0
    assert shared.verify().rc == 0


def test_a_failed_rank_ends_its_process_and_is_open_for_the_next_one(shared: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Status(400))

    failed = shared(max_failure_rate=0.5, max_documents=30)

    assert failed.rc == 3
    server.behave(lambda payload, n: None)
    shared.succeed(retry_failed=True, max_documents=30)
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(30)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": None}, ["--rank any", "--world-size"]),
        ({"fresh": True}, ["--rank any", "--fresh"]),
        ({"rank": "some"}, ["--rank", "'some'", "any"]),
    ],
)
def test_what_cannot_be_shared_is_a_usage_error(options: dict[str, object], words: list[str], shared: Job) -> None:
    finished = shared(**options)

    assert finished.rc == 2
    assert finished.says(*words)
