from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import os
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import sdg

if TYPE_CHECKING:
    pass

S3_ATTEMPTS = 10  # at a request, unless AWS_MAX_ATTEMPTS says another number: with the library's pauses, some 70 s
QUICK_ATTEMPTS = 4  # ... of the first look at a place, when it is rather a mistake: 5 s, or 25 if nothing answers
S3_VARIABLES = "AWS_ACCESS_KEY_ID or AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL_S3"
OBJECT_STORES = {"s3", "gcs", "abfs"}  # have no folders: to make one leaves an empty object
PUT_BYTES = 16 << 20  # handed over at a time: more than the smallest part of an upload, so that pyarrow copies nothing


def expanded(path: str) -> str:
    """A path with the home folder in place of a leading `~`, which shells leave in `--output=~/x`; any other URI."""
    return os.path.expanduser(path) if split_uri(path)[0] == "file" else path


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as ("s3", "bucket/key"); a plain path has the scheme "file"."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def format_of(path: str) -> str:
    """The suffix that tells a file's format: the last one, compression aside."""
    return Path(re.sub(r"\.(gz|zst)$", "", path)).suffix[1:]


def filesystem(uri: str, quick: bool = False) -> tuple[Any, str]:
    """The pyarrow file system of a URI, and the path in it (absolute if local). See `_s3` for `quick`."""
    import pyarrow as pa
    import pyarrow.fs

    scheme, rest = split_uri(uri)
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(rest))
    if scheme == "s3":
        # As in pyarrow's URIs, settings may follow. Any other question mark belongs to a glob.
        path, *settings = re.split(r"\?(?=(?:region|scheme|endpoint_override)=)", rest, maxsplit=1)
        bucket = path.partition("/")[0]
        if not re.fullmatch(r"[\w.:-]+", bucket):
            raise sdg.UsageError(f"{sdg.redact(uri)}: the name of a bucket is wanted after s3://")
        return _s3(bucket, "".join(settings), quick), path.rstrip("/")
    try:
        try:
            fs, path = pyarrow.fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid:  # a scheme that pyarrow does not know
            import fsspec

            other, path = fsspec.core.url_to_fs(uri)
            fs = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
    except (ImportError, ValueError, OSError) as problem:
        reason = " ".join(str(problem).split())
        raise sdg.UsageError(
            f"{sdg.redact(uri)}: {reason}; known are folders, s3://, gs://, and what fsspec has"
        ) from problem
    return fs, str(path)


def s3_endpoint() -> str | None:
    """The server that stands for AWS, as its own programs have it from the environment."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


@functools.cache
def _s3(bucket: str, settings: str, quick: bool) -> Any:
    """A client for a bucket; `settings` are those of pyarrow's URIs (`region=…&endpoint_override=…`).

    It bears with a server that is overloaded or gone for about a minute, a `quick` one for some seconds. A client from
    `FileSystem.from_uri` would give up sooner, and wait 3 s for an answer: large uploads take longer to be completed.
    Keys and roles are found by AWS's library, and the region, too, where the bucket cannot be asked for it.
    """
    import pyarrow.fs

    options: dict[str, Any] = {"endpoint_override": s3_endpoint(), **dict(urllib.parse.parse_qsl(settings))}
    if not options["endpoint_override"] and "region" not in options:
        options["region"] = _region_of(bucket)
    asked = os.environ.get("AWS_MAX_ATTEMPTS", "")
    attempts = QUICK_ATTEMPTS if quick else int(asked) if asked.isdigit() else S3_ATTEMPTS
    return pyarrow.fs.S3FileSystem(
        **options,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        connect_timeout=5,
        request_timeout=5 if quick else 60,
    )


@functools.cache
def _region_of(bucket: str) -> str | None:
    """The bucket's region, if AWS can be asked: in a private network the environment has to say it."""
    import pyarrow.fs

    try:
        return str(pyarrow.fs.resolve_s3_region(bucket))
    except OSError:
        return None


