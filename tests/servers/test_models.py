"""Further models: requests reach the right one, and each has its own limits, options and figures."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_server import Answer, Delay, FakeServer, Hang, Status, free_port
from launching import ENGINE
from running import Job, documents, wait_until

TWO = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("two", two)

    async def two(document, generate):
        draft = await generate(document.text)
        check = await generate(f"check {draft.text}", to="judge")
        return {"text": draft.text, "check": check.text}
"""


SLOW = "judge.max-concurrent-generations=4"


@pytest.fixture
def judge(servers: Callable[[], FakeServer]) -> FakeServer:
    server = servers()
    server.models = ["judge-model"]
    return server


@pytest.fixture
def two(job: Job, judge: FakeServer) -> Job:
    job.options["plugin"] = job.plugin("two", TWO)
    job.options["models"] = [f"judge.base-url={judge.url}", "judge.temperature=0"]
    job.options["max_tokens"] = 7
    job.input(documents(12))
    return job


def test_an_estimate_forecasts_each_model_and_the_time_of_the_slower_one(two: Job, judge: FakeServer) -> None:
    judge.behave(lambda payload, n: Delay(0.3))
    two.input(documents(120))
    options = two.command_line({"max_concurrent_generations": 20, "models": [*two.options["models"], SLOW]})

    estimated = two.sdg("estimate", "--sample", "40", "--json", *options)

    assert estimated.rc == 0, estimated
    found = json.loads(estimated.stdout)
    assert (len(two.server.requests), len(judge.requests)) == (40, 40)
    assert found["seconds"]["value"] == pytest.approx(120 * 0.3 / 4, rel=0.5)  # of the judge, whatever the first needs
    tokens = {name: both["completion_tokens"]["value"] for name, both in found["tokens"].items()}
    judge.behave(lambda payload, n: None)
    figures = two.succeed().stats()
    judged = figures["models"]["judge"]["completion_tokens"]
    assert tokens["judge"] == pytest.approx(judged, rel=0.1)
    assert tokens["model"] == pytest.approx(figures["completion_tokens"] - judged, rel=0.1)
    assert (len(two.server.requests), len(judge.requests)) == (120, 120)


def test_each_model_gets_its_requests_with_its_own_options_and_figures(two: Job, judge: FakeServer) -> None:
    judge.api_key = "the-key-of-the-judge"
    two.options["models"] += ["judge.api-key-env=JUDGE_KEY"]
    output = two.succeed(env={"JUDGE_KEY": judge.api_key})

    fields = [{key: value for key, value in each.payload.items() if key != "messages"} for each in judge.requests]
    assert fields == [{"model": "judge-model", "temperature": 0.0}] * 12
    assert all(request.payload["max_tokens"] == 7 for request in two.server.requests)
    assert len(two.server.requests) == 12
    assert all("Authorization" not in request.headers for request in two.server.requests)
    stats = output.stats()
    assert (stats["requests"], stats["models"]["judge"]["requests"]) == (24, 12)
    card = two.sdg("card", "--output", output.path)
    assert card.rc == 0, card
    text = (output.path / "README.md").read_text()
    assert "Model `judge` | judge-model; sampling: temperature 0.0" in text
    assert judge.api_key not in text + (output.state / "run.json").read_text()


def test_a_judge_that_is_killed_loses_nothing_and_nothing_is_bought_twice(two: Job, judge: FakeServer) -> None:
    judge.behave(lambda payload, n: Delay(0.02))
    started = two.start(max_concurrent_generations=2)
    wait_until(lambda: len(judge.answered) >= 2)
    judge.stop()
    wait_until(lambda: len(two.server.answered) >= 5)
    started.send(signal.SIGKILL)
    started.finish(bugs=True)
    judge.start()

    output = two.succeed()

    assert len(output.ids()) == 12
    for server, mark in ((two.server, "document"), (judge, "check")):
        assert all(prompt.startswith(mark) for prompt in server.prompts)
    durable = [request.prompt for request in two.server.answered]
    assert len(durable) <= len(set(durable)) + 3  # those in flight, and those of the last commit interval
    assert two.verify().rc == 0


