"""JSON values as Arrow columns: types that hold every value exactly, and Arrow's JSON type where there is none.

A column of the JSON type (`arrow.json`, which `datasets`, DuckDB and polars know) holds JSON as text. It stands where
values have several types, where a type cannot be told (only nulls, empty objects), and for objects of very many keys
or very many levels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import pyarrow as pa

MOST_FIELDS = 500  # of a struct: a column for each of thousands of keys makes footers of megabytes
MOST_LEVELS = 40  # of lists and structs: parquet files with 100 are unreadable (a list is two), Arrow's with 64
EXACT = 2**53  # integers up to here are exact as floats
LARGEST_FLOAT32 = 3.4e38
OF_MAP = {b"sdg.map": b"key"}  # metadata of a field
PLAIN_VALUES = {str, int, bool, type(None)}
HUGE = float(2**63)  # orjson reads integers from here on as floats, which are not exact

Check = Callable[[Any], bool]
Convert = Callable[[Any], Any]


def json_type() -> pa.DataType:
    """Arrow's JSON type."""
    import pyarrow as pa

    return pa.json_(pa.string())


def is_json(kind: pa.DataType) -> bool:
    """True for Arrow's JSON type."""
    import pyarrow as pa

    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def parts_of(kind: pa.DataType) -> list[pa.DataType]:
    """The types that a type is made of; none if it is not nested."""
    return [kind.field(i).type for i in range(kind.num_fields)]


def holds(kind: pa.DataType, test: Check) -> bool:
    """True if a test is true for a type, or for one of its parts at any depth."""
    return test(kind) or any(holds(part, test) for part in parts_of(kind))


# ── Parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_json(content: bytes, exact: bool = True) -> Any:
    """The value of a JSON text, as Python's `json` writes it: NaN, infinities and lone surrogates are accepted.

    A lone surrogate, which no encoding can hold, becomes U+FFFD.

    Args:
        content: the text, in UTF-8.
        exact: look for integers beyond 64 bits, which are floats otherwise.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as exc:
        try:
            return without_surrogates(json.loads(content))
        except (ValueError, RecursionError):
            raise exc from None
    return json.loads(content) if exact and has_huge(value) else value


def has_huge(value: Any) -> bool:
    """True if there is a float in a value that may have been an integer beyond 64 bits."""
    if isinstance(value, float):
        return abs(value) >= HUGE and not math.isinf(value)
    if isinstance(value, dict):
        return any(map(has_huge, value.values()))
    return isinstance(value, list) and any(map(has_huge, value))


def has_nan(value: Any) -> bool:
    """True if there is a float in a value that standard JSON does not have."""
    if isinstance(value, float):
        return not math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(has_nan(item) for item in items if type(item) not in PLAIN_VALUES)


def without_surrogates(value: Any) -> Any:
    """A JSON value whose texts can be encoded."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return [without_surrogates(item) for item in value] if isinstance(value, list) else value


def json_text(value: Any) -> str:
    """A value as JSON. NaN and large integers stay what they are, which orjson does not support."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ── Types of values ──────────────────────────────────────────────────────────────────────────────────────────────────


def type_of(values: Iterable[Any], exact: bool = False, levels: int = MOST_LEVELS) -> pa.DataType:
    """The Arrow type that holds some JSON values; the JSON type if no other one does.

    Args:
        values: nulls among them say nothing.
        exact: an object that lacks a key of others, or has it as null, makes the JSON type: a struct would not tell
            one from the other. So do integers beside floats, which would become floats.
        levels: how deep lists and structs may be nested; what lies deeper has the JSON type.
    """
    import pyarrow as pa

    values = list(values)
    kinds = set(map(type, values))
    if exact and type(None) in kinds:
        return json_type()
    kinds.discard(type(None))
    if not levels and kinds & {dict, list}:
        return json_type()
    if kinds == {dict}:
        return _struct_of([value for value in values if value is not None], exact, levels - 1)
    if kinds == {list}:
        return pa.list_(type_of((item for value in values if value for item in value), exact, levels - 1))
    if kinds in ({int}, {float}, {int, float}):
        return json_type() if exact and len(kinds) > 1 else _number_of(values, float in kinds)
    plain = {str: pa.string(), bool: pa.bool_()}
    return plain.get(kinds.pop(), json_type()) if len(kinds) == 1 else json_type()


def _struct_of(objects: list[dict[str, Any]], exact: bool, levels: int) -> pa.DataType:
    import pyarrow as pa

    fields = columns_of(objects)
    if not 0 < len(fields) <= MOST_FIELDS:
        return json_type()
    if exact and any(len(values) < len(objects) or None in values for values in fields.values()):
        return json_type()
    return pa.struct([(name, type_of(values, exact, levels)) for name, values in fields.items()])


def columns_of(objects: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key of some objects, as far as they have it."""
    columns: dict[str, list[Any]] = {}
    for item in objects:
        for key, value in item.items():
            columns.setdefault(key, []).append(value)
    return columns


