"""Find the document in a prompt, and the places where its text can be cut."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Awaitable, Callable, Hashable, Iterator
from typing import Any

import sdg

TextKey = tuple[int, int]  # of a text in a payload: the indices of its message and content part, or -1
Span = tuple[TextKey, int, int]  # a text, and where a passage of it starts and ends

SHORTEST = 64  # characters: a shorter text in a prompt is not taken for the document
PROBES = 64  # positions in a text at which parts of the document are searched
MAX_COUNTS = 16  # counts that one search for the place to cut may take
PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
SENTENCE = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？．][」』”’）]*\s*|\n\s*")
WORD = re.compile(r"\s+")


# ── Payloads ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def texts_of(payload: dict[str, Any]) -> dict[TextKey, str]:
    """The texts of a payload that become its prompt."""
    texts: dict[TextKey, str] = {}
    if isinstance(payload.get("prompt"), str):
        texts[-1, -1] = payload["prompt"]
    for i, message in enumerate(payload.get("messages") or []):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            texts[i, -1] = content
        elif isinstance(content, list):
            for j, part in enumerate(content):
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    texts[i, j] = part["text"]
    return texts


def with_texts(payload: dict[str, Any], texts: dict[TextKey, str]) -> dict[str, Any]:
    """A payload with other texts. What does not change is shared with the original."""
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


def user_texts(document: sdg.Document) -> list[str]:
    """The texts of the user's messages in a chat."""
    messages = [message for message in document.messages or [] if message.get("role") == "user"]
    return list(texts_of({"messages": messages}).values())


class Prompt:
    """A payload, and the passages of its texts that come from the document.

    Attributes:
        spans: where the passages are.
        passages: their texts, in the same order.
        longest: characters of the longest passage.
    """

    def __init__(self, payload: dict[str, Any], document: sdg.Document) -> None:
        self.payload = payload
        self.texts = texts_of(payload)
        self.spans = list(document_spans(payload, self.texts, document))
        self.passages = [self.texts[key][start:end] for key, start, end in self.spans]
        self.longest = max(map(len, self.passages), default=0)

    def kept(self, most: int) -> tuple[int, ...]:
        """Characters kept of each passage if none may have more than `most`: the longest ones are cut first."""
        return tuple(last_end(passage, most) for passage in self.passages)

    def cut(self, most: int) -> dict[str, Any]:
        """The payload with each passage cut to `most` characters, or fewer if that gives a better end."""
        texts = dict(self.texts)
        for (key, start, end), kept in reversed(list(zip(self.spans, self.kept(most), strict=True))):
            if kept < end - start:
                text = texts[key]
                texts[key] = text[:start] + text[start : start + kept].rstrip() + text[end:]
        return with_texts(self.payload, texts)


# ── The document in a prompt ─────────────────────────────────────────────────────────────────────────────────────────


def document_spans(payload: dict[str, Any], texts: dict[TextKey, str], document: sdg.Document) -> Iterator[Span]:
    """Find the document in a payload's texts: all copies of it, or else the longest part of it.

    For a chat, the document is what the user says. The model's messages are skipped: they may quote the document.
    """
    chat = document.messages is not None
    roles = {"user"} if chat else {"system", "developer", "user", "tool", "function"}
    messages = payload.get("messages") or []
    searched = {key: text for key, text in texts.items() if key[0] < 0 or messages[key[0]].get("role") in roles}
    sought = {text.strip() for text in (user_texts(document) if chat else [document.text])}
    sought = {text for text in sought if len(text) >= SHORTEST}
    spans = [(key, at, at + len(own)) for key in searched for own in sought for at in occurrences(own, searched[key])]
    if not spans:
        parts = [(key, *longest_shared(searched[key], own)) for key in searched for own in sought]
        longest = max(parts, key=lambda part: part[2] - part[1], default=((0, 0), 0, 0))
        spans = [longest] if longest[2] - longest[1] >= SHORTEST else []
    last: tuple[TextKey, int] | None = None
    for key, start, end in sorted(spans, key=lambda span: (span[0], span[1], -span[2])):
        if last is None or last[0] != key or start >= last[1]:  # one message may be part of another
            yield key, start, end
            last = key, end


def occurrences(part: str, text: str) -> Iterator[int]:
    """Positions in a text at which a part of it begins, without overlaps."""
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def longest_shared(text: str, document: str) -> tuple[int, int]:
    """Start and end of the longest stretch of a text that is also in the document, as far as probes find it."""
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
    """Number of equal characters from a position in each of two texts onward."""
    most = min(len(one) - start, len(other) - at)
    return equal_length(most, lambda low, high: one[start + low : start + high] == other[at + low : at + high])


def common_suffix(one: str, end: int, other: str, at: int, most: int) -> int:
    """Number of equal characters before a position in each of two texts, up to `most`."""
    most = min(most, at)
    return equal_length(most, lambda low, high: one[end - high : end - low] == other[at - high : at - low])


def equal_length(most: int, equal: Callable[[int, int], bool]) -> int:
    """The largest n up to `most` such that everything is equal from 0 to n, by bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if equal(low, middle):
            low = middle
        else:
            high = middle - 1
    return low


# ── Where to cut ─────────────────────────────────────────────────────────────────────────────────────────────────────


def last_end(text: str, most: int, patterns: tuple[re.Pattern[str], ...] = (SENTENCE, WORD)) -> int:
    """The last position within the first `most` characters of a text at which it can end.

    The first pattern that matches decides. Each may cost a share of the text: the last third (paragraphs), fifth
    (sentences) or tenth (words). If none matches, the text may end anywhere except within a character that consists of
    several code points.
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
    """True if a code point is a mark on the previous one, or joins the previous and the next one."""
    joins = character == "\u200d" or "\ufe00" <= character <= "\ufe0f" or "\U0001f3fb" <= character <= "\U0001f3ff"
    return joins or unicodedata.combining(character) > 0


async def search(
    count: Callable[[int], Awaitable[int]],
    kept: Callable[[int], Hashable],
    length: int,
    budget: int,
    known: tuple[int, int],
    guess: int,
) -> int:
    """The largest n up to `length` with count(n) ≤ budget, or one that leaves at most 2 % of the budget unused.

    Text has about as many tokens everywhere, so this is regula falsi, with bisection where that converges slowly.

    Args:
        count: tokens if n characters may be kept; does not decrease.
        kept: what is kept of n characters. Nothing is counted while that does not change.
        length: characters.
        budget: tokens.
        known: an n that fits, and its count.
        guess: the n to try first.
    """
    (low, fits), high, over = known, length + 1, 0
    slack, counts, n = max(8, budget // 50), 0, guess
    while counts < MAX_COUNTS and high - low > 1:
        n = min(max(n, low + 1), high - 1)
        if kept(n) == kept(low):
            low, n = n, (n + high) // 2
            continue
        counts += 1
        tokens = await count(n)
        if tokens <= budget:
            low, fits = n, tokens
            if budget - tokens <= slack:
                break
        else:
            high, over = n, tokens
        if counts > MAX_COUNTS // 3:
            n = (low + high) // 2
        elif over:
            n = low + (high - low) * (budget - slack // 2 - fits) // max(1, over - fits)
        else:
            n = known[0] + (low - known[0]) * (budget - slack // 2 - known[1]) // max(1, fits - known[1])
    return low
