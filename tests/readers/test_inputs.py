"""Files as people have them: formats and their oddities, each with the rows that must come out."""

from __future__ import annotations

import bz2
import gzip
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


def opened(path: str, prompt: str = "text", **options: Any) -> tuple[sdg.Reader, OpenChunk]:
    """The reader of an input, and all its rows as one chunk."""
    plugins, _ = sdg.Plugins.load([])
    given = {"input": path, "prompt_column": prompt, "id_column": None, "records_per_chunk": 10_000, "world_size": 1}
    run = SimpleNamespace(options=SimpleNamespace(**given, rank=0, max_documents=None, **options), source_schema=None)
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
    return [document for _, document in chunk.documents(prompt, ids)]


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
