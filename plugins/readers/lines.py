"""Shared by readers of formats with one row per line or a few lines: a cursor, bookmarks, an estimate of the total."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.files import InputFiles, codec_of

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 1 << 20  # bytes read at a time
SHOWN = 2000  # bytes or characters of a broken row that are kept in `failed/`


class Lines:
    """A cursor over the lines of many files.

    Attributes:
        file: index of the current file; the number of files after the last one.
        line: lines of the current file that were read.
        offset: bytes of the current file that were read, after decompression.
    """

    def __init__(self, files: InputFiles) -> None:
        self.files = files
        self.move_to(0, 0, 0)

    def move_to(self, file: int, line: int, offset: int) -> None:
        """Continue in a file after its first `line` lines, which are `offset` bytes.

        A compressed file is decompressed up to there, because it cannot be entered in the middle.
        """
        self.file, self.line, self.offset = file, line, offset
        self._lines: Iterator[bytes] | None = None
        self._raw: Any = None

    @property
    def name(self) -> str:
        """Name of the current file."""
        return self.files.names[self.file]

    def __iter__(self) -> Iterator[bytes]:
        """The remaining lines of the current file."""
        if self._lines is None:
            self._lines = self._open()
        for line in self._lines:
            self.line += 1
            self.offset += len(line)
            yield line

    def fraction(self) -> float:
        """The fraction of all bytes that has been read."""
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
    """The lines of a binary stream, line ends included."""
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
    """Base of the readers: subclasses set `schema`, find the rows of a file, and parse them.

    A bookmark is JSON: row of the input, row of the file, then the arguments of `Lines.move_to`.
    """

    schema: pa.Schema

    def __init__(self, run: sdg.Run, suffix: str) -> None:
        self.files = InputFiles(run.options.input, suffix)
        self.identity = self.files.identity
        self.lines = Lines(self.files)
        self._row = self._row_in_file = 0
        self._rows: Iterator[Any] = self.rows_of_file()

    def rows_of_file(self) -> Iterator[Any]:
        """The remaining rows of the current file of `self.lines`, not parsed: this is also how rows are skipped."""
        raise NotImplementedError

    def parse(self, raw: Any) -> dict[str, Any]:
        """A row's values by column.

        Args:
            raw: a row from `rows_of_file`.

        Raises:
            ValueError: the row is broken; its text is the reason.
        """
        raise NotImplementedError

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        known = json.loads(bookmark) if bookmark else [0, 0, 0, 0, 0]
        if not known[0] <= self._row <= row:  # otherwise the current row is at least as near
            self._row, self._row_in_file, *position = known
            self.lines.move_to(*position)
            self._rows = self.rows_of_file()
        while self._row < row and self._next() is not None:
            pass

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return json.dumps([self._row, self._row_in_file, self.lines.file, self.lines.line, self.lines.offset])

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        found: list[sdg.Block | sdg.BadRow] = []
        good: list[dict[str, Any]] = []  # rows of the next block
        start = ("", 0)  # file of `good`, and its first row there

        def end_block() -> None:
            if good:
                found.append(self._block(good, *start))
                good.clear()

        end = self._row + rows
        while self._row < end and (raw := self._next()) is not None:
            name, row = self.lines.name, self._row_in_file - 1
            if row == 0:
                end_block()
            try:
                values = self.parse(raw)
            except ValueError as exc:
                end_block()
                shown = raw[:SHOWN].decode(errors="replace") if isinstance(raw, bytes) else str(raw)[:SHOWN]
                found.append(sdg.BadRow(name, row, f"{name} line {self.lines.line}: {exc}", shown))
                continue
            if not good:
                start = (name, row)
            good.append(values)
        end_block()
        return found

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        fraction = self.lines.fraction() if self.lines.file < len(self.files.names) else 1.0
        return round(self._row / fraction) if fraction and self._row else None

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        return self.files.continues(earlier)

    def _next(self) -> Any:
        """The next row, not parsed; None after the last one."""
        while self.lines.file < len(self.files.names):
            raw = next(self._rows, None)
            if raw is not None:
                self._row += 1
                self._row_in_file += 1
                return raw
            self.lines.move_to(self.lines.file + 1, 0, 0)
            self._row_in_file = 0
            self._rows = self.rows_of_file()
        return None

    def _block(self, rows: list[dict[str, Any]], name: str, row: int) -> sdg.Block:
        import pyarrow as pa

        return sdg.Block(pa.RecordBatch.from_pylist(rows, schema=self.schema), name, row)
