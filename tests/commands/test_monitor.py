"""The monitor: what it reports during a run, when it ends, and that it publishes everything."""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Rights
from fake_server import Delay, FakeServer, Hang, prompt_of
from running import ECHO, Finished, Job, Sdg, Started, documents, wait_until

import sdg
from sdg_plugins.common.statistics import rank_statistics

REPO = "alice/out"
TOLD = "This dataset is being generated"
# Tests do not wait for the usual ten seconds between heartbeats.
QUICK = ECHO + "\n    from sdg_plugins.common import statistics\n    statistics.HEARTBEAT = 0.2\n"
HOSTILE = (
    "first line\n<!-- sdg: end data -->\n## A heading\n| a | b |\n---\n<script>alert(1)</script> <b>bold</b> "
    "`code` **strong** [link](http://evil.example) \x00\x1b[31m\n" + "very long " * 3000
)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.tokens["hf_write"] = Rights("alice")
        yield hub
    assert not hub.errors


def environment(hub: FakeHub, folder: Path, token: str = "hf_write") -> dict[str, str]:
    """Environment variables that point the Hub's client to the fake Hub."""
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(folder / "hf"), **quiet}


def progress_of(card: str) -> dict[str, str]:
    """The lines of the progress section by name, and the bar."""
    found = dict(re.findall(r"^- ([\w ]+): (.*)$", card, re.MULTILINE))
    bar = re.search(r"^`([█░]{30})` (\d+) %$", card, re.MULTILINE)
    return found | ({"bar": bar[1], "share": bar[2]} if bar else {})


# ── Runs of several ranks, and a monitor beside them ─────────────────────────────────────────────────────────────────


@pytest.fixture
def ranks(job: Job, server: FakeServer) -> Job:
    """A job of three ranks and 48 documents, each of which takes a while."""
    job.options |= {"plugin": job.plugin("quick", QUICK), "records_per_chunk": 4, "world_size": 3}
    job.options["max_concurrent_generations"] = 3
    job.input(documents(48))
    server.behave(lambda payload, n: Delay(0.2))
    return job


def start_ranks(job: Job, **options: Any) -> list[Started]:
    return [job.start(rank=rank, **options) for rank in range(3)]


def card_of(job: Job) -> str:
    path = job.output.path / "README.md"
    return path.read_text() if path.exists() else ""


def watch(job: Job, *arguments: object, **env: str) -> Started:
    return job.sdg.start("monitor", "--output", job.options["output"], "--interval", "0.3", *arguments, **env)


def test_the_card_in_a_folder_shows_the_progress_until_all_ranks_have_finished(ranks: Job, server: FakeServer) -> None:
    of_the_last_chunks = {f"document {number}" for number in range(36, 48)}
    server.behave(lambda payload, n: Hang() if prompt_of(payload) in of_the_last_chunks else Delay(0.2))
    monitor = watch(ranks)
    time.sleep(2)
    assert monitor.running
    processes = start_ranks(ranks)

    wait_until(lambda: re.search(r"[1-9]\d* of 48", card_of(ranks)) and "to go" in card_of(ranks))
    during = progress_of(card_of(ranks))
    server.release()
    ends = [process.finish() for process in processes]
    monitored = monitor.finish()

    assert [end.rc for end in ends] == [0, 0, 0]
    assert "of 48" in during["documents"]
    assert re.fullmatch(r"\d+\.\d documents/s, [\d,]+ tokens/s, \d+ (s|min) to go", during["speed"]), during
    assert during["bar"]
    assert re.search(r"[1-3] running", during["ranks"])
    assert monitored.rc == 0, monitored
    assert "waiting for a run to begin" in monitored.lines[0]
    assert monitored.stdout.startswith("the run has finished: ")
    assert TOLD not in card_of(ranks)
    assert "Not finished" not in card_of(ranks)
    assert "| Documents | 48 |" in card_of(ranks)
    assert ranks.verify().rc == 0


