"""JSON: lines, arrays and objects one after the other, plain or compressed. Each object is one document.

The columns and their types are inferred from a sample at the start of the input. A column whose values in the sample
have several types, or whose type cannot be told, has Arrow's JSON type. Later values that do not fit (a new column, a
value of another type) are kept as JSON in the column `source_extra`; a prompt is taken from there as it stands.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.chunks import EXTRA
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.kinds import (
    checker,
    columns_of,
    is_json,
    json_text,
    json_type,
    parse_json,
    prompt_checker,
    type_of,
    type_of_prompts,
)
from sdg_plugins.common.paths import parse_path
from sdg_plugins.common.streams import BLOCK, Stream
from sdg_plugins.readers.lines import Lines, LinesReader, split_lines
from sdg_plugins.readers.partitions import partitioned

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = 8 << 20  # bytes…
SAMPLE_REMOTE = 200  # … and remote files, at most: each takes two requests
MOST_COLUMNS = 1000  # the rarest of more columns are kept in `source_extra`
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)  # a lone quote: the text goes on
BETWEEN = b"\xef\xbb\xbf \t\r\n,"  # what may stand between values


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("jsonl", partitioned(JsonlReader))


class JsonlReader(LinesReader):
    """Read JSON objects, from lines or arrays."""

    def __init__(self, run: sdg.Run) -> None:
        files = InputFiles.of_run(run, "jsonl")
        encoding = getattr(run.options, "input_encoding", None)
        self._prompt = run.options.prompt_column
        self.schema = run.source_schema or infer_schema(Lines(files, encoding, splitter=splitter_for), self._prompt)
        self._checks = self._checkers(huge=False)
        self._exact_checks = self._checkers(huge=True)
        super().__init__(files, Lines(files, encoding, splitter=splitter_for))

    def _checkers(self, huge: bool) -> dict[str, Any]:
        checks = {field.name: checker(field.type, huge=huge) for field in self.schema}
        root, steps = parse_path(self._prompt, self.schema.names)
        if root in checks:
            checks[root] = prompt_checker(self.schema.field(root).type, huge, steps)
        return checks

    def rows_of_file(self) -> Iterator[bytes]:
        """See `LinesReader`."""
        return (line for line in self.lines if line.startswith(b"{") or line.strip(BETWEEN + b"]"))

    def parse(self, raw: bytes) -> dict[str, Any]:
        """See `LinesReader`."""
        values, checks = parse_row(raw, exact=False), self._checks
        for name, value in values.items():  # in most rows all values fit: `all` would take a third longer
            if (check := checks.get(name)) is None or not check(value):
                break
        else:
            return values
        values = parse_row(raw)
        checks = self._exact_checks
        extra = {name: value for name, value in values.items() if name not in checks or not checks[name](value)}
        if not extra:
            return values
        if EXTRA not in checks or values.get(EXTRA) is not None:  # the input may have such a column
            raise ValueError(f"column {next(iter(extra))!r} does not fit the schema that this run has recorded")
        return {**{name: value for name, value in values.items() if name not in extra}, EXTRA: self._extra(extra)}

    def _extra(self, values: dict[str, Any]) -> Any:
        return values if is_json(self.schema.field(EXTRA).type) else json_text(values)


def parse_row(piece: bytes, exact: bool = True) -> dict[str, Any]:
    """The JSON object in a piece of a file; ValueError if it holds anything else. See `parse_json` for `exact`."""
    text = piece if piece.startswith(b"{") and piece.endswith(b"}\n") else piece.strip(BETWEEN)
    if text[:1] == b"[" and not text.endswith(b"]"):  # the beginning of an array
        text = text[1:]
    values = parse_json(text, exact)
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found a {type(values).__name__}")
    return values


# ── Arrays, and objects over several lines ───────────────────────────────────────────────────────────────────────────


def splitter_for(head: bytes) -> Any:
    """The function that splits a file which begins with `head` into the pieces that hold its objects."""
    text = head.lstrip(BETWEEN)
    first, _, rest = text.partition(b"\n")
    if text[:1] == b"[":
        is_row = False if not rest.strip() else is_whole(first) and is_whole(rest.lstrip().partition(b"\n")[0])
        return split_lines if is_row else split_objects
    piece = next(objects_in([text]), b"") if text[:1] == b"{" and not is_whole(first) else b""
    return split_objects if b"\n" in piece.strip() and is_whole(piece) else split_lines


def is_whole(text: bytes) -> bool:
    """True if a text is JSON."""
    try:
        parse_json(text, exact=False)
    except ValueError:
        return False
    return True


def split_objects(stream: Stream) -> Iterator[bytes]:
    """The pieces of a stream, each of which ends with a JSON object or list that is inside of at most an array."""
    return objects_in(iter(functools.partial(stream.read, BLOCK), b""))


def objects_in(blocks: Any) -> Iterator[bytes]:
    """As `split_objects`, for the content's blocks."""
    rest, at, depth, first = b"", 0, 0, True
    for block in blocks:
        rest += block
        begun = 0  # of the next piece
        if first and rest.strip(BETWEEN):
            first, stripped = False, rest.lstrip(BETWEEN)
            at = len(rest) - len(stripped) + stripped.startswith(b"[")
        for token in TOKEN.finditer(rest, at):
            text = token[0]
            if text == b'"':
                at = token.start()
                break
            at = token.end()
            if text in b"{[":
                depth += 1
            elif text in b"}]":
                depth = max(0, depth - 1)
                if not depth and (text == b"}" or rest[begun:at].strip(BETWEEN + b"]")):
                    yield rest[begun:at]
                    begun = at
        else:
            at = len(rest)
        rest, at = rest[begun:], at - begun
    if rest:
        yield rest


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def infer_schema(lines: Lines, prompt: str) -> pa.Schema:
    """The columns of a sample of the input."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    size = 0
    most = len(lines.files.names) if lines.files.local else min(SAMPLE_REMOTE, len(lines.files.names))
    while lines.file < most and size < SAMPLE:
        for piece in lines:
            size += len(piece)
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # a broken line says nothing about the columns; it fails when read
                rows.append(parse_row(piece))
            if size >= SAMPLE:
                break
        else:
            lines.move_to(lines.file + 1, 0, 0)
    complete = lines.file == len(lines.files.names)
    columns = columns_of(rows)
    if not columns:
        raise sdg.InputError(f"--input: {lines.files.names[0]} has no line with a JSON object")
    root, steps = parse_path(prompt, list(columns))
    if len(columns) > MOST_COLUMNS:
        complete = False
        often = sorted(columns, key=lambda name: (name != root, -len(columns[name])))[:MOST_COLUMNS]
        columns = {name: columns[name] for name in columns if name in set(often)}
        sdg.say(f"--input: the objects have more than {MOST_COLUMNS:,} keys: the rarest are kept in {EXTRA}")
    fields = [
        (name, type_of_prompts(found, steps) if name == root else type_of(found)) for name, found in columns.items()
    ]
    return pa.schema(fields if complete or EXTRA in columns else [*fields, (EXTRA, json_type())])
