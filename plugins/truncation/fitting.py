"""Prompts that fit the model's context: only the document in them is cut, or it is run in parts.

Every request of a rollout passes `Fitter.post`. Most of them surely fit, because a token is at least a byte, and cost
nothing. For the others tokens are counted by `counting.py`. What the document is in a prompt is found by its text, so
that rollouts need not know of this. Where nobody says how long the context is, the server's refusal tells it.
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
from sdg_plugins.servers.responses import error_in
from sdg_plugins.truncation.counting import Tokens, ask, server_of
from sdg_plugins.truncation.cutting import (
    PARAGRAPH,
    SENTENCE,
    WORD,
    Prompt,
    ending,
    search,
    texts_of,
    user_texts,
    with_texts,
)
from sdg_plugins.truncation.model_files import Unusable

ANSWER_SHARE = 4  # one part in so many of the context is kept for the answer where no max_tokens is given
TEMPLATE = 1024  # tokens that a chat template may add of its own, such as a default system prompt; see `allowance`
PER_MESSAGE = 16  # tokens that it adds to each message: role, separators
ATTEMPTS = 6  # at a prompt that the server refuses as too long
LOOSE = 8  # characters of a token: a text that has more for each token of the budget is not counted as a whole
SMALLEST_PART = 32  # tokens of a document: with fewer an answer would be about nothing
SEAM = 8  # tokens by which a document's own may grow where they meet the instructions
PARTS_AT_ONCE = 16
CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length")  # in lists of models
CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error"}  # OpenAI's and those who follow; llama.cpp's
NUMBER = r"(\d{1,3}(?:,\d{3}){1,3}|\d{1,10})(?!\d)"  # bounded: a refusal may echo any document


# vLLM: "maximum context length is 2048 tokens", "maximum model length of 2048"; SGLang: "context length (2048 tokens)";
# llama.cpp: "n_ctx": 2048; TGI: "`inputs` tokens + `max_new_tokens` must be <= 2048", "`inputs` must have less than
# 2048 tokens"; Gemini: "maximum number of tokens allowed (2048)"; Anthropic: "9000 tokens > 2048 maximum"
CONTEXT_TOLD = re.compile(
    r"(?:context (?:length|size|window)|maximum model length|max_model_len|max_total_tokens|n_ctx|tokens >"
    r"|inputs\W+tokens \+ \W?max_new_tokens|inputs\W+must have|maximum number of tokens allowed)"
    rf"[^\d\n]{{0,20}}?{NUMBER}",
    re.IGNORECASE,
)


@sdg.hookimpl
def wrap_requests(run: sdg.Run, send: sdg.Send) -> sdg.Send:
    run.fitter = Fitter(run, send)
    return run.fitter.send


# ── Fitting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def output_of(payload: dict[str, Any]) -> int | None:
    """Tokens that a payload asks for, None if it leaves that to the server."""
    asked = payload.get("max_completion_tokens") or payload.get("max_tokens")
    return asked if isinstance(asked, int) else None


def allowance(payload: dict[str, Any], limit: int) -> int:
    """Tokens, at the most, that the model's template adds to a payload's texts."""
    messages = payload.get("messages")
    return min(TEMPLATE, limit // 8) + PER_MESSAGE * len(messages) if messages else PER_MESSAGE


def surely_fits(body: bytes, budget: int, tools: bool) -> bool:
    """Whether a body cannot have more tokens than `budget`, without counting them.

    A token stands for at least one byte of the text, but tokenizers with a normal form (NFC) may make three times as
    many bytes of it (https://unicode.org/faq/normalization.html). Templates write tools with more white space.
    """
    size = len(body) * (2 if tools else 1)
    if size > budget:
        return False
    return 3 * size <= budget or body.isascii() or unicodedata.is_normalized("NFC", body.decode())


class Fitter:
    """A link of `wrap_requests`: cuts the documents in prompts to the model's context, or has them run in parts."""

    def __init__(self, run: sdg.Run, send: sdg.Send) -> None:
        assert run.client
        self.run, self.client, self._send = run, run.client, send
        self.mode: str = run.options.long_documents
        self.tokens = Tokens(run, self.client)
        self._limit: int | None = run.options.model_max_context
        self._unasked = set(self.client.pool.upstreams)
        self._asking = asyncio.Lock()
        self._bases: dict[bytes, int] = {}  # tokens of prompts without the document: most rollouts have one or two
        self._reported = False

    async def send(self, request: sdg.Request) -> sdg.Response:
        """Send a request, with the document in it cut if necessary; that is noted in the response.

        Raises:
            RequestFailed: and `request.rollout.room` is set if the document must be split.
        """
        limit, fitted = await self.context(), request
        if limit and not self._surely_fits(request, limit):
            fitted = await self._fit(request, limit)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = await self._send(fitted)
                break
            except sdg.RequestFailed as exc:
                told, known = await self._limit_in(exc, fitted.payload) if attempt < ATTEMPTS else (None, False)
                if told is None:
                    raise
                self.client.counts.subtract([f"given_up.{exc.cause}"])
                shorter = await self._fit(request, told, 0.9 ** (attempt - 1))
                if shorter is request:
                    self.client.counts[f"given_up.{exc.cause}"] += 1
                    raise
                self.client.counts["retries.context"] += 1
                fitted, limit = shorter, told if known else None
        self._learn(limit)
        if fitted is request:
            return response
        body = orjson.dumps({**orjson.loads(response.body), "sdg_truncated": True})
        return sdg.Response(self.client.parse(body), body)

    def _surely_fits(self, request: sdg.Request, limit: int) -> bool:
        payload = request.payload
        budget = limit - allowance(payload, limit) - (output_of(payload) or limit // ANSWER_SHARE)
        return surely_fits(request.body, budget, "tools" in payload)

    async def _fit(self, request: sdg.Request, limit: int, share: float = 1.0) -> sdg.Request:
        """The request, or one with less of the document; see `send`."""
        payload, rollout = request.payload, request.rollout
        assert rollout
        document = rollout.document
        prompt: Prompt = await _in_thread(len(document.text), lambda: Prompt(payload, document))
        if not prompt.passages:
            return request  # nothing that may be cut: the server decides
        output = output_of(payload) or limit // ANSWER_SHARE
        budget = int((limit - output) * share)

        async def count(most: int) -> int:
            return await self._count(prompt.cut(most), limit)

        whole = await count(prompt.longest) if prompt.longest <= LOOSE * budget else None
        if whole is not None and whole <= budget:
            return request
        base = await self._base(prompt, limit)
        parts = f"{base:,} tokens without the document, and the answer up to {output:,} of the {limit:,}"
        room = (budget - base) // len(prompt.passages)
        if room - SEAM < SMALLEST_PART:
            raise self._too_long(f"the prompt has {parts} that the model takes: shorten the one, or lower --max-tokens")
        if self.mode == "split":
            rollout.room = min(room, rollout.room or room)
        if self.mode != "truncate":
            raise self._too_long(f"the document does not fit; the prompt has {parts} that the model takes")
        share = prompt.longest / sum(map(len, prompt.own))
        guess = await self.tokens.guess(max(prompt.own, key=len), room, whole and (whole - base) * share)
        most = await search(count, prompt.kept, prompt.longest, budget, (0, base), guess)
        if most >= prompt.longest:
            return request
        if not any(prompt.kept(most)):
            raise self._too_long(f"the prompt has {parts} that the model takes: nothing is left for the document")
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
            exceed = f"some documents exceed the model's context of {limit:,} tokens and are cut to it"
            sdg.say(f"{exceed}, counted by {self.tokens.name}")
            self._reported = True

    # The context

    async def context(self) -> int | None:
        """Tokens of prompt and answer together, the least that --model-max-context and the servers that are up say."""
        if self._unasked and (self._nobody_asked or any(upstream.up.is_set() for upstream in self._unasked)):
            async with self._asking:
                if self._unasked:  # else another request has asked meanwhile
                    await self._ask_servers()
        return self._limit

    @property
    def _nobody_asked(self) -> bool:
        return len(self._unasked) == len(self.client.pool.upstreams)

    async def _ask_servers(self) -> None:
        if self._nobody_asked:  # it may still be loading
            await server_of(self.client.pool)
        ready = {upstream for upstream in self._unasked if upstream.up.is_set()}
        for limit in await asyncio.gather(*map(self._context_of, ready)):
            self._learn(limit)
        self._unasked -= ready

    async def _context_of(self, upstream: sdg.Upstream) -> int | None:
        """What a server says of its model in the list of models."""
        try:
            cards = (await ask(self.client, "GET", "/models", attempts=2, of=upstream))["data"]
            named = {card["id"]: card for card in cards}
            card = named.get(self.run.model) or (cards[0] if len(cards) == 1 else {})
        except (Unusable, LookupError, TypeError):  # not every server has one
            return None
        told = (card.get(name) for name in CONTEXT_NAMES)
        return next((limit for limit in told if isinstance(limit, int) and limit > 0), None)

    def _learn(self, limit: int | None) -> None:
        """Take a context that is smaller than what was known."""
        if limit is not None and (self._limit is None or limit < self._limit):
            if self._limit is not None:
                sdg.say(f"the server takes {limit:,} tokens, not {self._limit:,}: prompts are fitted to that")
            self._limit = limit

    async def _limit_in(self, problem: sdg.RequestFailed, payload: dict[str, Any]) -> tuple[int | None, bool]:
        """The context that a refusal tells of, and whether it is more than a try; None if it is about something else.

        It must be a number that the tokens of this very prompt exceed. One that is not called the context is no more
        than a try, and that only where the refusal has a code that says what it is about.
        """
        nothing = None, False
        if problem.status not in {400, 413, 422}:
            return nothing
        told, tries, coded = limits_in(problem, payload)
        if not (told or coded) or not texts_of(payload):
            return nothing
        tokens = await self._count(payload, self._limit or TEMPLATE) + (output_of(payload) or 1)
        for limits in (told, tries):
            if exceeded := [limit for limit in limits if limit < tokens]:
                return exceeded[0], limits is told
        return (tokens // 2, False) if coded else nothing

    # Lengths of text

    async def fitting_length(
        self, text: str, tokens: int, patterns: tuple[re.Pattern[str], ...], *, strip: bool = False
    ) -> int:
        """How many characters of a text's beginning have `tokens` tokens or fewer, up to a good end.

        With `strip` white space at that end is not counted.
        """

        def kept(most: int) -> int:
            return ending(text, most, patterns)

        async def count(most: int) -> int:
            beginning = text[: kept(most)]
            return await self.tokens.count(beginning.rstrip() if strip else beginning)

        whole = await count(len(text)) if len(text) <= LOOSE * tokens else None
        if whole is not None and whole <= tokens:
            return len(text)
        guess = await self.tokens.guess(text, tokens, whole)
        return kept(await search(count, kept, len(text), tokens, (0, 0), guess))

    async def part_ends(self, text: str, tokens: int) -> list[int]:
        """Where the parts of a text end that have `tokens` tokens or fewer, and all about as many."""
        patterns = (PARAGRAPH, SENTENCE, WORD)
        most, ends = await self.fitting_length(text[: LOOSE * tokens], tokens, patterns) or 1, [0]
        while (left := len(text) - ends[-1]) > 0:
            even = math.ceil(left / math.ceil(left / most))
            part = text[ends[-1] : ends[-1] + even + 1]
            part = part[: ending(part, even, patterns)]
            if await self.tokens.count(part) > tokens:
                part = part[: await self.fitting_length(part, tokens, patterns) or 1]  # a character at least
            ends.append(ends[-1] + len(part))
        return ends[1:]

    # Parts

    async def run_parts(self, rollout: sdg.RolloutRun, ends: list[int] | None) -> list[dict[str, Any]] | dict[str, Any]:
        """Run the rollout for each part of its document, and join what comes of it.

        Args:
            rollout: of the whole document, which did not fit.
            ends: where the parts end, if an earlier process has settled that.
        """
        document = rollout.document
        text = max(user_texts(document), key=len, default="") if document.messages else document.text
        if ends is None:
            ends = await self.part_ends(text, (rollout.room or 0) - SEAM)
        if len(ends) < 2:
            return _failure("the prompt leaves no room for even a part of the document", 0)
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
        parts = rollout.parts([part_of(document, text, piece) for piece in pieces], ends)
        slots, broken = asyncio.Semaphore(PARTS_AT_ONCE), asyncio.Event()

        async def run(part: sdg.RolloutRun) -> list[dict[str, Any]] | dict[str, Any]:
            async with slots:
                # What follows a part that has failed would be paid for in vain.
                outcome = [] if broken.is_set() or not part.document.text.strip() else await part.run()
                if isinstance(outcome, dict):
                    broken.set()
                return outcome

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(part)) for part in parts]
        return joined([task.result() for task in tasks])


async def _in_thread(size: int, work: Callable[[], Any]) -> Any:
    """The result of some work on text, done in a thread if it would hold up the event loop."""
    return await asyncio.to_thread(work) if size > 200_000 else work()


def _failure(message: str, attempts: int) -> dict[str, Any]:
    return {"error": message, "error_type": "RequestFailed", "attempts": attempts}


def part_of(document: sdg.Document, text: str, piece: str) -> sdg.Document:
    """The document with a piece in place of a text: its own or, of a chat, of a message."""
    if not document.messages:
        return dataclasses.replace(document, text=piece)
    texts = texts_of({"messages": document.messages})
    place = next(place for place, own in texts.items() if own == text and document.messages[place[0]]["role"] == "user")
    messages = with_texts({"messages": document.messages}, {place: piece})["messages"]
    contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    return dataclasses.replace(document, text="\n\n".join(contents), messages=messages)


def joined(outcomes: list[list[dict[str, Any]] | dict[str, Any]]) -> list[dict[str, Any]] | dict[str, Any]:
    """What the parts' outcomes are together: one text where each has one, else all results one after the other."""
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


def limits_in(problem: sdg.RequestFailed, payload: dict[str, Any]) -> tuple[list[int], list[int], bool]:
    """Numbers in a refusal that are called the context; others that may be it; whether its code says that it is that.

    What the prompt itself says of contexts does not count: a refusal may quote it.
    """
    error = error_in(problem.body)
    coded = bool(CONTEXT_CODES & {value for value in error.values() if isinstance(value, str)})
    texts, output = texts_of(payload).values(), output_of(payload) or 0
    most = len(orjson.dumps(payload)) + output + TEMPLATE  # a token is a byte at least

    def possible(numbers: Iterable[str]) -> list[int]:
        values = (int(number.replace(",", "")) for number in numbers)
        return [value for value in values if SMALLEST_PART < value < most and value != problem.status]

    said = words_of(error)
    told = [match for match in CONTEXT_TOLD.finditer(said) if not any(match[0] in text for text in texts)]
    numbers = set(possible(re.findall(rf"(?<!\d){NUMBER}", said)) if coded else []) - {output}
    # "at least 1049 input tokens" is only what is left of the context beside the output, and one
    tries = sorted(number for number in numbers if number + output - 1 not in numbers)
    return possible(match[1] for match in told), tries, coded


def words_of(error: dict[str, Any]) -> str:
    """An error's message and its numbers with their names; what else it holds may be the request's."""
    numbers = [f"{name}: {value}" for name, value in error.items() if type(value) is int]
    messages = [error[name] for name in ("message", "detail", "error") if isinstance(error.get(name), str)]
    return "\n".join([*messages, *numbers])
