"""Each plugin on its own, without a server."""

from __future__ import annotations

import json
from pathlib import Path

from sdg_example.explain import explain
from sdg_example.mirror import mirror
from sdg_example.orc import OrcWriter
from sdg_example.paragraphs import ParagraphReader

import sdg
from sdg_plugins.testing import check_reader, check_server, check_writer, try_rollout


def test_an_unknown_word_is_explained_in_a_second_request() -> None:
    tried = try_rollout(explain, "A long text", answers=["Epistemic.", "Of knowledge"])
    assert tried.results[0]["explanation"] == "Of knowledge"
    assert tried.results[0]["known"] is False
    assert "'epistemic'" in tried.requests[1].prompt


def test_a_known_word_costs_one_request(tmp_path: Path) -> None:
    (tmp_path / "glossary.json").write_text(json.dumps({"epistemic": "of knowledge"}))
    tried = try_rollout(explain, "A text", answers=["epistemic"], options={"glossary": tmp_path / "glossary.json"})
    assert tried.results[0]["explanation"] == "of knowledge"
    assert len(tried.requests) == 1


def test_the_resource_can_be_replaced() -> None:
    tried = try_rollout(explain, "A text", answers="epistemic", resources={"glossary": {"epistemic": "of knowledge"}})
    assert tried.rows[0]["rollout_results"][0]["known"] is True


def test_a_text_without_a_word_is_filtered() -> None:
    tried = try_rollout(explain, ["first", "second"], answers=lambda payload: " . ")
    assert tried.filtered == ["rows/0", "rows/1"]


def test_a_refused_request_fails_its_document() -> None:
    tried = try_rollout(explain, "A text", answers=sdg.RequestFailed("400", "too long", status=400))
    assert tried.failed[0]["error"] == "too long"


def test_the_reader_keeps_the_contract(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n\n".join(f"paragraph {i} of {name}" for i in range(5)))
    rows = check_reader(ParagraphReader, {"input": tmp_path})
    assert len(rows) == 10
    assert rows[5] == {"text": "paragraph 0 of b.txt", "words": 4}


def test_the_writer_keeps_the_contract() -> None:
    check_writer(OrcWriter, {"output-filename": "${rank}_${chunk_index}.orc"})


def test_the_server_responds() -> None:
    assert check_server(mirror, prompt="Say hello") == "hello"
