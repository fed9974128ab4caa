"""The rollout `prompt`: a prompt given on the command line, with the document and other columns of its row in it.

A template is text with `[[DOCUMENT]]` and `[[COLUMN]]`; a file whose name ends in `.j2` is a Jinja template, in its
sandbox. With --schema the answers are validated JSON, whose fields become those of the result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.loading import named_object
from sdg_plugins.common.paths import prompt_column_of, type_at
from sdg_plugins.resources import ask as ask_module

if TYPE_CHECKING:
    import pyarrow as pa

PLACEHOLDER = re.compile(r"\[\[([^\[\]]+)\]\]")
Messages = list[dict[str, Any]]


class Jinja(str):
    """The text of a Jinja template."""

    __slots__ = ()


class Schema(dict[str, Any]):
    """A JSON schema, and what answers are converted to: a type, or the schema itself."""

    shape: Any = None


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "prompt, or @FILE; [[DOCUMENT]] stands for the document's text, [[NAME]] for a column; FILE.j2 is Jinja"
    parser.add_argument("--prompt-template", metavar="T", type=parse_template, help=text)
    parser.add_argument("--system-prompt", metavar="S", type=sdg.text_or_file, help="system message, or @FILE")
    text = "JSON schema of the answers: FILE.json, or MODULE:TYPE for a dataclass or pydantic model"
    parser.add_argument("--schema", metavar="S", type=parse_schema, help=text)


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("prompt", prompt)


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("prompt_of", prompt_of)


async def prompt(
    document: sdg.Document,
    generate: sdg.Generate,
    prompt_of: Callable[[sdg.Document], Messages],
    ask: ask_module.Ask,
    run: sdg.Run,
) -> sdg.Reply | dict[str, Any]:
    """Send the document unchanged, or in --prompt-template, after --system-prompt; with --schema for JSON."""
    schema: Schema | None = run.options.schema
    if schema is None:
        return await generate(prompt_of(document))
    value = await ask(prompt_of(document), schema.shape)
    if hasattr(value, "model_dump"):
        return dict(value.model_dump(mode="json"))
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    return value if isinstance(value, dict) else {"value": value}


def fields_of_answers(run: sdg.Run) -> dict[str, pa.DataType] | None:
    """The fields of results that --schema promises; None without it."""
    schema: Schema | None = run.options.schema
    return None if schema is None else ask_module.arrow_fields(schema)


prompt.fields = fields_of_answers  # type: ignore[attr-defined]


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_template(value: str) -> str:
    """The text of a template, which is given as text or @FILE."""
    text = sdg.text_or_file(value)
    if not (value.startswith("@") and value.endswith(".j2")):
        return text
    import jinja2

    try:
        environment().parse(text)
    except jinja2.TemplateSyntaxError as exc:
        raise argparse.ArgumentTypeError(f"{value[1:]} line {exc.lineno}: {exc.message}") from exc
    return Jinja(text)


def parse_schema(value: str) -> Schema:
    """The schema in FILE.json, or that of a type, given as MODULE:TYPE or FILE.py:TYPE."""
    try:
        if value.endswith(".json"):
            found = Schema(json.loads(Path(value).expanduser().read_text(encoding="utf-8")))
            found.shape = dict(found)
            ask_module.form_of(found.shape)
            return found
        if ":" not in value:
            raise argparse.ArgumentTypeError(f"{value}: expected FILE.json or MODULE:TYPE")
        shape = named_object(value)
        found = Schema(ask_module.form_of(shape).schema)
    except (OSError, ValueError, TypeError, ImportError, AttributeError) as exc:
        raise argparse.ArgumentTypeError(f"{value} is not a schema: {sdg.one_line(exc)}") from exc
    except sdg.Error as exc:
        raise argparse.ArgumentTypeError(f"{value}: {exc}") from exc
    found.shape = shape
    return found


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def prompt_of(run: sdg.Run) -> AsyncIterator[Callable[[sdg.Document], Messages]]:
    """A function that converts a document to messages, using --prompt-template and --system-prompt."""
    template, system = run.options.prompt_template, run.options.system_prompt
    filled = filler_of(template, run) if template else None

    def messages(document: sdg.Document) -> Messages:
        chat = document.messages or [{"role": "user", "content": filled(document) if filled else document.text}]
        return [{"role": "system", "content": system}, *chat] if system else chat

    yield messages


def filler_of(template: str, run: sdg.Run) -> Callable[[sdg.Document], str]:
    """A function that fills the template; raises UsageError if it cannot."""
    check_places(template, run)
    if not isinstance(template, Jinja):
        return functools.partial(fill, template)
    compiled = environment().from_string(template)
    return lambda document: str(compiled.render({**document.row, "id": document.id, "document": document.text}))


@functools.cache
def environment() -> Any:
    """Jinja's sandbox: templates may come from anywhere. An undefined name is an error, not an empty text."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as exc:
        raise sdg.PluginError("a template in a file .j2 needs a package that is missing: pip install jinja2") from exc
    return jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


def names_in(template: str) -> set[str]:
    """The columns that a template names; DOCUMENT, in Jinja `document`, is the text."""
    if not isinstance(template, Jinja):
        return set(PLACEHOLDER.findall(template))
    import jinja2.meta

    return set(jinja2.meta.find_undeclared_variables(environment().parse(template)))


def check_places(template: str, run: sdg.Run) -> None:
    """Raise UsageError if a template names a column that the input lacks, or if it says nothing about documents."""
    import pyarrow.types as t

    assert run.schema is not None
    options, used = run.options, names_in(template)
    text = "document" if isinstance(template, Jinja) else "DOCUMENT"
    names = [text, *dict.fromkeys(["id", *run.schema.names])]
    for name in sorted(used):
        if name not in names:
            shown = name if isinstance(template, Jinja) else f"[[{name}]]"
            known = ", ".join(names if isinstance(template, Jinja) else [f"[[{known}]]" for known in names])
            raise sdg.UsageError(f"--prompt-template: the input has no column for {shown}; available: {known}")
    if not used and not options.max_documents and options.rollouts_per_document == 1:
        message = "--prompt-template has no [[DOCUMENT]] and no [[COLUMN]], so all prompts would be the same"
        raise sdg.UsageError(f"{message}: add one, or say how many with --max-documents or --rollouts-per-document")
    column = prompt_column_of(options, run.schema)
    if column is not None and t.is_nested(type_at(run.schema, column)):
        message = f"--prompt-template has no effect: --prompt-column {column} holds lists of messages"
        raise sdg.UsageError(f"{message}; omit the template, or name a column of text")


def fill(template: str, document: sdg.Document) -> str:
    """The template with its placeholders replaced. Placeholders in the replacements are left alone."""
    others = set(PLACEHOLDER.findall(template)) - {"DOCUMENT"}
    row: Mapping[str, Any] = {"id": document.id, **document.row} if others else {}
    values = {"DOCUMENT": document.text, **{name: text_of(row[name]) for name in others}}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def text_of(value: Any) -> str:
    """A column's value for a prompt: text unchanged, anything else as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, default=sdg.plain).decode()
