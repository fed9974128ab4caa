"""Generate synthetic training data: one async rollout per document, against any OpenAI-compatible server.

    python sdg.py --plugin summarize                                      # a demonstration: no GPU, no network, no key
    python sdg.py --plugin summarize --input 'docs/*.parquet' --base-url http://localhost:8000
    python sdg.py --plugin ./mine.py --input docs.jsonl.gz --base-url https://api.example.com/v1 --model some-model
    python sdg.py --config run.toml --rank 3 --world-size 8               # one of eight processes
    python sdg.py --input hf://datasets/OWNER/NAME --output hf://datasets/YOU/NAME --server vllm --model OWNER/MODEL
    slurm/submit.sh --ranks 16 --gpus-per-node 8 -- --config run.toml     # on a Slurm cluster
    python sdg.py status --output /shared/out                             # how its ranks are doing
    python sdg.py monitor --output hf://datasets/YOU/NAME                 # publish what many ranks write
    python sdg.py verify --output ./output/summarize                      # is every document accounted for?

A request is the unit of replay, a document the unit of work, a chunk the unit of commit. Answers and finished
documents are durable in SQLite within a fraction of a second; when all documents of a chunk are final, its file is
written, recorded, and its part of the state dropped. Names of files and their content follow from the input and the
answers alone, so that every step can be repeated after a crash.

Reading order: types, errors, hooks, plugins, options, places, schema, store, client, engine, identity,
progress, commands.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import string
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import types
import typing
import urllib.parse
import uuid
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

try:
    import orjson
    import pluggy
    import xxhash
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(f"sdg: {missing.name} is not installed for {sys.executable}: pip install -e . installs all that is needed")

if TYPE_CHECKING:
    import aiohttp
    import aiosqlite
    import pyarrow as pa

__version__ = "0.1.0"

STATE_VERSION = 2
FIRST_LIMIT = 64  # requests at a time for a server whose load is not known yet: doubled each second if it bears it
PATIENT_LOOKS = 3  # at the load of a server that does not answer, before it counts as one without metrics
HEARTBEAT = 10.0  # s between two notes of a rank's figures in the state; less in its first minutes
RECENT = 6  # heartbeats over which the present rate is taken
METRICS_INTERVAL = 1.0  # s between two looks at the load that a server reports
COMMIT_INTERVAL = 0.05  # s between group commits: 5,000 documents/s become 250 rows a commit, not 5,000 commits
WINDOW = 32  # documents read and not yet written, per document in flight: 1 % stragglers of 20 times the mean need 20
GRACE = 10.0  # s that requests in flight get to be answered after SIGTERM: schedulers kill after 30
LAST_RESORT = 18.0  # s after a signal the process ends, even if a plugin blocks it
STORM_PATIENCE = 10  # times --max-retries: answers of 429 and 503 that one request takes while others succeed
LONGEST_REST = 3600.0  # s that a server may ask to be left alone
S3_ATTEMPTS = 10  # at a request, unless AWS_MAX_ATTEMPTS says another number: with the library's pauses, some 70 s
QUICK_ATTEMPTS = 4  # ... of the first look at a place, when it is rather a mistake: 5 s, or 25 if nothing answers
S3_VARIABLES = "AWS_ACCESS_KEY_ID or AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"
OBJECT_STORES = {"s3", "gcs", "abfs"}  # have no folders: to make one leaves an empty object
PUT_BYTES = 16 << 20  # handed over at a time: more than the smallest part of an upload, so that pyarrow copies nothing
SHORTEST_KEY = 12  # characters
LONGEST_PAUSE = 60.0  # s between two attempts, unless the server asks for more
PUBLISHER = "sdg-publisher"  # the thread that publishes beside a run; see `script`


# ── Types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


Usage = dict[str, int]  # tokens of a request as the server counted them, by the names in TOKENS
TOKENS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the model. `choices` has all `n` of them, this one included; `str(reply)` is its text."""

    text: str
    reasoning: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None  # of the whole request: only on the first choice, so that sums stay true
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    truncated: bool = False  # the prompt's part of the document was cut to the model's context
    choices: tuple[Reply, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One row of the input, as a rollout sees it."""

    id: str
    text: str  # the prompt column; of a list of messages their contents, joined by blank lines
    messages: list[dict[str, Any]] | None  # the prompt column where it holds chats, else None
    index: int  # row number in the whole input
    _table: pa.Table = dataclasses.field(repr=False)
    _position: int = dataclasses.field(repr=False)

    @property
    def row(self) -> dict[str, Any]:
        """All columns of the source's row as Python values. Made anew at each access: most rollouts need none."""
        return rows_of(self._table.slice(self._position, 1))[0]


class Block(NamedTuple):
    """Rows as a reader hands them over: `batch` starts at row `row` of `file` (both only name the rows)."""

    batch: pa.RecordBatch
    file: str
    row: int


class BadRow(NamedTuple):
    """Takes the place of one row that could not be read; its document fails with `reason`."""

    file: str
    row: int
    reason: str
    raw: str = ""  # what stood there, as far as it can be shown


class Reader(Protocol):
    """A source of rows, numbered from 0 over all its files.

    `seek`, `tell` and `read` are called in a thread, one at a time; `total` from the event loop: it must not block.
    A reader may also have `source`, JSON that is recorded when a run begins: later processes of the run find it in
    `run.source` (a revision to stay with), the dataset card quotes `dataset`, `revision`, `license` and `language`.
    """

    @property
    def schema(self) -> pa.Schema:
        """Arrow's schema of every batch; a plain attribute will do."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON that changes when the content does, not when it moves: part of the fingerprint. An attribute will do."""

    def seek(self, row: int, bookmark: str | None) -> None:
        """Go on at `row`. `bookmark`, if any, is what `tell` said at a row before it, or at it, in some earlier run."""

    def tell(self) -> str | None:
        """A bookmark (any text that spares reading what lies before it) of the present row; None if there are none."""

    def read(self, rows: int) -> list[Block | BadRow]:
        """The next `rows` rows, fewer only at the end of the input."""

    def total(self) -> int | None:
        """Rows of the whole input, or an estimate that gets better as reading goes on; None if nobody knows."""

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """Whether this input is one of identity `earlier` with rows added after its end."""


class Writer(Protocol):
    """Where chunks go. Called in threads, at most two at a time; each call for another chunk."""

    def write(self, chunk: Chunk, rows: pa.Table) -> None:
        """Make the chunk's file durable, whole or not at all. Called again after a crash: the result is the same."""

    def read(self, chunk: Chunk) -> pa.Table | None:
        """The rows of a chunk that was written, None if its file is gone."""


class Generate(Protocol):
    """What a rollout asks the model with."""

    @property
    def index(self) -> int:
        """Which of --rollouts-per-document this is, from 0."""

    async def __call__(self, prompt: str | list[dict[str, Any]] | dict[str, Any], **overrides: Any) -> Reply:
        """Answer a prompt. What it holds of the document is cut if it does not fit the model's context.

        Args:
            prompt: a string (one user message), a list of chat messages, or a whole payload: with `messages` for the
                chat endpoint, with `prompt` for completions.
            overrides: fields of the payload, such as `temperature=0.2` or `n=4`; they win over the command line's.

        Raises:
            RequestFailed: the server refused the request, or all retries were used up.
        """

    async def raw(self, prompt: str | list[dict[str, Any]] | dict[str, Any], **overrides: Any) -> tuple[Reply, bytes]:
        """Answer a prompt, and give the server's answer as well, as JSON."""


class PerRollout(NamedTuple):
    """What a resource yields if every rollout of a document is to have a value of its own.

    Attributes:
        make: `make(document, generate)` is called when a rollout begins; what it returns is what the rollout gets. An
            exception fails this rollout alone.
    """

    make: Callable[[Document, Generate], Any]


class HasFields(Protocol):
    """An instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class HasModel(Protocol):
    """A pydantic model, or what can be turned into JSON like one."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its fields as a dict; `mode="json"` wants values that JSON has."""


Result = str | Mapping[str, Any] | Reply | HasFields | HasModel | list[Any] | None  # what a rollout may return


class Rollout(Protocol):
    """What a plugin registers under `register_rollouts`: an async function of a document."""

    def __call__(self, document: Document, generate: Generate, /, *args: Any, **resources: Any) -> Awaitable[Result]:
        """Work on one document.

        Args:
            document: what it is about.
            generate: asks the model.
            resources: each further parameter names a resource, `run` among them; one with a default may be missing.

        Returns:
            A str, a dict, a `Reply`, a dataclass or pydantic model, a list of those: as many results. None, or a list
            without any, filters the document.
        """


class OpenReader(Protocol):
    """What a plugin registers under `register_readers`: a class of readers, or a function that opens one."""

    def __call__(self, run: Run, /) -> Reader:
        """Open `run.options.input`. In a thread; raise `InputError` if it cannot be read."""


class OpenResource(Protocol):
    """What a plugin registers under `register_resources`, as a rule by `@contextlib.asynccontextmanager`."""

    def __call__(self, run: Run, /) -> contextlib.AbstractAsyncContextManager[Any]:
        """An async context manager around the run; what it yields is what rollouts get."""


class OpenWriter(Protocol):
    """What a plugin registers under `register_writers`: a class of writers, or a function that opens one."""

    def __call__(self, run: Run, /) -> Writer:
        """Open the output. In a thread, before the server starts; raise `OutputError` if it cannot be written."""


class OpenServer(Protocol):
    """What a plugin registers under `register_servers`, as a rule by `@contextlib.asynccontextmanager`."""

    def __call__(self, run: Run, /) -> contextlib.AbstractAsyncContextManager[Sequence[str | Upstream]]:
        """An async context manager around all requests; it yields base URLs, or `Upstream`s."""


class Command(Protocol):
    """What a plugin registers under `register_commands`."""

    def __call__(self, argv: list[str], /) -> int:
        """Do what the arguments ask for; returns the exit status."""


@dataclasses.dataclass(slots=True)
class Chunk:
    """`count` rows of the input from row `start` on: one output file. `index` counts chunks of the whole input."""

    index: int
    start: int
    count: int = 0
    bookmark: str | None = None
    written: bool = False
    filtered: tuple[int, ...] = ()  # positions in the chunk
    failed: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in the chunk's file."""
        return self.count - len(self.filtered) - len(self.failed)


@dataclasses.dataclass(slots=True)
class Run:
    """What plugins learn about the run."""

    options: argparse.Namespace
    plugins: Plugins
    output: Place
    state: Path
    stop: Callable[[Error], None]  # end the run early: what is in flight gets a moment, what is answered is kept
    stopping: threading.Event = dataclasses.field(default_factory=threading.Event)  # it ends early: stop waiting
    model: str = ""
    fingerprint: str = ""
    input_revision: str = ""
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what the reader says of it; see `Reader`
    source_schema: pa.Schema | None = None  # of the input, as an earlier process of this run recorded it
    schema: pa.Schema | None = None  # of the input, as it is now: there when resources are opened
    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # of this process; see `statistics`
    fitter: Any = None  # of prompts to the model's context, once the servers are known; see `plugins/fitting.py`

    def path_of(self, chunk: Chunk) -> str:
        """The chunk's file, relative to the output."""
        name = string.Template(self.options.output_filename).substitute(
            rank=f"{chunk.index % self.options.world_size:05d}", chunk_index=f"{chunk.index:05d}"
        )
        return f"{self.options.output_config}/{name}"

    def failed_path_of(self, chunk: Chunk) -> str:
        """The file of the chunk's failed documents, relative to the output."""
        folder = "failed" if self.options.output_config == "data" else f"failed/{self.options.output_config}"
        return f"{folder}/{chunk.index % self.options.world_size:05d}_{chunk.index:05d}.jsonl"


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Error(Exception):
    """Ends the run with one line on stderr: what happened to which object, then the way out.

    Error
    ├── UsageError       2   an option that cannot be
    ├── InputError       1   the input cannot be read
    ├── PluginError      1   a plugin does not load, or breaks a rule
    ├── StateError       1   the state is locked, broken, or of another run
    ├── OutputError      1   the output cannot be written
    ├── ServerError      1   no server (Unreachable), no right, no such model
    ├── TooManyFailures  3   above --max-failure-rate
    └── Interrupted    130, 143   by a signal; run again to go on

    `RequestFailed` stands beside it: it fails a document, not the run.
    """

    exit_code = 1
    said = False  # on stderr, when it began to stop the run


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


class Interrupted(Error):
    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"interrupted by {signum.name}: what is answered gets stored; run the same command to go on")
        self.exit_code = 130 if signum == signal.SIGINT else 143


class RequestFailed(Exception):
    """A request that has no answer. A rollout may catch it; otherwise its document fails.

    Attributes:
        cause: the HTTP status as text, or one of timeout, connection, body, empty, crash, context.
        status: the HTTP status, None where there was none.
        attempts: how often the request was sent.
        body: what the server said, if it refused the request.
    """

    def __init__(self, cause: str, message: str, *, status: int | None = None, retry: bool = True) -> None:
        super().__init__(message)
        self.cause, self.status, self.retry, self.attempts = cause, status, retry, 1
        self.body = b""
        self.retry_after: float | None = None  # s, as the server asked
        self.unreached = False  # no connection: the request cannot have done anything

    @property
    def breaks_off(self) -> bool:
        """Whether it looks as if the server had died, rather than answered."""
        return self.cause == "connection" or (self.status is not None and self.status >= 500 and self.status != 503)


class BadDocument(Exception):
    """The input's row has no usable prompt."""


class BadResult(TypeError):
    """A rollout returned something that no row can hold."""


# ── Hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

hookspec = pluggy.HookspecMarker("sdg")
hookimpl = pluggy.HookimplMarker("sdg")


class Register(Protocol):
    """Handed to the `register_*` hooks: `register(name, factory)`. The factory's docstring is its one-line help.

    The hooks' own kinds of it, below, let a type checker see what is registered.
    """

    def __call__(self, name: str, factory: Callable[..., Any]) -> None: ...


class RegisterReaders(Protocol):
    """Takes readers: see `OpenReader`."""

    def __call__(self, name: str, factory: OpenReader) -> None: ...


class RegisterRollouts(Protocol):
    """Takes rollouts: see `Rollout`."""

    def __call__(self, name: str, factory: Rollout) -> None: ...


class RegisterResources(Protocol):
    """Takes resources: see `OpenResource`."""

    def __call__(self, name: str, factory: OpenResource) -> None: ...


class RegisterWriters(Protocol):
    """Takes writers: see `OpenWriter`."""

    def __call__(self, name: str, factory: OpenWriter) -> None: ...


class RegisterServers(Protocol):
    """Takes servers: see `OpenServer`."""

    def __call__(self, name: str, factory: OpenServer) -> None: ...


class RegisterCommands(Protocol):
    """Takes commands: see `Command`."""

    def __call__(self, name: str, factory: Command) -> None: ...


class Hooks:
    """The hook specifications. An implementation takes any subset of the arguments; no return value is used."""

    @hookspec
    def add_options(self, parser: argparse._ArgumentGroup) -> None:
        """Add command-line options to the plugin's own group of `--help`.

        Options of the plugin that registers the rollout or the reader in use are part of the run's fingerprint; those
        of a plugin whose rollouts, readers, writers and servers are not in use are refused. An exception ends the
        program and names the plugin.
        """

    @hookspec
    def register_readers(self, register: RegisterReaders) -> None:
        """Register `open_reader(run) -> Reader` under a URI scheme (`hf`) or a file suffix without its dot (`csv`).

        `open_reader`, `seek`, `tell` and `read` run in threads, one call at a time; an exception there ends the run.
        """

    @hookspec
    def register_rollouts(self, register: RegisterRollouts) -> None:
        """Register `async rollout(document, generate, **resources)`.

        It runs on the event loop, many at a time. It returns the result: a str, a dict, a `Reply`, a dataclass or a
        pydantic model, a list of those, or None to filter the document. An exception fails this rollout alone.
        """

    @hookspec
    def register_resources(self, register: RegisterResources) -> None:
        """Register an async context manager `resource(run)`, for the rollouts that have a parameter of its name.

        It is entered once per run, before the first document, and left after the last. An exception ends the run. If it
        yields `PerRollout(make)`, each rollout of a document gets a value of its own, `make(document, generate)`.
        """

    @hookspec
    def register_writers(self, register: RegisterWriters) -> None:
        """Register `open_writer(run) -> Writer` under a URI scheme or a file suffix without its dot.

        `open_writer` runs before the server starts, in a thread. The output of a scheme that has a writer is a folder
        of the state, `run.output`: what the writer puts there is for the plugin to publish. The writer runs in
        threads; an exception ends the run, with everything answered kept.
        """

    @hookspec
    def register_servers(self, register: RegisterServers) -> None:
        """Register an async context manager `server(run)` that yields a list of base URLs, or of `Upstream`s.

        It is entered before the first request and left after the last, whatever ended the run. A server that is
        launched is an `Upstream`: through it the engine learns when it is up, and that it has died. An empty list
        means that there is nothing to do here: the process was part of another one's server.
        """

    @hookspec
    def register_commands(self, register: RegisterCommands) -> None:
        """Register `main(argv) -> int`, run as `sdg.py NAME ARGUMENTS`; its result is the exit status."""

    @hookspec
    def observe(self, run: Run) -> contextlib.AbstractAsyncContextManager[None] | None:
        """Give an async context manager that is entered before the first document and left when the run has ended.

        The server has stopped by then, so that nobody waits on a GPU; what ended the run early is raised through it.
        An exception of its own ends the run.
        """

    @hookspec
    def chunk_written(self, run: Run, chunk: Chunk) -> None:
        """Learn that a chunk is durable. Called in a thread; an exception is reported and changes nothing."""


# ── Plugins ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BUNDLED = (
    *("card", "check", "command", "continuation", "csv", "demo", "endpoint", "fitting", "hf", "hf_output", "jsonl"),
    *("judge", "launching", "monitor", "openai_client", "parquet", "prompt", "qa", "refine", "rephrase", "resources"),
    *("sglang", "status", "structured", "summarize", "translate", "verify", "vllm"),
)


class Entry(NamedTuple):
    """One registered name."""

    factory: Callable[..., Any]
    plugin: str  # the module that registered it
    version: str  # of the package or file it comes from
    package: str = ""  # its name: of a distribution, a module or a file

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
        self.quiet = False  # observers are not told
        self.readers: dict[str, Entry] = {}
        self.rollouts: dict[str, Entry] = {}
        self.resources: dict[str, Entry] = {"run": Entry(_run_resource, "sdg", __version__, "sdg")}
        self.writers: dict[str, Entry] = {}
        self.servers: dict[str, Entry] = {}
        self.commands: dict[str, Entry] = {}
        self.commands["run"] = Entry(run_command, "sdg", __version__, "sdg")
        self.commands["plugins"] = Entry(plugins_command, "sdg", __version__, "sdg")

    @classmethod
    def load(cls, specs: Iterable[str]) -> tuple[Plugins, str | None]:
        """Load the bundled plugins, those of installed packages, then `specs` as `--plugin` takes them.

        Returns:
            The plugins, and the name of the rollout that the last of `specs` that has any stands for; None if none has.
        """
        plugins = cls()
        package = _bundled_package()
        for name in BUNDLED:
            plugins.add(importlib.import_module(f"{package}.{name}"), __version__, "sdg")
        plugins._load_installed()
        found = [(spec, *plugins._load_spec(spec)) for spec in specs]
        plugins.manager.check_pending()
        spec, rollout, _ = next((one for one in reversed(found) if one[2]), ("", None, []))
        if rollout == "":
            raise UsageError(f"--plugin {spec} registers several rollouts: name one as {spec}:NAME")
        return plugins, rollout

    def add(self, module: types.ModuleType, version: str, package: str = "") -> None:
        """Register a module's hooks and, through them, its names; `version` is that of `package`."""
        name = module.__name__
        if self.manager.has_plugin(name):
            return
        check_hooks(module)
        self.manager.register(module, name)
        for kind in self.kinds:
            register = functools.partial(self._register, kind, (name, version, package or name))
            self._call(f"register_{kind}", module, register=register)

    def add_options(self, parser: argparse.ArgumentParser) -> dict[str, set[str]]:
        """Let each plugin add its options, in a group of its own. Returns the option names of each plugin."""
        added = {}
        for name, module in self.manager.list_name_plugin():
            title = name.rpartition(".")[2]
            group = parser.add_argument_group(title)
            known = {action.dest for action in parser._actions}
            try:
                self._call("add_options", module, parser=group)
            except argparse.ArgumentError as problem:
                raise PluginError(f"plugin {name}: {problem}; rename the option") from problem
            added[name] = {action.dest for action in parser._actions} - known
            if not added[name]:
                parser._action_groups.remove(group)
        return added

    def find(self, kind: str, name: str) -> Entry:
        """The entry of a name, or a `UsageError` that offers near names."""
        entries: dict[str, Entry] = getattr(self, kind)
        if name in entries:
            return entries[name]
        raise UsageError(f"no {kind[:-1]} is called {name!r}; {nearest(name, entries, cutoff=0.5)}")

    def idle(self, plugin: str, used: set[str]) -> str:
        """If a plugin's options cannot have an effect: whose options they are. "" if they can."""
        module = self.manager.get_plugin(plugin)
        idle = []
        kinds = {"rollouts": "--plugin ", "servers": "--server ", "readers": "an --input of ", "writers": "--output "}
        for kind, option in kinds.items():
            entries: dict[str, Entry] = getattr(self, kind)
            # Those of a module that several plugins import are theirs.
            users = {
                name: entry.plugin
                for name, entry in entries.items()
                if entry.plugin == plugin
                or any(value is module for value in vars(self.manager.get_plugin(entry.plugin)).values())
            }
            if used & {*users.values(), plugin}:
                return ""
            if users:
                idle.append(f"{option}{' or '.join(sorted(users))}, which is not in use")
        return "; ".join(idle)

    def _register(self, kind: str, of: tuple[str, str, str], name: str, factory: Callable[..., Any]) -> None:
        entries: dict[str, Entry] = getattr(self, kind)
        plugin = of[0]
        if name in entries:
            both = f"plugins {entries[name].plugin} and {plugin} both register the {kind[:-1]} {name!r}"
            raise PluginError(f"{both}: give one of them another name")
        if not callable(factory):
            kinds = "an async function" if kind == "rollouts" else "a function or a class"
            raise PluginError(
                f"plugin {plugin}: the {kind[:-1]} {name!r} is a {type(factory).__name__}, and should be {kinds}"
            )
        entries[name] = Entry(factory, *of)

    def _call(self, hook: str, plugin: object, **arguments: Any) -> None:
        """Call one plugin's implementation of a hook: pluggy's own call cannot say whose turn it is."""
        for impl in getattr(self.manager.hook, hook).get_hookimpls():
            if impl.plugin is not plugin:
                continue
            try:
                impl.function(*[arguments[name] for name in impl.argnames])
            except (Error, argparse.ArgumentError):
                raise
            except Exception as problem:
                file = getattr(plugin, "__file__", None)
                raise PluginError(f"plugin {impl.plugin_name}: {hook} failed: {describe(problem, file)}") from problem

    def observers(self, hook: str) -> list[pluggy.HookImpl]:
        """Who implements `observe` or `chunk_written`: nobody where the rows are not to stay."""
        return [] if self.quiet else list(getattr(self.manager.hook, hook).get_hookimpls())

    def _load_installed(self) -> None:
        import importlib.metadata

        for point in importlib.metadata.entry_points(group="sdg"):
            package, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "")
            module = _import(f"the plugin {point.value} of the installed package {package}", point.load)
            self.add(module, version, package)

    def _load_spec(self, spec: str) -> tuple[str, list[str]]:
        """Load one `--plugin`; return the rollout that it names, "" if it leaves that open, and all rollouts it has."""
        if spec in self.rollouts:
            return spec, [spec]
        target, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
        if target.endswith(".py"):
            module, version = _import_file(Path(target).expanduser())
            package = target
        elif re.fullmatch(r"\w+(\.\w+)*", target) and importlib.util.find_spec(target.partition(".")[0]):
            module = _import(f"plugin {target}", functools.partial(importlib.import_module, target))
            version, package = str(getattr(module, "__version__", "")) or hash_of(module), target
        elif Path(f"{spec}.py").is_file():
            raise UsageError(f"no rollout is called {spec!r}; did you mean --plugin ./{spec}.py?")
        else:
            self.find("rollouts", spec)
        self.add(module, version, package)
        if not self.manager.get_hookcallers(module):
            raise UsageError(f"--plugin {spec} registers nothing: is @sdg.hookimpl there?")
        own = [name for name, entry in self.rollouts.items() if entry.plugin == module.__name__]
        if name and name not in own:
            raise UsageError(f"{target} has no rollout {name!r}; it has: {', '.join(own) or 'none'}")
        stem = module.__name__.rpartition(".")[2]
        return name or (own[0] if len(own) == 1 else stem if stem in own else ""), own


