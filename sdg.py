"""Generate synthetic training data: one async rollout per document, against any OpenAI-compatible server.

    python sdg.py --plugin summarize                                      # demo: no GPU, no network, no key
    python sdg.py --plugin summarize --input 'docs/*.parquet' --base-url http://localhost:8000
    python sdg.py --plugin ./mine.py --input docs.jsonl.gz --base-url https://api.example.com/v1 --model some-model
    python sdg.py --config run.toml --rank 3 --world-size 8               # one of eight processes
    python sdg.py --input hf://datasets/OWNER/NAME --output hf://datasets/YOU/NAME --server vllm --model OWNER/MODEL
    slurm/submit.sh --ranks 16 --gpus-per-node 8 -- --config run.toml     # on a Slurm cluster
    python sdg.py status --output /shared/out                             # progress of each rank
    python sdg.py monitor --output hf://datasets/YOU/NAME                 # publish what many ranks write
    python sdg.py verify --output ./output/summarize                      # is every document accounted for?

A request is the unit of replay, a document the unit of work, a chunk the unit of commit. Responses and finished
documents become durable in SQLite within a fraction of a second. When all documents of a chunk are final, its file is
written and recorded, and its part of the state is dropped. File names and contents depend only on the input and the
responses, so every step can be repeated after a crash.

This module is the engine, and the contract that plugins see. Everything else is a plugin, or machinery that plugins
share, in `plugins/`: `plugins/commands/jobs.py` puts a run together. Reading order: types, errors, hooks, plugins,
store, rollouts, engine, main.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import difflib
import errno
import functools
import heapq
import importlib
import importlib.util
import inspect
import json
import os
import re
import signal
import sqlite3
import string
import sys
import threading
import time
import traceback
import types
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, cast

try:
    import orjson
    import pluggy
    import xxhash
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"sdg: {missing.name} is not installed for {sys.executable}: run `pip install -e .`")

if TYPE_CHECKING:
    import aiosqlite
    import pyarrow as pa

    from sdg_plugins.common.chunks import Intake, OpenChunk, Outlet
    from sdg_plugins.common.crew import Crew
    from sdg_plugins.common.files import (
        Place as Place,
        file_system_of as file_system_of,
        filesystem as filesystem,
        format_of as format_of,
        split_uri as split_uri,
    )
    from sdg_plugins.common.inputs import InputFiles as InputFiles, list_files as list_files
    from sdg_plugins.common.kinds import checker as checker
    from sdg_plugins.common.options import (
        Option as Option,
        Options as Options,
        json_object as json_object,
        number as number,
        one_of as one_of,
        text_or_file as text_or_file,
    )
    from sdg_plugins.common.results import base_fields as base_fields, results_type as results_type
    from sdg_plugins.common.resuming import Known
    from sdg_plugins.common.secrets import redact as redact
    from sdg_plugins.common.tasks import background as background
    from sdg_plugins.common.values import plain as plain, rows_of as rows_of
    from sdg_plugins.python import run as run
    from sdg_plugins.servers.client import Client
    from sdg_plugins.servers.lane import Lane
    from sdg_plugins.servers.upstream import Upstream as Upstream
    from sdg_plugins.truncation.fitting import Fitter

__version__ = "0.1.0"

STATE_VERSION = 2
COMMIT_INTERVAL = 0.05  # s between group commits: 5,000 documents/s become 250 rows a commit, not 5,000 commits
LONGEST_UNSAVED = 2.0  # s that a response may not be durable before no further request is sent
MOST_UNSAVED = 64 << 20  # bytes of responses that are not durable, likewise
LARGE_CHUNK = 32 << 20  # bytes of results in a chunk above which no other such chunk is written at the same time
PIECE = 1024  # documents that are made into rows at a time
PIECE_BYTES = 8 << 20  # results of a large chunk that are in memory at a time
WINDOW = 32  # documents read but not yet written, per document in flight: 1 % stragglers of 20 times the mean need 20
AT_ONCE = 100  # documents that begin in one turn of the event loop, if many wait for the reader
RECENT = 1000  # documents that the failure rate is also judged by, so that a long run stops soon when all go wrong
PUBLISHER = "sdg-publisher"  # the thread that publishes during a run; see `run_program` in plugins/common/ending.py
hide: Callable[[str], str] = str  # takes keys out of a text; see `hide_secrets` in plugins/common/secrets.py
left_behind: list[object] = []  # tasks of plugins that did not end with the run; see `run_program`

# What plugins use that lives in plugins/: `sdg.InputFiles` is `sdg_plugins.common.inputs.InputFiles`.
HELPERS = {
    **dict.fromkeys(("Place", "file_system_of", "filesystem", "format_of", "split_uri"), "common.files"),
    **dict.fromkeys(("InputFiles", "list_files"), "common.inputs"),
    "checker": "common.kinds",
    **dict.fromkeys(("Option", "Options", "json_object", "number", "one_of", "text_or_file"), "common.options"),
    **dict.fromkeys(("base_fields", "results_type"), "common.results"),
    **dict.fromkeys(("plain", "rows_of"), "common.values"),
    "run": "python",
    "Upstream": "servers.upstream",
    "background": "common.tasks",
    "redact": "common.secrets",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in HELPERS:
            raise AttributeError(f"module 'sdg' has no attribute {name!r}")
        return getattr(importlib.import_module(f"sdg_plugins.{HELPERS[name]}"), name)


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


Usage = dict[str, int]  # tokens of a request as counted by the server, under the names in TOKENS
TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")
OVERLOADED = {429, 498, 503, 529, *range(520, 528), 530}  # 498 is Groq's, 529 Anthropic's, 520 to 530 Cloudflare's


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One completion. `choices` holds all completions of the request, this one first; `str(reply)` is its text."""

    text: str
    reasoning: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None  # of the whole request; only on the first choice, so that sums are right
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    truncated: bool = False  # the document in the prompt was cut to fit the model's context
    choices: tuple[Reply, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One row of the input, as a rollout sees it."""

    id: str
    text: str  # the prompt column; for a list of messages their contents, joined by blank lines
    messages: list[dict[str, Any]] | None  # the prompt column if it holds chats, else None
    index: int  # row number in the whole input
    _row: Callable[[], dict[str, Any]] = dataclasses.field(repr=False)

    @property
    def row(self) -> dict[str, Any]:
        """All columns of the input row as Python values. Built at each access, because most rollouts need none."""
        return self._row()

    if not TYPE_CHECKING:  # a checker of types finds it before

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a document has no `{name}`: the columns of its row are in `document.row`")

    def __getitem__(self, name: object) -> NoReturn:
        raise TypeError(f"a document is not a dict: use document.row[{name!r}]")


class Block(NamedTuple):
    """Rows returned by a reader: `batch` starts at row `row` of `file` (both only serve to name the rows)."""

    batch: pa.RecordBatch
    file: str
    row: int


class BadRow(NamedTuple):
    """Takes the place of one row that could not be read; its document fails with `reason`."""

    file: str
    row: int
    reason: str
    raw: str = ""  # the unreadable content, as far as it can be shown


class Reader(Protocol):
    """A source of rows, numbered from 0 across all its files.

    `seek`, `tell` and `read` are called in a thread, one at a time; `total` is called on the event loop and must not
    block. A reader may also have `source`, JSON that is recorded when a run begins: later processes of the run find it
    in `run.source` (for example a revision to stay with), and the dataset card quotes its `dataset`, `revision`,
    `license` and `language`.
    """

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of every batch. May be a plain attribute."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON that changes when the content changes, but not when it moves; part of the fingerprint. May be a plain
        attribute."""

    def seek(self, row: int, bookmark: str | None) -> None:
        """Continue at `row`. `bookmark` is what `tell` returned at this or an earlier row in some earlier process."""

    def tell(self) -> str | None:
        """Opaque bookmark for the current row, or None if bookmarks are not supported."""

    def read(self, rows: int) -> list[Block | BadRow]:
        """Return the next `rows` rows; fewer only at the end of the input."""

    def total(self) -> int | None:
        """Number of rows in the whole input, or an estimate that improves while reading; None if unknown."""

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """True if this input is the one with identity `earlier`, with rows added at its end."""


class Writer(Protocol):
    """Where chunks go. Called in threads, at most two at a time, each with another chunk.

    A writer may also have `write_pieces(chunk, schema, tables)`. It is called in place of `write` for chunks above
    32 MB, whose rows come as tables, one after the other. If it has `read_columns(chunk, names)`, `verify` reads only
    those columns of a file that is as it was written; names that the file does not have are ignored.
    """

    def write(self, chunk: Chunk, rows: pa.Table) -> None:
        """Make the chunk's file durable, whole or not at all. Called again after a crash, with the same result.

        Chunks without rows are not written; only if there are no rows at all, the first one is, at the end.
        """

    def read(self, chunk: Chunk) -> pa.Table | None:
        """The rows of a chunk that was written, None if its file is gone."""


Prompt = str | list[dict[str, Any]] | dict[str, Any]  # see `Generate`


class Generate(Protocol):
    """How a rollout sends requests to the model."""

    @property
    def index(self) -> int:
        """Which of --rollouts-per-document this is, from 0."""

    async def __call__(self, prompt: Prompt, *, to: str = "", **overrides: Any) -> Reply:
        """Send a prompt and return the reply. The document in it is cut if it does not fit the model's context.

        Args:
            prompt: a string (one user message), a list of chat messages, or a whole payload: with `messages` for the
                chat endpoint, with `prompt` for completions.
            to: the name of a further model, from `[models.NAME]` or --models; "" for the run's own.
            overrides: fields of the payload, such as `temperature=0.2` or `n=4`; they win over the command line.

        Raises:
            RequestFailed: the server refused the request, or all retries were used up.
        """

    async def raw(self, prompt: Prompt, *, to: str = "", **overrides: Any) -> tuple[Reply, bytes]:
        """Send a prompt and return the reply together with the server's JSON response."""

    async def post(self, path: str, payload: Mapping[str, Any], *, to: str = "") -> Any:
        """Send a payload to another endpoint, such as `/embeddings`, `/score` or `/rerank`, and return its JSON.

        Args:
            path: below the API root; one that begins with `/../` stands beside it.
            payload: as the server expects it; `model` is added if it is missing.
            to: as for a prompt.
        """


class PerRollout(NamedTuple):
    """Yielded by a resource that gives every rollout of a document its own value.

    Attributes:
        make: `make(document, generate)` is called when a rollout begins, and returns what the rollout gets. An
            exception fails only this rollout.
    """

    make: Callable[[Document, Generate], Any]


class HasFields(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class HasModel(Protocol):
    """A pydantic model, or anything that converts to JSON like one."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its fields as a dict; `mode="json"` asks for JSON values."""


Result = str | Mapping[str, Any] | Reply | HasFields | HasModel | list[Any] | None  # what a rollout may return


class Rollout(Protocol):
    """What a plugin registers under `register_rollouts`: an async function of a document."""

    def __call__(self, document: Document, generate: Generate, /, *args: Any, **resources: Any) -> Awaitable[Result]:
        """Process one document.

        Args:
            document: the input row.
            generate: sends requests to the model.
            resources: each further parameter names a resource, `run` among them; it may be absent if it has a default.

        Returns:
            A str, a dict, a `Reply`, a dataclass or a pydantic model: one result. A list of those: several results.
            None or an empty list: the document is filtered.
        """


@dataclasses.dataclass(slots=True)
class Chunk:
    """`count` rows of the input from row `start` on, for one output file. `index` counts chunks of the whole input."""

    index: int
    start: int
    count: int = 0
    bookmark: str | None = None
    written: bool = False
    filtered: tuple[int, ...] = ()  # positions in the chunk
    failed: tuple[int, ...] = ()
    size: int | None = None  # of its file in bytes, when it was written
    hash: str | None = None  # XXH3 of its file
    failed_hash: str | None = None  # and of the file of its failed documents
    digest: str | None = None  # of the rows that it is made of; see plugins/common/digests.py
    empty: int = 0  # documents without a text, which are among the failed

    @property
    def rows(self) -> int:
        """Rows in the chunk's file."""
        return self.count - len(self.filtered) - len(self.failed)


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """What plugins learn about the run."""

    options: argparse.Namespace
    plugins: Plugins
    output: Place
    state: Path
    stop: Callable[[BaseException], None]  # end the run early: rollouts get a moment, responses are saved
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)  # set when it ends early
    model: str = ""
    fingerprint: str = ""
    input_revision: str = ""
    edited: str = ""  # version of the plugin's code, if the run began with another one
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `Reader.source`
    source_schema: pa.Schema | None = None  # of the input, as recorded by an earlier process of this run
    schema: pa.Schema | None = None  # of the input, as it is now; set before resources are opened
    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # of this process; see `statistics`
    client: Client | None = None  # set once the servers are known
    models: dict[str, Run] = dataclasses.field(default_factory=dict)  # further ones, with their options and clients
    fitter: Fitter | None = None  # fits prompts to the model's context; set by its link of `wrap_requests`

    def path_of(self, chunk: Chunk) -> str:
        """The chunk's file, relative to the output."""
        numbers = {"rank": chunk.index % self.options.world_size, "chunk_index": chunk.index}
        return f"{self.options.output_config}/{_name_format(self.options.output_filename) % numbers}"

    def failed_path_of(self, chunk: Chunk) -> str:
        """The file of the chunk's failed documents, relative to the output."""
        return failed_path(self.options.output_config, chunk.index % self.options.world_size, chunk.index)


@functools.cache
def _name_format(template: str) -> str:
    """A template of file names as a format, which takes a tenth of the time for each of a million chunks."""
    return string.Template(template.replace("%", "%%")).substitute(rank="%(rank)05d", chunk_index="%(chunk_index)05d")


def failed_path(config: str, rank: int, chunk_index: int) -> str:
    """The file of a chunk's failed documents, relative to the output."""
    return f"{'failed' if config == 'data' else f'failed/{config}'}/{rank:05d}_{chunk_index:05d}.jsonl"


class Request:
    """One request on its way from a rollout to a server.

    Attributes:
        path: below the API root, such as `/chat/completions`.
        payload: the JSON body as Python values.
        body: `payload` as JSON.
        rollout: the run of a rollout that sends it; None outside of rollouts.
        to: the name of a further model; "" for the run's own.
    """

    __slots__ = ("body", "path", "payload", "rollout", "to")

    def __init__(
        self,
        path: str,
        payload: dict[str, Any],
        rollout: RolloutRun | None = None,
        body: bytes | None = None,
        to: str = "",
    ) -> None:
        self.path, self.payload, self.rollout, self.to = path, payload, rollout, to
        self.body = orjson.dumps(payload) if body is None else body

    def with_payload(self, payload: dict[str, Any]) -> Request:
        """The same request with another payload."""
        return Request(self.path, payload, self.rollout, to=self.to)


class Response(NamedTuple):
    """What came back for a request: the parsed reply, and the server's JSON."""

    reply: Reply
    body: bytes


Send = Callable[[Request], Awaitable[Response]]  # raises RequestFailed

# What plugins register; each may be a class or a function.
RowsOf = Callable[[Run], Iterator[Mapping[str, Any]]]  # a generator of rows: the simplest reader
WriteFile = Callable[[str, "pa.Table"], object]  # writes rows to the file with this path: the simplest writer
OpenReader = Callable[[Run], Reader]  # opens `run.options.input`, in a thread; raises InputError if it cannot be read
OpenWriter = Callable[[Run], Writer]  # opens the output, in a thread, before the server starts; raises OutputError
OpenResource = Callable[[Run], contextlib.AbstractAsyncContextManager[Any]]  # yields what rollouts get
OpenServer = Callable[[Run], contextlib.AbstractAsyncContextManager[Sequence["str | Upstream"]]]  # yields base URLs
Command = Callable[[list[str]], int]  # takes the arguments, returns the exit code

# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Error(Exception):
    """Ends the run with one line on stderr: what happened to which object, then the way out.

    Error
    ├── UsageError       2   an invalid option
    ├── InputError       1   the input cannot be read
    ├── PluginError      1   a plugin does not load, or breaks a rule
    ├── StateError       1   the state is locked, broken, or belongs to a different run
    ├── OutputError      1   the output cannot be written
    ├── ServerError      1   no server (Unreachable), no permission, no such model
    ├── TooManyFailures  3   above --max-failure-rate
    ├── BudgetSpent      4   --max-cost or --max-total-tokens is used up; run again with a larger one
    └── Interrupted    130, 143   by a signal; run again to resume

    `RequestFailed` stands beside it: it fails a document, not the run.
    """

    exit_code = 1
    said = False  # already printed on stderr, when it began to stop the run
    result: Any = None  # what was made before, for callers of `sdg.run`


class UsageError(Error):
    exit_code = 2


class InputError(Error):
    pass


class PluginError(Error):
    pass


class StateError(Error):
    pass


class OutputError(Error):
    pass


class ServerError(Error):
    pass


class Unreachable(ServerError):
    pass


class TooManyFailures(Error):
    exit_code = 3


class BudgetSpent(Error):
    exit_code = 4


class Interrupted(Error):
    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(
            f"interrupted by {signum.name}: completed responses are saved; run the same command again to resume"
        )
        self.exit_code = 130 if signum == signal.SIGINT else 143


class RequestFailed(Exception):
    """A request without a usable response. A rollout may catch it; otherwise its document fails.

    Attributes:
        cause: the HTTP status as text, or one of timeout, connection, aborted, body, empty, refusal, crash, context.
        status: the HTTP status, None if there was none.
        attempts: how often the request was sent.
        body: the server's response, if it refused the request.
        reply: what there was of a completion, with its reasoning, finish_reason and usage.
        refusal: the model's words, if it refused.
    """

    def __init__(self, cause: str, message: str, *, status: int | None = None, retry: bool = True) -> None:
        super().__init__(message)
        self.cause, self.status, self.retry, self.attempts = cause, status, retry, 1
        self.body = b""
        self.reply: Reply | None = None
        self.refusal: str | None = None
        self.retry_after: float | None = None  # s, as requested by the server
        self.most_attempts: int | None = None  # that are worth while; None: as many as --max-retries allows
        self.unreached = False  # no connection: the request cannot have had an effect
        self.account = False  # it says that the account cannot go on

    @property
    def overload(self) -> bool:
        """True if the server has no capacity, or the account no quota just now: not the request's fault."""
        return self.status in OVERLOADED

    @property
    def breaks_off(self) -> bool:
        """True if the failure looks like a server crash."""
        failing = self.status is not None and self.status >= 500 and not self.overload
        return self.cause in {"connection", "aborted"} or failing

    @property
    def details(self) -> dict[str, Any]:
        """What `failed/` records of the completion."""
        reply = self.reply
        known = reply and {"finish_reason": reply.finish_reason, "reasoning": reply.reasoning, "usage": reply.usage}
        return {name: value for name, value in {"refusal": self.refusal, **(known or {})}.items() if value}


class BadDocument(Exception):
    """The input row has no usable prompt."""


class BadResult(TypeError):
    """A rollout returned something that cannot be a row."""


def wrong_version(what: object, version: object) -> StateError:
    """The error for state that another version of sdg has written."""
    return StateError(
        f"state {what} has version {version}, this sdg writes version {STATE_VERSION}: "
        "finish the run with the sdg that began it, or start over with --fresh"
    )


def first_cause(exc: BaseException) -> BaseException:
    """The exception to report out of a group."""
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    leaves = [first_cause(part) for part in exc.exceptions]
    ranked = [leaf for kind in (Error, sqlite3.Error, Exception) for leaf in leaves if isinstance(leaf, kind)]
    return [*ranked, *leaves][0]


def one_line(value: object) -> str:
    """Text with every run of white space replaced by one space."""
    return " ".join(str(value).split())


def describe(exc: BaseException, file: str | None = None) -> str:
    """An exception in one line, with the place where it was raised: the deepest one in `file` if that is given."""
    try:
        text = one_line(exc) or "no message"
    except Exception:  # noqa: BLE001 - its own __str__ fails
        text = "no message"
    if isinstance(exc, SyntaxError):
        where = f" ({exc.filename}:{exc.lineno})" if exc.filename else ""
        return f"{type(exc).__name__}: {exc.msg}{where}"
    frames = traceback.extract_tb(exc.__traceback__)
    inside = [frame for frame in frames if frame.filename == file] or frames
    where = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    return f"{type(exc).__name__}: {text}{where}"


def reason_of(exc: OSError | sqlite3.Error) -> str:
    """Why a file operation failed, with the way out where there is one."""
    full = getattr(exc, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or (
        getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    )
    return "the disk is full: make room, then run the same command again" if full else one_line(exc)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggest close matches for an unknown name."""
    near = difflib.get_close_matches(name, known := sorted(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(known) or 'none'}"


def say(message: str) -> None:
    """Print a message on stderr, prefixed with `sdg: `, without tearing a progress bar."""
    text = hide(f"sdg: {message}")
    # Without a bar tqdm is not used: its lock does not tolerate signals, and a signal may arrive while it is imported.
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        if getattr(tqdm, "_instances", None):
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)
    except BrokenPipeError:  # as with `2>&1 | tee` after Ctrl-C: the reader is gone, but there is more to do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except (OSError, ValueError):  # a plugin has closed it
        pass


# ── Hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

hookspec = pluggy.HookspecMarker("sdg")
hookimpl = pluggy.HookimplMarker("sdg")

# Handed to the `register_*` hooks: `register(name, factory)`. The factory's docstring is its one-line help.
RegisterReaders = Callable[[str, OpenReader | RowsOf], None]
RegisterRollouts = Callable[[str, Rollout], None]
RegisterResources = Callable[[str, OpenResource], None]
RegisterWriters = Callable[[str, OpenWriter | WriteFile], None]
RegisterServers = Callable[[str, OpenServer], None]
RegisterCommands = Callable[[str, Command], None]


class Hooks:
    """The hook specifications. An implementation takes any subset of the arguments."""

    @hookspec
    def add_options(self, parser: Options) -> None:
        """Add command-line options to the plugin's own group of `--help`: `parser.add_argument(…)` as in `argparse`.

        Options of plugins that register the rollout or the reader in use, or have `wrap_requests`, are part of the
        run's fingerprint, unless they are added with `identity=False`. Those of a plugin whose rollouts, readers,
        writers and servers are not in use are refused. An exception ends the program and names the plugin.
        """

    @hookspec
    def register_readers(self, register: RegisterReaders) -> None:
        """Register `open_reader(run) -> Reader` under a URI scheme (`hf`) or a file suffix without its dot (`csv`).

        A generator function that yields dicts will do: its first 1,000 rows decide on the columns and identify the
        input, and seeking skips rows.

        `open_reader`, `seek`, `tell` and `read` run in threads, one call at a time; an exception there ends the run.
        """

    @hookspec
    def register_rollouts(self, register: RegisterRollouts) -> None:
        """Register `async rollout(document, generate, **resources)`.

        It runs on the event loop, many at a time. It returns the result: a str, a dict, a `Reply`, a dataclass or a
        pydantic model, a list of those, or None to filter the document. An exception fails only this rollout.
        """

    @hookspec
    def register_resources(self, register: RegisterResources) -> None:
        """Register an async context manager `resource(run)`, for rollouts that have a parameter of that name.

        It is entered once per run, before the first document, and left after the last one. An exception ends the run.
        If it yields `PerRollout(make)`, each rollout of a document gets its own value, `make(document, generate)`.
        """

    @hookspec
    def register_writers(self, register: RegisterWriters) -> None:
        """Register `open_writer(run) -> Writer` under a URI scheme or a file suffix without its dot.

        A function of two parameters, a path and an Arrow table, will do: it writes one file.

        `open_writer` runs in a thread, before the server starts. For a scheme that has a writer, `run.output` is a
        folder in the state, and the plugin publishes what the writer puts there. The writer runs in threads; an
        exception ends the run, and all responses are kept.
        """

    @hookspec
    def register_servers(self, register: RegisterServers) -> None:
        """Register an async context manager `server(run)` that yields a list of base URLs, or of `Upstream`s.

        It is entered before the first request and left after the last one, whatever ended the run. A server that the
        plugin launches is an `Upstream`: through it the engine learns when it is up and when it has crashed. An empty
        list means that there is nothing to do here, because this process was part of another process's server.
        """

    @hookspec
    def register_commands(self, register: RegisterCommands) -> None:
        """Register `main(argv) -> int`, run as `sdg.py NAME ARGUMENTS`; its result is the exit code."""

    @hookspec
    def wrap_requests(self, run: Run, send: Send) -> Send:  # type: ignore[empty-body]
        """Return `async send(request) -> Response`: all requests of rollouts pass it, and it calls the `send` given.

        Called once per run and for each further model, after the servers are known; `run` is then the model's, with its
        own options, counts and client. Responses that are already stored do not pass. Links of
        plugins that are loaded later are nearer to the rollout; `@sdg.hookimpl(trylast=True)` puts one nearest to the
        server. A `RequestFailed` that it raises fails the request, any other exception the document.
        """

    @hookspec
    def observe(self, run: Run) -> contextlib.AbstractAsyncContextManager[None] | None:
        """Return an async context manager that is entered before the first document and left when the run has ended.

        The server has stopped by then, so that no GPU is held; the exception that ended the run is raised here. An
        exception of the context manager itself ends the run.
        """

    @hookspec
    def chunk_written(self, run: Run, chunk: Chunk) -> None:
        """Learn that a chunk is durable. Called in a thread; an exception is reported and changes nothing."""


# ── Plugins ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Entry(NamedTuple):
    """One registered name."""

    factory: Callable[..., Any]
    plugin: str  # the module that registered it
    version: str  # of the package or file it comes from
    package: str = ""  # name of a distribution, a module or a file

    @property
    def help(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]


class Plugins:
    """The loaded plugins, and the names that they registered: `plugins.rollouts["summarize"]`."""

    kinds = ("readers", "rollouts", "resources", "writers", "servers", "commands")

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("sdg")
        self.manager.add_hookspecs(Hooks)
        self.quiet = False  # observers are not called, because the output is not kept
        self.readers: dict[str, Entry] = {}
        self.rollouts: dict[str, Entry] = {}
        self.resources: dict[str, Entry] = {"run": Entry(_run_resource, "sdg", __version__, "sdg")}
        self.writers: dict[str, Entry] = {}
        self.servers: dict[str, Entry] = {}
        self.commands: dict[str, Entry] = {}
        self.versions: dict[str, str] = {}  # of modules, by their names

    @classmethod
    def load(cls, specs: Iterable[str]) -> tuple[Plugins, str | None]:
        """Load the bundled plugins, those of installed packages, then `specs` as given to `--plugin`.

        Returns:
            The plugins, and the name of the rollout given by the last of `specs` that has any; None if none has.
        """
        from sdg_plugins.common import loading

        plugins = cls()
        loading.add_bundled(plugins)
        loading.add_installed(plugins)
        named = [(spec, *loading.add_named(plugins, spec)) for spec in specs]
        spec, rollout, _ = next((one for one in reversed(named) if one[2]), ("", None, []))
        if rollout == "":
            raise UsageError(f"--plugin {spec} registers several rollouts: name one as {spec}:NAME")
        return plugins, rollout

    def add(self, module: types.ModuleType, version: str, package: str = "") -> None:
        """Register a module's hooks and, through them, its names; `version` is that of `package`."""
        name = module.__name__
        if self.manager.has_plugin(name):
            return
        _check_hooks(module)
        self.versions[name] = version
        self.manager.register(module, name)
        for kind in self.kinds:
            if hasattr(module, f"register_{kind}"):
                register = functools.partial(self._register, kind, (name, version, package or name))
                self.call_one(f"register_{kind}", module, register=register)

    def find(self, kind: str, name: str) -> Entry:
        """The entry of a name, or a `UsageError` that suggests close matches."""
        entries: dict[str, Entry] = getattr(self, kind)
        if name in entries:
            return entries[name]
        if kind == "commands" and (
            option := importlib.import_module("sdg_plugins.common.loading").option_for(name, self)
        ):
            raise UsageError(f"unknown command {name!r}; did you mean {option} {name}?")
        raise UsageError(f"unknown {kind[:-1]} {name!r}; {nearest(name, entries, cutoff=0.5)}")

    def resources_of(self, rollout: str) -> dict[str, Entry]:
        """The resources that a rollout has parameters for."""
        parameters = list(inspect.signature(self.rollouts[rollout].factory).parameters)[2:]
        return {name: self.resources[name] for name in parameters if name in self.resources}

    def calls(self, hook: str, **arguments: Any) -> Iterator[tuple[pluggy.HookImpl, Callable[[], Any]]]:
        """Each implementation of a hook, with its call bound to those of the arguments that it takes."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            yield impl, functools.partial(impl.function, *[arguments[name] for name in impl.argnames])

    def call_one(self, hook: str, plugin: object, **arguments: Any) -> None:
        """Call one plugin's implementation of a hook; pluggy's own call could not name the plugin that failed."""
        for impl, call in self.calls(hook, **arguments):
            if impl.plugin is plugin:
                with at_work(f"plugin {impl.plugin_name}: {hook}", plugin, argparse.ArgumentError):
                    call()

    def linked(self, run: Run) -> Send:
        """The client's `send` with the links of all plugins around it; see the hook `wrap_requests`."""
        assert run.client
        send: Send = run.client.send
        for impl in self.manager.hook.wrap_requests.get_hookimpls():
            arguments = {"run": run, "send": send}
            with at_work(f"plugin {impl.plugin_name}: wrap_requests", impl.plugin):
                send = cast("Send", impl.function(*[arguments[name] for name in impl.argnames]))
            if not callable(send):
                raise PluginError(f"plugin {impl.plugin_name}: wrap_requests returned {send!r}, not a function")
        if not run.models:
            return send
        chains = {"": send, **{name: self.linked(model) for name, model in run.models.items()}}
        return lambda request: chains[request.to](request)

    def _register(self, kind: str, of: tuple[str, str, str], name: str, factory: Callable[..., Any]) -> None:
        entries: dict[str, Entry] = getattr(self, kind)
        plugin = of[0]
        if name in entries:
            both = f"plugins {entries[name].plugin} and {plugin} both register the {kind[:-1]} {name!r}"
            raise PluginError(f"{both}: rename one of them")
        if not callable(factory):
            expected = {
                "rollouts": "an async function",
                "resources": "a function that makes an async context manager (@contextlib.asynccontextmanager)",
            }.get(kind, "a function or a class")
            raise PluginError(
                f"plugin {plugin}: the {kind[:-1]} {name!r} is a {type(factory).__name__}, expected {expected}"
            )
        entries[name] = Entry(importlib.import_module("sdg_plugins.common.simple").adapted(kind, factory), *of)


def _check_hooks(module: types.ModuleType) -> None:
    """Raise PluginError if a function marked with `@sdg.hookimpl` is not a hook, or takes unknown arguments."""
    known = {name: hook for name, hook in vars(Hooks).items() if not name.startswith("_")}
    for name, function in vars(module).items():
        if not inspect.isroutine(function) or not hasattr(function, "sdg_impl"):
            continue
        takes = list(inspect.signature(known[name]).parameters)[1:] if name in known else []
        wrong = [parameter for parameter in inspect.signature(function).parameters if parameter not in takes]
        if name in known and not wrong:
            continue
        where = f"plugin {module.__name__}: {name}{place_of(function)}"
        if name not in known:
            raise PluginError(f"{where} is not a hook; {nearest(name, known)}")
        raise PluginError(f"{where} has unknown parameter {' and '.join(wrong)}; available: {', '.join(takes)}")


@contextlib.contextmanager
def at_work(what: str, plugin: object = None, *through: type[Exception]) -> Iterator[None]:
    """Turn an exception in a plugin's code into a PluginError that says where it happened.

    Args:
        what: what was being done, for the message.
        plugin: something that the plugin defines: its file is where the place is looked for.
        through: types of exceptions that are left alone.
    """
    try:
        yield
    except (Error, *through):  # type: ignore[misc]
        raise
    except (Exception, SystemExit) as exc:
        raise PluginError(f"{what} failed: {describe(exc, file_of(plugin))}") from exc


def file_of(thing: Any) -> str | None:
    """The file of a module, or of what defines a function, a class or an object; None if unknown."""
    if not isinstance(thing, types.ModuleType):
        thing = sys.modules.get(getattr(thing, "__module__", None) or type(thing).__module__)
    return getattr(thing, "__file__", None)


def place_of(thing: Any) -> str:
    """` (FILE:LINE)` of the definition of a function, a class or an object's class; "" if unknown."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    try:
        if code := getattr(thing, "__code__", None):
            return f" ({code.co_filename}:{code.co_firstlineno})"
        kind = thing if isinstance(thing, type) else type(thing)
        return f" ({inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]})"
    except (OSError, TypeError):  # no source, as in an interactive session
        return ""


def exec_file(name: str, path: Path, folder: Path | None = None) -> types.ModuleType:
    """Run a file as the module `name`; with `folder` it is a package of the modules there."""
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(folder)] if folder else None
    )
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _bundled_package() -> None:
    """Make the package `sdg_plugins` importable.

    In a checkout it is the folder `plugins/` beside this file, even if an older wheel is installed as well.
    """
    here = Path(__file__).resolve().parent
    if "sdg_plugins" not in sys.modules and not (here / "sdg_plugins").is_dir():
        exec_file("sdg_plugins", here / "plugins" / "__init__.py", here / "plugins")


def begin_process(specs: list[str], module: str, function: str) -> None:
    """Set up a spawned process: load the plugins, so that their functions can be unpickled, and call a function."""
    Plugins.load(specs)
    getattr(importlib.import_module(module), function)()


@contextlib.asynccontextmanager
async def _run_resource(run: Run) -> AsyncIterator[Run]:
    """The run itself, for rollouts that have options of their own."""
    yield run


# ── Store ────────────────────────────────────────────────────────────────────────────────────────────────────────────

TABLES = """
    CREATE TABLE IF NOT EXISTS chunks (
        chunk INTEGER PRIMARY KEY, start INTEGER, count INTEGER, bookmark TEXT,
        written INTEGER, filtered TEXT, failed TEXT, size INTEGER, hash TEXT, failed_hash TEXT, digest TEXT, empty INT);
    -- id = chunk << 32 | position: a chunk is one range of the tree
    CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY, status TEXT, body TEXT);
    CREATE TABLE IF NOT EXISTS requests (document INTEGER, key BLOB, body TEXT);
    CREATE INDEX IF NOT EXISTS requests_by_document ON requests (document);
    CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value REAL);
