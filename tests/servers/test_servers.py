"""Servers that a run launches: how they are started, watched, restarted and filled, and that none outlives the run."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fake_server import FakeServer, Hang, free_port, prompt_of
from launching import ENGINE, Launch, everything
from running import ECHO, Started, documents, wait_until

import sdg
from sdg_plugins.servers.launching.processes import killed_for_memory
from sdg_plugins.servers.limit import Load
from sdg_plugins.servers.pool import Pool, Suspicion


@pytest.fixture
def launch(tmp_path: Path, server: FakeServer) -> Iterator[Launch]:
    launch = Launch(tmp_path, server)
    yield launch
    launch.sdg.close()
    wait_until(lambda: not launch.processes(), 20)


# ── Starting and ending ──────────────────────────────────────────────────────────────────────────────────────────────


def test_launched_server_serves_the_run_and_is_gone_after_it(launch: Launch) -> None:
    launch.input(documents(50))

    finished = launch(faults="--children")

    everything(launch, 50, finished)
    assert not launch.processes()
    assert len(launch.starts) == 1
    printed = next(line for line in finished.lines if "starting" in line)
    assert shlex.split(printed.partition("starting ")[2])[1:] == [str(ENGINE), *launch.starts[0]["arguments"]]
    assert "is ready after" in finished.stderr


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_engine(launch: Launch, ending: signal.Signals) -> None:
    launch.input(documents(50))
    started = launch.start(faults="--children --seconds 60")
    wait_until(launch.requests)
    assert len(launch.processes()) >= 6  # the engine, the guard, the server, three children

    started.send(ending)

    assert started.finish(bugs=ending == signal.SIGKILL).rc in {130, 143, -9}
    wait_until(lambda: not launch.processes(), 10)


FORKING = """
    import concurrent.futures, multiprocessing
    import sdg

    POOL = concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork"))

    @sdg.hookimpl
    def register_rollouts(register):
        register("forking", forking)

    async def forking(document, generate):
        POOL.submit(abs, 1).result()
        return await generate(document.text)
"""


@pytest.mark.parametrize("kill", [False, True])
def test_processes_that_a_plugin_forks_do_not_keep_the_server_alive(launch: Launch, kill: bool) -> None:
    launch.input(documents(20))
    started = launch.start(faults="--children --seconds 0.5", plugin=launch.plugin("forking", FORKING))
    wait_until(lambda: len(launch.requests("answered")) > 2)
    if kill:
        started.send(signal.SIGKILL)
        started.process.wait()
        wait_until(lambda: not [command for command in launch.processes().values() if "sdg.py" not in command], 10)
        for pid in launch.processes():  # workers of the pool, which Python does not end when their parent is killed
            os.kill(pid, signal.SIGKILL)

    finished = started.finish(30, bugs=True)

    assert finished.rc == (-9 if kill else 0), finished
    assert not launch.processes()


def test_guard_that_is_killed_leaves_nothing_behind(launch: Launch) -> None:
    launch.input(documents(200))
    started = launch.start(faults="--children --seconds 0.2", max_concurrent_generations=8)
    wait_until(lambda: len(launch.requests("answered")) > 20)
    guard = next(pid for pid, command in launch.processes().items() if "guard.py" in command)
    engine = ("sdg.py", "forking.py")
    first = {pid for pid, command in launch.processes().items() if not any(name in command for name in engine)}

    os.kill(guard, signal.SIGKILL)

    wait_until(lambda: len(launch.starts) == 2)
    assert not first & launch.processes().keys()
    everything(launch, 200, started.finish(bugs=True))  # its last output may be a warning
    assert not launch.processes()


LEAVES_A_PROCESS = """
    import asyncio, os, sys, textwrap
    from pathlib import Path
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("leaves", leaves)

    TOOL = '''import os, pathlib, time
    os.fork() and os._exit(0)
    time.sleep(0.2)
    pathlib.Path("parent").write_text(str(os.getppid()))
    '''

    async def leaves(document, generate):
        await generate(document.text)
        tool = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(TOOL))
        await tool.wait()
        while not os.path.exists("parent"):
            await asyncio.sleep(0.01)
        return "mine" if Path("parent").read_text() == str(os.getpid()) else "not mine"
