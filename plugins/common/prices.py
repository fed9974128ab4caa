"""What tokens cost: the prices of a run's models, and the tokens that a budget counts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import sdg

MILLION = 1_000_000
CHARACTERS = 4  # of a text per token, for servers that report no usage


class Tokens(NamedTuple):
    """Tokens of prompts and of completions."""

    prompt: float = 0.0
    completion: float = 0.0

    def __add__(self, other: object) -> Tokens:
        assert isinstance(other, Tokens)
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def times(self, factor: float) -> Tokens:
        """As many times as many."""
        return Tokens(self.prompt * factor, self.completion * factor)

    @property
    def total(self) -> float:
        """Of both kinds."""
        return self.prompt + self.completion


def tokens_of(counts: Mapping[str, float], models: Iterable[str] = ()) -> dict[str, Tokens]:
    """The tokens of each model in a run's counts, those that were estimated included; "" is the run's own model."""
    names = ("prompt_tokens", "completion_tokens")
    found = {
        name: Tokens(*(counts.get(prefix + key, 0) + counts.get(f"{prefix}estimated_{key}", 0) for key in names))
        for name, prefix in {"": "", **{name: f"models.{name}." for name in models}}.items()
    }
    for name in models:  # those of the run are of all of its models
        found[""] = found[""] + found[name].times(-1)
    return found


def price_of(options: argparse.Namespace, model: str = "") -> Tokens | None:
    """The prices of a million tokens of a model; those of the run's own model if it has none, None if neither has."""
    for of in (options.models.get(model, options), options):
        if of.price_input is not None or of.price_output is not None:
            return Tokens(of.price_input or 0.0, of.price_output or 0.0)
    return None


def cost_of(options: argparse.Namespace, tokens: Mapping[str, Tokens]) -> float | None:
    """What the tokens of each model cost together; None without prices."""
    if price_of(options) is None and not any(price_of(options, name) for name in tokens):
        return None
    prices = {name: price_of(options, name) or Tokens() for name in tokens}
    return sum((t.prompt * prices[n].prompt + t.completion * prices[n].completion) / MILLION for n, t in tokens.items())


def estimated_tokens(request: sdg.Request, reply: sdg.Reply) -> Tokens:
    """The tokens of a request and its response, from the length of their texts."""
    choices = reply.choices or (reply,)
    received = sum(len(choice.text) + len(choice.reasoning or "") for choice in choices)
    return Tokens(-(-len(request.body) // CHARACTERS), -(-received // CHARACTERS))


def in_money(amount: float) -> str:
    """An amount of the prices' currency: cents, or as many digits as a small one needs."""
    return f"{amount:,.2f}" if amount >= 1 or not amount else f"{amount:.3g}"
