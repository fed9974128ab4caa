"""HTTP as servers speak it, against a server that sends exactly the bytes of a test: the same on both clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import pytest
from raw_server import CLIENTS, RawServer, Script, Then, ask, outcome, reset, run

from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.transport import Transport

pytestmark = pytest.mark.parametrize("client", CLIENTS)

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"Content-Length: 5\r\nX-One: 1\r\n\r\nhello"
ZIPPED = gzip.compress(b"hello")
BARE = zlib.compressobj(wbits=-15)
LARGE = bytes(range(256)) * 20_000


def sized(body: bytes, *headers: bytes) -> bytes:
    """A response with a Content-Length."""
    return OK + b"".join(line + b"\r\n" for line in headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, trailer: bytes = b"", headers: bytes = b"") -> bytes:
    """A response in chunks."""
    coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return OK + headers + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n" + trailer + b"\r\n"


WHOLE: dict[str, Script] = {
    "a length": [PLAIN],
    "chunks": [chunked(b"he", b"llo")],
    "a trailer": [chunked(b"hello", trailer=b"X-Sum: 1\r\n")],
    "an extension of a chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n"],
    "gzip": [sized(ZIPPED, b"Content-Encoding: gzip")],
    "gzip in upper case": [sized(ZIPPED, b"content-encoding: GZIP")],
    "gzip in chunks": [chunked(ZIPPED[:7], ZIPPED[7:], headers=b"Content-Encoding: gzip\r\n")],
    "gzip of two members": [sized(gzip.compress(b"hel") + gzip.compress(b"lo"), b"Content-Encoding: gzip")],
    "deflate": [sized(zlib.compress(b"hello"), b"Content-Encoding: deflate")],
    "deflate without a header": [sized(BARE.compress(b"hello") + BARE.flush(), b"Content-Encoding: deflate")],
    "identity": [sized(b"hello", b"Content-Encoding: identity")],
    "interim responses": [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Encoding: gzip\r\n\r\n" + PLAIN
    ],
    "no reason": [PLAIN.replace(b"200 OK", b"200 ")],
    "not even a space": [PLAIN.replace(b"200 OK", b"200")],
    "an odd reason": [PLAIN.replace(b"200 OK", b"200 \xff\xe9 \tHTTP/1.1 500")],
    "an offer to upgrade": [sized(b"hello", b"Upgrade: h2,h2c", b"Connection: Upgrade")],
    "HTTP/1.0": [PLAIN.replace(b"1.1", b"1.0", 1)],
    "the end of the connection": [OK + b"\r\nhello", Then.CLOSE],
    "the end in HTTP/1.0": [b"HTTP/1.0 200 OK\r\n\r\nhel", b"lo", Then.CLOSE],
    "gzip until the end": [OK + b"Content-Encoding: gzip\r\n\r\n" + ZIPPED, Then.CLOSE],
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_response_is_received_however_its_end_is_told(client: str, name: str) -> None:
    assert outcome(client, RawServer(WHOLE[name])) == (200, b"hello")


@pytest.mark.parametrize("status", [200, 204, 304, 404, 413, 429, 503, 599])
def test_statuses_and_reasons_come_as_they_are(client: str, status: int) -> None:
    head = b"HTTP/1.1 %d As You Like\r\nX-One: 1\r\n" % status
    answer = ask(client, RawServer([head + (b"\r\n" if status in {204, 304} else b"Content-Length: 2\r\n\r\nno")]))
    assert (answer.status, answer.reason, answer.headers["x-one"]) == (status, "As You Like", "1")
    assert answer.body == (b"" if status in {204, 304} else b"no")


BAD: dict[str, Script] = {
    "another protocol": [b"SSH-2.0-OpenSSH_9\r\n", Then.CLOSE],
    "HTTP/2": [b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00@\x00", Then.WAIT],
    "a version of two digits": [PLAIN.replace(b"1.1", b"11.1", 1), Then.CLOSE],
    "a status of four digits": [PLAIN.replace(b"200", b"2000", 1), Then.CLOSE],
    "a status of letters": [PLAIN.replace(b"200", b"two", 1), Then.CLOSE],
    "a switch of protocols": [b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", Then.CLOSE],
    "a length of letters": [OK + b"Content-Length: five\r\n\r\nhello", Then.WAIT],
    "an empty length": [OK + b"Content-Length: \r\n\r\nhello", Then.CLOSE],
    "a negative length": [OK + b"Content-Length: -5\r\n\r\nhello", Then.WAIT],
    "a length with a sign": [OK + b"Content-Length: +5\r\n\r\nhello", Then.WAIT],
    "a length beyond 64 bits": [OK + b"Content-Length: 99999999999999999999\r\n\r\nhello", Then.WAIT],
    "an enormous length": [OK + b"Content-Length: 9999999999999999\r\n\r\nhello", Then.CLOSE],
    "a length that is too long": [OK + b"Content-Length: 6\r\n\r\nhello", Then.CLOSE],
    "two lengths": [OK + b"Content-Length: 5\r\nContent-Length: 4\r\n\r\nhello", Then.WAIT],
    "a list of lengths": [OK + b"Content-Length: 5, 4\r\n\r\nhello", Then.WAIT],
    "no size of a chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", Then.WAIT],
    "a negative size of a chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n", Then.WAIT],
    "an enormous size of a chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\nhello", Then.WAIT],
    "a chunk that is longer": [OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n", Then.WAIT],
    "a chunk that is shorter": [OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nhello\r\n0\r\n\r\n", Then.CLOSE],
    "no last chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Then.CLOSE],
    "no end of the trailer": [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: 1\r\n", Then.CLOSE],
    "no gzip": [sized(b"hello", b"Content-Encoding: gzip")],
    "half of gzip": [sized(ZIPPED[:-6], b"Content-Encoding: gzip")],
    "gzip without its end until the end": [OK + b"Content-Encoding: gzip\r\n\r\n" + ZIPPED[:-1], Then.CLOSE],
    "gzip and more": [sized(ZIPPED + b"hello", b"Content-Encoding: gzip")],
    "half of deflate": [sized(zlib.compress(b"hello")[:-5], b"Content-Encoding: deflate")],
    "a wrong sum": [sized(ZIPPED[:-8] + b"\0\0\0\0" + ZIPPED[-4:], b"Content-Encoding: gzip")],
    "a header without a colon": [OK + b"Content-Length: 5\r\nX\r\n\r\nhello", Then.WAIT],
    "a header with a zero": [OK + b"Content-Length: 5\r\nX: \0\r\n\r\nhello", Then.WAIT],
    "a flood of headers": [OK, *[b"X-Flood: " + b"x" * 4000 + b"\r\n"] * 200, Then.WAIT],
    "a header without an end": [OK + b"X-Flood: ", *[b"x" * 40_000] * 20, Then.WAIT],
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_whole_response_is_broken(client: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert outcome(client, RawServer(BAD[name])) == "Broken"
    assert not caplog.records


PHASES: dict[str, Script] = {
    "before the response": [],
    "in the status line": [b"HTTP/1.1 20"],
    "in the headers": [OK + b"Content-Le"],
    "after the headers": [OK + b"Content-Length: 5\r\n\r\n"],
    "in the body": [OK + b"Content-Length: 5\r\n\r\n", b"hel"],
    "between two chunks": [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"],
    "in a chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel"],
    "in the trailer": [OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: "],
    "after an interim response": [b"HTTP/1.1 100 Continue\r\n\r\n"],
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_connection_that_ends_in_any_phase_is_broken(client: str, phase: str) -> None:
    ends = (Then.CLOSE, Then.RESET)
    assert [outcome(client, RawServer([*PHASES[phase], end])) for end in ends] == ["Broken", "Broken"]


def test_a_reset_is_not_the_end_of_a_body(client: str) -> None:
    head = [b"HTTP/1.0 200 OK\r\n\r\n", b"hello"]
    assert outcome(client, RawServer([*head, Then.CLOSE])) == (200, b"hello")
    if client == "own":  # aiohttp does not tell the one from the other
        assert outcome(client, RawServer([*head, Then.RESET])) == "Broken"


def test_large_bodies_arrive_whole_both_ways(client: str) -> None:
    server = RawServer([sized(LARGE)], [chunked(*[LARGE[i : i + 70_001] for i in range(0, len(LARGE), 70_001)])])

    async def twice(transport: Transport) -> list[bytes]:
        return [(await transport.post(server.url, "/x", LARGE)).body for _ in range(2)]

    assert run(client, server, twice) == [LARGE, LARGE]
    assert [request.partition(b"\r\n\r\n")[2] for request in server.requests] == [LARGE, LARGE]


def test_requests_have_the_same_headers(client: str) -> None:
    server = RawServer([PLAIN], [PLAIN])

    async def post_and_get(transport: Transport) -> None:
        await transport.post(server.url + "?api-version=a b", "/x", b'{"a":1}')
        await transport.get(server.url, "/models", 5)

    run(client, server, post_and_get, headers={"Content-Type": "application/json"})

    post, get = server.requests
    head, _, body = post.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    assert line in {"POST /v1/x?api-version=a%20b HTTP/1.1", "POST /v1/x?api-version=a+b HTTP/1.1"}
    headers = {name.lower(): value for name, value in (each.split(": ") for each in lines)}
    agent = headers.pop("user-agent")
    assert agent.startswith("sdg/")
    assert headers == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "*/*",
        "accept-encoding": "gzip, deflate",
        "authorization": "Bearer k",
        "content-type": "application/json",
        "content-length": "7",
    }
    assert body == b'{"a":1}'
    assert get.startswith(b"GET /v1/models HTTP/1.1\r\n")


def test_a_header_has_one_value_however_its_name_is_written(client: str) -> None:
    server = RawServer([PLAIN])
    given = {"user-agent": "mine", "AUTHORIZATION": "mine", "host": "mine", "accept": "mine"}
    run(client, server, lambda transport: transport.post(server.url, "/x", b"{}"), headers=given)
    lines = server.requests[0].decode().lower().split("\r\n")
    for name in given:
        assert [line for line in lines if line.startswith(f"{name.lower()}:")] == [f"{name.lower()}: mine"]


# ── Connections ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def twice(transport: Transport, server: RawServer) -> list[bytes]:
    return [(await transport.post(server.url, "/x", b"{}")).body for _ in range(2)]


@pytest.mark.parametrize(
    ("first", "connections"),
    [
        (PLAIN, 1),
        (chunked(b"hello"), 1),
        (PLAIN.replace(b"1.1 200", b"1.0 200").replace(b"X-One: 1", b"Connection: keep-alive"), 1),
        (PLAIN.replace(b"X-One: 1", b"Connection: close"), 2),
        (PLAIN.replace(b"1.1", b"1.0", 1), 2),
        (PLAIN + b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nforeign", 2),
    ],
)
def test_a_connection_is_used_again_unless_more_came_or_it_ends(client: str, first: bytes, connections: int) -> None:
    server = RawServer([first], [PLAIN])
    assert run(client, server, lambda transport: twice(transport, server)) == [b"hello", b"hello"]
    assert server.connections == connections


def test_what_comes_unasked_is_not_the_next_response(client: str) -> None:
    foreign = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nforeign"
    server = RawServer([PLAIN, foreign], [PLAIN])

    async def later(transport: Transport) -> bytes:
        assert (await transport.post(server.url, "/x", b"{}")).body == b"hello"
        while not server.done:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        return (await transport.post(server.url, "/x", b"{}")).body

    if client == "own":  # aiohttp would take it for the next response
        assert run(client, server, later) == b"hello"
        assert server.connections == 2


def test_a_connection_that_the_server_has_closed_is_not_used(client: str) -> None:
    server = RawServer([PLAIN, Then.CLOSE], [PLAIN])

    async def later(transport: Transport) -> bytes:
        await transport.post(server.url, "/x", b"{}")
        await server.lost.wait()
        await asyncio.sleep(0.05)
        return (await transport.post(server.url, "/x", b"{}")).body

    assert run(client, server, later) == b"hello"


def test_a_request_on_a_connection_that_ends_just_then_is_broken_and_not_sent_twice(client: str) -> None:
    server = RawServer([PLAIN], [Then.RESET], [PLAIN])

    async def thrice(transport: Transport) -> bytes:
        await transport.post(server.url, "/x", b"{}")
        with pytest.raises(Broken):
            await transport.post(server.url, "/x", b"{}")
        assert len(server.requests) == 2
        return (await transport.post(server.url, "/x", b"{}")).body

    assert run(client, server, thrice) == b"hello"


@pytest.mark.parametrize("sent", [[], [b"HTTP/1.1 200"], [OK + b"Content-Length: 9\r\n\r\nhel"]])
def test_a_canceled_request_leaves_no_connection_that_another_would_use(client: str, sent: list[bytes]) -> None:
    server = RawServer([*sent, Then.WAIT], [PLAIN])

    async def cancel_one(transport: Transport) -> bytes:
        first = asyncio.ensure_future(transport.post(server.url, "/x", b"{}"))
        while not server.requests:
            await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return (await transport.post(server.url, "/x", b"{}")).body

    assert run(client, server, cancel_one) == b"hello"
    assert server.connections == 2


@pytest.mark.parametrize("body", [b"{}", LARGE], ids=["small", "large"])
def test_a_response_before_the_request_was_read_is_received(client: str, body: bytes) -> None:
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    server = RawServer([refused, Then.WAIT], early=True)
    assert outcome(client, server, body=body) == (413, b"no")


@pytest.mark.parametrize("end", [Then.CLOSE, Then.RESET])
def test_a_refusal_is_received_though_the_connection_ends_before_the_request_was_read(client: str, end: Then) -> None:
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    assert outcome(client, RawServer([refused, end], early=True), body=LARGE) in {(413, b"no"), "Broken"}


class Unwilling(RawServer):
    """Accepts connections, and ends them at once, as a forwarded port does without a server behind it."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.early:
            reset(writer)


