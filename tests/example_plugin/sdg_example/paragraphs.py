"""A reader: each paragraph of a text file is a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

import sdg


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("txt", ParagraphReader)


class ParagraphReader:
    """Read the paragraphs of .txt files."""

    schema = pa.schema([("text", pa.string()), ("words", pa.int64())])

    def __init__(self, run: sdg.Run) -> None:
        self._files = sdg.InputFiles(run.options.input, "txt")
        self.identity = self._files.identity
        self._go(0, 0)

    def seek(self, row: int, bookmark: str | None) -> None:
        if row < self._row:
            self._go(0, 0)
        if bookmark:
            file, start = json.loads(bookmark)  # the file, and the number of its first row
            if file > self._file:
                self._go(file, start)
        while self._row < row and self._paragraph() is not None:
            self._row += 1

    def tell(self) -> str | None:
        return json.dumps([self._file, self._start])

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        found: list[sdg.Block | sdg.BadRow] = []
        while len(found) < rows and (text := self._paragraph()) is not None:
            batch = pa.RecordBatch.from_pylist([{"text": text, "words": len(text.split())}], schema=self.schema)
            found.append(sdg.Block(batch, self._files.names[self._file], self._row - self._start))
            self._row += 1
        return found

    def total(self) -> int | None:
        return self._row if self._file == len(self._files.names) else None

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        return self._files.continues(earlier)

    def _go(self, file: int, start: int) -> None:
        """Go to the beginning of a file; `start` is the number of its first row."""
        self._file, self._row, self._start = file, start, start
        self._paragraphs: list[str] | None = None

    def _paragraph(self) -> str | None:
        """The paragraph at the current row; None after the last one."""
        while self._file < len(self._files.names):
            if self._paragraphs is None:
                with self._files.open(self._file) as file:
                    text = file.read().decode(errors="replace")
                self._paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
            if self._row - self._start < len(self._paragraphs):
                return self._paragraphs[self._row - self._start]
            self._go(self._file + 1, self._row)
        return None
