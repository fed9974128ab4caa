"""Count tokens as the model does: by the server, by the model's own files, or by an estimate.

The server's `/tokenize` knows its chat template; vLLM has it for chats and texts, SGLang for texts. Without it,
`tokenizers` counts with the model's files, from a folder, the Hub's cache or the Hub. Without these, tokens are
estimated, and the estimate errs on the high side.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson

import sdg
from sdg_plugins.servers.client import LONGEST_PAUSE, Client
from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.transport import root_of
from sdg_plugins.truncation.cutting import texts_of
from sdg_plugins.truncation.model_files import FILES, Unusable, chat_template, model_files, template_arguments

PATIENCE = 60.0  # s for one response
COUNTS_AT_ONCE = 16
LONGEST_INLINE = 4096  # characters that are tokenized on the event loop: a thread would take longer
CHARACTERS_PER_TOKEN = 3.5  # as long as nothing has been counted
CHAT_FIELDS = (  # fields of a payload that vLLM's /tokenize accepts
    *("model", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "mm_processor_kwargs", "media_io_kwargs"),
)
T = TypeVar("T")


# ── Asking servers ───────────────────────────────────────────────────────────────────────────────────────────────────


async def available_server(client: Client) -> sdg.Upstream:
    """A server that is up, without waiting for a slot if there is one. Canceled when the run stops, as requests are."""
    if client.lane.stopped:
        raise asyncio.CancelledError
    now = asyncio.get_running_loop().time()
    ready = [upstream for upstream in client.pool.upstreams if upstream.up.is_set() and upstream.until <= now]
    if ready:
        return min(ready, key=lambda upstream: upstream.active)
    upstream = await client.lane.acquire()
    client.lane.release(upstream)
    return upstream


async def fetch_json(
    client: Client, path: str, body: Any = None, attempts: int = 1, server: sdg.Upstream | None = None
) -> Any:
    """Fetch a server's JSON response to a request that is not a completion.

    Args:
        client: whose transport and pool are used.
        path: below the server's address; `/models` is below its API root.
        body: posted as JSON; None gets the page.
        attempts: how often to send it.
        server: the server to ask; by default any one that is available.

    Raises:
        Unusable: there was no response, or not a JSON one.
    """
    reason = ""
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 2.0**attempt)))
        upstream = server or await available_server(client)
        root = upstream.url if path == "/models" else root_of(upstream.url)
        sent, where = asyncio.get_running_loop().time(), sdg.redact(root + path)
        try:
            if body is None:
                answer = await client.transport.get(root, path, PATIENCE)
            else:
                answer = await client.transport.post(root, path, orjson.dumps(body))
            if answer.status == 200:
                return orjson.loads(client.secrets.hidden(answer.body))
            reason = f"{answer.status} from {where}"
            if answer.status < 500 and answer.status not in {408, 425, 429}:
                raise Unusable(reason, answer.status)
        except ValueError as exc:
            raise Unusable(f"the response of {where} is not JSON") from exc
        except (Unreached, Broken, TimeoutError) as exc:
            reason = f"{where}: {sdg.redact(str(exc))}"
            if isinstance(exc, Unreached):
                client.pool.failed(upstream, sent, reason, patience=1)
    raise Unusable(reason)


class TokenCounter(Protocol):
    """One way of counting tokens. All methods may raise Unusable.

    Attributes:
        name: for messages.
    """

    name: str

    async def count(self, text: str) -> int:
        """Tokens of a text on its own."""

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """Tokens of a payload's prompt, including those that the model's template adds; None if unknown."""

    async def guess(self, text: str, tokens: int) -> int | None:
        """About how many characters of a text's beginning have this many tokens; None if unknown."""


class ServerCounter:
    """The server's `/tokenize`.

    Args:
        client: sends the questions.
        model: whose tokenizer.
        chats: whether the server counts chats, too.
    """

    def __init__(self, client: Client, model: str, chats: bool) -> None:
        self.name = "the server's /tokenize"
        self._client, self._model, self._chats = client, model, chats

    async def count(self, text: str) -> int:
        """See `TokenCounter`."""
        return await self._tokenize({"prompt": text, "add_special_tokens": False})

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `TokenCounter`."""
        if "messages" not in payload:
            return await self._tokenize({"model": payload["model"], "prompt": payload["prompt"]})
        if not self._chats:
            return None
        known = {name: payload[name] for name in CHAT_FIELDS if name in payload}
        try:
            return await self._tokenize(known | {"chat_template_kwargs": template_arguments(payload)})
        except Unusable as exc:
            if 400 <= exc.status < 500:  # the template rejects these messages
                return None
            raise

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `TokenCounter`."""
        return None

    async def _tokenize(self, question: dict[str, Any]) -> int:
        attempts = 1 + self._client.max_retries
        answer = await fetch_json(self._client, "/tokenize", {"model": self._model, **question}, attempts)
        count = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            raise Unusable("the response of the server's /tokenize has no count")
        return count


