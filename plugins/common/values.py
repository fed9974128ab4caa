"""Values of Arrow tables as Python and people have them, and what a prompt is made of."""

from __future__ import annotations

import argparse
import base64
import datetime
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import orjson

import sdg
from sdg_plugins.common.kinds import Convert, array_of, decoder, json_text, json_type, was_map

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 80  # characters of a value in a message

# Who speaks in a message of ShareGPT's form, {from, value}
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
SPEAKERS |= {"system": "system", "tool": "tool", "observation": "tool"}

Chat = list[dict[str, Any]]


# ── From Arrow ───────────────────────────────────────────────────────────────────────────────────────────────────────


def values_of(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """A column's values as Python has them: JSON parsed, invalid UTF-8 as bytes, nanoseconds and far years as text.

    Infinite times and dates are None.
    """
    try:
        values = cast("list[Any]", column.to_pylist())
    except (ValueError, OverflowError):
        values = [_value_of(scalar) for scalar in column]
    decode = decoder(column.type)
    return [decode(value) for value in values] if decode else values


def _value_of(scalar: Any) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _value_of(value) for name, value in scalar.items()}
        if hasattr(scalar, "values"):
            return [_value_of(item) for item in scalar.values]
        day_or_time = isinstance(scalar, pa.TimestampScalar | pa.Date32Scalar)
        if day_or_time and abs(scalar.value) == 2 ** (scalar.type.bit_width - 1) - 1:
            return None  # infinity, as DuckDB writes it: it has no text that others read
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else scalar.cast(pa.string()).as_py()


def rows_of(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """A table's rows as Python values."""
    columns = [values_of(column) for column in table.columns]
    names = table.schema.names
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def plain(value: Any) -> str:
    """The closest JSON text for a value that JSON cannot hold: times, decimals, bytes."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)  # as orjson writes times


def in_base64(value: Any) -> str:
    """As `plain`, without a loss: binary values in base64."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else plain(value)


def jsonable(value: Any, default: Callable[[Any], str] = plain) -> Any:
    """A value as JSON has it, with `default` for what it cannot hold."""
    if isinstance(value, dict):
        return {str(key): jsonable(item, default) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, default) for item in value]
    return value if value is None or isinstance(value, str | int | float) else default(value)


def json_line(row: dict[str, Any], default: Callable[[Any], str] = plain) -> bytes:
    """A row as a line of JSON, with `default` for values that JSON cannot hold."""
    try:
        return orjson.dumps(row, default=default, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # integers beyond 64 bits
        return f"{json_text(jsonable(row, default))}\n".encode()


def as_json(array: pa.Array) -> pa.Array:
    """Any values as an array of Arrow's JSON type."""
    return array_of([jsonable(value) for value in values_of(array)], json_type())


def id_text(value: Any) -> str:
    """An id as people write it."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return plain(value)


def json_id(value: Any) -> Any:
    """An id in JSON: a text or a number if it is one, else as people write it."""
    return value if isinstance(value, str | int) or (type(value) is float and math.isfinite(value)) else id_text(value)


def same_id(written: Any, own: Any) -> bool:
    """True if an id in an output is that of a document: JSON has binary ones in base64."""
    return id_text(written) == id_text(own) or (isinstance(own, bytes) and written == in_base64(own))


def id_column_of(options: argparse.Namespace, schema: pa.Schema) -> str | None:
    """The column that names the documents; None if they are named by file and row."""
    return options.id_column or ("id" if "id" in schema.names else None)


def pick(table: pa.Table, positions: list[int]) -> pa.Table:
    """Some rows of a table, in order, without copying them: `take` fails above 2 GiB, and for some types."""
    import pyarrow as pa

    runs: list[list[int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([position, 1])
    return pa.concat_tables([table.slice(*run) for run in runs]) if runs else table.slice(0, 0)


def null_row(schema: pa.Schema) -> pa.RecordBatch:
    """One row of nulls."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def prune(kind: pa.DataType) -> Convert | None:
    """Return a function that drops the keys of a value's structs that are null: this row does not have them.

    Maps become objects, with all their keys. What is JSON is left as it stands. None if the type has no structs.
    """
    import pyarrow.types as t

    if was_map(kind):
        of_value = prune(kind.value_type.field(1).type) or (lambda value: value)
        return lambda value: (
            None if value is None else {id_text(item["key"]): of_value(item["value"]) for item in value}
        )
    if t.is_struct(kind):
        fields = {field.name: prune(field.type) for field in kind}
        return lambda value: (
            value
            and {
                key: inner(item) if (inner := fields[key]) else item for key, item in value.items() if item is not None
            }
        )
    inner = prune(kind.value_type) if hasattr(kind, "value_type") else None
    return inner and (lambda value: value and [inner(item) for item in value])


class EmptyDocument(sdg.BadDocument):
    """The input row has no text."""


def parse_prompt(value: Any) -> tuple[str, Chat | None]:
    """Text and messages of a prompt column's value; BadDocument if it is not a prompt."""
    if isinstance(value, str):
        if not value.strip():
            raise EmptyDocument("is empty")
        return value, None
    if value is None:
        raise EmptyDocument("is null")
    if isinstance(value, bytes):
        raise sdg.BadDocument("is not UTF-8")
    if not isinstance(value, list) or not value:
        raise sdg.BadDocument(f"is neither text nor a list of messages: {str(value)[:SHOWN]}")
    messages = [message_of(item) for item in value]
    return "\n\n".join(m["content"] for m in messages if isinstance(m.get("content"), str)), messages


def message_of(value: Any) -> dict[str, Any]:
    """A message as it is sent: without keys that are null, and {from, value} as {role, content}."""
    if isinstance(value, list) and all(isinstance(item, dict) and "key" in item for item in value):  # a map
        value = {item["key"]: item.get("value") for item in value}
    if not isinstance(value, dict):
        raise sdg.BadDocument(f"has a message without a role: {str(value)[:SHOWN]}")
    if "role" not in value and isinstance(value.get("from"), str):
        speaker = SPEAKERS.get(value["from"].lower())
        if speaker is None:
            raise sdg.BadDocument(f"has a message from {value['from'][:SHOWN]!r}; known: {', '.join(SPEAKERS)}")
        value = {"role": speaker, "content": value.get("value")}
    if not isinstance(value.get("role"), str):
        raise sdg.BadDocument(f"has a message without a role: {str(value)[:SHOWN]}")
    if not isinstance(value.get("content"), (str, list)) and not value.get("tool_calls"):
        raise sdg.BadDocument(f"has a message without content: {str(value)[:SHOWN]}")
    return {key: item for key, item in value.items() if item is not None}
