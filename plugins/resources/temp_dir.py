"""The resource `temp_dir`: a temporary folder."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import sdg


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("temp_dir", temp_dir)


@contextlib.asynccontextmanager
async def temp_dir(run: sdg.Run) -> AsyncIterator[Path]:
    """A folder, as a Path, that is deleted when the run ends."""
    folder = tempfile.TemporaryDirectory(prefix="sdg-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        await asyncio.to_thread(folder.cleanup)
