"""Tokens as the model counts them: asked of the server, by the model's own files, or estimated.

The server's `/tokenize` knows its chat template; vLLM has it for chats and texts, SGLang for texts. Where it is missing
`tokenizers` counts with the files of the model: a folder, the Hub's cache, or the Hub. Where these are missing, too,
tokens are estimated, rather too many than too few.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import orjson

import sdg
from sdg_plugins.servers.client import LONGEST_PAUSE, Client
from sdg_plugins.servers.pool import Pool
from sdg_plugins.servers.responses import without_key
from sdg_plugins.truncation.cutting import texts_of
from sdg_plugins.truncation.model_files import FILES, Unusable, chat_template, model_files, template_arguments

COUNTS_AT_ONCE = 16
LONGEST_INLINE = 4096  # characters that are tokenized on the event loop: a thread would take longer
CHARACTERS = 3.5  # of a token, as far as nothing is counted
CHAT_FIELDS = (  # of a payload, that vLLM's /tokenize takes
    *("model", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "mm_processor_kwargs", "media_io_kwargs"),
)


async def server_of(pool: Pool) -> sdg.Upstream:
    """A server that is well: at once if there is one, for it needs no slot. Cancelled at a stop, as requests are."""
    if pool.stopped:
        raise asyncio.CancelledError
    now = asyncio.get_running_loop().time()
    ready = [upstream for upstream in pool.upstreams if upstream.up.is_set() and upstream.until <= now]
    if ready:
        return min(ready, key=lambda upstream: upstream.active)
    upstream = await pool.acquire()
    pool.release(upstream)
    return upstream


async def ask(
    client: Client, method: str, path: str, body: Any = None, attempts: int = 1, of: sdg.Upstream | None = None
) -> Any:
    """A server's JSON answer to something other than a request; of any server that is well, unless one is named.

    Raises:
        Unusable: it has none; with the status if it refused.
    """
    import aiohttp

    data, reason = (None if body is None else orjson.dumps(body)), ""
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 2.0**attempt)))
        upstream = of or await server_of(client.pool)
        url = upstream.url + path if path == "/models" else upstream.url.removesuffix("/v1") + path
        sent = asyncio.get_running_loop().time()
        try:
            timeout = aiohttp.ClientTimeout(total=60)
            async with client.session.request(method, url, data=data, timeout=timeout) as response:
                raw = without_key(await response.read(), client.key_name)
            if response.status == 200:
                return orjson.loads(raw)
            reason = f"{response.status} from {sdg.redact(url)}"
            if response.status < 500 and response.status not in {408, 425, 429}:
                raise Unusable(reason, response.status)
        except ValueError as problem:
            raise Unusable(f"{sdg.redact(url)} answers with something else than JSON") from problem
        except (aiohttp.ClientError, OSError) as problem:
            reason = f"{sdg.redact(url)}: {sdg.redact(str(problem)) or type(problem).__name__}"
            if isinstance(problem, aiohttp.ClientConnectorError):
                client.pool.failed(upstream, sent, patience=1)
    raise Unusable(reason)


class Counter(Protocol):
    """One way of counting. `name` is for the log; all may raise Unusable."""

    name: str

    async def count(self, text: str) -> int:
        """Tokens of a text by itself."""

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """Tokens of a payload's prompt with all that the model's template adds; None if that is not known."""

    async def guess(self, text: str, tokens: int) -> int | None:
        """About how many characters of a text's beginning have so many tokens; None: as many as usual."""


class ServerCounter:
    """The server's `/tokenize`."""

    def __init__(self, client: Client, model: str, chats: bool) -> None:
        self.name = "the server's /tokenize"
        self._client, self._model, self._chats = client, model, chats

    async def count(self, text: str) -> int:
        """See `Counter`."""
        return await self._ask({"prompt": text, "add_special_tokens": False})

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `Counter`."""
        if "messages" not in payload:
            return await self._ask({"model": payload["model"], "prompt": payload["prompt"]})
        if not self._chats:
            return None
        known = {name: payload[name] for name in CHAT_FIELDS if name in payload}
        try:
            return await self._ask(known | {"chat_template_kwargs": template_arguments(payload)})
        except Unusable as problem:
            if 400 <= problem.status < 500:  # the template refuses these messages
                return None
            raise

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `Counter`."""
        return None

    async def _ask(self, question: dict[str, Any]) -> int:
        attempts = 1 + self._client.max_retries
        answer = await ask(self._client, "POST", "/tokenize", {"model": self._model, **question}, attempts)
        count = answer.get("count") if isinstance(answer, dict) else None
        if not isinstance(count, int):
            raise Unusable("the server's /tokenize tells no count")
        return count


