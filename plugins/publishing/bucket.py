"""A bucket on the Hub as the place to publish to: files without revisions, stored by Xet."""

from __future__ import annotations

import time
from typing import Any

import sdg
from sdg_plugins.common import hub
from sdg_plugins.publishing.card import NAME
from sdg_plugins.publishing.repository import RemoteEntry, Repository, Upload

FRESH = 1.0  # s for which a listing is used again: buckets have no head that would say whether it has changed
NEEDED = "needs newer packages: pip install -U huggingface_hub hf_xet"


def open_repository(uri: str) -> Repository:
    """The dataset repository or bucket of an output's URI. Raises UsageError."""
    return Bucket(uri) if hub.is_bucket(uri) else Repository(uri)


class Bucket(Repository):
    """What is known of a bucket. Each file is replaced as a whole, so a publisher that is interrupted is continued.

    There are no commits on a condition: files of two publishers of one run are equal, and the last card wins.
    """

    def __init__(self, uri: str) -> None:
        self._init(uri, hub.parse_bucket(uri))
        self._read = 0.0  # time of the last listing
        try:
            import hf_xet

            _ = self.api.batch_bucket_files, hf_xet.hash_files
        except (ImportError, AttributeError) as exc:
            raise sdg.UsageError(f"--output {uri}: {NEEDED}") from exc

    @property
    def url(self) -> str:
        """The web page of the bucket."""
        return f"{self.api.endpoint}/buckets/{self.address.repo}"

    def ensure_writable(self, *, create: bool, public: bool) -> bool:
        """See `Repository`."""
        from huggingface_hub.errors import BucketNotFoundError

        account, repo = self._account(), self.address.repo
        try:
            self.private = bool(self.api.bucket_info(repo).private)
        except BucketNotFoundError:
            self.private = not public
            if not create:
                self._check_owner(account)
                return False
            self.api.create_bucket(repo, private=self.private, exist_ok=True)
        # Only those with write access get a token for the storage.
        hub.get_url(f"{self.api.endpoint}/api/buckets/{repo}/xet-write-token")
        return True

    def refresh(self, folders: list[str]) -> None:
        """Read the files below some folders and the card, unless that was done a moment ago."""
        from huggingface_hub.errors import EntryNotFoundError

        if time.monotonic() - self._read < FRESH:
            return
        entries = {}
        for folder in folders:
            for file in self.api.list_bucket_tree(self.address.repo, folder, recursive=True):
                if file.type == "file" and file.path.startswith(f"{folder}/"):  # the folder is only a prefix there
                    entries[file.path] = RemoteEntry(file.xet_hash, "")
        try:
            self.card = bytes(hub.get_from_bucket(self.api, self.address.repo, NAME).content)
        except EntryNotFoundError:
            self.card = None
        self.entries, self._read = entries, time.monotonic()

    @staticmethod
    def hash_of(path: str) -> str:
        """The hash by which Xet identifies a file."""
        import hf_xet

        return str(hf_xet.hash_files([path])[0].hash)

    def upload(self, sources: dict[str, str]) -> dict[str, Upload]:
        """See `Repository`. The content follows with `commit`."""
        return {path: Upload((source, path), self.hash_of(source)) for path, source in sources.items()}

    def commit(
        self, uploads: list[Upload], gone: list[str], readme: str | None, title: str, *, onto_any_head: bool = False
    ) -> None:
        """Upload files, and delete others; see `Repository`."""
        added: list[Any] = [upload.operation for upload in uploads]
        if readme is not None:
            added.append((readme.encode(), NAME))
        self._read = 0.0  # a failure may have done a part of it
        self.api.batch_bucket_files(self.address.repo, add=added, delete=gone)
        if readme is not None:
            self.card = readme.encode()
        self._read = time.monotonic()