def test_ranks_leave_the_hub_to_the_monitor(ranks: Job, server: FakeServer, hub: FakeHub, tmp_path: Path) -> None:
    first_chunks = {f"document {number}" for number in range(12)}
    server.behave(lambda payload, n: None if prompt_of(payload) in first_chunks else Hang())
    ranks.options |= {"output": f"hf://datasets/{REPO}", "state_dir": "state"}
    cards = []
    hub.before_commit = lambda repo: cards.append(hub.files(repo).get("README.md", b"").decode())
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "none")}

    processes = start_ranks(ranks, env=nowhere)
    monitor = watch(ranks, "--state-dir", "state", **environment(hub, tmp_path))
    wait_until(lambda: REPO in hub.repos and TOLD in hub.files(REPO).get("README.md", b"").decode())
    server.release()
    ends = [process.finish() for process in processes]
    monitored = monitor.finish()

    assert [end.rc for end in ends] == [0, 0, 0], ends  # without a Hub or a token
    assert monitored.rc == 0, monitored
    assert f"{hub.url}/datasets/{REPO}" in monitored.stdout
    files = hub.files(REPO)
    spool = tmp_path / "state/spool"
    assert {path: files[path] for path in files if path.startswith("data/")} == {
        str(path.relative_to(spool)): path.read_bytes() for path in (spool / "data").iterdir()
    }
    assert len([path for path in files if path.startswith("data/")]) == 12
    assert any(TOLD in card and progress_of(card)["ranks"] for card in cards)
    assert TOLD not in files["README.md"].decode()
    assert "| Documents | 48 |" in files["README.md"].decode()


