"""Configs and splits of a dataset, resolved as `datasets.load_dataset` resolves them: by its card, else by names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import sdg

# How `datasets` finds splits by the names of files and folders. The order of patterns is that in which files are read.
# https://huggingface.co/docs/datasets/repository_structure
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARDS = "data/{}-" + "[0-9]" * 5 + "-of-" + "[0-9]" * 5 + "*.*"
IN_FOLDERS = ("**/{0}/**", "**/{0}[-._ 0-9]*/**", "**/*[-._ 0-9]{0}/**", "**/*[-._ 0-9]{0}[-._ 0-9]*/**")
IN_NAMES = ("**/{0}[-._ 0-9]*", "**/*[-._ 0-9]{0}[-._ 0-9]*")
NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dummy_data.zip"}


class CardConfig(NamedTuple):
    """One of the `configs` of a dataset's card."""

    folder: str
    patterns: Mapping[str, list[str]]  # globs in the folder, by split; if empty, splits are found by the files' names
    default: bool


WHOLE = CardConfig("", {}, False)  # the config of a dataset whose card names none


def configs_in_card(entries: Any, address: object) -> dict[str, CardConfig]:
    """The `configs` of a dataset's card."""
    try:
        return {
            str(entry["config_name"]): CardConfig(
                str(entry.get("data_dir") or "").removeprefix("./").strip("/"),
                patterns_in_card(entry.get("data_files") or {}),
                bool(entry.get("default")),
            )
            for entry in entries or []
        }
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        message = f"{address}: the `configs` of its card are not in a form that `datasets` supports: {exc!r}"
        raise sdg.InputError(message) from exc


def choose_config(asked: str | None, configs: Mapping[str, CardConfig], address: object) -> str:
    """The name of the requested config, else of the default one."""
    available = f"available: {', '.join(configs)}"
    if asked is not None:
        if asked not in configs:
            raise sdg.InputError(f"--input-config {asked}: {address} has no such config; {available}")
        return asked
    marked = [name for name, config in configs.items() if config.default or name == "default"]
    default = marked or list(configs)
    if len(default) != 1:
        kind = "default configs" if marked else "configs"
        raise sdg.InputError(f"{address} has several {kind}: choose one with --input-config; {available}")
    return default[0]


def patterns_in_card(data_files: Any) -> dict[str, list[str]]:
    """A card's `data_files`, in any of the forms that they may have, as patterns by split."""
    if isinstance(data_files, Mapping):
        entries = [(str(split), paths) for split, paths in data_files.items()]
    elif isinstance(data_files, str) or not any(isinstance(item, Mapping) for item in data_files):
        entries = [("train", data_files)]
    else:
        entries = [(str(item["split"]), item["path"]) for item in data_files]
    listed = {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in entries}
    return {split: [path.removeprefix("./") for path in paths] for split, paths in listed.items()}


def matching_files(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The files that match patterns, in the order of the patterns, then sorted.

    A file that matches several patterns comes once, although `datasets` would read it for each of them.
    """
    from fsspec.utils import glob_translate

    found: dict[str, None] = {}
    for pattern in patterns:
        expression, base = re.compile(glob_translate(pattern)), os.path.basename(pattern)
        fitting = [name for name in names if expression.match(name) and hidden_parts(name) == hidden_parts(pattern)]
        ignored = NO_DATA - {base}
        found |= dict.fromkeys(sorted(name for name in fitting if os.path.basename(name) not in ignored))
    return list(found)


def hidden_parts(path: str) -> tuple[int, int]:
    """How many parts of a path begin with a dot, and how many folders with `__`.

    Files with such parts are hidden: only patterns with as many of them match.
    """
    *folders, name = path.split("/")
    return sum(part[:1] == "." for part in [*folders, name]), sum(part[:2] == "__" for part in folders)


def patterns_by_name(names: Collection[str]) -> dict[str, list[str]]:
    """Splits by the names of files and folders: shards in `data/`, else keywords, else everything is `train`."""
    if shards := matching_files([SHARDS.format("*")], names):
        splits = {re.sub(r"-\d{5}-of-\d{5}.*", "", name.removeprefix("data/")) for name in shards}
        return {split: [SHARDS.format(glob.escape(split))] for split in sorted(splits)}
    for shapes in (IN_FOLDERS, IN_NAMES):
        patterns = {split: [shape.format(word) for word in KEYWORDS[split] for shape in shapes] for split in KEYWORDS}
        if found := {split: paths for split, paths in patterns.items() if matching_files(paths, names)}:
            return found
    return {"train": ["**"]}


# ── Checkouts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_of(readme: str) -> dict[str, Any]:
    """The front matter of a card."""
    import yaml

    found = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", readme, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def names_of_split(
    names: Collection[str], card: Mapping[str, Any], config: str | None, split: str, where: str
) -> tuple[list[str], list[str]]:
    """The files of a split of a dataset in a folder, and the names of its other splits.

    Args:
        names: its files, relative to the folder.
        card: see `card_of`.
        config: its name; None for the default one.
        split: its name.
        where: what the folder is called in messages.
    """
    configs = configs_in_card(card.get("configs"), where) or {"default": WHOLE}
    chosen = configs[choose_config(config, configs, where)]
    inside = {name.removeprefix(f"{chosen.folder}/"): name for name in names if name.startswith(chosen.folder)}
    patterns = chosen.patterns or patterns_by_name(inside)
    splits = {name: [inside[path] for path in matching_files(paths, inside)] for name, paths in patterns.items()}
    if not splits.get(split):
        available = ", ".join(name for name, files in splits.items() if files) or "none"
        raise sdg.InputError(f"--input-split {split}: {where} has no such split; available: {available}")
    return splits[split], [name for name, files in splits.items() if name != split and files]
