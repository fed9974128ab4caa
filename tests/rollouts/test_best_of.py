"""The rollouts `best-of` and `embed`, and the command `export`, which makes training data of what they wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import Answer, FakeServer
from running import Job, documents


@pytest.fixture
def judge(servers: Callable[[], FakeServer]) -> FakeServer:
    """Scores an answer by its last figure."""
    server = servers()

    def score(payload: dict[str, Any], n: int) -> Answer:
        figure = re.search(r"sample (\d)", str(payload))
        return Answer(json.dumps({"reason": "by its figure", "score": int(figure[1]) if figure else 0}))

    server.behave(score)
    return server


def sampled(payload: dict[str, Any], n: int) -> Answer:
    return Answer(f"sample {payload['seed'] % 7}. The answer is {payload['seed'] % 2}.")


def test_a_judge_on_another_server_chooses_and_pairs_are_exported_with_margins(
    job: Job, server: FakeServer, judge: FakeServer
) -> None:
    job.input([*documents(3), {"id": "same", "text": "x"}])
    server.behave(lambda payload, n: Answer("alike") if "x" in str(payload["messages"]) else sampled(payload, n))
    options = {"models": f"judge.base-url={judge.url}", "seed": 3, "samples": 3, "keep_samples": 3}
    output = job.succeed(plugin="best-of", **options)

    scores = {row["id"]: [result["score"] for result in row["rollout_results"]] for row in output.rows()}
    assert scores == {**{f"d{i:04}": [5.0, 4.0, 3.0] for i in range(3)}, "same": [0.0, 0.0, 0.0]}
    assert (len(server.requests), len(judge.requests)) == (12, 12)
    exported = job.sdg("export", "--output", output.path, "--format", "preference", "--to", "pairs.jsonl")
    assert exported.rc == 0, exported
    assert "1 document left out" in exported.stderr
    pairs = [json.loads(line) for line in (job.folder / "pairs.jsonl").read_text().splitlines()]
    assert [(pair["id"], pair["margin"]) for pair in pairs] == [(f"d{i:04}", 2.0) for i in range(3)]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "document 0"}]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "sample 5. The answer is 1."}]
    assert pairs[0]["rejected"][0]["content"].startswith("sample 3")


def test_the_majority_is_that_of_the_part_which_a_pattern_finds(job: Job, server: FakeServer) -> None:
    job.input(documents(1))
    server.behave(sampled)

    output = job.succeed(plugin="best-of", prefer="majority", answer_pattern=r"answer is (\d)", seed=1, samples=3)

    (result,) = output.rows()[0]["rollout_results"]
    assert result["text"] == "sample 1. The answer is 1."
    assert result["score"] == pytest.approx(2 / 3)


def test_a_function_of_the_users_scores_and_its_code_is_identity(job: Job, server: FakeServer) -> None:
    job.input(documents(1))
    server.behave(sampled)
    path = job.folder / "scores.py"
    path.write_text("async def least(document, text):\n    return -int(text[7])\n")

    output = job.succeed(plugin="best-of", prefer="scores.py:least", seed=1)
    assert output.rows()[0]["rollout_results"][0]["text"].startswith("sample 1")
    path.write_text("def least(document, text):\n    return 0\n")
    assert job(plugin="best-of", prefer="scores.py:least", seed=1).rc == 1
    missing = job(plugin="best-of", prefer="scores.py:most", output="other")
    assert missing.rc == 2
    assert missing.says("--prefer", "scores.py:most", "most")


def test_embeddings_are_vectors_of_32_bits(job: Job) -> None:
    job.input(documents(2))

    output = job.succeed(plugin="embed", flat=True)

    assert output.table().schema.field("embedding").type == pa.list_(pa.float32())
    assert output.rows()[0]["embedding"][0] == len("document 0") / 8


def test_exports_are_deterministic_and_a_folder_is_completed(job: Job) -> None:
    job.input(documents(5))
    output = job.succeed(records_per_chunk=2, keep_messages=True)

    def export(to: str, form: str, *more: str) -> list[dict[str, Any]]:
        done = job.sdg("export", "--output", output.path, "--format", form, "--to", to, *more)
        assert done.rc == 0, done
        return pq.read_table(job.folder / to).to_pylist()

    rows = export("chats", "messages")
    assert [row["messages"][0]["content"] for row in rows] == [f"document {i}" for i in range(5)]
    before = (job.folder / "chats" / "00000_00001.parquet").read_bytes()
    (job.folder / "chats" / "00000_00001.parquet").unlink()
    assert export("chats", "messages") == rows
    assert (job.folder / "chats" / "00000_00001.parquet").read_bytes() == before
    (job.folder / "chats" / "other.parquet").write_bytes(before)
    said = job.sdg("export", "--output", output.path, "--format", "flat", "--to", "chats")
    assert said.says("files that are not of this export: other.parquet")
    flat = export("one.parquet", "flat")
    assert pq.read_table(job.folder / "chats" / "00000_00001.parquet").column_names == list(flat[0])
    assert [(row["id"], row["sample"]) for row in flat] == [(f"d{i:04}", 0) for i in range(5)]
    assert "rollout_results" not in flat[0]


PAIRS = """
    import asyncio
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("pairs", pairs)

    async def pairs(document, generate):
        kinds = ("Poem", "Recipe", "Recipe")
        replies = await asyncio.gather(*(generate(f"{kind}: {document.text}", seed=i) for i, kind in enumerate(kinds)))
        scores = [9.0, float("nan") if document.text == "odd" else 2.0, 5.0]
        return [{"text": f"{reply} ".strip(), "score": score} for reply, score in zip(replies, scores)]