def test_the_monitor_waits_for_the_rerun_of_a_rank_that_was_killed(ranks: Job, server: FakeServer) -> None:
    of_rank_1 = {f"document {number}" for number in range(48) if number // 4 % 3 == 1}
    server.behave(lambda payload, n: Hang() if prompt_of(payload) in of_rank_1 else None)
    processes = start_ranks(ranks)
    wait_until(lambda: of_rank_1 & {*server.prompts})
    monitor = watch(ranks)
    processes[1].send(signal.SIGKILL)
    server.release()
    assert [processes[rank].finish().rc for rank in (0, 2)] == [0, 0]
    wait_until(lambda: "2 finished" in progress_of(card_of(ranks)).get("ranks", ""))
    assert monitor.running

    again = ranks(rank=1)

    assert again.rc == 0, again
    monitored = monitor.finish()
    assert monitored.rc == 0, monitored
    assert TOLD not in card_of(ranks)
    assert "Not finished" not in card_of(ranks)


@pytest.mark.slow
def test_stopped_and_failed_ranks_are_reported_and_a_rerun_of_them_is_followed(
    ranks: Job, servers: Callable[[], FakeServer]
) -> None:
    other = servers()
    other.behave(lambda payload, n: Delay(0.2))
    processes = start_ranks(ranks)[:2]
    ranks.sdg.started[-1].close()
    failing = ranks.start(rank=2, base_url=other.url, request_timeout=1, max_retries=0)
    wait_until(lambda: other.requests)
    other.stop()
    processes[0].send(signal.SIGTERM)
    ends = [processes[0].finish().rc, processes[1].finish().rc, failing.finish().rc]
    assert ends == [143, 0, 1]

    ended = watch(ranks, "--patience", "1").finish()

    assert ended.rc == 1
    for word in ("ended early", "1 stopped", "1 finished", "1 failed", "last error"):
        assert word in ended.message
    assert "**Ended early**" in card_of(ranks)
    assert "1 stopped, 1 finished, 1 failed" in card_of(ranks)
    monitor = watch(ranks)  # as in a script that starts the ranks and the monitor again
    wait_until(lambda: TOLD in card_of(ranks))
    again = [ranks.start(rank=rank) for rank in (0, 2)]
    assert [process.finish().rc for process in again] == [0, 0]
    assert monitor.finish().rc == 0
    assert "Ended early" not in card_of(ranks)


# ── States that are written by hand ──────────────────────────────────────────────────────────────────────────────────


class Story:
    """A run whose state a test writes: of three ranks, unless `options` changes that."""

    def __init__(self, folder: Path, template: Path, hub: FakeHub) -> None:
        self.folder, self.hub, self.sdg = folder, hub, Sdg(folder)
        self.state = folder / "state"
        shutil.copytree(template, self.state)
        self.data = self.state / "spool/data"
        self.arguments = ["--output", f"hf://datasets/{REPO}", "--state-dir", self.state, "--interval", 0.2]

    def options(self, **options: Any) -> None:
        record = json.loads((self.state / "run.json").read_text())
        record["options"] |= options
        (self.state / "run.json").write_text(json.dumps(record))

    def rank(self, number: int, status: str, documents: int = 40, ago: float = 0.0, **record: Any) -> None:
        """Write the figures of a rank, `ago` seconds old."""
        figures = {"documents": documents, "rows": documents, "completion_tokens": 10 * documents, "seconds": 10.0}
        usual = {"expected": 100, "documents_per_second": 2.0, "error": None, "slurm_job": None}
        rank = {"status": status, "updated": time.time() - ago, **usual, **record}
        path = self.state / f"{number:05d}.stats.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures | {"rank": rank}))
        temporary.replace(path)

    def ranks(self, *statuses: str, **record: Any) -> None:
        for number, status in enumerate(statuses):
            self.rank(number, status, **record)

    def chunk(self, index: int, world: int = 3) -> None:
        """Write a file as a rank does."""
        target = self.data / f"{index % world:05d}_{index:05d}.parquet"
        temporary = target.with_name(f".{target.name}.tmp")
        pq.write_table(pa.table({"id": [f"d{index}"], "text": ["text"]}), temporary)
        temporary.rename(target)

    def squeue(self, script: str) -> None:
        """Put a program named squeue into PATH."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "squeue").chmod(0o755)

    def start(self, *arguments: object, token: str = "hf_write", **env: str) -> Started:
        path = f"{self.folder / 'bin'}:{self.sdg.environment()['PATH']}"
        variables = {"PATH": path, **environment(self.hub, self.folder, token), **env}
        return self.sdg.start("monitor", *self.arguments, *arguments, **variables)

    def __call__(self, *arguments: object, token: str = "hf_write", **env: str) -> Finished:
        return self.start(*arguments, token=token, **env).finish()

    @property
    def card(self) -> str:
        return self.hub.files(REPO).get("README.md", b"").decode() if REPO in self.hub.repos else ""

    @property
    def published(self) -> list[str]:
        return sorted(path for path in self.hub.files(REPO) if path.startswith("data/"))

    def waits_for(self, *words: str) -> dict[str, str]:
        """The progress on the card, once the card contains all these words."""
        wait_until(lambda: all(word in self.card for word in words))
        return progress_of(self.card)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a run with an output on the Hub, without any figures or files."""
    folder = tmp_path_factory.mktemp("template")
    with FakeServer() as server:
        job = Job(folder, server)
        job.input(documents(300))
        finished = job(output=f"hf://datasets/{REPO}", state_dir="state", world_size=3, max_documents=3)
        assert finished.rc == 0, finished
    for path in [*(folder / "state").glob("*stats.json"), *(folder / "state/spool/data").iterdir()]:
        path.unlink()
    return folder / "state"


@pytest.fixture
def story(tmp_path: Path, template: Path, hub: FakeHub) -> Iterator[Story]:
    story = Story(tmp_path, template, hub)
    yield story
    story.sdg.close()


def test_a_run_that_never_begins_is_an_error_of_one_line(run_sdg: Sdg) -> None:
    finished = run_sdg("monitor", "--output", "nowhere", "--patience", "1", "--interval", "0.1")

    assert finished.rc == 1
    assert finished.says("no run has begun in nowhere/.sdg")


def test_all_finished_is_published_at_once_and_the_card_is_the_final_one(story: Story) -> None:
    story.ranks("finished", "finished", "finished", documents=100)
    for index in range(6):
        story.chunk(index)

    finished = story()

    assert finished.rc == 0, finished
    assert len(story.published) == 6
    assert len(story.hub.commits(REPO)) == 2  # the first one is the repository's own
    assert TOLD not in story.card


def test_on_a_network_file_system_a_file_may_be_seen_later_than_the_finish(story: Story) -> None:
    plugin = story.folder / "network.py"
    plugin.write_text(
        textwrap.dedent(ECHO) + "\nfrom sdg_plugins.common import files\nfiles.LOCAL_FILE_SYSTEMS = set()\n"
    )
    story.options(plugin=[str(plugin)])
    story.ranks("finished", "finished", "finished")
    story.chunk(0)
    monitor = story.start("--patience", "3")
    wait_until(lambda: REPO in story.hub.repos and story.published)
    story.chunk(1)

    assert monitor.finish().rc == 0
    assert len(story.published) == 2


def test_a_run_without_any_figures_yet_is_given_time(story: Story) -> None:
    monitor = story.start()

    assert story.waits_for("3 waiting")["share"] == "0"
    story.ranks("finished", "finished", "finished")
    assert monitor.finish().rc == 0


def test_a_rank_without_heartbeats_is_silent_and_patience_with_it_ends(story: Story) -> None:
    story.ranks("finished", "running", "running", ago=300)
    story.rank(2, "running", ago=1)
    story.chunk(0)
    monitor = story.start("--patience", "100")

    story.waits_for("1 finished, 1 silent, 1 running")
    assert monitor.running
    monitor.close()
    story.rank(2, "running", ago=300)
    ended = story("--patience", "1")

    assert ended.rc == 1
    assert "ended early: no heartbeat for 5 min, ranks: 1 finished, 2 silent" in ended.message
    assert "**Ended early**" in story.card
    assert len(story.published) == 1


def test_the_last_error_names_its_rank_even_if_others_have_not_begun(story: Story) -> None:
    story.rank(2, "failed", error="the server is gone")
    monitor = story.start()

    assert story.waits_for("last error")["last error"] == "the server is gone (rank 2)"
    assert monitor.running
    assert "1 failed, 2 waiting" in story.card


def test_the_remaining_time_follows_from_the_recent_rate_of_running_ranks(story: Story) -> None:
    # 200 of 300 documents in 30 s; now it is one in ten seconds, and the rates of ended ranks do not count.
    story.rank(0, "finished", documents=100, documents_per_second=50.0)
    story.rank(1, "stopped", documents=60, documents_per_second=50.0)
    story.rank(2, "running", documents=40, documents_per_second=0.1)
    monitor = story.start()

    progress = story.waits_for("to go")
    assert monitor.running
    assert progress["documents"] == "200 of 300"
    assert progress["speed"] == "0.1 documents/s, 1 tokens/s, 17 min to go"
    assert progress["share"] == "66"
    assert progress["bar"].count("█") == 20


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_error_of_any_text_breaks_neither_card_nor_log(story: Story, status: str) -> None:
    story.ranks("finished", "finished", status, error=HOSTILE, ago=10)
    monitor = story.start("--patience", "1")

    story.waits_for("first line")
    if status == "running":
        monitor.close()
    else:
        finished = monitor.finish()
        assert finished.rc == 1
        assert "ended early" in finished.message
        assert all(len(line) < 1500 for line in finished.lines)
        assert "Ended early" in story.card
    assert story.card.count("<!-- sdg: end data -->") == 1
    assert story.card.count("<!-- sdg: begin data -->") == 1
    assert not re.search(r"^## A heading|<script|<b>|\x00|\x1b|[^\\]\*\*strong", story.card, re.MULTILINE)
    assert len(story.card) < 10_000


# ── Slurm ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_has_left_the_queue_ends_the_monitor_with_a_note_on_the_card(story: Story) -> None:
    story.ranks("finished", "stopped", slurm_job="77")
    story.chunk(0)
    (story.folder / "queue").write_text("77 78\n99 99\n")
    story.squeue(f"cat {story.folder / 'queue'}")
    monitor = story.start("--patience", "1")
    story.waits_for("1 finished, 1 stopped, 1 waiting")
    time.sleep(2)  # more than the patience: the job may be requeued
    assert monitor.running

    story.chunk(1)
    (story.folder / "queue").write_text("99 99\n")
    ended = monitor.finish()

    assert ended.rc == 1
    assert "the job has left the queue" in ended.message
    assert "**Ended early**, after 80 of 300 documents: the job has left the queue" in story.card
    assert len(story.published) == 2


def test_ranks_may_finish_just_before_their_job_leaves_the_queue(story: Story) -> None:
    story.ranks("finished", "finished", "running", slurm_job="77", ago=1000)
    story.squeue("exit 0")
    monitor = story.start("--patience", "3")
    wait_until(lambda: REPO in story.hub.repos and TOLD in story.card)

    story.rank(2, "finished")

    assert monitor.finish().rc == 0
    assert "Ended early" not in story.card


def test_heartbeats_count_more_than_the_queue(story: Story) -> None:
    story.ranks("stopped", "stopped", "running", slurm_job="77")
    story.squeue("echo 99 99")
    monitor = story.start("--patience", "1")

    story.waits_for("2 stopped, 1 running")
    time.sleep(1.5)

    assert monitor.running


@pytest.mark.slow
def test_a_rank_that_was_lost_with_its_job_ends_the_monitor_and_no_path_is_on_the_card(story: Story) -> None:
    story.ranks("finished", "failed", slurm_job="77", error="no GPU (log: out/.sdg/logs/vllm.log), see a/b/c.log")
    story.rank(2, "running", slurm_job="77", ago=20)
    story.squeue("echo 99 99")

    ended = story("--interval", "300", "--patience", "1")

    assert ended.rc == 1
    assert "the job has left the queue, ranks: 1 finished, 1 failed, 1 lost; last error: no GPU" in ended.message
    (note,) = [line for line in story.card.splitlines() if "Ended early" in line]
    assert note.endswith("1 lost; last error: no GPU…, see … (rank 1)")


def test_a_server_that_loads_is_on_the_card(story: Story) -> None:
    loading = {"since": time.time() - 240, "phase": "vllm: loading weights"}
    story.ranks("running", "running", "running", documents=0, loading=loading)
    monitor = story.start()

    story.waits_for("loading: 3 ranks have been loading their servers for 4 min: loading weights")

    assert monitor.running


def test_without_squeue_the_state_decides_when_the_run_has_ended(story: Story) -> None:
    story.ranks("stopped", "failed", "finished", slurm_job="77", error="no way")
    story.squeue("exit 1")

    ended = story("--patience", "1")

    assert ended.rc == 1
    assert "ended early: ranks: 1 stopped, 1 failed, 1 finished; last error: no way" in ended.message


def test_a_monitor_inside_the_job_does_not_wait_for_itself(story: Story) -> None:
    story.ranks("stopped", "failed", "finished", slurm_job="77")
    story.squeue("echo 77 77")

    assert story("--patience", "1", SLURM_JOB_ID="77").rc == 1


def test_a_job_that_waits_in_the_queue_is_waited_for(story: Story) -> None:
    hidden = story.state.with_name("hidden")
    story.state.rename(hidden)
    (story.folder / "queue").write_text("77 78\n")
    story.squeue(f"cat {story.folder / 'queue'}")
    monitor = story.start("--job", "77_3", "--patience", "1")
    time.sleep(2.5)
    assert monitor.running
    (hidden).rename(story.state)
    story.waits_for("3 waiting")
    monitor.close()

    story.state.rename(hidden)
    (story.folder / "queue").write_text("")
    ended = story("--job", "77", "--patience", "1")

    assert ended.rc == 1
    assert "job 77 is not in the queue, and no run has begun" in ended.message


# ── States that are broken, or change during monitoring ──────────────────────────────────────────────────────────────


def test_a_broken_file_of_figures_is_reported_and_may_be_replaced_meanwhile(story: Story) -> None:
    story.ranks("finished", "running", "finished")
    (story.state / "00001.stats.json").write_text("")
    ended = story("--patience", "1")
    assert ended.rc == 1
    assert "00001.stats.json is broken" in ended.message
    assert "1 broken" in ended.message

    monitor = story.start("--patience", "50")
    time.sleep(1)
    story.rank(1, "finished")

    assert monitor.finish().rc == 0
    assert TOLD not in story.card


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"documents": 3, "rank": 7}'])
def test_invalid_figures_are_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "00001.stats.json").write_text(content)

    with pytest.raises(sdg.StateError, match=r"00001\.stats\.json is broken .*: delete it"):
        rank_statistics(tmp_path)


