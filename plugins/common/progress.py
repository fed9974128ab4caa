"""What a run shows on the terminal: a progress bar or lines, and a report at its end."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import sdg
from sdg_plugins.common import published
from sdg_plugins.common.files import default_state_dir
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import program
from sdg_plugins.common.prices import in_money
from sdg_plugins.common.statistics import retries_in, rows_in
from sdg_plugins.common.time_to_go import TimeToGo

BAR_INTERVAL = 0.5  # s between two updates on a terminal
USUAL = {"stop", "length", "tool_calls"}  # reasons to finish that need no word
LONG_WAIT = 5.0  # s that no server takes requests, before it is shown
LINE_INTERVAL = 10.0  # s between two lines in a log
AGAIN = "run the same command again to go on"


class Course:
    """The configs, steps or ranks that a process runs, which may overlap: they share one display.

    Args:
        names: of the configs, in order.

    Attributes:
        engines: those at work, in the order in which they began.
        showing: the task that shows them, and what ends it; None if there is none.
        ahead: estimates the time to go.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self.engines: list[sdg.Engine] = []
        self._ended: Counter[str] = Counter()  # figures of engines that have ended
        self.showing: tuple[asyncio.Task[None], asyncio.Event] | None = None
        self.ahead = TimeToGo()
        self.ahead.look(0)
        self._usual: int | None = None  # documents of the last engine whose number was known
        self._began: float | None = None  # of the first request, on the monotonic clock

    def leave(self, engine: sdg.Engine) -> None:
        """An engine has ended."""
        self._began = time.monotonic() - self.seconds
        self._ended += self._figures_of(engine)
        self.engines.remove(engine)

    @staticmethod
    def _figures_of(engine: sdg.Engine) -> Counter[str]:
        done, expected = sum(engine.tally.values()), engine.intake.expected()
        own = {"done": done, "expected": done if expected is None else expected, "finished": engine.finished}
        return Counter(own) + engine.run.counts + Counter({name: engine.tally[name] for name in ("failed", "empty")})

    @property
    def figures(self) -> Counter[str]:
        """The counts of all engines so far."""
        return sum(map(self._figures_of, self.engines), self._ended)

    @property
    def seconds(self) -> float:
        """Since the first request."""
        if self._began is None:
            return max(1e-9, *(engine.client.lane.seconds for engine in self.engines))
        return time.monotonic() - self._began

    @property
    def place(self) -> str:
        """Which of the configs is at work, such as `french (2 of 3)`; "" if there is only one."""
        name, of = self._name, len(self._names)
        return f"{name} ({self._names.index(name) + 1} of {of})" if of > 1 else ""

    @property
    def is_last(self) -> bool:
        """True if no other config follows."""
        return self._name == self._names[-1]

    @property
    def _name(self) -> str:
        return str(self.engines[-1].run.options.output_config)

    @property
    def done(self) -> int:
        """Finished documents of the engines at work and of those before them."""
        return self.figures["done"]

    @property
    def total(self) -> int | None:
        """Documents of all configs; those not known yet are taken to have as many as the last one. None if unknown."""
        expected = [engine.intake.expected() for engine in self.engines]
        self._usual = next((count for count in reversed(expected) if count is not None), self._usual)
        if self._usual is None:
            return None
        unknown = [engine for engine, count in zip(self.engines, expected, strict=True) if count is None]
        more = sum(max(0, self._usual - sum(engine.tally.values())) for engine in unknown)
        later = len(self._names) - 1 - self._names.index(self._name)
        return self.figures["expected"] + more + self._usual * later

    # What `TimeToGo` asks for

    @property
    def finished(self) -> int:
        """Documents that this process has finished."""
        return self.figures["finished"]

    @property
    def begun(self) -> list[float]:
        """When each document in flight has begun."""
        return [began for engine in self.engines for began in engine.crew.begun.values()]

    @property
    def ended(self) -> list[tuple[float, float]]:
        """When each of the last documents has ended, and how long it took."""
        return list(heapq.merge(*(engine.crew.ended for engine in self.engines)))


@contextlib.asynccontextmanager
async def progress(engine: sdg.Engine, course: Course | None = None) -> AsyncIterator[None]:
    """Show how far the run is: a bar on a terminal, else a line every ten seconds.

    Args:
        engine: that is at work.
        course: of the configs that this one is one of; the first engine at work shows them all.
    """
    if engine.run.options.no_progress:
        yield
        return
    course = course or Course([engine.run.options.output_config])
    course.engines.append(engine)
    if course.showing is None:
        over = asyncio.Event()
        course.showing = asyncio.create_task(display(course, over)), over
    try:
        yield
    finally:
        if course.engines == [engine] and course.showing:
            (task, over), course.showing = course.showing, None
            over.set()
            await asyncio.wait([task])
        course.leave(engine)


