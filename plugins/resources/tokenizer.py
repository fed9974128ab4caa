from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator

import sdg
from sdg_plugins.truncation.cutting import SENTENCE, WORD
from sdg_plugins.truncation.fitting import Fitter


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("tokenizer", tokenizer)


@contextlib.asynccontextmanager
async def tokenizer(run: sdg.Run) -> AsyncIterator[Tokenizer]:
    """Count tokens as the model does, and cut or split texts: for rollouts that want to do it themselves."""
    assert run.fitter
    yield Tokenizer(run.fitter)


class Tokenizer:
    """The model's tokenizer, wherever it is: at the server, in the model's files or, failing these, an estimate."""

    def __init__(self, fitter: Fitter) -> None:
        self._fitter = fitter

    async def count(self, text: str) -> int:
        """Tokens of a text by itself, without those that a chat template adds."""
        return await self._fitter.tokens.count(text)

    async def cut(self, text: str, tokens: int) -> str:
        """As much of a text's beginning as has `tokens` tokens or fewer; it ends with a sentence, line or word."""
        return text[: await self._fitter.fitting_length(text, tokens, (SENTENCE, WORD), strip=True)].rstrip()

    async def split(self, text: str, tokens: int) -> list[str]:
        """A text in parts of `tokens` tokens or fewer, which end with paragraphs or sentences; joined they are it."""
        ends = await self._fitter.part_ends(text, tokens)
        return [text[start:end] for start, end in itertools.pairwise([0, *ends])]

    async def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None if nobody has said it yet."""
        return await self._fitter.context()
