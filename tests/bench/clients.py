"""Requests through sdg's own HTTP client, against the same through aiohttp (`SDG_HTTP=aiohttp`).

    python tests/bench/clients.py

Everything else is equal, so that the difference is what the client costs. Both take turns.
"""

import argparse
import sys

from harness import Result, instant_server, main, middle, say, spread, workplace
from throughput import Contest, Speed

QUICK = {"documents": 5000, "rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)


def measure(options: argparse.Namespace) -> list[Result]:
    """Run the rounds and compare."""
    pairs: list[tuple[Speed, Speed]] = []
    given = argparse.Namespace(**vars(options), peer=False, peer_documents=options.documents, format="parquet")
    with workplace() as folder, instant_server() as server:
        contest = Contest(given, folder, server)
        for turn in range(options.rounds):
            say(f"clients: round {turn + 1} of {options.rounds}")
            pairs.append((contest.speed(contest.sdg), contest.speed(contest.sdg_by_aiohttp)))
    ratios = [own.from_first_request / other.from_first_request for own, other in pairs]
    costs = [own.cpu_microseconds / other.cpu_microseconds for own, other in pairs]
    own, other = zip(*pairs, strict=True)
    return [
        Result("sdg's own HTTP client against aiohttp", middle(ratios), note=spread(ratios)),
        Result("  CPU time of a document, own against aiohttp", middle(costs), note=spread(costs)),
        Result("  own", middle([speed.cpu_microseconds for speed in own]), "µs", note=own[-1].cores),
        Result("  aiohttp", middle([speed.cpu_microseconds for speed in other]), "µs", note=other[-1].cores),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
