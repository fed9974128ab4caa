"""The options of `run`, and how a command line, a TOML file and the environment become a namespace."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common import models
from sdg_plugins.common.checks import check_rollout
from sdg_plugins.common.defaults import check_formats, check_uris, derive, derive_server, rank_or_any
from sdg_plugins.common.files import default_state_dir
from sdg_plugins.common.idle_options import check_idle, uses
from sdg_plugins.common.interleaving import check_interleaved
from sdg_plugins.common.loading import contributing
from sdg_plugins.common.options import (
    BriefHelp,
    Item,
    Option,
    Options,
    Parser,
    further_fields,
    name_and_variable,
    names,
    number,
    one_of,
    setting,
)
from sdg_plugins.common.steps import step_tables

FILENAME = "${rank}_${chunk_index}.parquet"
LONG_DOCUMENTS = ("truncate", "split", "fail")
FLAG = "store_true"
EMPTY_ANSWERS = ("fail", "keep")


_tokens = number(int, 1, 10**18)
_count, _natural, _seconds, _ratio = number(int, 1), number(int, 0), number(float, 0.001), number(float, 0)
_rate, _price = number(float, 0.001, 1e12), number(float, 0, 1e12)


OPTIONS = {
    "task": [
        setting(
            "--plugin",
            "P",
            "rollout, FILE.py or MODULE[:ROLLOUT]; repeatable: all are loaded, the last one runs",
            action="append",
        ),
        setting(
            "--config", "FILE.toml", "read options of the same names from a file; the command line wins", shared=True
        ),
        setting("--preview", "N", "show requests and rows of N documents; write nothing", type=_count, shared=True),
    ],
    "input": [
        setting(
            "--input",
            "URI",
            "hf://datasets/OWNER/NAME, or parquet, jsonl or csv: a file, folder, glob or s3://…; default: a demo",
        ),
        Option(
            "--prompt-column",
            "PATH",
            "column of strings or of lists of {role, content}, or a place in it such as rollout_results[0].text",
            "text",
        ),
        Option("--id-column", "NAME", "column of document ids; default: id if present, else <file>/<row>"),
        Option(
            "--input-config", "NAME", "config of a dataset on the Hub, or of its checkout; default: its default config"
        ),
        Option("--input-split", "NAME", "split of a dataset on the Hub, or of its checkout [train]", "train"),
        Option("--input-encoding", "NAME", "encoding of text files; default: UTF-8 or UTF-16, else Windows-1252"),
        setting("--max-documents", "N", "use only the first N of the whole input; may grow between runs", type=_count),
    ],
    "output": [
        setting(
            "--output",
            "URI",
            "a folder, s3://… or hf://datasets/OWNER/NAME; default: ./output/<rollout>, ./output/demo for the demo",
            shared=True,
        ),
        setting("--writer", "NAME", "writer of the files; default: by the suffix of --output-filename"),
        setting("--output-config", "NAME", "sub-folder, and the config for load_dataset", "data", shared=True),
        Option("--output-filename", "T", "template with ${chunk_index}; .jsonl writes JSON lines", FILENAME),
        Option(
            "--records-per-chunk",
            "N",
            "documents per file and checkpoint; default: 1000, fewer for inputs of less than 100,000",
            type=_count,
        ),
        Option("--flat", None, "write a row for each result, with its fields as columns", action=FLAG),
        Option("--keep-columns", "A,B", "columns of the source that rows keep [all]", type=names),
        Option("--drop-columns", "A,B", "columns of the source that rows do not keep", type=names),
        Option("--keep-messages", None, "write the messages of each result's last request", action=FLAG),
        Option("--results-column", "NAME", "column for the results", "rollout_results"),
    ],
    "server": [
        setting("--server", "NAME", "default: endpoint with --base-url or $OPENAI_BASE_URL, else demo", shared=True),
        setting(
            "--base-url",
            "URL",
            "server URL, with or without /v1; repeatable: requests go to the least loaded server",
            action="append",
            shared=True,
        ),
        setting("--api-key-env", "NAME", "environment variable that holds the API key", "OPENAI_API_KEY", shared=True),
        setting(
            "--header-env",
            "NAME=VARIABLE",
            "send a header whose value is in an environment variable, such as api-key=AZURE_KEY; repeatable",
            type=name_and_variable,
            action="append",
            shared=True,
        ),
        Option("--model", "NAME", "model name; default: the server's only model", shared=True),
        Option(
            "--model-max-context",
            "N",
            "context length in tokens, prompt and completion; default: as reported by the server",
            type=_count,
            shared=True,
        ),
        setting("--max-concurrent-generations", "N", "maximum requests in flight", 500, _count),
        setting(
            "--max-concurrent-documents",
            "N",
            "maximum documents in flight; default: 1.5 × --max-concurrent-generations + 16",
            type=_count,
        ),
        setting("--price-input", "X", "price of a million prompt tokens, for costs and --max-cost", type=_price),
        setting("--price-output", "X", "price of a million completion tokens", type=_price),
        setting("--requests-per-minute", "N", "send at most N requests per minute to all servers together", type=_rate),
        setting("--tokens-per-minute", "N", "send and receive at most N tokens per minute", type=_rate),
        setting("--request-timeout", "S", "seconds for one attempt; with --stream between two tokens", 600.0, _seconds),
        setting("--max-retries", "N", "attempts after the first one", 6, _natural),
        setting(
            "--models",
            "NAME.KEY=VALUE",
            "option of a further model, for generate(…, to=NAME); repeatable",
            type=models.setting,
            action="append",
            shared=True,
        ),
        setting(
            "--stream",
            None,
            "receive completions in pieces, for servers that close idle connections",
            action="store_true",
        ),
    ],
    "sampling": [
        Option("--max-tokens", "N", "maximum completion tokens per request", type=_count),
        Option("--temperature", "X", "sampling temperature; default: the model's own", type=_ratio),
        Option(
            "--top-p",
            "X",
            "nucleus sampling probability; default: the model's own",
            type=number(float, 0, 1),
        ),
        Option("--top-k", "N", "sample from the N most likely tokens", type=int),
        Option("--seed", "N", "seed of a document's first rollout; the next ones count up from it", type=int),
        Option("--generation", "JSON", "further fields of the request payload", type=further_fields),
        Option(
            "--empty-answers",
            "HOW",
            "completions without text: fail, or keep (a row with empty text, its reasoning and finish_reason)",
            EMPTY_ANSWERS[0],
            one_of(*EMPTY_ANSWERS),
        ),
        Option("--rollouts-per-document", "N", "independent rollouts per document", 1, _count),
        Option(
            "--long-documents",
            "HOW",
            "documents that exceed the context: truncate, split (run the parts, join the results) or fail",
            LONG_DOCUMENTS[0],
            one_of(*LONG_DOCUMENTS),
        ),
    ],
    "run": [
        setting(
            "--max-failure-rate",
            "X",
            "stop if more than this share of at least 100 documents fails",
            0.1,
            number(float, 0, 1),
        ),
        setting(
            "--max-cost", "X", "end the run with exit 4 when all ranks have spent this much; may grow", type=_price
        ),
        setting("--max-total-tokens", "N", "end the run with exit 4 after this many tokens; may grow", type=_tokens),
        setting("--retry-failed", None, "run the failed documents again", action="store_true", shared=True),
        setting(
            "--accept-edited-plugin",
            None,
            "go on although the plugin's code has changed: documents that are not finished run with the new code",
            action="store_true",
            shared=True,
        ),
        setting(
            "--rank",
            "I",
            "process chunks I, I+N, I+2N…, or any: the ranks that are neither finished nor taken, one after the other; "
            "default: Slurm's array task, else 0",
            type=rank_or_any,
            shared=True,
        ),
        Option(
            "--world-size",
            "N",
            "number of ranks that share the input; default: Slurm's array, else 1",
            type=_count,
            shared=True,
        ),
        setting(
            "--interleave-configs",
            None,
            "run a document's requests of all [configs] close together on one server, whose cache has it then",
            action=FLAG,
            shared=True,
        ),
        setting("--state-dir", "D", "default: <output>/.sdg for a folder, else ./.sdg/<output name>", shared=True),
        setting(
            "--processes",
            "N",
            "number of processes on this machine that share the ranks and the servers; may differ between runs; "
            "--world-size is then up to 8 × N unless given, or as the run was begun",
            type=_count,
            shared=True,
        ),
        setting("--fresh", None, "delete state and output, and start over", action="store_true", shared=True),
        setting("--no-progress", None, "show no progress bar or lines", action="store_true", shared=True),
    ],
}
CORE = [option for group in OPTIONS.values() for option in group]

# What `--help` shows, beside the options of plugins that are in use or not bundled; `--help-all` shows the rest.
EVERYDAY = {
    *("--plugin", "--config", "--preview", "--prompt-template", "--system-prompt"),
    *("--input", "--prompt-column", "--id-column", "--max-documents", "--output", "--output-config"),
    *("--base-url", "--server", "--model", "--api-key-env", "--max-concurrent-generations", "--tp", "--replicas"),
    *("--max-tokens", "--temperature", "--generation", "--rollouts-per-document", "--long-documents"),
    *("--retry-failed", "--rank", "--world-size", "--processes", "--fresh", "--version", "--help", "--help-all"),
}
EXAMPLES = """\
examples:
  sdg.py                                                   a demonstration: no server, no key
  sdg.py --plugin prompt --prompt-template 'Translate into French: [[DOCUMENT]]' \\
      --input docs.jsonl --base-url http://localhost:8000 --preview 3
  sdg.py --config run.toml                                 options of the same names from a file
