"""Servers that a run starts by itself: launched, watched, restarted, and gone when it ends.

The plugins `vllm`, `sglang` and `command` describe a `Program` and `serve` it; nothing here knows one of them. Each
replica is a `Replica`: a process tree under `guard.py`, which outlives nobody, and the `sdg.Upstream` through which the
engine learns when it is up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import sdg

from . import nodes

if TYPE_CHECKING:
    import aiohttp

PORTS = range(30_000, 32_768)  # below those that Linux gives to outgoing connections, above SGLang's own choice
LOG_BYTES = 64 << 20  # of a server's log, before it is moved aside; two are kept
LONGEST_LINE = 8 << 10  # bytes of a log line that are looked at
FATAL_PATIENCE = 5.0  # s between a fatal line and the kill: the lines after it may say more
NOTICE = 6.0  # s within which a server that has died in a request's face is seen to be dead
SICK = 3  # times in a row that /health refuses before the server counts as dead
LAST_WAIT = 15.0  # s for the guard to end everything
LONGEST_PAUSE = 60.0  # s before a restart
PORT_ATTEMPTS = 5

_whole, _seconds = sdg.number(int, 1), sdg.number(float, 0.1)


def server_argument(value: str) -> tuple[str, Any]:
    """`KEY=VALUE` as a flag's name and its value: True, False, or text (JSON stays as it is)."""
    name, _, text = value.partition("=")
    name = name.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{value!r}: KEY=VALUE is wanted")
    if re.search(r"(^|-)(key|token|secret|password)$", name) and "=" in value:
        raise argparse.ArgumentTypeError(
            f"{name}: arguments can be seen by others; set HF_TOKEN or VLLM_API_KEY instead"
        )
    return name, {"": True, "true": True, "false": False}.get(text.lower(), text) if "=" in value else True


def one_of(*names: str, more: bool = False) -> Callable[[str], str]:
    """A converter for options that take one of some names, or also a whole number."""

    def convert(value: str) -> str:
        if value not in names and not (more and value.isdigit()):
            raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(names)}{', or a number' * more}")
        return value

    return convert


OPTIONS = [
    sdg.Option("--tp", "N", "tensor parallelism: GPUs that share each layer", 1, _whole),
    sdg.Option("--pp", "N", "pipeline parallelism: groups of GPUs that share the layers", 1, _whole),
    sdg.Option("--dp", "N", "data parallelism inside one server", 1, _whole),
    sdg.Option("--replicas", "N", "servers on this machine, each on GPUs of its own", 1, _whole),
    sdg.Option("--model-max-context", "N", "tokens of prompt and answer; default: the model's own", type=_whole),
    sdg.Option("--gpu-memory-utilization", "X", "share of GPU memory to use", type=sdg.number(float, 0.01, 1)),
    sdg.Option("--quantization", "NAME", "of the weights, as the server names it"),
    sdg.Option("--kv-cache-dtype", "NAME", "type of the KV cache, such as fp8"),
    sdg.Option(
        "--chunked-prefill", "N", "tokens of a prefill step; or on, or off", type=one_of("on", "off", more=True)
    ),
    sdg.Option("--speculative-config", "JSON", "speculative decoding, as the server has it", type=sdg.json_object),
    sdg.Option(
        "--server-arg", "K=V", "any other flag of the server; repeatable", action="append", type=server_argument
    ),
    sdg.Option("--server-command", "C", "for --server command; {port} and {model} are filled in"),
    sdg.Option("--nodes", "N", "machines that hold one model together; one process on each", 1, _whole),
    sdg.Option("--node-rank", "I", "this machine's number; default: SLURM_NODEID, else 0", type=sdg.number(int, 0)),
    sdg.Option("--head-address", "H[:PORT]", "of machine 0, where the others join; default: Slurm's first node"),
    sdg.Option("--node-backend", "NAME", "how vLLM joins machines: native or ray", "native", one_of("native", "ray")),
    sdg.Option("--start-timeout", "S", "seconds that a server may take to be ready", 3600.0, _seconds),
    sdg.Option("--stall-timeout", "S", "seconds without token or answer before a server is restarted", 300.0, _seconds),
    sdg.Option("--max-restarts", "N", "of a server in a row, without an answer between", 6, sdg.number(int, 0)),
    sdg.Option("--no-compile-lock", None, "let servers of one configuration compile at once", action="store_true"),
]


