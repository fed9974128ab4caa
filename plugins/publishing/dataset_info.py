"""The `dataset_info` of a card: features of JSON lines, because the files do not say which types their columns have."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.features import NAMES, features_in
from sdg_plugins.common.files import file_writer
from sdg_plugins.common.kinds import is_json
from sdg_plugins.common.rows import empty_rows
from sdg_plugins.common.state import fixed_fields, recorded_fields, schema_of
from sdg_plugins.common.unify import is_list
from sdg_plugins.publishing.front_matter import config_name_of, paths_of

if TYPE_CHECKING:
    import pyarrow as pa


def features_of(run: sdg.Run, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The features of a run's rows as a card has them; none if its files describe their columns.

    Args:
        run: of the rows.
        record: the content of its `run.json`.
    """
    if file_writer(run.options) != "jsonl":
        return []
    source = schema_of(record["source_schema"])
    rows = empty_rows(run.options, source, recorded_fields(run.state) or fixed_fields(run.options))
    known = {name: feature for name, feature in features_in(source).items() if name in rows.column_names}
    labels = {name: feature["names"] for name, feature in known.items() if feature.get("_type") == "ClassLabel"}
    return [
        {"name": field.name, **(of_labels(labels[field.name]) if field.name in labels else feature_of(field.type))}
        for field in rows.schema
    ]


def of_labels(names: list[str]) -> dict[str, Any]:
    """The feature of a ClassLabel."""
    return {"dtype": {"class_label": {"names": {str(number): name for number, name in enumerate(names)}}}}


def feature_of(kind: pa.DataType) -> dict[str, Any]:
    """The feature of a column of JSON lines, from its Arrow type; what JSON cannot hold is text there."""
    import pyarrow as pa
    import pyarrow.types as t

    if is_json(kind) or t.is_uint64(kind):  # `datasets` would read large integers as floats
        return {"dtype": "json"}
    if t.is_struct(kind):
        return {"struct": [{"name": field.name, **feature_of(field.type)} for field in kind]}
    if is_list(kind):
        item = feature_of(kind.value_type)
        return {"list": item if "list" in item else item.get("struct") or item["dtype"]}
    if t.is_dictionary(kind):
        return feature_of(kind.value_type)
    if t.is_timestamp(kind) and kind.unit in {"s", "ms"}:  # their texts may have microseconds
        return {"dtype": str(pa.timestamp("us", kind.tz))}
    tests = (t.is_integer, t.is_floating, t.is_boolean, t.is_null, t.is_timestamp, t.is_date)
    return {"dtype": NAMES.get(str(kind), str(kind)) if any(test(kind) for test in tests) else "string"}


def with_features(values: dict[str, Any], name: str, files: str, features: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of the front matter, with the features of a config in `dataset_info`; infos of others stay.

    Args:
        values: see `front_matter.updated`; its `configs` are up to date.
        name: of the config on the card.
        files: of the config, as a glob.
        features: from `features_of`; none removes those that a run has described earlier.
    """
    present = values.get("dataset_info") or []
    infos = [info for info in (present if isinstance(present, list) else [present]) if isinstance(info, dict)]
    ours = [name]
    for entry in values["configs"]:  # `all` has several configs with the same columns
        if config_name_of(entry) == "all" and files in (paths := paths_of(entry)) and len(paths) > 1:
            ours.append("all")
    kept = [info for info in infos if info.get("config_name") not in ours or info.keys() - {"config_name", "features"}]
    described = {info.get("config_name"): info for info in kept}
    for config in ours if features else ():
        if config in described:
            described[config]["features"] = copy.deepcopy(features)  # one list for several would be an anchor in YAML
        else:
            kept.append({"config_name": config, "features": copy.deepcopy(features)})
    return {**values, "dataset_info": kept} if kept or "dataset_info" in values else values
