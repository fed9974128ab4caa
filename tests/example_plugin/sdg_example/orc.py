"""A writer: chunks as ORC files."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.orc

import sdg


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("orc", OrcWriter)


class OrcWriter:
    """Write each chunk as an ORC file."""

    def __init__(self, run: sdg.Run) -> None:
        self._run = run

    def write(self, chunk: sdg.Chunk, rows: pa.Table) -> None:
        self._run.output.write(self._run.path_of(chunk), lambda file: pyarrow.orc.write_table(rows, file))

    def read(self, chunk: sdg.Chunk) -> pa.Table | None:
        try:
            with self._run.output.open(self._run.path_of(chunk)) as file:
                return pyarrow.orc.read_table(file)
        except FileNotFoundError:
            return None
