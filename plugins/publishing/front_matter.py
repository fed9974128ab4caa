"""The YAML front matter of a card: keys of ours are updated, other keys and comments stay as they are."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.common.hub import dataset_of_source
from sdg_plugins.common.markdown import short_line

TAGS = ["synthetic", "sdg"]
MACHINE = "machine-generated"
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


class BrokenCard(sdg.OutputError):
    """The card has front matter that cannot be read, so it is left unchanged."""


class FrontMatter(NamedTuple):
    """Front matter as text, and its values."""

    text: str
    values: dict[str, Any]


def load_yaml(text: str) -> Any:
    """The values of YAML; by the C library if PyYAML has it, which takes seconds where Python takes a minute."""
    import yaml

    try:
        return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:  # the C library is stricter about characters
        return yaml.safe_load(text)


def split_card(text: str, name: str) -> tuple[FrontMatter, str]:
    """Split a card into its front matter and the text below it; `name` is that of the card in messages."""
    import yaml

    found = FRONT_MATTER.match(text)
    way_out = f"fix it, or delete it with its two lines of ---. {name} is left unchanged"
    if not found:
        if re.match(r"\s*---[ \t]*\r?(\n|\Z)", text):
            raise BrokenCard(f"{name}: the front matter has no closing line ---; {way_out}")
        return FrontMatter("", {}), text
    try:
        values = load_yaml(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise BrokenCard(f"{name}: the front matter is not valid YAML ({sdg.one_line(exc)}); {way_out}") from exc
    if not isinstance(values, dict | None):
        raise BrokenCard(f"{name}: the front matter is not a mapping; {way_out}")
    if not isinstance((values or {}).get("configs"), list | None):
        raise BrokenCard(f"{name}: `configs` in the front matter is not a list; {way_out}")
    return FrontMatter(found[1], values or {}), text[found.end() :]


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def updated(
    values: dict[str, Any], configs: dict[str, dict[str, Any]], source: dict[str, Any], dataset: str = ""
) -> dict[str, Any]:
    """The values of the front matter, brought up to date.

    Args:
        values: those of the card as it is.
        configs: facts of each config in the card, by name; see `card.facts_of`.
        source: what the reader recorded of the input.
        dataset: OWNER/NAME on the Hub, "" for an output elsewhere.
    """
    wanted = dict(values)
    tasks = list(dict.fromkeys(task for facts in configs.values() for task in facts["tasks"]))
    known = {key: text_or_texts(source.get(key)) for key in ("license", "language")}
    if "translation" in tasks:
        del known["language"]  # that of the source, not of the rows
    name = re.sub(r"[-_.]+", " ", dataset.rpartition("/")[2])
    made = {"annotations_creators": [MACHINE], "language_creators": [MACHINE]} if rows_of_configs(configs) else {}
    for key, value in {**known, "pretty_name": name[:1].upper() + name[1:], "task_categories": tasks, **made}.items():
        if wanted.get(key) is None and value:
            wanted[key] = value
    wanted["size_categories"] = [size_category(rows_of_configs(configs))]
    wanted["tags"] = extended(values.get("tags"), TAGS)
    if original := dataset_of_source(source):
        wanted["source_datasets"] = extended(values.get("source_datasets"), [original])
    wanted["configs"] = merge_configs(values.get("configs") or [], configs)
    if not dataset:
        for entry in wanted["configs"]:
            describe(entry, configs)
    return wanted


def rows_of_configs(configs: dict[str, dict[str, Any]]) -> int:
    """The rows of all configs."""
    return sum(int(facts["rows"]) for facts in configs.values())


def text_or_texts(value: Any) -> str | list[str] | None:
    """A license or language of a source: a text, or a list of texts; None if it is neither."""
    if isinstance(value, list):
        return [text for item in value if isinstance(item, str) and (text := short_line(item))]
    return short_line(value) if isinstance(value, str) else None


def extended(present: Any, ours: list[str]) -> list[Any]:
    """A list in the front matter, with our items appended unless it has them."""
    kept = present if isinstance(present, list) else [] if present is None else [present]
    return [*kept, *(item for item in ours if item not in kept)]


def size_category(rows: int) -> str:
    """The Hub's size category for a number of rows."""
    bounds = [f"{number}{unit}" for unit in "KMB" for number in (1, 10, 100)] + ["1T"]
    power = max(0, len(str(rows)) - 3) if rows else 0
    if power == 0:
        return "n<1K"
    return f"{bounds[power - 1]}<n<{bounds[power]}" if power < len(bounds) else "n>1T"


