"""The supervision of launched servers: a `Replica` starts a server, watches it, and restarts it when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

import sdg
from sdg_plugins.servers.connecting import models_in
from sdg_plugins.servers.launching import nodes
from sdg_plugins.servers.launching.processes import (
    NodeFailure,
    Placement,
    Process,
    Program,
    ServerDied,
    check_port,
    free_port,
)

if TYPE_CHECKING:
    import aiohttp

FATAL_PATIENCE = 5.0  # s between a fatal line and the kill: later lines may be more informative
NOTICE = 6.0  # s within which the supervisor notices that the server died while it processed a request
SUSPENDED = 15.0  # s between two looks that are a second apart: this process was stopped in the meantime
UNHEALTHY = 3  # failed health checks in a row after which the server counts as dead
LONGEST_PAUSE = 60.0  # s before a restart
PORT_ATTEMPTS = 5  # starts with another port each, if another process takes the port first


class Replica:
    """One server: started, watched, and restarted when it dies.

    Attributes:
        upstream: the server as the pool sees it.
        head: the connections to the other nodes; None on a single node.
        ready_once: the server has been ready at least once.
    """

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
        self._starts = 0
        self._fallen = asyncio.Event()
        self._doubted = 0.0  # loop time until which the server is checked more often
        self._loop = asyncio.get_running_loop()

    async def supervise(self, on_failure: Callable[[Replica, sdg.Error], None]) -> None:
        """Keep the server running until canceled, or until `on_failure` was called because it cannot be."""
        deaths = convictions = answers = convicted = 0  # deaths, convictions: since the last progress
        while True:
            try:
                await self._run_once()
            except ServerDied as exc:
                death = exc
            except sdg.Error as exc:
                on_failure(self, exc)
                return
            most = PORT_ATTEMPTS if death.port_taken and self._fixed_port is None else 0
            answered, found = self.upstream.answers > answers, self.upstream.convicted > convicted
            answers, convicted = self.upstream.answers, self.upstream.convicted
            # A convicted document is progress, too, unless every request crashes the server.
            convictions = 0 if answered else convictions + found
            deaths = 1 if answered or (found and convictions <= self.options.max_restarts) else deaths + 1
            if deaths > (self.options.max_restarts if self.ready_once else most):
                restarts = f"{deaths - 1} restart{'s' * (deaths != 2)}"
                failure = f"died after {restarts} without a response" if self.ready_once else "failed to start"
                on_failure(self, death.final(f"{self.name} {failure}: {death}"))
                return
            self.upstream.status = f"{self.name} is restarting"
            sdg.say(f"{self.name} died and is being restarted: {death}")
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** (deaths - 1) - 1))

    @property
    def _fixed_port(self) -> str | None:
        """The port given by --server-arg."""
        return dict(self.options.server_arg or []).get("port")

    async def _run_once(self) -> None:
        """Start the server and watch it until it dies. Always ends with an exception."""
        async with contextlib.AsyncExitStack() as stack:
            fixed = self._fixed_port
            port = stack.enter_context(free_port()) if fixed is None else check_port(fixed)
            placement = Placement(port, stack.enter_context(free_port()))
            if self.head:
                placement = dataclasses.replace(placement, nodes=self.options.nodes, head=self.head.host)
                await self._wait_for_nodes(self.head)
                stack.push_async_callback(self.head.stop)
            self.upstream.url = f"http://127.0.0.1:{port}/v1"
            async with self._compile_lock(placement) as mark_compiled:
                if self.head:  # again: a node may have gone while this one waited for the lock
                    await self._wait_for_nodes(self.head)
                process = launch(self.run, self.program, placement, self.number, self.gpus, quiet=self._starts > 0)
                self._starts += 1
                await stack.enter_async_context(process)
                if self.head:
                    await self.head.start(placement.rendezvous_port)
                await self._wait_until_ready(process)
                mark_compiled()
            self._fallen.clear()
            self.upstream.rise()
            try:
                await self._watch(process)
            except ServerDied:
                self.upstream.fall(crashed=True)
                raise
            finally:
                self._fallen.set()
                self.upstream.fall(crashed=False)

    # Starting

    async def _wait_for_nodes(self, head: nodes.Head) -> None:
        """Wait until all other nodes have joined; raise ServerError after --start-timeout."""
        began, address = self._loop.time(), f"{head.host}:{head.port}"
        if missing := head.missing():
            sdg.say(f"{self.name} is waiting for {_list_nodes(missing)} to join at {address}")
        while missing := head.missing():
            seconds = self._loop.time() - began
            self.upstream.status = f"{self.name} is waiting for {_list_nodes(missing)} ({seconds:.0f} s)"
            if seconds > self.options.start_timeout:
                have = "have" if len(missing) > 1 else "has"
                message = f"{_list_nodes(missing)} {have} not joined at {address} within --start-timeout"
                raise NodeFailure(message)
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def _compile_lock(self, placement: Placement) -> AsyncIterator[Callable[[], None]]:
        """Hold the lock of servers with this configuration and cache folder, unless one of them was ready before.

        Yields a function that records that this one is ready: later servers use the compiled graphs in the cache.
        """
        import filelock

        if self.program.cache is None or self.options.no_compile_lock:
            yield lambda: None
            return
        same = Placement(0, 0, nodes=placement.nodes)  # ports differ from start to start
        name = xxhash.xxh3_64_hexdigest(json.dumps([self.program.version, *self.program.command(same)]).encode())
        marker = self.program.cache / "sdg-compiled" / name
        lock = filelock.FileLock(marker.with_suffix(".lock"))
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            while not marker.exists():
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=0)
                    break
                self.upstream.status = f"{self.name} is waiting for another server, which compiles the same graphs"
                await asyncio.sleep(0.5)
        except (OSError, NotImplementedError) as exc:
            sdg.say(f"no compile lock at {marker.parent} ({exc}): several servers may compile the same graphs at once")
        try:
            yield lambda: _touch(marker)
        finally:
            lock.release()

    async def _wait_until_ready(self, process: Process) -> None:
        began, said = self._loop.time(), ""
        while not await self._healthy():
            seconds = self._loop.time() - began
            self.upstream.status = f"{self.name}: {process.phase} ({seconds:.0f} s) {process.line[:60]}"
            if process.phase != said and not self.number and not self.options.no_progress:
                said = process.phase
                sdg.say(f"{self.name}: {said} ({seconds:.0f} s)")
            self._check_processes(process)
            if process.fatal_at and self._loop.time() > process.fatal_at + FATAL_PATIENCE:
                raise process.death()
            if seconds > self.options.start_timeout:
                limit = f"--start-timeout {self.options.start_timeout:g} s"
                raise process.death(f"not ready within {limit}; {process.reason}")
            await asyncio.wait([process.exited], timeout=0.3)
        await self._check_model()
        self.ready_once = True
        sdg.say(f"{self.name} is ready after {self._loop.time() - began:.0f} s at {self.upstream.url}")

    async def _check_model(self) -> None:
        """Raise ServerError if the server does not serve our model: it may be another server on the same port."""
        import aiohttp

        served = None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # requests will show it
            async with self.session.get(f"{self.upstream.url}/models") as response:
                served = models_in(await response.read()) if response.status == 200 else None
        if self.program.model and served and self.program.model not in served:
            if self.program.lists_model:
                message = f"{self.name} does not serve {self.program.model}, but {', '.join(served)}"
                raise sdg.ServerError(f"{message}: is another server using its port?")
            message = f"{self.name} lists {', '.join(served)}, not {self.program.model}"
            sdg.say(f"{message}; if it rejects requests, change --model")

    # Watching

    def _check_processes(self, process: Process) -> None:
        """Raise an exception if a process of the server has ended, or a node is gone."""
        if process.exited.done():
            raise process.death()
        if self.head and self.head.lost:
            raise NodeFailure(self.head.lost, self.head.suspect)
        if self.head and self.head.died:
            raise ServerDied(self.head.died, by_options=self.head.died_by_options, node=self.head.suspect)

    async def _watch(self, process: Process) -> None:
        """Raise ServerDied when the server has ended, fails its health checks, or makes no progress."""
        unhealthy, checked = 0, self._loop.time()
        awake = checked
        while True:
            doubted = self._loop.time() < self._doubted
            await asyncio.wait([process.exited], timeout=0.25 if doubted else 1.0)
            self._check_processes(process)
            if self._loop.time() > awake + SUSPENDED:  # the server has been suspended together with this process
                self.upstream.progressed = self._loop.time()
            awake = self._loop.time()
            if doubted or self._loop.time() > checked + 5:
                checked = self._loop.time()
                unhealthy = unhealthy + 1 if await self._healthy() is False else 0
                if unhealthy >= UNHEALTHY:
                    raise ServerDied(f"its health checks fail; {process.reason}")
            limit = min(self.options.stall_timeout, self.options.request_timeout)
            idle = self._loop.time() - self.upstream.progressed
            busy = self.upstream.active or self.upstream.failures
            if busy and idle > limit and not await self._answers_probe(min(limit, 60.0)):
                raise ServerDied(f"no token and no response for {idle:.0f} s, although requests were sent")

    async def _healthy(self) -> bool | None:
        """True if the server accepts requests; None if it did not respond in time, as it may when it is busy."""
        import aiohttp

        root = self.upstream.url.removesuffix("/v1")
        try:
            status = await self._status(f"{root}/health")
            return status == 200 or (status in {404, 405} and await self._status(f"{root}/v1/models") < 500)
        except TimeoutError:
            return None
        except aiohttp.ClientError:
            return False

    async def _answers_probe(self, seconds: float) -> bool:
        """True if a server that does not report its tokens responds to a tiny request: it is slow, but works."""
        import aiohttp

        if self.upstream.limit.load and self.upstream.limit.load.tokens is not None:
            return False
        payload = {"model": self.run.model, "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
        timeout = aiohttp.ClientTimeout(total=seconds)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self.session.post(
                f"{self.upstream.url}/chat/completions", json=payload, timeout=timeout
            ) as response:
                await response.read()
                self.upstream.progressed = self._loop.time()
                return response.status < 500
        return False

    async def _status(self, url: str) -> int:
        async with self.session.get(url) as response:
            await response.read()
            return response.status

    async def examine(self, crashes: int) -> bool:
        """True if a request failed because the server crashed; see `sdg.Upstream`."""
        if self.upstream.crashes == crashes and self.upstream.up.is_set():
            self._doubted = self._loop.time() + NOTICE
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NOTICE):
                    await self._fallen.wait()
        return self.upstream.crashes > crashes


def _list_nodes(numbers: list[int]) -> str:
    """`node 1`, or `nodes 1, 2`."""
    return f"node{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _touch(marker: Path) -> None:
    with contextlib.suppress(OSError):  # without the marker, later servers only wait for the lock again
        marker.touch()


def launch(
    run: sdg.Run, program: Program, placement: Placement, number: int, gpus: list[str], *, quiet: bool = False
) -> Process:
    """Launch a server's process.

    Args:
        run: its state has the folder of logs.
        program: the kind of server.
        placement: where the process runs.
        number: of the replica.
        gpus: ids of the GPUs that it may use; empty for all.
        quiet: do not print the command line and the log's path.
    """
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PORT"}  # Kubernetes sets it
    own = {**program.environment, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})}
    argv = program.command(placement)
    node = f"-node{placement.node}" if placement.nodes > 1 else ""
    log = run.state / "logs" / f"{program.name}-{run.options.rank:05d}-{number}{node}.log"
    if not quiet:
        variables = "".join(f"{name}={shlex.quote(value)} " for name, value in own.items())
        sdg.say(f"starting {variables}{shlex.join(argv)}")
        sdg.say(f"its log is {log}")
    return Process(program, argv, {**environment, **own}, log)
