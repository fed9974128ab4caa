"""A lean HTTP/1.1 client for the requests of a run: bytes in; status, headers and body out.

One `asyncio.Protocol` for each connection, over the parser of httptools; one watchdog for all time-outs instead of a
timer for each request. It does what a run needs and no more: POST and GET, keep-alive, TLS, chunked and compressed
responses, streams. Proxies are left to aiohttp; see `Transport`. Protocol: RFC 9110 and 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

import httptools
from multidict import CIMultiDict

import sdg
from sdg_plugins.servers.brake import Brake

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT = 30.0  # s for a connection, with TLS
IDLE = 4.0  # s after which an idle connection is not used again: vLLM closes them after 5 s
NAMES_KEPT = 10.0  # s for which the addresses of a host are remembered
TICK = 0.25  # s between two looks at the time-outs
ENCODINGS = {"gzip", "x-gzip", "deflate"}  # those that are asked for


class Unreached(Exception):
    """There is no connection: the request cannot have had an effect."""


class Broken(Exception):
    """The connection broke before the response was complete."""


class Received(NamedTuple):
    """A response: the body is empty if it was given to `take` in pieces."""

    status: int
    reason: str
    headers: Mapping[str, str]  # names in any case
    body: bytes


class Take:
    """Where a streamed body goes: `wanted(status, headers)` decides, `piece(bytes)` takes each piece.

    Attributes:
        kept: bytes that it keeps of the pieces.
    """

    kept = 0

    def wanted(self, status: int, headers: Mapping[str, str]) -> bool:
        """True if the body of this response is to be given in pieces."""
        raise NotImplementedError

    def piece(self, piece: bytes) -> None:
        """Take in a piece of the body. What it raises fails the request."""
        raise NotImplementedError


class Connection(asyncio.Protocol):
    """One connection: one request at a time.

    Attributes:
        usable: another request may be sent, once this one is answered.
        idle_since: loop time of its last response.
        deadline: loop time at which the request in flight has failed; a pause does not count.
        patience: seconds without a piece of a streamed response after which it has; 0 for any other request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, brake: Brake) -> None:
        self._loop, self._brake = loop, brake
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Received] | None = None
        self._take: Take | None = None
        self.usable = True
        self.idle_since = self.deadline = self.patience = 0.0
        self.paused_at: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._reason, self._headers, self._body = b"", [], []  # type: tuple[bytes, list[tuple[str, str]], list[bytes]]
        self._known: CIMultiDict[str] | None = None
        self._inflate: Any = None
        self._streaming = self._complete = self._framed = False

    def send(self, head: bytes, body: bytes, deadline: float, take: Take | None, patience: float) -> Any:
        """Send a request; returns the future of its response.

        The future raises Broken, TimeoutError, or what `take` raised.
        """
        assert self._transport
        self._begin()
        self._take, self.deadline, self.patience = take, deadline, patience
        self._waiter = self._loop.create_future()
        self._transport.writelines([head, body])
        return self._waiter

    def close(self) -> None:
        """Close the connection at once, whatever is in flight."""
        self.usable = False
        self._waiter = None
        if self._transport:
            self._transport.abort()

    def fail(self, exc: Exception) -> None:
        """End the request in flight, and close the connection."""
        waiter = self._waiter
        self.close()
        if waiter and not waiter.done():
            waiter.set_exception(exc)

    def pause(self) -> None:
        """See `Receiving`."""
        if self.paused_at is None and self._transport and not self._transport.is_closing():
            self.paused_at = self._loop.time()
            self._transport.pause_reading()

    def resume(self) -> None:
        """See `Receiving`."""
        if self.paused_at is not None and self._transport:
            self.deadline += self._loop.time() - self.paused_at
            self.paused_at = None
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._waiter is None:  # nothing was asked
            self.close()
            return
        if self.patience:
            self.deadline = self._loop.time() + self.patience
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not self._complete:
                self.fail(problem_of(exc))
                return
            self.usable = False
        if self._complete:
            self._respond()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.usable = False
        if self._waiter is None or self._waiter.done():
            return
        if exc is None and self._known is not None and not self._framed:  # its body ends with the connection
            self._respond()
        else:
            self.fail(Broken(f"the server closed the connection{f': {exc}' if exc else ''}"))

    # Callbacks of httptools. Those of interim responses (1xx) are followed by those of the final one.

    def on_message_begin(self) -> None:
        """A response begins."""
        if self._complete:
            raise Broken("more came than one response")
        self._begin()

    def on_status(self, status: bytes) -> None:
        """The reason phrase, or a piece of it."""
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        """The body begins."""
        headers = self._known = CIMultiDict(self._headers)
        status = self._parser.get_status_code()
        self._framed = "Content-Length" in headers or "Transfer-Encoding" in headers or status in {204, 304}
        if headers.get("Content-Encoding", "").strip().lower() in ENCODINGS:
            self._inflate = zlib.decompressobj(wbits=47)  # gzip or zlib
        self._streaming = bool(self._take and self._take.wanted(status, headers))

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._inflate:
            piece = self._inflate.decompress(piece)
        if self._streaming:
            assert self._take
            before = self._take.kept
            self._take.piece(piece)
            self._brake.grew(self, self._take.kept - before)
        else:
            self._body.append(piece)
            self._brake.grew(self, len(piece))

    def on_message_complete(self) -> None:
        """The response is complete, unless it is an interim one."""
        self._complete = self._parser.get_status_code() >= 200
        if not self._complete:
            self._known = None
        self.usable = self.usable and (self._parser.should_keep_alive() or not self._complete)

    def _respond(self) -> None:
        waiter, self._waiter, self._take = self._waiter, None, None
        self.usable = self.usable and self._complete
        self.idle_since = self._loop.time()
        if not self.usable:
            self.close()
        if waiter is None or waiter.done():
            return
        if self._inflate and not self._inflate.eof and (self._body or self._streaming):
            waiter.set_exception(Broken("the compressed response is incomplete"))
            return
        assert self._known is not None
        pieces, self._body = self._body, []  # an idle connection must not hold them
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        waiter.set_result(Received(self._parser.get_status_code(), self._reason.decode("latin-1"), self._known, body))


