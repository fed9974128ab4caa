"""What rows look like: flat rows, columns that are kept, messages, and prompts from inside a column."""

from __future__ import annotations

from typing import Any

import pytest
from fake_server import FakeServer, Status, prompt_of
from running import Job, documents

SEVERAL = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("several", several)

    async def several(document, generate):
        if document.id == "none":
            return None
        reply = await generate(document.text)
        return [{"text": reply.text, "meta": "of the result"}, {"text": "second", "odd": len(document.text)}]
"""


@pytest.fixture
def rich(job: Job) -> Job:
    """Rows with more columns than the prompt, one of a name that results have, too."""
    rows: list[dict[str, Any]] = [{**row, "meta": {"title": f"title of {row['id']}"}, "n": 1} for row in documents(4)]
    job.input([*rows, {"id": "none", "text": "nothing", "meta": {"title": "-"}, "n": 2}])
    return job


def test_flat_rows_are_results_whose_fields_are_columns_and_a_run_grows_and_retries_over_them(
    rich: Job, server: FakeServer
) -> None:
    rich.options |= {"plugin": rich.plugin("several", SEVERAL), "flat": True, "drop_columns": "n"}
    rich.options |= {"rollouts_per_document": 2}
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) == "document 1" else None)

    rich.succeed(max_documents=2)
    output = rich.succeed()
    server.behave(lambda payload, n: None)
    rich.succeed(retry_failed=True)

    table = output.table()
    fixed = ["id", "text", "meta", "rollout", "sample", "generated_text", "reasoning", "finish_reason", "usage"]
    assert table.column_names == [*fixed, "truncated", "generated_meta", "odd", "extra"]
    rows = table.to_pylist()
    places = [(row["id"], row["rollout"], row["sample"]) for row in rows]
    assert places == [(f"d{i:04}", n // 2, n) for i in range(4) for n in range(4)]
    assert [(row["generated_meta"], row["odd"]) for row in rows[:2]] == [("of the result", None), (None, 10)]
    assert rows[0]["meta"] == {"title": "title of d0000"}
    assert rich.verify().rc == 0
    assert output.stats()["rows"] == 4


def test_flat_rows_do_not_depend_on_interruptions(rich: Job) -> None:
    options = {"plugin": rich.plugin("several", SEVERAL), "flat": True, "keep_columns": "text", "records_per_chunk": 5}
    rich.succeed(**options, output="grown", max_documents=3)

    assert rich.succeed(**options, output="grown").data() == rich.succeed(**options, output="whole").data()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flat": True}, ("rollout", "--drop-columns rollout")),
        ({"flat": True, "drop_columns": "rollout"}, ("generated_text", "--drop-columns generated_text")),
        ({"keep_columns": "txet"}, ("--keep-columns txet", "did you mean text")),
        ({"drop_columns": "nothing"}, ("--drop-columns nothing", "no such column")),
        ({"results_column": "text"}, ("already has a column text", "--results-column text_2")),
        ({"prompt_column": "meta.titel"}, ("meta has no field titel", "available: title")),
        ({"prompt_column": "meta[0]"}, ("meta holds struct", "expected lists")),
        ({"prompt_column": "rollout"}, ("--prompt-column rollout holds int64",)),
    ],
)
def test_columns_that_cannot_be_are_named_before_anything_is_paid_for(
    job: Job, server: FakeServer, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    job.input([{"id": "a", "text": "t", "generated_text": "g", "rollout": 1, "meta": {"title": "x"}}])

    finished = job(**options)

    assert finished.rc == 1
    assert finished.says(*words)
    assert not server.requests


def test_messages_are_those_of_the_request_that_a_result_comes_from(job: Job) -> None:
    job.documents("a")
    source = """
        import asyncio
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("chats", chats)

        async def chats(document, generate):
            one, two = await asyncio.gather(generate("first"), generate([{"role": "user", "content": "second"}]))
            return [one, two.text, {"text": "made of both"}]
    """
    output = job.succeed(plugin=job.plugin("chats", source), keep_messages=True)

    (row,) = output.rows()
    results = row["rollout_results"]
    chats = [[message["content"] for message in result["messages"]] for result in results]
    assert chats == [["first", results[0]["text"]], ["second", results[1]["text"]], ["second", results[1]["text"]]]


def test_the_output_of_a_run_is_the_input_of_the_next_one(rich: Job, server: FakeServer) -> None:
    first = rich.succeed(output="first", rollouts_per_document=1)
    texts = [text for (text,) in first.texts().values()]
    server.forget()

    follow = {"input": "first/data", "results_column": "second", "output": "followed"}
    second = rich(**follow, prompt_column="rollout_results[0].text", drop_columns="rollout_results")
    carried = rich(**{**follow, "output": "carried"}, max_documents=1)

    assert second.rc == 0, second
    assert "earlier run" not in second.stderr
    assert server.prompts[:5] == texts or sorted(server.prompts[:5]) == sorted(texts)
    assert rich.output_of(output="followed").table().column_names == ["id", "text", "meta", "n", "second"]
    assert "--prompt-column text is what that run was given" in carried.stderr
    assert "--prompt-column rollout_results[0].text" in carried.stderr
