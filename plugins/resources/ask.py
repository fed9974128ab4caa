"""The resource `ask`: JSON of a given shape from the model, validated, and requested again if it is invalid.

    @dataclass
    class Verdict:
        reason: str
        score: int

    async def judge(document, generate, ask):
        return await ask(f"How good is this text, from 0 to 5?\\n\\n{document.text}", Verdict)

The shape is whatever pydantic understands (dataclass, model, `list[Verdict]`), or a JSON schema as a dict.
Servers receive it as `response_format` (https://platform.openai.com/docs/guides/structured-outputs), which vLLM, SGLang
and others enforce while they decode. The prompt contains it as well, because models then write better values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import sdg
from sdg_plugins.common.loading import named_object

if TYPE_CHECKING:
    import pyarrow as pa

REASKS = 2  # after the first answer: a model that is wrong three times is seldom right the fourth time
REFUSALS = {400, 404, 422, 501}  # statuses with which servers refuse `response_format`
T = TypeVar("T")
Prompt = str | list[dict[str, Any]]


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("ask", ask)


class Ask(Protocol):
    """The resource `ask`, as a rollout sees it."""

    async def __call__(
        self, prompt: Prompt, shape: type[T], *, to: str = "", reasks: int = REASKS, **overrides: Any
    ) -> T:
        """Ask the model for JSON of a shape.

        Args:
            prompt: text, or chat messages of which the last one is the user's.
            shape: a dataclass, a pydantic model or another type; or a JSON schema, which returns plain JSON.
            to: the name of a further model; "" for the run's own.
            reasks: how often to ask again, with the reason why the answer was invalid.
            overrides: fields of the payload, as for `generate`.

        Raises:
            InvalidAnswer: no answer was valid.
            sdg.RequestFailed: as from `generate`.
        """


class InvalidAnswer(Exception):
    """The model did not answer with JSON of the requested shape.

    Args:
        message: why.
        reply: the last answer, for `failed/`.
    """

    def __init__(self, message: str, reply: sdg.Reply | None = None) -> None:
        super().__init__(message)
        self.details = {"answer": reply.text, "finish_reason": reply.finish_reason} if reply else {}


@dataclasses.dataclass
class FormatSupport:
    """What a run knows about a model's support of `response_format`.

    Attributes:
        accepted: True once a request with it has succeeded, False once one was refused because of it; None before that.
    """

    accepted: bool | None = None


@contextlib.asynccontextmanager
async def ask(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """Ask for JSON of a shape: `await ask(prompt, Shape)`; validated, and requested again if it is invalid."""
    support = {name: FormatSupport() for name in ("", *run.models)}
    yield sdg.PerRollout(lambda document, generate: functools.partial(answer, generate, support))


async def answer(
    generate: sdg.Generate,
    support: dict[str, FormatSupport],
    prompt: Prompt,
    shape: Any,
    *,
    to: str = "",
    reasks: int = REASKS,
    **overrides: Any,
) -> Any:
    """See `Ask`."""
    form = form_of(shape)
    problem = ValueError("none was requested")
    messages = instructed(prompt, form.schema)
    for _ in range(reasks + 1):
        reply = await request(generate, support.get(to, FormatSupport()), messages, form, {**overrides, "to": to})
        try:
            return parse_answer(reply.text, form.parse)
        except ValueError as exc:
            problem = exc
        if reply.finish_reason == "length":
            raise InvalidAnswer("the answer was cut off before its JSON was complete: raise --max-tokens", reply)
        correction = f"That is not right: {problem}\nAnswer once more, with nothing but the corrected JSON."
        messages = [
            *messages,
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": correction},
        ]
    raise InvalidAnswer(f"no valid answer in {reasks + 1} attempts; the last one: {sdg.one_line(problem)}", reply)


async def request(
    generate: sdg.Generate,
    support: FormatSupport,
    messages: list[dict[str, Any]],
    form: Form,
    overrides: dict[str, Any],
) -> sdg.Reply:
    """Get one answer. A server that refuses `response_format`, and nothing else, no longer receives it.

    A refusal may have another reason, so it only counts if the same request succeeds without the field. Once a request
    with it has succeeded, perhaps at another server or in an earlier process, each request is decided on its own.
    """
    if support.accepted is False:
        return await generate(messages, **overrides)
    try:
        reply = await generate(messages, response_format=form.response_format, **overrides)
    except sdg.RequestFailed as exc:
        if exc.status not in REFUSALS:
            raise
        reply = await generate(messages, **overrides)
        if support.accepted is None:
            support.accepted = False
            sdg.say(f"the server does not accept response_format, so only the prompt asks for JSON ({exc})")
        return reply
    support.accepted = True
    return reply


def instructed(prompt: Prompt, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt as messages; the last one ends with the schema: what is in front may be in a server's prefix cache."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = json.dumps(schema, ensure_ascii=False)
    order = f"\nAnswer with JSON that fits this schema, and with nothing else: {text}"
    content = messages[-1]["content"]
    content = content + order if isinstance(content, str) else [*content, {"type": "text", "text": order}]
    return [*messages[:-1], {**messages[-1], "content": content}]


# ── Shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Form:
    """A shape, prepared for requests.

    Attributes:
        schema: its JSON schema.
        response_format: the field of the payload.
        parse: converts a JSON value to the shape; raises ValueError.
    """

    schema: dict[str, Any]
    response_format: dict[str, Any]
    parse: Callable[[Any], Any]


def form_of(shape: Any) -> Form:
    """Prepare a shape. Each one is prepared once."""
    return form_of_schema(json.dumps(shape)) if isinstance(shape, dict) else form_of_type(shape)


@functools.lru_cache
def form_of_type(shape: Any) -> Form:
    """Prepare a type that pydantic understands."""
    import pydantic

    try:
        adapter = pydantic.TypeAdapter(shape)
        schema = strict_schema(adapter.json_schema())
    except pydantic.PydanticUserError as exc:
        reason = exc.message.partition("\n")[0]
        raise sdg.PluginError(f"{shape!r} is not a shape that `ask` supports: {reason}") from exc

    def parse(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except pydantic.ValidationError as exc:
            errors = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}".lstrip(": ") for error in exc.errors()]
            raise ValueError("; ".join(errors[:5])) from exc

    return Form(schema, response_format_of(schema, getattr(shape, "__name__", "answer"), strict=True), parse)


@functools.lru_cache
def form_of_schema(text: str) -> Form:
    """Prepare a JSON schema, given as text. It is sent unchanged."""
    schema = json.loads(text)
    try:
        import jsonschema
    except ImportError as exc:
        message = (
            "a JSON schema needs a package that is missing: pip install 'sdg-engine[jsonschema]', or use a dataclass"
        )
        raise sdg.PluginError(message) from exc
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as exc:
        raise sdg.PluginError(f"a rollout's JSON schema is invalid: {exc.message}") from exc

    def parse(value: Any) -> Any:
        errors = [f"{error.json_path}: {error.message}" for error in validator(schema).iter_errors(value)]
        if errors:
            raise ValueError("; ".join(errors[:5]))
        return value

    return Form(schema, response_format_of(schema, str(schema.get("title", "answer"))), parse)


def response_format_of(schema: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    """The field of the payload for a schema."""
    return {"type": "json_schema", "json_schema": {"name": re.sub(r"\W", "_", name)[:64], "schema": schema, **more}}


def strict_schema(schema: Any) -> Any:
    """A schema as OpenAI's strict mode needs it: all keys required, no others allowed; also without titles."""
    if isinstance(schema, list):
        return [strict_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if not isinstance(schema.get("properties"), dict) or schema.get("type") != "object":
        return {key: strict_schema(value) for key, value in schema.items() if key not in {"default", "title"}}
    kept = {key: strict_schema(value) for key, value in schema.items() if key not in {"default", "properties", "title"}}
    properties = {name: strict_schema(value) for name, value in schema["properties"].items()}
    return {**kept, "properties": properties, "required": [*properties], "additionalProperties": False}


def arrow_fields(schema: dict[str, Any]) -> dict[str, pa.DataType]:
    """The Arrow types of the properties of a JSON schema; without those that have no single type.

    A schema of something else than an object has its answers in the field `value`.
    """
    schema = resolved(schema, schema)
    properties = schema.get("properties") if schema.get("type", "object") == "object" else {"value": schema}
    kinds = {name: arrow_type(part, schema) for name, part in (properties or {}).items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def resolved(part: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """A part of a schema, with a reference followed and null left out of alternatives."""
    for _ in range(20):
        if not isinstance(part, dict):
            return {}
        if reference := part.get("$ref"):
            found: Any = whole
            for key in str(reference).removeprefix("#/").split("/"):
                found = found.get(key, {}) if isinstance(found, dict) else {}
            part = {**{"$defs": whole.get("$defs", {})}, **found}
            continue
        alternatives = [one for one in part.get("anyOf") or part.get("oneOf") or [] if one.get("type") != "null"]
        if len(alternatives) != 1:
            return part
        part = alternatives[0]
    return {}


def arrow_type(part: Any, whole: dict[str, Any]) -> pa.DataType | None:
    """The Arrow type of a part of a JSON schema; None if there is no single one."""
    import pyarrow as pa

    part = resolved(part, whole)
    kinds = part.get("type")
    given = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind not in {"null", None}]
    if "enum" in part or "const" in part:
        values = [value for value in part.get("enum", [part.get("const")]) if value is not None]
        names = {str: "string", bool: "boolean", int: "integer", float: "number"}
        given = sorted({names.get(type(value), "object") for value in values})
    if len(given) != 1:
        return None
    simple = {"string": pa.string(), "boolean": pa.bool_(), "integer": pa.int64(), "number": pa.float64()}
    if given[0] in simple:
        return simple[given[0]]
    if given[0] == "array":
        item = arrow_type(part.get("items"), whole)
        return None if item is None else pa.list_(item)
    members = {name: arrow_type(inner, whole) for name, inner in (part.get("properties") or {}).items()}
    closed = members and part.get("additionalProperties") is False
    return pa.struct(list(members.items())) if closed and None not in members.values() else None


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_answer(text: str, parse: Callable[[Any], Any]) -> Any:
    """The value in an answer, whose JSON may be in a fenced block or surrounded by other text.

    The messages of its errors are sent to the model as part of a correction.

    Raises:
        ValueError: there is no JSON, or none that `parse` accepts.
    """
    problem: ValueError | None = None
    for candidate in candidates(text):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        try:
            return parse(value)
        except RecursionError:
            problem = problem or ValueError("its JSON is nested too deeply")
        except ValueError as exc:
            problem = problem or exc
    raise problem or ValueError("it has no JSON that can be read")


def candidates(text: str) -> Iterator[str]:
    """The parts of an answer that may be JSON, the most likely one first."""
    yield text
    text = text.rpartition("</think>")[2]
    yield text
    yield from reversed(re.findall(r"```(?:json)?\s*(.*?)```", text, re.DOTALL))
    for opening, closing in ("{}", "[]"):
        yield text[text.find(opening) : text.rfind(closing) + 1]


class Schema(dict[str, Any]):
    """A JSON schema, and what answers are converted to: a type, or the schema itself."""

    shape: Any = None


def parse_schema(value: str) -> Schema:
    """The schema in FILE.json, or that of a type, given as MODULE:TYPE or FILE.py:TYPE."""
    try:
        if value.endswith(".json"):
            found = Schema(json.loads(Path(value).expanduser().read_text(encoding="utf-8")))
            found.shape = dict(found)
            form_of(found.shape)
            return found
        if ":" not in value:
            raise argparse.ArgumentTypeError(f"{value}: expected FILE.json or MODULE:TYPE")
        shape = named_object(value)
        found = Schema(form_of(shape).schema)
    except (OSError, ValueError, TypeError, ImportError, AttributeError) as exc:
        raise argparse.ArgumentTypeError(f"{value} is not a schema: {sdg.one_line(exc)}") from exc
    except sdg.Error as exc:
        raise argparse.ArgumentTypeError(f"{value}: {exc}") from exc
    found.shape = shape
    return found
