"""The templates in slurm/, run by the sbatch of a real cluster on this machine: `pytest -m real`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import real_engines
from fake_hub import FakeHub, Rights
from fake_server import Delay, FakeServer, Hang, prompt_of
from running import ECHO, ROOT, SIGNS_OF_A_BUG, Finished, Output, documents
from slurm_cluster import ADDRESS, NODES, Cluster, Unavailable, wait_for

pytestmark = pytest.mark.real

SLURM = ROOT / "slurm"
QUICK_HEARTBEAT = "\n    from sdg_plugins.common import statistics\n    statistics.HEARTBEAT = 0.5\n"
ENGINE = ROOT / "tests" / "support" / "fake_engine.py"
AT_ONCE = 4  # requests of a rank in flight
LOST = 2 * AT_ONCE  # most requests that a kill loses: these, and those answered in the last tenth of a second


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            real_engines.ROOT.mkdir(parents=True, exist_ok=True)
            cluster = stack.enter_context(Cluster([ROOT, Path(sys.prefix), real_engines.ROOT]))
        except Unavailable as reason:
            if os.environ.get("SDG_TEST_SKIPS") == "no":  # as in .ci/run: there it is a failure
                raise
            pytest.skip(f"NO SLURM CLUSTER: {reason}")
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up. No process may be left on them afterwards."""
    shared_cluster.restore()
    yield shared_cluster
    shared_cluster.slurm("scancel", "--user=root", check=False)
    wait_for(lambda: not shared_cluster.processes(), 30, shared_cluster.processes)


@pytest.fixture
def slow() -> Iterator[FakeServer]:
    """A server that all nodes can reach, and that responds after half a second."""
    with FakeServer(ADDRESS) as server:
        server.behave(lambda payload, n: Delay(0.5))
        yield server
    assert not server.errors


@dataclass
class Campaign:
    """A run on the cluster, in its own folder."""

    cluster: Cluster
    folder: Path
    options: dict[str, Any]
    env: dict[str, str]

    @property
    def output(self) -> Output:
        return Output(self.folder / "out")

    @property
    def logs(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted((self.output.state / "logs").iterdir())}

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return self.cluster.environment(**{"PATH": path, "PYTHONPATH": str(ROOT / "tests/support/without"), **self.env})

    def words(self, **options: Any) -> list[str]:
        words: list[str] = []
        for name, value in {**self.options, **options}.items():
            for item in value if isinstance(value, list) else [value]:
                words += [] if item is None else [f"--{name.replace('_', '-')}={item}"]
        return words

    def call(self, *command: object) -> Finished:
        began = time.monotonic()
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment(), capture_output=True, text=True, timeout=120, check=False
        )
        return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def sdg(self, command: str, *arguments: object) -> Finished:
        return self.call(sys.executable, ROOT / "sdg.py", command, "--output", self.output.path, *arguments)

    def submit(self, *flags: object, **options: Any) -> tuple[str, str, str]:
        """Call submit.sh; returns the job ids of ranks, monitor and card."""
        done = self.call(SLURM / "submit.sh", "--monitor", "--interval 1", *flags, "--", *self.words(**options))
        assert done.rc == 0, done
        ranks, monitor, card = re.findall(r"^\w+ +job (\d+)", done.stdout, re.MULTILINE)
        return ranks, monitor, card

    def sbatch(self, *arguments: object, **options: Any) -> str:
        """Call sbatch with a template; returns the job id."""
        done = self.call("sbatch", "--parsable", *arguments, *self.words(**options))
        assert done.rc == 0, done
        return done.stdout.strip()

    def done(self, job: str, seconds: float = 120) -> None:
        """Wait until all tasks of a job have succeeded."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.cluster.wait_for(job, *ended, seconds=seconds)
        assert set(self.cluster.states(job)) == {"COMPLETED"}, self.cluster.told(job)

    def answers(self, rank: int) -> int:
        """Documents of a rank that are final, by its statistics."""
        with contextlib.suppress(OSError, ValueError):
            figures = json.loads((self.output.state / f"{rank:05d}.stats.json").read_text())
            return int(figures["documents"])
        return 0

    def everything(self, count: int) -> None:
        """Check that each document has exactly one row, and that no log has an error."""
        assert sorted(self.output.ids()) == [row["id"] for row in documents(count)]
        verified = self.sdg("verify")
        assert verified.rc == 0, verified
        for name, text in self.logs.items():
            theirs = name.startswith("vllm-")  # vLLM's own log has warnings
            assert theirs or not [sign for sign in SIGNS_OF_A_BUG if sign in text], (name, text)


@pytest.fixture
def campaign(cluster: Cluster, slow: FakeServer, request: pytest.FixtureRequest) -> Campaign:
    """A run of an echo rollout against the slow server."""
    folder = cluster.shared / request.node.name
    folder.mkdir()
    (folder / "echo.py").write_text(textwrap.dedent(ECHO + QUICK_HEARTBEAT))
    options = {"plugin": "./echo.py", "input": "input.parquet", "output": "out", "base_url": slow.url}
    options |= {"records_per_chunk": 10, "max_concurrent_generations": AT_ONCE}
    return Campaign(cluster, folder, options, {})


def write(campaign: Campaign, count: int) -> list[str]:
    """Write the input; returns the documents' texts."""
    rows = documents(count)
    pq.write_table(pa.Table.from_pylist(rows), campaign.folder / "input.parquet")
    return [row["text"] for row in rows]


