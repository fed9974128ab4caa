"""Documents per second with everything durable, against datatrove and against a bare aiohttp loop.

    python tests/bench/throughput.py
    python tests/bench/throughput.py --documents 3000 --rounds 1 --no-peer

Every round runs, one after the other: the bare loop, sdg, datatrove with its checkpoints, and datatrove without. All
send the same prompts of 2 KB to the same server, 256 at a time; sdg and datatrove read the same file and close a file
after every 1,000 documents. Ratios are taken within a round; what is reported is their median. The clock runs from
the first request, as the server saw it, to the end of the process: reading, writing and everything durable included,
the start of the interpreter not (that is `whole process`). sdg and the bare loop get so many documents that what a run
of any length has once (connecting, the last files, the card: some 0.4 s) is less than a tenth of the time. datatrove
gets fewer, because it is slow; its rate hardly depends on their number. It is installed once, into an environment of
its own. The CPU time of a document is that of all threads, without the start: the difference to a run of a tenth of
the documents.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
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
    middle,
    number,
    run,
    run_sdg,
    say,
    spread,
    workplace,
)

PEER = "datatrove==0.10.0"
PEER_NEEDS = "aiofiles aiosqlite httpx orjson pyarrow uvloop xxhash"  # of its [inference]: what an endpoint needs
QUICK = {"documents": 5000, "peer_documents": 1500, "rounds": 1}


@dataclass(frozen=True)
class Speed:
    """Documents per second of one run, and what each cost."""

    from_first_request: float
    whole_process: float
    cpu_microseconds: float
    cores: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdg-bench" / PEER.replace("==", "-")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--peer-documents", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet", help="of input and output")
    parser.add_argument("--peer-venv", type=Path, default=cache, help="environment of datatrove, made if missing")
    parser.add_argument("--peer-uvloop", action="store_true", help="run datatrove on uvloop, as it does not itself")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave datatrove out")


def peer_python(folder: Path) -> Path:
    """Return the interpreter of datatrove's environment, which is made first if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"installing {PEER} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER, *PEER_NEEDS.split()], check=True)
        (folder / "complete").touch()
    return python


