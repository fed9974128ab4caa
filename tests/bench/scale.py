"""What a million documents cost more than ten thousand: memory, and time to go on.

    python tests/bench/scale.py
    python tests/bench/scale.py --documents 100000 --few 1000

For both numbers: run sdg on as many documents and take its peak memory; then run it again with one chunk more, a few
times, and take the time from the start of the process to the first new request, as the server saw it.
"""

import argparse
import sys
from dataclasses import dataclass

from harness import (
    BenchError,
    Finished,
    Result,
    expect_rows,
    instant_server,
    main,
    make_input,
    middle,
    run_sdg,
    say,
    spread,
    workplace,
)

QUICK = {"documents": 100_000, "few": 1000, "rounds": 1}
CHUNK = 1000


@dataclass(frozen=True)
class Cost:
    """What one size cost."""

    run: Finished
    resume_seconds: list[float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, default=1_000_000, help="the large number")
    parser.add_argument("--few", type=int, default=10_000, help="the small number")
    parser.add_argument("--bytes", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="how often to go on")


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure both sizes."""
    few, many = measure_size(options.few, options), measure_size(options.documents, options)
    memory = [cost.run.peak_memory / 2**20 for cost in (few, many)]
    seconds = [middle(cost.resume_seconds) for cost in (few, many)]
    size = f"{options.documents:,}"
    rate = options.documents / many.run.seconds
    return [
        Result(f"peak memory, {size} documents against {options.few:,}", memory[1] / memory[0], "x", 1.15, 1.05, False),
        Result(f"  {options.few:,} documents", memory[0], "MiB"),
        Result(f"  {size} documents", memory[1], "MiB", note=f"{rate:,.0f} documents/s, whole process"),
        Result(f"first new request, {size} done", seconds[1], "s", 2, 1, False, spread(many.resume_seconds)),
        Result(f"  {options.few:,} done", seconds[0], "s", note=spread(few.resume_seconds)),
        Result(f"  {size} done against {options.few:,}", seconds[1] / seconds[0]),
    ]


def measure_size(documents: int, options: argparse.Namespace) -> Cost:
    """Run a number of documents, then one chunk more each round."""
    with workplace() as folder, instant_server() as server:
        source = make_input(folder / "input.parquet", documents + CHUNK * options.rounds, options.bytes)

        def run_to(count: int, new: int) -> tuple[Finished, float]:
            """Run sdg up to a number of documents, of which some are new."""
            server.reset()
            limits = ["--max-documents", count, "--records-per-chunk", CHUNK]
            finished = run_sdg(folder, source, "output", server, options.concurrency, *limits)
            first = server.stats(requests=new)["first_request"]
            expect_rows(folder / "output" / "data", count)
            return finished, first - finished.started

        say(f"scale: {documents:,} documents")
        if documents % CHUNK:
            raise BenchError(f"the number of documents must be a multiple of {CHUNK:,}")
        complete, _ = run_to(documents, documents)
        waits = [run_to(documents + CHUNK * turn, CHUNK)[1] for turn in range(1, options.rounds + 1)]
    return Cost(complete, waits)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
