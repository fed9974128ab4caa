"""The lease of a rank: the right to write for it, which a process loses that is stopped, or whose machine is lost.

The kernel takes a lock back from a process that is gone, but not from one that is stopped, and on some shared disks not
from a machine that is lost. So the holder of a rank also has a folder of its own, `ranks/00003/TOKEN` in the state, and
renews it every second. All that it makes visible is renamed out of the folder in it, `ranks/00003/TOKEN/TOKEN`. Another
process takes the rank over by renaming the outer folder: one step, which only one process can make. Then it deletes the
inner one, before it does anything else. Whatever the earlier holder does when it goes on, its renames fail, even on a
machine that still has the old paths in a cache.

SQLite writes in place, so the next holder goes on with a copy of the database, under another name. The name in the
state becomes a link to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.files import rank_file, sync

BEAT = 1.0  # s between two renewals
LAPSE = 60.0  # s without one after which another process may take the rank; see PATIENCE
PATIENCE = "SDG_LEASE"  # environment variable: these seconds, for disks that stall for longer, or tests
HOLDER = "holder.json"  # in the inner folder: who has the rank, and since when; its time is that of the last renewal
FREE = "free"  # name of the folder that no process holds
UNCLEAN = "unclean"  # in a rank's folder: an earlier holder may still have the database open
COPIES = 100  # attempts to copy a database in which an earlier holder still writes


class Fenced(sdg.StateError):
    """Another process has taken the rank: this one writes nothing for it any more."""

    at_once = True  # nothing that is in flight can be saved


class Lease:
    """The right to write for one rank.

    Args:
        state: of the run.
        rank: number.
        token: name of the folder, which no other process knows beforehand.

    Attributes:
        outer: the folder whose name says who has the rank.
        folder: out of which everything is renamed.
        lost: another process has taken the rank.
        on_loss: called in a thread when that is noticed.
    """

    def __init__(self, state: Path, rank: int, token: str) -> None:
        self.state, self.rank, self.token = state, rank, token
        self.outer = home_of(state, rank) / token
        self.folder = self.outer / token
        self.lost = False
        self.on_loss: Callable[[], None] = lambda: None

    def renew(self) -> None:
        """Show that the holder is alive, or notice that it holds nothing any more."""
        try:
            os.utime(self.folder / HOLDER)
        except OSError as exc:
            if exc.errno in {errno.ENOENT, errno.ESTALE} and not self.lost:  # otherwise a disk that stalls
                self.lost = True
                self.on_loss()

    def is_lost(self) -> bool:
        """True if another process has taken the rank."""
        self.lost = self.lost or not self.folder.exists()
        return self.lost

    def error(self) -> Fenced:
        """What is said of a rank that was taken."""
        return Fenced(
            f"rank {self.rank}: another process has taken it, because this one was stopped for a while; "
            "nothing was written for it since then"
        )

    def delete(self, path: str | Path) -> None:
        """Delete a file, unless the rank was taken. Raises FileNotFoundError."""
        doomed = self.folder / f"{uuid.uuid4().hex}.doomed"
        os.rename(path, doomed)
        doomed.unlink()


# ── Taking a rank ────────────────────────────────────────────────────────────────────────────────────────────────────


def home_of(state: Path, rank: int) -> Path:
    """The folder with the lease of a rank."""
    return state / "ranks" / f"{rank:05d}"


def held_folder(state: Path, rank: int) -> Path | None:
    """The folder of a rank's holder, or the one that is free; None if no process has ever had a lease of this rank."""
    with contextlib.suppress(FileNotFoundError):
        for _ in range(10):  # while it is renamed, it may not be listed
            with os.scandir(home_of(state, rank)) as entries:
                if found := [Path(entry.path) for entry in entries if entry.is_dir()]:
                    return found[0]
    return None


def patience() -> float:
    """Seconds without a renewal after which a rank may be taken. Raises UsageError."""
    given = os.environ.get(PATIENCE) or LAPSE
    try:
        return max(3 * BEAT, float(given))
    except ValueError:
        raise sdg.UsageError(f"${PATIENCE} is {given!r}: expected a number of seconds") from None


