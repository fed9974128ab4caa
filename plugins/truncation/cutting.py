from __future__ import annotations

import re
import unicodedata
from collections.abc import Awaitable, Callable, Hashable, Iterator
from typing import Any

import sdg

Place = tuple[int, int]  # of a text in a payload: message and part; -1 where there is none


def texts_of(payload: dict[str, Any]) -> dict[Place, str]:
    """The texts of a payload that become its prompt."""
    found: dict[Place, str] = {}
    if isinstance(payload.get("prompt"), str):
        found[-1, -1] = payload["prompt"]
    for i, message in enumerate(payload.get("messages") or []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            found[i, -1] = content
        elif isinstance(content, list):
            for j, part in enumerate(content):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    found[i, j] = part["text"]
    return found


SHORTEST = 64  # characters: a shorter text in a prompt is not taken for the document's
PROBES = 64  # places of a text where a part of the document is looked for
CALLS = 16  # counts, at the most, to find out where to cut
PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？．][」』”’）]*\s*|\n\s*")
WORD = re.compile(r"\s+")


def ending(text: str, most: int, patterns: tuple[re.Pattern[str], ...] = (SENTENCE, WORD)) -> int:
    """The last good end of a text within its first `most` characters.

    Patterns come in the order in which they are wanted. Each may cost the last third (paragraphs), fifth (sentences)
    or tenth (words) of the text; else it ends anywhere, but not within a character that several code points make up.
    """
    if most >= len(text):
        return len(text)
    shares = {PARAGRAPH: 3, SENTENCE: 5, WORD: 10}
    for pattern in patterns:
        last = 0
        for match in pattern.finditer(text, most - most // shares[pattern], most):
            last = match.end()
        if last:
            return last
    for end in range(most, max(0, most - 32), -1):
        if not _belongs_to_previous(text[end]) and text[end - 1] != "\u200d":
            return end
    return most


def _belongs_to_previous(character: str) -> bool:
    """Whether a code point is a mark on the one before it, or joins the two."""
    joins = character == "\u200d" or "\ufe00" <= character <= "\ufe0f" or "\U0001f3fb" <= character <= "\U0001f3ff"
    return joins or unicodedata.combining(character) > 0


class Prompt:
    """A payload, and the passages in it that are the document's: (place, start, end) in its texts."""

    def __init__(self, payload: dict[str, Any], document: sdg.Document) -> None:
        self.payload = payload
        self.texts = texts_of(payload)
        self.passages = list(passages_of(payload, self.texts, document))
        self.own = [self.texts[place][start:end] for place, start, end in self.passages]
        self.longest = max(map(len, self.own), default=0)

    def kept(self, most: int) -> tuple[int, ...]:
        """Characters that stay of each passage when it may have `most`: so the longest ones are cut first."""
        return tuple(ending(passage, most) for passage in self.own)

    def cut(self, most: int) -> dict[str, Any]:
        """The payload with each passage cut to `most` characters or, at a good end, fewer."""
        texts = dict(self.texts)
        for (place, start, end), kept in reversed(list(zip(self.passages, self.kept(most), strict=True))):
            if kept < end - start:
                whole = texts[place]
                texts[place] = whole[:start] + whole[start : start + kept].rstrip() + whole[end:]
        return with_texts(self.payload, texts)


def passages_of(
    payload: dict[str, Any], texts: dict[Place, str], document: sdg.Document
) -> Iterator[tuple[Place, int, int]]:
    """The document in a payload's texts: all of it, wherever it stands, else the longest part of it that does.

    Of a chat it is what the user says. What the model has said is not looked at: an answer may quote the document.
    """
    chat = document.messages is not None
    roles = {"user"} if chat else {"system", "developer", "user", "tool", "function"}
    messages = payload.get("messages") or []
    places = {place: text for place, text in texts.items() if place[0] < 0 or messages[place[0]].get("role") in roles}
    wanted = {text.strip() for text in (user_texts(document) if chat else [document.text])}
    wanted = {text for text in wanted if len(text) >= SHORTEST}
    whole = [(place, at, at + len(own)) for place in places for own in wanted for at in places_of(own, places[place])]
    if not whole:
        parts = [(place, *shared(places[place], own)) for place in places for own in wanted]
        longest = max(parts, key=lambda part: part[2] - part[1], default=((0, 0), 0, 0))
        whole = [longest] if longest[2] - longest[1] >= SHORTEST else []
    last: tuple[Place, int] | None = None
    for place, start, end in sorted(whole, key=lambda found: (found[0], found[1], -found[2])):
        if last is None or last[0] != place or start >= last[1]:  # one message may be part of another
            yield place, start, end
            last = place, end


def places_of(part: str, text: str) -> Iterator[int]:
    """Where a part begins in a text, from left to right."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def user_texts(document: sdg.Document) -> list[str]:
    """What the user says in a chat."""
    messages = [message for message in document.messages or [] if message.get("role") == "user"]
    return list(texts_of({"messages": messages}).values())


def shared(text: str, document: str) -> tuple[int, int]:
    """Start and end of the longest stretch of a text that is a part of the document, as far as probes find it."""
    best, position = (0, 0), 0
    step = max(SHORTEST // 2, len(text) // PROBES)
    while position + SHORTEST // 2 <= len(text):
        at = document.find(text[position : position + SHORTEST // 2])
        if at >= 0:
            before = common_suffix(text, position, document, at, most=position - best[1])
            after = common_prefix(text, position, document, at)
            start, end = position - before, position + after
            if end - start > best[1] - best[0]:
                best = start, end
            position = max(position, end)
        position += step
    return best


def common_prefix(one: str, start: int, other: str, at: int) -> int:
    """Length of what two texts have in common from these places on."""
    most = min(len(one) - start, len(other) - at)
    return longest(most, lambda low, high: one[start + low : start + high] == other[at + low : at + high])


def common_suffix(one: str, end: int, other: str, at: int, most: int) -> int:
    """Length of what two texts have in common before these places, up to `most`."""
    most = min(most, at)
    return longest(most, lambda low, high: one[end - high : end - low] == other[at - high : at - low])


def longest(most: int, equal: Callable[[int, int], bool]) -> int:
    """The largest n up to `most` such that all is equal from 0 to n, by bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if equal(low, middle):
            low = middle
        else:
            high = middle - 1
    return low


def with_texts(payload: dict[str, Any], texts: dict[Place, str]) -> dict[str, Any]:
    """A payload with other texts; what does not change is shared with the old one."""
    payload = dict(payload)
    for (i, j), text in texts.items():
        if i < 0:
            payload["prompt"] = text
            continue
        payload["messages"] = list(payload["messages"])
        message = payload["messages"][i] = dict(payload["messages"][i])
        if j < 0:
            message["content"] = text
        else:
            message["content"] = list(message["content"])
            message["content"][j] = {**message["content"][j], "text": text}
    return payload


async def search(
    count: Callable[[int], Awaitable[int]],
    kept: Callable[[int], Hashable],
    length: int,
    budget: int,
    known: tuple[int, int],
    guess: int,
) -> int:
    """The largest n up to `length` with count(n) ≤ budget, or one that is less than 2 % of the budget from it.

    By regula falsi and, where that is slow, bisection: text has about as many tokens everywhere.

    Args:
        count: tokens when n characters may be kept; does not decrease.
        kept: what really is kept of n: as long as that does not change nothing is counted.
        length: characters.
        budget: tokens.
        known: an n that fits, and its count.
        guess: where to look first.
    """
    (low, fits), high, over = known, length + 1, 0
    slack, calls, n = max(8, budget // 50), 0, guess
    while calls < CALLS and high - low > 1:
        n = min(max(n, low + 1), high - 1)
        if kept(n) == kept(low):
            low, n = n, (n + high) // 2
            continue
        calls += 1
        tokens = await count(n)
        if tokens <= budget:
            low, fits = n, tokens
            if budget - tokens <= slack:
                break
        else:
            high, over = n, tokens
        if calls > CALLS // 3:
            n = (low + high) // 2
        elif over:
            n = low + (high - low) * (budget - slack // 2 - fits) // max(1, over - fits)
        else:
            n = known[0] + (low - known[0]) * (budget - slack // 2 - known[1]) // max(1, fits - known[1])
    return low
