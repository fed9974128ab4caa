"""One model on several nodes: node 0 runs the engine and has the others start and stop their parts of the server.

Each of the other nodes keeps a connection to node 0 (JSON lines over TCP). It also shows both sides when the other is
gone: the connection of a killed process closes, and a machine that is switched off sends no more heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common.crew import GRACE
from sdg_plugins.common.files import rank_file, sync
from sdg_plugins.common.identity import differences
from sdg_plugins.servers.launching.processes import NodeFailure, Placement, Process

if TYPE_CHECKING:
    import argparse

BEAT = 5.0  # s between two heartbeats
SILENCE = 30.0  # s without a heartbeat after which the other side counts as gone
STOPPING = 30.0  # s that a node may take to end its part
Message = dict[str, Any]


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def derive_node_options(options: argparse.Namespace) -> None:
    """Fill in --node-rank and --head-address from Slurm's variables if they are not given.

    Raises:
        UsageError: they contradict --nodes, or the address of node 0 is unknown.
    """
    slurm = os.environ if options.nodes > 1 else {}
    if options.node_rank is None:
        options.node_rank = int(slurm.get("SLURM_NODEID", "0"))
    if options.node_rank >= options.nodes:
        raise sdg.UsageError(f"--node-rank {options.node_rank} must be less than --nodes {options.nodes}")
    if options.nodes > 1 and not options.head_address:
        if "SLURM_JOB_NODELIST" not in slurm or not shutil.which("scontrol"):
            raise sdg.UsageError("--nodes requires --head-address: the host name or address of node 0")
        command = ["scontrol", "show", "hostnames", slurm["SLURM_JOB_NODELIST"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise sdg.UsageError(f"scontrol cannot list the nodes ({done.stderr.strip()}): set --head-address")
        options.head_address = done.stdout.split()[0]


def head_address(options: argparse.Namespace) -> tuple[str, int]:
    """Host and port of node 0. The port is 0 in Slurm's jobs, where node 0 takes a free one; see `Meeting`."""
    host, _, port = (
        options.head_address.rpartition(":") if ":" in options.head_address else (options.head_address, "", "")
    )
    if port and not port.isdigit():
        raise sdg.UsageError(f"--head-address {options.head_address}: expected HOST or HOST:PORT")
    return host, int(port or (0 if os.environ.get("SLURM_JOB_ID") else 29_400))


class Meeting(NamedTuple):
    """Where the nodes of one attempt meet: node 0 writes it into the state, which all nodes of a Slurm job share.

    The port of an earlier attempt may still be taken, or lead to its processes.

    Attributes:
        attempt: the Slurm job, and how often it has been restarted.
        port: node 0's.
        token: what a node that joins must show; only those who can read the state know it.
    """

    attempt: str
    port: int
    token: str

    @classmethod
    def file(cls, run: sdg.Run) -> Path:
        """Its file in the state."""
        return rank_file(run.state, run.options.rank, "meeting.json")

    @classmethod
    def current(cls, run: sdg.Run) -> Meeting | None:
        """The meeting of this attempt; None if node 0 has not called it yet."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            meeting = cls(**json.loads(cls.file(run).read_bytes()))
            return meeting if meeting.attempt == attempt_id() else None
        return None

    @classmethod
    def call(cls, run: sdg.Run, port: int, token: str) -> None:
        """Call a meeting at a port of this machine."""
        meeting = cls(attempt_id(), port, token)
        path = cls.file(run)
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(meeting._asdict(), file)
        os.replace(temporary, path)
        sync(path.parent)


def attempt_id() -> str:
    """The Slurm job of this process, and how often it has been restarted."""
    return f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def own_address(host: str) -> str:
    """The address of this machine, node 0, which the other nodes know as `host`.

    Debian resolves a machine's own name to its loopback; the address of the outward interface replaces that.
    """
    found = socket.gethostbyname(host)
    if not found.startswith("127.") or host in {"localhost", found}:
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # sends nothing: the kernel only chooses the interface
        return str(outward.getsockname()[0])


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that must be the same on all nodes, as JSON."""
    names = "server model nodes tp pp dp node_backend server_arg quantization kv_cache_dtype model_max_context"
    names += " chunked_prefill speculative_config"
    values: dict[str, Any] = json.loads(json.dumps({name: getattr(options, name) for name in names.split()}))
    return values


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def send_message(writer: asyncio.StreamWriter, **message: Any) -> None:
    """Send one message; raises ConnectionError if the other side is gone."""
    if writer.is_closing():  # uvloop raises a different error
        raise ConnectionResetError
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def received_messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """The other side's messages without its heartbeats, until it is gone.

    The silence is counted in seconds that this process was awake for: a job may be suspended as a whole.
    """
    silent = 0
    while silent < SILENCE:
        try:
            async with asyncio.timeout(1.0):
                line = await reader.readline()
            message = json.loads(line) if line else None
        except TimeoutError:
            silent += 1
            continue
        except (ConnectionError, ValueError):
            return
        silent = 0
        if not isinstance(message, dict):
            return
        if "beat" not in message:
            yield message


