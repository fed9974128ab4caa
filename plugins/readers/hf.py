"""Datasets of the Hugging Face Hub as input: `--input hf://datasets/OWNER/NAME[@REVISION]`."""

from __future__ import annotations

import functools
import glob
import io
import mimetypes
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.publishing import hub
from sdg_plugins.readers.parquet import ParquetReader

T = TypeVar("T")
CONVERTED = "refs/convert/parquet"  # where the Hub keeps what it made of other formats


# How `datasets` finds splits in the names of files and folders, patterns in the order in which it reads their files:
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
    parser.add_argument("--input-config", metavar="NAME", help="of a dataset on the Hub; default: its default one")
    parser.add_argument("--input-split", metavar="NAME", default="train", help="of a dataset on the Hub [train]")


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("hf", open_dataset)


class Part(NamedTuple):
    """A file of the repository."""

    path: str
    size: int


class Config(NamedTuple):
    """A config of a card: its folder, and the patterns of files in it by split; without them the files' names tell."""

    folder: str
    patterns: Mapping[str, list[str]]
    default: bool


WHOLE = Config("", {}, False)  # of a dataset that names none


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
        from huggingface_hub.errors import RevisionNotFoundError

        self.api = hub.connect()
        self.address, self.run = address, run
        earlier = run.source
        same = (earlier.get("dataset"), earlier.get("asked")) == (address.repo, address.revision)
        wanted = earlier["revision"] if same else address.revision
        self.pinned: str | None = earlier.get("parquet") if same else None
        try:
            info = self.info(wanted, "cardData")
        except sdg.InputError as problem:
            if same and isinstance(problem.__cause__, RevisionNotFoundError):
                gone = f"{address} has no more the revision {wanted} that this run began with"
                raise sdg.InputError(f"{gone}: --fresh starts over with what is there now") from problem
            raise
        self.revision = str(info.sha)
        card: Any = info.card_data
        self.card: dict[str, Any] = card.to_dict() if card else {}

    def ask(self, call: Callable[[], T], revision: str | None) -> T:
        """Have the Hub answer, whatever it takes."""
        return hub.patiently(call, self.address._replace(revision=revision), self.run.stopping)

    def info(self, revision: str | None, *more: Any) -> Any:
        """What the Hub says of a revision."""
        ask = functools.partial(self.api.dataset_info, expand=["sha", *more], timeout=60)
        return self.ask(lambda: ask(self.address.repo, revision=revision), revision)

    def find(self, config: str | None, split: str) -> Found:
        """The parquet files of a config and a split, resolved as `datasets.load_dataset` does it."""
        configs = configs_of(self.card.get("configs"), self.address)
        if not configs and config not in {None, "default"}:  # the Hub may know it from a loading script
            return self._converted(config, split, {"default": WHOLE})
        configs = configs or {"default": WHOLE}
        name = choose(config, configs, self.address)
        parts = {split: parquet_of(parts) for split, parts in self._splits(configs[name], name).items()}
        if any(parts.values()):
            return Found(name, pick(split, parts, f"{self.address} (config {name})"), self.revision)
        return self._converted(name, split, configs)

    def _splits(self, config: Config, name: str) -> dict[str, list[Part]]:
        """The files of each split, by the patterns of a config of the card, else by their names."""
        listed = [path for paths in config.patterns.values() for path in paths]
        fixed = [re.split(r"[*?\[]", path)[0].rpartition("/")[0] for path in listed]
        folder = "/".join(filter(None, [config.folder, os.path.commonpath(fixed) if fixed else ""]))
        inside = {part.path.removeprefix(f"{config.folder}/"): part for part in self.list(folder, self.revision)}
        for path in listed:
            if path not in inside and not glob.has_magic(path) and "://" not in path:
                where = f"{config.folder}/{path}".removeprefix("/")
                raise sdg.InputError(f"{self.address}: its card names {where} (config {name}), which is not there")
        patterns = config.patterns or patterns_by_name(inside)
        return {split: [inside[path] for path in matching(paths, inside)] for split, paths in patterns.items()}

    def _converted(self, config: str | None, split: str, configs: Mapping[str, Config]) -> Found:
        """What the Hub has made of a dataset that isn't parquet."""
        from huggingface_hub.errors import RevisionNotFoundError

        if self.address.revision not in {None, "main"}:
            choose(config, configs, self.address)
            raise sdg.InputError(
                f"{self.address} has no parquet files at {self.address.revision}, and the Hub converts only `main`"
            )
        try:
            revision = self.pinned or str(self.info(CONVERTED).sha)
        except sdg.InputError as problem:
            if not isinstance(problem.__cause__, RevisionNotFoundError):
                raise
            revision = ""
        folders: dict[str, dict[str, list[Part]]] = {}
        for part in self.list("", revision) if revision else []:
            if is_parquet(part) and part.path.count("/") == 2:
                name, folder, _ = part.path.split("/")
                folders.setdefault(name, {}).setdefault(folder, []).append(part)
        if not folders or (config in configs and config not in folders):
            choose(config, configs, self.address)
            what = f"{self.address} (config {config})" if folders else str(self.address)
            raise sdg.InputError(f"{what} is not parquet, and the Hub has not converted it: download its files")
        name = choose(config, dict.fromkeys(folders, WHOLE), self.address)
        whole = {folder.removeprefix("partial-"): parts for folder, parts in folders[name].items()}
        found = Found(name, pick(split, whole, f"{self.address} (config {name})"), revision)
        if f"partial-{split}" in folders[name]:
            sdg.say(f"{self.address} is not parquet, and the Hub has converted only the first 5 GB of {name}/{split}")
        return found

    def list(self, folder: str, revision: str) -> list[Part]:
        """All files below a folder, none if it does not exist."""
        files = self.ask(lambda: hub.list_files(self.api, self.address.repo, folder, revision), revision)
        return [Part(file.path, file.size) for file in files]


