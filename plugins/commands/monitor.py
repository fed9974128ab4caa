"""The command `monitor`: keeps the card of a run up to date, and publishes what its ranks have written."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time

import sdg
from sdg_plugins.common import hub, recorded
from sdg_plugins.common.files import uses_spool
from sdg_plugins.common.options import Parser, number
from sdg_plugins.common.published import record
from sdg_plugins.common.ranks import Looks, Overview, progress_section, why_not_begun
from sdg_plugins.common.slurm import any_queued, other_jobs
from sdg_plugins.publishing import card
from sdg_plugins.publishing.publisher import Publisher

# s for which a run must appear to be over before the monitor ends: network file systems show late what other machines
# wrote, and a run that ended early may be about to be started again, together with this monitor.
SETTLING = 15.0
LOOK = 2.0  # s between two looks at the heartbeats


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("monitor", monitor)


def monitor(argv: list[str]) -> int:
    """Publish finished chunks, and keep the card's progress up to date until the run ends."""
    parser = Parser(
        prog="sdg.py monitor",
        description=monitor.__doc__,
        epilog="example: sdg.py monitor --output hf://datasets/YOU/summaries",
    )
    recorded.add_run_options(parser, required=True)
    interval, patience = number(float, 0.1), number(float, 1)
    parser.add_argument("--interval", metavar="S", type=interval, default=300.0, help="seconds between updates [300]")
    parser.add_argument(
        "--job", metavar="ID", type=job_id, action="append", default=[], help="Slurm job of the run; repeatable"
    )
    parser.add_argument(
        "--patience",
        metavar="S",
        type=patience,
        default=3600.0,
        help="seconds without a heartbeat after which the run counts as ended [3600]",
    )
    args = parser.parse_args(argv)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda *_: sys.exit(143))  # leaves every `with` block, as Ctrl-C does
    while not follow(args):
        sdg.say("the run was started over: following the new one")
    return 0


def job_id(value: str) -> str:
    """The ID of a Slurm job; for a task of an array, that of the array."""
    found = re.match(r"\d+", value)
    if not found:
        raise argparse.ArgumentTypeError(f"{value}: expected the ID of a Slurm job")
    return found[0]


def follow(args: argparse.Namespace) -> bool:
    """Monitor one run. Returns True when it has finished, False when it was started over."""
    run = wait_for_run(args)
    with contextlib.ExitStack() as stack:
        publisher = None
        if uses_spool(run.options):
            publisher = stack.enter_context(contextlib.closing(Publisher(run)))
            hub.patiently(publisher.prepare, publisher.address, run.stopping)
        return watch(run, publisher, args)


def wait_for_run(args: argparse.Namespace) -> sdg.Run:
    """Load the run as soon as its first rank has begun.

    Raises:
        StateError: no rank begins within --patience, the job has left the queue, or the state is broken.
    """
    state = recorded.state_folder(args)
    jobs = other_jobs(args.job)
    began, said = time.monotonic(), ""
    while not (state / "run.json").exists():
        waited, why = time.monotonic() - began, why_not_begun(state)
        queued = any_queued(jobs)
        if queued is False and waited >= min(SETTLING, args.patience):
            result = f"the run has ended early: {why}" if why else f"no run has begun in {state}"
            raise sdg.StateError(f"job {', '.join(args.job)} is not in the queue, and {result}")
        if not queued and waited >= args.patience:
            where = "is --output correct, and --state-dir if the run has one?"
            raise sdg.StateError(f"the run does not begin: {why}" if why else f"no run has begun in {state}: {where}")
        if why and why != said:
            said = why
            sdg.say(why)
        if waited >= 1 and not said:
            said = "waiting"
            configs = ", ".join(recorded.configs_in(state))
            hint = f"; it has runs of the configs {configs}: choose one with --output-config" if configs else ""
            sdg.say(f"waiting for a run to begin in {state}{hint}")
        time.sleep(min(args.interval, 5.0, max(0.1, args.patience - waited)))
    return recorded.load_run(args)


def watch(run: sdg.Run, publisher: Publisher | None, args: argparse.Namespace) -> bool:
    """Update the card and publish until the run ends. Returns True if it has finished, False if it was started over.

    Raises:
        Error: the run has ended early, or its last files cannot be published.
    """
    first_id, began, since, said = present_id(run), time.time(), 0.0, ""
    settling, looks = min(SETTLING, args.patience), Looks()
    local = sdg.file_system_of(run.state) in sdg.LOCAL_FILE_SYSTEMS
    where = publisher.url if publisher else run.output.path(card.NAME)
    while first_id and present_id(run) == first_id:
        overview, now = Overview.of_ranks(looks.look(run)), time.monotonic()
        reason = overview.early_end(other_jobs([*args.job, *overview.jobs]), args.patience, began)
        early = f"the run has ended early: {reason}"
        since = (since or now) if overview.finished or reason else 0.0
        over = since and (now - since >= settling or (overview.finished and local))
        sdg.say(overview.log_line())
        if publisher:
            record(run.state, interval=args.interval)
        problem = update(run, publisher, overview.markdown(reason) if over else None)
        if over and problem:
            raise sdg.OutputError(f"{early}; {problem}" if reason else problem)
        if publisher:
            record(
                run.state,
                problem=problem,
                until=time.time() + args.interval if problem else 0.0,
                interval=args.interval,
            )
        if problem and problem != said:
            sdg.say(f"{problem}; retrying every {args.interval:g} s")
        said = problem
        if over and reason:
            raise sdg.StateError(f"{early}. Its output: {where}")
        if over:
            print(f"the run has finished: {where}")
            return True
        if since:
            time.sleep(min(args.interval, max(0.1, since + settling - now)))
        else:
            rest(run, args.interval, overview.active)
    return False


def rest(run: sdg.Run, seconds: float, active: bool) -> None:
    """Wait, but not after the last heartbeat of an active run: its end is shown soon, whatever the interval."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and (not active or Overview.of_run(run).active):
        time.sleep(min(LOOK, left) if active else left)


def present_id(run: sdg.Run) -> str:
    """The ID of the run that the state belongs to now; "" if its state cannot be read."""
    with contextlib.suppress(sdg.StateError):
        return recorded.run_id(run.state)
    return ""


def update(run: sdg.Run, publisher: Publisher | None, last: str | None) -> str:
    """Bring the Hub, or the card of an output elsewhere, up to date.

    Args:
        run: the run.
        publisher: publishes it; None if its output is not on the Hub.
        last: what the card says on how the run ended; None while it goes on.

    Returns:
        Why that failed, "" if it did not.
    """

    def section() -> str:
        return progress_section(run) if last is None else last

    try:
        if publisher is None:
            card.write(run, section())
        else:
            publisher.finish(section)
    except sdg.Error as exc:
        return str(exc)
    except Exception as exc:  # noqa: BLE001 - the next update may succeed, and the run may go on for days
        return f"unexpected {sdg.describe(exc)}"
    return ""
