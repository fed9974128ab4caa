"""Crashes, interruptions and reruns: nothing is lost, duplicated or sent again, and runs are not mixed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_server import Delay, FakeServer, Hang, Status, prompt_of
from running import ECHO, ROOT, Job, Started, documents, rollout, wait_until

import sdg
from sdg_plugins.common.state import recorded_fields

FAULTS = ROOT / "tests" / "support" / "faults.py"

TWO_STEPS = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("two_steps", two_steps)

    async def two_steps(document, generate):
        draft = await generate(f"draft {document.text}")
        return await generate(f"refine {document.text}: {draft}")
"""

FILTERING = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("filtering", filtering)

    async def filtering(document, generate):
        reply = await generate(document.text)
        return None if "filter" in document.text else reply
"""


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = ["one", "reject two", "filter three", "filter four", "five"]  # three chunks, all outcomes

# What a crash may hit: options of a run that succeeds, if any, and of the one that is disturbed after it.
SCENARIOS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "first run": (None, {}),
    "more documents": ({"max_documents": 3}, {}),
    "retry failed": ({}, {"retry_failed": True}),
}


class Crashes:
    """Runs over five documents in chunks of two, each in a folder and against a server of its own."""

    def __init__(self, folder: Path, scenario: str) -> None:
        self.folder, self.scenario = folder, scenario
        self.before, self.options = SCENARIOS[scenario]
        if self.before is not None:
            with FakeServer() as server:
                self.job("before", server).succeed(**self.before)
        with FakeServer() as server:
            self.undisturbed = self.continued("undisturbed", server).succeed(**self.options)

    def job(self, name: str, server: FakeServer) -> Job:
        folder = self.folder / name
        folder.mkdir()
        server.behave(lambda payload, n: Status(400) if "reject" in prompt_of(payload) else None)
        job = Job(folder, server)
        job.options |= {"records_per_chunk": 2, "max_concurrent_documents": 2}
        job.options["plugin"] = [FAULTS, job.plugin("filtering", FILTERING)]
        job.documents(*TEXTS)
        return job

    def continued(self, name: str, server: FakeServer) -> Job:
        """A job that continues the previous run."""
        job = self.job(name, server)
        if self.before is not None:
            shutil.copytree(self.folder / "before" / "output", job.output.path)
        if self.scenario == "retry failed":
            server.behave(lambda payload, n: None)
        return job

    def fault_then_resume(self, fault: str, number: int) -> int:
        """Run with a fault, rerun without, and compare with the undisturbed run. Returns the first run's exit code."""
        with FakeServer() as server:
            job = self.continued(f"{fault}-{number}", server)
            steps = str(job.folder / "steps.txt")
            first = job(env={"SDG_TEST_FAULT": f"{fault}:{number}", "SDG_TEST_STEPS": steps}, **self.options)
            assert first.rc in {0, 1, -signal.SIGKILL}, first
            where = f"{fault} {number}: {Path(steps).read_text().splitlines()[number - 1 : number]}"
            state = job.output.state / "00000.sqlite3"
            durable = {TEXTS[row] for row in job.output.durable()} if state.exists() else set()
            server.forget()
            output = job.succeed(**self.options)
        assert output.data() == self.undisturbed.data(), where
        assert list(output.failed()) == list(self.undisturbed.failed()), where
        assert set(output.files()) == set(self.undisturbed.files()), where
        assert _names(output.state) == _names(self.undisturbed.state), where
        assert set(Counter(server.prompts).values()) <= {1}, where
        again = durable & set(server.prompts)
        assert not again or (self.scenario == "retry failed" and again == {"reject two"}), where
        assert output.durable() == set(range(len(TEXTS))), where
        counted = ("documents", "rows", "filtered", "failed")
        expected = self.undisturbed.stats()
        assert {name: output.stats()[name] for name in counted} == {name: expected[name] for name in counted}, where
        if first.rc == 0:
            assert not server.requests, where
        if first.rc == 1:
            assert "full" in first.message or "No space" in first.message, first
        return first.rc


