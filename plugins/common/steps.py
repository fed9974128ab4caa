"""Steps of a `--config` file: tables `[[steps]]`, each of which works on what the one before it has written.

A step is a config of the same output, with a state of its own: its name is the folder, and the name for `load_dataset`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.options import text_or_file
from sdg_plugins.common.paths import OF_FLAT_ROWS, needs_no_document

SCHEME = "step"
# Options of the input: above the tables and on the command line they are the first step's.
OF_THE_INPUT = (
    *("input", "input-config", "input-split", "input-encoding", "vary"),
    *("prompt-column", "id-column", "max-documents"),
)
RESULTS = "rollout_results"


def step_tables(steps: Any, common: dict[str, Any], argv: list[str]) -> dict[str, dict[str, Any]]:
    """The tables `[[steps]]` as tables of configs, by name, each with its input and the columns it needs.

    Args:
        steps: as in the file.
        common: the options above the tables; those of the input become the first step's.
        argv: the command line; the same.

    Raises:
        UsageError: they are not tables.
    """
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise sdg.UsageError("steps must be tables, each of them [[steps]]")
    shape = shape_in(argv)
    of_the_input = {key: common.pop(key) for key in OF_THE_INPUT if key in common}
    tables: dict[str, dict[str, Any]] = {}
    before: tuple[str, dict[str, Any]] | None = None
    whole: list[tuple[str, dict[str, Any]]] = []  # the steps whose columns are all there
    for step in steps:
        table = {key.replace("_", "-"): value for key, value in step.items()}
        name = unused(str(table.pop("name", "") or name_of(table, common)), tables)
        if before is None:
            table = {**of_the_input, **table}
        else:
            table = {"input": f"{SCHEME}://{before[0]}", **following(before[1], name, table)}
        tables[name] = table
        before = name, {**common, **table, **shape}
        whole = whole if before[1].keys().isdisjoint(("keep-columns", "drop-columns")) else []
        check_columns(before, whole)
        whole.append(before)
    take_input(argv, tables)
    argv[:] = without(argv, OF_THE_INPUT)
    return tables


def check_columns(step: tuple[str, Mapping[str, Any]], others: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Raise UsageError if a step would write columns that the rows of an earlier one have.

    Args:
        step: name and options.
        others: earlier ones whose columns are kept.
    """
    name, options = step
    for other, theirs in others:
        if options.get("flat") and theirs.get("flat"):
            message = f"steps {other} and {name} are both flat, and number their rows in columns rollout and sample"
            raise sdg.UsageError(f'{message}: add drop-columns = "rollout,sample" to {name}')
        column = options.get("results-column", RESULTS)
        if not options.get("flat") and not theirs.get("flat") and column == theirs.get("results-column", RESULTS):
            message = f"steps {other} and {name} would both have their results in a column {column}"
            raise sdg.UsageError(f"{message}: give one of them another results-column")


def shape_in(argv: list[str]) -> dict[str, Any]:
    """The options of a command line that say where a step's results are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--results-column", dest="results-column")
    return vars(parser.parse_known_args(argv)[0])


def name_of(table: Mapping[str, Any], common: Mapping[str, Any]) -> str:
    """A step's name, if it has none: that of its rollout."""
    plugin = table.get("plugin", common.get("plugin"))
    last = (plugin[-1] if isinstance(plugin, list) else plugin) or ("prompt" if "prompt-template" in table else "")
    return re.sub(r"[^\w.-]+", "-", Path(str(last or "summarize").rpartition(":")[2]).stem)


def unused(name: str, tables: Mapping[str, Any]) -> str:
    """A name, with a number if another step has it."""
    return next(
        found
        for number in range(1, len(tables) + 2)
        if (found := f"{name}-{number}" * (number > 1) or name) not in tables
    )


def following(before: Mapping[str, Any], name: str, table: dict[str, Any]) -> dict[str, Any]:
    """A step's options: by default its prompts are the texts of the step before, and its results a column of its name.

    Args:
        before: the options of the step before.
        name: of the step.
        table: its own options.
    """
    defaults: dict[str, Any] = {"results-column": name}
    template = table.get("prompt-template")
    if not (isinstance(template, str) and needs_no_document(text_or_file(template))):
        column = before.get("results-column", RESULTS)
        defaults["prompt-column"] = OF_FLAT_ROWS if before.get("flat") else f"{column}[0].text"
    return {**defaults, **table}


def without(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """A command line without some options and their values."""
    flags = {f"--{name}" for name in names}
    kept = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def take_input(argv: list[str], tables: dict[str, dict[str, Any]]) -> None:
    """Copy options of the input from a command line into the first step's table."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in OF_THE_INPUT:
        parser.add_argument(f"--{name}", action="append" if name == "vary" else "store")
    given = vars(parser.parse_known_args(argv)[0])
    first = next(iter(tables.values()))
    first.update({name.replace("_", "-"): value for name, value in given.items() if value is not None})
