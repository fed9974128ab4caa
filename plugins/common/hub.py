"""What readers and publishers of the Hugging Face Hub share: addresses, requests, errors and retries."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import logging
import random
import re
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import sdg
from sdg_plugins.common.files import split_uri
from sdg_plugins.common.waiting import retry_after

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")
REPO_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TIMEOUT = 300.0  # s of silence on a connection: the Hub takes minutes for a commit of many files
TRANSIENT = {408, 409, 412, 413, 425, 429}  # 4xx after which a retry, or a smaller commit, may succeed
QUIET = 30.0  # s that an outage may last before it is reported


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Address(NamedTuple):
    """The parts of `hf://datasets/OWNER/NAME` or `hf://buckets/OWNER/NAME`.

    Inputs may name a revision of a dataset, outputs a folder.
    """

    repo: str
    revision: str | None = None
    folder: str = ""
    kind: str = "dataset"  # or bucket

    def __str__(self) -> str:
        return f"{self.kind} {self.repo}"


def parse_address(uri: str) -> Address:
    """The parts of `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`. Raises UsageError for anything else."""
    name = r"[\w.-]+"
    # A revision may be a branch, a tag, a hash, or a reference with slashes such as refs/pr/1.
    found = re.fullmatch(rf"hf://datasets/({name}/{name})(?:@(refs/[\w-]+/[\w.-]+|[^/@]+))?(?:/(.*))?", uri)
    if not found:
        raise sdg.UsageError(f"{uri}: expected hf://datasets/OWNER/NAME, optionally with @REVISION")
    repo, revision, folder = found.groups()
    return Address(repo, revision, (folder or "").strip("/"))


def is_bucket(uri: str | None) -> bool:
    """True for the URI of a bucket on the Hub: storage for files without revisions."""
    return (uri or "").startswith("hf://buckets/")


def parse_bucket(uri: str) -> Address:
    """The parts of `hf://buckets/OWNER/NAME[/FOLDER]`. Raises UsageError for anything else."""
    found = re.fullmatch(rf"hf://buckets/({REPO_NAME.pattern})(?:/(.*))?", uri, re.ASCII)
    if not found:
        raise sdg.UsageError(f"{uri}: expected hf://buckets/OWNER/NAME")
    return Address(found[1], None, (found[2] or "").strip("/"), "bucket")


def dataset_of_uri(uri: str | None) -> str:
    """OWNER/NAME if an input is a dataset on the Hub, else ""."""
    scheme, rest = split_uri(uri or "")
    parts = rest.partition("@")[0].split("/")
    return "/".join(parts[1:3]) if scheme == "hf" and parts[0] == "datasets" else ""


def dataset_of_source(source: dict[str, Any]) -> str:
    """OWNER/NAME if a recorded source is a dataset on the Hub, else ""."""
    name = source.get("dataset")
    return name if isinstance(name, str) and REPO_NAME.fullmatch(name) else ""


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_client() -> HfApi:
    """The Hub's client, for HF_ENDPOINT and HF_TOKEN (or the token that `hf auth login` stored).

    Its progress bars and warnings are switched off: outages that last are reported by `patiently` and the publisher.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if re.search(r"[^!-~]", get_token() or ""):  # the client's own error would quote the token
        raise sdg.InputError("the token for the Hub (HF_TOKEN) contains an invalid character: copy it again")
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(library_name="sdg", library_version=sdg.__version__)


def has_token() -> bool:
    """True if a token is set or stored."""
    from huggingface_hub import get_token

    return get_token() is not None


def set_timeout() -> None:
    """Limit how long a connection may be silent: by default the client waits forever."""
    from huggingface_hub import get_session

    session: Any = get_session()  # replaced after some errors, and None while another thread does that
    if session is not None:
        session.timeout = TIMEOUT


def client_library() -> Any:
    """The HTTP library of the Hub's client: httpx before its version 2.0, httpx2 since."""
    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