def _names(folder: Path) -> set[str]:
    """The files in a folder, without the hashes of inputs: they are kept if the input is a few seconds old."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "marks" not in path.name}


@pytest.mark.slow
# Before and after each odd step: that is once between any two steps.
@pytest.mark.parametrize(
    ("scenario", "fault", "every"),
    [
        ("first run", "kill-before", 2),
        ("first run", "kill-after", 2),
        ("more documents", "kill-before", 3),
        ("retry failed", "kill-before", 3),
    ],
)
def test_a_kill_at_any_durable_step_loses_and_duplicates_nothing(
    scenario: str, fault: str, every: int, tmp_path: Path
) -> None:
    crashes = Crashes(tmp_path, scenario)
    finished = threading.Event()

    def fault_at(number: int) -> int | AssertionError:
        try:
            rc = 0 if finished.is_set() else crashes.fault_then_resume(fault, number)
        except AssertionError as exc:
            return exc
        if rc == 0:
            finished.set()  # the run has fewer steps
        return rc

    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(fault_at, range(1, 200, every)))

    assert [code for code in codes if isinstance(code, AssertionError)] == []
    assert codes.count(-signal.SIGKILL) >= 5
    assert codes[-1] == 0


@pytest.mark.slow
def test_a_full_disk_at_any_durable_step_loses_and_duplicates_nothing(tmp_path: Path) -> None:
    crashes = Crashes(tmp_path, "first run")

    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(lambda number: crashes.fault_then_resume("full", number), [1, 2, 3, 5, 8, 13]))

    assert set(codes) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kills_at_random_moments_lose_and_duplicate_nothing(
    seed: int, job: Job, server: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    chance = random.Random(seed)
    count = 200
    job.input(documents(count))
    options = {"records_per_chunk": 7, "max_concurrent_documents": 5}
    expected = job.succeed(base_url=servers().url, output="undisturbed", **options).data()
    victim: list[Started] = []
    fatal = 0

    def maybe_kill(payload: dict[str, Any], n: int) -> Any:
        nonlocal fatal
        fatal -= 1
        if fatal == 0:
            victim[-1].process.kill()
        return None

    server.behave(maybe_kill)
    codes = []
    durable: set[str] = set()
    for round_ in range(7):
        fatal = chance.randrange(2, count // 4) if round_ < 6 else 0
        sent = len(server.requests)
        victim.append(job.start(**options))
        codes.append(victim[-1].finish().rc)
        assert not durable & set(server.prompts[sent:])
        durable = {f"document {row}" for row in job.output.durable()}
        on_the_way = job.output.ids()
        assert len(on_the_way) == len(set(on_the_way))
    output = job.output

    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 4
    assert output.data() == expected
    assert output.ids() == [row["id"] for row in documents(count)]
    assert output.stats()["documents"] == count
    assert job.verify().rc == 0


def test_a_kill_during_two_steps_sends_no_durable_step_again(job: Job, server: FakeServer) -> None:
    job.options["plugin"] = job.plugin("two_steps", TWO_STEPS)
    job.input(documents(30))
    server.behave(lambda payload, n: Hang() if prompt_of(payload).startswith("refine") else None)
    running = job.start(max_concurrent_generations=100)
    wait_until(lambda: len(server.requests) == 60)
    wait_until(lambda: len(job.output.durable()) == 30)
    running.process.kill()
    running.finish()

    server.release()
    server.forget()
    output = job.succeed()

    assert len(output.rows()) == 30
    assert [prompt for prompt in server.prompts if prompt.startswith("draft")] == []
    assert output.stats()["cache_hits"] == 30


# ── Interruptions ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_signals_end_the_run_within_20_seconds_and_answers_are_kept(tmp_path: Path) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}

    def interrupt(signum: signal.Signals) -> None:
        folder = tmp_path / signum.name
        folder.mkdir()
        with FakeServer() as server:
            job = Job(folder, server)
            job.options["plugin"] = job.plugin("two_steps", TWO_STEPS)
            job.input(documents(20))
            server.behave(lambda payload, n: Hang() if prompt_of(payload).startswith("refine") else None)
            running = job.start(max_concurrent_generations=50)
            wait_until(lambda: len(server.requests) == 40)
            running.send(signum)
            finished = running.finish(timeout=20)
            assert finished.rc == codes[signum], finished
            assert finished.says("interrupted"), finished
            assert not job.output.data()

            server.release()
            server.forget()
            output = job.succeed()
            assert len(output.rows()) == 20
            assert len(server.requests) == 20
            assert {prompt.split()[0] for prompt in server.prompts} == {"refine"}
            stats = output.stats()
            assert (stats["documents"], stats["cache_hits"]) == (20, 20)
            assert job.verify().rc == 0

    with ThreadPoolExecutor(len(codes)) as pool:
        list(pool.map(interrupt, codes))


def test_answers_that_come_after_the_signal_are_kept(job: Job, server: FakeServer) -> None:
    job.input(documents(50))
    server.behave(lambda payload, n: Hang())

    running = job.start(max_concurrent_generations=10)
    wait_until(lambda: len(server.requests) == 10)
    running.send(signal.SIGTERM)
    server.release()
    finished = running.finish()
    assert finished.rc == 143
    received = {request.prompt for request in server.answered}

    server.forget()
    output = job.succeed()
    assert len(output.rows()) == 50
    assert not received & set(server.prompts)


def test_a_signal_before_the_first_answer_is_clean(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    server.stop()
    server.behave(lambda payload, n: Status(503, {"Retry-After": "3600"}))
    server.start()

    running = job.start()
    wait_until(lambda: server.requests)
    running.send(signal.SIGTERM)

    assert running.finish(timeout=20).rc == 143


# ── Reruns ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rerun_of_a_finished_run_sends_nothing_and_changes_no_byte(job: Job, server: FakeServer) -> None:
    job.input(documents(10))
    output = job.succeed(records_per_chunk=3)
    before = output.files()
    touched = {path: path.stat().st_mtime_ns for path in (output.path / "data").iterdir()}
    stats = output.stats()
    server.forget()

    again = job(records_per_chunk=3, env={"PYTHONPROFILEIMPORTTIME": "1"})

    assert again.rc == 0
    assert "pyarrow" in again.stderr
    assert "pandas" not in again.stderr  # half of the time that a rerun takes
    assert not server.requests
    assert output.files() == before
    assert {path: path.stat().st_mtime_ns for path in (output.path / "data").iterdir()} == touched
    counted = ("documents", "rows", "requests", "prompt_tokens", "completion_tokens", "cache_hits")
    assert {name: output.stats()[name] for name in counted} == {name: stats[name] for name in counted}


def test_concurrency_and_address_may_change(job: Job, server: FakeServer, servers: Callable[[], FakeServer]) -> None:
    job.input(documents(40))
    server.behave(lambda payload, n: Hang() if int(prompt_of(payload).split()[1]) >= 20 else None)
    running = job.start(records_per_chunk=50, max_concurrent_generations=40)
    wait_until(lambda: len(server.requests) == 40 and len(job.output.durable()) == 20)
    running.send(signal.SIGTERM)
    server.stop()
    assert running.finish().rc == 143
    received = {request.prompt for request in server.answered}
    assert len(received) == 20

    other = servers()
    output = job.succeed(
        base_url=other.url, records_per_chunk=50, max_concurrent_generations=9, max_retries=1, request_timeout=30
    )

    assert output.ids() == [row["id"] for row in documents(40)]
    assert not received & set(other.prompts)
    assert output.data() == job.succeed(records_per_chunk=50, output="undisturbed", base_url=other.url).data()


def test_a_rerun_that_would_mix_runs_is_refused_with_each_difference(job: Job, server: FakeServer) -> None:
    server.models = ["small-model", "large-model"]
    job.input(documents(10))
    job.options |= {"plugin": "prompt", "prompt_template": "Echo [[DOCUMENT]]", "model": "small-model"}
    job.options |= {"temperature": 0.5, "records_per_chunk": 4}
    before = job.succeed().files()
    server.forget()

    changes = {"model": "large-model", "temperature": 0.7, "prompt_template": "Say [[DOCUMENT]]"}
    other = job.input(documents(11), "other.parquet")
    finished = job(**changes, records_per_chunk=5, rollouts_per_document=2, input=other)

    assert finished.rc == 1
    words = ["model", "temperature", "template", "records-per-chunk", "rollouts-per-document", "input", "--fresh"]
    said = finished.message.replace("_", "-")
    assert [word for word in words if word not in said] == [], finished
    assert finished.says("large-model", "small-model", "0.5", "0.7")
    assert job.output.files() == before
    assert not server.requests


def test_an_edited_input_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(10), "input.jsonl")
    before = job.succeed(records_per_chunk=4).files()
    job.input([{**row, "text": f"edited {row['text']}"} for row in documents(10)], "input.jsonl")
    server.forget()

    finished = job(records_per_chunk=4)

    assert finished.rc == 1
    assert finished.says("input", "--fresh")
    assert job.output.files() == before
    assert not server.requests


def test_an_edited_rollout_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    job.succeed()
    rollout = job.options["plugin"]
    rollout.write_text(rollout.read_text().replace("document.text)", "document.text + '!')"))
    server.forget()

    finished = job()

    assert finished.rc == 1
    assert finished.says("plugin", "--fresh")
    assert not server.requests


GUIDE = """
    import contextlib
    import sdg

    @sdg.hookimpl
    def add_options(parser):
        parser.add_argument("--style-guide", default="plain")

    @sdg.hookimpl
    def register_resources(register):
        register("guide", guide)

    @contextlib.asynccontextmanager
    async def guide(run):
        yield run.options.style_guide
