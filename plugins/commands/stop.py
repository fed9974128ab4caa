"""What ends the jobs of a process before they are done."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import threading
from collections.abc import Callable

import sdg
from sdg_plugins.common.crew import GRACE


class Stop:
    """Ends a run for a reason; the first reason counts. A second signal does not wait for requests in flight.

    Args:
        cancel: ends it when no engine is working.
        everything: for one of several jobs: ends all of them, if the server fails that they share.
        name: of the job, printed before its reason.
        quiet: the reason is raised to a caller in Python, who decides what to do with it: it is not printed, and the
            process goes on.

    Attributes:
        stopping: set when it ends early, for threads.
        cancel: ends it when no engine is working.
        gently: how to end it while an engine is working.
        parts: of the jobs that work, if it stops all of them.
        explain: returns the exception to report for one that is the reason.
    """

    def __init__(
        self, cancel: Callable[[], object], everything: Stop | None = None, name: str = "", quiet: bool = False
    ) -> None:
        self.reason: BaseException | None = None
        self.stopping = threading.Event()
        self.cancel = cancel
        self.gently: Callable[[], None] | None = None
        self.parts: set[Stop] = set()
        self.explain: Callable[[BaseException], BaseException] = sdg.first_cause
        self._everything, self._name = everything, name
        self.quiet: bool = everything.quiet if everything else quiet

    def __call__(self, reason: BaseException) -> None:
        reason = self.explain(reason)
        first, self.reason = self.reason is None, self.reason or reason
        if first:
            self.stopping.set()
            self._say(reason)
        shared = isinstance(reason, sdg.ServerError | sdg.Interrupted)
        if self._everything and self._everything.reason is None and shared:
            self._everything(reason)
        if first and self.parts:
            for part in self.parts.copy():
                part(reason)
        elif first:
            (self.cancel if getattr(reason, "at_once", False) else self.gently or self.cancel)()
        elif isinstance(reason, sdg.Interrupted) and not self._everything:
            self.cancel()

    def _say(self, reason: BaseException) -> None:
        if isinstance(reason, sdg.Error) and not reason.said and not self.quiet:
            working = isinstance(reason, sdg.Interrupted) and any(part.gently for part in (self, *self.parts))
            hint = f" (what is in flight has {GRACE:.0f} s to end; interrupt again to cut it off)" if working else ""
            sdg.say(f"{self._name}{reason}{hint}")
            reason.said = True


def explained(exc: BaseException, run: sdg.Run) -> BaseException:
    """The exception to report for a failure: those of databases and disks do not say what they concern."""
    exc = sdg.first_cause(exc)
    state = f"state {run.options.state_dir}"
    error: sdg.Error
    if type(exc) is sqlite3.DatabaseError:
        error = sdg.StateError(f"{state} is broken ({exc}): restore it from a backup, or start over with --fresh")
    elif isinstance(exc, sqlite3.Error):
        unwritten = getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR
        full = unwritten and not shutil.disk_usage(run.state).free  # of its journals SQLite does not say that
        hint = "; check the disk's space, quota and health, then run the same command again" * (unwritten and not full)
        error = sdg.StateError(f"{state}: {sdg.reason_of(OSError(errno.ENOSPC, '') if full else exc)}{hint}")
    elif isinstance(exc, OSError):
        error = sdg.OutputError(f"{exc.filename or run.options.output}: {sdg.reason_of(exc)}")
    else:
        return exc
    error.__cause__ = exc
    return error


def canceled(run: sdg.Run) -> sdg.Error:
    """The error of a run whose tasks were canceled without a reason: each stop of ours has one."""
    entry = run.plugins.rollouts[run.options.rollout]
    return sdg.PluginError(
        "all tasks of the run were canceled, as `asyncio.all_tasks()` returns them: the rollout "
        f"{run.options.rollout!r} of {entry.package or entry.plugin}, or what it calls, must cancel only its own tasks"
    )
