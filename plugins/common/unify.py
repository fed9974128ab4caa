"""Files whose columns differ: the schema that holds the values of all of them, and their rows in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.features import carried
from sdg_plugins.common.kinds import is_json, relaxed
from sdg_plugins.common.values import as_json

if TYPE_CHECKING:
    import pyarrow as pa

UNITS = ("s", "ms", "us", "ns")


def unified(schemas: Iterable[tuple[str, pa.Schema]], prompt: str) -> pa.Schema:
    """The schema for the rows of several files. No value is lost in it; columns that a file lacks are null.

    Args:
        schemas: name and schema of each file.
        prompt: the column that no file may lack.

    Raises:
        InputError: a column has types that no type can hold, or a file lacks the prompt column.
    """
    import pyarrow as pa

    kinds: dict[str, tuple[str, pa.Field]] = {}  # the file that each column comes from
    first, known = "", None
    for name, schema in schemas:
        if known is None:
            first, known = name, schema
            kinds = {field.name: (name, relaxed(field)) for field in schema}
            continue
        if schema.equals(known):
            continue
        if prompt in known.names and prompt not in schema.names:
            raise sdg.InputError(f"{name} has different columns than {first} (no {prompt}): choose other files")
        for field in map(relaxed, schema):
            where, other = kinds.setdefault(field.name, (name, field))
            if (kind := common_type(other.type, field.type)) is None:
                raise sdg.InputError(
                    f"{name} has different columns than {where} ({field.name}: {field.type} instead of {other.type}): "
                    "convert one of them, or choose files with the same columns"
                )
            kinds[field.name] = (where, other.with_type(kind))
    assert known is not None
    if len(set(known.names)) < len(known.names):  # reported by name, if it matters
        return pa.schema(list(map(relaxed, known)))
    return carried(known, pa.schema([field for _, field in kinds.values()]))


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None if there is none."""
    import pyarrow as pa
    import pyarrow.types as t

    if one.equals(other) or t.is_null(other):
        return one
    if t.is_null(one):
        return other
    for plain, large, small in (
        (is_text, t.is_large_string, pa.string()),
        (is_bytes, t.is_large_binary, pa.binary()),
    ):
        if plain(one) and plain(other):
            wide = pa.large_string() if small == pa.string() else pa.large_binary()
            return wide if large(one) or large(other) else small
    if is_number(one) and is_number(other):
        return common_number(one, other)
    if t.is_timestamp(one) and t.is_timestamp(other) and one.tz == other.tz:
        return pa.timestamp(max(one.unit, other.unit, key=UNITS.index), one.tz)
    if t.is_duration(one) and t.is_duration(other):
        return pa.duration(max(one.unit, other.unit, key=UNITS.index))
    if t.is_decimal(one) and t.is_decimal(other) and one.scale == other.scale:
        return max(one, other, key=lambda kind: kind.precision)
    return common_nested(one, other)


def is_text(kind: pa.DataType) -> bool:
    """True for texts, dictionaries of texts among them."""
    import pyarrow.types as t

    kind = kind.value_type if t.is_dictionary(kind) else kind
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """True for binary values of any length."""
    import pyarrow.types as t

    return bool(t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """True for integers and floats."""
    import pyarrow.types as t

    return bool(t.is_integer(kind) or t.is_floating(kind))


def common_number(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The number type that holds both. An integer of 64 bits and a float are a float: a cast checks the values."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_floating(one) or t.is_floating(other):
        both = t.is_floating(one) and t.is_floating(other)
        return max(one, other, key=lambda kind: kind.bit_width) if both else pa.float64()
    signed = [kind for kind in (one, other) if t.is_signed_integer(kind)]
    widest = max(one, other, key=lambda kind: kind.bit_width)
    if len(signed) != 1:
        return widest
    unsigned = other if signed[0] is one else one
    width = max(signed[0].bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(width)


def common_nested(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """As `common_type`, for structs and lists."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_struct(one) and t.is_struct(other):
        fields = {field.name: field for field in one}
        for field in other:
            known = fields.setdefault(field.name, field)
            if (kind := common_type(known.type, field.type)) is None:
                return None
            fields[field.name] = known.with_type(kind)
        return pa.struct(list(fields.values()))
    if is_list(one) and is_list(other):
        item = common_type(one.value_type, other.value_type)
        large = t.is_large_list(one) or t.is_large_list(other)
        return item and (pa.large_list(item) if large else pa.list_(item))
    return None


def is_list(kind: pa.DataType) -> bool:
    """True for lists of any kind."""
    import pyarrow.types as t

    return bool(t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind))


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Rows in another schema, which holds their values. Raises pyarrow.ArrowInvalid, with the column, if not."""
    import pyarrow as pa

    if batch.schema.equals(schema):
        return pa.RecordBatch.from_arrays(batch.columns, schema=schema)
    present = set(batch.schema.names)
    columns = []
    for field in schema:
        try:
            own = batch.column(field.name) if field.name in present else pa.nulls(len(batch))
            columns.append(converted(own, field.type))
        except pa.ArrowException as exc:
            raise pa.ArrowInvalid(f"column {field.name}: {exc}") from exc
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def converted(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """An array as another type; fields of structs that it lacks are null.

    Arrow's own cast drops the fields of structs that the type lacks, and needs those that it has.
    """
    import pyarrow as pa
    import pyarrow.types as t

    if array.type.equals(kind):
        return array
    if t.is_null(array.type):
        return pa.nulls(len(array), kind)
    if isinstance(array.type, pa.BaseExtensionType):
        if t.is_string(kind):
            return pa.array([None if value is None else str(value) for value in array.to_pylist()], kind)
        return converted(array.storage, kind)
    if is_json(kind):
        return as_json(array)
    if t.is_struct(kind):
        own = {field.name: i for i, field in enumerate(array.type)}
        children = [
            converted(array.field(own[field.name]), field.type)
            if field.name in own
            else pa.nulls(len(array), field.type)
            for field in kind
        ]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if t.is_map(array.type) and is_list(kind):
        entry = pa.struct([("key", array.type.key_type), ("value", array.type.item_type)])
        return converted(array.cast(pa.list_(entry)), kind)
    if is_list(kind) and not t.is_fixed_size_list(kind):
        return _list(array, kind)
    if t.is_dictionary(kind) and t.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(
            array.indices.cast(kind.index_type), converted(array.dictionary, kind.value_type), ordered=kind.ordered
        )
    return array.cast(kind)


def _list(array: pa.Array, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as t

    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths)])
    large = t.is_large_list(kind)
    make: Any = pa.LargeListArray if large else pa.ListArray
    values = converted(array.flatten(), kind.value_type)
    mask = array.is_null() if array.null_count else None
    return make.from_arrays(offsets.cast(pa.int64() if large else pa.int32()), values, type=kind, mask=mask)
