"""A real S3 server on loopback (moto's), whose answers a test may replace by the faults that S3 has.

    with FakeS3() as s3:
        s3.behave(lambda request: Fault(503, "SlowDown") if request.method == "PUT" else None)
        ...                                        # requests to s3.url
        assert s3.objects()

Each test has a bucket of its own. Whatever region, key and signature a request has, it is served.
"""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import Output
from werkzeug.serving import WSGIRequestHandler, make_server


@dataclass(frozen=True)
class Request:
    """What the server was asked for."""

    method: str
    path: str  # of the object, with the bucket
    query: str
    headers: dict[str, str]  # by names in lower case


@dataclass(frozen=True)
class Fault:
    """An error as S3 answers it; status 0 drops the connection."""

    status: int
    code: str = ""


DROP = Fault(0)

Behaviour = Callable[[Request], Fault | None]


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class FakeS3:
    """Serves while the context is open."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        import boto3
        from moto.server import DomainDispatcherApplication, create_backend_app

        self.requests: list[Request] = []
        self._behaviour: Behaviour = lambda request: None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="fake-s3", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="tester",
            aws_secret_access_key="unused",
        )
        self.bucket = ""

    def __enter__(self) -> FakeS3:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.shutdown()
        self._server.server_close()

    def begin(self) -> None:
        """A new bucket, and no faults: for the next test."""
        self.behave(lambda request: None)
        self.bucket = f"bucket-{next(self.numbers)}"
        self.client.create_bucket(Bucket=self.bucket)
        self.requests.clear()

    def behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    def uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)

    def objects(self, prefix: str = "") -> list[str]:
        """Names of all objects, empty ones that stand for folders included."""
        answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [entry["Key"] for entry in answer.get("Contents", [])]

    def output(self, prefix: str, folder: Path) -> Output:
        """What lies below a prefix, copied to a folder."""
        for key in (name for name in self.objects(prefix + "/") if not name.endswith("/")):
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
        return Output(folder / prefix)

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith(("HTTP_", "CONTENT_"))
        }
        request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"], headers)
        if "Boto3" not in headers.get("user-agent", ""):  # the test itself is not watched
            self.requests.append(request)
            fault = self._behaviour(request)
            if fault is not None:
                return self._fail(fault, environ, start)
        return self._moto(environ, start)

    def _fail(self, fault: Fault, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if fault == DROP:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            start("200 OK", [])
            return []
        start(f"{fault.status} {fault.code}", [("Content-Type", "application/xml")])
        if environ["REQUEST_METHOD"] == "HEAD":
            return []
        return [f"<Error><Code>{fault.code}</Code><Message>scripted by the test</Message></Error>".encode()]