"""

GUIDED = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("guided", guided)

    async def guided(document, generate, guide):
        return await generate(f"{guide}: {document.text}")
"""


def test_options_and_code_of_a_resource_are_part_of_the_identity(job: Job, server: FakeServer) -> None:
    job.documents("one", "two")
    guide = job.plugin("guide", GUIDE)
    job.options["plugin"] = [guide, job.plugin("guided", GUIDED)]
    job.succeed(style_guide="formal")
    assert set(server.prompts) == {"formal: one", "formal: two"}

    refused = job(style_guide="casual")
    assert refused.rc == 1
    assert refused.says("different run", 'style_guide: "formal" → "casual"')
    assert "--accept-edited-plugin" not in job(style_guide="write code that runs").stderr  # no code has changed

    guide.write_text(guide.read_text().replace("yield ", "yield 'very ' + "))
    edited = job(style_guide="formal")
    assert edited.rc == 1
    assert edited.says("different run", "code of the resource guide", "--accept-edited-plugin")
    assert job(plugin=job.options["plugin"][1:]).rc != 0  # the rollout needs its resource


WRAPPER = """
    import sdg

    @sdg.hookimpl
    def add_options(parser):
        parser.add_argument("--tone", default="plain")

    @sdg.hookimpl
    def wrap_requests(run, send):
        async def toned(request):
            return await send(request.with_payload({**request.payload, "user": run.options.tone}))
        return toned
"""


