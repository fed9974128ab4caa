"""Files of the input: which ones a URI names, which format they have, what identifies them."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash

import sdg
from sdg_plugins.common.files import access_errors, filesystem, fixed_folder, format_of, split_uri, suffix_of, utf8
from sdg_plugins.common.marks import MARKS, Marks
from sdg_plugins.common.outputs import written_by_run
from sdg_plugins.common.splits import card_of, names_of_split
from sdg_plugins.common.streams import BROKEN, Stream

END_BYTES = 64 << 10  # hashed at either end of an input file
SMALL = 1 << 20  # bytes of a remote file that is fetched whole before it is read in its order…
AHEAD = 16  # … together with the next ones: one after the other, thousands would wait for two responses each
KEPT = 256  # files of at most END_BYTES that are kept
SHOWN = 3  # names of files in a message
STATE = re.compile(r"(.*?)/\.sdg(/|-[^/]*\.json$)")  # in the output of a run: its state, or where that is
UNREAD = re.compile(r"(^|/)(_|\.[^.]|failed/(.+/)?\d{5,}_\d{5,}\.jsonl$)")  # hidden files, and a run's failures

# Suffixes of data: such files are named if they are not read. Those of text are not, because every folder has some.
DATA = {
    *("parquet", "jsonl", "csv", "arrow", "orc", "avro", "xml", "xls", "xlsx", "h5", "hdf5", "npy", "npz"),
    *("pkl", "pickle", "pt", "safetensors", "tar", "zip", "7z", "rar", "lance", "vortex", "mds", "tfrecord"),
    *("sqlite", "sqlite3", "db", "duckdb", "conll", "conllu", "msgpack", "bson"),
}

# Files that `datasets` writes beside the Arrow files of a dataset that is saved to disk
SAVED = {"state.json", "dataset_info.json", "dataset_dict.json"}

# Keys of a card by which a folder is a dataset
CARD_KEYS = {"configs", "dataset_info", "size_categories", "task_categories"}


def list_files(uri: str) -> list[tuple[str, int]]:
    """Paths and sizes (bytes) of the files of a URI, sorted: one file, a folder with everything below it, or a glob.

    Hidden files and folders below the URI (`.git`, `_temporary`), the outputs of runs, and what `datasets` notes beside
    Arrow files are skipped.

    Raises:
        InputError: there are none, or the place cannot be read.
    """
    return [(file.path, file.size) for file in listed_files(uri)]


class Listed(NamedTuple):
    """A file in a listing."""

    path: str
    size: int  # bytes
    version: str = ""  # of a remote file: changes with its content; "" if the listing has nothing of the kind
    times: tuple[int, int] = (0, 0)  # of a local file: when its content and its inode were changed, in ns

    @property
    def marks(self) -> list[int]:
        """What changes when a local file does."""
        return [self.size, *self.times]


def listed_files(uri: str) -> list[Listed]:
    """As `list_files`, with what the listing knows of the files' content."""
    import pyarrow.fs

    fs, path = filesystem(uri, quick=True)
    local = isinstance(fs, pyarrow.fs.LocalFileSystem)
    root = fixed_folder(path)
    with access_errors(uri, sdg.InputError):
        if not glob.has_magic(path) or fs.get_file_info(path).type:
            files, root = _files_below(uri, path), path
        elif local:
            names_here = filter(os.path.isfile, glob.glob(path, recursive=True))
            files = [listed(name, os.stat(name)) for name in names_here]
        else:
            files = [file for file in _files_below(uri, root) if fnmatch.fnmatch(file.path, path)]
    names = {file.path: file.path[len(root) :].lstrip("/") for file in files}
    outputs = tuple({f"{state[1]}/" for name in names.values() if (state := STATE.match(name))})
    found = [file for file in files if not UNREAD.search(name := names[file.path]) and not name.startswith(outputs)]
    if any(format_of(file.path) == "arrow" for file in found):
        found = [file for file in found if os.path.basename(file.path) not in SAVED]
    if not found:
        raise sdg.InputError(f"--input {uri}: no files found")
    for file in found if local else ():
        utf8(file.path)  # raises
    return sorted(found)