def answer_slowly(server: FakeServer, texts: list[str], ranks: int, waiting: set[int]) -> None:
    """Delay the responses to ranks that are still to be interrupted."""
    rank_of = {text: i // 10 % ranks for i, text in enumerate(texts)}
    server.behave(lambda payload, n: Delay(1.0 if rank_of[prompt_of(payload)] in waiting else 0.2))


def sent_again(server: FakeServer, texts: list[str], rank: int, world: int, chunk: int = 10) -> int:
    """The number of repeated requests for a rank's documents."""
    mine = {text for i, text in enumerate(texts) if i // chunk % world == rank}
    asked = Counter(request.prompt for request in server.requests if request.prompt in mine)
    assert set(asked) == mine
    return sum(asked.values()) - len(mine)


# ── Arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_array_with_monitor_and_card_fills_a_repository(campaign: Campaign, slow: FakeServer) -> None:
    texts = write(campaign, 160)
    with FakeHub(ADDRESS) as hub:
        hub.tokens["hf_write"] = Rights("alice")
        campaign.env |= hub.environment(campaign.folder, "hf_write")
        options = {"output": "hf://datasets/alice/out", "state_dir": "out/.sdg"}

        ranks, monitor, card = campaign.submit("--ranks=8", "--at-once=3", **options)
        most = 0

        def over() -> bool:
            nonlocal most
            most = max(most, campaign.cluster.states(ranks).count("RUNNING"))
            return set(campaign.cluster.states(card)) == {"COMPLETED"}

        wait_for(over, 150, lambda: campaign.logs)
        files = hub.files("alice/out")
        errors, writers = hub.errors, [commit.author for commit in hub.commits("alice/out")]

    assert most == 3
    assert campaign.cluster.states(monitor) == ["COMPLETED"]
    rows = [row["id"] for name in files if name.startswith("data/") for row in rows_in(files[name])]
    assert sorted(rows) == [row["id"] for row in documents(160)]
    assert len(slow.requests) == 160 == len({*texts})
    readme = files["README.md"].decode()
    assert "| Documents | 160 |" in readme
    assert "being generated" not in readme
    assert "Not finished" not in readme
    assert not errors
    assert writers
    assert "160 of 160" in campaign.logs[f"card-{card}.log"]
    assert {f"rank-{rank}-{ranks}.log" for rank in range(8)} <= {*campaign.logs}


def rows_in(content: bytes) -> list[dict[str, Any]]:
    return pq.read_table(pa.BufferReader(content)).to_pylist()  # type: ignore[no-any-return]


def test_an_interrupted_rank_loses_only_requests_in_flight(campaign: Campaign, slow: FakeServer) -> None:
    """One rank each for: a kill, a signal, a requeue by hand, the time limit, a preemption. The monitor is signaled."""
    cluster, texts = campaign.cluster, write(campaign, 5 * 100)
    waiting = {*range(5)}
    answer_slowly(slow, texts, 5, waiting)
    ranks, monitor, card = campaign.submit("--ranks=5", "--cpus-per-task=4", "--signal=B:USR1@50")
    wait_for(lambda: all(campaign.answers(rank) > 3 for rank in range(5)), 90, lambda: campaign.logs)

    node = cluster.task(ranks, 4).node
    kill_engine(campaign, 0)
    cluster.slurm("scancel", "--signal=USR1", f"{ranks}_1")
    cluster.slurm("scontrol", "requeue", f"{ranks}_2")
    cluster.slurm("scontrol", "update", f"jobid={ranks}_3", "timelimit=1")
    urgent = cluster.submit("-p", "urgent", "-w", node, "--exclusive", "--wrap", "sleep 5", "--output=/dev/null")
    cluster.slurm("scancel", "--batch", "--signal=USR1", monitor)
    for rank in (0, 1, 2, 4, 3):  # Slurm checks time limits every 30 s
        wait_for(lambda rank=rank: cluster.task(ranks, rank).restarts, 90, lambda: campaign.logs)  # type: ignore[misc]
        waiting.remove(rank)

    campaign.done(ranks, 150)
    campaign.done(card)
    campaign.done(urgent)
    assert cluster.job(monitor).restarts >= 1
    campaign.everything(500)
    again = {rank: sent_again(slow, texts, rank, 5) for rank in range(5)}
    print("sent again:", again)
    assert all(count <= LOST * cluster.task(ranks, rank).restarts for rank, count in again.items()), again


def kill_engine(campaign: Campaign, rank: int) -> None:
    """Kill a rank's engine, as the kernel does when memory is exhausted."""
    for pid, line in campaign.cluster.processes().items():
        if "sdg.py" in line and line.endswith(f"--rank {rank}") and not line.startswith(("srun", "/bin/bash")):
            os.kill(pid, 9)
            return
    raise AssertionError(campaign.cluster.processes())


def test_a_node_that_is_switched_off_loses_nothing(campaign: Campaign, slow: FakeServer) -> None:
    cluster, texts = campaign.cluster, write(campaign, 3 * 60)
    waiting = {*range(3)}
    answer_slowly(slow, texts, 3, waiting)
    ranks, _, card = campaign.submit("--ranks=3", "--cpus-per-task=8")
    wait_for(lambda: all(campaign.answers(rank) > 3 for rank in range(3)), 90, lambda: campaign.logs)

    lost = next(job for job in cluster.jobs(ranks) if job.node == "node2")
    cluster.switch_off("node2")
    waiting.clear()

    campaign.done(ranks)
    campaign.done(card)
    assert cluster.job(lost.id).restarts == 1
    assert cluster.job(lost.id).node in {"node1", "node3"}
    campaign.everything(180)
    assert sum(sent_again(slow, texts, rank, 3) for rank in range(3)) <= LOST


def test_canceled_ranks_are_reported_and_can_be_rerun_alone(campaign: Campaign, slow: FakeServer) -> None:
    cluster, texts = campaign.cluster, write(campaign, 4 * 40)
    waiting = {1, 3}
    answer_slowly(slow, texts, 4, waiting)
    ranks, monitor, card = campaign.submit("--ranks=4", "--monitor=--interval 1 --patience 2")
    wait_for(lambda: all(campaign.answers(rank) > 3 for rank in range(4)), 90, lambda: campaign.logs)

    cluster.slurm("scancel", f"{ranks}_1", f"{ranks}_3")

    wait_for(lambda: cluster.states(card) == ["FAILED"], 90, lambda: campaign.logs)
    assert cluster.states(ranks) == ["CANCELLED", "CANCELLED", "COMPLETED", "COMPLETED"]
    assert "ended early" in campaign.logs[f"monitor-{monitor}.log"]
    told = campaign.sdg("status")
    assert told.rc == 1
    assert "ranks 1,3" in told.stdout
    assert "Ended early" in (campaign.output.path / "README.md").read_text()
    assert "stopped" in campaign.logs[f"card-{card}.log"]
    before = len(slow.requests)
    waiting.clear()

    again, _, card = campaign.submit("--ranks=4", "--array=1,3")
    campaign.done(again)
    campaign.done(card)

    assert len(cluster.jobs(again)) == 2
    campaign.everything(160)
    assert "Ended early" not in (campaign.output.path / "README.md").read_text()
    assert campaign.sdg("status").rc == 0
    assert len(slow.requests) - before < 80
    assert sum(sent_again(slow, texts, rank, 4) for rank in range(4)) <= 2 * LOST


def test_a_monitor_that_is_killed_is_requeued(campaign: Campaign) -> None:
    write(campaign, 60)
    _, monitor, card = campaign.submit("--ranks=1")

    def pid() -> int | None:
        lines = campaign.cluster.processes().items()
        return next((pid for pid, line in lines if "sdg.py monitor" in line and not line.startswith("/bin/bash")), None)

    wait_for(pid, 60, lambda: campaign.logs)
    os.kill(pid() or 0, 9)

    campaign.done(monitor)
    campaign.done(card)
    assert campaign.cluster.job(monitor).restarts == 1
    campaign.everything(60)


def test_requeues_are_limited_and_invalid_options_cause_none(campaign: Campaign) -> None:
    write(campaign, 20)
    deadly = "import os, signal\n" + textwrap.dedent(ECHO).replace(
        "    return await", "    os.kill(os.getpid(), signal.SIGKILL)\n    return await"
    )
    (campaign.folder / "deadly.py").write_text(deadly)
    campaign.env |= {"SDG_REQUEUES": "1", "SDG_SLURM": str(SLURM)}
    script, log = SLURM / "generate.sbatch", "--output=%j.log"

    killed = campaign.sbatch(log, script, plugin="./deadly.py", output="killed")
    unreachable = campaign.sbatch(log, script, output="unreachable", base_url=f"http://{ADDRESS}:1")
    mistyped = campaign.sbatch(log, script, output="mistyped", prompt_column="no-such")
    fresh = campaign.sbatch(log, script, "--fresh", output="fresh")
    unsliced = campaign.sbatch(log, "--array=1", script, output="unsliced")

    refused = ((mistyped, 0, "1:0"), (fresh, 0, "2:0"), (unsliced, 0, "2:0"))
    for job, restarts, code in ((killed, 1, "137:0"), (unreachable, 0, "1:0"), *refused):
        campaign.cluster.wait_for(job, "FAILED")
        found = campaign.cluster.job(job)
        assert (found.restarts, found.fields["ExitCode"]) == (restarts, code), campaign.cluster.told(job)
    assert "SDG_REQUEUES" in campaign.cluster.told(killed)


HOARDING = """
    import os, subprocess, sys
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("hoard", hoard)

    async def hoard(document, generate):
        if not os.path.exists("hoarded"):
            open("hoarded", "w").close()
            if os.environ["HOARDER"] == "helper":
                subprocess.run([sys.executable, "-c", "x = bytearray(1 << 30)"])
            else:
                x = bytearray(1 << 30)
        return await generate(document.text)
"""


def test_an_engine_killed_for_memory_is_requeued_and_a_killed_helper_changes_nothing(campaign: Campaign) -> None:
    if not campaign.cluster.limits_memory:
        pytest.skip("NO CGROUPS FOR MEMORY")
    write(campaign, 20)
    (campaign.folder / "hoard.py").write_text(textwrap.dedent(HOARDING))
    script, flags = SLURM / "generate.sbatch", ["--output=%j.log", "--mem=500M", "--array=0"]

    for hoarder, restarts in (("engine", 1), ("helper", 0)):
        (campaign.folder / "hoarded").unlink(missing_ok=True)
        campaign.env["HOARDER"] = hoarder
        job = campaign.sbatch(*flags, script, plugin="./hoard.py", output=hoarder)
        campaign.done(job)

        told = campaign.cluster.told(job)
        assert campaign.cluster.job(job).restarts == restarts, told
        assert ("out of memory: the engine was killed; raise --mem" in told) == bool(restarts), told


def test_a_server_killed_for_memory_is_said_to_be_and_the_rank_is_requeued_without_avoiding_the_node(
    campaign: Campaign,
) -> None:
    if not campaign.cluster.limits_memory:
        pytest.skip("NO CGROUPS FOR MEMORY")
    write(campaign, 20)
    fake_vllm(campaign, "[ -n \"$SLURM_RESTART_COUNT\" ] || exec python3 -c 'x = bytearray(1 << 30)'", seconds=0.05)

    job = campaign.sbatch("--output=%j.log", "--mem=500M", "--gpus-per-node=1", SLURM / "generate.sbatch")
    campaign.done(job)

    told, found = campaign.cluster.told(job), campaign.cluster.job(job)
    assert found.restarts == 1, told
    assert "out of memory: a process of the job was killed" in told
    assert "--mem" in told
    assert found.fields["ExcNodeList"] == "(null)", told
    assert sorted(campaign.output.ids()) == [row["id"] for row in documents(20)]


def test_wrong_options_on_two_nodes_cost_one_attempt(campaign: Campaign) -> None:
    write(campaign, 20)
    fake_vllm(
        campaign, "case $* in *no-such-flag*) echo 'vllm: error: unrecognized arguments: --no-such-flag'; exit 2; esac"
    )
    script, flags = SLURM / "multinode.sbatch", ["--output=%j.log", "--gpus-per-node=1"]
    wrong = {
        "unknown": {"no_such_option": 1},
        "layout": {"tp": 3},
        "column": {"tp": 2, "prompt_column": "no-such"},
        "server": {"tp": 2, "server_arg": "no-such-flag"},
    }

    jobs = {name: campaign.sbatch(*flags, script, output=name, **options) for name, options in wrong.items()}

    for name, job in jobs.items():
        campaign.cluster.wait_for(job, "FAILED", "COMPLETED")
        found = campaign.cluster.job(job)
        code = "2:0" if name in {"unknown", "layout"} else "1:0"
        assert (found.restarts, found.fields["ExitCode"]) == (0, code), campaign.cluster.told(job)
        assert "not requeued" in campaign.cluster.told(job)


def test_ranks_leave_a_node_on_which_the_server_always_fails(campaign: Campaign) -> None:
    write(campaign, 200)
    fake_vllm(campaign, "[ $(hostname) != node2 ] || { echo 'RuntimeError: no GPU'; exit 1; }", seconds=0.05)

    ranks, _, card = campaign.submit("--ranks=20", "--gpus-per-node=2")

    campaign.done(ranks, 300)
    campaign.done(card)
    campaign.everything(200)
    assert all(job.restarts <= 2 for job in campaign.cluster.jobs(ranks))


def test_templates_work_from_any_folder_and_with_an_installed_sdg(campaign: Campaign) -> None:
    """From a folder with spaces in its name, outside of the checkout, and without the submission's environment."""
    write(campaign, 80)
    copied = campaign.folder / "my scripts"
    shutil.copytree(SLURM, copied)
    bin_folder = Path(sys.executable).parent
    assert (bin_folder / "sdg").exists()
    keep = f"--export=PATH={bin_folder}:/usr/bin:/bin,SLURM_CONF={campaign.environment()['SLURM_CONF']}"

    installed = campaign.sbatch(keep, "--array=3,7", copied / "generate.sbatch", "--world-size", 8)
    beside = campaign.sbatch("--array=0-2,4-6", SLURM / "generate.sbatch", "--world-size", 8)
    campaign.done(installed)
    campaign.done(beside)

    assert sorted(campaign.output.ids()) == [row["id"] for row in documents(80)]
    assert campaign.sdg("verify").rc == 0
    assert len(list(campaign.folder.glob("sdg-*.log"))) == 8


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        (["--partition=no-such"], {}, "Invalid partition"),
        (["--beside=--partition=no-such"], {}, "canceled job"),
        ([], {"temperature": "hot"}, "--temperature"),
        ([], {"prompt_column": "no-such"}, "no such column"),
        ([], {"plugin": "./no-such.py"}, "no such file"),
        ([], {"base_url": None, "server": "vllm"}, "--model"),
        (["--nodes=3"], {"base_url": None, "server": "vllm", "model": "m", "tp": 2}, "evenly"),
        (["--array=9"], {}, "0 to 1"),
        ([], {"world_size": 3}, "--ranks"),
    ],
)
def test_configuration_errors_are_reported_at_submission(
    campaign: Campaign, flags: list[str], options: dict[str, Any], words: str
) -> None:
    write(campaign, 20)

    done = campaign.call(SLURM / "submit.sh", "--ranks=2", *flags, "--", *campaign.words(**options))

    assert done.rc in {1, 2}
    assert words in done.stderr, done
    wait_for(lambda: not campaign.cluster.slurm("squeue", "--noheader").strip(), 30)
    assert not campaign.output.path.exists() or not campaign.output.data()