def describe(problem: BaseException, file: str | None = None) -> str:
    """An exception in one line, with the place where it was raised: the deepest one in `file` if that is given."""
    try:
        text = " ".join(str(problem).split()) or "no message"
    except Exception:  # noqa: BLE001 - its own words fail, too
        text = "no message"
    if isinstance(problem, SyntaxError):
        where = f" ({problem.filename}:{problem.lineno})" if problem.filename else ""
        return f"{type(problem).__name__}: {problem.msg}{where}"
    frames = traceback.extract_tb(problem.__traceback__)
    inside = [frame for frame in frames if frame.filename == file] or frames
    where = f" ({inside[-1].filename}:{inside[-1].lineno})" if inside else ""
    return f"{type(problem).__name__}: {text}{where}"


def hash_of(module: types.ModuleType) -> str:
    """What stands for the version of a module that has none."""
    file = getattr(module, "__file__", None)
    return xxhash.xxh3_64_hexdigest(Path(file).read_bytes()) if file else ""


def file_of(thing: Any) -> str | None:
    """The file of a module, or of what defines a function, a class or an object; None if nobody knows."""
    if not isinstance(thing, types.ModuleType):
        thing = sys.modules.get(getattr(thing, "__module__", None) or type(thing).__module__)
    return getattr(thing, "__file__", None)


def place_of(thing: Any) -> str:
    """` (FILE:LINE)` of the definition of a function, a class or an object's class; "" if nobody knows."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing)
    try:
        if code := getattr(thing, "__code__", None):
            return f" ({code.co_filename}:{code.co_firstlineno})"
        kind = thing if isinstance(thing, type) else type(thing)
        return f" ({inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]})"
    except (OSError, TypeError):  # no source, as in an interpreter
        return ""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """What somebody may have meant by a name that is not known."""
    near = difflib.get_close_matches(name, known := sorted(known), n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"


def check_hooks(module: types.ModuleType) -> None:
    """See that all that a module marks with `@sdg.hookimpl` are hooks, and take what hooks are given."""
    known = {name: hook for name, hook in vars(Hooks).items() if not name.startswith("_")}
    for name, function in vars(module).items():
        if not inspect.isroutine(function) or not hasattr(function, "sdg_impl"):
            continue
        where = f"plugin {module.__name__}: {name}{place_of(function)}"
        if name not in known:
            raise PluginError(f"{where} is no hook; {nearest(name, known)}")
        takes = list(inspect.signature(known[name]).parameters)[1:]
        wrong = [parameter for parameter in inspect.signature(function).parameters if parameter not in takes]
        if wrong:
            raise PluginError(f"{where} is not given {' and '.join(wrong)}; it may take: {', '.join(takes)}")


def check_rollout(name: str, plugins: Plugins) -> None:
    """See that a rollout is an async function of (document, generate) and of resources that there are."""
    rollout = plugins.rollouts[name].factory
    where = f"the rollout {name!r} of plugin {plugins.rollouts[name].plugin}{place_of(rollout)}"
    plain = inspect.unwrap(rollout)
    plain = plain if inspect.isroutine(plain) or isinstance(plain, functools.partial) else type(plain).__call__
    if inspect.isasyncgenfunction(plain):
        raise PluginError(f"{where} yields: return a list of the results instead")
    if not inspect.iscoroutinefunction(plain):
        raise PluginError(f"{where} is not async: begin it with `async def`")
    parameters = list(inspect.signature(rollout).parameters.values())
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    given = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters[:2])
    if (len(named) < 2 and not given) or named[:2] == ["generate", "document"]:
        raise PluginError(f"{where} takes ({', '.join(named)}), and should take (document, generate, …)")
    for parameter in parameters[2:]:
        optional = parameter.default is not parameter.empty
        if not optional and parameter.name not in plugins.resources and "VAR" not in parameter.kind.name:
            hint = nearest(parameter.name, plugins.resources)
            raise PluginError(f"{where} wants a resource {parameter.name!r}, which no plugin registers; {hint}")


def check_shape(thing: object, shape: type, what: str) -> None:
    """See that what a plugin made has all that a Protocol asks for, methods with their arguments.

    Args:
        thing: what it made.
        shape: the Protocol.
        what: the thing's name in messages.

    Raises:
        PluginError: something is missing; it is named, with the place of the thing's definition.
    """
    of = f"{what}{place_of(thing)}"
    for name, wanted in vars(shape).items():
        if name.startswith("_"):
            continue
        asked = list(inspect.signature(wanted).parameters)[1:] if inspect.isfunction(wanted) else None
        shown = name if asked is None else f"{name}({', '.join(asked)})"
        if not hasattr(thing, name):
            hint = (inspect.getdoc(wanted) or "").partition("\n")[0]
            raise PluginError(f"{of} has no `{shown}`, as sdg.{shape.__name__} has it: {hint}")
        if asked is None:
            continue
        try:
            inspect.signature(getattr(thing, name)).bind(*asked)
        except (TypeError, ValueError) as problem:
            raise PluginError(f"{of}: `{name}` is not as in sdg.{shape.__name__}, {shown}: {problem}") from problem


def check_reader(reader: Reader, what: str) -> None:
    """See that a plugin's reader has what `Reader` asks for, and a schema and an identity of the right kinds."""
    import pyarrow as pa

    check_shape(reader, Reader, what)
    if not isinstance(reader.schema, pa.Schema):
        kind = type(reader.schema).__name__
        raise PluginError(f"{what}{place_of(reader)}: `schema` is a {kind}, and should be a pyarrow.Schema")
    try:
        json.dumps(dict(reader.identity))
    except (TypeError, ValueError) as problem:
        raise PluginError(
            f"{what}{place_of(reader)}: `identity` is no mapping that JSON can hold: {problem}"
        ) from problem


def opened(entry: Entry, kind: str, name: str, run: Run) -> contextlib.AbstractAsyncContextManager[Any]:
    """The context manager of a registered server or resource."""
    what = f"the {kind} {name!r} of plugin {entry.plugin}{place_of(entry.factory)}"
    manager = entry.factory(run)
    if not hasattr(manager, "__aenter__"):
        if inspect.iscoroutine(manager):
            manager.close()
        problem = f"is no async context manager, but a {type(manager).__name__}"
        raise PluginError(f"{what} {problem}: is @contextlib.asynccontextmanager there?")
    return typing.cast("contextlib.AbstractAsyncContextManager[Any]", manager)


def made(factory: Callable[[Run], Any], run: Run) -> Any:
    """What a plugin's factory makes; a StopIteration would get lost between threads, and nobody would wake up."""
    try:
        return factory(run)
    except StopIteration as problem:
        raise RuntimeError("StopIteration") from problem


def _import(what: str, load: Callable[[], Any], file: str | None = None) -> types.ModuleType:
    """Import a plugin's module; whatever that raises is the plugin's fault."""
    try:
        module = load()
    except Error:
        raise
    except (Exception, SystemExit) as problem:
        raise PluginError(f"{what} does not import: {describe(problem, file)}") from problem
    if not isinstance(module, types.ModuleType):
        raise PluginError(f"{what} is a {type(module).__name__}; a plugin is a module")
    return module


def _import_file(path: Path) -> tuple[types.ModuleType, str]:
    """Import a plugin file, once; its version is a hash of its text."""
    if not path.is_file():
        raise UsageError(f"--plugin {path}: there is no such file")
    sys.modules.setdefault("sdg_plugin_files", types.ModuleType("sdg_plugin_files"))  # or nothing in it can be pickled
    for known, module in list(sys.modules.items()):  # what a copy of a bundled plugin imports as its neighbour
        if known.startswith("sdg_plugins.") and known != f"sdg_plugins.{path.stem}":
            sys.modules.setdefault(known.replace("sdg_plugins", "sdg_plugin_files", 1), module)
    name, file = f"sdg_plugin_files.{path.stem}", str(path.resolve())
    if name in sys.modules and sys.modules[name].__file__ != file:  # another one that is called alike
        name += f"_{xxhash.xxh3_64_hexdigest(file.encode())}"
    module = sys.modules.get(name) or _import(f"plugin {path}", functools.partial(_exec_file, name, Path(file)), file)
    return module, xxhash.xxh3_64_hexdigest(path.read_bytes())


def _exec_file(name: str, path: Path, folder: Path | None = None) -> types.ModuleType:
    """Run a file as the module `name`; with `folder` it is a package of the modules there."""
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(folder)] if folder else None
    )
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _bundled_package() -> str:
    """Make the package `sdg_plugins` importable, and name it.

    In a checkout it is the folder `plugins/` beside this file, even if an older wheel is installed as well.
    """
    here = Path(__file__).resolve().parent
    if "sdg_plugins" not in sys.modules and not (here / "sdg_plugins").is_dir():
        _exec_file("sdg_plugins", here / "plugins" / "__init__.py", here / "plugins")
    return "sdg_plugins"


def begin_process(specs: list[str], module: str, function: str) -> None:
    """Begin a process that was spawned: load the plugins, so that it knows their functions, and call one of these."""
    Plugins.load(specs)
    getattr(importlib.import_module(module), function)()


@contextlib.asynccontextmanager
async def _run_resource(run: Run) -> AsyncIterator[Run]:
    """The run itself, with its options: for rollouts that have some of their own."""
    yield run


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def text_or_file(value: str) -> str:
    """An option's text, or with a leading `@` the content of a file."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise argparse.ArgumentTypeError(f"cannot read {value[1:]}: {problem}") from problem


def json_object(value: str) -> dict[str, Any]:
    """An option's JSON object, with sorted keys."""
    try:
        parsed = orjson.loads(value)  # strict: json.loads takes NaN, which no server does
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"not JSON: {problem}") from problem
    if not isinstance(parsed, dict) or "stream" in parsed:
        raise argparse.ArgumentTypeError("a JSON object without `stream` is wanted")
    return dict(sorted(parsed.items()))


def number(kind: type[int] | type[float], low: float, high: float = 1e9) -> Callable[[str], float]:
    """A converter for options that are numbers between two others, these included."""

    def convert(value: str) -> float:
        number = kind(value)
        if not low <= number <= high:
            bounds = f"at least {low:,}" if high == 1e9 else f"between {low:,} and {high:,}"
            raise argparse.ArgumentTypeError(f"{value}: {bounds} is wanted")
        return number

    convert.__name__ = "number" if kind is float else "whole number"
    return convert


def one_of(*names: str, more: bool = False) -> Callable[[str], str]:
    """A converter for options that take one of some names, or also a whole number."""

    def convert(value: str) -> str:
        if value not in names and not (more and value.isdigit()):
            raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(names)}{', or a number' * more}")
        return value

    return convert


FILENAME = "${rank}_${chunk_index}.parquet"
LONG_DOCUMENTS = ("truncate", "split", "fail")
_count, _natural, _seconds, _ratio = number(int, 1), number(int, 0), number(float, 0.001), number(float, 0)


class Option(NamedTuple):
    """One option of `run`.

    `identity`: another value gives other data, so it is part of the fingerprint. `shared`: all `[configs.NAME]` of a
    process have one value.
    """

    name: str
    metavar: str | None
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    identity: bool = False
    action: str = "store"
    shared: bool = False

    @property
    def dest(self) -> str:
        """Its name in the namespace of options."""
        return self.name[2:].replace("-", "_")

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Add it to a group of a parser."""
        text = self.help if self.default is None else f"{self.help} [{self.default}]"
        settings = {"metavar": self.metavar, "default": self.default, "help": text, "action": self.action}
        if self.action == "store_true":
            settings = {"help": self.help, "action": self.action}
        else:
            settings["type"] = self.type
        group.add_argument(self.name, **settings)


OPTIONS = {
    "input": [
        Option(
            "--input",
            "URI",
            "hf://datasets/OWNER/NAME; parquet, jsonl or csv: file, folder, glob, s3://…; default: a demo",
        ),
        Option("--prompt-column", "NAME", "a column of strings, or of lists of {role, content}", "text", identity=True),
        Option("--id-column", "NAME", "names the documents; default: id if present, else <file>/<row>", identity=True),
        Option("--max-documents", "N", "only the first N of the whole input; may grow from run to run", type=_count),
    ],
    "output": [
        Option(
            "--output",
            "URI",
            "a folder, s3://… or hf://datasets/OWNER/NAME; default: ./output/<rollout>",
            shared=True,
        ),
        Option("--output-config", "NAME", "sub-folder, and the config for load_dataset", "data", shared=True),
        Option("--output-filename", "T", "a template with ${chunk_index}; .jsonl gives jsonl", FILENAME, identity=True),
        Option("--records-per-chunk", "N", "documents of one file and checkpoint", 1000, _count, identity=True),
        Option("--results-column", "NAME", "the column for results", "rollout_results", identity=True),
    ],
    "server": [
        Option("--server", "NAME", "default: endpoint with --base-url or $OPENAI_BASE_URL, else demo", shared=True),
        Option(
            "--base-url",
            "URL",
            "with /v1 or without; repeatable: the least loaded is asked",
            action="append",
            shared=True,
        ),
        Option("--api-key-env", "NAME", "the environment variable that holds the key", "OPENAI_API_KEY", shared=True),
        Option("--model", "NAME", "default: the server's only model", identity=True, shared=True),
        Option(
            "--model-max-context",
            "N",
            "tokens of prompt and answer; default: what the server says",
            type=_count,
            identity=True,
            shared=True,
        ),
        Option("--max-concurrent-generations", "N", "requests in flight", 500, _count),
        Option(
            "--max-concurrent-documents", "N", "documents in flight; default: half as many again, and 16", type=_count
        ),
        Option("--request-timeout", "S", "seconds for one attempt", 600.0, _seconds),
        Option("--max-retries", "N", "attempts after the first", 6, _natural),
    ],
    "sampling": [
        Option("--max-tokens", "N", "of one answer", type=_count, identity=True),
        Option("--temperature", "X", "default of this and the next: the model's own", type=_ratio, identity=True),
        Option("--top-p", "X", "nucleus sampling", type=number(float, 0, 1), identity=True),
        Option("--top-k", "N", "sample from so many tokens", type=int, identity=True),
        Option("--seed", "N", "of a document's first rollout; the next ones count up from it", type=int, identity=True),
        Option("--generation", "JSON", "anything else for the request's payload", type=json_object, identity=True),
        Option("--rollouts-per-document", "N", "independent results", 1, _count, identity=True),
        Option(
            "--long-documents",
            "HOW",
            "those that exceed the context: truncate, split (run the parts, join the results) or fail",
            LONG_DOCUMENTS[0],
            one_of(*LONG_DOCUMENTS),
            identity=True,
        ),
    ],
    "run": [
        Option("--plugin", "P", "rollout, FILE.py or MODULE[:ROLLOUT]; repeatable, the last one runs", action="append"),
        Option("--config", "FILE.toml", "options by the same names; the command line wins", shared=True),
        Option("--max-failure-rate", "X", "stop when more of at least 100 documents fail", 0.1, number(float, 0, 1)),
        Option(
            "--retry-failed", None, "run the failed documents again, and only them", action="store_true", shared=True
        ),
        Option(
            "--rank",
            "I",
            "takes the chunks I, I+N, I+2N…; default: Slurm's array task, else 0",
            type=_natural,
            shared=True,
        ),
        Option(
            "--world-size",
            "N",
            "ranks that share the input; default: Slurm's array, else 1",
            type=_count,
            identity=True,
            shared=True,
        ),
        Option("--state-dir", "D", "default: <output>/.sdg for a folder, else ./.sdg/<output name>", shared=True),
        Option("--fresh", None, "delete what is in state and output, and start over", action="store_true", shared=True),
        Option("--no-progress", None, "no progress bar or lines", action="store_true", shared=True),
        Option("--preview", "N", "show N documents: requests and rows; write nothing", type=_count, shared=True),
    ],
}


def build_parser(plugins: Plugins) -> tuple[argparse.ArgumentParser, dict[str, set[str]]]:
    """The parser of `run`, and which option names each plugin added."""
    parser = argparse.ArgumentParser(
        prog="sdg.py",
        usage="sdg.py [run] [OPTIONS]\n       sdg.py COMMAND [OPTIONS]",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"commands: {', '.join(sorted(plugins.commands))}; each has a --help of its own",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sdg {__version__}")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            option.add_to(group)
    return parser, plugins.add_options(parser)


class Config(NamedTuple):
    """What is generated into one folder of the output: the options, and the plugins that they name."""

    options: argparse.Namespace
    plugins: Plugins

    @property
    def name(self) -> str:
        """The name for `load_dataset`."""
        return str(self.options.output_config)


def parse_configs(argv: list[str]) -> list[Config]:
    """The configs that a command line asks for: those of the tables `[configs.NAME]` in `--config`, else one.

    A table's options replace those above the tables, and the command line wins over both; `--output-config` there takes
    one of them.

    Raises:
        UsageError, PluginError: with the option or plugin named.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    early.add_argument("--output-config")
    asked = argparse.Namespace(config=None, output_config=None)
    with contextlib.suppress(argparse.ArgumentError):  # the full parser will say it
        early.parse_known_args(argv, asked)
    common = _read_toml(asked.config) if asked.config else {}
    if "config" in common:
        raise UsageError(f"--config {asked.config}: `config` is no option for a file; tables are called [configs.NAME]")
    tables = common.pop("configs", None)
    if tables is None:
        return [parse_config(argv, common)]
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"--config {asked.config}: configs are tables, such as [configs.faq]")
    if asked.output_config and asked.output_config not in tables:
        raise UsageError(f"--output-config {asked.output_config}: {nearest(asked.output_config, tables)}")
    common = {"output": f"output/{Path(asked.config).stem}", **common}
    names = [asked.output_config] if asked.output_config else list(tables)
    configs = [parse_config(argv, {**common, "output-config": name}, _dashed(tables[name])) for name in names]
    for config in configs:
        if config.options.state_dir != default_state_dir(config.options.output, config.name):  # it was given, for all
            config.options.state_dir = os.path.join(config.options.state_dir, config.name)
    return configs


def parse_config(argv: list[str], common: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Config:
    """Load the plugins that a command line, a config's own table and what is common name; then as `parse_with`."""
    name = f": [configs.{common['output-config']}]" if own is not None else ""
    argv = as_arguments({**common, **(own or {})}, argv) + argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--plugin", action="append")
    asked = argparse.Namespace(plugin=None)
    with contextlib.suppress(argparse.ArgumentError):  # the full parser will say it
        early.parse_known_args(argv, asked)
    plugins, rollout = Plugins.load(asked.plugin or [])
    return parse_with(plugins, rollout or "summarize", argv, own or {}, name)


def parse_with(
    plugins: Plugins, rollout: str | None, argv: list[str], own: Iterable[str] = (), name: str = ""
) -> Config:
    """Options of `run`, with their defaults derived.

    The namespace also has `rollout` (the rollout's name) and `identity` (names of the options in the fingerprint).

    Args:
        plugins: what is loaded.
        rollout: the rollout's name.
        argv: all options.
        own: names of those that a config's table has; they may not be ones that all configs share.
        name: of the config, for messages.

    Raises:
        UsageError, PluginError: with the option or plugin named.
    """
    parser, added = build_parser(plugins)
    parser.prog += name
    options, unknown = parser.parse_known_args(argv)
    if sum(word.partition("=")[0] == "--input" for word in argv) > 1:
        parser.error("--input is given twice: name a folder, or a glob in quotes")
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, parser._option_string_actions, n=2, cutoff=0.7)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if not word.startswith("-"):
            hint = "; a glob stands in quotes, or the shell makes several words of it"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    core = [option for group in OPTIONS.values() for option in group]
    plugged = set().union(*added.values())
    shared = {option.dest for option in core if option.shared}
    options.rollout = rollout
    try:
        _check_shared(own, shared)
        _derive(options, plugins)
        serving = {plugins.rollouts[options.rollout].plugin, plugins.find("readers", options.reader).plugin}
        plugged_in = set().union(*(added.get(plugin, set()) for plugin in serving))
        _check_idle(options, plugins, added, {a.dest for a in parser._actions if _is_given(a, argv)}, serving)
        _check_shared(own, plugged - plugged_in)
    except UsageError as problem:
        parser.error(str(problem))
    check_rollout(options.rollout, plugins)
    options.identity = sorted(plugged_in | {option.dest for option in core if option.identity})
    return Config(options, plugins)


