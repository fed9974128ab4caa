"""The schema of results: which Arrow types the fields of a rollout's results have.

Each row holds a list of structs: text, reasoning, finish_reason, usage, truncated, then the rollout's own fields, then
`extra`, which keeps as JSON what does not fit the others.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.kinds import columns_of, has_nan, is_json, json_text, type_of

if TYPE_CHECKING:
    import pyarrow as pa


Float32 = typing.Annotated[float, "float32"]  # in annotations of rollouts: `embedding: list[Float32]`
SHORTEST_VECTOR = 8  # numbers in a list that is taken for an embedding without an annotation


def base_fields() -> dict[str, pa.DataType]:
    """The fields of every result."""
    import pyarrow as pa

    text = dict.fromkeys(("text", "reasoning", "finish_reason"), pa.string())
    return {**text, "usage": pa.struct([(name, pa.int64()) for name in sdg.TOKENS]), "truncated": pa.bool_()}


def results_type(fields: Mapping[str, pa.DataType]) -> pa.DataType:
    """The Arrow type of the results column."""
    import pyarrow as pa

    return pa.list_(pa.struct([*fields.items(), ("extra", pa.string())]))


# ── From annotations ─────────────────────────────────────────────────────────────────────────────────────────────────


def annotated_fields(rollout: Callable[..., Any]) -> dict[str, pa.DataType] | None:
    """Fields that a rollout's return annotation promises; None if it promises none."""
    try:
        return _promised(typing.get_type_hints(rollout).get("return"))
    except Exception:  # noqa: BLE001 - an annotation may be anything; it is a promise only if it can be read
        return None


def _promised(annotation: Any) -> dict[str, pa.DataType] | None:
    parts = [part for part in _alternatives(annotation) if part is not type(None)]
    if len(parts) == 1 and typing.get_origin(parts[0]) is list:
        parts = _alternatives(typing.get_args(parts[0])[0])
    if not parts or not all(part in {str, sdg.Reply} or _members(part) for part in parts):
        return None
    members = {name: kind for part in parts if part not in {str, sdg.Reply} for name, kind in _members(part).items()}
    return {name: kind for name, kind in ((n, arrow_type(k)) for n, k in members.items()) if kind is not None}


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union; any other type is its only one."""
    is_union = typing.get_origin(annotation) in {typing.Union, types.UnionType}
    return list(typing.get_args(annotation)) if is_union else [annotation]


def _members(annotation: Any) -> dict[str, Any]:
    """Names and types of the fields of a TypedDict, dataclass or pydantic model; empty for anything else."""
    is_model = dataclasses.is_dataclass(annotation) or hasattr(annotation, "model_fields")
    shaped = typing.is_typeddict(annotation) or is_model
    return typing.get_type_hints(annotation, include_extras=True) if shaped and annotation is not sdg.Reply else {}


def arrow_type(annotation: Any) -> pa.DataType | None:
    """The Arrow type of a Python type; None if there is none (its values are kept as JSON in `extra`)."""
    import pyarrow as pa

    plain = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if annotation is sdg.Reply:
        return pa.struct([(name, kind) for name, kind in base_fields().items() if name != "truncated"])
    if origin is typing.Annotated and "float32" in arguments[1:]:
        return pa.float32()
    if origin in {typing.Required, typing.NotRequired, typing.Annotated}:
        return arrow_type(arguments[0])
    if origin is typing.Literal and len({type(value) for value in arguments}) == 1:
        return arrow_type(type(arguments[0]))
    parts = [part for part in _alternatives(annotation) if part is not type(None)]
    if origin in {typing.Union, types.UnionType}:
        return arrow_type(parts[0]) if len(parts) == 1 else None
    if origin is list:
        item = arrow_type(arguments[0])
        return item and pa.list_(item)
    members = [(name, arrow_type(kind)) for name, kind in _members(annotation).items()]
    return pa.struct(members) if members and all(kind is not None for _, kind in members) else None


# ── From values ──────────────────────────────────────────────────────────────────────────────────────────────────────


def infer_fields(results: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Fields of results without an annotation: each key whose values all have one type."""
    import pyarrow as pa

    kinds = {
        key: pa.list_(pa.float32()) if is_vector(values) else type_of(values)
        for key, values in sorted(columns_of(results).items())
    }
    return {key: kind for key, kind in kinds.items() if not is_json(kind)}


def is_vector(values: list[Any]) -> bool:
    """True if these are embeddings: lists of as many numbers each, which models compute with 32 bits at most."""
    lists = [value for value in values if value is not None]
    if not lists or not all(isinstance(value, list) and len(value) == len(lists[0]) for value in lists):
        return False
    return len(lists[0]) >= SHORTEST_VECTOR and all(type(item) is float for value in lists for item in value)


def fit(result: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """A result as a struct of the fields that `checks` accepts; what does not fit becomes JSON in `extra`."""
    good, rest = {}, {}
    for key, value in result.items():
        if key in checks and checks[key](value):
            good[key] = value
        else:
            rest[key] = value
    if rest:
        good["extra"] = json_text(dict(sorted(rest.items()))) if has_nan(rest) else sorted_json(rest)
    return good


def unfit(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result that `fit` was given, from a row of the output."""
    kept = {key: value for key, value in result.items() if value is not None and key != "extra"}
    return {**kept, **json.loads(result.get("extra") or "{}")}


def sorted_json(value: Any) -> str:
    """A value as JSON, with sorted keys."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
