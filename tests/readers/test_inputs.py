"""Files as people have them: formats and their oddities, each with the rows that must come out."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sdg
from sdg_plugins.common.chunks import OpenChunk
from sdg_plugins.common.inputs import input_format
from sdg_plugins.common.values import id_column_of

ROWS = [{"text": f"Text number {n} is here."} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ONE = [{"text": "Hello.", "n": "1"}]
TWO = [*ONE, {"text": "Fine.", "n": "2"}]
BROKEN = "broken"  # in place of a row: the document fails


def table(rows: list[dict[str, Any]], write: Callable[[pa.Table, str], None]) -> Callable[[Path], None]:
    return lambda path: write(pa.Table.from_pylist(rows), str(path))


def arrow_stream(content: pa.Table, path: str) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
        stream.write_table(content)


def arrow_file(content: pa.Table, path: str) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, content.schema) as stream:
        stream.write_table(content, max_chunksize=2)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


CHAT = [{"role": "user", "content": "Hello."}]
Content = bytes | str | Callable[[Path], None]

# name: content, expected rows (None: BROKEN is expected)
FILES: dict[str, tuple[Content, list[Any]]] = {
    # JSON
    "lines.jsonl": (LINES, ROWS),
    "lines.json": (LINES, ROWS),
    "lines.ndjson": (LINES, ROWS),
    "LINES.JSONL": (LINES, ROWS),
    "no_suffix": (LINES, ROWS),
    "no_last_line_end.jsonl": (LINES[:-1], ROWS),
    "array.json": (json.dumps(ROWS), ROWS),
    "array.jsonl": (json.dumps(ROWS), ROWS),
    "array_indented.json": (json.dumps(ROWS, indent=2), ROWS),
    "array_row_per_line.json": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", ROWS),
    "array_with_braces_in_text.json": (json.dumps([{"text": 'a "}" [x{'}] * 2, indent=1), [{"text": 'a "}" [x{'}] * 2),
    "object.json": ('{\n "text": "Hello.",\n "n": "1"\n}\n', ONE),
    "objects_indented.jsonl": ("\n".join(json.dumps(row, indent=1) for row in ROWS), ROWS),
    "bom_and_crlf.jsonl": (b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n") + b"\r\n\r\n", ROWS),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), ROWS),
    "utf16_without_bom.json": (LINES.decode().encode("utf-16-le"), ROWS),
    "utf32.jsonl": (LINES.decode().encode("utf-32"), ROWS),
    "too_deep.jsonl": (LINES + b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", [*ROWS, BROKEN]),
    "broken_line.jsonl": (
        b'{"text": "Hello.", "n": "1"}\n{"text": \n{"text": "Fine.", "n": "2"}\n',
        [ONE[0], BROKEN, TWO[1]],
    ),
    "python_repr_first.jsonl": (b"{'text': 'no'}\n" + LINES, [BROKEN, *ROWS]),
    "nan.jsonl": (
        '{"text": "a", "x": NaN}\n{"text": "b", "x": -Infinity}\n',
        [{"text": "a", "x": "nan"}, {"text": "b", "x": "-inf"}],
    ),
    "nan_in_json.jsonl": ('{"text": "a", "x": [NaN, "y"]}\n', [{"text": "a", "x": ["nan", "y"]}]),
    "lone_surrogate.jsonl": (r'{"text": "half \ud83d."}', [{"text": "half \ufffd."}]),
    "huge_integers.jsonl": (
        '{"text": "a", "x": 123456789012345678901234567890}\n{"text": "b", "x": 1}',
        [{"text": "a", "x": 123456789012345678901234567890}, {"text": "b", "x": 1}],
    ),
    "unsigned.jsonl": ('{"text": "a", "x": 18446744073709551615}', [{"text": "a", "x": 18446744073709551615}]),
    "large_floats.jsonl": ('{"text": "a", "x": 1e300}', [{"text": "a", "x": 1e300}]),
    "mixed_types.jsonl": (
        '{"text": "a", "x": 1}\n{"text": "b", "x": "one"}\n{"text": "c", "x": {"y": null}}',
        [{"text": "a", "x": 1}, {"text": "b", "x": "one"}, {"text": "c", "x": {"y": None}}],
    ),
    "empty_objects.jsonl": (
        '{"text": "a", "x": {}, "l": [{}], "s": {"a": 1, "i": {}}}',
        [{"text": "a", "x": {}, "l": [{}], "s": {"a": 1, "i": {}}}],
    ),
    "only_nulls.jsonl": ('{"text": "a", "x": null, "l": []}', [{"text": "a", "x": None, "l": []}]),
    "many_keys.jsonl": (
        "\n".join(json.dumps({"text": "a", "x": {f"k{n}": 1}}) for n in range(2000)),
        [{"text": "a", "x": {f"k{n}": 1}} for n in range(2000)],
    ),
    # compression, by name or not
    "c.jsonl.gz": (gzip.compress(LINES), ROWS),
    "members.jsonl.gz": (gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]), ROWS),
    "c.jsonl.bz2": (bz2.compress(LINES), ROWS),
    "c.jsonl.xz": (lzma.compress(LINES), ROWS),
    "c.jsonl.zst": (zstd(LINES), ROWS),
    "c.jsonl.zstd": (zstd(LINES), ROWS),
    "C.JSONL.GZ": (gzip.compress(LINES), ROWS),
    "json.gz": (gzip.compress(LINES), ROWS),
    "gzip_without_suffix.jsonl": (gzip.compress(LINES), ROWS),
    "not_compressed.jsonl.zst": (LINES, ROWS),
    "array.json.bz2": (bz2.compress(json.dumps(ROWS).encode()), ROWS),
    "c.csv.gz": (gzip.compress(b"text,n\nHello.,1\n"), ONE),
    "c.tsv.xz": (lzma.compress(b"text\tn\nHello.\t1\n"), ONE),
    "c.txt.gz": (gzip.compress(b"Hello."), [{"name": "c.txt.gz", "text": "Hello."}]),
    # csv
    "plain.csv": ("text,n\nHello.,1\nFine.,2\n", TWO),
    "PLAIN.CSV": ("text,n\nHello.,1\nFine.,2\n", TWO),
    "plain.tsv": ("text\tn\nHello.\t1\n", ONE),
    "semicolon.csv": ("text;n\nHello.;1\n", ONE),
    "tab.csv": ("text\tn\nHello.\t1\n", ONE),
    "pipe.csv": ("text|n\nHello.|1\n", ONE),
    "sep.csv": ("sep=;\ntext;n\nHello.;1\n", ONE),
    "commas_in_semicolons.csv": (
        "text;n\na, b, c;1\nd, e;2\n",
        [{"text": "a, b, c", "n": "1"}, {"text": "d, e", "n": "2"}],
    ),
    "bom.csv": (b"\xef\xbb\xbftext,n\nHello.,1\n", ONE),
    "utf16.csv": ("text,n\nHello.,1\n".encode("utf-16"), ONE),
    "latin1.csv": ("text,n\nCafé.,1\n".encode("latin-1"), [{"text": "Café.", "n": "1"}]),
    "windows.csv": ("text,n\n“quoted”,1\n".encode("cp1252"), [{"text": "“quoted”", "n": "1"}]),
    "broken_utf8.csv": ("text,n\nCafé.,1\n".encode() + b"Caf\xe9.,2\n", [{"text": "Café.", "n": "1"}, BROKEN]),
    "crlf.csv": ("text,n\r\nHello.,1\r\nFine.,2\r\n", TWO),
    "cr.csv": ("text,n\rHello.,1\rFine.,2\r", TWO),
    "cr_inside.csv": ('text,n\n"a\rb",1\nc\rd,2\n', [{"text": "a\rb", "n": "1"}, {"text": "c\rd", "n": "2"}]),
    "quoted_newline.csv": ('text,n\r\n"a\r\nb, ""c""",1\r\nFine.,2\r\n', [{"text": 'a\r\nb, "c"', "n": "1"}, TWO[1]]),
    "backslash_quotes.csv": ('text,n\n"a \\"b, c\\" d",1\nFine.,2\n', [{"text": 'a "b, c" d', "n": "1"}, TWO[1]]),
    "backslashes.csv": ('text,n\n"C:\\temp",1\n', [{"text": "C:\\temp", "n": "1"}]),
    "stray_quote.csv": ('text,n\n"a "b" c",1\nFine.,2\n', [BROKEN, TWO[1]]),
    "unclosed_quote.csv": ('text,n\n"a,1\nFine.,2\nHello.,1\n', [BROKEN, TWO[1], ONE[0]]),
    "unclosed_before_quoted.csv": ('text,n\n"a,1\nFine.,2\n"b, c",3\n', [BROKEN, TWO[1], {"text": "b, c", "n": "3"}]),
    "broken_over_lines.csv": ('text,n\n"a "b"\nc d",1\nFine.,2\n', [BROKEN, TWO[1]]),
    "inch.csv": ('text,n\na 5" pipe,1\nFine.,2\n', [{"text": 'a 5" pipe', "n": "1"}, TWO[1]]),
    "spaces.csv": ('text, n\n"Hello.", "1"\n', ONE),
    "ragged.csv": ("text,n\nHello.,1,\nFine.\nFine.,2\n", [ONE[0], BROKEN, TWO[1]]),
    "nul.csv": (b"text,n\na\x00b,1\n", [{"text": "a\x00b", "n": "1"}]),
    "unnamed_columns.csv": (",,text\n0,5,Hello.\n", [{"Unnamed: 0": "0", "Unnamed: 1": "5", "text": "Hello."}]),
    "header_only.csv": ("text,n\n", []),
    "blank_lines.csv": ("text,n\n\nHello.,1\n\n", ONE),
    # tables
    "t.parquet": (table(ROWS, pq.write_table), ROWS),
    "T.PARQUET": (table(ROWS, pq.write_table), ROWS),
    "t.pq": (table(ROWS, pq.write_table), ROWS),
    "parquet_without_suffix": (table(ROWS, pq.write_table), ROWS),
    "stream.arrow": (table(ROWS, arrow_stream), ROWS),
    "file.arrow": (table(ROWS, arrow_file), ROWS),
    "t.feather": (table(ROWS, arrow_file), ROWS),
    "empty_struct.arrow": (table([{"text": "a", "x": {}}], arrow_stream), [{"text": "a", "x": {}}]),
    # text
    "a.txt": ("Hello one.\nHello two.\n", [{"name": "a.txt", "text": "Hello one.\nHello two.\n"}]),
    "a.md": ("# Title\n", [{"name": "a.md", "text": "# Title\n"}]),
    "latin1.txt": ("Café".encode("latin-1"), [{"name": "latin1.txt", "text": "Café"}]),
    "utf16.txt": ("Café".encode("utf-16"), [{"name": "utf16.txt", "text": "Café"}]),
    "empty.txt": ("", [BROKEN]),
}


