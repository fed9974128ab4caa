"""What all that talks to the Hugging Face Hub shares: addresses, errors in people's words, patience."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import logging
import random
import re
import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import sdg
from sdg_plugins.common.files import split_uri
from sdg_plugins.servers.responses import retry_after

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def hub_name(uri: str | None) -> str:
    """OWNER/NAME of an input on the Hub, else ""."""
    scheme, rest = split_uri(uri or "")
    parts = rest.partition("@")[0].split("/")
    return "/".join(parts[1:3]) if scheme == "hf" and parts[0] == "datasets" else ""


def hub_source(source: dict[str, Any]) -> str:
    """The dataset of a source if it is one on the Hub, else ""."""
    name = source.get("dataset")
    return name if isinstance(name, str) and ON_THE_HUB.fullmatch(name) else ""


T = TypeVar("T")
TIMEOUT = 300.0  # s of silence on a connection: the Hub takes minutes for a commit of many files
PASSING = {408, 409, 412, 413, 425, 429}  # of the 4xx: another attempt, or a smaller one, may do; so after any 5xx
QUIET = 30.0  # s that a disturbance may last before it is spoken of


class Address(NamedTuple):
    """`hf://datasets/OWNER/NAME`, with the revision (of an input) and the folder (of an output) that it may name."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        return f"dataset {self.repo}"


def parse_address(uri: str) -> Address:
    """The parts of `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`. Raises UsageError if it is something else."""
    name = r"[\w.-]+"
    # A revision may be a branch, a tag, a hash, or a reference with slashes such as refs/pr/1.
    found = re.fullmatch(rf"hf://datasets/({name}/{name})(?:@(refs/[\w-]+/[\w.-]+|[^/@]+))?(?:/(.*))?", uri)
    if not found:
        raise sdg.UsageError(f"{uri}: hf://datasets/OWNER/NAME is wanted, with @REVISION if need be")
    repo, revision, folder = found.groups()
    return Address(repo, revision, (folder or "").strip("/"))


def connect() -> HfApi:
    """The Hub's client, for HF_ENDPOINT and HF_TOKEN (or the token that `hf auth login` stored).

    Its progress bars and its words on each attempt are switched off: people hear of the run, and of what lasts.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if re.search(r"[^!-~]", get_token() or ""):  # it would end in an error that quotes it
        raise sdg.InputError("the token for the Hub (HF_TOKEN) has a character that no token has: copy it again")
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(library_name="sdg", library_version=sdg.__version__)


def has_token() -> bool:
    """Whether there is a token to show."""
    from huggingface_hub import get_token

    return get_token() is not None


def refusal(problem: BaseException, address: Address) -> str | None:
    """Why the Hub says no, and will as often as it is asked; None if it may well say yes later."""
    from huggingface_hub import errors

    problem = cause_of(problem)
    status = getattr(getattr(problem, "response", None), "status_code", 0)
    detail = " ".join(str(getattr(problem, "server_message", None) or "").split())
    right = "the token's account has no right to it" if has_token() else "it is private: set HF_TOKEN"
    said = {
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set, so the Hub is not asked: unset it",
        client_library().UnsupportedProtocol: "HF_ENDPOINT is no address: begin it with https:// or http://",
        errors.LocalTokenNotFoundError: "there is no token for the Hub: set HF_TOKEN, or run `hf auth login`",
        errors.GatedRepoError: f"{address} is gated: accept its conditions on its page, as the owner of HF_TOKEN",
        errors.RevisionNotFoundError: f"{address} has no revision {address.revision or 'main'}",
        errors.RepositoryNotFoundError: f"there is no {address}, or {right}",
        errors.HFValidationError: f"{address}: {' '.join(str(problem).split())}",
    }
    for kind, words in said.items():
        if isinstance(problem, kind):
            return words
    if status == 401:
        return f"the Hub does not know the token (HF_TOKEN): it was revoked, or mistyped; {address} wants a valid one"
    if status in {402, 403}:
        return (
            f"the Hub refuses: {detail or 'the right is missing'} ({address}; has HF_TOKEN the right to write to it?)"
        )
    if 400 <= status < 500 and status not in PASSING:
        return f"the Hub refuses ({status}): {detail or ' '.join(str(problem).split())[:300]} ({address})"
    return None


def client_library() -> Any:
    """What the Hub's client is made on: httpx before its version 2.0, httpx2 since."""
    import importlib

    from huggingface_hub.errors import HfHubHTTPError

    return importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def cause_of(problem: BaseException) -> BaseException:
    """What an upload failed of: the client wraps it into a RuntimeError."""
    while isinstance(problem, RuntimeError) and problem.__cause__:
        problem = problem.__cause__
    return problem


