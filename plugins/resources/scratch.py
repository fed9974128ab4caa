"""The resources `temp_dir`, a temporary folder, and `rng`, reproducible random numbers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import sdg


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("temp_dir", temp_dir)
    register("rng", rng)


@contextlib.asynccontextmanager
async def temp_dir(run: sdg.Run) -> AsyncIterator[Path]:
    """A folder, as a Path, that is deleted when the run ends."""
    folder = tempfile.TemporaryDirectory(prefix="sdg-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.to_thread(folder.cleanup)


@contextlib.asynccontextmanager
async def rng(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """A random.Random for each rollout, seeded with --seed, the document's id and the rollout's index."""

    def make(document: sdg.Document, generate: sdg.Generate) -> random.Random:
        return random.Random(f"{run.options.seed} {generate.index} {document.id}".encode(errors="surrogatepass"))

    yield sdg.PerRollout(make)
