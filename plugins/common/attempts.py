"""Attempts: each process of a rank records how it began and, last of all, how it ended.

Job scripts decide by it whether another attempt may succeed: `srun` reports the highest status of several tasks, 143 of
a task that was ended with the others, and 1 if any process of a step was killed for memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.locks import lock_rank
from sdg_plugins.common.state import replace_file
from sdg_plugins.common.statistics import statistics_of


@dataclasses.dataclass
class Attempt:
    """One process of a rank.

    Attributes:
        job: the Slurm job, for a task of an array `JOB_TASK`; "" outside of Slurm.
        restart: how often Slurm had restarted the job before.
        host: where the engine runs.
        began: time in s since the epoch; 0 if it ended before the rank's work began.
        before: the rank's progress when it began; see `progress_of`.
        ended: time in s since the epoch; None if it still runs, or was killed.
        code: exit code; None as long as `ended` is.
        cause: type of the error that ended it.
        error: its message.
        node: host on which the server failed.
        fruitless: attempts of this job in a row that ended without progress; counted by the job script's `ended`.
        excluded: hosts that the job script has excluded.
    """

    job: str = ""
    restart: int = 0
    host: str = ""
    began: float = 0.0
    before: int = 0
    ended: float | None = None
    code: int | None = None
    cause: str | None = None
    error: str | None = None
    node: str | None = None
    fruitless: int = 0
    excluded: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_mine(self) -> bool:
        """True if it belongs to this restart of the Slurm job in which this process runs."""
        return bool(self.job) and (self.job, self.restart) == (slurm_job(), slurm_restart())


def slurm_job() -> str:
    """The Slurm job of this process: `JOB`, `JOB_TASK` for a task of an array, "" outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def slurm_restart() -> int:
    """How often Slurm has restarted the job of this process."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def attempt_of(state: Path, rank: int) -> Attempt | None:
    """The last attempt of a rank; None if there was none, or its record is broken."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Attempt(**json.loads(rank_file(state, rank, "attempt.json").read_bytes()))
    return None


def progress_of(state: Path, rank: int) -> int:
    """A number that grows with each durable response and document of a rank."""
    figures: dict[str, Any] = {}
    with contextlib.suppress(sdg.StateError):
        figures = statistics_of(rank_file(state, rank, "stats.json"))
    return int(figures.get("documents", 0)) + int(figures.get("requests", 0))


def runs_the_engine(run: sdg.Run) -> bool:
    """False in the processes of a rank that only run a part of its server on another node."""
    nodes, number = getattr(run.options, "nodes", 1), getattr(run.options, "node_rank", None)
    return nodes == 1 or int(os.environ.get("SLURM_NODEID", "0") if number is None else number) == 0


def begin_attempt(run: sdg.Run) -> None:
    """Record that an attempt has begun; the rank must be locked."""
    earlier = attempt_of(run.state, run.options.rank)
    attempt = Attempt(slurm_job(), slurm_restart(), platform.node(), round(time.time(), 3))
    attempt.before = progress_of(run.state, run.options.rank)
    if earlier and earlier.job == attempt.job:
        attempt.fruitless, attempt.excluded = earlier.fruitless, earlier.excluded
    write_attempt(run, attempt)


def end_attempt(run: sdg.Run, problem: BaseException | None) -> None:
    """Record how this process ended, unless another process works on the rank, or the engine runs elsewhere."""
    if not runs_the_engine(run) or (run.output.fence and run.output.fence.is_lost()):
        return
    with contextlib.suppress(sdg.StateError, OSError), lock_rank(run):  # a full disk is reported elsewhere
        attempt = attempt_of(run.state, run.options.rank)
        if not attempt or not attempt.began or attempt.ended or attempt.host != platform.node():
            begin_attempt(run)
            attempt = attempt_of(run.state, run.options.rank) or Attempt()
            attempt.began = 0.0
        attempt.ended, attempt.code = round(time.time(), 3), exit_code_of(problem)
        if problem is not None:
            attempt.cause, attempt.error = type(problem).__name__, sdg.one_line(problem)
            attempt.node = getattr(problem, "node", None)
        write_attempt(run, attempt)


def write_attempt(run: sdg.Run, attempt: Attempt) -> None:
    """Write the record of an attempt, whole and durable."""
    name = rank_file(run.state, run.options.rank, "attempt.json").name
    replace_file(run, name, json.dumps(dataclasses.asdict(attempt), indent=2).encode())


def exit_code_of(problem: BaseException | None) -> int:
    """The exit code of a process that ends with an exception; see `sdg.main`."""
    if problem is None:
        return 0
    stopped = isinstance(problem, asyncio.CancelledError | KeyboardInterrupt)
    return int(getattr(problem, "exit_code", 130 if stopped else 1))
