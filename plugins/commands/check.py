"""The command `check`: reports what a run with these options would refuse, before the run waits in a queue."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import tempfile
from pathlib import Path

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.checks import check_columns, check_reader, reading
from sdg_plugins.common.command_line import Config, parse_configs
from sdg_plugins.common.files import output_place, rank_file, split_uri, uses_spool
from sdg_plugins.common.identity import changes_since, different_run
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.ranks import ranges
from sdg_plugins.common.state import (
    check_number_of_files,
    check_state_dir,
    columns_of,
    documents_in,
    goal_of,
    recorded_size,
    refuse_strangers,
    remember_source,
    size_of_chunks,
)
from sdg_plugins.common.statistics import statistics_of
from sdg_plugins.common.steps import SCHEME
from sdg_plugins.common.templates import check_places
from sdg_plugins.publishing.card import check_beside
from sdg_plugins.servers import command, sglang
from sdg_plugins.servers.launching import launching

# Functions that raise the errors of servers which a run would launch, without launching them
CHECKS = {"command": command.words_of, "sglang": sglang.checked_model, "vllm": launching.model_of}


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("check", check)


def check(argv: list[str]) -> int:
    """Check that a run with these options could begin, without writing anything or starting a server.

    Options, plugins, columns and folders are checked, and that no run with different options exists. What depends on
    the machine of the run (GPUs, an installed engine, the URL of a server) is not.
    """
    configs = parse_configs(argv)
    for config in configs:
        check_config(config, alone=len(configs) == 1)
    return 0


def check_config(config: Config, alone: bool) -> None:
    """Check that one config could be run, and print what scripts need to know of it, as `KEY VALUE` lines.

    Args:
        config: to check.
        alone: the only one; otherwise the step that it follows may not have run.
    """
    from sdg_plugins.servers.models import runs_of

    options, plugins = config
    if options.fresh:
        raise sdg.UsageError(
            "--fresh would start over at each requeue, and delete the files of other ranks: "
            "delete the output and its state by hand instead"
        )
    state = os.path.abspath(options.state_dir)
    run = sdg.Run(options, plugins, output_place(options, Path(state)), Path(state), raise_reason)
    for each in (run, *runs_of(run).values()):
        if each.options.server in CHECKS:
            CHECKS[each.options.server](each)
            launching.check_layout(each.options)
    for folder in [state] + [run.output.root] * run.output.local:
        check_writable(folder)
    check_state_dir(run)
    remember_source(run)
    if options.reader == SCHEME and not alone:
        print(f"output-config {options.output_config}")
        return
    reader = reader_of(run)
    if (
        "prompt_of" in inspect.signature(plugins.rollouts[options.rollout].factory).parameters
        and options.prompt_template
    ):
        check_places(options.prompt_template, run)
    documents = documents_in(reader)
    options.records_per_chunk = options.records_per_chunk or recorded_size(run) or size_of_chunks(documents)
    check_earlier_run(run, reader)
    if uses_spool(run.options):
        check_number_of_files(run, reader)
        check_publishing(run)
    documents = None if documents is None else min(documents, options.max_documents or documents)
    local = split_uri(options.output)[0] == "file"
    print(f"documents {'unknown' if documents is None else documents}")
    print(f"output {os.path.abspath(options.output) if local else options.output}")
    print(f"output-config {options.output_config}\nstate-dir {state}")
    if gpus := gpus_of(run):
        print(f"gpus {gpus}")
    print(f"open-ranks {ranges(open_ranks(run, reader)) or 'none'}")
    print(shares_of(documents, options))


def reader_of(run: sdg.Run) -> sdg.Reader:
    """Open the input, and check its columns; sets `run.schema`."""
    entry = run.plugins.readers[run.options.reader]
    with reading(run.options.input, entry.factory):
        reader: sdg.Reader = entry.factory(run)
    check_reader(reader, f"the reader {run.options.reader!r} of plugin {entry.plugin}")
    with columns_of(run, reader):
        check_columns(reader.schema, run.options)
    run.schema = reader.schema
    return reader


def gpus_of(run: sdg.Run) -> int:
    """How many GPUs of each node the run's servers take; 0 if it launches none, or one that does not say."""
    every = [run.options, *run.options.models.values()]
    return sum(launching.gpus_needed(options) for options in every if options.server in {"sglang", "vllm"})


def shares_of(documents: int | None, options: argparse.Namespace) -> str:
    """The last line, on how the documents are shared; ranks that would have nothing to do are said."""
    if documents is None:
        return "fine: the number of documents is not known before they are read"
    chunks = -(-documents // options.records_per_chunk)
    ranks = counted(options.world_size, "rank")
    if chunks < (options.processes or options.world_size):
        sizes = f"of {options.records_per_chunk:,} documents"
        who = "processes" if options.processes else "ranks"
        count = f"{options.processes or options.world_size:,} {who}"
        sdg.say(f"{count} share {counted(chunks, 'chunk')} {sizes}: use fewer {who}, or a smaller --records-per-chunk")
    return f"fine: {counted(documents, 'document')} in {counted(chunks, 'chunk')} for {ranks}"


def open_ranks(run: sdg.Run, reader: sdg.Reader) -> list[int]:
    """The ranks that have not finished, or have more to do; with --processes the one that stands for all."""
    options, goal = run.options, goal_of(reader, run.options)

    def is_open(rank: int) -> bool:
        figures = statistics_of(rank_file(run.state, rank, "stats.json"))
        record = figures.get("rank", {})
        done = record.get("status") == "finished" and record.get("goal") == goal
        return not done or bool(options.retry_failed and figures.get("failed"))

    found = [rank for rank in range(options.world_size) if is_open(rank)]
    whole = options.processes and not options.any_rank
    return found[:1] and [0] if whole else found


def raise_reason(reason: BaseException) -> None:
    """Stop a run that only checks: nothing is under way that could be ended."""
    raise reason


def check_writable(path: str) -> None:
    """Raise OutputError unless a folder can be written, or created."""
    existing = next(folder for folder in [Path(path), *Path(path).parents] if folder.exists())
    if not existing.is_dir():
        raise sdg.OutputError(f"{existing} is a file, expected a folder: choose another --output or --state-dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise sdg.OutputError(f"{existing} is not writable: choose another --output or --state-dir")


def check_publishing(run: sdg.Run) -> None:
    """Check that the output can be published: a run of one process checks that, ranks leave it to the monitor."""
    options = argparse.Namespace(**{**vars(run.options), "world_size": 1, "no_publish": False})
    with tempfile.TemporaryDirectory() as empty:
        state = run.state if (run.state / "run.json").exists() else Path(empty)
        alone = dataclasses.replace(run, options=options, state=state)
        run.plugins.writers[options.writer].factory(alone)


def check_earlier_run(run: sdg.Run, reader: sdg.Reader) -> None:
    """Raise StateError if the state belongs to a different run. Without --model, any model of that run is accepted.

    A run that begins must not have rows that could not be loaded beside those of others: OutputError.
    """
    refuse_strangers(run)
    check_beside(run)
    if not (run.state / "run.json").exists():
        return
    record = recorded.load_record(run.state)
    model = launching.served_name(run) if run.options.server in CHECKS else run.options.model
    run.model = model or record["identity"]["model"]
    if changes := changes_since(run, reader, record):
        raise different_run(run, changes)
