"""`--processes N` against one process, with an instant server on the same machine.

    python tests/bench/processes.py
    python tests/bench/processes.py --processes 4 --documents 100000 --rounds 3     # on a machine with more cores

Documents per second from the first request to the end, with a bundled rollout and with one that computes for a
millisecond per document; and what N processes cost beside one in CPU time per document. The server and the parent take
a part of the cores: with N as many as there are, the ratio is below N. A machine with neighbours shows nothing.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from harness import (
    Result,
    Server,
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

QUICK = {"documents": 5000, "rounds": 1}
COMPUTING = '''
import time
import sdg

@sdg.hookimpl
def register_rollouts(register):
    register("computing", computing)

async def computing(document, generate):
    """Ask, and compute for a while."""
    answer = await generate(document.text)
    end = time.thread_time() + 0.001
    while time.thread_time() < end:
        pass
    return answer
'''


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=int, default=256, help="requests in flight of all processes")
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace) -> list[Result]:
    """Run one process and several, one after the other, with both rollouts."""
    speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
    costs: dict[tuple[str, int], list[float]] = defaultdict(list)
    with workplace() as folder, instant_server() as server:
        source = make_input(folder / "input.parquet", options.documents, 2048)
        (folder / "computing.py").write_text(COMPUTING)
        for turn in range(options.rounds):
            for rollout in ("summarize", "./computing.py"):
                for processes in (1, options.processes)[:: 1 if turn % 2 else -1]:
                    say(f"processes: round {turn + 1} of {options.rounds}, {rollout} with {processes}")
                    speed, cost = one_run(options, folder, source, server, rollout, processes)
                    speeds[rollout, processes].append(speed)
                    costs[rollout, processes].append(cost)
    results = []
    for rollout, name in (("summarize", "sdg"), ("./computing.py", "with 1 ms of computing")):
        one, several = ((rollout, processes) for processes in (1, options.processes))
        ratios = [b / a for a, b in zip(speeds[one], speeds[several], strict=True)]
        note = f"{spread(ratios)}; {middle(costs[one]):.0f} and {middle(costs[several]):.0f} µs of CPU time a document"
        results.append(Result(f"{name}: {options.processes} processes against one", middle(ratios), "x", note=note))
    return results


def one_run(
    options: argparse.Namespace, folder: Path, source: Path, server: Server, rollout: str, processes: int
) -> tuple[float, float]:
    """Return documents per second, and microseconds of CPU time for each."""
    name = f"output-{processes}-{len(list(folder.iterdir()))}"
    server.reset()
    several = ["--processes", processes, "--world-size", 4 * processes] if processes > 1 else []
    finished = run_sdg(
        folder, source, name, server, options.limit, "--plugin", rollout, "--records-per-chunk", 500, *several
    )
    stats = server.stats(requests=options.documents)
    expect_rows(folder / name / "data", options.documents)
    seconds = finished.ended - stats["first_request"]
    return options.documents / seconds, finished.cpu_seconds / options.documents * 1e6


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
