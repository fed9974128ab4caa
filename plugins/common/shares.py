"""`--rank any`: processes that come and go take the ranks of a run one after the other.

A rank belongs to the process that holds its lock, which the kernel takes back when the process is gone. Whether a rank
has finished is in its figures, together with the input that it was finished for: if the input grows, it is open again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import sdg
from sdg_plugins.common.checks import created, reading
from sdg_plugins.common.command_line import Config
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.lease import BEAT, FREE, Lease, acquire, age_of, held_folder, renewed_at
from sdg_plugins.common.locks import fenced, locked
from sdg_plugins.common.resuming import known_chunks
from sdg_plugins.common.state import goal_of
from sdg_plugins.common.statistics import statistics_of, write_rank


class Share:
    """One rank that this process has taken: its config, and its lock."""

    def __init__(self, config: Config, lock: contextlib.ExitStack, lease: Lease) -> None:
        self.config = Config(argparse.Namespace(**{**vars(config.options), "rank": lease.rank}), config.plugins)
        self._lock, self._lease = lock, lease

    @contextlib.contextmanager
    def held(self, run: sdg.Run) -> Iterator[None]:
        """The rank's lock and lease, in place of `lock_rank`; they are released on the way out."""
        with self._lock, fenced(run, self._lease):
            yield


class Shares:
    """The ranks of one config that this process may still take.

    Args:
        config: with `--rank any`.
        run: of that config; it opens the reader.

    Attributes:
        tried: ranks that this process has had.
        closed: one of them has ended early: no other is taken.
    """

    def __init__(self, config: Config, run: sdg.Run) -> None:
        self.config, self._run = config, run
        self.tried: set[int] = set()
        self.closed = False
        self._finished: set[int] = set()  # what a thousand ranks have recorded is not read again for each that is taken
        self._goal: str | None = None
        self._seen: dict[tuple[str, float], float] = {}  # when each renewal of a lease was seen, on the monotonic clock

    def say(self, message: str) -> None:
        """Report which rank this process has, unless it is one of --processes: people see them as a whole."""
        if not self.config.options.part:
            sdg.say(message)

    async def take(self, at_the_end: bool) -> Share | None:
        """The next rank that is neither finished nor taken; None if there is none.

        At the end it waits until it is known of each holder of a rank that it is alive, or is not.
        """
        silent: dict[int, float] = {}  # age of leases in s, at the first look
        while True:
            if share := await asyncio.to_thread(self._take):
                return share
            if not (at_the_end and await asyncio.to_thread(self._silent, silent)):
                return None
            await asyncio.sleep(BEAT / 2)

    def _take(self) -> Share | None:
        state = self._run.state
        for rank in self._candidates(state):
            lock = contextlib.ExitStack()
            try:
                lock.enter_context(locked(state, rank))
                has_lock = True
            except sdg.StateError:
                has_lock = False
            if self._status(state, rank) == "finished":  # by a process that was faster
                lock.close()
                continue
            if not has_lock and not self._is_silent(rank):
                lock.close()
                continue
            if (lease := acquire(state, rank, has_lock)) is None:
                lock.close()
                continue
            if not has_lock:
                sdg.say(f"rank {rank} is taken over from a process that is stopped, or whose machine is lost")
            self.tried.add(rank)
            return Share(self.config, lock, lease)
        return None

    def _is_silent(self, rank: int) -> bool:
        """True if this process has not seen a lease renewed for some time: not even after a machine's sleep."""
        if (folder := held_folder(self._run.state, rank)) is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            now = time.monotonic()
            return now - self._seen.setdefault((folder.name, renewed_at(folder)), now) > 2 * BEAT
        return False

    def _silent(self, silent: dict[int, float]) -> bool:
        """True if the holder of a rank has not shown yet that it is alive.

        Args:
            silent: the ages of leases at the last look, in s; those that were renewed since are negative.
        """
        ranks = self._candidates(self._run.state)
        for rank in ranks:
            folder = held_folder(self._run.state, rank)
            with contextlib.suppress(FileNotFoundError):
                if folder and folder.name != FREE and silent.get(rank, 0.0) >= 0:
                    age = age_of(folder)
                    silent[rank] = -1.0 if age < silent.get(rank, 0.0) else age
                    continue
            silent[rank] = -1.0
        return any(silent[rank] >= 0 for rank in ranks)

    def summary(self) -> str:
        """How many ranks have finished, and what is with the others."""
        state, ranks = self._run.state, range(self._run.options.world_size)
        finished = sum(self._status(state, rank) == "finished" for rank in ranks)
        others = len(ranks) - finished
        return f"{finished} of {len(ranks)} have finished" + (
            f", {others} are in the hands of other processes, or ended early in this one" if others else ""
        )

    def free(self) -> list[int]:
        """The ranks that have not finished, and that no process has taken just now."""
        found = []
        for rank in self._candidates(self._run.state):
            with contextlib.suppress(sdg.StateError), locked(self._run.state, rank):
                found.append(rank)
        return found

    def reopen(self) -> None:
        """Have finished ranks run again whose files are gone from the output.

        Raises:
            OutputError: a file has another size than the one that was written.
            StateError: the state cannot be read.
        """
        for rank in range(self._run.options.world_size):
            options = argparse.Namespace(**{**vars(self._run.options), "rank": rank})
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(locked(self._run.state, rank))
                except sdg.StateError:  # another process has it
                    continue
                if self._status(self._run.state, rank) == "finished":
                    self._reopen(dataclasses.replace(self._run, options=options))
        self._finished.clear()

    def _reopen(self, run: sdg.Run) -> None:
        if known_chunks(run, aloud=False).lost:
            figures = statistics_of(rank_file(run.state, run.options.rank, "stats.json"))
            write_rank(run, figures, {**figures["rank"], "goal": None})

    def _candidates(self, state: Path) -> list[int]:
        """Ranks that have not finished, those last that have failed: their documents may fail again."""
        others = set(range(self.config.options.world_size)) - self.tried - self._finished
        ranks = {rank: self._status(state, rank) for rank in others}
        self._finished.update(rank for rank in ranks if ranks[rank] == "finished")
        return sorted(ranks.keys() - self._finished, key=lambda rank: (ranks[rank] == "failed", rank))

    def _status(self, state: Path, rank: int) -> str:
        figures = statistics_of(rank_file(state, rank, "stats.json"))
        record = figures.get("rank", {})
        status = str(record.get("status", ""))
        part = self.config.options.part
        if part and record.get("updated", 0.0) > part.began and status != "running" and not record.get("error"):
            return "finished"  # by another of these processes; of what has failed, it has tried again what it may
        if status == "finished":
            retry = self.config.options.retry_failed and figures.get("failed")
            return "finished" if record.get("goal") == self.goal and not retry else "open"
        return status

    @property
    def goal(self) -> str:
        """What a finished rank has been finished for."""
        if self._goal is None:
            entry = self._run.plugins.readers[self._run.options.reader]
            with reading(self._run.options.input, entry.factory):
                self._goal = goal_of(created(entry.factory, self._run), self._run.options)
        return self._goal
