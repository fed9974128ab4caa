"""Datasets of the Hugging Face Hub as input: `--input hf://datasets/OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import sdg

from . import hub
from .parquet import ParquetReader

T = TypeVar("T")

CONVERTED = "refs/convert/parquet"  # where the Hub keeps what it made of other formats
# How `datasets` finds splits in the names of files and folders:
# https://huggingface.co/docs/datasets/repository_structure
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
NO_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "README.md"}


@sdg.hookimpl
def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--input-config", metavar="NAME", help="of a dataset on the Hub; default: its default one")
    parser.add_argument("--input-split", metavar="NAME", default="train", help="of a dataset on the Hub [train]")


@sdg.hookimpl
def register_readers(register: sdg.Register) -> None:
    register("hf", open_dataset)


class Part(NamedTuple):
    """A file of the repository."""

    path: str
    size: int


class Found(NamedTuple):
    """What a config and a split stand for."""

    config: str
    parts: list[Part]
    revision: str  # hash of the commit that the files are read at


def open_dataset(run: sdg.Run) -> ParquetReader:
    """Read a split of a dataset on the Hugging Face Hub, as it was when the run began."""
    address = hub.parse_address(run.options.input)
    if address.folder:
        raise sdg.UsageError(f"{run.options.input}: name a config or a split instead of a folder (--input-config)")
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
    """A repository at one commit: that of an earlier process of the run, else what its revision stands for now."""

    def __init__(self, run: sdg.Run, address: hub.Address) -> None:
        self.api = hub.connect()
        self.address, self.run = address, run
        earlier = run.source
        same = (earlier.get("dataset"), earlier.get("asked")) == (address.repo, address.revision)
        wanted = earlier["revision"] if same else address.revision
        self.pinned: str | None = earlier.get("parquet") if same else None
        info = self.ask(
            lambda: self.api.dataset_info(address.repo, revision=wanted, expand=["sha", "cardData"], timeout=60)
        )
        self.revision = str(info.sha)
        card: Any = info.card_data
        self.card: dict[str, Any] = card.to_dict() if card else {}

    def ask(self, call: Callable[[], T]) -> T:
        """Have the Hub answer, whatever it takes."""
        return hub.patiently(call, self.address, self.run.stopping)

    def find(self, config: str | None, split: str) -> Found:
        """The parquet files of a config and a split, resolved as `datasets.load_dataset` does it."""
        configs = {str(entry["config_name"]): entry for entry in self.card.get("configs") or []}
        if configs or config in {None, "default"}:
            name = choose(config, configs or {"default": {}}, [n for n, e in configs.items() if e.get("default")], self)
            splits = self._splits(configs.get(name, {}))
            parts = {split: [part for part in parts if is_parquet(part)] for split, parts in splits.items()}
            if any(parts.values()):
                return Found(name, pick(split, parts, f"{self.address} (config {name})"), self.revision)
            config = name if configs else config
        return self._converted(config, split)

    def _splits(self, entry: Mapping[str, Any]) -> dict[str, list[Part]]:
        """The files of each split, by the patterns of a config of the card, else by their names."""
        base = str(entry.get("data_dir") or "").strip("/.")
        patterns = patterns_of(entry["data_files"]) if entry.get("data_files") else None
        fixed = [re.split(r"[*?\[]", p)[0].rpartition("/")[0] for paths in (patterns or {}).values() for p in paths]
        folder = "/".join(filter(None, [base, os.path.commonpath(fixed) if fixed else ""]))
        inside = {part.path.removeprefix(f"{base}/"): part for part in self.list(folder, self.revision)}
        if patterns is None:
            return {split: [inside[name] for name in names] for split, names in splits_by_name(inside).items()}
        return {split: matching(paths, inside) for split, paths in patterns.items()}

    def _converted(self, config: str | None, split: str) -> Found:
        """What the Hub has made of a dataset that isn't parquet."""
        from huggingface_hub.errors import RevisionNotFoundError

        if self.address.revision not in {None, "main"}:
            raise sdg.InputError(
                f"{self.address} has no parquet files at {self.address.revision}, and the Hub converts only `main`"
            )
        repo = self.address.repo
        try:
            revision = self.pinned or self.api.dataset_info(repo, revision=CONVERTED, expand=["sha"]).sha
        except RevisionNotFoundError as problem:
            message = (
                f"{self.address} is not parquet, and the Hub has not converted it: download it, and read its files"
            )
            raise sdg.InputError(message) from problem
        folders: dict[str, dict[str, list[Part]]] = {}
        for part in self.list("", str(revision)):
            if is_parquet(part) and part.path.count("/") == 2:
                name, folder, _ = part.path.split("/")
                folders.setdefault(name, {}).setdefault(folder, []).append(part)
        name = choose(config, folders, [], self)
        whole = {folder.removeprefix("partial-"): parts for folder, parts in folders[name].items()}
        if f"partial-{split}" in folders[name]:
            sdg.say(
                f"sdg: {self.address} is not parquet, and the Hub has converted only the first 5 GB of {name}/{split}"
            )
        return Found(name, pick(split, whole, f"{self.address} (config {name})"), str(revision))

    def list(self, folder: str, revision: str) -> list[Part]:
        """All files below a folder, none if it does not exist."""
        files = self.ask(lambda: hub.list_files(self.api, self.address.repo, folder, revision))
        return [Part(file.path, file.size) for file in files]


