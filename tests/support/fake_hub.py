"""A strict Hugging Face Hub on loopback: datasets with a real history of commits, for the real client.

    with FakeHub() as hub:
        hub.tokens["hf_write"] = Rights("alice")
        hub.create("alice/docs")
        hub.fail("commit", status=500, landed=True)
        ...                                        # a client with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1
        assert hub.files("alice/docs")["data/a.parquet"] == content
        assert not hub.errors

What a person does beside the client under test goes through `create`, `push` and `move`, not over HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml
from aiohttp import web
from fake_xet import Bucket, BucketFile, XetStore

ID = r"(?P<repo>[^/]+/[^/]+)"
REV = r"(?P<rev>[^/]+)"
API = f"/api/datasets/{ID}"
PREFIX = r"(?P<path>.+)"
ACCESS = r"(?P<access>read|write)"
TICKET = r"(?P<ticket>[0-9a-f]+)"
ROUTES = [
    (method, re.compile(pattern), operation)
    for method, pattern, operation in [
        ("GET", "/api/whoami-v2", "whoami"),
        ("GET", "/api/agent-[a-z]+", "telemetry"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate"),
        ("GET", f"{API}(?:/revision/{REV})?", "info"),
        ("GET", f"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("POST", f"{API}/preupload/{REV}", "preupload"),
        ("POST", f"/datasets/{ID}\\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", f"/datasets/{ID}\\.git/info/lfs/objects/verify", "lfs_verify"),
        ("PUT", f"/storage/{TICKET}(?:/(?P<part>[0-9]+))?", "lfs_put"),
        ("POST", f"/storage/{TICKET}/complete", "lfs_complete"),
        ("POST", f"{API}/commit/{REV}", "commit"),
        ("GET", f"{API}/tree/{REV}(?:/(?P<path>.+))?", "tree"),
        ("POST", f"{API}/paths-info/{REV}", "paths_info"),
        ("GET", f"{API}/refs", "refs"),
        ("GET", f"{API}/commits/{REV}", "commits"),
        ("HEAD", f"/datasets/{ID}/resolve/{REV}/(?P<path>.+)", "resolve"),
        ("GET", f"/datasets/{ID}/resolve/{REV}/(?P<path>.+)", "resolve"),
        ("POST", f"/api/buckets/{ID}", "bucket_create"),
        ("GET", f"/api/buckets/{ID}", "bucket_info"),
        ("GET", f"/api/buckets/{ID}/tree(?:/{PREFIX})?", "bucket_tree"),
        ("GET", f"/api/buckets/{ID}/xet-{ACCESS}-token", "bucket_token"),
        ("POST", f"/api/buckets/{ID}/batch", "bucket_batch"),
        ("GET", f"/buckets/{ID}/resolve/(?P<path>.+)", "bucket_resolve"),
        ("HEAD", f"/cdn/{ID}/(?P<sha>[0-9a-f]+)", "cdn"),
        ("GET", f"/cdn/{ID}/(?P<sha>[0-9a-f]+)", "cdn"),
    ]
]
SIGNED = {"lfs_put", "lfs_complete", "cdn"}  # their URL is the right; a token has no business there
LFS_JSON = "application/vnd.git-lfs+json"
LFS_SUFFIXES = (".parquet", ".arrow", ".bin", ".gz", ".zst", ".zip", ".npy", ".safetensors", ".tar", ".png", ".jpg")
NO_SUCH_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Rights:
    """Whose token it is, and what it may do; `gated` names the gated repositories that let him in."""

    name: str
    write: bool = True
    orgs: tuple[str, ...] | list[str] = ()
    gated: tuple[str, ...] | list[str] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in {self.name, *self.orgs}


@dataclass(frozen=True)
class Blob:
    """One version of a file, as git names it; `sha256` only if it is an LFS file."""

    content: bytes
    sha256: str | None
    oid: str

    @staticmethod
    def of(content: bytes, lfs: bool) -> Blob:
        if not lfs:
            return Blob(content, None, _git_oid(content))
        sha256 = hashlib.sha256(content).hexdigest()
        return Blob(content, sha256, _git_oid(_pointer(sha256, len(content))))

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def lfs(self) -> dict[str, Any] | None:
        if self.sha256 is None:
            return None
        pointer = _pointer(self.sha256, self.size)
        return {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": len(pointer)}


@dataclass(frozen=True)
class Commit:
    """A commit with all its files; `at` is the hub's clock and `date` the calendar."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, Blob]
    at: float
    date: str

    def below(self, path: str) -> dict[str, Blob]:
        """The file of that name, or all files of that folder."""
        return {name: blob for name, blob in self.files.items() if name == path or name.startswith(path + "/")}


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # by sha256: what was uploaded, committed or not

    def history(self, oid: str | None) -> Iterable[Commit]:
        while oid is not None:
            yield self.commits[oid]
            oid = self.commits[oid].parent


