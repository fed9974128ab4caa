"""What servers respond, and what it means: a reply, or a failure with what follows from it.

Shared by the client, which sends requests, and by everything that looks at responses that are already stored.
Protocol: https://platform.openai.com/docs/api-reference, as hosted providers and inference engines really speak it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

import sdg
from sdg_plugins.common.returned import FIELDS

# Reasons to finish, in lower case, by which a server says that it gave up: vLLM and SGLang abort, OpenRouter, GLM,
# DeepSeek and Cohere fail.
GAVE_UP = {"abort", "aborted", "canceled", "cancelled", "engine_error", "error", "failed", "incomplete"}
GAVE_UP |= {"insufficient_system_resource", "internal_error", "internal_server_error", "network_error", "overloaded"}
GAVE_UP |= {"server_error", "timeout", "unavailable", "user_cancel"}
# Reasons, in lower case, for which an empty completion would be empty again: Cohere, Mistral and Gemini have their own.
CUT_OFF = {"length", "max_tokens", "max_output_tokens", "model_length"}
FILTERED = {"content_filter", "blocklist", "prohibited_content", "recitation", "safety", "spii"}
TEXT_PARTS = {None, "text", "output_text"}  # types of the parts of a message's content that are its text
# How much a reason to finish spoils a result that several replies made: the last one here most.
SEVERITY = ("stop", "tool_calls", "function_call", "", "repetition", "length", "content_filter")
RANK = {reason: number for number, reason in enumerate(SEVERITY)}
UNCODED_ATTEMPTS = 2  # at a request whose 200 holds an error without a code
EMPTY_ATTEMPTS = 2  # at a request whose completion is empty though the model stopped by itself


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_json(raw: bytes) -> tuple[Any, bytes]:
    """Parse JSON as servers write it: with NaN, infinities, lone surrogates, a byte order mark, or in UTF-16.

    What JSON cannot hold is replaced: numbers by null, integers beyond 64 bits by floats, surrogates by U+FFFD.

    Returns:
        The value, and strict JSON of it: `raw` itself if it is that.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return orjson.loads(raw), raw
    except ValueError:
        try:
            value = _clean(json.loads(raw))
            return value, orjson.dumps(value)
        except (RecursionError, TypeError) as exc:
            raise ValueError("it is nested too deeply") from exc


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, int) and value.bit_length() > 63:
        return float(value) if value.bit_length() < 1024 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {_clean(key): _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


# ── Replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def reply_without_text(answer: Any) -> sdg.Reply:
    """What counts of a response that is not a completion, such as embeddings. Raises RequestFailed."""
    if not isinstance(answer, dict | list):
        raise sdg.RequestFailed("body", f"the response is not an object: {shown(compact(answer))}")
    return sdg.Reply("", usage=usage_in(answer))


def usage_in(answer: Any) -> sdg.Usage | None:
    """The tokens that a response counts, by their names; None if it counts none of a prompt or a completion."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = {name: usage[name] for name in sdg.TOKENS if is_count(usage.get(name))}
    return counts if any(counts.get(name) for name in sdg.TOKENS[:2]) else None


def parse_reply(answer: Any, keep_empty: bool = False) -> sdg.Reply:
    """Parse a chat or completion response.

    `sdg_truncated`, which we add ourselves, marks the response to a prompt that was cut.

    Args:
        answer: the response as Python values.
        keep_empty: return a reply without text rather than raise.

    Raises:
        RequestFailed: it has another shape, the server gave up, or there is neither text nor a tool call.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all([isinstance(choice, dict) for choice in choices]):
        raise sdg.RequestFailed("body", f"the response has no choices: {shown(compact(answer))}")
    usage = usage_in(answer)
    truncated = bool(answer.get("sdg_truncated"))
    replies: list[sdg.Reply] = []
    for choice in choices:
        reply = _parse_choice(choice, None if replies else usage, truncated)
        if gave_up(reply.finish_reason) or choice.get("error") or answer.get("error"):
            raise _broken_off(choice.get("error") or answer.get("error"), reply)
        replies.append(reply)
    kept = [reply for reply in replies if reply.text or reply.tool_calls]
    if not kept and not keep_empty:
        raise _empty(choices[0], replies[0])
    kept = kept or replies[:1]
    if usage and not kept[0].usage:
        kept[0] = dataclasses.replace(kept[0], usage=usage)
    return sdg.Reply(*FIELDS(kept[0]), *[tuple(kept)])


def _parse_choice(choice: dict[str, Any], usage: sdg.Usage | None, truncated: bool) -> sdg.Reply:
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    content, thought = texts_in(message.get("content"))
    calls = message.get("tool_calls") or None
    if not calls and isinstance(message.get("function_call"), dict):  # the form before `tools`
        calls = [{"type": "function", "function": message["function_call"]}]
    reason = choice.get("finish_reason")
    if isinstance(reason, dict):  # SGLang's own API has an object
        reason = reason.get("type")
    return sdg.Reply(
        content,
        message.get("reasoning_content") or message.get("reasoning") or thought or None,
        reason if isinstance(reason, str) else None,
        usage,
        calls,
        choice.get("logprobs"),
        truncated,
    )


def texts_in(content: Any) -> tuple[str, str]:
    """The text and the reasoning in the content of a message, which is a text or a list of parts."""
    if isinstance(content, str):
        return content, ""
    texts: tuple[list[str], list[str]] = [], []
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            inner = part.get("text") or part.get("thinking")
            if isinstance(inner, list):  # Mistral's reasoning
                inner = "".join([str(each.get("text") or "") for each in inner if isinstance(each, dict)])
            texts[part.get("type") not in TEXT_PARTS].append(str(inner or ""))
    return "".join(texts[0]), "".join(texts[1])


def gave_up(reason: str | None) -> bool:
    """True if a reason to finish says that the text before it is not a completion."""
    reason = (reason or "").lower()
    return reason in GAVE_UP or reason.startswith("error_")


def _broken_off(error: Any, reply: sdg.Reply) -> sdg.RequestFailed:
    """The failure for a choice that a server gave up on: the text in it is not a completion."""
    words = error_text(compact({"error": error})) if error else f"finish_reason {reply.finish_reason}"
    failure = sdg.RequestFailed("aborted", f"the server broke the completion off: {words}")
    failure.reply = reply
    return failure


def _empty(choice: dict[str, Any], reply: sdg.Reply) -> sdg.RequestFailed:
    """The failure for a response without text; asking again helps only if the model stopped by itself."""
    message = choice.get("message")
    refusal = message.get("refusal") if isinstance(message, dict) else None
    if isinstance(refusal, str) and refusal.strip():
        failure = sdg.RequestFailed("refusal", f"the model refused: {shown(refusal.encode())}", retry=False)
    else:
        reason = (reply.finish_reason or "").lower()
        thought = ", all of its tokens are reasoning" if reply.reasoning else ""
        hint = "; raise --max-tokens" if reason in CUT_OFF else ""
        message = f"the completion is empty (finish_reason {reply.finish_reason}){thought}{hint}"
        failure = sdg.RequestFailed("empty", message, retry=reason not in CUT_OFF | FILTERED)
        failure.most_attempts = EMPTY_ATTEMPTS
    failure.reply, failure.refusal = reply, refusal if isinstance(refusal, str) else None
    return failure


def is_count(value: Any) -> bool:
    """True if a server's figure can be a number of tokens; sums of invented ones would not fit into the state."""
    return isinstance(value, int) and 0 <= value < 1 << 40


def tokens_in(answer: Any) -> dict[str, int]:
    """Prompt and completion tokens that a response counts, and those of the prompt that came from a prefix cache."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details")
    counts = {name: usage[name] for name in sdg.TOKENS[:2] if is_count(usage.get(name))}
    if isinstance(details, dict) and is_count(details.get("cached_tokens")):
        counts["cached_tokens"] = details["cached_tokens"]
    return counts


def count_choices(body: bytes) -> int:
    """How many completions a response holds."""
    choices = read_json(body)[0].get("choices")
    return len(choices) if isinstance(choices, list) else 0


def merged(bodies: list[bytes]) -> bytes:
    """One response with the completions of several, and the sum of their usage."""
    contents = [read_json(body)[0] for body in bodies]
    choices = [choice for content in contents for choice in content["choices"]]
    usages = [content["usage"] for content in contents if isinstance(content.get("usage"), dict)]
    sums = {name: sum(usage[name] for usage in usages if is_count(usage.get(name))) for name in sdg.TOKENS}
    numbered = [{**choice, "index": index} for index, choice in enumerate(choices)]
    return orjson.dumps({**contents[0], "choices": numbered, **({"usage": sums} if usages else {})})


def worst(reasons: list[str | None]) -> str | None:
    """The reason to finish that says most about a result made of several replies; None if there is none."""
    return max(filter(None, reasons), key=lambda reason: RANK.get(reason, RANK[""]), default=None)


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_in(raw: bytes) -> dict[str, Any]:
    """The object in an error's body that describes it; empty if there is none.

    OpenAI and vLLM nest it in `error`, SGLang is flat, FastAPI has `detail`, Google wraps it into a list.
    """
    try:
        body, _ = read_json(raw)
    except ValueError:  # for example a proxy's HTML page
        return {}
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return {}
    error = body.get("error")
    return error if isinstance(error, dict) else body


def error_text(raw: bytes) -> str:
    """The message in an error's body, shortened; of a page its title."""
    error = error_in(raw)
    for name in ("message", "detail", "error", "msg"):
        if error.get(name):
            value = error[name]
            return shown(value.encode(errors="replace") if isinstance(value, str) else compact(value))
    title = re.search(rb"<title[^>]*>(.*?)</title>", raw[:20_000], re.IGNORECASE | re.DOTALL)
    return shown(title[1]) if title and re.match(rb"\s*<", raw) else shown(raw)


def is_error(content: Any) -> bool:
    """True if a response is an error and not a completion: nested in `error`, or flat, as older vLLM and SGLang do."""
    if not isinstance(content, dict) or content.get("choices"):
        return False
    flat = content.get("object") == "error" or ("message" in content and code_in(content) is not None)
    return bool(content.get("error")) or flat


def code_in(error: Mapping[str, Any]) -> int | None:
    """The HTTP status that an error carries as its code."""
    for name in ("code", "status", "status_code", "http_status"):
        value = error.get(name)
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        if type(value) is int and 400 <= value < 600:
            return value
    return None


def words_in(error: Mapping[str, Any]) -> set[str]:
    """The words by which an error says of what kind it is."""
    return {value for name in ("code", "type", "status") if isinstance(value := error.get(name), str)}


def compact(value: Any) -> bytes:
    """JSON of a value for a message."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return b"nested too deeply"


def shown(raw: bytes) -> str:
    """A body for a message: one line of at most 300 characters."""
    text = sdg.one_line(raw[:600].decode(errors="replace"))
    return text if len(text) <= 300 else text[:300] + "…"
