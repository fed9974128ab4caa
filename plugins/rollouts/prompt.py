"""The rollout `prompt`: a prompt given on the command line, with the document and other columns of its row in it."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

import sdg

PLACEHOLDER = re.compile(r"\[\[([^\[\]]+)\]\]")


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "prompt, or @FILE; [[DOCUMENT]] stands for the document's text, [[NAME]] for a column"
    parser.add_argument("--prompt-template", metavar="T", type=parse_template, help=text)
    parser.add_argument("--system-prompt", metavar="S", type=sdg.text_or_file, help="system message, or @FILE")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("prompt", prompt)


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("prompt_of", prompt_of)


def parse_template(value: str) -> str:
    """The text of a template, which is given as text or @FILE."""
    text = sdg.text_or_file(value)
    if not PLACEHOLDER.search(text):
        raise argparse.ArgumentTypeError("the template has no [[DOCUMENT]], so all prompts would be the same")
    return text


async def prompt(
    document: sdg.Document, generate: sdg.Generate, prompt_of: Callable[[sdg.Document], list[dict[str, Any]]]
) -> sdg.Reply:
    """Send the document unchanged, or in --prompt-template, after --system-prompt."""
    return await generate(prompt_of(document))


@contextlib.asynccontextmanager
async def prompt_of(run: sdg.Run) -> AsyncIterator[Callable[[sdg.Document], list[dict[str, Any]]]]:
    """A function that converts a document to messages, using --prompt-template and --system-prompt."""
    template, system = run.options.prompt_template, run.options.system_prompt
    if template:
        check_places(template, run)

    def messages(document: sdg.Document) -> list[dict[str, Any]]:
        text = fill(template, document) if template else document.text
        chat = document.messages or [{"role": "user", "content": text}]
        return [{"role": "system", "content": system}, *chat] if system else chat

    yield messages


def check_places(template: str, run: sdg.Run) -> None:
    """Raise UsageError if a template names a column that the input lacks, or if the prompts are lists of messages."""
    import pyarrow.types as t

    assert run.schema is not None
    names = ["DOCUMENT", *dict.fromkeys(["id", *run.schema.names])]
    for name in PLACEHOLDER.findall(template):
        if name not in names:
            known = ", ".join(f"[[{known}]]" for known in names)
            raise sdg.UsageError(f"--prompt-template: the input has no column for [[{name}]]; available: {known}")
    if t.is_nested(run.schema.field(column := run.options.prompt_column).type):
        message = f"--prompt-template has no effect: --prompt-column {column} holds lists of messages"
        raise sdg.UsageError(f"{message}; omit the template, or name a column of text")


def fill(template: str, document: sdg.Document) -> str:
    """The template with its placeholders replaced. Placeholders in the replacements are left alone."""
    others = set(PLACEHOLDER.findall(template)) - {"DOCUMENT"}
    row = {"id": document.id, **document.row} if others else {}
    values = {"DOCUMENT": document.text, **{name: text_of(row[name]) for name in others}}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def text_of(value: Any) -> str:
    """A column's value for a prompt: text unchanged, anything else as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, default=sdg.plain).decode()
