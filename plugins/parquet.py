"""Parquet files: read by row group, written with zstd."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import sdg

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER = 1 << 20  # bytes of a column chunk read at a time


@sdg.hookimpl
def register_readers(register: sdg.Register) -> None:
    register("parquet", ParquetReader)


@sdg.hookimpl
def register_writers(register: sdg.Register) -> None:
    register("parquet", ParquetWriter)


class ParquetReader:
    """Read parquet files in the order of their names; all must have one schema."""

    def __init__(self, run: sdg.Run) -> None:
        self._files = sdg.InputFiles(run.options.input, "parquet")
        self.identity = self._files.identity
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, range(len(self._files.names))))
        self.schema = footers[0][0].remove_metadata()
        for name, (schema, _) in zip(self._files.names, footers, strict=True):
            if not schema.equals(self.schema):
                raise sdg.InputError(f"{name} has other columns than {self._files.names[0]}: name those of one kind")
        self._groups = [rows for _, rows in footers]  # rows of each row group of each file
        self._starts = [0]
        for rows in self._groups:
            self._starts.append(self._starts[-1] + sum(rows))
        self._row = 0
        self._batches: Iterator[sdg.Block] = iter(())
        self._rest: sdg.Block | None = None
        self._at = sys.maxsize  # the row that `_batches` and `_rest` go on with: nowhere yet

    def _footer(self, i: int) -> tuple[pa.Schema, list[int]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self._files.open(i)) as file:
                meta = file.metadata
                return file.schema_arrow, [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        except (pa.ArrowException, OSError) as problem:
            raise sdg.InputError(f"{self._files.paths[i]} is no whole parquet file: {problem}") from problem

    def total(self) -> int | None:
        return self._starts[-1]

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        # A parquet file cannot grow: what is known must be there unchanged, new files may follow.
        return list(self.identity.items())[: len(earlier)] == list(earlier.items())

    def seek(self, row: int, bookmark: str | None) -> None:
        self._row = row

    def tell(self) -> str | None:
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        found: list[sdg.Block | sdg.BadRow] = []
        if not self._at <= self._row <= self._at + 100_000:  # near rows ahead are skipped faster than sought
            self._batches, self._rest = self._from(self._row), None
            self._at = self._row
        while rows and (block := self._rest or next(self._batches, None)):
            skip = min(self._row - self._at, block.batch.num_rows)
            part = block.batch.slice(skip, rows)
            rest = block.batch.slice(skip + part.num_rows)
            self._rest = block._replace(batch=rest, row=block.row + skip + part.num_rows) if rest.num_rows else None
            if part.num_rows:
                found.append(block._replace(batch=part, row=block.row + skip))
            self._at += skip + part.num_rows
            self._row += part.num_rows
            rows -= part.num_rows
        return found

    def _from(self, row: int) -> Iterator[sdg.Block]:
        """All batches from the one with this row of the input on, cut so that the first starts with it."""
        import pyarrow.parquet as pq

        for i, groups in enumerate(self._groups):
            if self._starts[i + 1] <= row:
                continue
            at, first, wanted = 0, 0, max(0, row - self._starts[i])
            while first < len(groups) and at + groups[first] <= wanted:
                at, first = at + groups[first], first + 1
            # Pre-buffering would keep what was read until the file is closed, and no buffer a whole row group.
            with pq.ParquetFile(self._files.open(i), pre_buffer=False, buffer_size=BUFFER) as file:
                for batch in file.iter_batches(1024, row_groups=list(range(first, len(groups)))):
                    skip = min(max(0, wanted - at), batch.num_rows)
                    if skip < batch.num_rows:
                        yield sdg.Block(batch.slice(skip).cast(self.schema), self._files.names[i], at + skip)
                    at += batch.num_rows


class ParquetWriter:
    """Write each chunk as a parquet file."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        import pyarrow.parquet as pq

        self._run.output.write(self._run.path_of(chunk), lambda file: pq.write_table(rows, file, compression="zstd"))

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        import pyarrow.parquet as pq

        try:
            with self._run.output.open(self._run.path_of(chunk)) as file:
                return pq.read_table(file)
        except FileNotFoundError:
            return None
