"""The parent of the processes of `--processes N`: starts servers and processes, and shows and judges them as one.

The parent makes the state the run's before there is a process, so what is refused is refused once. It restarts those
that are killed, passes on what ends the run, and has the observers: it alone publishes, and writes the card.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import sdg
from sdg_plugins.commands import jobs
from sdg_plugins.commands.jobs import Job
from sdg_plugins.commands.stop import Stop
from sdg_plugins.commands.team import Team
from sdg_plugins.commands.whole import Whole
from sdg_plugins.common.command_line import Config
from sdg_plugins.common.files import rank_file
from sdg_plugins.common.locks import locked
from sdg_plugins.common.processes import Part, most_processes, ranks_for
from sdg_plugins.common.progress import Course, progress, report
from sdg_plugins.common.ranks import ranges
from sdg_plugins.common.rereading import changed_rows
from sdg_plugins.common.shares import Shares
from sdg_plugins.common.state import (
    check_number_of_files,
    check_state_dir,
    claim_state,
    discarded,
    documents_in,
    recorded_size,
    remember_source,
    size_of_chunks,
    start_over,
)
from sdg_plugins.common.statistics import rank_statistics, sum_statistics, write_statistics
from sdg_plugins.publishing.card import check_beside
from sdg_plugins.servers.connecting import connect
from sdg_plugins.servers.models import Servers, connect_models

PATIENCE = 3.0  # s to wait for a rank whose process was killed together with an earlier parent
LOCK = "processes.lock"  # held by the parent
ROUNDS = 3  # of starting processes, if ranks are left that were taken by processes which have been killed since


async def run_all(configs: list[Config]) -> None:
    """Run the jobs of some configs, those with --processes by several processes; raises the worst of their errors."""
    course = Course([config.name for config in configs])

    async def first(config: Config, everything: Stop, name: str, **setting: Any) -> Job | None:
        if config.options.processes is None:
            return await jobs.first_job(config, everything, name, **setting)
        job = WholeJob(config, everything, name, course)
        if config.options.any_rank:  # it records its own end with a rank that no other machine works on
            free = await asyncio.to_thread(Shares(config, job.run).free)
            config.options.rank = next(iter(free), 0)
        await job.prepare()
        return job

    await jobs.run_all(configs, first=first)


class WholeJob(Job):
    """One config's run by several processes.

    Args:
        config: its options and plugins.
        everything: stops all jobs of this process.
        name: printed before its messages, "" if it is the only job.
        course: of the configs, for the progress bar.
    """

    def __init__(self, config: Config, everything: Stop, name: str, course: Course) -> None:
        super().__init__(config, everything, name, lock=lambda run: contextlib.nullcontext())
        self._config, self._course = config, course
        self._team: Team | None = None
        self._chunks = sys.maxsize  # as far as is known

    def may_overlap(self, before: Job) -> bool:
        """See `Job`: its processes have all of the limits."""
        return False

    async def _work(self, servers: Mapping[str, Servers]) -> None:
        with contextlib.ExitStack() as held:
            reader, retrying = await self._claim(servers, held)
            await self._observe()
            whole = Whole(self.run, reader, servers, retrying)
            shown = cast("sdg.Engine", whole)  # as far as the display looks at it
            self.stop.gently = self._end
            try:
                async with progress(shown, self._course):
                    await self._run_processes(whole, servers)
            finally:
                self.stop.gently = None
            await self._report(shown)

    async def _finish(self) -> None:
        """See `Job`: its processes have done it for each rank."""

    async def _claim(self, servers: Mapping[str, Servers], held: contextlib.ExitStack) -> tuple[sdg.Reader, bool]:
        """Make the state this run's, and keep other parents out of it. Returns the input's reader.

        Also returns whether only documents that have failed are to be run; see `claim_state`.
        """
        run, alone = self.run, not self.run.options.any_rank
        with contextlib.ExitStack() as begin:
            if alone:
                begin.enter_context(await asyncio.to_thread(first_rank, run))
            check_state_dir(run)
            check_beside(run)
            if run.options.fresh or discarded(run):
                start_over(run)
            remember_source(run)
            reader = await self._reader()
            self._count(reader)
            await self._connect(servers)
            retrying = claim_state(run, reader, functools.partial(changed_rows, run, reader))
            check_number_of_files(run, reader)
            if alone:
                held.enter_context(alone_in(run.state))
        return reader, retrying

    def _count(self, reader: sdg.Reader) -> None:
        """Count the chunks, and settle the number of ranks if the run begins."""
        options, documents = self.run.options, documents_in(reader)
        if documents:
            size = options.records_per_chunk or recorded_size(self.run) or size_of_chunks(documents)
            if not (self.run.state / "run.json").exists():
                options.world_size = ranks_for(options, -(-documents // size))
            self._chunks = -(-min(documents, options.max_documents or documents) // size)

    async def _connect(self, servers: Mapping[str, Servers]) -> None:
        """Settle the models. The parent sends no requests, so no limit of its own matters."""

        def narrow(options: argparse.Namespace) -> argparse.Namespace:
            return argparse.Namespace(**{**vars(options), "max_concurrent_generations": 1})

        options = narrow(self.run.options)
        options.models = {name: narrow(model) for name, model in options.models.items()}
        looking = dataclasses.replace(self.run, options=options)
        async with contextlib.AsyncExitStack() as stack:
            await connect_models(looking, servers, connect, stack)
        self.run.model = looking.model
        for name, model in looking.models.items():
            self.run.models[name] = dataclasses.replace(model, options=self.run.options.models[name])

    async def _observe(self) -> None:
        """Enter the observers that publish and write the card; those of others are called in each process."""
        for impl, call in self.run.plugins.calls("observe", run=self.run):
            if impl.plugin_name.startswith("sdg_plugins.") and (observer := call()) is not None:
                await self._observers.enter_async_context(observer)

    async def _run_processes(self, whole: Whole, servers: Mapping[str, Servers]) -> None:
        """Run processes until no rank is free, or something ends the run."""
        options = self.run.options
        await asyncio.to_thread(Shares(self._config, self.run).reopen)
        part = Part(0, most_processes(options), self._config.name, options.world_size, time.time())
        shares = Shares(Config(argparse.Namespace(**{**vars(options), "part": part}), self._config.plugins), self.run)
        for turn in range(ROUNDS + 1):
            free = await asyncio.to_thread(shares.free)
            if not free or self.stop.reason:
                break
            if turn == ROUNDS:
                raise sdg.StateError(f"ranks {ranges(free)} have not finished: run the same command again")
            busy = sum(rank < self._chunks for rank in free)  # the others have no documents
            some = part._replace(of=min(part.of, busy or 1))
            self._team = Team(options.command, some, servers, whole, self.stop)
            await self._team.work()
            if self._team.spent:
                free = await asyncio.to_thread(shares.free)
                self.stop(self._team.spent) if free else None
        if not self.stop.reason and (problem := whole.too_many_failures(at_end=True)):
            self.stop(problem)

    def _end(self) -> None:
        if self._team and self.stop.reason:
            self._team.end(self.stop.reason)

    async def _report(self, shown: sdg.Engine) -> None:
        """Sum up the figures of all ranks, and print what was written where."""
        write_statistics(self.run)
        figures = sum_statistics(rank_statistics(self.run.state))
        if figures.get("documents") or ("documents" in figures and not self.stop.reason):
            in_files = await asyncio.to_thread(documents_in_files, self.run)
            with contextlib.suppress(OSError, ValueError):  # no one reads it: the run is as good as before
                print(sdg.hide(report(shown, figures, in_files)), flush=True)


def first_rank(run: sdg.Run) -> contextlib.ExitStack:
    """The lock of the first rank, as taken. Processes that end because their parent was killed are waited for."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(run.state, run.options.rank))
                return stack.pop_all()
            except sdg.StateError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.1)


@contextlib.contextmanager
def alone_in(state: Path) -> Iterator[None]:
    """Keep other parents out of a state."""
    import filelock

    try:
        with filelock.FileLock(state / LOCK, timeout=0):
            yield
    except filelock.Timeout as exc:
        raise sdg.StateError(f"another process with --processes works in {state}: wait for it, or stop it") from exc


def documents_in_files(run: sdg.Run) -> int:
    """Documents in chunks that are written, of all ranks."""
    found = 0
    for rank in range(run.options.world_size):
        path = rank_file(run.state, rank, "sqlite3")
        if path.exists():
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
                found += int(db.execute("SELECT total(count) FROM chunks WHERE written").fetchone()[0])
    return found