def test_plugins_that_change_requests_and_options_of_further_models_are_part_of_the_identity(job: Job) -> None:
    job.documents("one")
    tone = job.plugin("tone", WRAPPER)
    job.options["plugin"] = [tone, job.options["plugin"]]
    job.options["models"] = "judge.max-tokens=5"
    job.succeed()

    assert job(tone="rude").says('tone: "plain" → "rude"')
    longer = job(models=["judge.max-tokens=5", "judge.long-documents=split"])
    assert longer.says('models judge long_documents: "truncate" → "split"')
    tone.write_text(tone.read_text() + "# edited")
    assert job().says("code of the plugin sdg_plugin_files.tone has changed")
    assert job(plugin=job.options["plugin"][1]).says("code of the plugin sdg_plugin_files.tone has changed")


def test_an_edited_plugin_runs_only_the_documents_that_it_is_asked_to(job: Job) -> None:
    job.input([{"id": name, "text": name} for name in "abcdef"])
    job.options["records_per_chunk"] = 3
    old = job.plugin("mine", rollout("return 1 / 0 if document.id in 'be' else 'old'"))
    job.succeed(plugin=old, max_documents=5)
    new = job.plugin("mine", rollout("return 'new'"))

    assert job(plugin=new).says("plugin's code has changed", "--accept-edited-plugin", "--retry-failed", "--fresh")
    retried = job(plugin=new, retry_failed=True)
    assert retried.rc == 0
    assert "only documents that have failed run with the new code" in retried.stderr
    assert "1 document: --accept-edited-plugin" in retried.stdout
    assert job.output.texts() == {"a": ["old"], "b": ["new"], "c": ["old"], "d": ["old"]}  # f's chunk waits for it
    assert job(plugin=new).rc == 1  # as before
    job.succeed(plugin=new, accept_edited_plugin=True)
    job.succeed(plugin=new)

    rows = {row["id"]: row["rollout_results"][0] for row in job.output.rows()}
    assert "".join(row["text"][0] for row in rows.values()) == "onoonn"
    edited = {id for id, result in rows.items() if "sdg_plugin_version" in json.loads(result["extra"] or "{}")}
    assert edited == {"b", "e", "f"}
    assert job.verify().rc == 0
    job.sdg("card", "--output", job.output.path)
    assert "| Edited versions |" in (job.output.path / "README.md").read_text()


def test_a_retry_with_an_edited_plugin_may_be_interrupted(job: Job, server: FakeServer) -> None:
    job.documents("a", "b", "c", "d")
    job.options["records_per_chunk"] = 2
    old = job.plugin("mine", rollout("return 1 / 0 if document.text != 'a' else 'old'"))
    job.succeed(plugin=old, max_failure_rate=1)
    job.options["plugin"] = job.plugin("mine", rollout("return await generate(document.text)"))
    server.behave(lambda payload, n: Hang())
    started = job.start(retry_failed=True)
    wait_until(lambda: server.in_flight == 3)
    started.close()  # kill -9
    server.release()

    server.behave(lambda payload, n: None)
    retried = job(retry_failed=True)
    assert "4 documents: 4 rows, 0 filtered, 0 failed" in retried.stdout
    assert sorted(job.output.texts()) == ["a", "b", "c", "d"]
    assert job.verify().rc == 0


