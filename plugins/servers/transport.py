"""HTTP: bytes to a server and back, with failures as types.

The only place that knows the HTTP library. Redirects are not followed: a POST that is turned into a GET loses its
body, and the key must not reach another origin.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import sdg
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


class Unreached(Exception):
    """There is no connection: the request cannot have had an effect."""


class Broken(Exception):
    """The connection broke before the response was complete."""


class Transport:
    """Sends requests through a session.

    Args:
        session: with the headers of every request.
        timeout: seconds for a whole request; of a stream, between two pieces of it.
    """

    def __init__(self, session: aiohttp.ClientSession, timeout: float) -> None:
        self._session, self.timeout = session, timeout

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
        import aiohttp

        data = body if len(body) < LARGE else io.BytesIO(body)  # aiohttp sends the second kind in pieces
        limit = aiohttp.ClientTimeout(**({"sock_read": self.timeout} if progressed else {"total": self.timeout}))
        try:
            async with self._session.post(
                address(url, path), data=data, allow_redirects=False, timeout=limit
            ) as response:
                if response.status == 200 and response.content_type == "text/event-stream":
                    content = await assembled(response.content, progressed)
                else:
                    content = await response.read()
                return Answer(response.status, response.headers, content, str(response.reason))
        except TimeoutError as exc:
            what = "of a stream for" if progressed else "within"
            raise TimeoutError(f"no {'piece' if progressed else 'response'} {what} {self.timeout:g} s") from exc
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as exc:
            raise Unreached(str(exc)) from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise Broken(str(exc) or type(exc).__name__) from exc

    async def get(self, url: str, path: str, seconds: float) -> Answer:
        """Get something in some seconds. Raises as `post`."""
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


async def assembled(content: aiohttp.StreamReader, progressed: Callable[[], None] | None) -> bytes:
    """The response that a stream of events amounts to. Raises Broken if the stream ends early."""
    assembly = Assembly()
    async for piece in content.iter_any():
        if progressed:
            progressed()
        assembly.feed(piece)
    if not assembly.complete:
        raise Broken("the stream ended before the completion did")
    return assembly.body()


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
