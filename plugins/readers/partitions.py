"""Hive partitions: folders such as `year=2024` become columns."""

from __future__ import annotations

import functools
import re
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    from sdg_plugins.common.inputs import InputFiles

NULL = "__HIVE_DEFAULT_PARTITION__"


def partitioned(open_reader: Callable[[sdg.Run], Any]) -> Callable[[sdg.Run], Any]:
    """Add the columns of partitions to a reader that has its `files`, if there are any."""

    @functools.wraps(open_reader, updated=())
    def opened(run: sdg.Run) -> Any:
        reader = open_reader(run)
        values = partitions_of(reader.files)
        names = [name for name in dict.fromkeys(n for row in values for n in row) if name not in reader.schema.names]
        return Partitioned(reader, names, dict(zip(reader.files.names, values, strict=True))) if names else reader

    return opened


def partitions_of(files: InputFiles) -> list[dict[str, str | None]]:
    """The partition of each file: names and values of its folders."""
    found = []
    for path in files.inner:
        parts = [part.partition("=") for part in path.split("/")[:-1] if re.fullmatch(r"[^=]+=[^=]*", part)]
        found.append({name: None if value == NULL else urllib.parse.unquote(value) for name, _, value in parts})
    return found


class Partitioned:
    """A reader whose rows have the columns of their file's partition. Values are integers if all of them are."""

    def __init__(self, reader: Any, names: list[str], values: dict[str, dict[str, str | None]]) -> None:
        import pyarrow as pa

        self._reader, self._values = reader, values
        self._fields = []
        for name in names:
            texts = [row.get(name) for row in values.values()]
            numbers = all(text is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", text) for text in texts)
            self._fields.append(pa.field(name, pa.int64() if numbers else pa.string()))
        self.schema = pa.schema([*reader.schema, *self._fields], reader.schema.metadata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        return [part if isinstance(part, sdg.BadRow) else self._extended(part) for part in self._reader.read(rows)]

    def _extended(self, block: sdg.Block) -> sdg.Block:
        import pyarrow as pa

        values = self._values[block.file]
        columns = [
            pa.array([values.get(field.name)]).cast(field.type).take(pa.array([0] * block.batch.num_rows))
            for field in self._fields
        ]
        batch = pa.RecordBatch.from_arrays([*block.batch.columns, *columns], schema=self.schema)
        return sdg.Block(batch, block.file, block.row)
