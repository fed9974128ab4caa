"""JSON lines, plain or compressed (.gz, .zst): each line that is not blank is one document.

The columns and their types are inferred from a sample at the start of the input. A column whose values in the sample
have several types, or are all null, is text: strings stay as they are, other values become JSON. Later values that do
not fit (a new column, a value of another type) are kept as JSON in the column `source_extra`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.results import checker, has_null
from sdg_plugins.readers.lines import Lines, LinesReader

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = 8 << 20  # bytes
EXTRA = "source_extra"


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("jsonl", JsonlReader)


class JsonlReader(LinesReader):
    """Read JSON lines, plain or compressed."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow.types

        super().__init__(run, "jsonl")
        self._prompt = run.options.prompt_column
        self.schema = run.source_schema or infer_schema(Lines(self.files), self._prompt)
        self._checks = {field.name: checker(field.type) for field in self.schema}
        self._texts = {field.name for field in self.schema if pyarrow.types.is_string(field.type)}

    def rows_of_file(self) -> Iterator[bytes]:
        """See `LinesReader`."""
        return (line for line in self.lines if not line.isspace())

    def parse(self, raw: bytes) -> dict[str, Any]:
        """See `LinesReader`."""
        import orjson

        values = parse_line(raw)
        extra = {}
        for name, value in list(values.items()):
            fits = self._checks.get(name)
            if fits and fits(value):
                continue
            if name == self._prompt and fits:
                expected = "is not text" if name in self._texts else "does not have the type of most rows"
                raise ValueError(f"column {name!r} {expected}: {str(value)[:80]}")
            if name not in self._texts:
                extra[name] = values.pop(name)
            else:
                values[name] = orjson.dumps(value).decode()
        if extra:
            if EXTRA not in self._checks or values.get(EXTRA) is not None:  # the input may have such a column
                raise ValueError(f"column {next(iter(extra))!r} does not fit the schema that this run has recorded")
            values[EXTRA] = orjson.dumps(extra).decode()
        return values


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; ValueError if the line holds anything else."""
    import orjson

    values = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found a {type(values).__name__}")
    return values


def infer_schema(lines: Lines, prompt: str) -> pa.Schema:
    """The columns of a sample of the input.

    The prompt column has the type of most of its values, so that only the documents with other values fail.
    """
    import pyarrow as pa

    known: dict[str, pa.DataType | None] = {}  # None: several types
    rows: list[dict[str, Any]] = []
    prompts: list[Any] = []
    size = 0
    while lines.file < len(lines.files.names) and size < SAMPLE:
        for line in lines:
            size += len(line)
            try:
                rows.append(parse_line(line))
            except ValueError:
                continue  # a broken line says nothing about the columns; it fails when it is read
            prompts.append(rows[-1].get(prompt))
            if len(rows) == 1000 or size >= SAMPLE:
                merge_types(known, rows)
                rows = []
            if size >= SAMPLE:
                break
        else:
            lines.move_to(lines.file + 1, 0, 0)
    merge_types(known, rows)
    if prompt in known and known[prompt] is None:
        known[prompt] = most_common_type(prompts)
    if not known:
        raise sdg.InputError(f"--input: {lines.files.names[0]} has no line with a JSON object")
    fields = [(name, pa.string() if kind is None or has_null(kind) else kind) for name, kind in known.items()]
    complete = lines.file == len(lines.files.names) or EXTRA in known
    return pa.schema(fields if complete else [*fields, (EXTRA, pa.string())])


def merge_types(known: dict[str, pa.DataType | None], rows: list[dict[str, Any]]) -> None:
    """Merge the types of more rows into the known types of columns."""
    import pyarrow as pa

    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            kind = pa.infer_type(values)
            if name in known:
                both = [pa.schema([(name, known[name])]), pa.schema([(name, kind)])] if known[name] is not None else []
                kind = pa.unify_schemas(both, promote_options="permissive").field(name).type if both else None
        except (pa.ArrowException, OverflowError):
            kind = None
        if kind is not None and not has_null(kind):
            known[name] = kind if all(map(checker(kind), values)) else None
        else:
            known[name] = kind


def most_common_type(values: list[Any]) -> pa.DataType | None:
    """The type of most of these values; None if they are all null."""
    import pyarrow as pa

    found: list[tuple[pa.Schema, int]] = []  # a type, as that of a column, and how many values have it
    for value in values:
        try:
            kind = pa.schema([("", pa.infer_type([value]))])
        except (pa.ArrowException, OverflowError):
            continue
        for i, (known, count) in enumerate(found):
            with contextlib.suppress(pa.ArrowException):
                found[i] = pa.unify_schemas([known, kind], promote_options="permissive"), count + 1
                break
        else:
            found.append((kind, 1))
    return max(found, key=lambda item: item[1])[0].field(0).type if found else None