def _number_of(values: list[Any], floats: bool) -> pa.DataType:
    import pyarrow as pa

    integers = [value for value in values if type(value) is int]
    least, most = min(integers, default=0), max(integers, default=0)
    if floats:
        return pa.float64() if least >= -EXACT and most <= EXACT else json_type()
    if least >= -(2**63) and most < 2**63:
        return pa.int64()
    return pa.uint64() if least >= 0 and most < 2**64 else json_type()


def type_of_prompts(values: list[Any], steps: Sequence[int | str] = ()) -> pa.DataType:
    """The Arrow type of a prompt column. Whatever lies below the messages of chats is kept exactly as it is.

    Keys of a message itself may be missing, because those that are null are not sent.

    Args:
        values: of the column.
        steps: to the prompt inside each value; see `parse_path`.
    """
    import pyarrow as pa

    if steps:
        return _type_around_prompts(values, steps)
    chats = [value for value in values if value is not None]
    if not chats or not all(isinstance(chat, list) for chat in chats):
        return type_of(chats, exact=True)
    messages = [message for chat in chats for message in chat]
    if not messages or not all(isinstance(message, dict) for message in messages):
        return type_of(chats, exact=True)
    fields = {
        name: type_of([value for value in values if value is not None], exact=True)
        for name, values in columns_of(messages).items()
    }
    return pa.list_(pa.struct(list(fields.items()))) if 0 < len(fields) <= MOST_FIELDS else json_type()


def _type_around_prompts(values: list[Any], steps: Sequence[int | str]) -> pa.DataType:
    """As `type_of`, but for what the steps lead to."""
    import pyarrow as pa
    import pyarrow.types as t

    kind = type_of(values)
    present = [value for value in values if value is not None]
    if isinstance(steps[0], int) and t.is_list(kind):
        return pa.list_(type_of_prompts([item for value in present for item in value], steps[1:]))
    if t.is_struct(kind) and kind.get_field_index(str(steps[0])) >= 0:
        inner = type_of_prompts(columns_of(present)[str(steps[0])], steps[1:])
        return pa.struct([field.with_type(inner) if field.name == steps[0] else field for field in kind])
    return kind


# ── Checks and conversions ───────────────────────────────────────────────────────────────────────────────────────────


