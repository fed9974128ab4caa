"""HTTP: bytes to a server and back, with failures as types.

Requests go through the lean client of `http1`, and through aiohttp if they need a proxy: its import takes a fifth of a
second of CPU.
Redirects are not followed: a POST that is turned into a GET loses its body, and the key must not reach another origin.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from multidict import CIMultiDict

import sdg
from sdg_plugins.servers.brake import Brake, Turns
from sdg_plugins.servers.http1 import (
    CONNECT_TIMEOUT,
    DEFAULTS,
    Broken,
    Decoder,
    Http1,
    Unreached,
    credentials,
    parsed,
)
from sdg_plugins.servers.origins import IDLE
from sdg_plugins.servers.streaming import Assembly, Take

if TYPE_CHECKING:
    import aiohttp

LARGE = 1 << 20  # bytes of a body that is sent in pieces
STREAM = re.compile(rb"(\xef\xbb\xbf)?((event|id|retry)?:[^\r\n]*[\r\n]+)*data:")  # how a stream begins
SUCCESS = {200, 201, 203}  # statuses of a response: 202 says that there is none yet


class Answer(NamedTuple):
    """An HTTP response, received in full."""

    status: int
    headers: Mapping[str, str]  # names in any case
    body: bytes
    reason: str = ""


class Transport:
    """Sends requests.

    Args:
        headers: of every request.
        timeout: seconds for a whole request; of a stream, between two pieces of it.
        lean: sends what needs no proxy; None to send everything through aiohttp.
        proxies: whether to use those of the environment for an API.

    Attributes:
        brake: bounds the bytes of responses in memory.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        timeout: float,
        lean: Http1 | None = None,
        proxies: Callable[[str], bool] = bool,
    ) -> None:
        self._headers, self.timeout, self._lean, self._proxies = CIMultiDict(DEFAULTS), timeout, lean, proxies
        self._headers.update(headers)
        self.brake = lean.brake if lean else Brake()
        self._proxied: dict[str, str] = {}  # the proxy for an API; "" if there is none
        self._opened: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            import aiohttp

            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # it does not notice what is missing
            )
        return self._opened

    async def aclose(self) -> None:
        """Close all connections but those of the lean client."""
        if self._opened:
            await self._opened.close()

    async def post(self, url: str, path: str, body: bytes, progressed: Callable[[], None] | None = None) -> Answer:
        """Post a body of JSON.

        Args:
            url: of the API.
            path: below it.
            body: JSON.
            progressed: called for each piece of a stream; None if none was asked for.

        Raises:
            Unreached, Broken: there is no answer.
            TimeoutError: none came in time.
        """
        proxy = self._proxy(url)
        if self._lean and not proxy:
            return await self._post_lean(self._lean, address(url, path), body, progressed)
        data = body if len(body) < LARGE else io.BytesIO(body)  # aiohttp sends the second kind in pieces
        limit = {"sock_read": self.timeout} if progressed else {"total": self.timeout}
        try:
            return await self._ask("POST", address(url, path), proxy, limit, data, progressed)
        except TimeoutError as exc:
            raise self._late(progressed) from exc

    async def _ask(
        self,
        method: str,
        url: str,
        proxy: str,
        limit: Mapping[str, float],
        data: bytes | io.BytesIO | None = None,
        progressed: Callable[[], None] | None = None,
    ) -> Answer:
        """Ask through aiohttp. Raises as `post`."""
        import aiohttp

        connecting = min(self.timeout, CONNECT_TIMEOUT)
        silence = aiohttp.ClientTimeout(None, sock_connect=connecting, sock_read=limit.get("sock_read"))
        options: dict[str, Any] = {"timeout": silence}
        options |= {"allow_redirects": False, "proxy": proxy or None}
        try:
            url, own = without_credentials(url)
            options["headers"] = CIMultiDict(self._headers)  # those of a session would be sent to the proxy as well
            options["headers"].update(own)
            async with (
                asyncio.timeout(limit.get("total")) as until,
                self._session.request(method, url, data=data, **options) as response,
            ):
                if response.status < 200:
                    raise Broken(f"the server switched to another protocol: {response.status}")
                body = await self._received(response, Turns(until), Events(progressed) if method == "POST" else None)
                return Answer(response.status, response.headers, body, str(response.reason))
        except aiohttp.ConnectionTimeoutError as exc:
            if self.timeout <= CONNECT_TIMEOUT:
                raise TimeoutError from exc
            raise Unreached(f"no connection within {CONNECT_TIMEOUT:g} s") from exc
        except TimeoutError:
            raise
        except (
            aiohttp.ClientConnectorError,
            aiohttp.ClientHttpProxyError,
            aiohttp.InvalidURL,
            UnicodeError,
        ) as exc:
            way = f"through the proxy {sdg.redact(proxy)}: " if proxy else ""
            raise Unreached(way + (sdg.redact(str(exc)) or type(exc).__name__)) from exc
        except (aiohttp.ClientError, ConnectionError, ValueError) as exc:
            raise Broken(str(exc) or type(exc).__name__) from exc

    async def _received(self, response: aiohttp.ClientResponse, turns: Turns, events: Events | None) -> bytes:
        """The body of a response, or what a stream of events amounts to; its pieces come as the brake allows."""
        decoder, pieces = Decoder(response.headers.get("Content-Encoding", "")), []
        streamed = events is not None and events.wanted(response.status, response.headers)
        self.brake.begin(turns)
        try:
            while await turns.next() and (piece := await response.content.readany()):
                content = decoder.feed(piece)
                if events and streamed:
                    before = events.kept
                    events.piece(content)
                    self.brake.grew(turns, events.kept - before)
                else:
                    pieces.append(content)
                    self.brake.grew(turns, len(content))
        finally:
            self.brake.end(turns)
        decoder.end()
        content = b"".join(pieces)
        return events.body(content) if events else content

    async def _post_lean(self, lean: Http1, url: str, body: bytes, progressed: Callable[[], None] | None) -> Answer:
        events = Events(progressed)
        try:
            status, reason, headers, content = await lean.post(url, body, events, progressed is not None)
        except TimeoutError as exc:
            raise self._late(progressed) from exc
        return Answer(status, headers, events.body(content), reason)

    def _late(self, progressed: Callable[[], None] | None) -> TimeoutError:
        if progressed:
            return TimeoutError(f"no piece of a stream for {self.timeout:g} s")
        return TimeoutError(f"no response within {self.timeout:g} s")

    def _proxy(self, url: str) -> str:
        """The proxy that the environment has for an API that is not on this machine; "" if none. Raises Unreached."""
        if url not in self._proxied:
            self._proxied[url] = proxy_of(url) if self._proxies(url) else ""
        return self._proxied[url]

    async def get(self, url: str, path: str, seconds: float) -> Answer:
        """Get something in some seconds. Raises as `post`."""
        proxy = self._proxy(url)
        try:
            if proxy or not self._lean:
                return await self._ask("GET", address(url, path), proxy, {"total": seconds})
            status, reason, headers, content = await self._lean.get(address(url, path), seconds)
        except TimeoutError as exc:
            raise TimeoutError(f"no response within {seconds:g} s") from exc
        return Answer(status, headers, content, reason)