def test_name_and_sampling_are_identity_and_urls_and_limits_are_not(
    two: Job, judge: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    two.succeed()
    other = servers()
    other.models = judge.models
    models = [f"judge.base-url={other.url}", "judge.temperature=0", "judge.max-concurrent-generations=3"]

    assert two(models=models).rc == 0
    assert not other.requests
    refused = two(models=[*models, "judge.temperature=1"])
    assert refused.rc == 1
    assert refused.says("models judge temperature: 0.0 → 1.0")
    assert two(models=[f"referee.{word.partition('.')[2]}" for word in models]).rc == 1


def test_models_are_tables_of_the_file_and_the_command_line_wins(two: Job, judge: FakeServer) -> None:
    del two.options["models"]
    (two.folder / "run.toml").write_text(
        f'[models.judge]\nbase_url = "{judge.url}"\ntemperature = 0.5\nmax-tokens = 9\ngeneration = {{min_p = 0.1}}\n'
    )

    two.succeed(config="run.toml", models=["judge.temperature=0.25"])

    payload = judge.requests[0].payload
    assert (payload["temperature"], payload["max_tokens"], payload["min_p"]) == (0.25, 9, 0.1)


def test_a_model_without_a_server_is_at_the_endpoint_of_the_run(two: Job) -> None:
    two.server.models = ["test-model", "judge-model"]

    two.succeed(model="test-model", models=["judge.model=judge-model"])

    assert sorted({request.payload["model"] for request in two.server.requests}) == ["judge-model", "test-model"]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["judge.base-url=http://127.0.0.1:{port}"], ("[models.judge]", "no server responds", "127.0.0.1:{port}")),
        (["judge.base-ulr=x"], ("models.judge.base-ulr", "did you mean base-url")),
        (["judge.temperature=warm"], ("models.judge", "temperature", "warm")),
        (["judge"], ("'judge'", "expected NAME.KEY=VALUE")),
        (["judge.server=vllm"], ("models.judge", "--server vllm requires --model")),
        (["judge.tp=2"], ("models.judge", "--tp requires")),
        (["judge.output=x"], ("models.judge.output",)),
    ],
)
def test_a_model_that_cannot_be_used_is_named_before_anything_is_paid_for(
    two: Job, models: list[str], words: tuple[str, ...]
) -> None:
    port = str(free_port())

    finished = two(models=[text.replace("{port}", port) for text in models])

    assert finished.rc in {1, 2}
    assert finished.says(*[word.replace("{port}", port) for word in words])
    assert not two.server.requests


def test_an_unknown_model_stops_the_run_and_lists_those_there_are(two: Job, judge: FakeServer) -> None:
    finished = two(models=[f"jury.base-url={judge.url}"])

    assert finished.rc == 2
    assert finished.says("to='judge'", "available: jury")


def test_judge_and_the_resources_ask_a_further_model(job: Job, judge: FakeServer) -> None:
    job.documents("good")
    judge.behave(lambda payload, n: Answer('{"reason": "so", "score": 4}' if "rubric" in str(payload) else "yes"))
    models = [f"judge.base-url={judge.url}"]

    job.succeed(plugin="judge", models=models, output="judged")
    assert (len(job.server.requests), len(judge.requests)) == (0, 1)
    source = """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("sdk", sdk)

        async def sdk(document, generate, openai):
            chat = [{"role": "user", "content": "named"}]
            one = await openai.chat.completions.create(model="judge", messages=chat)
            two = await openai.chat.completions.create(model="", messages=chat, extra_body={"to": "judge"})
            own = await openai.chat.completions.create(model="", messages=chat)
            return [one.choices[0].message.content, two.choices[0].message.content, own.choices[0].message.content]
    """
    job.succeed(plugin=job.plugin("sdk", source), models=models, output="sdk")
    assert (len(job.server.requests), len(judge.requests)) == (1, 3)
    assert {request.payload["model"] for request in judge.requests} == {"judge-model"}


