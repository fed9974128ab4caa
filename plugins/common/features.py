"""How `datasets` sees columns: metadata by which ClassLabel, Image, Audio and others are such again in the output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sdg_plugins.common.kinds import is_json

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"huggingface"  # in the metadata of a schema


def features_in(schema: pa.Schema) -> dict[str, Any]:
    """The features by column that a file's metadata describes; none if it describes none."""
    try:
        features = json.loads((schema.metadata or {}).get(KEY, b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def carried(source: pa.Schema, to: pa.Schema) -> pa.Schema:
    """The schema `to` with the features of those columns that it has from the schema `source`, type included."""
    features = features_in(source)
    kept = {
        field.name: features[field.name]
        for field in to
        if field.name in features and source.field(field.name).type.equals(field.type)
    }
    return to.with_metadata({KEY: json.dumps({"info": {"features": kept}})} if kept else None)


def described(schema: pa.Schema, source: pa.Schema | None) -> dict[bytes | str, Any]:
    """Metadata that describes all columns of an output, if that of the source does so; else none.

    Args:
        schema: of the output.
        source: of the input, with its metadata.
    """
    known = features_in(source) if source is not None else {}
    if not known:
        return {}
    features = {field.name: known.get(field.name) or feature_of(field.type) for field in schema}
    if None in features.values():
        return {}
    return {KEY: json.dumps({"info": {"features": features}})}


def feature_of(kind: pa.DataType) -> Any:
    """The feature of a type, as JSON that all versions of `datasets` read; None if there is none."""
    import pyarrow.types as t

    if is_json(kind):
        return {"_type": "Json"}
    if t.is_struct(kind):
        fields = {field.name: feature_of(field.type) for field in kind}
        return None if None in fields.values() else fields
    if t.is_list(kind):
        inner = feature_of(kind.value_type)
        return inner and [inner]
    if t.is_large_list(kind) or t.is_fixed_size_list(kind):
        inner = feature_of(kind.value_type)
        length = {} if t.is_large_list(kind) else {"length": kind.list_size}
        return inner and {"feature": inner, **length, "_type": "Sequence" if length else "LargeList"}
    if t.is_dictionary(kind):
        return feature_of(kind.value_type)
    if kind.num_fields or t.is_map(kind):
        return None
    return {"dtype": NAMES.get(str(kind), str(kind)), "_type": "Value"}


NAMES = {
    "float": "float32",
    "double": "float64",
    "halffloat": "float16",
    "date32[day]": "date32",
    "date64[ms]": "date64",
}
