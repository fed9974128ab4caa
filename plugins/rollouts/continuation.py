"""The rollout `continue`: the document is the beginning of a long text, and each request adds a part to it."""

from __future__ import annotations

from typing import TypedDict

import sdg

PROMPT = """{text}

The text above is the beginning of a long one. Continue it where it stops, in its style and language, by one \
substantial part of what is still to come. Answer with the continuation alone."""
AGAIN = (
    "Continue by the next part, without repeating anything. If the text is complete, answer with the word END alone."
)


class Continued(TypedDict):
    text: str
    parts: int
    finish_reason: str | None


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument("--parts", metavar="N", type=sdg.number(int, 1), default=4, help="maximum parts to add [4]")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("continue", continue_text)


async def continue_text(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> Continued:
    """Continue a document part by part, up to --parts."""
    chat = [{"role": "user", "content": PROMPT.format(text=document.text)}]
    parts: list[str] = []
    while len(parts) < run.options.parts:
        reply = await generate(chat)
        if parts and reply.text.strip(" .*\n") == "END":
            break
        parts.append(reply.text.strip())
        # The chat only grows at its end, so servers have the rest of it in their prefix cache.
        chat += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": AGAIN}]
    return {"text": "\n\n".join(parts), "parts": len(parts), "finish_reason": reply.finish_reason}
