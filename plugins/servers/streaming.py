"""Bodies that are taken in pieces: events of completions become the response that would have been sent at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from sdg_plugins.servers.responses import is_error, read_json, texts_in

LOGPROBS = b'"logprobs":{'  # in an event that has them, which are many times as long as its text
BOM = b"\xef\xbb\xbf"  # may begin a stream
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")  # fields of a delta that are continued


class Take:
    """Where a streamed body goes: `wanted(status, headers)` decides, `piece(bytes)` takes each piece.

    Attributes:
        kept: bytes that it keeps of the pieces.
    """

    kept = 0

    def wanted(self, status: int, headers: Mapping[str, str]) -> bool:
        """True if the body of this response is to be given in pieces."""
        raise NotImplementedError

    def piece(self, piece: bytes) -> None:
        """Take in a piece of the body. What it raises fails the request."""
        raise NotImplementedError


class Assembly:
    """A response that grows piece by piece (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Attributes:
        begun: True once there was a part of a completion, or an error.
        complete: True once each choice has its reason to finish, or there is an error.
        done: True once the server has said that the stream ends.
        size: bytes that are kept, about.
        malformed: the first event that is not a part of a completion: the response is then no JSON.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of a line that has not ended
        self._event: list[bytes] = []
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}  # pieces: to append to a long text copies it each time
        self.done = False
        self.size = 0
        self.malformed = b""

    @property
    def complete(self) -> bool:
        """True if nothing is missing. That the stream was ended is not enough: a server may do so when it gives up."""
        finished = all(choice.get("finish_reason") for choice in self._choices.values())
        ended = finished if self._choices else self.done
        return ended or "error" in self._head or bool(self.malformed)

    @property
    def begun(self) -> bool:
        """True if there was a part of a completion, or an error."""
        return bool(self._choices) or "error" in self._head

    def feed(self, piece: bytes) -> None:
        """Take in some bytes."""
        self._rest.append(piece)
        if b"\n" not in piece and b"\r" not in piece:
            return
        content = b"".join(self._rest)
        half = content[-1:] if content.endswith(b"\r") else b""  # the other half of this end of a line may follow
        content = content[: len(content) - len(half)]
        if b"\r" in content:
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = content.split(b"\n")
        self._rest = [rest + half]
        for line in lines:
            if line.startswith((b"data:", BOM + b"data:")):
                self._event.append(line.removeprefix(BOM)[5:].removeprefix(b" "))
            elif not line.strip() and self._event:
                self._take(b"\n".join(self._event))
                self._event = []

    def body(self) -> bytes:
        """The whole response as JSON."""
        if self.malformed:
            return b"an event of the stream is malformed: " + self.malformed
        for (index, name), pieces in self._texts.items():
            choice = self._choices[index]
            (choice if name == "text" else choice["message"])[name] = "".join(pieces)
        choices = [choice for _, choice in sorted(self._choices.items())]
        return orjson.dumps({**self._head, **({"choices": choices} if choices else {})})

    def _take(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self.done = True
            return
        try:
            event = read_json(data)[0] if data.strip() else {}
            if isinstance(event, dict):
                self._add_event(event)
                self.size += len(data) if LOGPROBS in data else 0
        except (AttributeError, LookupError, TypeError, ValueError):
            self.malformed = self.malformed or data

    def _add_event(self, event: dict[str, Any]) -> None:
        if is_error(event):
            event = {"error": event.get("error") or event}
        self._head |= {name: value for name, value in event.items() if name not in {"choices", "object"} and value}
        for part in event.get("choices") or []:
            index = int(part.get("index") or 0)
            self._add(self._choices.setdefault(index, {"index": index, "finish_reason": None}), part)

    def _append(self, index: int, name: str, text: Any) -> None:
        if isinstance(text, str):
            self._texts.setdefault((index, name), []).append(text)
            self.size += len(text)

    def _add(self, choice: dict[str, Any], part: dict[str, Any]) -> None:
        """Continue a choice by a part of it."""
        self._append(choice["index"], "text", part.get("text"))
        delta = part["delta"] if "delta" in part else part.get("message")  # the last part may repeat the whole message
        if isinstance(delta, dict):
            message = choice.setdefault("message", {"role": "assistant"})
            for name in TEXTS:
                self._append(choice["index"], name, delta.get(name))
            if isinstance(delta.get("content"), list):
                for name, text in zip(TEXTS, texts_in(delta["content"]), strict=False):
                    self._append(choice["index"], name, text or None)
            for call in delta.get("tool_calls") or []:
                continue_call(message.setdefault("tool_calls", []), call)
        if isinstance(logprobs := part.get("logprobs"), dict):
            known = choice.setdefault("logprobs", {})
            for name, values in logprobs.items():
                known[name] = [*known.get(name, []), *values] if isinstance(values, list) else values
        for name in ("finish_reason", "error", "stop_reason"):
            if part.get(name):
                choice[name] = part[name]


def continue_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a part of a tool call to those that are there: its arguments come in pieces."""
    index = part.get("index", len(calls))
    if not 0 <= index <= len(calls) + 100:
        raise ValueError(f"index {index}")
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[index], part.get("function") or {}
    call |= {name: part[name] for name in ("id", "type") if part.get(name)}
    for name in ("name", "arguments"):
        call["function"][name] += function.get(name) or ""
