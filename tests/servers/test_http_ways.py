"""The ways to a server that are not plain: TLS, and proxies. The same with both clients."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_server import CLIENTS, RawServer, Then, outcome, run
from test_http import OK, PLAIN

from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.transport import Transport

pytestmark = pytest.mark.parametrize("client", CLIENTS)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of 127.0.0.1, signed by itself."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is missing")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "-", "-out", "-"]
    who = ["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    path.write_bytes(subprocess.run(["openssl", "req", "-x509", *key, *who], check=True, capture_output=True).stdout)
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    """What a server needs."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The certificate is among those that are trusted on this machine."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ssl.create_default_context())  # made on import


@pytest.mark.usefixtures("trusted")
def test_connections_over_tls_are_kept(client: str, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer(*[[PLAIN]] * 6, tls=tls)
    make, made = ssl.create_default_context, []
    monkeypatch.setattr(ssl, "create_default_context", lambda: made.append(1) or make())  # type: ignore[func-returns-value]

    async def twice(transport: Transport) -> list[int]:
        return [
            answer.status
            for _ in range(2)
            for answer in await asyncio.gather(*(transport.post(server.url, "/x", b"{}") for _ in range(3)))
        ]

    assert run(client, server, twice) == [200] * 6
    assert server.connections == 3
    assert len(made) == (client == "own")


@pytest.mark.usefixtures("trusted")
def test_a_body_that_ends_with_the_connection_may_not_be_cut(client: str, tls: ssl.SSLContext) -> None:
    head = [OK + b"\r\n", b"hello"]
    assert outcome(client, RawServer([*head, Then.CLOSE], tls=tls)) == (200, b"hello")
    if client == "own":  # aiohttp does not tell the one from the other
        assert outcome(client, RawServer([*head, Then.CUT], tls=tls)) == "Broken"


def test_a_certificate_that_is_not_trusted_is_unreached(client: str, tls: ssl.SSLContext) -> None:
    server = RawServer([PLAIN], tls=tls)
    assert outcome(client, server) == "Unreached"
    assert server.requests == []


@pytest.mark.usefixtures("trusted")
def test_a_certificate_of_another_host_is_unreached(client: str, tls: ssl.SSLContext) -> None:
    server = RawServer([PLAIN], tls=tls, host="127.0.0.2")
    assert outcome(client, server) == "Unreached"
    assert server.requests == []


class Refusing(RawServer):
    """What a server of HTTP says to a greeting of TLS."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_server_without_tls_is_unreached_by_https(client: str) -> None:
    server = Refusing()

    async def ask(transport: Transport) -> None:
        with pytest.raises(Unreached):
            await transport.post(server.url.replace("http:", "https:"), "/x", b"{}")

    run(client, server, ask)


def test_a_server_with_tls_is_broken_for_http(client: str, tls: ssl.SSLContext) -> None:
    server = RawServer([PLAIN], tls=tls)

    async def ask(transport: Transport) -> None:
        with pytest.raises(Broken):
            await transport.post(server.url.replace("https:", "http:"), "/x", b"{}")

    run(client, server, ask)


# ── Proxies ──────────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS = "http://models.example/v1"


def through(monkeypatch: pytest.MonkeyPatch, client: str, server: RawServer, proxy: str, url: str) -> bytes | str:
    """The body of a response to a request with a proxy in the environment, or the error's name and words."""

    async def ask(transport: Transport) -> bytes | str:
        given = proxy.format(port=server.port)
        monkeypatch.setenv("http_proxy", given)
        monkeypatch.setenv("https_proxy", given)
        try:
            return (await transport.post(url, "/x", b"{}")).body
        except (Broken, Unreached, TimeoutError) as exc:
            return f"{type(exc).__name__}: {exc}"

    result = run(client, server, ask, proxies=True)
    assert isinstance(result, (bytes, str))
    return result


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:{port}", "me:secret@127.0.0.1:{port}/"])
def test_a_proxy_of_the_environment_is_used(client: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer([PLAIN])
    assert through(monkeypatch, client, server, proxy, MODELS) == b"hello"
    (request,) = server.requests
    assert request.startswith(b"POST http://models.example/v1/x HTTP/1.1\r\n")
    assert b"Host: models.example\r\n" in request
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in request
    assert b"Authorization: Bearer k\r\n" in request


@pytest.mark.parametrize("excepted", ["models.example", ".example", "*", "other.example,example"])
def test_hosts_that_need_no_proxy_are_asked_directly(
    client: str, excepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RawServer([PLAIN])
    monkeypatch.setenv("no_proxy", excepted)
    assert str(through(monkeypatch, client, server, "http://127.0.0.1:{port}", MODELS)).startswith("Unreached")
    assert server.requests == []


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "socks4"])
def test_a_proxy_that_is_not_of_http_is_refused_by_name(
    client: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = f"{scheme}://me:secret@127.0.0.1:1080"
    assert through(monkeypatch, client, RawServer(), proxy, MODELS) == (
        f"Unreached: HTTP_PROXY is {scheme}://***@127.0.0.1:1080: only HTTP proxies are supported; "
        "set it to an http:// URL"
    )


def test_a_netrc_does_not_compete_with_the_key(client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = RawServer([PLAIN])
    assert through(monkeypatch, client, server, "http://127.0.0.1:{port}", MODELS) == b"hello"
    assert b"Authorization: Bearer k\r\n" in server.requests[0]


def test_a_proxy_that_refuses_or_is_not_there_is_unreached(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = RawServer([b"HTTP/1.1 407 Who Are You\r\nContent-Length: 0\r\n\r\n"])
    url = MODELS.replace("http:", "https:")
    refusal = through(monkeypatch, client, refusing, "http://me:secret@127.0.0.1:{port}", url)
    assert str(refusal).startswith(f"Unreached: through the proxy http://***@127.0.0.1:{refusing.port}: 407")
    for missing in (url, MODELS):
        words = str(through(monkeypatch, client, RawServer(), "http://127.0.0.1:9", missing))
        assert words.startswith("Unreached: through the proxy http://127.0.0.1:9: ")


class Tunnel(RawServer):
    """A proxy for TLS: connects to whatever it is asked for."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        host, _, port = head.split()[1].decode().partition(":")
        there = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        with contextlib.closing(there[1]):
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        writer.write(data)
    writer.close()


@pytest.mark.usefixtures("trusted")
def test_tls_goes_through_a_tunnel_and_the_proxy_does_not_learn_the_key(
    client: str, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, tunnel = RawServer([PLAIN], [PLAIN], tls=tls), Tunnel()

    async def ask(transport: Transport) -> list[bytes]:
        async with tunnel.serving():
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{tunnel.port}")
            return [(await transport.post(server.url, "/x", b"{}")).body for _ in range(2)]

    assert run(client, server, ask, proxies=True) == [b"hello", b"hello"]
    assert [request.split()[0] for request in tunnel.requests] == [b"CONNECT"]
    assert b"Bearer" not in tunnel.requests[0]
    assert b"Authorization: Bearer k\r\n" in server.requests[0]
