"""What servers respond, and what it means: replies, errors, requests to wait.

Shared by the client, which sends requests, and by everything that looks at responses that are already stored.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson

import sdg

LONGEST_REST = 3600.0  # s: the longest pause that a server can ask for
SHORTEST_KEY = 12  # characters


def parse_reply(answer: Any) -> sdg.Reply:
    """Parse a chat or completion response (https://platform.openai.com/docs/api-reference).

    `sdg_truncated`, which we add ourselves, marks the response to a prompt that was cut.

    Raises:
        RequestFailed: it has another shape, or neither text nor a tool call.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise sdg.RequestFailed("body", f"the response has no choices: {shown(json.dumps(answer).encode())}")
    usage = answer.get("usage")
    usage = {name: usage[name] for name in sdg.TOKENS if is_count(usage.get(name))} if isinstance(usage, dict) else None
    replies: list[sdg.Reply] = []
    for choice in choices:
        reply = _parse_choice(choice, usage if not replies else None, bool(answer.get("sdg_truncated")))
        if reply.text or reply.tool_calls:
            replies.append(reply)
    if not replies:
        reason = choices[0].get("finish_reason")
        thought = ", all of its tokens are reasoning" if _parse_choice(choices[0]).reasoning else ""
        hint = "; raise --max-tokens" if reason == "length" else ""
        message = f"the completion is empty (finish_reason {reason}){thought}{hint}"
        raise sdg.RequestFailed("empty", message, retry=reason != "length")
    return dataclasses.replace(replies[0], choices=tuple(replies)) if len(replies) > 1 else replies[0]


def _parse_choice(choice: dict[str, Any], usage: sdg.Usage | None = None, truncated: bool = False) -> sdg.Reply:
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    content = message.get("content")
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return sdg.Reply(
        content if isinstance(content, str) else "",
        message.get("reasoning_content") or message.get("reasoning"),
        choice.get("finish_reason"),
        usage,
        message.get("tool_calls") or None,
        choice.get("logprobs"),
        truncated,
    )


def is_count(value: Any) -> bool:
    """True if a server's figure can be a number of tokens; sums of invented ones would not fit into the state."""
    return isinstance(value, int) and 0 <= value < 1 << 40


def tokens_in(answer: Any) -> dict[str, int]:
    """Prompt and completion tokens that a response counts."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return {}
    return {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if is_count(usage.get(name))}


def without_key(raw: bytes, key_name: str) -> bytes:
    """A response without the API key, because it goes into messages, records and state.

    Short keys are not secrets but words such as EMPTY, which completions may contain, too.
    """
    key = os.environ.get(key_name, "").encode()
    return raw.replace(key, b"***") if len(key) >= SHORTEST_KEY else raw


def error_in(raw: bytes) -> dict[str, Any]:
    """The object in an error's body that describes it: OpenAI and vLLM nest it, SGLang is flat; empty if none does."""
    try:
        body = orjson.loads(raw)
    except ValueError:  # for example a proxy's HTML page
        return {}
    if not isinstance(body, dict):
        return {}
    error = body.get("error")
    return error if isinstance(error, dict) else body


def error_text(raw: bytes) -> str:
    """The message in an error's body, shortened."""
    error = error_in(raw)
    for name in ("message", "detail", "error"):
        if error.get(name):
            return shown(str(error[name]).encode(errors="replace"))
    return shown(raw)


def shown(raw: bytes) -> str:
    """A body for a message: one line of at most 300 characters."""
    text = sdg.one_line(raw[:600].decode(errors="replace"))
    return text if len(text) <= 300 else text[:300] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: a number, or an HTTP date (RFC 9110, section 10.2.3)."""
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After")
    try:
        if "retry-after-ms" in headers:  # Azure's, more precise
            return min(max(0.0, float(headers["retry-after-ms"]) / 1000), LONGEST_REST)
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), LONGEST_REST) if math.isfinite(seconds) else None


def quota_pause(headers: Mapping[str, str]) -> float:
    """Seconds until an exhausted quota is renewed; 0 if some of it is left, or unknown.

    OpenAI's headers (https://platform.openai.com/docs/guides/rate-limits), adopted by others: requests and tokens that
    remain, and the time to the reset in Go's format of durations, such as `6m0s` or `20ms`.
    """
    pause = 0.0
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[hms]|$)", headers.get(f"x-ratelimit-reset-{kind}", ""))
            units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
            pause = max(pause, sum(float(number) * units[unit] for number, unit in parts))
    return min(pause, LONGEST_REST)
