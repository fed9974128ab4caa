"""How long servers ask to wait: in headers, and in the bodies of their errors."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

LONGEST_REST = 86_400.0  # s: the longest pause that a server can ask for
QUOTAS = [(f"x-ratelimit-remaining-{kind}", f"x-ratelimit-reset-{kind}") for kind in ("requests", "tokens")]
EPOCH = 1e9  # a number above it in a header is a date, in seconds since 1970
UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[dhms]|$)")
# "Please try again in 1m30.5s", "Please retry in 34.07s", "retry after 20 seconds"; the words are those of a refusal
# that has already been recognized by its status
IN_WORDS = re.compile(
    r"(?:try|retry|wait)[a-z ]{0,20}?\b(?:in|after|for)\s+((?:about\s+)?(?:\d+(?:\.\d+)?\s*"
    r"(?:milliseconds?|ms|days?|d|hours?|h|minutes?|mins?|m|seconds?|secs?|s)[\s,]*(?:and\s+)?)+)",
    re.IGNORECASE,
)


def retry_after(headers: Mapping[str, str], error: Mapping[str, Any] | None = None) -> float | None:
    """Seconds that a response asks to wait; None if it does not.

    Args:
        headers: `Retry-After`, a number or an HTTP date (RFC 9110, section 10.2.3), or Azure's `retry-after-ms`.
        error: the object in the body that describes the error: Google's `retryDelay`, or words.
    """
    seconds = _in_headers(headers)
    if seconds is None and error:
        seconds = _in_error(error)
    return None if seconds is None or not math.isfinite(seconds) else min(max(0.0, seconds), LONGEST_REST)


def _in_headers(headers: Mapping[str, str]) -> float | None:
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After")
    try:
        if "retry-after-ms" in headers:  # more precise
            return float(headers["retry-after-ms"]) / 1000
        return from_now(float(value or "nan")) if value else None
    except ValueError:
        try:
            return parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None


def _in_error(error: Mapping[str, Any]) -> float | None:
    details = error.get("details")
    for detail in details if isinstance(details, list) else []:
        if isinstance(detail, dict) and isinstance(delay := detail.get("retryDelay"), str):
            return duration(delay)
    message = error.get("message")
    found = IN_WORDS.search(message[:2000]) if isinstance(message, str) else None
    return duration(found[1]) if found else None


def duration(text: str) -> float:
    """Seconds of a duration: Go's form `6m0s`, or in words such as `20 seconds`; 0 if it is none."""
    short = re.sub(r"(milliseconds?)", "ms", text.lower())
    short = re.sub(r"(day|hour|min(?:ute)?|sec(?:ond)?)s?", lambda word: word[1][0], short)
    return sum(float(number) * UNITS[unit] for number, unit in DURATION.findall(short))


def from_now(seconds: float) -> float:
    """Seconds from now, of a number that may be a date."""
    if seconds > 100 * EPOCH:  # in milliseconds
        seconds /= 1000
    return seconds - time.time() if seconds > EPOCH else seconds


def quota_pause(headers: Mapping[str, str]) -> float:
    """Seconds until an exhausted quota is renewed; 0 if some of it is left, or unknown.

    OpenAI's headers (https://platform.openai.com/docs/guides/rate-limits), adopted by others: requests and tokens that
    remain, and the time to the reset: a duration, a number of seconds, or a date in seconds or milliseconds since 1970.
    """
    pause = 0.0
    for remaining, until in QUOTAS:
        if headers.get(remaining) == "0":
            reset = headers.get(until, "").strip()
            pause = max(pause, from_now(float(reset)) if re.fullmatch(r"\d+(\.\d+)?", reset) else duration(reset))
    return min(max(0.0, pause), LONGEST_REST)