"""


def test_pairs_are_two_answers_to_one_prompt_and_a_score_that_is_no_number_makes_none(
    job: Job, server: FakeServer
) -> None:
    job.documents("even", "odd")
    server.behave(lambda payload, n: Answer(f" {payload['messages']!s} number {payload['seed']} "))
    output = job.succeed(plugin=job.plugin("pairs", PAIRS), keep_messages=True)

    exported = job.sdg("export", "--output", output.path, "--format", "preference", "--to", "pairs.jsonl")

    assert exported.rc == 0, exported
    assert "1 document left out" in exported.stderr
    (pair,) = map(json.loads, (job.folder / "pairs.jsonl").read_text().splitlines())
    assert pair["prompt"] == [{"role": "user", "content": "Recipe: even"}]
    assert (pair["chosen"][0]["content"][-10:], pair["rejected"][0]["content"][-10:]) == (" number 2 ", " number 1 ")
    assert pair["margin"] == 3.0


def test_chats_that_role_and_text_cannot_hold_are_left_out_and_counted(job: Job, server: FakeServer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    called = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
    ]
    chats = [[{"role": "user", "content": "Hi"}, *called], [{"role": "user", "content": parts}]]
    lines = [json.dumps({"id": name, "chat": chat}) for name, chat in zip(("tool", "parts"), chats, strict=True)]
    (job.folder / "chats.jsonl").write_text("\n".join(lines))
    output = job.succeed(input=job.folder / "chats.jsonl", prompt_column="chat", keep_messages=True)

    exported = job.sdg("export", "--output", output.path, "--format", "messages", "--to", "chats.JSONL")

    assert exported.rc == 0, exported
    assert "1 result left out: no text, or a chat with tool calls" in exported.stderr
    (chat,) = map(json.loads, (job.folder / "chats.JSONL").read_text().splitlines())
    assert (chat["id"], chat["messages"][0]) == ("parts", {"role": "user", "content": "one\ntwo"})


def test_a_folder_gets_each_file_whatever_dots_are_in_its_name(job: Job) -> None:
    job.input(documents(4))
    output = job.succeed(records_per_chunk=2, output_filename="v1.${chunk_index}.parquet")

    for more in ([], ["--state-dir", job.folder / "elsewhere"]):
        if more:
            (output.path / ".sdg").rename(job.folder / "moved")
        done = job.sdg("export", "--output", output.path, "--format", "flat", "--to", "rows")
        assert done.rc == 0, done
        assert sorted(path.name for path in (job.folder / "rows").iterdir()) == ["v1.00000.parquet", "v1.00001.parquet"]
        assert pq.read_table(job.folder / "rows").num_rows == 4


def test_results_in_lists_on_flat_rows_are_exported_without_the_state(job: Job) -> None:
    job.input(documents(2))
    flat = job.succeed(flat=True, output="flat")
    output = job.succeed(input=flat.path / "data", prompt_column="generated_text", output="lists")
    (output.path / ".sdg").rename(job.folder / "moved")

    done = job.sdg("export", "--output", output.path, "--format", "messages", "--to", "chats.jsonl")

    assert done.rc == 0, done
    assert len((job.folder / "chats.jsonl").read_text().splitlines()) == 2


def test_flat_rows_are_not_taken_for_the_prompts_of_a_run_whose_template_names_columns(job: Job) -> None:
    job.input([{"id": "one", "question": "What is bread?"}])
    output = job.succeed(plugin="prompt", prompt_template="Answer: [[question]]", flat=True)

    refused = job.sdg("export", "--output", output.path, "--format", "messages", "--to", "chats.jsonl")
    named = [*("--prompt-column", "question"), *("--format", "messages", "--to", "chats.jsonl")]
    job.sdg("export", "--output", output.path, *named)

    assert refused.rc == 2
    assert refused.says("--prompt-column text", "available: id, question")
    (chat,) = map(json.loads, (job.folder / "chats.jsonl").read_text().splitlines())
    assert [message["content"] for message in chat["messages"]] == ["What is bread?", output.table()["text"][0].as_py()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "preference", "--to", "p.jsonl"], ("no field score", "available for --score: text")),
        (["--format", "pairs", "--to", "p.jsonl"], ("invalid choice", "pairs")),
        (["--format", "flat"], ("--to",)),
        (["--format", "flat", "--to", "s3://bucket/rows"], ("s3://bucket/rows", "copy it afterwards")),
        (["--format", "flat", "--to", "rows.jsonl.gz"], ("rows.jsonl.gz", ".parquet or .jsonl")),
        (["--format", "flat", "--to", "rows.csv"], ("rows.csv", ".parquet or .jsonl")),
    ],
)
def test_an_export_that_cannot_be_is_explained(job: Job, arguments: list[str], words: tuple[str, ...]) -> None:
    job.input(documents(1))
    output = job.succeed()

    finished = job.sdg("export", "--output", output.path, *arguments)

    assert finished.rc == 2
    assert finished.says(*words)
    assert not (job.folder / "p.jsonl").exists()
