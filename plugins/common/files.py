"""Files of the input and the output, local or in an object store: URIs, listings, reading, atomic writing."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash

import sdg
from sdg_plugins.common import s3

OBJECT_STORES = {"s3", "gcs", "abfs"}  # have no folders: creating one leaves an empty object
PUT_BYTES = 16 << 20  # written at a time: more than the smallest part of an upload, so that pyarrow copies nothing
PIECE = 1 << 20  # bytes of a file that are read at a time to hash it
LOOKS, LOOKERS = 5000, 4  # files that are looked at together, and threads that do it
ALIASES = {  # further suffixes of a format
    **dict.fromkeys(("ndjson", "json"), "jsonl"),
    **dict.fromkeys(("tsv", "tab", "psv"), "csv"),
    **dict.fromkeys(("pq", "parq", "geoparquet", "gpq"), "parquet"),
    **dict.fromkeys(("feather", "ipc", "arrows"), "arrow"),
    **dict.fromkeys(("txt", "md", "markdown"), "text"),
}

# Further file systems by scheme, set by the modules that make them: from a URI, the file system and the path in it.
FILE_SYSTEMS: dict[str, Callable[[str], tuple[Any, str]]] = {}

LOCAL_FILE_SYSTEMS = {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


# ── URIs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def expanded(path: str) -> str:
    """A path with its leading `~` expanded, which shells leave in `--output=~/x`; other URIs are unchanged."""
    return os.path.expanduser(path) if split_uri(path)[0] == "file" else path


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as ("s3", "bucket/key"); a plain path has the scheme "file"."""
    scheme, separator, rest = uri.partition("://")
    return (scheme, rest) if separator else ("file", uri)


def suffix_of(path: str) -> str:
    """The suffix of a file, in lower case, without the dot and without a suffix for compression."""
    return Path(re.sub(r"\.(gz|bz2|xz|zst|zstd)$", "", path.lower())).suffix[1:]


def file_writer(options: argparse.Namespace) -> str:
    """The name of the writer of a run's files, wherever they are published."""
    return getattr(options, "file_writer", None) or format_of(options.output_filename)


def format_of(path: str) -> str:
    """The format that a file's suffix names: that of the plugin which reads or writes it; "" if there is no suffix."""
    suffix = suffix_of(path)
    return ALIASES.get(suffix, suffix)


def codec_of(name: str) -> str | None:
    """Arrow's name for the compression that a file's name says; None if it is not compressed."""
    return {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "zstd": "zstd"}.get(name.lower().rpartition(".")[2])


def fixed_folder(pattern: str) -> str:
    """The part of a glob before the first name with a wildcard; for a plain path its folder."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]


def filesystem(uri: str, quick: bool = False) -> tuple[Any, str]:
    """The pyarrow file system of a URI, and the path in it (absolute if local). See `s3.client` for `quick`."""
    import pyarrow as pa
    import pyarrow.fs

    scheme, rest = split_uri(uri)
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(utf8(rest)))
    if scheme == "s3":
        # Settings may follow, as in pyarrow's URIs. Any other question mark belongs to a glob.
        path, *settings = re.split(r"\?(?=(?:region|scheme|endpoint_override)=)", rest, maxsplit=1)
        bucket = path.partition("/")[0]
        if not re.fullmatch(r"[\w.:-]+", bucket):
            raise sdg.UsageError(f"{sdg.redact(uri)}: expected the name of a bucket after s3://")
        return s3.client(bucket, "".join(settings), quick), path.rstrip("/")
    if scheme in FILE_SYSTEMS:
        return FILE_SYSTEMS[scheme](uri)
    try:
        try:
            fs, path = pyarrow.fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid:  # pyarrow does not support the scheme
            import fsspec

            other, path = fsspec.core.url_to_fs(uri)
            fs = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
    except (ImportError, ValueError, OSError) as exc:
        supported = "supported are local paths, s3://, gs://, and the schemes of fsspec"
        raise sdg.UsageError(f"{sdg.redact(uri)}: {sdg.one_line(exc)}; {supported}") from exc
    return fs, str(path)


def utf8(name: str) -> str:
    """A local path as it is. Raises UsageError if it is not UTF-8: Arrow cannot open such files."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as exc:
            raise sdg.UsageError(f"{name}: the name is not UTF-8: rename it, or give it another one by a link") from exc
    return name


