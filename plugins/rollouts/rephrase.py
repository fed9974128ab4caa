"""The rollout `rephrase`: the document rewritten in other styles, as pretraining data from web text.

WRAP (Maini et al. 2024) and Nemotron-CC (Su et al. 2024) have shown with a few styles that this helps; later work has
shown it with these and more styles at scale. The wording of the prompts is our own.
"""

from __future__ import annotations

import asyncio
from typing import TypedDict

import sdg

STYLES = {
    "article": "as an encyclopedia would: in clear, neutral, well ordered prose",
    "dialogue": "as a talk between a person who wants to understand it and one who explains it step by step",
    "distill": "in as few words as its facts allow, without losing one of them",
    "faq": "as questions that a reader would have, from the basic to the subtle, each with a full answer of its own",
    "math": "as a mathematical word problem built from its facts and numbers, followed by a solution in small steps",
    "simple": "for a child of ten: in short sentences, with everyday words and examples",
    "table": "as a table in Markdown that has all of its facts, followed by one question on the table and its answer",
    "tutorial": "as a tutorial that starts from what a beginner knows, with numbered steps and an example for each",
}
# The document comes first: servers have it in their prefix cache when the next style is asked for.
PROMPT = """{text}

Rewrite the text above {style}. Take the facts from the text alone, leave out advertising and navigation, and answer \
with nothing but the new text."""


class Rephrased(TypedDict):
    style: str
    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: sdg.Usage | None


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = f"{', '.join(STYLES)}, or all; repeatable, with one result per style [faq]"
    parser.add_argument("--style", metavar="NAME", action="append", choices=[*STYLES, "all"], help=text)


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("rephrase", rephrase)


async def rephrase(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> list[Rephrased]:
    """Rewrite a document in each --style; a style that fails does not affect the others."""

    async def rewrite(style: str) -> Rephrased | sdg.RequestFailed:
        try:
            reply = await generate(PROMPT.format(style=STYLES[style], text=document.text))
        except sdg.RequestFailed as exc:
            return exc
        return {
            "style": style,
            "text": reply.text,
            "reasoning": reply.reasoning,
            "finish_reason": reply.finish_reason,
            "usage": reply.usage,
        }

    given = run.options.style or ["faq"]
    styles = list(STYLES) if "all" in given else list(dict.fromkeys(given))
    outcomes = await asyncio.gather(*[rewrite(style) for style in styles])
    results = [outcome for outcome in outcomes if not isinstance(outcome, sdg.RequestFailed)]
    if not results:
        raise next(outcome for outcome in outcomes if isinstance(outcome, sdg.RequestFailed))
    return results
