"""Hostile servers: a client gives the complete and true response to a request, or an error. Never another one."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from raw_server import CLIENTS, RawServer, Then, outcome, reset, run
from test_http import OK, PLAIN, chunked, sized

from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.transport import Transport

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(quick, max_examples=1500)


def bare(body: bytes) -> bytes:
    """Deflated without a header."""
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(body) + deflate.flush()


CODINGS: dict[bytes, Callable[[bytes], bytes]] = {
    b"": lambda body: body,
    b"gzip": gzip.compress,
    b"Deflate": zlib.compress,
    b"deflate": bare,
}


@dataclass(frozen=True)
class Response:
    """A response, and what it holds. Its end is told by `framing`."""

    raw: bytes
    body: bytes
    framing: str
    coded: bool


@st.composite
def responses(draw: st.DrawFn) -> Response:
    """Responses of any form that the protocol allows."""
    body, coding = draw(st.binary(max_size=300)), draw(st.sampled_from(sorted(CODINGS)))
    framing = draw(st.sampled_from(["length", "chunks", "end"]))
    headers = [b"Content-Encoding: " + coding] if coding else []
    content = CODINGS[coding](body)
    if framing == "length":
        raw = sized(content, *headers)
    elif framing == "chunks":
        size = draw(st.integers(1, 400))
        pieces = [content[i : i + size] for i in range(0, len(content), size)]
        trailer = draw(st.sampled_from([b"", b"X-Sum: 1\r\n"]))
        raw = chunked(*pieces, trailer=trailer, headers=b"".join(line + b"\r\n" for line in headers))
    else:
        raw = OK + b"".join(line + b"\r\n" for line in headers) + b"\r\n" + content
    interim = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n"]))
    return Response(interim + raw, body, framing, bool(coding))


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes in pieces."""
    places = [0, *sorted(cut for cut in cuts if cut < len(raw)), len(raw)]
    return [raw[start:end] for start, end in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 500), max_size=6)


def check_whole(client: str, response: Response, cuts: list[int]) -> None:
    end = [Then.CLOSE] * (response.framing == "end")
    assert outcome(client, RawServer([*pieces_of(response.raw, cuts), *end])) == (200, response.body)


def check_cut(client: str, response: Response, cuts: list[int], at: float, end: Then) -> None:
    length = int(at * len(response.raw))
    head = len(response.raw) - len(response.raw.rpartition(b"\r\n\r\n")[2])
    result = outcome(client, RawServer([*pieces_of(response.raw[:length], cuts), end]))
    if response.framing != "end" or length < response.raw.index(OK) + len(OK) or end is Then.RESET:
        assert result == "Broken"
    elif response.coded:  # without a byte of it, it is an empty response, and no answer
        assert result in {"Broken", (200, b"")}
    else:  # nobody could know
        assert result == "Broken" or (length >= head - 300 and response.body.startswith(bytes(result[1])))


@pytest.mark.parametrize("client", CLIENTS)
@quick
@given(responses(), CUTS)
def test_a_response_of_any_form_in_any_pieces_is_received(client: str, response: Response, cuts: list[int]) -> None:
    check_whole(client, response, cuts)


@pytest.mark.parametrize("client", CLIENTS)
@quick
@given(responses(), CUTS, st.floats(0, 1, exclude_max=True), st.sampled_from([Then.CLOSE, Then.RESET]))
def test_a_response_that_is_cut_is_an_error(
    client: str, response: Response, cuts: list[int], at: float, end: Then
) -> None:
    if client == "aiohttp" and response.framing == "end":  # it does not tell a reset from an end
        end = Then.CLOSE
    check_cut(client, response, cuts, at, end)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
@thorough
@given(responses(), CUTS, st.floats(0, 1, exclude_max=True))
def test_responses_of_any_form_whole_and_cut(client: str, response: Response, cuts: list[int], at: float) -> None:
    check_whole(client, response, cuts)
    for end in (Then.CLOSE, Then.RESET)[: 1 if client == "aiohttp" and response.framing == "end" else 2]:
        check_cut(client, response, cuts, at, end)


# ── Garbage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def garbage(draw: st.DrawFn) -> bytes:
    """A response with some bytes changed, left out or put in; or any bytes."""
    raw = bytearray(draw(responses()).raw)
    for _ in range(draw(st.integers(1, 4))):
        place, put = draw(st.integers(0, len(raw))), draw(st.binary(max_size=6))
        raw[place : place + draw(st.integers(0, 6))] = put
    return bytes(raw) if draw(st.integers(0, 9)) else draw(st.binary(max_size=300))