def choose(asked: str | None, configs: Mapping[str, Any], defaults: list[str], dataset: Dataset) -> str:
    """The config that was asked for, else the default one."""
    names = list(configs)
    there = f"it has: {', '.join(names) or 'none'}"
    if asked is not None:
        if asked not in configs:
            raise sdg.InputError(f"--input-config {asked}: {dataset.address} has no such config; {there}")
        return asked
    default = [name for name in ("default", *defaults) if name in configs] or (names if len(names) == 1 else [])
    if not default:
        raise sdg.InputError(f"{dataset.address} has several configs, choose by --input-config; {there}")
    return default[0]


def pick(split: str, splits: Mapping[str, list[Part]], where: str) -> list[Part]:
    """A split's files."""
    if not splits.get(split):
        there = ", ".join(name for name, parts in splits.items() if parts)
        raise sdg.InputError(f"--input-split {split}: {where} has no such split; it has: {there or 'none'}")
    return splits[split]


def patterns_of(data_files: Any) -> dict[str, list[str]]:
    """The forms that a card's `data_files` may take, as patterns by split."""
    if isinstance(data_files, Mapping):
        entries = [(str(split), paths) for split, paths in data_files.items()]
    elif isinstance(data_files, str) or not any(isinstance(item, Mapping) for item in data_files):
        entries = [("train", data_files)]
    else:
        entries = [(str(item["split"]), item["path"]) for item in data_files]
    return {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in entries}


def matching(patterns: Iterable[str], files: Mapping[str, Part]) -> list[Part]:
    """The files that match one of some patterns, sorted."""
    from fsspec.utils import glob_translate

    wanted = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
    return sorted(part for name, part in files.items() if any(pattern.match(name) for pattern in wanted))


def splits_by_name(names: Iterable[str]) -> dict[str, list[str]]:
    """The splits that the names of files and folders tell: shards in `data/`, else keywords, else all are `train`."""
    hidden = re.compile(r"(^|/)(\.|__)")
    data = sorted(name for name in names if not hidden.search(name) and os.path.basename(name) not in NO_DATA)
    shards: dict[str, list[str]] = {}
    for name in data:
        if shard := re.fullmatch(r"data/([\w.]+)-\d{5}-of-\d{5}[^/]*\.[^/]*", name):
            shards.setdefault(shard[1], []).append(name)
    if shards:
        return shards
    for rule in (in_folder, in_filename):
        splits = {split: [name for name in data if rule(name, KEYWORDS[split])] for split in KEYWORDS}
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {"train": data}


def in_folder(name: str, keywords: Iterable[str]) -> bool:
    """Whether a folder above a file is named after a split: `dev`, `my-dev`, `dev_2`."""
    pattern = rf"(.*[-._ 0-9])?({'|'.join(keywords)})([-._ 0-9].*)?"
    return any(re.fullmatch(pattern, folder) for folder in name.split("/")[:-1])


def in_filename(name: str, keywords: Iterable[str]) -> bool:
    """Whether a file is named after a split: `dev.parquet`, `my-dev-2.parquet`."""
    return bool(re.match(rf"(.*[-._ 0-9])?({'|'.join(keywords)})[-._ 0-9]", os.path.basename(name)))


def is_parquet(part: Part) -> bool:
    """Whether a file is parquet, by its name."""
    return sdg.format_of(part.path) == "parquet"


class HubFiles:
    """Files of a repository at a commit, for the reader of parquet."""

    local = False

    def __init__(self, dataset: Dataset, found: Found) -> None:
        self.names = [part.path for part in found.parts]
        self.sizes = [part.size for part in found.parts]
        self._dataset, self._revision = dataset, found.revision

    def open(self, i: int) -> RemoteFile:
        """A file for reading."""
        api, repo = self._dataset.api, self._dataset.address.repo
        fetch = functools.partial(hub.get, api, repo, self.names[i], self._revision)
        return RemoteFile(lambda headers: self._dataset.ask(lambda: fetch(headers)), self.sizes[i])


class RemoteFile(io.RawIOBase):
    """A file that is read by HTTP ranges: one request for each read, and nothing else.

    The client's own file system lists folders before it opens a file, which a thousand ranks cannot afford.
    """

    def __init__(self, fetch: Callable[[dict[str, str]], Any], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start = self._position
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        if start >= end:
            return b""
        answer = self._fetch({"Range": f"bytes={start}-{end - 1}"})
        content = bytes(answer.content)
        if answer.status_code == 200:  # the whole file: some proxies know no ranges
            content = content[start:end]
        if len(content) != end - start:
            raise ConnectionError(f"{answer.url}: {len(content)} bytes came, {end - start} were asked for")
        self._position = end
        return content
