"""The rollout `prompt`: a prompt given on the command line, with the document and other columns of its row in it.

A template is text with `[[DOCUMENT]]` and `[[COLUMN]]`; a file whose name ends in `.j2` is a Jinja template, in its
sandbox. With --schema the answers are validated JSON, whose fields become those of the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.templates import filler_of, parse_template
from sdg_plugins.resources.ask import Ask, Schema, arrow_fields, parse_schema

if TYPE_CHECKING:
    import pyarrow as pa

Messages = list[dict[str, Any]]


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
    ask: Ask,
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
    return None if schema is None else arrow_fields(schema)


prompt.fields = fields_of_answers  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def prompt_of(run: sdg.Run) -> AsyncIterator[Callable[[sdg.Document], Messages]]:
    """A function that converts a document to messages, using --prompt-template and --system-prompt."""
    template, system = run.options.prompt_template, run.options.system_prompt
    filled = filler_of(template, run) if template else None

    def messages(document: sdg.Document) -> Messages:
        chat = document.messages or [{"role": "user", "content": filled(document) if filled else document.text}]
        return [{"role": "system", "content": system}, *chat] if system else chat

    yield messages
