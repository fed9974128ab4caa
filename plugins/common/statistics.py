"""The figures of a rank, in the state while it runs and at its end, and their sum over all ranks."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import json
import os
import platform
import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.prices import cost_of, tokens_of
from sdg_plugins.common.state import replace_file

HEARTBEAT = 10.0  # s between two updates of a rank's figures in the state; less in its first minutes
START_INTERVAL = 2.0  # s between two updates until the engine begins
PHASE_DETAILS = re.compile(r" \(\d+ s\).*")  # the seconds and the last line of the log
RECENT = 6  # heartbeats over which the current rate is taken


async def statistics(engine: sdg.Engine, tally: Counter[str]) -> dict[str, Any]:
    """The rank's figures over all its processes so far."""
    run, totals = engine.run, engine.store.totals()
    figures: dict[str, Any] = {"documents": sum(tally.values()), "rows": tally["row"]}
    figures |= {"filtered": tally["filtered"], "failed": tally["failed"] + tally["empty"], "empty": tally["empty"]}
    figures |= {name: int(totals[name]) for name in ("truncated", "failed_rollouts", "requests", "cache_hits")}
    figures |= {"results": int(totals["results"])} if "results" in totals else {}
    for group in ("retries", "given_up", "finish_reasons"):
        causes = {name.partition(".")[2]: int(n) for name, n in totals.items() if name.startswith(f"{group}.")}
        figures[group] = dict(sorted(causes.items()))
    figures |= {name: int(totals[name]) for name in ("prompt_tokens", "completion_tokens")}
    if totals["prefix_cache.queries"]:  # in tokens; only of servers that report it
        figures["prefix_cache"] = {name: int(totals[f"prefix_cache.{name}"]) for name in ("queries", "hits")}
    if cached := int(totals["cached_tokens"]):
        figures["cached_tokens"] = cached
    tokens = tokens_of(totals, run.options.models)
    if estimated := int(totals["estimated_prompt_tokens"] + totals["estimated_completion_tokens"]):
        figures["estimated_tokens"] = estimated
    if (cost := cost_of(run.options, tokens)) is not None:
        figures["cost"] = round(cost, 6)
    figures["seconds"] = round(totals["seconds"], 3)
    figures["tokens_per_second"] = round(totals["completion_tokens"] / max(totals["seconds"], 1e-9), 1)
    figures["mean_in_flight"] = round(engine.client.lane.mean_in_flight, 1)
    if run.models:
        figures["models"] = {
            name: figures_of_model(model, f"models.{name}.", totals) for name, model in run.models.items()
        }
    return figures | {"model": run.model, "fingerprint": run.fingerprint}


def figures_of_model(model: sdg.Run, prefix: str, totals: Mapping[str, float]) -> dict[str, Any]:
    """What a further model has done of all that the run's figures count."""
    counts = {name.removeprefix(prefix): number for name, number in totals.items() if name.startswith(prefix)}
    names = ("requests", "prompt_tokens", "completion_tokens")
    figures: dict[str, Any] = {"model": model.model, **{name: int(counts.get(name, 0)) for name in names}}
    in_flight = model.client.lane.mean_in_flight if model.client else 0.0
    return {**figures, "retries": retries_in(counts), "mean_in_flight": round(in_flight, 1)}


def rows_in(figures: Mapping[str, Any], options: argparse.Namespace) -> int:
    """The rows that a run's figures are of. What they count as rows is documents: with --flat each result is a row."""
    documents = int(figures.get("rows", 0))
    return int(figures.get("results", documents)) if getattr(options, "flat", False) else documents


def retries_in(counts: Mapping[str, float]) -> int:
    """Requests that were sent again."""
    return int(sum(value for name, value in counts.items() if name.startswith("retries.")))


def status_of(reason: BaseException | None) -> str:
    """The status of a rank that ended for a reason."""
    stopped = isinstance(reason, sdg.Interrupted | sdg.BudgetSpent | asyncio.CancelledError)
    return "finished" if reason is None else "stopped" if stopped else "failed"


@contextlib.asynccontextmanager
async def heartbeat(engine: sdg.Engine) -> AsyncIterator[None]:
    """Keep the rank's figures in the state up to date: monitors see nothing else of a run."""
    over = asyncio.Event()
    began = time.monotonic()
    loading = Loading(engine.client.pool.upstreams)
    looks = deque([(began, engine.finished)], maxlen=RECENT + 1)

    async def beat() -> None:
        while not over.is_set():
            looks.append((time.monotonic(), engine.finished))
            rate = (looks[-1][1] - looks[0][1]) / max(looks[-1][0] - looks[0][0], 1e-9)
            figures = await statistics(engine, engine.tally)
            with contextlib.suppress(OSError):  # the run itself will report a full disk
                record: dict[str, Any] = {
                    "status": "running",
                    "expected": engine.intake.expected(),
                    "documents_per_second": rate,
                }
                if phase := loading.phase():
                    record["loading"] = phase
                if waiting := engine.client.pool.waiting():
                    record["waiting"] = {"until": round(time.time() + waiting[0]), "reason": waiting[1]}
                await asyncio.to_thread(write_rank, engine.run, figures, record)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), min(HEARTBEAT, 1 + (looks[-1][0] - began) / 10))

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        over.set()
        await beating


