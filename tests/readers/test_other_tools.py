"""Files that `datasets`, polars and DuckDB write are read, and what is written is read by them.

They are imported where they are used: that takes seconds, which the processes that run other tests can do without.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from running import Job
from test_inputs import documents

import sdg


def test_types_of_duckdb_are_read(tmp_path: Path) -> None:
    import duckdb

    path = tmp_path / "duck.parquet"
    duckdb.sql(
        f"""COPY (SELECT '5f0c6f9e-8d3c-4d57-9d4b-3a7f1c2b9e10'::uuid AS id, 'Hello.' AS text,
        '{{"a": [1]}}'::json AS j, map {{'k': 1}} AS m, [1, 2] AS l, {{'a': 1}} AS s,
        timestamp_ns '2024-01-01' AS t, 1.5::decimal(10, 2) AS d,
        'x'::enum('x', 'y') AS e) TO '{path}'"""
    )

    (document,) = documents(str(path))

    assert isinstance(document, sdg.Document)
    assert document.id == "5f0c6f9e-8d3c-4d57-9d4b-3a7f1c2b9e10"
    assert document.row["j"] == {"a": [1]}
    assert document.row["m"] == [{"key": "k", "value": 1}]
    assert document.row["s"] == {"a": 1}


def test_types_of_polars_are_read_or_named(tmp_path: Path) -> None:
    import polars

    columns: dict[str, Any] = {
        "text": ["Hello."],
        "category": polars.Series(["x"], dtype=polars.Categorical),
        "array": polars.Series([[1, 2]], dtype=polars.Array(polars.Int8, 2)),
        "object": [{"a": {"b": [1]}}],
    }
    polars.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    polars.DataFrame(columns).write_ipc(tmp_path / "a.arrow")
    large = {**columns, "large": polars.Series([2**70], dtype=polars.Int128)}
    polars.DataFrame(large).write_parquet(tmp_path / "large.parquet")

    for name in ("a.parquet", "a.arrow"):
        (document,) = documents(str(tmp_path / name))
        assert isinstance(document, sdg.Document)
        assert {key: value for key, value in document.row.items() if key != "text"} == {
            "category": "x",
            "array": [1, 2],
            "object": {"a": {"b": [1]}},
        }
    with pytest.raises(sdg.InputError, match=r"large\.parquet .*64 bits"):
        documents(str(tmp_path / "large.parquet"))


def test_json_columns_of_datasets_are_sent_as_they_stand(tmp_path: Path) -> None:
    from datasets import Dataset

    parts = [{"type": "text", "text": "What is it?"}]
    system = {"role": "system", "content": "Be brief."}
    rows: list[dict[str, Any]] = [
        {
            "messages": [system, {"role": "user", "content": parts}],
            "meta": {"a": 1},
        },
        {"messages": [{"role": "user", "content": "Hello."}], "meta": "x"},
    ]
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "m.parquet")

    found = documents(str(tmp_path / "m.parquet"), "messages")

    assert [document.messages for document in found if isinstance(document, sdg.Document)] == [
        row["messages"] for row in rows
    ]
    assert [document.row["meta"] for document in found if isinstance(document, sdg.Document)] == [{"a": 1}, "x"]


def test_features_of_datasets_are_such_again(job: Job) -> None:
    from datasets import ClassLabel, Dataset, Features, Json, Value, load_dataset

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"]), "meta": Json()})
    rows = {"text": ["one", "two"], "label": [0, 1], "meta": [{"a": 1}, "x"]}
    Dataset.from_dict(rows, features=features).to_parquet(job.folder / "in.parquet")

    job.succeed(input="in.parquet")

    found = load_dataset(str(job.folder / "output"), split="train", cache_dir=str(job.folder / "cache"))
    assert {name: found.features[name] for name in features} == features
    assert found[1]["rollout_results"][0]["text"].startswith("answer ")
    assert found[0]["meta"] == {"a": 1}


LATE = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("late", late)

    async def late(document, generate):
        return {"text": "short", **({"surprise": 1} if document.index == 3 else {})}
"""


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz"])
def test_columns_of_every_kind_are_loaded(suffix: str, job: Job) -> None:
    from datasets import ClassLabel, load_dataset

    numbers = range(4)
    noon = dt.datetime(2024, 2, 29, 12, 0, 0, 123000)
    columns: dict[str, Any] = {
        "text": ["2024-01-01", "b", "c", "d"],
        "map": pa.array([None, [], [("k", 1)], [("k", None)]], pa.map_(pa.string(), pa.int32())),
        "maps": pa.array([{"m": [[("k", "v")]]}] * 4, pa.struct([("m", pa.list_(pa.map_(pa.string(), pa.string())))])),
        "berlin": pa.array([noon] * 4, pa.timestamp("ms", "Europe/Berlin"), safe=False),
        "largest": pa.array([2**64 - 1 - n for n in numbers], pa.uint64()),
        "late": pa.array([None, None, None, 0.5], pa.float32()),
        "decimal": pa.array([decimal.Decimal("1.5")] * 4, pa.decimal64(10, 2)),
        "truth": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None, 1], pa.int8())),
        "view": pa.array([[1], [], None, [2]], pa.list_view(pa.int64())),
        "pair": pa.array([[1, 2]] * 4, pa.list_(pa.int64(), 2)),
        "label": [0, 1, 0, 1],
    }
    features = {"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}
    job.input(pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)}))
    job.options["plugin"] = job.plugin("late", LATE)

    output = job.succeed(records_per_chunk=2, output_filename=f"${{rank}}_${{chunk_index}}.{suffix}").path

    for streaming in (False, True):
        found = load_dataset(str(output), split="train", cache_dir=str(job.folder / "cache"), streaming=streaming)
        rows = list(found)
        assert [row["text"] for row in rows] == columns["text"] or suffix != "parquet"
        assert [row["map"] for row in rows][1:] == [[], [{"key": "k", "value": 1}], [{"key": "k", "value": None}]]
        assert rows[0]["maps"] == {"m": [[{"key": "k", "value": "v"}]]}
        assert rows[0]["berlin"].astimezone(dt.UTC).replace(tzinfo=None) == noon
        assert [row["largest"] for row in rows] == columns["largest"].to_pylist()
        assert [row["late"] for row in rows] == [None, None, None, 0.5]
        assert [row["truth"] for row in rows] == [True, False, None, True]
        assert [row["view"] for row in rows] == [[1], [], None, [2]]
        assert found.features["label"] == ClassLabel(names=["neg", "pos"])
        assert [row["rollout_results"][0]["extra"] for row in rows] == [None, None, None, '{"surprise":1}']


