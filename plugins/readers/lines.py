"""Shared by readers of formats with one row per line or a few lines: a cursor, bookmarks, an estimate of the total."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.kinds import encoder, storage
from sdg_plugins.common.streams import BLOCK, BROKEN, Stream

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 2000  # bytes or characters of a broken row that are kept in `failed/`
BLOCK_ROWS_BYTES = 256 << 20  # bytes of rows in a block: an Arrow array of text holds 2 GiB

Split = Callable[[Stream], Iterator[bytes]]  # the pieces of a stream; together they are its content


class Lines:
    """A cursor over the lines of many files, or over other pieces that rows are made of.

    Args:
        files: to read.
        encoding: of all files; None to find out that of each.
        legacy: take files that are not Unicode for Windows-1252.
        splitter: `splitter(head)` returns the function that splits a file which begins with these bytes.

    Attributes:
        file: index of the current file; the number of files after the last one.
        line: pieces of the current file that were read.
        offset: bytes of the current file's content that were read: decompressed, and in UTF-8.
    """

    def __init__(
        self,
        files: InputFiles,
        encoding: str | None = None,
        legacy: bool = False,
        splitter: Callable[[bytes], Split] | None = None,
    ) -> None:
        self.files = files
        self._encoding, self._legacy = encoding, legacy
        self._splitter = splitter or (lambda head: split_lines)
        self._said = False
        self._stream: Stream | None = None
        self._raw: Any = None
        self.move_to(0, 0, 0)

    def move_to(self, file: int, line: int, offset: int) -> None:
        """Continue in a file after its first `line` pieces, which are `offset` bytes.

        A compressed file is decompressed up to there, because it cannot be entered in the middle.
        """
        if self._raw is not None:
            self._raw.close()
        self.file, self.line, self.offset = file, line, offset
        self._pieces: Iterator[bytes] | None = None
        self._raw = None

    @property
    def name(self) -> str:
        """Name of the current file."""
        return self.files.names[self.file]

    @property
    def stream(self) -> Stream:
        """The current file's content."""
        if self._pieces is None:
            self._pieces = self._open()
        assert self._stream
        return self._stream

    def __iter__(self) -> Iterator[bytes]:
        """The remaining pieces of the current file."""
        with self._naming_damage():
            if self._pieces is None:
                self._pieces = self._open()
            while (piece := next(self._pieces, None)) is not None:
                self.line += 1
                self.offset += len(piece)
                yield piece

    def take_back(self, pieces: list[bytes]) -> None:
        """Return the last pieces that were read: they come next."""
        assert self._pieces is not None
        self._pieces = itertools.chain(pieces, self._pieces)
        self.line -= len(pieces)
        self.offset -= sum(map(len, pieces))

    def fraction(self) -> float:
        """The fraction of all bytes that has been read."""
        before = sum(self.files.sizes[: self.file])
        inside = float(self.offset)
        if self._raw and self._stream and not self._stream.plain:  # more was taken from the file than was read
            inside = self._raw.tell() * min(1.0, self.offset / max(1, self._stream.produced))
        return float(before + inside) / max(1, sum(self.files.sizes))

    def _open(self) -> Iterator[bytes]:
        self._raw = self.files.open_in_order(self.file)
        self._stream = stream = Stream(self._raw, self._encoding, self._legacy)
        if stream.encoding == "cp1252" and not self._encoding and not self._said:
            self._said = True
            sdg.say(f"{self.name} is not UTF-8: read as Windows-1252, unless --input-encoding names another one")
        split = self._splitter(stream.head)
        if self.offset:
            stream.skip(self.offset)
        return split(stream)

    @contextlib.contextmanager
    def _naming_damage(self) -> Iterator[None]:
        """Name the file and the place in errors of reading it."""
        try:
            yield
        except BROKEN as exc:
            where = f"{self.name} cannot be read after line {self.line:,}: {sdg.one_line(exc)}"
            raise sdg.InputError(
                f"{where}. What was made of the lines before stays: replace the file, and run the same command again"
            ) from exc


def split_lines(stream: Stream, end: bytes = b"\n") -> Iterator[bytes]:
    """The lines of a stream, line ends included."""
    begun: list[bytes] = []  # parts of a line that is longer than a block
    while block := stream.read(BLOCK):
        if end == b"\n":
            lines = io.BytesIO(block).readlines()
        else:
            lines = [line + end for line in block.split(end)]
            lines[-1] = lines[-1].removesuffix(end)
        for line in lines:
            if not line.endswith(end):
                begun.append(line)
            elif begun:
                yield b"".join([*begun, line])
                begun = []
            else:
                yield line
    if any(begun):
        yield b"".join(begun)


class LinesReader:
    """Base of the readers: subclasses set `schema`, find the rows of a file, and parse them.

    A bookmark is JSON: row of the input, row of the file, then the arguments of `Lines.move_to`.
    """

    schema: pa.Schema

    def __init__(self, files: InputFiles, lines: Lines) -> None:
        self.files, self.lines = files, lines
        self.identity = files.identity
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

    def shown(self, raw: Any) -> str:
        """The beginning of a broken row's text, for `failed/`."""
        return str(raw[:SHOWN].decode(errors="replace"))

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
        size = 0  # of the rows in `good`

        def end_block() -> None:
            nonlocal size
            size = 0
            if good:
                found.append(self._block(good, *start))
                good.clear()

        end, last = self._row + rows, self.lines.offset
        while self._row < end and (raw := self._next()) is not None:
            name, row = self.lines.name, self._row_in_file - 1
            size, last = size + max(0, self.lines.offset - last), self.lines.offset
            if row == 0 or size > BLOCK_ROWS_BYTES:
                end_block()
            try:
                values = self.parse(raw)
            except (ValueError, RecursionError) as exc:
                end_block()
                reason = "is nested too deeply" if isinstance(exc, RecursionError) else exc
                found.append(sdg.BadRow(name, row, f"{name} line {self.lines.line}: {reason}", self.shown(raw)))
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

    def stamp(self, count: int) -> list[Any]:
        """See `InputFiles`."""
        return self.files.stamp(count)

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

        if not hasattr(self, "_encoders"):
            self._encoders = {field.name: encode for field in self.schema if (encode := encoder(field.type))}
            self._storage = pa.schema([field.with_type(storage(field.type)) for field in self.schema])
        for column, encode in self._encoders.items():
            for values in rows:
                if (value := values.get(column)) is not None:
                    values[column] = encode(value)
        batch = pa.RecordBatch.from_pylist(rows, schema=self._storage)
        if self._encoders:
            columns = [column.cast(field.type) for column, field in zip(batch.columns, self.schema, strict=True)]
            batch = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        return sdg.Block(batch, name, row)
