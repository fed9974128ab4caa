"""The command `monitor`: how far a run is, on its card, and what its ranks have written, on the Hub."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import subprocess
import time
from collections import Counter
from typing import Any, NamedTuple

import sdg

from . import card, hub, recorded
from .publishing import Publisher

SILENT = 120.0  # s without a heartbeat, and a rank does not count as running
BAR = 30  # characters


@sdg.hookimpl
def register_commands(register: sdg.Register) -> None:
    register("monitor", monitor)


def monitor(argv: list[str]) -> int:
    """Publish what is written and keep the card's progress up to date until the run ends."""
    parser = argparse.ArgumentParser(prog="sdg.py monitor", description=monitor.__doc__)
    recorded.add_options(parser)
    interval, patience = sdg.number(float, 0.1), sdg.number(float, 1)
    parser.add_argument("--interval", metavar="S", type=interval, default=300.0, help="seconds between two looks [300]")
    parser.add_argument("--job", metavar="ID", action="append", default=[], help="Slurm job to watch; repeatable")
    parser.add_argument(
        "--patience", metavar="S", type=patience, default=3600.0, help="seconds of silence until it ends [3600]"
    )
    asked = parser.parse_args(argv)
    run = wait_for_run(asked)
    with contextlib.ExitStack() as stack:
        publisher = None
        if card.spooled(run):
            publisher = stack.enter_context(contextlib.closing(Publisher(run)))
            hub.patiently(publisher.prepare, publisher.address, run.stopping)
        return watch(run, publisher, asked)


def wait_for_run(asked: argparse.Namespace) -> sdg.Run:
    """The run, as soon as its first rank has begun."""
    state = recorded.state_of(asked)
    began = time.monotonic()
    while not (state / "run.json").exists():
        if asked.job and not any_queued(set(asked.job)):
            raise sdg.StateError(f"job {', '.join(asked.job)} has ended, and nothing was begun in {state}")
        if not asked.job and time.monotonic() - began > asked.patience:
            raise sdg.StateError(f"no run was begun in {state}: is --output right, and --state-dir, if it has one?")
        if time.monotonic() - began < 1:
            sdg.say(f"sdg: waiting for a run to begin in {state}")
            time.sleep(1)
        time.sleep(min(asked.interval, 5.0))
    return recorded.open_run(asked)


def watch(run: sdg.Run, publisher: Publisher | None, asked: argparse.Namespace) -> int:
    """Look, publish and wait, until the run has ended. Returns 1 if not all ranks have finished."""
    told = ""
    while True:
        seen = look(run)
        ending = seen.ending(set(asked.job), asked.patience)
        try:
            publish(
                run, publisher, "" if seen.finished else f"**Ended early**: {ending}" if ending else seen.markdown()
            )
            told = ""
        except sdg.Error as problem:
            if seen.finished or ending:
                raise
            if str(problem) != told:
                told = str(problem)
                sdg.say(f"sdg: {problem}; it is tried again every {asked.interval:g} s")
        sdg.say(f"sdg: {seen.line()}")
        if seen.finished or ending:
            print(f"{ending or 'the run has finished'}: {publisher.url if publisher else run.output.path(card.NAME)}")
            return 0 if seen.finished else 1
        time.sleep(asked.interval)


def publish(run: sdg.Run, publisher: Publisher | None, progress: str) -> None:
    """Bring the Hub, or the card of an output elsewhere, up to date."""
    if publisher is None:
        card.write(run, progress)
        return
    publisher.finish(progress)


def progress(run: sdg.Run) -> str:
    """How far a run is, for its card."""
    return look(run).markdown()


class Seen(NamedTuple):
    """A run as its ranks' figures show it."""

    ranks: int
    states: Counter[str]  # of the ranks: running, silent, finished, stopped, failed, waiting
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

    def ending(self, jobs: set[str], patience: float) -> str:
        """Why nothing more is to be expected of a run that has not finished; "" if something is."""
        if self.finished:
            return ""
        jobs = jobs | self.jobs
        if jobs:
            return "" if any_queued(jobs) else f"the job has left the queue, {self.summary()}"
        if not self.states["running"] and not self.states["waiting"] and not self.states["silent"]:
            return self.summary()
        quiet = time.time() - self.updated
        return f"nothing was heard for {duration(quiet)}, {self.summary()}" if quiet > patience else ""

    def summary(self) -> str:
        """The ranks in a few words."""
        counted = ", ".join(f"{number} {state}" for state, number in self.states.items() if number)
        return f"ranks: {counted}" + (f"; last error: {self.error}" if self.error else "")

    def line(self) -> str:
        """All in a line, for a log."""
        of = f" of {self.expected:,}" if self.expected else ""
        rate = f"{self.rate:,.1f} documents/s, {self.tokens_per_second:,.0f} tokens/s"
        return f"{self.documents:,}{of} documents, {rate}{self.eta()}; {self.summary()}"

    def eta(self) -> str:
        """How long it takes at the present rate."""
        left = (self.expected or 0) - self.documents
        return f", {duration(left / self.rate)} to go" if left > 0 and self.rate > 0 else ""

    def markdown(self) -> str:
        """The progress section of the card."""
        share = min(1.0, self.documents / self.expected) if self.expected else 0.0
        bar = "█" * round(BAR * share) + "░" * (BAR - round(BAR * share))
        ranks = ", ".join(f"{number} {state}" for state, number in self.states.items() if number)
        lines = [
            "**This dataset is being generated.**\n",
            f"`{bar}` {100 * share:.0f} %\n",
            f"- documents: {self.documents:,}" + (f" of {self.expected:,}" if self.expected else ""),
            f"- speed: {self.rate:,.1f} documents/s, {self.tokens_per_second:,.0f} tokens/s{self.eta()}",
            f"- ranks: {ranks}",
        ]
        if self.error:
            lines.append(f"- last error: {card.inline(self.error)}")
        return "\n".join(lines) + "\n"


def look(run: sdg.Run) -> Seen:
    """What the state says of all ranks."""
    files = sdg.rank_statistics(run.state)
    records = [file.get("rank", {}) for file in files]
    world = run.options.world_size
    states = Counter(state_of(record) for record in records)
    states["waiting"] = max(0, world - len(records))
    total = sdg.sum_statistics(files)
    documents = int(total.get("documents", 0))
    known = [record["expected"] for record in records if record.get("expected") is not None]
    running = [record for record in records if state_of(record) == "running"]
    rate = sum(record.get("documents_per_second", 0.0) for record in running)
    failed = [
        (record["updated"], number, record["error"]) for number, record in enumerate(records) if record.get("error")
    ]
    return Seen(
        ranks=world,
        states=states,
        documents=documents,
        expected=round(sum(known) * world / len(known)) if known else None,
        rate=rate,
        tokens_per_second=rate * total.get("completion_tokens", 0) / max(1, documents),
        error=f"{max(failed)[2]} (rank {max(failed)[1]})" if failed else "",
        jobs=frozenset(record["slurm_job"] for record in records if record.get("slurm_job")),
        updated=max([record["updated"] for record in records], default=0.0),
    )


def state_of(record: dict[str, Any]) -> str:
    """How a rank is doing: one that says it runs must have said so lately."""
    status = str(record.get("status", "failed"))
    return "silent" if status == "running" and time.time() - record["updated"] > SILENT else status


def any_queued(jobs: set[str]) -> bool:
    """Whether one of some jobs is in Slurm's queue; where nobody can tell, it may be."""
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%F %A"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return True
    return bool(jobs & set(answer.stdout.split()))


def duration(seconds: float) -> str:
    """A time that people can read."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
