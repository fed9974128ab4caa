"""The resource `openai`: an `AsyncOpenAI` whose calls go through the engine, for libraries that need one.

A call whose `model` is the name of a further model goes there; so does one with `extra_body={"to": NAME}`. Calls are
cached, limited, retried and counted like those of `generate`. The SDK takes more than a millisecond of CPU time per
call, so prefer `generate` unless something needs the SDK.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Collection
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
    """An AsyncOpenAI whose calls go through the engine; an empty model name stands for the run's model."""
    try:
        import httpx
        from openai import AsyncOpenAI
    except ImportError as exc:
        message = f"the resource openai needs a package that is missing ({exc}): pip install 'sdg-engine[openai]'"
        raise sdg.PluginError(message) from exc

    def make(document: sdg.Document, generate: sdg.Generate) -> AsyncOpenAI:
        answering = functools.partial(respond, generate, set(run.models))
        transport = httpx.MockTransport(answering)  # calls a function, opens no connection
        client: Any = httpx.AsyncClient(transport=transport, trust_env=False, timeout=None)
        # The engine retries, and has the server's address and the key.
        return AsyncOpenAI(base_url="http://sdg.invalid/v1", api_key="sdg", max_retries=0, http_client=client)

    yield sdg.PerRollout(make)


async def respond(generate: sdg.Generate, models: Collection[str], request: httpx.Request) -> httpx.Response:
    """Respond to a request of the SDK. Failures have the form that the SDK converts to its own exceptions."""
    import httpx

    if not request.url.path.endswith("/completions"):
        return error_response(404, f"{request.url.path}: the resource openai has only chat.completions and completions")
    payload = json.loads(request.content)
    if payload.get("stream"):
        return error_response(400, "stream=True is not supported: responses are stored as a whole for replays")
    to = payload.pop("to", "") or (payload["model"] if payload.get("model") in models else "")
    if not payload.get("model") or payload["model"] == to:
        payload.pop("model", None)
    try:
        _, body = await generate.raw(payload, to=to)
    except sdg.RequestFailed as exc:
        if exc.cause == "timeout":
            raise httpx.ReadTimeout(str(exc), request=request) from exc
        if exc.cause == "context" and exc.status is None:  # libraries know by this code that the prompt is too long
            return error_response(400, str(exc), code="context_length_exceeded")
        return error_response(exc.status or 502, str(exc))
    return httpx.Response(200, content=body, headers={"Content-Type": "application/json"})


def error_response(status: int, message: str, code: str | None = None) -> httpx.Response:
    """An error in the form of OpenAI's servers. It asks the SDK not to retry, because the engine already has."""
    import httpx

    error = {"message": message, "type": "sdg", "code": code or status}
    return httpx.Response(status, json={"error": error}, headers={"x-should-retry": "false"})
