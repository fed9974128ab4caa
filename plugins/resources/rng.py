"""The resource `rng`: random numbers that can be reproduced."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import sdg


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("rng", rng)


@contextlib.asynccontextmanager
async def rng(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """A random.Random for each rollout, seeded with --seed, the document's id and the rollout's index."""

    def make(document: sdg.Document, generate: sdg.Generate) -> random.Random:
        return random.Random(f"{run.options.seed} {generate.index} {document.id}".encode(errors="surrogatepass"))

    yield sdg.PerRollout(make)
