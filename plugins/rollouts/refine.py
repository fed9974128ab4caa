"""The rollout `refine`: a draft, a critique of it, and a rewritten text (Self-Refine; Madaan et al. 2023)."""

from __future__ import annotations

from typing import TypedDict

import sdg

TASK = "Explain what the text above says to a reader who does not know the subject."
CRITIQUE = """Now be its strictest reader: what is wrong, missing, unclear or superfluous in that? Name the few points \
that matter most, each with what to do about it."""
REWRITE = "Write it once more, with all of these points fixed. Answer with the text alone."


class Refined(TypedDict):
    text: str
    draft: str
    critique: str
    finish_reason: str | None


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "what to write about a document, or @FILE [an explanation]"
    parser.add_argument("--task", metavar="TEXT", type=sdg.text_or_file, help=text)


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("refine", refine)


async def refine(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> Refined:
    """Write what --task asks for, criticize the draft, and rewrite it."""
    task = (run.options.task or TASK).strip()
    chat = [{"role": "user", "content": f"{document.text}\n\n{task}"}]
    draft = await generate(chat)
    chat += [{"role": "assistant", "content": draft.text}, {"role": "user", "content": CRITIQUE}]
    critique = await generate(chat)
    chat += [{"role": "assistant", "content": critique.text}, {"role": "user", "content": REWRITE}]
    final = await generate(chat)
    return {
        "text": final.text,
        "draft": draft.text,
        "critique": critique.text,
        "finish_reason": final.finish_reason,
    }
