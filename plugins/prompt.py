"""Any prompt: a template around the document, a system prompt before it."""

import argparse
from typing import Any

import sdg


@sdg.hookimpl
def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--prompt-template", metavar="T", type=template, help="[[DOCUMENT]] is the text; or @FILE")
    parser.add_argument("--system-prompt", metavar="S", type=sdg.text_or_file, help="the system message; or @FILE")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("prompt", prompt)


def template(value: str) -> str:
    """A template's text, from the option or the file that it names."""
    text = sdg.text_or_file(value)
    if "[[DOCUMENT]]" not in text:
        raise argparse.ArgumentTypeError("the template has no [[DOCUMENT]], so every prompt would be the same")
    return text


async def prompt(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> sdg.Reply:
    """Send the document as it is, or in --prompt-template, after --system-prompt."""
    wanted = run.options.prompt_template
    if wanted and document.messages:
        raise sdg.BadDocument("is a list of messages, which --prompt-template has no place for")
    text = wanted.replace("[[DOCUMENT]]", document.text) if wanted else document.text
    messages: list[dict[str, Any]] = document.messages or [{"role": "user", "content": text}]
    if run.options.system_prompt:
        messages = [{"role": "system", "content": run.options.system_prompt}, *messages]
    return await generate(messages)
