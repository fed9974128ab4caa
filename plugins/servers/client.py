"""The client: sends each request to a server of the pool until it is answered or given up."""

from __future__ import annotations

import asyncio
import io
import random
from typing import TYPE_CHECKING

import orjson

import sdg
from sdg_plugins.servers.responses import (
    error_text,
    parse_reply,
    quota_pause,
    retry_after,
    shown,
    tokens_in,
    without_key,
)

if TYPE_CHECKING:
    import aiohttp

    from sdg_plugins.servers.pool import Pool, Suspicion

STORM_PATIENCE = 10  # × --max-retries: 429 and 503 responses that one request accepts while others succeed
LONGEST_PAUSE = 60.0  # s: the longest pause between two attempts, unless the server asks for more
LARGE = 1 << 20  # bytes of a body that is sent in pieces


class Client:
    """Sends requests to the servers of a pool. `run.stop(error)` is called when the run cannot go on."""

    def __init__(self, session: aiohttp.ClientSession, pool: Pool, run: sdg.Run) -> None:
        self.session, self.pool, self.counts, self._stop = session, pool, run.counts, run.stop
        self.max_retries: int = run.options.max_retries
        self.timeout: float = run.options.request_timeout
        self.key_name: str = run.options.api_key_env
        self._time = asyncio.get_running_loop().time

    @staticmethod
    def parse(body: bytes) -> sdg.Reply:
        """The reply in a stored response."""
        return parse_reply(orjson.loads(body))

    async def send(self, request: sdg.Request) -> sdg.Response:
        """Send one request.

        Raises:
            RequestFailed: it was refused, or no attempt is left.
        """
        attempts = spent = storms = 0
        successes = self.pool.successes
        suspicion: Suspicion | None = None
        while True:
            upstream = await self.pool.acquire(suspicion)
            if suspicion and upstream is not suspicion.upstream:
                suspicion = None
            crashes = upstream.crashes
            try:
                response = await self._attempt(upstream, request)
                upstream.quarantine.cleared += suspicion is not None
                return response
            except sdg.RequestFailed as exc:
                failure, together = exc, upstream.quarantine.together
                doubtful = failure.breaks_off and upstream.examine is not None
                upstream.quarantine.doubts += doubtful
            finally:
                self.pool.release(upstream)
            died = doubtful and await self.pool.examine(upstream, crashes)
            if self.pool.stopped and (failure.retry or failure.status == 401):
                raise asyncio.CancelledError  # the run's fault, not the document's
            if failure.unreached:
                continue  # the server is set aside or down: waiting for a slot is the pause
            if died:
                suspicion = self._suspect(upstream, suspicion, together)
                continue
            failure.attempts = attempts = attempts + 1
            # An overloaded server that still answers other requests will answer this one, too.
            overload = failure.status in {429, 503}
            storms += overload
            spent += not overload or self.pool.successes == successes
            successes = self.pool.successes
            if not failure.retry or spent > self.max_retries or storms > STORM_PATIENCE * self.max_retries:
                self.counts[f"given_up.{failure.cause}"] += 1
                raise failure
            self.counts[f"retries.{failure.cause}"] += 1
            longest = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(attempts, 10))
            await asyncio.sleep(max(failure.retry_after or 0.0, random.uniform(0, longest)))  # full jitter

    def _suspect(self, upstream: sdg.Upstream, earlier: Suspicion | None, together: int) -> Suspicion:
        """Suspect a request of having crashed its server, with `together` requests in flight; raise if it is proved."""
        self.counts["retries.crash"] += 1
        suspicion = self.pool.suspect(upstream, earlier, together)
        if not suspicion.proved:
            return suspicion
        upstream.convicted += 1
        self.counts["given_up.crash"] += 1
        message = f"the server crashed {suspicion.crashes} times on this request, the last time with no other request"
        failure = sdg.RequestFailed("crash", f"{message} in flight")
        failure.attempts = suspicion.crashes
        raise failure

    async def _attempt(self, upstream: sdg.Upstream, request: sdg.Request) -> sdg.Response:
        """One request and its response; the pool learns the result."""
        import aiohttp

        sent, body = self._time(), request.body
        self.counts["requests"] += 1
        try:
            data = body if len(body) < LARGE else io.BytesIO(body)  # aiohttp sends the second kind in pieces
            async with self.session.post(upstream.url + request.path, data=data) as response:
                raw = without_key(await response.read(), self.key_name)
            self.pool.lost = None
            if response.status != 200:
                raise self._refused(upstream, response, raw, sent)
            try:
                answer = orjson.loads(raw)
            except ValueError as exc:
                raise sdg.RequestFailed("body", f"the response is not JSON: {exc}: {shown(raw)}") from exc
            self.counts.update(tokens_in(answer))
            reply = parse_reply(answer)
        except TimeoutError as exc:
            self.pool.failed(upstream, sent)
            raise sdg.RequestFailed("timeout", f"no response within {self.timeout:g} s") from exc
        except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as exc:
            self.counts["requests"] -= 1
            raise self._unreachable(upstream, exc, sent) from exc
        except (aiohttp.ClientError, ConnectionError) as exc:
            self.pool.failed(upstream, sent)
            raise sdg.RequestFailed("connection", f"the connection broke: {exc or type(exc).__name__}") from exc
        self.pool.succeeded(upstream)
        self.pool.set_aside(upstream, quota_pause(response.headers))
        return sdg.Response(reply, raw)

    def _refused(
        self, upstream: sdg.Upstream, response: aiohttp.ClientResponse, raw: bytes, sent: float
    ) -> sdg.RequestFailed:
        """The failure for a response whose status is not 200."""
        status = response.status
        retry = status in {408, 409, 425, 429} or status >= 500
        said = (error_text(raw) or str(response.reason)).encode()  # decoded, it may contain the key again
        message = f"{status} from {sdg.redact(upstream.url)}: {without_key(said, self.key_name).decode()}"
        failure = sdg.RequestFailed(str(status), message, status=status, retry=retry)
        failure.retry_after, failure.body = retry_after(response.headers), raw
        if status == 401:
            self._stop(sdg.ServerError(f"{message}; is the key in ${self.key_name} valid?"))
        elif status in {429, 503}:
            self.pool.overloaded(upstream, sent)
            self.pool.set_aside(upstream, failure.retry_after or 0.0)
        elif retry:
            self.pool.failed(upstream, sent)
        else:
            upstream.failures = 0
        self.pool.set_aside(upstream, quota_pause(response.headers))
        return failure

    def _unreachable(self, upstream: sdg.Upstream, exc: Exception, sent: float) -> sdg.RequestFailed:
        """No connection: set the server aside. When all have been unreachable for too long, the run ends."""
        self.pool.failed(upstream, sent, patience=1)
        self.pool.lost = self.pool.lost or sent
        silent = self._time() - self.pool.lost
        if silent > self.timeout and not upstream.examine:  # otherwise the supervisor decides
            message = f"no server could be reached for {silent:.0f} s ({exc}); start one, then run again"
            self._stop(sdg.ServerError(message))
        failure = sdg.RequestFailed("connection", str(exc))
        failure.unreached = True
        return failure
