"""The command `check`: what a run with these options would refuse, before it stands in a queue for a night."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.checks import check_columns, check_reader, reading
from sdg_plugins.common.command_line import Config, parse_configs
from sdg_plugins.common.files import output_place, split_uri
from sdg_plugins.common.state import changes_since, check_state_dir, different_run, refuse_strangers, remember_source
from sdg_plugins.publishing import card
from sdg_plugins.rollouts import prompt
from sdg_plugins.servers import command, sglang
from sdg_plugins.servers.launching import launching

# What servers say of options, without being started
CHECKS = {"command": command.words_of, "sglang": sglang.checked_model, "vllm": launching.model_of}


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("check", check)


def check(argv: list[str]) -> int:
    """See that a run with these options could begin, without beginning it; nothing is written, no server started.

    Options, plugins, columns and places are looked at, and whether a run that is there already is of other options.
    What depends on the machine of the run (GPUs, an installed engine, a server's URL) is not.
    """
    for config in parse_configs(argv):
        check_config(config)
    return 0


def check_config(config: Config) -> None:
    """See that one config could be begun, and print what a script needs to know of it."""
    options, plugins = config
    if options.fresh:
        raise sdg.UsageError(
            "--fresh would start over with every requeue, and delete what other ranks have: "
            "delete the output and its state by hand"
        )
    state = os.path.abspath(options.state_dir)
    run = sdg.Run(options, plugins, output_place(options, Path(state)), Path(state), stop)
    if options.server in CHECKS:
        CHECKS[options.server](run)
        launching.check_layout(options)
    for folder in [state] + [run.output.root] * run.output.local:
        check_folder(folder)
    check_state_dir(run)
    remember_source(run)
    entry = plugins.readers[options.reader]
    with reading(options.input, entry.factory):
        reader = entry.factory(run)
    check_reader(reader, f"the reader {options.reader!r} of plugin {entry.plugin}")
    check_columns(reader.schema, options)
    run.schema = reader.schema
    if options.rollout == "prompt" and options.prompt_template:
        prompt.check_places(options.prompt_template, run)
    check_earlier(run, reader)
    if card.spooled(run):
        check_publishing(run)
    documents = reader.total()
    if documents is not None:
        documents = min(documents, options.max_documents or documents)
        chunks = -(-documents // options.records_per_chunk)
        if chunks < options.world_size:
            some = f"{options.world_size} ranks share {chunks} chunk{'s' * (chunks != 1)}"
            sdg.say(f"{some} of {options.records_per_chunk:,} documents: use fewer ranks, or --records-per-chunk")
    local = split_uri(options.output)[0] == "file"
    print(f"documents {'unknown' if documents is None else documents}")
    print(f"output {os.path.abspath(options.output) if local else options.output}")
    print(f"output-config {options.output_config}\nstate-dir {state}")


def stop(reason: sdg.Error) -> None:
    """Nothing is under way that could be stopped."""
    raise reason


def check_folder(path: str) -> None:
    """Raise OutputError if a folder can neither be written nor be made."""
    there = next(place for place in [Path(path), *Path(path).parents] if place.exists())
    if not there.is_dir():
        raise sdg.OutputError(f"{there} is a file, where a folder is wanted: choose another --output or --state-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise sdg.OutputError(f"{there} may not be written: choose another --output or --state-dir")


def check_publishing(run: sdg.Run) -> None:
    """See that what the ranks write can be published, as a run of one process does: it is the monitor's to do."""
    options = argparse.Namespace(**{**vars(run.options), "world_size": 1, "no_publish": False})
    with tempfile.TemporaryDirectory() as nowhere:
        state = run.state if (run.state / "run.json").exists() else Path(nowhere)
        alone = dataclasses.replace(run, options=options, state=state)
        run.plugins.writers[options.writer].factory(alone)


def check_earlier(run: sdg.Run, reader: sdg.Reader) -> None:
    """Raise what a rank would, if there is a run of other options already. A model that is not named fits."""
    refuse_strangers(run)
    if not (run.state / "run.json").exists():
        return
    earlier: dict[str, Any] = recorded.record_of(run.state)
    launched = run.options.server in CHECKS
    wanted = launching.served_name(run) if launched else run.options.model
    run.model = wanted or earlier["identity"]["model"]
    if changes := changes_since(run, reader, earlier):
        raise different_run(run, changes)
