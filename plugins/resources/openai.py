"""The resource `openai`: an `AsyncOpenAI` whose calls go through the engine, for rollouts and libraries that take one.

Its calls are cached, limited, retried and counted like those of `generate`. The SDK costs more than a millisecond of
CPU a call, so that `generate` is the better choice where nothing needs the SDK.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI


@sdg.hookimpl
def register_resources(register: sdg.RegisterResources) -> None:
    register("openai", openai)


@contextlib.asynccontextmanager
async def openai(run: sdg.Run) -> AsyncIterator[sdg.PerRollout]:
    """An AsyncOpenAI whose calls go through the engine; an empty model name is the run's."""
    try:
        import httpx
        from openai import AsyncOpenAI
    except ImportError as problem:
        raise sdg.PluginError(
            f"the resource openai needs a package more ({problem}): pip install 'sdg[openai]'"
        ) from problem

    def make(document: sdg.Document, generate: sdg.Generate) -> AsyncOpenAI:
        transport = httpx.MockTransport(functools.partial(exchange, generate))  # has no connections, only a function
        client: Any = httpx.AsyncClient(transport=transport, trust_env=False, timeout=None)
        # The engine retries, has the server's address, and the key.
        return AsyncOpenAI(base_url="http://sdg.invalid/v1", api_key="sdg", max_retries=0, http_client=client)

    yield sdg.PerRollout(make)


async def exchange(generate: sdg.Generate, request: httpx.Request) -> httpx.Response:
    """Answer a request of the SDK's. What fails has the form that the SDK turns into its own exceptions."""
    import httpx

    if not request.url.path.endswith("/completions"):
        return refusal(404, f"{request.url.path}: the resource openai has chat.completions and completions only")
    payload = json.loads(request.content)
    if payload.get("stream"):
        return refusal(400, "stream=True: answers are kept as a whole, to be replayed; ask without it")
    if not payload.get("model"):
        payload.pop("model", None)
    try:
        _, body = await generate.raw(payload)
    except sdg.RequestFailed as problem:
        if problem.cause == "timeout":
            raise httpx.ReadTimeout(str(problem), request=request) from problem
        if problem.cause == "context" and problem.status is None:  # by that code libraries know that it is too long
            return refusal(400, str(problem), code="context_length_exceeded")
        return refusal(problem.status or 502, str(problem))
    return httpx.Response(200, content=body, headers={"Content-Type": "application/json"})


def refusal(status: int, message: str, code: str | None = None) -> httpx.Response:
    """An error as OpenAI's servers have it, which nobody should try again: the engine has."""
    import httpx

    error = {"message": message, "type": "sdg", "code": code or status}
    return httpx.Response(status, json={"error": error}, headers={"x-should-retry": "false"})
