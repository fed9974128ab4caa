"""The lease of a rank: who may write for it, and what happens to those who may no more."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sdg
from sdg_plugins.common import lease as leases
from sdg_plugins.common.files import Place, rank_file
from sdg_plugins.common.lease import Lease, acquire, held_folder, holder_of, release
from sdg_plugins.common.locks import locked

HOUR = 3600.0


def silence(lease: Lease) -> None:
    """Make a lease look as if its holder was stopped an hour ago."""
    leases._beats.remove(lease)
    os.utime(lease.folder / leases.HOLDER, (time.time() - HOUR, time.time() - HOUR))


def taken(state: Path, locked: bool) -> Lease:
    lease = acquire(state, 3, locked)
    assert lease
    return lease


def test_a_rank_is_taken_from_a_holder_that_is_silent_and_from_no_other(tmp_path: Path) -> None:
    holder = taken(tmp_path, True)

    assert acquire(tmp_path, 3, locked=False) is None
    assert (holder_of(tmp_path, 3) or {})["pid"] == os.getpid()
    silence(holder)
    assert (holder_of(tmp_path, 3) or {})["silent"] >= HOUR - 1
    next_one = taken(tmp_path, False)

    assert holder.is_lost()
    assert not next_one.is_lost()
    assert acquire(tmp_path, 3, locked=False) is None
    release(holder)
    assert held_folder(tmp_path, 3) == next_one.outer
    release(next_one)
    assert holder_of(tmp_path, 3) is None
    assert acquire(tmp_path, 3, locked=False) is None  # a process that has the lock without a lease


def test_who_has_lost_a_rank_makes_nothing_visible_and_deletes_nothing(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"))
    place.fence = holder = taken(tmp_path / "out" / ".sdg", True)
    place.write("data/a", lambda file: file.write(b"before"))
    silence(holder)
    release(taken(tmp_path / "out" / ".sdg", False))

    for work in (lambda: place.write("data/a", lambda file: file.write(b"after")), lambda: place.delete("data/a")):
        with contextlib.suppress(sdg.OutputError):
            work()
    with pytest.raises(sdg.OutputError):
        place.write("data/b", lambda file: file.write(b"after"))

    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["a"]
    assert (tmp_path / "out" / "data" / "a").read_bytes() == b"before"


def test_the_lock_of_a_stopped_process_is_replaced(tmp_path: Path) -> None:
    with locked(tmp_path, 3):
        silence(taken(tmp_path, True))
        lease = taken(tmp_path, False)
        with pytest.raises(sdg.StateError, match=f"process {os.getpid()} on .* is running rank 3"), locked(tmp_path, 3):
            pass
        release(lease)
        with locked(tmp_path, 3):
            pass


@pytest.mark.parametrize("mode", ["WAL", "TRUNCATE"])
def test_the_next_holder_goes_on_with_a_copy_of_the_database(mode: str, tmp_path: Path) -> None:
    path = rank_file(tmp_path, 3, "sqlite3")
    holder = taken(tmp_path, True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as earlier:
        begin(earlier, mode)  # and leaves a transaction open, as a stopped process may
        silence(holder)
        release(taken(tmp_path, False))
        earlier.execute("COMMIT")
        with contextlib.suppress(sqlite3.OperationalError):  # it may notice that its file has gone
            earlier.execute("INSERT INTO rows VALUES (3)")

        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as later:
            later.execute("PRAGMA journal_mode=WAL")
            later.execute("INSERT INTO rows VALUES (4)")
            earlier.close()  # deletes journals by their names
            assert rows_of(later) == [1, 4]

    with contextlib.closing(sqlite3.connect(path)) as again:
        assert rows_of(again) == [1, 4]


@pytest.mark.slow
def test_a_kill_at_any_step_of_taking_a_rank_over_loses_nothing(tmp_path: Path) -> None:
    for step in range(100):
        state = tmp_path / str(step)
        holder = taken(state, True)
        with contextlib.closing(sqlite3.connect(rank_file(state, 3, "sqlite3"), isolation_level=None)) as earlier:
            begin(earlier, "WAL")
            silence(holder)
            ended = killed_at(step, lambda state=state: acquire(state, 3, locked=False))  # type: ignore[misc]
            if folder := held_folder(state, 3):
                for path in (folder, folder / folder.name / leases.HOLDER):
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(path, (0, 0))
            release(taken(state, False))
            earlier.execute("COMMIT")
            with contextlib.closing(sqlite3.connect(rank_file(state, 3, "sqlite3"))) as later:
                assert rows_of(later) == [1], step
        if ended:
            break
    assert step > 8


@pytest.mark.parametrize("has_lock", [True, False])
@pytest.mark.parametrize("then", ["goes on", "has finished"])
def test_who_is_stopped_at_any_step_of_taking_a_rank_learns_that_another_has_it(
    then: str, has_lock: bool, tmp_path: Path
) -> None:
    overtaken = 0
    for step in range(400):
        state = tmp_path / str(step)
        if not has_lock:
            silence(taken(state, True))
        others: list[Lease] = []

        def overtake(state: Path = state, others: list[Lease] = others) -> None:
            if (folder := held_folder(state, 3)) and folder.name != leases.FREE:
                for path in (folder, folder / folder.name / leases.HOLDER):
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(path, (0, 0))
                others.extend(filter(None, [acquire(state, 3, locked=False)]))
                for other in others:
                    leases._beats.remove(other)
                    if then == "has finished":
                        release(other)

        with stopped_at(step, overtake) as stopped:
            lease = acquire(state, 3, has_lock)
        if others and then != "has finished":
            assert not any(other.is_lost() for other in others), step
            assert lease is None or lease.is_lost(), step
        overtaken += bool(others)
        if lease:
            release(lease)
        if not stopped:
            break

    assert not stopped
    assert overtaken > 8


@contextlib.contextmanager
def stopped_at(step: int, meanwhile: Callable[[], None]) -> Iterator[list[int]]:
    """Do something before the n-th line that is run of `lease.py`. Yields a list that has the line then."""
    lines: list[int] = []
    left = [step]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != leases.__file__ or frame.f_code.co_qualname.startswith("Beats"):
            return None  # `Beats` has a lock, which both processes have in this test
        if event == "line":
            left[0] -= 1
            if left[0] == -1:
                lines.append(frame.f_lineno)
                meanwhile()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def begin(db: sqlite3.Connection, mode: str) -> None:
    db.execute(f"PRAGMA journal_mode={mode}")
    db.execute("CREATE TABLE rows (number INTEGER)")
    db.execute("INSERT INTO rows VALUES (1)")
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO rows VALUES (2)")


def rows_of(db: sqlite3.Connection) -> list[int]:
    return [number for (number,) in db.execute("SELECT number FROM rows ORDER BY number")]


def killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Do something in a process of its own, which is gone at its n-th change of files. Returns whether it has ended."""
    child = os.fork()
    if not child:
        left = [step]

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*arguments: Any, **named: Any) -> Any:
                if not left[0]:
                    os._exit(9)
                left[0] -= 1
                return change(*arguments, **named)

            return instead

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "symlink"):
            setattr(os, name, counted(getattr(os, name)))
        shutil.copyfile = counted(shutil.copyfile)
        leases._beats = leases.Beats()
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
