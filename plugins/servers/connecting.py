"""From what a server plugin yielded to a client: which API roots respond, and which model to ask for.

With --model the list of models is a hint, never a gate: hosted providers guard it otherwise than the API, list other
names than they serve, or have none. The first requests say what is wrong, in the server's own words.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import functools
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from multidict import CIMultiDict

import sdg
from sdg_plugins.common.secrets import Secrets, secrets_of
from sdg_plugins.servers.client import Client
from sdg_plugins.servers.http1 import Broken, Http1, Unreached
from sdg_plugins.servers.load import watch_load
from sdg_plugins.servers.pool import Pace, Pool
from sdg_plugins.servers.refusals import doubt_about_key
from sdg_plugins.servers.responses import error_text, read_json
from sdg_plugins.servers.transport import Answer, Transport, redirected

SPARE_FILES = 256  # open files beside one for each request in flight
SWITCH = "SDG_HTTP"  # environment variable: `aiohttp` sends all requests through it, for comparison
LOCAL = re.compile(r"https?://([^/]*@)?(127\.|localhost\b|\[::1\])")  # needs no proxy, whatever the others need
LIST_TIMEOUT = 60.0  # s for a list of models
MISSING = {301, 302, 303, 307, 308, 404, 405, 410}  # statuses of a root that is another one


class Link:
    """The way to some servers: connections, and a pool of slots for requests.

    Args:
        transport: sends bytes over HTTP.
        pool: the servers.
        run: that has connected.
        doubt: what speaks against the model, before anything was asked.
    """

    def __init__(self, transport: Transport, pool: Pool, run: sdg.Run, doubt: str) -> None:
        self._transport, self._pool, self._run, self._doubt = transport, pool, run, doubt

    def client(self, run: sdg.Run) -> Client:
        """A client for a run; settles `run.model`."""
        run.model, self._run = self._run.model, run
        return Client(self._transport, self._pool, run, self._doubt)

    def counts(self) -> Counter[str]:
        """The counts of the run that has come last."""
        return self._run.counts


class Connections:
    """Connects the jobs of a process: those with the same servers and limits share connections and slots.

    As many requests are in flight as if there was one job, and quotas are kept by all of them together.
    """

    def __init__(self) -> None:
        self._links: dict[object, Link] = {}
        self._stack, self._turn = contextlib.AsyncExitStack(), asyncio.Lock()

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._links.clear()
        await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def connect(self, run: sdg.Run, servers: Sequence[str | sdg.Upstream]) -> AsyncIterator[Client]:
        """See the function `connect`."""
        key = (id(servers), *limits_of(run.options))
        async with self._turn:
            if key not in self._links:
                self._links[key] = await self._stack.enter_async_context(linked(run, servers))
        yield self._links[key].client(run)


def limits_of(options: argparse.Namespace) -> tuple[object, ...]:
    """What jobs have in common that share the slots of a pool, beside the servers."""
    return (
        *(options.model, options.max_concurrent_generations, options.request_timeout),
        *(options.requests_per_minute, options.tokens_per_minute),
        *(options.api_key_env, str(options.header_env)),
    )


@contextlib.asynccontextmanager
async def connect(run: sdg.Run, servers: Sequence[str | sdg.Upstream]) -> AsyncIterator[Client]:
    """A client of the servers that a plugin yielded; settles `run.model`.

    Launched servers may still be loading, if the model's name is known.

    Raises:
        ServerError: a server cannot be reached, rejects the key, or does not serve the model.
    """
    async with linked(run, servers) as link:
        yield link.client(run)


@contextlib.asynccontextmanager
async def linked(run: sdg.Run, servers: Sequence[str | sdg.Upstream]) -> AsyncIterator[Link]:
    """The way to the servers that a plugin yielded; see `connect`."""
    options = run.options
    limit = limit_of_files(options.max_concurrent_generations)
    headers = headers_of(run)
    async with contextlib.AsyncExitStack() as stack:
        lean = None
        if os.environ.get(SWITCH, "lean") != "aiohttp":
            source = options.part.source if options.part else ""
            lean = await stack.enter_async_context(Http1(headers, options.request_timeout, source).working())
        transport = Transport(headers, options.request_timeout, lean, lambda url: not LOCAL.match(url))
        stack.push_async_callback(transport.aclose)
        upstreams, doubt = await find_upstreams(run, transport, servers)
        pool = Pool(upstreams, limit, Pace(options.requests_per_minute, options.tokens_per_minute))
        for upstream in pool.upstreams:
            upstream.model = run.model
        link = Link(transport, pool, run, doubt)
        async with watch_load(transport, pool, link.counts):
            yield link


def headers_of(run: sdg.Run) -> CIMultiDict[str]:
    """The headers of all requests. Raises UsageError if one is invalid, or the variable that holds it is missing."""
    key = os.environ.get(run.options.api_key_env, "").strip()
    headers = CIMultiDict({"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
    variables = {"Authorization": run.options.api_key_env}
    for name, variable in dict(run.options.header_env or []).items():
        headers[name], variables[name] = os.environ.get(variable, "").strip(), variable
        if not headers[name]:
            raise sdg.UsageError(f"--header-env {name}={variable}: the environment variable {variable} is not set")
    for name, variable in variables.items():
        if re.search(r"[^\t -~]", headers.get(name, "")):
            raise sdg.UsageError(f"${variable} has a character that no header may have: copy it again")
    return headers


async def find_upstreams(
    run: sdg.Run, transport: Transport, servers: Sequence[str | sdg.Upstream]
) -> tuple[list[sdg.Upstream], str]:
    """The servers, each with its API root, and what speaks against the model; settles `run.model`."""
    launched = [server for server in servers if isinstance(server, sdg.Upstream)]
    known = [server.model for server in launched if server.model]
    if len(known) == len(servers):
        run.model = known[0]
        return launched, ""
    for upstream in launched:
        await upstream.up.wait()
    urls = [server if isinstance(server, str) else server.url for server in servers]
    roots, served = await find_roots(run, transport, urls)
    run.model = choose_model(run.options.model, served)
    upstreams = [
        server if isinstance(server, sdg.Upstream) else sdg.Upstream(root)
        for server, root in zip(servers, roots, strict=True)
    ]
    doubt = "" if run.model in served or not served else unlisted(run.model, served)
    return upstreams, doubt


class Found(NamedTuple):
    """What a base URL stands for: the API's root, and the models in its list; None if it has none."""

    root: str
    models: list[str] | None