def age_of(folder: Path) -> float:
    """Seconds since a lease was renewed, by the clock of the file system. Raises FileNotFoundError."""
    clock = folder.parent / f".{uuid.uuid4().hex}"
    clock.touch()
    try:
        return clock.stat().st_mtime - renewed_at(folder)
    finally:
        clock.unlink()


def renewed_at(folder: Path) -> float:
    """When a lease was renewed, in s since the epoch. Raises FileNotFoundError."""
    try:
        with open(folder / folder.name / HOLDER, "rb") as file:  # opened, because what is known of it may be old
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:  # it has been taken just now
        return folder.stat().st_mtime


def acquire(state: Path, rank: int, locked: bool) -> Lease | None:
    """Take the lease of a rank; None if another process has it.

    Args:
        state: of the run.
        rank: number.
        locked: this process has the rank's lock, so no holder on a machine that lives is alive.
    """
    prepare(state, rank)
    folder = held_folder(state, rank)
    if folder is None:
        return None
    lease = Lease(state, rank, uuid.uuid4().hex)
    try:
        if not locked:
            if folder.name == FREE or age_of(folder) < patience():
                return None
            (folder.parent / UNCLEAN).touch()
        os.rename(folder, lease.outer)
    except FileNotFoundError:  # another process was faster
        return None
    try:
        take_possession(lease, locked)
    except BaseException as exc:
        # Even with the lock: by another process, while this one was stopped in between.
        overtaken = isinstance(exc, FileNotFoundError) and not lease.outer.exists()
        release(lease)
        if overtaken or (isinstance(exc, FileNotFoundError | sdg.StateError) and not locked):
            return None  # another process was faster, or the earlier holder is still at work
        raise
    return lease


def prepare(state: Path, rank: int) -> None:
    """Create a rank's folder, with the lease that no process holds, unless it exists."""
    home = home_of(state, rank)
    if home.exists():
        return
    made = home.with_name(f".{uuid.uuid4().hex}")
    (made / FREE).mkdir(parents=True)
    try:
        os.rename(made, home)
    except OSError:  # it is not empty: another process was faster
        shutil.rmtree(made, ignore_errors=True)
        if not home.exists():
            raise


def take_possession(lease: Lease, locked: bool) -> None:
    """Clear what an earlier holder has left, replace its lock, and say who has the rank now."""
    os.utime(lease.outer)
    clear(lease.outer)
    lease.folder.mkdir()
    holder = {"host": platform.node(), "pid": os.getpid(), "since": round(time.time(), 3), "slurm_job": job_of_slurm()}
    (lease.folder / HOLDER).write_text(json.dumps(holder))
    _beats.add(lease)
    if not locked:
        lock_anew(lease)
    if (unclean := lease.outer.parent / UNCLEAN).exists():
        rescue(lease)
        unclean.unlink(missing_ok=True)