@sdg.hookimpl
def add_options(parser: argparse._ArgumentGroup) -> None:
    for option in OPTIONS:
        option.add_to(parser)


# Lines of libraries that all servers use
COMMON_FATAL = (
    (r"unrecognized arguments|error: argument|invalid choice", "see --server-arg, and the server's own --help"),
    (r"[Aa]ddress already in use", "leave out --server-arg port, and a free one is found"),
    (r"Invalid repository ID|is not a local folder and is not a valid model|Repo id must", "see --model"),
    (r"401 Client Error|gated repo|GatedRepoError", "is HF_TOKEN set, and access to --model granted?"),
    (r"^ModuleNotFoundError|^ImportError", "the server's environment is incomplete: install it anew"),
)


# ── What is launched ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where one process of a server runs."""

    port: int  # of the HTTP server, on loopback
    meeting_port: int  # where the processes of one server find each other, on the first node
    node: int = 0
    nodes: int = 1
    head: str = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of server.

    Attributes:
        command: the arguments of its process at a spot.
        model: the name under which it serves the model; None if it has to be asked.
        phases: what log lines tell of its start, as (regular expression, phase).
        fatal: lines after which it cannot start, as (regular expression, hint): what tells most comes first.
        version: of the package; with the command it names the compiled graphs.
        cache: where compiled graphs lie; None if there is nothing to compile.
        environment: variables that it needs.
        lists_model: whether its list of models can be relied on.
    """

    name: str
    command: Callable[[Spot], list[str]]
    model: str | None
    phases: tuple[tuple[str, str], ...] = ()
    fatal: tuple[tuple[str, str], ...] = ()
    version: str = ""
    cache: Path | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lists_model: bool = True


def flags(wanted: Mapping[str, Any], given: list[tuple[str, Any]] | None, *, negate: bool = False) -> list[str]:
    """Command-line flags; the user's own replace ours. None and False leave one out; `negate`: False is `--no-…`."""
    arguments: list[str] = []
    merged: dict[str, list[Any]] = {name: [value] for name, value in wanted.items()}
    for name, value in given or []:
        merged[name] = [value] if name in wanted else [*merged.get(name, []), value]
    for name, values in merged.items():
        for value in values:
            if value is True:
                arguments.append(f"--{name}")
            elif value is False and negate:
                arguments.append(f"--no-{name}")
            elif value is not None and value is not False:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                arguments += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return arguments


def executable(name: str, extra: str) -> Path:
    """A program beside this Python, else in PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise sdg.ServerError(
            f"{name} is not installed here: pip install 'sdg[{extra}]', or put the bin folder of the environment "
            "that has it into PATH"
        )
    return Path(found)


def interpreter(program: Path) -> Path:
    """The Python of the environment that a script belongs to."""
    beside = program.resolve().with_name("python")
    return beside if beside.exists() else Path(sys.executable)


def version_of(package: str, program: Path) -> str:
    """A package's version in the environment of a program, without starting that."""
    found = sorted(program.resolve().parent.parent.glob(f"lib/python3*/site-packages/{package}-*.dist-info"))
    return found[-1].name.split("-")[1].removesuffix(".dist") if found else ""


def model_of(run: sdg.Run) -> str:
    """The model to launch; the name that requests use is --server-arg served-model-name, if given."""
    if not run.options.model:
        raise sdg.UsageError(f"--server {run.options.server} needs --model: a name on the Hub, or a folder")
    return str(run.options.model)


def cache_folder(name: str, variable: str) -> Path:
    """Where a server caches what it compiles: a variable of its own, or where the desktop standard puts caches."""
    told = os.environ.get(variable)
    return Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


