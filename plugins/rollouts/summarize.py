"""The rollout `summarize`: the smallest useful plugin."""

from __future__ import annotations

import sdg

PROMPT = "{text}\n\nSummarize the text above in one paragraph."


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("summarize", summarize)


async def summarize(document: sdg.Document, generate: sdg.Generate) -> sdg.Reply:
    """Summarize a document in one paragraph."""
    return await generate(PROMPT.format(text=document.text))