def test_launched_models_share_the_gpus_and_too_few_are_refused(job: Job) -> None:
    job.input(documents(4))

    def launched(name: str) -> str:
        words = [sys.executable, str(ENGINE), "--folder", str(job.folder / name), "--port", "{port}", "--model", "m"]
        return shlex.join(words)

    options: dict[str, Any] = {"base_url": None, "server": "command", "model": "m", "server_command": launched("one")}
    options["plugin"] = job.plugin("two", TWO)
    options["models"] = ["judge.server=command", "judge.model=m", "judge.tp=2"]
    options["models"] += [f"judge.server-command={launched('two')}"]

    finished = job(env={"CUDA_VISIBLE_DEVICES": "4,5,6"}, **options)

    assert finished.rc == 0, finished
    gpus = {
        name: [json.loads(line).get("gpus") for line in (job.folder / name / "starts.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert gpus == {"one": ["4"], "two": ["5,6"]}
    refused = job(env={"CUDA_VISIBLE_DEVICES": "4,5"}, output="refused", **options)
    assert refused.rc == 1
    assert refused.says("the models need 3 GPUs", "judge 2", "but 2 are visible")


def test_both_servers_are_kept_full(two: Job, judge: FakeServer) -> None:
    two.input(documents(120))
    for server in (two.server, judge):
        server.behave(lambda payload, n: Delay(0.05))

    two.succeed(max_concurrent_generations=10, models=[*two.options["models"], "judge.max-concurrent-generations=10"])

    assert two.server.max_in_flight == judge.max_in_flight == 10


POST = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("vector", vector)

    async def vector(document, generate):
        answer = await generate.post("/embeddings", {"input": document.text})
        again = await generate.post("/../classify", {"input": document.text})
        if document.id in await_more:
            await generate(document.text)
        return {"vector": answer["data"][0]["embedding"], "label": again["label"]}

    await_more = {"d0001"}
"""


def test_other_endpoints_are_retried_cached_and_counted_and_vectors_take_half_the_room(
    job: Job, server: FakeServer
) -> None:
    job.input(documents(3))
    server.behave(lambda payload, n: Status(500) if payload.get("input") == "document 2" and n == 1 else None)
    job.options["plugin"] = job.plugin("vector", POST)

    output = job.succeed(max_tokens=9)

    rows = output.rows()
    assert [result["label"] for row in rows for result in row["rollout_results"]] == ["short"] * 3
    kind = output.table().schema.field("rollout_results").type.value_type.field("vector").type
    assert kind == pa.list_(pa.float32())
    stats = output.stats()
    assert (stats["requests"], stats["retries"]) == (8, {"500": 1})
    assert stats["prompt_tokens"] == 8
    embeddings = [request.payload for request in server.requests if request.path.endswith("/embeddings")]
    assert {tuple(sorted(payload)) for payload in embeddings} == {("input", "model")}


def stored(state: Path) -> dict[str, int]:
    """Finished documents, and responses of the others, that a kill cannot undo."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/00000.sqlite3?mode=ro", uri=True, timeout=30)) as db:
        return {name: db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("documents", "requests")}


def test_a_response_of_another_endpoint_is_not_bought_twice(job: Job, server: FakeServer) -> None:
    job.input(documents(2))
    job.options["plugin"] = job.plugin("vector", POST)
    server.behave(lambda payload, n: Hang() if "messages" in payload else None)
    started = job.start()
    wait_until(lambda: len(server.requests) >= 5 and job.output.written() == [])
    wait_until(lambda: stored(job.output.state) == {"documents": 1, "requests": 2})
    started.send(signal.SIGKILL)
    started.finish(bugs=True)
    server.release()

    job.succeed()

    prompts = [(request.path, str(request.payload.get("input"))) for request in server.requests]
    posted = [prompt for prompt in prompts if prompt[1] != "None"]
    assert len(posted) == len(set(posted)) == 4
