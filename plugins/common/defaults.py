"""The defaults of `run` that depend on other options or on the environment, and what options must not be together."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from pathlib import Path

import sdg
from sdg_plugins.common.files import default_state_dir, expanded, format_of, split_uri, suffix_of
from sdg_plugins.common.inputs import input_format
from sdg_plugins.common.options import number
from sdg_plugins.common.processes import derive_processes

DEMO_OUTPUT = "output/demo"  # so that a demonstration does not stand in the way of the first real run
ANY = "any"  # instead of a rank: whichever is free


def rank_or_any(value: str) -> float | str:
    """A rank, or the word that stands for whichever is free."""
    try:
        return value if value == ANY else number(int, 0)(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r}: expected the number of a rank, or {ANY}") from None


def derive(options: argparse.Namespace, plugins: sdg.Plugins) -> None:
    """Fill in the defaults that depend on other options or on the environment."""
    plugins.find("rollouts", options.rollout)
    for name in ("input", "output", "state_dir"):
        if getattr(options, name) == "":  # for example an unset shell variable, which must not select a default
            raise sdg.UsageError(f"--{name.replace('_', '-')} is empty")
    derive_server(options, plugins)
    options.reader = by_scheme_or_suffix(plugins, "readers", options.input) if options.input else "demo"
    _derive_filename(options, plugins)
    _check_filename(options.output_filename)
    if not re.fullmatch(r"[\w.-]+", options.output_config) or options.output_config in {"failed", ".", "..", ".sdg"}:
        raise sdg.UsageError(f"--output-config {options.output_config!r}: expected a folder name other than `failed`")
    demo = options.server == "demo"
    options.output = expanded(options.output or (DEMO_OUTPUT if demo else f"output/{options.rollout}"))
    check_uris(options)
    scheme, name = split_uri(options.output)[0], options.output_filename
    if format_of(options.output) in {*plugins.readers, *plugins.writers} and not os.path.isdir(options.output):
        hint = f"--output-filename '${{rank}}_${{chunk_index}}.{format_of(options.output)}' chooses the format"
        raise sdg.UsageError(f"--output {options.output}: the output is a folder with a file for each chunk; {hint}")
    options.file_writer = options.writer or by_scheme_or_suffix(plugins, "writers", name)
    options.writer = scheme if scheme in plugins.writers else options.file_writer
    if options.fresh and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        raise sdg.UsageError("--fresh in a requeued job would delete its earlier work: submit it without --fresh")
    if options.max_cost is not None and options.price_input is None and options.price_output is None:
        raise sdg.UsageError("--max-cost requires --price-input or --price-output")
    options.sample = None  # see the command `estimate`
    if options.results_column == "id":
        raise sdg.UsageError("--results-column id: this column holds the document ids")
    options.state_dir = expanded(options.state_dir or default_state_dir(options.output, options.output_config))
    _derive_rank(options)


def derive_server(options: argparse.Namespace, plugins: sdg.Plugins) -> None:
    """Settle the server of a model."""
    options.base_url = options.base_url or []
    given = options.base_url or (options.input and os.environ.get("OPENAI_BASE_URL"))
    options.server = options.server or ("endpoint" if given else "demo")
    plugins.find("servers", options.server)
    if options.base_url and options.server != "endpoint":
        raise sdg.UsageError(f"--base-url requires --server endpoint, not {options.server}")


def _derive_filename(options: argparse.Namespace, plugins: sdg.Plugins) -> None:
    """With --writer, files have its name as their suffix, or what it has in its attribute `suffix`."""
    if options.writer and options.output_filename.endswith("}.parquet"):
        factory = plugins.find("writers", options.writer).factory
        name = options.output_filename.removesuffix(".parquet")
        options.output_filename = f"{name}.{getattr(factory, 'suffix', options.writer).lstrip('.')}"


def _check_filename(name: str) -> None:
    if "${chunk_index}" not in name:
        raise sdg.UsageError("--output-filename needs ${chunk_index}, otherwise chunks overwrite each other")
    if "$" in name.replace("${chunk_index}", "").replace("${rank}", ""):
        raise sdg.UsageError("--output-filename may contain only the placeholders ${rank} and ${chunk_index}")
    if "/" in name:
        raise sdg.UsageError(f"--output-filename {name}: must not contain a folder; --output-config names the folder")


def check_formats(every: list[argparse.Namespace]) -> None:
    """Raise UsageError if a config that has not begun has another format than the first one.

    Args:
        every: the options of each config; they share --output.
    """
    first = every[0]
    for options in every:
        ours, theirs = format_of(options.output_filename), format_of(first.output_filename)
        if ours != theirs and not (Path(options.state_dir) / "run.json").exists():
            raise sdg.UsageError(
                f"--output-filename: [configs.{first.output_config}] is in {theirs} and "
                f"[configs.{options.output_config}] in {ours}, and `datasets` loads all configs in one format"
            )


def check_uris(options: argparse.Namespace) -> None:
    """Raise UsageError for a key in a URI, or a --base-url that is not one."""
    for uri in (options.input or "", options.output):
        if sdg.redact(uri) != uri:
            message = "put keys into the environment (AWS_ACCESS_KEY_ID…), not into a URI"
            raise sdg.UsageError(f"{sdg.redact(uri)}: {message}")
    for url in options.base_url or []:
        if not url.startswith(("http://", "https://")):
            raise sdg.UsageError(f"--base-url {sdg.redact(url)}: must begin with http:// or https://")


def _derive_rank(options: argparse.Namespace) -> None:
    """Take rank and world size from Slurm's array if they are not given."""
    options.any_rank = options.rank == ANY
    if options.any_rank:
        _check_any_rank(options)
    if derive_processes(options, options.output == DEMO_OUTPUT and options.server == "demo"):
        return
    first, last, task = (os.environ.get(f"SLURM_ARRAY_TASK_{key}") for key in ("MIN", "MAX", "ID"))
    if options.rank is None:
        options.rank = int(task) - int(first or 0) if task else 0
    if options.world_size is None:
        options.world_size = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) if task else 1
        if task and options.world_size != int(last or 0) - int(first or 0) + 1:
            raise sdg.UsageError("this Slurm array has gaps: give --rank and --world-size")
        if task and options.world_size > 1:
            which = f"rank {options.rank} of {options.world_size}, as Slurm's array says"
            sdg.say(f"{which}: for runs of their own give --rank 0 --world-size 1 and an --output each")
    if options.rank >= options.world_size:
        raise sdg.UsageError(f"--rank {options.rank} must be less than --world-size {options.world_size}")


