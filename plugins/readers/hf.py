"""Datasets of the Hugging Face Hub as input: `--input hf://datasets/OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import functools
import glob
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.files import fixed_folder, suffix_of
from sdg_plugins.common.remote import RemoteFile
from sdg_plugins.readers.buckets import open_bucket
from sdg_plugins.readers.parquet import ParquetReader

T = TypeVar("T")
CONVERTED = "refs/convert/parquet"  # where the Hub keeps its parquet conversions of other formats

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
PARQUET = {"parquet", "geoparquet", "gpq"}
OTHER_FORMATS = {"arrow", "conll", "conllu", "csv", "h5", "hdf5", "json", "jsonl", "lance", "ndjson", "tar", "tsv"}
OTHER_FORMATS |= {"txt", "vortex", "xml", "zip"}


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument(
        "--input-config", metavar="NAME", help="config of a dataset on the Hub; default: its default config"
    )
    parser.add_argument("--input-split", metavar="NAME", default="train", help="split of a dataset on the Hub [train]")


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("hf", open_dataset)


class FileEntry(NamedTuple):
    """A file of the repository."""

    path: str
    size: int  # bytes


class CardConfig(NamedTuple):
    """One of the `configs` of a dataset's card."""

    folder: str
    patterns: Mapping[str, list[str]]  # globs in the folder, by split; if empty, splits are found by the files' names
    default: bool


WHOLE = CardConfig("", {}, False)  # the config of a dataset whose card names none


class FoundSplit(NamedTuple):
    """The files of a config and a split."""

    config: str
    files: list[FileEntry]
    revision: str  # hash of the commit at which the files are read


def open_dataset(run: sdg.Run) -> sdg.Reader:
    """Read a split of a dataset on the Hugging Face Hub, at one revision for the whole run; or files of a bucket."""
    if hub.is_bucket(run.options.input):
        return open_bucket(run)
    address = hub.parse_address(run.options.input)
    if address.folder:
        raise sdg.UsageError(f"{run.options.input}: a folder cannot be given; use --input-config or --input-split")
    dataset = Dataset(run, address)
    found = dataset.find(run.options.input_config, run.options.input_split)
    files = HubFiles(dataset, found)
    identity = {"dataset": address.repo, "revision": dataset.revision}
    if found.revision != dataset.revision:
        identity["parquet"] = found.revision
    reader = ParquetReader(run, files, identity)
    card = {name: value for name in ("license", "language") if (value := dataset.card.get(name))}
    reader.source = {**identity, "asked": address.revision, "config": found.config, **card}
    reader.source["split"] = run.options.input_split
    return reader