async def send_heartbeats(writer: asyncio.StreamWriter) -> None:
    """Send a heartbeat every BEAT seconds."""
    with contextlib.suppress(ConnectionError):  # the reading side notices it, too
        while True:
            await send_message(writer, beat=True)
            await asyncio.sleep(BEAT)


# ── Node 0 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Head:
    """Node 0's side of the connections.

    Attributes:
        lost: says which node is gone; "" if none is.
        died: says which node's part of the server has ended, and why; "" if none has.
        died_by_options: that part refuses its options.
        suspect: host of the node that is gone, or whose part has ended; None if there is none.
    """

    def __init__(self, run: sdg.Run) -> None:
        self.run, self.options = run, run.options
        self.host, self.port = head_address(run.options)
        self.lost = self.died = ""
        self.died_by_options = False
        self.suspect: str | None = None
        self._hosts: dict[int, str] = {}
        self._token = ""  # only in Slurm's jobs
        self._writers: dict[int, asyncio.StreamWriter] = {}  # of the nodes that have joined
        self._started = False  # from then on a node that goes is lost; before, it may join again
        self._running: set[int] = set()
        self._stopped = asyncio.Event()
        self._connections: set[asyncio.Task[Any]] = set()
        self._ending = False

    async def __aenter__(self) -> Head:
        try:
            own = await asyncio.to_thread(own_address, self.host)
            if not self.port:
                self._token = secrets.token_hex(16)  # before anyone can connect
            self._server = await asyncio.start_server(self._serve_node, own, self.port)
            if not self.port:
                self.port = self._server.sockets[0].getsockname()[1]
                await asyncio.to_thread(Meeting.call, self.run, self.port, self._token)
        except OSError as exc:
            message = f"node 0 cannot listen at {self.host}:{self.port} ({exc.strerror or exc})"
            raise NodeFailure(f"{message}: choose another --head-address HOST:PORT on all nodes") from exc
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        for writer in self._writers.values():
            with contextlib.suppress(ConnectionError):
                await send_message(writer, end=True)
        self._server.close()
        if self._connections:  # the other nodes close them
            await asyncio.wait(self._connections, timeout=BEAT)

    def missing(self) -> list[int]:
        """The nodes that have not joined."""
        return [node for node in range(1, self.options.nodes) if node not in self._writers]

    async def start(self, rendezvous_port: int) -> None:
        """Have the other nodes start their parts of the server, which meet at a port of this machine."""
        self.died, self._started, self.suspect = "", True, None
        self._running = set(self._writers)
        for writer in self._writers.values():
            with contextlib.suppress(ConnectionError):  # `lost` will say so
                await send_message(writer, start=rendezvous_port)

    async def stop(self) -> None:
        """Have the other nodes end their parts, and wait until they have."""
        self._stopped.clear()
        for writer in self._writers.values():
            with contextlib.suppress(ConnectionError):
                await send_message(writer, stop=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOPPING):
                while self._running:
                    await self._stopped.wait()
                    self._stopped.clear()

    async def _serve_node(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle the connection of one node."""
        node, task = 0, asyncio.current_task()
        assert task
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        async with sdg.background(send_heartbeats(writer)):
            async for message in received_messages(reader):
                if "node" in message:
                    if refusal := self._refusal(message):
                        with contextlib.suppress(ConnectionError):
                            await send_message(writer, refused=refusal)
                        break
                    node = message["node"]
                    self._writers[node], self._hosts[node] = writer, str(message.get("host") or "")
                elif "died" in message and node:
                    self._note_death(node, message)
                elif "stopped" in message and node:
                    self._running.discard(node)
                    self._stopped.set()
        if node and not self._started:
            del self._writers[node]
        elif node and not self._ending:
            self.lost = self.lost or f"node {node} is gone: its process or its machine has ended"
            self.suspect = self.suspect or self._hosts[node] or None
            self._running.discard(node)
            self._stopped.set()
        writer.close()

    def _note_death(self, node: int, message: Message) -> None:
        """Note that a node's part has ended; the first one counts, because the others follow it."""
        if not self.died:
            self.died = f"node {node} ({message.get('host')}): {message['died']}"
            self.died_by_options = bool(message.get("by_options"))
            self.suspect = str(message.get("host") or "") or None

    def _refusal(self, message: Message) -> str:
        """Why a node may not join; "" if it may."""
        if not hmac.compare_digest(self._token, str(message.get("token") or "")):
            return "it does not have the token of this run, which is in the run's state"
        mine, node = shared_options(self.options), message["node"]
        if not isinstance(node, int) or not 0 < node < self.options.nodes:
            return f"there are only {self.options.nodes} nodes"
        if changes := list(differences(mine, message.get("layout"))):
            return f"node 0 has different options: {', '.join(change.partition(':')[0] for change in changes)}"
        return "a node with this number has already joined" if node in self._writers else ""


# ── The other nodes ──────────────────────────────────────────────────────────────────────────────────────────────────


async def follow_head(run: sdg.Run, launch: Callable[[Placement], Process]) -> None:
    """The other nodes' side: start and stop a part of the server on node 0's request, until node 0 ends.

    Args:
        run: names the node and the address of node 0.
        launch: launches this node's process.

    Raises:
        ServerError: node 0 does not respond, refuses this node, or is gone without having said so.
    """
    host, port, reader, writer = await _connect(run)
    sdg.say(f"node {run.options.node_rank} has joined node 0 at {host}:{port}")
    part = ServerPart(run, launch, writer)
    following = asyncio.create_task(_follow(run, part, host, reader, writer))
    try:
        await asyncio.shield(following)
    except asyncio.CancelledError:
        # Schedulers signal all nodes at once: node 0 still waits for its requests in flight.
        await asyncio.wait([following], timeout=GRACE + 2)
        raise
    finally:
        following.cancel()
        await asyncio.wait([following])
        await part.stop()
        writer.close()


async def _follow(
    run: sdg.Run, part: ServerPart, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Do what node 0 requests, until it ends."""
    node, meeting = run.options.node_rank, Meeting.current(run)
    token = meeting.token if meeting else ""
    with contextlib.suppress(ConnectionError):
        async with sdg.background(send_heartbeats(writer)):
            layout = shared_options(run.options)
            await send_message(writer, node=node, host=platform.node(), token=token, layout=layout)
            async for message in received_messages(reader):
                if "end" in message:
                    return
                if "refused" in message:
                    raise sdg.ServerError(f"node 0 refuses node {node}: {message['refused']}")
                if "start" in message:
                    await part.start(host, message["start"])
                elif "stop" in message:
                    await part.stop()
                    await send_message(writer, stopped=True)
    raise sdg.ServerError(f"node 0 ({host}) is gone: its process or its machine has ended")


async def _connect(run: sdg.Run) -> tuple[str, int, asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to node 0, which may start later than this node. Returns its host and port, too."""
    loop = asyncio.get_running_loop()
    said, deadline = loop.time(), loop.time() + run.options.start_timeout
    host, port = head_address(run.options)
    sdg.say(f"node {run.options.node_rank} is connecting to node 0 at {host}")
    while True:
        meeting = Meeting.current(run) if not port else None
        at = port or (meeting.port if meeting else 0)
        reason: object = f"{Meeting.file(run)} is not there yet"
        if at:
            try:
                return host, at, *await asyncio.open_connection(host, at)
            except OSError as exc:
                reason = exc.strerror or exc
        where = f"{host}:{at}" if at else host
        if loop.time() > deadline:
            message = f"node 0 did not respond at {where} within --start-timeout ({reason})"
            raise sdg.ServerError(f"{message}: is --head-address correct, is node 0 running?")
        if loop.time() > said + 10:
            said = loop.time()
            sdg.say(f"node 0 does not respond at {where} yet ({reason})")
        await asyncio.sleep(0.5)


class ServerPart:
    """This node's part of the server, which node 0 starts and stops."""

    def __init__(self, run: sdg.Run, launch: Callable[[Placement], Process], writer: asyncio.StreamWriter) -> None:
        self._run, self._launch, self._writer = run, launch, writer
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, host: str, rendezvous_port: int) -> None:
        """Start the process, which meets those of the other nodes at a port of `host`."""
        options = self._run.options
        self._process = self._launch(Placement(0, rendezvous_port, options.node_rank, options.nodes, host))
        self._watching = asyncio.create_task(self._watch(self._process))

    async def stop(self) -> None:
        """End the process, if it runs."""
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._process:
            await self._process.end()
        self._process = self._watching = None

    async def _watch(self, process: Process) -> None:
        """Report to node 0 when the process ends by itself."""
        await asyncio.wait([process.exited])
        with contextlib.suppress(ConnectionError):
            await send_message(self._writer, died=process.reason, by_options=process.by_options, host=platform.node())