def listed(path: str, status: os.stat_result) -> Listed:
    """A local file."""
    return Listed(path, status.st_size, times=(status.st_mtime_ns, status.st_ctime_ns))


def _files_below(uri: str, path: str) -> list[Listed]:
    """The file with this path, or everything below it if it is a folder."""
    import pyarrow.fs

    first, _ = filesystem(uri, quick=True)
    info = first.get_file_info(path)
    if info.type == pyarrow.fs.FileType.NotFound:
        bucket = path.partition("/")[0]
        if split_uri(uri)[0] == "s3" and first.get_file_info(bucket).type == info.type:
            raise sdg.InputError(f"--input {uri}: bucket {bucket} does not exist")
        name = re.fullmatch(r"(?:https://huggingface\.co/datasets/)?([\w.-]+/[\w.-]+)", uri)
        hint = f"; for a dataset on the Hub write hf://datasets/{name[1]}" if name else ""
        raise sdg.InputError(f"--input {uri}: no such file or folder{hint}")
    if isinstance(first, pyarrow.fs.LocalFileSystem):
        return [listed(path, os.stat(path))] if info.is_file else list(_walk(path, ()))
    versions = getattr(getattr(getattr(first, "handler", None), "fs", None), "versions", {})
    infos = [info] if info.is_file else first.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    return [
        Listed(
            info.path,
            info.size,
            versions.get(info.path) or (f"{info.mtime:%Y-%m-%dT%H:%M:%S.%f}" if info.mtime else ""),
        )
        for info in infos
        if info.is_file
    ]


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Listed]:
    """The files below a local folder. Links are followed, except to folders that they are in.

    Args:
        folder: its path.
        above: device and inode of each folder on the way to it.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        sdg.say(f"{folder} is a link to a folder that contains it: not followed")
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, (*above, here))
            elif entry.is_file():
                yield listed(entry.path, entry.stat())


# ── Formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def input_format(uri: str, known: Collection[str], reader_of: Callable[[str], object] = str) -> str | None:
    """The one of the `known` formats that the files of a URI have; None if it is none of them.

    Files whose names have no suffix are looked into. Text files beside others, such as a README, do not count.

    Args:
        uri: of the files.
        known: the formats.
        reader_of: what reads a format: several formats that it reads count as the first of them.

    Raises:
        UsageError: there are files of several formats.
    """
    named = _format_by_name(split_uri(uri)[1], known)
    if named and not glob.has_magic(uri) and not os.path.isdir(os.path.expanduser(uri)):
        return named
    files = [name for name, _ in list_files(uri)]
    formats = sorted({found for name in files if (found := _format_by_name(name, known))})
    if len(formats) > 1:
        formats = [name for name in formats if name not in {"text", "txt"}] or formats
    if len({reader_of(name) for name in formats}) > 1:
        message = f"has files of several formats, {' and '.join(formats)}: select those of one format with a glob"
        raise sdg.UsageError(f"{sdg.redact(uri)} {message}")
    if formats:
        return formats[0]
    silent = files if len(files) == 1 else [name for name in files if not suffix_of(name)]
    found = format_by_content(uri, silent[0]) if silent else None
    return found if found in known else None


def _format_by_name(path: str, known: Collection[str]) -> str | None:
    """The format that a file's suffix names: a plugin may have registered the suffix itself."""
    return next((name for name in (suffix_of(path), format_of(path)) if name in known), None)


def format_by_content(uri: str, path: str) -> str | None:
    """The format that a file has by its first bytes; None if they do not say."""
    with access_errors(uri, sdg.InputError), filesystem(uri)[0].open_input_file(path) as file:
        try:
            head = Stream(file).head.lstrip(b"\xef\xbb\xbf \t\r\n")
        except BROKEN:
            return None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    return "jsonl" if head.startswith((b"{", b"[")) else None


# ── The files of a run ───────────────────────────────────────────────────────────────────────────────────────────────