def checker(kind: pa.DataType, exact: bool = False, huge: bool = True) -> Check:
    """Return a function that is True for JSON values that can be stored as this Arrow type without losing anything.

    Built once per type: inspecting Arrow types for each value would cost more than writing the value.

    Args:
        kind: the type.
        exact: as for `type_of`: below the top, null and missing keys do not fit, nor do integers in place of floats.
        huge: accept floats that may have been integers beyond 64 bits.
    """
    import pyarrow.types as t

    if is_json(kind):
        return (lambda _: True) if huge else (lambda value: not has_huge(value))
    if t.is_struct(kind):
        return _struct_checker(kind, exact, huge)
    if t.is_list(kind):
        inner = checker(kind.value_type, exact, huge)
        return lambda value: (
            value is None or (isinstance(value, list) and all(map(inner, value)) and not (exact and None in value))
        )
    if t.is_boolean(kind):
        return lambda value: value is None or isinstance(value, bool)
    if t.is_uint64(kind):
        return lambda value: value is None or (type(value) is int and 0 <= value < 2**64)
    if t.is_integer(kind):
        return lambda value: value is None or (type(value) is int and -(2**63) <= value < 2**63)
    if t.is_float32(kind):
        return lambda value: value is None or (type(value) in {int, float} and abs(value) <= LARGEST_FLOAT32)
    if t.is_floating(kind):
        return lambda value: (
            value is None
            or (type(value) is float and (huge or -HUGE < value < HUGE))
            or (not exact and type(value) is int and -EXACT <= value <= EXACT)
        )
    return (
        (lambda value: value is None or isinstance(value, str)) if t.is_string(kind) else (lambda value: value is None)
    )


def _struct_checker(kind: pa.DataType, exact: bool, huge: bool) -> Check:
    fields = {field.name: checker(field.type, exact, huge) for field in kind}
    if exact:
        return lambda value: (
            isinstance(value, dict)
            and value.keys() == fields.keys()
            and all(item is not None and fields[key](item) for key, item in value.items())
        )

    def fits(value: Any) -> bool:
        if value is None:
            return True
        if not isinstance(value, dict):
            return False
        for key, item in value.items():  # noqa: SIM110 - `all` takes a third longer
            if (check := fields.get(key)) is None or not check(item):
                return False
        return True

    return fits


def prompt_checker(kind: pa.DataType, huge: bool = True, steps: Sequence[int | str] = ()) -> Check:
    """As `checker`, for a type from `type_of_prompts`."""
    import pyarrow.types as t

    if steps and isinstance(steps[0], int) and t.is_list(kind):
        item = prompt_checker(kind.value_type, huge, steps[1:])
        return lambda value: value is None or (isinstance(value, list) and all(map(item, value)))
    if steps and t.is_struct(kind) and kind.get_field_index(str(steps[0])) >= 0:
        step, whole = str(steps[0]), checker(kind, huge=huge)
        inner = prompt_checker(kind.field(step).type, huge, steps[1:])
        return lambda value: value is None or (whole(value) and inner(value.get(step)))
    if steps:
        return checker(kind, huge=huge)
    if not t.is_list(kind) or not t.is_struct(kind.value_type):
        return checker(kind, True, huge)
    fields = {field.name: checker(field.type, True, huge) for field in kind.value_type}

    def fits(message: Any) -> bool:
        return isinstance(message, dict) and all(
            key in fields and (item is None or fields[key](item)) for key, item in message.items()
        )

    return lambda value: value is None or (isinstance(value, list) and all(map(fits, value)))


def converter(kind: pa.DataType, convert: Convert) -> Convert | None:
    """Return a function that applies `convert` to the parts of a value that have the JSON type; None if none has it."""
    import pyarrow.types as t

    if is_json(kind):
        return lambda value: None if value is None else convert(value)
    if t.is_struct(kind):
        fields = {field.name: inner for field in kind if (inner := converter(field.type, convert))}
        if not fields:
            return None
        return lambda value: (
            value and {key: fields[key](item) if key in fields else item for key, item in value.items()}
        )
    part = kind.item_type if t.is_map(kind) else getattr(kind, "value_type", None)
    inner = converter(part, convert) if part is not None else None
    if inner is None:
        return None
    if t.is_map(kind):
        return lambda value: value and [(key, inner(item)) for key, item in value]
    return lambda value: [inner(item) for item in value] if isinstance(value, list) else value


def encoder(kind: pa.DataType) -> Convert | None:
    """Return a function that makes a JSON value one of the type's `storage`; None if it is that already.

    A null where a type has JSON is Arrow's null, and not JSON's.
    """
    return converter(kind, json_text)


def decoder(kind: pa.DataType) -> Convert | None:
    """Return a function that parses the JSON in a value from a column of this type; None if there is none."""
    return converter(kind, lambda value: parse_json(value.encode()) if isinstance(value, str) else value)