@functools.cache
def file_client() -> Any:
    """A client to read files: the library closes its own after an error, while other threads are reading with it."""
    client = client_library().Client(follow_redirects=True, timeout=60)
    atexit.register(client.close)
    return client


def list_files(api: HfApi, repo: str, folder: str, revision: str) -> list[RepoFile]:
    """All files below a folder ("" for the whole repository), sorted; empty if the folder does not exist."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile  # the package itself does not export it before 1.1

    try:
        entries = api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type="dataset")
        return sorted((entry for entry in entries if isinstance(entry, RepoFile)), key=lambda file: file.path)
    except EntryNotFoundError:
        return []


def get_from_bucket(api: HfApi, bucket: str, path: str, headers: dict[str, str] | None = None) -> Any:
    """Request a file of a bucket and return the response. Raises the exceptions of the Hub's client."""
    return get_url(f"{api.endpoint}/buckets/{bucket}/resolve/{urllib.parse.quote(path, safe='')}", headers)


def get(api: HfApi, repo: str, path: str, revision: str, headers: dict[str, str] | None = None) -> Any:
    """Request a file and return the response. Raises the exceptions of the Hub's client."""
    from huggingface_hub import hf_hub_url

    return get_url(hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=api.endpoint), headers)


def get_url(url: str, headers: dict[str, str] | None = None) -> Any:
    """Send a GET request with the token and return the response. Raises the exceptions of the Hub's client."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    response = file_client().get(url, headers={**build_hf_headers(library_name="sdg"), **(headers or {})})
    hf_raise_for_status(response)
    return response


def read_bytes(api: HfApi, repo: str, path: str, revision: str) -> bytes | None:
    """The content of a small file, None if it does not exist."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return bytes(get(api, repo, path, revision).content)
    except EntryNotFoundError:
        return None


# ── Errors and retries ───────────────────────────────────────────────────────────────────────────────────────────────


def refusal(exc: BaseException, address: Address) -> str | None:
    """Reason for a permanent Hub error; None if a retry may succeed."""
    from huggingface_hub import errors

    exc = cause_of(exc)
    status = http_status(exc) or 0
    detail = sdg.one_line(getattr(exc, "server_message", None) or "")
    access = "the token has no access to it" if has_token() else "it is private: set HF_TOKEN"
    missing_bucket = getattr(errors, "BucketNotFoundError", errors.RepositoryNotFoundError)  # new in 1.5
    reasons = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so no request is sent to the Hub: unset it",
        client_library().UnsupportedProtocol: "HF_ENDPOINT is not a URL: it must begin with https:// or http://",
        errors.LocalTokenNotFoundError: "no token for the Hub: set HF_TOKEN, or run `hf auth login`",
        errors.GatedRepoError: f"{address} is gated: accept its conditions on its page, with the account of HF_TOKEN",
        errors.RevisionNotFoundError: f"{address} has no revision {address.revision or 'main'}",
        errors.RepositoryNotFoundError: f"{address} does not exist, or {access}",
        missing_bucket: f"{address} does not exist, or {access}",
        errors.HFValidationError: f"{address}: {sdg.one_line(exc)}",
    }
    for kind, reason in reasons.items():
        if isinstance(exc, kind):
            return reason
    if status == 401:
        return f"the Hub rejected the token (HF_TOKEN) for {address}: it may be revoked or mistyped; set a valid one"
    if status in {402, 403}:
        right = "read" if method_of(exc) in {"GET", "HEAD"} else "write"
        asked = f"{address}, {request_of(exc)}; does HF_TOKEN have {right} access to it?"
        return f"the Hub refused: {detail or 'no permission'} ({asked})"
    if 400 <= status < 500 and status not in TRANSIENT:
        return f"the Hub refused ({status}): {detail or sdg.one_line(exc)[:300]} ({address}, {request_of(exc)})"
    return None


def failed_request(exc: BaseException) -> Any:
    """The request that failed, as the HTTP library has it; None if unknown."""
    for of in (exc, getattr(exc, "response", None)):
        with contextlib.suppress(RuntimeError):  # made without its request
            if request := getattr(of, "request", None):
                return request
    return None