def test_rows_of_an_earlier_run_are_not_loaded_again(job: Job) -> None:
    from datasets import load_dataset

    found = []
    for text in ("first", "other"):
        job.input([{"id": "a", "text": text}])
        job.succeed(fresh=True)
        rows = load_dataset(str(job.folder / "output"), split="train", cache_dir=str(job.folder / "cache"))
        found.append(rows["text"][0])

    assert found == ["first", "other"]


def test_what_is_written_is_read_by_others(job: Job) -> None:
    import duckdb
    import polars
    from datasets import load_dataset

    rows = [{"text": "one", "x": {"a": 1, "b": {}}}, {"text": "two", "x": {"a": 2, "b": [1, None]}}]
    (job.folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))

    output = job.succeed(input="in.jsonl").path / "data"

    (file,) = output.glob("*.parquet")
    assert pq.read_schema(file).field("x").type.field("a").type == pa.int64()
    assert polars.read_parquet(file).height == 2
    answer = duckdb.sql(f"SELECT x.a, x.b, rollout_results[1].text FROM '{file}' ORDER BY 1").fetchall()
    assert [row[:2] for row in answer] == [(1, "{}"), (2, "[1,null]")]
    found = load_dataset(str(output), split="train", cache_dir=str(job.folder / "cache"))
    assert [row["x"] for row in found] == [row["x"] for row in rows]


def test_uuids_are_written_as_text(job: Job) -> None:
    ids = [uuid.UUID(int=n) for n in range(2)]
    table = pa.table({"id": pa.array([item.bytes for item in ids], pa.uuid()), "text": ["one", "two"]})
    pq.write_table(table, job.folder / "in.parquet")

    output = job.succeed(input="in.parquet")

    assert output.ids() == [str(item) for item in ids]
    assert job.verify().rc == 0
