"""Hive partitions: folders such as `year=2024` become columns."""

from __future__ import annotations

import copy
import functools
import json
import re
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    import pyarrow as pa

    from sdg_plugins.common.inputs import InputFiles

NULL = "__HIVE_DEFAULT_PARTITION__"
KEY = b"sdg.partitions"  # in the metadata of a recorded schema: names of the columns that the files do not have


def partitioned(open_reader: Callable[[sdg.Run], Any]) -> Callable[[sdg.Run], Any]:
    """Add the columns of partitions to a reader that has its `files`, if there are any.

    The reader itself never sees them in the schema that an earlier process has recorded: it would read them as null.
    """

    @functools.wraps(open_reader, updated=())
    def opened(run: sdg.Run) -> Any:
        known = run.source_schema
        recorded = json.loads((known.metadata or {}).get(KEY, b"[]")) if known is not None else []
        reader = open_reader(_without(run, recorded))
        values = partitions_of(reader.files)
        names = list(dict.fromkeys(name for row in values for name in row))
        if known is not None and names and not recorded:  # by an earlier version, or the files have these columns
            own = open_reader(_without(run, known.names)).schema.names
            if recorded := [name for name in known.names if name in names and name not in own]:
                reader = open_reader(_without(run, recorded))
        if known is None:
            fields = [(name, _type_of(values, name)) for name in names if name not in reader.schema.names]
        else:
            fields = [(name, known.field(name).type) for name in recorded]
            if new := [name for name in names if name not in known.names]:
                sdg.say(f"--input: this run began without the partitions {', '.join(new)}=…: they are left out")
        return Partitioned(reader, fields, values) if fields else reader

    return opened


def _without(run: sdg.Run, names: list[str]) -> sdg.Run:
    """A run whose recorded schema lacks some columns; it has none if these are all."""
    import pyarrow as pa

    known = run.source_schema
    if not names or known is None:
        return run
    run = copy.copy(run)
    kept = [field for field in known if field.name not in names]
    run.source_schema = pa.schema(kept, known.metadata) if kept else None
    return run


def _type_of(values: list[dict[str, str | None]], name: str) -> pa.DataType:
    """The type of a partition's values: integers if all of them are."""
    import pyarrow as pa

    texts = [row.get(name) for row in values]
    numbers = all(text is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", text) for text in texts)
    return pa.int64() if numbers else pa.string()


def partitions_of(files: InputFiles) -> list[dict[str, str | None]]:
    """The partition of each file: names and values of its folders."""
    found = []
    for path in files.inner:
        parts = [part.partition("=") for part in path.split("/")[:-1] if re.fullmatch(r"[^=]+=[^=]*", part)]
        found.append({name: None if value == NULL else urllib.parse.unquote(value) for name, _, value in parts})
    return found


class Partitioned:
    """A reader whose rows have the columns of their file's partition.

    Args:
        reader: of the files.
        fields: name and type of each column to add.
        values: the partition of each file.
    """

    def __init__(self, reader: Any, fields: list[tuple[str, pa.DataType]], values: list[dict[str, str | None]]) -> None:
        import pyarrow as pa

        self._reader, self._fields = reader, fields
        self._values = dict(zip(reader.files.names, values, strict=True))
        for name, kind in fields:
            if kind == pa.int64() and _type_of(values, name) != kind:
                raise sdg.InputError(
                    f"--input: the folders {name}=… had numbers as this run began, and now there are others: "
                    "choose another --output, or start over with --fresh"
                )
        metadata = {**(reader.schema.metadata or {}), KEY: json.dumps([name for name, _ in fields])}
        self.schema = pa.schema([*reader.schema, *(pa.field(*field) for field in fields)], metadata)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        return [part if isinstance(part, sdg.BadRow) else self._extended(part) for part in self._reader.read(rows)]

    def _extended(self, block: sdg.Block) -> sdg.Block:
        import pyarrow as pa

        values = self._values[block.file]
        columns = [
            pa.array([values.get(name)], pa.string()).cast(kind).take(pa.array([0] * block.batch.num_rows))
            for name, kind in self._fields
        ]
        batch = pa.RecordBatch.from_arrays([*block.batch.columns, *columns], schema=self.schema)
        return sdg.Block(batch, block.file, block.row)
