"""What Slurm knows of a run: which jobs are in its queue, and how the run was submitted."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SUBMISSION = "submission"  # file of the state that submit.sh writes: words that end with NUL


class Queue(NamedTuple):
    """Slurm's queue of this user.

    Attributes:
        jobs: numbers of all jobs; an array's tasks have numbers of their own beside the array's.
        states: of each job or task, by its name (`JOB` or `ARRAY_TASK`); empty if `squeue` does not say.
    """

    jobs: frozenset[str]
    states: dict[str, str]

    @classmethod
    def now(cls) -> Queue | None:
        """The queue; None if `squeue` fails."""
        command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F %A %K %T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        jobs: set[str] = set()
        states: dict[str, str] = {}
        for line in answer.stdout.splitlines():
            words = line.split()
            jobs.update(words[:2])
            if len(words) == 4:
                array, job, task, state = words
                states[f"{array}_{task}" if task.isdigit() else job] = state
        return cls(frozenset(jobs), states)

    def state_of(self, job: str | None, task: str | None) -> str | None:
        """The state of a job or of one task of an array; "" if it has left the queue, None if that is unknown."""
        if not job:
            return None
        if job not in self.jobs:
            return ""
        name = f"{job}_{task}" if task else job
        if name in self.states:
            return self.states[name]
        others = any(known.partition("_")[0] == job for known in self.states)
        return "" if task and others else None


def any_queued(jobs: Iterable[str]) -> bool | None:
    """True if one of some jobs is in Slurm's queue; None if there are no jobs, or `squeue` fails."""
    jobs = set(jobs)
    queue = Queue.now() if jobs else None
    return None if queue is None else bool(jobs & queue.jobs)


def other_jobs(jobs: Iterable[str]) -> set[str]:
    """Slurm jobs without the one that this process belongs to, which is in the queue as long as it runs."""
    own = {os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")}
    return {job for job in jobs if job not in own}


class Submission(NamedTuple):
    """How `submit.sh` was called for a run."""

    jobs: list[str]  # of the ranks
    folder: str
    script: str
    words: list[str]

    @classmethod
    def of_run(cls, state: Path) -> Submission | None:
        """The last submission of a run; None if it was not submitted by submit.sh."""
        with contextlib.suppress(OSError, ValueError):
            jobs, folder, script, *words = (state / SUBMISSION).read_bytes().decode().rstrip("\0").split("\0")
            return cls(jobs.split(","), folder, script, words)
        return None

    def again(self, array: str, exclude: str = "") -> str:
        """The command that submits some of the ranks again, without a node if `exclude` names one."""
        end = self.words.index("--") if "--" in self.words else len(self.words)
        own, options, skip = [], self.words[end:], False
        for word in self.words[:end]:
            if not skip and word != "--array" and not word.startswith("--array="):
                own.append(word)
            skip = word == "--array" and not skip
        workers = any(word.partition("=")[0] == "--workers" for word in own)  # take whichever rank is open
        ranks = [] if workers else ["--array", array]
        excluded = [f"--exclude={exclude}"] if exclude else []
        command = shlex.join([self.script, *own, *ranks, *excluded, *options])
        here = os.path.realpath(self.folder) == os.getcwd()
        return command if here else f"cd {shlex.quote(self.folder)} && {command}"
