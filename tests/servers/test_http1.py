"""What only the lean HTTP client has: its parser's boundary, its watchdog, its connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from raw_server import RawServer, Then
from test_http import OK, PLAIN, WHOLE

from sdg_plugins.servers import http1
from sdg_plugins.servers.http1 import Broken, Http1, Unreached
from sdg_plugins.servers.streaming import Take

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a machine has 127.0.0.1 alone")


def with_client(server: RawServer, work: Callable[[Http1, str], Awaitable[Any]], timeout: float = 20.0) -> Any:
    """What `work(client, url)` returns, in an event loop of asyncio itself, as in a notebook."""

    async def both() -> Any:
        async with server.serving(), Http1({"Authorization": "Bearer k"}, timeout).working() as client:
            return await work(client, server.url)

    return asyncio.run(both())


@only_linux
def test_connections_to_this_machine_come_from_the_address_that_is_asked_for() -> None:
    """Each of several processes has its own, and so its own ports."""
    came: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(writer.get_extra_info("peername")[0])
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(PLAIN)
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            for source in ("", "127.0.1.9"):
                async with Http1({}, 20, source).working() as client:
                    assert (await client.post(f"http://127.0.0.1:{port}/", b"{}")).body == b"hello"

    asyncio.run(ask())
    assert came == ["127.0.0.1", "127.0.1.9"]


@only_linux
def test_thousands_of_connections_to_this_machine_come_from_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel looks for long for a free port when most of those of an address are in use."""
    monkeypatch.setattr(http1, "PORTS", 2)
    came: list[str] = []

    async def ask() -> None:
        all_came = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            came.append(writer.get_extra_info("peername")[0])
            next_one.set()
            await all_came.wait()
            writer.write(PLAIN)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, Http1({}, 20).working() as client, asyncio.TaskGroup() as requests:
            for _ in range(5):
                next_one = asyncio.Event()
                requests.create_task(client.post(url, b"{}"))
                await next_one.wait()
            all_came.set()

    asyncio.run(ask())
    assert came == ["127.0.0.1"] * 2 + ["127.0.2.251"] * 2 + ["127.0.3.251"]


def test_an_address_that_the_machine_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http1, "_source_for", lambda client, address: "203.0.113.1")

    async def ask(client: Http1, url: str) -> bytes:
        return (await client.post(url, b"{}")).body

    assert with_client(RawServer([PLAIN]), ask) == b"hello"


@pytest.mark.parametrize("name", WHOLE)
def test_a_response_may_be_split_at_every_byte(name: str) -> None:
    raw = b"".join(step for step in WHOLE[name] if isinstance(step, bytes))
    end = [step for step in WHOLE[name] if isinstance(step, Then)]
    scripts = [[raw[:i], raw[i:], *end] for i in range(1, len(raw))]
    server = RawServer(*scripts, [*[raw[i : i + 1] for i in range(len(raw))], *end])

    async def all_splits(client: Http1, url: str) -> list[bytes]:
        return [(await client.post(url, b"{}")).body for _ in range(len(raw))]

    assert set(with_client(server, all_splits)) == {b"hello"}
    assert server.connections == 1 or end or name == "HTTP/1.0"


@pytest.mark.parametrize("name", WHOLE)
def test_a_response_that_ends_early_is_broken(name: str) -> None:
    raw = b"".join(step for step in WHOLE[name] if isinstance(step, bytes))
    until_the_end = Then.CLOSE in WHOLE[name] and b"gzip" not in raw
    ends = range(0, raw.index(b"\r\n\r\n") + 4 if until_the_end else len(raw), 3)
    server = RawServer(*[[raw[:end], Then.CLOSE] for end in ends])

    async def all_ends(client: Http1, url: str) -> None:
        for _ in ends:
            with pytest.raises(Broken):
                await client.post(url, b"{}")

    with_client(server, all_ends)


def test_the_rest_of_a_response_that_was_more_is_dropped_with_its_connection() -> None:
    server = RawServer([PLAIN + b"garbage"], [PLAIN])

    async def twice(client: Http1, url: str) -> list[bytes]:
        return [(await client.post(url, b"{}")).body for _ in range(2)]

    assert with_client(server, twice) == [b"hello", b"hello"]
    assert server.connections == 2


def test_connections_that_have_been_idle_for_long_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdg_plugins.servers.origins.KEPT", 0.01)
    server = RawServer([PLAIN], [PLAIN])

    async def twice(client: Http1, url: str) -> bytes:
        await client.post(url, b"{}")
        await asyncio.wait_for(server.lost.wait(), 20)
        return (await client.post(url, b"{}")).body

    assert with_client(server, twice, timeout=1) == b"hello"
    assert server.connections == 2