def opened(
    path: str, prompt: str = "text", known: pa.Schema | None = None, **options: Any
) -> tuple[sdg.Reader, OpenChunk]:
    """The reader of an input, and all its rows as one chunk. `known` is the schema from an earlier process."""
    plugins, _ = sdg.Plugins.load([])
    given = {"input": path, "prompt_column": prompt, "id_column": None, "records_per_chunk": 10_000, "world_size": 1}
    run = SimpleNamespace(options=SimpleNamespace(**given, rank=0, max_documents=None, **options), source_schema=known)
    name = input_format(path, plugins.readers)
    assert name, path
    reader: sdg.Reader = plugins.readers[name].factory(run)
    return reader, OpenChunk(sdg.Chunk(0, 0), reader.read(10_000), reader.schema)


def documents(path: str, prompt: str = "text", **options: Any) -> list[sdg.Document | str]:
    """The documents of an input; the reason for those that fail."""
    reader, chunk = opened(path, prompt, **options)
    if not chunk.chunk.count:
        return []
    ids = id_column_of(SimpleNamespace(id_column=None), reader.schema)  # type: ignore[arg-type]
    found = (document for _, document in chunk.documents(prompt, ids))
    return [document["error"] if isinstance(document, dict) else document for document in found]


# ── Folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in documents(str(path), **options) if isinstance(document, sdg.Document)]


