"""A reader of an Arrow table in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xxhash

import sdg

if TYPE_CHECKING:
    import pyarrow as pa


class TableReader:
    """Reads an Arrow table in memory; its identity is its content."""

    def __init__(self, table: pa.Table) -> None:
        self.schema: pa.Schema = table.schema
        self._table = table
        self.identity = {"rows": table.num_rows, "content": self._digest(table.num_rows)}
        self._row = 0

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        self._row = row

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        start, some = self._row, self._table.slice(self._row, rows)
        self._row += some.num_rows
        blocks: list[sdg.Block | sdg.BadRow] = []
        for batch in some.to_batches():
            blocks.append(sdg.Block(batch, "rows", start))
            start += batch.num_rows
        return blocks

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        return int(self._table.num_rows)

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        rows = earlier.get("rows", 0)
        return rows <= self._table.num_rows and self._digest(rows) == earlier.get("content")

    def _digest(self, rows: int) -> str:
        """A hash of the first rows, independent of how the table is divided."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as stream:
            for start in range(0, rows, 1000):
                positions = pa.array(range(start, min(start + 1000, rows)), pa.int64())
                stream.write_table(self._table.take(positions).combine_chunks())  # a copy, without what lies around it
        return xxhash.xxh3_64_hexdigest(sink.getvalue())


def without_views(table: pa.Table) -> pa.Table:
    """A table whose texts and bytes are not views, as polars has them: Arrow cannot take rows of those."""
    import pyarrow as pa

    return table.cast(pa.schema([field.with_type(_without_views(field.type)) for field in table.schema]))


def _without_views(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa
    import pyarrow.types as t

    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    if t.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    for is_list, make in ((t.is_list, pa.list_), (t.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_without_views(kind.value_type)))
    return views.get(kind, kind)
