"""Any prompt: a template around the document and the other columns of its row, a system prompt before it."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

import sdg

PLACE = re.compile(r"\[\[([^\[\]]+)\]\]")


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "[[DOCUMENT]] is the text, [[NAME]] a column; or @FILE"
    parser.add_argument("--prompt-template", metavar="T", type=template, help=text)
    parser.add_argument("--system-prompt", metavar="S", type=sdg.text_or_file, help="the system message; or @FILE")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("prompt", prompt)


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("prompt_of", prompt_of)


def template(value: str) -> str:
    """A template's text, from the option or the file that it names."""
    text = sdg.text_or_file(value)
    if not PLACE.search(text):
        raise argparse.ArgumentTypeError("the template has no [[DOCUMENT]], so every prompt would be the same")
    return text


async def prompt(
    document: sdg.Document, generate: sdg.Generate, prompt_of: Callable[[sdg.Document], list[dict[str, Any]]]
) -> sdg.Reply:
    """Send the document as it is, or in --prompt-template, after --system-prompt."""
    return await generate(prompt_of(document))


@contextlib.asynccontextmanager
async def prompt_of(run: sdg.Run) -> AsyncIterator[Callable[[sdg.Document], list[dict[str, Any]]]]:
    """A function that makes a document's messages, by --prompt-template and --system-prompt."""
    wanted, system = run.options.prompt_template, run.options.system_prompt
    if wanted:
        check_places(wanted, run)

    def messages(document: sdg.Document) -> list[dict[str, Any]]:
        text = filled(wanted, document) if wanted else document.text
        chat = document.messages or [{"role": "user", "content": text}]
        return [{"role": "system", "content": system}, *chat] if system else chat

    yield messages


def check_places(wanted: str, run: sdg.Run) -> None:
    """See that the input has what the template asks for. Raises UsageError."""
    import pyarrow.types as t

    assert run.schema is not None
    names = ["DOCUMENT", *dict.fromkeys(["id", *run.schema.names])]
    for name in PLACE.findall(wanted):
        if name not in names:
            known = ", ".join(f"[[{known}]]" for known in names)
            raise sdg.UsageError(f"--prompt-template: the input has no column for [[{name}]]; there are: {known}")
    column = run.options.prompt_column
    if t.is_nested(run.schema.field(column).type):
        reason = f"--prompt-column {column} holds lists of messages, which are sent as they are"
        raise sdg.UsageError(f"--prompt-template has no use: {reason}; leave it out, or name a column of text")


def filled(wanted: str, document: sdg.Document) -> str:
    """The template with its places filled in. What is filled in is not looked at again."""
    others = set(PLACE.findall(wanted)) - {"DOCUMENT"}
    row = {"id": document.id, **document.row} if others else {}
    values = {"DOCUMENT": document.text, **{name: text_of(row[name]) for name in others}}
    return PLACE.sub(lambda place: values[place[1]], wanted)


def text_of(value: Any) -> str:
    """A column's value in a prompt: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, default=sdg.plain).decode()