def put(path: Path, *rows: str) -> None:
    """Write texts in the format that the suffix of a path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(rows)}), path)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def test_all_suffixes_of_a_format_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "b.json", "C.JSONL", "d.ndjson"):
        put(tmp_path / name, name)
    (tmp_path / "e.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "e.jsonl.bz2"}'))
    (tmp_path / "f.tfrecord").write_bytes(b"?")
    (tmp_path / "LICENSE").write_text("free")

    assert texts(tmp_path) == ["C.JSONL", "a.jsonl", "b.json", "d.ndjson", "e.jsonl.bz2"]

    said = capsys.readouterr().err
    assert "f.tfrecord" in said
    assert "LICENSE" not in said


def test_links_to_a_folder_above_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.jsonl", "one")
    put(tmp_path / "elsewhere/b.jsonl", "two")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")

    assert texts(tmp_path / "in") == ["one", "two"]
    assert "loop" in capsys.readouterr().err


def test_a_checkout_of_a_dataset_has_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        put(tmp_path / f"data/{name}.parquet", name)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (tmp_path / ".gitattributes").write_text("")

    assert texts(tmp_path, input_split="train") == ["train-00000-of-00002", "train-00001-of-00002"]
    assert "others: test" in capsys.readouterr().err
    assert texts(tmp_path, input_split="test") == ["test-00000-of-00001"]
    with pytest.raises(sdg.InputError, match="no such split; available: test, train"):
        texts(tmp_path, input_split="validation")


def test_the_card_of_a_folder_decides_on_configs(tmp_path: Path) -> None:
    put(tmp_path / "en/x.jsonl", "hello")
    put(tmp_path / "de/x.jsonl", "hallo")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*\n  default: true\n"
        "- config_name: de\n  data_files: de/*\n---\n"
    )

    assert texts(tmp_path, input_split="train", input_config=None) == ["hello"]
    assert texts(tmp_path, input_split="train", input_config="de") == ["hallo"]


def test_what_datasets_notes_beside_arrow_files_is_not_input(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        table([{"text": split}], arrow_stream)(tmp_path / split / "data-00000-of-00001.arrow")
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")

    assert texts(tmp_path) == ["test", "train"]
    assert texts(tmp_path / "train") == ["train"]


def test_a_folder_without_a_card_is_read_whole_unless_a_split_is_asked_for(tmp_path: Path) -> None:
    for name in ("test", "train"):
        put(tmp_path / f"{name}.jsonl", name)

    assert texts(tmp_path, input_split="train") == ["test", "train"]
    assert texts(tmp_path, input_split="test") == ["test"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_partitions_are_columns(suffix: str, tmp_path: Path) -> None:
    for year, lang in ((2023, "en"), (2024, "pt%2FBR"), (2024, "__HIVE_DEFAULT_PARTITION__")):
        put(tmp_path / f"year={year}/lang={lang}/part{suffix}", "a", "b")

    rows = [document.row for document in documents(str(tmp_path)) if isinstance(document, sdg.Document)]

    assert [(row["year"], row["lang"]) for row in rows[::2]] == [(2023, "en"), (2024, None), (2024, "pt/BR")]
    assert len(rows) == 6


def write_both(path: Path, content: pa.Table) -> None:
    """Write a table in the format that the suffix of a path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(content, path)
    elif path.suffix == ".arrow":
        arrow_file(content, str(path))
    elif path.suffix == ".csv":
        path.write_text(
            "".join(
                ",".join(map(str, row)) + "\n"
                for row in [content.column_names, *zip(*content.to_pydict().values(), strict=True)]
            )
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content.to_pylist()))


