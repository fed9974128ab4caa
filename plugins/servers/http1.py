"""A lean HTTP/1.1 client for the requests of a run: bytes in; status, headers and body out.

One `asyncio.Protocol` for each connection, over the parser of httptools; one watchdog for all time-outs instead of a
timer for each request. It does what a run needs and no more: POST and GET, keep-alive, TLS, chunked and compressed
responses, streams. Proxies are left to aiohttp; see `Transport`. Protocol: RFC 9110 and 9112.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import functools
import select
import socket
import sys
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

import httptools
from multidict import CIMultiDict

import sdg
from sdg_plugins.common.processes import PORTS
from sdg_plugins.servers.brake import Brake, Pausable
from sdg_plugins.servers.origins import Origin
from sdg_plugins.servers.streaming import Take

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT = 30.0  # s for a connection, with TLS
OTHER_ADDRESS = 5.0  # s for an address of a host that has others
TICK = 0.25  # s between two looks at the time-outs
NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: `connect` chooses the port
OWN = 251  # last part of the further loopback addresses of a process that shares its work with no other
CLOSED = "the server closed the connection"
MOST_HEAD = 1 << 18  # bytes of headers, those of interim responses included
MOST = 1 << 30  # bytes of a response, as sent and as decompressed
ENCODINGS = {"gzip", "x-gzip", "deflate"}  # those that are asked for
SAFE = "/%:@!$&'()*+,;=~-._?"  # characters of a URL that need no quoting
DEFAULTS = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": f"sdg/{sdg.__version__}"}


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


class Decoder:
    """Decompresses a body piece by piece, if its Content-Encoding is one of those that are asked for."""

    def __init__(self, encoding: str) -> None:
        self._encoding, self._size = encoding.strip().lower(), 0
        self._inflate: Any = None

    def feed(self, piece: bytes) -> bytes:
        """What a piece holds. Raises Broken."""
        if self._encoding not in ENCODINGS:
            return piece
        pieces = []
        while piece:
            if self._inflate is None or self._inflate.eof:  # the first member of a gzip file, or another one
                bare = self._encoding == "deflate" and piece[0] & 15 != 8  # without the header of zlib
                self._inflate = zlib.decompressobj(wbits=-15 if bare else 47)
            try:
                pieces.append(self._inflate.decompress(piece, MOST))
            except zlib.error as exc:
                raise Broken(f"the compressed response is invalid: {exc}") from exc
            self._size += len(pieces[-1])
            if self._inflate.unconsumed_tail or self._size > MOST:
                raise Broken(f"the response has more than {MOST >> 20} MiB")
            piece = self._inflate.unused_data
        return b"".join(pieces)

    def end(self) -> None:
        """Raise Broken if something is missing."""
        if self._inflate and not self._inflate.eof:
            raise Broken("the compressed response is incomplete")


class Connection(Pausable, asyncio.Protocol):
    """One connection: one request at a time.

    Attributes:
        usable: another request may be sent, once this one is answered.
        idle_since: loop time of its last response.
        patience: seconds without a piece of a streamed response after which it has; 0 for any other request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, brake: Brake) -> None:
        self._loop, self._brake = loop, brake
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Received] | None = None
        self._take: Take | None = None
        self.usable = True
        self._received, self._ended = 0, False
        self.idle_since = self.patience = 0.0
        self._begin()

    def _begin(self) -> None:
        self._reason, self._headers, self._body = b"", [], []  # type: tuple[bytes, list[tuple[str, str]], list[bytes]]
        self._known: CIMultiDict[str] | None = None
        self._decoder: Decoder | None = None
        self._streaming = self._complete = self._framed = False

    def send(self, head: bytes, body: bytes, deadline: float, take: Take | None, patience: float) -> Any:
        """Send a request; returns the future of its response.

        The future raises Broken, TimeoutError, or what `take` raised.
        """
        assert self._transport
        if not self.usable:  # it has ended since it was made
            raise Broken(CLOSED)
        self._begin()
        self._take, self.deadline, self.patience, self._received = take, deadline, patience, 0
        self._waiter = self._loop.create_future()
        self._transport.write(head + body)
        return self._waiter

    def close(self) -> None:
        """Close the connection at once, whatever is in flight."""
        self.usable = False
        self._waiter = None
        if self._transport:
            self._transport.abort()

    def disturbed(self) -> bool:
        """True if the server has closed an idle connection or sent something, which the loop has not seen yet."""
        assert self._transport
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def fail(self, exc: Exception) -> None:
        """End the request in flight, and close the connection."""
        waiter = self._waiter
        self.close()
        if waiter and not waiter.done():
            waiter.set_exception(exc)

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
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self._complete:
                self.fail(problem_of(exc))
                return
            self.usable = False
        if self._complete:
            self._respond()
            return
        self._received += len(data)
        if self._received > (MOST_HEAD if self._known is None else MOST):
            self.fail(Broken(f"the response has more than {self._received >> 10:,} KiB"))

    def eof_received(self) -> None:
        """See `asyncio.Protocol`. With TLS it is called only if the server said so, and nothing was cut off."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.usable = False
        if self._waiter is None or self._waiter.done():
            return
        whole = self._ended and exc is None and self._known is not None
        if whole and not self._framed:  # its body ends with the connection
            self._respond()
        else:
            self.fail(Broken(f"{CLOSED}{f': {exc}' if exc else ''}"))

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
        if encoding := headers.get("Content-Encoding"):
            self._decoder = Decoder(encoding)
        self._streaming = bool(self._take and self._take.wanted(status, headers))

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._decoder:
            piece = self._decoder.feed(piece)
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
        assert self._known is not None
        assert self._transport
        if self._decoder:
            try:
                self._decoder.end()
            except Broken as exc:
                self.fail(exc)
                return
        waiter, self._waiter, self._take = self._waiter, None, None
        self.idle_since = self._loop.time()
        if not (self.usable and self._complete) or self._transport.get_write_buffer_size():  # the request was not read
            self.close()
        if waiter is None or waiter.done():
            return
        pieces, self._body = self._body, []  # an idle connection must not hold them
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        waiter.set_result(Received(self._parser.get_status_code(), self._reason.decode("latin-1"), self._known, body))


def problem_of(exc: Exception) -> Exception:
    """What is raised for a response that cannot be parsed: the parser wraps the exceptions of its callbacks."""
    if isinstance(exc, httptools.HttpParserUpgrade):
        return Broken("the server switched to another protocol")
    cause = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
    return cause if isinstance(cause, Exception) else Broken(f"the response is not HTTP: {exc}")


class Http1:
    """Connections to any number of origins. Enter it to start its watchdog; leaving closes all connections.

    Args:
        headers: of every request, beside Host and Content-Length.
        timeout: seconds for a whole request; of a stream, between two pieces of it.
        source: loopback address that the first connections to this machine come from; "" for the usual one.

    Attributes:
        brake: bounds the bytes of responses in memory.
    """

    def __init__(self, headers: Mapping[str, str], timeout: float, source: str = "") -> None:
        self._loop, self.brake = asyncio.get_running_loop(), Brake()
        self._headers, self.timeout, self._source = CIMultiDict(DEFAULTS), timeout, source
        self._headers.update(headers)
        self._origins: dict[tuple[bool, str, int], Origin[Connection]] = {}
        self._heads: dict[str, tuple[Origin[Connection], bytes]] = {}  # of URLs, what follows the method
        self._busy: dict[Connection, None] = {}  # in the order in which their requests were sent
        self._secure: asyncio.Future[ssl.SSLContext] | None = None

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
                origin.clear()
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
            Unreached: there is no connection, nor could there be one if the URL is invalid.
            Broken: there is no response.
            TimeoutError: none came in time.
        """
        origin, head = self._heads.get(url) or self._parse(url)
        now = self._loop.time()
        connection = origin.ready(now) or await self._connect_in_turn(origin)
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
            async with self._connecting(origin):
                connection = await self._connect_to_any(origin)
            return await self._exchange(origin, connection, head, b"", now)

    async def _exchange(
        self,
        origin: Origin[Connection],
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

    def _parse(self, url: str) -> tuple[Origin[Connection], bytes]:
        parts, host, port = parsed(url)
        secure = parts.scheme == "https"
        key = (secure, host, port)
        origin = self._origins.setdefault(key, Origin(*key))
        name = f"[{host}]" if ":" in host else host
        where = name if port == (443 if secure else 80) else f"{name}:{port}"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = CIMultiDict({"Host": where})
        headers.update(self._headers)
        headers.update(credentials(parts))
        lines = [f"{quote(target, safe=SAFE)} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._heads[url] = known = (origin, "\r\n".join(lines).encode("latin-1"))
        return known

    async def _connect_in_turn(self, origin: Origin[Connection]) -> Connection:
        """A new connection, or one that has become idle meanwhile: thousands of requests may begin at once."""
        async with self._connecting(origin), origin.connecting:
            return origin.ready(self._loop.time()) or await self._connect_to_any(origin)

    @contextlib.asynccontextmanager
    async def _connecting(self, origin: Origin[Connection]) -> AsyncIterator[None]:
        """Raises Unreached if there is no connection or, if the request's own time is over, TimeoutError."""
        where = f"{origin.host}:{origin.port}"
        try:
            async with asyncio.timeout(min(self.timeout, CONNECT_TIMEOUT)) as limit:
                yield
        except (OSError, UnicodeError) as exc:  # such as a TimeoutError, and a name that no host can have
            if limit.expired() and self.timeout <= CONNECT_TIMEOUT:
                raise TimeoutError from exc
            if limit.expired():
                raise Unreached(f"no connection to {where} within {CONNECT_TIMEOUT:g} s") from exc
            raise Unreached(f"cannot connect to {where}: {getattr(exc, 'strerror', '') or exc}") from exc

    async def _connect_to_any(self, origin: Origin[Connection]) -> Connection:
        """A connection to the first address that accepts one. Raises OSError of the last one."""
        secure: dict[str, Any] = {"ssl": await self._tls(), "server_hostname": origin.host} if origin.secure else {}
        *others, last = await origin.addresses()
        for address in others:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(OTHER_ADDRESS):
                    return await self._connect_to(origin, address, secure)
            origin.avoid(address)
        return await self._connect_to(origin, last, secure)

    async def _connect_to(self, origin: Origin[Connection], address: str, secure: Mapping[str, Any]) -> Connection:
        source = self._source_for(address)

        async def connect() -> Connection:
            make = functools.partial(Connection, self._loop, self.brake)
            if source is None:
                _, made = await self._loop.create_connection(make, address, origin.port, **secure)
            else:
                own = await self._connected(source, (address, origin.port))
                _, made = await self._loop.create_connection(make, sock=own, **secure)
            return made

        try:
            return await connect()
        except OSError as exc:
            if exc.errno == errno.EADDRNOTAVAIL and source:  # a machine on which only 127.0.0.1 is its own
                source = None
            elif exc.errno not in {errno.EMFILE, errno.ENFILE} or not sum(
                each.clear() for each in self._origins.values()
            ):
                raise
        await asyncio.sleep(0)  # the connections that were idle, with other servers, are closed by then
        return await connect()

    def _source_for(self, address: str) -> str | None:
        """Where a connection to an address comes from, if not from the usual address: each has ports of its own."""
        turn = len(self._busy) // PORTS
        if sys.platform != "linux" or not address.startswith("127.") or not (turn or self._source):
            return None
        return f"127.0.{1 + turn % 250}.{self._source.rpartition('.')[2] or OWN}"

    async def _connected(self, source: str, target: tuple[str, int]) -> socket.socket:
        """A connected socket. Ports taken by `bind` would be missing elsewhere until a minute after their last use."""
        made = socket.socket(proto=socket.IPPROTO_TCP)  # by which asyncio knows that it is TCP
        try:
            made.setblocking(False)
            with contextlib.suppress(OSError):
                made.setsockopt(socket.IPPROTO_IP, NO_PORT, 1)
            made.bind((source, 0))
            await self._loop.sock_connect(made, target)
        except BaseException:
            made.close()
            raise
        return made

    async def _tls(self) -> ssl.SSLContext:
        """What TLS needs: made once, which takes some hundredths of a second of CPU."""
        if self._secure is None:
            import ssl

            self._secure = asyncio.ensure_future(asyncio.to_thread(ssl.create_default_context))
        return await asyncio.shield(self._secure)

    async def _watch(self) -> None:
        """Fail the requests whose time is over, and close idle connections.

        Requests were sent in order, and so they time out, but for streams, pauses, and the time that connecting took.
        """
        disorder = min(self.timeout, CONNECT_TIMEOUT)
        while True:
            await asyncio.sleep(min(TICK, self.timeout / 10))
            now, late = self._loop.time(), []
            for connection in self._busy:
                if connection.deadline <= now:
                    late += [connection] if connection.paused_at is None else []
                elif not connection.patience and connection.deadline - disorder > now:
                    break
            for connection in late:
                connection.fail(TimeoutError())
            for origin in self._origins.values():
                origin.tidy(now)


def parsed(url: str) -> tuple[SplitResult, str, int]:
    """A URL, its host and port. Raises Unreached."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("it must begin with http:// or https:// and a host")
        host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
        return parts, host, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as exc:
        raise Unreached(f"{sdg.redact(url)} is not a URL of a server: {exc}") from exc


def credentials(parts: SplitResult) -> dict[str, str]:
    """The header that a URL's user and password amount to; it takes precedence over an API key."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
