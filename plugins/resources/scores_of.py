"""The resource `scores_of`: scores of several answers to one prompt, by a judge, a function or the majority."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

import sdg
from sdg_plugins.common.loading import named_object
from sdg_plugins.common.versions import version_of_module
from sdg_plugins.resources.ask import Ask

Messages = list[dict[str, Any]]
JUDGING = """Here are a task and an answer to it.

The task:
{task}

The answer:
{text}

Judge how good the answer is, from 0 (useless) to 10 (cannot be better). What counts: {criterion}. First give your \
reason in one or two sentences, then the score."""


@dataclass
class Grade:
    reason: str
    score: Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("scores_of", scores_of)


def preference(value: str) -> str:
    """A converter for --prefer; another content of the function's file makes it another run."""
    if value in {"judge", "majority"}:
        return value
    if not re.fullmatch(r".+:\w+", value):
        raise argparse.ArgumentTypeError(f"{value!r}: expected judge, majority or FILE.py:FUNCTION")
    try:
        function = named_object(value)
    except (ImportError, AttributeError, sdg.Error) as exc:
        raise argparse.ArgumentTypeError(f"{value}: {exc}") from exc
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    version = version_of_module(module) if module else ""
    return f"{value}@{version}" if version else value


def pattern(value: str) -> str:
    """A converter for regular expressions."""
    try:
        re.compile(value)
    except re.error as exc:
        raise argparse.ArgumentTypeError(f"{value!r} is not a regular expression: {exc}") from exc
    return value


@contextlib.asynccontextmanager
async def scores_of(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """A function that scores the samples of a prompt, as --prefer says."""
    how: str = run.options.prefer
    if how == "majority":
        yield sdg.PerRollout(lambda document, generate: functools.partial(by_majority, run.options.answer_pattern))
    elif how == "judge":
        to = "judge" if "judge" in run.models else ""
        async with run.plugins.resources["ask"].factory(run) as asking:
            yield sdg.PerRollout(
                lambda document, generate: functools.partial(
                    by_judge, asking.make(document, generate), run.options.criterion.strip(), to
                )
            )
    else:
        score = named_object(how.partition("@")[0])
        yield sdg.PerRollout(lambda document, generate: functools.partial(by_function, score))


async def by_judge(
    ask: Ask, criterion: str, to: str, document: sdg.Document, messages: Messages, replies: list[sdg.Reply]
) -> list[tuple[float, str | None]]:
    """The judge's scores, with its reasons."""
    task = "\n\n".join(str(message.get("content")) for message in messages)

    async def grade(reply: sdg.Reply) -> tuple[float, str | None]:
        question = JUDGING.format(criterion=criterion, task=task, text=reply.text)
        grade = await ask(question, Grade, to=to)
        return float(grade.score), grade.reason

    return list(await asyncio.gather(*[grade(reply) for reply in replies]))


async def by_majority(
    answer_pattern: str | None, document: sdg.Document, messages: Messages, replies: list[sdg.Reply]
) -> list[tuple[float, str | None]]:
    """For each sample the share of samples with the same answer."""
    answers = [answer_in(reply.text, answer_pattern) for reply in replies]
    counts = Counter(answer for answer in answers if answer)
    return [(counts[answer] / len(replies), None) for answer in answers]


def answer_in(text: str, answer_pattern: str | None) -> str:
    """The part of a text that is compared: all of it, or the last match of a pattern."""
    if answer_pattern:
        found = list(re.finditer(answer_pattern, text))
        text = (found[-1][1] if found[-1].groups() else found[-1][0]) if found else ""
    return sdg.one_line(text).strip(" .").casefold()


async def by_function(
    score: Callable[..., Any], document: sdg.Document, messages: Messages, replies: list[sdg.Reply]
) -> list[tuple[float, str | None]]:
    """The scores of a function of the user's."""
    values = [score(document, reply.text) for reply in replies]
    return [(float(await value if inspect.isawaitable(value) else value), None) for value in values]