"""


class Store:
    """The state of one rank: responses and finished documents of open chunks, all chunks, totals.

    Responses and outcomes are handed in without waiting; one task commits them in groups. A finished document
    supersedes its requests: those still waiting for their commit are then never written.
    """

    def __init__(self, db: aiosqlite.Connection, counts: Counter[str]) -> None:
        self._db, self._counts = db, counts
        # Advances only with work: a process that finds everything done must not change the figures on the card.
        self._started = self._worked_until = time.monotonic()
        self._chunks: list[Chunk] = []
        self._documents: list[tuple[int, str, bytes]] = []
        self._requests: dict[int, list[tuple[bytes, bytes]]] = {}
        self._handed = self._durable = 0  # how many of these there ever were
        self.unsaved: Counter[str] = Counter()  # number of responses that are not durable; bytes, with outcomes
        self._oldest: float | None = None  # time since which something is not
        self._dirty, self._hurry = asyncio.Event(), asyncio.Event()
        self._committed = asyncio.Event()  # set after the next commit, and replaced
        self._closing = False
        self._problem: Exception | None = None  # of the last commit
        self.base: Counter[str] = Counter()  # totals of earlier processes
        self._saved: Counter[str] = Counter()  # totals that are durable
        self._in_files = -1, (0, 0, 0, 0)  # rows that had been changed then; see `in_files`
        self.most_answers = 500  # that a crash may lose, beside those in flight
        self.on_durable: Callable[[list[int]], None] = lambda ids: None
        self.on_failure: Callable[[Exception], None] = lambda exc: None
        self.on_room: Callable[[], None] = lambda: None  # fewer bytes are unsaved than before

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, counts: Counter[str], confirm: Callable[[], object] = bool) -> AsyncIterator[Store]:
        """Open the state file and commit what is handed in; the last commit is made on the way out.

        `confirm` is called when the file is open: what raises there keeps this process from writing.

        Raises:
            StateError: the file has another version.
            sqlite3.Error: the file is broken, or the last commit failed.
        """
        async with _database(path) as db:
            confirm()
            store = cls(db, counts)
            await store._prepare(path)
            async with asyncio.TaskGroup() as tasks:
                committing = tasks.create_task(store._commit_forever())
                try:
                    yield store
                finally:
                    store._closing = True
                    store._dirty.set()
                    store._hurry.set()
                    await asyncio.wait([committing])

    async def _prepare(self, path: Path) -> None:
        async with self._db.execute("PRAGMA user_version") as cursor:
            (version,) = await cursor.fetchone() or (0,)
        if version not in {0, STATE_VERSION}:
            raise wrong_version(path, version)
        from sdg_plugins.common.database import pragmas_for

        for pragma in pragmas_for(path):
            await self._db.execute(f"PRAGMA {pragma}")
        await self._db.executescript(TABLES + f"PRAGMA user_version={STATE_VERSION};")
        async with self._db.execute("PRAGMA table_info(chunks)") as cursor:
            columns = {row[1] for row in await cursor.fetchall()}
        for column in ("size INTEGER", "hash TEXT", "failed_hash TEXT", "digest TEXT", "empty INT DEFAULT 0"):  # new
            if column.split()[0] not in columns:
                await self._db.execute(f"ALTER TABLE chunks ADD COLUMN {column}")
        async with self._db.execute("SELECT name, value FROM totals") as cursor:
            self.base = self._saved = Counter({name: value async for name, value in cursor})

    # Handing in

    def opened(self, chunk: Chunk) -> None:
        """A chunk was read."""
        self._chunks.append(dataclasses.replace(chunk))
        self._handed_in()

    def answered(self, document: int, key: bytes, body: bytes) -> None:
        """A request of a document has its response."""
        self._requests.setdefault(document, []).append((key, body))
        self.unsaved["number"] += 1
        self.unsaved["bytes"] += len(body)
        if 4 * self.unsaved["number"] > self.most_answers:  # so that requests need not wait for `room`
            self._hurry.set()
        self._handed_in()

    def finished(self, document: int, status: str, body: bytes) -> None:
        """A document is final: status row, filtered, failed or empty; body is JSON."""
        self.unsaved["bytes"] += len(body) - sum(len(answer) for _, answer in self._requests.pop(document, ()))
        self._documents.append((document, status, body))
        self._handed_in()

    def _handed_in(self) -> None:
        self._worked_until = now = time.monotonic()
        if self._oldest is None:
            self._oldest = now
        self._handed += 1
        self._dirty.set()

    @property
    def crowded(self) -> bool:
        """True if more is handed in than the disk accepts: a crash must not cost too many responses."""
        answers, age = self.unsaved, self._worked_until - (self._oldest or self._worked_until)
        few = answers["number"] < self.most_answers and answers["bytes"] < MOST_UNSAVED and age < LONGEST_UNSAVED
        return not few or len(self._documents) > 20_000

    async def room(self) -> None:
        """Wait until the store is no longer crowded, or cannot store anything."""
        self._hurry.set()
        while self.crowded and not self._problem:
            await self._committed.wait()

    async def flush(self) -> None:
        """Wait until everything handed in so far is durable. Raises what keeps it from becoming so."""
        handed = self._handed
        self._dirty.set()
        self._hurry.set()
        while self._durable < handed and not self._problem:
            await self._committed.wait()
        if self._problem:
            raise self._problem

    # Committing

    async def _commit_forever(self) -> None:
        while not self._closing:
            await self._dirty.wait()
            self._dirty.clear()
            self._hurry.clear()
            try:
                await self._commit()
                self._problem = None
            except Exception as exc:  # noqa: BLE001 - it is raised by the last commit, if it lasts
                self._problem = exc
                self._dirty.set()
                self.on_failure(exc)
            committed, self._committed = self._committed, asyncio.Event()
            committed.set()
            if not self._closing:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), 0.5 if self._problem else COMMIT_INTERVAL)
        await self._commit()

    async def _commit(self) -> None:
        # There is no await between these lines: the totals belong to exactly these rows.
        chunks, documents, requests = self._chunks, self._documents, self._requests
        self._chunks, self._documents, self._requests = [], [], {}
        totals, handed = self.totals(), self._handed
        taken, began = self.unsaved.copy(), time.monotonic()
        answers = [(document, *answer) for document, own in requests.items() for answer in own]
        rows = {"chunks": [_chunk_row(chunk) for chunk in chunks], "documents": documents, "requests": answers}
        try:
            if handed > self._durable or totals != self._saved:
                await self._save({**rows, "totals": list(totals.items())})
        except BaseException:  # they wait for the next attempt
            self._chunks, self._documents = chunks + self._chunks, documents + self._documents
            self._requests = {i: requests.get(i, []) + self._requests.get(i, []) for i in requests | self._requests}
            raise
        self._durable, self._saved = handed, totals
        self.unsaved.subtract(taken)
        self._oldest = began if self._handed > handed else None
        self.on_room()
        self.on_durable([document for document, _, _ in documents])

    async def _save(self, rows: Mapping[str, list[tuple[Any, ...]]], *statements: tuple[str, Sequence[Any]]) -> None:
        """Insert rows by table, then execute statements: all or nothing."""
        from sdg_plugins.common.database import transact

        await transact(self._db, rows, statements)

    async def written(self, chunk: Chunk) -> None:
        """The chunk's file is durable: record that, and drop the documents and responses it was made of."""
        span = (chunk.index << 32, (chunk.index + 1) << 32)
        documents = ("DELETE FROM documents WHERE id >= ? AND id < ?", span)
        requests = ("DELETE FROM requests WHERE document >= ? AND document < ?", span)
        await self._save({"chunks": [_chunk_row(chunk)]}, documents, requests)

    async def lost(self, chunks: list[int]) -> None:
        """Make written chunks open again, whose rows are nowhere any more."""
        sql = """UPDATE chunks SET written = 0, filtered = '[]', failed = '[]'
                 WHERE chunk IN (SELECT value FROM json_each(?))"""
        await self._save({}, (sql, (json.dumps(chunks),)))

    async def reopen(self, chunk: Chunk, outcomes: Iterable[tuple[int, str, bytes]]) -> None:
        """Make a written chunk open again, with the documents that stay as they are."""
        documents = [(chunk.index << 32 | i, status, body) for i, status, body in outcomes]
        await self._save({"documents": documents, "chunks": [_chunk_row(chunk)]})

    # Queries

    def totals(self) -> Counter[str]:
        """Counters over all processes of this rank so far."""
        return self.base + self._counts + Counter({"seconds": self._worked_until - self._started})

    async def chunks(self) -> dict[int, Chunk]:
        """All chunks that were ever read, by index."""
        async with self._db.execute("SELECT * FROM chunks ORDER BY chunk") as cursor:
            return {row[0]: chunk_of(row) async for row in cursor}

    async def tally(self) -> Counter[str]:
        """How many documents are a row, filtered, failed, or without a text, which are failed as well."""
        every, filtered, failed, empty = await self.in_files()
        async with self._db.execute("SELECT status, count(*) FROM documents GROUP BY status") as cursor:
            tally = Counter({status: number async for status, number in cursor})
        written = {"row": every - filtered - failed, "filtered": filtered, "failed": failed - empty, "empty": empty}
        return tally + Counter(written)

    async def in_files(self) -> tuple[int, int, int, int]:
        """Documents in written chunks; how many of them are filtered and failed, and how many of these are empty."""
        if self._in_files[0] != (changed := self._db.total_changes):  # of a million chunks it takes a while
            gone = "total(CASE {0} WHEN '[]' THEN 0 ELSE json_array_length({0}) END)"
            sums = f"total(count), {gone.format('filtered')}, {gone.format('failed')}, total(empty)"
            async with self._db.execute(f"SELECT {sums} FROM chunks WHERE written") as cursor:
                ((every, filtered, failed, empty),) = await cursor.fetchall()
            self._in_files = changed, (int(every), int(filtered), int(failed), int(empty))
        return self._in_files[1]

    async def finished_in(self, chunk: Chunk) -> dict[int, str]:
        """Positions and statuses of a chunk's final documents."""
        sql = "SELECT id & 0xffffffff, status FROM documents WHERE id >= ? AND id < ?"
        async with self._db.execute(sql, (chunk.index << 32, (chunk.index + 1) << 32)) as cursor:
            return {row[0]: row[1] async for row in cursor}

    async def answers_to(self, document: int) -> dict[bytes, bytes]:
        """Durable responses of one unfinished document, by key."""
        async with self._db.execute("SELECT key, body FROM requests WHERE document = ?", (document,)) as cursor:
            return {row[0]: row[1] async for row in cursor}

    async def bytes_of(self, chunk: Chunk) -> int:
        """Bytes of the results and failures of a chunk."""
        sql = "SELECT total(length(body)) FROM documents WHERE id >= ? AND id < ?"
        async with self._db.execute(sql, (chunk.index << 32, (chunk.index + 1) << 32)) as cursor:
            ((size,),) = await cursor.fetchall()
        return int(size)

    async def outcomes_of(self, chunk: Chunk) -> list[bytes]:
        """A chunk's documents as JSON lists of [position, status, body], a thousand in each, fewer if they are large.

        SQLite builds each list in one step, without the GIL.
        """
        first = chunk.index << 32
        lists = []
        for start in range(first, first + chunk.count, 1000):
            lists += await self.outcomes_between(start, min(start + 1000, first + chunk.count))
        return lists

    def in_pieces(self, chunk: Chunk, size: int) -> Iterator[bytes]:
        """The lists of `outcomes_of`, a few documents at a time; for a thread, while the event loop goes on.

        Args:
            chunk: a complete one.
            size: from `bytes_of`.
        """
        step = 1 << max(1, min(PIECE, PIECE_BYTES * chunk.count // max(1, size))).bit_length() - 1  # rarely another one
        loop, first = asyncio.get_running_loop(), chunk.index << 32
        ids = range(first, first + chunk.count)

        def fetched(start: int) -> list[bytes]:
            fetching = self.outcomes_between(start, min(start + step, ids.stop))
            return asyncio.run_coroutine_threadsafe(fetching, loop).result(60)  # unless the loop waits for this thread

        return (text for start in ids[::step] for text in fetched(start))

    async def outcomes_between(self, first: int, end: int) -> list[bytes]:
        """Such lists of the documents with these IDs."""
        sql = """SELECT '[' || group_concat('[' || (id & 0xffffffff) || ',"' || status || '",' || body || ']') || ']'
                 FROM (SELECT * FROM documents WHERE id >= ? AND id < ? ORDER BY id)"""
        try:
            async with self._db.execute(sql, (first, end)) as cursor:
                ((text,),) = await cursor.fetchall()
        except sqlite3.DataError:  # longer than a gigabyte, SQLite's limit for one value
            if end - first == 1:
                raise
            middle = (first + end) // 2
            return await self.outcomes_between(first, middle) + await self.outcomes_between(middle, end)
        return [text if isinstance(text, bytes) else text.encode()] if text else []


@contextlib.asynccontextmanager
async def _database(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    """A connection. It is closed even if it is canceled while opening: its thread would outlive the loop."""
    import aiosqlite

    # Each statement that sqlite3 keeps for later also keeps the values that were last bound to it: megabytes.
    connecting = asyncio.ensure_future(aiosqlite.connect(path, iter_chunk_size=4096, timeout=60, cached_statements=0))
    try:
        yield await asyncio.shield(connecting)
    finally:
        await (await connecting).close()


def _chunk_row(chunk: Chunk) -> tuple[Any, ...]:
    *first, filtered, failed, size, hash_, failed_hash, digest, empty = dataclasses.astuple(chunk)
    return (*first, json.dumps(filtered), json.dumps(failed), size, hash_, failed_hash, digest, empty)


def chunk_of(row: Sequence[Any]) -> Chunk:
    """The chunk in a row of the table `chunks`."""
    index, start, count, bookmark, written, *gone = row[:7]
    lists: list[Any] = [() if text == "[]" else tuple(json.loads(text)) for text in gone]
    return Chunk(index, start, count, bookmark, bool(written), *lists, *row[7:], *(*[None] * 4, 0)[len(row) - 7 :])


# ── Rollouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Outcome = list[dict[str, Any]] | dict[str, Any]  # results, or what failed: {error, error_type, attempts}


def sampling(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """The fields that every payload begins with."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return {"model": model, **given, **(options.generation or {})}


class RolloutRun:
    """One rollout of one document, or of a part of it: it is the `generate` that the rollout is given.

    Attributes:
        reasons: the finish_reason of each reply.
        room: tokens that a part may have; set by a link of `wrap_requests` if the document must be run in parts.
        final: True once the rollout has ended: what it left behind is canceled.
    """

    __slots__ = (
        *("_answers", "_branches", "_engine", "_key", "_ordinals", "_part", "attempts", "document", "final", "index"),
        *("asked", "interrupted", "reasons", "room", "truncated", "usage"),
    )

    def __init__(
        self, engine: Engine, document: Document, key: int, index: int, answers: dict[bytes, bytes], part: str = ""
    ) -> None:
        self._engine, self.document, self._key, self.index, self._answers = engine, document, key, index, answers
        self._part = part  # ".1" is the second part, ".1.0" the first part of that
        self._ordinals: dict[bytes, int] = {}  # of the last of equal requests: each of them is another sample
        self._branches: set[asyncio.Task[Any]] = set()  # tasks that wait for a response
        self.asked: list[list[Any]] = []  # the payload and the reply of each request, with --keep-messages
        self.attempts = 0
        self.interrupted = self.final = self.truncated = False
        self.reasons: list[str | None] = []  # to finish, of all replies
        self.room: int | None = None
        self.usage: Usage | None = None

    async def __call__(self, prompt: Prompt, *, to: str = "", **overrides: Any) -> Reply:
        """See `Generate`."""
        reply, _ = await self.raw(prompt, to=to, **overrides)
        return reply

    async def post(self, path: str, payload: Mapping[str, Any], *, to: str = "") -> Any:
        """See `Generate`."""
        if not path.startswith("/"):
            raise BadResult(f"generate.post({path!r}): expected a path below the API root, such as /embeddings")
        model = self._engine.model(to).model
        return orjson.loads((await self._ask(path, {"model": model, **payload}, to)).body)

    async def raw(self, prompt: Prompt, *, to: str = "", **overrides: Any) -> tuple[Reply, bytes]:
        """See `Generate`."""
        path, payload = self._engine.payload(prompt, overrides, self.index, to)
        reply, answer = await self._ask(path, payload, to)
        n = payload.get("n")
        if isinstance(n, int) and n > 1 and (missing := self._engine.client_of(to).missing(answer, n)):
            single = {name: value for name, value in payload.items() if name != "n"}
            step = self._engine.run.options.rollouts_per_document
            seeds = [{"seed": payload["seed"] + (n - i) * step} if "seed" in payload else {} for i in range(missing)]
            more = await asyncio.gather(*[self._ask(path, single | seed, to) for seed in seeds])
            return self._engine.client_of(to).together([answer, *(body for _, body in more)])
        return reply, answer

    async def _ask(self, path: str, payload: dict[str, Any], to: str) -> Response:
        """The response to a payload: stored by an earlier process, or from a server."""
        if self.final:  # a branch that the rollout has left behind
            raise asyncio.CancelledError
        asked: list[Any] = [payload]
        if self._engine.run.options.keep_messages:
            self.asked.append(asked)
        try:
            request = Request(path, payload, self, to=to)
        except TypeError as exc:
            raise BadDocument(f"the prompt cannot be sent: {exc}") from exc
        digest = xxhash.xxh3_128(request.body)
        digest.update(f"{path}\0{self.index}{self._part}\0{self.document.id}".encode(errors="surrogatepass"))
        digest.update(to.encode())
        same = digest.digest()
        ordinal = self._ordinals[same] = self._ordinals.get(same, -1) + 1
        key = same + ordinal.to_bytes(4, "big")
        response = self._stored(key, request)
        if response is None:
            if ordinal and isinstance(payload.get("seed"), int):  # otherwise the server would return the same sample
                seed = payload["seed"] + ordinal * self._engine.run.options.rollouts_per_document
                request = request.with_payload({**payload, "seed": seed})
            response = await self._send(request, key)
        reply = response.reply
        asked.append(reply)
        self.attempts += 1
        self.truncated |= reply.truncated
        self.reasons.append(reply.finish_reason)
        if reply.usage:
            self.usage = dict(Counter(self.usage) + Counter(reply.usage)) if self.usage else reply.usage
        return response

    def _stored(self, key: bytes, request: Request) -> Response | None:
        """The stored response of a key; None if there is none, or none that is worth anything."""
        if key not in self._answers:
            return None
        try:
            reply = self._engine.client_of(request.to).parse(self._answers[key], request.path)
        except RequestFailed:  # an earlier version of sdg has stored what this one asks for again
            return None
        self._engine.run.counts["cache_hits"] += 1
        return Response(reply, self._answers[key])

    async def _send(self, request: Request, key: bytes) -> Response:
        branch = self._task()
        self._branches.add(branch)
        try:
            if self._engine.store.crowded:
                await self._engine.store.room()
            response = await self._engine.send(request)
        except asyncio.CancelledError:
            self.interrupted = True
            raise
        finally:
            self._branches.discard(branch)
        if not self.final:  # otherwise the rollout has ended without waiting for this response
            self._engine.store.answered(self._key, key, response.body)
        return response

    async def run(self) -> Outcome:
        """The results, or what failed. Canceled if the run is stopping: whatever the rollout made of that is void."""
        engine = self._engine
        try:
            ends = self._answers.get(self._parts_key)
            outcome = await self._outcome() if ends is None else []
            if ends is not None or self.room is not None:
                assert engine.run.fitter
                outcome = await engine.run.fitter.run_parts(self, None if ends is None else orjson.loads(ends))
        finally:
            self.final = True
            for branch in self._branches:  # as `gather` leaves them when one has failed: nothing awaits their responses
                branch.cancel()
        if engine.crew.left_by(self._task()):
            await engine.crew.take_back_cancellation()
        if engine.crew.cut_off or (self.interrupted and engine.stopping):
            raise asyncio.CancelledError  # the next process runs it again
        return outcome

    def _task(self) -> asyncio.Task[Any]:
        task = asyncio.current_task(self._engine.loop)  # it would look for the loop with a system call
        assert task
        return task

    @property
    def _parts_key(self) -> bytes:
        return f"parts of {self.index}{self._part}".encode()

    def parts(self, documents: list[Document], ends: list[int]) -> list[RolloutRun]:
        """The same rollout of each part; where they end is stored before anything is sent, for later processes."""
        if self._parts_key not in self._answers:
            self._engine.store.answered(self._key, self._parts_key, orjson.dumps(ends))
        same = (self._key, self.index, self._answers)
        return [RolloutRun(self._engine, part, *same, f"{self._part}.{i}") for i, part in enumerate(documents)]

    async def _outcome(self) -> Outcome:
        engine = self._engine
        try:
            own = {name: make(self.document, self) for name, make in engine.makers.items()}
            returned = await engine.rollout(self.document, self, **engine.resources, **own)
            results = engine.outlet.results_in(returned, self.usage)
            common: dict[str, Any] = {"truncated": self.truncated}
            if self.reasons:
                common["finish_reason"] = engine.client.worst(self.reasons)
            return engine.outlet.with_messages([{**common, **result} for result in results], self.asked)
        except BaseException as exc:
            if engine.crew.cut_off or (self.interrupted and engine.stopping):
                raise
            return self._failure(first_cause(exc))  # a TaskGroup raises groups

    def _failure(self, exc: BaseException) -> dict[str, Any]:
        if isinstance(exc, Error):
            self._engine.run.stop(exc)
            raise asyncio.CancelledError from exc
        if isinstance(exc, RequestFailed):
            return {"error": str(exc), "error_type": "RequestFailed", "attempts": exc.attempts, **exc.details}
        if isinstance(exc, BadDocument):
            return {"error": str(exc), "error_type": "BadDocument", "attempts": 0}
        error = self._engine.client.secrets.hidden_in(describe(exc, self._engine.rollout_file))
        kind = type(exc).__name__
        if isinstance(exc, BadResult):
            error, kind = f"{exc}{place_of(self._engine.rollout)}", "TypeError"
        if isinstance(exc, dataclasses.FrozenInstanceError):
            error += "; a document is read-only: use a variable for the prompt, and return what is new"
        details = getattr(exc, "details", {})  # what an exception has for `failed/`, such as the model's last answer
        return {"error": error, "error_type": kind, "attempts": max(1, self.attempts), **details}


# ── Engine ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def announce(run: Run, chunk: Chunk) -> None:
    """Call the hook `chunk_written`."""
    if run.plugins.quiet:
        return
    for impl, call in run.plugins.calls("chunk_written", run=run, chunk=chunk):
        try:
            call()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - the chunk is durable, whatever an observer does
            say(f"plugin {impl.plugin_name}: chunk_written failed: {describe(exc)}")


class Failures:
    """The documents that failed in this process.

    Attributes:
        documents: their number.
        reasons: how often each reason occurred; digits are replaced, so that equal reasons count together.
        examples: one full text of each reason.
        recent: whether each of the last documents failed.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.recent: deque[bool] = deque(maxlen=RECENT)

    def note(self, error: str | None) -> None:
        """Take in a finished document; `error` is None unless it failed."""
        self.recent.append(error is not None)
        if error is None:
            return
        self.documents += 1
        if len(self.reasons) < 1000:
            kind = re.sub(r"\d+", "#", error)
            self.reasons[kind] += 1
            self.examples.setdefault(kind, error)

    def too_many(self, failed: int, documents: int, which: str, most: float) -> TooManyFailures:
        """The error for `failed` of `documents` that failed, if `most` is the highest rate allowed."""
        reasons = [f" ({times:,} × {self.examples[kind]})" for kind, times in self.reasons.most_common(1)]
        return TooManyFailures(
            f"{failed:,} of {which}{documents:,} documents failed, more than --max-failure-rate {most:g} allows"
            f"{''.join(reasons)}. Fix the cause and rerun with --retry-failed, "
            "or raise --max-failure-rate (at most 1)"
        )


class Feed:
    """Hands documents to workers. One of them at a time reads on, while the others sleep.

    When it has read, some wake in each turn of the event loop: 10,000 that begin in one would hold it for a second.

    Args:
        batches: documents, with their chunks, as they are read.
    """

    def __init__(self, batches: AsyncIterator[Iterator[tuple[OpenChunk, Document]]]) -> None:
        self._batches = batches
        self._ready: Iterator[tuple[OpenChunk, Document]] = iter(())
        self._reading = self._exhausted = self._waking = False
        self._asleep: deque[asyncio.Future[None]] = deque()

    async def take(self) -> tuple[OpenChunk, Document] | None:
        """The next document; None if there is none."""
        while not (taken := next(self._ready, None)) and not self._exhausted:
            if self._reading:
                self._asleep.append(sleeper := asyncio.get_running_loop().create_future())
                await sleeper
                continue
            self._reading = True
            try:
                batch = await anext(self._batches, None)
            finally:
                self._reading = False
                if not self._waking:
                    self._wake()
            self._ready, self._exhausted = batch or iter(()), batch is None
        return taken

    def _wake(self) -> None:
        if waking := bool(self._asleep) and not self._reading:
            for _ in range(min(AT_ONCE, len(self._asleep))):
                if not (sleeper := self._asleep.popleft()).done():
                    sleeper.set_result(None)
            asyncio.get_running_loop().call_soon(self._wake)
        self._waking = waking


class Engine:
    """Moves documents from the intake through rollouts to the outlet; see the top of this module.

    Args:
        run: what to do.
        store: the rank's state, open.
        crew: runs the workers.
        intake: reads chunks.
        outlet: writes chunks.
        send: the client, with the links of plugins around it.
        resources: of the rollout, by the names of its parameters.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        crew: Crew,
        intake: Intake,
        outlet: Outlet,
        send: Send,
        resources: dict[str, Any],
    ) -> None:
        assert run.client
        entry = run.plugins.rollouts[run.options.rollout]
        self.run, self.store, self.crew, self.client, self.send = run, store, crew, run.client, send
        self.intake, self.outlet = intake, outlet
        self.makers = {name: value.make for name, value in resources.items() if isinstance(value, PerRollout)}
        self.resources = {name: value for name, value in resources.items() if name not in self.makers}
        self.rollout, self.rollout_file = entry.factory, getattr(sys.modules.get(entry.plugin), "__file__", None)
        self._defaults = {name: sampling(of.options, of.model) for name, of in {"": run, **run.models}.items()}
        self.loop, self.stopping = asyncio.get_running_loop(), False
        self.started = self.finished = 0  # documents, in this process
        self.failures = Failures()
        self.tally: Counter[str] = Counter()  # documents, in all processes
        self._open: dict[int, OpenChunk] = {}
        self._deferred: dict[int, OpenChunk] = {}  # final, but the fields of results are not settled
        self._untried: list[int] = []  # a heap of those that may settle them
        self._unwritten, self._space = 0, asyncio.Event()
        self._window = max(WINDOW * run.options.max_concurrent_documents, 4 * run.options.records_per_chunk)
        self._writing = ThreadPoolExecutor(2, "sdg-writer")
        self._settling, self._two_write, self._one_large = asyncio.Lock(), asyncio.Semaphore(2), asyncio.Lock()

    async def work(self) -> None:
        """Process all chunks of this rank. When stopped, save completed responses and write complete chunks."""
        known = await asyncio.to_thread(self.intake.known)
        if known.lost:
            await self.store.lost(known.lost)
        self.tally = await self.store.tally()
        self.store.on_durable, self.store.on_failure = self._durable, self.run.stop
        in_flight = self.run.options.max_concurrent_generations
        self.store.most_answers = max(1000 - in_flight, in_flight)
        with self.intake, self._writing:
            async with asyncio.TaskGroup() as self._write_tasks, contextlib.aclosing(self._batches(known)) as batches:
                try:
                    feed = Feed(batches)
                    await self.crew.work(self._work(feed) for _ in range(self.run.options.max_concurrent_documents))
                    with contextlib.suppress(Exception):  # it has stopped the run
                        await self.store.flush()
                finally:
                    self.store.on_durable = lambda ids: None  # chunks that are complete from now on: the next run
            if self._deferred and self._complete:  # no document has a result
                self.outlet.settle_without_results()
                async with asyncio.TaskGroup() as self._write_tasks:
                    self._write_deferred()
            if self._complete:
                await self._in_writing_thread(self.outlet.finish)
        if self._open and self._complete:
            raise StateError(f"chunks {sorted(self._open)[:5]} are unfinished: run again, and please report this")
        failed = self.tally["failed"] + self.tally["empty"] * (not self.tally["row"])  # without rows they are, too
        self._check_failure_rate(failed, self.tally.total(), least=1)

    @property
    def _complete(self) -> bool:
        """True unless the run was stopped, or works on a sample."""
        return not self.stopping and self.intake.chosen is None

    def stop(self) -> None:
        """Start nothing new, give documents in flight a moment, then cancel them."""
        self.stopping = True
        for lane in self._lanes:
            lane.stop()
        self.crew.end()

    async def _work(self, feed: Feed) -> None:
        """Process one document after the other. What fails beside them ends the run, but no worker."""
        try:
            while not self.stopping:
                taken = await feed.take()
                if not taken:
                    return
                await self.crew.turn(taken[1].index)
                with self.crew.at(taken[1].index):
                    await self._roll_out(*taken)
                if self.store.crowded:
                    await self.store.room()
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        except Exception as exc:  # noqa: BLE001 - what is in flight is worth the wait
            self.run.stop(exc)

    # Reading

    async def _batches(self, known: Known) -> AsyncGenerator[Iterator[tuple[OpenChunk, Document]], None]:
        """For each chunk the documents that are not final."""
        async with contextlib.aclosing(self.intake.chunks(known)) as chunks:
            async for opened in chunks:
                final = await self._open_chunk(opened, known.get(opened.chunk.index))
                if final is not None:
                    yield self._documents(opened, final)

    def _documents(self, opened: OpenChunk, final: Mapping[int, str]) -> Iterator[tuple[OpenChunk, Document]]:
        """A chunk's documents that are not final; those without a prompt fail here."""
        for position, item in opened.documents(self.intake.prompt_column, self.intake.id_column):
            if position in final:
                continue
            self.started += 1
            if isinstance(item, Document):
                yield opened, item
            else:
                self._finish(opened, position, item)

    async def _open_chunk(self, opened: OpenChunk, earlier: Chunk | None) -> Mapping[int, str] | None:
        """Admit a chunk when there is room. Returns the final documents in it; None if there is nothing to do."""
        chunk, retry = opened.chunk, self.run.options.retry_failed
        if earlier and earlier.written:  # it has grown, or has failures to retry
            outcomes = await self._in_writing_thread(self.outlet.outcomes, earlier)
            await self.store.reopen(chunk, outcomes)
        while self._unwritten and self._unwritten + chunk.count > self._window:
            self._space.clear()
            await self._space.wait()
        known = await self.store.finished_in(chunk) if earlier else {}
        # Documents are failed until they are finished again: a retry may be interrupted.
        final = {i: status for i, status in known.items() if not (retry and status in {"failed", "empty"})}
        self.tally -= Counter(status for i, status in known.items() if i not in final)
        opened.expect(final, resumed=earlier is not None)
        self._open[chunk.index] = opened
        self._unwritten += opened.weight
        if not earlier or earlier.count != chunk.count or earlier.digest != chunk.digest:
            self.store.opened(chunk)
        if not opened.remaining:
            self._ended(opened)
        return final if opened.remaining or opened.whole else None

    # Rollouts

    @property
    def _lanes(self) -> list[Lane]:
        return [of.client.lane for of in (self.run, *self.run.models.values()) if of.client]

    def model(self, name: str) -> Run:
        """The run of a further model, or this one for ""."""
        if name and name not in self.run.models:
            hint = f"{nearest(name, self.run.models)}; see [models.NAME] in --config"
            raise UsageError(f"generate(…, to={name!r}): there is no such model; {hint}")
        return self.run.models[name] if name else self.run

    def client_of(self, name: str) -> Client:
        """The client of a further model, or the run's own for ""."""
        return cast("Client", self.model(name).client) if name else self.client

    def payload(self, prompt: Prompt, overrides: dict[str, Any], index: int, to: str) -> tuple[str, dict[str, Any]]:
        """Endpoint and body of a request. The kind of prompt decides on the first; later fields win in the second."""
        if isinstance(prompt, str):
            prompt = {"messages": [{"role": "user", "content": prompt}]}
        elif isinstance(prompt, list):
            prompt = {"messages": prompt}
        if to not in self._defaults:
            self.model(to)  # raises
        payload = {**self._defaults[to], **prompt, **overrides}
        if index and isinstance(payload.get("seed"), int):
            payload["seed"] += index
        return "/completions" if "prompt" in prompt else "/chat/completions", payload

    async def _roll_out(self, opened: OpenChunk, document: Document) -> None:
        """Run all rollouts of a document. The failure of one leaves the others running."""
        position = document.index - opened.chunk.start
        key = opened.chunk.index << 32 | position
        answers = await self.store.answers_to(key) if opened.resumed else {}
        count = self.run.options.rollouts_per_document
        rollouts = [RolloutRun(self, document, key, index, answers) for index in range(count)]
        if count == 1:
            outcomes = [await rollouts[0].run()]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(rollout.run()) for rollout in rollouts]
            outcomes = [task.result() for task in tasks]
        results = self.outlet.results_of(outcomes)
        failures = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        self.run.counts["failed_rollouts"] += len(failures) * bool(results)  # of rows: failed documents may be retried
        self._finish(opened, position, results or (failures[0] if failures else None))

    def _finish(self, opened: OpenChunk, position: int, outcome: Outcome | None) -> None:
        """Hand a document's outcome to the store: results, a failure, or None if it was filtered."""
        status = self.outlet.status_of(outcome)
        try:
            body = self.client.secrets.hidden(self.outlet.stored(outcome or None))
        except TypeError as exc:
            reason = f"the rollout's result cannot be stored as JSON: {exc}{place_of(self.rollout)}"
            return self._finish(opened, position, {"error": reason, "error_type": "TypeError", "attempts": 1})
        self.store.finished(opened.chunk.index << 32 | position, status, body)
        self.tally[status] += 1
        self.finished += 1
        self.failures.note(outcome["error"] if isinstance(outcome, dict) and status == "failed" else None)
        if isinstance(outcome, list):
            self.run.counts["results"] += len(outcome)
            self.run.counts["truncated"] += any(result.get("truncated") is True for result in outcome)
        if status == "failed":
            if self.finished >= 100:  # of those started, not finished: refusals arrive sooner than completions
                self._check_failure_rate(self.failures.documents, self.started)
            if len(self.failures.recent) == RECENT:
                self._check_failure_rate(sum(self.failures.recent), RECENT, "the last ")

    def _check_failure_rate(self, failed: int, documents: int, which: str = "", least: int = 100) -> None:
        most = self.run.options.max_failure_rate
        if documents >= least and failed > most * documents and not self.stopping:
            self.run.stop(self.failures.too_many(failed, documents, which, most))

    # Writing

    def _durable(self, documents: list[int]) -> None:
        """The store has committed these documents: write the chunks that are complete now."""
        for document in documents:
            opened = self._open[document >> 32]
            opened.remaining -= 1
            if not opened.remaining:
                self._ended(opened)

    def _ended(self, opened: OpenChunk) -> None:
        """What is run of a chunk here is final. Write it, unless other documents are left to a later process."""
        if opened.whole:
            self._write_tasks.create_task(self._write_chunk(opened))
        else:
            self._open.pop(opened.chunk.index).close()
            self._written(opened)

    async def _settle(self, opened: OpenChunk) -> None:
        """Learn the fields of results from the first chunk that has any; chunks without results wait for it."""
        async with self._settling:
            self._deferred[opened.chunk.index] = self._open.pop(opened.chunk.index)
            heapq.heappush(self._untried, opened.chunk.index)
            self._written(opened)
            # In the order of the input, so that equal responses give equal files, whichever chunk is complete first.
            incomplete = min(self._open, default=sys.maxsize)
            while self.outlet.fields is None and self._untried and self._untried[0] < incomplete:
                first = self._deferred[heapq.heappop(self._untried)]
                pieces = self.store.in_pieces(first.chunk, await self.store.bytes_of(first.chunk))
                await self._in_writing_thread(self.outlet.settle, pieces)
            if self.outlet.fields is not None:
                self._write_deferred()

    def _write_deferred(self) -> None:
        self._open |= self._deferred
        for opened in self._deferred.values():
            self._unwritten += opened.weight
            self._write_tasks.create_task(self._write_chunk(opened))
        self._deferred.clear()

    async def _write_chunk(self, opened: OpenChunk) -> None:
        """Write the file, record it, clean up: in this order, and each step may be repeated."""
        try:
            if self.outlet.fields is None:
                await self._settle(opened)
                return
            large = (size := await self.store.bytes_of(opened.chunk)) > LARGE_CHUNK
            async with self._two_write, self._one_large if large else contextlib.nullcontext():
                chunk = opened.chunk
                outcomes = self.store.in_pieces(chunk, size) if large else await self.store.outcomes_of(chunk)
                await self._in_writing_thread(self.outlet.write, opened, outcomes, self.intake.id_column)
                chunk.written = True
                await self.store.written(chunk)
                self._open.pop(chunk.index)
                opened.close()
                await self._in_writing_thread(announce, self.run, chunk)
            self._written(opened)
        except Exception as exc:  # noqa: BLE001 - what is in flight is worth the wait
            self.run.stop(exc)

    def _written(self, opened: OpenChunk) -> None:
        """Move the window on."""
        self._unwritten -= opened.weight
        self._space.set()

    async def _in_writing_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writing, work, *arguments)


# ── Main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: list[str] | None = None) -> int:
    """The command line: `sdg.py COMMAND ARGUMENTS`, where `run` may be left out. Returns the exit code; see `Error`."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        plugins, _ = Plugins.load([])
        name, *rest = argv if argv and not argv[0].startswith("-") else ["run", *argv]
        entry = plugins.find("commands", name)
        if entry.package == "sdg":  # reported below
            return int(entry.factory(rest))
        with at_work(f"the command {name} of {entry.package}", entry.factory):
            return int(entry.factory(rest))
    except Error as exc:
        if os.environ.get("SDG_TRACEBACK") and exc.__cause__:
            traceback.print_exception(exc.__cause__)
        if not exc.said:
            say(str(exc))
        return exc.exit_code
    except BrokenPipeError:  # as with `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        if os.environ.get("SDG_TRACEBACK"):
            raise
        if isinstance(exc, OSError) and exc.filename:
            say(f"{exc.filename}: {reason_of(exc)}")
        else:
            say(f"unexpected {describe(exc)}: please report it (SDG_TRACEBACK=1 shows the traceback)")
        return 1


def script() -> NoReturn:
    """`main` as a program."""
    importlib.import_module("sdg_plugins.common.ending").run_program(main)
    raise SystemExit  # it does not return


_bundled_package()

if __name__ == "__main__":
    # Plugins import `sdg`. Without this detour they would get a second copy of every class.
    from sdg import script as imported_script

    imported_script()
