"""The lock of a rank, which keeps other processes out; with `--rank any` there is a lease beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import sdg
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.lease import Lease, acquire, held, holder_of, home_of


@contextlib.contextmanager
def lock_rank(run: sdg.Run) -> Iterator[None]:
    """Keep other processes of this run's rank out, on this and on other hosts that share the file system."""
    with locked(run.state, run.options.rank):
        if not home_of(run.state, run.options.rank).exists():  # no process of this run has had `--rank any`
            yield
            return
        if (lease := acquire(run.state, run.options.rank, locked=True)) is None:
            raise taken(run.state, run.options.rank)
        with fenced(run, lease):
            yield


@contextlib.contextmanager
def fenced(run: sdg.Run, lease: Lease) -> Iterator[None]:
    """Write only as long as a lease is held, and release it. What was lost stays so."""
    run.output.fence = lease
    try:
        with held(lease):
            yield
    finally:  # what ended it is not taken for the loss of a lease that was released
        if not lease.lost:
            run.output.fence = None


def confirm(run: sdg.Run) -> None:
    """Check that this process still has its rank. Raises Fenced."""
    if isinstance(lease := run.output.fence, Lease) and lease.is_lost():
        raise lease.error()


def taken(state: Path, rank: int) -> sdg.StateError:
    """The error for a rank that another process has."""
    who = holder_of(state, rank)
    where = f" (process {who['pid']} on {who['host']})" if who else ""
    return sdg.StateError(f"another process{where} is running rank {rank} in {state}: wait for it, or stop it")


@contextlib.contextmanager
def locked(state: Path, rank: int) -> Iterator[None]:
    """Hold the lock of a rank. Raises StateError if another process holds it."""
    import filelock

    try:
        state.mkdir(parents=True, exist_ok=True)
        # Not bound to a thread: `--rank any` takes it in one thread and releases it in another.
        with filelock.FileLock(rank_file(state, rank, "lock"), timeout=0, thread_local=False):
            yield
    except filelock.Timeout as exc:
        raise taken(state, rank) from exc