def _is_given(action: argparse.Action, argv: list[str]) -> bool:
    return any(word.partition("=")[0] in action.option_strings for word in argv)


def _check_shared(own: Iterable[str], shared: set[str]) -> None:
    """See that a config's table has none of the options that all configs share."""
    for key in own:
        if key.replace("-", "_") in shared:
            raise UsageError(f"--{key} is the same for all configs: write {key} above the tables")


def _check_idle(
    options: argparse.Namespace, plugins: Plugins, added: dict[str, set[str]], given: set[str], serving: set[str]
) -> None:
    """See that the plugins whose options are given are in use."""
    in_use = {plugins.servers[options.server].plugin, plugins.find("writers", options.writer).plugin}
    for plugin, dests in added.items():
        if owners := plugins.idle(plugin, serving | in_use):
            for dest in sorted(dests & given):
                raise UsageError(f"--{dest.replace('_', '-')} goes with {owners}")


def _read_toml(path: str) -> dict[str, Any]:
    """A TOML file's options; `configs` are its tables."""
    try:
        return _dashed(tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise UsageError(f"--config {path}: {problem}") from problem


def _dashed(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table by the names that options have."""
    return {key.replace("_", "-"): value for key, value in table.items()}


def as_arguments(table: Mapping[str, Any], argv: list[str]) -> list[str]:
    """A table's options as arguments, without those that the command line has too."""
    given = {word.partition("=")[0] for word in argv}
    arguments = []
    for key, value in table.items():
        name = f"--{key}"
        if name in given or value is False:
            continue
        items = value if isinstance(value, list) else [value]
        if key == "input" and len(items) > 1:
            raise UsageError("input: several are given; name a folder, or a glob")
        for item in items:
            text = json.dumps(item, default=str) if isinstance(item, dict) else str(item)
            arguments.append(name if item is True else f"{name}={text}")
    return arguments


def _derive(options: argparse.Namespace, plugins: Plugins) -> None:
    """Fill in the defaults that depend on other options or on the environment."""
    plugins.find("rollouts", options.rollout)
    for name in ("input", "output", "state_dir"):
        if getattr(options, name) == "":  # as of a shell's variable that was never set: no default is meant
            raise UsageError(f"--{name.replace('_', '-')} is empty")
    options.base_url = [re.sub(r"/(chat/)?completions/*$", "", url) for url in options.base_url or []]
    given = options.base_url or (options.input and os.environ.get("OPENAI_BASE_URL"))
    options.server = options.server or ("endpoint" if given else "demo")
    plugins.find("servers", options.server)
    if options.base_url and options.server != "endpoint":
        raise UsageError(f"--base-url goes with --server endpoint, not {options.server}")
    options.reader = _by_scheme_or_suffix(plugins, "readers", options.input) if options.input else "demo"
    _check_filename(options.output_filename)
    if not re.fullmatch(r"[\w.-]+", options.output_config) or options.output_config in {"failed", ".", "..", ".sdg"}:
        raise UsageError(f"--output-config {options.output_config!r}: a plain folder name is wanted, and not `failed`")
    options.output = expanded(options.output or f"output/{options.rollout}")
    _check_uris(options)
    scheme, name = split_uri(options.output)[0], options.output_filename
    options.writer = scheme if scheme in plugins.writers else _by_scheme_or_suffix(plugins, "writers", name)
    if options.fresh and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        raise UsageError("--fresh in a job that was requeued would delete what it has done: submit it without")
    if options.results_column == "id":
        raise UsageError("--results-column id: that is the column of the documents' names")
    options.state_dir = expanded(options.state_dir or default_state_dir(options.output, options.output_config))
    if options.max_concurrent_documents is None:  # more than requests: some wait for a retry, or compute
        options.max_concurrent_documents = math.ceil(1.5 * options.max_concurrent_generations) + 16
    _derive_rank(options)


def _check_filename(name: str) -> None:
    if "${chunk_index}" not in name:
        raise UsageError("--output-filename needs ${chunk_index}: chunks would overwrite each other")
    if "$" in name.replace("${chunk_index}", "").replace("${rank}", ""):
        raise UsageError("--output-filename: ${rank} and ${chunk_index} are all that it may hold")
    if "/" in name:
        raise UsageError(
            f"--output-filename {name}: a name without folders is wanted; --output-config names the folder"
        )


def _check_uris(options: argparse.Namespace) -> None:
    for uri in (options.input or "", options.output):
        if redact(uri) != uri:
            raise UsageError(f"{redact(uri)}: keys belong in the environment (AWS_ACCESS_KEY_ID…), not in a URI")
    for url in options.base_url or []:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--base-url {redact(url)}: begin it with http:// or https://")


def _derive_rank(options: argparse.Namespace) -> None:
    """Rank and world size from Slurm's array where the options are silent."""
    first, last, task = (os.environ.get(f"SLURM_ARRAY_TASK_{key}") for key in ("MIN", "MAX", "ID"))
    if options.rank is None:
        options.rank = int(task) - int(first or 0) if task else 0
    if options.world_size is None:
        options.world_size = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) if task else 1
        if task and options.world_size != int(last or 0) - int(first or 0) + 1:
            raise UsageError("this Slurm array has gaps: say --rank and --world-size")
    if options.rank >= options.world_size:
        raise UsageError(f"--rank {options.rank} is not below --world-size {options.world_size}")


def default_state_dir(output: str, config: str) -> str:
    """Where a run's state lies: in the output if that is a folder, else below the working directory."""
    scheme, rest = split_uri(redact(output))
    base = Path(rest) / ".sdg" if scheme == "file" else Path(".sdg") / re.sub(r"[^\w.-]+", "-", rest.strip("/"))
    return str(base if config == "data" else base / config)


def expanded(path: str) -> str:
    """A path with the home folder in place of a leading `~`, which shells leave in `--output=~/x`; any other URI."""
    return os.path.expanduser(path) if split_uri(path)[0] == "file" else path


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as ("s3", "bucket/key"); a plain path has the scheme "file"."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def format_of(path: str) -> str:
    """The suffix that tells a file's format: the last one, compression aside."""
    return Path(re.sub(r"\.(gz|zst)$", "", path)).suffix[1:]


def _by_scheme_or_suffix(plugins: Plugins, kind: str, uri: str) -> str:
    """The registered name that stands for a URI: its scheme, else the format of its files."""
    entries: dict[str, Entry] = getattr(plugins, kind)
    scheme, path = split_uri(uri)
    if scheme in entries:
        return scheme
    many = kind == "readers" and (format_of(path) not in entries or any(mark in path for mark in "*?["))
    formats = sorted({format_of(name) for name in ([name for name, _ in list_files(uri)] if many else [path])})
    known = [name for name in formats if name in entries]
    if len(known) == 1:
        return known[0]
    if known:
        raise UsageError(
            f"{redact(uri)} has files of several formats, {' and '.join(known)}: name those of one by a glob"
        )
    raise UsageError(f"{redact(uri)}: no format that is known by suffix or scheme ({', '.join(sorted(entries))})")


# ── Places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def filesystem(uri: str, quick: bool = False) -> tuple[Any, str]:
    """The pyarrow file system of a URI, and the path in it (absolute if local). See `_s3` for `quick`."""
    import pyarrow as pa
    import pyarrow.fs

    scheme, rest = split_uri(uri)
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(rest))
    if scheme == "s3":
        # As in pyarrow's URIs, settings may follow. Any other question mark belongs to a glob.
        path, *settings = re.split(r"\?(?=(?:region|scheme|endpoint_override)=)", rest, maxsplit=1)
        bucket = path.partition("/")[0]
        if not re.fullmatch(r"[\w.:-]+", bucket):
            raise UsageError(f"{redact(uri)}: the name of a bucket is wanted after s3://")
        return _s3(bucket, "".join(settings), quick), path.rstrip("/")
    try:
        try:
            fs, path = pyarrow.fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid:  # a scheme that pyarrow does not know
            import fsspec

            other, path = fsspec.core.url_to_fs(uri)
            fs = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
    except (ImportError, ValueError, OSError) as problem:
        reason = " ".join(str(problem).split())
        raise UsageError(f"{redact(uri)}: {reason}; known are folders, s3://, gs://, and what fsspec has") from problem
    return fs, str(path)


def s3_endpoint() -> str | None:
    """The server that stands for AWS, as its own programs have it from the environment."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@functools.cache
def _s3(bucket: str, settings: str, quick: bool) -> Any:
    """A client for a bucket; `settings` are those of pyarrow's URIs (`region=…&endpoint_override=…`).

    It bears with a server that is overloaded or gone for about a minute, a `quick` one for some seconds. A client from
    `FileSystem.from_uri` would give up sooner, and wait 3 s for an answer: large uploads take longer to be completed.
    Keys and roles are found by AWS's library, and the region, too, where the bucket cannot be asked for it.
    """
    import pyarrow.fs

    options: dict[str, Any] = {"endpoint_override": s3_endpoint(), **dict(urllib.parse.parse_qsl(settings))}
    if not options["endpoint_override"] and "region" not in options:
        options["region"] = _region_of(bucket)
    asked = os.environ.get("AWS_MAX_ATTEMPTS", "")
    attempts = QUICK_ATTEMPTS if quick else int(asked) if asked.isdigit() else S3_ATTEMPTS
    return pyarrow.fs.S3FileSystem(
        **options,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=5,
        request_timeout=5 if quick else 60,
    )


@functools.cache
def _region_of(bucket: str) -> str | None:
    """The bucket's region, if AWS can be asked: in a private network the environment has to say it."""
    import pyarrow.fs

    try:
        return str(pyarrow.fs.resolve_s3_region(bucket))
    except OSError:
        return None


@contextlib.contextmanager
def reaching(uri: str, kind: type[Error]) -> Iterator[None]:
    """Say of errors of a file system which place they concern and, of S3, what decides on the access."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as problem:
        at, hint = "", ""
        if split_uri(uri)[0] == "s3":
            at = f" at {redact(endpoint)}" if (endpoint := s3_endpoint()) else ""
            hint = f"; {S3_VARIABLES} decide"
        option = "--input " if kind is InputError else ""
        raise kind(f"{option}{redact(uri)}{at} cannot be used: {reason_of(problem)}{hint}") from problem


def list_files(uri: str) -> list[tuple[str, int]]:
    """Paths and sizes (bytes) of the files that a URI means, sorted: one file, a folder with all below it, or a glob.

    Of a folder nothing is taken that is hidden (`.git`, `_temporary`), or the output of a run.

    Raises:
        InputError: there are none, or the place cannot be read.
    """
    import glob

    import pyarrow.fs

    fs, path = filesystem(uri, quick=True)
    local = isinstance(fs, pyarrow.fs.LocalFileSystem)
    root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    with reaching(uri, InputError):
        if not any(mark in path for mark in "*?[") or (local and os.path.exists(path)):
            infos, root = _files_below(uri, path), path
        elif local:
            infos = fs.get_file_info(glob.glob(path, recursive=True))
        else:
            infos = _files_below(uri, root)
            infos = [info for info in infos if fnmatch.fnmatch(info.path, path)]
    names = {info.path: info.path[len(root) :].lstrip("/") for info in infos}
    outputs = tuple({f"{name.partition('/.sdg')[0]}/" for name in names.values() if re.search(r"/\.sdg(/|$)", name)})
    found = [
        (info.path, info.size)
        for info in infos
        if info.is_file and not re.search(r"(^|/)(_|\.[^.])", name := names[info.path]) and not name.startswith(outputs)
    ]
    if not found:
        raise InputError(f"--input {uri}: there are no files")
    return sorted(found)


def _files_below(uri: str, path: str) -> list[Any]:
    """The file that has this path, or all below it if it is a folder."""
    import pyarrow.fs

    first, _ = filesystem(uri, quick=True)
    info = first.get_file_info(path)
    if info.type == pyarrow.fs.FileType.NotFound:
        bucket = path.partition("/")[0]
        if split_uri(uri)[0] == "s3" and first.get_file_info(bucket).type == info.type:
            raise InputError(f"--input {uri}: there is no bucket {bucket}")
        name = re.fullmatch(r"(?:https://huggingface\.co/datasets/)?([\w.-]+/[\w.-]+)", uri)
        hint = f"; a dataset on the Hub would be hf://datasets/{name[1]}" if name else ""
        raise InputError(f"--input {uri}: there is no such file or folder{hint}")
    if info.is_file:
        return [info]
    return list(filesystem(uri)[0].get_file_info(pyarrow.fs.FileSelector(path, recursive=True)))


class InputFiles:
    """The files of `--input` that have a suffix: for readers of formats."""

    def __init__(self, uri: str, suffix: str) -> None:
        self.fs, _ = filesystem(uri)
        self.local = self.fs.type_name == "local"
        found = [(file, size) for file, size in list_files(uri) if format_of(file) == suffix]
        if not found:
            raise InputError(f"--input {uri}: there are no .{suffix} files")
        self.paths = [file for file, _ in found]
        self.sizes = [size for _, size in found]
        root = os.path.commonpath(self.paths) if len(found) > 1 else os.path.dirname(found[0][0])
        self.names = [os.path.relpath(file, root) for file in self.paths]

    @functools.cached_property
    def identity(self) -> dict[str, list[Any]]:
        """Size and a hash of the first and the last 64 KiB of each file, by name."""
        with ThreadPoolExecutor(16) as pool:
            marks = pool.map(self._mark, range(len(self.paths)), self.sizes)
            return {name: [size, mark] for name, size, mark in zip(self.names, self.sizes, marks, strict=True)}

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """Whether `earlier` is a beginning of these files: all its files come first, and only its last one grew."""
        known = list(earlier)
        if known != self.names[: len(known)]:
            return False
        same = all(earlier[name] == self.identity[name] for name in known[:-1])
        size, mark = earlier[known[-1]]
        return same and self.sizes[len(known) - 1] >= size and self._mark(len(known) - 1, size) == mark

    def open(self, i: int) -> Any:
        """A file for reading, as bytes lie on the disk."""
        return self.fs.open_input_file(self.paths[i])

    def _mark(self, i: int, size: int) -> str:
        """A hash of the two ends of a file's first `size` bytes."""
        with self.open(i) as file:
            mark = xxhash.xxh3_64(file.read(min(65536, size)))
            file.seek(max(0, size - 65536))
            mark.update(file.read(min(65536, size)))
        return mark.hexdigest()