"""


def test_processes_that_tools_leave_behind_do_not_become_zombies_of_the_engine(launch: Launch) -> None:
    launch.input(documents(1))
    output = launch.succeed(plugin=launch.plugin("leaves", LEAVES_A_PROCESS))
    assert output.texts() == {"d0000": ["not mine"]}


def test_no_process_outlives_a_run_that_fails(launch: Launch) -> None:
    launch.input(documents(50))

    finished = launch(faults="--children", prompt_column="nothing")

    assert finished.rc == 1
    assert "no such column" in finished.message
    assert not launch.processes()


def test_input_is_read_while_the_server_loads(launch: Launch) -> None:
    launch.input(documents(50))
    started = launch.start(faults="--start-seconds 2")
    state = launch.output.state / "00000.sqlite3"

    wait_until(state.exists)
    assert not launch.requests()

    everything(launch, 50, started.finish())


def test_user_sees_what_a_loading_server_does(launch: Launch) -> None:
    launch.input(documents(5))
    env = launch.program("vllm") | {"FAKE_ENGINE": "--start-seconds 2 --say Loading-weights"}

    finished = launch(env, server="vllm", no_progress=None)

    assert finished.rc == 0
    assert [line for line in finished.lines if "vllm: " in line and "s)" in line], finished.stderr


def test_model_that_is_not_named_is_asked_for(launch: Launch) -> None:
    launch.input(documents(5))

    everything(launch, 5, launch(model=None))

    assert launch.output.stats()["model"] == "m"


def test_server_of_another_model_is_refused(launch: Launch) -> None:
    launch.input(documents(5))

    env = launch.program("vllm") | {"FAKE_ENGINE": "--served-model-name n"}

    finished = launch(env, server="vllm")

    assert finished.rc == 1
    assert "does not serve m, but n" in finished.message
    assert not launch.requests()


@pytest.mark.parametrize("hang", ["", "--hang"])
def test_fatal_line_ends_the_wait_with_its_reason_and_a_hint(launch: Launch, hang: str) -> None:
    launch.input(documents(5))
    (launch.folder / "say.txt").write_text(
        "(EngineCore pid=7) ERROR 11-23 12:00:00 [core.py:1] ValueError: No available memory for the cache blocks.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    env = launch.program("vllm") | {"FAKE_ENGINE": f"--say-file {launch.folder}/say.txt {hang or '--exit 1'}"}

    finished = launch(env, server="vllm", start_timeout=60)

    assert finished.rc == 1
    assert "No available memory for the cache blocks" in finished.message
    assert "--gpu-memory-utilization" in finished.message
    assert "log:" in finished.message
    assert len(launch.starts) == 1
    assert finished.seconds < 30


def test_fatal_line_of_a_command_that_hangs_ends_the_wait(launch: Launch) -> None:
    launch.input(documents(5))
    (launch.folder / "say.txt").write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")

    finished = launch(faults=f"--say-file {launch.folder}/say.txt --hang")

    assert finished.rc == 1
    assert "CUDA out of memory" in finished.message
    assert "--tp" in finished.message


def test_death_at_the_start_is_reported_with_status_and_last_output(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch(faults="--exit 5 --say one --say last")

    assert finished.rc == 1
    assert "status 5" in finished.message
    assert "last" in finished.message


def test_start_that_takes_too_long_is_ended(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch(server_command="sh -c 'echo dozing; exec sleep 300' {port}", start_timeout=3)

    assert finished.rc == 1
    assert "--start-timeout" in finished.message
    assert "dozing" in finished.message


def test_missing_program_names_the_extra(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch(server="vllm")

    assert finished.rc == 1
    assert finished.says("vllm is not installed", "pip install 'sdg-engine[vllm]'")


def test_missing_command_is_reported(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch(server_command="/no/such/program {port}")

    assert finished.rc == 1
    assert "/no/such/program: No such file" in finished.message


def test_log_lines_may_have_any_length(launch: Launch) -> None:
    launch.input(documents(5))

    everything(launch, 5, launch(faults="--babble"))

    log = next((launch.output.state / "logs").iterdir()).read_text()
    assert len(log) > 1 << 20
    assert "end of the long line" in log


@pytest.mark.parametrize(
    ("groups", "file", "content"),
    [
        (
            "9:pids:/a\n4:memory:/slurm/job_3\n0::/\n",
            "memory/slurm/job_3/memory.oom_control",
            "under_oom 0\noom_kill 2\n",
        ),
        ("0::/system.slice/job_3\n", "system.slice/job_3/memory.events", "oom 5\noom_kill 2\noom_group_kill 0\n"),
        ("0::/kubepods/pod7\n", "memory.events", "oom_kill 2\n"),  # in a container, which has its own group mounted
        ("0::/\n", "memory.stat", "oom_kill 3\n"),
    ],
)
def test_kills_for_memory_are_counted(tmp_path: Path, groups: str, file: str, content: str) -> None:
    (tmp_path / "groups").write_text(groups)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)

    assert killed_for_memory(tmp_path / "groups", tmp_path) == (0 if file == "memory.stat" else 2)
    assert killed_for_memory(tmp_path / "missing", tmp_path) == 0


def test_log_stays_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sdg

    sdg.Plugins.load([])
    processes = sys.modules["sdg_plugins.servers.launching.processes"]
    monkeypatch.setattr(processes, "LOG_BYTES", 1000)
    log = processes.Log(tmp_path / "log", "title")
    for number in range(1000):
        log.write(f"line {number}\n".encode())
    log.close()

    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2100
    assert (tmp_path / "log").read_text().endswith("line 999\n")


# ── Crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_server_costs_no_document_and_only_what_was_in_flight(launch: Launch) -> None:
    launch.input(documents(200))
    started = launch.start(faults="--seconds 0.1", max_concurrent_generations=20)
    wait_until(lambda: len(launch.requests("answered")) >= 60)

    os.kill(launch.starts[0]["pid"], signal.SIGKILL)

    everything(launch, 200, started.finish())
    assert len(launch.starts) == 2
    times = Counter(record["prompt"] for record in launch.requests())
    again = [prompt for prompt, count in times.items() if count > 1]
    assert len(again) <= 20
    answered_first = {r["prompt"] for r in launch.requests("answered") if r["pid"] == launch.starts[0]["pid"]}
    assert not answered_first.intersection(again)
    assert len(again) <= launch.output.stats()["retries"].get("crash", 0) <= 40  # some had not reached it


def test_document_that_kills_the_server_is_found_and_the_others_finish(launch: Launch) -> None:
    rows = documents(60)
    rows[30]["text"] = "poison"
    launch.input(rows)

    finished = launch(faults="--seconds 0.2", max_concurrent_generations=32)

    assert finished.rc == 0, finished
    assert list(launch.output.failed()) == ["d0030"]
    assert launch.output.failed()["d0030"]["attempts"] == 3
    assert "the server crashed 3 times on this request" in launch.output.failed()["d0030"]["error"]
    assert len(launch.output.rows()) == 59
    assert len(launch.starts) == 4
    together = [record["together"] for record in launch.requests() if record["prompt"] == "poison"]
    assert together[-1] == 1


def test_two_documents_that_kill_the_server_are_both_found(launch: Launch) -> None:
    rows = documents(40)
    rows[3]["text"], rows[4]["text"] = "poison 1", "poison 2"
    launch.input(rows)

    finished = launch(faults="--seconds 0.05", max_concurrent_generations=16, timeout=120)

    assert finished.rc == 0, finished
    assert sorted(launch.output.failed()) == ["d0003", "d0004"]
    assert len(launch.output.rows()) == 38


def test_many_documents_that_kill_the_server_in_a_row_are_all_found(launch: Launch) -> None:
    rows = documents(30)
    for row in rows[4:8]:
        row["text"] = f"poison {row['id']}"
    launch.input(rows)

    finished = launch(faults="--seconds 0.05", max_concurrent_generations=8, max_restarts=3, timeout=100)

    assert finished.rc == 0, finished
    assert sorted(launch.output.failed()) == [row["id"] for row in rows[4:8]]
    assert len(launch.output.rows()) == 26


def test_server_that_never_answers_is_given_up(launch: Launch) -> None:
    launch.input([{"id": "a", "text": "poison"}, {"id": "b", "text": "poison too"}])

    finished = launch(max_restarts=1)

    assert finished.rc == 1
    assert "died after 1 restart without a response" in finished.message
    assert len(launch.starts) == 2


def test_server_that_fails_its_health_checks_is_restarted(launch: Launch) -> None:
    launch.input(documents(30))

    finished = launch(faults="--sick --crash-after 10 --only-life 1 --seconds 0.1", max_concurrent_generations=4)

    assert finished.rc == 0, finished
    assert len(launch.starts) >= 2


def test_wedged_server_is_restarted_though_its_health_is_fine(launch: Launch) -> None:
    launch.input([*documents(20), {"id": "w", "text": "wedge"}])

    finished = launch(faults="--metrics --only-life 1", stall_timeout=1.5, max_concurrent_generations=4)

    assert finished.rc == 0, finished
    assert "no token and no response" in finished.stderr
    assert len(launch.starts) == 2
    assert len(launch.output.rows()) == 21


def test_wedged_server_without_metrics_is_restarted_when_its_requests_time_out(launch: Launch) -> None:
    launch.input([*documents(20), {"id": "w", "text": "wedge"}])

    finished = launch(faults="--only-life 1", request_timeout=2, max_concurrent_generations=4)

    assert finished.rc == 0, finished
    assert len(launch.starts) == 2
    assert len(launch.output.rows()) == 21


def test_slow_server_without_metrics_that_answers_a_tiny_request_is_left_alone(launch: Launch) -> None:
    launch.input(documents(4))

    finished = launch(faults="--seconds 5 --quick-word 1", stall_timeout=1)

    everything(launch, 4, finished)
    assert len(launch.starts) == 1


def test_slow_server_whose_metrics_have_no_tokens_is_left_alone(launch: Launch) -> None:
    launch.input(documents(4))

    finished = launch(faults="--seconds 5 --quick-word 1 --metrics --no-tokens", stall_timeout=1)

    everything(launch, 4, finished)
    assert len(launch.starts) == 1


def test_slow_server_that_makes_tokens_is_left_alone(launch: Launch) -> None:
    launch.input(documents(4))

    finished = launch(faults="--metrics --seconds 6", stall_timeout=1.5)

    everything(launch, 4, finished)
    assert len(launch.starts) == 1


def test_killed_engine_and_its_server_lose_nothing(launch: Launch) -> None:
    launch.input(documents(100))
    started = launch.start(faults="--seconds 0.1", max_concurrent_generations=10)
    wait_until(lambda: len(launch.requests("answered")) >= 40)
    started.send(signal.SIGKILL)
    started.finish(bugs=True)
    kept, sent = launch.output.durable(), len(launch.requests())

    everything(launch, 100, launch())

    prompts = {row["text"]: position for position, row in enumerate(documents(100))}
    assert not kept & {prompts[record["prompt"]] for record in launch.requests()[sent:]}


# ── Several servers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_replicas_have_their_own_port_and_gpus(launch: Launch) -> None:
    launch.input(documents(100))

    load = {"faults": "--seconds 0.3", "max_concurrent_generations": 8}
    finished = launch({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, replicas=2, tp=2, **load)

    everything(launch, 100, finished)
    assert sorted(start["gpus"] for start in launch.starts) == ["4,5", "6,7"]
    assert len({start["port"] for start in launch.starts}) == 2
    assert set(Counter(record["pid"] for record in launch.requests())) == {start["pid"] for start in launch.starts}


def test_too_few_gpus_are_reported_before_anything_starts(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, replicas=3, tp=2)

    assert finished.rc == 1
    assert finished.says("--replicas 3", "--tp 2", "need 6 GPUs", "4 are visible")
    assert not launch.starts


def test_other_replicas_work_while_one_restarts(launch: Launch) -> None:
    launch.input(documents(300))
    started = launch.start(faults="--seconds 0.1 --start-seconds 2", replicas=2, max_concurrent_generations=8)
    wait_until(lambda: len({record["pid"] for record in launch.requests("answered")}) == 2)
    victim, other = (start["pid"] for start in launch.starts)

    os.kill(victim, signal.SIGKILL)
    killed = time.time()

    everything(launch, 300, started.finish())
    assert len(launch.starts) == 3
    meanwhile = [r for r in launch.requests("answered") if r["pid"] == other and 0.3 < r["time"] - killed < 2]
    assert len(meanwhile) > 5


def test_eight_runs_on_one_machine_do_not_take_each_others_ports(launch: Launch) -> None:
    launch.input(documents(8))
    runs = [launch.start(rank=rank, world_size=8, records_per_chunk=1) for rank in range(8)]

    ended = [run.finish(90) for run in runs]
    assert [finished for finished in ended if finished.rc] == []
    everything(launch, 8)
    assert len({start["port"] for start in launch.starts}) == 8


def test_port_that_was_taken_meanwhile_is_replaced(launch: Launch) -> None:
    launch.input(documents(5))
    (launch.folder / "say.txt").write_text("OSError: [Errno 98] Address already in use\n")
    env = launch.program("vllm")
    env["FAKE_ENGINE"] = f"--say-file {launch.folder}/say.txt --exit 1 --only-life 1"

    everything(launch, 5, launch(env, server="vllm"))

    assert len({start["port"] for start in launch.starts}) == 2


def test_fixed_port_that_is_taken_ends_the_run(launch: Launch) -> None:
    launch.input(documents(5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        finished = launch(launch.program("vllm"), server="vllm", server_arg=f"port={port}")

    assert finished.rc == 1
    assert "address already in use" in finished.message.lower()
    assert not launch.starts


def test_replicas_cannot_share_a_port(launch: Launch) -> None:
    launch.input(documents(5))

    finished = launch(launch.program("vllm"), server="vllm", server_arg="port=30000", replicas=2)

    assert finished.rc == 2
    assert finished.says("--server-arg port", "--replicas")


# ── Concurrency ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("launched", [True, False])
def test_concurrency_follows_what_the_server_reports(launch: Launch, launched: bool) -> None:
    launch.input(documents(2500))
    faults = "--metrics --slots 40 --seconds 0.1"
    if launched:
        finished = launch(faults=faults, max_concurrent_generations=1000)
    else:
        port = free_port()
        with Background(launch, f"{faults} --port {port} --model m"):
            url = f"http://127.0.0.1:{port}"
            finished = launch(server=None, base_url=url, max_concurrent_generations=1000)

    everything(launch, 2500, finished)
    together = [record["together"] for record in launch.requests()]
    steady = sorted(together[len(together) // 2 : -100])
    assert steady[len(steady) // 2] >= 40  # full, with something to do next
    assert steady[-1] <= 80  # and no more than a short queue


class Background:
    """A fake engine that the run does not start."""

    def __init__(self, launch: Launch, arguments: str) -> None:
        import subprocess

        command = [sys.executable, str(ENGINE), "--folder", str(launch.engine), *arguments.split()]
        self.process = subprocess.Popen(command)
        self.ready: Callable[[], bool] = lambda: bool(launch.starts)

    def __enter__(self) -> None:
        wait_until(self.ready)
        time.sleep(0.5)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize(("running", "limit"), [(1, 1.0), (0, 1.27), (1, 3.8), (16, 64.0)])
def test_limit_recovers_from_any_low(running: int, limit: float) -> None:
    """Also if the metrics show only a part of the requests, as behind a load balancer."""

    async def grow() -> float:
        upstream = sdg.Upstream("http://localhost/v1")
        pool = Pool([upstream], 500)
        pool.adapt(upstream, Load(1, 100, 0))  # there was a queue once
        upstream.limit.value = limit
        for _ in range(100):
            upstream.active = int(upstream.limit.value)
            pool.adapt(upstream, Load(running, 0, 0))
        return upstream.limit.value

    assert asyncio.run(grow()) == 500


def test_crashes_on_one_server_do_not_convict_on_another() -> None:
    async def move() -> None:
        first, second = (sdg.Upstream(url, examine=never) for url in ("a", "b"))
        pool = Pool([first, second], 10)
        second.rise()
        waiting = asyncio.create_task(pool.acquire(Suspicion(first, 1, 1)))
        await asyncio.sleep(0)
        assert not waiting.done()
        first.give_up()
        assert await waiting is second

    async def never(crashes: int) -> bool:
        return False

    asyncio.run(move())


@pytest.mark.parametrize("reason", ["down", "set aside", "quarantined"])
def test_documents_do_not_wait_for_their_server_while_it_takes_no_requests(reason: str) -> None:
    async def wait() -> None:
        home, other = (sdg.Upstream(url) for url in ("a", "b"))
        pool = Pool([home, other], 2)
        for upstream in pool.upstreams:
            upstream.rise()
        assert await pool.acquire(None, request_of(0)) is home
        assert await pool.acquire(None, request_of(1)) is other
        waiting = [asyncio.create_task(pool.acquire(None, request_of(document))) for document in (0, 2, 3)]
        await asyncio.sleep(0)
        if reason == "down":
            home.up.clear()
        elif reason == "set aside":
            pool.set_aside(home, 60.0)
        else:
            home.quarantine.share = 1
        pool.release(other)
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, False, False]
        for task in waiting:
            task.cancel()

    def request_of(document: int) -> sdg.Request:
        rollout = SimpleNamespace(document=SimpleNamespace(index=document))
        return cast(sdg.Request, SimpleNamespace(rollout=rollout))

    asyncio.run(wait())


def test_server_without_metrics_gets_all_that_the_flag_allows(launch: Launch, server: FakeServer) -> None:
    launch.input(documents(400))
    server.behave(lambda payload, n: Hang())

    running = launch.start(server=None, base_url=server.url, model=None, max_concurrent_generations=300)
    wait_until(lambda: server.in_flight == 300)
    server.release()
    assert running.finish().rc == 0

    assert len(launch.output.rows()) == 400
    assert server.max_in_flight == 300
    assert prompt_of(server.requests[0].payload)


# ── The compile lock ─────────────────────────────────────────────────────────────────────────────────────────────────


def start_two(
    launch: Launch, first: dict[str, Any], second: dict[str, Any], faults: str = "--start-seconds 1.5"
) -> list[Started]:
    """Start two runs of the fake vLLM, the second one after the server of the first has started."""
    env = launch.program("vllm") | {"FAKE_ENGINE": faults, "VLLM_CACHE_ROOT": str(launch.folder / "c")}
    launch.input(documents(3))
    there = len(launch.starts)
    runs = [launch.start(env, server="vllm", output=f"{there} one", **first)]
    wait_until(lambda: len(launch.starts) > there)
    return [*runs, launch.start(env, server="vllm", output=f"{there} two", **second)]


def test_servers_of_one_configuration_compile_one_after_the_other_and_only_once(launch: Launch) -> None:
    finished = [run.finish() for run in start_two(launch, {}, {})]
    assert [one.rc for one in finished] == [0, 0], finished
    first, second = (start["time"] for start in launch.starts)
    assert second - first > 1.4

    start_two(launch, {}, {}, "--hang")
    wait_until(lambda: len(launch.starts) == 4)  # although the third will never be ready


def test_run_continues_if_the_cache_cannot_be_written(launch: Launch) -> None:
    launch.input(documents(3))

    finished = launch(launch.program("vllm") | {"VLLM_CACHE_ROOT": "/dev/null/cache"}, server="vllm")

    everything(launch, 3, finished)
    assert "no compile lock" in finished.stderr


@pytest.mark.parametrize("second", [{"tp": 2}, {"no_compile_lock": True}, {"server_arg": "seed=1"}])
def test_other_configurations_do_not_wait(launch: Launch, second: dict[str, Any]) -> None:
    start_two(launch, {}, second, "--hang")
    wait_until(lambda: len(launch.starts) == 2)


def test_compile_lock_of_a_killed_run_is_free(launch: Launch) -> None:
    env = launch.program("vllm") | {"FAKE_ENGINE": "--hang --only-life 1", "VLLM_CACHE_ROOT": str(launch.folder / "c")}
    launch.input(documents(3))
    killed = launch.start(env, server="vllm", output="one")
    wait_until(lambda: launch.starts)
    waiting = launch.start(env, server="vllm", output="two")
    time.sleep(1)
    assert len(launch.starts) == 1

    killed.send(signal.SIGKILL)

    assert waiting.finish().rc == 0
    killed.finish(bugs=True)


# ── Several nodes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def start_nodes(launch: Launch) -> Callable[..., list[Started]]:
    """Starts a run on two nodes, which are both this machine; `launch.starts` has a line for each part."""
    launch.input(documents(100))
    address = f"127.0.0.1:{free_port()}"
    env = launch.program("vllm", "sglang", "python")

    def start(faults: str = "", head: dict[str, Any] | None = None, **options: Any) -> list[Started]:
        common = {"server": "vllm", "nodes": 2, "tp": 2, "head_address": address, **options}
        own: list[dict[str, Any]] = [head or {}, {}]
        return [
            launch.start(env | {"FAKE_ENGINE": faults}, node_rank=rank, **{**common, **own[rank]}) for rank in (0, 1)
        ]

    return start


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_two_nodes_serve_one_model(launch: Launch, start_nodes: Callable[..., list[Started]], name: str) -> None:
    head, other = start_nodes(server=name)

    everything(launch, 100, head.finish())
    ended = other.finish(10)
    assert ended.rc == 0
    assert "has joined" in ended.stderr
    assert not launch.processes()
    lines = sorted(" ".join(start["arguments"]) for start in launch.starts)
    assert len(lines) == 2
    flag = "--nnodes 2 --node-rank"
    assert all(f"{flag} {rank}" in line for rank, line in enumerate(sorted(lines, key=lambda x: x.partition(flag)[2])))


def test_death_of_a_part_on_another_node_restarts_all_parts(
    launch: Launch, start_nodes: Callable[..., list[Started]]
) -> None:
    head, other = start_nodes("--seconds 0.2", max_concurrent_generations=10)
    wait_until(lambda: len(launch.requests("answered")) > 10)
    part = next(start for start in launch.starts if "--headless" in start["arguments"])

    os.kill(part["pid"], signal.SIGKILL)

    finished = head.finish()
    everything(launch, 100, finished)
    assert "node 1" in finished.stderr
    assert len(launch.starts) == 4
    assert other.finish(10).rc == 0


def test_head_notices_that_a_node_is_gone(launch: Launch, start_nodes: Callable[..., list[Started]]) -> None:
    head, other = start_nodes("--seconds 60")
    wait_until(launch.requests)

    other.send(signal.SIGKILL)

    finished = head.finish(20)
    assert finished.rc == 1
    assert "node 1 is gone" in finished.message
    other.finish(bugs=True)
    wait_until(lambda: not launch.processes())


def test_other_nodes_end_with_the_head(launch: Launch, start_nodes: Callable[..., list[Started]]) -> None:
    head, other = start_nodes("--seconds 60")
    wait_until(launch.requests)

    head.send(signal.SIGKILL)

    finished = other.finish(20)
    assert finished.rc == 1
    assert finished.says("node 0", "is gone") if len(finished.lines) == 1 else "is gone" in finished.message
    head.finish(bugs=True)
    wait_until(lambda: not launch.processes())


def test_node_rank_and_head_come_from_slurm(launch: Launch) -> None:
    launch.input(documents(20))
    env = launch.program("vllm") | {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(free_port())}
    scontrol = launch.folder / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n')
    scontrol.chmod(0o755)
    started = [launch.start(env | {"SLURM_NODEID": str(rank)}, server="vllm", nodes=2, tp=2) for rank in (0, 1)]

    everything(launch, 20, started[0].finish(40))
    assert started[1].finish(20).rc == 0


def test_a_node_joins_only_with_the_token_in_the_state(launch: Launch) -> None:
    launch.input(documents(20))
    env = launch.program("vllm") | {"SLURM_JOB_ID": str(free_port()), "SLURM_RESTART_COUNT": "1"}
    meeting = launch.output.state / "00000.meeting.json"
    meeting.parent.mkdir(parents=True)
    meeting.write_text(json.dumps({"attempt": f"{env['SLURM_JOB_ID']}.0", "port": 1, "token": "of an earlier attempt"}))
    options = {"server": "vllm", "nodes": 2, "tp": 2, "head_address": "127.0.0.1"}
    head, other = (launch.start(env | {"SLURM_NODEID": str(rank)}, **options) for rank in (0, 1))
    other.send(signal.SIGSTOP)
    wait_until(lambda: json.loads(meeting.read_text())["port"] != 1)

    with socket.create_connection(("127.0.0.1", json.loads(meeting.read_text())["port"])) as stranger:
        stranger.sendall(b'{"node": 1, "layout": {}}\n')
        said = b"".join(iter(lambda: stranger.recv(1000), b"")).decode()
    other.send(signal.SIGCONT)

    assert "does not have the token" in said
    assert "tp" not in said
    assert meeting.stat().st_mode & 0o777 == 0o600
    everything(launch, 20, head.finish(40))
    assert other.finish(20).rc == 0


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on(launch: Launch, start_nodes: Callable[..., list[Started]]) -> None:
    """For longer than the silence after which a node counts as gone, and than a stall of the server."""
    impatient = (
        "from sdg_plugins.servers.launching import nodes, supervision\n"
        "nodes.BEAT, nodes.SILENCE, supervision.SUSPENDED = 0.5, 3, 2.5\n"
    )
    (launch.folder / "echo.py").write_text(textwrap.dedent(ECHO) + impatient)
    started = start_nodes("--seconds 1 --metrics", plugin="./echo.py", stall_timeout=4)
    wait_until(lambda: launch.requests("answered"))
    processes = list(launch.processes())

    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)

    everything(launch, 100, started[0].finish(60))
    assert len(launch.starts) == 2
    assert started[1].finish(20).rc == 0


def test_node_may_join_again_before_all_have_joined(launch: Launch) -> None:
    launch.input(documents(20))
    options = {"server": "vllm", "nodes": 3, "tp": 3, "head_address": f"127.0.0.1:{free_port()}"}
    env = launch.program("vllm")
    head, early = (launch.start(env, node_rank=rank, **options) for rank in (0, 1))
    time.sleep(1.5)
    early.send(signal.SIGKILL)
    early.finish(bugs=True)
    others = [launch.start(env, node_rank=rank, **options) for rank in (1, 2)]

    everything(launch, 20, head.finish(40))
    assert [other.finish(20).rc for other in others] == [0, 0]


def test_node_with_different_options_is_refused(launch: Launch, start_nodes: Callable[..., list[Started]]) -> None:
    head, other = start_nodes(head={"tp": 4})

    finished = other.finish(20)
    assert finished.rc == 1
    assert "different options" in finished.message
    head.send(signal.SIGTERM)
    assert head.finish(20).rc == 143


def test_nodes_that_do_not_join_are_named(launch: Launch) -> None:
    launch.input(documents(5))
    env = launch.program("vllm")

    finished = launch(env, server="vllm", nodes=3, tp=3, head_address=f"127.0.0.1:{free_port()}", start_timeout=1)

    assert finished.rc == 1
    assert "nodes 1, 2 have not joined" in finished.message


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def arguments_of(launch: Launch, name: str, **options: Any) -> str:
    """The command line that a fake program was started with."""
    launch.input(documents(2))
    finished = launch(launch.program(name, "python"), server=name, **options)
    assert finished.rc == 0, finished
    return " " + " ".join(launch.starts[-1]["arguments"]) + " "


NAMED = {
    "tp": 2,
    "pp": 3,
    "dp": 4,
    "model_max_context": 4096,
    "gpu_memory_utilization": 0.8,
    "quantization": "fp8",
    "kv_cache_dtype": "fp8_e5m2",
    "chunked_prefill": 8192,
}


def test_options_become_flags_of_vllm(launch: Launch) -> None:
    wanted = {"speculative_config": '{"method": "ngram"}', "server_arg": ["enforce-eager", "max_num_seqs=64"]}

    line = arguments_of(launch, "vllm", **NAMED, **wanted)

    for flag in (
        *("serve m", "--host 127.0.0.1", "--tensor-parallel-size 2", "--pipeline-parallel-size 3"),
        *("--data-parallel-size 4", "--max-model-len 4096", "--gpu-memory-utilization 0.8", "--quantization fp8"),
        *("--kv-cache-dtype fp8_e5m2", "--enable-chunked-prefill", "--max-num-batched-tokens 8192"),
        *('--speculative-config {"method": "ngram"}', "--enforce-eager", "--max-num-seqs 64"),
    ):
        assert f" {flag} " in line, line


def test_options_become_flags_of_sglang(launch: Launch) -> None:
    wanted = {"speculative_config": '{"algorithm": "EAGLE", "num-steps": 3}', "server_arg": "disable_radix_cache=true"}

    line = arguments_of(launch, "sglang", **NAMED, **wanted)

    for flag in (
        *("-m sglang.launch_server --model-path m", "--host 127.0.0.1", "--tp-size 2", "--pp-size 3", "--dp-size 4"),
        *("--context-length 4096", "--mem-fraction-static 0.8", "--quantization fp8", "--kv-cache-dtype fp8_e5m2"),
        *("--chunked-prefill-size 8192", "--speculative-algorithm EAGLE", "--speculative-num-steps 3"),
        *("--enable-metrics", "--disable-radix-cache"),
    ):
        assert f" {flag} " in line, line


def test_own_flags_win_and_booleans_can_be_switched_off(launch: Launch) -> None:
    line = arguments_of(
        launch,
        "vllm",
        model_max_context=4096,
        chunked_prefill="off",
        server_arg=["max-model-len=100", "enable-prefix-caching=False", 'override={"a": 1}', "served-model-name=n"],
    )

    assert " --max-model-len 100 " in line
    assert "4096" not in line
    assert " --no-enable-chunked-prefill " in line
    assert " --no-enable-prefix-caching " in line
    assert ' --override {"a": 1} ' in line
    assert launch.output.stats()["model"] == "n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"server": None, "base_url": "http://127.0.0.1:1", "tp": 2},
            ["--tp requires --server command or"],
        ),
        ({"server": "vllm", "model": "./typo"}, ["--model ./typo", "no such folder"]),
        ({"server": None, "model": "m"}, ["--model m requires a server", "--base-url"]),
        ({"server": "vllm", "nodes": 2, "tp": 3, "head_address": "a"}, ["--tp 3", "--nodes 2"]),
        ({"server": "vllm", "model": None}, ["--server vllm requires --model"]),
        ({"server": "command", "server_command": "serve it"}, ["{port}"]),
        ({"server": "vllm", "server_arg": "api-key=x"}, ["api-key", "VLLM_API_KEY"]),
        ({"server": "vllm", "nodes": 2, "node_rank": 2, "head_address": "a"}, ["--node-rank 2", "--nodes 2"]),
        ({"server": "vllm", "nodes": 2, "tp": 2}, ["--head-address"]),
        ({"server": "vllm", "nodes": 2, "tp": 2, "replicas": 2, "head_address": "a"}, ["--replicas"]),
        ({"server": "sglang", "node_backend": "ray"}, ["--node-backend ray"]),
        ({"server": "vllm", "chunked_prefill": "maybe"}, ["on, off, or a number"]),
    ],
)
def test_invalid_options_are_refused(launch: Launch, options: dict[str, Any], words: list[str]) -> None:
    launch.input(documents(2))

    finished = launch(launch.program("vllm", "sglang"), **options)

    assert finished.rc == 2
    assert finished.says(*words)
    assert not launch.starts
