"""The supervision of launched servers: a `Replica` starts one, watches it, and starts it again while that helps."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

import sdg
from sdg_plugins.servers.connecting import models_in
from sdg_plugins.servers.launching import nodes
from sdg_plugins.servers.launching.processes import Died, Process, Program, Spot, free_port

if TYPE_CHECKING:
    import aiohttp

FATAL_PATIENCE = 5.0  # s between a fatal line and the kill: the lines after it may say more
NOTICE = 6.0  # s within which a server that has died in a request's face is seen to be dead
SICK = 3  # times in a row that /health refuses before the server counts as dead
LONGEST_PAUSE = 60.0  # s before a restart
PORT_ATTEMPTS = 5


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
        barren = convictions = answers = convicted = 0
        while True:
            try:
                await self._live()
            except Died as problem:
                death = problem
            except sdg.Error as problem:
                on_failure(self, problem)
                return
            taken = re.search(r"address already in use", str(death), re.IGNORECASE)
            most = PORT_ATTEMPTS if taken and not self._fixed_port else 0
            answered, found = self.upstream.answers > answers, self.upstream.convicted > convicted
            answers, convicted = self.upstream.answers, self.upstream.convicted
            # A document that was found out is progress, too, unless the server dies of whatever it gets.
            convictions = 0 if answered else convictions + found
            barren = 1 if answered or (found and convictions <= self.options.max_restarts) else barren + 1
            if barren > (self.options.max_restarts if self.ready_once else most):
                tried = f" after {barren - 1} restarts without an answer" if self.ready_once else ""
                on_failure(self, sdg.ServerError(f"{self.name} does not run{tried}: {death}"))
                return
            self.upstream.status = f"{self.name} is starting again"
            sdg.say(f"{self.name} has died and is started again: {death}")
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** (barren - 1) - 1))

    @property
    def _fixed_port(self) -> str | None:
        return dict(self.options.server_arg or []).get("port")

    async def _live(self) -> None:
        """One life of the server. Always ends with an exception."""
        async with contextlib.AsyncExitStack() as stack:
            port = stack.enter_context(free_port(self._fixed_port))
            spot = Spot(port, stack.enter_context(free_port()))
            if self.head:
                spot = dataclasses.replace(spot, nodes=self.options.nodes, head=self.head.host)
                await self._gather(self.head)
                stack.push_async_callback(self.head.stop)
            self.upstream.url = f"http://127.0.0.1:{port}/v1"
            async with self._compile_lock(spot) as mark:
                if self.head:  # again: one may have gone while this one waited for the lock
                    await self._gather(self.head)
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
            names = ", ".join(map(str, head.missing()))
            sdg.say(f"{self.name} waits for node {names} to join at {head.host}:{head.port}")
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
            sdg.say(f"no compile lock at {marker.parent} ({problem}): servers may compile the same graphs at once")
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
                sdg.say(f"{self.name}: {said} ({seconds:.0f} s)")
            await self._check(process)
            if process.fatal_at and self._loop.time() > process.fatal_at + FATAL_PATIENCE:
                raise Died(process.reason)
            if seconds > self.options.start_timeout:
                raise Died(f"it is not ready after --start-timeout {self.options.start_timeout:g} s: {process.reason}")
            await asyncio.wait([process.exited], timeout=0.3)
        await self._check_model()
        self.ready_once = True
        sdg.say(f"{self.name} is ready after {self._loop.time() - began:.0f} s at {self.upstream.url}")

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

        if self.upstream.limit.load and self.upstream.limit.load.tokens is not None:
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
                served = models_in(await response.read()) if response.status == 200 else None
        if self.program.model and served and self.program.model not in served:
            problem = f"{self.name} does not serve {self.program.model}, but {', '.join(served)}"
            if self.program.lists_model:
                raise sdg.ServerError(f"{problem}: is it another server?")
            sdg.say(f"{problem}, as it says; if it refuses requests, say another --model")

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
        sdg.say(f"starting {settings}{shlex.join(argv)}\nsdg: its log is {log}")
    return Process(program, argv, {**environment, **own}, log)