class Dataset:
    """A dataset at one commit: that of an earlier process of the run, else the one its revision now refers to."""

    def __init__(self, run: sdg.Run, address: hub.Address) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        self.api = hub.open_client()
        self.address, self.run = address, run
        earlier = run.source
        same = (earlier.get("dataset"), earlier.get("asked")) == (address.repo, address.revision)
        revision = earlier["revision"] if same else address.revision
        self.pinned: str | None = earlier.get("parquet") if same else None
        try:
            info = self.info(revision, "cardData")
        except sdg.InputError as exc:
            if same and isinstance(exc.__cause__, RevisionNotFoundError):
                gone = f"{address} no longer has the revision {revision} that this run began with"
                raise sdg.InputError(f"{gone}: start over at the current one with --fresh") from exc
            raise
        self.revision = str(info.sha)
        card: Any = info.card_data
        self.card: dict[str, Any] = card.to_dict() if card else {}

    def ask(self, call: Callable[[], T], revision: str | None) -> T:
        """Call the Hub, and retry until it responds."""
        return hub.patiently(call, self.address._replace(revision=revision), self.run.stopping)

    def info(self, revision: str | None, *more: Any) -> Any:
        """The Hub's metadata of a revision, with the properties `more`."""
        request = functools.partial(self.api.dataset_info, expand=["sha", *more], timeout=60)
        return self.ask(lambda: request(self.address.repo, revision=revision), revision)

    def find(self, config: str | None, split: str) -> FoundSplit:
        """The parquet files of a config and a split, resolved as `datasets.load_dataset` resolves them."""
        configs = configs_in_card(self.card.get("configs"), self.address)
        if not configs and config not in {None, "default"}:  # the Hub may know it from a loading script
            return self._converted(config, split, {"default": WHOLE})
        configs = configs or {"default": WHOLE}
        name = choose_config(config, configs, self.address)
        splits = {split: parquet_files(files) for split, files in self._splits(configs[name], name).items()}
        if any(splits.values()):
            return FoundSplit(name, files_of_split(split, splits, f"{self.address} (config {name})"), self.revision)
        return self._converted(name, split, configs)

    def _splits(self, config: CardConfig, name: str) -> dict[str, list[FileEntry]]:
        """The files of each split, found by the patterns of a config of the card, else by their names."""
        listed = [path for paths in config.patterns.values() for path in paths]
        fixed = [fixed_folder(path) for path in listed]
        folder = "/".join(filter(None, [config.folder, os.path.commonpath(fixed) if fixed else ""]))
        inside = {file.path.removeprefix(f"{config.folder}/"): file for file in self.list(folder, self.revision)}
        for path in listed:
            if path not in inside and not glob.has_magic(path) and "://" not in path:
                where = f"{config.folder}/{path}".removeprefix("/")
                raise sdg.InputError(f"{self.address}: its card names {where} (config {name}), which does not exist")
        patterns = config.patterns or patterns_by_name(inside)
        return {split: [inside[path] for path in matching_files(paths, inside)] for split, paths in patterns.items()}

    def _converted(self, config: str | None, split: str, configs: Mapping[str, CardConfig]) -> FoundSplit:
        """The parquet files to which the Hub has converted a dataset of another format."""
        from huggingface_hub.errors import RevisionNotFoundError

        if self.address.revision not in {None, "main"}:
            choose_config(config, configs, self.address)
            raise sdg.InputError(
                f"{self.address} has no parquet files at {self.address.revision}, and the Hub converts only `main`"
            )
        try:
            revision = self.pinned or str(self.info(CONVERTED).sha)
        except sdg.InputError as exc:
            if not isinstance(exc.__cause__, RevisionNotFoundError):
                raise
            revision = ""
        folders: dict[str, dict[str, list[FileEntry]]] = {}
        for file in self.list("", revision) if revision else []:
            if is_parquet(file) and file.path.count("/") == 2:
                name, folder, _ = file.path.split("/")
                folders.setdefault(name, {}).setdefault(folder, []).append(file)
        if not folders or (config in configs and config not in folders):
            choose_config(config, configs, self.address)
            what = f"{self.address} (config {config})" if folders else str(self.address)
            raise sdg.InputError(f"{what} is not parquet, and the Hub has not converted it: download its files")
        name = choose_config(config, dict.fromkeys(folders, WHOLE), self.address)
        splits = {folder.removeprefix("partial-"): files for folder, files in folders[name].items()}
        found = FoundSplit(name, files_of_split(split, splits, f"{self.address} (config {name})"), revision)
        if f"partial-{split}" in folders[name]:
            sdg.say(f"{self.address} is not parquet, and the Hub has converted only the first 5 GB of {name}/{split}")
        return found

    def list(self, folder: str, revision: str) -> list[FileEntry]:
        """All files below a folder, none if it does not exist."""
        files = self.ask(lambda: hub.list_files(self.api, self.address.repo, folder, revision), revision)
        return [FileEntry(file.path, file.size) for file in files]


def configs_in_card(entries: Any, address: hub.Address) -> dict[str, CardConfig]:
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


def choose_config(asked: str | None, configs: Mapping[str, CardConfig], address: hub.Address) -> str:
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


def files_of_split(split: str, splits: Mapping[str, list[FileEntry]], where: str) -> list[FileEntry]:
    """A split's files; InputError if it has none."""
    if not splits.get(split):
        available = ", ".join(name for name, files in splits.items() if files) or "none"
        raise sdg.InputError(f"--input-split {split}: {where} has no such split; available: {available}")
    return splits[split]


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


def is_parquet(file: FileEntry) -> bool:
    """True if a file is parquet, by its name."""
    return suffix_of(file.path) in PARQUET


def parquet_files(files: list[FileEntry]) -> list[FileEntry]:
    """The parquet files of a split; none if another format has more files, because then that one is its data."""
    suffixes = Counter(suffix_of(file.path) for file in files)
    others = [count for suffix, count in suffixes.items() if suffix in OTHER_FORMATS or is_media(suffix)]
    found = [file for file in files if is_parquet(file)]
    return found if len(found) >= max(others, default=0) else []


def is_media(suffix: str) -> bool:
    """True if files with this suffix are images, audio or video."""
    return (mimetypes.guess_type(f"_.{suffix}")[0] or "").startswith(("image/", "audio/", "video/"))


class HubFiles:
    """Files of a dataset at a commit, for `ParquetReader`."""

    local = False

    def __init__(self, dataset: Dataset, found: FoundSplit) -> None:
        self.names = [entry.path for entry in found.files]
        self.sizes = [entry.size for entry in found.files]
        self._dataset, self._revision = dataset, found.revision

    def open(self, i: int) -> RemoteFile:
        """Open the file with index `i` for reading."""
        api, repo = self._dataset.api, self._dataset.address.repo
        fetch = functools.partial(hub.get, api, repo, self.names[i], self._revision)
        return RemoteFile(
            lambda headers: self._dataset.ask(lambda: fetch(headers=headers), self._revision), self.sizes[i]
        )
