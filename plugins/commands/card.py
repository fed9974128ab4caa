"""The command `card`, and the card that a run writes at its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.ranks import look
from sdg_plugins.common.statistics import rank_statistics, sum_statistics
from sdg_plugins.publishing.card import NAME, spooled, write
from sdg_plugins.publishing.publisher import Publisher


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("card", card)


@sdg.hookimpl
def observe(run: sdg.Run) -> contextlib.AbstractAsyncContextManager[None]:
    return written_at_the_end(run)


def card(argv: list[str]) -> int:
    """Write the dataset card from what the run's state and files say."""
    parser = argparse.ArgumentParser(prog="sdg.py card", description=card.__doc__)
    recorded.add_options(parser)
    run = recorded.open_run(parser.parse_args(argv))
    ending = ending_of(run)
    if spooled(run):
        with contextlib.closing(Publisher(run)) as publisher:
            print(publisher.finish(lambda: ending))
        return 0
    try:
        write(run, ending)
    except OSError as problem:
        raise sdg.OutputError(f"{run.output.path(NAME)} was not written: {sdg.reason_of(problem)}") from problem
    print(run.output.path(NAME))
    return 0


def ending_of(run: sdg.Run) -> str:
    """A word on what failed, and why, if no rank is at work and not all is done."""
    seen = look(run)
    over = not (seen.finished or seen.states["running"] or seen.states["silent"])
    return seen.markdown(seen.summary()) if over else ""


@contextlib.asynccontextmanager
async def written_at_the_end(run: sdg.Run) -> AsyncIterator[None]:
    """Write the card when the run has ended, however it did; whoever publishes an output writes its card, too."""
    writable, early = not spooled(run), True
    try:
        yield
        early = False
    except sdg.OutputError:
        writable = False
        raise
    finally:
        if writable:
            await asyncio.to_thread(write_or_say, run, early)


def write_or_say(run: sdg.Run, early: bool) -> None:
    """Write the card of a run that has anything to show; a failure is said and changes nothing."""
    try:
        if sum_statistics(rank_statistics(run.state)).get("documents"):
            write(run, ending_of(run) if early else "")  # ranks that have not begun are no early end
    except Exception as problem:  # noqa: BLE001 the rows are there, and `sdg.py card` can be run again
        text = str(problem) if isinstance(problem, sdg.Error | OSError) else sdg.describe(problem)
        sdg.say(f"the dataset card was not written: {text}")
