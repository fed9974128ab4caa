"""The rollout `prompt`: templates, documents without documents, and answers by a schema."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest
from fake_server import Answer, FakeServer
from running import Job

SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["x", "y"]},
        "score": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["label", "score"],
    "additionalProperties": False,
}


@pytest.fixture
def templated(job: Job) -> Job:
    """A job without a plugin: a template is all that is needed."""
    job.options["plugin"] = None
    job.input([{"id": "a", "question": "Why?", "tags": ["p", "q"]}, {"id": "b", "question": "How?", "tags": []}])
    return job


def test_a_template_that_names_its_columns_needs_no_prompt_column(templated: Job, server: FakeServer) -> None:
    templated.succeed(prompt_template="Answer: [[question]]")

    assert sorted(server.prompts) == ["Answer: How?", "Answer: Why?"]


def test_a_template_in_a_file_of_jinja_has_conditions_loops_and_filters_in_a_sandbox(
    templated: Job, server: FakeServer
) -> None:
    path = templated.folder / "t.j2"
    path.write_text("{{ document|upper }}{% for tag in tags %} <{{ tag }}>{% else %} none{% endfor %} {{ id }}")
    templated.succeed(prompt_template=f"@{path}", prompt_column="question")
    assert sorted(server.prompts) == ["HOW? none b", "WHY? <p> <q> a"]

    path.write_text("{{ document.__class__.__mro__ }}")
    failed = templated(prompt_template=f"@{path}", prompt_column="question", output="unsafe")
    assert failed.rc == 0
    assert "SecurityError" in templated.output_of(output="unsafe").failures()[0]["error"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ titel }}", ("no column for titel", "available: document, id, question, tags")),
        ("{% if %}", ("t.j2 line 1",)),
    ],
)
def test_a_broken_jinja_template_is_named(
    templated: Job, server: FakeServer, template: str, words: tuple[str, ...]
) -> None:
    (templated.folder / "t.j2").write_text(template)

    finished = templated(prompt_template="@t.j2", prompt_column="question")

    assert finished.rc == 2
    assert finished.says(*words)
    assert not server.requests


def test_documents_without_documents_are_the_combinations_of_values(templated: Job, server: FakeServer) -> None:
    personas = templated.folder / "personas.txt"
    personas.write_text("a pirate, retired\n\na nurse\n")
    options = {"input": "vary://", "prompt_template": "[[persona]] on [[topic]]"}
    options["vary"] = ["topic=tides,moons,bread", f"persona=@{personas}"]

    output = templated.succeed(**options)
    everything = {
        f"{who} on {topic}" for who in ("a pirate, retired", "a nurse") for topic in ("tides", "moons", "bread")
    }
    assert set(server.prompts) == everything
    assert len(output.rows()) == 6
    assert templated.verify().rc == 0
    orders = []
    for seed in (1, 2, 1):
        output = templated.succeed(**options, seed=seed, max_documents=4, output=f"seed{len(orders)}")
        orders.append([(row["topic"], row["persona"]) for row in output.rows()])
        assert len(set(orders[-1])) == 4
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input": "vary://", "vary": "topic="}, ("--vary", "topic has no values")),
        ({"input": "vary://", "vary": "topic=a,,b"}, ("topic has an empty value",)),
        ({"input": "vary://", "vary": ["a=1", "a=2"]}, ("--vary names a column twice",)),
        ({"input": "vary://"}, ("requires --vary", "--max-documents")),
        ({"prompt_template": "Say something"}, ("no [[DOCUMENT]]", "--rollouts-per-document")),
        ({"vary": "topic=a"}, ("--vary requires", "vary")),
        ({"schema": "nowhere.json"}, ("--schema", "nowhere.json")),
        ({"schema": "no schema"}, ("expected FILE.json or MODULE:TYPE",)),
        ({"schema": "json:Nothing"}, ("json:Nothing is not a schema",)),
        ({"schema": "broken.json"}, ("broken.json", "42")),
    ],
)
def test_inputs_and_schemas_that_cannot_be_are_named(
    templated: Job, server: FakeServer, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    (templated.folder / "broken.json").write_text('{"type": 42}')

    finished = templated(**{"prompt_template": "[[question]]", **options})

    assert finished.rc in {1, 2}
    assert finished.says(*words)
    assert not server.requests


def test_a_template_without_a_place_is_sent_as_often_as_is_asked(templated: Job, server: FakeServer) -> None:
    output = templated.succeed(input="vary://", prompt_template="Say something", max_documents=3)

    assert server.prompts == ["Say something"] * 3
    assert [row["number"] for row in output.rows()] == [1, 2, 3]


def test_a_schema_gives_validated_columns_and_failures_keep_the_last_answer(templated: Job, server: FakeServer) -> None:
    (templated.folder / "labels.json").write_text(json.dumps(SCHEMA))
    answers = {"Why?": '{"label": "x", "score": null}', "How?": '{"label": "z"}'}
    server.behave(lambda payload, n: Answer(next(text for key, text in answers.items() if key in str(payload))))

    output = templated.succeed(schema="labels.json", prompt_column="question", flat=True)

    (row,) = output.rows()
    assert (row["id"], row["label"], row["score"], row["generated_tags"]) == ("a", "x", None, None)
    schema = output.table().schema
    assert [schema.field(name).type for name in ("label", "score", "generated_tags")] == [
        pa.string(),
        pa.int64(),
        pa.list_(pa.string()),
    ]
    assert output.failed()["b"]["answer"] == '{"label": "z"}'
    assert "'z' is not one of" in output.failed()["b"]["error"]


def test_a_schema_may_be_a_type_in_a_file(templated: Job, server: FakeServer) -> None:
    (templated.folder / "shapes.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Label:\n    name: str\n    sure: float\n"
    )
    server.behave(lambda payload, n: Answer('{"name": "n", "sure": 0.5}'))

    output = templated.succeed(schema="shapes.py:Label", prompt_column="question")

    assert {(r["name"], r["sure"]) for row in output.rows() for r in row["rollout_results"]} == {("n", 0.5)}
