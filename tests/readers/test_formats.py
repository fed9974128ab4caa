"""The source's columns keep their types, order and content, in every format."""

from __future__ import annotations

import csv
import datetime as dt
import decimal
import gzip
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, Status, prompt_of
from hypothesis import given, settings, strategies as st
from running import Job, documents

import sdg

# ── Arrow types ──────────────────────────────────────────────────────────────────────────────────────────────────────


def many_types(count: int) -> pa.Table:
    """Columns of types that are easily lost; in some columns the first values, or all of them, are null."""
    numbers = range(count)
    noon = dt.datetime(2024, 2, 29, 12, 0, 0, 123456)
    columns = {
        "id": pa.array([f"d{n}" for n in numbers]),
        "text": pa.array([f"document {n}" for n in numbers], pa.large_string()),
        "null_first": pa.array([None] * (count // 2) + list(range(count - count // 2)), pa.int16()),
        "all_null": pa.nulls(count, pa.float32()),
        "null_type": pa.nulls(count),
        "list": pa.array([list(range(n % 3)) if n % 4 else None for n in numbers], pa.list_(pa.int8())),
        "large_list": pa.array([["x"] * (n % 2) for n in numbers], pa.large_list(pa.string())),
        "fixed_list": pa.array([[n, n] for n in numbers], pa.list_(pa.float32(), 2)),
        "struct": pa.array(
            [{"a": n, "b": {"c": [str(n), None]}} for n in numbers],
            pa.struct([("a", pa.uint64()), ("b", pa.struct([("c", pa.list_(pa.string()))]))]),
        ),
        "map": pa.array([[("k", n)] for n in numbers], pa.map_(pa.string(), pa.int32())),
        "ns": pa.array([1_700_000_000_123_456_789 + n for n in numbers], pa.timestamp("ns")),
        "us_utc": pa.array([noon.replace(tzinfo=dt.UTC)] * count, pa.timestamp("us", "UTC")),
        "ms_berlin": pa.array([noon] * count, pa.timestamp("ms", "Europe/Berlin"), safe=False),
        "date": pa.array([dt.date(1969, 7, 20)] * count, pa.date32()),
        "time": pa.array([1] * count, pa.time64("ns")),
        "duration": pa.array([n for n in numbers], pa.duration("us")),
        "decimal": pa.array([decimal.Decimal("12345678901234567.89")] * count, pa.decimal128(22, 2)),
        "dictionary": pa.array(["red", "green"] * (count // 2)).dictionary_encode(),
        "binary": pa.array([b"\x00\xff" * n for n in numbers], pa.binary()),
        "fixed_binary": pa.array([b"abcd"] * count, pa.binary(4)),
        "bool": pa.array([n % 2 == 0 for n in numbers]),
        "float16": pa.array([0.5] * count, pa.float16()),
        "uint64": pa.array([2**64 - 1 - n for n in numbers], pa.uint64()),
        "nan": pa.array([float("nan"), -0.0] * (count // 2)),
        "a column, with marks: ☃": pa.array(["x"] * count),
    }
    metadata = {b"huggingface": b'{"info": {"features": {}}}'}
    return pa.table(columns).replace_schema_metadata(metadata)


def test_source_columns_keep_their_types_and_values(job: Job) -> None:
    job.input(many_types(20))
    source = pq.read_table(job.options["input"])
    entries = pa.list_(pa.struct([("key", pa.string()), ("value", pa.int32())]))  # `datasets` cannot read maps
    source = source.set_column(source.column_names.index("map"), "map", source["map"].cast(entries))

    output = job.succeed(records_per_chunk=7).table()

    kept = output.drop_columns(["rollout_results"])
    assert kept.schema.remove_metadata().equals(source.schema.remove_metadata())
    for name in source.column_names:
        ours, theirs = kept[name].combine_chunks(), source[name].combine_chunks()
        if name == "nan":
            assert str(ours) == str(theirs)
        else:
            assert ours.equals(theirs), name


def test_all_files_of_a_run_have_one_schema(job: Job) -> None:
    job.input(many_types(20))

    output = job.succeed(records_per_chunk=3)

    schemas = [pq.read_schema(output.path / name) for name in output.data()]
    assert len(schemas) == 7
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)


def test_results_have_the_fields_of_the_contract(job: Job) -> None:
    job.input(documents(2))

    results = job.succeed().table().schema.field("rollout_results").type

    assert pa.types.is_list(results)
    usage = pa.struct([(name, pa.int64()) for name in ("prompt_tokens", "completion_tokens", "total_tokens")])
    fields = {field.name: field.type for field in results.value_type}
    expected = {"text": pa.string(), "reasoning": pa.string(), "finish_reason": pa.string(), "usage": usage}
    assert {name: fields[name] for name in expected} == expected


def test_ids_are_generated_if_the_source_has_none(job: Job) -> None:
    job.input([{"text": "one"}, {"text": "two"}])

    output = job.succeed()

    assert output.ids() == ["input.parquet/0", "input.parquet/1"]
    assert output.table().column_names == ["text", "id", "rollout_results"]


def test_another_column_may_give_the_id(job: Job) -> None:
    job.input([{"url": "https://a", "text": "one"}, {"url": "https://b", "text": "two"}])

    assert job.succeed(id_column="url").ids() == ["https://a", "https://b"]


def test_parquet_metadata_names_the_run(job: Job) -> None:
    job.input(documents(2))

    output = job.succeed()

    metadata = pq.read_schema(output.path / "data/00000_00000.parquet").metadata
    text = b" ".join([*metadata, *metadata.values()]).decode()
    assert "test-model" in text
    assert "sdg" in text
    assert "fingerprint" in text


# ── Results with different fields ────────────────────────────────────────────────────────────────────────────────────

RESULTS = """
    from typing import TypedDict

    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("annotated", annotated)
        register("inferred", inferred)

    class Score(TypedDict):
        text: str
        score: float
        labels: list[str]

    async def annotated(document, generate) -> Score:
        return surprise(document)

    async def inferred(document, generate):
        return surprise(document)

    def surprise(document):
        result = {"text": document.text, "score": 0.5, "labels": ["a"]}
        if document.text == "document 5":
            result |= {"new": {"key": 1}}
        if document.text == "document 6":
            result |= {"score": "high"}
        if document.text == "document 0":
            del result["labels"]
        return result
"""


@pytest.mark.parametrize("rollout", ["annotated", "inferred"])
def test_fields_of_a_dict_have_one_type_and_surprises_are_kept(rollout: str, job: Job) -> None:
    job.input(documents(8))
    path = job.plugin("results", RESULTS)

    job.succeed(plugin=f"{path}:{rollout}", records_per_chunk=3, max_documents=3)
    output = job.succeed(plugin=f"{path}:{rollout}", records_per_chunk=3)

    results = [row["rollout_results"][0] for row in output.rows()]
    assert len(results) == 8
    assert [result["score"] for result in results] == [0.5] * 6 + [None, 0.5]
    assert [result["labels"] for result in results] == [None] + [["a"]] * 7
    assert json.loads(results[5]["extra"]) == {"new": {"key": 1}}
    assert json.loads(results[6]["extra"]) == {"score": "high"}
    assert job.verify().rc == 0


# ── Text formats ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write_text(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write jsonl or csv, as the suffix says."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text))
    elif path.name.endswith(".jsonl.zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(text)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_bytes(text)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"])
def test_every_format_is_read_in_order_and_resumed_in_the_middle(suffix: str, job: Job, server: FakeServer) -> None:
    rows = [{"id": f"d{n:04}", "text": f'Zeile {n}, „quoted“\nand "more" 🎉', "number": str(n)} for n in range(50)]
    path = job.folder / f"input{suffix}"
    if suffix == ".parquet":
        job.input(rows, row_group_size=6)
    else:
        write_text(path, rows)
    job.options |= {"input": path, "records_per_chunk": 4}

    job.succeed(max_documents=17)
    output = job.succeed(max_documents=None)

    assert [{name: row[name] for name in rows[0]} for row in output.rows()] == rows
    assert len(server.requests) == 50
    assert job.verify().rc == 0


@pytest.mark.parametrize("many", ["many", "web-1.0", "2026.11.24"])
def test_folders_and_globs_are_read_in_the_order_of_names(job: Job, many: str) -> None:
    folder = job.folder / many / "deep"
    folder.mkdir(parents=True)
    for name, numbers in {"b.jsonl": range(3, 6), "a.jsonl": range(3), "c.jsonl": range(6, 8)}.items():
        write_text(folder / name, [{"text": f"document {n}"} for n in numbers])
    (folder / "readme.md").write_text("not for us")
    (folder / "_temporary.jsonl").write_text("{")

    whole = job.succeed(input=many, records_per_chunk=5)
    globbed = job.succeed(input=f"{many}/*/[ab].jsonl", output="globbed")

    assert [row["text"] for row in whole.rows()] == [f"document {n}" for n in range(8)]
    assert len(set(whole.ids())) == 8
    assert [row["text"] for row in globbed.rows()] == [f"document {n}" for n in range(6)]


def test_files_of_one_folder_may_differ_in_their_columns(job: Job) -> None:
    folder = job.folder / "many"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["one"], "extra": [1]}), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["two"]}), folder / "b.parquet")

    finished = job(input="many")

    if finished.rc == 0:
        assert [row["text"] for row in job.output.rows()] == ["one", "two"]
    else:
        assert finished.rc == 1
        assert finished.says("a.parquet", "b.parquet")


