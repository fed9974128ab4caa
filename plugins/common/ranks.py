"""How the ranks of a run are doing, and the run as a whole, according to the figures in its state."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common.attempts import Attempt, attempt_of
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.markdown import inline, public, short_line
from sdg_plugins.common.slurm import Queue
from sdg_plugins.common.statistics import HEARTBEAT, statistics_of, sum_statistics

FRESH = 12.0  # s that a heartbeat counts more than Slurm's queue
SILENT = 120.0  # s without a heartbeat after which a rank no longer counts as running
SKEW = 3600.0  # s by which clocks of machines may differ
SECOND_LOOK = 12.0  # s after which a heartbeat has changed, if its rank is alive
BAR = 30  # characters


class Rank(NamedTuple):
    """One rank, according to its figures."""

    number: int
    # running, silent, finished, stopped, failed, broken, or waiting if it has not begun; according to Slurm's queue
    # also lost (its job is gone, and it has recorded no end) or requeued
    state: str
    figures: dict[str, Any]
    attempt: Attempt | None = None  # the last one

    @property
    def record(self) -> dict[str, Any]:
        """Status, host and error, as the rank recorded them."""
        record: dict[str, Any] = self.figures.get("rank", {})
        return record

    @property
    def documents(self) -> int:
        """Documents that are final."""
        return int(self.figures.get("documents", 0))

    @property
    def rate(self) -> float:
        """Documents per second, over the last heartbeats."""
        return float(self.record.get("documents_per_second", 0.0)) if self.state == "running" else 0.0

    @property
    def updated(self) -> float:
        """Time of the last heartbeat, in s since the epoch; 0 if there was none."""
        return float(self.record.get("updated", 0.0))

    @property
    def waiting(self) -> str:
        """Until when it sends nothing, and why; "" if it does not wait for a server."""
        pause = self.record.get("waiting") or {}
        if self.state != "running" or pause.get("until", 0.0) <= time.time():
            return ""
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(pause["until"]))
        return f"nothing is sent until {until}: {short_line(pause['reason'])}"

    @property
    def loading(self) -> str:
        """What its server is doing until it is ready; "" if it is."""
        return str((self.record.get("loading") or {}).get("phase", "")) if self.state == "running" else ""

    @property
    def loading_for(self) -> float:
        """For how many seconds the server has been loading."""
        since = float((self.record.get("loading") or {}).get("since", time.time()))
        return max(0.0, time.time() - since)

    @property
    def node(self) -> str:
        """The host on which it ran, or on which a part of its server failed."""
        return (self.attempt and self.attempt.node) or str(self.record.get("host") or "")

    def in_queue(self, queue: Queue | None) -> str | None:
        """The state of its Slurm job; "" if the job has left the queue, None if that is unknown."""
        return queue.state_of(self.record.get("slurm_job"), self.record.get("slurm_task")) if queue else None

    def according_to(self, queue: Queue | None) -> Rank:
        """The rank with the state that follows from Slurm's queue, too."""
        known = self.in_queue(queue)
        if known == "" and self.state in {"running", "silent"}:
            return self._replace(state="lost")
        pending = known == "PENDING" and self.state in {"running", "silent", "failed", "stopped"}
        return self._replace(state="requeued") if pending else self

    def alive(self) -> Rank:
        """The rank if its heartbeat has changed just now, whatever time it has."""
        record = {**self.record, "updated": time.time()}
        return self._replace(state="running", figures={**self.figures, "rank": record})

    @property
    def error(self) -> str:
        """Why it ended early, in one line; "" if it did not."""
        return short_line(self.record["error"]) if self.record.get("error") else ""


def ranks_of(state: Path, world_size: int) -> list[Rank]:
    """All ranks of a run, from the files in its state."""
    return [_read_rank(state, number) for number in range(world_size)]