@pytest.mark.parametrize("early", [False, True], ids=["closed", "reset"])
def test_a_connection_that_ends_as_soon_as_it_is_accepted_is_broken(client: str, early: bool) -> None:
    assert outcome(client, Unwilling(early=early)) == "Broken"


def test_a_connection_whose_request_was_not_read_is_not_used_again(client: str) -> None:
    server = RawServer([b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno", Then.WAIT], [PLAIN], early=True)

    async def twice(transport: Transport) -> list[bytes]:
        return [(await transport.post(server.url, "/x", body)).body for body in (LARGE * 4, b"")]

    assert run(client, server, twice) == [b"no", b"hello"]
    assert server.connections == 2


# ── Time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sent", [[], [b"HTTP/1.1 200"], [OK + b"Content-Length: 9\r\n\r\nhel"]])
def test_no_whole_response_in_time_is_a_time_out(client: str, sent: list[bytes]) -> None:
    assert outcome(client, RawServer([*sent, Then.WAIT]), timeout=0.2) == "TimeoutError"


def test_bytes_that_drip_do_not_prolong_the_time_of_a_request(client: str) -> None:
    drip = [step for _ in range(200) for step in (b"x", 0.02)]
    assert outcome(client, RawServer([OK + b"Content-Length: 1000\r\n\r\n", *drip]), timeout=0.3) == "TimeoutError"


def test_a_server_that_never_reads_is_a_time_out(client: str) -> None:
    assert outcome(client, RawServer(deaf=True), body=LARGE * 4, timeout=0.2) == "TimeoutError"


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def events(*contents: Any) -> list[bytes]:
    """Parts of a completion as server-sent events, each a chunk."""
    lines = [content if isinstance(content, bytes) else json.dumps(content).encode() for content in contents]
    return [b"%x\r\n%b\r\n" % (len(line) + 8, b"data: " + line + b"\n\n") for line in lines]


STREAM = OK + b"Content-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
PARTS = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("It ", "rains.")]
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("kind", [b"text/event-stream", b"text/plain"])
def test_a_stream_is_assembled_whether_it_was_asked_for_or_not(client: str, kind: bytes, asked: bool) -> None:
    head = STREAM.replace(b"text/event-stream", kind)
    server = RawServer([head, *events(*PARTS, LAST, b"[DONE]"), b"0\r\n\r\n"])
    answer = ask(client, server, streamed=asked)
    (choice,) = json.loads(answer.body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It rains.", "stop")


def test_an_error_that_is_sent_as_an_event_keeps_its_status(client: str) -> None:
    head = STREAM.replace(b"200 OK", b"503 Busy")
    answer = ask(client, RawServer([head, *events({"error": {"message": "busy"}}), b"0\r\n\r\n"]), streamed=True)
    assert answer.status == 503


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"])
def test_a_stream_may_begin_with_a_mark_and_lack_its_last_line(client: str, line: bytes, size: int) -> None:
    stream = b"\xef\xbb\xbf" + (line + line).join(b"data: " + json.dumps(event).encode() for event in [*PARTS, LAST])
    pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
    head = STREAM.replace(b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(stream))
    answer = ask(client, RawServer([head, *pieces]), streamed=True)
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "It rains."


@pytest.mark.parametrize("end", [[Then.CLOSE], [Then.RESET], [b"0\r\n\r\n"], [*events(b"[DONE]"), b"0\r\n\r\n"]])
def test_a_stream_that_ends_early_is_broken(client: str, end: list[bytes | Then]) -> None:
    assert outcome(client, RawServer([STREAM, *events(*PARTS), *end]), streamed=True) == "Broken"


MALFORMED: list[Any] = [
    b"{half",
    b"\xff",
    {"choices": ["text"]},
    {"choices": 5},
    {"choices": [{"index": [1], "delta": {}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 10**9, "function": {"name": "f"}}]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": ["call"]}}]},
]


@pytest.mark.parametrize("event", MALFORMED)
def test_a_malformed_event_makes_the_whole_stream_malformed(client: str, event: Any) -> None:
    server = RawServer([STREAM, *events(*PARTS, event, LAST, b"[DONE]"), b"0\r\n\r\n"])
    answer = ask(client, server, streamed=True)
    assert answer.body.startswith(b"an event of the stream is malformed: ")


def test_a_stream_times_out_between_two_pieces(client: str) -> None:
    server = RawServer([STREAM, *events(*PARTS), Then.WAIT])
    assert outcome(client, server, streamed=True, timeout=0.2) == "TimeoutError"


@pytest.mark.slow
def test_a_stream_that_drips_may_take_longer_than_the_time_between_two_pieces(client: str) -> None:
    drip = [step for _ in range(70) for step in (b"1\r\n:\r\n", 0.1)]  # a comment, without its end
    server = RawServer([STREAM, *drip, b"1\r\n\n\r\n", *events(*PARTS, LAST, b"[DONE]"), b"0\r\n\r\n"])
    answer = ask(client, server, streamed=True, timeout=5)
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "It rains."


# ── Addresses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1", f"http://{'a' * 70}.example/v1"),
        *("http://[::1", "http://host:99999", "http://host:port", "ftp://host", "host:80", "http://", ""),
    ],
)
def test_a_host_that_cannot_be_connected_to_is_unreached(client: str, url: str) -> None:
    async def both(transport: Transport) -> None:
        with pytest.raises(Unreached):
            await transport.get(url, "/models", 5)
        with pytest.raises(Unreached):
            await transport.post(url, "/completions", b"{}")

    run(client, RawServer(), both)


def test_a_message_about_a_url_has_no_password(client: str) -> None:
    async def both(transport: Transport) -> list[str]:
        messages = []
        for url in ("http://me:hunter2@127.0.0.1:9/v1", "ftp://me:hunter2@host", "http://me:hunter2@host:port"):
            with pytest.raises(Unreached) as caught:
                await transport.post(url, "/completions", b"{}")
            messages.append(str(caught.value))
        return messages

    assert "hunter2" not in str(run(client, RawServer(), both))


def test_an_ipv6_literal_is_an_address(client: str) -> None:
    server = RawServer([PLAIN], host="::1")
    assert outcome(client, server) == (200, b"hello")
    assert f"\r\nHost: [::1]:{server.port}\r\n".encode() in server.requests[0]


def test_user_and_password_of_a_url_are_sent_instead_of_the_key(client: str) -> None:
    server = RawServer([PLAIN], [PLAIN])

    async def both(transport: Transport) -> None:
        url = server.url.replace("//", "//me:p%40ss@")
        await transport.post(url, "/x", b"{}")
        await transport.get(url, "/models", 5)

    run(client, server, both)

    for request in server.requests:
        assert request.lower().count(b"authorization:") == 1
        assert b"Authorization: Basic bWU6cEBzcw==\r\n" in request
        assert f"Host: 127.0.0.1:{server.port}\r\n".encode() in request


BIG = b"x" * 300_000


def test_large_responses_are_received_one_at_a_time(client: str) -> None:
    """Each is larger than the bound. The store is full from the first response on, and is emptied late."""
    most = 0
    stored: list[int] = []
    server = RawServer(*[[sized(BIG)]] * 20)

    async def post(transport: Transport) -> None:
        nonlocal most
        answer = await transport.post(server.url, "/x", b"{}")
        assert answer.body == BIG
        stored.append(len(BIG))
        most = max(most, sum(stored))

    async def work(transport: Transport) -> None:
        transport.brake.most, transport.brake.unsaved = 200_000, lambda: sum(stored)
        posting = asyncio.gather(*[post(transport) for _ in range(20)])
        while not posting.done():
            await asyncio.sleep(0.02)
            stored.clear()
            transport.brake.look()
        await posting
        assert not transport.brake.on

    run(client, server, work)
    assert most <= 5 * len(BIG)  # those that had come when the brake was put on, and one


@pytest.mark.parametrize("streamed", [True, False])
def test_time_in_which_a_response_is_paused_does_not_count_for_its_time_out(client: str, streamed: bool) -> None:
    server = RawServer([sized(BIG)])

    async def work(transport: Transport) -> bytes:
        transport.brake.most, transport.brake.unsaved = 1, lambda: 2
        progressed = (lambda: None) if streamed else None
        posting = asyncio.create_task(transport.post(server.url, "/x", b"{}", progressed))
        while not transport.brake.on:
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)
        transport.brake.unsaved = int
        transport.brake.look()
        return (await posting).body

    assert run(client, server, work, timeout=0.3) == BIG
