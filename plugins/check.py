"""The command `check`: what a run with these options would refuse, before it stands in a queue for a night."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import sdg

from . import card, command, launching, recorded, sglang

# What servers say of options, without being started
CHECKS = {"command": command.words_of, "sglang": sglang.check, "vllm": launching.model_of}


@sdg.hookimpl
def register_commands(register: sdg.Register) -> None:
    register("check", check)


def check(argv: list[str]) -> int:
    """See that a run with these options could begin, without beginning it; nothing is written, no server started.

    Options, plugins, columns and places are looked at, and whether a run that is there already is of other options.
    What depends on the machine of the run (GPUs, an installed engine, a server's URL) is not.
    """
    options, plugins = sdg.parse_options(argv)
    state = os.path.abspath(options.state_dir)
    run = sdg.Run(options, plugins, sdg.output_place(options, Path(state)), Path(state), stop)
    if options.server in CHECKS:
        CHECKS[options.server](run)
        launching.check(options)
    sdg.check_state_dir(run)
    sdg.remember_source(run)
    with sdg.reading(options.input):
        reader = plugins.readers[options.reader].factory(run)
    sdg.check_columns(reader.schema, options)
    check_earlier(run, reader)
    if card.spooled(run):
        check_publishing(run)
    documents = reader.total()
    if documents is not None:
        documents = min(documents, options.max_documents or documents)
        chunks = -(-documents // options.records_per_chunk)
        if chunks < options.world_size:
            some = f"{options.world_size} ranks share {chunks} chunk{'s' * (chunks != 1)}"
            sdg.say(f"sdg: {some} of {options.records_per_chunk:,} documents: use fewer ranks, or --records-per-chunk")
    local = sdg.split_uri(options.output)[0] == "file"
    print(f"documents {'unknown' if documents is None else documents}")
    print(f"output {os.path.abspath(options.output) if local else options.output}")
    print(f"output-config {options.output_config}\nstate-dir {state}")
    return 0


def stop(reason: sdg.Error) -> None:
    """Nothing is under way that could be stopped."""
    raise reason


def check_publishing(run: sdg.Run) -> None:
    """See that what the ranks write can be published, as a run of one process does: it is the monitor's to do."""
    options = argparse.Namespace(**{**vars(run.options), "world_size": 1, "no_publish": False})
    with tempfile.TemporaryDirectory() as nowhere:
        state = run.state if (run.state / "run.json").exists() else Path(nowhere)
        alone = dataclasses.replace(run, options=options, state=state)
        run.plugins.writers[options.writer].factory(alone)


def check_earlier(run: sdg.Run, reader: sdg.Reader) -> None:
    """Raise what a rank would, if there is a run of other options already. A model that is not named fits."""
    if run.options.fresh:
        return
    sdg.refuse_strangers(run)
    if not (run.state / "run.json").exists():
        return
    earlier: dict[str, Any] = recorded.record_of(run.state)
    launched = run.options.server in CHECKS
    wanted = launching.served_name(run) if launched else run.options.model
    run.model = wanted or earlier["identity"]["model"]
    if changes := sdg.changes_since(run, reader, earlier):
        raise sdg.of_another_run(run, changes)
