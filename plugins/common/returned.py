"""What rollouts return, as results: dicts whose keys are the fields of a row's results."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import sdg

# What a reply has beside its choices. `dataclasses.replace` takes three times as long, for each response.
NAMES = [field.name for field in dataclasses.fields(sdg.Reply) if field.name != "choices"]
FIELDS: Callable[[sdg.Reply], tuple[Any, ...]] = operator.attrgetter(*NAMES)


def results_of(value: Any, usage: sdg.Usage | None) -> list[dict[str, Any]]:
    """Convert what a rollout returned to a list of results; empty for None.

    Args:
        value: a str, dict, Reply, dataclass, pydantic model, a list of those, or None.
        usage: tokens of the whole rollout, for results that are not a single reply.

    Raises:
        BadResult: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, list):
        if any(isinstance(item, list) for item in value):
            raise sdg.BadResult(
                "the rollout returned a list of lists: return one list of results, or the lists in dicts"
            )
        parts = [results_of(item, None) for item in value]
        results = [result for part in parts for result in part]
        if usage and results and not any("usage" in result for result in results):
            results[0] = {**results[0], "usage": usage}
        return results
    if isinstance(value, sdg.Reply):
        untouched = value.choices and FIELDS(value) == FIELDS(value.choices[0])
        return [_reply_result(choice) for choice in (value.choices if untouched else (value,))]
    value = _fields_of(value)
    if not isinstance(value, dict):
        missing = "await" if inspect.isawaitable(value) else "list(…)" if isinstance(value, Iterable) else ""
        if inspect.iscoroutine(value):
            value.close()  # otherwise Python warns on the terminal that it was never awaited
        hint = f"is {missing} missing?" if missing else "expected a str, dict, Reply, list or None"
        raise sdg.BadResult(f"the rollout returned a {type(value).__name__}: {hint}")
    if not all(isinstance(key, str) for key in value):
        raise sdg.BadResult("the rollout returned a dict with keys that are not str: they name fields of the result")
    value = {key: _plain_replies(item) for key, item in value.items()}
    return [value if "usage" in value or not usage else {**value, "usage": usage}]


def _fields_of(value: Any) -> Any:
    """The fields of a single result: a text is `text`, a number or a truth value is `value`."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, bool | int | float):
        return {"value": value}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def _plain_replies(value: Any) -> Any:
    """A field of a result, with the replies in it as dicts."""
    if isinstance(value, sdg.Reply):
        return _reply_result(value)
    if isinstance(value, dict):
        return {key: _plain_replies(item) for key, item in value.items()}
    return [_plain_replies(item) for item in value] if isinstance(value, list) else value


def _reply_result(reply: sdg.Reply) -> dict[str, Any]:
    names = ("text", "reasoning", "finish_reason", "usage", "tool_calls", "logprobs")
    return {name: value for name in names if (value := getattr(reply, name)) is not None}


def no_prompt(kind: str, error: str, empty: bool = False) -> dict[str, Any]:
    """The failure of a document that has no usable prompt, perhaps because its text is empty."""
    return {"error": error, "error_type": kind, "attempts": 0} | ({"empty": True} if empty else {})


def status_of(outcome: Any) -> str:
    """The status of a document in the store: row, filtered, failed, or empty: failed because it has no text."""
    if not isinstance(outcome, dict):
        return "row" if outcome else "filtered"
    return "empty" if outcome.get("empty") is True and not outcome["attempts"] else "failed"
