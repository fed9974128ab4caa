"""What the commands that look at a run share: their options, and the run as its state remembers it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.command_line import default_state_dir
from sdg_plugins.common.files import expanded, output_place
from sdg_plugins.common.state import parse_run, remember_source


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command finds the run."""
    parser.add_argument("--output", required=True, type=expanded, metavar="URI", help="the run's output")
    parser.add_argument("--output-config", default="data", metavar="NAME", help="as given to the run")
    parser.add_argument("--state-dir", type=expanded, metavar="D", help="as given to the run")


def open_run(asked: argparse.Namespace) -> sdg.Run:
    """The run that `add_options`'s options mean, with its model, fingerprint and source.

    Raises:
        StateError: there is no such run, or its state is broken.
    """
    state = state_of(asked)
    recorded = record_of(state)
    options = argparse.Namespace(**recorded["options"])
    options.output, options.state_dir = asked.output, str(state)
    try:
        plugins, _ = sdg.Plugins.load(options.plugin or [])
    except (sdg.PluginError, sdg.UsageError) as problem:  # it may be on the ranks' machines only
        sdg.say(f"{problem}; going on without it")
        plugins, _ = sdg.Plugins.load([])
    run = sdg.Run(options, plugins, output_place(options, state), state, lambda reason: None)
    remember_source(run)
    run.model, run.fingerprint = recorded["identity"]["model"], recorded["fingerprint"]
    return run


def state_of(asked: argparse.Namespace) -> Path:
    """The folder of the run's state. Below --state-dir if the run had several configs in tables of a file."""
    if not asked.state_dir:
        return Path(default_state_dir(asked.output, asked.output_config))
    below = Path(asked.state_dir) / asked.output_config
    return below if (below / "run.json").exists() else Path(asked.state_dir)


def record_of(state: Path) -> dict[str, Any]:
    """The content of a state's `run.json`."""
    path = state / "run.json"
    if not path.exists() and (configs := configs_in(state)):
        raise sdg.StateError(f"{state} has runs of the configs {', '.join(configs)}: name one by --output-config")
    if not path.exists():
        raise sdg.StateError(f"{state} has no run.json: is --output right, and --state-dir, if the run had one?")
    return parse_run(path, path.read_bytes())


def configs_in(state: Path) -> list[str]:
    """The configs that have states below the one of an output's `data`."""
    return sorted(path.parent.name for path in state.glob("*/run.json"))
