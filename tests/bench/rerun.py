"""How long it takes to find that a run of many chunks is finished.

    python tests/bench/rerun.py
    python tests/bench/rerun.py --chunks 100000

Each chunk is one document, and so one file. Only the first ones are generated; all others are links to one of them,
recorded in the state like it. The run is started again a few times; and the same for a tenth of the chunks, so that
the time for a million can be told from the difference if there are fewer.
"""

import argparse
import contextlib
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

from harness import (
    BenchError,
    Finished,
    Result,
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

QUICK = {"chunks": 20_000, "rounds": 1}
MANY = 1_000_000
GENERATED = 100  # chunks
LINKS = 50_000  # to one file; ext4 has at most 65,000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--chunks", type=int, default=MANY)
    parser.add_argument("--rounds", type=int, default=3, help="how often to start again")


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure both sizes."""
    few, many = options.chunks // 10, options.chunks
    reruns = {chunks: measure_size(chunks, options.rounds) for chunks in (few, many)}

    def reckoned(seconds: Callable[[Finished], float]) -> float:
        small, large = (middle([seconds(run) for run in reruns[chunks]]) for chunks in (few, many))
        return small + max(0.0, large - small) / (many - few) * (MANY - few)

    how = "" if many == MANY else "reckoned; "
    note = f"{how}{number(reckoned(lambda run: run.cpu_seconds))} s of CPU time"
    value = reckoned(lambda run: run.seconds)
    results = [Result("rerun of a finished run of 1,000,000 chunks", value, "s", 3, 1, False, note)]
    for chunks, runs in reruns.items():
        seconds = [run.seconds for run in runs]
        memory = f"{max(run.peak_memory for run in runs) >> 20} MB"
        note = f"{spread(seconds)}; {memory}; {runs[-1].cores(0)}"
        results.append(Result(f"  of {chunks:,} chunks", middle(seconds), "s", note=note))
    return results


def measure_size(chunks: int, rounds: int) -> list[Finished]:
    """Finish a run, then start it again; return how each start went."""
    say(f"rerun: {chunks:,} chunks")
    with workplace() as folder, instant_server() as server:
        source = make_input(folder / "input.parquet", chunks, 200)
        options = ["--records-per-chunk", 1]
        run_sdg(folder, source, "output", server, 256, *options, "--max-documents", GENERATED)
        multiply(folder / "output", chunks)
        server.reset()
        run_sdg(folder, source, "output", server, 256, *options)
        reruns = [run_sdg(folder, source, "output", server, 256, *options) for _ in range(rounds)]
        server.stats(requests=0)
        found = json.loads((folder / "output" / ".sdg" / "stats.json").read_bytes())["rows"]
        if found != chunks:
            raise BenchError(f"{found} rows instead of {chunks}")
    return reruns


def multiply(output: Path, chunks: int) -> None:
    """Give a finished run more chunks, which have the content of its first one."""
    name = f"{output}/data/00000_{{:05d}}.parquet".format  # no list of all: the memory of a child begins with ours
    for first in range(GENERATED, chunks, LINKS):
        shutil.copyfile(name(0), name(first))
        for index in range(first + 1, min(first + LINKS, chunks)):
            os.link(name(first), name(index))
    with contextlib.closing(sqlite3.connect(output / ".sdg" / "00000.sqlite3")) as state, state:
        _, _, *first = state.execute("SELECT * FROM chunks WHERE chunk = 0").fetchone()
        marks = ",".join("?" * (2 + len(first)))
        rows = ((index, index, *first) for index in range(GENERATED, chunks))
        state.executemany(f"INSERT INTO chunks VALUES ({marks})", rows)


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
