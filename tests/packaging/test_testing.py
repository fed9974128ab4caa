"""`sdg_plugins.testing`: what the helpers return, and which broken contracts they find."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from running import Job

import sdg
from sdg_plugins.readers import csv, jsonl
from sdg_plugins.readers.parquet import open_files
from sdg_plugins.rollouts import prompt
from sdg_plugins.servers import demo
from sdg_plugins.testing import check_reader, check_server, check_writer, document, try_rollout
from sdg_plugins.writers.jsonl import JsonlWriter
from sdg_plugins.writers.parquet import ParquetWriter


async def echo(document: sdg.Document, generate: sdg.Generate) -> sdg.Reply:
    """Send the document."""
    return await generate(document.messages or document.text, temperature=0.5)


# ── Rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_three_lines_are_enough() -> None:
    tried = try_rollout(echo, "a question", answers="an answer")
    assert tried.texts == ["an answer"]
    assert tried.requests[0].prompt == "a question"


def test_the_row_is_the_one_that_a_run_writes(job: Job) -> None:
    job.input([{"id": "one", "text": "a question", "stars": 3}])
    job.server.behave(lambda payload, n: "four words of answer")
    (written,) = job.succeed().rows()
    (row,) = try_rollout(echo, {"id": "one", "text": "a question", "stars": 3}, "four words of answer").rows
    assert list(row) == list(written)
    for values in (row, written):
        values["rollout_results"][0].pop("usage")  # tokens are counted by the server
    assert row == written


def test_payloads_are_those_of_the_engine() -> None:
    options = {"max-tokens": 50, "generation": {"stop": ["."]}, "model": "some", "seed": 3, "rollouts-per-document": 2}
    tried = try_rollout(echo, "a", options=options)
    message = {"role": "user", "content": "a"}
    common = {"max_tokens": 50, "stop": ["."], "model": "some", "temperature": 0.5, "messages": [message]}
    assert [request.payload for request in tried.requests] == [{**common, "seed": 3}, {**common, "seed": 4}]
    assert tried.requests[0].path == "/chat/completions"
    assert [len(requests) for requests in tried.outcomes[0].rollouts] == [1, 1]


def test_answers_may_be_texts_json_replies_errors_bodies_and_functions() -> None:
    async def ask(document: sdg.Document, generate: sdg.Generate) -> dict[str, Any]:
        reply = await generate({"prompt": document.text})
        return {"text": reply.text, "reasoning": reply.reasoning, "finish_reason": reply.finish_reason}

    body = {"choices": [{"text": "of a body", "finish_reason": "length"}]}
    reply = sdg.Reply("of a reply", finish_reason="length")
    answers = ["of a text", {"of": "JSON"}, reply, sdg.RequestFailed("500", "of an error", status=500), body]
    tried = try_rollout(ask, ["1", "2", "3", "4", "5"], answers)
    assert tried.texts == ["of a text", '{"of": "JSON"}', "of a reply", "of a body"]
    assert [result["finish_reason"] for result in tried.results] == ["stop", "stop", "length", "length"]
    assert [record["error"] for record in tried.failed] == ["of an error"]
    assert try_rollout(echo, ["1", "2"], lambda payload: payload["messages"][0]["content"] * 2).texts == ["11", "22"]


def test_more_requests_than_answers_are_an_assertion_error() -> None:
    with pytest.raises(AssertionError, match="request 2 has no answer"):
        try_rollout(echo, ["1", "2"], ["one"])


def test_what_a_rollout_returns_or_raises_is_treated_as_in_a_run() -> None:
    @dataclass
    class Fact:
        topic: str
        sure: bool

    async def various(document: sdg.Document, generate: sdg.Generate) -> list[Fact] | Fact | None:
        if document.text == "raises":
            raise ValueError("no")
        return {"none": None, "list": [Fact("a", True), Fact("b", False)]}.get(document.text, Fact("c", True))

    tried = try_rollout(various, ["none", "list", "one", "raises"])
    assert tried.filtered == ["rows/0"]
    assert [(result["topic"], result["sure"]) for result in tried.results] == [("a", True), ("b", False), ("c", True)]
    assert tried.failed[0]["error_type"] == "ValueError"
    assert tried.failed[0]["document"] == {"text": "raises"}
    assert [outcome.status for outcome in tried.outcomes] == ["filtered", "row", "row", "failed"]


def test_a_plugins_options_are_there_and_resources_can_be_replaced() -> None:
    tried = try_rollout(prompt.prompt, "a", options={"prompt-template": "Say [[DOCUMENT]]", "system-prompt": "Shout."})
    assert [message["content"] for message in tried.requests[0].payload["messages"]] == ["Shout.", "Say a"]

    async def clocked(document: sdg.Document, generate: sdg.Generate, clock: Any) -> str:
        return f"at {clock}"

    assert try_rollout(clocked, "a", resources={"clock": 5}).texts == ["at 5"]
    with pytest.raises(sdg.PluginError, match="resource 'clock'"):
        try_rollout(clocked, "a")


def test_a_mistake_is_raised() -> None:
    with pytest.raises(sdg.PluginError, match="not async"):
        try_rollout(lambda document, generate: "x", "a")  # type: ignore[arg-type, return-value]


def test_it_works_in_a_running_loop_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def test() -> list[str]:
        return try_rollout(echo, "a", "b").texts

    assert asyncio.run(test()) == ["b"]
    assert not list(tmp_path.iterdir())


def test_documents_are_made_of_texts_rows_and_chats() -> None:
    assert document("a text").text == "a text"
    assert document({"id": 7, "text": "a"}).id == "7"
    assert document({"question": "why?", "stars": 3}, "question").row == {"question": "why?", "stars": 3}
    chat = [{"role": "user", "content": "hello"}]
    assert document({"text": chat}).messages == chat
    with pytest.raises(sdg.BadDocument, match="is empty"):
        document(" ")


# ── Readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bundled_readers_keep_the_contract(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "number": i} for i in range(25)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"text {i}\n" for i in range(25)))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=10)
    assert check_reader(open_files, {"input": tmp_path / "rows.parquet"}) == rows
    assert check_reader(jsonl.JsonlReader, {"input": tmp_path / "rows.jsonl"})[:25] == rows
    assert len(check_reader(csv.CsvReader, {"input": tmp_path / "rows.csv"})) == 25


class CountReader:
    """Counts to ten; subclasses break the contract."""

    schema = pa.schema([("text", pa.string())])
    identity: Mapping[str, Any] = {"count": 10}

    def __init__(self, run: sdg.Run) -> None:
        self.row = 0

    def seek(self, row: int, bookmark: str | None) -> None:
        self.row = row

    def tell(self) -> str | None:
        return str(self.row)

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        start, self.row = self.row, min(10, self.row + rows)
        texts = [self.text(i) for i in range(start, self.row)]
        batch = pa.RecordBatch.from_pydict({"text": texts}, schema=self.schema)
        return [sdg.Block(batch, "count", start)] if texts else []

    def text(self, i: int) -> str:
        return f"number {i}"

    def total(self) -> int | None:
        return 10

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        return False


class Forgetful(CountReader):
    """Does not seek."""

    def seek(self, row: int, bookmark: str | None) -> None:
        pass


class TakesBookmarksForRows(CountReader):
    """Goes to the bookmark instead of the row."""

    def seek(self, row: int, bookmark: str | None) -> None:
        self.row = int(bookmark) if bookmark else row


class NeverEnds(CountReader):
    """Starts over after the end."""

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        self.row %= 10
        return super().read(rows)


class Random(CountReader):
    """Has another identity each time it is opened."""

    opened = 0

    def __init__(self, run: sdg.Run) -> None:
        super().__init__(run)
        Random.opened += 1
        self.identity = {"opened": Random.opened}


class Miscounts(CountReader):
    """Reports a wrong total."""

    def total(self) -> int | None:
        return 11


class NamesByPiece(CountReader):
    """Numbers rows from where reading began."""

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        return [sdg.Block(part.batch, "count", 0) for part in super().read(rows) if isinstance(part, sdg.Block)]


class Greedy(CountReader):
    """Returns more rows than requested."""

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        return super().read(rows + 1)


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (Forgetful, "after seek"),
        (TakesBookmarksForRows, "bookmark"),
        (NeverEnds, "after the end"),
        (Random, "identity"),
        (Miscounts, r"total\(\) is 11"),
        (NamesByPiece, r"count/0"),
        (Greedy, "when asked for"),
    ],
)
def test_a_reader_that_breaks_the_contract_is_found(reader: type[CountReader], said: str) -> None:
    assert len(check_reader(CountReader, {"input": "rows://"})) == 10
    with pytest.raises((AssertionError, sdg.PluginError), match=said):
        check_reader(reader, {"input": "rows://"})


# ── Writers and servers ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bundled_writers_keep_the_contract() -> None:
    check_writer(ParquetWriter, {})
    check_writer(JsonlWriter, {"output-filename": "${chunk_index}.jsonl"})
    check_writer(JsonlWriter, {"output-filename": "${chunk_index}.jsonl.zst"})


class Amnesiac(JsonlWriter):
    """Cannot read what it has written."""

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        return None


def one_file(run: sdg.Run) -> sdg.Writer:
    """Writes all chunks into one file."""
    chunks: dict[str, pa.Table] = {}

    class Writer:
        def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
            chunks["all"] = rows

        def read(self, chunk: sdg.Chunk) -> pa.Table | None:
            return chunks.get("all")

    return Writer()


@pytest.mark.parametrize(("writer", "said"), [(one_file, "read"), (Amnesiac, "returned None for chunk 0")])
def test_a_writer_that_breaks_the_contract_is_found(writer: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_writer(writer, {"output-filename": "${chunk_index}.jsonl"})


def test_a_server_is_started_used_and_stopped() -> None:
    assert check_server(demo.demo, prompt="Say it.\n\nThis is what there is to say.") == "This is what there is to say."


def test_a_server_that_leaves_a_task_behind_is_found() -> None:
    left: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def careless(run: sdg.Run) -> AsyncIterator[list[str]]:
        async with demo.demo(run) as urls:
            left.append(asyncio.create_task(asyncio.sleep(3600)))
            yield urls

    with pytest.raises(AssertionError, match="tasks are left"):
        check_server(careless)
