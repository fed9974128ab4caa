"""Fit prompts to the model's context: cut the document in them and nothing else, or run it in parts.

Every request of a rollout passes `Fitter.send`. Most of them certainly fit, because a token is at least one byte, and
cost nothing. For the others, `counting.py` counts tokens. The document is found in the prompt by its text, so rollouts
need no code for this. If neither the user nor the server states the context, it is learned from the server's refusal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import orjson
import xxhash

import sdg
from sdg_plugins.servers.responses import error_in, words_in
from sdg_plugins.truncation.counting import Tokens, available_server, fetch_json
from sdg_plugins.truncation.cutting import (
    PARAGRAPH,
    SENTENCE,
    WORD,
    Prompt,
    last_end,
    search,
    texts_of,
    user_texts,
    with_texts,
)
from sdg_plugins.truncation.model_files import Unusable

SURELY_SHORT = 4000  # bytes of a request that every model takes
COMPLETION_SHARE = 4  # one part in so many of the context is kept for the completion if there is no max_tokens
TEMPLATE = 1024  # tokens that a chat template may add, such as a default system prompt; see `allowance`
PER_MESSAGE = 16  # tokens that it adds to each message: role, separators
ATTEMPTS = 6  # for a prompt that the server refuses as too long
MOST_CHARACTERS = 8  # per token: a text with more for each token of the budget is not counted as a whole
SMALLEST_PART = 32  # tokens of a document: a completion for fewer would be meaningless
SEAM = 8  # tokens that a document may gain where it meets the instructions
PARTS_AT_ONCE = 16
CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length")  # in lists of models
CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error"}  # OpenAI and compatible ones; llama.cpp
NUMBER = r"(\d{1,3}(?:,\d{3}){1,3}|\d{1,10})(?!\d)"  # bounded: a refusal may echo any document

# vLLM: "maximum context length is 2048 tokens", "maximum model length of 2048"; SGLang: "context length (2048 tokens)";
# llama.cpp: "n_ctx": 2048; TGI: "`inputs` tokens + `max_new_tokens` must be <= 2048", "`inputs` must have less than
# 2048 tokens"; Gemini: "maximum number of tokens allowed (2048)"; Anthropic: "9000 tokens > 2048 maximum"; Mistral:
# "too large for model with 2048 maximum context length"; others: "input limit of 2048", "exceeds the 2048 token limit"
CONTEXT_STATED = re.compile(
    r"(?:context (?:length|size|window)|maximum model length|max_model_len|max_total_tokens|n_ctx|tokens >"
    r"|inputs\W+tokens \+ \W?max_new_tokens|inputs\W+must have|maximum number of tokens allowed"
    r"|(?:input|prompt|token|sequence)s?(?: token| length)? limit|max(?:imum)?[ _](?:input|prompt|seq(?:uence)?)"
    r"[ _](?:length|len|tokens|size))"
    rf"[^\d\n]{{0,20}}?{NUMBER}"
    rf"|(?<!\d){NUMBER}[ -](?:tokens? )?(?:max(?:imum)? (?:context|input|prompt|sequence|model)"
    r"|context (?:length|size|window|limit)|tokens? (?:limit|maximum)|limit)",
    re.IGNORECASE,
)
OTHER_CODES = {"content_filter", "content_policy_violation", "invalid_api_key", "model_not_found"}  # not of a length


# ── Fitting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def max_completion(payload: dict[str, Any]) -> int | None:
    """Maximum completion tokens that a payload asks for; None if it leaves that to the server."""
    asked = payload.get("max_completion_tokens") or payload.get("max_tokens")
    return asked if isinstance(asked, int) else None


def allowance(payload: dict[str, Any], limit: int) -> int:
    """Maximum tokens that the model's template adds to a payload's texts, for a context of `limit` tokens."""
    messages = payload.get("messages")
    return min(TEMPLATE, limit // 8) + PER_MESSAGE * len(messages) if messages else PER_MESSAGE


def surely_fits(body: bytes, budget: int, tools: bool) -> bool:
    """True if a body cannot have more tokens than `budget`; nothing is counted.

    A token stands for at least one byte of text, but tokenizers that normalize it (NFC) may triple its bytes
    (https://unicode.org/faq/normalization.html). Templates write tools with more white space.
    """
    size = len(body) * (2 if tools else 1)
    if size > budget:
        return False
    return 3 * size <= budget or body.isascii() or unicodedata.is_normalized("NFC", body.decode())


class Fitter:
    """Cuts the documents in prompts to the model's context, or has them run in parts: a link of `wrap_requests`."""

    def __init__(self, run: sdg.Run, send: sdg.Send) -> None:
        assert run.client
        self.run, self.client, self._send = run, run.client, send
        self.mode: str = run.options.long_documents
        self.tokens = Tokens(run, self.client)
        self._limit: int | None = run.options.model_max_context
        self._unasked = set(self.client.pool.upstreams)
        self._asking = asyncio.Lock()
        self._bases: dict[bytes, int] = {}  # tokens of prompts without the document; most rollouts have one or two
        self._reported = False
        self._longest = 0  # bytes of a request that was answered

    async def send(self, request: sdg.Request) -> sdg.Response:
        """Send a request, with the document in it cut if necessary; the response then has `sdg_truncated`.

        Raises:
            RequestFailed: `request.rollout.room` is set if the document must be run in parts.
        """
        if not request.path.endswith("/completions"):
            return await self._send(request)
        limit, fitted = await self.context(), request
        if limit and not self._surely_fits(request, limit):
            fitted = await self._fit(request, limit)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = await self._send(fitted)
                break
            except sdg.RequestFailed as exc:
                found, certain = await self._limit_in(exc, fitted) if attempt < ATTEMPTS else (None, False)
                if found is None:
                    raise
                self.client.counts.subtract([f"given_up.{exc.cause}"])
                shorter = await self._fit(request, found, 0.9 ** (attempt - 1))
                if shorter is request:
                    self.client.counts[f"given_up.{exc.cause}"] += 1
                    raise
                self.client.counts["retries.context"] += 1
                fitted, limit = shorter, found if certain else None
        self._learn(limit)
        self._longest = max(self._longest, len(fitted.body))
        if fitted is request:
            return response
        body = orjson.dumps({**orjson.loads(response.body), "sdg_truncated": True})
        return sdg.Response(self.client.parse(body), body)

    def _surely_fits(self, request: sdg.Request, limit: int) -> bool:
        payload = request.payload
        budget = limit - allowance(payload, limit) - (max_completion(payload) or limit // COMPLETION_SHARE)
        return surely_fits(request.body, budget, "tools" in payload)

    async def _fit(self, request: sdg.Request, limit: int, share: float = 1.0) -> sdg.Request:
        """The request, or one with less of the document; see `send`.

        Args:
            request: with the whole document.
            limit: tokens of the context.
            share: of the room for the prompt that it may use.
        """
        payload, rollout = request.payload, request.rollout
        assert rollout
        document = rollout.document
        prompt: Prompt = await _in_thread(len(document.text), lambda: Prompt(payload, document))
        if not prompt.spans:
            return request  # there is nothing to cut: the server decides
        completion = max_completion(payload) or limit // COMPLETION_SHARE
        budget = int((limit - completion) * share)

        async def count(most: int) -> int:
            return await self._count(prompt.cut(most), limit)

        whole = await count(prompt.longest) if prompt.longest <= MOST_CHARACTERS * budget else None
        if whole is not None and whole <= budget:
            return request
        base = await self._base(prompt, limit)
        need = f"the prompt needs {base:,} tokens without the document and the completion up to {completion:,}"
        need = f"{need}, of a context of {limit:,}"
        room = (budget - base) // len(prompt.spans)
        if room - SEAM < SMALLEST_PART:
            raise self._too_long(f"{need}: shorten the prompt or lower --max-tokens")
        if self.mode == "split":
            rollout.room = min(room, rollout.room or room)
        if self.mode != "truncate":
            raise self._too_long(f"the document does not fit: {need}")
        longest_share = prompt.longest / sum(map(len, prompt.passages))
        counted = whole and (whole - base) * longest_share
        guess = await self.tokens.guess(max(prompt.passages, key=len), room, counted)
        most = await search(count, prompt.kept, prompt.longest, budget, (0, base), guess)
        if most >= prompt.longest:
            return request
        if not any(prompt.kept(most)):
            raise self._too_long(f"no room is left for the document: {need}")
        self._report(limit)
        return request.with_payload(prompt.cut(most))

    def _too_long(self, message: str) -> sdg.RequestFailed:
        failure = sdg.RequestFailed("context", message, retry=False)
        failure.attempts = 0
        self.client.counts["given_up.context"] += self.mode != "split"
        return failure

    async def _base(self, prompt: Prompt, limit: int) -> int:
        """Tokens of a prompt without the document."""
        empty = prompt.cut(0)
        key = xxhash.xxh3_128_digest(orjson.dumps(empty))
        if key not in self._bases:
            if len(self._bases) >= 1000:
                self._bases.clear()
            self._bases[key] = await self._count(empty, limit)
        return self._bases[key]

    async def _count(self, payload: dict[str, Any], limit: int) -> int:
        return await self.tokens.count_payload(payload, allowance(payload, limit))

    def _report(self, limit: int) -> None:
        if not self._reported:
            exceed = f"some documents exceed the model's context of {limit:,} tokens and are cut to fit"
            sdg.say(f"{exceed}; tokens are counted by {self.tokens.name}")
            self._reported = True

    # The context

    async def context(self) -> int | None:
        """Tokens of prompt and completion together; None if unknown.

        This is the smallest number that --model-max-context and the servers that are up state.
        """
        if self._unasked and (self._none_asked or any(upstream.up.is_set() for upstream in self._unasked)):
            async with self._asking:
                if self._unasked:  # otherwise another request has asked meanwhile
                    await self._ask_servers()
        return self._limit

    @property
    def _none_asked(self) -> bool:
        return len(self._unasked) == len(self.client.pool.upstreams)

    async def _ask_servers(self) -> None:
        if self._none_asked:  # the first one may still be loading
            await available_server(self.client)
        ready = {upstream for upstream in self._unasked if upstream.up.is_set()}
        for limit in await asyncio.gather(*map(self._context_of, ready)):
            self._learn(limit)
        self._unasked -= ready

    async def _context_of(self, upstream: sdg.Upstream) -> int | None:
        """The context in a server's list of models."""
        try:
            cards = (await fetch_json(self.client, "/models", attempts=2, server=upstream))["data"]
            named = {card["id"]: card for card in cards}
            card = named.get(self.run.model) or (cards[0] if len(cards) == 1 else {})
        except (Unusable, LookupError, TypeError):  # not every server has a list
            return None
        stated = (card.get(name) for name in CONTEXT_NAMES)
        return next((limit for limit in stated if isinstance(limit, int) and limit > 0), None)

    def _learn(self, limit: int | None) -> None:
        """Adopt a context that is smaller than the one known so far."""
        if limit is not None and (self._limit is None or limit < self._limit):
            if self._limit is not None:
                sdg.say(f"the server accepts {limit:,} tokens, not {self._limit:,}: prompts are fitted to that")
            self._limit = limit

    async def _limit_in(self, failure: sdg.RequestFailed, request: sdg.Request) -> tuple[int | None, bool]:
        """The context according to a refusal, and whether that is certain; None if it is about something else.

        It must be a number that the tokens of this very prompt exceed. One that the refusal does not call the context
        is a guess, and is only tried if the refusal has a code that says what it is about. A refusal in unknown words
        may be about the length if shorter requests are answered: half of it is tried.
        """
        payload = request.payload
        if failure.status not in {400, 413, 422} or not texts_of(payload):
            return None, False
        stated, guesses, coded = limits_in(failure, payload)
        if not (stated or coded) and not self._may_be_too_long(failure, request):
            return None, False
        tokens = await self._count(payload, self._limit or TEMPLATE) + (max_completion(payload) or 1)
        for limits in (stated, guesses):
            if exceeded := [limit for limit in limits if limit < tokens]:
                return exceeded[0], limits is stated
        return (None, False) if stated and not coded else (tokens // 2, False)

    def _may_be_too_long(self, failure: sdg.RequestFailed, request: sdg.Request) -> bool:
        """True if nothing speaks against a refusal being about the length: a longer request has not been answered."""
        other = OTHER_CODES & words_in(error_in(failure.body))
        return not other and self.client.answers and len(request.body) > max(self._longest, SURELY_SHORT)

    # Lengths of text

    async def fitting_length(
        self, text: str, tokens: int, patterns: tuple[re.Pattern[str], ...], *, strip: bool = False
    ) -> int:
        """The length in characters of the longest beginning of a text that has at most `tokens` tokens.

        Args:
            text: the text.
            tokens: how many its beginning may have.
            patterns: where it may end; see `last_end`.
            strip: do not count white space at the end.
        """

        def kept(most: int) -> int:
            return last_end(text, most, patterns)

        async def count(most: int) -> int:
            beginning = text[: kept(most)]
            return await self.tokens.count(beginning.rstrip() if strip else beginning)

        whole = await count(len(text)) if len(text) <= MOST_CHARACTERS * tokens else None
        if whole is not None and whole <= tokens:
            return len(text)
        guess = await self.tokens.guess(text, tokens, whole)
        return kept(await search(count, kept, len(text), tokens, (0, 0), guess))

    async def part_ends(self, text: str, tokens: int) -> list[int]:
        """Where to split a text into parts of similar length that have at most `tokens` tokens each."""
        patterns = (PARAGRAPH, SENTENCE, WORD)
        most, ends = await self.fitting_length(text[: MOST_CHARACTERS * tokens], tokens, patterns) or 1, [0]
        while (left := len(text) - ends[-1]) > 0:
            even = math.ceil(left / math.ceil(left / most))
            part = text[ends[-1] : ends[-1] + even + 1]
            part = part[: last_end(part, even, patterns)]
            if await self.tokens.count(part) > tokens:
                part = part[: await self.fitting_length(part, tokens, patterns) or 1]  # at least one character
            ends.append(ends[-1] + len(part))
        return ends[1:]

    # Parts

    async def run_parts(self, rollout: sdg.RolloutRun, ends: list[int] | None) -> sdg.Outcome:
        """Run a rollout for each part of its document, and join the outcomes.

        Args:
            rollout: of the whole document, which did not fit.
            ends: where the parts end, if an earlier process has decided that.
        """
        document = rollout.document
        text = max(user_texts(document), key=len, default="") if document.messages else document.text
        if ends is None:
            ends = await self.part_ends(text, (rollout.room or 0) - SEAM)
        if len(ends) < 2:
            message = "the prompt leaves no room for any part of the document"
            return {"error": message, "error_type": "RequestFailed", "attempts": 0}
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
        parts = rollout.parts([part_of(document, text, piece) for piece in pieces], ends)
        slots, failed = asyncio.Semaphore(PARTS_AT_ONCE), asyncio.Event()

        async def run(part: sdg.RolloutRun) -> sdg.Outcome:
            async with slots:
                # One failed part fails the document: requests for further parts would be wasted.
                outcome = [] if failed.is_set() or not part.document.text.strip() else await part.run()
                if isinstance(outcome, dict):
                    failed.set()
                return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(part)) for part in parts]
        return join_outcomes([task.result() for task in tasks])


async def _in_thread(size: int, work: Callable[[], Any]) -> Any:
    """Do some work on a text of `size` characters, in a thread if it would block the event loop for too long."""
    return await asyncio.to_thread(work) if size > 200_000 else work()


def part_of(document: sdg.Document, text: str, piece: str) -> sdg.Document:
    """The document with a piece of a text in place of that text, which is its own or, in a chat, a message's."""
    if not document.messages:
        return dataclasses.replace(document, text=piece)
    texts = texts_of({"messages": document.messages})
    key = next(key for key, own in texts.items() if own == text and document.messages[key[0]]["role"] == "user")
    messages = with_texts({"messages": document.messages}, {key: piece})["messages"]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    return dataclasses.replace(document, text="\n\n".join(contents), messages=messages)


def join_outcomes(outcomes: list[sdg.Outcome]) -> sdg.Outcome:
    """Join the outcomes of a document's parts: to one text if each has one, otherwise to a list of all results."""
    for number, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, dict):
            return {**outcome, "error": f"part {number} of {len(outcomes)}: {outcome['error']}"}
    lists = [outcome for outcome in outcomes if isinstance(outcome, list) and outcome]
    results = [result for some in lists for result in some]
    plain = {"text", "reasoning", "finish_reason", "usage", "truncated"}
    if len(lists) < 2 or len(results) > len(lists) or not all(set(result) <= plain for result in results):
        return results
    one: dict[str, Any] = {"truncated": any(result["truncated"] for result in results)}
    for name in ("text", "reasoning"):
        if texts := [result[name] for result in results if result.get(name)]:
            one[name] = "\n\n".join(texts)
    if reasons := [result["finish_reason"] for result in results if result.get("finish_reason")]:
        one["finish_reason"] = next((reason for reason in reasons if reason != "stop"), "stop")
    if usages := [result["usage"] for result in results if result.get("usage")]:
        one["usage"] = {name: sum(usage.get(name, 0) for usage in usages) for name in usages[0]}
    return [one]


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def limits_in(failure: sdg.RequestFailed, payload: dict[str, Any]) -> tuple[list[int], list[int], bool]:
    """Find the model's context in a refusal.

    Text that is also in the prompt does not count, because a refusal may quote it.

    Returns:
        The numbers that the refusal calls the context, other numbers that may be it, and whether the refusal has a code
        for prompts that are too long.
    """
    error = error_in(failure.body)
    coded = bool(CONTEXT_CODES & {value for value in error.values() if isinstance(value, str)})
    texts, completion = texts_of(payload).values(), max_completion(payload) or 0
    most = len(orjson.dumps(payload)) + completion + TEMPLATE  # a token has at least one byte

    def possible(numbers: Iterable[str]) -> list[int]:
        values = (int(number.replace(",", "")) for number in numbers)
        return [value for value in values if SMALLEST_PART < value < most and value != failure.status]

    refusal = refusal_text(error)
    stated = [match for match in CONTEXT_STATED.finditer(refusal) if not any(match[0] in text for text in texts)]
    numbers = set(possible(re.findall(rf"(?<!\d){NUMBER}", refusal)) if coded else []) - {completion}
    # The number in "at least 1049 input tokens" is the context less the completion, plus one.
    guesses = sorted(number for number in numbers if number + completion - 1 not in numbers)
    return possible(match[1] or match[2] for match in stated), guesses, coded


def refusal_text(error: dict[str, Any]) -> str:
    """An error's message and its numbers with their names. Other fields are left out: they may echo the request."""
    numbers = [f"{name}: {value}" for name, value in error.items() if type(value) is int]
    messages = [error[name] for name in ("message", "detail", "error") if isinstance(error.get(name), str)]
    return "\n".join([*messages, *numbers])
