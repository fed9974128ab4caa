"""A remote file that is read by HTTP ranges."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


class RemoteFile(io.RawIOBase):
    """A file that is read by HTTP ranges, with one request per read and no others.

    The file system of huggingface_hub lists folders before it opens a file: too many requests with a thousand ranks.

    Args:
        fetch: sends a request with additional headers.
        size: bytes in the file.
    """

    def __init__(self, fetch: Callable[[dict[str, str]], Any], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._position = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """See `io.RawIOBase`."""
        start = self._position
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        if start >= end:
            return b""
        response = self._fetch({"Range": f"bytes={start}-{end - 1}"})
        content = bytes(response.content)
        if response.status_code == 200:  # the whole file: some proxies do not support ranges
            content = content[start:end]
        if len(content) != end - start:
            raise ConnectionError(f"{response.url}: received {len(content)} bytes, expected {end - start}")
        self._position = end
        return content