class InputFiles:
    """The files of `--input` that have a given format: for readers of formats.

    Args:
        uri: of a file, a folder or a glob.
        format: or a suffix, or several of them. A single file is taken whatever its name is.

    Attributes:
        paths: in the file system `fs`, sorted.
        sizes: in bytes.
        names: the paths relative to their common folder.
        local: False if each access takes a network request.
    """

    def __init__(
        self, uri: str, format: str | Collection[str], config: str | None = None, split: str | None = None
    ) -> None:
        formats = {format} if isinstance(format, str) else set(format)
        self.fs, self._root = filesystem(uri)
        self.local = self.fs.type_name == "local"
        every = {file.path: file for file in listed_files(uri)}
        files = [(file.path, file.size) for file in every.values()]
        if split:
            files = self._of_split(uri, files, config, split)
        found = [(file, size) for file, size in files if formats & {suffix_of(file), format_of(file)}]
        if not found:
            found = [(file, size) for file, size in files if len(files) == 1 or not suffix_of(file)]
        if not found:
            raise sdg.InputError(f"--input {uri}: no .{' or .'.join(sorted(formats))} files found")
        self._say_skipped(uri, files, {file for file, _ in found})
        found = self._without_outputs(uri, found, min(formats))
        self.paths = [file for file, _ in found]
        self.sizes = [size for _, size in found]
        root = os.path.commonpath(self.paths) if len(found) > 1 else os.path.dirname(found[0][0])
        self.names = [os.path.relpath(file, root) for file in self.paths]
        self._versions = [every[path].version for path in self.paths]
        self._marks = Marks({path: every[path].marks for path in self.paths} if self.local else {})
        self._ahead: dict[int, Future[bytes]] = {}
        self._fetch_once = functools.lru_cache(KEPT)(self._fetch)  # the first ones are read for the schema, too

    @classmethod
    def of_run(cls, run: sdg.Run, format: str | Collection[str]) -> InputFiles:
        """The files of a run's input; of a dataset's checkout only those of its config and split."""
        options = run.options
        files = cls(
            options.input, format, getattr(options, "input_config", None), getattr(options, "input_split", None)
        )
        if state := getattr(run, "state", None):
            files._marks.path = state / MARKS
        return files

    @property
    def inner(self) -> list[str]:
        """The paths relative to the URI, or to the first folder of a glob that has no wildcard."""
        root = fixed_folder(self._root) if glob.has_magic(self._root) else self._root
        return [os.path.relpath(path, root) for path in self.paths]

    def _of_split(
        self, uri: str, files: list[tuple[str, int]], config: str | None, split: str
    ) -> list[tuple[str, int]]:
        """The files of a split, if the URI is the folder of a dataset with a card or a split is asked for; else all."""
        names = {os.path.relpath(path, self._root): (path, size) for path, size in files}
        asked = config is not None or split != "train"
        if glob.has_magic(self._root) or "." in names or not (asked or "README.md" in names):
            return files
        card = {}
        if "README.md" in names:
            with access_errors(uri, sdg.InputError), self.fs.open_input_file(names["README.md"][0]) as file:
                card = card_of(file.read().decode(errors="replace"))
        marks = [f"{self._root}/{name}" for name in (".gitattributes", ".cache/huggingface")]
        marked = card and any(info.type for info in self.fs.get_file_info(marks))
        if not (asked or marked or CARD_KEYS & card.keys()):
            return files
        found, others = names_of_split(names, card, config, split, sdg.redact(uri))
        if others:
            sdg.say(f"--input {sdg.redact(uri)}: reading the split {split}; others: {', '.join(others)}")
        return [names[name] for name in found]

    def _without_outputs(self, uri: str, files: list[tuple[str, int]], format: str) -> list[tuple[str, int]]:
        """The files but those that a run has written, unless all are: its own output must not become input."""
        firsts = {os.path.dirname(path): path for path, _ in reversed(files)}
        if len(firsts) < 2:
            return files

        def is_output(path: str) -> bool:
            try:
                with self.fs.open_input_file(path) as file:
                    return written_by_run(file, format)
            except OSError:  # reported when it is read
                return False

        with ThreadPoolExecutor(16) as pool:
            written = dict(zip(firsts, pool.map(is_output, firsts.values()), strict=True))
        outputs = [folder for folder, found in written.items() if found]
        if not 0 < len(outputs) < len(firsts):
            return files
        sdg.say(f"--input {sdg.redact(uri)}: {', '.join(outputs[:SHOWN])} is the output of a run: not read")
        return [(path, size) for path, size in files if not written[os.path.dirname(path)]]

    @staticmethod
    def _say_skipped(uri: str, files: list[tuple[str, int]], used: set[str]) -> None:
        skipped = [name for name, _ in files if name not in used and format_of(name) in DATA]
        if skipped:
            names = ", ".join(os.path.basename(name) for name in skipped[:SHOWN])
            more = f" and {len(skipped) - SHOWN:,} more" * (len(skipped) > SHOWN)
            sdg.say(f"--input {sdg.redact(uri)}: these files look like data, but are not read: {names}{more}")

    @functools.cached_property
    def identity(self) -> dict[str, list[Any]]:
        """Size and hash of each file, by name; only the first and the last 64 KiB are hashed.

        Remote files have their version instead, if the listing has it: a hash would take several requests for each.
        """
        if all(self._versions):
            return {name: [*file] for name, *file in zip(self.names, self.sizes, self._versions, strict=True)}
        known = self._marks.read()
        new = [i for i, path in enumerate(self.paths) if path not in known]
        with ThreadPoolExecutor(16) as pool:
            hashes = pool.map(self._hash, new, [self.sizes[i] for i in new])
            known |= {self.paths[i]: digest for i, digest in zip(new, hashes, strict=True)}
        if new:
            self._marks.keep(known)
        return {name: [size, known[path]] for name, size, path in zip(self.names, self.sizes, self.paths, strict=True)}

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """True if the files of the identity `earlier` come first here, unchanged; only the last one may have grown."""
        known = list(earlier)
        if known != self.names[: len(known)]:
            return False
        same = all(earlier[name] == self.identity[name] for name in known[:-1])
        size, digest = earlier[known[-1]]
        if not same or self.sizes[len(known) - 1] < size:
            return False
        return bool(self.identity[known[-1]] == [size, digest] or self._hash(len(known) - 1, size) == digest)

    def stamp(self, count: int) -> list[Any]:
        """What changes when files are written again: of the first files by name, then size and time of the last one.

        Args:
            count: how many files, at most.
        """
        names = self.names[:count]
        paths, versions = self.paths[:count], self._versions[:count]
        times = [os.stat(path).st_mtime_ns for path in paths] if self.local else [version or 0 for version in versions]
        digest = xxhash.xxh3_64(repr(list(zip(names[:-1], times, strict=False))).encode())
        return [digest.hexdigest(), self.sizes[len(names) - 1], times[-1]] if names else ["", 0, 0]

    def open(self, i: int) -> Any:
        """Open the file with index `i` for reading; a compressed file is not decompressed."""
        return self.fs.open_input_file(self.paths[i])

    def open_in_order(self, i: int) -> Any:
        """As `open`, for readers that open the files one after the other: small remote files are fetched ahead."""
        import pyarrow as pa

        if self.local:
            return self.open(i)
        coming = range(i, min(i + AHEAD, len(self.paths)))
        for later in coming:
            if later not in self._ahead and self.sizes[later] <= SMALL:
                fetch = self._fetch_once if self.sizes[later] <= END_BYTES else self._fetch
                self._ahead[later] = self._pool.submit(fetch, later)
        for stale in self._ahead.keys() - set(coming):
            self._ahead.pop(stale).cancel()
        fetched = self._ahead.pop(i, None)
        return pa.BufferReader(fetched.result()) if fetched else self.open(i)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(AHEAD, "sdg-files")

    def _fetch(self, i: int) -> bytes:
        for pause in (0.5, 2.0, None):  # pyarrow does not retry an error whose text is longer than the file
            try:
                with self.open(i) as file:
                    return bytes(file.read())
            except OSError:
                if pause is None:
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _hash(self, i: int, size: int) -> str:
        """A hash of both ends of a file's first `size` bytes."""
        with open(self.paths[i], "rb", 0) if self.local else self.open(i) as file:
            digest = xxhash.xxh3_64(file.read(min(END_BYTES, size)))
            file.seek(max(0, size - END_BYTES))
            digest.update(file.read(min(END_BYTES, size)))
        return digest.hexdigest()