async def display(course: Course, over: asyncio.Event) -> None:
    """Show the engines at work until that is over."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    columns, lines = os.get_terminal_size(sys.stderr.fileno()) if terminal else (0, 0)
    terminal = terminal or "ipykernel" in sys.modules  # a notebook shows a bar as well
    shape = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {desc}"
    columns, lines = columns or 80, lines or 24  # some terminals report no size
    bar = tqdm(initial=course.done, disable=not terminal, bar_format=shape, ncols=columns, nrows=lines)
    ahead = course.ahead

    def show() -> None:
        bar.total, done, bar.leave = course.total, course.done, course.is_last
        counts = 2 * len(f"{bar.total or 0}")  # the bar and they need the rest
        total, seconds = bar.total, ahead.of(course, None if bar.total is None else bar.total - done)
        shown = None if seconds is None else bar.format_interval(int(seconds))
        speed = [f"ETA {shown}", f"{ahead.rate:,.1f} documents/s"] if shown and total != done else []
        words = ", ".join(filter(None, [course.place, figures_of(course, speed)]))
        bar.set_description_str(fitted(words, max(20, columns - counts - 18)), refresh=False)
        bar.update(done - bar.n)
        bar.refresh()

    try:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), BAR_INTERVAL if terminal else LINE_INTERVAL)
                break
            show() if terminal else sdg.say(": ".join(filter(None, [course.place, progress_line(course, ahead)])))
    finally:
        show()
        bar.close()


def put(text: str) -> None:
    """Print on standard output, without tearing the bar of what still runs."""
    with contextlib.suppress(OSError, ValueError):  # no one reads it: the run is as good as before
        bar = sys.modules.get("tqdm")
        if bar and getattr(bar.tqdm, "_instances", None):
            bar.tqdm.write(text, file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()


def rate_of(engine: sdg.Engine) -> float:
    """Documents per second in this process, from its first request on."""
    return engine.finished / max(engine.client.lane.seconds, 1e-9)


def fitted(words: str, room: int) -> str:
    """As many of the figures, separated by commas, as fit."""
    return words if len(words) <= room else words[: room + 1].rpartition(", ")[0] or words[:room]


def figures_of(course: Course, speed: Iterable[str] = ()) -> str:
    """The figures beside the bar: first what someone may have to act on, because a terminal may be narrow."""
    engine, figures = course.engines[-1], course.figures
    pool = engine.client.pool  # what overlaps shares it
    pools = {name: model.client.pool for name, model in engine.run.models.items() if model.client}
    every = [upstream for each in (pool, *pools.values()) for upstream in each.upstreams]
    down = [upstream.status for upstream in every if not upstream.up.is_set()]
    if down and len(down) == len(every):  # nothing else to report yet
        return "; ".join(down[:4])
    if (waiting := pool.waiting()) and waiting[0] > LONG_WAIT:
        when = time.strftime("%H:%M", time.localtime(time.time() + waiting[0]))
        return f"waiting until {when}: {waiting[1]}"
    unpublished = [text] if engine.run.options.writer == "hf" and (text := published.waits(engine.run.state)) else []
    loads = [upstream.limit.load for upstream in pool.upstreams if upstream.limit.load and upstream.up.is_set()]
    queue = f" ({sum(load.waiting for load in loads):.0f} queued)" if loads else ""
    rare = {
        "failed": figures["failed"],
        "empty": figures["empty"],
        "retries": retries_in(figures),
        "cached": figures["cache_hits"],
    }
    words = [*unpublished, *(f"{number:,} {name}" for name, number in rare.items() if number), *speed]
    words += [f"{figures['completion_tokens'] / course.seconds:,.0f} tokens/s", f"{pool.active} in flight{queue}"]
    words += [f"{each.active} at {name}" for name, each in pools.items()]
    return ", ".join(words) + "".join(f"; {status}" for status in down[:2])


def progress_line(course: Course, ahead: TimeToGo) -> str:
    """The bar as a line for a log file."""
    done, total = course.done, course.total
    seconds = ahead.of(course, None if total is None else total - done)
    of = f" of {total:,}" if total else ""
    left = f", {seconds:,.0f} s to go" if seconds is not None else ""
    return f"{done:,}{of} documents, {ahead.rate:,.1f} documents/s{left}, {figures_of(course)}"


def report(engine: sdg.Engine, figures: dict[str, Any], in_files: int) -> str:
    """What is done, what was written where, and how to look at it.

    Args:
        engine: that has ended.
        figures: the rank's statistics.
        in_files: documents in chunks that are written.
    """
    run, place = engine.run, engine.run.output
    shown = os.path.relpath(place.root) if place.local else place.uri
    shown = place.root if shown.startswith("../../") else shown
    rows = rows_in(figures, run.options)
    lines = [
        f"{counted(figures['documents'], 'document')}: {counted(rows, 'row')}, {figures['filtered']:,} filtered, "
        f"{figures['failed']:,} failed ({engine.finished:,} of them now, {rate_of(engine):,.1f} documents/s)",
        *unfinished_lines(engine, figures["documents"], in_files),
    ]
    if in_files:
        lines.append(f"rows    {shown}/{os.path.dirname(run.path_of(sdg.Chunk(0, 0)))}")
    if "cost" in figures:
        tokens = figures["prompt_tokens"] + figures["completion_tokens"] + figures.get("estimated_tokens", 0)
        guessed = " (estimated: the server reports no usage)" if "estimated_tokens" in figures else ""
        lines.append(f"cost    {in_money(figures['cost'])} for {tokens:,} tokens{guessed}")
    if share := cached_share(figures):
        lines.append(f"reused  {share:.0%} of the prompt tokens were in the servers' prefix caches")
    if figures["truncated"]:
        lines.append(
            f"cut     {counted(figures['truncated'], 'document')} did not fit the model's context; "
            "--long-documents split processes all of a document, part by part"
        )
    if unusual := {name: n for name, n in figures["finish_reasons"].items() if name not in USUAL}:
        unusual = {"without one" if name == "None" else name: n for name, n in unusual.items()}
        named = ", ".join(f"{n:,} {name}" for name, n in sorted(unusual.items(), key=lambda item: -item[1]))
        lines.append(f"ends    completions that did not end as usual, by finish_reason: {named}")
    if empty := figures["empty"]:
        words = "they are listed as failed, but do not count for --max-failure-rate"
        lines.append(f"empty   {counted(empty, 'document')} without a text in {engine.intake.prompt_column!r}: {words}")
    if figures["failed"]:
        lines += failure_lines(engine, f"{shown}/{os.path.dirname(run.failed_path_of(sdg.Chunk(0, 0)))}")
    if run.options.rollouts_per_document > 1 and figures["failed_rollouts"]:
        lines.append(f"lost    {figures['failed_rollouts']:,} rollouts failed; a document fails only if all of its do")
    lines.append(f"state   {run.state}: stats.json has the figures")
    if figures["documents"]:
        lines.append(f"look    {show_command(run)}{' --failed' * (not figures['rows'] and figures['failed'] > 0)}")
    return "\n".join(lines)


def cached_share(figures: dict[str, Any]) -> float:
    """The share of prompt tokens that servers found in their prefix caches; 0 if none reports that."""
    reported = figures.get("prefix_cache", {})
    hits, of = reported.get("hits", 0), reported.get("queries", 0)
    if not of:
        hits, of = figures.get("cached_tokens", 0), figures["prompt_tokens"]
    return hits / of if of else 0.0


def unfinished_lines(engine: sdg.Engine, documents: int, in_files: int) -> Iterator[str]:
    """What a run that ended early leaves to the next process."""
    expected = engine.intake.expected()
    if not engine.stopping and not engine.intake.retrying:
        return
    if expected is not None and expected > documents:
        how = "--accept-edited-plugin runs them with the new code" if engine.intake.retrying else AGAIN
        yield f"open    {counted(expected - documents, 'document')}: {how}"
    if documents > in_files:
        waiting = counted(documents - in_files, "finished document")
        yield f"saved   {waiting} in the state, written to a file once all of the chunk are finished"


def failure_lines(engine: sdg.Engine, folder: str) -> Iterator[str]:
    """Where the failed documents are, and the most common reasons of this process."""
    yield f"failed  {folder}; run them again with --retry-failed"
    for kind, times in engine.failures.reasons.most_common(3):
        yield f"        {times} × {engine.failures.examples[kind][:150]}"
    if len(engine.failures.reasons) > 3:
        yield f"        and {len(engine.failures.reasons) - 3:,} more reasons"


def show_command(run: sdg.Run) -> str:
    """The command that shows a run's rows."""
    options = run.options
    called = ["sdg"] if program() == "sdg" else ["python", sys.argv[0]]
    words = [*called, "show", "--output", options.output]
    if options.output_config != "data":
        words += ["--config", options.output_config]
    if options.state_dir != default_state_dir(options.output, options.output_config):
        words += ["--state-dir", options.state_dir]
    return shlex.join(words)
