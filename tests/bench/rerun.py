"""How long it takes to find that a run of many chunks is finished.

    python tests/bench/rerun.py
    python tests/bench/rerun.py --chunks 100000

Each chunk is one document, and so one file. The run is finished, then started again a few times; and the same for a
tenth of the chunks, so that the time for a million can be told from the difference.
"""

import argparse
import sys
from collections.abc import Callable

from harness import (
    Finished,
    Result,
    expect_rows,
    instant_server,
    main,
    make_input,
    middle,
    number,
    run_sdg,
    say,
    spread,
    workplace,
)

QUICK = {"chunks": 2000, "rounds": 1}
MANY = 1_000_000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3, help="how often to start again")


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure both sizes."""
    few, many = options.chunks // 10, options.chunks
    reruns = {chunks: measure_size(chunks, options.rounds) for chunks in (few, many)}

    def reckoned(seconds: Callable[[Finished], float]) -> float:
        small, large = (middle([seconds(run) for run in reruns[chunks]]) for chunks in (few, many))
        return small + max(0.0, large - small) / (many - few) * (MANY - few)

    note = f"reckoned; {number(reckoned(lambda run: run.cpu_seconds))} s of CPU time"
    value = reckoned(lambda run: run.seconds)
    results = [Result("rerun of a finished run of 1,000,000 chunks", value, "s", 3, 1, False, note)]
    for chunks, runs in reruns.items():
        seconds = [run.seconds for run in runs]
        cores = runs[-1].cores(0)
        results.append(Result(f"  of {chunks:,} chunks", middle(seconds), "s", note=f"{spread(seconds)}; {cores}"))
    return results


def measure_size(chunks: int, rounds: int) -> list[Finished]:
    """Finish a run, then start it again; return how each start went."""
    say(f"rerun: {chunks:,} chunks")
    with workplace() as folder, instant_server() as server:
        source = make_input(folder / "input.parquet", chunks, 200)
        options = ["--records-per-chunk", 1]
        run_sdg(folder, source, "output", server, 256, *options)
        expect_rows(folder / "output" / "data", chunks)
        server.reset()
        reruns = [run_sdg(folder, source, "output", server, 256, *options) for _ in range(rounds)]
        server.stats(requests=0)
    return reruns


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