@dataclass
class Fault:
    """What happens to requests in place of the usual, or after it if `landed`; with only a delay, before it."""

    operation: str
    status: int | None = None
    times: int = 1
    after: int = 0  # so many requests pass first
    landed: bool = False
    drop: bool = False  # close the connection without an answer
    delay: float = 0.0
    error: str = "scripted by the test"
    text: str | None = None  # a body that is not JSON
    headers: dict[str, str] = field(default_factory=dict)
    match: str = ""  # only requests with this in their path

    def response(self) -> web.Response:
        assert self.status is not None
        if self.text is not None:
            return web.Response(status=self.status, text=self.text, headers=self.headers)
        return web.json_response({"error": self.error}, status=self.status, headers=self.headers)


class Request(NamedTuple):
    """One request and the status of its answer, 0 if its connection was dropped."""

    method: str
    path: str
    operation: str
    status: int


class Ticket(NamedTuple):
    """An upload that was promised a place."""

    repo: Repo
    oid: str
    size: int
    parts: dict[int, bytes]


@dataclass(frozen=True)
class Call:
    """A request that was understood."""

    operation: str
    method: str
    path: str
    params: dict[str, str | None]
    query: Any
    headers: Any
    body: bytes

    @property
    def rev(self) -> str:
        return self.params.get("rev") or "main"

    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


