"""A server that is already running: a hosted API, or an engine that was started elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import sdg


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("endpoint", endpoint)


@contextlib.asynccontextmanager
async def endpoint(run: sdg.Run) -> AsyncIterator[list[str]]:
    """Use the servers of --base-url, else of the variable OPENAI_BASE_URL."""
    urls = run.options.base_url or [os.environ.get("OPENAI_BASE_URL", "")]
    if not all(urls):
        raise sdg.UsageError("--server endpoint requires --base-url, or OPENAI_BASE_URL in the environment")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise sdg.UsageError(f"OPENAI_BASE_URL {sdg.redact(url)}: must begin with http:// or https://")
    yield urls
