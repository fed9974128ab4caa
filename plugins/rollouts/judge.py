"""The rollout `judge`: a score for each document by a rubric, and a threshold.

It asks the further model `judge` if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import sdg
from sdg_plugins.resources.ask import Ask

RUBRIC = """0 for spam, navigation or gibberish; 1 for little of use among much else; 2 for what is on a topic but \
shallow or disordered; 3 for a coherent text that teaches something; 4 for one that explains well, at a steady level; \
5 for one that could stand in a textbook."""
PROMPT = """{text}

Judge the text above by this rubric: {rubric} First give your reason in one or two sentences that name what decides, \
then the score."""


@dataclass
class Verdict:
    reason: str  # comes first: a score that follows its reason is better
    score: Literal[0, 1, 2, 3, 4, 5]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "meaning of the scores 0 to 5, or @FILE [educational value]"
    parser.add_argument("--rubric", metavar="TEXT", type=sdg.text_or_file, help=text)
    text = "filter documents with a lower score [0]"
    parser.add_argument("--min-score", metavar="N", type=sdg.number(int, 0, 5), default=0, help=text)


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("judge", judge)


async def judge(document: sdg.Document, generate: sdg.Generate, ask: Ask, run: sdg.Run) -> Verdict | None:
    """Score a document by --rubric, with a reason; filter it if the score is below --min-score."""
    rubric = (run.options.rubric or RUBRIC).strip()
    to = "judge" if "judge" in run.models else ""
    verdict = await ask(PROMPT.format(rubric=rubric, text=document.text), Verdict, to=to)
    return verdict if verdict.score >= run.options.min_score else None