def test_a_thousand_ranks_are_submitted_as_one_array(campaign: Campaign) -> None:
    write(campaign, 20)

    ranks, _, _ = campaign.submit("--ranks=1000", "--at-once=50", "--hold", records_per_chunk=1)

    assert len(campaign.cluster.slurm("squeue", "--noheader", "--array", "--jobs", ranks).splitlines()) == 1000


def test_a_cluster_with_small_arrays_refuses_more_ranks_and_workers_take_them(campaign: Campaign) -> None:
    """Nine ranks where arrays have eight tasks. A worker is canceled, another one joins, and its engine is killed."""
    write(campaign, 9 * 20)
    own_node = "--cpus-per-task=8"
    with campaign.cluster.limit_arrays(8):
        nine = campaign.call(SLURM / "submit.sh", "--ranks=9", "--", *campaign.words())
        fits = campaign.call(SLURM / "submit.sh", "--ranks=8", "--hold", "--", *campaign.words(output="fits"))
        assert nine.rc == 2, nine
        assert "at most 8 tasks (MaxArraySize)" in nine.stderr
        assert fits.rc == 0, fits
        campaign.cluster.slurm("scancel", "--user=root")
        workers, _, first = campaign.submit("--ranks=9", "--workers=2", own_node)
        wait_for(lambda: len(ranks_begun(campaign)) == 2, 60, lambda: campaign.logs)

        campaign.cluster.slurm("scancel", f"{workers}_0")
        joined, _, last = campaign.submit("--ranks=9", "--workers=1", own_node)
        wait_for(lambda: len(ranks_begun(campaign)) >= 4, 60, lambda: campaign.logs)
        os.kill(pid_on(campaign, campaign.cluster.task(joined, 0).node, "sdg.py", "--rank any"), 9)

        for job in (joined, last, first):
            campaign.done(job)
    assert campaign.cluster.states(workers) == ["CANCELLED", "COMPLETED"]
    assert campaign.cluster.task(joined, 0).restarts == 1
    campaign.everything(180)
    assert campaign.sdg("status").rc == 0


