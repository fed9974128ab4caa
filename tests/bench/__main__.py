"""All benches, one table.

    python tests/bench
    python tests/bench --quick
    python tests/bench --only throughput startup

Run it with an interpreter that has what sdg needs. Every number is a ratio of things that ran side by side, or a
time that is reported and not asserted: a machine with neighbours is slow at will. The whole takes about half an hour,
`--quick` a few minutes, with fewer documents and less exact.
"""

import argparse
import signal
import sys

import clients
import hub
import in_flight
import processes
import ranks
import rerun
import scale
import served
import startup
import throughput
from harness import BenchError, defaults, heading, interrupt, say, table

MODULES = (throughput, clients, in_flight, scale, rerun, ranks, processes, hub, startup, served)
BENCHES = {module.__name__: module for module in MODULES}


def main() -> int:
    """Run the benches one after the other; one that fails does not keep the others from running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shrink everything")
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES), metavar="NAME")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    results, failed = [], False
    for name in options.only:
        bench = BENCHES[name]
        try:
            results += bench.measure(defaults(bench.add_options, bench.QUICK if options.quick else {}))
        except BenchError as error:
            say(f"{name} failed: {error}")
            failed = True
        except KeyboardInterrupt:
            return 130
    print(heading(), table(results), sep="\n\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
