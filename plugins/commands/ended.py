"""The command `ended`: tells a job script how the rank's engine ended, and whether another attempt may succeed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import os
import platform
import time
from pathlib import Path
from typing import NamedTuple

import sdg
from sdg_plugins.common.attempts import (
    Attempt,
    attempt_of,
    progress_of,
    slurm_job,
    slurm_restart,
    write_attempt,
)
from sdg_plugins.common.command_line import Config, parse_configs
from sdg_plugins.common.files import output_place
from sdg_plugins.common.locks import lock_rank
from sdg_plugins.common.options import Parser

FRUITLESS = 3  # attempts in a row without progress that end a job
EARLY = 600.0  # s within which an error is taken for one that another attempt would meet, too; SDG_EARLY overrides it
FINAL = {0, 2, 3, 4, 130}  # success, invalid options, too many failures, a used-up budget, Ctrl-C
SERVER_FAILURES = {"NodeFailure", "OutOfMemory"}
PERMANENT = {"UsageError", "InputError", "PluginError", "InvalidServerOptions"}


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("ended", ended)


class Verdict(NamedTuple):
    """What a job script does after an attempt.

    Attributes:
        code: the exit status of the job.
        requeue: another attempt may succeed.
        why: for the log.
        fruitless: attempts in a row without progress, this one included.
        avoid: host that the next attempt should avoid; "" if none.
    """

    code: int
    requeue: bool
    why: str
    fruitless: int = 0
    avoid: str = ""


def ended(argv: list[str]) -> int:
    """Report to a job script whether a rank's next attempt may succeed: `requeue|stop CODE [HOST TO AVOID]`."""
    parser = Parser(
        prog="sdg.py ended",
        description=ended.__doc__,
        usage="%(prog)s --status N OPTIONS OF run",
        epilog="example, after srun in a job script: sdg ended --status $? --config run.toml",
    )
    parser.add_argument("--status", type=int, required=True, metavar="N", help="exit status of srun")
    parser.add_argument("--signaled", action="store_true", help="Slurm has signaled the job script")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="duration of the attempt")
    args, rest = parser.parse_known_args(argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the run has printed it
            configs = parse_configs(rest)
    except (sdg.UsageError, sdg.PluginError, SystemExit) as exc:
        code = getattr(exc, "exit_code", 2)
        sdg.say("not requeued: the options are invalid")
        print("stop", code)
        return 0
    verdicts = [of_config(config, args) for config in configs]
    # Configs of one process: an attempt that helps one of them is worth while.
    verdict = max(verdicts, key=lambda verdict: (verdict.requeue, verdict.code))
    sdg.say(verdict.why)
    print("requeue" if verdict.requeue else "stop", verdict.code, verdict.avoid)
    return 0


def of_config(config: Config, args: argparse.Namespace) -> Verdict:
    """The verdict on the last attempt of a config's rank, which is recorded with it."""
    options, state = config.options, Path(config.options.state_dir)
    if options.any_rank or options.processes:
        options.rank = own_rank(state, options.world_size)
    run = sdg.Run(options, config.plugins, output_place(options, state), state, lambda reason: None)
    try:
        with lock_rank(run):
            attempt = attempt_of(state, options.rank)
            verdict = judged(attempt, progress_of(state, options.rank), args)
            record(run, attempt, verdict)
            return limited(verdict, slurm_restart())
    except sdg.StateError as exc:
        return Verdict(args.status or 1, False, f"not requeued: {exc}")


def own_rank(state: Path, world_size: int) -> int:
    """The rank on which this job worked last, with `--rank any` or `--processes`; 0 if there is none.

    One without an end was killed. What several processes end with is recorded by their parent, as the last of all.
    """
    attempts = [(rank, attempt_of(state, rank)) for rank in range(world_size)]
    mine = [
        (attempt.ended or math.inf, attempt.began, rank) for rank, attempt in attempts if attempt and attempt.is_mine
    ]
    return max(mine, default=(0.0, 0.0, 0))[2]


def judged(attempt: Attempt | None, progress: int, args: argparse.Namespace) -> Verdict:
    """The verdict on an attempt, without the limits.

    Args:
        attempt: the last one that was recorded; None if there is none.
        progress: of the rank, now.
        args: exit status of srun, whether the job script was signaled, and duration in s.
    """
    host = platform.node()
    earlier = attempt.fruitless if attempt and attempt.job == slurm_job() else 0
    if attempt is None or not attempt.is_mine:
        if args.status in FINAL:
            return Verdict(args.status, False, f"not requeued: exit status {args.status} before the rank began")
        if args.signaled:
            return Verdict(args.status, True, "interrupted before the rank began", earlier)
        why = f"the engine did not start on {host} (exit status {args.status})"
        return Verdict(args.status, True, why, earlier + 1, host)
    advanced = bool(attempt.began) and progress > attempt.before
    fruitless = 0 if advanced else earlier + 1
    if attempt.code is None:
        return killed(args, fruitless, earlier)
    if attempt.code in FINAL:
        return Verdict(attempt.code, False, ending_of(attempt))
    if attempt.code == 143:
        idle = fruitless if not args.signaled else 0 if advanced else earlier
        return Verdict(143, True, "interrupted: completed responses are saved", idle)
    if attempt.cause in SERVER_FAILURES and not advanced:
        avoid = (attempt.node or attempt.host) if attempt.cause == "NodeFailure" else ""
        return Verdict(attempt.code, True, f"{attempt.error}", fruitless, avoid)
    early = args.seconds < float(os.environ.get("SDG_EARLY") or EARLY)
    if not advanced and (early or attempt.cause in PERMANENT):
        return Verdict(attempt.code, False, f"not requeued, another attempt would end in the same way: {attempt.error}")
    return Verdict(attempt.code, True, f"{attempt.error}", fruitless)


def killed(args: argparse.Namespace, fruitless: int, earlier: int) -> Verdict:
    """The verdict on an engine that has recorded no end."""
    if args.signaled:  # it was too slow for Slurm, or a plugin blocked it
        return Verdict(143, True, "interrupted: the engine did not end in time", min(earlier, fruitless))
    if args.status == 1:  # srun's, if a process of the step was killed for memory; 137 if it was killed otherwise
        memory = "raise --mem, or lower --max-concurrent-generations or --max-concurrent-documents"
        return Verdict(137, True, f"out of memory: the engine was killed; {memory}", fruitless)
    return Verdict(args.status or 1, True, f"the engine was killed (exit status {args.status})", fruitless)


def ending_of(attempt: Attempt) -> str:
    """How an attempt ended that is not repeated."""
    if attempt.code == 0:
        return "the rank has finished; a process beside the engine was killed"
    return f"not requeued: {attempt.error}"


def limited(verdict: Verdict, restarts: int) -> Verdict:
    """A verdict after the limits: SDG_REQUEUES for all requeues, else FRUITLESS for attempts without progress."""
    if not verdict.requeue:
        return verdict
    most = os.environ.get("SDG_REQUEUES")
    if most and restarts >= int(most):
        why = f"not requeued, the limit of {most} requeues is reached (SDG_REQUEUES): {verdict.why}"
        return verdict._replace(requeue=False, why=f"{why}; submit it again to resume")
    if not most and verdict.fruitless >= FRUITLESS:
        why = f"not requeued after {FRUITLESS} attempts in a row without progress (SDG_REQUEUES=N allows more)"
        return verdict._replace(requeue=False, why=f"{why}: {verdict.why}")
    which = f"{restarts + 1} of at most {most}" if most else f"restart {restarts + 1}"
    idle = f", {verdict.fruitless} of {FRUITLESS} attempts without progress" if verdict.fruitless and not most else ""
    return verdict._replace(why=f"requeueing the job ({which}{idle}): {verdict.why}")


def record(run: sdg.Run, attempt: Attempt | None, verdict: Verdict) -> None:
    """Keep the count of attempts without progress, and how a killed engine ended, for `status`."""
    kept = attempt or Attempt()
    if not kept.is_mine:
        kept = dataclasses.replace(Attempt(), job=slurm_job(), restart=slurm_restart(), host=platform.node())
        kept.excluded = attempt.excluded if attempt and attempt.job == kept.job else []
    if kept.code is None:
        kept.ended, kept.code, kept.cause, kept.error = time.time(), verdict.code, "Killed", verdict.why
    kept.fruitless = verdict.fruitless
    if verdict.requeue and verdict.avoid and verdict.avoid not in kept.excluded:
        kept.excluded = [*kept.excluded, verdict.avoid]
    with contextlib.suppress(OSError):
        run.state.mkdir(parents=True, exist_ok=True)
        write_attempt(run, kept)