def test_figures_without_a_record_are_those_of_a_rank_that_failed(story: Story) -> None:
    story.ranks("finished", "finished")
    (story.state / "00002.stats.json").write_text('{"documents": 3}')

    ended = story("--patience", "1")

    assert ended.rc == 1
    assert "2 finished, 1 failed" in ended.message


@pytest.mark.parametrize(("content", "words"), [("{", "is broken"), ('{"state_version": 1}', "version 1")])
def test_a_run_that_cannot_be_read_is_an_error_of_one_line(story: Story, content: str, words: str) -> None:
    (story.state / "run.json").write_text(content)

    ended = story()

    assert ended.rc == 1
    assert ended.says("run.json", words)


def test_figures_that_are_replaced_and_deleted_all_the_time_do_no_harm(story: Story) -> None:
    story.ranks("running", "running", "running")
    over = threading.Event()

    def disturb() -> None:
        while not over.is_set():
            story.rank(1, "running")
            (story.state / "00001.stats.json").unlink()

    thread = threading.Thread(target=disturb)
    monitor = story.start("--interval", "0.1")
    story.waits_for(TOLD)
    thread.start()
    try:
        time.sleep(2)
    finally:
        over.set()
        thread.join()
    story.ranks("finished", "finished", "finished")

    finished = monitor.finish()
    assert finished.rc == 0
    assert not [line for line in finished.lines if "of 300 documents" not in line], finished.stderr


