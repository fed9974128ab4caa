"""A server that sends exactly the bytes of a test, and the two HTTP clients that must make the same of them.

server = RawServer([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel", Then.RESET])
with pytest.raises(Broken):
    ask(server, "own")
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import uvloop
from multidict import CIMultiDict

from sdg_plugins.servers.http1 import Broken, Http1, Unreached
from sdg_plugins.servers.transport import Answer, Transport

CLIENTS = ["own", "aiohttp"]


class Then(enum.Enum):
    """What a script does beside sending bytes."""

    CLOSE = "close the connection in order"
    RESET = "reset it"
    CUT = "close it without a word of TLS"
    WAIT = "say nothing more"


Script = Sequence[bytes | float | Then]  # numbers are pauses in seconds


class RawServer:
    """Answers each request with the next of its scripts, on whatever connection it comes; keeps what it received.

    Args:
        scripts: one for each request. After the last one, requests are not answered.
        early: a script begins when the head of its request has come, and the body is not read.
        deaf: nothing is read at all.
        host: address to listen on.
        tls: of the server.
    """

    def __init__(
        self,
        *scripts: Script,
        early: bool = False,
        deaf: bool = False,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.scripts, self.early, self.deaf, self.host, self.tls = [*scripts], early, deaf, host, tls
        self.requests: list[bytes] = []
        self.connections = self.done = 0  # connections that came, scripts that were played
        self.lost = asyncio.Event()  # a connection has ended
        self.port = 0
        self._handlers: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * (self.tls is not None)}://{host}:{self.port}/v1"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[RawServer]:
        listening = await asyncio.start_server(self._handle, self.host, self.port, ssl=self.tls)
        self.port = listening.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listening.close()
            for handler in self._handlers:
                handler.cancel()
            await asyncio.gather(*self._handlers, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler
        self._handlers.add(handler)
        self.connections += 1
        with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
            try:
                await self._serve(reader, writer)
            finally:
                self.lost.set()
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.deaf:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(3600)
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            self.requests.append(head + (b"" if self.early else await reader.readexactly(length)))
            for step in self.scripts.pop(0) if self.scripts else [Then.WAIT]:
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                    await asyncio.sleep(0)
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                elif step is Then.WAIT:
                    await reader.read()
                    return
                elif step is Then.CLOSE:
                    return
                elif step is Then.CUT:
                    writer.transport.abort()
                    return
                else:
                    reset(writer)
                    return
            self.done += 1


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection at once, without what has not been sent yet."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def run(
    client: str,
    server: RawServer,
    work: Callable[[Transport], Awaitable[Any]],
    timeout: float = 20.0,
    headers: dict[str, str] | None = None,
    proxies: bool = False,
) -> Any:
    """What `work(transport)` returns, with one of the clients."""

    async def both() -> Any:
        given = CIMultiDict({"Authorization": "Bearer k"})
        given.update(headers or {})
        async with server.serving(), contextlib.AsyncExitStack() as stack:
            own = await stack.enter_async_context(Http1(given, timeout).working()) if client == "own" else None
            transport = Transport(given, timeout, own, lambda url: proxies)
            stack.push_async_callback(transport.aclose)
            return await work(transport)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(both())


def ask(client: str, server: RawServer, body: bytes = b"{}", streamed: bool = False, timeout: float = 20.0) -> Answer:
    """Post once."""
    progressed = (lambda: None) if streamed else None
    work = lambda transport: transport.post(server.url, "/x", body, progressed)  # noqa: E731
    answer = run(client, server, work, timeout)
    assert isinstance(answer, Answer)
    return answer


def outcome(client: str, server: RawServer, **options: Any) -> tuple[int, bytes] | str:
    """Status and body of a response, or the name of the error."""
    try:
        answer = ask(client, server, **options)
    except (Broken, TimeoutError, Unreached) as exc:
        return type(exc).__name__ if str(exc) else "an error without words"
    return answer.status, answer.body