class LocalCounter:
    """The model's own files, by the library `tokenizers`, which does without the GIL."""

    def __init__(self, files: dict[str, Path]) -> None:
        from tokenizers import Tokenizer

        self.name = f"the model's {FILES[0]}"
        self._tokenizer = Tokenizer.from_file(str(files[FILES[0]]))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._render = chat_template(files)

    async def count(self, text: str) -> int:
        """See `Counter`."""
        return await self._run(text, lambda: len(self._tokenizer.encode(text, add_special_tokens=False)))

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `Counter`."""
        if "messages" not in payload:
            text = str(payload["prompt"])
            return await self._run(text, lambda: len(self._tokenizer.encode(text)))
        text = self._render(payload) if self._render else ""
        return await self.count(text) if text else None

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `Counter`: here it is exact but for a character that several tokens share."""
        some = text[: 16 * tokens]

        def last() -> int:
            offsets = self._tokenizer.encode(some, add_special_tokens=False).offsets
            return int(offsets[tokens][0]) if tokens < len(offsets) else len(some)

        return await self._run(some, last)

    async def _run(self, text: str, work: Callable[[], int]) -> int:
        return await asyncio.to_thread(work) if len(text) > LONGEST_INLINE else work()


class Estimate:
    """A guess that is rather too high: the usual tokenizers have fewer tokens for nearly all texts."""

    name = "an estimate"
    _letters = (string.ascii_letters + " ").encode()

    async def count(self, text: str) -> int:
        """A token for three letters or spaces, for any other ASCII character, and for two bytes of all else."""
        raw = text.encode(errors="replace")
        others = raw.translate(None, self._letters)
        ascii_others = len(others.translate(None, bytes(range(128, 256))))
        return (len(raw) - len(others) + 2) // 3 + ascii_others + (len(others) - ascii_others + 1) // 2

    async def count_prompt(self, payload: dict[str, Any]) -> int | None:
        """See `Counter`."""
        return None

    async def guess(self, text: str, tokens: int) -> int | None:
        """See `Counter`."""
        return None


class Tokens:
    """The best counter that works, found when the first one is needed; the next one is taken when it fails."""

    def __init__(self, run: sdg.Run, client: Client) -> None:
        self._run, self._client = run, client
        self._counter: Counter | None = None
        self._choosing = asyncio.Lock()
        self._slots = asyncio.Semaphore(COUNTS_AT_ONCE)
        self._ways = [self._server_for_chats, self._local, self._server_for_texts, self._estimate]
        self._reasons: list[str] = []

    @property
    def name(self) -> str:
        """Of the counter in use."""
        return self._counter.name if self._counter else ""

    async def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return int(await self._ask(lambda counter: counter.count(text)))

    async def count_payload(self, payload: dict[str, Any], allowance: int) -> int:
        """Tokens of a payload's prompt; `allowance` is added for the template where the tokenizer does not know it."""
        tokens: int | None = await self._ask(lambda counter: counter.count_prompt(payload))
        if tokens is not None:
            return tokens
        texts = "\n".join(texts_of(payload).values())
        if payload.get("tools"):
            texts += json.dumps(payload["tools"], indent=4)
        return await self.count(texts) + allowance

    async def guess(self, text: str, tokens: int, counted: float | None = None) -> int:
        """About how many characters of a text's beginning have so many tokens.

        Nothing but the text may decide this, or it would be cut otherwise when it is run again.

        Args:
            text: the text.
            tokens: how many are wanted.
            counted: tokens of the whole text, if that is known.
        """
        exact: int | None = await self._ask(lambda counter: counter.guess(text, tokens))
        if exact is not None:
            return exact
        return int(tokens * (len(text) / counted if counted else CHARACTERS))

    async def _ask(self, question: Callable[[Counter], Any]) -> Any:
        while True:
            counter = self._counter or await self._choose()
            try:
                async with self._slots:
                    return await question(counter)
            except Unusable as problem:
                if self._counter is counter:
                    sdg.say(f"{counter.name} does not work any more ({problem}); tokens are counted otherwise")
                    self._counter = None

    async def _choose(self) -> Counter:
        async with self._choosing:
            while self._counter is None:
                try:
                    counter = await self._ways[0]()  # it stays the next one for others if this is cancelled
                except Unusable as problem:
                    self._reasons.append(str(problem))
                else:
                    self._counter = counter
                del self._ways[0]
            return self._counter

    async def _server_for_chats(self) -> Counter:
        counter = ServerCounter(self._client, self._run.model, chats=True)
        if await counter.count_prompt({"messages": [{"role": "user", "content": "x"}]}) is None:
            raise Unusable("the server has no /tokenize for chats")
        return counter

    async def _server_for_texts(self) -> Counter:
        counter = ServerCounter(self._client, self._run.model, chats=False)
        await counter.count("x")
        return counter

    async def _local(self) -> Counter:
        files = await asyncio.to_thread(model_files, self._run)
        try:
            return await asyncio.to_thread(LocalCounter, files)
        except ImportError as problem:
            raise Unusable("the library tokenizers is not installed: pip install 'sdg[tokenizers]'") from problem
        except Exception as problem:
            raise Unusable(f"the model's files cannot be used: {sdg.describe(problem)}") from problem

    async def _estimate(self) -> Counter:
        sdg.say(
            "tokens are estimated, rather too many, so that up to half of the context is left free "
            f"({'; '.join(dict.fromkeys(self._reasons))}); --model as a folder or a name on the Hub, with "
            "pip install 'sdg[tokenizers]', has them counted"
        )
        return Estimate()