def storage(kind: pa.DataType) -> pa.DataType:
    """A type with text in place of JSON: Arrow cannot make arrays of extension types from Python's values."""
    import pyarrow as pa
    import pyarrow.types as t

    if is_json(kind):
        return kind.storage_type
    if t.is_struct(kind):
        return pa.struct([field.with_type(storage(field.type)) for field in kind])
    if t.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(storage(kind.value_type)))
    if t.is_list(kind):
        return pa.list_(kind.value_field.with_type(storage(kind.value_type)))
    return kind


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """JSON values as an array of a type."""
    import pyarrow as pa

    if not values:  # of a list, even of an empty one, Arrow wants to know if it is one of pandas, which takes 0.3 s
        return pa.nulls(0, kind)
    if encode := encoder(kind):
        return pa.array([encode(value) for value in values], storage(kind)).cast(kind)
    return pa.array(values, kind)


def writable(kind: pa.DataType) -> pa.DataType:
    """The type in which a column is written.

    Objects without fields are JSON, because parquet cannot hold them. What `datasets` cannot read becomes what it can:
    UUIDs are text, maps are lists of {key, value}, and Arrow's other extension types are what they are stored as. What
    parquet cannot hold does, too: dictionaries of views.
    """
    import pyarrow as pa
    import pyarrow.types as t

    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name in PLAIN:
        return writable(PLAIN[kind.extension_name](kind))
    if t.is_struct(kind):
        return pa.struct([relaxed(field) for field in kind]) if kind.num_fields else json_type()
    if t.is_map(kind):
        key = pa.field("key", writable(kind.key_type), metadata=OF_MAP)
        return pa.list_(pa.struct([key, ("value", writable(kind.item_type))]))
    if t.is_dictionary(kind) and kind.value_type in {pa.string_view(), pa.binary_view()}:
        plain = pa.string() if t.is_string_view(kind.value_type) else pa.binary()
        return pa.dictionary(kind.index_type, plain, kind.ordered)
    if t.is_decimal32(kind) or t.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if t.is_list_view(kind) or t.is_large_list_view(kind):
        return pa.large_list(relaxed(kind.value_field))
    if t.is_fixed_size_list(kind):
        return pa.list_(relaxed(kind.value_field), kind.list_size)
    if t.is_large_list(kind):
        return pa.large_list(relaxed(kind.value_field))
    if t.is_list(kind):
        return pa.list_(relaxed(kind.value_field))
    return kind


def in_json(kind: pa.DataType) -> pa.DataType:
    """The type of a type's values in JSON: what JSON does not have is text there."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_struct(kind):
        return pa.struct([field.with_type(in_json(field.type)) for field in kind])
    if t.is_dictionary(kind):
        return in_json(kind.value_type)
    if hasattr(kind, "value_type"):
        return pa.list_(in_json(kind.value_type))
    same = is_json(kind) or t.is_integer(kind) or t.is_float32(kind) or t.is_float64(kind)
    if same or t.is_boolean(kind) or t.is_null(kind):
        return kind
    return pa.float32() if t.is_float16(kind) else pa.string()


def was_map(kind: pa.DataType) -> bool:
    """True for lists of {key, value} that `writable` has made of maps."""
    import pyarrow.types as t

    entry = getattr(kind, "value_type", None)
    if entry is None or not t.is_struct(entry) or not entry.num_fields:
        return False
    return OF_MAP.items() <= (entry.field(0).metadata or {}).items()


def _text(_: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return pa.string()


def _boolean(_: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return pa.bool_()


# What extension types of Arrow are written as
PLAIN: dict[str, Callable[[Any], pa.DataType]] = {
    "arrow.uuid": _text,
    "arrow.bool8": _boolean,
    "arrow.fixed_shape_tensor": lambda kind: kind.storage_type,
}


def relaxed(field: pa.Field) -> pa.Field:
    """A field in which every value can be written: rows that could not be read have nulls."""
    return field.with_type(writable(field.type)).with_nullable(True)
