"""The load that vLLM and SGLang report on their pages of metrics, and the watch that adapts the pool to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, NamedTuple

import sdg

if TYPE_CHECKING:
    import aiohttp

    from sdg_plugins.servers.pool import Pool

INTERVAL = 1.0  # s between two looks
PATIENT_LOOKS = 3  # at a server that does not respond, before it counts as one without metrics


class Load(NamedTuple):
    """A server's requests, summed over its engines; `kv_use` is the share in use of the fullest KV cache."""

    running: float
    waiting: float
    kv_use: float
    tokens: float | None  # prompt and completion tokens since it started; None if it does not report them


# Names in vLLM (0.10 to 0.32) and SGLang (0.5)
METRICS = {
    "running": {"vllm:num_requests_running", "sglang:num_running_reqs"},
    "waiting": {"vllm:num_requests_waiting", "sglang:num_queue_reqs"},
    "kv_use": {"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"},
    "tokens": {
        *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        "sglang:realtime_tokens_total",  # its other counters advance only when a request ends
    },
}


def parse_load(text: str) -> Load | None:
    """Parse a page of metrics (https://prometheus.io/docs/instrumenting/exposition_formats); None without a load."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for name, number in re.findall(r"^((?:vllm|sglang):\w+)(?:\{.*\})? (\S+)", text, re.MULTILINE):
        for kind, names in METRICS.items():
            if name in names:
                values[kind].append(float(number))
    if not values["running"] or not values["waiting"]:
        return None
    tokens = sum(values["tokens"]) if values["tokens"] else None
    return Load(sum(values["running"]), sum(values["waiting"]), max(values["kv_use"], default=0.0), tokens)


async def look_at_load(session: aiohttp.ClientSession, pool: Pool, upstream: sdg.Upstream) -> None:
    """Ask a server for its load, and let the pool adapt to it."""
    import aiohttp

    url = upstream.url.removesuffix("/v1") + "/metrics"
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=5), allow_redirects=False) as response:
            load = parse_load(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, OSError) as exc:  # too busy, or gone, unless it answers requests meanwhile
        upstream.limit.silent += isinstance(exc, TimeoutError) or upstream.answers > 0
        if upstream.limit.silent < PATIENT_LOOKS:
            return
        load = None
    except ValueError:  # not text
        load = None
    if upstream.up.is_set():
        pool.adapt(upstream, load)


@contextlib.asynccontextmanager
async def watch_load(session: aiohttp.ClientSession, pool: Pool) -> AsyncIterator[None]:
    """Ask the servers that are up for their load, now and then regularly; one without metrics is asked only once."""

    async def look_at_all() -> None:
        async with asyncio.TaskGroup() as group:
            for upstream in pool.upstreams:
                if upstream.up.is_set() and upstream.limit.reports is not False:
                    group.create_task(look_at_load(session, pool, upstream))

    async def repeat() -> None:
        while True:
            await look_at_all()
            await asyncio.sleep(INTERVAL)

    await look_at_all()
    async with sdg.background(repeat()):
        yield
