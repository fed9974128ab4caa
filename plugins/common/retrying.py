"""Documents that have failed and are run again: which they are, and what an interrupted retry has left."""

from __future__ import annotations

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.markdown import counted

MARK = "retry"  # suffix of a rank's file that exists from the begin of a retry to its end


async def failed_documents(store: sdg.Store) -> dict[int, frozenset[int]]:
    """Positions of the failed documents of each chunk."""
    found = {}
    for index, chunk in (await store.chunks()).items():
        final = {} if chunk.written else await store.finished_in(chunk)
        open_ = (position for position, status in final.items() if status in {"failed", "empty"})
        if failed := frozenset([*chunk.failed, *open_]):
            found[index] = failed
    return found


async def begin(run: sdg.Run, store: sdg.Store) -> None:
    """Mark a retry; say if an earlier one was interrupted and this run does not go on with it."""
    mark = rank_file(run.state, run.options.rank, MARK)
    if run.options.retry_failed:
        mark.touch()
    elif mark.exists():
        tally = await store.tally()
        failed = counted(tally["failed"] + tally["empty"], "failed document")
        sdg.say(
            f"--retry-failed was interrupted before all documents had run again: {failed} of rank {run.options.rank} "
            "will stay as they are; add --retry-failed to go on with it"
        )


def end(run: sdg.Run) -> None:
    """The rank has finished."""
    rank_file(run.state, run.options.rank, MARK).unlink(missing_ok=True)