def test_time_outs_come_in_the_order_of_their_deadlines_whatever_came_first() -> None:
    """Connecting takes part of a request's time: one that was sent later may be over earlier."""

    async def all_late(client: Http1, url: str) -> None:
        waiting = [asyncio.ensure_future(client.post(url, b"{}")) for _ in range(3)]
        while len(client._busy) < 3:
            await asyncio.sleep(0.001)
        last = [*client._busy][-1]
        last.deadline = 0.0
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [type(each.exception()) for each in done] == [TimeoutError]
        assert len(client._busy) == 2
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    with_client(RawServer(), all_late)


def test_a_connection_that_is_not_accepted_in_time_is_unreached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdg_plugins.servers.http1.CONNECT_TIMEOUT", 0.2)

    async def ask(client: Http1, url: str) -> None:
        with (
            full_listener() as port,
            pytest.raises(Unreached, match=r"no connection to 127\.0\.0\.1:\d+ within 0\.2 s"),
        ):
            await client.post(f"http://127.0.0.1:{port}/v1", b"{}")

    with_client(RawServer(), ask)


def test_a_request_whose_time_is_over_while_it_connects_is_a_time_out() -> None:
    async def ask(client: Http1, url: str) -> None:
        with full_listener() as port, pytest.raises(TimeoutError):
            await client.post(f"http://127.0.0.1:{port}/v1", b"{}")

    with_client(RawServer(), ask, timeout=0.2)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_may_be_canceled_while_it_connects(scheme: str) -> None:
    async def cancel(client: Http1, url: str) -> None:
        with full_listener() as port:
            server = RawServer(deaf=True)
            async with server.serving():
                there = f"https://127.0.0.1:{server.port}/v1" if scheme == "https" else f"http://127.0.0.1:{port}/v1"
                asking = asyncio.ensure_future(client.post(there, b"{}"))
                while scheme == "https" and not server.connections:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.01)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
        assert not client._busy
        assert (await client.post(url, b"{}")).body == b"hello"

    with_client(RawServer([PLAIN]), cancel)


