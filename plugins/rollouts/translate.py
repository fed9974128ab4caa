"""The rollout `translate`."""

from __future__ import annotations

import sdg

PROMPT = """{text}

Translate the text above into {language}. Keep its meaning, tone, and layout: headings, lists and paragraphs stay, \
code and names do too. Answer with the translation alone."""


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument("--target-language", metavar="NAME", default="French", help="name of a language [French]")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("translate", translate)


async def translate(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> sdg.Reply:
    """Translate a document into --target-language."""
    return await generate(PROMPT.format(language=run.options.target_language, text=document.text))
