"""Parquet files as output, compressed with zstd."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES = 128 << 20  # of a row group in memory: the Hub's viewer refuses row groups above 300 MB


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("parquet", ParquetWriter)


def grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables put together to row groups."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(each.nbytes for each in waiting) >= GROUP_BYTES // 2:
            yield pa.concat_tables(waiting)
            waiting.clear()
    if any(each.num_rows for each in waiting):
        yield pa.concat_tables(waiting)


class ParquetWriter:
    """Write each chunk as a parquet file."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        """See `sdg.Writer`."""
        import pyarrow.parquet as pq

        group = max(1, rows.num_rows * GROUP_BYTES // max(rows.nbytes, 1))

        def produce(file: Any) -> None:
            with pq.ParquetWriter(file, rows.schema, compression="zstd", write_page_index=True) as writer:
                if rows.num_rows:  # `datasets` cannot read row groups without rows
                    writer.write_table(rows, row_group_size=group)

        self._run.output.write(self._run.path_of(chunk), produce)

    def write_pieces(self, chunk: sdg.Chunk, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """As `write`, for rows that come as tables one after the other."""
        import pyarrow.parquet as pq

        def produce(file: Any) -> None:
            with pq.ParquetWriter(file, schema, compression="zstd", write_page_index=True) as writer:
                for group in grouped(tables):
                    writer.write_table(group, row_group_size=group.num_rows)

        self._run.output.write(self._run.path_of(chunk), produce)

    def check(self, schema: pa.Schema) -> None:
        """Write an empty file of a schema to memory. Raises InputError, naming the column that cannot be written."""
        import io

        import pyarrow as pa
        import pyarrow.parquet as pq

        def works(fields: list[pa.Field]) -> bool:
            try:
                with pq.ParquetWriter(io.BytesIO(), pa.schema(fields)):
                    return True
            except (pa.ArrowException, NotImplementedError):
                return False

        if works(list(schema)):
            return
        for field in schema:
            if not works([field]):
                raise sdg.InputError(
                    f"column {field.name} has type {field.type}, which parquet cannot hold: write JSON lines with "
                    f"--output-filename '${{rank}}_${{chunk_index}}.jsonl', or convert the column"
                )

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`."""
        return self.read_columns(chunk, None)

    def read_columns(self, chunk: sdg.Chunk, names: Container[str] | None) -> pa.Table | None:
        """As `read`, without columns that are not asked for; None asks for all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._run.output.open(self._run.path_of(chunk)) as file:
                whole = pq.ParquetFile(file)  # `read_table` imports pandas
                columns = None if names is None else [name for name in whole.schema_arrow.names if name in names]
                groups = [whole.read_row_group(i, columns) for i in range(whole.num_row_groups)]  # not above 2 GiB each
                return pa.concat_tables(groups) if groups else whole.read(columns)
        except FileNotFoundError:
            return None
