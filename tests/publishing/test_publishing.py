"""Publishing to the Hub: the real client against a Hub on loopback, with faults between them."""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import functools
import io
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Fault, Rights
from fake_server import Delay, Hang, Status
from hypothesis import given, settings, strategies as st
from running import Finished, Job, Output, Started, documents, program, wait_until

import sdg
from sdg_plugins.common import hub as hub_plugin, recorded
from sdg_plugins.common.command_line import FILENAME
from sdg_plugins.common.ending import LAST_RESORT
from sdg_plugins.common.files import output_place, rank_file
from sdg_plugins.publishing import quota as quota_plugin, spool as spool_plugin
from sdg_plugins.publishing.ledger import Ledger
from sdg_plugins.publishing.publisher import Publisher
from sdg_plugins.publishing.spool import Spool

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "alice/out"
URI = f"hf://datasets/{REPO}"
TOKEN = "hf_write_aaaabbbbccccdddd"


@pytest.fixture
def hub(hub: FakeHub) -> FakeHub:
    hub.tokens = {TOKEN: Rights("alice"), "hf_read": Rights("alice", write=False), "hf_bob": Rights("bob")}
    return hub


class HubJob(Job):
    """A run that publishes to the Hub; `publish_interval` is short."""

    def __init__(self, folder: Path, server: Any, hub: FakeHub) -> None:
        super().__init__(folder, server)
        self.hub = hub
        self.options |= {"output": URI, "publish_interval": 0.5, "records_per_chunk": 5}
        self.env = hub.environment(folder, TOKEN)

    def command(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Finished:
        """Run another command on this run."""
        return self.sdg(name, "--output", URI, *arguments, **{**self.env, **(env or {})})

    @property
    def state(self) -> Path:
        return self.folder / ".sdg" / "datasets-alice-out"

    @property
    def spool(self) -> dict[str, bytes]:
        """The files that the run has written, by name."""
        files = (self.state / "spool").rglob("[!.]*.*")
        return {str(path.relative_to(self.state / "spool")): path.read_bytes() for path in files if path.is_file()}

    @property
    def there(self) -> dict[str, bytes]:
        """The files on the Hub by name, except the card and .gitattributes."""
        files = self.hub.files(REPO) if REPO in self.hub.repos else {}
        return {name: content for name, content in files.items() if name not in {".gitattributes", "README.md"}}

    @property
    def card(self) -> str:
        return self.hub.files(REPO)["README.md"].decode()

    @property
    def finished(self) -> bool:
        """True if everything is generated."""
        figures = self.state / "00000.stats.json"
        return figures.exists() and json.loads(figures.read_text())["rank"]["status"] == "finished"

    def all_is_there(self) -> bool:
        assert self.there == self.spool
        return True


@pytest.fixture
def job(tmp_path: Path, server: Any, hub: FakeHub) -> Iterator[HubJob]:
    job = HubJob(tmp_path, server, hub)
    job.input(documents(23))
    yield job
    job.sdg.close()


def ids(files: dict[str, bytes]) -> list[str]:
    """The documents of all data files, in the order of the files' names."""
    tables = [pq.read_table(io.BytesIO(files[name])) for name in sorted(files) if name.endswith(".parquet")]
    return [row["id"] for table in tables for row in table.to_pylist()]


def changes(hub: FakeHub) -> Counter[str]:
    """How often each file was added or changed in the history of the repository."""
    counted: Counter[str] = Counter()
    before: dict[str, Any] = {}
    for commit in hub.commits(REPO):
        counted.update(
            path for path, blob in commit.files.items() if path not in before or before[path].oid != blob.oid
        )
        before = commit.files
    return counted


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chunks_failures_and_the_card_are_published_and_datasets_reads_them(job: HubJob) -> None:
    job.server.behave(lambda payload, n: Status(400) if "document 7" in str(payload) else None)
    finished = job(max_failure_rate=1)
    assert finished.rc == 0, finished
    assert finished.stdout.splitlines()[-1] == f"published {job.hub.url}/datasets/{REPO}"
    assert job.all_is_there()
    assert sorted(job.there) == [f"data/00000_{i:05}.parquet" for i in range(5)] + ["failed/00000_00001.jsonl"]
    assert job.hub.repos[REPO].private
    script = f"""
        import datasets
        for rows in (datasets.load_dataset({REPO!r}, split="train"), datasets.load_dataset({REPO!r}, "data")["train"]):
            print(*sorted(rows["id"]))
    """
    environment = {**os.environ, **job.env, "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    answer = subprocess.run(program(script), env=environment, capture_output=True)
    expected = " ".join(f"d{i:04}" for i in range(23) if i != 7)
    assert answer.stdout.decode().splitlines() == [expected, expected], answer.stderr.decode()


@pytest.mark.slow
def test_several_processes_are_published_by_their_parent_also_after_a_kill(job: HubJob) -> None:
    job.server.behave(lambda payload, n: Hang() if "document 22" in str(payload) else None)
    started = job.start(processes=2)
    wait_until(lambda: len(job.there) == 4)
    started.send(signal.SIGKILL)
    started.finish()
    job.server.release()
    finished = job(processes=3)

    assert finished.rc == 0, finished
    assert finished.stdout.count(f"published {job.hub.url}/datasets/{REPO}") == 1
    assert job.all_is_there()
    assert sorted(ids(job.there)) == [row["id"] for row in documents(23)]
    assert set(changes(job.hub).values()) - {1} <= {changes(job.hub)["README.md"]}  # each file once, the card again
    assert job.command("verify").rc == 0


def test_a_rerun_of_a_finished_run_commits_nothing(job: HubJob) -> None:
    assert job().rc == 0
    commits = len(job.hub.commits(REPO))
    assert job().rc == 0
    assert job.command("card").rc == 0
    (job.state / "published.sqlite3").unlink()  # a cache
    assert job().rc == 0
    assert len(job.hub.commits(REPO)) == commits


def test_the_token_is_written_nowhere(job: HubJob) -> None:
    finished = job()
    written = [path.read_bytes() for path in job.folder.rglob("*") if path.is_file()]
    said = [finished.stdout.encode(), finished.stderr.encode(), *job.hub.files(REPO).values(), *written]
    assert not any(TOKEN.encode() in text for text in said)


def test_data_and_progress_are_published_during_the_run(job: HubJob) -> None:
    job.input(documents(60))
    job.server.behave(lambda payload, n: Delay(0.3))
    started = job.start(max_concurrent_generations=2)
    wait_until(lambda: len(job.there) >= 2)
    assert started.running
    assert "This dataset is being generated" in job.card
    assert "of 60" in job.card
    finished = started.finish()
    assert finished.rc == 0
    assert "being generated" not in job.card
    assert job.all_is_there()
    assert all(times == 1 for path, times in changes(job.hub).items() if path.startswith("data/"))


def test_a_public_repository_is_created_only_on_request(job: HubJob) -> None:
    assert job(output_public=True).rc == 0
    assert not job.hub.repos[REPO].private


def test_an_existing_repository_keeps_its_other_files_and_its_visibility(job: HubJob) -> None:
    job.hub.create(REPO)
    theirs = {"data/notes.txt": b"mine", "train.parquet": b"?", "other/00000_00000.parquet": b"?"}
    job.hub.push(REPO, {**theirs, "README.md": b"---\nlicense: mit\n---\n# My own words\n"})
    assert job().rc == 0
    assert job.there == {**job.spool, **theirs}
    assert not job.hub.repos[REPO].private
    assert "# My own words" in job.card
    assert "license: mit" in job.card


def test_rows_of_others_in_the_same_config_are_refused(job: HubJob) -> None:
    job.hub.create(REPO)
    job.hub.push(REPO, {"data/train-0.parquet": b"?"})
    for more in ({}, {"fresh": True}):
        finished = job(**more)
        assert finished.rc == 1
        assert finished.says("data/train-0.parquet", "--output-config")
        assert not job.server.requests
    assert job(output_config="mine").rc == 0


def test_a_run_that_fails_at_once_leaves_no_repository(job: HubJob) -> None:
    finished = job(prompt_column="nope")
    assert finished.rc == 1
    assert REPO not in job.hub.repos


def test_outputs_in_a_sub_folder(job: HubJob) -> None:
    assert job(output=f"{URI}/some/folder").rc == 0
    assert sorted(job.there) == [f"some/folder/data/00000_{i:05}.parquet" for i in range(5)]
    assert "path: some/folder/data/**/*.parquet" in job.card


def test_two_configs_share_the_card(job: HubJob) -> None:
    assert job().rc == 0
    assert job(output_config="other").rc == 0
    assert sum(name.startswith("other/") for name in job.there) == 5
    assert job.card.count("config_name: all") == 1
    assert ids(job.there) == [f"d{i:04}" for i in range(23)] * 2
    asked = len(job.server.requests)
    others = job(output_config="lines", output_filename="${rank}_${chunk_index}.jsonl")
    assert others.says("the config data in parquet", "one format", "another --output")
    assert job(output=f"{URI}/other", output_config="below").says("the config other would have its rows, too")
    assert len(job.server.requests) == asked


def test_outputs_in_different_folders_share_the_card(job: HubJob) -> None:
    for folder in ("first", "second", "first"):
        assert job(output=f"{URI}/{folder}").rc == 0
    card = job.card
    assert "path: first/data/**/*.parquet" in card
    assert "path: second/data/**/*.parquet" in card
    assert card.count("<!-- sdg: begin data -->") == card.count("<!-- sdg: begin second-data -->") == 1
    ours, mine = "    path: first/data/**/*.parquet\n", "  - split: mine\n    path: x.parquet\n"
    edited = card.replace(ours, ours + mine, 1)
    assert edited != card
    job.hub.push(REPO, {"README.md": edited.encode()})
    assert job(output=f"{URI}/first", output_config="third").rc == 0
    assert mine in job.card


def test_ranks_do_not_touch_the_hub(job: HubJob) -> None:
    finished = [job(rank=rank, world_size=2) for rank in (0, 1)]
    assert not job.hub.requests
    assert all("sdg.py monitor --output" in one.stderr for one in finished)
    assert job.command("monitor", "--interval", "0.2").rc == 0
    assert job.all_is_there()
    assert len(job.there) == 5


def test_a_repository_that_others_push_to_all_the_time_is_published_to(job: HubJob) -> None:
    job.hub.create(REPO)
    job.hub.before_commit = lambda repo: len(job.hub.commits(repo)) % 2 and job.hub.push(repo, {"notes.txt": b"?"})
    assert job().rc == 0
    assert {name: content for name, content in job.there.items() if name != "notes.txt"} == job.spool
    assert "being generated" not in job.card
    assert job.hub.statuses("commit")[:2] == [412, 200]


@pytest.mark.parametrize("folder", ["..", "a/./b", "a//b", "a/.git", "a:b", "what?"])
def test_a_folder_that_the_hub_cannot_have_is_refused_before_the_run(job: HubJob, folder: str) -> None:
    finished = job(output=f"{URI}/{folder}")
    assert finished.rc == 2
    assert finished.says("the Hub cannot have a folder")
    assert not job.server.requests


def test_a_quota_that_is_used_up_is_reported_at_once_and_shown_by_status(job: HubJob) -> None:
    said = "You have exceeded the rate limit for repository commits. You can retry this action in 2 minutes."
    job.hub.fail("commit", status=429, times=3, error=said)
    started = job.start()
    record = job.state / "publishing.json"
    wait_until(lambda: record.exists() and json.loads(record.read_text())["problem"])
    wait_until(lambda: job.finished)
    status = job.command("status")
    assert status.rc == 0
    assert "0 of 5 files published; publishing waits until" in status.stdout
    assert "You can retry this action in 2 minutes" in status.stdout
    started.send(signal.SIGTERM)
    assert "next try at" in started.finish().stderr

    record.write_text(json.dumps(json.loads(record.read_text()) | {"updated": time.time() - 999, "until": 0}))
    status = job.command("status")
    assert status.rc == 1
    assert "the publisher is gone" in status.stdout
    job.hub.forget_faults()
    assert job().rc == 0
    status = job.command("status")
    assert status.rc == 0
    assert "5 files: all published" in status.stdout


def test_more_documents_replace_the_chunk_that_was_not_full(job: HubJob) -> None:
    assert job(max_documents=7).rc == 0
    assert ids(job.there) == [f"d{i:04}" for i in range(7)]
    assert job(max_documents=12).rc == 0
    assert job.all_is_there()
    assert ids(job.there) == [f"d{i:04}" for i in range(12)]


def test_failures_that_were_retried_are_gone(job: HubJob) -> None:
    job.server.behave(lambda payload, n: Status(400) if "document 7" in str(payload) else None)
    assert job(max_failure_rate=1).rc == 0
    job.server.behave(lambda payload, n: None)
    assert job(retry_failed=True).rc == 0
    assert not any(name.startswith("failed/") for name in job.there)
    assert job.all_is_there()
    assert ids(job.there) == [f"d{i:04}" for i in range(23)]


def test_a_chunk_that_was_deleted_on_the_hub_is_published_again(job: HubJob) -> None:
    assert job().rc == 0
    job.hub.push(REPO, {"data/00000_00002.parquet": None})
    assert job().rc == 0
    assert job.all_is_there()


def test_verify_looks_at_the_hub_too(job: HubJob) -> None:
    assert job().rc == 0
    assert job.command("verify").rc == 0
    job.hub.push(REPO, {"data/00000_00002.parquet": None, "data/00000_00003.parquet": b"?"})
    job.hub.push(REPO, {"data/00000_00099.parquet": b"?", "data/notes.txt": b"mine"})
    finished = job.command("verify")
    assert finished.rc == 1
    assert [line.split()[2] for line in finished.lines] == [f"data/00000_000{i}.parquet" for i in ("02", "03", "99")]
    assert "someone else" in finished.lines[1]


def test_fresh_deletes_what_the_earlier_run_has_published_and_nothing_else(job: HubJob) -> None:
    assert job().rc == 0
    job.hub.push(REPO, {"data/notes.txt": b"mine"})
    assert job(fresh=True, max_documents=8).rc == 0
    assert job.there == {**job.spool, "data/notes.txt": b"mine"}
    assert len(job.spool) == 2


@pytest.mark.slow
def test_a_kill_at_any_request_of_fresh_leaves_what_is_refused_or_starts_clean(
    job: HubJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.documents(*"abcd")
    job.options["records_per_chunk"] = 2
    expected, saved = {}, {}
    for temperature in (0.7, 0.5):
        assert job(temperature=temperature, fresh=True).rc == 0
        assert job.all_is_there()
        expected[temperature], saved = job.there, copy.deepcopy(job.hub.repos)
    shutil.copytree(job.state, job.folder / "saved")
    next_fault = job.hub._next_fault

    def kill_at(number: int) -> int:
        """Start the run with the lower temperature over with the higher one, kill that, and go on with either."""
        job.hub.repos = copy.deepcopy(saved)
        shutil.rmtree(job.state)
        shutil.copytree(job.folder / "saved", job.state)
        left, victim = itertools.count(number, -1), list[Started]()

        def kill(operation: str, path: str) -> Fault:
            if next(left) != 1:
                return next_fault(operation, path)
            wait_until(lambda: victim)
            victim[0].process.kill()
            return Fault(operation, drop=True)

        monkeypatch.setattr(job.hub, "_next_fault", kill)
        victim.append(job.start(temperature=0.7, fresh=True))
        rc = victim[0].finish().rc
        monkeypatch.setattr(job.hub, "_next_fault", next_fault)
        now = (0.7, 0.5)[number % 2]
        again = job(temperature=now)
        if again.rc == 1:
            assert "--fresh" in again.message or "belongs to a different run" in again.message, (number, again)
            again = job(temperature=(now := 0.7), fresh=True)
        assert again.rc == 0, (number, again)
        assert job.there == expected[now], number
        assert job.command("verify").rc == 0, number
        return rc

    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(kill_at(len(codes) + 1))
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 10


def test_output_of_an_unknown_run_is_refused_and_deleted_with_fresh(job: HubJob) -> None:
    assert job().rc == 0
    for path in sorted(job.state.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    refused = job(max_documents=8)
    assert refused.rc == 1
    assert refused.says("data/00000_00000.parquet", "the state of its run is not here", "--fresh")
    assert job(fresh=True, max_documents=8).rc == 0
    assert job.all_is_there()
    assert len(job.there) == 2


def test_outputs_with_similar_names_do_not_share_a_state(job: HubJob) -> None:
    assert job(output="hf://datasets/alice/a-b").rc == 0
    refused = job(output="hf://datasets/alice-a/b", no_publish=True)
    assert refused.rc == 1
    assert refused.says("hf://datasets/alice/a-b", "--state-dir")
    assert job(output="hf://datasets/alice-a/b", no_publish=True, fresh=True).rc == 1


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_small_chunks_are_merged_in_order(job: HubJob) -> None:
    job.input(documents(200))
    assert job(max_file_size="20kB").rc == 0
    assert len(job.spool) == 40
    assert 2 < len(job.there) < 20
    assert all(len(content) <= 22_000 for content in job.there.values())
    assert ids(job.there) == [f"d{i:04}" for i in range(200)]
    commits = len(job.hub.commits(REPO))
    (job.state / "published.sqlite3").rename(job.folder / "remembered")
    assert job(max_file_size="20kB").rc in {0, 1}
    (job.folder / "remembered").replace(job.state / "published.sqlite3")
    assert job(max_file_size="20kB").rc == 0
    assert len(job.hub.commits(REPO)) == commits
    other = job(max_file_size="40kB")
    assert other.rc == 2
    assert other.says("--max-file-size", "20000", "--fresh")


def test_merged_files_are_replaced_when_the_input_grows(job: HubJob) -> None:
    job.input(documents(100))
    assert job(max_file_size="20kB", max_documents=47).rc == 0
    assert ids(job.there) == [f"d{i:04}" for i in range(47)]
    assert job(max_file_size="20kB", max_documents=93).rc == 0
    assert ids(job.there) == [f"d{i:04}" for i in range(93)]


@pytest.mark.parametrize("size", [{}, {"max_file_size": "20kB"}])
def test_files_deleted_from_the_spool_stay_published(job: HubJob, size: dict[str, Any]) -> None:
    job.input(documents(60))
    assert job(max_documents=43, **size).rc == 0
    published = job.there
    for chunk in (0, 4):
        (job.state / f"spool/data/00000_{chunk:05}.parquet").unlink()
    verified = job.command("verify")
    assert verified.rc == 0
    assert "2 published files" in verified.stderr
    assert job.command("card").rc == 0
    assert job(max_documents=43, **size).rc == 0
    assert job.there == published

    assert job(**size).rc == 0
    assert {**job.there, **published}.keys() == job.there.keys()
    assert ids(job.there) == [f"d{i:04}" for i in range(60)]

    job.hub.push(REPO, {"data/00000_00000.parquet": b"?"})
    for again in (job.command("verify"), job(**size)):
        assert again.rc == 1
        assert "data/00000_00000.parquet is missing or was changed there" in again.stderr
    assert job.there["data/00000_00000.parquet"] == b"?"


def test_a_range_whose_parts_are_gone_is_left_as_it_is_without_the_ledger(job: HubJob) -> None:
    job.input(documents(60))
    assert job(max_file_size="20kB").rc == 0
    published = job.there
    (job.state / "spool/data/00000_00001.parquet").unlink()
    (job.state / "published.sqlite3").unlink()
    finished = job(max_file_size="20kB")
    assert finished.rc == 1
    assert "00000_00001.parquet" in finished.stderr
    assert job.there == published


def test_a_record_of_failures_that_is_gone_from_the_spool_holds_up_no_rows(
    job: HubJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.server.behave(lambda payload, n: Status(400) if "document 7" in str(payload) else None)
    merged = {"max_file_size": "20kB"}
    assert job(**merged).rc == 0
    (failed,) = (job.state / "spool/failed").glob("[!.]*")
    name = f"failed/{failed.name}"
    monkeypatch.setattr(spool_plugin, "FRESH", 1000.0)
    monkeypatch.chdir(job.folder)
    parser = argparse.ArgumentParser()
    recorded.add_run_options(parser)
    with contextlib.closing(Ledger(job.state / "published.sqlite3")) as ledger:
        spool = Spool(recorded.load_run(parser.parse_args(["--output", URI])), "", ledger)
        spool.files()
        content = failed.read_bytes()
        failed.unlink()
        assert spool.is_due(name)
        database = rank_file(job.state, 0, "sqlite3")
        database.rename(job.state / "aside")
        spool.files()
        assert spool._is_written(0)  # what cannot be read now is as it was
        (job.state / "aside").rename(database)
        failed.write_bytes(content)
        before = job.there
        job.server.behave(lambda payload, n: None)
        assert job(**merged, retry_failed=True).rc == 0
        spool.files()
        assert not spool.is_due(name)  # what was read before the documents were retried does not count
    assert ids(job.there) == [f"d{i:04}" for i in range(23)]
    assert job.there != before

    job.server.behave(lambda payload, n: Status(400))
    job.input(documents(24))
    assert job(**merged).rc == 0
    for record in (job.state / "spool/failed").glob("[!.]*"):
        record.unlink()
    job.hub.push(REPO, dict.fromkeys(path for path in job.there if path.startswith("data/")))
    assert job(**merged).rc == 0
    assert ids(job.there) == [f"d{i:04}" for i in range(23)]


def test_merged_rows_stay_on_the_hub_while_the_run_grows(job: HubJob) -> None:
    job.input(documents(100))
    assert job(max_file_size="20kB", max_documents=23).rc == 0
    assert ids(job.there) == [f"d{i:04}" for i in range(23)]
    job.server.behave(lambda payload, n: Delay(0.5))
    started = job.start(max_file_size="20kB", max_concurrent_generations=1)
    wait_until(lambda: len(job.server.requests) > 25)
    time.sleep(1.5)
    assert ids(job.there)[:23] == [f"d{i:04}" for i in range(23)]
    started.close()  # kill -9
    assert job.command("card").rc == 0
    assert ids(job.there)[:23] == [f"d{i:04}" for i in range(23)]


def test_files_that_are_merged_again_are_replaced_in_one_commit(bench: Callable[..., Bench], hub: FakeHub) -> None:
    made = bench(max_file_size=12_000)
    hub.create(REPO)
    (made.run.state / "00000.stats.json").write_text(json.dumps({"rank": {"status": "finished"}}))
    made.write(*range(40))
    with contextlib.closing(made.publisher()) as publisher:
        publisher.publish_all()
        files = len(made.there())
        made.write(*range(0, 40, 2), text="x" * 3000)
        publisher.quota.files = 3
        while publisher.publish():
            pass
    assert len(made.there()) > files
    for commit in hub.commits(REPO)[2:]:
        there = hub.files(REPO, commit.oid)
        assert sorted(map(int, ids(there))) == list(range(40)), commit.title


def test_a_failed_fresh_run_does_not_allow_later_runs_to_delete(job: HubJob) -> None:
    job.hub.create(REPO)
    job.hub.push(REPO, {"data/00000_00777.parquet": b"?"})
    assert job().rc == 1
    assert job(fresh=True, prompt_column="nope").rc == 1
    assert job().rc == 1
    assert "data/00000_00777.parquet" in job.hub.files(REPO)


def test_two_runs_to_one_config_do_not_overwrite_each_other(job: HubJob) -> None:
    assert job().rc == 0
    before = dict(job.there)
    (job.state / "published.sqlite3").unlink()
    job.hub.push(REPO, {"data/00000_00001.parquet": b"of another run"})
    finished = job()
    assert finished.rc == 1
    assert "data/00000_00001.parquet was written by someone else" in finished.message
    assert job.there == {**before, "data/00000_00001.parquet": b"of another run"}


def test_a_config_may_have_the_name_of_a_part_of_a_path(job: HubJob) -> None:
    job.server.behave(lambda payload, n: Status(400) if "document 7" in str(payload) else None)
    assert job(max_failure_rate=1, output_config="20241").rc == 0
    assert job(max_failure_rate=1).rc == 0
    assert "failed/20241/00000_00001.jsonl" in job.there
    assert "failed/00000_00001.jsonl" in job.there


def test_a_lost_ledger_costs_nothing_after_failures_were_retried(job: HubJob) -> None:
    job.server.behave(lambda payload, n: Status(400) if "document 7" in str(payload) else None)
    assert job(max_failure_rate=1).rc == 0
    job.server.behave(lambda payload, n: None)
    assert job(retry_failed=True, no_publish=True).rc == 0
    (job.state / "published.sqlite3").unlink()
    (job.state / "published.sqlite3").write_bytes(b"")
    job.hub.push(REPO, {"data/00000_00001.parquet": None})
    assert job().rc == 0
    assert job.all_is_there()


@pytest.mark.slow
def test_of_two_runs_that_begin_at_the_same_time_one_has_the_output(job: HubJob, server: Any) -> None:
    """Both find an empty repository. Their files have different names, and could stand beside each other."""
    job.input(documents(4))
    server.behave(lambda payload, n: Hang())
    late = job.start(state_dir="late", output_filename="late-${rank}_${chunk_index}.parquet")
    wait_until(lambda: server.in_flight == 4)
    server.behave(lambda payload, n: None)
    assert job().rc == 0
    server.release()

    finished = late.finish()
    assert finished.rc == 1
    assert "has data/00000_00000.parquet" in finished.message
    assert "choose another --output-config or --output" in finished.message
    assert job.all_is_there()


def test_a_broken_ledger_is_reported(job: HubJob) -> None:
    assert job().rc == 0
    (job.state / "published.sqlite3").write_bytes(b"no database at all" * 100)
    finished = job()
    assert finished.rc == 1
    assert finished.says("published.sqlite3", "delete it")


def test_a_ledger_that_is_locked_or_on_a_full_disk_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "published.sqlite3"
    connect = functools.partial(sqlite3.connect, path, isolation_level=None, check_same_thread=False)
    with contextlib.closing(connect()) as other:
        monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: connect(timeout=0))
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sdg.StateError, match="has been locked by another process"):
            Ledger(path)
        other.execute("ROLLBACK")

    def full(*_: Any, **__: Any) -> sqlite3.Connection:
        db = connect()
        db.execute("PRAGMA max_page_count=1")
        return db

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(sdg.StateError, match="the disk is full: make room"):
        Ledger(path)


def test_a_wrong_setting_of_the_hub_is_an_error_and_not_an_outage(job: HubJob) -> None:
    for env, word in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_ENDPOINT": "huggingface.example"}, "HF_ENDPOINT"),
    ):
        finished = job(env=env)
        assert finished.rc == 1
        assert finished.says(word)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    world=st.integers(1, 3),
    limit=st.integers(10, 200),
    finished=st.booleans(),
)
def test_merging_keeps_each_chunk_once_and_in_order(
    sizes: list[int], world: int, limit: int, finished: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("merging")
    ledger = Ledger(folder / "ledger")
    options = {"output_filename": FILENAME, "output_config": "data", "world_size": world, "max_file_size": limit}
    run = make_run(folder, **options)
    for rank in range(world):
        record = {"rank": {"status": "finished" if finished else "running"}}
        (run.state / f"{rank:05}.stats.json").write_text(json.dumps(record))
    spool = Spool(run, "", ledger)
    data = {index: run.path_of(sdg.Chunk(index, 0)) for index in range(len(sizes))}
    marks = {name: f"{sizes[index]} 0" for index, name in data.items()}
    files = [parts for _, parts in spool._merged(data, marks)]
    assert files == [parts for _, parts in spool._merged(data, marks)]
    merged = [name for file in files for name in file]
    assert len(merged) == len(set(merged))
    assert all(list(file) == sorted(file) and len({name[:10] for name in file}) == 1 for file in files)
    by_name = {name: sizes[index] for index, name in data.items()}
    assert all(len(file) == 1 or sum(by_name[name] for name in file) <= limit for file in files)
    if finished:
        assert set(merged) == set(data.values())
    ledger.close()


# ── One publisher, in this process ───────────────────────────────────────────────────────────────────────────────────


def make_run(folder: Path, **options: Any) -> sdg.Run:
    """A run as loaded from its state, with no files written."""
    import argparse

    plugins, _ = sdg.Plugins.load([])
    defaults = {
        **{name: None for name in ("input", "prompt_template", "system_prompt", "generation", "max_file_size", "seed")},
        **{name: None for name in ("max_tokens", "temperature", "top_p", "top_k", "max_documents", "base_url")},
        **{"output": URI, "output_config": "data", "output_filename": FILENAME, "world_size": 1, "rank": 0},
        **{"writer": "hf", "output_public": False, "fresh": False, "plugin": [], "rollout": "summarize"},
        **{
            "results_column": "rollout_results",
            "rollouts_per_document": 1,
            "records_per_chunk": 1,
            "server": "demo",
        },
    }
    defaults |= {"identity": [], "prompt_column": "text", "id_column": None, "publish_interval": 300.0}
    namespace = argparse.Namespace(**{**defaults, **options})
    state = folder / "state"
    state.mkdir()
    run = sdg.Run(namespace, plugins, output_place(namespace, state), state, lambda reason: None)
    record = {
        "sdg": sdg.__version__,
        "state_version": sdg.STATE_VERSION,
        "fingerprint": "f00d",
        "run": "abc",
        "identity": {"model": "some-model", "rollout": "summarize", "plugin_version": "1"},
        "options": vars(namespace),
        "source": {},
        "source_schema": base64.b64encode(pa.schema({"id": pa.string()}).serialize().to_pybytes()).decode(),
    }
    (state / "run.json").write_text(json.dumps(record))
    return run


class Bench:
    """A publisher in this process, and the spool that it publishes."""

    def __init__(self, folder: Path, hub: FakeHub, **options: Any) -> None:
        self.hub, self.run = hub, make_run(folder, **options)
        self.spool = Path(self.run.output.root)

    def write(self, *indices: int, text: str = "") -> None:
        """Write chunks."""
        for index in indices:
            table = pa.table({"id": [str(index)], "rollout_results": pa.array([[]], pa.list_(pa.string()))})
            path = self.spool / self.run.path_of(sdg.Chunk(index, 0))
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.replace_schema_metadata({"chunk": f"{index} {text}"}), path)

    def publisher(self) -> Publisher:
        return Publisher(self.run)

    def files(self) -> dict[str, bytes]:
        return Output(self.spool).files()

    def there(self) -> dict[str, bytes]:
        return {name: content for name, content in self.hub.files(REPO).items() if name.startswith("data/")}


@pytest.fixture
def bench(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """Makes a `Bench`, with pauses a hundred times shorter."""
    from huggingface_hub import HfApi

    hub_plugin.open_client()  # keeps the client quiet
    monkeypatch.setattr(hub_plugin, "open_client", lambda: HfApi(endpoint=hub.url, token=TOKEN))
    monkeypatch.setattr(hub_plugin, "has_token", lambda: True)
    true_pause = hub_plugin.pause_after
    monkeypatch.setattr(hub_plugin, "pause_after", lambda *a, **k: true_pause(*a, **k) / 100)
    for variable, value in {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url}.items():
        monkeypatch.setenv(variable, value)
    return lambda **options: Bench(tmp_path, hub, **options)


@pytest.mark.slow
def test_a_thousand_chunks_through_faults_land_once_in_few_commits(bench: Callable[..., Bench], hub: FakeHub) -> None:
    made = bench()
    made.write(*range(1000))
    hub.create(REPO)
    for at, fault in enumerate(
        (
            {"status": 500},
            {"status": 504, "landed": True},
            {"drop": True, "landed": True},
            {"drop": True},
            {"status": 429, "headers": {"Retry-After": "1"}},
            {"status": 409},
            {"status": 500, "landed": True},
            {"status": 502, "text": "<html>bad gateway</html>"},
            {"drop": True, "landed": True},
        )
    ):
        hub.fail("commit", after=2 * at, **fault)
    hub.fail("lfs_put", status=500, times=3, after=50)
    hub.fail("preupload", status=503, times=2)
    hub.fail("info", status=500, times=3, after=4)
    hub.fail("tree", drop=True, after=3)
    rival = iter(range(3))
    hub.before_commit = lambda repo: next(rival, None) is not None and hub.push(repo, {f"notes{time.time()}.txt": b"x"})
    with contextlib.closing(made.publisher()) as publisher:
        publisher.publish_all()
    assert made.there() == made.files()
    assert len(made.files()) == 1000
    ours = [commit for commit in hub.commits(REPO) if any(path.startswith("data/") for path in commit.files)]
    assert len(ours) <= 40
    assert hub.counts["commit"] <= 40
    assert {times for path, times in changes(hub).items() if path.startswith("data/")} == {1}


def test_two_publishers_at_once_do_no_harm(bench: Callable[..., Bench], hub: FakeHub) -> None:
    made = bench()
    made.write(*range(300))
    hub.create(REPO)
    problems: list[BaseException] = []

    def publish() -> None:
        try:
            with contextlib.closing(made.publisher()) as publisher:
                publisher.publish_all()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems
    assert made.there() == made.files()
    assert {times for path, times in changes(hub).items() if path.startswith("data/")} == {1}


def test_a_replica_that_lags_behind_costs_nothing(bench: Callable[..., Bench], hub: FakeHub) -> None:
    made = bench()
    hub.create(REPO)
    made.write(*range(250))
    hub.lag = 0.5
    with contextlib.closing(made.publisher()) as publisher:
        publisher.publish_all()
    assert made.there() == made.files()
    assert hub.statuses("commit") == [200, 200, 200]


def test_an_hour_has_no_more_commits_than_the_hub_accepts(
    bench: Callable[..., Bench], hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_plugin, "HOUR", 3.0)
    monkeypatch.setattr(quota_plugin, "COMMITS", 10)
    hub.commits_per_hour, hub.hour = 12, 3.0
    made = bench()
    hub.create(REPO)
    with contextlib.closing(made.publisher()) as publisher:
        for index in range(25):  # as a run writes them
            made.write(index)
            publisher.publish_all()
    assert made.there() == made.files()
    assert 429 not in hub.statuses("commit")


def test_a_backlog_takes_more_files_a_commit_when_commits_get_scarce(bench: Callable[..., Bench], hub: FakeHub) -> None:
    publisher = bench().publisher()
    with contextlib.closing(publisher):
        quota = publisher.quota
        assert quota.files_for(1000) == 100
        quota._times.extend([time.monotonic()] * 96)
        assert quota.files_for(1000) == 250
        quota._times.extend([time.monotonic()] * 4)
        assert quota.files_for(5000) == 1000
        assert quota.pause() > 3000


def test_a_commit_that_is_too_large_is_halved(bench: Callable[..., Bench], hub: FakeHub) -> None:
    made = bench()
    hub.create(REPO)
    hub.max_operations = 30
    made.write(*range(60))
    with contextlib.closing(made.publisher()) as publisher:
        publisher.publish_all()
    assert made.there() == made.files()


def test_no_folder_gets_too_many_files(
    bench: Callable[..., Bench], hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_plugin, "FOLDER", 10)
    made = bench()
    hub.create(REPO)
    made.write(*range(25))
    with contextlib.closing(made.publisher()) as publisher:
        publisher.publish_all()
        there = made.there()
        assert "data/00000_00009.parquet" in there
        assert "data/00001/00000_00010.parquet" in there
        assert "data/00002/00000_00024.parquet" in there
        assert len(there) == 25
        made.write(15, text="again")
        publisher.publish_all()
    assert made.there()["data/00001/00000_00015.parquet"] == made.files()["data/00000_00015.parquet"]


def test_more_files_than_the_hub_accepts_are_announced(
    bench: Callable[..., Bench], hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    made = bench(records_per_chunk=10)
    hub.create(REPO)
    (made.run.state / "00000.stats.json").write_text(json.dumps({"rank": {"status": "running", "expected": 1_000_000}}))
    with contextlib.closing(made.publisher()) as publisher:
        publisher.prepare()
    assert "100,000 files, and" in capsys.readouterr().err


# ── Trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_publisher_that_is_killed_at_any_time_publishes_every_file_once(job: HubJob) -> None:
    job.input(documents(240))
    assert job(records_per_chunk=1, no_publish=True).rc == 0
    assert not job.hub.requests
    job.hub.create(REPO)
    chance = random.Random(7)
    for _ in range(10):
        started = job.sdg.start("card", "--output", URI, **job.env)
        time.sleep(chance.uniform(0.5, 2.5))
        started.close()  # kill -9
    assert job.command("card").rc == 0
    assert job.all_is_there()
    assert {times for path, times in changes(job.hub).items() if path.startswith("data/")} == {1}
    assert len(job.hub.commits(REPO)) <= 40
    assert not list(job.state.glob("publishing-*"))


def test_a_missing_token_is_a_usage_error(job: HubJob) -> None:
    finished = job(env={"HF_TOKEN": ""})
    assert finished.rc == 2
    assert finished.says("no token", "HF_TOKEN")


def test_a_read_only_token_is_refused(job: HubJob) -> None:
    finished = job(env={"HF_TOKEN": "hf_read"})
    assert finished.rc == 1
    assert finished.says("read-only", URI)
    assert not job.server.requests


def test_an_unknown_token_is_refused(job: HubJob) -> None:
    finished = job(env={"HF_TOKEN": "hf_mistyped_secret"})
    assert finished.rc == 1
    assert finished.says("HF_TOKEN", REPO)
    assert "hf_mistyped_secret" not in finished.stderr
    assert not job.server.requests


def test_a_repository_of_someone_else_is_refused(job: HubJob) -> None:
    job.hub.create(REPO)
    for private in (False, True):
        job.hub.repos[REPO].private = private
        finished = job(env={"HF_TOKEN": "hf_bob"})
        assert finished.rc == 1
        assert finished.says(REPO)
        assert not job.server.requests


@pytest.mark.parametrize("uri", ["hf://datasets/alice", "hf://alice/out", "hf://models/alice/out", URI + "@main"])
def test_an_invalid_address_is_a_usage_error(job: HubJob, uri: str) -> None:
    finished = job(output=uri)
    assert finished.rc == 2
    assert finished.says("hf://")


def test_a_token_that_is_revoked_during_the_run_loses_nothing(job: HubJob) -> None:
    job.input(documents(40))
    job.server.behave(lambda payload, n: Delay(0.4))
    started = job.start(max_concurrent_generations=2)
    wait_until(lambda: len(job.there) >= 2)
    rights = job.hub.tokens.pop(TOKEN)
    finished = started.finish()
    assert finished.rc == 1
    assert len(job.spool) == 8
    assert finished.stderr.count("The run continues") == 1
    assert "HF_TOKEN" in finished.message
    requests = len(job.server.requests)
    job.hub.tokens[TOKEN] = rights
    assert job().rc == 0
    assert len(job.server.requests) == requests
    assert job.all_is_there()


def test_a_hub_that_is_down_until_the_end_of_the_run_gets_everything(job: HubJob) -> None:
    job.hub.stop()
    started = job.start()
    wait_until(lambda: len(job.spool) == 5)
    time.sleep(2)
    assert started.running
    job.hub.start()
    finished = started.finish()
    assert finished.rc == 0, finished
    assert job.all_is_there()


def test_ctrl_c_while_the_hub_is_down_leaves_everything_for_the_next_run(job: HubJob) -> None:
    job.hub.stop()
    started = job.start()
    wait_until(lambda: len(job.spool) == 5)
    wait_until(lambda: job.finished)
    time.sleep(1)
    started.send(signal.SIGINT)
    finished = started.finish(timeout=20)
    assert finished.rc == 130
    job.hub.start()
    requests = len(job.server.requests)
    assert job().rc == 0
    assert len(job.server.requests) == requests
    assert job.all_is_there()


@pytest.mark.parametrize("hanging", ["commit", "lfs_put"])
def test_ctrl_c_does_not_wait_for_an_upload_that_hangs(job: HubJob, hanging: str) -> None:
    fault = job.hub.fail(hanging, delay=300.0, status=500, times=100)
    started = job.start()
    wait_until(lambda: fault.times < 100 and job.finished)
    started.send(signal.SIGINT)
    began = time.monotonic()
    finished = started.finish()
    assert finished.rc == 130
    assert "not published yet" in finished.stderr
    assert time.monotonic() - began < LAST_RESORT  # otherwise it was killed
    fault.times = 0
    assert job().rc == 0
    assert job.all_is_there()


def test_an_exhausted_storage_quota_is_reported(job: HubJob) -> None:
    job.hub.quota_bytes = 10
    finished = job()
    assert finished.rc == 1
    assert "refused" in finished.message
    assert len(job.spool) == 5
    job.hub.quota_bytes = None
    assert job().rc == 0
    assert job.all_is_there()


def test_a_card_with_broken_front_matter_is_kept_and_everything_else_published(job: HubJob) -> None:
    job.hub.create(REPO)
    broken = b"---\nlicense: [mit\n---\nmine\n"
    job.hub.push(REPO, {"README.md": broken})
    finished = job()
    assert finished.rc == 1
    assert finished.stderr.count("front matter is not valid YAML") == 1
    assert "not the card" in finished.message
    assert job.all_is_there()
    assert job.hub.files(REPO)["README.md"] == broken
    job.hub.push(REPO, {"README.md": b"---\nlicense: mit\n---\nmine\n"})
    assert job().rc == 0
    assert "mine" in job.card
    assert "config_name: data" in job.card


def test_a_card_that_the_hub_refuses_does_not_hold_up_the_files(job: HubJob) -> None:
    job.hub.fail("validate", status=400, times=100, text='{"errors": [{"message": "bad licence"}], "warnings": []}')
    finished = job()
    assert finished.rc == 1
    assert "bad licence" in finished.stderr
    assert job.all_is_there()


def test_ranks_that_begin_at_the_same_time_share_one_ledger(tmp_path: Path) -> None:
    old = "CREATE TABLE files (path TEXT PRIMARY KEY, run TEXT, signature TEXT, hash TEXT, parts TEXT)"
    for number in range(10):
        path, start = tmp_path / f"{number}.sqlite3", threading.Barrier(6)
        if number % 2:  # of an earlier sdg
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute(old)

        def opened(path: Path = path, start: threading.Barrier = start) -> None:
            start.wait()
            Ledger(path).close()

        with ThreadPoolExecutor(6) as threads:
            for done in [threads.submit(opened) for _ in range(6)]:
                done.result()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, f"dataset {REPO} refuses the commit"),
        (403, f"/api/datasets/{REPO}/commit/main; does HF_TOKEN have write access to it?"),
    ],
)
def test_a_refused_commit_is_that_of_the_commit(status: int, words: str, job: HubJob) -> None:
    job.hub.create(REPO)
    job.hub.fail("commit", status=status, times=1000)
    finished = job()
    assert finished.rc == 1
    assert words in finished.message
    assert "card" not in finished.message
    job.hub.forget_faults()
    assert job().rc == 0
    assert job.all_is_there()
