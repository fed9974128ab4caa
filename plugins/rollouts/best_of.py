"""The rollout `best-of`: several samples of one prompt, of which the best are kept.

What is best is decided by a judge (the further model `judge` if there is one), by a function of yours, or by the
majority: the answer that most samples give.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypedDict

import sdg
from sdg_plugins.resources import scores_of as scoring
from sdg_plugins.resources.scores_of import Messages, pattern, preference

CRITERION = "correct, complete, clear, and exactly what was asked for"
JUDGING = scoring.JUDGING


class Best(TypedDict):
    text: str
    score: float
    reason: str | None
    usage: sdg.Usage | None
    reasoning: str | None
    finish_reason: str | None


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument("--samples", metavar="N", type=sdg.number(int, 2), default=4, help="samples to draw [4]")
    parser.add_argument(
        "--keep-samples", metavar="N", type=sdg.number(int, 1), default=1, help="best samples to keep [1]"
    )
    text = "judge, majority, or FILE.py:FUNCTION with score(document, text) [judge]"
    parser.add_argument("--prefer", metavar="HOW", type=preference, default="judge", help=text)
    text = f"what the judge looks at, or @FILE [{CRITERION}]"
    parser.add_argument("--criterion", metavar="TEXT", type=sdg.text_or_file, default=CRITERION, help=text)
    text = "regular expression for the part of a text that the majority is about; its last match counts"
    parser.add_argument("--answer-pattern", metavar="RE", type=pattern, help=text)


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("best-of", best_of)


async def best_of(
    document: sdg.Document,
    generate: sdg.Generate,
    prompt_of: Callable[[sdg.Document], Messages],
    scores_of: Callable[..., Any],
    run: sdg.Run,
) -> list[Best]:
    """Draw --samples answers to a prompt, and keep those that --prefer decides for, the best first."""
    messages = prompt_of(document)
    replies = await asyncio.gather(*[generate(messages) for _ in range(run.options.samples)])
    scores: list[tuple[float, str | None]] = await scores_of(document, messages, replies)
    order = sorted(range(len(replies)), key=lambda i: -scores[i][0])[: run.options.keep_samples]
    return [
        {
            "text": replies[i].text,
            "score": scores[i][0],
            "reason": scores[i][1],
            "usage": replies[i].usage,
            "reasoning": replies[i].reasoning,
            "finish_reason": replies[i].finish_reason,
        }
        for i in order
    ]
