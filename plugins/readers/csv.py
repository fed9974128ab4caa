"""CSV files with a header, plain or compressed. Every column is text, because CSV has no types."""

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
    """Read CSV files, each with a header."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        super().__init__(run, "csv")
        self._header = next(records(Lines(self.files)), [])
        if not self._header:
            raise sdg.InputError(f"--input: {self.files.names[0]} has no header")
        if len(set(self._header)) < len(self._header):
            raise sdg.InputError(
                f"--input: the header of {self.files.names[0]} has a duplicate name: rename one column"
            )
        self.schema = pa.schema([(name, pa.string()) for name in self._header])

    def rows_of_file(self) -> Iterator[list[str]]:
        """See `LinesReader`."""
        at_start = self.lines.offset == 0 and self.lines.file < len(self.files.names)
        rows = records(self.lines)
        if at_start and next(rows, self._header) != self._header:
            raise sdg.InputError(f"{self.lines.name} has different columns than {self.files.names[0]}")
        yield from rows

    def parse(self, raw: list[str]) -> dict[str, Any]:
        """See `LinesReader`."""
        if len(raw) != len(self._header):
            raise ValueError(f"{len(raw)} fields, expected {len(self._header)}")
        if any("\udc80" <= char <= "\udcff" for value in raw if not value.isascii() for char in value):
            raise ValueError("not UTF-8")
        return dict(zip(self._header, raw, strict=True))


def records(lines: Lines) -> Iterator[list[str]]:
    """The remaining records of the current file; a quoted field may span lines."""
    texts = (line.decode("utf-8-sig" if lines.offset == len(line) else "utf-8", "surrogateescape") for line in lines)
    rows = csv.reader(texts, strict=True)
    while True:
        try:
            record = next(rows, None)
        except csv.Error as exc:
            raise sdg.InputError(f"{lines.name} line {lines.line}: {exc}; fix the file") from exc
        if record is None:
            return
        if record:
            yield record
