"""From what a server plugin yielded to a client: which API roots respond, and which model to ask for."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import sdg
from sdg_plugins.servers.client import Client
from sdg_plugins.servers.load import watch_load
from sdg_plugins.servers.pool import Pool
from sdg_plugins.servers.responses import error_text, without_key

if TYPE_CHECKING:
    import aiohttp

SPARE_FILES = 256  # open files beside one for each request in flight


@contextlib.asynccontextmanager
async def connect(run: sdg.Run, servers: Sequence[str | sdg.Upstream]) -> AsyncIterator[Client]:
    """A client of the servers that a plugin yielded; settles `run.model`.

    Launched servers may still be loading, if the model's name is known.

    Raises:
        ServerError: a server cannot be reached, rejects the key, or does not serve the model.
    """
    import aiohttp

    key = os.environ.get(run.options.api_key_env)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    limit = limit_of_files(run.options.max_concurrent_generations)
    urls = [server if isinstance(server, str) else server.url for server in servers]
    local = all(re.match(r"https?://(127\.|localhost|\[::1\])", url) for url in urls)
    async with aiohttp.ClientSession(
        # vLLM closes idle connections after 5 s: ours must not be reused just when it closes them.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        timeout=aiohttp.ClientTimeout(total=run.options.request_timeout),
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=not local,
    ) as session:
        pool = Pool(await find_upstreams(run, session, servers), limit)
        for upstream in pool.upstreams:
            upstream.model = run.model
        async with watch_load(session, pool):
            yield Client(session, pool, run)


async def find_upstreams(
    run: sdg.Run, session: aiohttp.ClientSession, servers: Sequence[str | sdg.Upstream]
) -> list[sdg.Upstream]:
    """The servers, each with its API root; settles `run.model`."""
    launched = [server for server in servers if isinstance(server, sdg.Upstream)]
    known = [server.model for server in launched if server.model]
    if len(known) == len(servers):
        run.model = known[0]
        return launched
    for upstream in launched:
        await upstream.up.wait()
    urls = [server if isinstance(server, str) else server.url for server in servers]
    roots = await find_roots(run, session, urls)
    return [
        server if isinstance(server, sdg.Upstream) else sdg.Upstream(root)
        for server, root in zip(servers, roots, strict=True)
    ]


async def find_roots(run: sdg.Run, session: aiohttp.ClientSession, urls: list[str]) -> list[str]:
    """The API roots of some base URLs; settles `run.model`."""
    found = [await try_models(session, url, run.options.api_key_env) for url in urls]
    dead = [outcome for outcome in found if isinstance(outcome, sdg.Unreachable)]
    if len(dead) == len(found):
        raise dead[0]
    for exc in dead:
        sdg.say(f"{exc} Meanwhile the other servers are used.")
    live = [outcome for outcome in found if not isinstance(outcome, sdg.Unreachable)]
    run.model = choose_model(run.options.model, sorted({model for _, models in live for model in models or []}))
    for url, outcome in zip(urls, found, strict=True):
        if not isinstance(outcome, sdg.Unreachable) and outcome[1] and run.model not in outcome[1]:
            raise sdg.ServerError(f"{sdg.redact(url)} does not serve {run.model}, but {', '.join(outcome[1])}")
    guesses = [url.rstrip("/") + ("" if url.rstrip("/").endswith("/v1") else "/v1") for url in urls]
    return [
        guess if isinstance(outcome, sdg.Unreachable) else outcome[0]
        for guess, outcome in zip(guesses, found, strict=True)
    ]


async def try_models(
    session: aiohttp.ClientSession, url: str, key_name: str
) -> tuple[str, list[str] | None] | sdg.Unreachable:
    """The result of `find_models`, or why no server responds."""
    try:
        return await find_models(session, url, key_name)
    except sdg.Unreachable as exc:
        return exc


async def find_models(session: aiohttp.ClientSession, url: str, key_name: str) -> tuple[str, list[str] | None]:
    """The API root of a base URL that may lack its `/v1`, and the models served; None if they are not listed."""
    import aiohttp

    base = url.rstrip("/")
    roots = [base] if base.endswith("/v1") else [f"{base}/v1", base]
    status = 0
    for root in roots:
        try:
            async with session.get(f"{root}/models", timeout=aiohttp.ClientTimeout(total=60)) as response:
                status, raw = response.status, without_key(await response.read(), key_name)
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            reason = sdg.redact(str(exc) or type(exc).__name__)
            message = f"no server responds at {sdg.redact(url)} ({reason}): is --base-url correct, is the server up?"
            raise sdg.Unreachable(message) from exc
        if status in {401, 403}:
            raise sdg.ServerError(
                f"{status} from {sdg.redact(root)}: {error_text(raw)}; is the key in ${key_name} valid?"
            )
        if status == 200 and (models := models_in(raw)) is not None:
            return root, models
    if status >= 500:
        raise sdg.ServerError(f"{status} from {sdg.redact(base)}: the server is not ready")
    # No list of models: no /v1 is added to an endpoint that has a path of its own.
    return (base if re.search(r"//[^/]+/", base) else roots[0]), None


def models_in(raw: bytes) -> list[str] | None:
    """The names in a list of models; None if it is something else, such as a proxy's page."""
    try:
        return [str(model["id"]) for model in json.loads(raw)["data"]]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def choose_model(asked: str | None, served: list[str]) -> str:
    """The model to ask for; ServerError if the servers do not have it, or leave the choice open."""
    if asked and (not served or asked in served):
        return asked
    if not asked and len(served) == 1:
        return served[0]
    names = ", ".join(served[:20]) or "no model that it lists"
    if asked:
        near = difflib.get_close_matches(asked, served, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise sdg.ServerError(f"the server does not serve --model {asked}; it serves: {names}{hint}")
    raise sdg.ServerError(f"--model is needed; the server serves: {names}")


def limit_of_files(requests: int) -> int:
    """Raise the limit of open files for some requests in flight; return how many it allows."""
    import resource

    needed = requests + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            allowed = f"allows {soft - SPARE_FILES} requests in flight, not {requests}"
            sdg.say(f"the limit of open files, {hard}, {allowed}: see ulimit -Hn")
    return requests if soft == resource.RLIM_INFINITY else max(1, min(requests, soft - SPARE_FILES))