@pytest.mark.parametrize("own", [False, True])  # the files have a column of a partition themselves, too
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow", ".csv"])
def test_later_processes_of_a_run_read_the_same_partitions(suffix: str, own: bool, tmp_path: Path) -> None:
    for year in (2023, 2024):
        content = pa.table({"text": ["a", "b"], **({"lang": [str(year)] * 2} if own else {})})
        write_both(tmp_path / f"year={year}/lang=en/part{suffix}", content)

    reader, first = opened(str(tmp_path))
    recorded = pa.ipc.read_schema(reader.schema.serialize())
    for known in (recorded, recorded.remove_metadata()):  # as an earlier version has recorded it
        again, later = opened(str(tmp_path), known=known)
        assert again.schema == reader.schema
        assert later.table.equals(first.table)

    assert first.table.column("year").to_pylist() == [2023, 2023, 2024, 2024]
    assert first.table.column("lang").to_pylist() == (["2023", "2023", "2024", "2024"] if own else ["en"] * 4)


def test_the_columns_of_partitions_stay_as_a_run_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "year=2023/a.jsonl", "a")
    known = opened(str(tmp_path))[0].schema

    put(tmp_path / "year=2024/lang=en/a.jsonl", "b")
    assert opened(str(tmp_path), known=known)[1].table.to_pylist() == [
        {"text": "a", "year": 2023},
        {"text": "b", "year": 2024},
    ]
    assert "this run began without the partitions lang=…" in capsys.readouterr().err

    put(tmp_path / "year=later/a.jsonl", "c")
    with pytest.raises(sdg.InputError, match="year=… had numbers as this run began"):
        opened(str(tmp_path), known=known)