def _check_any_rank(options: argparse.Namespace) -> None:
    """Raise UsageError if processes that share the ranks cannot do what is asked; sets a rank to begin with."""
    if options.world_size is None:
        raise sdg.UsageError("--rank any needs --world-size N, the number of ranks that the processes share")
    if options.fresh:
        raise sdg.UsageError(
            "--rank any with --fresh would delete the work of other processes: run once with --rank 0 --fresh"
        )
    options.rank = 0


def by_scheme_or_suffix(plugins: sdg.Plugins, kind: str, uri: str) -> str:
    """The registered name for a URI: its scheme, else the format of its files."""
    entries: dict[str, sdg.Entry] = getattr(plugins, kind)
    scheme, path = split_uri(uri)
    if scheme in entries:
        return scheme
    if uri == "-" and "stdin" in entries:
        return "stdin"
    if kind == "readers":
        found = input_format(uri, entries, lambda name: inspect.unwrap(entries[name].factory))
    else:
        found = suffix if (suffix := suffix_of(path)) in entries else format_of(path)
    if found in entries:
        return str(found)
    option = {"readers": "--input ", "writers": "--output-filename "}.get(kind, "")
    raise sdg.UsageError(f"{option}{sdg.redact(uri)}: unknown suffix or scheme; known: {', '.join(sorted(entries))}")
