"""`--processes N`: N processes of one machine share the ranks of a run beside one set of servers.

The process that was called is the first one's parent: it starts the servers, makes the state its own, and publishes.
Each of the N works like one with `--rank any`. Their number may differ from run to run, the number of ranks may not:
it is part of the run's identity, and so it is read back from the state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sdg

PART = "SDG_PART"  # environment variable of the processes: number of a socket's file, and the parent's process ID
RANKS = 8  # for each process: the last ones end at about the same time, and later runs may have more processes
# Connections of one address to a server: the kernel has 28,000 ports, but beyond 14,000 it takes 0.8 ms to find one
# that is free, instead of 0.04 ms.
PORTS = 12_000
LIMITS = ("max_concurrent_generations", "max_concurrent_documents", "requests_per_minute", "tokens_per_minute")


class Part(NamedTuple):
    """What one of the processes is told by their parent.

    Attributes:
        number: of the process, from 0.
        of: how many processes share the limits.
        config: name of the config.
        world_size: number of ranks.
        began: time in s since the epoch at which the parent began.
        whole: the limits that were given for all processes together, by option; those of a further model under
            `NAME.OPTION`.
    """

    number: int
    of: int
    config: str
    world_size: int
    began: float
    whole: Mapping[str, Any] | None = None

    @property
    def source(self) -> str:
        """Loopback address of its connections to servers on this machine; "" for the usual one.

        Few runs need the ports of several, and a server may admit 127.0.0.1 alone.
        """
        most = (self.whole or {}).get("max_concurrent_generations", 0)
        return f"127.0.1.{1 + self.number % 250}" if most > PORTS and sys.platform == "linux" else ""


def derive_processes(options: argparse.Namespace, demo: bool) -> bool:
    """Settle how many processes share the ranks, and how many ranks there are; False if it is one process, one rank.

    Sets `processes`: None in a run of one process, unless its state was begun with several; and `ranks_chosen`: the
    number of ranks is free, because it was neither given nor recorded.

    Args:
        options: of the run.
        demo: it is the demo, which may replace the last one.

    Raises:
        UsageError: other options say otherwise.
    """
    options.part, options.ranks_chosen = None, False
    asked, options.processes = options.processes, None
    if not _is_whole(options, asked):
        return False
    record = {} if options.fresh else _recorded(options)
    recorded = record.get("options", {})
    if (asked or 1) == 1 and not recorded.get("processes"):
        return False
    given = options.world_size if options.world_size != 1 else None
    known = recorded.get("world_size")
    if known == 1 and not given:
        if not (demo or _is_replaceable(options, record)):
            sdg.say(
                f"--processes {asked}: this run was begun with a single rank, on which one process can work: "
                "choose another --output, or start over with --fresh, to use more"
            )
            return False
        known = None
    options.processes, options.rank = asked or 1, 0
    options.world_size, options.ranks_chosen = given or known or RANKS * options.processes, not (given or known)
    return True


def _is_whole(options: argparse.Namespace, asked: int | None) -> bool:
    """True if the process is not called for one rank, nor to take ranks beside others by itself."""
    array = options.rank is None and os.environ.get("SLURM_ARRAY_TASK_COUNT", "1") != "1"
    one = options.rank is not None and (options.rank or (options.world_size or 1) > 1)
    if not options.any_rank and (one or array):
        if (asked or 1) > 1:
            which = "each task of a Slurm array" if array else f"--rank {options.rank}"
            raise sdg.UsageError(
                f"--processes {asked} shares all ranks, and {which} is one of them: use --rank any "
                "(slurm/submit.sh --workers), or leave out --processes"
            )
        return False
    if getattr(options, "nodes", 1) > 1 and (asked or 1) > 1:
        raise sdg.UsageError(f"--processes {asked} requires a server on one machine: leave out --nodes")
    return bool(asked) or not options.any_rank


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """What is recorded of a run with this state; {} if there is none, or its reader will report that it is broken."""
    state = Path(options.state_dir)
    for path in (state / options.output_config / "run.json", state / "run.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_bytes())
            if isinstance(found, dict) and isinstance(found.get("options"), dict) and not found.get("discarded"):
                return found
    return {}


def _is_replaceable(options: argparse.Namespace, record: dict[str, Any]) -> bool:
    """True if nothing of a recorded run is kept: an estimate, or a run that has sent no request."""
    if record.get("estimate"):
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        figures = json.loads((Path(options.state_dir) / "00000.stats.json").read_bytes())
        return not (figures.get("documents") or figures.get("requests"))
    return False


def shared(options: argparse.Namespace, part: Part) -> argparse.Namespace:
    """The options of one of the processes: its share of each limit, and no more than once what is done once.

    Shares of whole numbers add up to the whole.
    """
    own = argparse.Namespace(**{**vars(options), "models": {}})
    whole: dict[str, Any] = {}
    for name, model in {"": own, **options.models}.items():
        mine = own if not name else argparse.Namespace(**vars(model))
        for limit in LIMITS:
            if (most := getattr(mine, limit)) is not None:
                whole[f"{name}.{limit}" if name else limit] = most
                setattr(mine, limit, _share(most, part))
        if name:
            own.models[name] = mine
    part = part._replace(whole={**whole, "max_failure_rate": options.max_failure_rate})
    for each in (own, *own.models.values()):
        each.part = part
    own.rank, own.any_rank, own.world_size, own.fresh = 0, True, part.world_size, False
    own.max_failure_rate = 1.0  # the parent judges all of them together
    return own


def _share(most: float, part: Part) -> float:
    """One process's share of a limit."""
    if isinstance(most, float):
        return most / part.of
    return max(1, most // part.of + (part.number < most % part.of))


def ranks_for(options: argparse.Namespace, chunks: int) -> int:
    """The number of ranks for an input with some chunks: a rank without any costs time, too."""
    most: int = options.world_size
    return min(most, max(options.processes, chunks)) if options.ranks_chosen else most


def most_processes(options: argparse.Namespace) -> int:
    """How many processes can work: each has a rank, and may have at least one request in flight."""
    most: int = min(options.processes, options.world_size, options.max_concurrent_generations)
    return max(1, most)


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they were given for the whole run, to record them."""
    every = {name: value for name, value in vars(options).items() if name not in {"part", "command", "ranks_chosen"}}
    part: Part | None = getattr(options, "part", None)
    whole = part.whole if part and part.whole else {}
    return {**every, **{name: most for name, most in whole.items() if "." not in name}}