class Contest:
    """The contestants: each runs once on its input and returns when everything is written."""

    def __init__(self, options: argparse.Namespace, folder: Path, server: Server) -> None:
        self.options, self.folder, self.server = options, folder, server
        self.python = peer_python(options.peer_venv) if options.peer else None
        self.inputs = {
            count: make_input(folder / f"{count}.{options.format}", count, options.bytes)
            for count in (options.documents, options.documents // 10, options.peer_documents)
        }
        self.count = options.documents  # of the next run

    def bare(self, _output: Path) -> Finished:
        """Run the bare loop."""
        given = self.options
        command = [sys.executable, HERE / "bare_loop.py", self.server.url, "--concurrency", given.concurrency]
        return run([*command, "--documents", self.count, "--bytes", given.bytes], self.folder)

    def sdg(self, output: Path) -> Finished:
        """Run sdg."""
        return self.run_sdg(output)

    def sdg_by_aiohttp(self, output: Path) -> Finished:
        """Run sdg with its requests sent through aiohttp."""
        return self.run_sdg(output, env={"SDG_HTTP": "aiohttp"})

    def run_sdg(self, output: Path, env: Mapping[str, str] | None = None) -> Finished:
        """Run sdg."""
        options = ["--records-per-chunk", 1000]  # as the peer; by itself it would make a hundred files
        options += ["--output-filename", f"${{rank}}_${{chunk_index}}.{self.options.format}"]
        source, concurrency = self.inputs[self.count], self.options.concurrency
        return run_sdg(self.folder, source, output.name, self.server, concurrency, *options, env=env)

    def peer(self, output: Path) -> Finished:
        """Run datatrove without checkpoints."""
        return self.run_peer(output)

    def durable_peer(self, output: Path) -> Finished:
        """Run datatrove with checkpoints."""
        return self.run_peer(output, "--checkpoints", output.with_name("checkpoints"))

    def run_peer(self, output: Path, *options: object) -> Finished:
        """Run datatrove."""
        command = [self.python, HERE / "peer_datatrove.py", self.inputs[self.count], output]
        command += ["--base-url", self.server.url, "--concurrency", self.options.concurrency]
        command += ["--format", self.options.format, *["--uvloop"] * self.options.peer_uvloop]
        return run([*command, *options], self.folder)

    def speed(self, contestant: Callable[[Path], Finished]) -> Speed:
        """Run a contestant, check what it did, and return its speed."""
        if contestant in (self.peer, self.durable_peer):
            return self.speed_of(contestant, self.options.peer_documents)[1]
        few, many = self.options.documents // 10, self.options.documents
        start, _ = self.speed_of(contestant, few)
        finished, speed = self.speed_of(contestant, many)
        each = (finished.cpu_seconds - start.cpu_seconds) / (many - few) * 1e6
        rate = f"{speed.from_first_request:8,.0f} documents/s, {each:.0f} µs each"
        say(f"  {contestant.__name__:14} {rate}; {speed.cores}")
        return dataclasses.replace(speed, cpu_microseconds=each)

    def speed_of(self, contestant: Callable[[Path], Finished], count: int) -> tuple[Finished, Speed]:
        """Run a contestant on a number of documents."""
        self.count, output = count, self.folder / "output"
        self.server.reset()
        finished = contestant(output)
        stats = self.server.stats(requests=count)
        if contestant != self.bare:
            expect_rows(output / "data" if (output / "data").exists() else output, count)
        for path in (output, output.with_name("checkpoints")):
            shutil.rmtree(path, ignore_errors=True)
        rates = count / (finished.ended - stats["first_request"]), count / finished.seconds
        return finished, Speed(*rates, finished.cpu_seconds / count * 1e6, finished.cores(stats["cpu_seconds"]))


def measure(options: argparse.Namespace) -> list[Result]:
    """Run the rounds and compare."""
    speeds: dict[str, list[Speed]] = defaultdict(list)
    with workplace() as folder, instant_server() as server:
        contest = Contest(options, folder, server)
        contestants = [contest.bare, contest.sdg, *[contest.durable_peer, contest.peer] * options.peer]
        for turn in range(options.rounds):
            say(f"throughput: round {turn + 1} of {options.rounds}")
            for contestant in contestants if turn % 2 == 0 else reversed(contestants):
                speeds[contestant.__name__].append(contest.speed(contestant))
    return compare(speeds)


def compare(speeds: dict[str, list[Speed]]) -> list[Result]:
    """Return the ratios, and the rates for information."""

    def ratio(name: str, over: str, at_least: float | None = None, aim: float | None = None) -> Result:
        pairs = zip(speeds["sdg"], speeds[over], strict=True)
        ratios = [sdg.from_first_request / other.from_first_request for sdg, other in pairs]
        return Result(f"sdg against {name}", middle(ratios), "x", at_least, aim, note=spread(ratios))

    def rate(name: str, key: str) -> list[Result]:
        first = [speed.from_first_request for speed in speeds[key]]
        whole = middle([speed.whole_process for speed in speeds[key]])
        cpu = middle([speed.cpu_microseconds for speed in speeds[key]])
        note = f"{spread(first)}; whole process {number(whole)}, {number(cpu)} µs of CPU time each"
        note += f"; {speeds[key][-1].cores}"
        return [Result(f"  {name}", middle(first), "documents/s", note=note)]

    ceiling = ratio("a bare aiohttp loop", "bare", 1.0, 1.2)
    costs = [speed.cpu_microseconds for speed in speeds["sdg"]]
    cost = Result("CPU time of a document", middle(costs), "µs", 70, 55, False, spread(costs))
    rates = rate("sdg", "sdg") + rate("bare loop", "bare")
    if not speeds["peer"]:
        return [ceiling, cost, *rates]
    rates += rate("datatrove with checkpoints", "durable_peer") + rate("datatrove without", "peer")
    durable = ratio("datatrove with checkpoints", "durable_peer", 18, 25)
    return [durable, ratio("datatrove without", "peer"), ceiling, cost, *rates]


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