@pytest.mark.slow
def test_a_retry_with_an_edited_plugin_does_not_keep_chunks_open_that_it_cannot_complete(
    job: Job, server: FakeServer
) -> None:
    """Of each of 100 chunks one document has failed, and the other is not finished."""
    job.input(documents(200))
    job.options |= {"records_per_chunk": 2, "max_concurrent_documents": 200}
    job.options["plugin"] = job.plugin("mine", rollout("return await generate(document.text)"))
    server.behave(lambda payload, n: Status(400) if int(prompt_of(payload)[-2:]) % 2 else Hang())
    started = job.start()
    wait_until(lambda: server.in_flight == 100 and len(job.output.durable()) == 100)
    started.close()  # kill -9
    server.release()
    counting = "import pathlib\nreturn {'open': len(list(pathlib.Path('output/.sdg/open').glob('*.arrow')))}"

    job.options["plugin"] = job.plugin("mine", rollout(counting))
    assert job(max_concurrent_documents=1, retry_failed=True).rc == 0

    output = job.succeed(accept_edited_plugin=True)
    counts = [row["rollout_results"][0]["open"] for row in output.rows()[1::2]]
    assert len(counts) == 100
    assert max(counts) <= 32 + 20  # the window, and what is written and read ahead


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_the_file_of_a_run_without_rows_is_written_again(job: Job, suffix: str) -> None:
    """A process may have been killed between its last chunk and this file, which names the columns."""
    job.documents("a", "b")
    job.options |= {
        "plugin": job.plugin("mine", rollout("return None")),
        "output_filename": f"${{rank}}_${{chunk_index}}.{suffix}",
    }
    before = job.succeed().data()
    (name,) = before
    (job.output.path / name).unlink()

    assert job.succeed().data() == before


def test_a_rerun_says_that_a_retry_was_interrupted(job: Job, server: FakeServer) -> None:
    job.documents("a", "b", "c", "d")
    job.options["records_per_chunk"] = 1
    server.behave(lambda payload, n: None if prompt_of(payload) == "a" else Status(400))
    job.succeed()
    server.behave(lambda payload, n: None if prompt_of(payload) == "b" else Hang())
    started = job.start(retry_failed=True)
    wait_until(lambda: server.in_flight == 2)
    started.close()  # kill -9
    server.release()

    again = job()
    assert again.rc == 0
    assert "--retry-failed was interrupted" in again.stderr
    assert "add --retry-failed" in again.stderr
    assert len(job.output.failed()) >= 2
    assert "interrupted" not in job().stderr  # it has been said, and the run has finished
    assert "interrupted" not in job(retry_failed=True).stderr
    assert sorted(job.output.texts()) == ["a", "b", "c", "d"]


def test_fewer_documents_than_before_and_ids_that_occur_twice_are_said(job: Job, server: FakeServer) -> None:
    job.input([{"id": name, "text": f"{name} {i}"} for i, name in enumerate(["a", "b", "a", "c"])])

    finished = job()
    assert finished.rc == 0
    assert "1 of 4 ids in data/00000_00000.parquet occur twice: see --id-column" in finished.stderr
    fewer = job(max_documents=2)
    assert fewer.rc == 0
    assert "--max-documents 2 is less than before (all): existing rows are kept" in fewer.stderr
    assert len(job.output.rows()) == 4


def test_ids_that_occur_in_several_chunks_and_ranks_are_said(job: Job) -> None:
    job.input([{"id": name, "text": f"{name} {i}"} for i, name in enumerate("abcdaebf")])
    job.options |= {"records_per_chunk": 2, "world_size": 2}

    first, second = job(rank=0), job(rank=1)
    assert "1 of 2 ids in data/00000_0000" in first.stderr  # whichever chunk of the two is written last
    assert "occur twice" not in second.stderr  # b is in a chunk of the other rank, too
    verified = job.verify()
    assert verified.rc == 0
    assert "2 documents have the id of an earlier one" in verified.stderr


def test_another_world_size_is_refused(job: Job) -> None:
    job.input(documents(10))
    job.succeed(records_per_chunk=2)

    finished = job(records_per_chunk=2, rank=0, world_size=2)

    assert finished.rc == 1
    assert finished.says("world", "--fresh")


def test_fresh_starts_over(job: Job, server: FakeServer) -> None:
    job.input(documents(10))
    job.succeed(records_per_chunk=2, temperature=0)
    server.forget()

    output = job.succeed(records_per_chunk=4, temperature=1, fresh=True)

    assert len(server.requests) == 10
    assert sorted(output.data()) == [f"data/00000_{chunk:05}.parquet" for chunk in range(3)]
    assert output.ids() == [row["id"] for row in documents(10)]
    assert output.stats()["requests"] == 10
    assert job.verify().rc == 0


