"""Mean number of requests in flight over the limit, and how late the event loop is.

    python tests/bench/in_flight.py
    python tests/bench/in_flight.py --documents 10000 0 0 --ceiling
    python tests/bench/in_flight.py --documents 0 0 200000 --processes 4 --files 5500 --delay 8

1,000 at a time with answers after 1 s, 1 % of them after 20 s; 10,000 at a time with answers after 8 s, 1 % of them
after 60 s; 19,700 at a time (or what the limit of open files allows) with answers after 2 s, which takes all that a
core can do; 1,000 documents a chunk. The server counts, between the moment when the limit was first reached and the
arrival of the last request, and the lag of the event loop is that of the same time (see lag.py). `--documents` gives
the number for each of the three, 0 leaves one out: a run should be longer than a slow answer takes, or stragglers
cannot show. `--ceiling` measures the bare loop as well.

`--processes` shares the limit among processes, whose lag is not measured; with `--files`, each of them may open only so
many files. If the machine has fewer cores than they and the server need, `--delay` makes the answers slower: the limit
over the answers' time, times the CPU time of a document in client and server, must fit into the cores.
"""

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import (
    HERE,
    Finished,
    Result,
    Server,
    expect_rows,
    instant_server,
    main,
    make_input,
    number,
    run,
    run_sdg,
    say,
    workplace,
)

QUICK = {"documents": [10_000, 30_000, 60_000]}
FILES = 300  # of a process, beside one for each request in flight
PERIOD = 0.01  # s between two samples of lag.py


@dataclass(frozen=True)
class Case:
    """How many at a time, how long answers take, and what is expected."""

    limit: int
    delay: float
    slow_delay: float
    at_least: float
    aim: float


ALLOWED = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
MANY = 19_700 if ALLOWED == resource.RLIM_INFINITY else min(19_700, ALLOWED - FILES)
CASES = [Case(1000, 1, 20, 0.95, 0.98), Case(10_000, 8, 60, 0.9, 0.95), Case(MANY, 2, 0, 0.95, 0.98)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, nargs=len(CASES), default=[40_000, 120_000, 200_000], metavar="N")
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--ceiling", action="store_true", help="measure the bare loop, too")
    parser.add_argument("--processes", type=int, default=1, help="that share the limit")
    parser.add_argument("--files", type=int, help="limit of open files of each process")
    parser.add_argument("--delay", type=float, help="seconds until an answer that is not slow")


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure all cases."""
    results = []
    for case, documents in zip(CASES, options.documents, strict=True):
        if documents:
            say(f"in flight: {documents:,} documents, {case.limit:,} at a time")
            results += measure_case(case, documents, options)
    return results


def measure_case(case: Case, documents: int, options: argparse.Namespace) -> list[Result]:
    """Measure one case."""
    delay = options.delay or case.delay
    delays = ["--delay", delay, "--slow-share", 0.01 if case.slow_delay else 0, "--slow-delay", case.slow_delay]
    alone = options.processes == 1
    with workplace() as folder, instant_server(*delays) as server:
        source = make_input(folder / "input.parquet", documents, options.bytes)
        server.reset(case.limit)
        samples = folder / "lag.json"
        given: list[object] = ["--records-per-chunk", 1000]
        given += ["--plugin", HERE / "lag.py"] if alone else ["--processes", options.processes]
        given += ["--plugin", "summarize"]
        lagging = {"BENCH_LAG": str(samples)}
        finished = run_sdg(folder, source, "output", server, case.limit, *given, env=lagging, files=options.files)
        expect_rows(folder / "output" / "data", documents)
        name = f"{case.limit:,} in flight" + ("" if alone else f" of {options.processes} processes")
        results = [result(name, case, server, documents, finished)]
        if alone:
            results.append(lag(case, server, samples))
        if options.ceiling:
            server.reset(case.limit)
            command = [sys.executable, HERE / "bare_loop.py", server.url, "--concurrency", case.limit]
            finished = run([*command, "--documents", documents, "--bytes", options.bytes], folder)
            found = result("", case, server, documents, finished)
            results.append(Result(f"  bare loop, {case.limit:,} in flight", found.value, note=found.note))
    return results


def result(name: str, case: Case, server: Server, documents: int, finished: Finished) -> Result:
    """Return what the server saw of a run that has ended."""
    stats = server.stats(requests=documents)
    cost = (
        f"{number(finished.cpu_seconds / documents * 1e6)} µs of CPU time each; {finished.cores(stats['cpu_seconds'])}"
    )
    with_start = f"{stats['mean_in_flight_with_ramp'] / case.limit:.3f} with the start"
    if stats["mean_in_flight"] is None:
        note = f"never reached: at most {stats['peak_in_flight']:,}, {with_start}; {cost}"
        return Result(name, 0, "x", case.at_least, case.aim, note=note)
    note = f"{with_start}, of {stats['ramp_seconds']:.1f} s; {cost}"
    if stats["peak_in_flight"] > case.limit:
        note += f"; EXCEEDED: {stats['peak_in_flight']:,}"
    return Result(name, stats["mean_in_flight"] / case.limit, "x", case.at_least, case.aim, note=note)


def lag(case: Case, server: Server, path: Path) -> Result:
    """Return how late the event loop was, while the limit was reached if it was."""
    stats = server.stats()
    samples = json.loads(path.read_text())
    start = stats["full_at"] or samples[0][0]
    inside, used = zip(
        *[each[1:] for each in samples if start <= each[0] <= stats["last_at"]] or [(0.0, 0.0)], strict=True
    )
    bounds = (0.15, 0.07) if case.limit == 10_000 else (None, None)
    note = f"in CPU time of its thread {percentile(used, 0.99):.3f}; median {percentile(inside, 0.5):.3f}, "
    note += f"most {max(inside):.3f}, with the start {max(late for _, late, _ in samples):.3f}"
    return Result(
        f"  p99 lag of the loop, {case.limit:,} in flight", percentile(inside, 0.99), "s", *bounds, False, note
    )


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the lateness that what becomes due at any time meets in this share of the cases.

    A turn of a second meets a hundred times as much as one of a hundredth, though each is one sample.
    """
    ordered = sorted(samples)
    left = share * sum(late + PERIOD for late in ordered)
    for late in ordered:
        left -= late + PERIOD
        if left <= 0:
            return late
    return ordered[-1]


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
