"""A dataset repository on the Hub: its files at the head that was read last, and commits on top of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import hub
from sdg_plugins.publishing.card import NAME

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


class RemoteEntry(NamedTuple):
    """A file in the repository, identified by one of two hashes."""

    sha256: str | None  # of a large file
    git_hash: str  # of any other file


class Repository:
    """What is known of a dataset repository.

    Args:
        uri: `hf://datasets/OWNER/NAME[/FOLDER]`.

    Attributes:
        entries: the files in the folders that `refresh` reads, by path.
        card: the content of its card, None if it has none.
        private: its visibility, or that which it will get.

    Raises:
        UsageError: the URI is invalid, or names a revision.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.address = uri, hub.parse_address(uri)
        if self.address.revision:
            raise sdg.UsageError(f"{uri}: runs publish to `main`: remove @{self.address.revision}")
        self.api = hub.open_client()
        self.entries: dict[str, RemoteEntry] = {}
        self.card: bytes | None = None
        self.private = True
        self._head = ""
        self._past: set[str] = set()  # heads that we have replaced: a replica may still report one of them

    @property
    def url(self) -> str:
        """The web page of the dataset."""
        return f"{self.api.endpoint}/datasets/{self.address.repo}"

    def ensure_writable(self, *, create: bool, public: bool) -> bool:
        """Check that the repository can be written, and create it if it does not exist.

        Args:
            create: False to check only that the account can create it.
            public: visibility of a new repository.

        Returns:
            True if it exists now.

        Raises:
            UsageError: there is no token.
            OutputError: the token has no write access.
            Exception: of the Hub's client.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import RepositoryNotFoundError

        repo = self.address.repo
        if not hub.has_token():
            raise sdg.UsageError(f"--output {self.uri}: no token for the Hub: set HF_TOKEN, or run `hf auth login`")
        account = self.api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise sdg.OutputError(f"--output {self.uri}: the token is read-only: create one with write access")
        try:
            self.private = bool(self.api.dataset_info(repo, expand=["sha", "private"], timeout=60).private)
        except RepositoryNotFoundError:
            self.private = not public
            if not create:
                self._check_owner(account)
                return False
            self.api.create_repo(repo, repo_type="dataset", private=self.private, exist_ok=True)
        # Asks how this file would be stored, which the Hub only answers to those with write access.
        self.api.preupload_lfs_files(repo, [CommitOperationAdd(NAME, b"\n")], repo_type="dataset")
        return True

    def _check_owner(self, account: dict[str, Any]) -> None:
        """Raise OutputError unless the account can create the repository later, when there are files for it."""
        owners = [str(account.get("name")), *(str(org.get("name")) for org in account.get("orgs", []))]
        if self.address.repo.partition("/")[0] not in owners:
            raise sdg.OutputError(
                f"{self.address} does not exist, or the token has no access to it: "
                f"HF_TOKEN can create datasets of {', '.join(owners)}"
            )

    def refresh(self, folders: list[str]) -> None:
        """Read the head and, if others have moved it, the files below some folders and the card."""
        head = str(self.api.dataset_info(self.address.repo, revision="main", expand=["sha"], timeout=60).sha)
        if head == self._head or head in self._past:
            return
        found = [hub.list_files(self.api, self.address.repo, folder, head) for folder in folders]
        self.entries = {file.path: entry_of(file) for files in found for file in files}
        self.card = hub.read_bytes(self.api, self.address.repo, NAME, head)
        self._head = head

    def commit(self, operations: list[Any], title: str) -> None:
        """Commit on top of the head that was read last; fails if others have moved it."""
        try:
            commit = self.api.create_commit(
                self.address.repo, operations, repo_type="dataset", commit_message=title, parent_commit=self._head
            )
        except Exception as exc:
            if hub.http_status(exc) == 412:
                self._past.clear()  # the branch may have been moved back to one of them
            raise
        self._past.add(self._head)
        self._head = commit.oid


def entry_of(file: RepoFile) -> RemoteEntry:
    """The entry of a file in a listing."""
    return RemoteEntry(file.lfs.sha256 if file.lfs else None, file.blob_id)