def test_the_output_of_a_run_is_not_read_beside_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in/a.parquet", "mine")
    (tmp_path / "in/out/data").mkdir(parents=True)
    written = pa.table({"text": ["theirs"]}).replace_schema_metadata({"sdg.fingerprint": "f"})
    pq.write_table(written, tmp_path / "in/out/data/00000_00000.parquet")

    assert texts(tmp_path / "in") == ["mine"]
    assert "is the output of a run" in capsys.readouterr().err
    assert texts(tmp_path / "in/out") == ["theirs"]


@pytest.mark.parametrize("flat", [False, True])
def test_output_in_json_lines_is_recognized_by_its_results(
    flat: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "in/a.jsonl", "mine")
    (tmp_path / "in/out/data").mkdir(parents=True)
    result = {
        "text": "short",
        "reasoning": None,
        "finish_reason": "stop",
        "usage": {},
        "truncated": False,
        "extra": None,
    }
    row = {"text": "theirs", "id": "a", **({**result, "generated_text": "short"} if flat else {"results": [result]})}
    (tmp_path / "in/out/data/00000_00000.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))

    assert texts(tmp_path / "in") == ["mine"]
    assert "is the output of a run" in capsys.readouterr().err


def test_the_total_of_compressed_lines_is_estimated_without_what_was_only_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 200) for i in range(20_000)), 1))
    reader, _ = opened(str(path))
    reader.seek(0, None)
    reader.read(5)
    assert reader.total() == pytest.approx(20_000, rel=0.5)


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_new_columns_of_late_files_are_named(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"sdg_plugins.readers.{suffix}.EAGER", 1)
    for name, columns in {"a": {"text": ["a"]}, "b": {"text": ["b"], "new": [1]}}.items():
        table = pa.table(columns)
        if suffix == "parquet":
            pq.write_table(table, tmp_path / f"{name}.parquet")
            continue
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema) as file:
            file.write_table(table)

    with pytest.raises(sdg.InputError, match=rf"b\.{suffix} has .* column.*new"):
        documents(str(tmp_path))
    assert suffix == "arrow" or "the columns are those of the first 1 of 2 files" in capsys.readouterr().err


def test_empty_csv_files_among_others_have_no_rows(tmp_path: Path) -> None:
    for name, content in {"a.csv": b"", "b.csv": b"text\none\n", "c.csv.gz": gzip.compress(b"")}.items():
        (tmp_path / name).write_bytes(content)

    assert texts(tmp_path) == ["one"]
    (tmp_path / "b.csv").unlink()
    with pytest.raises(sdg.InputError, match=r"a\.csv has no header"):
        documents(str(tmp_path))


def test_columns_of_shards_are_unified(tmp_path: Path) -> None:
    shards: list[dict[str, Any]] = [
        {"text": ["a"], "n": pa.array([1], pa.int32()), "x": pa.nulls(1), "t": pa.array([5], pa.timestamp("ms"))},
        {"t": pa.array([5000], pa.timestamp("us")), "n": pa.array([2**40]), "text": ["b"], "x": [["tag"]]},
        {"text": pa.array(["c"], pa.large_string()), "n": [0.5], "new": [{"a": 1}]},
    ]
    for number, columns in enumerate(shards):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")

    rows = [document.row for document in documents(str(tmp_path)) if isinstance(document, sdg.Document)]

    assert [(row["text"], row["n"], row["x"], row["new"]) for row in rows] == [
        ("a", 1.0, None, None),
        ("b", float(2**40), ["tag"], None),
        ("c", 0.5, None, {"a": 1}),
    ]
    assert rows[0]["t"] == rows[1]["t"]


