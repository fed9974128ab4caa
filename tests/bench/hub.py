"""Mean number of requests in flight with input and output on the Hub, over that with local files.

    python tests/bench/hub.py
    python tests/bench/hub.py --documents 10000 --rounds 1

Both runs do the same, one after the other: 1,000 documents at a time, answers after 1 s. The Hub is the one of the
tests, in a process of its own on the same machine; each of its answers to a read takes --latency seconds longer, and
the run commits every 5 s. The server counts, between the moment when the limit was first reached and the last request.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import (
    HERE,
    BenchError,
    Result,
    expect_rows,
    instant_server,
    main,
    make_input,
    middle,
    run_sdg,
    say,
    spread,
    stop,
    workplace,
)

QUICK = {"documents": 10_000, "rounds": 1}
SHARDS, ROW_GROUP = 4, 1000
TOKEN = "hf_bench"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, default=25_000)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=1000, help="documents at a time")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds that an answer takes")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds that the Hub takes for a read")
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace) -> list[Result]:
    """Measure the rounds, and return the ratio."""
    ratios = []
    for number in range(options.rounds):
        say(f"hub: round {number + 1} of {options.rounds}, {options.documents:,} documents")
        with workplace() as folder, instant_server("--delay", options.delay) as server:
            source = make_input(folder / "input.parquet", options.documents, options.bytes)
            found = []
            with the_hub(source, folder, options.latency) as url:
                os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
                os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
                for where in ("local", "hub"):
                    server.reset(options.limit)
                    run_case(where, folder, source, server, options)
                    found.append(server.stats(requests=options.documents)["mean_in_flight"])
            expect_rows(folder / "output" / "data", options.documents)
            expect_rows(folder / "published", options.documents)
            if None in found:
                raise BenchError("the limit was never reached: more --documents")
            ratios.append(found[1] / found[0])
    return [Result("in flight, Hub over local files", middle(ratios), "x", 0.97, 0.99, note=spread(ratios))]


def run_case(where: str, folder: Path, source: Path, server: object, options: argparse.Namespace) -> None:
    """Run sdg with local files, or with datasets on the Hub."""
    if where == "local":
        run_sdg(folder, source, "output", server, options.limit)
        return
    extra = ["--output", "hf://datasets/bench/out", "--publish-interval", 5, "--state-dir", folder / "state"]
    run_sdg(folder, "hf://datasets/bench/in", "unused", server, options.limit, *extra)


@contextlib.contextmanager
def the_hub(source: Path, folder: Path, latency: float) -> Iterator[str]:
    """Run a Hub that has the input in shards; what has been published lies in `published` when it ends."""
    command = [sys.executable, HERE / "hub.py", "--serve", source, folder / "published", latency]
    with subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield json.loads(process.stdout.readline())["url"]
            process.communicate(timeout=60)  # its standard input ends
        finally:
            stop(process.pid)
            process.kill()


def serve(source: str, target: str, latency: str) -> None:
    """Be the Hub until standard input ends."""
    import io

    import pyarrow.parquet as pq

    sys.path.insert(0, str(HERE.parent / "support"))
    from fake_hub import FakeHub, Rights

    table = pq.read_table(source)
    size = -(-table.num_rows // SHARDS)
    files = {}
    for shard in range(SHARDS):
        content = io.BytesIO()
        pq.write_table(table.slice(shard * size, size), content, row_group_size=ROW_GROUP)
        files[f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet"] = content.getvalue()
    with FakeHub() as hub:
        hub.tokens[TOKEN] = Rights("bench")
        hub.create("bench/in")
        hub.push("bench/in", files)
        hub.fail("resolve", delay=float(latency), times=1_000_000)
        print(json.dumps({"url": hub.url}), flush=True)
        sys.stdin.read()
        for name, content in hub.files("bench/out").items():
            if name.endswith(".parquet"):
                path = Path(target) / Path(name).name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(*sys.argv[2:]))
    sys.exit(main(__doc__, add_options, measure))
