"""CSV files with a header, plain or compressed: every column is text, for CSV has no types."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Any

import sdg
from sdg_plugins.readers.lines import Lines, LinesReader


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("csv", CsvReader)


class CsvReader(LinesReader):
    """Read CSV files with one header each."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        super().__init__(run, "csv")
        self._header = next(records(Lines(self.files)), [])
        if not self._header:
            raise sdg.InputError(f"--input: {self.files.names[0]} has no header")
        if len(set(self._header)) < len(self._header):
            raise sdg.InputError(f"--input: the header of {self.files.names[0]} has a name twice: rename one")
        self.schema = pa.schema([(name, pa.string()) for name in self._header])

    def rows_of_file(self) -> Iterator[list[str]]:
        at_start = self.lines.offset == 0 and self.lines.file < len(self.files.names)
        rows = records(self.lines)
        if at_start and next(rows, self._header) != self._header:
            raise sdg.InputError(f"{self.lines.name} has other columns than {self.files.names[0]}")
        yield from rows

    def parse(self, piece: list[str]) -> dict[str, Any]:
        if len(piece) != len(self._header):
            raise ValueError(f"{len(piece)} fields instead of {len(self._header)}")
        if any("\udc80" <= char <= "\udcff" for value in piece if not value.isascii() for char in value):
            raise ValueError("not UTF-8")
        return dict(zip(self._header, piece, strict=True))


def records(lines: Lines) -> Iterator[list[str]]:
    """The records of the present file; a quoted field may span lines."""
    texts = (line.decode("utf-8-sig" if lines.offset == len(line) else "utf-8", "surrogateescape") for line in lines)
    rows = csv.reader(texts, strict=True)
    while True:
        try:
            record = next(rows, None)
        except csv.Error as problem:
            raise sdg.InputError(f"{lines.name} line {lines.line}: {problem}; mend the file") from problem
        if record is None:
            return
        if record:
            yield record