class Looks:
    """The ranks as one process sees them again and again: clocks of machines differ, so what counts is what changes.

    A rank on another machine is alive if its heartbeat has changed since an earlier look, whatever time it has. The
    time of its heartbeat becomes that at which we first saw it, according to our clock.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float, bool]] = {}  # heartbeat, since when, whether it changed

    def look(self, run: sdg.Run) -> list[Rank]:
        """All ranks of a run now."""
        return [self._seen_here(rank) for rank in ranks_of(run.state, run.options.world_size)]

    def _seen_here(self, rank: Rank) -> Rank:
        if rank.state not in {"running", "silent"} or by_our_clock(rank):
            return rank
        now = time.monotonic()
        beat, since, changed = self._seen.get(rank.number, (rank.updated, now, False))
        if beat != rank.updated:
            since, changed = now, True
        self._seen[rank.number] = (rank.updated, since, changed)
        quiet = now - since
        state = "silent" if quiet > SILENT else "running" if changed else rank.state
        record = {**rank.record, "updated": time.time() - quiet}
        return rank._replace(state=state, figures={**rank.figures, "rank": record})


def by_our_clock(rank: Rank) -> bool:
    """True if the time of a rank's heartbeat is that of this machine's clock, which was not set back since then."""
    return rank.record.get("host") in {None, platform.node()} and time.time() - rank.updated >= -HEARTBEAT / 2


def in_doubt(rank: Rank) -> bool:
    """True if one look cannot tell whether a rank is alive, because its clock may differ from ours."""
    if rank.state not in {"running", "silent"} or by_our_clock(rank):
        return False
    age = time.time() - rank.updated
    return age < -HEARTBEAT / 2 or SILENT < age < SKEW


def looked_at_again(ranks: list[Rank], read: Callable[[], list[Rank]]) -> list[Rank]:
    """Ranks after a second look at those in doubt, for which it waits up to SECOND_LOOK.

    Args:
        ranks: as they were at the first look.
        read: returns the ranks as they are now.
    """
    doubtful = {rank.number: rank.updated for rank in ranks if in_doubt(rank)}
    found = {rank.number: rank for rank in ranks}
    deadline = time.monotonic() + SECOND_LOOK
    if doubtful:
        sdg.say(f"waiting for the next heartbeat of rank {ranges(sorted(doubtful))}: clocks of machines may differ")
    while doubtful and time.monotonic() < deadline:
        time.sleep(min(0.5, SECOND_LOOK))
        for rank in read():
            if rank.number in doubtful and rank.updated != doubtful[rank.number]:
                del doubtful[rank.number]
                found[rank.number] = rank.alive() if rank.state in {"running", "silent"} else rank
    return [rank._replace(state="silent") if rank.number in doubtful else found[rank.number] for rank in ranks]


def _read_rank(state: Path, number: int) -> Rank:
    try:
        figures = statistics_of(rank_file(state, number, "stats.json"))
    except sdg.StateError as exc:
        return Rank(number, "broken", {"rank": {"status": "broken", "error": str(exc)}})
    attempt = attempt_of(state, number)
    figures = _completed(figures, attempt)
    return Rank(number, _rank_state(figures.get("rank", {})) if figures else "waiting", figures, attempt)


def _completed(figures: dict[str, Any], attempt: Attempt | None) -> dict[str, Any]:
    """The figures with the end of an attempt that could not write it there: it was killed, or failed early."""
    record = figures.get("rank", {})
    if attempt is None or attempt.ended is None or attempt.code == 0 or attempt.ended < record.get("updated", 0.0):
        return figures
    if record.get("status", "running") != "running":
        return figures
    status = {130: "stopped", 143: "stopped"}.get(attempt.code or 0, "failed")
    job, _, task = attempt.job.partition("_")
    own = {"status": status, "error": attempt.error, "updated": attempt.ended, "host": attempt.host}
    return {**figures, "rank": {**record, **own, "slurm_job": job or None, "slurm_task": task or None}}


def begun_ranks(state: Path) -> list[Rank]:
    """The ranks of a run of which none has got as far as to record its options; empty if none has begun."""
    files = [path for kind in ("stats", "attempt") for path in state.glob(f"[0-9]*.{kind}.json")]
    numbers = {int(path.name.partition(".")[0]) for path in files}
    ranks = [rank for number in sorted(numbers) if (rank := _read_rank(state, number)).state != "waiting"]
    return ranks_of(state, max((int(rank.record.get("world_size") or rank.number + 1) for rank in ranks), default=0))


def why_not_begun(state: Path) -> str:
    """What the ranks of a run without recorded options are doing, or why they ended; "" if none has begun."""
    overview = Overview.of_ranks(begun_ranks(state))
    return "; ".join(filter(None, [overview.summary() if overview.ranks else "", overview.loading]))


def _rank_state(record: dict[str, Any]) -> str:
    """The recorded status; a rank that records nothing for a while, although it should be running, is silent."""
    status = str(record.get("status", "failed"))
    return "silent" if status == "running" and time.time() - record.get("updated", 0.0) > SILENT else status


class Overview(NamedTuple):
    """A run, according to the figures of its ranks."""

    ranks: int
    states: Counter[str]  # number of ranks in each state; see `Rank.state`
    documents: int
    expected: int | None
    rate: float  # documents per second, over the last heartbeats
    tokens_per_second: float
    error: str  # the last one, with its rank
    waiting: str  # why a rank sends nothing just now, if one does
    loading: str  # how many ranks are loading their servers, and what the first of them is doing
    jobs: frozenset[str]  # IDs of Slurm jobs
    updated: float  # time of the last heartbeat of any rank, in s since the epoch

    @classmethod
    def of_run(cls, run: sdg.Run) -> Overview:
        """The overview of a run, from its state."""
        return cls.of_ranks(ranks_of(run.state, run.options.world_size))

    @classmethod
    def of_ranks(cls, ranks: list[Rank]) -> Overview:
        """The overview of the run to which these ranks belong."""
        total = sum_statistics([rank.figures for rank in ranks])
        documents = int(total.get("documents", 0))
        known = [rank.record["expected"] for rank in ranks if rank.record.get("expected") is not None]
        rate = sum(rank.rate for rank in ranks)
        last = max((rank for rank in ranks if rank.error), key=lambda rank: (rank.updated, rank.number), default=None)
        return cls(
            ranks=len(ranks),
            states=Counter(rank.state for rank in ranks),
            documents=documents,
            expected=round(sum(known) * len(ranks) / len(known)) if known else None,
            rate=rate,
            tokens_per_second=rate * total.get("completion_tokens", 0) / max(1, documents),
            error=f"{last.error} (rank {last.number})" if last else "",
            waiting=next((rank.waiting for rank in ranks if rank.waiting), ""),
            loading=loading_line([rank for rank in ranks if rank.loading]),
            jobs=frozenset(str(rank.record["slurm_job"]) for rank in ranks if rank.record.get("slurm_job")),
            updated=max((rank.updated for rank in ranks), default=0.0),
        )

    @property
    def finished(self) -> bool:
        """True if all ranks have finished."""
        return self.states["finished"] == self.ranks

    @property
    def active(self) -> bool:
        """True if a rank is running, and has said so within the last seconds."""
        return bool(self.states["running"]) and time.time() - self.updated < FRESH

    @property
    def done(self) -> str:
        """The number of documents that are final, and of those expected: `80 of 300`."""
        return f"{self.documents:,} of {self.expected:,}" if self.expected else f"{self.documents:,}"

    def early_end(self, jobs: set[str], patience: float, began: float) -> str:
        """Why no more progress is expected of an unfinished run; "" if it has finished or may still go on.

        Args:
            jobs: IDs of Slurm jobs; the run may go on as long as one of them is in the queue.
            patience: s without a heartbeat that are tolerated if the state of the queue is unknown.
            began: time since which heartbeats were expected, in s since the epoch, in case there was none at all.
        """
        if self.finished or self.active:
            return ""
        queue = Queue.now() if jobs else None
        queued = None if queue is None else bool(jobs & queue.jobs)
        if self.states["running"] and queued is not False:
            return ""
        if self.states["running"]:
            states = self.states + Counter(lost=self.states["running"]) - Counter(running=self.states["running"])
            return self._replace(states=states).early_end(jobs, patience, began)
        if queued is not None:
            return "" if queued else f"the job has left the queue, {self.summary()}"
        if not self.states["waiting"] and not self.states["silent"]:
            return self.summary()
        quiet = time.time() - max(self.updated, began if self.states["waiting"] else 0.0)
        return f"no heartbeat for {rounded_duration(quiet)}, {self.summary()}" if quiet > patience else ""

    def ranks_by_state(self) -> str:
        """The number of ranks in each state; those that have not begun come last."""
        states = sorted(self.states, key="waiting".__eq__)
        return ", ".join(f"{self.states[state]:,} {state}" for state in states if self.states[state])

    def summary(self) -> str:
        """The ranks by state, and the last error."""
        return f"ranks: {self.ranks_by_state()}" + (f"; last error: {self.error}" if self.error else "")

    @property
    def seconds_to_go(self) -> float | None:
        """The remaining time at the present rate; None if nothing is left, or the rate is unknown."""
        left = (self.expected or 0) - self.documents
        return left / self.rate if left > 0 and self.rate > 0 else None

    def speed(self) -> str:
        """Documents and tokens per second, and the remaining time at this rate."""
        to_go = f", {rounded_duration(self.seconds_to_go)} to go" if self.seconds_to_go is not None else ""
        return f"{self.rate:,.1f} documents/s, {self.tokens_per_second:,.0f} tokens/s{to_go}"

    def log_line(self) -> str:
        """Progress, speed and ranks in one line."""
        words = [f"{self.done} documents, {self.speed()}", self.loading, self.summary()]
        return "; ".join(filter(None, words))

    def markdown(self, early_end: str = "") -> str:
        """The progress section of the card, or a note on an early end; "" if the run has finished."""
        if self.finished:
            return ""
        if early_end:
            return f"> **Ended early**, after {self.done} documents: {inline(public(early_end))}\n"
        share = min(1.0, self.documents / self.expected) if self.expected else 0.0
        bar = "█" * int(BAR * share) + "░" * (BAR - int(BAR * share))  # rounded down: full only at 100 %
        lines = [
            "**This dataset is being generated.**\n",
            f"`{bar}` {int(100 * share)} %\n",
            f"- documents: {self.done}",
            f"- speed: {self.speed()}",
            f"- ranks: {self.ranks_by_state()}",
        ]
        if self.loading:
            lines.append(f"- loading: {inline(public(self.loading))}")
        if self.waiting:
            lines.append(f"- waiting: {inline(public(self.waiting))}")
        if self.error:
            lines.append(f"- last error: {inline(public(self.error))}")
        return "\n".join(lines) + "\n"


def progress_section(run: sdg.Run) -> str:
    """The progress of a run as markdown, for its card."""
    return Overview.of_run(run).markdown()


def loading_line(ranks: list[Rank]) -> str:
    """What ranks do that load servers, such as `1 rank has been loading its server for 4 min: compiling`."""
    if not ranks:
        return ""
    longest = max(ranks, key=lambda rank: rank.loading_for)
    who, whose = ("1 rank has", "its server") if len(ranks) == 1 else (f"{len(ranks):,} ranks have", "their servers")
    return f"{who} been loading {whose} for {rounded_duration(longest.loading_for)}: {short_line(phase_of(longest))}"


def phase_of(rank: Rank) -> str:
    """The phase of the start that the rank's server has reached, without the server's name."""
    return rank.loading.partition(": ")[2] or rank.loading


def rounded_duration(seconds: float) -> str:
    """A duration in whole seconds, minutes, hours or days, such as `17 min`."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in the syntax of `sbatch --array`: `0-3,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
