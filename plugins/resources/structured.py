"""Answers that are JSON of a given shape: asked for, validated, and asked for again when they are wrong.

A rollout gets it as the resource `ask`:

    @dataclass
    class Verdict:
        reason: str
        score: int

    async def judge(document, generate, ask):
        return await ask(f"How good is this text, from 0 to 5?\\n\\n{document.text}", Verdict)

The shape is whatever pydantic understands (dataclass, model, `list[Verdict]`), or a JSON schema as a dict.
Servers are told it by `response_format` (https://platform.openai.com/docs/guides/structured-outputs), which vLLM,
SGLang and others enforce while they decode; models are told it in the prompt, too, and write better values then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol, TypeVar

import sdg

REASKS = 2  # after the first answer: a model that is wrong three times seldom is right the fourth
REFUSALS = {400, 404, 422, 501}  # statuses of servers that do not know `response_format`
T = TypeVar("T")
Prompt = str | list[dict[str, Any]]


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("ask", ask)


class Ask(Protocol):
    """The resource `ask`, as a rollout sees it."""

    async def __call__(self, prompt: Prompt, shape: type[T], *, reasks: int = REASKS, **overrides: Any) -> T:
        """Ask for an answer of a shape.

        Args:
            prompt: text, or chat messages of which the last one is the user's.
            shape: a dataclass, a pydantic model or another type; or a JSON schema, for which the value is plain JSON.
            reasks: how often to ask again, with what was wrong, before giving up.
            overrides: fields of the payload, as for `generate`.

        Raises:
            InvalidAnswer: no answer was right.
            sdg.RequestFailed: as from `generate`.
        """


class InvalidAnswer(Exception):
    """The model did not give an answer of the shape asked for."""


@dataclasses.dataclass
class Server:
    """What a run has learned of its server."""

    formats: bool | None = None  # whether `response_format` was taken first, or refused; None until one of them


@contextlib.asynccontextmanager
async def ask(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """Ask for JSON of a shape: `await ask(prompt, Shape)`; validated, and asked for again when it is wrong."""
    server = Server()
    yield sdg.PerRollout(lambda document, generate: functools.partial(answer, generate, server))


async def answer(
    generate: sdg.Generate, server: Server, prompt: Prompt, shape: Any, *, reasks: int = REASKS, **overrides: Any
) -> Any:
    """See `Ask`."""
    form = form_of(shape)
    problem = ValueError("none was asked for")
    messages = instructed(prompt, form.schema)
    for _ in range(reasks + 1):
        reply = await request(generate, server, messages, form, overrides)
        try:
            return read(reply.text, form.parse)
        except ValueError as wrong:
            problem = wrong
        if reply.finish_reason == "length":
            raise InvalidAnswer("the answer was cut off before its JSON was complete: raise --max-tokens")
        correction = f"That is not right: {problem}\nAnswer once more, with nothing but the corrected JSON."
        messages = [
            *messages,
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": correction},
        ]
    raise InvalidAnswer(f"no valid answer in {reasks + 1} attempts; the last one: {' '.join(str(problem).split())}")


async def request(
    generate: sdg.Generate, server: Server, messages: list[dict[str, Any]], form: Form, overrides: dict[str, Any]
) -> sdg.Reply:
    """One answer. A server that refuses `response_format`, and nothing else, is asked without it from then on.

    Any refused request would look like that. So it counts only if the same one is answered without the field. Once
    one with it has been answered, perhaps by another server or in an earlier process, each request is tried by itself.
    """
    if server.formats is False:
        return await generate(messages, **overrides)
    try:
        reply = await generate(messages, response_format=form.response_format, **overrides)
    except sdg.RequestFailed as refusal:
        if refusal.status not in REFUSALS:
            raise
        reply = await generate(messages, **overrides)
        if server.formats is None:
            server.formats = False
            sdg.say(f"the server takes no response_format, so that JSON is only asked for in prompts ({refusal})")
        return reply
    server.formats = True
    return reply


def instructed(prompt: Prompt, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt as messages, the last of which begins with the schema: equal beginnings are cached by servers."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    order = f"Answer with JSON that fits this schema, and with nothing else: {json.dumps(schema, ensure_ascii=False)}\n"
    content = messages[-1]["content"]
    content = order + content if isinstance(content, str) else [{"type": "text", "text": order}, *content]
    return [*messages[:-1], {**messages[-1], "content": content}]


# ── Shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Form:
    """A shape made ready: its JSON schema, what asks for it, and `parse`, which raises ValueError."""

    schema: dict[str, Any]
    response_format: dict[str, Any]
    parse: Callable[[Any], Any]


def form_of(shape: Any) -> Form:
    """Make a shape ready, once."""
    return form_of_schema(json.dumps(shape)) if isinstance(shape, dict) else form_of_type(shape)


@functools.lru_cache
def form_of_type(shape: Any) -> Form:
    """What pydantic makes of a type."""
    import pydantic

    try:
        adapter = pydantic.TypeAdapter(shape)
        schema = closed(adapter.json_schema())
    except pydantic.PydanticUserError as problem:
        reason = problem.message.partition("\n")[0]
        raise sdg.PluginError(f"{shape!r} is no shape that can be asked for: {reason}") from problem

    def parse(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except pydantic.ValidationError as problem:
            where = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}".lstrip(": ") for error in problem.errors()]
            raise ValueError("; ".join(where[:5])) from problem

    return Form(schema, response_format(schema, getattr(shape, "__name__", "answer"), strict=True), parse)


@functools.lru_cache
def form_of_schema(text: str) -> Form:
    """A JSON schema as it is, and the library that validates by it."""
    schema = json.loads(text)
    try:
        import jsonschema
    except ImportError as problem:
        message = "a JSON schema needs a package more: pip install 'sdg[jsonschema]'; a dataclass in its place does not"
        raise sdg.PluginError(message) from problem
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as problem:
        raise sdg.PluginError(f"a rollout's JSON schema is none: {problem.message}") from problem

    def parse(value: Any) -> Any:
        where = [f"{error.json_path}: {error.message}" for error in kind(schema).iter_errors(value)]
        if where:
            raise ValueError("; ".join(where[:5]))
        return value

    return Form(schema, response_format(schema, str(schema.get("title", "answer"))), parse)


def response_format(schema: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    """The payload's field for a schema."""
    return {"type": "json_schema", "json_schema": {"name": re.sub(r"\W", "_", name)[:64], "schema": schema, **more}}


