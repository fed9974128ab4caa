"""The client: sends each request to a server of the pool until it is answered or given up."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.secrets import secrets_of
from sdg_plugins.common.waiting import quota_pause
from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.lane import Lane
from sdg_plugins.servers.refusals import WHATEVER_IS_ASKED, error_inside, refused, smallest, way_out
from sdg_plugins.servers.responses import (
    count_choices,
    error_text,
    is_error,
    merged,
    parse_reply,
    read_json,
    reply_without_text,
    tokens_in,
    worst,
)
from sdg_plugins.servers.transport import SUCCESS, Answer, Transport

if TYPE_CHECKING:
    from sdg_plugins.servers.pool import Pool, Suspicion

CHAT = "/chat/completions"
STORM_PATIENCE = 10  # × --max-retries: overloaded responses that one request accepts while others are answered
LONELY = 2  # overloaded responses in a row to one request, with no other answered: is it this request?
MANY = 20  # refusals in a row with the same words, after answers: is it these requests?
LONGEST_PAUSE = 60.0  # s: the longest pause between two attempts, unless the server asks for more


class Tries:
    """What has become of one request so far.

    Args:
        most: attempts after the first one that may fail.
        answered: responses to all requests so far.

    Attributes:
        sent: attempts.
        spent: those that count, because the server could have answered.
        alone: those in a row for which no server had capacity, nor for any other request.
        answered: responses to all requests, at the last attempt.
        failure: the last one.
        pause: seconds before the next one.
        suspicion: that the request has crashed its server.
    """

    def __init__(self, most: int, answered: int) -> None:
        self.most, self.answered = most, answered
        self.sent = self.spent = self.alone = self._storms = 0
        self.pause = 0.0
        self._failures: Counter[str] = Counter()  # by cause
        self.failure: sdg.RequestFailed | None = None
        self.suspicion: Suspicion | None = None

    def another_after(self, failure: sdg.RequestFailed, answered: int) -> bool:
        """Take in a failure; True if another attempt is worth while.

        That a server has no capacity counts only if it has answered others since, and then for little: many requests
        may compete for the few that it accepts.
        """
        self.failure, failure.attempts, self.pause = failure, self.sent, 0.0
        if failure.overload:  # the server is set aside: waiting for a slot is the pause
            others = answered > self.answered
            self._storms, self.alone = self._storms + others, 0 if others else self.alone + 1
        else:
            self.spent, self.alone = self.spent + 1, 0
            longest = min(LONGEST_PAUSE, 0.5 * 2.0 ** min(self.spent, 10))
            self.pause = max(failure.retry_after or 0.0, random.uniform(0, longest))  # full jitter
        self.answered = answered
        self._failures[failure.cause] += 1
        fruitless = failure.most_attempts is not None and self._failures[failure.cause] >= failure.most_attempts
        left = self.spent <= self.most and self._storms <= STORM_PATIENCE * max(1, self.most)
        return failure.retry and left and not fruitless

    def failed_alone(self, answered: int) -> None:
        """The server has capacity, but had none for this request; raise the last failure if no attempt is left."""
        assert self.failure
        self.spent, self.alone, self.answered = self.spent + 1, 0, answered
        if self.spent > self.most:
            self.failure.retry = False
            raise self.failure


class Client:
    """Sends requests to the servers of a pool. `run.stop(error)` is called when the run cannot go on.

    Args:
        transport: sends bytes over HTTP.
        pool: the servers.
        run: whose options and counts are used.
        doubt: what speaks against the model, before anything was asked.
    """

    def __init__(self, transport: Transport, pool: Pool, run: sdg.Run, doubt: str = "") -> None:
        self.transport, self.pool, self.counts, self._stop = transport, pool, run.counts, run.stop
        self.lane = Lane(pool)
        self.secrets = secrets_of(run.options)
        self.stream: bool = run.options.stream
        self.max_retries: int = run.options.max_retries
        self.keep_empty: bool = run.options.empty_answers == "keep"
        self._options, self._doubt = run.options, doubt
        self._time = asyncio.get_running_loop().time
        self._probing = asyncio.Lock()
        self._answered_at = 0.0  # loop time at which the last answered probe was sent
        self._probed_status: int | None = None  # of the last probe that was refused
        self._refused: tuple[str, int] = ("", 0)  # the last refusal, and the responses before it
        self._refusals = 0  # like it in a row
        self._ignores_n = False

    @property
    def answers(self) -> bool:
        """True once the server has answered something, if only the smallest request."""
        return self.pool.successes > 0 or self._answered_at > 0

    def parse(self, body: bytes, path: str = CHAT) -> sdg.Reply:
        """The reply in a stored response of an endpoint."""
        return self._reply_in(read_json(body)[0], path)

    def _reply_in(self, content: Any, path: str) -> sdg.Reply:
        """The reply in a response; of endpoints without completions it has only the usage."""
        return parse_reply(content, self.keep_empty) if path.endswith("/completions") else reply_without_text(content)

    @staticmethod
    def worst(reasons: list[str | None]) -> str | None:
        """The reason to finish that says most about a result made of several replies."""
        return worst(reasons)

    async def send(self, request: sdg.Request) -> sdg.Response:
        """Send one request.

        Raises:
            RequestFailed: it was refused, or no attempt is left.
        """
        tries = Tries(self.max_retries, self.pool.successes)
        while True:
            upstream = await self.lane.acquire(tries.suspicion, request)
            if tries.suspicion and upstream is not tries.suspicion.upstream:
                tries.suspicion = None
            crashes, streamed = upstream.crashes, self.stream
            try:
                response = await self._try(upstream, request, tries)
                upstream.quarantine.cleared += tries.suspicion is not None
                return response
            except sdg.RequestFailed as exc:
                failure, together = exc, upstream.quarantine.together
                doubtful = failure.breaks_off and upstream.examine is not None
                upstream.quarantine.doubts += doubtful
                self.pool.pace.correct(request, None)
            finally:
                self.lane.release(upstream)
            died = doubtful and await self.pool.examine(upstream, crashes)
            if not self.lane.stopped and await self._refuses_everything(upstream, request, failure, streamed):
                self._stop(sdg.ServerError(f"{failure}; {way_out(failure, self._options, self._doubt)}"))
            lasting = failure.account or failure.status in WHATEVER_IS_ASKED or self._refusals >= MANY
            if self.lane.stopped and (failure.retry or lasting):
                raise asyncio.CancelledError  # the run's fault, not the document's
            if failure.unreached:
                continue  # the server is set aside or down: waiting for a slot is the pause
            if died:
                tries.suspicion = self._suspect(upstream, tries.suspicion, together)
                continue
            if not tries.another_after(failure, self.pool.successes):
                self.counts[f"given_up.{failure.cause}"] += 1
                raise failure
            self.counts[f"retries.{failure.cause}"] += 1
            await self.lane.pause(tries.pause)

    async def _try(self, upstream: sdg.Upstream, request: sdg.Request, tries: Tries) -> sdg.Response:
        """One attempt, after a smallest request if a server has had no capacity for this one again and again."""
        if tries.alone >= LONELY and self.pool.successes == tries.answered:
            await self._find_capacity(upstream, request)
            tries.failed_alone(self.pool.successes)
        tries.sent += 1
        response = await self._attempt(upstream, request)
        for choice in response.reply.choices:
            self.counts[f"finish_reasons.{choice.finish_reason}"] += 1
        return response

    async def _find_capacity(self, upstream: sdg.Upstream, request: sdg.Request) -> None:
        """Send the smallest request. Raises RequestFailed if the server has no capacity for that either."""
        self.counts["requests"] -= 1
        self.counts["probes"] += 1
        try:
            await self._attempt(upstream, smallest(request))
        except sdg.RequestFailed as exc:
            if exc.retry and exc.cause != "empty":  # a completion of a few tokens may hold only reasoning
                raise
            self.pool.succeeded(upstream)

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

    # One attempt

    async def _attempt(self, upstream: sdg.Upstream, request: sdg.Request) -> sdg.Response:
        """One request and its response; the pool learns the result."""
        sent = self._time()
        self.counts["requests"] += 1
        try:
            answer = await self.exchange(upstream, request)
            self.pool.lost = None
            response = self.understood(upstream, answer, request.path)
        except Unreached as exc:
            self.counts["requests"] -= 1
            raise self._unreachable(upstream, exc, sent) from exc
        except Broken as exc:
            self.pool.failed(upstream, sent, f"the connection broke: {exc}")
            raise sdg.RequestFailed("connection", f"the connection broke: {exc}") from exc
        except TimeoutError as exc:
            self.pool.failed(upstream, sent, str(exc))
            raise sdg.RequestFailed("timeout", str(exc)) from exc
        except sdg.RequestFailed as exc:
            self._learn(upstream, exc, sent)
            raise
        if self._doubt:
            sdg.say(f"{self._doubt}; but it responds")
            self._doubt = ""
        self.pool.succeeded(upstream)
        self.pool.set_aside(upstream, quota_pause(answer.headers), "the quota in its headers is used up")
        self.pool.pace.correct(request, response.reply.usage)
        return response

    async def exchange(self, upstream: sdg.Upstream, request: sdg.Request, stream: bool | None = None) -> Answer:
        """Send a request once, and receive all of the answer. Raises Unreached, Broken or TimeoutError."""
        stream = self.stream if stream is None else stream
        body = request.body
        if stream and request.path.endswith("/completions"):
            body = orjson.dumps({**request.payload, "stream": True, "stream_options": {"include_usage": True}})

        def progressed() -> None:
            upstream.progressed = self._time()

        answer = await self.transport.post(upstream.url, request.path, body, progressed if stream else None)
        hidden = self.secrets.hidden(answer.body)
        return answer if hidden is answer.body else answer._replace(body=hidden)

    def understood(self, upstream: sdg.Upstream, answer: Answer, path: str) -> sdg.Response:
        """The response in an answer of an endpoint. Raises RequestFailed."""
        if answer.status not in SUCCESS:
            raise refused(answer, answer.status, upstream.url, self.secrets)
        try:
            content, body = read_json(answer.body)
        except ValueError as exc:
            raise sdg.RequestFailed("body", f"the response is not JSON: {exc}: {error_text(answer.body)}") from exc
        if is_error(content):
            raise error_inside(answer, upstream.url, self.secrets)
        for name, number in tokens_in(content).items():
            self.counts[name] += number
        reply = self._reply_in(content, path)
        return sdg.Response(reply, body)

    def _learn(self, upstream: sdg.Upstream, failure: sdg.RequestFailed, sent: float) -> None:
        """Let the pool know of a failure that came as a response."""
        if failure.overload and not failure.account:
            self.pool.overloaded(upstream, sent, failure.retry_after, str(failure))
        elif failure.breaks_off:
            self.pool.failed(upstream, sent, str(failure))
        elif failure.status:
            upstream.failures = 0
        if failure.retry_after and not failure.overload:
            self.pool.set_aside(upstream, failure.retry_after, str(failure))

    def _unreachable(self, upstream: sdg.Upstream, exc: Exception, sent: float) -> sdg.RequestFailed:
        """No connection: set the server aside. When all have been unreachable for too long, the run ends."""
        self.pool.failed(upstream, sent, str(exc), patience=1)
        self.pool.lost = self.pool.lost or sent
        silent = self._time() - self.pool.lost
        if silent > self.transport.timeout and not upstream.examine:  # otherwise the supervisor decides
            message = f"no server could be reached for {silent:.0f} s ({exc}); start one, then run again"
            self._stop(sdg.ServerError(message))
        failure = sdg.RequestFailed("connection", str(exc))
        failure.unreached = True
        return failure

    # Whose fault it is

    async def _refuses_everything(
        self, upstream: sdg.Upstream, request: sdg.Request, failure: sdg.RequestFailed, streamed: bool
    ) -> bool:
        """True if a refusal concerns the account or the URL rather than this request.

        The smallest possible request decides, sent after the refusal came: the account may have just come to its end.
        A server that refuses everything with 400 may respond only in streams: then the request is sent again.
        """
        status, came = failure.status or 0, self._time()
        if failure.account or failure.retry:
            return failure.account
        certain = status in WHATEVER_IS_ASKED or 300 <= status < 400
        if not (certain or self._refuses_many(failure) or (status == 400 and not streamed)):
            return False
        async with self._probing:
            doubtful = certain or self._refusals >= MANY  # unless a probe was answered meanwhile
            if self.lane.stopped or (not doubtful and (status != 400 or self.stream or self.answers)):
                failure.retry = status == 400 and self.stream and not streamed
                return False
            if self._answered_at > came or await self._answers(upstream, request, self.stream):
                return False
            refuses = doubtful and self._probed_status == status
            if status == 400 and not self.stream and await self._answers(upstream, request, stream=True):
                sdg.say(f"{sdg.redact(upstream.url)} responds only in streams: --stream is on from now on")
                self.stream = failure.retry = True
            return refuses

    def _refuses_many(self, failure: sdg.RequestFailed) -> bool:
        """True if the last requests were all refused in the same words, though others were answered before them."""
        refused = (str(failure), self.pool.successes)
        again = self._refusals + 1 if refused == self._refused else 1
        self._refusals = again if self.answers and failure.status else 0
        self._refused = refused
        return self._refusals >= MANY

    async def _answers(self, upstream: sdg.Upstream, request: sdg.Request, stream: bool) -> bool:
        """True if a server answers the smallest possible request of this kind."""
        self.counts["probes"] += 1
        sent = self._time()
        try:
            self.understood(upstream, await self.exchange(upstream, smallest(request), stream), request.path)
        except sdg.RequestFailed as exc:
            self._probed_status = exc.status
            if exc.cause not in {"empty", "refusal"}:  # a completion of a few tokens may hold only reasoning
                return False
        except (Unreached, Broken, TimeoutError):
            self._probed_status = None
            return False
        self._answered_at, self._refusals = sent, 0
        return True

    # Fewer completions than asked for

    def missing(self, body: bytes, n: int) -> int:
        """How many of `n` completions a response lacks; says once that the server ignores `n`."""
        lacking = max(0, n - count_choices(body))
        if lacking and not self._ignores_n:
            self._ignores_n = True
            sdg.say(f"the server returned {n - lacking} of n={n} completions: the others are requested one by one")
        return lacking

    def together(self, bodies: list[bytes]) -> sdg.Response:
        """Several responses as one."""
        body = merged(bodies)
        return sdg.Response(self.parse(body), body)
