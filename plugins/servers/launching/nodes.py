"""One model on several machines: machine 0 runs the engine and tells the others when to start and stop their part.

Each of the others keeps a connection to machine 0 (JSON lines over TCP), which is also how both sides notice that the
other is gone: a process that is killed closes it, and a machine that is switched off sends no more beats.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.state import differences
from sdg_plugins.servers.launching.processes import Process

if TYPE_CHECKING:
    import argparse

BEAT = 5.0  # s between two beats
SILENCE = 30.0  # s without a beat after which a machine counts as gone
STOPPING = 30.0  # s that a machine may take to end its part
Message = dict[str, Any]


def place(options: argparse.Namespace) -> None:
    """Fill in the options that say which machine this is, from Slurm's variables where they are silent.

    Raises:
        UsageError: they do not fit together, or nothing tells where machine 0 is.
    """
    slurm = os.environ if options.nodes > 1 else {}
    if options.node_rank is None:
        options.node_rank = int(slurm.get("SLURM_NODEID", "0"))
    if options.node_rank >= options.nodes:
        raise sdg.UsageError(f"--node-rank {options.node_rank} is not below --nodes {options.nodes}")
    if options.nodes > 1 and not options.head_address:
        if "SLURM_JOB_NODELIST" not in slurm or not shutil.which("scontrol"):
            raise sdg.UsageError("--nodes needs --head-address: the name of machine 0, as the others reach it")
        command = ["scontrol", "show", "hostnames", slurm["SLURM_JOB_NODELIST"]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise sdg.UsageError(f"scontrol does not tell machine 0 ({done.stderr.strip()}): give --head-address")
        options.head_address = done.stdout.split()[0]


def address(options: argparse.Namespace) -> tuple[str, int]:
    """Host and port of machine 0; without a port one that follows from Slurm's job number, else 29400."""
    host, _, port = (
        options.head_address.rpartition(":") if ":" in options.head_address else (options.head_address, "", "")
    )
    job = os.environ.get("SLURM_JOB_ID")
    if port and not port.isdigit():
        raise sdg.UsageError(f"--head-address {options.head_address}: HOST or HOST:PORT is wanted")
    return host, int(port or (18_000 + int(job) % 3_000 if job else 29_400))


def own_address(host: str) -> str:
    """The address of this machine, machine 0, under which the others know it as `host`.

    Debian lets a machine's own name point to its loopback: there the address of its outward interface is taken.
    """
    found = socket.gethostbyname(host)
    if not found.startswith("127.") or host in {"localhost", found}:
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("192.0.2.1", 9))  # nothing is sent: the kernel only chooses the interface
        return str(outward.getsockname()[0])


def layout(options: argparse.Namespace) -> dict[str, Any]:
    """What all machines have to agree on, as JSON."""
    names = "server model nodes tp pp dp node_backend server_arg quantization kv_cache_dtype model_max_context"
    names += " chunked_prefill speculative_config"
    values: dict[str, Any] = json.loads(json.dumps({name: getattr(options, name) for name in names.split()}))
    return values


async def send(writer: asyncio.StreamWriter, **message: Any) -> None:
    """Send one message; ConnectionError if the other side is gone."""
    if writer.is_closing():  # uvloop has another error for that
        raise ConnectionResetError
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[Message]:
    """The other side's messages, beats aside; ends when it is gone."""
    while True:
        try:
            async with asyncio.timeout(SILENCE):
                line = await reader.readline()
            message = json.loads(line) if line else None
        except (TimeoutError, ConnectionError, ValueError):
            return
        if not isinstance(message, dict):
            return
        if "beat" not in message:
            yield message


async def beat(writer: asyncio.StreamWriter) -> None:
    """Let the other side know that this one is alive."""
    with contextlib.suppress(ConnectionError):  # whoever reads notices
        while True:
            await send(writer, beat=True)
            await asyncio.sleep(BEAT)