def test_a_run_that_is_started_over_is_followed(story: Story) -> None:
    story.ranks("running", "running", "running")
    monitor = story.start()
    story.waits_for("3 running")
    record = json.loads((story.state / "run.json").read_text())

    (story.state / "run.json").unlink()
    for path in story.state.glob("0*.stats.json"):
        path.unlink()
    time.sleep(1)
    story.ranks("finished", "finished", "finished")
    record["run"], record["identity"]["model"] = "another", "another-model"
    (story.state / "new.json").write_text(json.dumps(record))
    (story.state / "new.json").rename(story.state / "run.json")

    assert monitor.finish().rc == 0
    assert "another-model" in story.card


def test_a_plugin_that_is_missing_on_this_machine_is_skipped(story: Story) -> None:
    story.options(plugin=["/nowhere/mine.py"])
    story.ranks("finished", "finished", "finished")
    story.chunk(0)

    finished = story()

    assert finished.rc == 0, finished
    assert "/nowhere/mine.py" in finished.lines[0]
    assert len(story.published) == 1


# ── A Hub that comes and goes, and monitors that do ──────────────────────────────────────────────────────────────────


def test_a_hub_that_is_down_is_waited_for_also_at_the_end(story: Story) -> None:
    story.ranks("running", "running", "running")
    story.chunk(0)
    story.hub.down = True
    monitor = story.start()
    wait_until(lambda: story.hub.requests)
    story.hub.down = False
    story.waits_for("3 running")

    story.hub.down = True
    story.chunk(1)
    story.ranks("finished", "finished", "finished")
    wait_until(lambda: story.hub.requests[-1].status == 0)
    time.sleep(1)
    assert monitor.running
    story.hub.down = False

    assert monitor.finish().rc == 0
    assert len(story.published) == 2
    assert TOLD not in story.card


