"""The commands for runs of many ranks: `status`, `check`, and `submit.sh`, which uses them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_hub import FakeHub, Rights
from fake_server import FakeServer
from running import ROOT, Finished, Job, Sdg, documents

from sdg_plugins.commands.status import ranges  # type: ignore[import-not-found]

SUBMIT = ROOT / "slurm" / "submit.sh"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state of a small run that has finished."""
    folder = tmp_path_factory.mktemp("template")
    with FakeServer() as server:
        job = Job(folder, server)
        job.input(documents(3))
        yield job.succeed().state
        job.sdg.close()


class State:
    """A state in which a test writes the figures of the ranks."""

    def __init__(self, folder: Path, template: Path, ranks: int) -> None:
        self.folder, self.sdg = folder, Sdg(folder)
        self.path = folder / "out" / ".sdg"
        shutil.copytree(template, self.path)
        for path in self.path.glob("0*.stats.json"):
            path.unlink()
        record = json.loads((self.path / "run.json").read_text())
        record["options"]["world_size"] = ranks
        (self.path / "run.json").write_text(json.dumps(record))

    def rank(self, number: int, status: str, documents: int = 40, ago: float = 0.0, **record: Any) -> None:
        """Write the figures of a rank, `ago` seconds old."""
        usual = {"expected": 100, "documents_per_second": 2.0, "error": None, "slurm_job": None, "host": "node7"}
        rank = {"status": status, "updated": time.time() - ago, **usual, **record}
        figures = {"documents": documents, "rows": documents, "completion_tokens": 10 * documents, "rank": rank}
        (self.path / f"{number:05d}.stats.json").write_text(json.dumps(figures))

    def __call__(self, *arguments: object, squeue: str = "exit 1") -> Finished:
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
        (programs / "squeue").chmod(0o755)
        return self.sdg("status", "--output", "out", *arguments, PATH=f"{programs}:{os.environ['PATH']}")


@pytest.fixture
def state(tmp_path: Path, template: Path) -> State:
    return State(tmp_path, template, 4)


# ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_running_run_is_described_in_two_lines(state: State) -> None:
    for number in range(3):
        state.rank(number, "running")

    shown = state()

    assert shown.rc == 0
    first, second = shown.stdout.splitlines()
    assert first.startswith("120 of 400 documents (30 %), 6.0 documents/s, 60 tokens/s, 47 s to go")
    assert second == "4 ranks: 3 running, 1 waiting"


def test_a_finished_run_needs_no_attention(state: State) -> None:
    for number in range(4):
        state.rank(number, "finished", documents=100, documents_per_second=0.0)

    shown = state()

    assert shown.rc == 0
    assert shown.stdout.splitlines() == ["400 of 400 documents (100 %)", "4 ranks: 4 finished"]


def test_ranks_that_need_attention_are_named_with_their_last_error(state: State) -> None:
    state.rank(0, "finished", documents=100)
    state.rank(1, "failed", error="no server answers at http://node9:1", ago=300, slurm_job="77")
    state.rank(2, "running", ago=6000)
    (state.path / "00003.stats.json").write_text("{")

    shown = state()

    assert shown.rc == 1
    assert "4 ranks: 1 finished, 1 failed, 1 silent, 1 broken" in shown.stdout
    assert re.search(
        r"^failed +rank 1: no server answers at http://node9:1 \(5 min ago, node7, job 77\)$", shown.stdout, re.M
    )
    assert re.search(r"^silent +rank 2: no error recorded \(100 min ago, node7\)$", shown.stdout, re.M)
    assert re.search(r"^broken +rank 3: .*00003.stats.json is broken", shown.stdout, re.M)
    assert shown.stdout.rstrip().endswith("ranks 1-3")


def test_ranks_whose_job_is_in_the_queue_need_no_attention(state: State) -> None:
    state.rank(0, "stopped", slurm_job="77")
    state.rank(1, "running", ago=6000, slurm_job="77")

    queued, gone, failed = state(squeue="echo 77 78"), state(squeue="echo 9 9"), state

    assert queued.rc == 0
    assert "Slurm job 77: in the queue" in queued.stdout
    assert gone.rc == 1
    assert "Slurm job 77: no longer in the queue" in gone.stdout
    assert gone.stdout.rstrip().endswith("ranks 0-3")
    failed.rank(2, "failed", error="a word", slurm_job="77")
    assert failed(squeue="echo 77 78").rc == 1