class Head:
    """Machine 0's side. `lost` says which machine is gone, `died` whose part of the server has ended."""

    def __init__(self, run: sdg.Run) -> None:
        self.run, self.options = run, run.options
        self.host, self.port = address(run.options)
        self.lost = self.died = ""
        self._others: dict[int, asyncio.StreamWriter] = {}
        self._begun = False  # from then on a machine that goes is lost; before it may come again
        self._running: set[int] = set()
        self._stopped = asyncio.Event()
        self._talks: set[asyncio.Task[Any]] = set()
        self._ending = False

    async def __aenter__(self) -> Head:
        try:
            own = await asyncio.to_thread(own_address, self.host)
            self._server = await asyncio.start_server(self._welcome, own, self.port)
        except OSError as problem:
            message = f"machine 0 cannot listen at {self.host}:{self.port} ({problem.strerror or problem})"
            raise sdg.ServerError(f"{message}: give another --head-address HOST:PORT to all of them") from problem
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ending = True
        for writer in self._others.values():
            with contextlib.suppress(ConnectionError):
                await send(writer, end=True)
        self._server.close()
        if self._talks:  # the others hang up
            await asyncio.wait(self._talks, timeout=BEAT)

    def missing(self) -> list[int]:
        """The machines that have not joined."""
        return [node for node in range(1, self.options.nodes) if node not in self._others]

    async def start(self, meeting_port: int) -> None:
        """Have the others start their part of the server, which meets at a port of this machine."""
        self.died, self._begun = "", True
        self._running = set(self._others)
        for writer in self._others.values():
            with contextlib.suppress(ConnectionError):  # `lost` will tell
                await send(writer, start=meeting_port)

    async def stop(self) -> None:
        """Have the others end their part, and wait until they have."""
        self._stopped.clear()
        for writer in self._others.values():
            with contextlib.suppress(ConnectionError):
                await send(writer, stop=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOPPING):
                while self._running:
                    await self._stopped.wait()
                    self._stopped.clear()

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        node, task = 0, asyncio.current_task()
        assert task
        self._talks.add(task)
        task.add_done_callback(self._talks.discard)
        async with sdg.background(beat(writer)):
            async for message in messages(reader):
                if "node" in message:
                    if refusal := self._refusal(message):
                        with contextlib.suppress(ConnectionError):
                            await send(writer, refused=refusal)
                        break
                    node = message["node"]
                    self._others[node] = writer
                elif "died" in message and node:
                    self.died = self.died or f"node {node} ({message.get('host')}): {message['died']}"
                elif "stopped" in message and node:
                    self._running.discard(node)
                    self._stopped.set()
        if node and not self._begun:
            del self._others[node]
        elif node and not self._ending:
            self.lost = self.lost or f"node {node} is gone: its process or its machine has ended"
            self._running.discard(node)
            self._stopped.set()
        writer.close()

    def _refusal(self, message: Message) -> str:
        mine, node = layout(self.options), message["node"]
        if not isinstance(node, int) or not 0 < node < self.options.nodes:
            return f"there is no machine {node}"
        if changes := list(differences(mine, message.get("layout"))):
            return f"machine 0 was started with other options: {'; '.join(changes)}"
        return f"there is a machine {node} already" if node in self._others else ""


async def join(run: sdg.Run, start: Callable[[Message], Process]) -> None:
    """The other machines' side: run a part of the server when told to, until machine 0 ends.

    Args:
        start: launches this machine's process at the spot of the fields given.

    Raises:
        ServerError: machine 0 was not found, refused, or is gone without a word.
    """
    host, port = address(run.options)
    reader, writer = await _connect(run, host, port)
    sdg.say(f"node {run.options.node_rank} has joined {host}:{port}")
    part = Part(run, start, writer)
    obeying = asyncio.create_task(_obey(run, part, reader, writer))
    try:
        await asyncio.shield(obeying)
    except asyncio.CancelledError:
        # Schedulers signal all machines at once: the first one still lets what is in flight end.
        await asyncio.wait([obeying], timeout=sdg.GRACE + 2)
        raise
    finally:
        obeying.cancel()
        await asyncio.wait([obeying])
        await part.stop()
        writer.close()


async def _obey(run: sdg.Run, part: Part, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Do as machine 0 says, until it ends."""
    host, port = address(run.options)
    with contextlib.suppress(ConnectionError):
        async with sdg.background(beat(writer)):
            await send(writer, node=run.options.node_rank, layout=layout(run.options))
            async for message in messages(reader):
                if "end" in message:
                    return
                if "refused" in message:
                    raise sdg.ServerError(f"node {run.options.node_rank} is refused: {message['refused']}")
                if "start" in message:
                    await part.start(host, message["start"])
                elif "stop" in message:
                    await part.stop()
                    await send(writer, stopped=True)
    raise sdg.ServerError(f"machine 0 ({host}:{port}) is gone")


async def _connect(run: sdg.Run, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    said, deadline = loop.time(), loop.time() + run.options.start_timeout
    sdg.say(f"node {run.options.node_rank} looks for machine 0 at {host}:{port}")
    while True:
        try:
            return await asyncio.open_connection(host, port)
        except OSError as problem:
            if loop.time() > deadline:
                message = f"machine 0 was not found at {host}:{port} in --start-timeout ({problem.strerror or problem})"
                raise sdg.ServerError(message) from problem
            if loop.time() > said + 10:
                said = loop.time()
                sdg.say(f"machine 0 does not answer at {host}:{port} yet ({problem.strerror or problem})")
        await asyncio.sleep(0.5)


class Part:
    """This machine's part of the server, while it runs."""

    def __init__(self, run: sdg.Run, start: Callable[[Message], Process], writer: asyncio.StreamWriter) -> None:
        self._run, self._start, self._writer = run, start, writer
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, host: str, meeting_port: int) -> None:
        """Start it."""
        options = self._run.options
        spot = {"port": 0, "node": options.node_rank, "nodes": options.nodes}
        self._process = self._start({**spot, "head": host, "meeting_port": meeting_port})
        self._watching = asyncio.create_task(self._watch(self._process))

    async def stop(self) -> None:
        """End it, if it runs."""
        if self._watching:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        if self._process:
            await self._process.__aexit__()
        self._process = self._watching = None

    async def _watch(self, process: Process) -> None:
        await asyncio.wait([process.exited])
        with contextlib.suppress(ConnectionError):
            await send(self._writer, died=process.reason, host=os.uname().nodename)