# ── Access ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_bucket(uri: str) -> None:
    """Raise OutputError, before anything is generated, if S3 or the bucket does not exist or cannot be accessed."""
    import pyarrow.fs

    fs, root = filesystem(uri, quick=True)
    with access_errors(uri, sdg.OutputError), contextlib.suppress(FileNotFoundError):
        # Listing a missing folder takes one request, and its errors have a text; those of a HEAD request have none.
        fs.get_file_info(pyarrow.fs.FileSelector(f"{root}/.sdg"))


@contextlib.contextmanager
def access_errors(uri: str, kind: type[sdg.Error]) -> Iterator[None]:
    """Raise errors of a file system as `kind`, naming the URI and, for S3, the variables that configure access."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as exc:
        at, hint = "", ""
        if split_uri(uri)[0] == "s3":
            at = f" at {sdg.redact(found)}" if (found := s3.endpoint()) else ""
            hint = f"; check {s3.VARIABLES}"
        option = "--input " if kind is sdg.InputError else ""
        raise kind(f"{option}{sdg.redact(uri)}{at} cannot be used: {sdg.reason_of(exc)}{hint}") from exc


# ── Output ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Stamp(NamedTuple):
    """Size (bytes) and hash of a file's content."""

    size: int
    hash: str


def stamp_of(file: Any) -> Stamp:
    """The stamp of an open file, from its current position to its end."""
    digest, size = xxhash.xxh3_128(), 0
    while piece := file.read(PIECE):
        digest.update(piece)
        size += len(piece)
    return Stamp(size, digest.hexdigest())


Sizes = Sequence[int | None]  # of files in bytes; None for what is no file


class Fence(Protocol):
    """What keeps a process from writing that has lost its rank; see `lease.py`."""

    folder: Path  # the only one out of which files may be renamed; it is gone when the rank is lost

    def is_lost(self) -> bool:
        """True if another process has taken the rank."""

    def delete(self, path: str) -> None:
        """Delete a file, unless the rank is lost."""


