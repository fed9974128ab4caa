"""Refusals: what an error of a server says of the request, the server, or the account."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.waiting import quota_pause, retry_after
from sdg_plugins.servers.responses import UNCODED_ATTEMPTS, code_in, error_in, error_text, words_in
from sdg_plugins.servers.transport import Answer, redirected

if TYPE_CHECKING:
    from sdg_plugins.common.secrets import Secrets

RETRIED = {408, 409, 425, 429, 498}  # of the 4xx: another attempt may be answered
WHATEVER_IS_ASKED = {401, 402, 403, 404, 405, 410, 412}  # that say more of the account or the URL than of one request
# Codes and types by which an account cannot go on, whatever the status: OpenAI's and those who follow
ACCOUNT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated"}
ACCOUNT |= {"access_terminated", "insufficient_user_quota", "insufficient_balance", "exceeded_current_quota_error"}
TOO_MANY = {"rate_limit_exceeded", "rate_limit_error", "rate_limit"}  # codes and types of a 429
HI = "Hi"  # a prompt that no server can find fault with
FEW_TOKENS = 16  # of a completion: some models take no fewer


def refused(answer: Answer, status: int, url: str, secrets: Secrets) -> sdg.RequestFailed:
    """The failure for an answer that is an error.

    Args:
        answer: what the server sent.
        status: of the HTTP response, or the code of the error inside a 200.
        url: of the server.
        secrets: to keep out of the message.
    """
    error = error_in(answer.body)
    said = secrets.hidden_in(error_text(answer.body) or answer.reason)  # decoded, it may contain a key again
    if target := redirected(answer):
        said = f"redirected to {target}"
    account = bool(ACCOUNT & words_in(error))
    retry = not account and (status in RETRIED or status >= 500)
    failure = sdg.RequestFailed(str(status), f"{status} from {sdg.redact(url)}: {said}", status=status, retry=retry)
    failure.body, failure.account = answer.body, account
    asks = error if failure.overload or status >= 500 else None  # others may quote the document
    asked, quota = retry_after(answer.headers, asks), quota_pause(answer.headers)
    failure.retry_after = max(asked or 0.0, quota) if asked is not None or quota else None
    return failure


def error_inside(answer: Answer, url: str, secrets: Secrets) -> sdg.RequestFailed:
    """The failure for a 200 that holds an error: its own code decides; without one it is tried a second time."""
    error, words = error_in(answer.body), words_in(error_in(answer.body))
    if code := code_in(error) or (402 if ACCOUNT & words else 429 if TOO_MANY & words else None):
        return refused(answer, code, url, secrets)
    message = f"an error inside the response of {sdg.redact(url)}: {secrets.hidden_in(error_text(answer.body))}"
    failure = sdg.RequestFailed("body", message)
    failure.body, failure.most_attempts = answer.body, UNCODED_ATTEMPTS
    return failure


def smallest(request: sdg.Request) -> sdg.Request:
    """The same request with hardly a prompt: a server that refuses this refuses everything."""
    payload: dict[str, Any] = {name: value for name, value in request.payload.items() if name != "n"}
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(payload.get(name), int):
            payload[name] = min(payload[name], FEW_TOKENS)
    if isinstance(payload.get("messages"), list):
        payload["messages"] = [{"role": "user", "content": HI}]
    for name in ("prompt", "input"):
        if name in payload:
            payload[name] = HI
    return sdg.Request(request.path, payload, body=orjson.dumps(payload))


def doubt_about_key(variable: str) -> str:
    """What may be wrong with the key that a server refuses."""
    return f"is the key in ${variable} valid?" if os.environ.get(variable) else f"${variable} is not set"


def way_out(failure: sdg.RequestFailed, options: argparse.Namespace, doubt: str) -> str:
    """What a person can do about a server that refuses everything. `doubt`: what speaks against the model."""
    again = "then run the same command again"
    if failure.account or failure.status == 402:
        return f"settle it with the provider, {again}"
    if failure.status == 401:
        return doubt_about_key(options.api_key_env)
    if failure.status == 403:
        return f"may the key in ${options.api_key_env} use this model? Change that, {again}"
    if failure.status is not None and 300 <= failure.status < 400:
        return "set --base-url to that URL"
    if doubt:
        return doubt
    return "even the smallest request is refused: are --base-url, --model and the sampling options correct?"
