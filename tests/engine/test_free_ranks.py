"""`--rank any`: processes that come and go share the ranks of a run."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sqlite3
from collections import Counter

import pytest
from fake_server import Delay, FakeServer, Hang, Status, prompt_of
from running import Job, Started, documents, wait_until


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


@pytest.mark.parametrize("processes", [None, 2])
def test_finished_ranks_whose_files_are_gone_run_again(shared: Job, server: FakeServer, processes: int | None) -> None:
    if processes:
        shared.options |= {"processes": processes, "rank": None}
    shared.succeed()
    server.forget()
    first, second, *_, last = sorted(shared.output.path.glob("data/*.parquet"))
    first.unlink()
    last.write_bytes(b"")

    again = shared()

    assert again.rc == 0, again
    assert again.stderr.count("missing from the output, will be written again") == 2
    assert len(server.prompts) == 10
    assert sorted(shared.output.ids()) == sorted(row["id"] for row in documents(120))
    assert shared.verify().rc == 0
    second.write_bytes(b"other")

    refused = shared()

    assert refused.rc == 1
    assert refused.says(second.name, "has 5 bytes", "move it away")


def test_the_rank_of_a_killed_process_is_taken_by_another(shared: Job, server: FakeServer) -> None:
    answered = documents(120)[2]["text"]
    server.behave(lambda payload, n: None if answered in str(payload) else Hang())
    killed = shared.start()
    wait_until(lambda: len(server.requests) >= 20 and 2 in shared.output.durable())
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
    first = shared.start(max_concurrent_documents=1)  # otherwise it takes further ranks meanwhile
    wait_until(lambda: held in server.prompts)

    second = shared()

    status = json.loads(shared.sdg("status", "--output", shared.output.path, "--json").stdout)
    assert status["parts"] == {"done": 5, "taken": 1, "free": 0}
    assert status["ranks"][0]["holder"]["pid"] == first.process.pid
    assert status["ranks"][1]["holder"] is None
    words = shared.sdg("status", "--output", shared.output.path)
    assert "parts: 5 done, 1 taken, 0 free" in words.stdout
    assert f"taken     rank 0: process {first.process.pid} on" in words.stdout
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


def test_the_next_rank_begins_when_the_last_document_of_the_present_one_has_begun(
    shared: Job, server: FakeServer
) -> None:
    """With as many requests in flight as before, and each rank's files and figures its own."""
    held = documents(120)[2]["text"]
    server.behave(lambda payload, n: Hang() if prompt_of(payload) == held else None)
    process = shared.start(max_concurrent_generations=2)
    wait_until(lambda: set(server.prompts) == {row["text"] for row in documents(120)})
    assert held not in [request.prompt for request in server.answered]
    server.release()

    finished = process.finish()

    assert finished.rc == 0
    assert finished.stdout.count("20 documents: 20 rows") == 6
    assert server.max_in_flight == 2
    assert len(server.prompts) == len(documents(120))
    figures = [json.loads(path.read_bytes()) for path in shared.output.state.glob("0*.stats.json")]
    assert [(rank["rows"], rank["requests"], rank["rank"]["status"]) for rank in figures] == [(20, 20, "finished")] * 6
    assert shared.verify().rc == 0


@pytest.mark.parametrize("hurried", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_signal_stops_all_ranks_that_overlap_and_nothing_is_sent_again(
    hurried: bool, shared: Job, server: FakeServer
) -> None:
    held = {documents(120)[position]["text"] for position in (2, 7, 12)}  # of ranks 0, 1 and 2
    server.behave(lambda payload, n: Hang() if prompt_of(payload) in held else None)
    process = shared.start(max_concurrent_generations=8)
    wait_until(lambda: len(set(server.prompts)) == 120)
    wait_until(lambda: durable(shared) == 120 - len(held))
    process.send(signal.SIGTERM)
    if hurried:
        process.send(signal.SIGINT)

    finished = process.finish()

    assert finished.rc in {130, 143}
    assert hurried or finished.stderr.count("interrupted by SIGTERM") == 1
    answered = {request.prompt for request in server.answered}
    server.release()
    server.forget()
    shared.succeed()
    assert not answered & set(server.prompts)
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(120)]


def test_a_rank_that_fails_lets_the_ranks_beside_it_end_and_no_other_begin(shared: Job, server: FakeServer) -> None:
    held, bad = documents(120)[2]["text"], {row["text"] for row in documents(120)[5:10]}  # of ranks 0 and 1
    server.behave(
        lambda payload, n: Hang() if prompt_of(payload) == held else Status(400) if prompt_of(payload) in bad else None
    )
    process = shared.start(max_failure_rate=0.1)
    wait_until(lambda: shared.output.state.joinpath("00001.stats.json").exists() and "failed" in status_of(shared, 1))
    server.release()

    finished = process.finish()

    assert finished.rc == 3
    assert status_of(shared, 0) == "finished"


@pytest.mark.slow
def test_the_rank_of_a_stopped_process_is_taken_by_another_and_it_writes_nothing_when_it_goes_on(
    shared: Job, server: FakeServer
) -> None:
    held = documents(120)[2]["text"]
    server.behave(lambda payload, n: Hang() if prompt_of(payload) == held else None)
    stopped = shared.start(env={"SDG_LEASE": "3"}, max_concurrent_documents=1)  # it takes no further rank meanwhile
    wait_until(lambda: durable(shared) == 2 and held in server.prompts)
    stopped.send(signal.SIGSTOP)
    server.behave(lambda payload, n: None)
    server.forget()

    finished = shared(env={"SDG_LEASE": "3"})

    assert finished.rc == 0
    assert "rank 0 is taken over" in finished.stderr
    assert Counter(server.prompts) == {row["text"]: 1 for row in documents(120)[2:]}
    server.release()
    check_that_it_writes_nothing(stopped, shared)
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(120)]