def test_a_revoked_token_is_reported_once_and_nothing_is_lost(story: Story) -> None:
    story.ranks("running", "running", "running")
    monitor = story.start()
    story.waits_for("3 running")
    del story.hub.tokens["hf_write"]
    story.chunk(0)
    wait_until(lambda: Counter(request.status for request in story.hub.requests)[401] > 3)
    story.ranks("finished", "finished", "finished")

    ended = monitor.finish()

    assert ended.rc == 1
    assert "HF_TOKEN" in ended.message
    assert len([line for line in ended.lines if "HF_TOKEN" in line and "retrying" in line]) == 1
    assert "HF_TOKEN" not in story.card
    story.hub.tokens["hf_new"] = Rights("alice")
    assert story(token="hf_new").rc == 0
    assert len(story.published) == 1
    assert TOLD not in story.card


def test_a_run_that_ended_early_and_cannot_be_published_reports_both(story: Story) -> None:
    story.ranks("finished", "finished", "failed", error="no way")
    monitor = story.start("--patience", "3")
    story.waits_for("1 failed")
    del story.hub.tokens["hf_write"]

    ended = monitor.finish()

    assert ended.rc == 1
    assert "ended early: ranks: 2 finished, 1 failed; last error: no way (rank 2)" in ended.message
    assert "HF_TOKEN" in ended.message


