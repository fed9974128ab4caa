"""The command `status`: the progress of a run, and which of its ranks need attention.

It reads what the ranks record in the state, on the disk that they share, and sends no request to a server or the Hub.
It asks Slurm only which of the ranks' jobs are still in the queue.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.lease import holder_of, patience
from sdg_plugins.common.markdown import counted, short_line
from sdg_plugins.common.options import Parser
from sdg_plugins.common.published import Publishing, publishing_of
from sdg_plugins.common.ranks import (
    Overview,
    Rank,
    begun_ranks,
    looked_at_again,
    phase_of,
    ranges,
    ranks_of,
    rounded_duration,
)
from sdg_plugins.common.slurm import Queue, Submission, any_queued

GROUPS = 10  # groups of ranks that are shown: a thousand ranks fail for few reasons, or for too many to read
NODES = 8  # nodes that are named in a line
LOG = re.compile(r" \(log: [^)]*\)")  # each rank has its own
NO_ERROR = {"waiting": "not started", "lost": "its job is gone, and it has recorded no end"}
EXIT = (
    "example: sdg.py status --output ./summaries --ranks; exit status: 0 no rank needs attention; "
    "1 some ranks do, or no process publishes what is written, or no such run exists; 2 usage error"
)


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("status", status)


def status(argv: list[str]) -> int:
    """Show the progress of a run, and which of its ranks need attention."""
    parser = Parser(prog="sdg.py status", description=status.__doc__, epilog=EXIT)
    recorded.add_run_options(parser)
    parser.add_argument("--ranks", action="store_true", help="also print one line per rank")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for programs")
    args = parser.parse_args(argv)
    state = recorded.state_folder(args)
    ranks = recorded_ranks(state)
    queue = Queue.now() if any(rank.state != "finished" for rank in ranks) else None
    ranks = [rank.according_to(queue) for rank in ranks]
    ranks = looked_at_again(ranks, lambda: [rank.according_to(queue) for rank in recorded_ranks(state)])
    overview, submission = Overview.of_ranks(ranks), Submission.of_run(state)
    jobs = overview.jobs | set(submission.jobs if submission else ())
    queued = bool(jobs & queue.jobs) if queue and jobs else None
    troubled = [rank for rank in ranks if needs_attention(rank, overview, queue, queued)]
    publishing = publishing_of(state, recorded_options(state))
    holders = holders_of(state, ranks)
    if holders and any(holders.values()):  # a process at work takes what is free
        troubled = [rank for rank in troubled if rank.state in {"failed", "broken"} and not holders[rank.number]]
    attention = troubled or (publishing and publishing.needs_attention(overview.finished))
    if args.json:
        report = as_json(ranks, overview, queued, troubled) | as_json_of(publishing)
        print(json.dumps(with_holders(report, holders), indent=2))
        return 1 if attention else 0
    for line in overview_lines(ranks, overview, sorted(jobs), queued):
        print(line)
    for line in holder_lines(ranks, holders) if holders else ():
        print(line)
    if publishing:
        print(publishing.line())
    for line in attention_lines(ranks, troubled, submission) if troubled else ():
        print(line)
    for line in rank_table(ranks) if args.ranks else ():
        print(line)
    return 1 if attention else 0


def holders_of(state: Path, ranks: list[Rank]) -> dict[int, dict[str, Any] | None] | None:
    """Who has taken each rank; None for the whole if no process has had `--rank any`.

    A process that has been silent for so long that others may take its rank does not have it any more.
    """
    if not (state / "ranks").is_dir():
        return None
    found = {rank.number: holder_of(state, rank.number) for rank in ranks}
    return {number: who if who and (who["silent"] or 0) < patience() else None for number, who in found.items()}


def parts_of(ranks: list[tuple[bool, bool]]) -> dict[str, int]:
    """How many ranks are done, taken and free; for each, whether it has finished and whether a process has it."""
    done, taken = sum(finished for finished, _ in ranks), sum(held for finished, held in ranks if not finished)
    return {"done": done, "taken": taken, "free": len(ranks) - done - taken}


def holder_lines(ranks: list[Rank], holders: dict[int, dict[str, Any] | None]) -> Iterator[str]:
    """Lines on the ranks that processes with `--rank any` share."""
    parts = parts_of([(rank.state == "finished", bool(holders[rank.number])) for rank in ranks])
    yield "parts: " + ", ".join(f"{number:,} {name}" for name, number in parts.items())
    groups: dict[str, list[int]] = {}
    since: dict[str, float] = {}
    for number, who in holders.items():
        if who:
            name = f"process {who['pid']} on {who['host']}" + (f", job {who['slurm_job']}" if who["slurm_job"] else "")
            groups.setdefault(name, []).append(number)
            since[name] = min(since.get(name, who["since"]), who["since"])
    for name, numbers in itertools.islice(groups.items(), GROUPS):
        yield f"taken     rank {ranges(numbers)}: {name}, for {rounded_duration(max(0.0, time.time() - since[name]))}"
    if len(groups) > GROUPS:
        yield f"          and by {len(groups) - GROUPS:,} more processes: see --json"


def with_holders(report: dict[str, Any], holders: dict[int, dict[str, Any] | None] | None) -> dict[str, Any]:
    """The report for programs with `parts`, and the `holder` of each rank; null if the ranks are not shared."""
    ranks = [{**rank, "holder": holders[rank["rank"]] if holders else None} for rank in report["ranks"]]
    finished = [(rank["state"] == "finished", bool(rank["holder"])) for rank in ranks]
    return {**report, "parts": parts_of(finished) if holders else None, "ranks": ranks}


def recorded_options(state: Path) -> dict[str, Any]:
    """The options of the run in a state; {} if it has recorded none yet."""
    options: dict[str, Any] = recorded.load_record(state)["options"] if (state / "run.json").exists() else {}
    return options


def as_json_of(publishing: Publishing | None) -> dict[str, Any]:
    """How far the publication is, for programs; `published` is null if the run does not publish."""
    if publishing is None:
        return {"published": None}
    figures = publishing._asdict() | {"gone": publishing.gone}
    return {"published": {name: figures[name] for name in ("written", "published", "gone", "problem", "until")}}


def recorded_ranks(state: Path) -> list[Rank]:
    """The ranks of the run in a state, even if none of them has got as far as to record its options."""
    if (state / "run.json").exists() or recorded.configs_in(state):
        return ranks_of(state, int(recorded.load_record(state)["options"]["world_size"]))
    if ranks := begun_ranks(state):
        return ranks
    if not state.is_dir():
        recorded.load_record(state)
    submission = Submission.of_run(state)
    queued = any_queued(submission.jobs) if submission else None
    known = {True: "in the queue", False: "no longer in the queue", None: "unknown, because squeue failed"}
    job = f": Slurm job {', '.join(submission.jobs)} is {known[queued]}" if submission else ""
    raise sdg.StateError(f"no rank has begun yet in {state}{job}")


def needs_attention(rank: Rank, overview: Overview, queue: Queue | None, queued: bool | None) -> bool:
    """True if a rank does not continue by itself, as far as the state and Slurm's queue show.

    Args:
        rank: its state already follows from the queue, too.
        overview: of the run.
        queue: Slurm's queue; None if it is unknown.
        queued: whether one of the run's jobs is in the queue.
    """
    if rank.state in {"running", "finished", "requeued"}:
        return False
    if rank.state in {"lost", "broken"} or rank.in_queue(queue) == "":
        return True
    if rank.state == "failed":
        return not (rank.in_queue(queue) and rank.record.get("slurm_task"))  # its job script may requeue it
    return not queued and (rank.state != "waiting" or not overview.states["running"])


def overview_lines(ranks: list[Rank], overview: Overview, jobs: list[str], queued: bool | None) -> Iterator[str]:
    """Lines on the whole run."""
    share = f" ({int(100 * min(1.0, overview.documents / overview.expected))} %)" if overview.expected else ""
    speed = f", {overview.speed()}" if overview.states["running"] else ""
    yield f"{out_of(overview.documents, overview.expected)} documents{share}{speed}"
    yield f"{counted(overview.ranks, 'rank')}: {overview.ranks_by_state()}"
    if jobs and not overview.finished:
        where = {True: "in the queue", False: "no longer in the queue", None: "unknown, because squeue failed"}
        yield f"Slurm job {', '.join(jobs)}: {where[queued]}"
    yield from loading_lines(ranks)
    yield from waiting_lines(ranks)


def attention_lines(ranks: list[Rank], troubled: list[Rank], submission: Submission | None) -> Iterator[str]:
    """Lines on the ranks that need attention, and how to run them again."""
    numbers = ranges([rank.number for rank in troubled])
    yield ""
    yield from trouble_by_reason(troubled)
    node = bad_node(ranks, troubled)
    if node:
        yield f"all failures were on {node}: avoid it with --exclude={node}"
    yield f"rerun with the original options: ranks {numbers}"
    if submission:
        yield f"    {submission.again(numbers, node)}"


def bad_node(ranks: list[Rank], troubled: list[Rank]) -> str:
    """The node on which all failed ranks ran, if others ran elsewhere; "" if there is no such node."""
    failed = [rank for rank in troubled if rank.state in {"failed", "lost"}]
    nodes = {rank.node for rank in failed}
    elsewhere = any(rank.node and rank.node not in nodes for rank in ranks)
    return nodes.pop() if len(failed) > 1 and len(nodes) == 1 and elsewhere else ""


def loading_lines(ranks: list[Rank]) -> Iterator[str]:
    """A line for each group of ranks whose servers are in the same phase of their start."""
    groups: dict[str, list[Rank]] = {}
    for rank in ranks:
        if rank.loading:
            groups.setdefault(phase_of(rank), []).append(rank)
    for phase, group in itertools.islice(groups.items(), GROUPS):
        numbers, longest = ranges([rank.number for rank in group]), max(rank.loading_for for rank in group)
        yield f"loading   rank {numbers}: loading its server for {rounded_duration(longest)}: {short_line(phase)}"


def waiting_lines(ranks: list[Rank]) -> Iterator[str]:
    """A line for each group of ranks that wait for a server for the same reason."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        if rank.waiting:
            groups.setdefault(rank.waiting, []).append(rank.number)
    for reason, numbers in itertools.islice(groups.items(), GROUPS):
        yield f"waiting   rank {ranges(numbers)}: {reason}"


