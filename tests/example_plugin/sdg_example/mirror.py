"""A server in the run's own process, which answers with the prompt's last word."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

import sdg

MODEL = "mirror"


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("mirror", mirror)


@contextlib.asynccontextmanager
async def mirror(run: sdg.Run) -> AsyncIterator[list[str]]:
    """Answer with the last word of the prompt."""
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield [f"http://127.0.0.1:{runner.addresses[0][1]}/v1"]
    finally:
        await runner.cleanup()


async def models(request: web.Request) -> web.Response:
    """List the only model."""
    return web.json_response({"data": [{"id": MODEL}]})


async def answer(request: web.Request) -> web.Response:
    """Respond in the format of OpenAI's API."""
    payload = await request.json()
    word = payload["messages"][-1]["content"].split()[-1]
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": word}}
    return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