class Place:
    """A folder on a file system that pyarrow knows. A file appears there whole, durable, or not at all."""

    def __init__(self, uri: str) -> None:
        import pyarrow.fs

        scheme, _ = split_uri(uri)
        if scheme == "s3":
            _look_at_bucket(uri)
        self.fs, self.root = filesystem(uri)
        self.uri = uri if scheme == "file" else f"{scheme}://{self.root}"
        self.local = isinstance(self.fs, pyarrow.fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a name in this place."""
        return f"{self.root}/{name}"

    def write(self, name: str, produce: Callable[[Any], None]) -> None:
        """Write a file by calling `produce` with an open binary file. Raises OutputError, and leaves nothing then."""
        target = self.path(name)
        try:
            (self._replace if self.local else self._put)(target, produce)
        except OSError as problem:
            ours = self.local or problem.errno is None
            where = target if ours else f"{tempfile.gettempdir()}, where files are made for {self.uri},"
            raise OutputError(f"{where} cannot be written: {reason_of(problem)}") from problem

    def _replace(self, target: str, produce: Callable[[Any], None]) -> None:
        folder, _, base = target.rpartition("/")
        temporary = f"{folder}/.{base}.tmp"
        try:
            self.fs.create_dir(folder, recursive=True)
            with self.fs.open_output_stream(temporary, compression=None) as file:
                produce(file)
            sync(temporary)
            os.replace(temporary, target)
            sync(folder)
        except OSError:
            with contextlib.suppress(OSError):
                self.fs.delete_file(temporary)
            raise

    def _put(self, target: str, produce: Callable[[Any], None]) -> None:
        """Make the file here and put it there when it is whole: pyarrow would publish one that `produce` broke off."""
        with tempfile.TemporaryFile() as whole:
            with open(os.dup(whole.fileno()), "wb") as file:  # one that `produce` may close
                produce(file)
            size = whole.seek(0, os.SEEK_END)
            whole.seek(0)
            if self.fs.type_name not in OBJECT_STORES:
                self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            try:
                with self.fs.open_output_stream(target, compression=None) as stream:
                    shutil.copyfileobj(whole, stream, PUT_BYTES)
            except OSError:
                with contextlib.suppress(OSError):  # leaving the stream has published what there was of it
                    self.fs.delete_file(target)
                raise
        there = self.fs.get_file_info(target).size
        if there != size:
            with contextlib.suppress(OSError):
                self.fs.delete_file(target)
            raise OSError(f"{size} bytes were put, {there} are there")

    def open(self, name: str) -> Any:
        """A file for reading; FileNotFoundError if there is none."""
        return self.fs.open_input_file(self.path(name))

    def delete(self, name: str) -> None:
        """Remove a file if there is one. Raises OutputError. (On S3, pyarrow leaves an empty object for the folder.)"""
        with reaching(self.uri, OutputError), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def list(self, folder: str) -> list[str]:
        """Names (with the folder) of the files directly in a folder; none if it does not exist. Raises OutputError."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self.path(folder), allow_not_found=True)
        with reaching(self.uri, OutputError):
            return sorted(f"{folder}/{info.base_name}" for info in self.fs.get_file_info(selector) if info.is_file)


def _look_at_bucket(uri: str) -> None:
    """Raise OutputError if S3 cannot be reached, or has no such bucket, or not for us: before anything is generated."""
    import pyarrow.fs

    fs, root = filesystem(uri, quick=True)
    with reaching(uri, OutputError), contextlib.suppress(FileNotFoundError):
        # To list what is not there takes one request, whose errors have texts: those of a HEAD have none.
        fs.get_file_info(pyarrow.fs.FileSelector(f"{root}/.sdg"))


def sync(path: str | Path) -> None:
    """Make a file's or folder's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason_of(problem: OSError | sqlite3.Error) -> str:
    """Why a file operation failed, with the way out where there is one."""
    full = getattr(problem, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or (
        getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    )
    return "the disk is full: make room, then run the same command again" if full else " ".join(str(problem).split())


def publish_once(run: Run, name: str, content: bytes) -> bytes:
    """Create a file of the state unless it exists, atomically. Returns what is there: of many ranks the first wins."""
    temporary = _write_temporary(run, name, content)
    with contextlib.suppress(FileExistsError):
        os.link(temporary, run.state / name)
    temporary.unlink()
    sync(run.state)
    return (run.state / name).read_bytes()


def replace_file(run: Run, name: str, content: bytes) -> None:
    """Write a file of the state, whole and durable."""
    os.replace(_write_temporary(run, name, content), run.state / name)
    sync(run.state)


def _write_temporary(run: Run, name: str, content: bytes) -> Path:
    # The rank's lock keeps the name from being used twice, and a rerun overwrites what a crash left.
    temporary = run.state / f".{run.options.rank:05d}.{name}.tmp"
    temporary.write_bytes(content)
    sync(temporary)
    return temporary


def redact(url: str) -> str:
    """A URL without the password or key that it may carry."""
    return re.sub(r"([?&][\w-]*(?:key|token)=)[^&\s]+", r"\1***", re.sub(r"//[^/]*@", "//***@", url))


# ── Schema of results ────────────────────────────────────────────────────────────────────────────────────────────────
# Each row holds a list of structs: text, reasoning, finish_reason, usage, then the rollout's own fields, then `extra`.


def base_fields() -> dict[str, pa.DataType]:
    """The fields of every result."""
    import pyarrow as pa

    text = dict.fromkeys(("text", "reasoning", "finish_reason"), pa.string())
    return {**text, "usage": pa.struct([(name, pa.int64()) for name in TOKENS]), "truncated": pa.bool_()}


def results_type(fields: Mapping[str, pa.DataType]) -> pa.DataType:
    """The Arrow type of the results column."""
    import pyarrow as pa

    return pa.list_(pa.struct([*fields.items(), ("extra", pa.string())]))


def annotated_fields(rollout: Callable[..., Any]) -> dict[str, pa.DataType] | None:
    """Fields that a rollout's return annotation promises; None if it promises nothing."""
    try:
        return _promised(typing.get_type_hints(rollout).get("return"))
    except Exception:  # noqa: BLE001 - an annotation may be anything; it is a promise only if it can be read
        return None


def _promised(wanted: Any) -> dict[str, pa.DataType] | None:
    parts = [part for part in _alternatives(wanted) if part is not type(None)]
    if len(parts) == 1 and typing.get_origin(parts[0]) is list:
        parts = _alternatives(typing.get_args(parts[0])[0])
    if not parts or not all(part in {str, Reply} or _members(part) for part in parts):
        return None
    members = {name: kind for part in parts if part not in {str, Reply} for name, kind in _members(part).items()}
    return {name: kind for name, kind in ((n, arrow_type(k)) for n, k in members.items()) if kind is not None}


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union; a type by itself is the only one."""
    is_union = typing.get_origin(annotation) in {typing.Union, types.UnionType}
    return list(typing.get_args(annotation)) if is_union else [annotation]


def _members(annotation: Any) -> dict[str, Any]:
    """Names and types of a TypedDict's, dataclass's or pydantic model's fields; none for anything else."""
    is_model = dataclasses.is_dataclass(annotation) or hasattr(annotation, "model_fields")
    shaped = typing.is_typeddict(annotation) or is_model
    return typing.get_type_hints(annotation) if shaped and annotation is not Reply else {}


def arrow_type(annotation: Any) -> pa.DataType | None:
    """The Arrow type of a Python type; None where there is none (its values are kept as JSON in `extra`)."""
    import pyarrow as pa

    plain = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if origin in {typing.Required, typing.NotRequired, typing.Annotated}:
        return arrow_type(arguments[0])
    if origin is typing.Literal and len({type(value) for value in arguments}) == 1:
        return arrow_type(type(arguments[0]))
    parts = [part for part in _alternatives(annotation) if part is not type(None)]
    if origin in {typing.Union, types.UnionType}:
        return arrow_type(parts[0]) if len(parts) == 1 else None
    if origin is list:
        item = arrow_type(arguments[0])
        return item and pa.list_(item)
    members = [(name, arrow_type(kind)) for name, kind in _members(annotation).items()]
    return pa.struct(members) if members and all(kind is not None for _, kind in members) else None


def infer_fields(results: Iterable[Mapping[str, Any]]) -> dict[str, pa.DataType]:
    """Fields of results without an annotation: each key whose values all have one type."""
    columns: dict[str, list[Any]] = {}
    for result in results:
        for key, value in result.items():
            columns.setdefault(key, []).append(value)
    kinds = {key: infer_type(values) for key, values in sorted(columns.items())}
    return {key: kind for key, kind in kinds.items() if kind is not None}


def infer_type(values: list[Any]) -> pa.DataType | None:
    """The one Arrow type of some JSON values; None if they have several, or none at all."""
    import pyarrow as pa
    import pyarrow.types

    try:
        kind = pa.infer_type(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return None
    if (pyarrow.types.is_struct(kind) and not kind.num_fields) or has_null(kind):
        return None
    return kind if all(map(checker(kind), values)) else None


def has_null(kind: pa.DataType) -> bool:
    """Whether some part of a type is the type of columns that have no value yet."""
    import pyarrow.types

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return bool(pyarrow.types.is_null(kind)) or any(map(has_null, inner))


def checker(kind: pa.DataType) -> Callable[[Any], bool]:
    """A function that says whether a JSON value can be stored as this Arrow type without losing anything.

    Made once per type: asking Arrow about its types for each value would cost more than writing the value.
    """
    import pyarrow.types as t

    if t.is_struct(kind):
        fields = {field.name: checker(field.type) for field in kind}
        return lambda value: (
            value is None
            or (isinstance(value, dict) and all(key in fields and fields[key](item) for key, item in value.items()))
        )
    if t.is_list(kind):
        inner = checker(kind.value_type)
        return lambda value: value is None or (isinstance(value, list) and all(inner(item) for item in value))
    if t.is_boolean(kind):
        return lambda value: value is None or isinstance(value, bool)
    if t.is_integer(kind):
        return lambda value: value is None or (type(value) is int and -(2**63) <= value < 2**63)
    if t.is_floating(kind):
        return lambda value: value is None or type(value) is float or (type(value) is int and abs(value) <= 2**53)
    return lambda value: value is None or (isinstance(value, str) and t.is_string(kind))


def fit(result: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """A result as a struct of the fields that `checks` accepts: what does not fit stands as JSON in `extra`."""
    good, rest = {}, {}
    for key, value in result.items():
        if key in checks and checks[key](value):
            good[key] = value
        else:
            rest[key] = value
    if rest:
        good["extra"] = orjson.dumps(rest, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS).decode()
    return good


def unfit(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result that `fit` was given, from a row of the output."""
    kept = {key: value for key, value in result.items() if value is not None and key != "extra"}
    return {**kept, **json.loads(result.get("extra") or "{}")}


def results_of(value: Any, usage: Usage | None) -> list[dict[str, Any]]:
    """What a rollout returned, as a list of results; none for None.

    Args:
        value: a str, dict, Reply, dataclass, pydantic model, a list of those, or None.
        usage: tokens of the whole rollout, for results that are not themselves one answer of the model.

    Raises:
        BadResult: it is something else.
    """
    if value is None:
        return []
    if isinstance(value, list):
        parts = [results_of(item, None) for item in value]
        results = [result for part in parts for result in part]
        if usage and results and not any("usage" in result for result in results):
            results[0] = {**results[0], "usage": usage}
        return results
    if isinstance(value, Reply):
        untouched = value.choices and dataclasses.replace(value, choices=()) == value.choices[0]
        return [_reply_result(choice) for choice in (value.choices if untouched else (value,))]
    if isinstance(value, str):
        value = {"text": value}
    elif hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        missing = "await" if inspect.isawaitable(value) else "list(…)" if isinstance(value, Iterable) else ""
        hint = f"is {missing} missing?" if missing else "it may be a str, dict, Reply, list or None"
        raise BadResult(f"the rollout returned a {type(value).__name__}: {hint}")
    if not all(isinstance(key, str) for key in value):
        raise BadResult("the rollout returned a dict with keys that are not str: they name the fields of the result")
    return [value if "usage" in value or not usage else {**value, "usage": usage}]


def _reply_result(reply: Reply) -> dict[str, Any]:
    names = ("text", "reasoning", "finish_reason", "usage", "tool_calls", "logprobs")
    return {name: value for name in names if (value := getattr(reply, name)) is not None}


# ── Store ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LOCAL_FILE_SYSTEMS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}

TABLES = """
    CREATE TABLE IF NOT EXISTS chunks (
        chunk INTEGER PRIMARY KEY, start INTEGER, count INTEGER, bookmark TEXT,
        written INTEGER, filtered TEXT, failed TEXT);
    -- id = chunk << 32 | position: a chunk is one range of the tree
    CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY, status TEXT, body TEXT);
    CREATE TABLE IF NOT EXISTS requests (document INTEGER, key BLOB, body TEXT);
    CREATE INDEX IF NOT EXISTS requests_by_document ON requests (document);
    CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value REAL);
"""


class Store:
    """The state of one rank: answered requests and finished documents of open chunks, all chunks, totals.

    Answers and outcomes are handed in without waiting; one task commits them in groups. A finished document supersedes
    its requests: those that are still waiting for their commit then are never written.
    """

    def __init__(self, db: aiosqlite.Connection, counts: Counter[str]) -> None:
        self._db = db
        self._counts = counts
        # Not until now: a process that finds all done would change the figures, and with them the dataset card.
        self._started = self._worked_until = time.monotonic()
        self._chunks: list[Chunk] = []
        self._documents: list[tuple[int, str, bytes]] = []
        self._requests: dict[int, list[tuple[bytes, bytes]]] = {}
        self._handed = self._durable = 0  # how many of these there ever were
        self._dirty = asyncio.Event()
        self._committed = asyncio.Condition()
        self._turn = asyncio.Lock()
        self._closing = False
        self.base: Counter[str] = Counter()  # totals of earlier processes
        self.on_durable: Callable[[list[int]], None] = lambda ids: None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, counts: Counter[str]) -> AsyncIterator[Store]:
        """Open the state file, and commit what is handed in until the end; the last commit is made on the way out.

        Raises:
            StateError: the file is of another version.
            sqlite3.Error: the file is broken, or a commit failed; in the second case the body was cancelled.
        """
        async with _database(path) as db:
            store = cls(db, counts)
            await store._prepare(path)
            async with asyncio.TaskGroup() as tasks:
                committing = tasks.create_task(store._commit_forever())
                try:
                    yield store
                finally:
                    store._closing = True
                    store._dirty.set()
                    await asyncio.wait([committing])

    async def _prepare(self, path: Path) -> None:
        async with self._db.execute("PRAGMA user_version") as cursor:
            (version,) = await cursor.fetchone() or (0,)
        if version not in {0, STATE_VERSION}:
            raise StateError(
                f"state {path} is of version {version}, this sdg writes version {STATE_VERSION}: "
                "finish the run with the sdg that began it, or start over with --fresh"
            )
        mode = "WAL" if file_system_of(path) in LOCAL_FILE_SYSTEMS else "TRUNCATE"  # WAL needs shared memory
        for pragma in (f"journal_mode={mode}", "synchronous=FULL", "cache_size=-8192"):
            await self._db.execute(f"PRAGMA {pragma}")
        await self._db.executescript(TABLES + f"PRAGMA user_version={STATE_VERSION};")
        async with self._db.execute("SELECT name, value FROM totals") as cursor:
            self.base = Counter({name: value async for name, value in cursor})

    # Handing in

    def opened(self, chunk: Chunk) -> None:
        """A chunk was read."""
        self._chunks.append(dataclasses.replace(chunk))
        self._handed_in()

    def answered(self, document: int, key: bytes, body: bytes) -> None:
        """A request of a document has its answer."""
        self._requests.setdefault(document, []).append((key, body))
        self._handed_in()

    def finished(self, document: int, status: str, body: bytes) -> None:
        """A document is final: status row, filtered or failed; body is JSON."""
        self._requests.pop(document, None)
        self._documents.append((document, status, body))
        self._handed_in()

    def _handed_in(self) -> None:
        self._worked_until = time.monotonic()
        self._handed += 1
        self._dirty.set()

    @property
    def crowded(self) -> bool:
        """Whether more is handed in than the disk takes."""
        return len(self._documents) > 20_000

    async def room(self) -> None:
        """Wait until the store is not crowded."""
        async with self._committed:
            await self._committed.wait_for(lambda: not self.crowded)

    async def flush(self) -> None:
        """Wait until all that was handed in is durable."""
        handed = self._handed
        self._dirty.set()
        async with self._committed:
            await self._committed.wait_for(lambda: self._durable >= handed)

    # Committing

    async def _commit_forever(self) -> None:
        while not self._closing:
            await self._dirty.wait()
            self._dirty.clear()
            await self._commit()
            await asyncio.sleep(0 if self._closing else COMMIT_INTERVAL)
        await self._commit()

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[None]:
        """All or nothing, and one at a time: everybody shares the connection."""
        async with self._turn:
            try:
                yield
            except BaseException:
                await self._db.rollback()
                raise
            await self._db.commit()

    async def _commit(self) -> None:
        async with self._transaction():
            # No await lies between these lines: the totals belong to exactly these rows.
            chunks, documents, requests = self._chunks, self._documents, self._requests
            self._chunks, self._documents, self._requests = [], [], {}
            totals, handed = list(self.totals().items()), self._handed
            await self._insert("chunks", 7, [_chunk_row(chunk) for chunk in chunks])
            await self._insert("documents", 3, documents)
            await self._insert("requests", 3, [(i, *answer) for i, answers in requests.items() for answer in answers])
            await self._insert("totals", 2, totals)
        self._durable = handed
        self.on_durable([document for document, _, _ in documents])
        async with self._committed:
            self._committed.notify_all()

    async def _insert(self, table: str, width: int, rows: list[tuple[Any, ...]]) -> None:
        """One statement for many rows: `executemany` takes the GIL back for each row, up to 5 ms when it is busy."""
        for i in range(0, len(rows), 1000):
            some = rows[i : i + 1000]
            marks = ",".join([f"({','.join('?' * width)})"] * len(some))
            values = [value for row in some for value in row]
            await self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES {marks}", values)

    async def written(self, chunk: Chunk) -> None:
        """The chunk's file is durable: record it and drop what it took to make it."""
        span = (chunk.index << 32, (chunk.index + 1) << 32)
        async with self._transaction():
            await self._insert("chunks", 7, [_chunk_row(chunk)])
            await self._db.execute("DELETE FROM documents WHERE id >= ? AND id < ?", span)
            await self._db.execute("DELETE FROM requests WHERE document >= ? AND document < ?", span)

    async def reopen(self, chunk: Chunk, outcomes: Iterable[tuple[int, str, bytes]]) -> None:
        """Make a written chunk open again, with the documents that stay as they are."""
        async with self._transaction():
            await self._insert("documents", 3, [(chunk.index << 32 | i, status, body) for i, status, body in outcomes])
            await self._insert("chunks", 7, [_chunk_row(chunk)])

    async def forget_failures(self) -> None:
        """Make the failed documents of open chunks unfinished."""
        async with self._transaction():
            await self._db.execute("DELETE FROM documents WHERE status = 'failed'")

    # Asking

    def totals(self) -> Counter[str]:
        """Counters over all processes of this rank so far."""
        return self.base + self._counts + Counter({"seconds": self._worked_until - self._started})

    async def chunks(self) -> dict[int, Chunk]:
        """All chunks that were ever read, by index."""
        return await recorded_chunks(self._db)

    async def tally(self) -> Counter[str]:
        """How many documents are a row, filtered or failed."""
        sql = "SELECT status, count(*) FROM documents GROUP BY status"
        async with self._db.execute(sql) as cursor:
            tally: Counter[str] = Counter({status: number async for status, number in cursor})
        for chunk in (await self.chunks()).values():
            if chunk.written:
                tally.update(row=chunk.rows, filtered=len(chunk.filtered), failed=len(chunk.failed))
        return tally

    async def finished_in(self, chunk: Chunk) -> dict[int, str]:
        """Positions and statuses of a chunk's final documents."""
        sql = "SELECT id & 0xffffffff, status FROM documents WHERE id >= ? AND id < ?"
        async with self._db.execute(sql, (chunk.index << 32, (chunk.index + 1) << 32)) as cursor:
            return {row[0]: row[1] async for row in cursor}

    async def answers_to(self, document: int) -> dict[bytes, bytes]:
        """Durable answers of one unfinished document, by key."""
        async with self._db.execute("SELECT key, body FROM requests WHERE document = ?", (document,)) as cursor:
            return {row[0]: row[1] async for row in cursor}

    async def outcomes_of(self, chunk: Chunk) -> list[bytes]:
        """A chunk's documents as JSON lists of [position, status, body], a thousand in each, or fewer if they are big.

        SQLite makes each list in one step, without the GIL.
        """
        first = chunk.index << 32
        lists = []
        for start in range(first, first + chunk.count, 1000):
            lists += await self._outcomes_between(start, min(start + 1000, first + chunk.count))
        return lists

    async def _outcomes_between(self, first: int, end: int) -> list[bytes]:
        sql = """SELECT '[' || group_concat('[' || (id & 0xffffffff) || ',"' || status || '",' || body || ']') || ']'
                 FROM (SELECT * FROM documents WHERE id >= ? AND id < ? ORDER BY id)"""
        try:
            async with self._db.execute(sql, (first, end)) as cursor:
                ((text,),) = await cursor.fetchall()
        except sqlite3.DataError:  # longer than a gigabyte, the most that SQLite has in one piece
            if end - first == 1:
                raise
            middle = (first + end) // 2
            return await self._outcomes_between(first, middle) + await self._outcomes_between(middle, end)
        return [text if isinstance(text, bytes) else text.encode()] if text else []


@contextlib.asynccontextmanager
async def _database(path: Path) -> AsyncIterator[aiosqlite.Connection]:
    """A connection. Cancelled while it opens, it is closed all the same: its thread would outlive the loop."""
    import aiosqlite

    connecting = asyncio.ensure_future(aiosqlite.connect(path, timeout=60))
    try:
        yield await asyncio.shield(connecting)
    finally:
        await (await connecting).close()


def _chunk_row(chunk: Chunk) -> tuple[Any, ...]:
    return (*dataclasses.astuple(chunk)[:5], json.dumps(chunk.filtered), json.dumps(chunk.failed))


async def recorded_chunks(db: aiosqlite.Connection) -> dict[int, Chunk]:
    """All chunks in a state file, by index."""
    async with db.execute("SELECT * FROM chunks ORDER BY chunk") as cursor:
        rows = await cursor.fetchall()
    return {
        index: Chunk(
            index, start, count, bookmark, bool(written), tuple(json.loads(filtered)), tuple(json.loads(failed))
        )
        for index, start, count, bookmark, written, filtered, failed in rows
    }


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a path, as the kernel's mount table names it."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return "apfs"  # macOS: local unless mounted otherwise
    best, kind = "", ""
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape")
        if Path(os.path.realpath(path)).is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    return kind


# ── Client ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Upstream:
    """One server: what the pool knows of it, and what the engine and the plugin that launched it tell each other.

    A plugin that launches servers yields these. It calls `rise` when the server is ready, `fall` when it is not any
    more, `give_up` when it will not come back, and says in `status` what it does meanwhile. No request is sent, and
    none times out, while the server is down. `answers` and `progressed` tell the plugin whether it still works.

    Args:
        url: ends in /v1, or what the endpoint has instead.
        model: the name under which requests find the model, if it is known before the server is up.
        examine: `await examine(crashes)` tells whether a failure just now was the server's death, rather than one
            request's; `crashes` is their number when the request was sent. Without it the server is somebody else's.
    """

    def __init__(
        self, url: str, examine: Callable[[int], Awaitable[bool]] | None = None, model: str | None = None
    ) -> None:
        self.url, self.examine, self.model = url, examine, model
        self.up = asyncio.Event()
        self.gone = False
        self.status = ""
        self.crashes = 0
        self.answers = 0
        self.progressed = 0.0  # loop time of the last answer or token, or of the first request after a rest
        self.active = 0
        self.limit = math.inf  # requests at a time, as the server bears them
        self.growth = 2.0  # of the limit, each time that the server is found without a queue
        self.load: Load | None = None  # as the server reports it
        self.reports: bool | None = None  # whether it reports its load; None until that is known
        self.silent = 0  # looks at its load without an answer
        self.until = 0.0  # set aside until this loop time
        self.failures = 0  # in a row, of requests sent one after the other
        self.failed_at = 0.0
        self.shrunk = 0.0  # when the limit was last halved
        self.suspects: deque[tuple[int, asyncio.Future[Upstream]]] = deque()  # with their shares; see `Pool`
        self.share = 0  # the smallest share of those in flight; 0 if there is no suspect among them
        self.cleared = 0  # suspects that were answered since the server rose
        self.together = 0  # the most requests in flight since none was
        self.convicted = 0  # requests that have killed it, alone with it
        self.doubts = 0  # requests that have broken off, and nobody knows yet whether the server has died
        self.changed: Callable[[], None] = lambda: None  # the pool's
        if examine is None:
            self.up.set()

    def rise(self) -> None:
        """It is ready for requests."""
        self.failures, self.until, self.reports, self.load = 0, 0.0, None, None
        self.limit, self.growth, self.cleared, self.silent = FIRST_LIMIT, 2.0, 0, 0
        self.up.set()
        self.changed()

    def fall(self, crashed: bool) -> None:
        """It takes no requests now; `crashed`: those in flight are lost, and one of them may be the reason."""
        if self.up.is_set():
            self.crashes += crashed
        self.up.clear()

    def give_up(self) -> None:
        """It will not come back: the other servers do its work."""
        self.gone = True
        self.changed()


class Pool:
    """Slots for requests: at most `limit` in flight in all, each on the least loaded server that is well.

    A server that reports its load gets as many requests as keep a short queue in it; see `adapt`. Any other
    that answers 429 or 503 gets half as many at a time, and one more for each limit's worth of answers in twenty
    (additive increase, multiplicative decrease; Chiu and Jain 1989). One that fails several times in a row is set
    aside, ever longer, and comes back with one request at a time.

    Requests that were in flight when a server died are suspects: they go back to that server and no other, before all
    others and apart from them. As many as a sixteenth of those that saw it die, the share of each, are in flight at a
    time, up to four times as many when they are answered. So a request that kills its server is soon alone with it, and
    found, and after a crash by chance the server is soon full again.
    """

    def __init__(self, upstreams: Iterable[Upstream], limit: int) -> None:
        self.limit = limit
        self.upstreams = list(upstreams)
        for upstream in self.upstreams:
            upstream.changed = self._wake
            upstream.limit = limit if upstream.reports is False else min(limit, FIRST_LIMIT)
        self.active = 0
        self.successes = 0
        self._waiting: deque[asyncio.Future[Upstream]] = deque()
        self._alarm: tuple[float, asyncio.Handle] | None = None  # uvloop's handles of short delays have no `when`
        self.stopped = False
        self._loop = asyncio.get_running_loop()
        self._area = 0.0  # integral of `active` over time
        self._since = self._began = self._loop.time()
        self.lost: float | None = None  # since when no server could be connected to

    async def acquire(self, suspicion: Suspicion) -> Upstream:
        """Wait for a slot: on the same server for a request that has seen it die. Cancelled at a stop."""
        if self.stopped:
            raise asyncio.CancelledError
        suspected, crashes, share = suspicion
        if not suspected and not self._waiting and (upstream := self._take(self._loop.time())):
            return upstream
        slot: asyncio.Future[Upstream] = self._loop.create_future()
        if suspected and not suspected.gone:
            # The one that was alone with it goes on at once: what it is should be known soon.
            (suspected.suspects.appendleft if crashes > 1 and share == 1 else suspected.suspects.append)((share, slot))
        else:
            self._waiting.append(slot)
        self._wake()
        try:
            return await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.release(slot.result())
            self._wake()
            raise

    @property
    def _suspects(self) -> bool:
        return any(upstream.suspects for upstream in self.upstreams)

    async def examine(self, upstream: Upstream, crashes: int) -> bool:
        """Have it found out whether the server has died. Suspects wait for that, or they would fall into its grave."""
        assert upstream.examine
        try:
            return await upstream.examine(crashes)
        finally:
            upstream.doubts -= 1
            self._wake()

    def release(self, upstream: Upstream) -> None:
        """Give a slot back."""
        self._measure()
        self.active -= 1
        upstream.active -= 1
        if not upstream.active:
            upstream.share = upstream.together = 0
        if self._waiting or self._suspects:
            self._wake()

    def succeeded(self, upstream: Upstream) -> None:
        """An answer came."""
        self.successes += 1
        upstream.answers += 1
        upstream.progressed = self._loop.time()
        if upstream.failures:
            upstream.failures = 0
            upstream.until = 0.0
        if upstream.limit < self.limit and upstream.reports is False:
            upstream.limit = min(self.limit, upstream.limit + max(1.0, self.limit / 20) / upstream.limit)

    def overloaded(self, upstream: Upstream, sent: float, pause: float | None) -> None:
        """A 429 or 503 came: one halving for all requests that were sent before the last one."""
        now = self._loop.time()
        if sent >= upstream.shrunk:
            upstream.limit = max(1.0, min(upstream.limit, upstream.active) / 2)
            upstream.shrunk = now
        if pause:
            upstream.until = max(upstream.until, now + pause)

    def failed(self, upstream: Upstream, sent: float, patience: int = 8) -> None:
        """No usable answer came. After `patience` failures in a row the server is set aside."""
        if sent < upstream.failed_at:
            return  # one crash breaks all requests in flight, and is one failure
        upstream.failures += 1
        upstream.failed_at = now = self._loop.time()
        if upstream.failures >= patience:
            pause = min(30.0, 0.5 * 2 ** min(upstream.failures - patience, 10))
            upstream.until = max(upstream.until, now + pause)

    def adapt(self, upstream: Upstream, load: Load | None) -> None:
        """Take in what a server reports of its load, each second or so; None if it does not report.

        While it has no queue more requests: twice as many, or an eighth once it had a queue, or where what runs is not
        what was sent (it may be one of several behind an address). Fewer when more wait than an eighth of what runs.
        Others' requests count as well: a server that ranks share is not flooded by all of them.
        """
        if load is None:
            if upstream.reports is None:  # nothing to go by but 429 and 503
                upstream.reports, upstream.limit = False, self.limit
        else:
            if load.tokens and upstream.load and load.tokens > (upstream.load.tokens or 0):
                upstream.progressed = self._loop.time()
            upstream.reports, upstream.load = True, load
            queue = max(4.0, load.running / 8)
            if load.waiting:
                upstream.growth = 1.125
            if load.waiting > queue:
                upstream.limit = max(1.0, min(upstream.limit, upstream.active) - (load.waiting - queue) / 2)
            elif not load.waiting and upstream.active >= 0.8 * int(upstream.limit):
                growth = upstream.growth if load.running >= 0.5 * upstream.active else 1.125
                upstream.limit = min(self.limit, max(upstream.limit + 1, growth * upstream.limit))
        self._wake()

    def stop(self) -> None:
        """Let no further request begin."""
        self.stopped = True
        for upstream in self.upstreams:
            self._waiting.extend(slot for _, slot in upstream.suspects)
            upstream.suspects.clear()
        while self._waiting:
            self._waiting.popleft().cancel()

    @property
    def seconds(self) -> float:
        """Since the first request: a server that is launched may load for long before that."""
        return self._loop.time() - self._began

    @property
    def mean_in_flight(self) -> float:
        """Requests in flight, averaged over the time since the first one."""
        self._measure()
        return self._area / max(self._since - self._began, 1e-9)

    def _measure(self) -> None:
        now = self._loop.time()
        self._area += self.active * (now - self._since)
        self._since = now

    def _take(self, now: float) -> Upstream | None:
        if self.active >= self.limit:
            return None
        best: Upstream | None = None
        for upstream in self.upstreams:
            if upstream.until > now or not upstream.up.is_set() or upstream.suspects or upstream.share:
                continue
            allowed = 1 if upstream.failures >= 3 else upstream.limit
            if upstream.active + 1 <= allowed and (not best or upstream.active < best.active):
                best = upstream
        if best:
            self._occupy(best, now)
        return best

    def _occupy(self, upstream: Upstream, now: float) -> None:
        if not self._area and not self.active:
            self._began = self._since = now
        self._measure()
        if not upstream.active and not upstream.failures:
            upstream.progressed = now
        self.active += 1
        upstream.active += 1
        upstream.together = max(upstream.together, upstream.active)

    def _admit_suspects(self, upstream: Upstream, now: float) -> None:
        if upstream.gone:
            self._waiting.extendleft(slot for _, slot in reversed(upstream.suspects))
            upstream.suspects.clear()
        while upstream.suspects:
            share, slot = upstream.suspects[0]
            share = min(share, upstream.share or share)
            if not slot.done():
                most = share if share == 1 else min(4 * share, share + upstream.cleared)
                ready = upstream.up.is_set() and not upstream.doubts and upstream.until <= now
                if not ready or self.active >= self.limit or upstream.active >= most:
                    break
                upstream.share = share
                self._occupy(upstream, now)
                slot.set_result(upstream)
            upstream.suspects.popleft()

    def _wake(self) -> None:
        now = self._loop.time()  # once: what is set aside for `_take` must be so for the alarm, too
        if self._suspects:
            for upstream in self.upstreams:
                self._admit_suspects(upstream, now)
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
            elif free := self._take(now):
                self._waiting.popleft().set_result(free)
            else:
                break
        aside = min((upstream.until for upstream in self.upstreams if upstream.until > now), default=None)
        if (self._waiting or self._suspects) and aside and (not self._alarm or self._alarm[0] > aside):
            if self._alarm:
                self._alarm[1].cancel()
            self._alarm = aside, self._loop.call_at(aside, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._wake()


class Suspicion(NamedTuple):
    """That a request has killed a server: `of` which, after how many crashes, and in how much company it may go on."""

    of: Upstream | None = None
    crashes: int = 0
    share: int = 0


class Client:
    """Sends payloads until they are answered or given up. `stop(error)` is called when the run cannot go on."""

    def __init__(self, session: aiohttp.ClientSession, pool: Pool, run: Run, stop: Callable[[Error], None]) -> None:
        self.session, self.pool, self.counts, self._stop = session, pool, run.counts, stop
        self.max_retries: int = run.options.max_retries
        self.timeout: float = run.options.request_timeout
        self.key_name: str = run.options.api_key_env

    async def post(self, path: str, body: bytes) -> tuple[Reply, bytes]:
        """Send one payload to the pool.

        Args:
            path: below the base URL, such as `/chat/completions`.
            body: the payload as JSON.

        Returns:
            The answer, and its body as JSON.

        Raises:
            RequestFailed: refused, or no attempt is left.
        """
        attempts = spent = storms = 0
        suspicion, successes = Suspicion(), self.pool.successes
        while True:
            upstream = await self.pool.acquire(suspicion)
            if upstream is not suspicion.of:
                suspicion = Suspicion()
            before = upstream.crashes
            try:
                answer = await self._attempt(upstream, path, body)
                upstream.cleared += suspicion.crashes > 0
                return answer
            except RequestFailed as problem:
                failure, together = problem, upstream.together
                doubtful = failure.breaks_off and upstream.examine is not None
                upstream.doubts += doubtful
            finally:
                self.pool.release(upstream)
            died = doubtful and await self.pool.examine(upstream, before)
            if self.pool.stopped and (failure.retry or failure.status == 401):
                raise asyncio.CancelledError  # the run's fault, not the document's
            if failure.unreached:
                continue  # the server is set aside or down: waiting for a slot is the pause
            if died:
                suspicion = self._suspect(upstream, suspicion.crashes + 1, together)
                continue
            failure.attempts = attempts = attempts + 1
            # An overloaded server that still answers others will answer this request, too.
            overload = failure.status in {429, 503}
            storms += overload
            spent += not overload or self.pool.successes == successes
            successes = self.pool.successes
            if not failure.retry or spent > self.max_retries or storms > STORM_PATIENCE * self.max_retries:
                self.counts[f"given_up.{failure.cause}"] += 1
                raise failure
            self.counts[f"retries.{failure.cause}"] += 1
            longest = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(attempts, 10))
            await asyncio.sleep(max(failure.retry_after or 0.0, random.uniform(0, longest)))  # full jitter

    def _suspect(self, upstream: Upstream, crashes: int, together: int) -> Suspicion:
        """What is held against a request whose server has died, with `together` requests in flight, so many times."""
        self.counts["retries.crash"] += 1
        if crashes < 3 or together > 1:
            return Suspicion(upstream, crashes, max(1, together // 16))
        upstream.convicted += 1
        self.counts["given_up.crash"] += 1
        message = f"the server died each of the {crashes} times that it had this request, at last alone with it"
        failure = RequestFailed("crash", message)
        failure.attempts = crashes
        raise failure

    async def _attempt(self, upstream: Upstream, path: str, body: bytes) -> tuple[Reply, bytes]:
        """One request and its answer; the pool learns how it went."""
        import aiohttp

        sent = self.pool._loop.time()
        self.counts["requests"] += 1
        try:
            data = body if len(body) < 1 << 20 else io.BytesIO(body)  # aiohttp sends the second kind in pieces
            async with self.session.post(upstream.url + path, data=data) as response:
                raw = without_key(await response.read(), self.key_name)
            self.pool.lost = None
            if response.status != 200:
                raise self._refused(upstream, response, raw, sent)
            try:
                answer = orjson.loads(raw)
            except ValueError as problem:
                raise RequestFailed("body", f"the answer is not JSON: {problem}: {_shown(raw)}") from problem
            self._count_tokens(answer)
            reply = parse_reply(answer)
        except TimeoutError as problem:
            self.pool.failed(upstream, sent)
            raise RequestFailed("timeout", f"no answer within {self.timeout:g} s") from problem
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as problem:
            self.counts["requests"] -= 1
            raise self._unreachable(upstream, problem, sent) from problem
        except (aiohttp.ClientError, ConnectionError) as problem:
            self.pool.failed(upstream, sent)
            raise RequestFailed("connection", f"the connection broke: {problem or type(problem).__name__}") from problem
        self.pool.succeeded(upstream)
        self._heed_quota(upstream, response)
        return reply, raw

    def _heed_quota(self, upstream: Upstream, response: aiohttp.ClientResponse) -> None:
        if pause := quota_pause(response.headers):
            upstream.until = max(upstream.until, self.pool._loop.time() + pause)

    def _refused(self, upstream: Upstream, response: aiohttp.ClientResponse, raw: bytes, sent: float) -> RequestFailed:
        """Make an error of an answer that is not 200."""
        status = response.status
        retry = status in {408, 409, 425, 429} or status >= 500
        said = (error_text(raw) or str(response.reason)).encode()  # decoded, it may have the key again
        message = f"{status} from {redact(upstream.url)}: {without_key(said, self.key_name).decode()}"
        failure = RequestFailed(str(status), message, status=status, retry=retry)
        failure.retry_after, failure.body = retry_after(response.headers), raw
        if status == 401:
            self._stop(ServerError(f"{message}; is the key in ${self.key_name} right?"))
        elif status in {429, 503}:
            self.pool.overloaded(upstream, sent, failure.retry_after)
        elif retry:
            self.pool.failed(upstream, sent)
        else:
            upstream.failures = 0
        self._heed_quota(upstream, response)
        return failure

    def _unreachable(self, upstream: Upstream, problem: Exception, sent: float) -> RequestFailed:
        """No connection: set the server aside. When all have been gone for too long the run ends."""
        self.pool.failed(upstream, sent, patience=1)
        self.pool.lost = self.pool.lost or sent
        silent = self.pool._loop.time() - self.pool.lost
        if silent > self.timeout and not upstream.examine:  # else the supervisor decides
            self._stop(ServerError(f"no server could be reached for {silent:.0f} s ({problem}); start one, run again"))
        failure = RequestFailed("connection", str(problem))
        failure.unreached = True
        return failure

    def _count_tokens(self, answer: Any) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if isinstance(usage, dict):
            for name in ("prompt_tokens", "completion_tokens"):
                if is_count(usage.get(name)):
                    self.counts[name] += usage[name]


def parse_reply(answer: Any) -> Reply:
    """A chat or completion answer as the protocol has it (https://platform.openai.com/docs/api-reference).

    With `sdg_truncated`, which is ours, it is the answer to a prompt that was cut.

    Raises:
        RequestFailed: it has another shape, or neither text nor a tool call.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise RequestFailed("body", f"the answer has no choices: {_shown(json.dumps(answer).encode())}")
    usage = answer.get("usage")
    usage = {name: usage[name] for name in TOKENS if is_count(usage.get(name))} if isinstance(usage, dict) else None
    replies: list[Reply] = []
    for choice in choices:
        reply = _parse_choice(choice, usage if not replies else None, bool(answer.get("sdg_truncated")))
        if reply.text or reply.tool_calls:
            replies.append(reply)
    if not replies:
        reason = choices[0].get("finish_reason")
        thought = ", all of its tokens went into reasoning" if _parse_choice(choices[0]).reasoning else ""
        hint = "; raise --max-tokens" if reason == "length" else ""
        message = f"the answer is empty (finish_reason {reason}){thought}{hint}"
        raise RequestFailed("empty", message, retry=reason != "length")
    return dataclasses.replace(replies[0], choices=tuple(replies)) if len(replies) > 1 else replies[0]


def is_count(value: Any) -> bool:
    """Whether a server's figure can be a number of tokens; sums of what it makes up would not fit into the state."""
    return isinstance(value, int) and 0 <= value < 1 << 40


def _parse_choice(choice: dict[str, Any], usage: Usage | None = None, truncated: bool = False) -> Reply:
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    content = message.get("content")
    if isinstance(content, list):  # of parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return Reply(
        content if isinstance(content, str) else "",
        message.get("reasoning_content") or message.get("reasoning"),
        choice.get("finish_reason"),
        usage,
        message.get("tool_calls") or None,
        choice.get("logprobs"),
        truncated,
    )


def without_key(raw: bytes, key_name: str) -> bytes:
    """What a server said, without the key: it goes into messages, records and state.

    Short keys are no secrets, but words such as EMPTY, which answers may have, too.
    """
    key = os.environ.get(key_name, "").encode()
    return raw.replace(key, b"***") if len(key) >= SHORTEST_KEY else raw


def error_text(raw: bytes) -> str:
    """The message in an error's body: OpenAI and vLLM nest it, SGLang is flat, others say `detail`."""
    try:
        body = json.loads(raw)
    except ValueError:
        return _shown(raw)
    if isinstance(body, dict):
        error = body.get("error")
        inner = error if isinstance(error, dict) else body
        for name in ("message", "detail", "error"):
            if inner.get(name):
                return _shown(str(inner[name]).encode(errors="replace"))
    return _shown(raw)


def _shown(raw: bytes) -> str:
    text = " ".join(raw[:600].decode(errors="replace").split())
    return text if len(text) <= 300 else text[:300] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: a number, or an HTTP date (RFC 9110, section 10.2.3)."""
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After")
    try:
        if "retry-after-ms" in headers:  # Azure's, and more exact
            return min(max(0.0, float(headers["retry-after-ms"]) / 1000), LONGEST_REST)
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return None
    return min(max(0.0, seconds), LONGEST_REST) if math.isfinite(seconds) else None


def quota_pause(headers: Mapping[str, str]) -> float:
    """Seconds until a quota that is used up is renewed; 0 if something is left of it, or none is told.

    OpenAI's headers (https://platform.openai.com/docs/guides/rate-limits), which others have taken over: requests and
    tokens that remain, and until when in Go's form of durations, such as `6m0s` or `20ms`.
    """
    pause = 0.0
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[hms]|$)", headers.get(f"x-ratelimit-reset-{kind}", ""))
            units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
            pause = max(pause, sum(float(number) * units[unit] for number, unit in parts))
    return min(pause, LONGEST_REST)


@contextlib.asynccontextmanager
async def connect(run: Run, servers: Sequence[str | Upstream], stop: Callable[[Error], None]) -> AsyncIterator[Client]:
    """A client of the servers, as their plugin yielded them; settles `run.model`.

    Servers that are launched may still be loading then, if the model's name is known.

    Raises:
        ServerError: a server cannot be reached, refuses the key, or does not serve the model.
    """
    import aiohttp

    key = os.environ.get(run.options.api_key_env)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    limit = limit_of_files(run.options.max_concurrent_generations)
    urls = [server if isinstance(server, str) else server.url for server in servers]
    local = all(re.match(r"https?://(127\.|localhost|\[::1\])", url) for url in urls)
    async with aiohttp.ClientSession(
        # vLLM's server closes idle connections after 5 s: ours must not be the ones it is just closing.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=run.options.request_timeout),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=not local,
    ) as session:
        launched = [server for server in servers if isinstance(server, Upstream)]
        known = [server.model for server in launched if server.model]
        if len(known) == len(servers):
            run.model = known[0]
        else:
            for upstream in launched:
                await upstream.up.wait()
            roots = await find_servers(run, session, [s if isinstance(s, str) else s.url for s in servers])
            servers = [s if isinstance(s, Upstream) else Upstream(root) for s, root in zip(servers, roots, strict=True)]
        pool = Pool((server for server in servers if isinstance(server, Upstream)), limit)
        for upstream in pool.upstreams:
            upstream.model = run.model
        async with watch_load(session, pool):
            yield Client(session, pool, run, stop)


async def find_servers(run: Run, session: aiohttp.ClientSession, urls: list[str]) -> list[str]:
    """The APIs' roots; settles `run.model`."""
    found = [await try_models(session, url, run.options.api_key_env) for url in urls]
    dead = [outcome for outcome in found if isinstance(outcome, Unreachable)]
    if len(dead) == len(found):
        raise dead[0]
    for problem in dead:
        say(f"sdg: {problem} The others are used meanwhile.")
    live = [outcome for outcome in found if not isinstance(outcome, Unreachable)]
    run.model = choose_model(run.options.model, sorted({model for _, models in live for model in models or []}))
    for url, outcome in zip(urls, found, strict=True):
        if not isinstance(outcome, Unreachable) and outcome[1] and run.model not in outcome[1]:
            raise ServerError(f"{redact(url)} does not serve {run.model}, but {', '.join(outcome[1])}")
    guesses = [url.rstrip("/") + ("" if url.rstrip("/").endswith("/v1") else "/v1") for url in urls]
    return [
        guess if isinstance(outcome, Unreachable) else outcome[0] for guess, outcome in zip(guesses, found, strict=True)
    ]


class Load(NamedTuple):
    """What a server says of its work, summed over its engines; `kv_use` is the fullest KV cache's share in use."""

    running: float
    waiting: float
    kv_use: float
    tokens: float | None  # ever, of prompts and answers; None if it does not tell


# Names of vLLM (0.10 to 0.32) and SGLang (0.5), in the Prometheus text format
LOAD_METRICS = {
    "running": {"vllm:num_requests_running", "sglang:num_running_reqs"},
    "waiting": {"vllm:num_requests_waiting", "sglang:num_queue_reqs"},
    "kv_use": {"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"},
    "tokens": {
        *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        "sglang:realtime_tokens_total",  # its others move only when a request ends
    },
}


def parse_load(text: str) -> Load | None:
    """The load in a page of metrics (https://prometheus.io/docs/instrumenting/exposition_formats), if it has any."""
    values: dict[str, list[float]] = {name: [] for name in LOAD_METRICS}
    for name, number in re.findall(r"^((?:vllm|sglang):\w+)(?:\{.*\})? (\S+)", text, re.MULTILINE):
        for kind, names in LOAD_METRICS.items():
            if name in names:
                values[kind].append(float(number))
    if not values["running"] or not values["waiting"]:
        return None
    tokens = sum(values["tokens"]) if values["tokens"] else None
    return Load(sum(values["running"]), sum(values["waiting"]), max(values["kv_use"], default=0.0), tokens)


@contextlib.asynccontextmanager
async def background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have something go on beside the body, and end with it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def look_at_load(session: aiohttp.ClientSession, pool: Pool, upstream: Upstream) -> None:
    """Ask a server for its load, and let the pool adapt to it."""
    import aiohttp

    url = upstream.url.removesuffix("/v1") + "/metrics"
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5), allow_redirects=False) as response:
            load = parse_load(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, OSError) as problem:  # too busy, or gone; unless it answers requests meanwhile
        upstream.silent += isinstance(problem, TimeoutError) or upstream.answers > 0
        if upstream.silent < PATIENT_LOOKS:
            return
        load = None
    except ValueError:  # no text
        load = None
    if upstream.up.is_set():
        pool.adapt(upstream, load)


@contextlib.asynccontextmanager
async def watch_load(session: aiohttp.ClientSession, pool: Pool) -> AsyncIterator[None]:
    """Ask the servers that are up for their load, now and again and again; one that has no metrics only once."""

    async def look_at_all() -> None:
        async with asyncio.TaskGroup() as group:
            for upstream in pool.upstreams:
                if upstream.up.is_set() and upstream.reports is not False:
                    group.create_task(look_at_load(session, pool, upstream))

    async def repeat() -> None:
        while True:
            await look_at_all()
            await asyncio.sleep(METRICS_INTERVAL)

    await look_at_all()
    async with background(repeat()):
        yield


async def try_models(
    session: aiohttp.ClientSession, url: str, key_name: str
) -> tuple[str, list[str] | None] | Unreachable:
    """What `find_models` finds, or why there is nobody to ask."""
    try:
        return await find_models(session, url, key_name)
    except Unreachable as problem:
        return problem


async def find_models(session: aiohttp.ClientSession, url: str, key_name: str) -> tuple[str, list[str] | None]:
    """The API's root below a base URL that may lack its `/v1`, and the models served; None if it does not say."""
    import aiohttp

    base = url.rstrip("/")
    roots = [base] if base.endswith("/v1") else [f"{base}/v1", base]
    status = 0
    for root in roots:
        try:
            async with session.get(f"{root}/models", timeout=aiohttp.ClientTimeout(total=60)) as response:
                status, raw = response.status, without_key(await response.read(), key_name)
        except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
            reason = str(problem) or type(problem).__name__
            message = f"no server answers at {redact(url)} ({redact(reason)}): is --base-url right, is it up?"
            raise Unreachable(message) from problem
        if status in {401, 403}:
            raise ServerError(f"{status} from {redact(root)}: {error_text(raw)}; is the key in ${key_name} right?")
        if status == 200 and (models := models_in(raw)) is not None:
            return root, models
    if status >= 500:
        raise ServerError(f"{status} from {redact(base)}: the server is not ready")
    # No list of models: an endpoint with a path of its own has no /v1 to add.
    return (base if re.search(r"//[^/]+/", base) else roots[0]), None


def models_in(raw: bytes) -> list[str] | None:
    """The names in a list of models; None if it is something else, such as a proxy's page."""
    try:
        return [str(model["id"]) for model in json.loads(raw)["data"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def choose_model(wanted: str | None, served: list[str]) -> str:
    """The model to ask for; ServerError if the servers do not have it, or leave the choice open."""
    if wanted and (not served or wanted in served):
        return wanted
    if not wanted and len(served) == 1:
        return served[0]
    names = ", ".join(served[:20]) or "none that it tells"
    if wanted:
        near = difflib.get_close_matches(wanted, served, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ServerError(f"the server does not serve --model {wanted}; it serves: {names}{hint}")
    raise ServerError(f"say which --model; the server serves: {names}")


def limit_of_files(wanted: int) -> int:
    """Raise the limit of open files for `wanted` requests in flight; return how many it allows."""
    import resource

    needed = wanted + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            say(
                f"the limit of open files, {hard}, allows {soft - 256} requests at a time, not {wanted}: see ulimit -Hn"
            )
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - 256))


# ── Engine ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class OpenChunk:
    """A chunk between reading and writing. Its rows wait in an Arrow file: memory does not grow with stragglers."""

    def __init__(self, chunk: Chunk, parts: list[Block | BadRow], schema: pa.Schema, spool: Path | None = None) -> None:
        import pyarrow as pa

        self.chunk = chunk
        self.bad: dict[int, BadRow] = {}
        self.remaining = 0  # documents that are not final
        self.resumed = False
        self._origins: list[tuple[int, str, int]] = []  # (position, file, row there)
        self._spool = spool
        batches = []
        for part in parts:
            self._origins.append((chunk.count, part.file, part.row))
            if isinstance(part, BadRow):
                self.bad[chunk.count] = part
            batches.append(_null_row(schema) if isinstance(part, BadRow) else part.batch)
            chunk.count += batches[-1].num_rows
        self.table = pa.Table.from_batches(batches, schema).unify_dictionaries()
        if spool:
            with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
                file.write_table(self.table)
            self.table = pa.ipc.open_file(pa.memory_map(str(spool))).read_all()

    def ids(self, column: str | None) -> list[str]:
        """The documents' ids: the column's values, and `<file>/<row>` where it has none."""
        ends = [position for position, _, _ in self._origins[1:]] + [self.chunk.count]
        names = [
            f"{file}/{row + i}"
            for (start, file, row), end in zip(self._origins, ends, strict=True)
            for i in range(end - start)
        ]
        if column is None:
            return names
        own = values_of(self.table.column(column))
        return [name if value is None else str(value) for name, value in zip(names, own, strict=True)]

    def documents(self, prompt_column: str, id_column: str | None) -> Iterator[tuple[int, Document | str]]:
        """Position and document of each row in order; in place of one without a usable prompt the reason."""
        ids = self.ids(id_column)
        prompts = self.table.column(prompt_column)
        for start in range(0, self.chunk.count, 256):
            for position, value in enumerate(values_of(prompts.slice(start, 256)), start):
                if position in self.bad:
                    yield position, self.bad[position].reason
                    continue
                try:
                    text, messages = prompt_of(value)
                except BadDocument as problem:
                    yield position, f"column {prompt_column!r} {problem}"
                    continue
                index = self.chunk.start + position
                yield position, Document(ids[position], text, messages, index, self.table, position)

    def close(self) -> None:
        """Drop the rows."""
        del self.table
        if self._spool:
            self._spool.unlink(missing_ok=True)


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """A column's values as Python has them; text that is not UTF-8 as bytes, nanoseconds and far years as text."""
    try:
        return typing.cast("list[Any]", column.to_pylist())
    except (ValueError, OverflowError):
        return [_value_of(scalar) for scalar in column]


def _value_of(scalar: Any) -> Any:
    import pyarrow as pa

    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        if isinstance(scalar, pa.StructScalar):
            return {name: _value_of(value) for name, value in scalar.items()}
        if hasattr(scalar, "values"):
            return [_value_of(item) for item in scalar.values]
        return scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else scalar.cast(pa.string()).as_py()


def pick(table: pa.Table, positions: list[int]) -> pa.Table:
    """Some rows of a table, in order, without copying them: `take` stops at 2 GiB, and at some types."""
    import pyarrow as pa

    runs: list[list[int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([position, 1])
    return pa.concat_tables([table.slice(*run) for run in runs]) if runs else table.slice(0, 0)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """A table's rows as Python values."""
    columns = [values_of(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _null_row(schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)


def id_column_of(options: argparse.Namespace, schema: pa.Schema) -> str | None:
    """The column that names the documents; None if they go by file and row."""
    return options.id_column or ("id" if "id" in schema.names else None)


def prompt_of(value: Any) -> tuple[str, list[dict[str, Any]] | None]:
    """Text and messages of a prompt column's value; BadDocument if it is no prompt."""
    if isinstance(value, str):
        if not value.strip():
            raise BadDocument("is empty")
        return value, None
    if value is None:
        raise BadDocument("is null")
    if isinstance(value, bytes):
        raise BadDocument("is not UTF-8")
    if not isinstance(value, list) or not value:
        raise BadDocument(f"is neither text nor a list of messages: {str(value)[:80]}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadDocument(f"has a message without a role: {str(message)[:80]}")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise BadDocument(f"has a message without content: {str(message)[:80]}")
        messages.append({key: item for key, item in message.items() if item is not None})
    return "\n\n".join(m["content"] for m in messages if isinstance(m.get("content"), str)), messages


class Trial:
    """One rollout of one document, or of a part of it: it is the `generate` that the rollout is given."""

    __slots__ = (
        "_answers",
        "_branches",
        "_engine",
        "_key",
        "_ordinals",
        "_part",
        "attempts",
        "document",
        "final",
        "index",
        "interrupted",
        "room",
        "truncated",
        "usage",
    )

    def __init__(
        self, engine: Engine, document: Document, key: int, index: int, answers: dict[bytes, bytes], part: str = ""
    ) -> None:
        self._engine, self.document, self._key, self.index, self._answers = engine, document, key, index, answers
        self._part = part  # ".1" is the second one, ".1.0" the first of its parts
        self._ordinals: dict[bytes, int] = {}  # the ordinal of the last of equal requests: each is another sample
        self._branches: set[asyncio.Task[Any]] = set()  # tasks that wait for an answer
        self.attempts = 0
        self.interrupted = self.final = self.truncated = False
        self.room: int | None = None  # tokens that a part may have: set when the document must be split
        self.usage: Usage | None = None

    async def __call__(self, prompt: str | list[dict[str, Any]] | dict[str, Any], **overrides: Any) -> Reply:
        """See `Generate`."""
        reply, _ = await self.raw(prompt, **overrides)
        return reply

    async def raw(self, prompt: str | list[dict[str, Any]] | dict[str, Any], **overrides: Any) -> tuple[Reply, bytes]:
        """See `Generate`."""

        if self.final:  # a branch that the rollout has left behind
            raise asyncio.CancelledError
        path, payload = self._engine.payload(prompt, overrides, self.index)
        try:
            body = orjson.dumps(payload)
        except TypeError as problem:
            raise BadDocument(f"the prompt cannot be sent: {problem}") from problem
        digest = xxhash.xxh3_128(body)
        digest.update(f"{path}\0{self.index}{self._part}\0{self.document.id}".encode(errors="surrogatepass"))
        same = digest.digest()
        ordinal = self._ordinals[same] = self._ordinals.get(same, -1) + 1
        key = same + ordinal.to_bytes(4, "big")
        if key in self._answers:
            self._engine.run.counts["cache_hits"] += 1
            answer = self._answers[key]
            reply = parse_reply(orjson.loads(answer))
        else:
            if ordinal and isinstance(payload.get("seed"), int):  # else the server would give the same sample again
                payload["seed"] += ordinal * self._engine.run.options.rollouts_per_document
                body = orjson.dumps(payload)
            reply, answer = await self._send(path, payload, body, key)
        self.attempts += 1
        self.truncated |= reply.truncated
        if reply.usage:
            self.usage = dict(Counter(self.usage) + Counter(reply.usage)) if self.usage else reply.usage
        return reply, answer

    async def _send(self, path: str, payload: dict[str, Any], body: bytes, key: bytes) -> tuple[Reply, bytes]:
        reply: Reply
        answer: bytes
        branch = asyncio.current_task()
        assert branch
        self._branches.add(branch)
        try:
            reply, answer = await self._engine.run.fitter.post(self, path, payload, body)
        except asyncio.CancelledError:
            self.interrupted = True
            raise
        finally:
            self._branches.discard(branch)
        if not self.final:  # else the rollout has ended without waiting for this answer
            self._engine.store.answered(self._key, key, answer)
        return reply, answer

    async def run(self) -> list[dict[str, Any]] | dict[str, Any]:
        """The results, or what failed: `{error, error_type, attempts}`. Cancelled if the run is stopping."""
        ends = self._answers.get(self._parts_key)
        outcome = await self._outcome() if ends is None else []
        if ends is not None or self.room is not None:
            outcome = await self._engine.run.fitter.run_parts(self, ends and orjson.loads(ends))
        self.final = True
        for branch in self._branches:  # as `gather` leaves them when one has failed: nobody waits for their answers
            branch.cancel()
        if self.interrupted and self._engine.stopping:
            raise asyncio.CancelledError  # made without an answer that was on its way: the next run makes it again
        return outcome

    @property
    def _parts_key(self) -> bytes:
        return f"parts of {self.index}{self._part}".encode()

    def parts(self, documents: list[Document], ends: list[int]) -> list[Trial]:
        """The same rollout of each part; where they end is stored, before anything is sent, for the next process."""
        if self._parts_key not in self._answers:
            self._engine.store.answered(self._key, self._parts_key, orjson.dumps(ends))
        same = (self._key, self.index, self._answers)
        return [Trial(self._engine, part, *same, f"{self._part}.{i}") for i, part in enumerate(documents)]

    async def _outcome(self) -> list[dict[str, Any]] | dict[str, Any]:
        engine = self._engine
        try:
            own = {name: make(self.document, self) for name, make in engine.makers.items()}
            results = results_of(await engine.rollout(self.document, self, **engine.resources, **own), self.usage)
            return [{"truncated": self.truncated, **result} for result in results]
        except asyncio.CancelledError as problem:
            task = asyncio.current_task()
            if engine.stopping or (task and task.cancelling()):
                raise
            return self._failure(problem)  # the rollout's own: something that it awaited was cancelled
        except (Exception, SystemExit) as problem:  # noqa: BLE001 - a rollout's fault is its document's failure
            return self._failure(first_cause(problem))  # a TaskGroup raises groups

    def _failure(self, problem: BaseException) -> dict[str, Any]:
        if isinstance(problem, Error):
            self._engine.run.stop(problem)
            raise asyncio.CancelledError from problem
        if isinstance(problem, RequestFailed):
            return {"error": str(problem), "error_type": "RequestFailed", "attempts": problem.attempts}
        if isinstance(problem, BadDocument):
            return {"error": str(problem), "error_type": "BadDocument", "attempts": 0}
        error, kind = describe(problem, self._engine.rollout_file), type(problem).__name__
        if isinstance(problem, BadResult):
            error, kind = f"{problem}{place_of(self._engine.rollout)}", "TypeError"
        return {"error": error, "error_type": kind, "attempts": max(1, self.attempts)}


class Engine:
    """Moves documents from the reader through rollouts into files; see the top of this module."""

    def __init__(
        self, run: Run, store: Store, reader: Reader, writer: Writer, client: Client, resources: dict[str, Any]
    ) -> None:
        options = run.options
        self.run, self.store, self.reader, self.writer, self.client = run, store, reader, writer, client
        self.makers = {name: value.make for name, value in resources.items() if isinstance(value, PerRollout)}
        self.resources = {name: value for name, value in resources.items() if name not in self.makers}
        self.rollout = run.plugins.rollouts[options.rollout].factory
        self.rollout_file = getattr(sys.modules.get(run.plugins.rollouts[options.rollout].plugin), "__file__", None)
        self.defaults = sampling(options, run.model)
        self.id_column = id_column_of(options, reader.schema)
        self.fields = recorded_fields(run.state) or settle_fields(run, annotated_fields(self.rollout))
        self.stopping = self._broken_off = False
        self.began = time.monotonic()
        self.started = self.finished = self.failed = 0  # documents, in this process
        self.tally: Counter[str] = Counter()  # documents, ever
        self.reasons: Counter[str] = Counter()
        self._open: dict[int, OpenChunk] = {}
        self._deferred: list[OpenChunk] = []  # final, but the fields of results are not settled
        self._unwritten = 0
        self._space = asyncio.Event()
        self._ready: Iterator[tuple[OpenChunk, Document]] = iter(())
        self._turn = asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []
        self._draining: asyncio.Task[None] | None = None
        self._reading = ThreadPoolExecutor(1, "sdg-reader")
        self._writing = ThreadPoolExecutor(2, "sdg-writer")
        self._settling = asyncio.Lock()
        self._two_write = asyncio.Semaphore(2)

    async def work(self) -> None:
        """Process all chunks of this rank. When told to stop: what is answered is stored, what is complete written."""
        self._clear_leftovers()
        if self.run.options.retry_failed:
            await self.store.forget_failures()
        await self._make_anew()
        self.tally = await self.store.tally()
        self.store.on_durable = self._durable
        with self._reading, self._writing:
            async with asyncio.TaskGroup() as self._write_tasks, contextlib.aclosing(self._batches()) as batches:
                try:
                    async with asyncio.TaskGroup() as workers:
                        for _ in range(self.run.options.max_concurrent_documents):
                            self._workers.append(workers.create_task(self._work(batches)))
                    await self.store.flush()
                except BaseException:
                    self._broken_off = True
                    raise
            if self._deferred and not self.stopping:  # no document has a result: the files are empty
                self.fields = recorded_fields(self.run.state) or base_fields()
                async with asyncio.TaskGroup() as self._write_tasks:
                    self._write_deferred()
        if self._draining:
            await self._draining
        if self._open and not self.stopping:
            raise StateError(f"chunks {sorted(self._open)[:5]} are unfinished: run again, and please report this")
        self._clear_leftovers()
        self._check_failure_rate(self.tally["failed"], sum(self.tally.values()))

    def stop(self) -> None:
        """Start nothing new, give what is in flight a moment, then cancel it."""
        self.stopping = True
        self.client.pool.stop()
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        deadline = time.monotonic() + GRACE
        while self.client.pool.active and time.monotonic() < deadline:  # noqa: ASYNC110 - the pool is too hot for events
            await asyncio.sleep(0.05)
        for worker in self._workers:
            worker.cancel()

    async def _work(self, batches: AsyncIterator[Iterator[tuple[OpenChunk, Document]]]) -> None:
        """One of as many workers as documents may be in flight: a task for each document would cost a tenth more."""
        try:
            while not self.stopping:
                if taken := next(self._ready, None):
                    await self._roll_out(*taken)
                    if self.store.crowded:
                        await self.store.room()
                    continue
                exhausted = self._ready
                async with self._turn:  # not for each document: those who wait for a lock would queue up for good
                    if self._ready is exhausted:
                        batch = await anext(batches, None)
                        if batch is None:
                            return
                        self._ready = batch
        except Error as problem:
            self.run.stop(problem)
        except asyncio.CancelledError:
            if not self.stopping:
                raise

    def _clear_leftovers(self) -> None:
        folder = self.run.state / "open"
        folder.mkdir(exist_ok=True)
        rank = f"{self.run.options.rank:05d}"
        for leftover in [*folder.glob(f"{rank}_*"), *self.run.state.glob(f".{rank}.*.tmp")]:
            leftover.unlink(missing_ok=True)  # a heartbeat may be at it

    async def _make_anew(self) -> None:
        """Open the chunks again whose files somebody has taken away: their rows are nowhere else."""
        options = self.run.options
        if split_uri(options.output)[0] != "file" or self.run.plugins.writers[options.writer].package != "sdg":
            return  # a store is asked by `verify` alone, for it takes long; what was published may leave the spool
        chunks = [chunk for chunk in (await self.store.chunks()).values() if chunk.written and chunk.rows]
        folders = {os.path.dirname(self.run.path_of(chunk)) for chunk in chunks}
        there = {file for folder in folders for file in await asyncio.to_thread(self.run.output.list, folder)}
        gone = [chunk for chunk in chunks if self.run.path_of(chunk) not in there]
        if not gone:
            return
        names = f"{self.run.output.path(self.run.path_of(gone[0]))}{f' and {len(gone) - 1:,} more' * (len(gone) > 1)}"
        say(f"sdg: gone from the output, and made anew: {names}")
        for chunk in gone:
            await self.store.reopen(dataclasses.replace(chunk, written=False, filtered=(), failed=()), [])

    # Reading

    async def _batches(self) -> AsyncGenerator[Iterator[tuple[OpenChunk, Document]], None]:
        """For each chunk the documents that are not final."""
        known = await self.store.chunks()
        async with contextlib.aclosing(self._chunks(known)) as chunks:
            async for opened in chunks:
                final = await self._open_chunk(opened, known.get(opened.chunk.index))
                if final is not None:
                    yield self._documents(opened, final)

    def _documents(self, opened: OpenChunk, final: Mapping[int, str]) -> Iterator[tuple[OpenChunk, Document]]:
        """A chunk's documents that are not final; those without a prompt fail here."""
        for position, item in opened.documents(self.run.options.prompt_column, self.id_column):
            if position in final:
                continue
            self.started += 1
            if isinstance(item, Document):
                yield opened, item
            else:
                kind = "BadRow" if position in opened.bad else "BadDocument"
                self._finish(opened, position, {"error": item, "error_type": kind, "attempts": 0})

    async def _open_chunk(self, opened: OpenChunk, earlier: Chunk | None) -> Mapping[int, str] | None:
        """Take a chunk in when there is room. Returns what is final in it; None if there is nothing to do."""
        chunk = opened.chunk
        if earlier and earlier.written and not await self._reopen(opened, earlier):
            opened.close()
            return None
        while self._unwritten and self._unwritten + chunk.count > self._window():
            self._space.clear()
            await self._space.wait()
        final = await self.store.finished_in(chunk) if earlier else {}
        opened.resumed = earlier is not None
        opened.remaining = chunk.count - len(final)
        self._open[chunk.index] = opened
        self._unwritten += chunk.count
        if not earlier or earlier.count != chunk.count:
            self.store.opened(chunk)
        if not opened.remaining:
            self._write_tasks.create_task(self._write_chunk(opened))
        return final

    def _window(self) -> int:
        options = self.run.options
        return int(max(WINDOW * options.max_concurrent_documents, 4 * options.records_per_chunk))

    async def _chunks(self, known: dict[int, Chunk]) -> AsyncGenerator[OpenChunk, None]:
        """What `_read_chunks` yields, read one chunk ahead in the reader's thread."""
        loop = asyncio.get_running_loop()
        chunks = self._read_chunks(known)
        ahead = loop.run_in_executor(self._reading, next, chunks, None)
        try:
            while opened := await ahead:
                ahead = loop.run_in_executor(self._reading, next, chunks, None)
                yield opened
        finally:
            ahead.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _read_chunks(self, known: dict[int, Chunk]) -> Iterator[OpenChunk]:
        """This rank's chunks that are not written, and those that may have to be opened again."""
        options = self.run.options
        size, most = options.records_per_chunk, options.max_documents or sys.maxsize
        bookmark = None
        for index in range(options.rank, sys.maxsize, options.world_size):
            start = index * size
            wanted = min(size, most - start)
            chunk = known.get(index)
            if chunk:
                bookmark = chunk.bookmark or bookmark
                wanted = max(wanted, chunk.count)  # what was begun with a larger --max-documents is finished
            if wanted <= 0:
                return
            if chunk and chunk.written and chunk.count >= wanted and not (options.retry_failed and chunk.failed):
                continue
            with reading(options.input, self.reader):
                self.reader.seek(start, bookmark)
                bookmark = self.reader.tell()
                parts = self.reader.read(wanted)
                check_blocks(parts, wanted, self.reader)
            if not parts:
                return
            spool = self.run.state / "open" / f"{options.rank:05d}_{index:05d}.arrow"
            opened = OpenChunk(Chunk(index, start, bookmark=bookmark), parts, self.reader.schema, spool)
            yield opened
            if opened.chunk.count < wanted:
                return

    async def _reopen(self, opened: OpenChunk, earlier: Chunk) -> bool:
        """Take a written chunk up again if it has grown, or has failures to retry. Returns False if it is complete."""
        retry = self.run.options.retry_failed and bool(earlier.failed)
        if opened.chunk.count <= earlier.count and not retry:
            return False
        outcomes = await asyncio.get_running_loop().run_in_executor(self._writing, self._outcomes_in_files, earlier)
        if retry:
            self.tally["failed"] -= len(earlier.failed)
        await self.store.reopen(opened.chunk, outcomes)
        return True

    def _outcomes_in_files(self, chunk: Chunk) -> list[tuple[int, str, bytes]]:
        """The documents of a written chunk as the store would have them, from its files."""

        gone = set(chunk.filtered) | set(chunk.failed)
        table = self.writer.read(chunk)
        if table is None or table.num_rows != chunk.rows:
            raise OutputError(
                f"{self.run.output.path(self.run.path_of(chunk))} is not as it was written: put it back, or use --fresh"
            )
        rows = table.column(self.run.options.results_column).to_pylist() if chunk.rows else []
        kept = [position for position in range(chunk.count) if position not in gone]
        outcomes = [
            (position, "row", orjson.dumps([unfit(result) for result in results]))
            for position, results in zip(kept, rows, strict=True)
        ]
        outcomes += [(position, "filtered", b"null") for position in chunk.filtered]
        if self.run.options.retry_failed:
            return outcomes
        failures = read_failed(self.run, chunk)
        if len(failures) != len(chunk.failed):
            raise OutputError(f"{self.run.output.path(self.run.failed_path_of(chunk))} is not as it was written")
        for position, record in zip(chunk.failed, failures, strict=True):
            body = {name: record[name] for name in ("error", "error_type", "attempts")}
            outcomes.append((position, "failed", orjson.dumps(body)))
        return outcomes

    # Rollouts

    def payload(
        self, prompt: str | list[dict[str, Any]] | dict[str, Any], overrides: dict[str, Any], index: int
    ) -> tuple[str, dict[str, Any]]:
        """Endpoint and body of a request: the prompt's kind decides the first, the last word wins in the second."""
        if isinstance(prompt, str):
            prompt = {"messages": [{"role": "user", "content": prompt}]}
        elif isinstance(prompt, list):
            prompt = {"messages": prompt}
        payload = {**self.defaults, **prompt, **overrides}
        if index and isinstance(payload.get("seed"), int):
            payload["seed"] += index
        return "/completions" if "prompt" in prompt else "/chat/completions", payload

    async def _roll_out(self, opened: OpenChunk, document: Document) -> None:
        """All rollouts of a document. Those that fail leave the others standing."""
        key = opened.chunk.index << 32 | document._position
        answers = await self.store.answers_to(key) if opened.resumed else {}
        trials = [Trial(self, document, key, index, answers) for index in range(self.run.options.rollouts_per_document)]
        if len(trials) == 1:
            outcomes = [await trials[0].run()]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(trial.run()) for trial in trials]
            outcomes = [task.result() for task in tasks]
        results = [result for outcome in outcomes if isinstance(outcome, list) for result in outcome]
        failures = [outcome for outcome in outcomes if isinstance(outcome, dict)]
        self.run.counts["failed_rollouts"] += len(failures)
        self._finish(opened, document._position, results or (failures[0] if failures else None))

    def _finish(self, opened: OpenChunk, position: int, outcome: list[dict[str, Any]] | dict[str, Any] | None) -> None:
        """Hand a document's outcome to the store: results, a failure, or None for filtered."""

        status = "filtered" if not outcome else "row" if isinstance(outcome, list) else "failed"
        try:
            body = orjson.dumps(outcome or None, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
        except TypeError as problem:
            reason = f"the rollout's result is not JSON: {problem}{place_of(self.rollout)}"
            self._finish(opened, position, {"error": reason, "error_type": "TypeError", "attempts": 1})
            return
        self.store.finished(opened.chunk.index << 32 | position, status, body)
        self.tally[status] += 1
        self.finished += 1
        if isinstance(outcome, list):
            self.run.counts["truncated"] += any(result.get("truncated") is True for result in outcome)
        if isinstance(outcome, dict):
            self.failed += 1
            if len(self.reasons) < 1000:
                self.reasons[outcome["error"]] += 1
            if self.finished >= 100:  # of those started, not finished: refusals come back sooner than answers
                self._check_failure_rate(self.failed, self.started)

    def _check_failure_rate(self, failed: int, documents: int) -> None:
        most = self.run.options.max_failure_rate
        if documents >= 100 and failed > most * documents and not self.stopping:
            reasons = [f"; {times} times: {reason}" for reason, times in self.reasons.most_common(1)]
            self.run.stop(
                TooManyFailures(
                    f"{failed} of {documents} documents failed, more than --max-failure-rate {most:g} allows"
                    f"{''.join(reasons)}. Mend the cause, then run again with --retry-failed; "
                    "or allow more, up to 1"
                )
            )

    # Writing

    def _durable(self, documents: list[int]) -> None:
        """The store has committed these documents: chunks that are complete now get written."""
        for document in documents:
            opened = self._open[document >> 32]
            opened.remaining -= 1
            if not opened.remaining and not self._broken_off:  # else the next run writes it
                self._write_tasks.create_task(self._write_chunk(opened))

    async def _settle(self, opened: OpenChunk) -> None:
        """Learn the fields of results from the first chunk that has any; those without wait for it."""
        async with self._settling:
            self._deferred.append(opened)
            self._written(opened.chunk)
            if self.fields is None:
                lists = await self.store.outcomes_of(opened.chunk)
                outcomes = [outcome for text in lists for outcome in orjson.loads(text)]
                results = [result for _, status, body in outcomes if status == "row" for result in body]
                told = settle_fields(self.run, infer_fields(results)) if results else None
                self.fields = told or recorded_fields(self.run.state)  # of another rank
            if self.fields is not None:
                self._write_deferred()

    def _write_deferred(self) -> None:
        for opened in self._deferred:
            self._unwritten += opened.chunk.count
            self._write_tasks.create_task(self._write_chunk(opened))
        self._deferred.clear()

    async def _write_chunk(self, opened: OpenChunk) -> None:
        """File, record, clean up: in this order, and each step may be repeated."""
        chunk = opened.chunk
        if self.fields is None:
            await self._settle(opened)
            return
        async with self._two_write:
            outcomes = await self.store.outcomes_of(chunk)
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._writing, self._write_files, opened, outcomes)
            except Error as problem:
                self.run.stop(problem)
                return
            chunk.written = True
            await self.store.written(chunk)
            self._open.pop(chunk.index)
            opened.close()
            await loop.run_in_executor(self._writing, self._tell, chunk)
        self._written(chunk)

    def _written(self, chunk: Chunk) -> None:
        """Let the window move on."""
        self._unwritten -= chunk.count
        self._space.set()

    def _write_files(self, opened: OpenChunk, outcomes: list[bytes]) -> None:
        """Write a chunk's rows and failures."""
        import pyarrow as pa

        assert self.fields is not None
        chunk, options = opened.chunk, self.run.options
        statuses: dict[str, list[int]] = {"row": [], "filtered": [], "failed": []}
        bodies: dict[str, list[Any]] = {"row": [], "filtered": [], "failed": []}
        for position, status, body in (outcome for text in outcomes for outcome in orjson.loads(text)):
            statuses[status].append(position)
            bodies[status].append(body)
        if sorted(position for positions in statuses.values() for position in positions) != list(range(chunk.count)):
            raise StateError(f"state of chunk {chunk.index} does not match its input: start over with --fresh")
        chunk.filtered, chunk.failed = tuple(statuses["filtered"]), tuple(statuses["failed"])
        ids = opened.ids(self.id_column)
        rows = pick(opened.table, statuses["row"])
        if "id" not in rows.column_names:
            rows = rows.append_column("id", pa.array([ids[position] for position in statuses["row"]], pa.string()))
        checks = {name: checker(kind) for name, kind in self.fields.items()}
        fitted = [[fit(result, checks) for result in row] for row in bodies["row"]]
        rows = rows.append_column(options.results_column, pa.array(fitted, results_type(self.fields)))
        self._write_failed(opened, ids, bodies["failed"])
        with at_work(f"the writer of {self.run.output.path(self.run.path_of(chunk))}", self.writer):
            self.writer.write(chunk, rows.replace_schema_metadata(provenance(self.run)))

    def _write_failed(self, opened: OpenChunk, ids: list[str], failures: list[dict[str, Any]]) -> None:

        path = self.run.failed_path_of(opened.chunk)
        if not failures:
            self.run.output.delete(path)
            return
        lines = []
        for position, failure in zip(opened.chunk.failed, failures, strict=True):
            bad = opened.bad.get(position)
            row = bad._asdict() if bad else rows_of(opened.table.slice(position, 1))[0]
            lines.append(orjson.dumps({"id": ids[position], **failure, "document": row}, default=plain))
        self.run.output.write(path, lambda file: file.write(b"\n".join(lines) + b"\n"))

    def _tell(self, chunk: Chunk) -> None:
        for impl in self.run.plugins.observers("chunk_written"):
            arguments = {"run": self.run, "chunk": chunk}
            try:
                impl.function(*[arguments[name] for name in impl.argnames])
            except (Exception, SystemExit) as problem:  # noqa: BLE001 - the chunk is safe, whatever an observer does
                say(f"plugin {impl.plugin_name}: chunk_written failed: {describe(problem)}")


def check_blocks(parts: list[Block | BadRow], wanted: int, reader: Reader) -> None:
    """See that a reader's rows are as it promised. Raises PluginError."""
    where = f"the reader{place_of(reader)}: read()"
    if not isinstance(parts, list) or not all(isinstance(part, Block | BadRow) for part in parts):
        kinds = " of ".join({type(parts).__name__: 0, **{type(part).__name__: 0 for part in parts or ()}})
        raise PluginError(f"{where} gave {kinds}, and should give a list of sdg.Block and sdg.BadRow")
    for part in parts:
        if isinstance(part, Block) and not part.batch.schema.equals(reader.schema):
            there = ", ".join(f"{field.name}: {field.type}" for field in part.batch.schema)
            raise PluginError(f"{where} gave a batch of ({there}), which is not its `schema`")
    rows = [part.batch.num_rows if isinstance(part, Block) else 1 for part in parts]
    if 0 in rows or sum(rows) > wanted:
        raise PluginError(f"{where} gave batches of {rows} rows when {wanted} were wanted; after the end it gives []")


@contextlib.contextmanager
def reading(uri: str | None, reader: object = None) -> Iterator[None]:
    """Say of errors in a reader, or in what opens it, which input they concern."""
    import pyarrow as pa

    try:
        yield
    except Error:
        raise
    except (OSError, pa.ArrowException) as problem:
        raise InputError(f"--input {uri} cannot be read: {' '.join(str(problem).split())}") from problem
    except (Exception, SystemExit) as problem:
        raise PluginError(f"the reader of --input {uri} failed: {describe(problem, file_of(reader))}") from problem


@contextlib.contextmanager
def at_work(what: str, plugin: object = None) -> Iterator[None]:
    """Say of errors in a plugin's code where they happened: `plugin` is something that it defines."""
    try:
        yield
    except Error:
        raise
    except (Exception, SystemExit) as problem:
        raise PluginError(f"{what} failed: {describe(problem, file_of(plugin))}") from problem


def sampling(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """What every payload begins with."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return {"model": model, **given, **(options.generation or {})}


def provenance(run: Run) -> dict[str, str]:
    """Key-value metadata for the files of a run."""
    named = {"version": __version__, "fingerprint": run.fingerprint, "model": run.model, "rollout": run.options.rollout}
    return {f"sdg.{name}": value for name, value in {**named, "input_revision": run.input_revision}.items()}


def plain(value: Any) -> str:
    """JSON's best word for a value that it cannot hold: times, decimals, bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def read_failed(run: Run, chunk: Chunk) -> list[dict[str, Any]]:
    """The records of a chunk's failed documents, in order."""
    try:
        with run.output.open(run.failed_path_of(chunk)) as file:
            return [orjson.loads(line) for line in file.read().splitlines()]
    except FileNotFoundError:
        return []


def recorded_fields(state: Path) -> dict[str, pa.DataType] | None:
    """The fields of results that this run settled on; None if it has not yet."""
    import pyarrow as pa

    try:
        recorded = json.loads((state / "schema.json").read_bytes())
    except FileNotFoundError:
        return None
    return {field.name: field.type for field in pa.ipc.read_schema(pa.py_buffer(base64.b64decode(recorded["arrow"])))}


def settle_fields(run: Run, own: dict[str, pa.DataType] | None) -> dict[str, pa.DataType] | None:
    """Record the fields of results for all ranks, unless another was first; the recorded ones are returned."""
    import pyarrow as pa

    if own is None:
        return None
    base = base_fields()
    special = {*base, "extra", "tool_calls", "logprobs"}
    fields = {**base, **{name: kind for name, kind in own.items() if name not in special}}
    arrow = base64.b64encode(pa.schema(list(fields.items())).serialize().to_pybytes()).decode()
    content = {"fields": {name: str(kind) for name, kind in fields.items()}, "arrow": arrow}
    publish_once(run, "schema.json", json.dumps(content, indent=2).encode())
    return recorded_fields(run.state)


# ── Identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def identity_of(run: Run, reader: Reader) -> dict[str, Any]:
    """All that changes the data: input, rollout and the version of its plugin, model, sampling, slicing."""
    entry = run.plugins.rollouts[run.options.rollout]
    options = {name: getattr(run.options, name) for name in run.options.identity}
    own = {"input": dict(reader.identity), "rollout": run.options.rollout, "plugin_version": entry.version}
    return {**own, **options, "model": run.model}


def claim_state(run: Run, reader: Reader) -> None:
    """Make the state this run's, or see that it is; sets the fingerprint.

    Raises:
        StateError: the state is of another run; each difference is named.
        OutputError: there is output that no state knows.
    """

    path = run.state / "run.json"
    identity = json.loads(json.dumps(identity_of(run, reader)))
    run.source = getattr(reader, "source", {})
    revision = xxhash.xxh3_64_hexdigest(json.dumps(identity["input"]).encode())
    run.input_revision = str(run.source.get("revision", revision))
    mine = {
        "sdg": __version__,
        "state_version": STATE_VERSION,
        "fingerprint": xxhash.xxh3_64_hexdigest(json.dumps(identity).encode()),
        "run": uuid.uuid4().hex,
        "identity": identity,
        "options": recordable_options(run),
        "source": dict(run.source),
        "source_schema": base64.b64encode(reader.schema.serialize().to_pybytes()).decode(),
    }
    refuse_strangers(run)
    if run.options.retry_failed and not path.exists():
        raise StateError(f"there is no run in {run.state} that --retry-failed could complete: is --output right?")
    recorded = parse_run(path, publish_once(run, path.name, json.dumps(mine, indent=2).encode()))
    run.fingerprint = recorded["fingerprint"]
    changes = changes_since(run, reader, recorded)
    if changes and untouched(run):  # as after a mistyped model
        start_over(run)
        return claim_state(run, reader)
    if changes:
        raise of_another_run(run, changes)
    most = (recorded["options"]["max_documents"], run.options.max_documents)
    mine["options"]["max_documents"] = max(most) if all(most) else None
    now = recorded | {"identity": identity, "options": mine["options"]}
    if now != recorded:
        replace_file(run, path.name, json.dumps(now, indent=2).encode())


def refuse_strangers(run: Run) -> None:
    """Raise OutputError if there is output, and no state of the run that made it."""
    if not (run.state / "run.json").exists() and (strangers := output_files(run)):
        refuse_others(run, set(chunk_files(run, run.options.output_config, run.options.output_filename)))
        raise OutputError(
            f"{run.output.path(strangers[0])} is there, but no state of its run: "
            "choose another --output, or --fresh, which deletes an earlier run's files"
        )


def refuse_others(run: Run, ours: set[str]) -> None:
    """Raise OutputError if there are files beside those of a run: `load_dataset` would take them for rows."""
    if others := [file for file in output_files(run) if file not in ours]:
        raise OutputError(
            f"{run.output.path(others[0])} was written by no run: move it away, or choose another --output or "
            "--output-config"
        )


def changes_since(run: Run, reader: Reader, recorded: Mapping[str, Any]) -> list[str]:
    """What differs from the options of a recorded run, and would change its data; a line each."""
    identity = json.loads(json.dumps(identity_of(run, reader)))
    earlier = dict(recorded["identity"])
    if earlier["input"] != identity["input"] and reader.continues(earlier["input"]):
        earlier["input"] = identity["input"]
    if run.options.retry_failed and earlier["plugin_version"] != identity["plugin_version"]:
        say("sdg: the plugin has changed since this run began: what is not finished runs with the new one")
        earlier["plugin_version"] = identity["plugin_version"]
    edited = earlier.pop("plugin_version") != identity.pop("plugin_version")
    return [*["the plugin's code has changed"] * edited, *differences(earlier, identity)]


def of_another_run(run: Run, changes: list[str]) -> StateError:
    """Why a state is not this run's."""
    return StateError(
        f"state {run.state} is of another run: {'; '.join(changes[:10])}. "
        "Go back to what it was, take another --output, or --fresh to start over"
    )


def check_state_dir(run: Run) -> None:
    """See that the state is not that of another output.

    Its default place may be taken by one that is called alike: s3://a/b-c and s3://a-b/c. A state that lies in its
    output is moved and copied with it; any other may go on when the output was moved.
    """
    options, path = run.options, run.state / "run.json"
    default = options.state_dir == default_state_dir(options.output, options.output_config)
    local = split_uri(options.output)[0] == "file"
    if local == default:
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is broken is said by who needs it
        theirs = str(json.loads(path.read_bytes())["options"]["output"])
        moved = local and not os.path.exists(expanded(theirs))
        here, there = (
            (os.path.realpath if local else str)(expanded(uri).rstrip("/")) for uri in (options.output, theirs)
        )
        if here != there and not moved:
            raise StateError(f"state {run.state} is of the output {theirs}: give this run a --state-dir of its own")


def untouched(run: Run) -> bool:
    """Whether the state has nothing that was paid for, and no other rank has begun there."""
    mine = run.state / f"{run.options.rank:05d}.sqlite3"
    ranks = {path.stem for pattern in ("*.lock", "*.sqlite3") for path in run.state.glob(f"[0-9]{pattern}")}
    if ranks != {mine.stem} or output_files(run):
        return False
    if not mine.exists():
        return True
    with contextlib.closing(sqlite3.connect(f"file:{mine}?mode=ro", uri=True)) as db:
        tables = ("documents", "requests", "chunks WHERE written")
        return not any(db.execute(f"SELECT EXISTS (SELECT 1 FROM {table})").fetchone()[0] for table in tables)


def recordable_options(run: Run) -> dict[str, Any]:
    """The options as JSON, without secrets, and so that other commands can use them in another folder."""
    options: dict[str, Any] = json.loads(json.dumps(vars(run.options), default=str))
    options["base_url"] = [redact(url) for url in run.options.base_url or []]
    if options["input"] and split_uri(options["input"])[0] == "file":
        options["input"] = os.path.abspath(options["input"])
    options["plugin"] = [
        os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else name for name in options["plugin"] or []
    ]
    return options


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def parse_run(path: Path, content: bytes) -> dict[str, Any]:
    """The content of a state's `run.json`."""
    try:
        recorded = json.loads(content)
        version = recorded["state_version"]
        if version == STATE_VERSION and not (int(recorded["options"]["world_size"]) and recorded["identity"]):
            raise ValueError("it is not whole")
    except (ValueError, KeyError, TypeError) as problem:
        raise StateError(f"state {path} is broken: restore it from a backup, or start over with --fresh") from problem
    if version != STATE_VERSION:
        raise StateError(
            f"state {path} is of version {version}, this sdg writes version {STATE_VERSION}: "
            "finish the run with the sdg that began it, or start over with --fresh"
        )
    return typing.cast("dict[str, Any]", recorded)


def remember_source(run: Run) -> None:
    """Tell the reader what the first process of this run saw of the input, if there was one."""
    import pyarrow as pa

    path = run.state / "run.json"
    if path.exists():
        recorded = parse_run(path, path.read_bytes())
        run.source = recorded.get("source", {})
        run.source_schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(recorded["source_schema"])))


def output_files(run: Run) -> list[str]:
    """All files where the run's chunks go, hidden ones aside."""
    files = run.output.list(os.path.dirname(run.path_of(Chunk(0, 0))))
    return [file for file in files if not os.path.basename(file).startswith(".")]


def chunk_files(run: Run, config: str, template: str) -> list[str]:
    """Files in the output, and in its `failed`, that a run with these options can have made."""
    name = re.escape(f"{config}/{template}")
    for key in ("rank", "chunk_index"):
        name = name.replace(re.escape(f"${{{key}}}"), r"\d{5,}")
    failed = "failed" if config == "data" else f"failed/{config}"
    pattern = re.compile(name + "|" + re.escape(failed) + r"/\d{5,}_\d{5,}\.jsonl")
    folders = [os.path.dirname(f"{config}/{template}"), failed]
    return [file for folder in folders for file in run.output.list(folder) if pattern.fullmatch(file)]


def start_over(run: Run) -> None:
    """Delete what this run, or the one that the state is of, has written: nothing else."""
    import filelock

    with contextlib.ExitStack() as locks:
        for path in run.state.glob("*.lock"):
            if path.name != f"{run.options.rank:05d}.lock":
                try:
                    locks.enter_context(filelock.FileLock(path, timeout=0))
                except filelock.Timeout as problem:
                    raise StateError(f"another process is at work in {run.state} ({path.name}): stop it") from problem
        names = {(run.options.output_config, run.options.output_filename)}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is broken tells no names
            old = json.loads((run.state / "run.json").read_bytes())["options"]
            names.add((old["output_config"], old["output_filename"]))
        doomed = {file for config, template in names for file in chunk_files(run, config, template)}
        refuse_others(run, doomed)
        for file in sorted(doomed):
            run.output.delete(file)
        own = re.compile(r"(run|schema|stats|\d{5}\.stats)\.json|\d{5}\.sqlite3(-wal|-shm|-journal)?")
        for path in run.state.iterdir():
            if own.fullmatch(path.name):
                path.unlink()


@contextlib.contextmanager
def lock_rank(run: Run) -> Iterator[None]:
    """Keep other processes of this rank out, on this and on other hosts that share the file system."""
    import filelock

    path = run.state / f"{run.options.rank:05d}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path, timeout=0):
            yield
    except filelock.Timeout as problem:
        raise StateError(
            f"another process is at work on rank {run.options.rank} in {run.state}: wait for it, or stop it"
        ) from problem


# ── Progress and statistics ──────────────────────────────────────────────────────────────────────────────────────────


def say(message: str) -> None:
    """Tell the user something, without tearing a progress bar."""
    # Not without a bar: its lock bears no signals, and plugins import it, too. A signal may come in the middle of that.
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    try:
        if getattr(tqdm, "_instances", None):
            tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr)
    except BrokenPipeError:  # as of `2>&1 | tee` after Ctrl-C: nobody reads it, but there is more to do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@contextlib.asynccontextmanager
async def progress(engine: Engine) -> AsyncIterator[None]:
    """Show how far the run is: a bar on a terminal, else a line every ten seconds."""
    from tqdm import tqdm

    if engine.run.options.no_progress:
        yield
        return
    terminal = sys.stderr.isatty()
    began = sum(engine.tally.values())
    columns, lines = os.get_terminal_size(sys.stderr.fileno()) if terminal else (0, 0)
    shape = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {desc}"
    columns, lines = columns or 80, lines or 24  # some terminals report no size
    bar = tqdm(initial=began, disable=not terminal, bar_format=shape, ncols=columns, nrows=lines)

    def show() -> None:
        bar.total = documents_expected(engine)
        words = eta(engine, bar.format_interval) + postfix(engine)
        room = max(20, columns - 45)  # what is left is the bar's
        words = words if len(words) <= room else words[:room].rpartition(", ")[0]
        bar.set_description_str(words, refresh=False)
        bar.update(sum(engine.tally.values()) - bar.n)
        bar.refresh()

    async def repeat() -> None:
        while True:
            await asyncio.sleep(0.5 if terminal else 10)
            show() if terminal else say(progress_line(engine))

    try:
        async with background(repeat()):
            yield
    finally:
        show()
        bar.close()


def eta(engine: Engine, shown: Callable[[int], str]) -> str:
    """Documents a second and the time that is left, both from what this process has done."""
    rate = engine.finished / max(engine.client.pool.seconds, 1e-9)
    left = max(0, (documents_expected(engine) or 0) - sum(engine.tally.values()))
    return f"ETA {shown(int(left / rate))}, {rate:,.1f} documents/s, " if rate and left else ""


def postfix(engine: Engine) -> str:
    """The figures beside the bar."""
    counts, seconds = engine.run.counts, max(engine.client.pool.seconds, 1e-9)
    pool = engine.client.pool
    down = [upstream.status for upstream in pool.upstreams if not upstream.up.is_set()]
    if down and len(down) == len(pool.upstreams):  # nothing else to tell yet
        return "; ".join(down[:4])
    loads = [upstream.load for upstream in pool.upstreams if upstream.load and upstream.up.is_set()]
    queue = f" ({sum(load.waiting for load in loads):.0f} queued)" if loads else ""
    rare = {"failed": engine.tally["failed"], "retries": retries_in(counts), "cached": counts["cache_hits"]}
    figures = [f"{number:,} {name}" for name, number in rare.items() if number]
    figures += [f"{counts['completion_tokens'] / seconds:,.0f} tokens/s", f"{pool.active} in flight{queue}"]
    return ", ".join(figures) + "".join(f"; {status}" for status in down[:2])


def progress_line(engine: Engine) -> str:
    """The bar for a log file."""
    done, total = sum(engine.tally.values()), documents_expected(engine)
    rate = engine.finished / max(engine.client.pool.seconds, 1e-9)
    of = f" of {total:,}" if total else ""
    eta = f", {max(0, total - done) / rate:,.0f} s to go" if total and rate else ""
    return f"sdg: {done:,}{of} documents, {rate:,.1f} documents/s{eta}, {postfix(engine)}"


def retries_in(counts: Mapping[str, float]) -> int:
    """Requests that were sent again."""
    return int(sum(value for name, value in counts.items() if name.startswith("retries.")))


def documents_expected(engine: Engine) -> int | None:
    """How many documents fall to this rank, as far as the reader knows."""
    options = engine.run.options
    total = engine.reader.total()
    if total is None:
        return None
    full, rest = divmod(min(total, options.max_documents or total), options.records_per_chunk)
    mine = len(range(options.rank, full, options.world_size)) * options.records_per_chunk
    return int(mine + (rest if full % options.world_size == options.rank else 0))


async def statistics(engine: Engine, tally: Counter[str]) -> dict[str, Any]:
    """The rank's figures over all its processes so far."""
    run, totals = engine.run, engine.store.totals()
    figures: dict[str, Any] = {"documents": sum(tally.values()), "rows": tally["row"]}
    figures |= {name: tally[name] for name in ("filtered", "failed")}
    figures |= {name: int(totals[name]) for name in ("truncated", "failed_rollouts", "requests", "cache_hits")}
    for group in ("retries", "given_up"):
        causes = {name.partition(".")[2]: int(n) for name, n in totals.items() if name.startswith(f"{group}.")}
        figures[group] = dict(sorted(causes.items()))
    figures |= {name: int(totals[name]) for name in ("prompt_tokens", "completion_tokens")}
    figures["seconds"] = round(totals["seconds"], 3)
    figures["tokens_per_second"] = round(totals["completion_tokens"] / max(totals["seconds"], 1e-9), 1)
    figures["mean_in_flight"] = round(engine.client.pool.mean_in_flight, 1)
    return figures | {"model": run.model, "fingerprint": run.fingerprint}


def status_of(reason: BaseException | None) -> str:
    """What is said of a rank that ended for a reason."""
    stopped = isinstance(reason, Interrupted | asyncio.CancelledError)
    return "finished" if reason is None else "stopped" if stopped else "failed"


@contextlib.asynccontextmanager
async def heartbeat(engine: Engine) -> AsyncIterator[None]:
    """Keep the rank's figures in the state fresh: monitors see nothing else of a run."""
    over = asyncio.Event()
    began = time.monotonic()
    looks = deque([(began, engine.finished)], maxlen=RECENT + 1)

    async def beat() -> None:
        while not over.is_set():
            looks.append((time.monotonic(), engine.finished))
            rate = (looks[-1][1] - looks[0][1]) / max(looks[-1][0] - looks[0][0], 1e-9)
            figures = await statistics(engine, engine.tally)
            with contextlib.suppress(OSError):  # on a full disk the run itself will say so
                record = {"status": "running", "expected": documents_expected(engine), "documents_per_second": rate}
                await asyncio.to_thread(write_rank, engine.run, figures, record)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), min(HEARTBEAT, 1 + (looks[-1][0] - began) / 10))

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        over.set()
        await beating


@contextlib.contextmanager
def recording_the_end(run: Run, stop: Stop) -> Iterator[None]:
    """Note in the rank's figures why it ended, if it ends before it could do so itself."""
    try:
        yield
    except (Exception, asyncio.CancelledError) as problem:
        path = run.state / f"{run.options.rank:05d}.stats.json"
        reason = stop.reason or first_cause(problem)
        with contextlib.suppress(OSError, ValueError):  # what is broken or full is not for this to say
            figures = json.loads(path.read_bytes()) if path.exists() else {}
            record = figures.get("rank", {})
            # A mistyped rerun, refused for its options, changes nothing about how the rank is doing.
            if record.get("status") != "finished" and not isinstance(reason, StateError):
                write_rank(run, figures, {**record, "status": status_of(reason)}, reason)
        raise


def write_rank(run: Run, figures: dict[str, Any], record: dict[str, Any], reason: BaseException | None = None) -> None:
    """Write the rank's figures, how it is doing, and why it ended early."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    rank = {
        **record,
        "error": reason and str(reason),
        "updated": round(time.time(), 3),
        "host": platform.node(),
        "slurm_job": job,
    }
    name = f"{run.options.rank:05d}.stats.json"
    replace_file(run, name, json.dumps({**figures, "rank": rank}, indent=2).encode())


def write_statistics(run: Run) -> None:
    """Write the sum over all ranks that have written their figures."""
    replace_file(run, "stats.json", json.dumps(sum_statistics(rank_statistics(run.state)), indent=2).encode())


def rank_statistics(state: Path) -> list[dict[str, Any]]:
    """The figures of all ranks that have begun. Raises StateError."""
    return [figures for path in sorted(state.glob("[0-9]*.stats.json")) if (figures := statistics_of(path))]


def statistics_of(path: Path) -> dict[str, Any]:
    """The figures in a rank's file, {} if there is none. Raises StateError if it is broken."""
    for _ in range(10):
        try:
            figures = json.loads(path.read_bytes())
            if not isinstance(figures, dict) or not isinstance(figures.get("rank", {}), dict):
                raise ValueError("no figures")
            return figures
        except FileNotFoundError:
            break
        except ValueError as problem:
            raise StateError(
                f"{path} is broken ({problem}): delete it, its rank's next run writes it anew"
            ) from problem
        except OSError as problem:
            if problem.errno != errno.ESTALE:  # on NFS: it was just replaced on another machine
                raise StateError(f"{path}: {reason_of(problem)}") from problem
    return {}


def sum_statistics(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several ranks as those of one run."""
    total: dict[str, Any] = {}
    for rank in ranks:
        for name, value in rank.items():
            if name == "rank":
                continue
            if isinstance(value, dict):
                total[name] = dict(Counter(total.get(name, {})) + Counter(value))
            elif isinstance(value, str):
                total[name] = value
            else:
                total[name] = round(total.get(name, 0) + value, 3)
    return {"ranks": len(ranks), **total}


def report(engine: Engine, figures: dict[str, Any]) -> str:
    """What was written where, and how to look at it."""
    run, place = engine.run, engine.run.output
    name = run.path_of(Chunk(0, 0))
    shown = os.path.relpath(place.root) if place.local else place.uri
    shown = place.root if shown.startswith("../../") else shown
    kind = {"jsonl": "json"}.get(format_of(name), format_of(name))  # as pyarrow calls it
    folder = f"{shown}/{os.path.dirname(name)}"
    rate = engine.finished / max(engine.client.pool.seconds, 1e-9)
    lines = [
        f"{figures['documents']:,} documents: {figures['rows']:,} rows, {figures['filtered']:,} filtered, "
        f"{figures['failed']:,} failed ({engine.finished:,} of them now, {rate:,.1f} documents/s)",
        f"rows    {folder}",
    ]
    if figures["truncated"]:
        lines.append(
            f"cut     {figures['truncated']:,} documents did not fit the model's context: --long-documents split"
        )
    if figures["failed"]:
        failed = f"{shown}/{os.path.dirname(run.failed_path_of(Chunk(0, 0)))}"
        lines.append(f"failed  {failed}; run them again: --retry-failed")
        lines += [f"        {times} × {reason[:150]}" for reason, times in engine.reasons.most_common(3)]
        lines += [f"        and {len(engine.reasons) - 3:,} more reasons"] * (len(engine.reasons) > 3)
    if run.options.rollouts_per_document > 1 and figures["failed_rollouts"]:
        lines.append(f"lost    {figures['failed_rollouts']:,} rollouts failed; a document fails if all of its own do")
    lines.append(f"state   {run.state}: stats.json has the figures")
    if place.local:
        lines.append(
            f'look    python -c "import pyarrow.dataset as d; '
            f"print(*d.dataset('{folder}', format='{kind}').head(3).to_pylist(), sep='\\n\\n')\""
        )
    return "\n".join(lines)


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stop:
    """Ends a run for a reason; the first reason counts. A second signal does not wait for what is in flight.

    Args:
        cancel: ends it where no engine is at work.
        everything: for one of several runs: what ends all of them, if the server fails that they share.
        name: of the run, before its reason.
    """

    def __init__(self, cancel: Callable[[], object], everything: Stop | None = None, name: str = "") -> None:
        self.reason: Error | None = None
        self.stopping = threading.Event()
        self.gently: Callable[[], None] | None = None  # set while an engine works
        self._cancel, self._everything, self._name = cancel, everything, name

    def __call__(self, reason: Error) -> None:
        first, self.reason = self.reason is None, self.reason or reason
        if first:
            self.stopping.set()
            self._say(reason)
        if self._everything and self._everything.reason is None and isinstance(reason, ServerError | Interrupted):
            self._everything(reason)
        if first:
            (self.gently or self._cancel)()
        elif isinstance(reason, Interrupted) and not self._everything:
            self._cancel()

    def _say(self, reason: Error) -> None:
        if reason.said:
            return
        say(f"sdg: {self._name}{reason}")
        reason.said = True
        if isinstance(reason, Interrupted):  # whatever a plugin does: what is answered is durable by then
            watchdog = threading.Timer(LAST_RESORT, os._exit, [reason.exit_code])
            watchdog.daemon = True
            watchdog.start()


@contextlib.contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """Stop the run on SIGINT, SIGTERM, and SIGUSR1 (which Slurm can send before the time limit)."""
    loop = asyncio.get_running_loop()
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    for signum in handled:
        loop.add_signal_handler(signum, stop, Interrupted(signum))
    try:
        yield
    finally:
        for signum in handled:
            loop.remove_signal_handler(signum)


def output_place(options: argparse.Namespace, state: Path) -> Place:
    """Where files are written: the output itself or, if its scheme has a writer of its own, a folder of the state."""
    return Place(str(state / "spool") if options.writer == split_uri(options.output)[0] else options.output)


def open_run(options: argparse.Namespace, plugins: Plugins, stop: Stop) -> Run:
    """The run that the options describe, with its output and state folders made."""
    state = Path(options.state_dir)
    run = Run(options, plugins, output_place(options, state), state, stop, stop.stopping)
    try:
        run.state.mkdir(parents=True, exist_ok=True)
        if run.output.local:
            os.makedirs(run.output.path(options.output_config), exist_ok=True)
    except OSError as problem:
        message = f"{problem.filename} cannot be made: {reason_of(problem)}; choose another --output"
        raise OutputError(message) from problem
    return run


Present = Callable[["Engine", Stop], contextlib.AbstractAsyncContextManager[None]]  # around an engine's work


async def run_all(configs: list[Config], present: Present) -> None:
    """Run the configs one after the other beside one server, each as far as it gets; raises the worst of their errors.

    What ends one of them leaves the others alone, but for signals, and the failures of the server that they share.
    """
    task = asyncio.current_task()
    assert task is not None
    stop = Stop(task.cancel)
    attempts: list[Attempt] = []
    try:
        with signals(stop):
            for config in configs:
                name = f"config {config.name}: " if len(configs) > 1 else ""
                attempts.append(Attempt(config, task, stop, name))
                await attempts[-1].prepare()
            await generate_all(attempts, stop, present)
            for attempt in attempts:
                await attempt.leave()
    except (asyncio.CancelledError, Exception) as problem:
        if stop.reason is None or problem is stop.reason:
            raise
        raise stop.reason from problem
    finally:
        for stopping in [stop, *(attempt.stop for attempt in attempts)]:
            stopping.stopping.set()  # threads that still wait for something far away keep the process from ending
    problems = [problem for problem in [stop.reason, *(attempt.problem for attempt in attempts)] if problem]
    if problems:
        raise max(problems, key=lambda problem: getattr(problem, "exit_code", 1))


async def generate_all(attempts: list[Attempt], stop: Stop, present: Present) -> None:
    """Start the server, and have each attempt use it in its turn, until something stops them all."""
    run = dataclasses.replace(attempts[0].run, stop=stop, stopping=stop.stopping)
    name = run.options.server
    entry = run.plugins.servers[name]
    try:
        async with contextlib.AsyncExitStack() as stack:
            with at_work(f"the server {name!r}", entry.factory):
                servers = await stack.enter_async_context(opened(entry, "server", name, run))
                check_servers(servers, f"the server {name!r} of plugin {entry.plugin}{place_of(entry.factory)}")
            for attempt in attempts if servers else []:  # else we have lent GPUs to a run elsewhere, which has ended
                if stop.reason is None:
                    await attempt.generate(servers, present)
    except (asyncio.CancelledError, Exception) as problem:  # noqa: BLE001 - raised when nobody observes any more
        for attempt in attempts:
            attempt.problem = attempt.problem or stop.reason or understood(problem, run.options)


def check_servers(servers: Any, what: str) -> None:
    """See that a server's plugin has yielded a list of what the client knows. Raises PluginError."""
    if isinstance(servers, str) or not isinstance(servers, Sequence):
        raise PluginError(f"{what} yielded a {type(servers).__name__}, and should yield a list of URLs")
    for server in servers:
        if not isinstance(server, str | Upstream):
            raise PluginError(f"{what} yielded a list with a {type(server).__name__}: URLs or sdg.Upstreams are wanted")


class Attempt:
    """One config's run, from the first look at its output until nobody observes it; `problem` is what ended it early.

    Observers are left when the server has stopped, with the problem raised through them.
    """

    def __init__(self, config: Config, task: asyncio.Task[Any], everything: Stop, name: str) -> None:
        self.stop = Stop(task.cancel, everything, name)
        self.run = open_run(config.options, config.plugins, self.stop)
        self.problem: BaseException | None = None
        self._task, self._everything, self._name = task, everything, name
        self._observers = contextlib.AsyncExitStack()
        self._writer: Writer

    async def prepare(self) -> None:
        """Open the writer: what is wrong with the output is told before a server starts."""
        options = self.run.options
        entry = self.run.plugins.writers[options.writer]
        with at_work(f"the writer of {redact(options.output)}", entry.factory):
            self._writer = await asyncio.to_thread(made, entry.factory, self.run)
        check_shape(self._writer, Writer, f"the writer {options.writer!r} of plugin {entry.plugin}")

    async def generate(self, servers: Sequence[str | Upstream], present: Present) -> None:
        """Run to the end, or as far as it gets."""
        self._everything.gently = lambda: self.stop(typing.cast("Error", self._everything.reason))
        try:
            with lock_rank(self.run), recording_the_end(self.run, self.stop):
                await self._generate(servers, present)
        except asyncio.CancelledError:
            if self.stop.reason is None:
                raise
            self._task.uncancel()
        except Exception as problem:  # noqa: BLE001 - it is raised when all that can run has run
            self.problem = self.stop.reason or understood(problem, self.run.options)
            if isinstance(self.problem, ServerError):  # the others would ask the same server
                self._everything.reason = self._everything.reason or self.problem
        finally:
            self._everything.gently = None
        self.problem = self.problem or self.stop.reason

    async def _generate(self, servers: Sequence[str | Upstream], present: Present) -> None:
        run = self.run
        check_state_dir(run)
        if run.options.fresh:
            start_over(run)
        async with open_engine(run, self._writer, connect(run, servers, self.stop)) as engine:
            for impl in run.plugins.observers("observe"):
                with at_work(f"plugin {impl.plugin_name}: observe", impl.plugin):
                    observer: Any = impl.function(*[run for _ in impl.argnames])
                    if observer is not None:
                        await self._observers.enter_async_context(observer)
            _tame_collector()
            async with present(engine, self.stop):
                self.stop.gently = engine.stop
                try:
                    await engine.work()
                finally:
                    self.stop.gently = None

    async def leave(self) -> None:
        """Leave the observers; with several configs, say how this one ended."""
        try:
            async with self._observers:
                if problem := self.problem or self._everything.reason:
                    raise problem
        except (asyncio.CancelledError, Exception) as problem:  # noqa: BLE001 - it is raised when the others are left
            raised, ended = understood(problem, self.run.options), self._everything.reason or self.problem
            if ended and raised is not ended and not isinstance(raised, asyncio.CancelledError):
                say(f"sdg: {self._name}an observer failed, too: {describe(raised)}")
            self.problem = ended or raised
            if self._name and isinstance(self.problem, Error) and not self.problem.said:
                say(f"sdg: {self._name}{self.problem}")
                self.problem.said = True


@contextlib.asynccontextmanager
async def open_engine(
    run: Run, writer: Writer, connecting: contextlib.AbstractAsyncContextManager[Client]
) -> AsyncIterator[Engine]:
    """An engine with all that it needs: input, client, state, resources. The rank must be locked.

    Args:
        run: what to do.
        writer: takes the chunks.
        connecting: the client, not yet connected; it settles `run.model` when it is.
    """
    options, entry = run.options, run.plugins.readers[run.options.reader]
    remember_source(run)
    with reading(options.input, entry.factory):
        reader = await asyncio.to_thread(made, entry.factory, run)
    check_reader(reader, f"the reader {options.reader!r} of plugin {entry.plugin}")
    check_columns(reader.schema, options)
    run.schema = reader.schema
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connecting)
        claim_state(run, reader)
        store = await stack.enter_async_context(Store.open(run.state / f"{options.rank:05d}.sqlite3", run.counts))
        run.fitter = importlib.import_module(f"{_bundled_package()}.fitting").Fitter(run, client)
        resources = await open_resources(run, stack)
        yield Engine(run, store, reader, writer, client, resources)


@contextlib.asynccontextmanager
async def reported(engine: Engine, stop: Stop) -> AsyncIterator[None]:
    """Show an engine's progress, keep its figures, and say at the end what was written where."""
    run = engine.run
    async with progress(engine), heartbeat(engine):
        yield
    figures = await statistics(engine, await engine.store.tally())
    expected = documents_expected(engine)
    write_rank(run, figures, {"status": status_of(stop.reason), "expected": expected}, stop.reason)
    write_statistics(run)
    if figures["documents"] or not stop.reason:
        with contextlib.suppress(BrokenPipeError):  # nobody reads it: the run is as good as before
            print(report(engine, figures), flush=True)


def _tame_collector() -> None:
    """Ten thousand requests in flight are a million objects: full collections would take half of the time."""
    import gc

    import pyarrow as pa

    pa.array(["Arrow imports pandas here, where there is one, and not in the middle of the run"])
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


async def open_resources(run: Run, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
    """Enter the resources that the rollout has parameters for."""
    rollout = run.plugins.rollouts[run.options.rollout].factory
    entered = {}
    for parameter in list(inspect.signature(rollout).parameters.values())[2:]:
        if entry := run.plugins.resources.get(parameter.name):
            with at_work(f"the resource {parameter.name!r}", entry.factory):
                resource = opened(entry, "resource", parameter.name, run)
                entered[parameter.name] = await stack.enter_async_context(resource)
    return entered


def check_columns(schema: pa.Schema, options: argparse.Namespace) -> None:
    """See that the columns that the options name are there, and can hold what they should."""
    import pyarrow.types as t

    for option, name in (("--prompt-column", options.prompt_column), ("--id-column", options.id_column)):
        if name is not None and name not in schema.names:
            raise InputError(f"{option} {name}: the input has no such column; it has: {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise InputError(f"{option} {name}: the input has {schema.names.count(name)} columns of this name")
    if options.results_column in schema.names:
        raise InputError(f"the input has a column {options.results_column} already: give another --results-column")
    kind = schema.field(options.prompt_column).type
    inner = kind.value_type if t.is_dictionary(kind) else kind
    text = t.is_string(inner) or t.is_large_string(inner) or t.is_string_view(inner)
    item = kind.value_type if t.is_list(kind) or t.is_large_list(kind) else None
    chat = item is not None and t.is_struct(item) and {"role", "content"} <= {field.name for field in item}
    if not text and not chat:
        problem = f"--prompt-column {options.prompt_column} holds {kind}, neither text nor lists of {{role, content}}"
        raise InputError(problem)


def first_cause(problem: BaseException) -> BaseException:
    """The exception that a person should hear of, out of a group."""
    if not isinstance(problem, BaseExceptionGroup):
        return problem
    leaves = [first_cause(part) for part in problem.exceptions]
    ranked = [leaf for kind in (Error, sqlite3.Error, Exception) for leaf in leaves if isinstance(leaf, kind)]
    return [*ranked, *leaves][0]


def understood(problem: BaseException, options: argparse.Namespace) -> BaseException:
    """What a person should hear of a failure: databases and disks do not say what they are for."""
    problem = first_cause(problem)
    told: Error
    if type(problem) is sqlite3.DatabaseError:
        way_out = "restore it from a backup, or start over with --fresh"
        told = StateError(f"state {options.state_dir} is broken ({problem}): {way_out}")
    elif isinstance(problem, sqlite3.Error):
        told = StateError(f"state {options.state_dir}: {reason_of(problem)}")
    elif isinstance(problem, OSError):
        told = OutputError(f"{problem.filename or options.output}: {reason_of(problem)}")
    else:
        return problem
    told.__cause__ = problem
    return told


def run_command(argv: list[str]) -> int:
    """Generate: the command that runs when none is named."""
    import uvloop

    configs = parse_configs(argv)
    if configs[0].options.preview:
        preview = importlib.import_module(f"{_bundled_package()}.preview")
        preview.preview(configs)
    else:
        uvloop.run(run_all(configs, reported))
    return 0


def plugins_command(argv: list[str]) -> int:
    """List what is registered, and by which package."""
    parser = argparse.ArgumentParser(prog="sdg.py plugins", description=plugins_command.__doc__)
    parser.add_argument("--plugin", action="append", metavar="FILE.py|MODULE", help="load this one, too; repeatable")
    plugins, _ = Plugins.load([*(parser.parse_args(argv).plugin or []), "summarize"])
    for kind in Plugins.kinds:
        print(f"{kind}:")
        for name, entry in sorted(getattr(plugins, kind).items()):
            print(f"  {name:<12} {f'{entry.package} {entry.version}':<24} {entry.help}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status; see `Error` for what each one means."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and not argv[0].startswith("-"):
            plugins, _ = Plugins.load([])
            entry = plugins.find("commands", argv[0])
            ours = entry.package == "sdg"  # whose mistakes are told below
            with (
                contextlib.nullcontext()
                if ours
                else at_work(f"the command {argv[0]} of {entry.package}", entry.factory)
            ):
                return int(entry.factory(argv[1:]))
        return run_command(argv)
    except Error as problem:
        if os.environ.get("SDG_TRACEBACK") and problem.__cause__:
            traceback.print_exception(problem.__cause__)
        if not problem.said:
            say(f"sdg: {problem}")
        return problem.exit_code
    except BrokenPipeError:  # as with `| head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as problem:
        if os.environ.get("SDG_TRACEBACK"):
            raise
        if isinstance(problem, OSError) and problem.filename:
            say(f"sdg: {problem.filename}: {reason_of(problem)}")
        else:
            hint = "please report it (SDG_TRACEBACK=1 shows the traceback)"
            say(f"sdg: unexpected {describe(problem)}: {hint}")
        return 1


def script() -> typing.NoReturn:
    """`main` as a program of its own: an upload that hangs does not keep it from ending.

    The interpreter would wait for some of the publisher's threads, and pull libraries from under others: they crash.
    """
    code = main()
    if any(thread.name == PUBLISHER for thread in threading.enumerate()):
        import multiprocessing

        for child in multiprocessing.active_children():  # of a plugin's pool
            child.terminate()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    # Plugins import `sdg`. Without this detour they would get a second copy of every class.
    from sdg import script as imported_script

    imported_script()