def test_a_rank_whose_job_is_gone_is_lost_at_once_and_a_pending_one_is_requeued(state: State) -> None:
    for number in range(4):
        state.rank(
            number, "failed" if number == 3 else "running", slurm_job="77", slurm_task=str(number), error="a word"
        )

    shown = state(squeue="printf '77 77 0 RUNNING\\n77 78 2 PENDING\\n77 79 3 PENDING\\n'")

    assert shown.rc == 1
    assert "4 ranks: 1 running, 1 lost, 2 requeued" in shown.stdout
    assert re.search(r"^lost +rank 1: a word \(\d+ s ago, node7, job 77\)$", shown.stdout, re.M)
    assert shown.stdout.rstrip().endswith("ranks 1")


def test_equal_failures_are_one_group_with_its_nodes_and_the_command_that_repeats_them(state: State) -> None:
    for number in range(3):
        log = f"(log: /shared/out/.sdg/logs/vllm-{number:05d}-0.log)"
        state.rank(number, "failed", error=f"vllm failed to start: no GPU {log}", host="node2", slurm_job="77")
    state.rank(3, "finished", documents=100, host="node1", slurm_job="77")
    words = ["--ranks", "4", "--array=0-3", "--gpus-per-node=8", "--", "--input", "my docs/", "--array-like", "x"]
    parts = ["77", str(state.folder), "/code/slurm/submit.sh", *words]
    (state.path / "submission").write_text("".join(f"{part}\0" for part in parts))

    shown = state(squeue="echo 9 9")

    lines = shown.stdout.splitlines()
    (failed,) = [line for line in lines if line.startswith("failed")]
    assert failed.startswith("failed    rank 0-2: vllm failed to start: no GPU (log: ")
    assert "all failures were on node2: avoid it with --exclude=node2" in lines
    assert lines[-1].strip() == (
        "/code/slurm/submit.sh --ranks 4 --gpus-per-node=8 --array 0-2 --exclude=node2 -- "
        "--input 'my docs/' --array-like x"
    )
    workers = ["77", str(state.folder), "submit.sh", "--ranks", "4", "--workers", "2", "--", "--input", "x"]
    (state.path / "submission").write_text("".join(f"{part}\0" for part in workers))
    again = state(squeue="echo 9 9").stdout.splitlines()[-1].strip()
    assert again == "submit.sh --ranks 4 --workers 2 --exclude=node2 -- --input x"  # they take whichever rank is open
    state.rank(1, "failed", error="vllm failed to start: no GPU", host="node3", slurm_job="77")
    assert "node2, node3" in state(squeue="echo 9 9").stdout


def test_ranks_that_load_their_servers_say_so_and_for_how_long(state: State) -> None:
    for number, phase in enumerate(["loading weights", "loading weights", "compiling"]):
        loading = {"since": time.time() - 240, "phase": f"vllm: {phase}"}
        state.rank(number, "running", documents=0, loading=loading)

    shown = state()

    assert shown.rc == 0
    assert "loading   rank 0-1: loading its server for 4 min: loading weights" in shown.stdout
    assert "loading   rank 2: loading its server for 4 min: compiling" in shown.stdout


def test_a_server_that_fails_before_the_first_row_is_told_although_no_run_is_recorded(job: Job) -> None:
    job.documents("one")
    command = f"{sys.executable} -c 'raise SystemExit(\"no such GPU\")' {{port}}"
    options = {"base_url": None, "server": "command", "server_command": command}

    assert job(**options).rc == 1

    shown = job.sdg("status", "--output", job.output.path)
    assert shown.rc == 1
    assert re.search(r"^failed +rank 0: command failed to start.*no such GPU", shown.stdout, re.M), shown
    assert job.sdg("card", "--output", job.output.path).says("no rows yet", "no such GPU")


def test_a_line_for_each_rank_on_demand(state: State) -> None:
    state.rank(0, "running", slurm_job="77")

    lines = state("--ranks", squeue="echo 77 1").stdout.splitlines()

    assert [line.split()[:2] for line in lines[-4:]] == [["0", "running"], *([n, "waiting"] for n in "123")]
    assert "40 of 100" in lines[-4]
    assert "node7, job 77" in lines[-4]


def test_programs_get_json(state: State) -> None:
    state.rank(0, "running")
    state.rank(1, "failed", error="a word")

    shown = state("--json")

    found = json.loads(shown.stdout)
    assert shown.rc == 1
    assert found["states"] == {"running": 1, "failed": 1, "waiting": 2}
    assert found["need_somebody"] == [1]
    assert (found["documents"], found["expected"], found["seconds_to_go"]) == (80, 400, 160)
    assert [rank["state"] for rank in found["ranks"]] == ["running", "failed", "waiting", "waiting"]
    assert found["ranks"][1]["error"] == "a word"


