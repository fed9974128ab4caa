"""Buckets of the Hugging Face Hub as input: `--input hf://buckets/OWNER/NAME[/FOLDER or file or glob]`."""

from __future__ import annotations

import functools
import threading
from typing import Any

import sdg
from sdg_plugins.common import hub
from sdg_plugins.common.files import FILE_SYSTEMS
from sdg_plugins.common.inputs import input_format

_stopping = threading.Event()  # set when the run ends early; of the process that opens the input


def open_bucket(run: sdg.Run) -> sdg.Reader:
    """Read the files of a bucket with the reader of their format."""
    global _stopping  # noqa: PLW0603 - file systems are made from URIs, which do not know the run
    _stopping = run.stopping
    formats = {name: entry for name, entry in run.plugins.readers.items() if name != "hf"}
    found = input_format(run.options.input, formats)
    if found not in formats:
        raise sdg.UsageError(f"--input {run.options.input}: unknown format; known: {', '.join(sorted(formats))}")
    reader: sdg.Reader = formats[found].factory(run)
    return reader


def bucket_filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow file system of a bucket, for reading, and the path in it."""
    import pyarrow.fs

    address = hub.parse_bucket(uri)

    fs = _opened(address.repo)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), f"{address.repo}/{address.folder}".rstrip("/")


@functools.cache
def _opened(bucket: str) -> Any:
    """One file system for a bucket in each process, which reads its listing once."""
    from sdg_plugins.common.bucket_files import BucketFiles

    return BucketFiles(hub.Address(bucket, kind="bucket"), lambda: _stopping)


FILE_SYSTEMS["hf"] = bucket_filesystem