def check_garbage(first: bytes, cuts: list[int], closes: bool) -> None:
    """Whatever came for the first request, the second gets its own response, or none if the connection ends then."""
    server = RawServer([*pieces_of(first, cuts), *[Then.CLOSE] * closes], [PLAIN], [PLAIN])

    async def post(transport: Transport, seconds: float) -> bytes | None:
        with contextlib.suppress(Broken, TimeoutError):
            async with asyncio.timeout(seconds):
                return (await transport.post(server.url, "/x", b"{}")).body
        return None

    async def thrice(transport: Transport) -> list[bytes | None]:
        await post(transport, 0.02)
        if not server.requests:  # it was given up before
            server.scripts.pop(0)
        return [await post(transport, 10) for _ in range(2)]

    second, third = run("own", server, thrice)
    assert second in {b"hello", None}
    assert third == b"hello"


@quick
@given(garbage(), CUTS, st.booleans())
def test_garbage_does_not_become_the_response_to_another_request(first: bytes, cuts: list[int], closes: bool) -> None:
    check_garbage(first, cuts, closes)


@pytest.mark.slow
@thorough
@given(garbage(), CUTS, st.booleans())
def test_much_garbage_does_not_become_the_response_to_another_request(
    first: bytes, cuts: list[int], closes: bool
) -> None:
    check_garbage(first, cuts, closes)


# ── Many requests at once ────────────────────────────────────────────────────────────────────────────────────────────


class Chaotic(RawServer):
    """Answers a request with its own body, in one of many ways, or does not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            body = await reader.readexactly(length)
            way = self.random.choice(
                [*["whole"] * 8, "gzip", "slow", "more", "bye", "cut", "reset", "wrong", "refused"]
            )
            raw = sized(gzip.compress(body), b"Content-Encoding: gzip") if way == "gzip" else sized(body)
            if way == "slow":
                await asyncio.sleep(self.random.random() / 100)
            if writer.is_closing():  # the client has left meanwhile
                return
            if way == "reset":
                reset(writer)
                return
            if way == "wrong":
                raw = raw.replace(b"Content-Length: ", b"Content-Length: 1")
            if way == "refused":
                raw = raw.replace(b"200 OK", b"503 No")
            if way == "bye":
                raw = chunked(body, headers=b"Connection: close\r\n")
            raw = raw[: self.random.randrange(len(raw))] if way == "cut" else raw + sized(b"foreign") * (way == "more")
            for piece in pieces_of(raw, [self.random.randrange(len(raw) + 1) for _ in range(self.random.randrange(3))]):
                writer.write(piece)
                if way != "more":  # what comes later, unasked, cannot be told from a response
                    await asyncio.sleep(0)
            if way in {"bye", "cut", "wrong"}:
                return


def check_chaos(seed: int) -> None:
    server, chance = Chaotic(seed), random.Random(~seed)

    async def one(transport: Transport, number: int) -> str:
        body = b"request %d " % number * chance.choice([1, 1, 1, 5000])
        patience = chance.choice([5, 5, 5, chance.random() / 100])  # the last one cancels it, in any phase
        try:
            async with asyncio.timeout(patience):
                answer = await transport.post(server.url, "/x", body)
        except (Broken, Unreached, TimeoutError) as exc:
            return type(exc).__name__
        assert answer.body == body
        assert answer.status in {200, 503}
        return "answered"

    async def many(transport: Transport) -> list[str]:
        numbers = iter(range(60))

        async def work() -> list[str]:
            return [await one(transport, number) for number in numbers]

        return [each for results in await asyncio.gather(*(work() for _ in range(6))) for each in results]

    outcome("own", RawServer([PLAIN]))  # what an event loop opens only once
    before = len(os.listdir("/proc/self/fd"))
    results = run("own", server, many)
    assert len(results) == 60
    assert results.count("answered") > 10
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("seed", range(5))
def test_each_of_many_requests_gets_its_own_response_or_an_error(seed: int) -> None:
    check_chaos(seed)


@pytest.mark.slow
@settings(thorough, max_examples=300)
@given(st.integers(0, 2**32))
def test_each_of_very_many_requests_gets_its_own_response_or_an_error(seed: int) -> None:
    check_chaos(seed)


def test_a_stream_of_garbage_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdg_plugins.servers.http1.MOST", 100_000)
    endless: list[Any] = [
        OK + b"Transfer-Encoding: chunked\r\n\r\n",
        *[b"1000\r\n" + b"x" * 4096 + b"\r\n"] * 100,
        Then.WAIT,
    ]
    assert outcome("own", RawServer(endless)) == "Broken"
    bomb = sized(gzip.compress(bytes(1_000_000)), b"Content-Encoding: gzip")
    assert [outcome(client, RawServer([bomb])) for client in CLIENTS] == ["Broken", "Broken"]
