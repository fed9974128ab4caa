"""Datasets of the Hugging Face Hub as input: `--input hf://datasets/OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import functools
import glob
import mimetypes
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.files import fixed_folder, suffix_of
from sdg_plugins.common.remote import RemoteFile
from sdg_plugins.common.splits import (
    WHOLE,
    CardConfig,
    choose_config,
    configs_in_card,
    matching_files,
    patterns_by_name,
)
from sdg_plugins.readers.buckets import open_bucket
from sdg_plugins.readers.parquet import ParquetReader

T = TypeVar("T")
CONVERTED = "refs/convert/parquet"  # where the Hub keeps its parquet conversions of other formats

PARQUET = {"parquet", "geoparquet", "gpq"}
OTHER_FORMATS = {"arrow", "conll", "conllu", "csv", "h5", "hdf5", "json", "jsonl", "lance", "ndjson", "tar", "tsv"}
OTHER_FORMATS |= {"txt", "vortex", "xml", "zip"}


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("hf", open_dataset)


class FileEntry(NamedTuple):
    """A file of the repository."""

    path: str
    size: int  # bytes


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


def files_of_split(split: str, splits: Mapping[str, list[FileEntry]], where: str) -> list[FileEntry]:
    """A split's files; InputError if it has none."""
    if not splits.get(split):
        available = ", ".join(name for name, files in splits.items() if files) or "none"
        raise sdg.InputError(f"--input-split {split}: {where} has no such split; available: {available}")
    return splits[split]


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
