"""JSON lines as output, plain or compressed (.gz, .zst)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.files import codec_of
from sdg_plugins.common.kinds import array_of, checker, holds, in_json, json_type, parse_json
from sdg_plugins.common.rows import empty_rows
from sdg_plugins.common.state import recorded_fields
from sdg_plugins.common.unify import is_bytes
from sdg_plugins.common.values import in_base64, json_line, rows_of

if TYPE_CHECKING:
    import pyarrow as pa


STEP_BYTES = 8 << 20  # of rows that are in memory as Python values


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("jsonl", JsonlWriter)


class JsonlWriter:
    """Write each chunk as JSON lines."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        """See `sdg.Writer`."""
        self.write_pieces(chunk, rows.schema, [rows])

    def write_pieces(self, chunk: sdg.Chunk, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """As `write`, for rows that come as tables one after the other."""
        import pyarrow as pa

        path = self._run.path_of(chunk)
        codec = codec_of(path)

        def produce(file: Any) -> None:
            for table in tables:
                step = max(1, min(1000, table.num_rows * STEP_BYTES // max(1, table.nbytes)))
                for batch in table.to_batches(step):
                    file.write(b"".join(json_line(row, in_base64) for row in rows_of(batch)))

        def compress(file: Any) -> None:
            with pa.CompressedOutputStream(file, codec) as compressed:
                produce(compressed)

        self._run.output.write(path, compress if codec else produce)

    def check(self, schema: pa.Schema) -> None:
        """Say what JSON cannot hold."""
        import pyarrow.types as t

        binary = [
            field.name for field in schema if holds(field.type, lambda k: is_bytes(k) or t.is_fixed_size_binary(k))
        ]
        if binary:
            sdg.say(f"JSON has no binary values: those of {', '.join(binary)} are written in base64")

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`. All chunks have the same types; a column whose values do not fit is JSON."""
        import pyarrow as pa

        path = self._run.path_of(chunk)
        codec = codec_of(path)
        try:
            with self._run.output.open(path) as file:
                content = pa.CompressedInputStream(file, codec).read() if codec else file.read()
        except FileNotFoundError:
            return None
        rows = [parse_json(line) for line in content.splitlines()]
        kinds = self._types()
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: column_of([row.get(name) for row in rows], kinds.get(name)) for name in names})

    def _types(self) -> dict[str, pa.DataType]:
        """The type of each column in JSON; none if the run has not settled them yet."""
        run = self._run
        source, fields = run.source_schema or run.schema, recorded_fields(run.state)
        if source is None or fields is None:
            return {}
        return {field.name: in_json(field.type) for field in empty_rows(run.options, source, fields).schema}


def column_of(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """JSON values as a column of a type, or of the type that is inferred; as JSON if they have several types."""
    import pyarrow as pa

    if kind is not None and not all(map(checker(kind), values)):
        return array_of(values, json_type())
    try:
        return pa.array(values) if kind is None else array_of(values, kind)
    except (pa.ArrowException, OverflowError):
        return array_of(values, json_type())