def is_passing(problem: Exception) -> bool:
    """Whether a failure may be over later: of the network, of the Hub, of a race with another commit, of the disk."""
    # Xet's failures are plain ConnectionErrors and RuntimeErrors, answers cut short are ValueErrors of JSON.
    transport = client_library().HTTPError
    return isinstance(problem, transport | OSError | RuntimeError | json.JSONDecodeError | sqlite3.OperationalError)


def pause_after(problem: BaseException, attempt: int, longest: float) -> float:
    """Seconds until the next attempt: what the Hub asks for, else exponential back-off with full jitter."""
    problem = cause_of(problem)
    headers = getattr(getattr(problem, "response", None), "headers", {})
    asked = retry_after(headers)
    if asked is None:  # a quota of commits is told in words only
        said = re.search(r"retry this action in (?:about )?(\d+) (second|minute|hour)", str(problem))
        asked = said and int(said[1]) * {"second": 1.0, "minute": 60.0, "hour": 3600.0}[said[2]]
    return asked + random.uniform(0, 1 + asked / 20) if asked else random.uniform(0, min(longest, 2.0**attempt))


def describe(problem: BaseException) -> str:
    """A failure that may pass, in a few words."""
    problem = cause_of(problem)
    if isinstance(problem, sqlite3.Error) or (isinstance(problem, OSError) and problem.filename):
        return f"publishing is held up: {sdg.reason_of(problem)}"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    detail = getattr(problem, "server_message", None) or str(problem).partition("\n")[0]
    name = type(problem).__name__
    return f"the Hub answers {status}: {detail}" if status else f"the Hub cannot be reached: {detail or name}"


def patiently(call: Callable[[], T], address: Address, stopping: threading.Event) -> T:
    """Ask the Hub until it answers: an outage of hours costs nothing but the delay.

    Args:
        call: asks; it may be called any number of times.
        stopping: set when there is no point in going on.

    Raises:
        InputError: the Hub refuses, which it would do again.
    """
    waited, told = 0.0, False
    for attempt in itertools.count():
        set_timeout()
        try:
            return call()
        except Exception as problem:
            if reason := refusal(problem, address):
                raise sdg.InputError(reason) from problem
            if not is_passing(problem) or stopping.is_set():
                raise
            pause = pause_after(problem, attempt, longest=60.0)
            waited += pause
            if waited > QUIET and not told:
                told = True
                sdg.say(f"{describe(problem)}; asking again until it answers")
            stopping.wait(pause)
    raise AssertionError("unreachable")


def set_timeout() -> None:
    """Keep a connection that has gone silent from holding us for ever: by default the client waits without an end."""
    from huggingface_hub import get_session

    session: Any = get_session()  # made anew after some errors, and None while another thread is at that
    if session is not None:
        session.timeout = TIMEOUT


@functools.cache
def plain_client() -> Any:
    """A client for files: the library's own is closed after an error, under the hands of all threads that read."""
    client = client_library().Client(follow_redirects=True, timeout=60)
    atexit.register(client.close)
    return client


def list_files(api: HfApi, repo: str, folder: str, revision: str) -> list[RepoFile]:
    """All files below a folder ("" for all of the repository), sorted; none if it does not exist."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile  # the package itself does not export it before 1.1

    try:
        entries = api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type="dataset")
        return sorted((entry for entry in entries if isinstance(entry, RepoFile)), key=lambda file: file.path)
    except EntryNotFoundError:
        return []


def get(api: HfApi, repo: str, path: str, revision: str, headers: dict[str, str] | None = None) -> Any:
    """The response to one request for a file; raises what the client raises."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=api.endpoint)
    answer = plain_client().get(url, headers={**build_hf_headers(library_name="sdg"), **(headers or {})})
    hf_raise_for_status(answer)
    return answer


def read_bytes(api: HfApi, repo: str, path: str, revision: str) -> bytes | None:
    """A small file, None if there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return bytes(get(api, repo, path, revision).content)
    except EntryNotFoundError:
        return None
