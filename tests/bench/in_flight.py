"""Mean number of requests in flight over the limit, when some answers take much longer than others.

    python tests/bench/in_flight.py
    python tests/bench/in_flight.py --documents 10000 0 --ceiling

1,000 at a time with answers after 1 s, 1 % of them after 20 s; 10,000 at a time with answers after 8 s, 1 % of them
after 60 s; 1,000 documents a chunk in both. The server counts, between the moment when the limit was first reached
and the arrival of the last request. `--documents` gives the number for each of the two, 0 leaves one out: a run
should be longer than a slow answer takes, or stragglers cannot show. `--ceiling` measures the bare loop as well.
"""

import argparse
import sys
from dataclasses import dataclass

from harness import HERE, Result, Server, expect_rows, instant_server, main, make_input, run, run_sdg, say, workplace

QUICK = {"documents": [10_000, 30_000]}


@dataclass(frozen=True)
class Case:
    """How many at a time, how long answers take, and what is expected."""

    limit: int
    delay: float
    slow_delay: float
    at_least: float
    aim: float


CASES = [Case(1000, 1, 20, 0.95, 0.98), Case(10_000, 8, 60, 0.9, 0.95)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, nargs=len(CASES), default=[40_000, 120_000], metavar="N")
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--ceiling", action="store_true", help="measure the bare loop, too")


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
    delays = ["--delay", case.delay, "--slow-share", 0.01, "--slow-delay", case.slow_delay]
    with workplace() as folder, instant_server(*delays) as server:
        source = make_input(folder / "input.parquet", documents, options.bytes)
        server.reset(case.limit)
        run_sdg(folder, source, "output", server, case.limit, "--records-per-chunk", 1000)
        expect_rows(folder / "output" / "data", documents)
        results = [result(f"{case.limit:,} in flight", case, server, documents)]
        if options.ceiling:
            server.reset(case.limit)
            command = [sys.executable, HERE / "bare_loop.py", server.url, "--concurrency", case.limit]
            run([*command, "--documents", documents, "--bytes", options.bytes], folder)
            found = result("", case, server, documents)
            results.append(Result(f"  bare loop, {case.limit:,} in flight", found.value, note=found.note))
    return results


def result(name: str, case: Case, server: Server, documents: int) -> Result:
    """Return what the server saw of a run that has ended."""
    stats = server.stats(requests=documents)
    if stats["mean_in_flight"] is None:
        return Result(name, 0, "x", case.at_least, case.aim, note=f"at most {stats['peak_in_flight']:,}")
    note = f"{stats['mean_in_flight_with_ramp'] / case.limit:.3f} with the start, of {stats['ramp_seconds']:.1f} s"
    if stats["peak_in_flight"] > case.limit:
        note += f"; EXCEEDED: {stats['peak_in_flight']:,}"
    return Result(name, stats["mean_in_flight"] / case.limit, "x", case.at_least, case.aim, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