def closed(schema: Any) -> Any:
    """A type's schema with all keys required and no others allowed, as OpenAI's strict mode has it; without titles."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if not isinstance(schema.get("properties"), dict) or schema.get("type") != "object":
        return {key: closed(value) for key, value in schema.items() if key not in {"default", "title"}}
    kept = {key: closed(value) for key, value in schema.items() if key not in {"default", "properties", "title"}}
    properties = {name: closed(value) for name, value in schema["properties"].items()}
    return {**kept, "properties": properties, "required": [*properties], "additionalProperties": False}


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(text: str, parse: Callable[[Any], Any]) -> Any:
    """The value in an answer, whose JSON may stand in a fenced block, or between thoughts and remarks.

    Raises:
        ValueError: there is no JSON, or none that `parse` takes.
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
        except ValueError as wrong:
            problem = problem or wrong
    raise problem or ValueError("it has no JSON that can be read")


def candidates(text: str) -> Iterator[str]:
    """Where JSON may stand in an answer, the likeliest first."""
    yield text
    text = text.rpartition("</think>")[2]
    yield text
    yield from reversed(re.findall(r"```(?:json)?\s*(.*?)```", text, re.DOTALL))
    for opening, closing in ("{}", "[]"):
        yield text[text.find(opening) : text.rfind(closing) + 1]
