"""`sdg.run` is a run as a call in Python."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_server import FakeServer, Hang
from running import Sdg

import sdg

DOCUMENTS: list[dict[str, Any]] = [{"text": f"document {i}", "n": i} for i in range(5)]


async def shout(document: sdg.Document, generate: sdg.Generate) -> dict[str, Any] | None:
    """Answer loudly."""
    reply = await generate(document.text)
    if document.row["n"] == 3:
        raise ValueError("three")
    return {"text": reply.text.upper(), "n": document.row["n"]} if document.row["n"] != 4 else None


@pytest.fixture
def call(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`sdg.run` with the server, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    options = {"base_url": server.url, "progress": False, "max_failure_rate": 1}
    return lambda rollout, *given, **more: sdg.run(rollout, *given, **{**options, **more})


def test_rows_failures_and_figures_come_back_without_a_file(call: Any, tmp_path: Path) -> None:
    done = call(shout, DOCUMENTS)
    results = [row["rollout_results"][0] for row in done.rows()]
    assert [result["n"] for result in results] == [0, 1, 2]
    assert all(result["text"].startswith("ANSWER") for result in results)
    assert [(record["id"], record["error_type"]) for record in done.failed] == [("rows/3", "ValueError")]
    assert done.stats["rows"] == 3
    assert done.stats["filtered"] == 1
    assert done.table().column("n").to_pylist() == [0, 1, 2]
    assert repr(done) == "<sdg.run: 3 rows, 1 filtered, 1 failed>"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["table", "dataset", "parquet", "jsonl"])
def test_input_may_be_a_table_a_dataset_or_a_path(call: Any, kind: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(DOCUMENTS[:3])
    given: Any = table
    if kind == "dataset":
        import datasets

        given = datasets.Dataset.from_list(DOCUMENTS).select([0, 1, 2])
    elif kind == "parquet":
        given = tmp_path / "rows.parquet"
        pa.parquet.write_table(table, given)
    elif kind == "jsonl":
        given = str(tmp_path / "rows.jsonl")
        Path(given).write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS[:3]))
    assert [row["n"] for row in call(shout, given).rows()] == [0, 1, 2]


def test_works_inside_a_running_event_loop_with_options_and_a_name(call: Any, server: FakeServer) -> None:
    async def cell() -> Any:
        return call("summarize", DOCUMENTS[:1], max_tokens=7, generation={"stop": ["x"]})

    assert len(asyncio.run(cell())) == 1
    (request,) = server.requests
    assert request.payload["max_tokens"] == 7
    assert request.payload["stop"] == ["x"]


def test_named_run_without_output_continues(call: Any, server: FakeServer) -> None:
    first = call(shout, DOCUMENTS, name="trial")
    sent = len(server.requests)
    again = call(shout, DOCUMENTS, name="trial")
    assert again.rows() == first.rows()
    assert len(server.requests) == sent
    grown = call(shout, [*DOCUMENTS, {"text": "more", "n": 9}], name="trial")
    assert len(grown) == 4
    assert len(server.requests) == sent + 1


def test_output_is_that_of_the_command(call: Any, run_sdg: Sdg, tmp_path: Path) -> None:
    done = call(shout, DOCUMENTS, output="out")
    assert done.output == "out"
    assert (tmp_path / "out" / "README.md").exists()
    assert "ANSWER" in run_sdg("show", "--output", tmp_path / "out").stdout
    verified = run_sdg("verify", "--output", tmp_path / "out")
    assert verified.stderr == "sdg: the input of this run was given in Python, in memory: it cannot be read again\n"


def test_thresholds_of_the_garbage_collector_are_restored(call: Any) -> None:
    before = gc.get_threshold()
    call(shout, DOCUMENTS[:1])
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_failures_are_an_exception_that_has_what_was_made(call: Any) -> None:
    with pytest.raises(sdg.TooManyFailures, match="1 of 5 documents failed") as raised:
        call(shout, DOCUMENTS, max_failure_rate=0.1)
    assert len(raised.value.result.rows()) == 3


def test_input_may_be_a_data_frame_of_views_but_not_one_column(call: Any) -> None:
    class Frame:
        def __init__(self, data: pa.Table | pa.Array) -> None:
            self.__arrow_c_stream__ = data.__arrow_c_stream__

    rows = [{"text": "a", "n": 1, "tags": ["x"], "meta": {"of": "y"}}]
    views = [pa.string_view(), pa.int64(), pa.large_list(pa.string_view()), pa.struct([("of", pa.string_view())])]
    frame = Frame(pa.Table.from_pylist(rows, pa.schema([*zip(rows[0], views, strict=True)])))
    (row,) = call(shout, frame).rows()
    assert {name: row[name] for name in rows[0]} == rows[0]
    with pytest.raises(sdg.InputError, match="the input is a Frame: give a data frame"):
        call(shout, Frame(pa.chunked_array([["a"]])))


@pytest.mark.parametrize("flat", [False, True])
def test_run_that_ends_early_has_the_rows_made_so_far(call: Any, flat: bool) -> None:
    async def some(document: sdg.Document, generate: sdg.Generate) -> Any:
        if document.row["n"] == 2:
            raise ValueError("two")
        return [{"text": (await generate(document.text)).text, "n": document.row["n"]}]

    documents = [{"text": f"document {i} " * 20, "n": i} for i in range(50)]
    options = {"max_total_tokens": 1000, "max_concurrent_generations": 2, "flat": flat, "keep_columns": "text"}
    with pytest.raises(sdg.BudgetSpent) as raised:
        call(some, documents, **options)
    result = raised.value.result
    assert [record["id"] for record in result.failed] == ["rows/2"]
    assert len(result) == result.stats["rows"] > 5
    rows = result.rows()
    made = [row["n"] if flat else row["rollout_results"][0]["n"] for row in rows]
    assert made == sorted({*made} - {2})
    columns = {*rows[0]}
    assert columns >= ({"text", "id", "generated_text", "sample"} if flat else {"text", "id", "rollout_results"})


@pytest.mark.parametrize(
    ("rollout", "given", "options", "error", "message"),
    [
        (lambda document, generate: None, DOCUMENTS, {}, sdg.PluginError, "a lambda cannot be a rollout"),
        (shout, [], {}, sdg.InputError, "the input is empty"),
        (shout, ["a"], {}, sdg.InputError, "item 0 of the input is a str, expected a dict; for texts write"),
        (shout, [{"text": 1}, {"text": "a"}], {}, sdg.InputError, "column 'text' has values of several types"),
        (shout, 3, {}, sdg.InputError, "the input is a int, expected"),
        (shout, DOCUMENTS, {"max_token": 3}, sdg.UsageError, "did you mean --max-tokens"),
        (shout, DOCUMENTS, {"temperature": "hot"}, sdg.UsageError, "--temperature: invalid number"),
        (shout, DOCUMENTS, {"prompt_column": "body"}, sdg.InputError, "no such column; available: text, n"),
        ("sumarize", DOCUMENTS, {}, sdg.UsageError, "did you mean summarize?"),
        (shout, "nowhere.parquet", {}, sdg.InputError, "no such file"),
        (
            shout,
            [{"text": "\ud800"}],
            {},
            sdg.InputError,
            "column 'text' has values of several types, or an invalid one",
        ),
        (shout, {"train": DOCUMENTS}, {}, sdg.InputError, "the input is a dict: give one of its splits"),
        (str, DOCUMENTS, {}, sdg.PluginError, "the class str cannot be a rollout"),
        (shout, DOCUMENTS, {"config": "run.toml"}, sdg.UsageError, "config=… is not read by sdg.run"),
        (shout, DOCUMENTS, {"preview": 2}, sdg.UsageError, "preview=… is for the terminal"),
        (shout, DOCUMENTS, {"name": "a", "output": "b"}, sdg.UsageError, "give name or output, not both"),
        (shout, DOCUMENTS, {"name": "../b"}, sdg.UsageError, "name='../b': expected the name of a folder"),
    ],
)
def test_mistakes_are_one_exception(
    call: Any, capsys: pytest.CaptureFixture[str], rollout: Any, given: Any, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error) as raised:
        call(rollout, given, **options)
    assert message in str(raised.value)
    assert capsys.readouterr().err == ""


def test_interrupt_saves_what_was_answered(call: Any, server: FakeServer) -> None:
    server.behave(lambda payload, n: Hang() if "document 2" in str(payload) and n == 1 else None)

    def interrupt() -> None:
        while len(server.requests) < 5:
            time.sleep(0.05)
        time.sleep(0.5)
        for _ in range(2):  # the second one does not wait for what is in flight
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.5)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        call(shout, DOCUMENTS, name="broken")
    helper.join()
    assert len(call(shout, DOCUMENTS, name="broken")) == 3
    assert len(server.requests) == 6


def test_edit_of_a_plugin_or_of_what_a_function_uses_counts_within_a_process(
    call: Any, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import sdg\n@sdg.hookimpl\ndef register_rollouts(register):\n    register('own', own)\n"
    text += "async def own(document, generate):\n    return await generate('{} ' + document.text)\n"
    for word in ("one", "two"):
        (tmp_path / "own_edited.py").write_text(text.format(word))
        call("./own_edited.py", DOCUMENTS[:1], output=word)
    assert server.prompts == ["one document 0", "two document 0"]

    async def styled(document: sdg.Document, generate: sdg.Generate, style: str = "") -> sdg.Reply:
        return await generate(style + document.text)

    for style in ("dry", "dry"):
        call(functools.partial(styled, style=style), DOCUMENTS[:1], output="styled")
    with pytest.raises(sdg.StateError, match="the plugin's code has changed"):
        call(functools.partial(styled, style="loud"), DOCUMENTS[:1], output="styled")
    assert len(server.requests) == 3


def test_what_a_function_changes_itself_is_not_an_edit_but_what_its_caller_changes_is(
    call: Any, server: FakeServer
) -> None:
    seen: list[str] = []

    async def counting(document: sdg.Document, generate: sdg.Generate) -> sdg.Reply:
        seen.append(document.id)
        return await generate(document.text)

    for count in (1, 2, 3):
        assert len(call(counting, DOCUMENTS[:count], name="counted")) == count
    assert len(server.requests) == len(seen) == 3
    seen.clear()
    call(counting, DOCUMENTS[:3], name="counted")
    seen.append("more")
    with pytest.raises(sdg.StateError, match="the plugin's code has changed"):
        call(counting, DOCUMENTS[:3], name="counted")
