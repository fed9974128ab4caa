"""Xet on loopback for the Hub's buckets: the real library stores into a folder, and reads from copies of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

READ = """
import json, sys
from huggingface_hub.utils._xet import get_xet_session
from hf_xet import XetFileInfo
url, target, size, name = sys.argv[1:]
with get_xet_session().new_file_download_group(
    token_refresh_url=url, token_refresh_headers={}, custom_headers={}
) as group:
    group.start_download_file(XetFileInfo(name, int(size) if size else None), target)
"""


class XetStore:
    """What has been uploaded. The process that uploads has the store open, and others can read only a copy."""

    def __init__(self) -> None:
        self._root = tempfile.TemporaryDirectory(prefix="xet-", ignore_cleanup_errors=True)
        self.folder = Path(self._root.name) / "store"
        self.folder.mkdir()

    def close(self) -> None:
        """Delete everything."""
        self._root.cleanup()

    def add(self, content: bytes) -> str:
        """The hash of some content, which is not stored."""
        import hf_xet

        path = Path(self._root.name) / "hashed"
        path.write_bytes(content)
        return str(hf_xet.hash_files([str(path)])[0].hash)

    @functools.cache  # noqa: B019 - lives as long as the test
    def read(self, name: str) -> bytes:
        """The content with this hash."""
        if set(name) == {"0"}:
            return b""
        with tempfile.TemporaryDirectory(dir=self._root.name) as folder:
            copy, target = Path(folder) / "copy", Path(folder) / "content"
            shutil.copytree(self.folder, copy)
            with _tokens(f"local://{copy}") as url:
                environment = {**os.environ, "HF_HOME": folder}
                subprocess.run(
                    [sys.executable, "-c", READ, url, target, "", name], env=environment, check=True, timeout=60
                )
            return target.read_bytes()


class _tokens:
    """Serves tokens for a store."""

    def __init__(self, store: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps({"casUrl": store, "accessToken": "xet", "exp": int(time.time()) + 3600}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class BucketFile:
    """A file of a bucket, read when it is needed."""

    store: XetStore
    xet_hash: str
    known: bytes | None = None

    @property
    def content(self) -> bytes:
        return self.store.read(self.xet_hash) if self.known is None else self.known

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass
class Bucket:
    id: str
    private: bool = False
    files: dict[str, BucketFile] = field(default_factory=dict)

    def push(self, store: XetStore, path: str, content: bytes) -> None:
        """Add a file as another program would."""
        self.files[path] = BucketFile(store, store.add(content), content)