def test_a_value_that_a_common_type_cannot_hold_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [2**60 + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": [0.5]}), tmp_path / "b.parquet")

    with pytest.raises(sdg.InputError, match=r"a\.parquet has values that do not fit.*column n"):
        documents(str(tmp_path))


# ── Chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": None, "b": [1, {"c": 2}]}}}
CHATS: dict[str, list[Any]] = {
    "plain": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
    "keys vary": [[{"role": "user", "content": "a", "name": "x"}], [{"role": "user", "content": "b"}]],
    "parts": [[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "x", "y": {"z": None}}]}]],
    "text and parts": [[{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text"}]}]],
    "tool calls": [[{"role": "assistant", "tool_calls": [CALL]}], [{"role": "user", "content": "b"}]],
    "strings": ["just text", [{"role": "user", "content": "b"}]],
    "numbers": [[{"role": "assistant", "content": [{"x": number}], "weight": number}] for number in (1, 2.5, 3)],
}
# Where a chat stands in a row
PLACES: dict[str, Callable[[Any], Any]] = {
    "m": lambda chat: {"m": chat},
    "d.m": lambda chat: {"d": {"other": 1, "m": chat}},
    "d[-1].m": lambda chat: {"d": [{"m": None}, {"m": chat}]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHATS)
def test_chats_of_json_lines_are_sent_as_they_stand(name: str, place: str, tmp_path: Path) -> None:
    rows = [{"n": n, **PLACES[place](chat)} for n, chat in enumerate(CHATS[name])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = documents(str(tmp_path / "a.jsonl"), place)

    sent = [d.messages or d.text for d in found if isinstance(d, sdg.Document)]
    assert json.dumps(sent) == json.dumps(CHATS[name])  # 1 is not 1.0


@pytest.mark.parametrize("place", PLACES)
def test_keys_that_first_appear_after_the_sample_are_sent(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdg_plugins.readers.jsonl.SAMPLE", 200)
    chats: list[Any] = [[{"role": "user", "content": f"number {n}", "weight": 0.5}] for n in range(20)]
    chats += [[{"role": "user", "content": "late", "name": "x"}], [{"role": "tool", "content": [{"a": None}]}], "text"]
    chats += [[{"role": "user", "content": "an integer", "weight": 1}]]
    rows = [{"id": n, **PLACES[place](chat)} for n, chat in enumerate(chats)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = documents(str(tmp_path / "a.jsonl"), place)

    sent = [d.messages or d.text for d in found if isinstance(d, sdg.Document)]
    assert json.dumps(sent) == json.dumps(chats)  # 1 is not 1.0


def test_null_keys_are_not_sent(tmp_path: Path) -> None:
    part = {"type": "text", "text": "a", "cache": None}
    chat = [{"role": "user", "content": "a", "name": None, "tool_calls": None}]
    table([{"m": chat}], pq.write_table)(tmp_path / "a.parquet")
    table([{"m": [{"role": "user", "content": [part]}]}], pq.write_table)(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps({"m": chat}))

    for name in ("a.parquet", "c.jsonl"):
        (document,) = documents(str(tmp_path / name), "m")
        assert isinstance(document, sdg.Document)
        assert document.messages == [{"role": "user", "content": "a"}]
    (first,) = documents(str(tmp_path / "b.parquet"), "m")
    assert isinstance(first, sdg.Document)
    assert first.messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


def test_maps_inside_of_chats_are_objects(tmp_path: Path) -> None:
    kind = pa.list_(
        pa.struct(
            [("role", pa.string()), ("tool_calls", pa.list_(pa.struct([("f", pa.map_(pa.string(), pa.int8()))])))]
        )
    )
    chat = [{"role": "assistant", "tool_calls": [{"f": [("a", 1), ("b", None)]}, {"f": []}, {"f": None}]}]
    pairs = [{"role": "assistant", "tool_calls": [{"f": [{"key": "a", "value": 1}]}]}]
    pq.write_table(pa.table({"m": pa.array([chat], kind)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"m": pa.array([chat], kind), "other": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"m": pairs}))

    for path in ("a.parquet", "*.parquet"):
        document, *_ = documents(str(tmp_path / path), "m")
        assert isinstance(document, sdg.Document)
        assert document.messages == [
            {"role": "assistant", "tool_calls": [{"f": {"a": 1, "b": None}}, {"f": {}}, {}]},
        ]
    (document,) = documents(str(tmp_path / "pairs.jsonl"), "m")
    assert isinstance(document, sdg.Document)
    assert document.messages == pairs


def test_values_of_any_depth_stay_what_they_are_and_make_readable_files(tmp_path: Path) -> None:
    nested: dict[str, Any] = {"text": "a", "thread": "leaf", "lists": 1}
    for _ in range(60):
        nested["thread"] = {"body": "x", "replies": [nested["thread"]]}
        nested["lists"] = [nested["lists"]]
    (tmp_path / "a.jsonl").write_text(json.dumps(nested))

    _, chunk = opened(str(tmp_path / "a.jsonl"))
    results = chunk.table.add_column(0, "results", pa.array([[{"own": row} for row in chunk.table.to_pylist()]]))
    pq.write_table(results, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", results.schema) as file:
        file.write_table(results)

    assert chunk.row(0) == nested
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 1
    assert pa.ipc.open_file(tmp_path / "a.arrow").read_all().num_rows == 1


def test_sharegpt_is_understood(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("tool", "t")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"c": [{"from": who, "value": text} for who, text in turns]}))

    (document,) = documents(str(tmp_path / "a.jsonl"), "c")

    assert isinstance(document, sdg.Document)
    roles = zip(("system", "user", "assistant", "tool"), "shgt", strict=True)
    assert document.messages == [{"role": role, "content": text} for role, text in roles]


def write(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def comparable(value: Any) -> Any:
    """A value in which NaN and infinities are equal to their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_its_rows(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    write(tmp_path / name, content)

    found = documents(str(tmp_path / name))

    rows = [BROKEN if isinstance(document, str) else document.row for document in found]
    assert comparable(rows) == expected
    for document in found:
        assert isinstance(document, sdg.Document) or name in document or "is empty" in document


@pytest.mark.parametrize("name", [name for name in FILES if not callable(FILES[name][0])])
def test_reading_continues_at_every_bookmark(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    write(tmp_path / name, content)
    path = str(tmp_path / name)
    whole, chunk = opened(path)
    steps = range(min(len(expected), 5))

    for row in steps:
        whole.seek(row, None)
        bookmark = whole.tell()
        later, _ = opened(path)
        later.seek(row, bookmark)
        rest = OpenChunk(sdg.Chunk(0, 0), later.read(10_000), later.schema)
        assert rest.table.equals(chunk.table.slice(row)) or "nan" in name


@pytest.mark.parametrize(
    ("content", "broken"),
    [
        ('{"text": 1\n', '{"text": 1\n'),
        ('text,n\n"a ""b" c,1\nFine.,2\n', '"a ""b" c,1\n'),
        ("text,n\nFine.\n", "Fine."),
        (b"text,n\nCaf\xe9.,1\n".replace(b"text", "tëxt".encode()), "Caf\ufffd.,1"),
    ],
)
def test_a_broken_row_is_shown_as_it_stands(content: str | bytes, broken: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl" if content[:1] == "{" else "a.csv")
    write(path, LINES + content.encode() if path.suffix == ".jsonl" and isinstance(content, str) else content)

    _, chunk = opened(str(path))

    assert [row.raw for row in chunk.bad.values()] == [broken]


# ── Standard input ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_standard_input_is_kept_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins, _ = sdg.Plugins.load([])

    def read(content: bytes) -> list[str]:
        options = SimpleNamespace(input="-", prompt_column="text", world_size=1, part=None)
        run = SimpleNamespace(options=options, plugins=plugins, state=tmp_path, source_schema=None)
        stdin = SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: False)
        monkeypatch.setattr("sys.stdin", stdin)
        (block,) = plugins.readers["stdin"].factory(run).read(100)
        assert options.input == str(tmp_path / "stdin.jsonl")
        return [row["text"] for row in block.batch.to_pylist()]

    assert read(LINES) == [row["text"] for row in ROWS]
    (tmp_path / "run.json").write_text("{}")
    assert read(b"") == [row["text"] for row in ROWS]
    assert read(LINES + b'{"text": "more"}\n')[-1] == "more"
    with pytest.raises(sdg.StateError, match="not what this run was begun with"):
        read(LINES)
