"""What readers of line-wise formats share: a cursor over the lines of many files, bookmarks, the total."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.files import InputFiles, codec_of

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 20  # bytes read at a time


class Lines:
    """The lines of some files, one after the other, from any place on."""

    def __init__(self, files: InputFiles) -> None:
        self.files = files
        self.go(0, 0, 0)

    def go(self, file: int, line: int, offset: int) -> None:
        """Continue in this file, after `line` lines and `offset` bytes of it.

        Compressed files are unpacked up to there: they cannot be entered in the middle.
        """
        self.file, self.line, self.offset = file, line, offset
        self._lines: Iterator[bytes] | None = None
        self._raw: Any = None

    @property
    def name(self) -> str:
        """The present file."""
        return self.files.names[self.file]

    def __iter__(self) -> Iterator[bytes]:
        """The lines that are left of the present file."""
        if self._lines is None:
            self._lines = self._open()
        for line in self._lines:
            self.line += 1
            self.offset += len(line)
            yield line

    def fraction(self) -> float:
        """How much of all files has been read."""
        before = sum(self.files.sizes[: self.file])
        inside = self._raw.tell() if self._raw and codec_of(self.name) else self.offset
        return float(before + inside) / max(1, sum(self.files.sizes))

    def _open(self) -> Iterator[bytes]:
        import pyarrow as pa

        self._raw = stream = self.files.open(self.file)
        codec = codec_of(self.name)
        if codec:
            stream = pa.CompressedInputStream(self._raw, codec)
            left = self.offset
            while left and (block := stream.read(min(left, BLOCK))):
                left -= len(block)
        elif self.offset:
            stream.seek(self.offset)
        return split_lines(stream)


def split_lines(stream: Any) -> Iterator[bytes]:
    """The lines of a binary stream, with their ends."""
    begun: list[bytes] = []
    while block := stream.read(BLOCK):
        *whole, last = block.split(b"\n")
        for line in whole:
            begun.append(line + b"\n")
            yield b"".join(begun)
            begun = []
        begun.append(last)
    if any(begun):
        yield b"".join(begun)


class LinesReader:
    """A reader of rows that stand in lines. Subclasses say what the rows of a file are, and the schema."""

    schema: pa.Schema

    def __init__(self, run: sdg.Run, suffix: str) -> None:
        self.run = run
        self.files = InputFiles(run.options.input, suffix)
        self.identity = self.files.identity
        self.lines = Lines(self.files)
        self._row = self._row_in_file = 0
        self._rows: Iterator[Any] = self.rows_of_file()

    def rows_of_file(self) -> Iterator[Any]:
        """What `self.lines` has left of its present file, in pieces that are a row each, cheaply split."""
        raise NotImplementedError

    def parse(self, piece: Any) -> dict[str, Any]:
        """A row's values by column. Raises ValueError, with the reason, if it is broken."""
        raise NotImplementedError

    def seek(self, row: int, bookmark: str | None) -> None:
        known = json.loads(bookmark) if bookmark else [0, 0, 0, 0, 0]
        if not known[0] <= self._row <= row:  # the place where we are is not nearer
            self._row, self._row_in_file, *place = known
            self.lines.go(*place)
            self._rows = self.rows_of_file()
        while self._row < row and self._next() is not None:
            pass

    def tell(self) -> str | None:
        return json.dumps([self._row, self._row_in_file, self.lines.file, self.lines.line, self.lines.offset])

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        found: list[sdg.Block | sdg.BadRow] = []
        good: list[dict[str, Any]] = []
        start = ("", 0)
        end = self._row + rows
        while self._row < end and (piece := self._next()) is not None:
            name, row = self.lines.name, self._row_in_file - 1
            if good and row == 0:
                found.append(self._block(good, *start))
                good = []
            try:
                values = self.parse(piece)
            except ValueError as problem:
                if good:
                    found.append(self._block(good, *start))
                    good = []
                shown = piece[:2000].decode(errors="replace") if isinstance(piece, bytes) else str(piece)[:2000]
                found.append(sdg.BadRow(name, row, f"{name} line {self.lines.line}: {problem}", shown))
                continue
            if not good:
                start = (name, row)
            good.append(values)
        return [*found, self._block(good, *start)] if good else found

    def total(self) -> int | None:
        fraction = self.lines.fraction() if self.lines.file < len(self.files.names) else 1.0
        return round(self._row / fraction) if fraction and self._row else None

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        return self.files.continues(earlier)

    def _next(self) -> Any:
        """The next row's piece; None after the last one."""
        while self.lines.file < len(self.files.names):
            piece = next(self._rows, None)
            if piece is not None:
                self._row += 1
                self._row_in_file += 1
                return piece
            self.lines.go(self.lines.file + 1, 0, 0)
            self._row_in_file = 0
            self._rows = self.rows_of_file()
        return None

    def _block(self, rows: list[dict[str, Any]], name: str, row: int) -> sdg.Block:
        import pyarrow as pa

        return sdg.Block(pa.RecordBatch.from_pylist(rows, schema=self.schema), name, row)