def merge_configs(present: list[Any], configs: dict[str, dict[str, Any]]) -> list[Any]:
    """The `configs` of the front matter: ours updated, `all` added if there are several, all others as they are.

    With several configs, the first of ours becomes the default, so that `load_dataset` still works without a name.
    A config that has no files yet is left out beside others: `load_dataset` would load none of them.
    """
    paths = {name: facts["files"] for name, facts in configs.items() if facts["files"]}
    without = {name for name in paths if not configs[name]["exist"]}
    present = [entry for entry in present if not is_ours(entry, paths, without)]
    if present or without != paths.keys():
        paths = {name: path for name, path in paths.items() if name not in without}
    named = {name: entry for entry in present if (name := config_name_of(entry))}
    ours = {name: with_train_split(named.get(name, {}), config_entry(name, [path])) for name, path in paths.items()}
    several = "all" not in paths and len(paths) > 1 and same_columns([configs[name] for name in paths])
    known = {*paths.values(), *(path for name in paths for path in paths_of(named.get(name)))}
    if "all" not in paths and "all" in named and known.issuperset(paths_of(named["all"]) or [""]):  # an `all` of ours
        del named["all"]
        present = [entry for entry in present if config_name_of(entry) != "all"]
    if several and "all" not in named:
        ours["all"] = config_entry("all", list(paths.values()))
    theirs = [entry for name, entry in named.items() if name not in ours]
    defaults = [entry for entry in ours.values() if entry.pop("default", False)] or list(ours.values())[:1]
    taken = any(entry.get("default") or entry["config_name"] == "default" for entry in theirs) or "default" in ours
    if defaults and not taken and len(ours) + len(theirs) > 1:
        defaults[0]["default"] = True
    left = dict(ours)
    merged = [left.pop(config_name_of(entry), entry) for entry in present]
    return [*merged, *left.values()]


def describe(entry: Any, configs: dict[str, dict[str, Any]]) -> None:
    """Tell the rows of a config of ours from earlier ones.

    `datasets` keeps what it has loaded from a local folder, and looks at the card, but not at the files, to decide
    whether that is still the same.
    """
    facts = configs.get(config_name_of(entry))
    if facts and facts["run"] and paths_of(entry) == [facts["files"]]:
        entry["description"] = f"{facts['rows']:,} rows of run {facts['run']}"


def config_name_of(entry: Any) -> str:
    """The name of an entry of `configs`, "" if it has none."""
    name = entry.get("config_name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else ""


def with_train_split(present: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with our split; other splits and keys, which a person has added, stay."""
    files = present.get("data_files")
    splits = [item for item in files if isinstance(item, dict)] if isinstance(files, list) else []
    (train,) = entry["data_files"]
    kept = [train if item.get("split") == "train" else item for item in splits]
    return {**present, **entry, "data_files": kept if train in kept else [train, *kept]}


def is_ours(entry: Any, paths: dict[str, str], names: set[str]) -> bool:
    """True if an entry is that of one of these configs, as `config_entry` makes it."""
    name = config_name_of(entry)
    return name in names and paths_of(entry) == [paths[name]]


def config_entry(name: str, paths: list[str]) -> dict[str, Any]:
    """An entry of `configs`, as `load_dataset` reads it."""
    return {"config_name": name, "data_files": [{"split": "train", "path": paths[0] if len(paths) == 1 else paths}]}


def paths_of(entry: Any) -> list[str]:
    """The paths in an entry that has the form of `config_entry`; empty for any other."""
    try:
        ((split, paths),) = [(files["split"], files["path"]) for files in entry["data_files"]]
    except (TypeError, KeyError, ValueError):
        return []
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])] if split == "train" else []


def same_columns(facts: list[dict[str, Any]]) -> bool:
    """True if configs can be loaded as one: with the same columns, from files of the same format."""
    return len({(format_of(config["files"]), config["columns"]) for config in facts}) == 1


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_values(front: FrontMatter, wanted: dict[str, Any], newline: str) -> str:
    """The text of front matter with the values wanted; only keys whose values differ are rewritten, if possible."""
    import yaml

    changed = {key: value for key, value in wanted.items() if key not in front.values or front.values[key] != value}
    if not changed:
        return front.text
    try:
        text = replace_keys(front.text, changed, newline)
        if load_yaml(text) == wanted:
            return text
    except (yaml.YAMLError, ValueError):
        pass  # braces, anchors, indented keys: it cannot be edited by the line
    text = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return str(text).replace("\n", newline)


def replace_keys(text: str, changed: dict[str, Any], newline: str) -> str:
    """Replace top-level keys in a block of YAML; other keys, and the comments between keys, stay untouched."""
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    starts = [key.start_mark.index for key, _ in pairs]
    parts = [text[: starts[0]] if starts else text]
    for (key, _), (start, end) in zip(pairs, itertools.pairwise([*starts, len(text)]), strict=True):
        part = text[start:end]
        if key.value in changed:
            tail = re.search(r"(?:^[ \t]*(?:#[^\n]*)?\r?\n)*\Z", part, re.MULTILINE)
            part = key_as_yaml(key.value, changed[key.value], newline) + (tail[0] if tail else "")
        parts.append(part)
    known = {key.value for key, _ in pairs}
    return "".join(parts + [key_as_yaml(key, value, newline) for key, value in changed.items() if key not in known])


def key_as_yaml(key: str, value: Any, newline: str) -> str:
    """One key of the front matter with its value, in the style of the Hub's client."""
    from huggingface_hub import DatasetCardData

    text = DatasetCardData(**{key: value}).to_yaml()
    # The Hub reads YAML 1.2, where more names look like numbers than in PyYAML's 1.1.
    text = re.sub(r"(config_name: )([-.\d].*)$", r"\1'\2'", text, flags=re.MULTILINE)
    return text.replace("\n", newline) + newline