class Refusal(Exception):
    """An error as the Hub answers it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers: dict[str, str] = more.pop("headers", {})
        self.more = more

    def response(self) -> web.Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {}) | self.headers
        return web.json_response({"error": self.message, **self.more}, status=self.status, headers=headers)


class FakeHub:
    """Starts on entering and stops on leaving; `stop` and `start` in between are an outage."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.tokens: dict[str, Rights] = {}
        self.repos: dict[str, Repo] = {}
        self.buckets: dict[str, Bucket] = {}
        self.xet = XetStore()
        self.requests: list[Request] = []
        self.errors: list[Any] = []  # mistakes of the hub, and what a right client would never send
        self.down = False  # drop every connection
        self.before_commit: Callable[[str], Any] | None = None  # gets the repository's id; under the lock: no requests
        self.page_size = 1000
        self.part_bytes: int | None = None  # larger LFS files go up in parts
        self.lfs_bytes = 10_000_000  # larger files are LFS files whatever their name
        self.max_operations: int | None = None
        self.commits_per_hour: int | None = None
        self.hour = 3600.0
        self.clock: Callable[[], float] = time.monotonic
        self.lag = 0.0  # seconds for which a branch is read as it was
        self.quota_bytes: int | None = None  # for each namespace
        self.gate = {"resolve", "auth_check"}  # what a gated repository refuses to strangers
        self.lock = threading.RLock()
        self.port = 0
        self._faults: list[Fault] = []
        self._committed: deque[float] = deque()
        self._tickets: dict[str, Ticket] = {}
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-hub", daemon=True)

    # -- what tests use

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def environment(self, folder: Path, token: str | None = None) -> dict[str, str]:
        """What a process needs to take this for the Hub, with a home of its own in a folder."""
        plain = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return plain | {"HF_HOME": str(folder / "hf-home")} | ({"HF_TOKEN": token} if token else {})

    def fail(self, operation: str, **fault: Any) -> Fault:
        """Let requests of an operation fail: see `Fault`; `times` of them after the first `after`."""
        assert operation in {name for _, _, name in ROUTES}, operation
        with self.lock:
            self._faults.append(Fault(operation, **fault))
            return self._faults[-1]

    def forget_faults(self) -> None:
        """Let nothing fail any more."""
        with self.lock:
            self._faults.clear()

    @property
    def counts(self) -> Counter[str]:
        """How many requests there were of each operation."""
        return Counter(request.operation for request in self.requests)

    def statuses(self, operation: str) -> list[int]:
        return [request.status for request in self.requests if request.operation == operation]

    def forget(self) -> None:
        """Start a new recording."""
        self.requests = []

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> str:
        """A new dataset has one commit already."""
        with self.lock:
            assert repo_id not in self.repos
            self.repos[repo_id] = Repo(repo_id, private, gated)
            return self.push(repo_id, {".gitattributes": _git_attributes()}, message="initial commit")

    def push(self, repo_id: str, files: dict[str, Any], revision: str = "main", message: str = "by hand") -> str:
        """Commit as a person would, None deleting a file; a new revision begins without files and without a past."""
        with self.lock:
            repo = self.repos[repo_id]
            tree = self._tree_of(repo, revision)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                else:
                    tree[path] = Blob.of(content, self._is_lfs(path, len(content), content[:512]))
            return self._apply(repo, revision, tree, message, "", repo_id.split("/")[0]).oid

    def move(self, repo_id: str, revision: str, oid: str | None) -> None:
        """Let a ref name another commit, or delete it."""
        with self.lock:
            repo = self.repos[repo_id]
            if oid is None:
                del repo.refs[_ref(revision)]
            else:
                repo.refs[_ref(revision)] = repo.commits[oid].oid

    def head(self, repo_id: str, revision: str = "main") -> str:
        return self.repos[repo_id].refs[_ref(revision)]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            repo = self.repos[repo_id]
            return {path: blob.content for path, blob in self._find(repo, revision, now=True).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The newest last."""
        with self.lock:
            repo = self.repos[repo_id]
            return list(repo.history(self._find(repo, revision, now=True).oid))[::-1]

    # -- life

    def __enter__(self) -> FakeHub:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.xet.close()

    def start(self) -> None:
        self._call(self._start())

    def stop(self) -> None:
        """End at once: open connections are reset, new ones are refused."""
        self._call(self._stop())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port, reuse_address=True, backlog=1024)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        for site in list(runner.sites):
            await site.stop()
        await asyncio.sleep(0.02)  # connections that the kernel has accepted already get their transports now
        if runner.server is not None:
            for connection in runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await runner.cleanup()
        await asyncio.sleep(0.02)  # aborted transports close their sockets in the loop's next turns

    # -- requests

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """A request that came whole is worked on to its end, whether or not its client still lives."""
        path = request.raw_path.partition("?")[0]
        operation, params = _route(request.method, path)
        response: web.Response | None = None
        fault = self._next_fault(operation, path)
        if not self.down:
            try:
                body = await request.read()
            except (web.RequestPayloadError, OSError):  # its client is gone
                return self._answered(request, operation, None)
            call = Call(operation, request.method, path, params, request.query, request.headers, body)
            await self._sleep(0 if fault.landed else fault.delay)
            if fault.landed or not (fault.status or fault.drop):
                response = self._answer(call)
            await self._sleep(fault.delay if fault.landed else 0)
            if fault.status and (response is None or response.status < 400):  # what was refused has not landed
                response = fault.response()
        return self._answered(request, operation, None if fault.drop or self.down else response)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the server, which waits for those who are at work."""
        until = time.monotonic() + seconds
        while self._runner and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))

    def _answered(self, request: web.Request, operation: str, response: web.Response | None) -> web.Response:
        status = response.status if response is not None else 0
        self.requests.append(Request(request.method, request.raw_path, operation, status))
        if response is not None:
            return response
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    def _next_fault(self, operation: str, path: str) -> Fault:
        with self.lock:
            for fault in self._faults:
                if fault.operation != operation or fault.match not in unquote(path) or self.down:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault(operation)

    def _answer(self, call: Call) -> web.Response:
        try:
            with self.lock:
                if call.operation in SIGNED and "Authorization" in call.headers:
                    self.errors.append(f"a token was sent to {call.path}")
                response = getattr(self, f"_{call.operation}")(call)
                assert isinstance(response, web.Response)
                return response
        except Refusal as refusal:
            return refusal.response()
        except Exception as error:
            self.errors.append(error)
            return web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)

    def _violation(self, message: str, status: int = 400) -> Refusal:
        """The answer to something that a right client never sends."""
        self.errors.append(message)
        return Refusal(status, message)

    def _unknown(self, call: Call) -> web.Response:
        raise self._violation(f"no route: {call.method} {call.path}", 404)

    def _telemetry(self, call: Call) -> web.Response:
        """What the client asks for the sake of its user agent, and does without."""
        raise Refusal(404, "Not found")

    # -- rights

    def _who(self, call: Call) -> Rights | None:
        header = call.headers.get("Authorization")
        if header is None:
            return None
        rights = self.tokens.get(header.removeprefix("Bearer "))
        if rights is None:
            raise Refusal(401, NO_SUCH_TOKEN)
        return rights

    def _writer(self, call: Call) -> Rights:
        rights = self._who(call)
        if rights is None:
            raise self._violation(f"{call.operation} without a token", 401)
        return rights

    def _open(self, call: Call, write: bool = False) -> Repo:
        """The repository, if this token may read it, or write to it."""
        rights = self._writer(call) if write else self._who(call)
        name = call.params["repo"]
        repo = self.repos.get(name) if name else None
        own = rights is not None and repo is not None and rights.owns(repo.id)
        if repo is None or (repo.private and not own):
            if rights is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repo.gated and not own and call.operation in self.gate:
            if rights is None:
                raise Refusal(401, f"Access to dataset {repo.id} is restricted. Please log in.", "GatedRepo")
            if repo.id not in rights.gated:
                raise Refusal(403, f"Access to dataset {repo.id} is restricted: not authorized.", "GatedRepo")
        if write and not (own and rights is not None and rights.write):
            raise Refusal(403, "Forbidden: you don't have the required permissions to write to this repository")
        return repo

    def _whoami(self, call: Call) -> web.Response:
        rights = self._writer(call)
        role = "write" if rights.write else "read"
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in rights.orgs]
        token = {"displayName": "test", "role": role, "createdAt": _now()}
        auth = {"type": "access_token", "accessToken": token}
        return web.json_response({"type": "user", "name": rights.name, "fullname": "", "orgs": orgs, "auth": auth})

    def _auth_check(self, call: Call) -> web.Response:
        self._open(call, write=call.params["write"] is not None)
        return web.json_response({})

    # -- repositories

    def _create(self, call: Call) -> web.Response:
        rights, asked = self._writer(call), call.json()
        if asked.get("type") != "dataset":
            raise self._violation(f"the type of the repository is {asked.get('type')!r}")
        repo_id = f"{asked.get('organization') or rights.name}/{asked['name']}"
        if not rights.write or not rights.owns(repo_id):
            namespace = repo_id.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a dataset under the namespace "{namespace}"')
        url = f"{self.url}/datasets/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "You already created this dataset repo", url=url)
        self.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return web.json_response({"url": url, "name": repo_id, "id": repo_id})

    def _validate(self, call: Call) -> web.Response:
        errors, warnings = _check_card(call.json()["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return web.json_response(answer, status=400 if errors else 200)

    def _info(self, call: Call) -> web.Response:
        repo = self._open(call)
        commit = self._find(repo, call.rev)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if call.query.get("blobs") == "true":
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"size": blob.size, "blobId": blob.oid} | ({"lfs": blob.lfs} if blob.lfs else {})
        readme = commit.files.get("README.md")
        info = {
            "author": repo.id.split("/")[0],
            "cardData": _card(readme.content.decode())[0] if readme else None,
            "createdAt": next(iter(repo.commits.values())).date,
            "disabled": False,
            "downloads": 0,
            "gated": "manual" if repo.gated else False,
            "lastModified": commit.date,
            "likes": 0,
            "private": repo.private,
            "sha": commit.oid,
            "siblings": siblings,
            "tags": [],
        }
        expand = call.query.getall("expand", list(info))
        if unknown := set(expand) - set(info):
            raise self._violation(f"cannot expand {sorted(unknown)}")
        wanted = {key: info[key] for key in expand if info[key] is not None}
        return web.json_response({"_id": _git_oid(repo.id.encode())[:24], "id": repo.id, **wanted})

    def _refs(self, call: Call) -> web.Response:
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        prefixes = {"refs/heads/": "branches", "refs/convert/": "converts", "refs/tags/": "tags"}
        for ref, oid in self._open(call).refs.items():
            for prefix, kind in prefixes.items():
                if ref.startswith(prefix):
                    kinds[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return web.json_response(kinds)

    def _commits(self, call: Call) -> web.Response:
        repo = self._open(call)
        found = [
            {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            | {"authors": [{"user": commit.author}]}
            for commit in repo.history(self._find(repo, call.rev).oid)
        ]
        return self._paged(call, found)

    # -- uploads

    def _is_lfs(self, path: str, size: int, sample: bytes) -> bool:
        return size > self.lfs_bytes or path.endswith(LFS_SUFFIXES) or b"\0" in sample

    def _preupload(self, call: Call) -> web.Response:
        repo = self._open(call, write=True)
        files = self._find(repo, call.rev, now=True).files
        asked = call.json()["files"]
        if len(asked) > 256:
            raise self._violation(f"preupload of {len(asked)} files, more than 256")
        answers = []
        for file in asked:
            path, sample = file["path"], base64.b64decode(file["sample"], validate=True)
            if len(sample) != min(file["size"], 512):
                raise self._violation(f"preupload of {path}: a sample of {len(sample)} bytes")
            mode = "lfs" if self._is_lfs(path, file["size"], sample) else "regular"
            blob = files.get(path)
            oid = {"oid": blob.sha256 or blob.oid} if blob else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return web.json_response({"files": answers})

    def _lfs_batch(self, call: Call) -> web.Response:
        repo, asked = self._open(call, write=True), call.json()
        if asked["operation"] != "upload" or asked.get("hash_algo") != "sha256" or "basic" not in asked["transfers"]:
            raise self._violation("an LFS batch that is not an upload by sha256")
        if LFS_JSON not in (call.headers.get("Accept"), call.headers.get("Content-Type")):
            raise self._violation("an LFS batch without its media type")
        new = {item["oid"]: item["size"] for item in asked["objects"] if item["oid"] not in repo.lfs}
        self._check_quota(repo, sum(new.values()))
        objects = []
        for item in asked["objects"]:
            known = item["oid"] not in new
            objects.append(item if known else item | {"actions": self._upload_actions(repo, item["oid"], item["size"])})
        return web.Response(text=json.dumps({"transfer": "basic", "objects": objects}), content_type=LFS_JSON)

    def _upload_actions(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        ticket = _git_oid(f"{len(self._tickets)} {repo.id} {oid}".encode())
        self._tickets[ticket] = Ticket(repo, oid, size, {})
        href = f"{self.url}/storage/{ticket}"
        verify = {"href": f"{self.url}/datasets/{repo.id}.git/info/lfs/objects/verify"}
        if self.part_bytes is None or size <= self.part_bytes:
            return {"upload": {"href": href}, "verify": verify}
        parts = {str(part): f"{href}/{part}" for part in range(1, -(-size // self.part_bytes) + 1)}
        return {"upload": {"href": f"{href}/complete", "header": {"chunk_size": str(self.part_bytes), **parts}}}

    def _ticket(self, call: Call) -> Ticket:
        ticket = self._tickets.get(call.params["ticket"] or "")
        if ticket is None:
            raise self._violation("an upload without a signature", 403)
        return ticket

    def _store(self, ticket: Ticket, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != ticket.oid or len(content) != ticket.size:
            raise self._violation(f"the upload of {ticket.oid} has another sha256 or size")
        ticket.repo.lfs[ticket.oid] = content

    def _lfs_put(self, call: Call) -> web.Response:
        ticket, part = self._ticket(call), call.params["part"]
        if part is None:
            self._store(ticket, call.body)
        else:
            ticket.parts[int(part)] = call.body
        return web.Response(headers={"ETag": _etag(call.body)})

    def _lfs_complete(self, call: Call) -> web.Response:
        ticket, asked = self._ticket(call), call.json()
        parts = [{"partNumber": n, "etag": _etag(ticket.parts[n])} for n in sorted(ticket.parts)]
        if asked != {"oid": ticket.oid, "parts": parts}:
            raise self._violation(f"the parts of {ticket.oid} are not those that were uploaded")
        self._store(ticket, b"".join(ticket.parts[n] for n in sorted(ticket.parts)))
        return web.json_response({})

    def _lfs_verify(self, call: Call) -> web.Response:
        repo, asked = self._open(call, write=True), call.json()
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise self._violation(f"{asked['oid']} was not uploaded", 404)
        return web.json_response({})

    def _check_quota(self, repo: Repo, more: int) -> None:
        """LFS objects are what counts, committed or not, in all repositories of the namespace."""
        others = [other for other in self.repos.values() if other.id.split("/")[0] == repo.id.split("/")[0]]
        stored = sum(len(content) for other in others for content in other.lfs.values())
        if self.quota_bytes is not None and stored + more > self.quota_bytes:
            raise Refusal(403, "Private repository storage limit reached, please upgrade your plan to increase it")

    # -- buckets

    def _bucket(self, call: Call, write: bool = False) -> Bucket:
        rights = self._writer(call) if write else self._who(call)
        name = call.params["repo"] or ""
        bucket = self.buckets.get(name)
        own = rights is not None and rights.owns(name)
        if bucket is None or (bucket.private and not own):
            raise Refusal(404, "Bucket not found", "RepoNotFound")
        if write and not (own and rights is not None and rights.write):
            raise Refusal(403, "Forbidden: you don't have the required permissions to write to this bucket")
        return bucket

    def _bucket_create(self, call: Call) -> web.Response:
        rights, name = self._writer(call), call.params["repo"] or ""
        if not rights.write or not rights.owns(name):
            raise Refusal(403, "You don't have the rights to create a bucket under this namespace")
        url = f"{self.url}/buckets/{name}"
        if name in self.buckets:
            raise Refusal(409, "You already created this bucket", url=url)
        self.buckets[name] = Bucket(name, call.json().get("visibility") == "private")
        return web.json_response({"url": url, "name": name, "id": name})

    def _bucket_info(self, call: Call) -> web.Response:
        bucket = self._bucket(call)
        sizes = [file.size for file in bucket.files.values()]
        info = {"id": bucket.id, "private": bucket.private, "createdAt": _now(), "size": sum(sizes)}
        return web.json_response({**info, "totalFiles": len(sizes)})

    def _bucket_tree(self, call: Call) -> web.Response:
        bucket, prefix = self._bucket(call), call.params["path"] or ""
        items: list[Any] = [
            {"type": "file", "path": path, "size": file.size, "xetHash": file.xet_hash, "mtime": _now()}
            for path, file in sorted(bucket.files.items())
            if path.startswith(prefix)
        ]
        if call.query.get("recursive", "").lower() != "true":  # as `HfFileSystem` asks
            root = f"{prefix.rstrip('/')}/" if prefix else ""
            deeper = {item["path"]: item["path"][len(root) :].partition("/") for item in items}
            folders = sorted({root + name for name, slash, _ in deeper.values() if slash})
            items = [item for item in items if not deeper[item["path"]][1]]
            items += [{"type": "directory", "path": folder, "uploadedAt": _now()} for folder in folders]
        return self._paged(call, items)

    def _bucket_token(self, call: Call) -> web.Response:
        self._bucket(call, write=call.params["access"] == "write")
        token = {"casUrl": f"local://{self.xet.folder}", "accessToken": "xet", "exp": int(time.time()) + 3600}
        return web.json_response(token)

    def _bucket_batch(self, call: Call) -> web.Response:
        bucket, failed = self._bucket(call, write=True), []
        for line in call.body.splitlines():
            operation = json.loads(line)
            if operation["type"] == "addFile":
                bucket.files[operation["path"]] = BucketFile(self.xet, operation["xetHash"])
            elif operation["type"] == "deleteFile" and bucket.files.pop(operation["path"], None) is None:
                failed.append({"path": operation["path"], "error": "not found"})
        return web.json_response({"success": not failed, "failed": failed})

    def _bucket_resolve(self, call: Call) -> web.Response:
        file = self._bucket(call).files.get(call.params["path"] or "")
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return _ranged(call, file.content, {"ETag": f'"{file.xet_hash}"', "Accept-Ranges": "bytes"})

    # -- commits

    def _commit(self, call: Call) -> web.Response:
        repo = self._open(call, write=True)
        if call.headers.get("Content-Type") != "application/x-ndjson" or call.query:
            raise self._violation("a commit that is not x-ndjson, or with a query")
        header, *operations = [json.loads(line) for line in call.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise self._violation("a commit without a header")
        if self.max_operations is not None and len(operations) > self.max_operations:
            raise Refusal(413, f"Too many operations: {len(operations)} > {self.max_operations}")
        if self.before_commit is not None:
            self.before_commit(repo.id)
        self._check_rate()
        if _ref(call.rev) not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {call.rev}", "RevisionNotFound")
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.refs[_ref(call.rev)]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree = self._tree_of(repo, call.rev)
        for operation in operations:
            self._operate(repo, tree, operation["key"], operation["value"])
        title, message = header["value"]["summary"], header["value"].get("description", "")
        commit = self._apply(repo, call.rev, tree, title, message, self._writer(call).name)
        self._committed.append(self.clock())
        url = f"{self.url}/datasets/{repo.id}/commit/{commit.oid}"
        return web.json_response({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _operate(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key in {"deletedFile", "deletedFolder"}:
            folder = path.rstrip("/") + "/"
            gone = [name for name in tree if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]
            return
        parts = path.split("/")
        if any(part in {"", ".", "..", ".git"} for part in parts):
            raise self._violation(f"{path!r} is not a path")
        folders = {"/".join(parts[:n]) for n in range(1, len(parts))}
        if folders & tree.keys() or any(name.startswith(path + "/") for name in tree):
            raise Refusal(400, f"{path} is both a file and a folder")
        if key == "lfsFile":
            content = repo.lfs.get(value["oid"])
            if value["algo"] != "sha256" or content is None or value.get("size", len(content)) != len(content):
                raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
            tree[path] = Blob.of(content, lfs=True)
        elif key == "file" and value["encoding"] == "base64":
            content = base64.b64decode(value["content"], validate=True)
            if content and self._is_lfs(path, len(content), content[:512]):
                raise self._violation(f"{path} is committed as a regular file, and should be an LFS file")
            if path == "README.md" and (errors := _check_card(content.decode())[0]):
                raise Refusal(400, f"Invalid metadata in README.md: {errors}")
            tree[path] = Blob.of(content, lfs=False)
        else:
            raise self._violation(f"an unknown operation in a commit: {key}")

    def _check_rate(self) -> None:
        """The 429 of too many commits says that there are API requests left: those are another limit's."""
        now = self.clock()
        while self._committed and self._committed[0] <= now - self.hour:
            self._committed.popleft()
        if self.commits_per_hour is None or len(self._committed) < self.commits_per_hour:
            return
        wait = _in_words(self._committed[0] + self.hour - now)
        raise Refusal(
            429,
            f"You have exceeded the rate limit for repository commits ({self.commits_per_hour} per hour). You can retry"
            f" this action in {wait}. If you are doing a large number of operations, please consider grouping them.",
            headers={"RateLimit": '"api";r=990;t=200', "RateLimit-Policy": '"fixed window";"api";q=1000;w=300'},
        )

    def _apply(self, repo: Repo, revision: str, tree: dict[str, Blob], title: str, message: str, author: str) -> Commit:
        parent = repo.refs.get(_ref(revision))
        names = sorted((path, blob.oid) for path, blob in tree.items())
        oid = _git_oid(json.dumps([len(repo.commits), repo.id, parent, title, message, names]).encode())
        commit = Commit(oid, parent, title, message, author, tree, self.clock(), _now())
        repo.commits[oid] = commit
        repo.refs[_ref(revision)] = oid
        repo.lfs.update({blob.sha256: blob.content for blob in tree.values() if blob.sha256})
        return commit

    # -- reading

    def _tree_of(self, repo: Repo, revision: str) -> dict[str, Blob]:
        """A copy of the files of a branch, none if there is no such branch."""
        oid = repo.refs.get(_ref(revision))
        return dict(repo.commits[oid].files) if oid else {}

    def _find(self, repo: Repo, revision: str, now: bool = False) -> Commit:
        """The commit of a branch, a tag, a ref or a sha; of a branch an older one, while readers lag behind."""
        if revision in repo.commits:
            return repo.commits[revision]
        oid = repo.refs.get(_ref(revision)) or repo.refs.get(f"refs/tags/{revision}")
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repo.commits[oid]
        while not now and commit.parent and commit.at + self.lag > self.clock():
            commit = repo.commits[commit.parent]
        return commit

    def _entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        blob = commit.files.get(path)
        if blob is not None:
            entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            entry |= {"lfs": blob.lfs} if blob.lfs else {}
        else:
            names = sorted((name, below.oid) for name, below in commit.below(path).items())
            entry = {"type": "directory", "oid": _git_oid(json.dumps(names).encode()), "size": 0, "path": path}
        if expand:
            last = commit
            while last.parent and repo.commits[last.parent].below(path) == last.below(path):
                last = repo.commits[last.parent]
            entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return entry

    def _tree(self, call: Call) -> web.Response:
        repo = self._open(call)
        commit, folder = self._find(repo, call.rev), call.params["path"]
        recursive = call.query.get("recursive") == "true"
        prefix = f"{folder}/" if folder else ""
        paths = set()
        for path in commit.files:
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                deepest = len(parts) if recursive else 1
                paths |= {prefix + "/".join(parts[:depth]) for depth in range(1, deepest + 1)}
        if folder and not paths:
            raise Refusal(404, f'{folder} does not exist on "{call.rev}"', "EntryNotFound")
        expand = call.query.get("expand") == "true"
        return self._paged(call, [self._entry(repo, commit, path, expand) for path in sorted(paths)])

    def _paged(self, call: Call, items: list[dict[str, Any]]) -> web.Response:
        cursor = int(call.query.get("cursor", "0"))
        end = cursor + self.page_size
        headers = {}
        if end < len(items):
            query = urlencode({**call.query, "cursor": end})
            headers["Link"] = f'<{self.url}{call.path}?{query}>; rel="next"'
        return web.json_response(items[cursor:end], headers=headers)

    def _paths_info(self, call: Call) -> web.Response:
        repo = self._open(call)
        commit, form = self._find(repo, call.rev), parse_qs(call.body.decode(), strict_parsing=True)
        found = [path for path in dict.fromkeys(form["paths"]) if commit.below(path)]
        expand = form.get("expand") == ["true"]
        return web.json_response([self._entry(repo, commit, path, expand) for path in found])

    def _resolve(self, call: Call) -> web.Response:
        repo = self._open(call)
        commit = self._find(repo, call.rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(call.params["path"] or "")
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        headers["ETag"] = f'"{blob.sha256 or blob.oid}"'
        if blob.sha256 is None:
            return _ranged(call, blob.content, headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        # Another host by its name, so that the client comes as it does to the real one: without its token.
        host = "localhost" if self.host == "127.0.0.1" else self.host
        headers["Location"] = f"http://{host}:{self.port}/cdn/{quote(repo.id)}/{blob.sha256}"
        return web.Response(status=302, headers=headers)

    def _cdn(self, call: Call) -> web.Response:
        content = self.repos[call.params["repo"] or ""].lfs[call.params["sha"] or ""]
        return _ranged(call, content, {"ETag": f'"{call.params["sha"]}"', "Accept-Ranges": "bytes"})


def _route(method: str, path: str) -> tuple[str, dict[str, str | None]]:
    for its_method, pattern, operation in ROUTES:
        match = pattern.fullmatch(path)
        if match and its_method == method:
            return operation, {name: value and unquote(value) for name, value in match.groupdict().items()}
    return "unknown", {}


def _ref(revision: str) -> str:
    return revision if revision.startswith("refs/") else f"refs/heads/{revision}"


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_attributes() -> bytes:
    return "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _in_words(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 3000 else "about 1 hour"


def _card(readme: str) -> tuple[Any, str | None]:
    """The metadata at the top of a README.md, and what is wrong with them."""
    match = re.match(r"---\r?\n(.*?)\r?\n?---(\r?\n|$)", readme, re.DOTALL)
    try:
        return (yaml.safe_load(match[1]) if match else None), None
    except yaml.YAMLError as error:
        return None, str(error)


def _check_card(readme: str) -> tuple[list[str], list[str]]:
    """Errors and warnings."""
    card, error = _card(readme)
    if error is not None:
        return [error], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["the metadata must be an object"], []
    configs = card.get("configs", [])
    if not isinstance(configs, list) or not all(isinstance(c, dict) and "config_name" in c for c in configs):
        return ['"configs" must be an array of objects with a "config_name"'], []
    return [], []


def _ranged(call: Call, content: bytes, headers: dict[str, str]) -> web.Response:
    wanted = call.headers.get("Range")
    if wanted is None:
        return web.Response(body=content, headers=headers, content_type="application/octet-stream")
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    assert match, f"not a range: {wanted}"
    first, last = match.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
    return web.Response(status=206, body=content[start:end], headers=headers, content_type="application/octet-stream")
