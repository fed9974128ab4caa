"""Parquet files as output, compressed with zstd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_BYTES = 128 << 20  # of a row group in memory: the Hub's viewer refuses row groups above 300 MB


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("parquet", ParquetWriter)


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

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        """See `sdg.Writer`."""
        import pyarrow.parquet as pq

        try:
            with self._run.output.open(self._run.path_of(chunk)) as file:
                return pq.read_table(file)
        except FileNotFoundError:
            return None