def test_a_folder_may_grow(job: Job, server: FakeServer) -> None:
    folder = job.folder / "many"
    folder.mkdir()
    write_text(folder / "a.jsonl", [{"text": f"document {n}"} for n in range(5)])
    job.succeed(input="many", records_per_chunk=2)
    server.forget()
    write_text(folder / "b.jsonl", [{"text": f"document {n}"} for n in range(5, 9)])

    output = job.succeed(input="many", records_per_chunk=2)

    assert len(server.requests) == 4
    assert [row["text"] for row in output.rows()] == [f"document {n}" for n in range(9)]
    assert output.table().equals(job.succeed(input="many", records_per_chunk=2, output="at-once").table())


def test_values_of_jsonl_are_kept(job: Job) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": "a",
            "text": "1",
            "tags": ["x", "y"],
            "meta": {"year": 2024, "ok": True},
            "score": 0.1,
            "big": 2**60 + 1,
        },
        {"id": "b", "text": "two", "tags": [], "meta": {"year": None, "ok": False}, "score": 2.0, "big": 3},
        {"id": "c", "text": "three", "tags": None, "meta": None, "score": None, "big": None},
    ]
    job.input(rows, "input.jsonl")

    kept = [{name: row[name] for name in rows[0]} for row in job.succeed(records_per_chunk=1).rows()]

    assert kept == rows


