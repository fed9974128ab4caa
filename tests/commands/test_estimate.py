"""`estimate` runs a sample spread over the input, keeps its responses for the run, and forecasts what the run takes."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import orjson
import pytest
from fake_server import Delay, Raw, Status
from running import Finished, Job

from sdg_plugins.common import forecast
from sdg_plugins.common.forecast import Pace, Range, Takes


def words(payload: dict[str, Any], seconds: float = 0.0) -> Any:
    """A response of a length that depends on the prompt, at a speed of so many seconds for each token."""
    prompt = payload["messages"][-1]["content"]
    count = random.Random(prompt).randint(10, 50)
    choice = {"index": 0, "message": {"role": "assistant", "content": "w " * count}, "finish_reason": "stop"}
    usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
    body = Raw(orjson.dumps({"choices": [choice], "usage": usage}))
    return Delay(seconds * count, body) if seconds else body


def rows(count: int) -> list[dict[str, Any]]:
    """Documents that become longer."""
    return [{"id": f"d{i:04}", "text": f"{i} " + "x" * (i // 10)} for i in range(count)]


def estimate(job: Job, *arguments: object, **options: Any) -> Finished:
    return job.sdg("estimate", *arguments, *job.command_line(options), **job.env)


def test_sample_is_spread_and_belongs_to_the_run(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload, 0.001))
    job.input(rows(1000))
    options = {"records_per_chunk": 50, "max_concurrent_generations": 16, "price_input": 1, "price_output": 2}
    shown = estimate(job, "--sample", 100, "--json", **options)
    assert shown.rc == 0, shown
    found = json.loads(shown.stdout)
    sampled = [int(prompt.split()[0]) for prompt in job.server.prompts]
    assert len(sampled) == 100
    assert [sum(start <= row < start + 250 for row in sampled) for start in range(0, 1000, 250)] == [25] * 4

    output = job.succeed(**options)
    assert len(output.rows()) == 1000
    assert len(job.server.requests) == 1000  # nothing was sent twice
    stats = output.stats()
    for kind in ("prompt_tokens", "completion_tokens"):
        assert found["tokens"]["model"][kind]["value"] == pytest.approx(stats[kind], rel=0.1)
    assert found["tokens"]["model"]["prompt_tokens"]["value"] == pytest.approx(stats["prompt_tokens"], rel=0.001)
    assert found["cost"]["value"] == pytest.approx(stats["cost"], rel=0.1)
    assert found["documents"] == 1000
    assert found["seconds"]["low"] <= found["seconds"]["value"] <= found["seconds"]["high"]


def test_second_estimate_sends_nothing_and_says_the_same(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input(rows(300))
    first = estimate(job, "--sample", 20)
    assert first.rc == 0, first
    assert "300 documents, estimated from 20 (evenly spread)" in first.stdout
    assert "cost    unknown: give --price-input and --price-output" in first.stdout
    again = estimate(job, "--sample", 20)
    assert again.stdout == first.stdout
    assert len(job.server.requests) == 20


def test_failures_and_filtered_documents_are_forecast(job: Job) -> None:
    job.server.behave(lambda payload, n: Status(400) if "7" in payload["messages"][-1]["content"] else words(payload))
    job.input([{"text": f"{i}"} for i in range(100)])
    shown = json.loads(estimate(job, "--sample", 100, "--json").stdout)
    assert shown["failed"]["value"] == shown["failed"]["low"] == 0.19
    assert shown["sample"] == 100


def test_options_may_change_after_an_estimate_but_not_after_a_run(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input(rows(200))
    assert estimate(job, "--sample", 5).rc == 0
    other = estimate(job, "--sample", 5, "--json", max_tokens=7)
    assert other.rc == 0
    counted = sum(len(prompt) for prompt in job.server.prompts[5:])
    assert json.loads(other.stdout)["tokens"]["model"]["prompt_tokens"]["value"] == pytest.approx(40 * counted, rel=0.1)
    assert "holds an estimate with other options (max_tokens: null → 7): it is replaced" in other.stderr
    job.succeed(max_tokens=7)
    refused = estimate(job, "--sample", 5, max_tokens=8)
    assert refused.rc == 1
    assert "belongs to a different run" in refused.stderr


def test_documents_that_an_earlier_run_has_finished_count_only_if_they_were_measured(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input([{"text": "x" * 100}] * 100)
    budget = {"max_total_tokens": 1500, "max_concurrent_generations": 2, "records_per_chunk": 10}
    assert job(**budget).rc == 4
    options = {**budget, "max_total_tokens": 10**6}

    def prompt_tokens(sample: int) -> Any:
        return json.loads(estimate(job, "--sample", sample, "--json", **options).stdout)["tokens"]["model"]

    assert prompt_tokens(100)["prompt_tokens"]["value"] == 10_000
    before = len(job.server.requests)
    assert prompt_tokens(100)["prompt_tokens"]["value"] == 10_000
    assert len(job.server.requests) == before
    job.succeed(**options)
    (job.output.state / "estimate.json").unlink()
    assert "were finished by an earlier run" in estimate(job, "--sample", 5, **options).message


def test_forecasts_of_several_configs_are_named_and_may_be_cut_off(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input(rows(30))
    (job.folder / "run.toml").write_text('plugin = "summarize"\n[configs.a]\nmax-tokens = 5\n[configs.b]\n')
    options: dict[str, Any] = {"plugin": None, "config": "run.toml"}
    shown = [json.loads(line) for line in estimate(job, "--sample", 5, "--json", **options).stdout.splitlines()]
    assert [one["config"] for one in shown] == ["a", "b"]
    text = estimate(job, "--sample", 5, **options).stdout.splitlines()
    assert [line for line in text if line.startswith("config")] == ["config  a", "config  b"]

    started = job.sdg.start("estimate", "--sample", 5, *job.command_line(options))
    assert started.process.stdout
    started.process.stdout.close()  # as `| head` does
    assert started.process.wait(60) == 0
    assert not [path for path in (job.output.state / "a").glob("*.stats.json") if "Broken" in path.read_text()]


def test_preview_ends_with_the_tokens_of_the_whole_input(job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input([{"text": "x" * 10}] * 1000)
    shown = job(preview=2, price_input=1_000_000, price_output=0)
    assert "tokens: 20 prompt, " in shown.stdout
    assert "all 1,000 documents: 10,000 prompt" in shown.stdout
    assert "cost 10,000.00" in shown.stdout


def test_lengths_of_texts_sharpen_an_estimate() -> None:
    sizes = [float(i) for i in range(100)]
    values = [3 * size + 7 for size in sizes]
    plain, corrected = forecast.mean_of(values, 10_000), forecast.mean_of(values, 10_000, sizes, 60.0)
    assert plain.low < plain.value < plain.high
    assert corrected == pytest.approx((187.0, 187.0, 187.0))


@pytest.mark.parametrize("full", [False, True])
def test_duration_follows_from_how_requests_slow_each_other_down(full: bool) -> None:
    narrow = Pace(work=100.0, seconds=20.0, area=100.0)  # 5 in flight, 1 s for each unit
    wide = Pace(100.0, 20.0 if full else 4.0, 20.0 * 25 if full else 100.0)  # 25 in flight
    likely = forecast.duration(Range(1000.0, 1000.0, 1000.0), narrow, wide, 50, last=0.0)
    assert likely.value == pytest.approx(200.0 if full else 20.0)
    assert likely.low <= likely.value <= likely.high


@pytest.mark.parametrize("count", [1, 3, 12])
def test_an_estimate_of_few_documents_knows_their_tokens_and_a_time(count: int, job: Job) -> None:
    job.server.behave(lambda payload, n: words(payload))
    job.input(rows(count))
    found = json.loads(estimate(job, "--json").stdout)
    prompt = found["tokens"]["model"]["prompt_tokens"]
    assert prompt["low"] == prompt["value"] == prompt["high"] > 0
    assert 0 < found["seconds"]["value"] < 60


@pytest.mark.parametrize("takes", [Takes(2.0, 0.0), Takes(0.0, 0.1), Takes(1.0, 0.05)])
def test_time_of_requests_is_told_from_that_of_their_tokens(takes: Takes) -> None:
    requests = [(tokens, takes.work(1, tokens)) for tokens in (10.0, 20.0, 50.0, 30.0, 25.0) * 4]
    found = forecast.takes_of(requests)
    assert found.work(7, 100) == pytest.approx(takes.work(7, 100))
    assert forecast.takes_of(requests[:3]).work(1, 20) == pytest.approx(takes.work(1, 20), rel=0.5)


def test_share_of_nothing_found_is_not_certain() -> None:
    none = forecast.share_of(0, 100, 10_000)
    assert none.value == none.low == 0.0
    assert 0.02 < none.high < 0.05
    assert forecast.share_of(1, 4, 4) == (0.25, 0.25, 0.25)


def test_durations_have_two_digits() -> None:
    seconds = (0.42, 45, 700, 12_000, 400_000, math.inf)
    assert [forecast.in_words(s) for s in seconds] == ["0.4 s", "45 s", "12 min", "3.3 h", "4.6 days", "?"]
