"""A real OpenAI-compatible HTTP server on loopback, programmed by the tests: a recorder first, a model never.

    with FakeServer() as server:
        server.behave(lambda payload, n: Status(500) if n == 1 else None)
        ...                                        # requests to server.url
        assert len(server.requests) == 2

A behaviour gets the payload and how often this very payload has been seen (from 1), and returns a text, an `Answer`,
one of the faults below, or None for the usual answer, which depends on the payload and on nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Payload = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A well-formed answer; `choices` replaces the list that `text` and its like would give."""

    text: str | None = None
    reasoning: str | None = None
    reasoning_key: str = "reasoning_content"
    tool_calls: list[Payload] | None = None
    logprobs: Payload | None = None
    finish_reason: str = "stop"
    choices: list[Payload] | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """An HTTP error with the body that OpenAI's servers give."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "scripted by the test"


@dataclass(frozen=True)
class Raw:
    """A body that is sent as it is."""

    body: bytes
    status: int = 200


@dataclass(frozen=True)
class Drop:
    """Close the connection, after `sent` bytes of an answer that announces more."""

    sent: int = 0


@dataclass(frozen=True)
class Hang:
    """Answer only after `release()`."""

    then: Any = None


@dataclass(frozen=True)
class Delay:
    """Answer after some seconds."""

    seconds: float
    then: Any = None


PROBE = "Hi"
Behaviour = Callable[[Payload, int], Any]

# vLLM's words
TOO_LONG = "This model's maximum context length is {} tokens. However, your prompt contains at least {} input tokens."


@dataclass
class Request:
    """One request, as it came; `answered` is when the last byte of its answer left, None if that never happened."""

    path: str
    headers: dict[str, str]
    payload: Payload
    time: float
    connection: int
    n: int
    answered: float | None = None

    @property
    def prompt(self) -> str:
        return prompt_of(self.payload)


def prompt_of(payload: Payload) -> str:
    """The text of the last message, or the prompt of a completion."""
    text = payload["prompt"] if "prompt" in payload else payload["messages"][-1]["content"]
    if isinstance(text, list):
        text = "\n".join(part["text"] for part in text if part["type"] == "text")
    assert isinstance(text, str)
    return text


def usual_text(payload: Payload) -> str:
    """The usual answer: a hash of all that may change an answer, and some words whose number varies."""
    asked = {name: value for name, value in payload.items() if name not in {"stream", "stream_options"}}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"answer {digest[:16]}" + " word" * int(digest[0], 16)


class FakeServer:
    """Starts on entering and stops on leaving; `stop` and `start` in between are a crash and a restart."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.requests: list[Request] = []
        self.probes: list[Request] = []  # the smallest possible requests, by which sdg finds out what a refusal means
        self.model_requests: list[Request] = []
        self.models = ["test-model"]
        self.listed: list[str] | None = None  # the list of models, if it names others
        self.list_status = 200
        self.redirect = ""  # where everything is redirected to
        self.only_streams = False
        self.break_streams = self.stall_streams = 0  # how many of the next streams break off or stall
        self.max_model_len: int | None = None  # as the list of models tells it
        self.count: Callable[[Payload], int] | None = None  # tokens of a prompt: makes /tokenize exist
        self.context: int | None = None  # prompts of more tokens are refused, as vLLM does
        self.tokenize_requests: list[Payload] = []
        self.api_key: str | None = None
        self.errors: list[BaseException] = []
        self.max_in_flight = 0
        self.in_flight = 0
        self.port = 0
        self._behaviour: Behaviour = lambda payload, n: None
        self._seen: Counter[str] = Counter()
        self._area = 0.0
        self._changed = 0.0
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server", daemon=True)

    # -- what tests use

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def release(self) -> None:
        """Answer whatever hangs, and let nothing hang any more."""
        self._loop.call_soon_threadsafe(self._released.set)

    def hold(self) -> None:
        """Let requests hang again."""
        self._loop.call_soon_threadsafe(self._released.clear)

    def forget(self) -> None:
        """Start a new recording, without what was sent before; whatever is scripted begins anew."""
        self._call(self._forget())

    async def _forget(self) -> None:
        for _ in range(20):  # the loop's turns until what a killed process has sent is accepted, read and recorded
            await asyncio.sleep(0)
        self.requests = []
        self.model_requests, self.probes = [], []
        self.tokenize_requests = []
        self._seen.clear()
        self._area = 0.0
        self.max_in_flight = self.in_flight

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for request in self.requests]

    @property
    def answered(self) -> list[Request]:
        return [request for request in self.requests if request.answered is not None]

    def mean_in_flight(self) -> float:
        """Requests in flight, averaged from the first request to the last change."""
        elapsed = self._changed - self.requests[0].time
        return self._area / elapsed if elapsed else 0.0

    # -- life

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        self._call(self._start())

    def stop(self) -> None:
        """End at once: open connections are reset, new ones are refused."""
        self._call(self._stop())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/{prefix:.*}v1/models", self._list_models)
        app.router.add_post("/{prefix:.*}v1/chat/completions", self._complete)
        app.router.add_post("/{prefix:.*}v1/completions", self._complete)
        app.router.add_post("/{prefix:.*}v1/embeddings", self._embed)
        app.router.add_post("/classify", self._classify)
        app.router.add_post("/tokenize", self._tokenize)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True, backlog=4096)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        for site in list(runner.sites):
            await site.stop()
        await asyncio.sleep(0.02)  # connections that the kernel has accepted already get their transports now
        if runner.server is not None:
            for connection in runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await runner.cleanup()
        await asyncio.sleep(0.02)  # aborted transports close their sockets in the loop's next turns

    # -- the protocol

    def _record(self, request: web.Request, payload: Payload) -> Request:
        key = request.path + json.dumps(payload, sort_keys=True)
        self._seen[key] += 1
        return Request(
            request.path, dict(request.headers), payload, time.monotonic(), id(request.transport), self._seen[key]
        )

    def _authorized(self, request: web.Request) -> bool:
        return self.api_key is None or request.headers.get("Authorization") == f"Bearer {self.api_key}"

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        self.model_requests.append(self._record(request, {}))
        if self.redirect:
            return web.Response(status=301, headers={"Location": f"{self.redirect}/models"})
        if self.list_status != 200:
            return _error(Status(self.list_status))
        if not self._authorized(request):
            return _error(Status(401, message="no valid API key"))
        extra = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "test", **extra}
            for name in self.listed or self.models
        ]
        return web.json_response({"object": "list", "data": models})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        payload = json.loads(await request.read())
        self.tokenize_requests.append(payload)
        if self.count is None:
            return _error(Status(404))
        if "messages" in payload or "prompt" in payload:
            return web.json_response({"count": self.count(payload), "max_model_len": self.max_model_len, "tokens": []})
        return _error(Status(422))

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        """Embeddings of one text or of several; the behaviour may give an error."""
        record = self._record(request, json.loads(await request.read()))
        self.requests.append(record)
        fault = self._behaviour(record.payload, record.n)
        if isinstance(fault, Status):
            return _error(fault)
        if isinstance(fault, Raw):
            return web.Response(status=fault.status, body=fault.body, content_type="application/json")
        texts = record.payload["input"]
        texts = [texts] if isinstance(texts, str) else texts
        data = [{"index": i, "embedding": [len(text) / 8, 0.1, *[0.5] * 6]} for i, text in enumerate(texts)]
        usage = {"prompt_tokens": sum(len(text.split()) for text in texts)}
        record.answered = time.monotonic()
        return web.json_response({"object": "list", "data": data, "model": record.payload["model"], "usage": usage})

    async def _classify(self, request: web.Request) -> web.StreamResponse:
        """An endpoint beside the API, as vLLM has it."""
        record = self._record(request, json.loads(await request.read()))
        self.requests.append(record)
        return web.json_response({"label": "long" if len(record.payload["input"]) > 10 else "short"})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        record = self._record(request, json.loads(await request.read()))
        if self.redirect:
            return web.Response(status=301, headers={"Location": self.redirect})
        if self.only_streams and not record.payload.get("stream"):
            return _error(Status(400, message="This model only supports stream mode."))
        if not record.payload or record.prompt == PROBE:
            return await self._answer_probe(request, record)
        self.requests.append(record)
        self._count(+1)
        try:
            if not self._authorized(request):
                return _error(Status(401, message="no valid API key"))
            if record.payload.get("model") not in self.models:
                return _error(Status(404, message=f"the model {record.payload.get('model')} does not exist"))
            return await self._answer(request, record)
        except (AssertionError, LookupError, TypeError, ValueError) as error:  # a mistake in the test's behaviour
            self.errors.append(error)
            raise
        finally:
            self._count(-1)

    async def _answer_probe(self, request: web.Request, record: Request) -> web.StreamResponse:
        """A behaviour may refuse whatever it is asked; one that knows only its documents' prompts lets probes pass."""
        self.probes.append(record)
        if not self._authorized(request):
            return _error(Status(401, message="no valid API key"))
        if record.payload.get("model") not in self.models:
            return _error(Status(404, message=f"the model {record.payload.get('model')} does not exist"))
        try:
            answer = self._behaviour(record.payload, record.n)
        except Exception:
            answer = None
        if isinstance(answer, Status):
            return _error(answer)
        if isinstance(answer, Raw):
            return web.Response(status=answer.status, body=answer.body, content_type="application/json")
        body = _body(record, Answer("Hi"))
        return await self._stream(request, record, body) if record.payload.get("stream") else web.json_response(body)

    async def _answer(self, request: web.Request, record: Request) -> web.StreamResponse:
        if self.count and self.context and self.count(record.payload) > self.context:
            return _error(Status(400, message=TOO_LONG.format(self.context, self.context + 1)))
        answer = self._behaviour(record.payload, record.n)
        while isinstance(answer, (Delay, Hang)):
            if isinstance(answer, Delay):
                await asyncio.sleep(answer.seconds)
            else:
                await self._released.wait()
            answer = answer.then
        if isinstance(answer, Status):
            return _error(answer)
        if answer is None:
            answer = usual_text(record.payload)
        if isinstance(answer, str):
            answer = Answer(answer)
        if isinstance(answer, Answer):
            body = json.dumps(_body(record, answer)).encode()
        elif isinstance(answer, Raw):
            body = answer.body
        else:
            assert isinstance(answer, Drop), f"the test's behaviour returned {answer!r}"
            return await _drop(request, answer)
        if record.payload.get("stream") and not isinstance(answer, Raw):
            return await self._stream(request, record, json.loads(body))
        headers = answer.headers if isinstance(answer, Answer) else {}
        status = answer.status if isinstance(answer, Raw) else 200
        response = web.Response(status=status, body=body, content_type="application/json", headers=headers)
        await response.prepare(request)
        await response.write_eof()
        record.answered = time.monotonic()
        return response

    async def _stream(self, request: web.Request, record: Request, content: Payload) -> web.StreamResponse:
        """The same answer as server-sent events, a word in each."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        common = {"id": "test", "object": "chat.completion.chunk", "model": content["model"]}
        for choice in content["choices"]:
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            words = re.findall(r"\S+\s*", text or "")
            for number, word in enumerate(words):
                if number == 1 and self.break_streams:
                    self.break_streams -= 1
                    assert request.transport
                    request.transport.close()
                    return response
                if number == 1 and self.stall_streams:
                    self.stall_streams -= 1
                    await asyncio.sleep(30)
                part = {"delta": {"content": word}} if "message" in choice else {"text": word}
                await _send_event(response, {**common, "choices": [{"index": choice["index"], **part}]})
            end = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
            await _send_event(response, {**common, "choices": [end]})
        await _send_event(response, {**common, "choices": [], "usage": content["usage"]})
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        record.answered = time.monotonic()
        return response

    def _count(self, change: int) -> None:
        now = time.monotonic()
        self._area += self.in_flight * (now - self._changed) if self.in_flight else 0.0
        self._changed = now
        self.in_flight += change
        self.max_in_flight = max(self.max_in_flight, self.in_flight)


async def _send_event(response: web.StreamResponse, event: Payload) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


def _error(fault: Status) -> web.Response:
    body = {"error": {"message": fault.message, "type": "test", "code": fault.status}}
    return web.json_response(body, status=fault.status, headers=fault.headers)


async def _drop(request: web.Request, fault: Drop) -> web.StreamResponse:
    assert request.transport is not None
    response = web.StreamResponse(headers={"Content-Length": "1000000", "Content-Type": "application/json"})
    if fault.sent:
        await response.prepare(request)
        await response.write(b" " * fault.sent)
    request.transport.close()
    return response


def _body(record: Request, answer: Answer) -> Payload:
    chat = record.path.endswith("/chat/completions")
    choices = answer.choices
    if choices is None:
        choices = [_choice(index, chat, answer) for index in range(record.payload.get("n") or 1)]
    messages = record.payload.get("messages") or [{"content": record.payload.get("prompt")}]
    prompt_tokens = sum(len(str(message["content"]).split()) for message in messages)
    completion_tokens = len((answer.text or "").split()) * len(choices)
    return {
        "id": "test",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": record.payload["model"],
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _choice(index: int, chat: bool, answer: Answer) -> Payload:
    text = answer.text if index == 0 or answer.text is None else f"{answer.text} #{index}"
    choice: Payload = {"index": index, "finish_reason": answer.finish_reason, "logprobs": answer.logprobs}
    if not chat:
        return choice | {"text": text}
    message: Payload = {"role": "assistant", "content": text}
    if answer.reasoning is not None:
        message[answer.reasoning_key] = answer.reasoning
    if answer.tool_calls is not None:
        message["tool_calls"] = answer.tool_calls
    return choice | {"message": message}