class Events(Take):
    """Takes a stream of events, whether it was asked for or not."""

    def __init__(self, progressed: Callable[[], None] | None) -> None:
        self._progressed = progressed
        self.assembly: Assembly | None = None
        self._successful = False

    def wanted(self, status: int, headers: Mapping[str, str]) -> bool:
        """See `Take`."""
        self._successful = status in SUCCESS
        self.assembly = Assembly() if self._successful and is_stream(headers) else None
        return self.assembly is not None

    def piece(self, piece: bytes) -> None:
        """See `Take`."""
        assert self.assembly
        if self._progressed:
            self._progressed()
        self.assembly.feed(piece)
        self.kept = self.assembly.size

    def body(self, content: bytes) -> bytes:
        """The whole response, if it did not come in pieces `content`; that may be a stream under another type.

        Raises:
            Broken: the stream ended early.
        """
        if self._successful and not self.assembly and STREAM.match(content):
            found = Assembly()
            found.feed(content)
            self.assembly = found if found.begun else None
        return whole(self.assembly) if self.assembly else content


def is_stream(headers: Mapping[str, str]) -> bool:
    """True if a body is a stream of events."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower() == "text/event-stream"


def whole(assembly: Assembly) -> bytes:
    """The response that a stream of events amounts to. Raises Broken if the stream ended early."""
    assembly.feed(b"\n\n")  # the last event may lack its end
    if not assembly.complete:
        why = "without a finish_reason for each completion" if assembly.done else "before the completion did"
        raise Broken(f"the stream ended {why}")
    return assembly.body()


def proxy_of(url: str) -> str:
    """The proxy that the environment has for a URL, by the rules of `urllib`; "" if none. Raises Unreached."""
    import urllib.request

    parts, host, _ = parsed(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(host):
        return ""
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        name = f"{parts.scheme.upper()}_PROXY"
        raise Unreached(f"{name} is {sdg.redact(proxy)}: only HTTP proxies are supported; set it to an http:// URL")
    return proxy


def without_credentials(url: str) -> tuple[str, dict[str, str]]:
    """A URL without its user and password, and the header that they amount to. Raises Unreached."""
    parts, *_ = parsed(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), credentials(parts)


def address(url: str, path: str) -> str:
    """The URL of a path below an API's URL, which may carry a query: `…/v1?api-version=1` keeps it.

    A path that begins with `/../` stands beside the API: vLLM has `/classify` there.
    """
    if path.startswith("/../"):
        return address(root_of(url), path[3:])
    if "?" not in url:
        return url + path
    base, _, query = url.partition("?")
    return f"{base.rstrip('/')}{path}?{query}"


def root_of(url: str) -> str:
    """A server's root, for pages beside its API such as /metrics."""
    base, mark, query = url.partition("?")
    return base.rstrip("/").removesuffix("/v1") + mark + query


def redirected(answer: Answer) -> str:
    """Where an answer redirects to; "" if it does not."""
    return sdg.redact(answer.headers.get("Location", "")) if 300 <= answer.status < 400 else ""