STOPS = """
    import os, pathlib, signal
    from sdg_plugins.commands import jobs
    from sdg_plugins.common import database
    import sdg

    def stop_in(module, name):
        work = getattr(module, name)
        def stopping(*arguments):
            if os.environ.get("STOPS"):
                pathlib.Path("stopped").touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return work(*arguments)
        setattr(module, name, stopping)

    stop_in({where})

    @sdg.hookimpl
    def register_rollouts(register):
        register("stops", stops)

    async def stops(document, generate):
        return await generate(document.text)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["database, 'pragmas_for'", "jobs, 'begin_attempt'", "jobs, 'status_of'"])
def test_a_process_that_is_stopped_where_a_rank_begins_or_ends_is_in_nobodys_way(
    where: str, shared: Job, server: FakeServer
) -> None:
    shared.options["plugin"] = shared.plugin("stops", STOPS.format(where=where))
    stopped = shared.start(env={"SDG_LEASE": "3", "STOPS": "1"})
    wait_until(shared.folder.joinpath("stopped").exists)

    finished = shared(env={"SDG_LEASE": "3"})

    assert finished.rc == 0
    assert "rank 0 is taken over" in finished.stderr
    check_that_it_writes_nothing(stopped, shared)


def check_that_it_writes_nothing(stopped: Started, shared: Job) -> None:
    """Wake a process that has lost rank 0."""
    written = files_of(shared, 0)
    stopped.send(signal.SIGCONT)
    ended = stopped.finish()
    assert ended.rc == 0
    assert "rank 0: another process has taken it" in ended.stderr
    assert files_of(shared, 0) == written
    assert shared.verify().rc == 0


def test_a_rank_that_was_lost_at_its_end_does_not_end_the_process(shared: Job) -> None:
    shared.options["plugin"] = shared.plugin(
        "late",
        """
        import sdg
        from sdg_plugins.commands.jobs import Job

        work = Job.work

        async def noticed_late(self, servers):
            heed, found = self._heed_lease, []
            self._heed_lease = lambda loop: (heed(loop), found.append(self.run.output.fence))
            await work(self, servers)
            found[0].on_loss()

        Job.work = noticed_late

        @sdg.hookimpl
        def register_rollouts(register):
            register("late", late)

        async def late(document, generate):
            return await generate(document.text)
        """,
    )

    output = shared.succeed()

    assert sorted(output.ids()) == [row["id"] for row in documents(120)]


def files_of(job: Job, rank: int) -> dict[str, bytes]:
    """The files of a rank, in the output and the state."""
    names = [f"data/{rank:05d}_*", f".sdg/{rank:05d}.*", f".sdg/ranks/{rank:05d}/*.sqlite3*"]
    paths = [path for name in names for path in job.output.path.glob(name)]
    return {str(path): path.read_bytes() for path in sorted(paths) if path.suffix != ".sqlite3-shm"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_processes_that_are_killed_and_stopped_at_random_make_each_row_once(
    seed: int, shared: Job, server: FakeServer
) -> None:
    chance = random.Random(seed)
    server.behave(lambda payload, n: Delay(chance.expovariate(5)))
    shared.options |= {"max_concurrent_generations": 4}
    env = {"SDG_LEASE": "3"}
    living = [shared.start(env=env) for _ in range(3)]
    asleep: list[Started] = []
    woken: list[Started] = []
    for _ in range(12):
        count = len(server.requests) + 5
        wait_until(lambda count=count: len(server.requests) > count or not any_runs(living))  # type: ignore[misc]
        victim = living.pop(chance.randrange(len(living)))
        if chance.random() < 0.5:
            victim.send(signal.SIGKILL)
        else:
            victim.send(signal.SIGSTOP)
            asleep.append(victim)
        living.append(shared.start(env=env))
        if asleep and chance.random() < 0.5:
            woken.append(asleep.pop(0))
            woken[-1].send(signal.SIGCONT)
    ended = [process.finish() for process in [*living, *woken]]
    for process in asleep:
        process.send(signal.SIGCONT)
        ended.append(process.finish())

    assert not [process for process in ended if process.rc]
    assert shared(env=env).says("6 of 6 have finished")
    assert shared.verify().rc == 0
    assert sorted(shared.output.ids()) == [row["id"] for row in documents(120)]


def any_runs(processes: list[Started]) -> bool:
    return any(process.running for process in processes)


def durable(job: Job) -> int:
    """Documents that are final in the states of all ranks."""
    total = 0
    for path in job.output.state.glob("0*.sqlite3"):
        with (
            contextlib.suppress(sqlite3.OperationalError),  # it has just been created
            contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as state,
        ):
            open_, written = "SELECT count(*) FROM documents", "SELECT total(count) FROM chunks WHERE written"
            total += sum(int(state.execute(query).fetchone()[0]) for query in (open_, written))
    return total


def status_of(job: Job, rank: int) -> str:
    figures = json.loads(job.output.state.joinpath(f"{rank:05d}.stats.json").read_bytes())
    return str(figures["rank"]["status"])


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


def test_what_a_rank_cannot_begin_with_is_reported(shared: Job) -> None:
    finished = shared(prompt_column="body")

    assert finished.rc == 1
    assert "--prompt-column body: the input has no such column" in finished.message