"""


def build_parser(plugins: sdg.Plugins, rollout: str | None = None) -> tuple[Parser, dict[str, Options]]:
    """The parser of `run`, and the options that each plugin added.

    Args:
        plugins: those that are loaded.
        rollout: the one to run; `--help` shows the options of its plugin.
    """
    width = max(map(len, plugins.commands))
    commands = [f"  {name:<{width}}  {entry.help}" for name, entry in sorted(plugins.commands.items())]
    parser = Parser(
        prog="sdg.py",
        usage="sdg.py [run] [OPTIONS]\n       sdg.py COMMAND [OPTIONS]",
        description=(sdg.__doc__ or "").partition("\n")[0],
        epilog="\n".join([EXAMPLES, "commands; each has its own --help:", *commands]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    brief = parser.add_argument("-h", "--help", action=BriefHelp, help="show the options that are used most")
    parser.add_argument("--help-all", action="help", help="show all options")
    parser.add_argument("--version", action="version", version=f"sdg {sdg.__version__}", help="show the version")
    for title, options in OPTIONS.items():
        group = Options(parser, parser.add_argument_group(title))
        for option in options:
            group.add(option)
    added = {name: plugin_options(parser, plugins, name) for name, _ in plugins.manager.list_name_plugin()}
    in_use = plugins.rollouts[rollout].plugin if rollout in plugins.rollouts else ""
    shown = [group.identity for name, group in added.items() if name == in_use or not name.startswith("sdg_plugins.")]
    brief.const = {flag[2:].replace("-", "_") for flag in EVERYDAY}.union(*shown)
    return parser, added


def plugin_options(parser: Parser, plugins: sdg.Plugins, name: str) -> Options:
    """Let a plugin add its options, in a group of its own."""
    plugin = plugins.manager.get_plugin(name)
    none = Options(parser, None)
    if not any(impl.plugin is plugin for impl, _ in plugins.calls("add_options", parser=none)):
        return none
    group = Options(parser, parser.add_argument_group(title_of(name)))
    try:
        plugins.call_one("add_options", plugin, parser=group)
    except argparse.ArgumentError as exc:
        raise sdg.PluginError(f"plugin {name}: {exc}; rename the option") from exc
    return group


def title_of(plugin: str) -> str:
    """The title of a plugin's options: `rollout judge` for a bundled one, else the last part of its name."""
    package, _, rest = plugin.partition(".")
    kind, _, name = rest.partition(".")
    return (
        f"{kind.removesuffix('s')} {name.rpartition('.')[2]}" if package == "sdg_plugins" else plugin.rpartition(".")[2]
    )


# ── Parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Config(NamedTuple):
    """What is generated into one folder of the output: the options, and the plugins that they name."""

    options: argparse.Namespace
    plugins: sdg.Plugins

    @property
    def name(self) -> str:
        """The name for `load_dataset`."""
        return str(self.options.output_config)


def parse_configs(argv: list[str]) -> list[Config]:
    """The configs of a command line: those of the tables `[configs.NAME]` in `--config`, else one.

    A table's options override those above the tables, and the command line overrides both; `--output-config` there
    selects one of the tables.

    Raises:
        UsageError, PluginError: with the option or plugin named.
    """
    asked = _early(argv, "--config", "--output-config")
    common = _read_toml(asked["config"]) if asked["config"] else {}
    if "config" in common:
        message = f"--config {asked['config']}: `config` is not an option of the file; name tables [configs.NAME]"
        raise sdg.UsageError(message)
    tables = common.pop("configs", None)
    if "steps" in common:
        if tables:
            raise sdg.UsageError(f"--config {asked['config']} has configs and steps: use one of them in a file")
        tables = step_tables(common.pop("steps"), common, argv := list(argv))
    if tables is None:
        return [parse_config(argv, common)]
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise sdg.UsageError(f"--config {asked['config']}: configs must be tables, such as [configs.faq]")
    chosen = asked["output_config"]
    if chosen and chosen not in tables:
        raise sdg.UsageError(f"--output-config {chosen}: {sdg.nearest(chosen, tables)}")
    common = {"output": f"output/{Path(asked['config'] or '').stem}", **common}
    names = [chosen] if chosen else list(tables)
    configs = [parse_config(argv, {**common, "output-config": name}, _dashed(tables[name])) for name in names]
    for config in configs:
        if config.options.state_dir != default_state_dir(config.options.output, config.name):  # given, for all
            config.options.state_dir = os.path.join(config.options.state_dir, config.name)
    check_interleaved([config.options for config in configs])
    check_formats([config.options for config in configs])
    return configs


