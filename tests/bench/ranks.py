"""Ranks that processes take one after the other, with `--rank any`.

    python tests/bench/ranks.py
    python tests/bench/ranks.py --only killed --ranks 256 --processes 16 --limit 24 --documents 500     # 6.5 minutes

Borders: one process takes 21 ranks; the mean number of requests in flight over the limit, between the moment when the
limit was first reached and the arrival of the last request, across 20 borders of ranks. Answers take 1 s in the middle,
one in twenty 2.3 s or more (lognormal).

Coming and going: processes share some ranks, and a third of them is killed at random moments and replaced at once; the
documents times the mean time of an answer, over what all processes together had in flight for as long as they lived.
What was in flight when a process was killed is lost, and so is the time in which a process starts: 16 processes on two
cores start for six seconds, so such a run must be long, and few enough requests must be in flight to need less than the
cores.
"""

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from harness import (
    SDG,
    BenchError,
    Result,
    Server,
    environment,
    expect_rows,
    instant_server,
    main,
    make_input,
    run_sdg,
    say,
    workplace,
)

QUICK = {"documents": 200, "ranks": 16, "processes": 2}
DELAY, SPREAD = 1.0, 0.5  # s in the middle, and sigma
BORDERS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, default=600, help="of a rank")
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--limit", type=int, default=100, help="requests in flight of a process")
    parser.add_argument("--only", choices=["borders", "killed"])


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure both."""
    results = []
    if options.only != "killed":
        results.append(measure_borders(options))
    if options.only != "borders":
        results.append(measure_killed(options))
    return results


def of_ranks(options: argparse.Namespace, ranks: int) -> list[object]:
    """Options of a run whose ranks have a chunk each."""
    return ["--rank", "any", "--world-size", ranks, "--records-per-chunk", options.documents]


def measure_borders(options: argparse.Namespace) -> Result:
    """One process that takes all ranks."""
    ranks, limit = BORDERS + 1, options.limit
    say(f"borders: {ranks} ranks of {options.documents} documents, {limit} at a time")
    with workplace() as folder, instant_server("--delay", DELAY, "--spread", SPREAD) as server:
        source = make_input(folder / "input.parquet", ranks * options.documents, 500)
        server.reset(limit)
        run_sdg(folder, source, "output", server, limit, *of_ranks(options, ranks))
        expect_rows(folder / "output" / "data", ranks * options.documents)
        stats = server.stats(requests=ranks * options.documents)
    note = f"at most {stats['peak_in_flight']:,} in flight" + ", EXCEEDED" * (stats["peak_in_flight"] > limit)
    return Result(f"in flight across {BORDERS} borders", stats["mean_in_flight"] / limit, "x", 0.95, 0.98, note=note)


def measure_killed(options: argparse.Namespace) -> Result:
    """Several processes, a third of which is killed and replaced."""
    documents, chance = options.ranks * options.documents, random.Random(1)
    say(f"killed: {options.processes} processes, {options.ranks} ranks of {options.documents} documents")
    with workplace() as folder, instant_server("--delay", DELAY, "--spread", SPREAD) as server:
        source = make_input(folder / "input.parquet", documents, 500)
        lives = Lives(folder, source, server, options)
        mean = DELAY * math.exp(SPREAD**2 / 2)
        ideal = documents * mean / options.limit / options.processes
        moments = sorted(chance.uniform(0.1, 0.8) * ideal for _ in range(max(1, options.processes // 3)))
        lives.run(options.processes, moments, chance)
        expect_rows(folder / "output" / "data", documents)
    value = documents * mean / (options.limit * lives.seconds)
    note = f"{len(moments)} killed; {lives.seconds:,.0f} process-seconds, {lives.wall:,.0f} s"
    return Result(
        f"{options.processes} processes, a third killed, against the ideal", value, "x", 0.93, 0.97, note=note
    )


class Lives:
    """Processes of one run, and how long all of them have lived together."""

    def __init__(self, folder: Path, source: Path, server: Server, options: argparse.Namespace) -> None:
        command = [sys.executable, SDG, "--plugin", "summarize", "--input", source, "--base-url", server.url]
        command += ["--output", folder / "output", "--max-concurrent-generations", options.limit, "--no-progress"]
        self._command = [str(word) for word in [*command, *of_ranks(options, options.ranks)]]
        self._folder = folder
        self._living: dict[subprocess.Popen, float] = {}
        self.seconds = self.wall = 0.0

    def run(self, number: int, moments: list[float], chance: random.Random) -> None:
        """Run that many processes until all have ended; kill and replace one at each of the moments."""
        began = time.monotonic()
        try:
            for _ in range(number):
                self._start()
            while self._living:
                if moments and time.monotonic() - began >= moments[0]:
                    moments = moments[1:]
                    os.killpg(chance.choice(list(self._living)).pid, signal.SIGKILL)
                    self._start()
                time.sleep(0.05)
                self._bury()
            self.wall = time.monotonic() - began
        finally:
            for process in self._living:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _start(self) -> None:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(self._command, cwd=self._folder, env=environment(), start_new_session=True, **pipes)
        self._living[process] = time.monotonic()

    def _bury(self) -> None:
        for process, born in list(self._living.items()):
            if process.poll() is None:
                continue
            self.seconds += time.monotonic() - born
            del self._living[process]
            if process.returncode not in {0, -signal.SIGKILL}:
                raise BenchError(f"a process ended with {process.returncode}")


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
