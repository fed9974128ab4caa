"""The resource `ask`: requests, parsing, asking again, and servers without `response_format`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from fake_server import Answer, FakeServer, Hang, Status, prompt_of
from hypothesis import assume, given, strategies as st
from replaying import answers_in, check_replay
from running import Job, documents, wait_until

from sdg_plugins.resources import ask as structured

SHAPES = """
    import asyncio
    from dataclasses import dataclass
    from typing import Literal, Optional

    import pydantic

    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        for rollout in (own, model, schema, many):
            register(rollout.__name__, rollout)

    @dataclass
    class Part:
        word: str

    @dataclass
    class Whole:
        parts: list[Part]
        kind: Literal["a", "b"]
        note: Optional[str] = None

    class Model(pydantic.BaseModel):
        score: int = pydantic.Field(ge=0, le=5)

    SCHEMA = {"type": "object", "properties": {"score": {"type": "integer", "maximum": 5}}, "required": ["score"]}

    async def own(document, generate, ask) -> Whole:
        return await ask(document.text, Whole)

    async def model(document, generate, ask) -> Model:
        found = await ask([{"role": "system", "content": "Judge."}, {"role": "user", "content": document.text}], Model)
        assert isinstance(found, Model)
        return found

    async def schema(document, generate, ask):
        return await ask(document.text, SCHEMA, reasks=1, temperature=0)

    async def many(document, generate, ask):
        return await ask(document.text, list[Part])