@pytest.mark.parametrize(
    ("signum", "rc", "operation"), [(signal.SIGINT, 130, "info"), (signal.SIGTERM, 143, "lfs_put")]
)
def test_a_monitor_that_is_interrupted_leaves_nothing_behind(
    story: Story, signum: signal.Signals, rc: int, operation: str
) -> None:
    story.ranks("running", "running", "running")
    story.chunk(0)
    story.hub.fail(operation, delay=3.0, after=1 if operation == "info" else 0)
    monitor = story.start()
    wait_until(lambda: story.hub.counts["preupload"] > (operation == "lfs_put"))

    time.sleep(1)  # it waits for the response now
    monitor.send(signum)

    assert monitor.finish().rc == rc
    assert not list(story.state.glob("publishing-*"))
    story.ranks("finished", "finished", "finished")
    assert story().rc == 0
    assert len(story.published) == 1


def test_two_monitors_of_a_run_do_no_harm(story: Story) -> None:
    story.ranks("running", "running", "running")
    monitors = [story.start(), story.start()]
    for index in range(30):
        story.chunk(index)
        time.sleep(0.05)
    story.ranks("finished", "finished", "finished")

    ends = [monitor.finish() for monitor in monitors]

    assert [end.rc for end in ends] == [0, 0], ends
    files = story.hub.files(REPO)
    assert story.published == sorted(f"data/{path.name}" for path in story.data.iterdir())
    assert all(files[path] == (story.data / Path(path).name).read_bytes() for path in story.published)
    assert TOLD not in story.card


def shrink(story: Story, hour: float, commits: int, quota: int) -> None:
    """Set the length of an hour in s, and in it the commits of the publisher and the quota of the Hub."""
    module = "sys.modules['sdg_plugins.publishing.quota']"
    plugin = story.folder / "shrink.py"
    plugin.write_text(f"{textwrap.dedent(ECHO)}\nimport sys\n{module}.HOUR = {hour}\n{module}.COMMITS = {commits}\n")
    story.options(plugin=[str(plugin)])
    story.hub.hour, story.hub.commits_per_hour = hour, quota


@pytest.mark.slow
def test_a_hundred_ranks_are_published_within_the_quota_of_commits(story: Story) -> None:
    shrink(story, hour=3.0, commits=10, quota=12)  # a tenth of the real ones
    story.options(world_size=100)
    monitor = story.start()
    started = time.monotonic()

    for chunk in range(20):
        began = time.monotonic()
        for rank in range(100):
            story.chunk(100 * chunk + rank, world=100)
        for rank in range(chunk % 10, 100, 10):
            story.rank(rank, "running", documents=chunk, expected=20)
        time.sleep(max(0.0, 0.25 - (time.monotonic() - began)))
    story.ranks(*["finished"] * 100, documents=20, expected=20)
    finished = monitor.finish()

    assert finished.rc == 0, finished
    assert len(story.published) == 2000
    added = [int(word) for commit in story.hub.commits(REPO) for word in commit.title.split() if word.isdigit()]
    assert sum(added) == 2000  # no file twice
    assert story.hub.counts["commit"] <= 12 * (1 + (time.monotonic() - started) / 3)
    assert 429 not in story.hub.statuses("commit")
    assert "| Documents | 2,000 |" in story.card
    assert TOLD not in story.card


@pytest.mark.slow
def test_a_card_that_changes_all_the_time_does_not_use_up_the_quota(story: Story) -> None:
    shrink(story, hour=2.0, commits=3, quota=3)
    monitor = story.start("--interval", "0.1")
    for number in range(30):
        story.ranks("running", "running", "running", documents=number)
        time.sleep(0.1)
    story.ranks("finished", "finished", "finished")

    assert monitor.finish().rc == 0
    assert story.hub.counts["commit"] > 3
    assert 429 not in story.hub.statuses("commit")


# ── What a rank records about itself ─────────────────────────────────────────────────────────────────────────────────


def record_of(job: Job, rank: int = 0) -> dict[str, Any]:
    record = json.loads((job.output.state / f"{rank:05d}.stats.json").read_text())["rank"]
    assert isinstance(record, dict)
    return record


def test_a_rank_says_that_it_runs_and_how_it_ended(ranks: Job, server: FakeServer) -> None:
    ranks.options["world_size"] = 1
    server.behave(lambda payload, n: Hang() if prompt_of(payload) == "document 47" else Delay(0.2))
    running = ranks.start()
    wait_until(lambda: (ranks.output.state / "00000.stats.json").exists() and record_of(ranks)["documents_per_second"])
    first = record_of(ranks)
    running.send(signal.SIGTERM)
    assert running.finish().rc == 143
    stopped = record_of(ranks)
    server.behave(lambda payload, n: None)
    ranks.succeed()
    finished = record_of(ranks)

    assert (first["status"], first["expected"], first["error"]) == ("running", 48, None)
    assert 1 < first["documents_per_second"] < 50
    assert abs(first["updated"] - time.time()) < 60
    assert stopped["status"] == "stopped"
    assert "SIGTERM" in stopped["error"]
    assert (finished["status"], finished["error"]) == ("finished", None)