def configs_of(entries: Any, address: hub.Address) -> dict[str, Config]:
    """The `configs` of a dataset's card."""
    try:
        return {
            str(entry["config_name"]): Config(
                str(entry.get("data_dir") or "").removeprefix("./").strip("/"),
                patterns_of(entry.get("data_files") or {}),
                bool(entry.get("default")),
            )
            for entry in entries or []
        }
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        message = f"{address}: the `configs` of its card are not of a form that `datasets` reads: {problem!r}"
        raise sdg.InputError(message) from problem


def choose(asked: str | None, configs: Mapping[str, Config], address: hub.Address) -> str:
    """The config that was asked for, else the default one."""
    there = f"it has: {', '.join(configs)}"
    if asked is not None:
        if asked not in configs:
            raise sdg.InputError(f"--input-config {asked}: {address} has no such config; {there}")
        return asked
    marked = [name for name, config in configs.items() if config.default or name == "default"]
    default = marked or list(configs)
    if len(default) != 1:
        kind = "default configs" if marked else "configs"
        raise sdg.InputError(f"{address} has several {kind}, choose by --input-config; {there}")
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
    listed = {split: [paths] if isinstance(paths, str) else list(paths) for split, paths in entries}
    return {split: [path.removeprefix("./") for path in paths] for split, paths in listed.items()}


def matching(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    """The files that match patterns: in the order of these, then sorted; each once, where `datasets` repeats it."""
    from fsspec.utils import glob_translate

    found: dict[str, None] = {}
    for pattern in patterns:
        wanted, base = re.compile(glob_translate(pattern)), os.path.basename(pattern)
        fitting = [name for name in names if wanted.match(name) and hidden_in(name) == hidden_in(pattern)]
        ignored = NO_DATA - {base}
        found |= dict.fromkeys(sorted(name for name in fitting if os.path.basename(name) not in ignored))
    return list(found)


def hidden_in(path: str) -> tuple[int, int]:
    """How many names in a path hide it, unless a pattern has as many: those with a dot, and folders with `__`."""
    *folders, name = path.split("/")
    return sum(part[:1] == "." for part in [*folders, name]), sum(part[:2] == "__" for part in folders)


def patterns_by_name(names: Collection[str]) -> dict[str, list[str]]:
    """The splits that the names of files and folders tell: shards in `data/`, else keywords, else all are `train`."""
    if shards := matching([SHARDS.format("*")], names):
        splits = {re.sub(r"-\d{5}-of-\d{5}.*", "", name.removeprefix("data/")) for name in shards}
        return {split: [SHARDS.format(glob.escape(split))] for split in sorted(splits)}
    for shapes in (IN_FOLDERS, IN_NAMES):
        patterns = {split: [shape.format(word) for word in KEYWORDS[split] for shape in shapes] for split in KEYWORDS}
        if found := {split: paths for split, paths in patterns.items() if matching(paths, names)}:
            return found
    return {"train": ["**"]}


def is_parquet(part: Part) -> bool:
    """Whether a file is parquet, by its name."""
    return format_of(part.path) in PARQUET


def parquet_of(parts: list[Part]) -> list[Part]:
    """The parquet files of a split, none if more of its files are of another format: then that one is its data."""
    suffixes = Counter(format_of(part.path) for part in parts)
    others = [count for suffix, count in suffixes.items() if suffix in OTHER_FORMATS or is_media(suffix)]
    found = [part for part in parts if is_parquet(part)]
    return found if len(found) >= max(others, default=0) else []


def is_media(suffix: str) -> bool:
    """Whether files of a suffix are images, sounds or films."""
    return (mimetypes.guess_type(f"_.{suffix}")[0] or "").startswith(("image/", "audio/", "video/"))


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
        return RemoteFile(
            lambda headers: self._dataset.ask(lambda: fetch(headers=headers), self._revision), self.sizes[i]
        )


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
