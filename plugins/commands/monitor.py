"""The command `monitor`: how far a run is, on its card, and what its ranks have written, on the Hub."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.options import number
from sdg_plugins.common.ranks import any_queued, look, others, progress
from sdg_plugins.publishing import card, hub
from sdg_plugins.publishing.publisher import Publisher

# s for which a run must seem to be over before that is believed: network file systems show late what other machines
# wrote, and what ended early may be about to be started again, together with this monitor.
SETTLING = 60.0


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("monitor", monitor)


def monitor(argv: list[str]) -> int:
    """Publish what is written and keep the card's progress up to date until the run ends."""
    parser = argparse.ArgumentParser(prog="sdg.py monitor", description=monitor.__doc__)
    recorded.add_options(parser)
    interval, patience = number(float, 0.1), number(float, 1)
    parser.add_argument("--interval", metavar="S", type=interval, default=300.0, help="seconds between two looks [300]")
    parser.add_argument(
        "--job", metavar="ID", type=job_number, action="append", default=[], help="Slurm job to watch; repeatable"
    )
    parser.add_argument(
        "--patience", metavar="S", type=patience, default=3600.0, help="seconds of silence until it ends [3600]"
    )
    asked = parser.parse_args(argv)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: sys.exit(143))  # leaves every `with` block as Ctrl-C does
    while not follow(asked):
        sdg.say("the run was started over")
    return 0


def job_number(value: str) -> str:
    """The number of a Slurm job, of an array's task the array's."""
    found = re.match(r"\d+", value)
    if not found:
        raise argparse.ArgumentTypeError(f"{value}: a job's number is wanted")
    return found[0]


def follow(asked: argparse.Namespace) -> bool:
    """Watch one run. Returns whether it has finished: if not, another one has taken its place."""
    run = wait_for_run(asked)
    with contextlib.ExitStack() as stack:
        publisher = None
        if card.spooled(run):
            publisher = stack.enter_context(contextlib.closing(Publisher(run)))
            hub.patiently(publisher.prepare, publisher.address, run.stopping)
        return watch(run, publisher, asked)


def wait_for_run(asked: argparse.Namespace) -> sdg.Run:
    """The run, as soon as its first rank has begun.

    Raises:
        StateError: that takes too long, its job has left the queue, or the state is broken.
    """
    state = recorded.state_of(asked)
    jobs = others(asked.job)
    began, told = time.monotonic(), False
    while not (state / "run.json").exists():
        waited = time.monotonic() - began
        queued = any_queued(jobs)
        if queued is False and waited >= min(SETTLING, asked.patience):
            raise sdg.StateError(f"job {', '.join(asked.job)} is not in the queue, and nothing was begun in {state}")
        if not queued and waited >= asked.patience:
            raise sdg.StateError(f"no run was begun in {state}: is --output right, and --state-dir, if it has one?")
        if waited >= 1 and not told:
            told = True
            configs = ", ".join(recorded.configs_in(state))
            hint = f"; there are runs of the configs {configs}: --output-config names one" if configs else ""
            sdg.say(f"waiting for a run to begin in {state}{hint}")
        time.sleep(min(asked.interval, 5.0, max(0.1, asked.patience - waited)))
    return recorded.open_run(asked)


def watch(run: sdg.Run, publisher: Publisher | None, asked: argparse.Namespace) -> bool:
    """Look, publish and wait, until the run has ended. Returns whether it has finished, as `follow` does.

    Raises:
        Error: the run has ended early, or what is left cannot be published.
    """
    this, began, since, told = run_id(run), time.time(), 0.0, ""
    settling = min(SETTLING, asked.patience)
    local = sdg.file_system_of(run.state) in sdg.LOCAL_FILE_SYSTEMS
    where = publisher.url if publisher else run.output.path(card.NAME)
    while this and run_id(run) == this:
        seen, now = look(run), time.monotonic()
        ending = seen.ending(others([*asked.job, *seen.jobs]), asked.patience, began)
        early = f"the run has ended early: {ending}"
        since = (since or now) if seen.finished or ending else 0.0
        over = since and (now - since >= settling or (seen.finished and local))
        sdg.say(f"{seen.line()}")
        problem = publish(run, publisher, seen.markdown(ending) if over else None)
        if over and problem:
            raise sdg.OutputError(f"{early}; {problem}" if ending else problem)
        if problem and problem != told:
            sdg.say(f"{problem}; it is tried again every {asked.interval:g} s")
        told = problem
        if over and ending:
            raise sdg.StateError(f"{early}. What it wrote: {where}")
        if over:
            print(f"the run has finished: {where}")
            return True
        time.sleep(min(asked.interval, max(0.1, since + settling - now)) if since else asked.interval)
    return False


def run_id(run: sdg.Run) -> str:
    """What tells a run from one that was started over in its place; "" if its state is gone."""
    with contextlib.suppress(sdg.StateError):
        return str(recorded.record_of(run.state).get("run"))
    return ""


def publish(run: sdg.Run, publisher: Publisher | None, last: str | None) -> str:
    """Bring the Hub, or the card of an output elsewhere, up to date; `last` is what the card says of a run's end.

    Returns:
        What stands in the way, "" if nothing does.
    """
    try:
        if publisher is None:
            card.write(run, progress(run) if last is None else last)
            return ""
        publisher.finish(lambda: progress(run) if last is None else last)
        return ""
    except sdg.Error as problem:
        return str(problem)
    except Exception as problem:  # noqa: BLE001 - the next look may go well, and the run has days to go
        return f"unexpected {sdg.describe(problem)}"