def job_of_slurm() -> str | None:
    """The Slurm job of this process."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")


def lock_anew(lease: Lease) -> None:
    """Put a lock that this process holds in the place of one that a stopped process holds; held until it ends."""
    made = lease.folder / "lock"
    handle = os.open(made, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    with contextlib.suppress(OSError):  # a file system without locks: the lease has to do
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(made, rank_file(lease.state, lease.rank, "lock"))
    _locks[lease.token] = handle


def release(lease: Lease) -> None:
    """Give a rank back, with the lock of `lock_anew` if there is one."""
    _beats.remove(lease)
    if not lease.is_lost():
        with contextlib.suppress(OSError):
            clear(lease.outer)
            os.rename(lease.outer, lease.outer.with_name(FREE))
    if (handle := _locks.pop(lease.token, None)) is not None:
        os.close(handle)


def clear(outer: Path) -> None:
    """Delete the inner folders. An earlier holder may still write into one."""
    for name in os.listdir(outer):
        inner = outer / name
        while True:
            for file in os.listdir(inner):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(inner / file)
            try:
                os.rmdir(inner)
                break
            except OSError as exc:
                if exc.errno != errno.ENOTEMPTY:
                    raise


# ── The database ─────────────────────────────────────────────────────────────────────────────────────────────────────


def rescue(lease: Lease) -> None:
    """Go on with a copy of the rank's database, because an earlier holder may still have it open."""
    name = rank_file(lease.state, lease.rank, "sqlite3")
    if not name.exists():
        return
    before = name.resolve()
    copy = copy_at_rest(before, lease.folder / "state.sqlite3")
    with contextlib.closing(sqlite3.connect(copy)) as db:  # takes in what a journal has
        db.execute("PRAGMA journal_mode=DELETE").fetchall()
        db.execute("SELECT count(*) FROM sqlite_master").fetchall()
    sync(copy)
    kept = lease.outer.parent / f"{lease.token}.sqlite3"
    os.rename(copy, kept)
    link = lease.folder / "link"
    link.symlink_to(kept.relative_to(lease.state))
    os.replace(link, name)
    sync(lease.state)
    for suffix in ("-wal", "-shm", "-journal", ""):
        if suffix or before != name:
            Path(f"{before}{suffix}").unlink(missing_ok=True)


def copy_at_rest(source: Path, target: Path) -> Path:
    """Copy a database with its journals, such that nothing was written meanwhile. Returns the copy."""

    def looks() -> list[tuple[int, int]]:
        return [(found.st_size, found.st_mtime_ns) for path in parts if (found := stat_of(path))]

    parts = [Path(f"{source}{suffix}") for suffix in ("", "-wal", "-journal")]
    for _ in range(COPIES):
        before = looks()
        for path, suffix in zip(parts, ("", "-wal", "-journal"), strict=True):
            copy = Path(f"{target}{suffix}")
            copy.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(path, copy)
        if looks() == before:
            return target
        time.sleep(0.1)  # the earlier holder has woken up, and ends soon
    raise sdg.StateError(f"{source} is still written by a process that has lost its rank: stop it")


def stat_of(path: Path) -> os.stat_result | None:
    """What is known of a file; None if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None


# ── Renewal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Beats:
    """A thread that renews the leases of this process."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        """Renew a lease from now on."""
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="sdg-leases", daemon=True)
                self._thread.start()

    def remove(self, lease: Lease) -> None:
        """Renew a lease no more."""
        with self._lock:
            self._leases.discard(lease)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                leases = list(self._leases)
                if not leases:
                    self._thread = None
                    return
            for lease in leases:
                lease.renew()


_beats = Beats()
_locks: dict[str, int] = {}  # handles of locks, by the tokens of leases


# ── Other locks ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def brief_lock(path: Path) -> Iterator[None]:
    """Hold a lock that is needed for moments only: one that is held for too long is a stopped process's, and goes."""
    import filelock

    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(filelock.FileLock(path, timeout=patience()))
            except filelock.Timeout:
                path.unlink(missing_ok=True)
                continue
            yield
            return


# ── Who has which rank ───────────────────────────────────────────────────────────────────────────────────────────────


def holder_of(state: Path, rank: int) -> dict[str, Any] | None:
    """Who has a rank by a lease: host, pid, since (s since the epoch), slurm_job; None if no process has.

    `silent` is the time in s since its lease was renewed, if it has not been for some time.
    """
    folder = held_folder(state, rank)
    if folder is None or folder.name == FREE:
        return None
    with contextlib.suppress(OSError, ValueError):
        holder: dict[str, Any] = json.loads((folder / folder.name / HOLDER).read_bytes())
        age = time.time() - renewed_at(folder)
        return {**holder, "silent": round(age) if age > 10 * BEAT else None}
    return None


@contextlib.contextmanager
def held(lease: Lease) -> Iterator[Lease]:
    """Release a lease, and the lock of `lock_anew`, on the way out."""
    try:
        yield lease
    finally:
        release(lease)