def trouble_by_reason(troubled: list[Rank]) -> Iterator[str]:
    """A line for each group of ranks with the same state and error, the largest groups first."""

    def reason(rank: Rank) -> tuple[str, str]:
        return rank.state, LOG.sub("", rank.error)

    groups = [list(group) for _, group in itertools.groupby(sorted(troubled, key=reason), reason)]
    groups.sort(key=lambda group: (-len(group), group[0].number))
    for group in groups[:GROUPS]:
        last = max(group, key=lambda rank: rank.updated)
        error = last.error or NO_ERROR.get(last.state, "no error recorded")
        nodes = sorted({rank.node for rank in group if rank.node})
        where = ", ".join(nodes[:NODES]) + (f" and {len(nodes) - NODES} more nodes" if len(nodes) > NODES else "")
        details = ", ".join(filter(None, [last_heartbeat(last), where, job_of(last)]))
        shown = f" ({details})" if details else ""
        yield f"{last.state:<8}  rank {ranges([rank.number for rank in group])}: {error}{shown}"
    if rest := sum(len(group) for group in groups[GROUPS:]):
        yield f"          and {rest:,} more: see --ranks"


def rank_table(ranks: list[Rank]) -> Iterator[str]:
    """A table with a line for each rank."""
    yield ""
    yield f"{'rank':>6}  {'state':<8}  {'documents':>21}  {'per s':>7}  {'heartbeat':<12}  where"
    for rank in ranks:
        done = out_of(rank.documents, rank.record.get("expected"))
        where = ", ".join(filter(None, [rank.record.get("host"), job_of(rank), rank.error]))
        figures = f"{done:>21}  {rank.rate:>7,.1f}  {last_heartbeat(rank):<12}"
        yield f"{rank.number:>6}  {rank.state:<8}  {figures}  {where}".rstrip()


