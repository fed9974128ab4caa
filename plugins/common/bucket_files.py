"""The files of a bucket on the Hub as a file system of fsspec, for reading. Imported where it is used."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fsspec import AbstractFileSystem

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.remote import RemoteFile

T = TypeVar("T")


class BucketFiles(AbstractFileSystem):  # type: ignore[misc]
    """A bucket, read by HTTP ranges. Requests are repeated until the Hub responds, and the listing is read once.

    Args:
        address: of the bucket.
        stopping: returns the event that is set when the run ends early.
    """

    cachable = False
    protocol = "hf-bucket"

    def __init__(self, address: hub.Address, stopping: Callable[[], threading.Event]) -> None:
        super().__init__()
        self._api: Any = hub.open_client()
        self._address, self._stopping = address, stopping

    @functools.cached_property
    def _files(self) -> dict[str, int]:
        """Size in bytes of each file, by path."""
        return {path: size for path, (size, _) in self._listing.items()}

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Hash of each file, by path."""
        return {path: hash_ for path, (_, hash_) in self._listing.items()}

    @functools.cached_property
    def _listing(self) -> dict[str, tuple[int, str]]:
        if not hasattr(self._api, "list_bucket_tree"):
            raise sdg.UsageError("hf://buckets needs a newer package: pip install -U huggingface_hub")
        bucket = self._address.repo
        listed = self._ask(lambda: list(self._api.list_bucket_tree(bucket, recursive=True)))
        return {f"{bucket}/{file.path}": (file.size, file.xet_hash) for file in listed if file.type == "file"}

    def _ask(self, call: Callable[[], T]) -> T:
        return hub.patiently(call, self._address, self._stopping())

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """See `fsspec`."""
        path = path.strip("/")
        if path in self._files:
            return {"name": path, "size": self._files[path], "type": "file"}
        if path == self._address.repo or self._below(path):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        """See `fsspec`."""
        path = path.strip("/")
        found = {name: self.info(name) for name in ([path] if path in self._files else self._below(path))}
        return found if detail else list(found)

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        """See `fsspec`."""
        root = path.strip("/")
        below = {f"{root}/{name[len(root) + 1 :].partition('/')[0]}" for name in self._below(root)}
        return [self.info(name) if detail else name for name in sorted(below)]

    def _below(self, folder: str) -> list[str]:
        return sorted(name for name in self._files if name.startswith(f"{folder}/"))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        bucket = self._address.repo
        fetch = functools.partial(hub.get_from_bucket, self._api, bucket, path.removeprefix(f"{bucket}/"))
        return RemoteFile(lambda headers: self._ask(lambda: fetch(headers)), self._files[path])
