from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common.markdown import inline, line, public
from sdg_plugins.common.statistics import statistics_of, sum_statistics

SILENT = 120.0  # s without a heartbeat, and a rank does not count as running
BAR = 30  # characters


def progress(run: sdg.Run) -> str:
    """How far a run is, for its card."""
    return look(run).markdown()


class Seen(NamedTuple):
    """A run as its ranks' figures show it."""

    ranks: int
    states: Counter[str]  # of the ranks: running, silent, finished, stopped, failed, broken, waiting
    documents: int
    expected: int | None
    rate: float  # documents a second, of late
    tokens_per_second: float
    error: str  # the last one, and whose
    jobs: frozenset[str]  # of Slurm
    updated: float  # when a rank was heard of last; s since the epoch

    @property
    def finished(self) -> bool:
        """Whether all is done."""
        return self.states["finished"] == self.ranks

    def ending(self, jobs: set[str], patience: float, began: float) -> str:
        """Why nothing more is to be expected of a run that has not finished; "" if something is.

        Args:
            jobs: of Slurm; the run goes on as long as one of them is in the queue.
            patience: seconds of silence that are borne where Slurm does not tell.
            began: when the silence began if no rank was ever heard of.
        """
        if self.finished or self.states["running"]:
            return ""
        queued = any_queued(jobs)
        if queued is not None:
            return "" if queued else f"the job has left the queue, {self.summary()}"
        if not self.states["waiting"] and not self.states["silent"]:
            return self.summary()
        quiet = time.time() - max(self.updated, began if self.states["waiting"] else 0.0)
        return f"nothing was heard for {duration(quiet)}, {self.summary()}" if quiet > patience else ""

    def counted(self) -> str:
        """The ranks, by how they are doing; those that have not begun come last."""
        states = sorted(self.states, key="waiting".__eq__)
        return ", ".join(f"{self.states[state]:,} {state}" for state in states if self.states[state])

    def summary(self) -> str:
        """The ranks in a few words."""
        return f"ranks: {self.counted()}" + (f"; last error: {self.error}" if self.error else "")

    def speed(self) -> str:
        """What is done in a second, and how long it takes at this rate."""
        return f"{self.rate:,.1f} documents/s, {self.tokens_per_second:,.0f} tokens/s{self.eta()}"

    def line(self) -> str:
        """All in a line, for a log."""
        of = f" of {self.expected:,}" if self.expected else ""
        return f"{self.documents:,}{of} documents, {self.speed()}; {self.summary()}"

    def eta(self) -> str:
        """How long it takes at the present rate."""
        left = (self.expected or 0) - self.documents
        return f", {duration(left / self.rate)} to go" if left > 0 and self.rate > 0 else ""

    def markdown(self, ending: str = "") -> str:
        """The progress section of the card, or a word on an early end; "" if all is done."""
        if self.finished:
            return ""
        of = f" of {self.expected:,}" if self.expected else ""
        if ending:
            return f"> **Ended early**, after {self.documents:,}{of} documents: {inline(public(ending))}\n"
        share = min(1.0, self.documents / self.expected) if self.expected else 0.0
        bar = "█" * int(BAR * share) + "░" * (BAR - int(BAR * share))  # full, and 100 %, when all is done
        lines = [
            "**This dataset is being generated.**\n",
            f"`{bar}` {int(100 * share)} %\n",
            f"- documents: {self.documents:,}{of}",
            f"- speed: {self.speed()}",
            f"- ranks: {self.counted()}",
        ]
        if self.error:
            lines.append(f"- last error: {inline(public(self.error))}")
        return "\n".join(lines) + "\n"


def look(run: sdg.Run) -> Seen:
    """What the state says of all ranks."""
    return overall(ranks_of(run.state, run.options.world_size))


class Rank(NamedTuple):
    """One rank, as its figures show it."""

    number: int
    state: str  # running, silent, finished, stopped, failed, broken, or waiting if it has not begun
    figures: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What the rank says of itself."""
        record: dict[str, Any] = self.figures.get("rank", {})
        return record

    @property
    def documents(self) -> int:
        """Documents that are final."""
        return int(self.figures.get("documents", 0))

    @property
    def rate(self) -> float:
        """Documents a second, of late."""
        return float(self.record.get("documents_per_second", 0.0)) if self.state == "running" else 0.0

    @property
    def updated(self) -> float:
        """When it was heard of last; s since the epoch, 0 if it has not begun."""
        return float(self.record.get("updated", 0.0))

    @property
    def error(self) -> str:
        """Why it ended early, in a line; "" if it did not."""
        return line(self.record["error"]) if self.record.get("error") else ""


def ranks_of(state: Path, world_size: int) -> list[Rank]:
    """All ranks of a run, from the files in its state."""
    return [rank_of(state, number) for number in range(world_size)]


def rank_of(state: Path, number: int) -> Rank:
    """One rank. What is broken is a rank that needs looking after."""
    try:
        figures = statistics_of(state / f"{number:05d}.stats.json")
    except sdg.StateError as problem:
        return Rank(number, "broken", {"rank": {"status": "broken", "error": str(problem)}})
    return Rank(number, state_of(figures.get("rank", {})) if figures else "waiting", figures)


def overall(ranks: list[Rank]) -> Seen:
    """The run that these are the ranks of."""
    total = sum_statistics([rank.figures for rank in ranks])
    documents = int(total.get("documents", 0))
    known = [rank.record["expected"] for rank in ranks if rank.record.get("expected") is not None]
    rate = sum(rank.rate for rank in ranks)
    last = max((rank for rank in ranks if rank.error), key=lambda rank: (rank.updated, rank.number), default=None)
    return Seen(
        ranks=len(ranks),
        states=Counter(rank.state for rank in ranks),
        documents=documents,
        expected=round(sum(known) * len(ranks) / len(known)) if known else None,
        rate=rate,
        tokens_per_second=rate * total.get("completion_tokens", 0) / max(1, documents),
        error=f"{last.error} (rank {last.number})" if last else "",
        jobs=frozenset(str(rank.record["slurm_job"]) for rank in ranks if rank.record.get("slurm_job")),
        updated=max((rank.updated for rank in ranks), default=0.0),
    )


def state_of(record: dict[str, Any]) -> str:
    """How a rank is doing: one that says it runs must have said so lately."""
    status = str(record.get("status", "failed"))
    return "silent" if status == "running" and time.time() - record.get("updated", 0.0) > SILENT else status


def others(jobs: list[str]) -> set[str]:
    """Jobs without the one that we are part of: it is in the queue as long as we are."""
    own = {os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")}
    return {job for job in jobs if job not in own}


def any_queued(jobs: set[str]) -> bool | None:
    """Whether one of some jobs is in Slurm's queue; None where nobody can tell."""
    if not jobs:
        return None
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F %A"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(jobs & set(answer.stdout.split()))


def duration(seconds: float) -> str:
    """A time that people can read."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