async def find_roots(run: sdg.Run, transport: Transport, urls: list[str]) -> tuple[list[str], list[str]]:
    """The API roots of some base URLs, and the models that they list."""
    found = [await try_root(run, transport, url) for url in urls]
    dead = [outcome for outcome in found if isinstance(outcome, sdg.Unreachable)]
    if len(dead) == len(found):
        raise dead[0]
    for exc in dead:
        sdg.say(f"{exc} Meanwhile the other servers are used.")
    live = [outcome for outcome in found if isinstance(outcome, Found)]
    served = sorted({model for each in live for model in each.models or []})
    model = choose_model(run.options.model, served)
    for each in live:
        if each.models and model not in each.models and model in served:
            raise sdg.ServerError(f"{sdg.redact(each.root)} does not serve {model}, but {', '.join(each.models)}")
    roots = [
        candidates_of(url)[0] if isinstance(each, sdg.Unreachable) else each.root
        for url, each in zip(urls, found, strict=True)
    ]
    return roots, served


async def try_root(run: sdg.Run, transport: Transport, url: str) -> Found | sdg.Unreachable:
    """The result of `find_root`, or why no server responds."""
    try:
        return await find_root(run, transport, url)
    except sdg.Unreachable as exc:
        return exc


async def find_root(run: sdg.Run, transport: Transport, url: str) -> Found:
    """The API root of a base URL: the one whose list of models makes sense, else whose endpoint does."""
    answers: dict[str, Answer] = {}
    for root in candidates_of(url):
        answer = answers[root] = await get(transport, root, "/models", url)
        if answer.status == 200 and (models := models_in(answer.body)) is not None:
            return Found(root, models)
    secrets = secrets_of(run.options)
    if not run.options.model:
        refuse_without_list(url, answers, secrets, run.options.api_key_env)
    for root in answers:
        probe = sdg.Request("/chat/completions", {})  # which any endpoint of the protocol refuses, but does not miss
        try:
            answer = await transport.post(root, probe.path, probe.body)
        except (Unreached, Broken, TimeoutError) as exc:
            raise unreachable(url, exc) from exc
        if answer.status not in MISSING:
            return Found(root, None)
        if target := redirected(answer):
            raise sdg.ServerError(
                f"{answer.status} from {sdg.redact(url)}: redirected to {target}; set --base-url to that URL"
            )
    # An endpoint with a path of its own gets no /v1; it may have completions alone.
    return Found(candidates_of(url)[0], None)


