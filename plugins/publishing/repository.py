"""A dataset repository on the Hub: its files at the head that was read last, and commits on top of that."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common import hub
from sdg_plugins.publishing.card import NAME
from sdg_plugins.publishing.ledger import Known

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile


UNUSABLE = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')  # characters that paths on the Hub must not have


class RemoteEntry(NamedTuple):
    """A file in the repository, identified by one of two hashes."""

    hash: str | None  # of a large file: SHA-256, in a bucket that of Xet
    git_hash: str  # of any other file

    def is_of(self, known: Known) -> bool:
        """True if it has the content that is remembered; of files without a remembered hash nothing is known."""
        mine, theirs = (known.hash, self.hash) if self.hash else (known.git_hash, self.git_hash)
        return not mine or mine == theirs


class Upload(NamedTuple):
    """A file whose content is on the Hub, ready to be committed."""

    operation: Any  # for the Hub's client
    hash: str  # see `RemoteEntry`


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
        address = hub.parse_address(uri)
        if address.revision:
            raise sdg.UsageError(f"{uri}: runs publish to `main`: remove @{address.revision}")
        self._init(uri, address)

    def _init(self, uri: str, address: hub.Address) -> None:
        for part in address.folder.split("/") if address.folder else ():
            if part in {"", ".", "..", ".git"} or UNUSABLE.search(part):
                raise sdg.UsageError(f"--output {uri}: the Hub cannot have a folder {part!r}")
        self.uri, self.address = uri, address
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

        repo, account = self.address.repo, self._account()
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

    def _account(self) -> dict[str, Any]:
        """Whose token it is. Raises an error if there is none, or it is read-only."""
        if not hub.has_token():
            raise sdg.UsageError(f"--output {self.uri}: no token for the Hub: set HF_TOKEN, or run `hf auth login`")
        account: dict[str, Any] = self.api.whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise sdg.OutputError(f"--output {self.uri}: the token is read-only: create one with write access")
        return account

    def _check_owner(self, account: dict[str, Any]) -> None:
        """Raise OutputError unless the account can create the repository later, when there are files for it."""
        owners = [str(account.get("name")), *(str(org.get("name")) for org in account.get("orgs", []))]
        if self.address.repo.partition("/")[0] not in owners:
            raise sdg.OutputError(
                f"{self.address} does not exist, or the token has no access to it: "
                f"HF_TOKEN can create {self.address.kind}s of {', '.join(owners)}"
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

    @staticmethod
    def hash_of(path: str) -> str:
        """The hash by which the Hub identifies a large file."""
        with open(path, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def upload(self, sources: dict[str, str]) -> dict[str, Upload]:
        """Upload local files, by their paths in the repository."""
        from huggingface_hub import CommitOperationAdd

        adds = {path: CommitOperationAdd(path, source) for path, source in sources.items()}
        self.api.preupload_lfs_files(self.address.repo, adds.values(), repo_type="dataset")
        return {path: Upload(add, add.upload_info.sha256.hex()) for path, add in adds.items()}

    def commit(
        self, uploads: list[Upload], gone: list[str], readme: str | None, title: str, *, onto_any_head: bool = False
    ) -> None:
        """Commit on top of the head that was read last; fails if others have moved it.

        Args:
            uploads: added files, from `upload`.
            gone: paths to delete.
            readme: the card, None if it stays as it is.
            title: of the commit.
            onto_any_head: commit even if others have moved the head.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [*(upload.operation for upload in uploads), *map(CommitOperationDelete, gone)]
        if readme is not None:
            operations.append(CommitOperationAdd(NAME, readme.encode()))
        parent = None if onto_any_head else self._head
        try:
            commit = self.api.create_commit(
                self.address.repo, operations, repo_type="dataset", commit_message=title, parent_commit=parent
            )
        except Exception as exc:
            if hub.http_status(exc) == 412:
                self._past.clear()  # the branch may have been moved back to one of them
            raise
        if readme is not None:
            self.card = readme.encode()
        self._past.add(self._head)
        self._head = "" if onto_any_head else commit.oid  # the files that others have added are not known


def entry_of(file: RepoFile) -> RemoteEntry:
    """The entry of a file in a listing."""
    return RemoteEntry(file.lfs.sha256 if file.lfs else None, file.blob_id)