@contextlib.contextmanager
def reaching(uri: str, kind: type[sdg.Error]) -> Iterator[None]:
    """Say of errors of a file system which place they concern and, of S3, what decides on the access."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as problem:
        at, hint = "", ""
        if split_uri(uri)[0] == "s3":
            at = f" at {sdg.redact(endpoint)}" if (endpoint := s3_endpoint()) else ""
            hint = f"; {S3_VARIABLES} decide"
        option = "--input " if kind is sdg.InputError else ""
        raise kind(f"{option}{sdg.redact(uri)}{at} cannot be used: {sdg.reason_of(problem)}{hint}") from problem


def list_files(uri: str) -> list[tuple[str, int]]:
    """Paths and sizes (bytes) of the files that a URI means, sorted: one file, a folder with all below it, or a glob.

    Of a folder nothing is taken that is hidden (`.git`, `_temporary`), or the output of a run.

    Raises:
        InputError: there are none, or the place cannot be read.
    """
    import glob

    import pyarrow.fs

    fs, path = filesystem(uri, quick=True)
    local = isinstance(fs, pyarrow.fs.LocalFileSystem)
    root = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    with reaching(uri, sdg.InputError):
        if not any(mark in path for mark in "*?[") or (local and os.path.exists(path)):
            infos, root = _files_below(uri, path), path
        elif local:
            infos = fs.get_file_info(glob.glob(path, recursive=True))
        else:
            infos = _files_below(uri, root)
            infos = [info for info in infos if fnmatch.fnmatch(info.path, path)]
    names = {info.path: info.path[len(root) :].lstrip("/") for info in infos}
    outputs = tuple({f"{name.partition('/.sdg')[0]}/" for name in names.values() if re.search(r"/\.sdg(/|$)", name)})
    found = [
        (info.path, info.size)
        for info in infos
        if info.is_file and not re.search(r"(^|/)(_|\.[^.])", name := names[info.path]) and not name.startswith(outputs)
    ]
    if not found:
        raise sdg.InputError(f"--input {uri}: there are no files")
    return sorted(found)


def _files_below(uri: str, path: str) -> list[Any]:
    """The file that has this path, or all below it if it is a folder."""
    import pyarrow.fs

    first, _ = filesystem(uri, quick=True)
    info = first.get_file_info(path)
    if info.type == pyarrow.fs.FileType.NotFound:
        bucket = path.partition("/")[0]
        if split_uri(uri)[0] == "s3" and first.get_file_info(bucket).type == info.type:
            raise sdg.InputError(f"--input {uri}: there is no bucket {bucket}")
        name = re.fullmatch(r"(?:https://huggingface\.co/datasets/)?([\w.-]+/[\w.-]+)", uri)
        hint = f"; a dataset on the Hub would be hf://datasets/{name[1]}" if name else ""
        raise sdg.InputError(f"--input {uri}: there is no such file or folder{hint}")
    if info.is_file:
        return [info]
    return list(filesystem(uri)[0].get_file_info(pyarrow.fs.FileSelector(path, recursive=True)))


class InputFiles:
    """The files of `--input` that have a suffix: for readers of formats."""

    def __init__(self, uri: str, suffix: str) -> None:
        self.fs, _ = filesystem(uri)
        self.local = self.fs.type_name == "local"
        found = [(file, size) for file, size in list_files(uri) if format_of(file) == suffix]
        if not found:
            raise sdg.InputError(f"--input {uri}: there are no .{suffix} files")
        self.paths = [file for file, _ in found]
        self.sizes = [size for _, size in found]
        root = os.path.commonpath(self.paths) if len(found) > 1 else os.path.dirname(found[0][0])
        self.names = [os.path.relpath(file, root) for file in self.paths]

    @functools.cached_property
    def identity(self) -> dict[str, list[Any]]:
        """Size and a hash of the first and the last 64 KiB of each file, by name."""
        with ThreadPoolExecutor(16) as pool:
            marks = pool.map(self._mark, range(len(self.paths)), self.sizes)
            return {name: [size, mark] for name, size, mark in zip(self.names, self.sizes, marks, strict=True)}

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """Whether `earlier` is a beginning of these files: all its files come first, and only its last one grew."""
        known = list(earlier)
        if known != self.names[: len(known)]:
            return False
        same = all(earlier[name] == self.identity[name] for name in known[:-1])
        size, mark = earlier[known[-1]]
        return same and self.sizes[len(known) - 1] >= size and self._mark(len(known) - 1, size) == mark

    def open(self, i: int) -> Any:
        """A file for reading, as bytes lie on the disk."""
        return self.fs.open_input_file(self.paths[i])

    def _mark(self, i: int, size: int) -> str:
        """A hash of the two ends of a file's first `size` bytes."""
        with self.open(i) as file:
            mark = xxhash.xxh3_64(file.read(min(65536, size)))
            file.seek(max(0, size - 65536))
            mark.update(file.read(min(65536, size)))
        return mark.hexdigest()