class LocalCounter:
    """The model's own files, read by the library `tokenizers`, which releases the GIL."""

    def __init__(self, files: dict[str, Path]) -> None:
        from tokenizers import Tokenizer

        self.name = f"the model's {FILES[0]}"
        self._tokenizer = Tokenizer.from_file(str(files[FILES[0]]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._render = chat_template(files)

    async def count(self, text: str) -> int:
        """See `TokenCounter`."""
        return await self._run(text, lambda: len(self._tokenizer.encode(text, add_special_tokens=False)))

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `TokenCounter`."""
        if "messages" not in payload:
            text = str(payload["prompt"])
            return await self._run(text, lambda: len(self._tokenizer.encode(text)))
        text = self._render(payload) if self._render else ""
        return await self.count(text) if text else None

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `TokenCounter`. This is exact unless several tokens share a character."""
        beginning = text[: 16 * tokens]

        def length() -> int:
            offsets = self._tokenizer.encode(beginning, add_special_tokens=False).offsets
            return int(offsets[tokens][0]) if tokens < len(offsets) else len(beginning)

        return await self._run(beginning, length)

    async def _run(self, text: str, work: Callable[[], int]) -> int:
        return await asyncio.to_thread(work) if len(text) > LONGEST_INLINE else work()


class Estimate:
    """An estimate on the high side: common tokenizers produce fewer tokens for nearly all texts."""

    name = "an estimate"
    _letters = (string.ascii_letters + " ").encode()

    async def count(self, text: str) -> int:
        """One token per three letters or spaces, per other ASCII character, and per two bytes of anything else."""
        raw = text.encode(errors="replace")
        others = raw.translate(None, self._letters)
        ascii_others = len(others.translate(None, bytes(range(128, 256))))
        return (len(raw) - len(others) + 2) // 3 + ascii_others + (len(others) - ascii_others + 1) // 2

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `TokenCounter`."""
        return None

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `TokenCounter`."""
        return None


# ── The best way ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokens:
    """Counts in the best way that works. It is chosen at the first use; when it fails, the next one takes over."""

    def __init__(self, run: sdg.Run, client: Client) -> None:
        self._run, self._client = run, client
        self._counter: TokenCounter | None = None
        self._choosing = asyncio.Lock()
        self._slots = asyncio.Semaphore(COUNTS_AT_ONCE)
        self._ways = [self._server_for_chats, self._local, self._server_for_texts, self._estimate]
        self._reasons: list[str] = []

    @property
    def name(self) -> str:
        """Name of the counter in use."""
        return self._counter.name if self._counter else ""

    async def count(self, text: str) -> int:
        """Tokens of a text on its own."""
        return await self._ask(lambda counter: counter.count(text))

    async def count_payload(self, payload: dict[str, Any], allowance: int) -> int:
        """Tokens of a payload's prompt; `allowance` stands for the template if the counter does not know it."""
        tokens = await self._ask(lambda counter: counter.count_prompt(payload))
        if tokens is not None:
            return tokens
        texts = "\n".join(texts_of(payload).values())
        if payload.get("tools"):
            texts += json.dumps(payload["tools"], indent=4)
        return await self.count(texts) + allowance

    async def guess(self, text: str, tokens: int, counted: float | None = None) -> int:
        """About how many characters of a text's beginning have this many tokens.

        This depends on the text alone, otherwise a replay could cut it elsewhere.

        Args:
            text: the text.
            tokens: how many.
            counted: tokens of the whole text, if known.
        """
        exact = await self._ask(lambda counter: counter.guess(text, tokens))
        if exact is not None:
            return exact
        return int(tokens * (len(text) / counted if counted else CHARACTERS_PER_TOKEN))

    async def _ask(self, question: Callable[[TokenCounter], Awaitable[T]]) -> T:
        while True:
            counter = self._counter or await self._choose()
            try:
                async with self._slots:
                    return await question(counter)
            except Unusable as exc:
                if self._counter is counter:
                    sdg.say(f"{counter.name} no longer works ({exc}): tokens are counted in another way from now on")
                    self._counter = None

    async def _choose(self) -> TokenCounter:
        async with self._choosing:
            while self._counter is None:
                try:
                    counter = await self._ways[0]()  # if this is canceled, the next caller tries the same one
                except Unusable as exc:
                    self._reasons.append(str(exc))
                else:
                    self._counter = counter
                del self._ways[0]
            return self._counter

    async def _server_for_chats(self) -> TokenCounter:
        counter = ServerCounter(self._client, self._run.model, chats=True)
        if await counter.count_prompt({"messages": [{"role": "user", "content": "x"}]}) is None:
            raise Unusable("the server has no /tokenize for chats")
        return counter

    async def _server_for_texts(self) -> TokenCounter:
        counter = ServerCounter(self._client, self._run.model, chats=False)
        await counter.count("x")
        return counter

    async def _local(self) -> TokenCounter:
        files = await asyncio.to_thread(model_files, self._run)
        try:
            return await asyncio.to_thread(LocalCounter, files)
        except ImportError as exc:
            raise Unusable("the library tokenizers is not installed: pip install 'sdg-engine[tokenizers]'") from exc
        except Exception as exc:
            raise Unusable(f"the model's files cannot be used: {sdg.describe(exc)}") from exc

    async def _estimate(self) -> TokenCounter:
        reasons = "; ".join(dict.fromkeys(self._reasons))
        sdg.say(
            "token counts are estimated on the high side, so up to half of the context may stay unused "
            f"({reasons}); for exact counts install 'sdg-engine[tokenizers]', with --model a folder or a name on the "
            "Hub"
        )
        return Estimate()
