"""A rollout of two steps, with its own option and resource."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypedDict

import sdg

Glossary = dict[str, str]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument("--glossary", metavar="FILE.json", help="known words with their explanations")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("explain", explain)


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("glossary", glossary)


@contextlib.asynccontextmanager
async def glossary(run: sdg.Run) -> AsyncIterator[Glossary]:
    """The words of --glossary."""
    yield json.loads(Path(run.options.glossary).read_text()) if run.options.glossary else {}


class Explanation(TypedDict):
    word: str
    explanation: str
    known: bool


async def explain(document: sdg.Document, generate: sdg.Generate, glossary: Glossary) -> Explanation | None:
    """Explain the hardest word of a document."""
    answer = await generate(f"Name the hardest word of this text, nothing else:\n\n{document.text}", temperature=0)
    word = answer.text.strip().strip(".").lower()
    if not word:
        return None
    if word in glossary:
        return {"word": word, "explanation": glossary[word], "known": True}
    explanation = await generate(f"Explain the word {word!r} as it is used here:\n\n{document.text}")
    return {"word": word, "explanation": explanation.text, "known": False}