def test_a_missing_or_broken_run_is_one_clear_message(state: State, run_sdg: Sdg) -> None:
    assert state.sdg("status", "--output", "nowhere").says("nowhere", "is --output correct")
    (state.path / "run.json").write_text("{")
    assert state().says("run.json", "broken")
    (state.path / "run.json").unlink()
    begun = state()
    assert begun.rc == 1
    assert begun.says("no rank has begun yet in out/.sdg")


def test_an_error_of_any_text_stays_in_its_line(state: State) -> None:
    state.rank(0, "failed", error="first\nsecond \x1b[31m" + "long " * 1000)

    (line,) = [line for line in state().stdout.splitlines() if line.startswith("failed")]

    assert "\x1b" not in line
    assert len(line) < 400


def test_a_thousand_ranks_are_readable_within_seconds_and_little_memory(tmp_path: Path, template: Path) -> None:
    state = State(tmp_path, template, 1000)
    for number in range(990):
        status = "failed" if number % 10 == 3 else "running"
        error = f"node{number} is gone" if number % 20 == 3 else "no server answers"
        state.rank(number, status, error=error if status == "failed" else None, slurm_job="77")

    shown = state(squeue="echo 77 1")

    assert shown.rc == 1
    lines = shown.stdout.splitlines()
    assert len(lines) < 20
    assert "1,000 ranks: 891 running, 99 failed, 10 waiting" in lines
    assert any(line.startswith("failed    rank 13,33,53") for line in lines)
    assert any(line.strip() == "and 41 more: see --ranks" for line in lines)
    assert len(state("--ranks", squeue="echo 77 1").stdout.splitlines()) > 1000

    for number in range(1000):
        state.rank(number, "finished", documents=100, slurm_job="77")
    monitored = state.sdg("monitor", "--output", "out", "--interval", "0.5")

    assert monitored.rc == 0, monitored
    assert "100,000 of 100,000 documents" in monitored.stderr
    assert state().rc == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1 << 20  # KiB


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 7, 8, 9], "0,2-3,7-9")]
)
def test_numbers_are_written_as_sbatch_reads_them(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check(job: Job, **options: Any) -> Finished:
    return job.sdg("check", *job.command_line(options), **job.env)


def test_check_finds_unknown_places_of_a_template_and_invalid_folders(job: Job) -> None:
    job.documents("one")
    assert check(job, plugin="prompt", prompt_template="[[DOCUMENT]] [[unknown]]").says("[[unknown]]", "[[id]]")
    (job.folder / "taken").write_text("")
    assert check(job, output="taken").says("taken is a file")


def test_a_job_that_was_requeued_does_not_start_over(job: Job) -> None:
    job.documents("one")
    assert job(fresh=True).rc == 0

    finished = job(fresh=True, env={"SLURM_RESTART_COUNT": "1"})

    assert finished.rc == 2
    assert "--fresh" in finished.message
    assert job.output.ids() == ["one"]


def test_valid_options_are_confirmed_and_nothing_is_written(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    before = sorted(job.folder.rglob("*"))

    checked = check(job, records_per_chunk=10, world_size=2, rank=0)

    assert checked.rc == 0, checked
    assert f"documents 30\noutput {job.output.path}\n" in checked.stdout
    assert f"state-dir {job.output.state}" in checked.stdout
    assert not server.requests
    after = [path for path in sorted(job.folder.rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": "hot"}, ["--temperature"]),
        ({"fresh": True}, ["--fresh", "by hand"]),
        ({"input": "nowhere.parquet"}, ["nowhere.parquet"]),
        ({"prompt_column": "no-such"}, ["--prompt-column", "no-such"]),
        ({"base_url": None, "server": "vllm"}, ["--model"]),
        ({"base_url": None, "server": "command"}, ["--server-command"]),
        ({"base_url": None, "server": "vllm", "model": "m", "nodes": 2, "replicas": 2}, ["--replicas"]),
        ({"base_url": None, "server": "vllm", "model": "m", "nodes": 2, "tp": 3}, ["--tp 3"]),
        ({"base_url": None, "server": "sglang", "model": "m", "nodes": 2, "node_backend": "ray"}, ["--node-backend"]),
    ],
)
def test_options_that_a_run_would_refuse_are_refused(job: Job, options: dict[str, Any], words: list[str]) -> None:
    job.input(documents(3))

    refused = check(job, **options)

    assert refused.rc in {1, 2}
    assert refused.says(*words)


def test_a_run_with_different_options_is_found(job: Job) -> None:
    job.input(documents(3))
    job.succeed()

    assert check(job).rc == 0
    assert check(job, max_concurrent_generations=7).rc == 0
    assert check(job, temperature=0.5).says("different run", "temperature")
    assert check(job, model="another").says("different run", "model")
    assert check(job, world_size=2, rank=0).says("different run", "world_size")
    (job.output.state / "run.json").unlink()
    assert check(job).says("the state of its run does not")


@pytest.mark.parametrize(("token", "words"), [("hf_read", "is read-only"), (None, "no token"), ("hf_bob", "alice")])
def test_a_repository_that_cannot_be_written_is_found(job: Job, hub: FakeHub, token: str | None, words: str) -> None:
    hub.tokens |= {"hf_read": Rights("alice", write=False), "hf_bob": Rights("bob"), "hf_alice": Rights("alice")}
    job.input(documents(30))
    many = {"output": "hf://datasets/alice/out", "world_size": 3, "rank": 0, "records_per_chunk": 5}

    job.env |= hub.environment(job.folder, token)
    assert words in check(job, **many).message
    job.env |= hub.environment(job.folder, "hf_alice")
    assert check(job, **many).rc == 0

    assert "alice/out" not in hub.repos
    assert not (job.folder / ".sdg").exists()


def test_more_files_than_the_hub_takes_are_refused_before_anything_is_sent(
    job: Job, hub: FakeHub, server: FakeServer
) -> None:
    hub.tokens["hf_alice"] = Rights("alice")
    job.env |= hub.environment(job.folder, "hf_alice")
    job.input(pa.table({"text": ["x"] * 100_001}))
    options = {"output": "hf://datasets/alice/out", "records_per_chunk": 1}

    checked, run = check(job, **options), job(**options)

    for refused in (checked, run):
        assert refused.rc == 2
        assert "100,001 documents make about 100,001 files, and the Hub takes 100,000" in refused.message
        assert "--max-file-size" in refused.message
    assert not server.requests
    assert "alice/out" not in hub.repos
    assert check(job, **options, max_file_size="500MB").rc == 0
    assert check(job, **options, max_documents=1000).rc == 0


def test_ranks_without_work_are_reported(job: Job) -> None:
    job.input(documents(30))

    checked = check(job, records_per_chunk=10, world_size=8, rank=0)

    assert checked.rc == 0
    assert checked.says("8 ranks share 3 chunks")


# ── submit.sh ────────────────────────────────────────────────────────────────────────────────────────────────────────


def submit(job: Job, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = job.sdg.environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    words = [str(SUBMIT), *arguments, "--", *job.command_line({"no_progress": None})]
    return subprocess.run(words, cwd=job.folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_workers_share_the_ranks(job: Job) -> None:
    job.input(documents(40))
    job.options |= {"records_per_chunk": 5}

    done = submit(job, "--dry-run", "--ranks=8", "--workers", "3")

    assert done.returncode == 0, done.stderr
    assert "--array=0-2 " in done.stdout
    assert "--world-size 8" in done.stdout
    assert "leave out --array" in submit(job, "--dry-run", "--ranks=8", "--workers=3", "--array=1").stderr
    assert "leave out --nodes" in submit(job, "--dry-run", "--ranks=8", "--workers=3", "--nodes=2").stderr
    assert "--workers must be whole numbers" in submit(job, "--dry-run", "--workers=0").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks=4", "--array=3-1"], "ranks are numbered 0 to 3"),
        (["--ranks=4", "--array=0-9:2"], "ranks are numbered 0 to 3"),
        (["--ranks=4", "--export=NONE"], "--export=NONE: jobs take their settings"),
        (["--ranks=4", "--export", "PATH"], "add ALL to it"),
    ],
)
def test_what_would_go_wrong_on_the_nodes_is_refused(job: Job, arguments: list[str], words: str) -> None:
    job.documents("one")

    done = submit(job, "--dry-run", *arguments)

    assert done.returncode == 2
    assert words in done.stderr


def test_a_dry_run_prints_the_three_commands(job: Job) -> None:
    job.input(documents(30))

    done = submit(job, "--dry-run", "--ranks=8", "--at-once", "3", "--time", "1:00:00", "--beside=-p cpu", "--nodes=2")

    assert done.returncode == 2  # an endpoint does not run on several nodes
    assert "--nodes" in done.stderr
    done = submit(job, "--dry-run", "--ranks=8", "--at-once", "3", "--time", "1:00:00", "--beside=-p cpu")
    assert done.returncode == 0, done.stderr
    ranks, monitor, card = done.stdout.splitlines()
    assert all(line.startswith("sbatch --parsable ") for line in (ranks, monitor, card))
    for word in ("--array=0-7%3", "--nodes=1", "--time 1:00:00", "generate.sbatch", "--world-size 8"):
        assert word in ranks
    assert "-p cpu" not in ranks
    assert "-p cpu" in monitor
    assert "--dependency=after:RANKS_0" in monitor
    assert f"--output {job.output.path}" in monitor
    assert "--dependency=afterany:RANKS:MONITOR" in card
    assert not job.output.path.exists()


def test_the_gpus_of_a_node_are_compared_with_those_that_the_servers_take(job: Job) -> None:
    job.input(documents(3))
    job.options |= {"base_url": None, "server": "vllm", "model": "m", "tp": 2, "replicas": 2}

    assert "need 4 GPUs on each node" in submit(job, "--dry-run", "--gres=gpu:a100:2").stderr
    assert "need 4 GPUs on each node" in submit(job, "--dry-run", "--gpus-per-node", "3").stderr
    assert "GPUs on each node" not in submit(job, "--dry-run", "--gpus=a100:2,h100:2").stderr  # of several types
    enough = submit(job, "--dry-run", "--gpus-per-node=8")
    assert enough.returncode == 0
    assert "take 4 of 8 GPUs" in enough.stderr


def test_a_clusters_file_and_common_flags_reach_the_jobs_that_need_them(job: Job) -> None:
    job.input(documents(30))
    (job.folder / "env.sh").write_text("export FROM_ENV=$UNSET_IS_ALLOWED")
    (job.folder / "cluster.toml").write_text(
        'account = "project"\npartition = "gpu"\ngpus-per-node = 8\nenv = "env.sh"\n[beside]\npartition = "cpu"\n'
    )
    options = ["--cluster", "cluster.toml", "--partition=big", "--name=qa", "--mail-type", "END", "--ranks=2"]

    done = submit(job, "--dry-run", *options)

    assert done.returncode == 0, done.stderr
    ranks, monitor, card = done.stdout.splitlines()
    for word in ("--account=project", "--gpus-per-node=8", "--job-name=qa ", "--mail-type=END"):
        assert word in ranks
    assert ranks.index("--partition=gpu") < ranks.index("--partition=big")
    for line, name in ((monitor, "qa-monitor"), (card, "qa-card")):
        assert f"--job-name={name} " in line
        assert "--account=project --partition=cpu" in line
        assert "--mail-type=END" in line
        assert "gpu" not in line
    (job.folder / "cluster.toml").write_text("mem = [1, 2]")
    assert "mem must be text" in submit(job, "--dry-run", "--cluster", "cluster.toml").stderr


def test_submit_refuses_a_preview_and_leaves_out_ranks_that_have_finished(job: Job) -> None:
    job.input(documents(30))
    many = {"world_size": 3, "records_per_chunk": 10}
    assert job(rank=1, **many).rc == 0

    def ranks(*options: str, PATH: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        words = [
            str(SUBMIT),
            "--dry-run",
            "--ranks=3",
            *options,
            "--",
            *job.command_line({"records_per_chunk": 10, **more}),
        ]
        env = job.sdg.environment(PATH=f"{PATH}:{Path(sys.executable).parent}:{os.environ['PATH']}")
        return subprocess.run(words, cwd=job.folder, env=env, capture_output=True, text=True, timeout=60, check=False)

    assert "--preview shows documents" in ranks(preview=1).stderr
    programs = job.folder / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 2'\n")
    (programs / "scontrol").chmod(0o755)
    assert "at most 2 tasks (MaxArraySize)" in ranks(PATH=str(programs)).stderr
    assert "--array=0\\,2 " in ranks().stdout, ranks()
    assert "--array=1 " in ranks("--array=1").stdout
    assert job(rank=0, **many).rc == job(rank=2, **many).rc == 0
    assert "all ranks have finished" in ranks().stderr


def test_the_scripts_are_written_into_a_folder_and_not_over_others(run_sdg: Sdg) -> None:
    assert run_sdg("slurm", "scripts").rc == 0
    written = run_sdg.folder / "scripts"
    assert {path.name for path in written.iterdir()} >= {"submit.sh", "common.sh", "generate.sbatch", "card.sbatch"}
    assert os.access(written / "submit.sh", os.X_OK)
    assert run_sdg("slurm", "scripts").rc == 0
    (written / "common.sh").write_text("mine")
    assert run_sdg("slurm", "scripts").says("common.sh", "differs")
    assert (written / "common.sh").read_text() == "mine"


@pytest.mark.parametrize("path", [*sorted((ROOT / "slurm").glob("*.s*"))], ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
