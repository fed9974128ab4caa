"""Streams of bytes: decompressed, and as UTF-8, whatever the file's name says."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from typing import Any

BLOCK = 1 << 20  # bytes read at a time; what is found out about a file is found in its first ones
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)  # raised while reading a damaged file
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BOMS = {codecs.BOM_UTF8: None, codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # the first one begins that of UTF-32


class Stream:
    """A file's content, decompressed and in UTF-8.

    Args:
        file: the open file, at its start.
        encoding: of the content; None to find it out.
        legacy: take content that is not Unicode for Windows-1252.

    Attributes:
        head: its first bytes, at most BLOCK.
        encoding: what it is converted from, None if it is UTF-8.
        plain: the file's bytes are the content's: it can be entered in the middle.
        produced: bytes of the content that were taken from the file, read ahead ones included.
    """

    def __init__(self, file: Any, encoding: str | None = None, legacy: bool = False) -> None:
        self._file = file
        head = bytes(file.read(BLOCK))
        codec = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        self._read = file.read
        if codec:
            file.seek(0)
            self._read = decompressed(file, codec)
            head = self._read(BLOCK)
        self.encoding = encoding_of(head, legacy) if encoding is None else canonical(encoding)
        if self.encoding:
            self._decoder = codecs.getincrementaldecoder(self.encoding)("windows-1252-as-browsers-do")
            head = self._converted(head)
        self.plain = not codec and not self.encoding
        self.head = self._ahead = head
        self.produced = len(head)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end."""
        if self._ahead:
            block, self._ahead = self._ahead[:size], self._ahead[size:]
            return block
        block = self._read(size)
        content = self._converted(block) if self.encoding else bytes(block)
        self.produced += len(content)
        return content

    def skip(self, offset: int) -> None:
        """Continue after the first `offset` bytes of the content."""
        if self.plain:
            self._file.seek(offset)
            self._ahead = b""
            return
        while offset and (block := self.read(min(offset, BLOCK))):
            offset -= len(block)

    def _converted(self, block: bytes) -> bytes:
        while True:
            text = self._decoder.decode(block, final=not block)
            if text or not block:
                return text.encode("utf-8", "surrogatepass")
            block = self._read(BLOCK)


def decompressed(file: Any, codec: str) -> Any:
    """A function that reads from a compressed file. What precedes damage is returned before the error is raised."""
    if codec == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(file, codec).read
    openers: dict[str, Any] = {
        "gzip": lambda file: gzip.GzipFile(fileobj=file),
        "bz2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
    }
    return openers[codec](file).read1


def canonical(encoding: str) -> str | None:
    """Python's name of an encoding; None for UTF-8. Raises LookupError."""
    name = codecs.lookup(encoding).name
    return None if name in {"utf-8", "ascii"} else name


def encoding_of(head: bytes, legacy: bool) -> str | None:
    """The encoding of a text that begins with `head`; None for UTF-8, and for what cannot be told from it."""
    for bom, encoding in BOMS.items():
        if head.startswith(bom):
            return encoding
    if len(head) > 3 and not head[1] and not head[3] and head[0] and head[2]:
        return "utf-16-le"
    if len(head) > 3 and not head[0] and not head[2] and head[1] and head[3]:
        return "utf-16-be"
    if not legacy or head.isascii():
        return None
    text = head[: -3 if len(head) == BLOCK else None].decode("utf-8", "surrogateescape")
    broken = sum("\udc80" <= char <= "\udcff" for char in text)
    return "cp1252" if 2 * broken > sum(not char.isascii() for char in text) else None


def _as_browsers_do(exc: UnicodeError) -> tuple[str, int]:
    """Bytes that Windows-1252 does not define are control characters; other encodings are decoded strictly."""
    if isinstance(exc, UnicodeDecodeError) and exc.encoding == "charmap":
        return exc.object[exc.start : exc.end].decode("latin-1"), exc.end
    raise exc


codecs.register_error("windows-1252-as-browsers-do", _as_browsers_do)
