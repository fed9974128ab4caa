"""Text files: each file is one document, with its path as `name`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sdg
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.streams import BLOCK, Stream
from sdg_plugins.readers.lines import Lines, LinesReader
from sdg_plugins.readers.partitions import partitioned


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("text", partitioned(TextReader))


class TextReader(LinesReader):
    """Read whole text files."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        self.schema = pa.schema([("name", pa.string()), ("text", pa.string())])
        files = InputFiles.of_run(run, "text")
        encoding = getattr(run.options, "input_encoding", None)
        super().__init__(files, Lines(files, encoding, legacy=True, splitter=lambda head: whole))

    def rows_of_file(self) -> Iterator[bytes]:
        """See `LinesReader`."""
        return iter(() if self.lines.line else self.lines)  # an empty file is a row, too: its offset says nothing

    def parse(self, raw: bytes) -> dict[str, Any]:
        """See `LinesReader`."""
        return {"name": self.lines.name, "text": raw.decode("utf-8-sig")}


def whole(stream: Stream) -> Iterator[bytes]:
    """The whole content of a stream as one piece."""
    yield b"".join(iter(lambda: stream.read(BLOCK), b""))
