"""A server without a language model, for demonstrations: its responses are sentences of the prompt."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import xxhash

import sdg
from sdg_plugins.common.state import DEMO_MODEL as MODEL

if TYPE_CHECKING:
    from aiohttp import web

DIMENSIONS = 64  # of a vector, unless others are asked for
RATE = 100.0  # responses per second: slow enough to watch a run, to stop it and to resume it


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("demo", demo)


@contextlib.asynccontextmanager
async def demo(run: sdg.Run) -> AsyncIterator[list[str]]:
    """Respond with the most central sentences of the prompt: a demonstration without a language model."""
    from aiohttp import web

    if run.options.model not in {None, MODEL}:
        raise sdg.UsageError(f"--model {run.options.model} requires a server: --base-url URL, or --server vllm")
    files = "" if run.options.input else "--input YOUR_FILES "
    sdg.say(
        "this is a demonstration without a language model: its responses are sentences of the document. "
        f"To use a model: {files}--base-url http://HOST:PORT"
    )
    app = web.Application(client_max_size=1 << 30, middlewares=[rate_limit()])
    app.add_routes(
        [
            web.get("/v1/models", list_models),
            web.post("/v1/chat/completions", complete),
            web.post("/v1/completions", complete),
            web.post("/v1/embeddings", embed),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield [f"http://127.0.0.1:{runner.addresses[0][1]}"]
    finally:
        await runner.cleanup()


def rate_limit() -> Any:
    """A middleware that starts at most RATE responses per second."""
    from aiohttp import web

    turn = 0.0

    @web.middleware
    async def wait(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        nonlocal turn
        if request.method == "POST":
            now = asyncio.get_running_loop().time()
            turn = max(now, turn + 1 / RATE)
            await asyncio.sleep(turn - now)
        try:
            return await handler(request)
        except ConnectionError:  # the process that has asked was killed; see --processes
            return web.Response(status=499)

    return wait


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/models."""
    from aiohttp import web

    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "sdg"}]})


async def complete(request: web.Request) -> web.Response:
    """POST /v1/chat/completions and /v1/completions."""
    from aiohttp import web

    payload = await request.json()
    if payload.get("model") != MODEL:
        return web.json_response({"error": {"message": f"the only model is {MODEL}", "code": 404}}, status=404)
    chat = "messages" in payload
    contents = [message.get("content") for message in payload["messages"]] if chat else [payload.get("prompt")]
    prompt = max(["", *map(text_of, contents)], key=len)  # the one with the document
    document = without_instruction(prompt)
    response_format = payload.get("response_format") or {}
    if response_format.get("type") == "json_schema":
        completion = json.dumps(by_schema(response_format["json_schema"]["schema"], document))
    else:
        completion = central_sentences(document, payload.get("max_tokens") or 100)
    choice = {"message": {"role": "assistant", "content": completion}} if chat else {"text": completion}
    choices = [{"index": i, "finish_reason": "stop", **choice} for i in range(payload.get("n") or 1)]
    tokens = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(completion.split()) * len(choices)}
    body = {"id": "demo", "object": "chat.completion" if chat else "text_completion", "created": int(time.time())}
    usage = {**tokens, "total_tokens": sum(tokens.values())}
    return web.json_response({**body, "model": MODEL, "choices": choices, "usage": usage})


def without_instruction(prompt: str) -> str:
    """The document in a prompt: an instruction is a paragraph before or after it."""
    paragraphs = prompt.split("\n\n")
    if len(paragraphs) == 1:
        return prompt
    return "\n\n".join(paragraphs[1:] if len(paragraphs[0]) < len(paragraphs[-1]) else paragraphs[:-1])


async def embed(request: web.Request) -> web.Response:
    """POST /v1/embeddings: counts of words, folded into a few numbers, so that texts with equal words are near."""
    from aiohttp import web

    payload = await request.json()
    given = payload.get("input")
    texts = given if isinstance(given, list) else [given]
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": word_vector(str(text), payload.get("dimensions") or DIMENSIONS),
        }
        for i, text in enumerate(texts)
    ]
    tokens = sum(len(str(text).split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return web.json_response({"object": "list", "model": MODEL, "data": data, "usage": usage})


def word_vector(text: str, dimensions: int) -> list[float]:
    """How often each word occurs, as a vector of length 1: a word's place is its hash."""
    vector = [0.0] * dimensions
    for word in re.findall(r"\w+", text.lower()):
        vector[xxhash.xxh3_64_intdigest(word.encode()) % dimensions] += 1.0
    length = math.sqrt(sum(number * number for number in vector)) or 1.0
    return [number / length for number in vector]


def text_of(content: Any) -> str:
    """The text of a message's content, which may be a list of parts: images and the like are left out."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n\n".join(text for text in texts if isinstance(text, str))


def by_schema(schema: dict[str, Any], text: str) -> Any:
    """A value that a JSON schema allows, made of a text: strings are its sentences, the rest depends on its length.

    Supports the schemas that pydantic generates for dataclasses and models.
    """
    sentences, ranks = ranked_sentences(text)
    central = itertools.cycle([sentences[i] for i in ranks] or [text])
    number = len(text)

    def value(part: dict[str, Any]) -> Any:
        if "$ref" in part:
            return value(schema["$defs"][part["$ref"].rpartition("/")[2]])
        if choices := part.get("enum") or part.get("anyOf"):
            return choices[number % len(choices)] if "enum" in part else value(choices[0])
        match part.get("type"):
            case "object":
                return {name: value(inner) for name, inner in part.get("properties", {}).items()}
            case "array":
                return [value(part.get("items", {})) for _ in range(max(2, part.get("minItems", 0)))]
            case "integer" | "number":
                return min(part.get("minimum", 0) + number % 10, part.get("maximum", number))
            case "boolean":
                return number % 2 == 0
        return part.get("const", next(central))

    return value(schema)


def ranked_sentences(text: str) -> tuple[list[str], list[int]]:
    """A text's sentences, and their indices, the most central sentence first.

    A sentence's score is the mean frequency of its words in the text (SumBasic; Nenkova and Vanderwende 2005).
    """
    sentences = [sdg.one_line(part) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
    words = [re.findall(r"[a-z]{4,}", sentence.lower()) for sentence in sentences]
    frequency = Counter(word for some in words for word in some)
    scores = [sum(frequency[word] for word in some) / (len(some) + 3) for some in words]
    return sentences, sorted(range(len(sentences)), key=lambda i: -scores[i])


def central_sentences(text: str, most: int) -> str:
    """The most central sentences of a text, at most three, in their order, with at most `most` words in all."""
    sentences, ranks = ranked_sentences(text)
    chosen: list[int] = []
    for i in ranks[:3]:
        if sum(len(sentences[j].split()) for j in [*chosen, i]) <= most:
            chosen.append(i)
    kept = " ".join(sentences[i] for i in sorted(chosen))
    return kept or " ".join(text.split()[:most])