@pytest.mark.slow
def test_a_kill_at_any_step_of_fresh_leaves_what_is_refused_or_starts_clean(tmp_path: Path) -> None:
    def job_in(name: str, server: FakeServer) -> Job:
        folder = tmp_path / name
        folder.mkdir()
        job = Job(folder, server)
        job.options |= {"records_per_chunk": 2, "no_progress": True, "plugin": [FAULTS, job.plugin("echo", ECHO)]}
        job.documents(*TEXTS)
        return job

    with FakeServer() as server:
        job_in("before", server).succeed(temperature=0.5)
        expected = job_in("expected", server).succeed(temperature=0.7)

    def kill_at(number: int) -> int:
        with FakeServer() as server:
            job = job_in(f"killed-{number}", server)
            shutil.copytree(tmp_path / "before" / "output", job.output.path)
            first = job(env={"SDG_TEST_FAULT": f"kill-before:{number}"}, temperature=0.7, fresh=True)
            assert first.rc in {0, -signal.SIGKILL}, first
            old = job(temperature=0.5)
            assert old.rc == 1 or set(job.output.ids()) == set(TEXTS), (number, old)
            if old.rc == 1:
                assert old.says("belongs to a different run")
                assert job.succeed(temperature=0.7).data() == expected.data(), number
            else:
                assert job.succeed(temperature=0.7, fresh=True).data() == expected.data(), number
            assert job.verify().rc == 0, number
            return first.rc

    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(kill_at, range(1, 30)))
    assert codes.count(-signal.SIGKILL) >= 15


def test_another_input_in_the_same_output_is_a_different_run_and_not_a_missing_column(job: Job) -> None:
    job.documents("one")
    job.succeed()
    job.input([{"id": "two", "question": "What is bread?"}], name="questions.jsonl")

    for command in ((), ("check",)):
        refused = job.sdg(*command, *job.command_line({"prompt_column": "question"}))
        assert refused.rc == 1
        assert refused.says("belongs to a different run", "questions.jsonl", "choose another --output")


def test_a_fresh_start_that_was_killed_is_completed(job: Job, server: FakeServer) -> None:
    job.documents("one", "two", "three")
    job.succeed(temperature=0.5, records_per_chunk=1)
    record = json.loads((job.output.state / "run.json").read_text())
    (job.output.state / "run.json").write_text(json.dumps(record | {"discarded": True}))
    (job.output.path / "data" / "00000_00000.parquet").unlink()  # it was killed after this
    server.forget()

    refused = job.verify()
    assert refused.rc == 1
    assert refused.says("being deleted by --fresh")
    output = job.succeed(temperature=0.7, records_per_chunk=2)

    assert output.ids() == ["one", "two", "three"]
    assert len(server.requests) == 3
    assert output.written() == ["data/00000_00000.parquet", "data/00000_00001.parquet"]


def test_a_state_without_its_identity_is_refused(job: Job, server: FakeServer) -> None:
    job.documents("one", "two")
    job.succeed(records_per_chunk=1)
    (job.output.state / "run.json").unlink()
    for path in job.output.path.glob("data/*"):
        path.unlink()

    refused = job(temperature=0.7, records_per_chunk=1)

    assert refused.rc == 1
    assert refused.says("00000.sqlite3 exists, but", "run.json does not", "--fresh")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"arrow": "AAAA"}'])
def test_a_broken_schema_of_results_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "schema.json").write_text(content)

    with pytest.raises(sdg.StateError, match=r"schema\.json is broken: restore it .*--fresh"):
        recorded_fields(tmp_path)


def test_two_states_cannot_claim_one_output(job: Job, server: FakeServer) -> None:
    job.documents("one", "two")
    server.behave(lambda payload, n: Hang())
    running = job.start(state_dir="elsewhere")
    wait_until(lambda: server.requests)

    for options in ({}, {"state_dir": "third"}):
        refused = job(**options)
        assert refused.rc == 1
        assert refused.says("belongs to the run with the state", "elsewhere")

    server.release()
    assert running.finish().rc == 0
    assert job(state_dir="elsewhere").rc == 0
    assert job(state_dir="elsewhere", fresh=True).rc == 0


def test_a_file_of_another_size_is_refused_and_an_empty_one_is_written_again(job: Job, server: FakeServer) -> None:
    job.input(documents(4))
    expected = job.succeed(records_per_chunk=2).data()
    first, second = (job.output.path / name for name in sorted(expected))
    server.forget()
    first.write_bytes(first.read_bytes()[:-50])

    refused = job(records_per_chunk=2)
    assert refused.rc == 1
    assert refused.says("00000_00000.parquet has", "bytes, but", "were written", "restore it")
    first.write_bytes(b"")
    second.unlink()

    assert job.succeed(records_per_chunk=2).data() == expected
    assert len(server.requests) == 4


def test_output_without_its_state_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(4))
    job.succeed(state_dir="state")
    server.forget()

    finished = job(state_dir="elsewhere")

    assert finished.rc == 1
    assert finished.says("output", "--fresh")
    assert not server.requests


def test_more_documents_complete_the_partial_chunk(job: Job, server: FakeServer) -> None:
    job.input(documents(20))
    job.succeed(records_per_chunk=4, max_documents=6)
    first = job.output.data()
    assert len(job.output.rows()) == 6
    assert job.verify().rc == 0
    server.forget()

    job.succeed(records_per_chunk=4, max_documents=11)
    assert sorted(server.prompts) == sorted(row["text"] for row in documents(11)[6:])
    grown = job.succeed(records_per_chunk=4, max_documents=None)

    assert len(server.requests) == 14
    assert grown.data() == job.succeed(records_per_chunk=4, output="at-once").data()
    assert grown.data()["data/00000_00000.parquet"] == first["data/00000_00000.parquet"]
    assert grown.stats()["documents"] == 20
    assert job.verify().rc == 0