def problem_of(exc: httptools.HttpParserError) -> Exception:
    """What is raised for a response that cannot be parsed: the parser wraps the exceptions of its callbacks."""
    cause = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
    if isinstance(cause, Exception) and not isinstance(cause, zlib.error):
        return cause
    return Broken(f"the response is not HTTP: {cause or exc}")


class Origin:
    """A scheme, host and port, its idle connections, and its addresses."""

    def __init__(self, secure: bool, host: str, port: int) -> None:
        self.secure, self.host, self.port = secure, host, port
        self.idle: deque[Connection] = deque()  # the last one used is on the right
        self.addresses: list[Any] = []
        self.resolved_at = -NAMES_KEPT

    def ready(self, now: float) -> Connection | None:
        """An idle connection that may be used; older ones are closed."""
        while self.idle:
            connection = self.idle.pop()
            if connection.usable and now - connection.idle_since < IDLE:
                return connection
            connection.close()
        return None


class Http1:
    """Connections to any number of origins. Enter it to start its watchdog; leaving closes all connections.

    Args:
        headers: of every request, beside Host and Content-Length.
        timeout: seconds for a whole request; of a stream, between two pieces of it.
        brake: bounds the bytes of responses in memory.
    """

    def __init__(self, headers: Mapping[str, str], timeout: float, brake: Brake | None = None) -> None:
        self._loop, self.brake = asyncio.get_running_loop(), brake or Brake()
        defaults = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": f"sdg/{sdg.__version__}"}
        lines = [f"{name}: {value}" for name, value in {**defaults, **headers}.items()]
        self._headers, self.timeout = "\r\n".join(lines), timeout
        self._origins: dict[tuple[bool, str, int], Origin] = {}
        self._heads: dict[str, tuple[Origin, bytes]] = {}  # of URLs, what follows the method
        self._busy: dict[Connection, None] = {}  # in the order in which their requests were sent
        self._secure: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[Http1]:
        """Look at the time-outs meanwhile; close all connections at the end."""
        watchdog = asyncio.create_task(self._watch())
        try:
            yield self
        finally:
            watchdog.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watchdog
            for origin in self._origins.values():
                for connection in origin.idle:
                    connection.close()
            for connection in [*self._busy]:
                connection.fail(Broken("the client was closed"))

    async def post(self, url: str, body: bytes, take: Take | None = None, streamed: bool = False) -> Received:
        """Post a body.

        Args:
            url: absolute.
            body: as it is sent.
            take: takes the body of the response in pieces.
            streamed: a stream was asked for: the time-out is that between two pieces.

        Raises:
            ValueError: the URL is invalid.
            Unreached, Broken: there is no response.
            TimeoutError: none came in time.
        """
        origin, head = self._heads.get(url) or self._parse(url)
        now = self._loop.time()
        connection = origin.ready(now) or await self._connect(origin, now)
        head = b"POST %b\r\nContent-Length: %d\r\n\r\n" % (head, len(body))
        return await self._exchange(origin, connection, head, body, now, take, self.timeout * streamed)

    async def get(self, url: str, seconds: float) -> Received:
        """Get something in some seconds. Raises as `post`."""
        origin, head = self._heads.get(url) or self._parse(url)
        head = b"GET %b\r\n\r\n" % head
        async with asyncio.timeout(seconds):
            now = self._loop.time()
            if kept := origin.ready(now):
                with contextlib.suppress(Broken):  # the server has closed it: nothing is lost but the attempt
                    return await self._exchange(origin, kept, head, b"", now)
            connection = await self._connect(origin, now)
            return await self._exchange(origin, connection, head, b"", now)

    async def _exchange(
        self,
        origin: Origin,
        connection: Connection,
        head: bytes,
        body: bytes,
        now: float,
        take: Take | None = None,
        patience: float = 0.0,
    ) -> Received:
        self._busy[connection] = None
        self.brake.begin(connection)
        try:
            received: Received = await connection.send(head, body, now + self.timeout, take, patience)
        except asyncio.CancelledError:
            connection.close()
            raise
        finally:
            del self._busy[connection]
            self.brake.end(connection)
        if connection.usable:
            origin.idle.append(connection)
        return received

    def _parse(self, url: str) -> tuple[Origin, bytes]:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"{url} is not a URL of HTTP")
        port = parts.port or (443 if secure else 80)
        host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        key = (secure, host, port)
        origin = self._origins.setdefault(key, Origin(*key))
        name = f"[{host}]" if ":" in host else host
        where = name if port == (443 if secure else 80) else f"{name}:{port}"
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{parts.query}" if parts.query else "")
        head = f"{path} HTTP/1.1\r\nHost: {where}\r\n{self._headers}"
        self._heads[url] = known = (origin, head.encode("latin-1"))
        return known

    async def _connect(self, origin: Origin, now: float) -> Connection:
        """A new connection. Raises Unreached or, if the request's own time is over, TimeoutError."""
        where = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(min(self.timeout, CONNECT_TIMEOUT)):
                return await self._connect_to_any(origin, await self._resolve(origin, now))
        except TimeoutError as exc:
            if self.timeout <= CONNECT_TIMEOUT:
                raise
            raise Unreached(f"no connection to {where} within {CONNECT_TIMEOUT:g} s") from exc
        except OSError as exc:
            raise Unreached(f"cannot connect to {where}: {exc.strerror or exc}") from exc

    async def _connect_to_any(self, origin: Origin, addresses: list[Any]) -> Connection:
        """A connection to the first address that accepts one. Raises OSError of the last one."""
        if origin.secure and self._secure is None:
            import ssl

            self._secure = await asyncio.to_thread(ssl.create_default_context)
        secure: dict[str, Any] = {"ssl": self._secure, "server_hostname": origin.host} if origin.secure else {}
        problem = OSError("it has no address")
        for address in addresses:
            try:
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self._loop, self.brake), address[0], address[1], **secure
                )
                return connection
            except TimeoutError:
                raise
            except OSError as exc:
                problem = exc
        raise problem

    async def _resolve(self, origin: Origin, now: float) -> list[Any]:
        """The addresses of a host; each connection begins with another one. Raises OSError."""
        if now - origin.resolved_at > NAMES_KEPT:
            found = await self._loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
            origin.addresses, origin.resolved_at = [address for *_, address in found], now
        first, *others = origin.addresses
        origin.addresses = [*others, first]
        return [first, *others]

    async def _watch(self) -> None:
        """Fail the requests whose time is over. They were sent in order, and so they time out, but for pauses."""
        while True:
            await asyncio.sleep(min(TICK, self.timeout / 10))
            now, late = self._loop.time(), []
            for connection in self._busy:
                if connection.paused_at is not None:
                    continue
                if connection.deadline <= now:
                    late.append(connection)
                elif not connection.patience:
                    break
            for connection in late:
                connection.fail(TimeoutError())