class Place:
    """A folder on any file system that pyarrow supports. Files appear in it whole and durable, or not at all.

    Attributes:
        fence: of the rank that writes here; None if it cannot be lost.
        stamps: of the files that were written, by name, until they are taken from here.
    """

    def __init__(self, uri: str) -> None:
        import pyarrow.fs

        scheme, _ = split_uri(uri)
        if scheme == "s3":
            _check_bucket(uri)
        self.fs, self.root = filesystem(uri)
        self.uri = uri if scheme == "file" else f"{scheme}://{self.root}"
        self.local = isinstance(self.fs, pyarrow.fs.LocalFileSystem)
        self.stamps: dict[str, Stamp] = {}
        self.fence: Fence | None = None
        self._apart = False  # the fence's folder is on another file system

    def path(self, name: str) -> str:
        """The full path of a file in this folder."""
        return f"{self.root}/{name}"

    def write(self, name: str, produce: Callable[[Any], None]) -> None:
        """Write a file.

        Args:
            name: its path relative to this folder.
            produce: called with an open binary file, which it may close.

        Raises:
            OutputError: the file could not be written; nothing of it is left.
        """
        target = self.path(name)
        try:
            self.stamps[name] = (self._replace if self.local else self._put)(target, produce)
        except OSError as exc:
            temporary = not self.local and exc.errno is not None  # errors of remote file systems have no errno
            where = f"{tempfile.gettempdir()}, where files for {self.uri} are made," if temporary else target
            raise sdg.OutputError(f"{where} cannot be written: {sdg.reason_of(exc)}") from exc

    def _replace(self, target: str, produce: Callable[[Any], None]) -> Stamp:
        """Write a local file under a temporary name, then rename it."""
        folder, _, base = target.rpartition("/")
        temporary = f"{folder}/.{base}.tmp"
        if self.fence and not self._apart:
            temporary = f"{self.fence.folder}/{base}.tmp"
        try:
            self.fs.create_dir(folder, recursive=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # it may be a link that someone else has put there
            with self.fs.open_output_stream(temporary, compression=None) as file:
                produce(file)
            sync(temporary)
            with open(temporary, "rb") as written:
                stamp = stamp_of(written)
            if self._apart:
                self._check_fence()
            os.replace(temporary, target)
            sync(folder)
            return stamp
        except OSError as exc:
            with contextlib.suppress(OSError):
                self.fs.delete_file(temporary)
            if exc.errno == errno.EXDEV and self.fence and not self._apart:
                self._apart = True
                return self._replace(target, produce)
            raise

    def _check_fence(self) -> None:
        """Where no rename can be refused: look right before a file becomes visible. Raises OSError."""
        if self.fence and self.fence.is_lost():
            raise OSError("another process has taken the rank")

    def _put(self, target: str, produce: Callable[[Any], None]) -> Stamp:
        """Write a local temporary file, then upload it: pyarrow would publish what a failing `produce` has written."""
        with tempfile.TemporaryFile() as whole:
            with open(os.dup(whole.fileno()), "wb") as file:  # a second handle, because `produce` may close it
                produce(file)
            whole.seek(0)
            stamp = stamp_of(whole)
            whole.seek(0)
            if self.fs.type_name not in OBJECT_STORES:
                self.fs.create_dir(target.rpartition("/")[0], recursive=True)
            self._check_fence()
            try:
                with self.fs.open_output_stream(target, compression=None) as stream:
                    shutil.copyfileobj(whole, stream, PUT_BYTES)
            except OSError:
                with contextlib.suppress(OSError):  # closing the stream has published an incomplete object
                    self.fs.delete_file(target)
                raise
        stored = self.fs.get_file_info(target).size
        if stored != stamp.size:
            with contextlib.suppress(OSError):
                self.fs.delete_file(target)
            raise OSError(f"{stamp.size} bytes were uploaded, {stored} are stored")
        return stamp

    def open(self, name: str) -> Any:
        """Open a file for reading; FileNotFoundError if it does not exist."""
        return self.fs.open_input_file(self.path(name))

    def delete(self, name: str) -> None:
        """Delete a file if it exists. Raises OutputError. (On S3, pyarrow leaves an empty object for the folder.)"""
        with access_errors(self.uri, sdg.OutputError), contextlib.suppress(FileNotFoundError):
            if self.fence and self.local and not self._apart:
                try:
                    self.fence.delete(self.path(name))
                    return
                except OSError as exc:
                    self._apart = exc.errno == errno.EXDEV
                    if not self._apart:
                        raise
            self._check_fence()
            self.fs.delete_file(self.path(name))

    def check_access(self, name: str) -> None:
        """Check the rights that a run needs, by writing a file, listing and reading it, and deleting it.

        Nothing is checked in a local folder. (On S3, pyarrow leaves an empty object for the folder.)

        Args:
            name: of the file, directly in this folder.

        Raises:
            OutputError: a right is missing, other than that to delete, without which a run can do: that is reported.
        """
        if self.local:
            return
        # As long as an error's text: a shorter answer is not retried, because pyarrow has no room for the error in it.
        content = b"sdg has checked that it can write, list, read and delete here".ljust(4096) + b"\n"
        try:
            self.write(name, lambda file: file.write(content))
            listed = name in (path.strip("/") for path in self.sizes(""))
            with access_errors(self.uri, sdg.OutputError), self.open(name) as file:
                read = bytes(file.read())
        except sdg.OutputError as exc:
            raise sdg.OutputError(f"{exc}. A run needs the rights to put, get and list objects there") from exc
        finally:
            self.stamps.pop(name, None)
        if not listed or read != content:
            what = "differs from what was written" if listed else "was written, but is not listed"
            raise sdg.OutputError(f"{self.path(name)} {what}: choose another --output")
        try:
            self.delete(name)
        except sdg.OutputError as exc:
            sdg.say(
                f"{exc}. The run goes on without the right to delete: records of failures that are retried are "
                f"replaced by empty files, --fresh is not possible, and {self.path(name)} stays"
            )

    def clear(self, name: str) -> None:
        """Delete a file if it exists; where that is not permitted, empty it. Raises OutputError."""
        try:
            self.delete(name)
        except sdg.OutputError as exc:
            if self.local:
                raise
            self.write(name, lambda file: None)
            sdg.say(f"{exc}. {self.path(name)} was replaced by an empty file: give the right to delete, or delete it")

    def stamp(self, name: str) -> Stamp | None:
        """Size and hash of a file as it is now; None if it does not exist."""
        try:
            with self.open(name) as file:
                return stamp_of(file)
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """True if there is a file of this name. Raises OutputError."""
        with access_errors(self.uri, sdg.OutputError):
            return bool(self.fs.get_file_info(self.path(name)).is_file)

    def list(self, folder: str) -> list[str]:
        """Names, `folder/` included, of the files directly in a folder; [] if it does not exist. Raises OutputError."""
        return sorted(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """The names that `list` returns, with the files' sizes in bytes."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self.path(folder).rstrip("/"), allow_not_found=True)
        with access_errors(self.uri, sdg.OutputError):
            infos = self.fs.get_file_info(selector)
        sizes = ((info.base_name, info.size) for info in infos)  # `is_file` makes an enum of each
        return {f"{folder}/{name}": size for name, size in sizes if size is not None}

    def measuring(self, folder: str, pool: ThreadPoolExecutor) -> Callable[[Sequence[str]], Callable[[], Sizes]]:
        """A function that begins to look at files in a folder, by their names; what it returns waits for their sizes.

        Local files are looked at one by one, and only those that are named, without a list of all in memory. An object
        store is listed once, when there is the first file to look at. Both raise OutputError.
        """
        if self.local:
            return functools.partial(self._look, pool)
        listed = functools.cache(lambda: self.sizes(folder))
        return lambda names: lambda: [listed().get(name) for name in names]

    def _look(self, pool: ThreadPoolExecutor, names: Sequence[str]) -> Callable[[], Sizes]:
        folder = self.path("")
        parts = [[folder + name for name in names[i : i + LOOKS]] for i in range(0, len(names), LOOKS)]
        # Arrow looks without the GIL: two cores take half the time, and network file systems do not wait for each file.
        looks = pool.map(self.fs.get_file_info, parts)

        def sizes() -> Sizes:
            with access_errors(self.uri, sdg.OutputError):
                return [info.size for infos in looks for info in infos]

        return sizes


def uses_spool(options: argparse.Namespace) -> bool:
    """True if the output's scheme has a writer of its own (`hf`): files are collected in the spool, then published."""
    return bool(options.writer == split_uri(options.output)[0])


def output_place(options: argparse.Namespace, state: Path) -> Place:
    """Where a run writes: the output, or the spool, a folder of the state."""
    return Place(str(state / "spool") if uses_spool(options) else options.output)


def rank_file(state: Path, rank: int, suffix: str) -> Path:
    """A rank's file in the state, such as `00003.sqlite3`."""
    return state / f"{rank:05d}.{suffix}"


def default_state_dir(output: str, config: str) -> str:
    """The default folder of a run's state: inside the output if that is a folder, else below the working directory."""
    scheme, rest = split_uri(sdg.redact(output))
    base = Path(rest) / ".sdg" if scheme == "file" else Path(".sdg") / re.sub(r"[^\w.-]+", "-", rest.strip("/"))
    return str(base if config == "data" else base / config)


def sync(path: str | Path) -> None:
    """Make the content of a file or folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a path, as named in the kernel's mount table."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return "apfs"  # macOS: local unless mounted otherwise
    best, kind = "", ""
    for line in mounts.read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        # Names may be in any encoding; white space and backslashes in them are octal numbers.
        name = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), before.split()[4])
        mount = os.fsdecode(name)
        if Path(os.path.realpath(path)).is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, os.fsdecode(after.split()[0])
    return kind