def test_the_state_may_be_elsewhere(job: Job, server: FakeServer) -> None:
    job.input(documents(4))
    job.succeed(state_dir="state")
    server.forget()

    job.succeed(state_dir="state")

    assert not server.requests
    assert not job.output.state.exists()
    assert (job.folder / "state" / "run.json").exists()
    assert job.sdg("verify", "--output", "output", "--state-dir", "state").rc == 0


# ── Ranks, stragglers, locks ─────────────────────────────────────────────────────────────────────────────────────────


def test_ranks_share_the_input_without_gap_or_overlap(job: Job, server: FakeServer) -> None:
    job.input(documents(50))
    job.options |= {"records_per_chunk": 4, "world_size": 3, "max_documents": 45}

    ranks = [job.start(rank=rank) for rank in range(3)]
    assert [rank.finish().rc for rank in ranks] == [0, 0, 0]

    assert sorted(job.output.data()) == sorted(f"data/{chunk % 3:05}_{chunk:05}.parquet" for chunk in range(12))
    assert sorted(job.output.ids()) == [row["id"] for row in documents(45)]
    assert Counter(server.prompts) == {row["text"]: 1 for row in documents(45)}
    assert job.output.stats()["documents"] == 45
    assert job.verify().rc == 0


def test_slurm_sets_rank_and_world_size(job: Job, server: FakeServer) -> None:
    job.input(documents(12))
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    array |= {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2"}

    assert job(env=array, records_per_chunk=3).rc == 0

    assert sorted(job.output.data()) == ["data/00001_00001.parquet", "data/00001_00003.parquet"]


def test_verify_reports_a_rank_that_has_not_run(job: Job) -> None:
    job.input(documents(20))
    assert job(records_per_chunk=4, rank=0, world_size=2).rc == 0

    assert job.verify().rc == 1


def test_a_second_process_of_the_same_rank_is_refused(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    server.behave(lambda payload, n: Hang())
    first = job.start()
    wait_until(lambda: len(server.requests) == 5)

    second = job()
    server.release()

    assert second.rc == 1
    assert second.says(".sdg")
    assert first.finish().rc == 0
    assert len(server.requests) == 5
    assert job.output.ids() == [row["id"] for row in documents(5)]


def test_the_lock_of_a_killed_process_is_released(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    server.behave(lambda payload, n: Hang())
    first = job.start()
    wait_until(lambda: len(server.requests) == 5)
    os.kill(first.process.pid, signal.SIGKILL)
    first.finish()
    server.release()

    assert len(job.succeed().rows()) == 5


def test_a_straggler_does_not_delay_later_chunks(job: Job, server: FakeServer) -> None:
    job.options["plugin"] = "summarize"  # whose fields are annotated: those of `echo` follow from the first chunk
    job.input(documents(40))
    server.behave(lambda payload, n: Hang() if prompt_of(payload).startswith("document 0\n") else None)

    running = job.start(records_per_chunk=2, max_concurrent_generations=3)
    wait_until(lambda: len(server.answered) == 39)
    wait_until(lambda: len(list(job.output.path.glob("data/0*.parquet"))) == 19)
    server.release()

    assert running.finish().rc == 0
    assert job.output.ids() == [row["id"] for row in documents(40)]


def test_a_run_that_found_no_server_does_not_block_a_corrected_one(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")
    server.stop()
    job.sdg("--base-url", server.url, "--input", job.options["input"], "--output", "output", "--model", "typo")
    server.start()

    job.succeed(model=None, max_tokens=7)
    refused = job(max_tokens=8)

    assert job.output.ids() == ["a", "b"]
    assert refused.rc == 1
    assert refused.says("max_tokens: 7 → 8")


def test_a_run_without_responses_may_be_repeated_with_other_options(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")
    server.behave(lambda payload, n: Hang())
    first = job.start(max_tokens=7)
    wait_until(lambda: len(server.requests) == 2)
    first.send(signal.SIGKILL)
    first.finish(bugs=True)
    server.behave(lambda payload, n: None)

    assert job.succeed(max_tokens=8).ids() == ["a", "b"]


def test_an_interruption_that_a_rollout_swallows_is_not_a_failure(job: Job, server: FakeServer) -> None:
    job.input(documents(12))
    server.behave(lambda payload, n: Hang() if n == 1 else None)
    body = (
        "replies = await asyncio.gather(generate('a' + document.text), generate('b'), return_exceptions=True)\n"
        "return replies[0].text"
    )
    options = {"plugin": job.plugin("mine", rollout(body)), "max_concurrent_generations": 8}
    started = job.start(**options)
    while len(server.requests) < 8:
        time.sleep(0.02)
    started.send(signal.SIGTERM)
    time.sleep(0.3)
    started.send(signal.SIGTERM)
    assert started.finish().rc == 143
    server.behave(lambda payload, n: None)
    output = job.succeed(**options)
    assert len(output.rows()) == 12
    assert not output.failures()


def test_fresh_deletes_only_what_a_run_has_written(job: Job) -> None:
    job.documents("one", "two")
    output = job.succeed(state_dir=".")
    strangers = ["package.json", "other.arrow", "output/failed/notes.txt", "output/data/mine.parquet"]
    (output.path / "failed").mkdir(exist_ok=True)
    for name in strangers:
        (job.folder / name).write_text("mine")
    assert job(state_dir=".", fresh=True, output_filename="${chunk_index}.parquet").rc == 1  # because of mine.parquet
    (job.folder / "output/data/mine.parquet").unlink()
    job.succeed(state_dir=".", fresh=True, output_filename="${chunk_index}.parquet")
    assert [path.name for path in (output.path / "data").iterdir()] == ["00000.parquet"]
    for name in strangers[:3]:
        assert (job.folder / name).read_text() == "mine"


def test_unusual_line_ends_in_a_failed_document_can_be_retried(job: Job, server: FakeServer) -> None:
    job.documents("a\u2028b\u0085c\x0cd", "fine")
    server.behave(lambda payload, n: Status(400) if n == 1 and "fine" not in prompt_of(payload) else None)
    job.succeed()
    assert job.verify().rc == 0
    output = job.succeed(retry_failed=True)
    assert len(output.rows()) == 2


def test_a_fixed_plugin_may_retry_failed_documents(job: Job) -> None:
    job.documents("one", "two")
    job.succeed(plugin=job.plugin("mine", rollout("return 1 / 0 if document.id == 'one' else 'fine'")))
    fixed = job.plugin("mine", rollout("return 'fixed'"))
    assert job(plugin=fixed).rc == 1
    output = job.succeed(plugin=fixed, retry_failed=True)
    assert output.texts() == {"one": ["fixed"], "two": ["fine"]}


def test_fresh_deletes_nothing_if_a_file_does_not_belong_to_a_run(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed()
    before = job.output.files()
    (job.output.path / "data" / "mine.parquet").write_bytes(b"mine")

    refused = job(fresh=True)

    assert refused.rc == 1
    assert refused.says("mine.parquet", "move it away")
    assert job.output.files() == before | {"data/mine.parquet": b"mine"}
    assert len(server.requests) == 5


def test_a_file_that_was_deleted_is_written_again(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    before = job.succeed(records_per_chunk=10).data()
    (job.output.path / "data" / "00000_00001.parquet").unlink()
    server.forget()

    again = job(records_per_chunk=10)

    assert again.rc == 0
    assert "00000_00001.parquet" in again.stderr
    assert job.output.data() == before
    assert sorted(server.prompts) == [f"document {number}" for number in range(10, 20)]
    assert job.output.stats()["rows"] == 30
    assert job.verify().rc == 0


def test_the_state_of_one_output_is_not_taken_for_another(job: Job, server: FakeServer) -> None:
    job.input(documents(5))
    job.succeed(state_dir="state")

    other = job(state_dir="state", output="other")
    beside = job(state_dir="state", output_config="beside")
    job.output.path.rename(job.folder / "moved")
    moved = job(state_dir="state", output="moved")

    assert other.rc == 1
    assert other.says("state", "belongs to the output output")
    assert beside.says("state", "belongs to --output-config data", "--state-dir")
    assert moved.rc == 0
    assert len(server.requests) == 5


@pytest.mark.slow
def test_interrupts_while_the_run_ends_print_no_traceback(job: Job, server: FakeServer) -> None:
    job.input(documents(300))
    server.behave(lambda payload, n: Delay(0.1))
    for turn in range(8):
        server.forget()
        started = job.start(output=f"output{turn}", max_concurrent_generations=10)
        wait_until(lambda: len(server.answered) > 5)
        for _ in range(3):
            started.send(signal.SIGINT)
            time.sleep(0.02 * turn)
        assert started.finish().rc == 130  # looks for tracebacks


def test_an_interrupt_works_when_standard_error_is_closed(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    server.behave(lambda payload, n: Delay(0.5))
    started = job.start(max_concurrent_generations=1)
    wait_until(lambda: server.answered)
    assert started.process.stderr is not None
    started.process.stderr.close()
    started.process.stderr = None

    started.send(signal.SIGINT)

    assert started.process.wait(20) == 130
    assert len(server.requests) < 10