@contextlib.contextmanager
def full_listener() -> Any:
    """The port of a server that accepts nothing: the kernel drops further attempts to connect."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def resolving_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name stand for some addresses; returns a list that gets each name that is looked up."""
    asked: list[str] = []

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        await asyncio.sleep(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", getaddrinfo)
    return asked


def test_connections_are_spread_over_the_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = RawServer(*[[PLAIN.replace(b"X-One: 1", b"Connection: close")]] * 4)
    second = RawServer(*first.scripts, host="127.0.0.2")

    async def ask(client: Http1, url: str) -> None:
        second.port = first.port
        asked = resolving_to(monkeypatch, "127.0.0.1", "127.0.0.2")
        async with second.serving():
            await asyncio.gather(*(client.post(url.replace("127.0.0.1", "name"), b"{}") for _ in range(4)))
        assert asked == ["name"]

    with_client(first, ask)

    assert (first.connections, second.connections) == (2, 2)


def test_an_address_that_refuses_is_left_out_while_others_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer(*[[PLAIN.replace(b"X-One: 1", b"Connection: close")]] * 4)
    tried: list[str] = []

    async def ask(client: Http1, url: str) -> list[bytes]:
        resolving_to(monkeypatch, "127.0.0.3", "127.0.0.1")
        connect = client._connect_to
        client._connect_to = lambda origin, address, secure: tried.append(address) or connect(origin, address, secure)  # type: ignore[method-assign, func-returns-value]
        return [(await client.post(url.replace("127.0.0.1", "name"), b"{}")).body for _ in range(4)]

    assert with_client(server, ask) == [b"hello"] * 4
    assert tried == ["127.0.0.3", *["127.0.0.1"] * 4]


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


def test_each_piece_of_a_stream_puts_its_time_out_off() -> None:
    deadlines: list[float] = []
    pieces = [step for _ in range(4) for step in (b"1\r\nx\r\n", 0.01)]
    server = RawServer([OK + b"Transfer-Encoding: chunked\r\n\r\n", *pieces, b"0\r\n\r\n"])

    async def ask(client: Http1, url: str) -> list[bytes]:
        class Noting(Collected):
            def piece(self, piece: bytes) -> None:
                super().piece(piece)
                deadlines.append(next(iter(client._busy)).deadline)

        take = Noting()
        await client.post(url, b"{}", take, streamed=True)
        return take.pieces

    assert b"".join(with_client(server, ask)) == b"xxxx"
    assert deadlines[0] < deadlines[-1]


def test_what_the_taker_of_a_stream_raises_is_raised() -> None:
    with pytest.raises(KeyError, match="of the taker"):
        with_client(RawServer([PLAIN]), lambda client, url: client.post(url, b"{}", Collected(fail=True)))


# ── Connections that are kept, and many at once ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("idle", "connections"), [(0.0, 1), (20.0, 2), (42.0, 1)])
def test_an_idle_connection_is_not_used_when_its_server_may_be_closing_it(
    idle: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdg_plugins.servers.origins.LASTING", 40.0)
    server = RawServer([PLAIN], [PLAIN])

    async def twice(client: Http1, url: str) -> bytes:
        await client.post(url, b"{}")
        (origin,) = client._origins.values()
        origin.idle[0].idle_since -= idle
        return (await client.post(url, b"{}")).body

    assert with_client(server, twice) == b"hello"
    assert server.connections == connections


@pytest.mark.parametrize("disturbance", [PLAIN, b""], ids=["something came", "closed"])
def test_a_connection_that_is_no_longer_idle_is_not_used_though_the_loop_has_not_seen_it(disturbance: bytes) -> None:
    writers: list[asyncio.StreamWriter] = []

    class Remembering(RawServer):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            await super()._serve(reader, writer)

    server = Remembering([PLAIN], [PLAIN.replace(b"hello", b"again")])

    async def twice(client: Http1, url: str) -> bytes:
        await client.post(url, b"{}")
        (origin,) = client._origins.values()
        origin.idle[0].idle_since -= 1
        if disturbance:
            writers[0].write(disturbance)  # at once; there is no turn of the loop until the next request is sent
        else:
            writers[0].get_extra_info("socket").shutdown(socket.SHUT_WR)
        return (await client.post(url, b"{}")).body

    assert with_client(server, twice) == b"again"
    assert server.connections == 2


def test_requests_that_begin_at_once_connect_in_turn_and_use_what_has_become_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdg_plugins.servers.origins.CONNECTING", 3)
    server = RawServer(*[[PLAIN]] * 50)
    now, most = 0, 0

    async def ask(client: Http1, url: str) -> list[bytes]:
        connect = client._connect_to

        async def counted(*arguments: Any) -> Any:
            nonlocal now, most
            now, most = now + 1, max(most, now + 1)
            try:
                return await connect(*arguments)
            finally:
                now -= 1

        client._connect_to = counted  # type: ignore[method-assign]
        return [each.body for each in await asyncio.gather(*(client.post(url, b"{}") for _ in range(50)))]

    assert with_client(server, ask) == [b"hello"] * 50
    assert most == 3
    assert server.connections < 50


def test_a_look_at_a_server_does_not_wait_behind_requests_that_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdg_plugins.servers.origins.CONNECTING", 1)
    closing = PLAIN.replace(b"X-One: 1", b"Connection: close")

    async def ask(client: Http1, url: str) -> bytes:
        await client.post(url, b"{}")
        (origin,) = client._origins.values()
        await origin.connecting.acquire()  # as if another request was at it
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.post(url, b"{}"), 0.05)
        return (await client.get(url, 20)).body

    assert with_client(RawServer([closing], [PLAIN]), ask) == b"hello"


def test_a_connection_that_ends_before_the_request_is_sent_is_broken() -> None:
    class Unwilling(RawServer):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            return

    async def ask(client: Http1, url: str) -> None:
        connect = client._connect_to

        async def late(*arguments: Any) -> Any:
            connection = await connect(*arguments)
            while connection.usable:
                await asyncio.sleep(0.001)
            return connection

        client._connect_to = late  # type: ignore[method-assign]
        with pytest.raises(Broken, match="the server closed the connection"):
            await client.post(url, b"{}")
        assert not client._busy

    with_client(Unwilling(), ask)


def test_idle_connections_give_their_files_to_new_ones() -> None:
    first, second = RawServer(*[[PLAIN]] * 20), RawServer(*[[PLAIN]] * 20)

    async def ask(client: Http1, url: str) -> list[bytes]:
        async with second.serving():
            await asyncio.gather(*(client.post(url, b"{}") for _ in range(10)))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
            taken: list[int] = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(os.dup(0))
                return [(await client.post(second.url, b"{}")).body]
            finally:
                for file in taken:
                    os.close(file)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert with_client(first, ask) == [b"hello"]