def served_name(run: sdg.Run) -> str:
    """The name under which the model is served."""
    return str(dict(run.options.server_arg or []).get("served-model-name", run.options.model))


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use; empty if there are none, or nobody knows."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [gpu for gpu in told.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split() if done.returncode == 0 else []


def gpus_of_replicas(options: argparse.Namespace) -> list[list[str]]:
    """A slice of this machine's GPUs for each replica; empty slices leave the choice to the server."""
    width = -(-options.tp * options.pp * options.dp // options.nodes)
    gpus = visible_gpus()
    if gpus and options.replicas * width > len(gpus):
        raise sdg.ServerError(
            f"--replicas {options.replicas} × --tp {options.tp} × --pp {options.pp} × --dp {options.dp} "
            f"on {options.nodes} machines need {options.replicas * width} GPUs here, and {len(gpus)} are visible: "
            "lower one of them"
        )
    if options.replicas == 1:
        return [[]]
    return [gpus[i * width : (i + 1) * width] for i in range(options.replicas)]


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nothing listens on and that no other run on this machine takes meanwhile."""
    import filelock

    folder = Path(tempfile.gettempdir()) / f"sdg-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    start = random.randrange(len(PORTS))
    for port in [*PORTS[start:], *PORTS[:start]]:
        lock = filelock.FileLock(folder / f"{port}.lock")
        try:
            lock.acquire(timeout=0)
            with socket.socket() as trial:
                trial.bind(("", port))
            break
        except (filelock.Timeout, OSError):
            lock.release()
    else:
        raise sdg.ServerError(f"no free port between {PORTS[0]} and {PORTS[-1]}")
    try:
        yield port
    finally:
        lock.release()


# ── Its process ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Died(Exception):
    """A server is not there any more, or never came up; the message says why."""


class Process:
    """A running process tree and its log. Leave the context, and it is gone."""

    def __init__(self, program: Program, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.program, self.log = program, log
        self.phase, self.line = "starting", ""
        self.fatal_at: float | None = None
        self._fatal: tuple[int, str] | None = None  # rank of the pattern, what was said
        self._complaint = ""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        self._popen = subprocess.Popen(
            [*guard, *argv],
            stdin=subprocess.PIPE,  # held open: its end is the guard's sign to end
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is the run's to handle
        )
        self._thread = threading.Thread(target=self._pump, args=[shlex.join(argv)], name="sdg-log", daemon=True)
        self._thread.start()

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._popen.stdin
        self._popen.stdin.close()
        await asyncio.wait([self.exited], timeout=LAST_WAIT)
        if not self.exited.done():  # something has killed the guard, and what is left keeps the log open
            self._popen.kill()

    @property
    def reason(self) -> str:
        """Why it ended, or cannot go on, in one line."""
        if self._fatal:
            hint = self.program.fatal[self._fatal[0]][1]
            return f"{self._fatal[1]}{f'; {hint}' if hint else ''} (log: {self.log})"
        status = f"it ended with status {self.exited.result()}" if self.exited.done() else "it gave no reason"
        said = self._complaint or self.line
        return f"{status}{f', its last words: {said}' if said else ', and without a word'} (log: {self.log})"

    def _pump(self, command: str) -> None:
        """Copy the output to the log, and look at its lines; in a thread, until all who could write are gone."""
        pipe = self._popen.stdout
        assert isinstance(pipe, io.BufferedReader)
        rest = b""
        with contextlib.closing(Log(self.log, command)) as log:
            while chunk := pipe.read1(1 << 16):
                log.write(chunk)
                *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
                rest = rest[-LONGEST_LINE:]
                for line in lines:
                    self._notice(line)
            self._notice(rest)
        pipe.close()
        status = self._popen.wait()  # after all lines: whoever hears of the end knows the reason
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
            self._loop.call_soon_threadsafe(self._end, status)

    def _end(self, status: int) -> None:
        if not self.exited.done():
            self.exited.set_result(status)

    def _notice(self, raw: bytes) -> None:
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw[-LONGEST_LINE:].decode(errors="replace")).strip()
        line = re.sub(r"^(\([^)]*pid=\d+\) *)?([A-Z]+ [\d:. -]+\[[^]]*\] *)?(\[[\d: -]+[^]]*\] *)?", "", line)[:300]
        if not line:
            return
        self.line = line
        for pattern, phase in self.program.phases:
            if re.search(pattern, line):
                self.phase = phase
        if re.match(r"([\w.]+(Error|Exception)\b|error\b|fatal\b|[\w.-]+: error: )", line, re.IGNORECASE):
            self._complaint = line
        for rank, (pattern, _) in enumerate(self.program.fatal):
            if re.search(pattern, line):
                if self._fatal is None or rank < self._fatal[0]:
                    self._fatal = rank, line
                self.fatal_at = self.fatal_at or self._loop.time()
                break


class Log:
    """A log file that stays within bounds. A disk that is full loses lines of it, not the run."""

    def __init__(self, path: Path, title: str) -> None:
        self._path = path
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        self.write(f"$ {title}\n".encode())

    def _open(self) -> Any:
        try:
            return open(self._path, "ab", buffering=0)
        except OSError:
            return open(os.devnull, "wb", buffering=0)

    def write(self, chunk: bytes) -> None:
        """Add to the end."""
        with contextlib.suppress(OSError):
            if self._file.tell() > LOG_BYTES:
                self._file.close()
                os.replace(self._path, f"{self._path}.1")
                self._file = self._open()
            self._file.write(chunk)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# ── Its supervision ──────────────────────────────────────────────────────────────────────────────────────────────────


class Replica:
    """One server: started, watched, restarted while it makes sense."""

    def __init__(
        self, run: sdg.Run, program: Program, number: int, gpus: list[str], session: aiohttp.ClientSession
    ) -> None:
        self.run, self.program, self.gpus, self.session = run, program, gpus, session
        self.options = run.options
        self.name = program.name if run.options.replicas == 1 else f"{program.name} {number}"
        self.number = number
        self.upstream = sdg.Upstream("", self.examine, program.model)
        self.upstream.status = f"{self.name} is starting"
        self.head: nodes.Head | None = None
        self.ready_once = False
        self.lives = 0
        self._fallen = asyncio.Event()
        self._doubted = 0.0  # loop time until which it is looked at more closely
        self._loop = asyncio.get_running_loop()

    async def supervise(self, on_failure: Callable[[Replica, sdg.Error], None]) -> None:
        """Keep the server alive until cancelled, or until `on_failure` was told that it is beyond help."""
        barren = 0
        while True:
            answers = self.upstream.answers
            try:
                await self._live()
            except Died as problem:
                death = problem
            except sdg.Error as problem:
                on_failure(self, problem)
                return
            taken = re.search(r"address already in use", str(death), re.IGNORECASE)
            most = PORT_ATTEMPTS if taken and not self._fixed_port else 0
            barren = 1 if self.upstream.answers > answers else barren + 1
            if barren > (self.options.max_restarts if self.ready_once else most):
                tried = f" after {barren - 1} restarts without an answer" if self.ready_once else ""
                on_failure(self, sdg.ServerError(f"{self.name} does not run{tried}: {death}"))
                return
            self.upstream.status = f"{self.name} is starting again"
            sdg.say(f"sdg: {self.name} has died and is started again: {death}")
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** (barren - 1) - 1))

    @property
    def _fixed_port(self) -> Any:
        return dict(self.options.server_arg or []).get("port")

    async def _live(self) -> None:
        """One life of the server. Always ends with an exception."""
        async with contextlib.AsyncExitStack() as stack:
            port = int(self._fixed_port or stack.enter_context(free_port()))
            spot = Spot(port, stack.enter_context(free_port()))
            if self.head:
                spot = dataclasses.replace(spot, nodes=self.options.nodes, head=self.head.host)
                await self._gather(self.head)
                stack.push_async_callback(self.head.stop)
            self.upstream.url = f"http://127.0.0.1:{port}/v1"
            async with self._compile_lock(spot) as mark:
                process = launch(self.run, self.program, spot, self.number, self.gpus, again=self.lives > 0)
                self.lives += 1
                await stack.enter_async_context(process)
                if self.head:
                    await self.head.start(spot.meeting_port)
                await self._until_ready(process)
                mark()
            self._fallen.clear()
            self.upstream.rise()
            try:
                await self._watch(process)
            except Died:
                self.upstream.fall(crashed=True)
                raise
            finally:
                self._fallen.set()
                self.upstream.fall(crashed=False)

    async def _gather(self, head: nodes.Head) -> None:
        began = self._loop.time()
        if head.missing():
            sdg.say(
                f"sdg: {self.name} waits for {len(head.missing())} more machines to join at {head.host}:{head.port}"
            )
        while missing := head.missing():
            names = ", ".join(map(str, missing))
            self.upstream.status = f"{self.name} waits for node {names} ({self._loop.time() - began:.0f} s)"
            if self._loop.time() - began > self.options.start_timeout:
                raise sdg.ServerError(f"node {names} has not joined at {head.host}:{head.port} in --start-timeout")
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def _compile_lock(self, spot: Spot) -> AsyncIterator[Callable[[], None]]:
        """Alone for servers of this configuration on this file system, until one of them was ready."""
        import filelock

        if self.program.cache is None or self.options.no_compile_lock:
            yield lambda: None
            return
        same = Spot(0, 0, nodes=spot.nodes)  # ports differ from start to start
        name = xxhash.xxh3_64_hexdigest(json.dumps([self.program.version, *self.program.command(same)]).encode())
        marker = self.program.cache / "sdg-compiled" / name
        lock = filelock.FileLock(marker.with_suffix(".lock"))
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            while not marker.exists():
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=0)
                    break
                self.upstream.status = f"{self.name} waits for another one, which compiles the same"
                await asyncio.sleep(0.5)
        except (OSError, NotImplementedError) as problem:
            sdg.say(f"sdg: no compile lock at {marker.parent} ({problem}): servers may compile the same graphs at once")
        try:
            yield lambda: _mark(marker)
        finally:
            lock.release()

    async def _until_ready(self, process: Process) -> None:
        began, said = self._loop.time(), ""
        while not await self._healthy():
            seconds = self._loop.time() - began
            self.upstream.status = f"{self.name}: {process.phase} ({seconds:.0f} s) {process.line[:60]}"
            if process.phase != said and not self.number and not self.options.no_progress:
                said = process.phase
                sdg.say(f"sdg: {self.name}: {said} ({seconds:.0f} s)")
            await self._check(process)
            if process.fatal_at and self._loop.time() > process.fatal_at + FATAL_PATIENCE:
                raise Died(process.reason)
            if seconds > self.options.start_timeout:
                raise Died(f"it is not ready after --start-timeout {self.options.start_timeout:g} s: {process.reason}")
            await asyncio.wait([process.exited], timeout=0.3)
        await self._check_model()
        self.ready_once = True
        sdg.say(f"sdg: {self.name} is ready after {self._loop.time() - began:.0f} s at {self.upstream.url}")

    async def _check(self, process: Process) -> None:
        """See that all processes of the server are there."""
        if process.exited.done():
            raise Died(process.reason)
        if self.head and self.head.lost:
            raise sdg.ServerError(self.head.lost)
        if self.head and self.head.died:
            raise Died(self.head.died)

    async def _watch(self, process: Process) -> None:
        """Return by `Died` when the server is dead, sick, or does nothing."""
        sick, looked = 0, self._loop.time()
        while True:
            doubted = self._loop.time() < self._doubted
            await asyncio.wait([process.exited], timeout=0.25 if doubted else 1.0)
            await self._check(process)
            if doubted or self._loop.time() > looked + 5:
                looked = self._loop.time()
                sick = sick + 1 if await self._healthy() is False else 0
                if sick >= SICK:
                    raise Died(f"its /health refuses: {process.reason}")
            limit = min(self.options.stall_timeout, self.options.request_timeout)
            idle = self._loop.time() - self.upstream.progressed
            busy = self.upstream.active or self.upstream.failures
            if busy and idle > limit and not await self._answers(min(limit, 60.0)):
                raise Died(f"no token and no answer for {idle:.0f} s, though there are requests")

    async def _healthy(self) -> bool | None:
        """Whether it takes requests; None if it did not say in time, as a busy one may."""
        import aiohttp

        root = self.upstream.url.removesuffix("/v1")
        try:
            status = await self._status(f"{root}/health")
            return status == 200 or (status in {404, 405} and await self._status(f"{root}/v1/models") < 500)
        except TimeoutError:
            return None
        except aiohttp.ClientError:
            return False

    async def _answers(self, seconds: float) -> bool:
        """Whether a server that does not report its tokens answers a tiny request; it may just be slow."""
        import aiohttp

        if self.upstream.reports:
            return False
        payload = {"model": self.run.model, "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
        timeout = aiohttp.ClientTimeout(total=seconds)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self.session.post(
                f"{self.upstream.url}/chat/completions", json=payload, timeout=timeout
            ) as answer:
                await answer.read()
                self.upstream.progressed = self._loop.time()
                return answer.status < 500
        return False

    async def _status(self, url: str) -> int:
        async with self.session.get(url) as response:
            await response.read()
            return response.status

    async def _check_model(self) -> None:
        import aiohttp

        served = None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # requests will tell
            async with self.session.get(f"{self.upstream.url}/models") as response:
                served = sdg.models_in(await response.read()) if response.status == 200 else None
        if self.program.model and served and self.program.model not in served:
            problem = f"{self.name} does not serve {self.program.model}, but {', '.join(served)}"
            if self.program.lists_model:
                raise sdg.ServerError(f"{problem}: is it another server?")
            sdg.say(f"sdg: {problem}, as it says; if it refuses requests, say another --model")

    async def examine(self, crashes: int) -> bool:
        """Whether a request that broke off did so because the server died; see `sdg.Upstream`."""
        if self.upstream.crashes == crashes and self.upstream.up.is_set():
            self._doubted = self._loop.time() + NOTICE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOTICE):
                    await self._fallen.wait()
        return self.upstream.crashes > crashes


def _mark(marker: Path) -> None:
    with contextlib.suppress(OSError):  # the next server compiles again, or finds what there is
        marker.touch()


def launch(run: sdg.Run, program: Program, spot: Spot, number: int, gpus: list[str], *, again: bool = False) -> Process:
    """Start a server's process, and tell the user how, the first time."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}  # Kubernetes sets it
    own = {**program.environment, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
    argv = program.command(spot)
    node = f"-node{spot.node}" if spot.nodes > 1 else ""
    log = run.state / "logs" / f"{program.name}-{run.options.rank:05d}-{number}{node}.log"
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in own.items())
    if not again:
        sdg.say(f"sdg: starting {settings}{shlex.join(argv)}\nsdg: its log is {log}")
    return Process(program, argv, {**environment, **own}, log)


@contextlib.asynccontextmanager
async def serve(run: sdg.Run, program: Program) -> AsyncIterator[list[sdg.Upstream]]:
    """Serve a model by a program, on this machine or on several; yields a replica each."""
    import aiohttp

    options = run.options
    nodes.place(options)
    if options.nodes > 1 and options.replicas > 1:
        raise sdg.UsageError("--replicas are for one machine; with --nodes start several runs")
    if options.node_rank:
        await nodes.join(run, lambda spot: launch(run, program, Spot(**spot), 0, []))
        yield []
        return
    slices = gpus_of_replicas(options)
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        replicas = [Replica(run, program, number, gpus, session) for number, gpus in enumerate(slices)]
        if options.nodes > 1:
            replicas[0].head = await stack.enter_async_context(nodes.Head(run))

        def failed(replica: Replica, problem: sdg.Error) -> None:
            replica.upstream.give_up()
            if replica.ready_once and not all(other.upstream.gone for other in replicas):
                sdg.say(f"sdg: {problem}; the other replicas go on without it")
            else:
                run.stop(problem)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(replica.supervise(failed)) for replica in replicas]
            try:
                yield [replica.upstream for replica in replicas]
            finally:
                for task in tasks:
                    task.cancel()
