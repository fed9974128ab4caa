"""The lean HTTP client, against a server that sends exactly the bytes of a test."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sdg_plugins.servers.brake import Brake
from sdg_plugins.servers.http1 import IDLE, Broken, Http1, Received, Take, Unreached
from sdg_plugins.servers.transport import Transport

Pieces = list[bytes | None]  # None closes the connection, and so does the end of the list if `close`

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-One: 1\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nTrailer: t\r\n\r\n"
ZIPPED = gzip.compress(b"hello")
GZIP = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(ZIPPED) + ZIPPED
DEFLATED = zlib.compress(b"hello")
DEFLATE = b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\nContent-Length: %d\r\n\r\n" % len(DEFLATED) + DEFLATED
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN
WHOLE = {"plain": PLAIN, "chunked": CHUNKED, "gzip": GZIP, "deflate": DEFLATE, "interim": INTERIM}


class Server:
    """Answers each request of a connection with the next of its scripts; keeps what it received."""

    def __init__(self, *scripts: list[bytes], close: bool = False, silent: bool = False) -> None:
        self.scripts, self.close, self.silent = [*scripts], close, silent
        self.requests: list[bytes] = []
        self.connections = 0
        self.handlers: set[asyncio.Task[Any]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                for piece in self.scripts.pop(0) if self.scripts else []:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.silent:
                    await asyncio.sleep(3600)
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass


def run(server: Server, work: Callable[[Http1, str], Awaitable[Any]], timeout: float = 20.0) -> Any:
    """What `work(client, url)` returns."""

    async def both() -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            handler = asyncio.current_task()
            assert handler
            server.handlers.add(handler)
            try:
                await server.serve(reader, writer)
            finally:
                writer.close()

        listening = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        try:
            async with Http1({"Authorization": "Bearer k"}, timeout).working() as client:
                return await work(client, f"http://127.0.0.1:{port}/v1/x?q=1")
        finally:
            listening.close()
            for handler in server.handlers:
                handler.cancel()
            await asyncio.gather(*server.handlers, return_exceptions=True)

    return asyncio.run(both())


def post(server: Server, body: bytes = b"{}", timeout: float = 20.0, take: Take | None = None) -> Received:
    result = run(server, lambda client, url: client.post(url, body, take, take is not None), timeout)
    assert isinstance(result, Received)
    return result


def test_a_request_is_sent_as_the_protocol_has_it() -> None:
    server = Server([PLAIN])

    response = post(server, b'{"a":1}')

    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/x?q=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer k\r\n" in head
    assert body == b'{"a":1}'
    assert (response.status, response.reason, response.body) == (200, "OK", b"hello")
    assert response.headers["x-one"] == "1"


@pytest.mark.parametrize("name", WHOLE)
def test_a_response_may_be_split_at_every_byte(name: str) -> None:
    raw = WHOLE[name]
    server = Server(*[[raw[:i], raw[i:]] for i in range(1, len(raw))], [raw[i : i + 1] for i in range(len(raw))])

    async def all_splits(client: Http1, url: str) -> list[bytes]:
        return [(await client.post(url, b"{}")).body for _ in range(len(raw))]

    assert set(run(server, all_splits)) == {b"hello"}
    assert server.connections == 1


@pytest.mark.parametrize("name", WHOLE)
def test_a_response_that_ends_early_is_broken(name: str) -> None:
    raw = WHOLE[name]
    for end in range(0, len(raw), 5):
        with pytest.raises(Broken):
            post(Server([raw[:end]], close=True))


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    assert post(Server([b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"], close=True)).body == b"hello"


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_what_is_not_http_is_broken(raw: bytes) -> None:
    with pytest.raises(Broken):
        post(Server([raw], close=True))


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_no_garbage_is_taken_for_a_complete_response(garbage: bytes) -> None:
    with pytest.raises(Broken):
        post(Server([b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + garbage], close=True))


def test_a_connection_is_kept_unless_the_server_says_otherwise() -> None:
    async def twice(client: Http1, url: str) -> None:
        await client.post(url, b"{}")
        await client.post(url, b"{}")

    kept = Server([PLAIN], [PLAIN])
    run(kept, twice)
    assert kept.connections == 1

    closing = Server(*[[PLAIN.replace(b"X-One: 1", b"Connection: close")]] * 2)
    run(closing, twice)
    assert closing.connections == 2

    talkative = Server([PLAIN + PLAIN], [PLAIN])
    run(talkative, twice)
    assert talkative.connections == 2


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdg_plugins.servers.http1.IDLE", -1.0)
    assert IDLE > 0
    server = Server([PLAIN], [PLAIN])

    async def twice(client: Http1, url: str) -> None:
        await client.post(url, b"{}")
        await client.post(url, b"{}")

    run(server, twice)

    assert server.connections == 2


def test_no_response_in_time_is_a_time_out() -> None:
    with pytest.raises(TimeoutError):
        post(Server([PLAIN[:30]], silent=True), timeout=0.3)


def test_a_canceled_request_leaves_no_connection_that_another_would_use() -> None:
    server = Server([PLAIN[:30]], [PLAIN])

    async def cancel_one(client: Http1, url: str) -> bytes:
        first = asyncio.ensure_future(client.post(url, b"{}"))
        while not server.requests:
            await asyncio.sleep(0.01)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        body: bytes = (await client.post(url, b"{}")).body
        return body

    assert run(server, cancel_one) == b"hello"
    assert server.connections == 2


def test_a_host_that_refuses_or_does_not_exist_is_unreached() -> None:
    async def refused(client: Http1, url: str) -> None:
        await client.post("http://127.0.0.1:9/v1", b"{}")

    async def unknown(client: Http1, url: str) -> None:
        await client.post("http://no-such-host.invalid/v1", b"{}")

    for work in (refused, unknown):
        with pytest.raises(Unreached, match=r"cannot connect to (127.0.0.1:9|no-such-host.invalid:80)"):
            run(Server(), work)


@pytest.mark.parametrize("url", ["http://[::1", "http://host:99999", "ftp://host"])
def test_what_is_not_a_url_of_a_server_is_unreached(url: str) -> None:
    async def ask() -> None:
        async with Http1({}, 5).working() as lean:
            transport = Transport({}, 5, lean)
            with pytest.raises(Unreached):
                await transport.get(url, "/models", 5)
            with pytest.raises(Unreached):
                await transport.post(url, "/completions", b"{}")

    asyncio.run(ask())


BIG = 300_000


@pytest.mark.parametrize("lean", [True, False])
def test_large_responses_are_received_one_at_a_time(lean: bool) -> None:
    """Each is larger than the bound; the store is full from the first response on, and is emptied late."""
    most = 0
    brake = Brake(most=200_000)
    stored: list[int] = []
    brake.unsaved = lambda: sum(stored)

    async def ask(transport: Transport, url: str) -> None:
        nonlocal most
        answer = await transport.post(url, "", b"{}")
        assert answer.body == b"x" * BIG
        stored.append(BIG)
        most = max(most, sum(stored))

    async def empty_the_store() -> None:
        while True:
            await asyncio.sleep(0.02)
            stored.clear()
            brake.look()

    async def work(client: Http1, url: str) -> None:
        transport = Transport({}, 20, Http1({}, 20, brake) if lean else None, proxies=False)
        transport.brake = brake
        emptying = asyncio.create_task(empty_the_store())
        await asyncio.gather(*[ask(transport, url) for _ in range(20)])
        emptying.cancel()
        await transport.aclose()

    run(Server(*[[large(BIG)]] * 20, close=True), work)
    stored.clear()
    brake.look()
    assert not brake.on
    assert most <= 5 * BIG  # those that had come when the brake was put on, and one


@pytest.mark.parametrize("lean", [True, False])
def test_time_in_which_a_response_is_paused_does_not_count_for_its_timeout(lean: bool) -> None:
    brake = Brake(most=1)
    brake.unsaved = lambda: 2

    async def work(client: Http1, url: str) -> bytes:
        async with Http1({}, 0.3, brake).working() as own:
            transport = Transport({}, 0.3, own if lean else None, proxies=False)
            transport.brake = brake
            asked = asyncio.create_task(transport.post(url, "", b"{}"))
            while not brake.on:
                await asyncio.sleep(0)
            await asyncio.sleep(0.5)
            brake.unsaved = int
            brake.look()
            body = (await asked).body
            await transport.aclose()
            return body

    assert run(Server([large(BIG)]), work) == b"x" * BIG


def large(size: int) -> bytes:
    """A response with a body of so many bytes."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size


def test_a_large_body_arrives_whole() -> None:
    server = Server([PLAIN])
    body = bytes(range(256)) * 20_000

    post(server, body)

    assert server.requests[0].partition(b"\r\n\r\n")[2] == body


class Collected(Take):
    """Takes all bodies in pieces."""

    def __init__(self, fail: bool = False) -> None:
        self.pieces: list[bytes] = []
        self.fail = fail

    def wanted(self, status: int, headers: Mapping[str, str]) -> bool:
        return True

    def piece(self, piece: bytes) -> None:
        if self.fail:
            raise KeyError("of the taker")
        self.pieces.append(piece)


def test_a_stream_is_given_in_pieces_and_may_take_longer_than_the_timeout() -> None:
    class Slow(Server):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(8):
                writer.write(b"1\r\nx\r\n")
                await asyncio.sleep(0.3)
            writer.write(b"0\r\n\r\n")

    take = Collected()

    post(Slow(), timeout=1.5, take=take)

    assert b"".join(take.pieces) == b"x" * 8
    assert len(take.pieces) > 1


def test_what_the_taker_of_a_stream_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="of the taker"):
        post(Server([PLAIN]), take=Collected(fail=True))