def test_jsonl_columns_of_mixed_types_are_json(job: Job) -> None:
    job.input(
        [
            {"id": "a", "text": "one", "mixed": "text", "never": None},
            {"id": "b", "text": "two", "mixed": 5, "never": None},
            {"id": "c", "text": "three", "mixed": {"a": [1]}, "never": None, "late": 1.5},
        ],
        "input.jsonl",
    )

    rows = job.succeed(records_per_chunk=1).rows()

    assert [json.loads(row["mixed"]) for row in rows] == ["text", 5, {"a": [1]}]
    assert [row["late"] for row in rows] == [None, None, 1.5]
    assert [row["never"] for row in rows] == [None] * 3


def test_a_late_change_of_type_in_jsonl_fails_at_most_its_document(job: Job) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"d{n}", "text": "early", "value": n, "pad": "x" * 350_000} for n in range(200)
    ]
    rows += [{"id": "late", "text": "late", "value": "not a number"}, {"id": "last", "text": "last", "value": 1}]
    job.input(rows, "input.jsonl")

    output = job.succeed(plugin=job.plugin("local", LOCAL))

    assert len(output.table()) + len(output.failures()) == 202
    assert "last" in output.ids()


LOCAL = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("local", local)

    async def local(document, generate):
        return "no question asked"
