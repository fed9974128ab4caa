"""Several runs, machines and strangers on one repository, and interruptions of all kinds in a row."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub, Rights
from fake_server import FakeServer, Status, prompt_of
from running import Job, documents, program

pytestmark = pytest.mark.slow

REPO = "alice/out"
URI = f"hf://datasets/{REPO}"
ROUNDS = int(os.environ.get("SDG_TEST_ROUNDS", "5"))  # the numbers in the issue are of 30
LOAD = """
    import json, sys
    import datasets
    datasets.disable_progress_bars()
    loaded = {}
    for name in sys.argv[1:]:
        rows = datasets.load_dataset("alice/out", name, split="train", download_mode="force_redownload")
        loaded[name] = [row["id"] for row in rows]
    print(json.dumps(loaded))
"""


@pytest.fixture
def machine(tmp_path: Path, server: FakeServer, hub: FakeHub) -> Iterator[Callable[..., Job]]:
    """Makes a job with a folder, and therefore a state, of its own: `machine("first", 20, output_config="a")`."""
    hub.tokens = {"hf_write": Rights("alice")}
    jobs: list[Job] = []

    def make(name: str, count: int, **options: Any) -> Job:
        (tmp_path / name).mkdir()
        job = Job(tmp_path / name, server)
        job.env = hub.environment(job.folder, "hf_write")
        job.options |= {"output": URI, "publish_interval": 0.3, "records_per_chunk": 5, **options}
        job.input(rows_of(name, count))
        jobs.append(job)
        return job

    yield make
    for job in jobs:
        job.sdg.close()


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"id": f"{name}-{row['id']}", "text": f"{name} {row['text']}"} for row in documents(count)]


def ids_of(name: str, count: int) -> list[str]:
    return sorted(row["id"] for row in rows_of(name, count))


def command(job: Job, name: str, *arguments: str) -> list[str]:
    """The words of another command on a job's run."""
    own = ["--output", job.options["output"]]
    config = job.options.get("output_config")
    return [name, *own, *(["--output-config", config] if config else []), *arguments]


