"""The command `status`: how far a run is, and which of its ranks need somebody.

It reads what the ranks note in the state, on the disk that they share; no server and no Hub is asked. Slurm is only
asked whether the ranks' job is still in its queue.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.ranks import Rank, Seen, any_queued, duration, overall, ranks_of

GROUPS = 10  # troubles that are shown: a thousand ranks have few reasons, or too many to read
EXIT = "exit status: 0 nothing needs a person; 1 some ranks do, or there is no such run; 2 usage"


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("status", status)


def status(argv: list[str]) -> int:
    """Tell how far a run is, and which of its ranks need somebody."""
    parser = argparse.ArgumentParser(prog="sdg.py status", description=status.__doc__, epilog=EXIT)
    recorded.add_options(parser)
    parser.add_argument("--ranks", action="store_true", help="a line for each rank")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, for programs")
    asked = parser.parse_args(argv)
    state = recorded.state_of(asked)
    if state.is_dir() and not (state / "run.json").exists() and not recorded.configs_in(state):
        raise sdg.StateError(f"no rank has begun yet in {state}")
    ranks = ranks_of(state, int(recorded.record_of(state)["options"]["world_size"]))
    seen = overall(ranks)
    queued = any_queued(set(seen.jobs)) if not seen.finished else None
    troubled = [rank for rank in ranks if needs_somebody(rank, seen, queued)]
    if asked.json:
        print(json.dumps(as_json(ranks, seen, queued, troubled), indent=2))
    else:
        for line in lines(ranks, seen, queued, troubled, every=asked.ranks):
            print(line)
    return 1 if troubled else 0


def needs_somebody(rank: Rank, seen: Seen, queued: bool | None) -> bool:
    """Whether a rank does not go on by itself, as far as one can tell."""
    if rank.state in {"running", "finished"}:
        return False
    if rank.state in {"failed", "broken"}:
        return True
    return not queued and (rank.state != "waiting" or not seen.states["running"])


def lines(ranks: list[Rank], seen: Seen, queued: bool | None, troubled: list[Rank], *, every: bool) -> Iterator[str]:
    """What people read: the whole, then the ranks that need somebody, then each rank if `every` is wanted."""
    share = f" ({int(100 * min(1.0, seen.documents / seen.expected))} %)" if seen.expected else ""
    speed = f", {seen.speed()}" if seen.states["running"] else ""
    yield f"{of(seen.documents, seen.expected)} documents{share}{speed}"
    yield f"{seen.ranks:,} rank{'s' * (seen.ranks != 1)}: {seen.counted()}"
    if seen.jobs and not seen.finished:
        word = {
            True: "in the queue",
            False: "no longer in the queue",
            None: "(squeue does not tell whether it is queued)",
        }
        yield f"Slurm job {', '.join(sorted(seen.jobs))} {word[queued]}"
    if troubled:
        yield ""
        yield from troubles(troubled)
        yield f"run them again, with the options that they had: ranks {ranges([rank.number for rank in troubled])}"
    if every:
        yield ""
        yield f"{'rank':>6}  {'state':<8}  {'documents':>21}  {'per s':>7}  {'heard of':<12}  where"
        for rank in ranks:
            done = of(rank.documents, rank.record.get("expected"))
            where = ", ".join(filter(None, [rank.record.get("host"), job_of(rank), rank.error]))
            line = f"{rank.number:>6}  {rank.state:<8}  {done:>21}  {rank.rate:>7,.1f}  {heard(rank):<12}  {where}"
            yield line.rstrip()


def troubles(troubled: list[Rank]) -> Iterator[str]:
    """Ranks that need somebody, those of one state and reason together, the largest groups first."""

    def reason(rank: Rank) -> tuple[str, str]:
        return rank.state, rank.error

    groups = [list(group) for _, group in itertools.groupby(sorted(troubled, key=reason), reason)]
    groups.sort(key=lambda group: (-len(group), group[0].number))
    for group in groups[:GROUPS]:
        last = max(group, key=lambda rank: rank.updated)
        what = last.error or {"waiting": "never begun"}.get(last.state, "no word of an error")
        seen = ", ".join(filter(None, [heard(last), last.record.get("host"), job_of(last)]))
        yield f"{last.state:<8}  rank {ranges([rank.number for rank in group])}: {what}" + (
            f" ({seen})" if seen else ""
        )
    if rest := sum(len(group) for group in groups[GROUPS:]):
        yield f"          and {rest:,} more: see --ranks"


def as_json(ranks: list[Rank], seen: Seen, queued: bool | None, troubled: list[Rank]) -> dict[str, Any]:
    """All that is known; times in seconds, `updated` since the epoch, `queued` null where Slurm does not tell."""
    left = (seen.expected or 0) - seen.documents
    numbers = {rank.number for rank in troubled}
    return {
        "finished": seen.finished,
        "documents": seen.documents,
        "expected": seen.expected,
        "documents_per_second": round(seen.rate, 3),
        "tokens_per_second": round(seen.tokens_per_second, 3),
        "seconds_to_go": round(left / seen.rate) if left > 0 and seen.rate else None,
        "states": {state: number for state, number in seen.states.items() if number},
        "slurm_jobs": sorted(seen.jobs),
        "queued": queued,
        "need_somebody": sorted(numbers),
        "ranks": [
            {
                "rank": rank.number,
                "state": rank.state,
                "documents": rank.documents,
                "failed": int(rank.figures.get("failed", 0)),
                "expected": rank.record.get("expected"),
                "documents_per_second": round(rank.rate, 3),
                "updated": rank.updated or None,
                "host": rank.record.get("host"),
                "slurm_job": rank.record.get("slurm_job"),
                "error": rank.error or None,
            }
            for rank in ranks
        ],
    }


def of(documents: int, expected: int | None) -> str:
    """So many of so many, as far as that is known."""
    return f"{documents:,} of {expected:,}" if expected is not None else f"{documents:,}"


def job_of(rank: Rank) -> str:
    """The Slurm job that a rank was part of."""
    return f"job {rank.record['slurm_job']}" if rank.record.get("slurm_job") else ""


def heard(rank: Rank) -> str:
    """How long ago a rank was heard of."""
    return f"{duration(max(0.0, time.time() - rank.updated))} ago" if rank.updated else ""


def ranges(numbers: list[int]) -> str:
    """Sorted numbers as `sbatch --array` takes them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