"""


def test_output_may_be_jsonl(job: Job, server: FakeServer) -> None:
    job.input(many_types(6).select(["id", "text", "list", "struct", "ns", "us_utc", "decimal", "binary", "null_first"]))

    output = job.succeed(output_filename="${rank}-${chunk_index}.jsonl", records_per_chunk=4)

    assert sorted(output.data()) == ["data/00000-00000.jsonl", "data/00000-00001.jsonl"]
    lines = [line for content in output.data().values() for line in content.splitlines()]
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [f"d{n}" for n in range(6)]
    assert rows[1]["struct"] == {"a": 1, "b": {"c": ["1", None]}}
    assert rows[1]["list"] == [0]
    assert {len(row["rollout_results"]) for row in rows} == {1}
    assert rows[0]["rollout_results"][0]["text"].startswith("answer ")
    assert job.verify().rc == 0

    server.forget()
    job.succeed(output_filename="${rank}-${chunk_index}.jsonl", records_per_chunk=4)
    assert not server.requests


# ── Seeking ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Row = tuple[str, int, str | None]  # file, row in it, text (None: broken)


def write_part(path: Path, texts: list[str | None], rows_per_group: int) -> None:
    """Write a file of an input. In jsonl None is a broken line, and each line is followed by a blank one."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=rows_per_group)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *[[text] for text in texts]])
    else:
        lines = ["{broken" if text is None else json.dumps({"text": text}) for text in texts]
        content = "".join(f"{line}\n\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def open_reader(folder: str, suffix: str) -> sdg.Reader:
    """The bundled reader for a suffix, over all files of a folder."""
    plugins, _ = sdg.Plugins.load([])
    run = SimpleNamespace(options=SimpleNamespace(input=folder, prompt_column="text"), source_schema=None)
    reader: sdg.Reader = plugins.readers[suffix.split(".")[1]].factory(run)
    return reader


def rows_of(parts: list[sdg.Block | sdg.BadRow]) -> list[Row]:
    """The rows that a reader returned, one by one."""
    rows: list[Row] = []
    for part in parts:
        if isinstance(part, sdg.BadRow):
            rows.append((part.file, part.row, None))
        else:
            texts = part.batch.column("text").to_pylist()
            rows += [(part.file, part.row + number, text) for number, text in enumerate(texts)]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    suffix=st.sampled_from([".parquet", ".jsonl", ".jsonl.gz", ".csv"]),
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    rows_per_group=st.integers(1, 12),
    chunk=st.integers(1, 13),
    world=st.integers(1, 4),
    reopened=st.sets(st.integers(0, 40)),
    bookmarks=st.booleans(),
)
def test_chunks_of_all_ranks_partition_the_input(
    suffix: str, sizes: list[int], rows_per_group: int, chunk: int, world: int, reopened: set[int], bookmarks: bool
) -> None:
    whole: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(sizes):
            texts: list[str | None] = [f"file {number}\n\u201crow\u201d, {row}" for row in range(size)]
            if "jsonl" in suffix:
                texts = [None if row % 5 == 3 else text for row, text in enumerate(texts)]
            name = f"{number}{suffix}"
            write_part(Path(folder) / name, texts, rows_per_group)
            whole += [(name, row, text) for row, text in enumerate(texts)]
        found: dict[int, list[Row]] = {}
        for rank in range(world):
            reader, bookmark = open_reader(folder, suffix), None
            for index in range(rank, len(whole) // chunk + 1 + world, world):
                if index in reopened:  # as after a crash
                    reader = open_reader(folder, suffix)
                reader.seek(index * chunk, bookmark if bookmarks else None)
                bookmark = reader.tell()
                found[index] = rows_of(reader.read(chunk))

    assert [row for index in sorted(found) for row in found[index]] == whole
    assert {len(found[index]) for index in found if (index + 1) * chunk <= len(whole)} <= {chunk}


def test_struct_fields_that_only_some_files_have_are_kept(job: Job) -> None:
    (job.folder / "in").mkdir()
    job.input([{"text": "a", "meta": {"url": "u1"}}], "in/a.parquet")
    job.input([{"text": "b", "meta": {"url": "u2", "license": "mit"}}], "in/b.parquet")

    rows = job.succeed(input=job.folder / "in").rows()

    assert [row["meta"] for row in rows] == [{"url": "u1", "license": None}, {"url": "u2", "license": "mit"}]


def test_files_whose_columns_no_type_can_hold_are_named(job: Job, server: FakeServer) -> None:
    (job.folder / "in").mkdir()
    job.input([{"text": "a", "meta": {"url": "u1"}}], "in/a.parquet")
    job.input([{"text": "b", "meta": "u2"}], "in/b.parquet")

    finished = job(input=job.folder / "in")

    assert finished.rc == 1
    assert finished.says("b.parquet", "meta", "a.parquet")
    assert not server.requests


def test_categories_and_views_pass_unchanged(job: Job) -> None:
    categories = pa.array(["a", "b", "a", "c"]).dictionary_encode()
    views = pa.array(["w", "x", "y", "z"], pa.string_view())
    table = pa.table({"text": pa.array(["1", "2", "3", "4"]), "category": categories, "view": views})
    path = job.input(table, row_group_size=2)
    output = job.succeed()
    assert output.table().column("category").to_pylist() == ["a", "b", "a", "c"]
    assert output.table().column("view").to_pylist() == pq.read_table(path).column("view").to_pylist()


def test_categories_of_views_are_written_as_categories(job: Job) -> None:
    """Polars writes them."""
    categories = pa.array(["a", "b", "a", None]).dictionary_encode()
    views = pa.DictionaryArray.from_arrays(categories.indices, categories.dictionary.cast(pa.string_view()))
    table = pa.table(
        {"text": ["1", "2", "3", "4"], "category": views, "inside": pa.StructArray.from_arrays([views], ["x"])}
    )
    with pa.ipc.new_file(job.folder / "in.arrow", table.schema) as file:
        file.write_table(table)

    rows = job.succeed(input="in.arrow").rows()

    assert [row["category"] for row in rows] == ["a", "b", "a", None]
    assert [row["inside"] for row in rows] == [{"x": "a"}, {"x": "b"}, {"x": "a"}, {"x": None}]


def test_a_folder_of_several_formats_is_refused_and_backups_are_not_read(job: Job, server: FakeServer) -> None:
    folder = job.folder / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "a.jsonl.bak").write_text('{"text": "a"}\n')
    job.options["input"] = folder
    assert len(job.succeed().rows()) == 1
    (folder / "b.csv").write_text("text\nb\n")
    finished = job(output="other")
    assert finished.rc == 2
    assert finished.says("csv", "jsonl")


