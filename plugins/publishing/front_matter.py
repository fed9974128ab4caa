from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.common.markdown import line
from sdg_plugins.publishing.hub import hub_source

if TYPE_CHECKING:
    pass

TAGS = ["synthetic", "sdg"]
FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


class BrokenCard(sdg.OutputError):
    """The card that is there has front matter which is no YAML mapping. It is left as it is."""


class Block(NamedTuple):
    """Front matter as it stands there, and what it says."""

    text: str
    values: dict[str, Any]


def split(text: str, place: str) -> tuple[Block, str]:
    """A card's front matter and the text below it."""
    import yaml

    found = FRONT.match(text)
    way_out = f"mend it, or delete it with its two lines of ---. {place} is left as it is"
    if not found:
        if re.match(r"\s*---[ \t]*\r?(\n|\Z)", text):
            raise BrokenCard(f"{place}: the front matter has no end, a line of ---; {way_out}")
        return Block("", {}), text
    try:
        values = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        reason = " ".join(str(problem).split())
        raise BrokenCard(f"{place}: the front matter is no YAML ({reason}); {way_out}") from problem
    if not isinstance(values, dict | None):
        raise BrokenCard(f"{place}: the front matter is no mapping of keys to values; {way_out}")
    if not isinstance((values or {}).get("configs"), list | None):
        raise BrokenCard(f"{place}: `configs` in the front matter is no list; {way_out}")
    return Block(found[1], values or {}), text[found.end() :]


def update(front: dict[str, Any], configs: dict[str, dict[str, Any]], source: dict[str, Any]) -> dict[str, Any]:
    """What the front matter should say."""
    wanted = dict(front)
    for key in ("license", "language"):
        if wanted.get(key) is None and (value := words(source.get(key))):
            wanted[key] = value
    rows = sum(int(facts["rows"]) for facts in configs.values())
    wanted["size_categories"] = [size_category(rows)]
    wanted["tags"] = joined(front.get("tags"), TAGS)
    if hub := hub_source(source):
        wanted["source_datasets"] = joined(front.get("source_datasets"), [hub])
    wanted["configs"] = merge_configs(front.get("configs") or [], configs)
    return wanted


def words(value: Any) -> str | list[str] | None:
    """A licence or language as a source has it, or several; None if that is neither."""
    if isinstance(value, list):
        return [text for item in value if isinstance(item, str) and (text := line(item))]
    return line(value) if isinstance(value, str) else None


def joined(present: Any, ours: list[str]) -> list[Any]:
    """A list of the front matter with ours in it."""
    kept = present if isinstance(present, list) else [] if present is None else [present]
    return [*kept, *(item for item in ours if item not in kept)]


def size_category(rows: int) -> str:
    """The Hub's word for so many rows."""
    bounds = [f"{number}{unit}" for unit in "KMB" for number in (1, 10, 100)] + ["1T"]
    power = max(0, len(str(rows)) - 3) if rows else 0
    if power == 0:
        return "n<1K"
    return f"{bounds[power - 1]}<n<{bounds[power]}" if power < len(bounds) else "n>1T"


def merge_configs(present: list[Any], configs: dict[str, dict[str, Any]]) -> list[Any]:
    """The `configs` of the front matter: ours as the card's sections have them, `all` for several, others as they are.

    The first of ours is the default once there are several, so that `load_dataset` goes on to work without a name.
    """
    paths = {name: facts["files"] for name, facts in configs.items() if facts["files"]}
    named = {name: entry for entry in present if (name := name_of(entry))}
    ours = {name: {**named.get(name, {}), **config_entry(name, [path])} for name, path in paths.items()}
    several = "all" not in paths and len(paths) > 1 and alike([configs[name] for name in paths])
    known = {*paths.values(), *(path for name in paths for path in paths_of(named.get(name)))}
    if "all" not in paths and "all" in named and known.issuperset(paths_of(named["all"]) or [""]):  # it was made here
        del named["all"]
        present = [entry for entry in present if name_of(entry) != "all"]
    if several and "all" not in named:
        ours["all"] = config_entry("all", list(paths.values()))
    theirs = [entry for name, entry in named.items() if name not in ours]
    defaults = [entry for entry in ours.values() if entry.pop("default", False)] or list(ours.values())[:1]
    taken = any(entry.get("default") or entry["config_name"] == "default" for entry in theirs) or "default" in ours
    if defaults and not taken and len(ours) + len(theirs) > 1:
        defaults[0]["default"] = True
    left = dict(ours)
    merged = [left.pop(name_of(entry), entry) for entry in present]
    return [*merged, *left.values()]


def name_of(entry: Any) -> str:
    """The name of an entry of `configs`, "" if people wrote none."""
    name = entry.get("config_name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else ""


def config_entry(name: str, paths: list[str]) -> dict[str, Any]:
    """A config for `load_dataset`."""
    return {"config_name": name, "data_files": [{"split": "train", "path": paths[0] if len(paths) == 1 else paths}]}


def paths_of(entry: Any) -> list[str]:
    """The files of a config that looks like one of `config_entry`, of any other none."""
    try:
        ((split, paths),) = [(files["split"], files["path"]) for files in entry["data_files"]]
    except (TypeError, KeyError, ValueError):
        return []
    return [str(path) for path in (paths if isinstance(paths, list) else [paths])] if split == "train" else []


def alike(facts: list[dict[str, Any]]) -> bool:
    """Whether configs can be loaded as one: of one format, with the same columns."""
    return len({(format_of(config["files"]), config["columns"]) for config in facts}) == 1


def edit(block: Block, wanted: dict[str, Any], newline: str) -> str:
    """The front matter's text with the keys that changed written anew."""
    import yaml

    changed = {key: value for key, value in wanted.items() if key not in block.values or block.values[key] != value}
    if not changed:
        return block.text
    try:
        text = replace_keys(block.text, changed, newline)
        if yaml.safe_load(text) == wanted:
            return text
    except (yaml.YAMLError, ValueError):
        pass  # braces, anchors, indented keys: nothing that can be edited by the line
    text = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return str(text).replace("\n", newline)


def replace_keys(text: str, changed: dict[str, Any], newline: str) -> str:
    """A block of YAML with some of its top-level keys replaced, the others and the comments between them untouched."""
    import yaml

    node = yaml.compose(text, yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    starts = [key.start_mark.index for key, _ in pairs]
    parts = [text[: starts[0]] if starts else text]
    for (key, _), (start, end) in zip(pairs, itertools.pairwise([*starts, len(text)]), strict=True):
        part = text[start:end]
        if key.value in changed:
            tail = re.search(r"(?:^[ \t]*(?:#[^\n]*)?\r?\n)*\Z", part, re.MULTILINE)
            part = in_yaml(key.value, changed[key.value], newline) + (tail[0] if tail else "")
        parts.append(part)
    known = {key.value for key, _ in pairs}
    return "".join(parts + [in_yaml(key, value, newline) for key, value in changed.items() if key not in known])


def in_yaml(key: str, value: Any, newline: str) -> str:
    """One key of the front matter, as the Hub's client writes it."""
    from huggingface_hub import DatasetCardData

    text = DatasetCardData(**{key: value}).to_yaml()
    # The Hub reads YAML 1.2, where more names look like numbers than in PyYAML's 1.1.
    text = re.sub(r"(config_name: )([-.\d].*)$", r"\1'\2'", text, flags=re.MULTILINE)
    return text.replace("\n", newline) + newline
