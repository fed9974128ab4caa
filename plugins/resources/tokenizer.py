"""The resource `tokenizer`, for rollouts that count, cut and split texts on their own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import sdg

if TYPE_CHECKING:
    from sdg_plugins.truncation.fitting import Fitter


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("tokenizer", tokenizer)


@contextlib.asynccontextmanager
async def tokenizer(run: sdg.Run) -> AsyncIterator[Tokenizer]:
    """Count tokens as the model does, and cut or split texts by tokens."""
    assert run.fitter
    yield Tokenizer(run.fitter)


class Tokenizer:
    """The model's tokenizer: the server's, the one in the model's files or, without these, an estimate."""

    def __init__(self, fitter: Fitter) -> None:
        self._fitter = fitter

    async def count(self, text: str) -> int:
        """Tokens of a text on its own, without those that a chat template adds."""
        return await self._fitter.tokens.count(text)

    async def cut(self, text: str, tokens: int) -> str:
        """The longest beginning of a text with at most `tokens` tokens that ends with a sentence, line or word."""
        from sdg_plugins.truncation.cutting import SENTENCE, WORD

        return text[: await self._fitter.fitting_length(text, tokens, (SENTENCE, WORD), strip=True)].rstrip()

    async def split(self, text: str, tokens: int) -> list[str]:
        """Split a text into parts of at most `tokens` tokens that end with paragraphs or sentences.

        The parts joined are the text.
        """
        ends = await self._fitter.part_ends(text, tokens)
        return [text[start:end] for start, end in itertools.pairwise([0, *ends])]

    async def context(self) -> int | None:
        """Tokens that prompt and completion may have together; None if that is not known yet."""
        return await self._fitter.context()