def method_of(exc: BaseException) -> str:
    """The HTTP method of the request that failed; "" if unknown."""
    return str(getattr(failed_request(exc), "method", ""))


def request_of(exc: BaseException) -> str:
    """What was asked for, without the query, which may hold a signature."""
    path = urllib.parse.unquote(str(getattr(failed_request(exc), "url", "")).partition("?")[0])
    return f"{method_of(exc)} {sdg.redact(path)}".strip()


def is_refused_range(exc: BaseException) -> bool:
    """True if a part of a file was refused: a signed URL that has just expired is renewed by asking again."""
    return http_status(exc) in {403, 416} and "range" in getattr(failed_request(exc), "headers", {})


def cause_of(exc: BaseException) -> BaseException:
    """The error behind a failed upload, which the client wraps into a RuntimeError."""
    while isinstance(exc, RuntimeError) and exc.__cause__:
        exc = exc.__cause__
    return exc


def http_status(exc: BaseException) -> int | None:
    """The HTTP status of an error of the Hub's client, None if there was no response."""
    return getattr(getattr(exc, "response", None), "status_code", None)


def is_conflict(exc: BaseException) -> bool:
    """True if a commit failed because of another one."""
    return http_status(cause_of(exc)) in {409, 412}


def is_transient(exc: Exception) -> bool:
    """True if a retry may succeed: failures of the network, the Hub or the disk, and races with other commits."""
    # Xet raises plain ConnectionErrors and RuntimeErrors, a response that is cut short a ValueError of JSON.
    transport = client_library().HTTPError
    return isinstance(exc, transport | OSError | RuntimeError | json.JSONDecodeError | sqlite3.OperationalError)


def transient_message(exc: BaseException) -> str:
    """A transient error in one line."""
    exc = cause_of(exc)
    if isinstance(exc, sqlite3.Error) or (isinstance(exc, OSError) and exc.filename):
        return f"publishing is delayed: {sdg.reason_of(exc)}"
    status = http_status(exc)
    detail = getattr(exc, "server_message", None) or str(exc).partition("\n")[0]
    if status:
        return f"the Hub responds {status}: {detail}"
    return f"the Hub cannot be reached: {detail or type(exc).__name__}"


def pause_after(exc: BaseException, attempt: int, longest: float) -> float:
    """Seconds until the next attempt: as the Hub asks, otherwise exponential back-off with full jitter."""
    exc = cause_of(exc)
    asked = retry_after(getattr(getattr(exc, "response", None), "headers", {}))
    if asked is None:  # the quota of commits is only mentioned in the message
        said = re.search(r"retry this action in (?:about )?(\d+) (second|minute|hour)", str(exc))
        asked = said and int(said[1]) * {"second": 1.0, "minute": 60.0, "hour": 3600.0}[said[2]]
    return asked + random.uniform(0, 1 + asked / 20) if asked else random.uniform(0, min(longest, 2.0**attempt))


def patiently(call: Callable[[], T], address: Address, stopping: threading.Event) -> T:
    """Retry a request until the Hub responds: an outage of hours costs only the delay.

    Args:
        call: sends the request; may be called any number of times.
        address: the dataset, for messages.
        stopping: set when the run ends, after which a failure is raised.

    Raises:
        InputError: a permanent error of the Hub.
    """
    waited, said, renewed = 0.0, False, False
    for attempt in itertools.count():
        set_timeout()
        try:
            return call()
        except Exception as exc:
            renewing, renewed = is_refused_range(exc) and not renewed, renewed or is_refused_range(exc)
            if (reason := refusal(exc, address)) and not renewing:
                raise sdg.InputError(reason) from exc
            if not is_transient(exc) or stopping.is_set():
                raise
            pause = pause_after(exc, attempt, longest=60.0)
            waited += pause
            if waited > QUIET and not said:
                said = True
                sdg.say(f"{transient_message(exc)}; retrying")
            stopping.wait(pause)
    raise AssertionError("unreachable")