@pytest.mark.parametrize("ended", ["finished", "stopped"])
def test_a_mistyped_rerun_does_not_change_how_a_rank_is_doing(ranks: Job, server: FakeServer, ended: str) -> None:
    ranks.options["world_size"] = 1
    if ended == "stopped":
        server.behave(lambda payload, n: Hang() if prompt_of(payload) == "document 7" else Delay(0.2))
    first = ranks.start(max_documents=8)
    if ended == "stopped":
        wait_until(
            lambda: (ranks.output.state / "00000.stats.json").exists() and record_of(ranks)["documents_per_second"]
        )
        first.send(signal.SIGTERM)
    first.finish()
    before = record_of(ranks)
    assert before["status"] == ended

    refused = ranks(max_documents=8, temperature=0.9)

    assert refused.rc == 1
    assert "different run" in refused.message
    assert record_of(ranks) == before


def test_a_recorded_error_has_no_secrets(ranks: Job, server: FakeServer) -> None:
    server.api_key = "another-key"
    keys = {"OPENAI_API_KEY": "sk-secret-of-mine"}
    url = server.url.replace("://", "://someone:hunter2@")

    assert ranks(keys, world_size=1, base_url=url).rc == 1
    refused = (ranks.output.state / "00000.stats.json").read_text()
    gone = ranks(keys, world_size=1, base_url="http://someone:hunter2@127.0.0.1:9/v1", request_timeout=1)

    assert gone.rc == 1
    for text in (refused, (ranks.output.state / "00000.stats.json").read_text()):
        assert json.loads(text)["rank"]["status"] == "failed"
        assert "hunter2" not in text
        assert "sk-secret" not in text


def test_a_rank_whose_clock_differs_is_alive_while_its_heartbeat_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from sdg_plugins.common import ranks as ranks_module

    run: Any = argparse.Namespace(state=tmp_path, options=argparse.Namespace(world_size=1))
    looks = ranks_module.Looks()

    def look(clock: float, host: str = "another-machine") -> str:
        record = {"status": "running", "updated": time.time() + clock, "host": host}
        (tmp_path / "00000.stats.json").write_text(json.dumps({"rank": record}))
        return looks.look(run)[0].state

    def seen_twice(clock: float, beats: bool, host: str = "another-machine") -> tuple[str, bool]:
        """What `status` says of a rank whose clock differs: its state, and whether its heartbeat counts as new."""
        look(clock, host)
        first = ranks_module.ranks_of(tmp_path, 1)

        def read() -> list[ranks_module.Rank]:
            if beats:
                look(clock, host)
            return ranks_module.ranks_of(tmp_path, 1)

        (rank,) = ranks_module.looked_at_again(first, read)
        return rank.state, abs(rank.updated - time.time()) < 60

    monkeypatch.setattr(ranks_module, "SECOND_LOOK", 0.05)
    assert seen_twice(-500, beats=True) == ("running", True)
    assert seen_twice(500, beats=True) == ("running", True)
    assert seen_twice(-500, beats=False)[0] == "silent"
    assert seen_twice(500, beats=False)[0] == "silent"
    for host in ("another-machine", platform.node()):  # a clock of ours may have been set back
        assert seen_twice(7200, beats=True, host=host) == ("running", True)
        assert seen_twice(7200, beats=False, host=host)[0] == "silent"
        assert seen_twice(-5, beats=False, host=host) == ("running", True)  # not in doubt
    looks = ranks_module.Looks()
    assert look(-5000) == "silent"
    assert look(-4999) == "running"
    (rank,) = looks.look(run)
    assert abs(rank.updated - time.time()) < 60
    look(5000)
    monkeypatch.setattr(ranks_module, "SILENT", 0.05)
    time.sleep(0.1)
    assert looks.look(run)[0].state == "silent"