"""

WHOLE = {"parts": [{"word": "x"}], "kind": "a", "note": None}


@pytest.fixture
def shapes(job: Job) -> Job:
    """A job whose rollout asks for JSON."""
    job.options["plugin"] = job.plugin("own", SHAPES)
    return job


def take(job: Job, rollout: str) -> None:
    job.options["plugin"] = f"{job.folder / 'own.py'}:{rollout}"


def test_a_shape_is_requested_and_its_value_is_the_result(shapes: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: json.dumps(WHOLE))
    shapes.documents("a text")

    output = shapes.succeed()

    result = output.rows()[0]["rollout_results"][0]
    assert {name: result[name] for name in WHOLE} == WHOLE
    payload = server.requests[0].payload
    wanted = payload["response_format"]
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["name"] == "Whole"
    assert wanted["json_schema"]["strict"] is True
    schema = wanted["json_schema"]["schema"]
    assert schema["required"] == ["parts", "kind", "note"]
    assert schema["additionalProperties"] is schema["$defs"]["Part"]["additionalProperties"] is False
    assert "default" not in json.dumps(schema)
    assert json.dumps(schema) in payload["messages"][0]["content"]
    assert payload["messages"][0]["content"].startswith("a text\n")


def test_a_pydantic_model_with_bounds_and_messages(shapes: Job, server: FakeServer) -> None:
    take(shapes, "model")
    server.behave(lambda payload, n: '{"score": 6}' if len(payload["messages"]) == 2 else '{"score": 5}')
    shapes.documents("a text")

    output = shapes.succeed()

    assert output.rows()[0]["rollout_results"][0]["score"] == 5
    first, second = (request.payload["messages"] for request in server.requests)
    assert first[0] == {"role": "system", "content": "Judge."}
    assert second[:3] == [*first, {"role": "assistant", "content": '{"score": 6}'}]
    assert "score" in second[3]["content"]
    assert "less than or equal to 5" in second[3]["content"]


def test_a_json_schema_is_sent_as_it_is_and_validated(shapes: Job, server: FakeServer) -> None:
    take(shapes, "schema")
    server.behave(lambda payload, n: '{"score": 6}' if len(payload["messages"]) == 1 else '{"score": 5, "more": [1]}')
    shapes.documents("a text")

    output = shapes.succeed()

    assert output.rows()[0]["rollout_results"][0]["score"] == 5
    wanted = server.requests[0].payload["response_format"]["json_schema"]
    assert wanted["schema"]["required"] == ["score"]
    assert "strict" not in wanted
    assert server.requests[0].payload["temperature"] == 0
    assert "6 is greater than the maximum of 5" in server.prompts[1]


def test_a_json_schema_without_the_library_says_how_to_get_it(shapes: Job, server: FakeServer) -> None:
    take(shapes, "schema")
    package = shapes.folder / "without" / "jsonschema"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not installed')")
    shapes.documents("a text")

    finished = shapes(env={"PYTHONPATH": str(package.parent)})

    assert finished.rc == 1
    assert finished.says("jsonschema", "pip install 'sdg-engine[jsonschema]'")
    assert not server.requests


def test_an_invalid_schema_ends_the_run(shapes: Job, server: FakeServer) -> None:
    wrong = SHAPES.replace('{"type": "object"', '{"type": "objekt"')
    shapes.plugin("own", wrong)
    take(shapes, "schema")
    shapes.documents("a text")

    finished = shapes()

    assert finished.rc == 1
    assert finished.says("JSON schema", "objekt")
    assert not server.requests


def test_an_unsupported_shape_ends_the_run(shapes: Job, server: FakeServer) -> None:
    shapes.plugin("own", SHAPES.replace("list[Part])", "open)"))
    take(shapes, "many")
    shapes.documents("a text")

    finished = shapes()

    assert finished.rc == 1
    assert finished.says("open", "shape")
    assert not server.requests


def test_a_list_may_be_a_shape(shapes: Job, server: FakeServer) -> None:
    take(shapes, "many")
    answer = '[{"word": "x"}, {"word": "y"}]'
    server.behave(lambda payload, n: f"Here [you] are: {answer}" if len(payload["messages"]) == 1 else f"So: {answer}")
    shapes.documents("a text")

    results = shapes.succeed().rows()[0]["rollout_results"]

    assert len(server.requests) == 2  # the brackets around "you" spoil the first one
    assert [result["word"] for result in results] == ["x", "y"]


def test_asking_again_is_bounded_and_the_last_problem_is_reported(shapes: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: "I would rather not." if len(payload["messages"]) < 4 else '{"kind": "c"}')
    shapes.documents("a text")

    record = shapes.succeed().failed()["a text"]

    assert len(server.requests) == 3
    assert record["error_type"] == "InvalidAnswer"
    assert all(words in record["error"] for words in ("3 attempts", "kind", "parts: Field required"))
    assert "no JSON" in server.prompts[1]
    assert shapes.verify().rc == 0


def test_an_answer_that_was_cut_off_is_not_asked_for_again(shapes: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Answer('{"parts": [{"wor', finish_reason="length"))
    shapes.documents("a text")

    record = shapes.succeed().failed()["a text"]

    assert len(server.requests) == 1
    assert "--max-tokens" in record["error"]


# ── Servers without response_format ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_response_format_is_asked_without_it(
    status: int, shapes: Job, server: FakeServer
) -> None:
    server.behave(lambda payload, n: Status(status) if "response_format" in payload else json.dumps(WHOLE))
    shapes.input(documents(40))

    finished = shapes(max_concurrent_generations=2, max_concurrent_documents=2)

    assert finished.rc == 0
    assert len(finished.lines) == 1
    assert "response_format" in finished.stderr
    assert len(shapes.output.rows()) == 40
    kinds = Counter("response_format" in request.payload for request in server.requests)
    assert kinds == {True: 2, False: 40}  # the two that began together


def test_a_refusal_for_another_reason_fails_only_its_document(shapes: Job, server: FakeServer) -> None:
    server.behave(
        lambda payload, n: Status(400, message="too long") if "3" in prompt_of(payload) else json.dumps(WHOLE)
    )
    shapes.input([{"id": f"d{number}", "text": f"document {number}"} for number in range(3, 9)])

    output = shapes.succeed(max_concurrent_generations=1, max_concurrent_documents=1)

    assert list(output.failed()) == ["d3"]
    assert "too long" in output.failed()["d3"]["error"]
    assert len(output.rows()) == 5
    assert sum("response_format" in request.payload for request in server.requests) == 6


def test_once_response_format_was_accepted_a_refused_document_is_asked_once_more_without_it(
    shapes: Job, server: FakeServer
) -> None:
    server.behave(lambda payload, n: Status(400) if "5" in prompt_of(payload) else json.dumps(WHOLE))
    shapes.input([{"id": f"d{number}", "text": f"document {number}"} for number in range(3, 9)])

    output = shapes.succeed(max_concurrent_generations=1, max_concurrent_documents=1)

    assert list(output.failed()) == ["d5"]
    assert len(server.requests) == 7
    assert sum("response_format" in request.payload for request in server.requests) == 6


def refuses_formats(payload: dict[str, Any], n: int) -> Status | str:
    return Status(400, message="no response_format") if "response_format" in payload else json.dumps(WHOLE)


def test_of_two_servers_one_may_refuse_response_format(
    shapes: Job, server: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    other = servers()
    server.behave(lambda payload, n: json.dumps(WHOLE))
    other.behave(refuses_formats)
    shapes.input(documents(20))

    output = shapes.succeed(base_url=[server.url, other.url], max_concurrent_generations=2)

    assert len(output.rows()) == 20


def test_a_run_can_resume_with_a_server_that_refuses_response_format(
    shapes: Job, server: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    other = servers()
    server.behave(lambda payload, n: json.dumps(WHOLE) if "document 0" in prompt_of(payload) and n == 1 else Hang())
    other.behave(refuses_formats)
    shapes.input([{"id": f"d{number}", "text": f"document {number}"} for number in range(6)])
    running = shapes.start(rollouts_per_document=2)
    wait_until(lambda: len(server.requests) == 12 and len(server.answered) >= 1)
    wait_until(lambda: answers_in(shapes.output.state) == len(server.answered))
    running.process.kill()
    running.finish()

    output = shapes.succeed(rollouts_per_document=2, base_url=other.url)

    assert len(output.rows()) == 6


def test_answers_with_attempts_are_replayed(shapes: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: "no" if len(payload["messages"]) == 1 else json.dumps(WHOLE))
    shapes.documents("one", "two")
    shapes.options["plugin"] = shapes.folder / "own.py:own"

    assert check_replay(shapes, server, "sdg_plugin_files.own", "own") == 4


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)
AROUND = [
    "{}",
    "\n {}\n",
    "```json\n{}\n```",
    "```\n{}\n```",
    "Sure! Here it is:\n\n```json\n{}\n```\nI hope that helps.",
    "<think>It could be {{'a': 1}} or {{}}.</think>\n{}",
    "<think>\n```json\n{{}}\n```\n</think>\n\n```json\n{}\n```",
    "The answer is {}",
    "{} is the answer.",
]


def as_object(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


@given(OBJECTS, st.sampled_from(AROUND), st.sampled_from([None, 2]), st.booleans())
def test_json_is_found_in_whatever_stands_around_it(
    value: dict[str, Any], around: str, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assume(around.strip() == "{}" or ("</think>" not in text and "`" not in text))

    assert structured.parse_answer(around.format(text), as_object) == value


@pytest.mark.parametrize(
    "text", ["", "no", "{", "}{", "[1, 2", "```json\n```", "<think>{}</think>", '{"a": 1,}', "[1]"]
)
def test_text_without_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no JSON|not an object"):
        structured.parse_answer(text, as_object)


NESTED = "[" * 100_000 + "]" * 100_000


def test_json_that_is_nested_too_deeply_is_requested_again(shapes: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: NESTED if len(payload["messages"]) == 1 else json.dumps(WHOLE))
    shapes.documents("a text")

    assert len(shapes.succeed().rows()) == 1
    assert len(server.requests) == 2


def test_a_value_that_is_too_deep_to_be_validated_is_invalid() -> None:
    nests = {"$ref": "#/$defs/nest", "$defs": {"nest": {"type": "array", "items": {"$ref": "#/$defs/nest"}}}}

    with pytest.raises(ValueError, match="nested too deeply"):
        structured.parse_answer("[" * 400 + "]" * 400, structured.form_of(nests).parse)


@dataclass
class Tricky:
    """Keys that are also keywords of schemas."""

    type: str
    properties: list[str]
    title: str
    default: Literal["default", "object"] = "default"
    required: bool = False


def test_keys_that_are_keywords_of_schemas_are_only_keys() -> None:
    form = structured.form_of(Tricky)

    names = ["type", "properties", "title", "default", "required"]
    assert [*form.schema["properties"]] == form.schema["required"] == names
    assert form.schema["properties"]["title"] == {"type": "string"}
    value = {"type": "object", "properties": ["a"], "title": "t", "default": "object", "required": True}
    assert form.parse(value) == Tricky(**value)
