"""A plugin that makes its own process fail at the n-th durable step: loaded by `--plugin tests/support/faults.py`.

    SDG_TEST_FAULT=kill-before:7    end as by `kill -9` before the 7th step
    SDG_TEST_FAULT=kill-after:7     ... after it
    SDG_TEST_FAULT=full:7           the disk is full from the 7th step on

A step is what changes the disk for good: a rename, a link, an unlink, an fsync, a commit, and the hook that a chunk is
written. SDG_TEST_STEPS names a file that gets a line per step.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import sdg
from sdg_plugins.commands import jobs
from sdg_plugins.common import database

MODE, _, NUMBER = os.environ.get("SDG_TEST_FAULT", ":0").partition(":")
TRACE = os.environ.get("SDG_TEST_STEPS")

_numbers = itertools.count(1)
_lock = threading.Lock()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _begin(name: str) -> int:
    """Count a step, and fail before it if its turn has come."""
    with _lock:
        number = next(_numbers)
        if TRACE:
            with open(TRACE, "a", encoding="utf-8") as trace:
                trace.write(f"{number} {name}\n")
        if MODE == "kill-before" and number == int(NUMBER):
            _kill()
    if MODE == "full" and number >= int(NUMBER) and "unlink" not in name and "remove" not in name:
        if name.startswith("commit"):
            raise sqlite3.OperationalError("database or disk is full")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    return number


def _end(number: int) -> None:
    if MODE == "kill-after" and number == int(NUMBER):
        _kill()


def _patch(name: str) -> None:
    original: Callable[..., Any] = getattr(os, name)

    def step(*args: Any, **kwargs: Any) -> Any:
        number = _begin(f"{name} {args[0] if args else ''}")
        try:
            return original(*args, **kwargs)
        finally:  # also after a step that fails, such as the removal of a file that is not there
            _end(number)

    setattr(os, name, step)


for _name in ("replace", "rename", "link", "fsync", "fdatasync", "unlink", "remove"):
    _patch(_name)

_commit = database.commit


def _commit_step(db: sqlite3.Connection) -> None:
    number = _begin("commit")
    _commit(db)
    _end(number)


database.commit = _commit_step


@contextlib.asynccontextmanager
async def _no_heartbeat(engine: sdg.Engine) -> AsyncIterator[None]:
    yield


jobs.heartbeat = _no_heartbeat  # it comes when it likes: steps would have other numbers each time


@sdg.hookimpl
def chunk_written() -> None:
    _end(_begin("chunk_written"))
