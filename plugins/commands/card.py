"""The command `card`, and the dataset card that a run writes at its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import uses_spool
from sdg_plugins.common.options import Parser
from sdg_plugins.common.ranks import Overview, ranks_of
from sdg_plugins.common.slurm import Queue
from sdg_plugins.common.statistics import rank_statistics, sum_statistics
from sdg_plugins.publishing.card import NAME, write
from sdg_plugins.publishing.publisher import Publisher


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("card", card)


@sdg.hookimpl
def observe(run: sdg.Run) -> contextlib.AbstractAsyncContextManager[None] | None:
    return None if run.options.part else writing_at_end(run)


def card(argv: list[str]) -> int:
    """Write the dataset card from the run's state and files; publish what is missing on the Hub."""
    parser = Parser(prog="sdg.py card", description=card.__doc__, epilog="example: sdg.py card --output ./summaries")
    recorded.add_run_options(parser)
    run = recorded.load_run(parser.parse_args(argv))
    note = note_on_early_end(run)
    if uses_spool(run.options):
        with contextlib.closing(Publisher(run)) as publisher:
            print(publisher.finish(lambda: note))
        return 0
    try:
        write(run, note)
    except OSError as exc:
        raise sdg.OutputError(f"{run.output.path(NAME)} cannot be written: {sdg.reason_of(exc)}") from exc
    print(run.output.path(NAME))
    return 0


def note_on_early_end(run: sdg.Run) -> str:
    """Markdown on which ranks ended early and why; "" if ranks are still running, or all have finished."""
    ranks = ranks_of(run.state, run.options.world_size)
    queue = Queue.now() if any(rank.record.get("slurm_job") and rank.state != "finished" for rank in ranks) else None
    overview = Overview.of_ranks([rank.according_to(queue) for rank in ranks])
    over = not (overview.finished or overview.states["running"] or overview.states["silent"])
    return overview.markdown(overview.summary()) if over else ""


@contextlib.asynccontextmanager
async def writing_at_end(run: sdg.Run) -> AsyncIterator[None]:
    """Write the card when the run has ended for any reason, unless the publisher of its output writes it."""
    writable, early = not uses_spool(run.options), True
    try:
        yield
        early = False
    except sdg.OutputError:
        writable = False
        raise
    finally:
        if writable:
            await asyncio.to_thread(write_or_report, run, early)


def write_or_report(run: sdg.Run, early: bool) -> None:
    """Write the card of a run that has documents; report a failure, and let the run end as it did."""
    try:
        if sum_statistics(rank_statistics(run.state)).get("documents"):
            write(run, note_on_early_end(run) if early else "")  # other ranks may begin later
    except Exception as exc:  # noqa: BLE001 - the rows are written, and `sdg.py card` can be run again
        text = str(exc) if isinstance(exc, sdg.Error | OSError) else sdg.describe(exc)
        sdg.say(f"the dataset card was not written: {text}")
