"""Budgets end a run before it costs more than allowed, over all ranks, and a larger one continues it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from fake_server import Delay, FakeServer, Raw
from running import Job, documents, wait_until

import sdg

SIZE = 30  # tokens of each request


USAGE = {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": SIZE}


def counted(server: FakeServer, seconds: float = 0.0, usage: dict[str, int] | None = USAGE) -> None:
    """Let each request cost 20 prompt tokens and 10 completion tokens."""
    tokens = {} if usage is None else {"usage": usage}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x" * 40}, "finish_reason": "stop"}
    body = Raw(orjson.dumps({"choices": [choice], **tokens}))
    server.behave(lambda payload, n: Delay(seconds, body) if seconds else body)


@pytest.mark.parametrize(
    "limits", [{"max_total_tokens": 1000}, {"max_cost": 0.5, "price_input": 100, "price_output": 800}]
)
def test_budget_is_spent_and_exceeded_by_less_than_a_request(job: Job, limits: dict[str, Any]) -> None:
    counted(job.server)
    job.input(documents(300))
    ended = job(records_per_chunk=10, **limits)
    assert ended.rc == 4, ended
    assert len(job.server.requests) == (50 if "max_cost" in limits else 34)  # 0.01 each, or 30 tokens each
    option = "--max-cost" if "max_cost" in limits else "--max-total-tokens"
    assert f"run the same command with a larger {option} to go on" in ended.stderr
    assert "is used up" in (job.output.path / "README.md").read_text()


def test_larger_budget_continues_and_sends_nothing_again(job: Job) -> None:
    counted(job.server)
    job.input(documents(100))
    assert job(max_total_tokens=900).rc == 4
    sent = len(job.server.requests)
    assert job(max_total_tokens=900).rc == 4
    assert len(job.server.requests) == sent
    output = job.succeed(max_total_tokens=900_000)
    assert len(output.rows()) == len(job.server.requests) == 100
    assert len({str(request.payload) for request in job.server.requests}) == 100
    assert "cost" not in output.stats()


def test_four_ranks_share_a_budget(job: Job) -> None:
    counted(job.server, 0.02)
    job.input(documents(800))  # one rank alone would exceed it
    options = {"records_per_chunk": 5, "world_size": 4, "max_total_tokens": 3000, "max_concurrent_generations": 8}
    ranks = [job.start(rank=rank, **options) for rank in range(4)]
    assert {rank.finish().rc for rank in ranks} == {4}
    assert 3000 - 4 * SIZE <= SIZE * len(job.server.requests) <= 3000 + 4 * 8 * SIZE
    shares = json.loads((job.output.state / "budget-tokens.json").read_text())
    assert sum(shares.values()) == SIZE * len(job.server.requests)


@pytest.mark.parametrize("usage", [None, {"total_tokens": 22}, dict.fromkeys(USAGE, 0)])
def test_tokens_are_estimated_if_the_server_reports_none(job: Job, usage: dict[str, int] | None) -> None:
    counted(job.server, usage=usage)
    job.input(documents(50))
    ended = job(max_cost=0.001, price_input=0, price_output=10)
    assert ended.rc == 4
    assert ended.stderr.count("the server reports no usage: tokens are estimated") == 1
    assert len(job.server.requests) == 10  # 10 tokens for 40 characters each
    assert "(estimated: the server reports no usage)" in ended.stdout


def test_budget_below_one_request_is_one_line(server: FakeServer) -> None:
    counted(server)

    async def ask(document: sdg.Document, generate: sdg.Generate) -> sdg.Reply:
        return await generate(document.text)

    with pytest.raises(sdg.BudgetSpent, match="--max-total-tokens 1 is used up") as raised:
        sdg.run(ask, documents(20), base_url=server.url, max_total_tokens=1, progress=False)
    assert len(server.requests) <= 8
    assert raised.value.exit_code == 4


def test_cost_is_in_the_figures_and_on_the_card_without_a_budget(job: Job, tmp_path: Path) -> None:
    counted(job.server)
    job.input(documents(10))
    ended = job(price_input=1, price_output=10)
    assert "cost    0.0012 for 300 tokens" in ended.stdout
    assert job.output.stats()["cost"] == 0.0012
    assert "| Cost | 0.0012 |" in (job.output.path / "README.md").read_text()


def test_further_model_has_its_own_price(job: Job, servers: Callable[[], FakeServer]) -> None:
    judge = servers()
    counted(job.server)
    counted(judge)
    job.options["plugin"] = job.plugin(
        "judged",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("judged", judged)

        async def judged(document, generate):
            await generate(document.text)
            return await generate(document.text, to="judge")
        """,
    )
    job.input(documents(10))
    models = [f"judge.base-url={judge.url}", "judge.price-output=100"]
    ended = job(price_input=1, price_output=10, models=models)
    assert ended.rc == 0, ended
    assert job.output.stats()["cost"] == 0.0112  # 10 × (20 × 1 + 10 × 10) / 10⁶, and 10 × 10 × 100 / 10⁶


def test_cost_without_a_price_is_refused(job: Job) -> None:
    job.documents("one")
    refused = job(max_cost=3)
    assert refused.rc == 2
    assert "--max-cost requires --price-input or --price-output" in refused.stderr


def test_budget_does_not_end_a_run_that_has_finished(job: Job) -> None:
    counted(job.server)
    job.input(documents(10))
    assert job(max_total_tokens=10 * SIZE).rc == 0
    wait_until(lambda: len(job.output.rows()) == 10)
