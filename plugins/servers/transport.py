"""HTTP: bytes to a server and back, with failures as types.

Requests go through the lean client of `http1`, and through aiohttp if they need a proxy: its import takes a fifth of a
second of CPU.
Redirects are not followed: a POST that is turned into a GET loses its body, and the key must not reach another origin.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import sdg
from sdg_plugins.servers.brake import Brake, Turns
from sdg_plugins.servers.http1 import IDLE, Broken, Http1, Take, Unreached
from sdg_plugins.servers.streaming import Assembly

if TYPE_CHECKING:
    import aiohttp

LARGE = 1 << 20  # bytes of a body that is sent in pieces


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
        proxies: use those of the environment.

    Attributes:
        brake: bounds the bytes of responses in memory.
    """

    def __init__(
        self, headers: Mapping[str, str], timeout: float, lean: Http1 | None = None, proxies: bool = True
    ) -> None:
        self._headers, self.timeout, self._lean, self._proxies = headers, timeout, lean, proxies
        self.brake = lean.brake if lean else Brake()
        self._proxied: dict[str, bool] = {}  # whether a proxy is set for an API
        self._opened: aiohttp.ClientSession | None = None

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            import aiohttp

            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE),
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._proxies,
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
        if self._lean and not self._needs_proxy(url):
            return await self._post_lean(self._lean, address(url, path), body, progressed)
        import aiohttp

        data = body if len(body) < LARGE else io.BytesIO(body)  # aiohttp sends the second kind in pieces
        limit = aiohttp.ClientTimeout(total=None, sock_read=self.timeout if progressed else None)
        try:
            async with (
                asyncio.timeout(None if progressed else self.timeout) as until,
                self._session.post(address(url, path), data=data, allow_redirects=False, timeout=limit) as response,
            ):
                events = response.status == 200 and response.content_type == "text/event-stream"
                content = await self._received(response, Turns(until), Events(progressed) if events else None)
                return Answer(response.status, response.headers, content, str(response.reason))
        except TimeoutError as exc:
            raise self._late(progressed) from exc
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as exc:
            raise Unreached(str(exc)) from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise Broken(str(exc) or type(exc).__name__) from exc

    async def _received(self, response: aiohttp.ClientResponse, turns: Turns, events: Events | None) -> bytes:
        """The body of a response, or what a stream of events amounts to, received as the brake allows."""
        pieces = []
        self.brake.begin(turns)
        try:
            while await turns.next() and (piece := await response.content.readany()):
                if events:
                    before = events.kept
                    events.piece(piece)
                    self.brake.grew(turns, events.kept - before)
                else:
                    pieces.append(piece)
                    self.brake.grew(turns, len(piece))
        finally:
            self.brake.end(turns)
        return events.body() if events else b"".join(pieces)

    async def _post_lean(self, lean: Http1, url: str, body: bytes, progressed: Callable[[], None] | None) -> Answer:
        events = Events(progressed)
        try:
            status, reason, headers, content = await lean.post(url, body, events, progressed is not None)
        except TimeoutError as exc:
            raise self._late(progressed) from exc
        except ValueError as exc:
            raise Unreached(str(exc)) from exc
        return Answer(status, headers, events.body() if events.assembly else content, reason)

    def _late(self, progressed: Callable[[], None] | None) -> TimeoutError:
        if progressed:
            return TimeoutError(f"no piece of a stream for {self.timeout:g} s")
        return TimeoutError(f"no response within {self.timeout:g} s")

    def _needs_proxy(self, url: str) -> bool:
        """True if the environment has a proxy for an API that is not on this machine."""
        if url not in self._proxied:
            self._proxied[url] = self._proxies and proxy_is_set(url)
        return self._proxied[url]

    async def get(self, url: str, path: str, seconds: float) -> Answer:
        """Get something in some seconds. Raises as `post`."""
        if self._lean and not self._needs_proxy(url):
            try:
                status, reason, headers, content = await self._lean.get(address(url, path), seconds)
            except TimeoutError as exc:
                raise TimeoutError(f"no response within {seconds:g} s") from exc
            except ValueError as exc:
                raise Unreached(str(exc)) from exc
            return Answer(status, headers, content, reason)
        import aiohttp

        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(address(url, path), timeout=limit, allow_redirects=False) as response:
                return Answer(response.status, response.headers, await response.read(), str(response.reason))
        except TimeoutError as exc:
            raise TimeoutError(f"no response within {seconds:g} s") from exc
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as exc:
            raise Unreached(str(exc) or type(exc).__name__) from exc
        except (aiohttp.ClientError, ConnectionError, ValueError) as exc:
            raise Broken(str(exc) or type(exc).__name__) from exc


class Events(Take):
    """Takes a stream of events, whether it was asked for or not."""

    def __init__(self, progressed: Callable[[], None] | None) -> None:
        self._progressed = progressed
        self.assembly: Assembly | None = Assembly()

    def wanted(self, status: int, headers: Mapping[str, str]) -> bool:
        """See `Take`."""
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        self.assembly = Assembly() if status == 200 and kind == "text/event-stream" else None
        return self.assembly is not None

    def piece(self, piece: bytes) -> None:
        """See `Take`."""
        assert self.assembly
        if self._progressed:
            self._progressed()
        self.assembly.feed(piece)
        self.kept = self.assembly.size

    def body(self) -> bytes:
        """The whole response. Raises Broken if the stream ended early."""
        assert self.assembly
        if not self.assembly.complete:
            raise Broken("the stream ended before the completion did")
        return self.assembly.body()


def proxy_is_set(url: str) -> bool:
    """True if the environment has a proxy for a URL, by the rules of `urllib`, which aiohttp follows."""
    import urllib.request

    try:
        parts = urlsplit(url)
    except ValueError:  # it is not a URL, as the request will say
        return False
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")


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
