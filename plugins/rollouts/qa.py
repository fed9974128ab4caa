"""The rollout `qa`: questions and answers about the document, as validated JSON."""

from __future__ import annotations

from dataclasses import dataclass

import sdg
from sdg_plugins.resources.ask import Ask

PROMPT = """{text}

Write {count} questions on the text above, and answer them. Each question can be understood without the text, asks for \
something that matters in it, and is unlike the others; each answer is complete, and nothing in it goes beyond the \
text."""


@dataclass
class Pair:
    question: str
    answer: str


@dataclass
class Pairs:
    pairs: list[Pair]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    kind = sdg.number(int, 1)
    parser.add_argument("--pairs", metavar="N", type=kind, default=5, help="questions per document [5]")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("qa", qa)


async def qa(document: sdg.Document, generate: sdg.Generate, ask: Ask, run: sdg.Run) -> list[Pair]:
    """Write --pairs questions about a document with their answers; each pair is a result."""
    return (await ask(PROMPT.format(count=run.options.pairs, text=document.text), Pairs)).pairs