def ranks_begun(campaign: Campaign) -> list[int]:
    return [rank for rank in range(9) if campaign.answers(rank)]


def test_shellcheck_finds_nothing_in_the_scripts(cluster: Cluster) -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *sorted(SLURM.glob("*.s*"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# ── Workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tap:
    """Lets a server answer some requests; the following ones hang until it is opened again."""

    def __init__(self, server: FakeServer, seconds: float = 0.2) -> None:
        self._server, self._seconds, self._most = server, seconds, 0
        server.behave(self._behaviour)

    def _behaviour(self, payload: dict[str, Any], n: int) -> Delay:
        return Delay(self._seconds, None if len(self._server.requests) <= self._most else Hang())

    def allow(self, more: int) -> None:
        """Answer what hangs, and some more requests."""
        self._most = len(self._server.requests) + more
        self._server.release()
        self._server.hold()

    def open(self) -> None:
        """Answer all requests from now on."""
        self._server.behave(lambda payload, n: Delay(self._seconds))
        self._server.release()


def settle(campaign: Campaign, server: FakeServer, ranks: int, workers: dict[str, int]) -> None:
    """Wait until all requests of some workers hang, and `status` tells the truth about the ranks.

    Args:
        workers: how many there are of each job.
    """
    count = sum(workers.values())
    wait_for(lambda: server.in_flight == AT_ONCE * count, 60, lambda: (server.in_flight, workers, campaign.logs))

    def is_told() -> bool:
        status = json.loads(campaign.sdg("status", "--json").stdout)
        parts, holders = status["parts"], [rank["holder"] for rank in status["ranks"] if rank["holder"]]
        files = Counter(name.partition("_")[0] for name in campaign.output.written())
        living = Counter(job for job, _, _ in {(who["slurm_job"], who["host"], who["pid"]) for who in holders})
        # A worker takes its next rank when the last document of the present one has begun.
        few_or_many = count <= parts["taken"] <= 2 * count
        done = parts["done"] == sum(chunks == 2 for chunks in files.values())
        return done and few_or_many and sum(parts.values()) == ranks and living == workers

    wait_for(is_told, 60, lambda: (workers, campaign.sdg("status", "--ranks").stdout, campaign.logs))


def test_workers_come_and_go_and_a_node_is_switched_off_and_on_again(campaign: Campaign, slow: FakeServer) -> None:
    cluster, ranks = campaign.cluster, 24
    write(campaign, ranks * 20)
    campaign.options["max_concurrent_documents"] = AT_ONCE
    campaign.env["SDG_LEASE"] = "5"
    tap = Tap(slow)
    tap.allow(100)
    first, _, earlier = campaign.submit("--ranks=24", "--workers=3", "--cpus-per-task=6")  # each on a node of its own
    settle(campaign, slow, ranks, {first: 3})

    cluster.slurm("scancel", f"{first}_1")
    settle(campaign, slow, ranks, {first: 2})
    tap.allow(50)
    joined, _, card = campaign.submit("--ranks=24", "--workers=2", "--cpus-per-task=3")  # in the place of that one
    settle(campaign, slow, ranks, {first: 2, joined: 2})

    lost = max((job for job in cluster.jobs(first) if job.state == "RUNNING"), key=lambda job: job.node)
    assert lost.node not in {job.node for job in cluster.jobs(joined)}
    cluster.switch_off(lost.node)
    tap.allow(50)
    settle(campaign, slow, ranks, {first: 1, joined: 2})
    cluster.switch_on(lost.node)
    settle(campaign, slow, ranks, {first: 2, joined: 2})
    tap.open()

    for job in (joined, card, earlier):
        campaign.done(job)
    assert cluster.states(first) == ["CANCELLED", "COMPLETED", "COMPLETED"]
    assert cluster.job(lost.id).restarts == 1
    campaign.everything(ranks * 20)
    told = campaign.sdg("status")
    assert told.rc == 0
    assert "parts: 24 done, 0 taken, 0 free" in told.stdout
    wait_for(lambda: not cluster.processes(), 30, cluster.processes)
    again = len(slow.requests) - ranks * 20
    print("sent again:", again)
    assert again <= 2 * LOST


@pytest.mark.parametrize("lost", [False, True], ids=["alone", "with its node"])
def test_a_worker_that_is_frozen_until_others_have_finished_its_ranks_writes_nothing(
    lost: bool, campaign: Campaign, slow: FakeServer
) -> None:
    """If Slurm takes its node for lost, it starts the worker on another one meanwhile."""
    cluster, ranks = campaign.cluster, 6
    write(campaign, ranks * 20)
    campaign.options["max_concurrent_documents"] = AT_ONCE
    campaign.env["SDG_LEASE"] = "4"
    tap = Tap(slow)
    tap.allow(20)
    workers, _, card = campaign.submit("--ranks=6", "--workers=2", "--cpus-per-task=8")  # each on a node of its own
    settle(campaign, slow, ranks, {workers: 2})

    node = cluster.task(workers, 0).node
    with cluster.frozen(node, lost):
        tap.open()
        cluster.wait_for(workers if lost else f"{workers}_1", "COMPLETED")
        assert "parts: 6 done, 0 taken, 0 free" in campaign.sdg("status").stdout
        before = files_of_ranks(campaign)
    wait_for(lambda: not cluster.processes(node), 60, lambda: cluster.processes(node))

    assert files_of_ranks(campaign) == before
    campaign.done(workers)
    campaign.done(card)
    assert cluster.task(workers, 0).restarts == lost
    assert "is taken over" in campaign.logs[f"rank-1-{workers}.log"]
    assert lost or "another process has taken it" in campaign.logs[f"rank-0-{workers}.log"]
    campaign.everything(ranks * 20)


def files_of_ranks(campaign: Campaign) -> dict[Path, tuple[bytes, int]]:
    """What ranks have written: content and time of each of their files, in the output and in the state."""
    patterns = ["data/*", "failed/*", ".sdg/0*", ".sdg/ranks/*/*.sqlite3*"]
    files = [path for pattern in patterns for path in campaign.output.path.glob(pattern) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files if path.suffix != ".sqlite3-shm"}


# ── Models on several nodes ──────────────────────────────────────────────────────────────────────────────────────────


def fake_vllm(campaign: Campaign, script: str = "", seconds: float = 0.5) -> None:
    """Put a fake vLLM into PATH that runs a shell script first, and responds after some seconds."""
    programs = campaign.folder / "bin"
    programs.mkdir()
    engine = f'exec python3 {ENGINE} --folder {campaign.folder}/engine --seconds {seconds} "$@"'
    (programs / "vllm").write_text(f"#!/bin/sh\n{script}\n{engine}\n")
    (programs / "vllm").chmod(0o755)
    campaign.options |= {"base_url": None, "server": "vllm", "model": "played"}
    campaign.env["PATH"] = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def starts(campaign: Campaign) -> list[dict[str, Any]]:
    path = campaign.folder / "engine" / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def asked(campaign: Campaign) -> Counter[str]:
    """How often the fake engine has received each prompt."""
    lines = (campaign.folder / "engine" / "requests.jsonl").read_text().splitlines()
    return Counter(line["prompt"] for line in map(json.loads, lines) if line["event"] == "came")


def pid_on(campaign: Campaign, node: str, *words: str) -> int:
    """The first process on a node whose command line has all these words, without the shells and srun around it."""
    found = [
        pid
        for pid, line in campaign.cluster.processes(node).items()
        if all(word in line for word in words) and not line.startswith(("srun", "/bin/bash", "bash"))
    ]
    assert found, (words, campaign.cluster.processes(node))
    return min(found)


def nodes_of(campaign: Campaign, job: str) -> list[str]:
    return campaign.cluster.slurm("scontrol", "show", "hostnames", campaign.cluster.job(job).fields["NodeList"]).split()


def test_ranks_on_two_nodes_survive_the_death_of_a_head_and_of_a_worker(campaign: Campaign) -> None:
    write(campaign, 2 * 60)
    fake_vllm(campaign, seconds=1.0)
    ranks, _, card = campaign.submit("--ranks=2", "--nodes=2", "--gpus-per-node=1", tp=2)
    wait_for(lambda: all(campaign.answers(rank) > 3 for rank in range(2)), 90, lambda: campaign.logs)

    head, worker = nodes_of(campaign, f"{ranks}_0")[0], nodes_of(campaign, f"{ranks}_1")[1]
    os.kill(pid_on(campaign, head, "sdg.py", "--rank 0"), 9)
    os.kill(pid_on(campaign, worker, "sdg.py", "--rank 1"), 9)

    campaign.done(ranks)
    campaign.done(card)
    assert [job.restarts for job in campaign.cluster.jobs(ranks)] == [1, 1]
    campaign.everything(120)
    assert sum(asked(campaign).values()) - 120 <= 2 * LOST


def test_a_process_that_hangs_on_another_node_does_not_hold_a_finished_rank(campaign: Campaign) -> None:
    write(campaign, 20)
    fake_vllm(campaign)
    hanging = (
        f'{sys.executable} {ROOT}/sdg.py "$@"; status=$?; [[ ${{SLURM_NODEID:-0}} == 0 ]] || sleep 600; exit $status'
    )
    (campaign.folder / "hanging.sh").write_text(hanging)
    campaign.env |= {"SDG": f"bash {campaign.folder}/hanging.sh", "SDG_WAIT": "5"}

    rank, _, card = campaign.submit("--nodes=2", "--gpus-per-node=1", tp=2)

    campaign.done(rank)
    campaign.done(card)
    assert campaign.cluster.job(f"{rank}_0").restarts == 0
    campaign.everything(20)


def test_a_rank_that_loses_a_node_continues_on_others(campaign: Campaign) -> None:
    write(campaign, 60)
    fake_vllm(campaign)
    rank, _, card = campaign.submit("--nodes=2", "--gpus-per-node=2", tp=4)
    wait_for(lambda: campaign.answers(0) > 8, 60, lambda: campaign.logs)

    _, worker = nodes_of(campaign, rank)
    campaign.cluster.lose(worker)

    campaign.done(rank, 180)
    campaign.done(card)
    assert worker not in nodes_of(campaign, rank)
    campaign.everything(60)
    assert sum(asked(campaign).values()) - 60 <= LOST


def test_two_nodes_refuse_a_stranger_and_survive_a_suspension_of_their_job(campaign: Campaign) -> None:
    """Nodes count as lost after 4 s of silence here, and the job is suspended for 10 s."""
    write(campaign, 60)
    fake_vllm(campaign)
    quick = "\nfrom sdg_plugins.servers.launching import nodes\nnodes.BEAT, nodes.SILENCE = 1.0, 4.0\n"
    (campaign.folder / "echo.py").write_text(textwrap.dedent(ECHO + QUICK_HEARTBEAT) + quick)
    rank, _, card = campaign.submit("--nodes=2", "--gpus-per-node=1", tp=2)
    wait_for(lambda: campaign.answers(0) > 4, 60, lambda: campaign.logs)
    meeting = json.loads((campaign.output.state / "00000.meeting.json").read_text())
    head = NODES[nodes_of(campaign, rank)[0]]

    for token in ("", "guessed", meeting["token"][:-1]):
        with socket.create_connection((head, meeting["port"]), timeout=10) as stranger:
            stranger.sendall(json.dumps({"node": 1, "host": "stranger", "token": token}).encode() + b"\n")
            said = b"".join(iter(lambda: stranger.recv(1 << 16), b"")).decode()
        assert "does not have the token" in said
        assert "layout" not in said
        assert meeting["token"] not in said
    campaign.cluster.slurm("scontrol", "suspend", f"{rank}_0")
    wait_for(lambda: campaign.cluster.states(rank) == ["SUSPENDED"], 30)
    before = len(asked(campaign))
    time.sleep(10)
    assert len(asked(campaign)) - before <= AT_ONCE
    campaign.cluster.slurm("scontrol", "resume", f"{rank}_0")

    campaign.done(rank)
    campaign.done(card)
    assert campaign.cluster.job(f"{rank}_0").restarts == 0
    assert len(starts(campaign)) == 2  # a process on each node, once
    campaign.everything(60)
    assert sum(asked(campaign).values()) == 60


def test_ray_connects_two_nodes_and_does_so_again_when_a_part_dies(campaign: Campaign) -> None:
    """Ray is real; vLLM is a fake, because its CPU build cannot use Ray's GPUs."""
    ray, count = real_engines.vllm(), 100
    write(campaign, count)
    see = "import ray; ray.init(log_to_driver=False); print('GPUs', ray.cluster_resources()['GPU'], len(ray.nodes()))"
    fake_vllm(campaign, f'{ray}/python -c "{see}" >> {campaign.folder}/seen.txt 2>&1')
    (campaign.folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {ray}/python "$@"\n')
    (campaign.folder / "bin" / "python").chmod(0o755)
    campaign.env["PATH"] += f":{ray}"
    campaign.env |= {"RAY_OVERRIDE_RESOURCES": '{"GPU": 2}', "RAY_TMPDIR": "/tmp", "PYTHONWARNINGS": "ignore"}
    campaign.env["PYTHONPATH"] = ""  # Ray needs what the other tests do without
    rank, _, card = campaign.submit("--nodes=2", "--gpus-per-node=2", tp=4, node_backend="ray")
    wait_for(lambda: campaign.answers(0) > 8, 120, lambda: campaign.logs)

    head, worker = nodes_of(campaign, rank)
    os.kill(pid_on(campaign, head, "fake_engine.py"), 9)
    wait_for(lambda: len(starts(campaign)) == 2, 60, lambda: campaign.logs)
    before = campaign.answers(0)
    wait_for(lambda: campaign.answers(0) > before + 4, 60, lambda: campaign.logs)
    os.kill(pid_on(campaign, worker, "raylet"), 9)

    campaign.done(rank)
    campaign.done(card)
    assert len(starts(campaign)) == 3
    assert (campaign.folder / "seen.txt").read_text().count("GPUs 4.0 2") == 3
    campaign.everything(count)
    assert sum(asked(campaign).values()) - count <= 2 * LOST


def test_real_vllm_responds_from_two_nodes(campaign: Campaign) -> None:
    vllm, model, count = real_engines.vllm(), real_engines.tiny_model(), 40
    write(campaign, count)
    campaign.env |= {
        "PATH": f"{Path(sys.executable).parent}:{vllm}:{os.environ['PATH']}",
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
        **{"VLLM_CACHE_ROOT": str(campaign.folder / "cache"), "HF_HOME": str(campaign.folder), "HF_HUB_OFFLINE": "1"},
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": "",  # vLLM needs what the other tests do without
    }
    options = {"base_url": None, "server": "vllm", "model": model, "max_tokens": 16, "tp": 2}

    flags = ["--nodes=2", "--gpus-per-node=1", "--mem=5G"]
    rank, _, card = campaign.submit(*flags, server_arg="enforce-eager", **options)

    campaign.done(rank, 240)
    campaign.done(card)
    campaign.everything(count)
    assert all(row["rollout_results"][0]["text"] for row in campaign.output.rows())
    assert {"vllm-00000-0-node0.log", "vllm-00000-0-node1.log"} <= {*campaign.logs}