def test_output_named_gz_is_compressed(job: Job) -> None:
    job.documents("one", "two")
    name = "${rank}_${chunk_index}.jsonl.gz"
    output = job.succeed(output_filename=name)
    lines = gzip.decompress((output.path / "data" / "00000_00000.jsonl.gz").read_bytes()).splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["one", "two"]
    assert job.verify().rc == 0


def test_a_csv_header_with_a_duplicate_name_is_refused(job: Job) -> None:
    (job.folder / "twice.csv").write_text("text,a,a\nx,1,2\n")
    finished = job(input="twice.csv")
    assert finished.rc == 1
    assert finished.says("twice.csv", "twice")


def test_hidden_folders_and_outputs_of_runs_are_not_read(job: Job, server: FakeServer) -> None:
    folder = job.folder / "project"
    for name in ("", ".ipynb_checkpoints", "_temporary"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "docs.jsonl").write_text('{"text": "document"}\n')
    options = {"input": "project", "output": "project/output/x", "output_filename": "${chunk_index}.jsonl"}

    job.succeed(**options)
    job.succeed(**{**options, "output": "project/elsewhere", "state_dir": "state"})
    again = job(**options)

    assert again.rc == 0, again
    assert server.prompts == ["document"] * 2


@pytest.mark.parametrize("odd", ["plain text", [{"role": "user", "content": [{"type": "text", "text": "parts"}]}]])
def test_an_unusual_chat_among_others_is_sent_as_it_stands(job: Job, server: FakeServer, odd: object) -> None:
    chats: list[object] = [[{"role": "user", "content": f"hello {number}"}] for number in range(20)]
    chats[0], chats[7] = odd, [{"role": "user", "content": "hello", "name": 3}]
    chats[8] = [{"role": "user", "content": "hello", "name": "x"}]
    job.input([{"id": f"{number}", "messages": chat} for number, chat in enumerate(chats)], "chats.jsonl")

    output = job.succeed(prompt_column="messages")

    assert len(output.rows()) == 20
    sent = [request.payload["messages"] for request in server.requests]
    assert all(chat in sent for chat in chats[1:])


def test_columns_of_any_type_can_be_verified_and_completed_as_jsonl(job: Job, server: FakeServer) -> None:
    maps = pa.array([[("k", 1)], [], None, [("a", 2)]], pa.map_(pa.string(), pa.int64()))
    job.input(
        pa.table(
            {
                "text": ["a", "b", "reject", "d"],
                "map": maps,
                "binary": [b"\xff", b"", None, b"x"],
                "id": [b"\xfe", b"b", b"\x00", b"d"],
            }
        )
    )
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) == "reject" else None)
    options = {"output_filename": "${chunk_index}.jsonl", "records_per_chunk": 2}
    job.succeed(**options)
    assert job.verify().rc == 0
    server.behave(lambda payload, n: None)

    job.succeed(retry_failed=True, **options)

    assert job.verify().rc == 0
    lines = [json.loads(line) for file in job.output.data().values() for line in file.splitlines()]
    assert [line["text"] for line in lines] == ["a", "b", "reject", "d"]