def loaded(folder: Path, hub: FakeHub, *configs: str) -> dict[str, list[str]]:
    """The ids that the client of `datasets` loads of each config, sorted."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, **hub.environment(folder, "hf_write"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    script = [*program(LOAD), *configs]
    answer = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return {name: sorted(ids) for name, ids in json.loads(answer.stdout).items()}


def test_runs_of_several_machines_share_a_repository_that_others_push_to(
    machine: Callable[..., Job], hub: FakeHub, tmp_path: Path
) -> None:
    """Two configs of two ranks with monitors, and a run in another folder; a stranger commits every half a second."""
    hub.create(REPO)
    first, second = machine("first", 40), machine("second", 30, output_config="second")
    third = machine("third", 20, output=f"{URI}/deep", output_config="third")
    over = threading.Event()

    def push() -> None:
        while not over.wait(0.5):
            hub.push(REPO, {"notes.txt": str(time.time()).encode()})

    stranger = threading.Thread(target=push)
    stranger.start()
    try:
        monitors = [job.sdg.start(*command(job, "monitor", "--interval", "0.5"), **job.env) for job in (first, second)]
        ranks = [job.start(rank=rank, world_size=2) for job in (first, second) for rank in (0, 1)]
        ends = [started.finish() for started in [*ranks, third.start(), *monitors]]
    finally:
        over.set()
        stranger.join()

    assert [end.rc for end in ends] == [0] * 7, ends
    statuses = hub.statuses("commit")
    print("commits:", statuses.count(200), "conflicts:", len(statuses) - statuses.count(200))
    counts = {"data": ("first", 40), "second": ("second", 30), "third": ("third", 20)}
    there = loaded(tmp_path / "client", hub, *counts)
    assert there == {config: ids_of(*of) for config, of in counts.items()}
    card = hub.files(REPO)["README.md"].decode()
    assert "being generated" not in card
    assert all(f"| Documents | {count} |" in card for _, count in counts.values())
    assert hub.files(REPO)["notes.txt"] != b""
    for job in (first, second, third):
        assert job.sdg(*command(job, "verify"), **job.env).rc == 0


class Story:
    """A run that is interrupted again and again, and what should be on the Hub of it."""

    def __init__(self, job: Job, name: str, chance: random.Random) -> None:
        self.job, self.name, self.chance = job, name, chance
        self.count = 20
        self.state = job.folder / ".sdg" / "datasets-alice-out"
        if "output_config" in job.options:
            self.state /= job.options["output_config"]

    @property
    def config(self) -> str:
        return str(self.job.options.get("output_config", "data"))

    @property
    def rows(self) -> int:
        """Rows according to the ledger."""
        return int(json.loads((self.state / "00000.stats.json").read_text())["rows"])

    def grow(self) -> None:
        self.count += self.chance.randrange(1, 12)
        self.job.input(rows_of(self.name, self.count))

    def kill(self, **options: Any) -> None:
        started = self.job.start(**options)
        time.sleep(self.chance.uniform(0.3, 3.0))
        started.process.kill()
        started.process.communicate()

    def forget_some(self, hub: FakeHub) -> None:
        """Delete files from the spool whose rows are on the Hub and complete: no later run may need to change them."""
        there = set(rows_on(hub, self.config))
        for path in sorted((self.state / "spool" / self.config).glob("[!.]*.parquet")):
            ids = [row["id"] for row in pq.read_table(path).to_pylist()]
            if len(ids) == 5 and there.issuperset(ids) and self.chance.random() < 0.5:
                path.unlink()


def rows_on(hub: FakeHub, config: str) -> list[str]:
    """The ids of the rows of a config on the Hub."""
    files = hub.files(REPO) if REPO in hub.repos else {}
    mine = [files[path] for path in sorted(files) if path.startswith(f"{config}/") and path.endswith(".parquet")]
    return [row["id"] for content in mine for row in pq.read_table(io.BytesIO(content)).to_pylist()]


def test_rows_are_distinct_and_those_of_the_ledger_after_any_interruptions(
    machine: Callable[..., Job], hub: FakeHub, server: FakeServer, tmp_path: Path
) -> None:
    """Kills, growth, failures that are retried, merging in one of two configs, and files deleted from the spool."""
    chance = random.Random(int(os.environ.get("SDG_TEST_SEED", "7")))
    merged = machine("merged", 20, max_file_size="6kB")
    plain = machine("plain", 20, output_config="plain")
    stories = [Story(merged, "merged", chance), Story(plain, "plain", chance)]
    ill = {"modulus": 7}
    server.behave(lambda payload, n: Status(400) if hash_of(prompt_of(payload)) % ill["modulus"] == 0 else None)
    for number in range(ROUNDS):
        story = chance.choice(stories) if number > 1 else stories[number]
        if chance.random() < 0.5:
            story.grow()
        ill["modulus"] = chance.choice([5, 7, 1 << 40])
        options = {"retry_failed": True} if chance.random() < 0.4 and (story.state / "run.json").exists() else {}
        story.kill(**options)
        for each in stories:
            ids = rows_on(hub, each.config)
            assert len(ids) == len(set(ids))
        finished = story.job(**options)
        assert finished.rc == 0, (number, options, finished)
        begun = [each for each in stories if (each.state / "00000.stats.json").exists()]
        there = loaded(tmp_path / "client", hub, *(each.config for each in begun))
        for each in begun:
            ids = there[each.config]
            assert len(ids) == len(set(ids)) == each.rows, (number, each.name)
        if chance.random() < 0.5:
            story.forget_some(hub)
    server.behave(lambda payload, n: None)
    for story in stories:
        assert story.job(retry_failed=True).rc == 0
        assert sorted(rows_on(hub, story.config)) == ids_of(story.name, story.count)
        assert story.job.sdg(*command(story.job, "verify"), **story.job.env).rc == 0


def hash_of(text: str) -> int:
    return sum(map(ord, text))
