"""What `card`, `monitor`, `status` and `verify` share: options that select a run, and loading it from its state."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.command_line import CORE, default_state_dir
from sdg_plugins.common.files import expanded, output_place
from sdg_plugins.common.state import parse_run, remember_source


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a run."""
    parser.add_argument("--output", required=True, type=expanded, metavar="URI", help="output of the run")
    parser.add_argument("--output-config", default="data", metavar="NAME", help="--output-config of the run [data]")
    parser.add_argument("--state-dir", type=expanded, metavar="D", help="--state-dir of the run, if it had one")


def load_run(args: argparse.Namespace) -> sdg.Run:
    """Load the run that the options of `add_run_options` select, with its model, fingerprint and source.

    Raises:
        StateError: no such run exists, or its state is broken.
    """
    state = state_folder(args)
    record = load_record(state)
    # What an older sdg has not recorded had its default.
    options = argparse.Namespace(**{**{option.dest: option.default for option in CORE}, **record["options"]})
    options.output, options.state_dir = args.output, str(state)
    try:
        plugins, _ = sdg.Plugins.load(options.plugin or [])
    except (sdg.PluginError, sdg.UsageError) as exc:  # the plugin may exist only on the machines of the ranks
        sdg.say(f"{exc}; continuing without this plugin")
        plugins, _ = sdg.Plugins.load([])
    run = sdg.Run(options, plugins, output_place(options, state), state, lambda reason: None)
    remember_source(run)
    run.model, run.fingerprint = record["identity"]["model"], record["fingerprint"]
    return run


def state_folder(args: argparse.Namespace) -> Path:
    """The folder of the run's state: a sub-folder of --state-dir if the process of the run had several configs."""
    if not args.state_dir:
        return Path(default_state_dir(args.output, args.output_config))
    below = Path(args.state_dir) / args.output_config
    return below if (below / "run.json").exists() else Path(args.state_dir)


def load_record(state: Path) -> dict[str, Any]:
    """The content of a state's `run.json`. Raises StateError."""
    path = state / "run.json"
    if not path.exists() and (configs := configs_in(state)):
        message = f"{state} has no run of its own, but runs of the configs {', '.join(configs)}"
        raise sdg.StateError(f"{message}: choose one with --output-config")
    if not path.exists():
        raise sdg.StateError(f"{state} has no run.json: is --output correct, and --state-dir if the run had one?")
    return parse_run(path, path.read_bytes())


def configs_in(state: Path) -> list[str]:
    """The configs whose states are sub-folders of a state folder."""
    return sorted(path.parent.name for path in state.glob("*/run.json"))