def as_json(ranks: list[Rank], overview: Overview, queued: bool | None, troubled: list[Rank]) -> dict[str, Any]:
    """The report for programs. Times are in s, `updated` since the epoch; `queued` is null if `squeue` fails."""
    to_go = overview.seconds_to_go
    return {
        "finished": overview.finished,
        "documents": overview.documents,
        "expected": overview.expected,
        "documents_per_second": round(overview.rate, 3),
        "tokens_per_second": round(overview.tokens_per_second, 3),
        "seconds_to_go": None if to_go is None else round(to_go),
        "states": {state: number for state, number in overview.states.items() if number},
        "slurm_jobs": sorted(overview.jobs),
        "queued": queued,
        "need_somebody": sorted(rank.number for rank in troubled),
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
                "waiting": rank.waiting or None,
                "loading": rank.loading or None,
                "error": rank.error or None,
            }
            for rank in ranks
        ],
    }


def out_of(documents: int, expected: int | None) -> str:
    """A number of documents, and how many are expected if that is known: `12 of 40`."""
    return f"{documents:,} of {expected:,}" if expected is not None else f"{documents:,}"


def job_of(rank: Rank) -> str:
    """The Slurm job that a rank belongs to; "" if there is no job."""
    return f"job {rank.record['slurm_job']}" if rank.record.get("slurm_job") else ""


def last_heartbeat(rank: Rank) -> str:
    """The age of a rank's last heartbeat; "" if there was none."""
    return f"{rounded_duration(max(0.0, time.time() - rank.updated))} ago" if rank.updated else ""
