"""How long `python sdg.py --help` takes, beside an interpreter that does nothing and one that imports aiohttp.

    python tests/bench/startup.py --rounds 30

The three take turns; the first turn, in which byte code may be compiled, does not count.
"""

import argparse
import sys

from harness import SDG, Result, main, middle, run, say, spread, workplace

QUICK = {"rounds": 5}
COMMANDS = {
    "--help": [sys.executable, SDG, "--help"],
    "pass": [sys.executable, "-c", "pass"],
    "aiohttp": [sys.executable, "-c", "import aiohttp"],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--rounds", type=int, default=15)


def measure(options: argparse.Namespace) -> list[Result]:
    """Start each in turn."""
    say(f"startup: {options.rounds} rounds")
    with workplace() as folder:
        turns = [[run(command, folder).seconds for command in COMMANDS.values()] for _ in range(options.rounds + 1)]
    seconds = dict(zip(COMMANDS, zip(*turns[1:], strict=True), strict=True))
    help_, nothing, aiohttp = (middle(seconds[name]) for name in COMMANDS)
    return [
        Result("python sdg.py --help", help_, "s", 0.25, 0.15, False, spread(seconds["--help"])),
        Result("  against `python -c pass`", help_ / nothing, note=f"{nothing:.3f} s"),
        Result("  against `import aiohttp`", help_ / aiohttp, note=f"{aiohttp:.3f} s"),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
