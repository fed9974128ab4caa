"""JSON lines, plain or compressed (.gz, .zst): each line that is not blank is one document.

The columns and their types are learnt from a sample at the start of the input. A column whose values there are of
several types, or all null, is text: strings as they are, anything else as JSON. What the sample did not announce (a new
column, a value of another type) is kept as JSON in the column `source_extra`.
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
        self.schema = run.source_schema or learn_schema(Lines(self.files), self.parse_line, self._prompt)
        self._checks = {field.name: checker(field.type) for field in self.schema}
        self._texts = {field.name for field in self.schema if pyarrow.types.is_string(field.type)}

    def rows_of_file(self) -> Iterator[bytes]:
        return (line for line in self.lines if not line.isspace())

    @staticmethod
    def parse_line(line: bytes) -> dict[str, Any]:
        """A line's object; ValueError if it is none."""
        import orjson

        values = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object is wanted, this is a {type(values).__name__}")
        return values

    def parse(self, piece: bytes) -> dict[str, Any]:
        import orjson

        values = self.parse_line(piece)
        surprises = {}
        for name, value in list(values.items()):
            check = self._checks.get(name)
            if check and check(value):
                continue
            if name == self._prompt and check:
                wanted = "text" if name in self._texts else "as it is in most rows"
                raise ValueError(f"column {name!r} is not {wanted}: {str(value)[:80]}")
            if name not in self._texts:
                surprises[name] = values.pop(name)
            else:
                values[name] = orjson.dumps(value).decode()
        if surprises:
            if EXTRA not in self._checks or values.get(EXTRA) is not None:  # the input may have such a column
                raise ValueError(f"column {next(iter(surprises))!r} does not fit what this run recorded of its input")
            values[EXTRA] = orjson.dumps(surprises).decode()
        return values


def learn_schema(lines: Lines, parse: Any, prompt: str) -> pa.Schema:
    """The columns of a sample of the input. That of the prompts has the type of most, so that others fail alone."""
    import pyarrow as pa

    known: dict[str, pa.DataType | None] = {}  # None: of several types
    rows: list[dict[str, Any]] = []
    prompts: list[Any] = []
    size = 0
    while lines.file < len(lines.files.names) and size < SAMPLE:
        for line in lines:
            size += len(line)
            try:
                rows.append(parse(line))
            except ValueError:
                continue  # a broken line says nothing about the columns; it fails when it is read
            prompts.append(rows[-1].get(prompt))
            if len(rows) == 1000 or size >= SAMPLE:
                learn(known, rows)
                rows = []
            if size >= SAMPLE:
                break
        else:
            lines.go(lines.file + 1, 0, 0)
    learn(known, rows)
    if prompt in known and known[prompt] is None:
        known[prompt] = usual_type(prompts)
    if not known:
        raise sdg.InputError(f"--input: {lines.files.names[0]} has no line with a JSON object")
    fields = [(name, pa.string() if kind is None or has_null(kind) else kind) for name, kind in known.items()]
    complete = lines.file == len(lines.files.names) or EXTRA in known
    return pa.schema(fields if complete else [*fields, (EXTRA, pa.string())])


def learn(known: dict[str, pa.DataType | None], rows: list[dict[str, Any]]) -> None:
    """Merge the types of some rows into those that are known."""
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


def usual_type(values: list[Any]) -> pa.DataType | None:
    """The type of most values, where they are of several; None if they are all null."""
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
