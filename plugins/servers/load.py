"""The load that vLLM and SGLang report on their pages of metrics, and the watch that adapts the pool to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import sdg
from sdg_plugins.servers.http1 import Broken, Unreached
from sdg_plugins.servers.limit import Load
from sdg_plugins.servers.transport import Transport, root_of

if TYPE_CHECKING:
    from sdg_plugins.servers.pool import Pool

INTERVAL = 1.0  # s between two looks
TIMEOUT = 5.0  # s for one
PATIENT_LOOKS = 3  # at a server that does not respond, before it counts as one without metrics


# Names in vLLM (0.10 to 0.33) and SGLang (0.5)
METRICS = {
    "running": {"vllm:num_requests_running", "sglang:num_running_reqs"},
    "waiting": {"vllm:num_requests_waiting", "sglang:num_queue_reqs"},
    "held": {"vllm:num_requests_waiting_by_reason"},  # of which only those that lack capacity are a queue
    "tokens": {
        *("vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
        "sglang:realtime_tokens_total",  # its other counters advance only when a request ends
    },
    "sought": {"vllm:prefix_cache_queries_total", "sglang:prompt_tokens_total"},
    "hits": {"vllm:prefix_cache_hits_total", "sglang:cached_tokens_total"},
}
SERIES = re.compile(r"^((?:vllm|sglang):\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)


def parse_load(text: str) -> Load | None:
    """Parse a page of metrics (https://prometheus.io/docs/instrumenting/exposition_formats); None without a load."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    totals: set[str] = set()  # metrics that have a series for all priorities
    parts: list[tuple[str, str, float]] = []  # series for one priority, which count only where there is no total
    for name, labels, number in SERIES.findall(text):
        kind = next((kind for kind, names in METRICS.items() if name in names), None)
        if kind is None or (kind == "held" and 'reason="capacity"' not in labels):
            continue
        if re.search(r'\bpriority="[^"]', labels):
            parts.append((kind, name, float(number)))
        else:
            totals.add(name)
            values[kind].append(float(number))
    for kind, name, value in parts:
        if name not in totals:
            values[kind].append(value)
    waiting = values["held"] or values["waiting"]
    if not values["running"] or not waiting:
        return None
    tokens, sought, hits = (sum(values[name]) if values[name] else None for name in ("tokens", "sought", "hits"))
    return Load(sum(values["running"]), sum(waiting), tokens, sought, hits)


async def look_at_load(
    transport: Transport, pool: Pool, upstream: sdg.Upstream, counts: Callable[[], Counter[str]]
) -> None:
    """Ask a server for its load, and let the pool adapt to it. What its prefix cache has saved is counted."""
    load = None
    try:
        answer = await transport.get(root_of(upstream.url), "/metrics", TIMEOUT)
        load = parse_load(answer.body.decode(errors="replace")) if answer.status == 200 else None
    except (Unreached, Broken, TimeoutError) as exc:  # too busy, or gone, unless it answers requests meanwhile
        upstream.limit.silent += isinstance(exc, TimeoutError) or upstream.answers > 0
        if upstream.limit.silent < PATIENT_LOOKS:
            return
    if upstream.up.is_set():
        if load and (known := upstream.limit.load):
            for name, now, before in (("queries", load.sought, known.sought), ("hits", load.hits, known.hits)):
                if now is not None and before is not None:
                    counts()[f"prefix_cache.{name}"] += int(max(0.0, now - before))
        pool.adapt(upstream, load)


@contextlib.asynccontextmanager
async def watch_load(transport: Transport, pool: Pool, counts: Callable[[], Counter[str]]) -> AsyncIterator[None]:
    """Ask the servers that are up for their load, now and then regularly; one without metrics is asked only once.

    Args:
        transport: reaches them.
        pool: of the servers.
        counts: returns those of the job at work.
    """

    async def look_at_all() -> None:
        async with asyncio.TaskGroup() as group:
            for upstream in pool.upstreams:
                if upstream.up.is_set() and upstream.limit.reports is not False:
                    group.create_task(look_at_load(transport, pool, upstream, counts))

    async def repeat() -> None:
        while True:
            await look_at_all()
            await asyncio.sleep(INTERVAL)

    await look_at_all()
    async with sdg.background(repeat()):
        yield