class Loading:
    """What launched servers are doing until one of them is ready."""

    def __init__(self, servers: Iterable[str | sdg.Upstream]) -> None:
        self._servers = list(servers)
        self._since = 0.0  # in s since the epoch; 0 while a server is up

    def phase(self) -> dict[str, Any] | None:
        """Since when no server has been ready, in s since the epoch, and what the first one is doing; else None."""
        launched = [server for server in self._servers if isinstance(server, sdg.Upstream)]
        if not launched or len(launched) < len(self._servers) or any(server.up.is_set() for server in launched):
            self._since = 0.0
            return None
        self._since = self._since or time.time()
        status = next((server.status for server in launched if not server.gone), "")
        return {"since": round(self._since, 3), "phase": PHASE_DETAILS.sub("", status)}


@contextlib.asynccontextmanager
async def recording_the_start(run: sdg.Run, servers: Iterable[str | sdg.Upstream]) -> AsyncIterator[None]:
    """Record what launched servers are doing before the engine's own heartbeat begins.

    A rerun that is refused leaves the figures as they were.
    """
    path = rank_file(run.state, run.options.rank, "stats.json")
    earlier = path.read_bytes() if path.exists() else None
    loading = Loading(servers)

    async def beat() -> None:
        while True:
            await asyncio.sleep(START_INTERVAL)
            if phase := loading.phase():
                with contextlib.suppress(OSError, sdg.StateError):  # reported by the run itself
                    figures = statistics_of(path)
                    record = {"status": "running", "expected": figures.get("rank", {}).get("expected")}
                    write_rank(run, figures, {**record, "loading": phase})

    try:
        async with sdg.background(beat()):
            yield
    except sdg.StateError:
        if earlier is not None:
            replace_file(run, path.name, earlier)
        else:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def recording_the_end(run: sdg.Run, reason: Callable[[], BaseException | None]) -> Iterator[None]:
    """Record in the rank's figures why it ended, if it ended before it could do so itself.

    Args:
        run: whose rank.
        reason: returns what stopped the run, if something did.
    """
    try:
        yield
    except (Exception, asyncio.CancelledError) as exc:
        path = rank_file(run.state, run.options.rank, "stats.json")
        cause = reason() or sdg.first_cause(exc)
        with contextlib.suppress(OSError, ValueError):  # a broken file or a full disk is reported elsewhere
            figures = json.loads(path.read_bytes()) if path.exists() else {}
            record = figures.get("rank", {})
            # A rerun that was refused for a mistyped option does not change how the rank is doing.
            if record.get("status") != "finished" and not isinstance(cause, sdg.StateError):
                write_rank(run, figures, {**record, "status": status_of(cause)}, cause)
        raise


def write_rank(
    run: sdg.Run, figures: dict[str, Any], record: dict[str, Any], reason: BaseException | None = None
) -> None:
    """Write the rank's figures, its status, and why it ended early."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    rank = {
        **record,
        "error": reason and sdg.hide(str(reason)),
        "updated": round(time.time(), 3),
        "host": platform.node(),
        "slurm_job": job,
        "slurm_task": os.environ.get("SLURM_ARRAY_TASK_ID"),
        "world_size": run.options.world_size,
    }
    name = rank_file(run.state, run.options.rank, "stats.json").name
    replace_file(run, name, json.dumps({**figures, "rank": rank}, indent=2).encode())


def write_statistics(run: sdg.Run) -> None:
    """Write the sum over all ranks that have written their figures."""
    replace_file(run, "stats.json", json.dumps(sum_statistics(rank_statistics(run.state)), indent=2).encode())


def rank_statistics(state: Path) -> list[dict[str, Any]]:
    """The figures of all ranks that have begun. Raises StateError."""
    return [figures for path in sorted(state.glob("[0-9]*.stats.json")) if (figures := statistics_of(path))]


def statistics_of(path: Path) -> dict[str, Any]:
    """The figures in a rank's file, {} if there is none. Raises StateError if it is broken."""
    for _ in range(10):
        try:
            figures = json.loads(path.read_bytes())
            if not isinstance(figures, dict) or not isinstance(figures.get("rank", {}), dict):
                raise ValueError("not figures")
            return figures
        except FileNotFoundError:
            break
        except ValueError as exc:
            message = f"{path} is broken ({exc}): delete it; the next process of its rank writes it again"
            raise sdg.StateError(message) from exc
        except OSError as exc:
            if exc.errno != errno.ESTALE:  # on NFS: it was just replaced on another machine
                raise sdg.StateError(f"{path}: {sdg.reason_of(exc)}") from exc
    return {}


def sum_statistics(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several ranks as those of one run."""
    total: dict[str, Any] = {}
    for rank in ranks:
        total = summed(total, {name: value for name, value in rank.items() if name != "rank"})
    return {"ranks": len(ranks), **total}


def summed(total: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The sums of the numbers in two nested objects of figures; of texts the later one."""
    sums = dict(total)
    for name, value in more.items():
        if isinstance(value, dict):
            sums[name] = summed(total.get(name, {}), value)
        else:
            sums[name] = value if isinstance(value, str) else round(total.get(name, 0) + value, 6)
    return sums
