"""Arrow files as input: IPC files (Feather) and streams, such as the cache of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.unify import conformed, unified
from sdg_plugins.readers.parquet import EAGER, EAGER_REMOTE, FOOTERS, no_fit, no_reader
from sdg_plugins.readers.partitions import partitioned

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"ARROW1"


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("arrow", partitioned(ArrowReader))


class ArrowReader:
    """Reads batch by batch. A bookmark is JSON: index of a file, and its first row in the input."""

    def __init__(self, run: sdg.Run) -> None:
        self.files = InputFiles.of_run(run, "arrow")
        self.identity = self.files.identity
        names = self.files.names[: EAGER if self.files.local else EAGER_REMOTE]
        with ThreadPoolExecutor(FOOTERS) as pool:
            schemas = pool.map(self._schema, range(0 if run.source_schema else len(names)))
            self.schema = run.source_schema or unified(zip(names, schemas, strict=True), run.options.prompt_column)
        self._batch_start = 0  # row of the input that `_batch` begins with
        self._move_to(0, 0)

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        file, start = json.loads(bookmark) if bookmark else (0, 0)
        if row < self._batch_start or file > self._file:
            self._move_to(file, start)
        self._row = row

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return json.dumps([self._file, self._start])

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        import pyarrow as pa

        found: list[sdg.Block | sdg.BadRow] = []
        while rows and (batch := self._load()) is not None:
            part = batch.slice(self._row - self._batch_start, rows)
            name = self.files.names[self._file]
            if new := [column for column in part.schema.names if column not in self.schema.names]:
                raise no_fit(name, ValueError(f"column {new[0]} is not in them"))
            try:
                found.append(sdg.Block(conformed(part, self.schema), name, self._row - self._start))
            except pa.ArrowException as exc:
                raise no_fit(name, exc) from exc
            self._row += part.num_rows
            rows -= part.num_rows
        return found

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        if self._file == len(self.files.names):
            return self._start
        read = sum(self.files.sizes[: self._file])
        return round(self._start * sum(self.files.sizes) / read) if read else None

    def stamp(self, count: int) -> list[Any]:
        """See `InputFiles`."""
        return self.files.stamp(count)

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        return list(self.identity.items())[: len(earlier)] == list(earlier.items())

    def _move_to(self, file: int, start: int) -> None:
        """Continue with a file, whose first row is row `start` of the input."""
        self._file, self._start, self._row = file, start, start
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._batch: pa.RecordBatch | None = None
        self._batch_start = start

    def _load(self) -> pa.RecordBatch | None:
        """The batch with the current row; None after the last row."""
        while self._file < len(self.files.names):
            if self._batches is None:
                self._batches = self._open(self._file)
            while self._batch is None or self._row >= self._batch_start + self._batch.num_rows:
                self._batch_start += self._batch.num_rows if self._batch is not None else 0
                self._batch = next(self._batches, None)
                if self._batch is None:
                    break
            else:
                return self._batch
            row = self._row
            self._move_to(self._file + 1, self._batch_start)
            self._row = row
        return None

    def _source(self, i: int) -> Any:
        """A reader of the IPC file or stream with index `i`. Raises InputError."""
        import pyarrow as pa

        try:
            file = pa.memory_map(self.files.paths[i]) if self.files.local else self.files.open(i)
            is_file = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        except pa.ArrowNotImplementedError as exc:
            raise no_reader(self.files.names[i], exc) from exc
        except (pa.ArrowException, OSError) as exc:
            raise sdg.InputError(f"{self.files.names[i]} is not a complete Arrow file: {sdg.one_line(exc)}") from exc

    def _schema(self, i: int) -> pa.Schema:
        schema: pa.Schema = self._source(i).schema
        return schema

    def _open(self, i: int) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        source = self._source(i)
        try:
            if hasattr(source, "num_record_batches"):
                yield from (source.get_batch(number) for number in range(source.num_record_batches))
            else:
                yield from source
        except (pa.ArrowException, OSError) as exc:
            raise sdg.InputError(f"{self.files.names[i]} is damaged: {sdg.one_line(exc)}") from exc