class Place:
    """A folder on a file system that pyarrow knows. A file appears there whole, durable, or not at all."""

    def __init__(self, uri: str) -> None:
        import pyarrow.fs

        scheme, _ = split_uri(uri)
        if scheme == "s3":
            _look_at_bucket(uri)
        self.fs, self.root = filesystem(uri)
        self.uri = uri if scheme == "file" else f"{scheme}://{self.root}"
        self.local = isinstance(self.fs, pyarrow.fs.LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a name in this place."""
        return f"{self.root}/{name}"

    def write(self, name: str, produce: Callable[[Any], None]) -> None:
        """Write a file by calling `produce` with an open binary file. Raises OutputError, and leaves nothing then."""
        target = self.path(name)
        try:
            (self._replace if self.local else self._put)(target, produce)
        except OSError as problem:
            ours = self.local or problem.errno is None
            where = target if ours else f"{tempfile.gettempdir()}, where files are made for {self.uri},"
            raise sdg.OutputError(f"{where} cannot be written: {sdg.reason_of(problem)}") from problem

    def _replace(self, target: str, produce: Callable[[Any], None]) -> None:
        folder, _, base = target.rpartition("/")
        temporary = f"{folder}/.{base}.tmp"
        try:
            self.fs.create_dir(folder, recursive=True)
            with self.fs.open_output_stream(temporary, compression=None) as file:
                produce(file)
            sync(temporary)
            os.replace(temporary, target)
            sync(folder)
        except OSError:
            with contextlib.suppress(OSError):
                self.fs.delete_file(temporary)
            raise

    def _put(self, target: str, produce: Callable[[Any], None]) -> None:
        """Make the file here and put it there when it is whole: pyarrow would publish one that `produce` broke off."""
        with tempfile.TemporaryFile() as whole:
            with open(os.dup(whole.fileno()), "wb") as file:  # one that `produce` may close
                produce(file)
            size = whole.seek(0, os.SEEK_END)
            whole.seek(0)
            if self.fs.type_name not in OBJECT_STORES:
                self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            try:
                with self.fs.open_output_stream(target, compression=None) as stream:
                    shutil.copyfileobj(whole, stream, PUT_BYTES)
            except OSError:
                with contextlib.suppress(OSError):  # leaving the stream has published what there was of it
                    self.fs.delete_file(target)
                raise
        there = self.fs.get_file_info(target).size
        if there != size:
            with contextlib.suppress(OSError):
                self.fs.delete_file(target)
            raise OSError(f"{size} bytes were put, {there} are there")

    def open(self, name: str) -> Any:
        """A file for reading; FileNotFoundError if there is none."""
        return self.fs.open_input_file(self.path(name))

    def delete(self, name: str) -> None:
        """Remove a file if there is one. Raises OutputError. (On S3, pyarrow leaves an empty object for the folder.)"""
        with reaching(self.uri, sdg.OutputError), contextlib.suppress(FileNotFoundError):
            self.fs.delete_file(self.path(name))

    def list(self, folder: str) -> list[str]:
        """Names (with the folder) of the files directly in a folder; none if it does not exist. Raises OutputError."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self.path(folder), allow_not_found=True)
        with reaching(self.uri, sdg.OutputError):
            return sorted(f"{folder}/{info.base_name}" for info in self.fs.get_file_info(selector) if info.is_file)


def _look_at_bucket(uri: str) -> None:
    """Raise OutputError if S3 cannot be reached, or has no such bucket, or not for us: before anything is generated."""
    import pyarrow.fs

    fs, root = filesystem(uri, quick=True)
    with reaching(uri, sdg.OutputError), contextlib.suppress(FileNotFoundError):
        # To list what is not there takes one request, whose errors have texts: those of a HEAD have none.
        fs.get_file_info(pyarrow.fs.FileSelector(f"{root}/.sdg"))


def sync(path: str | Path) -> None:
    """Make a file's or folder's content durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_place(options: argparse.Namespace, state: Path) -> Place:
    """Where files are written: the output itself or, if its scheme has a writer of its own, a folder of the state."""
    return Place(str(state / "spool") if options.writer == split_uri(options.output)[0] else options.output)


def codec_of(name: str) -> str | None:
    """How a file of this name is compressed, in Arrow's words."""
    return {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