def test_ids_of_several_types_can_be_verified_as_jsonl(job: Job) -> None:
    ids = [1, "a", 2**70, None, 0.5]
    lines = [json.dumps({"id": id_, "text": "" if number == 2 else "text"}) for number, id_ in enumerate(ids)]
    (job.folder / "in.jsonl").write_text("\n".join(lines))

    output = job.succeed(input="in.jsonl", output_filename="${chunk_index}.jsonl", max_failure_rate=1)

    assert job.verify().rc == 0
    assert [failure["id"] for failure in output.failures()] == [2**70]


def test_dates_beyond_pythons_range_do_not_block_failed_documents(job: Job) -> None:
    far = pa.array([2**62, 0, -(2**62)], pa.timestamp("us", tz="Asia/Tokyo"))
    columns = {"text": ["a", None, "c"], "when": far, "day": pa.array([2**30, 1, 2], pa.date32())}
    columns["infinite"] = pa.array([2**63 - 1, -(2**63) + 1, 0], pa.timestamp("us"))
    columns["never"] = pa.array([2**31 - 1, -(2**31) + 1, 0], pa.date32())
    job.input(pa.table(columns))

    for filename in ("${chunk_index}.parquet", "${chunk_index}.jsonl"):
        output = job.succeed(output=filename[-5:], output_filename=filename)
        assert output.stats()["rows"] == 2
        (failure,) = output.failures()
        assert failure["document"]["infinite"] is failure["document"]["never"] is None


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = """
    import asyncio
    import math
    from typing import TypedDict

    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("shapes", shapes)
        register("judged", judged)
        register("number", number)

    async def shapes(document, generate):
        n = int(document.text.split()[1])
        await asyncio.sleep(0.2 * (n == 0))
        answer = await generate(document.text)
        result = {"answer": answer, "score": math.nan if n % 2 else 0.5, "table": [[1, 2], [n]]}
        result["call"] = {"arguments": {}}
        result["thread"] = {"body": "last"}
        for _ in range(40):
            result["thread"] = {"body": "x", "replies": [result["thread"]]}
        return result if n < 2 else {"later": n}

    class Judged(TypedDict):
        answer: sdg.Reply
        score: float

    async def judged(document, generate) -> Judged:
        return {"answer": await generate(document.text), "score": 1.0}

    async def number(document, generate):
        return [["a"], ["b"]] if document.index == 2 else 0.5
"""


def test_results_keep_their_shape(job: Job) -> None:
    job.input(documents(4))
    plugin = job.plugin("shapes", SHAPES)

    output = job.succeed(plugin=f"{plugin}:shapes", records_per_chunk=2)

    first, second, third, _ = (row["rollout_results"][0] for row in output.rows())
    assert first["answer"]["text"].startswith("answer ")
    assert first["table"] == [[1, 2], [0]]
    assert json.loads(first["call"]["arguments"]) == {}
    assert first["thread"]["replies"][0]["body"] == "x"
    assert first["score"] == 0.5
    assert str(second["score"]) == "nan"
    assert json.loads(third["extra"]) == {"later": 2}  # the fields are those of the first chunk of the input
    assert job.verify().rc == 0


def test_numbers_are_results_and_rollouts_are_numbered(job: Job) -> None:
    job.input([{"id": number, "text": "text"} for number in range(3)])
    plugin = job.plugin("shapes", SHAPES)
    options = {"plugin": f"{plugin}:number", "rollouts_per_document": 2, "max_failure_rate": 1}

    output = job.succeed(**options)
    results = [row["rollout_results"] for row in output.rows()]
    (failure,) = output.failures()
    judged = job.succeed(plugin=f"{plugin}:judged", output="judged").rows()[0]["rollout_results"][0]

    assert [[(item["rollout"], item["value"]) for item in row] for row in results] == [[(0, 0.5), (1, 0.5)]] * 2
    assert judged["answer"]["text"].startswith("answer ")
    assert judged["extra"] is None
    assert failure["id"] == 2, "the id keeps its type"
    assert "list of lists" in failure["error"]