def candidates_of(url: str) -> list[str]:
    """The API roots that a base URL may stand for, the likeliest first: it may lack its `/v1`, and have a query."""
    base, mark, query = url.partition("?")
    base = re.sub(r"/(chat/)?completions/*$", "", base.rstrip("/"))
    if base.endswith("/v1"):
        roots = [base]
    else:
        own_path = re.search(r"//[^/]+/", base)
        roots = [base, f"{base}/v1"] if own_path else [f"{base}/v1", base]
    return [root + mark + query for root in roots]


def refuse_without_list(url: str, answers: dict[str, Answer], secrets: Secrets, key_name: str) -> None:
    """Raise ServerError: nothing says which model to ask for."""
    for root, answer in answers.items():
        words = secrets.hidden_in(error_text(answer.body))
        if answer.status in {401, 403}:
            raise sdg.ServerError(f"{answer.status} from {sdg.redact(root)}: {words}; {doubt_about_key(key_name)}")
        if target := redirected(answer):
            message = f"{answer.status} from {sdg.redact(root)}: redirected to {target}; set --base-url to that URL"
            raise sdg.ServerError(message)
        if answer.status >= 500:
            raise sdg.ServerError(f"{answer.status} from {sdg.redact(url)}: {words}; the server is not ready")
    raise sdg.ServerError(f"{sdg.redact(url)} has no list of models: --model is needed")


async def get(transport: Transport, root: str, path: str, url: str) -> Answer:
    """Get something below an API root. Raises Unreachable."""
    try:
        return await transport.get(root, path, LIST_TIMEOUT)
    except (Unreached, Broken, TimeoutError) as exc:
        raise unreachable(url, exc) from exc


def unreachable(url: str, exc: Exception) -> sdg.Unreachable:
    """The error for a server that does not respond."""
    reason = sdg.redact(str(exc) or type(exc).__name__)
    return sdg.Unreachable(
        f"no server responds at {sdg.redact(url)} ({reason}): is --base-url correct, is the server up?"
    )


def models_in(raw: bytes) -> list[str] | None:
    """The names in a list of models; None if it is something else, such as a proxy's page."""
    try:
        content, _ = read_json(raw)
        entries = content if isinstance(content, list) else content.get("data", content.get("models"))
        return [str(entry if isinstance(entry, str) else entry["id"]) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def choose_model(asked: str | None, served: list[str]) -> str:
    """The model to ask for; ServerError if the choice is open. A name that is not listed may be an alias."""
    if asked:
        return asked
    if len(served) == 1:
        return served[0]
    raise sdg.ServerError(f"--model is needed; the server serves: {', '.join(served[:20]) or 'no model that it lists'}")


def unlisted(model: str, served: list[str]) -> str:
    """What to say of a model that the server does not list."""
    near = difflib.get_close_matches(model, served, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"the server does not list --model {model}, but {', '.join(served[:20])}{hint}"


@functools.cache  # said once
def limit_of_files(requests: int) -> int:
    """Raise the limit of open files for some requests in flight; return how many it allows."""
    import resource

    needed = requests + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            allowed = f"allows {max(1, soft - SPARE_FILES)} requests in flight, not {requests}"
            sdg.say(f"the limit of open files, {hard}, {allowed}: see ulimit -Hn")
    return requests if soft == resource.RLIM_INFINITY else max(1, min(requests, soft - SPARE_FILES))