def parse_config(argv: list[str], common: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Config:
    """Load the plugins that a command line, a config's own table and the common options name; then `parse_with`."""
    name = f": [configs.{common['output-config']}]" if own is not None else ""
    argv = as_arguments({**common, **(own or {})}, argv) + argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--plugin", action="append")
    asked = argparse.Namespace(plugin=None)
    with contextlib.suppress(argparse.ArgumentError):  # reported by the full parser
        early.parse_known_args(argv, asked)
    plugins, rollout = sdg.Plugins.load(asked.plugin or [])
    templated = any(word.partition("=")[0] in {"--prompt-template", "--schema"} for word in argv)
    return parse_with(plugins, rollout or ("prompt" if templated else "summarize"), argv, own or {}, name)


def _early(argv: list[str], *flags: str) -> dict[str, str | None]:
    """Options that decide how the others are read, by their names; the full parser reports what is wrong."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked = argparse.Namespace(**{early.add_argument(flag).dest: None for flag in flags})
    with contextlib.suppress(argparse.ArgumentError):
        early.parse_known_args(argv, asked)
    return vars(asked)


def parse_with(plugins: sdg.Plugins, rollout: str, argv: list[str], own: Iterable[str] = (), name: str = "") -> Config:
    """Parse the options of `run`, and derive their defaults.

    The namespace also has `rollout` (the rollout's name) and `identity` (names of the options in the fingerprint).

    Args:
        plugins: those that are loaded.
        rollout: the rollout's name.
        argv: all options.
        own: names of those in a config's table, which must not be shared by all configs.
        name: of the config, for messages.

    Raises:
        UsageError, PluginError: with the option or plugin named.
    """
    parser, added = build_parser(plugins, rollout)
    parser.prog += name
    options = parser.parse_args(argv)
    if sum(word.partition("=")[0] == "--input" for word in argv) > 1:
        parser.error("--input is given twice: name a folder, or a glob in quotes")
    options.rollout = rollout
    try:
        _check_shared(own, {option.dest for option in CORE if option.shared})
        derive(options, plugins)
        serving = {plugins.rollouts[rollout].plugin, plugins.find("readers", options.reader).plugin}
        serving |= contributing(plugins, rollout) & added.keys()
        check_idle(options, plugins, added, argv, serving)
        _derive_models(options, plugins, parser, added)
        plugged = set().union(*(group.identity for group in added.values()))
        used = {dest: identity for plugin in serving for dest, identity in added[plugin].identity.items()}
        _check_shared(own, plugged - set(used))
    except sdg.UsageError as exc:
        parser.error(str(exc))
    check_rollout(rollout, plugins)
    own_identity = {dest for dest, identity in used.items() if identity}
    options.identity = sorted(own_identity | {option.dest for option in CORE if option.identity})
    return Config(options, plugins)


def _derive_models(
    options: argparse.Namespace, plugins: sdg.Plugins, parser: Parser, added: dict[str, Options]
) -> None:
    """Replace `options.models` by the options of each further model."""

    def derive(model: argparse.Namespace, words: list[str]) -> None:
        derive_server(model, plugins)
        check_uris(model)
        check_idle(model, plugins, added, words, set())

    own = {option.dest: option.action == "store_true" for option in OPTIONS["server"] + OPTIONS["sampling"]}
    for plugin, group in added.items():
        if any(uses(plugins, entry, plugin) for entry in plugins.servers.values()):
            own |= {dest: parser.get_default(dest) is False for dest in group.identity}
    options.models = models.namespaces(options, options.models or [], parser, own, derive)


def _check_shared(own: Iterable[str], shared: set[str]) -> None:
    """Raise UsageError if a config's table has an option that all configs share."""
    for key in own:
        if key.replace("-", "_") in shared:
            raise sdg.UsageError(f"--{key} is the same for all configs: write {key} above the tables")


def _read_toml(path: str) -> dict[str, Any]:
    """A TOML file's options; `configs` are its tables."""
    try:
        return _dashed(tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError) as exc:
        raise sdg.UsageError(f"--config {path}: {exc}") from exc


def _dashed(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the names that options have."""
    return {key.replace("_", "-"): value for key, value in table.items()}


def as_arguments(table: Mapping[str, Any], argv: list[str]) -> list[str]:
    """A table's options as arguments, without those that are also on the command line."""
    given = {word.partition("=")[0] for word in argv}
    arguments = []
    for key, value in table.items():
        name = f"--{key}"
        if key == "models":
            arguments += models.file_settings(value, argv, as_arguments)
            continue
        if name in given or value is False:
            continue
        items = value if isinstance(value, list | tuple) else [value]
        if key == "input" and len(items) > 1:
            raise sdg.UsageError("input: several are given; name a folder, or a glob")
        for item in items:
            text = json.dumps(item, default=str) if isinstance(item, dict) else str(item)
            word = name if item is True else f"{name}={text}"
            arguments.append(Item(word) if len(items) > 1 else word)
    return arguments
