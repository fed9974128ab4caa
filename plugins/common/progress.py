"""What a run shows on the terminal: a progress bar or lines, and a report at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.common.statistics import retries_in

BAR_INTERVAL = 0.5  # s between two updates on a terminal
USUAL = {"stop", "length", "tool_calls", "None"}  # reasons to finish that need no word
LONG_WAIT = 5.0  # s that no server takes requests, before it is shown
LINE_INTERVAL = 10.0  # s between two lines in a log


@contextlib.asynccontextmanager
async def progress(engine: sdg.Engine) -> AsyncIterator[None]:
    """Show how far the run is: a bar on a terminal, else a line every ten seconds."""
    from tqdm import tqdm

    if engine.run.options.no_progress:
        yield
        return
    terminal = sys.stderr.isatty()
    began = sum(engine.tally.values())
    columns, lines = os.get_terminal_size(sys.stderr.fileno()) if terminal else (0, 0)
    shape = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {desc}"
    columns, lines = columns or 80, lines or 24  # some terminals report no size
    bar = tqdm(initial=began, disable=not terminal, bar_format=shape, ncols=columns, nrows=lines)

    def show() -> None:
        bar.total = engine.intake.expected()
        words = time_to_go(engine, bar.format_interval) + figures_of(engine)
        room = max(20, columns - 45)  # the bar needs the rest
        words = words if len(words) <= room else words[:room].rpartition(", ")[0]
        bar.set_description_str(words, refresh=False)
        bar.update(sum(engine.tally.values()) - bar.n)
        bar.refresh()

    async def repeat() -> None:
        while True:
            await asyncio.sleep(BAR_INTERVAL if terminal else LINE_INTERVAL)
            show() if terminal else sdg.say(progress_line(engine))

    try:
        async with sdg.background(repeat()):
            yield
    finally:
        show()
        bar.close()


def rate_of(engine: sdg.Engine) -> float:
    """Documents per second in this process."""
    return engine.finished / max(engine.client.pool.seconds, 1e-9)


def time_to_go(engine: sdg.Engine, shown: Callable[[int], str]) -> str:
    """Remaining time and documents per second, for the bar."""
    rate = rate_of(engine)
    left = max(0, (engine.intake.expected() or 0) - sum(engine.tally.values()))
    return f"ETA {shown(int(left / rate))}, {rate:,.1f} documents/s, " if rate and left else ""


def figures_of(engine: sdg.Engine) -> str:
    """The figures beside the bar."""
    counts, pool = engine.run.counts, engine.client.pool
    down = [upstream.status for upstream in pool.upstreams if not upstream.up.is_set()]
    if down and len(down) == len(pool.upstreams):  # nothing else to report yet
        return "; ".join(down[:4])
    if (waiting := pool.waiting()) and waiting[0] > LONG_WAIT:
        when = time.strftime("%H:%M", time.localtime(time.time() + waiting[0]))
        return f"waiting until {when}: {waiting[1]}"
    loads = [upstream.limit.load for upstream in pool.upstreams if upstream.limit.load and upstream.up.is_set()]
    queue = f" ({sum(load.waiting for load in loads):.0f} queued)" if loads else ""
    rare = {"failed": engine.tally["failed"], "retries": retries_in(counts), "cached": counts["cache_hits"]}
    figures = [f"{number:,} {name}" for name, number in rare.items() if number]
    tokens = counts["completion_tokens"] / max(pool.seconds, 1e-9)
    figures += [f"{tokens:,.0f} tokens/s", f"{pool.active} in flight{queue}"]
    return ", ".join(figures) + "".join(f"; {status}" for status in down[:2])


def progress_line(engine: sdg.Engine) -> str:
    """The bar as a line for a log file."""
    done, total, rate = sum(engine.tally.values()), engine.intake.expected(), rate_of(engine)
    of = f" of {total:,}" if total else ""
    left = f", {max(0, total - done) / rate:,.0f} s to go" if total and rate else ""
    return f"{done:,}{of} documents, {rate:,.1f} documents/s{left}, {figures_of(engine)}"


def report(engine: sdg.Engine, figures: dict[str, Any]) -> str:
    """What was written where, and how to look at it."""
    run, place = engine.run, engine.run.output
    name = run.path_of(sdg.Chunk(0, 0))
    shown = os.path.relpath(place.root) if place.local else place.uri
    shown = place.root if shown.startswith("../../") else shown
    kind = {"jsonl": "json"}.get(format_of(name), format_of(name))  # pyarrow's name
    folder = f"{shown}/{os.path.dirname(name)}"
    lines = [
        f"{figures['documents']:,} documents: {figures['rows']:,} rows, {figures['filtered']:,} filtered, "
        f"{figures['failed']:,} failed ({engine.finished:,} of them now, {rate_of(engine):,.1f} documents/s)",
        f"rows    {folder}",
    ]
    if figures["truncated"]:
        lines.append(
            f"cut     {figures['truncated']:,} documents did not fit the model's context: --long-documents split"
        )
    if unusual := {name: n for name, n in figures["finish_reasons"].items() if name not in USUAL}:
        named = ", ".join(f"{n:,} {name}" for name, n in sorted(unusual.items(), key=lambda item: -item[1]))
        lines.append(f"ends    completions that did not end as usual, by finish_reason: {named}")
    if figures["failed"]:
        failed = f"{shown}/{os.path.dirname(run.failed_path_of(sdg.Chunk(0, 0)))}"
        lines.append(f"failed  {failed}; run them again with --retry-failed")
        common = engine.failures.reasons.most_common(3)
        lines += [f"        {times} × {engine.failures.examples[kind][:150]}" for kind, times in common]
        lines += [f"        and {len(engine.failures.reasons) - 3:,} more reasons"] * (len(engine.failures.reasons) > 3)
    if run.options.rollouts_per_document > 1 and figures["failed_rollouts"]:
        lines.append(f"lost    {figures['failed_rollouts']:,} rollouts failed; a document fails only if all of its do")
    lines.append(f"state   {run.state}: stats.json has the figures")
    if place.local:
        lines.append(
            f'look    python -c "import pyarrow.dataset as d; '
            f"print(*d.dataset('{folder}', format='{kind}').head(3).to_pylist(), sep='\\n\\n')\""
        )
    return "\n".join(lines)
