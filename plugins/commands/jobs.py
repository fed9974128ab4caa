"""Jobs: a config's run, from the lock of its rank to the report at its end.

All jobs of a process run beside one server, each as far as it gets: what ends one of them leaves the others alone,
except signals and failures of the server that they share. In which order they run is in `relay.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import platform
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

import xxhash

import sdg
from sdg_plugins.commands.relay import Relay
from sdg_plugins.commands.stop import Stop, canceled, explained
from sdg_plugins.common import retrying
from sdg_plugins.common.attempts import begin_attempt, end_attempt
from sdg_plugins.common.checks import (
    check_columns,
    check_reader,
    check_shape,
    created,
    entering,
    reading,
)
from sdg_plugins.common.chunks import Intake, Outlet
from sdg_plugins.common.claims import release_claims
from sdg_plugins.common.command_line import Config
from sdg_plugins.common.crew import Crew, Places
from sdg_plugins.common.database import create, shrink
from sdg_plugins.common.ending import same_folder, signals
from sdg_plugins.common.files import output_place, rank_file
from sdg_plugins.common.interleaving import Abreast
from sdg_plugins.common.lease import Fenced, Lease
from sdg_plugins.common.locks import confirm, lock_rank
from sdg_plugins.common.memory import before_the_first_request, tune_memory
from sdg_plugins.common.progress import Course, progress, put, report
from sdg_plugins.common.rereading import changed_rows
from sdg_plugins.common.secrets import hide_secrets
from sdg_plugins.common.shares import Share, Shares
from sdg_plugins.common.state import (
    check_number_of_files,
    check_state_dir,
    claim_state,
    columns_of,
    discarded,
    goal_of,
    private_folder,
    promised_fields,
    remember_source,
    start_over,
)
from sdg_plugins.common.statistics import (
    heartbeat,
    recording_the_end,
    recording_the_start,
    statistics,
    status_of,
    write_rank,
    write_statistics,
)
from sdg_plugins.common.steps import SCHEME
from sdg_plugins.publishing.card import check_beside
from sdg_plugins.servers.brake import watching
from sdg_plugins.servers.connecting import Connections, connect, limits_of
from sdg_plugins.servers.models import Connect, Servers, connect_models, start

Lock = Callable[[sdg.Run], contextlib.AbstractContextManager[None]]
Present = Callable[[sdg.Engine, Stop], contextlib.AbstractAsyncContextManager[None]]  # entered around `Engine.work`
FirstJob = Callable[..., Awaitable["Job | None"]]  # takes a config, what stops all jobs, a name, and more of a `Job`
Starting = Callable[[sdg.Run, contextlib.AsyncExitStack], Awaitable[Mapping[str, Servers]]]


@contextlib.asynccontextmanager
async def reported(engine: sdg.Engine, stop: Stop, course: Course | None = None) -> AsyncIterator[None]:
    """Show an engine's progress, keep its figures, and print at the end what was written where."""
    async with progress(engine, course), heartbeat(engine):
        yield
    figures, (in_files, *_) = await record_end(engine, stop), await engine.store.in_files()
    if figures["documents"] or not stop.reason:
        put(sdg.hide(report(engine, figures, in_files)))


async def record_end(engine: sdg.Engine, stop: Stop) -> dict[str, Any]:
    """Write the figures of a rank that has ended, and the sum over all ranks. Returns the rank's."""
    figures = await statistics(engine, await engine.store.tally())
    goal = goal_of(engine.intake.reader, engine.run.options)
    expected = engine.intake.expected()
    left = engine.intake.retrying and (expected is None or expected > figures["documents"])
    status = "stopped" if left else status_of(stop.reason)
    record = {"status": status, "expected": expected, "goal": goal}
    write_rank(engine.run, figures, record, stop.reason)
    write_statistics(engine.run)
    return figures


class Job:
    """One config's run, from the first look at its output until its observers are left.

    Observers are left when the server has stopped, with the exception that ended the run raised through them.

    Args:
        config: its options and plugins.
        everything: stops all jobs of this process.
        name: printed before its messages, "" if it is the only job.
        present: a context manager around the engine's work: shows it.
        connecting: yields the client for the servers.
        lock: keeps other processes of the same rank out.
        places: of documents in flight, in all jobs.

    Attributes:
        problem: what ended it early.
        finished: its work is done.
        abreast: of the jobs that take their documents in one order, if it is one of them.
        begun_all: set when all of its documents have begun: another job may begin beside it.
    """

    def __init__(
        self,
        config: Config,
        everything: Stop,
        name: str = "",
        present: Present = reported,
        connecting: Connect = connect,
        lock: Lock = lock_rank,
        places: Places | None = None,
    ) -> None:
        task = asyncio.current_task()
        assert task
        self.stop = Stop(task.cancel, everything, name)
        self.run = open_run(config, self.stop)
        self.stop.explain = self._explained
        self.problem: BaseException | None = None
        self.finished = False
        self.begun_all = asyncio.Event()
        self._places = places or Places()
        self.abreast: Abreast | None = None
        self._everything, self._name = everything, name
        self._present, self._connecting, self._lock = present, connecting, lock
        self._observers = contextlib.AsyncExitStack()
        self._writer: sdg.Writer

    async def prepare(self) -> None:
        """Open the writer: problems with the output are reported before a server starts."""
        options = self.run.options
        await asyncio.to_thread(self.run.output.check_access, _probe(self.run))
        entry = self.run.plugins.writers[options.writer]
        with sdg.at_work(f"the writer of {sdg.redact(options.output)}", entry.factory):
            self._writer = await asyncio.to_thread(created, entry.factory, self.run)
        check_shape(self._writer, sdg.Writer, f"the writer {options.writer!r} of plugin {entry.plugin}")

    async def work(self, servers: Mapping[str, Servers]) -> None:
        """Run to the end, or as far as it gets."""
        task, before = cast("asyncio.Task[Any]", asyncio.current_task()), self.stop.cancel
        self.stop.cancel = task.cancel
        self._everything.parts.add(self.stop)
        try:
            with self._lock(self.run), recording_the_end(self.run, lambda: self.stop.reason):
                self._heed_lease(asyncio.get_running_loop())
                begin_attempt(self.run)
                await self._work(servers)
                self.finished = self.stop.reason is None
                if self.finished:
                    await self._finish()
        except asyncio.CancelledError:
            if self.stop.reason is None:
                raise
            task.uncancel()
        except Exception as exc:  # noqa: BLE001 - it is raised when all jobs have run that can
            self.problem = self.stop.reason or self._explained(exc)
            if isinstance(self.problem, sdg.ServerError):  # the other jobs would ask the same server
                self._everything.reason = self._everything.reason or self.problem
        finally:
            self._everything.parts.discard(self.stop)
            self.stop.cancel, self.stop.gently = before, None
            if self.abreast:
                self.abreast.leave(self.begun_all)  # it may have ended before that
        self.problem = self.problem or self.stop.reason

    async def _finish(self) -> None:
        """Clean up after a rank that has finished."""
        retrying.end(self.run)
        await asyncio.to_thread(release_claims, self.run)
        await asyncio.to_thread(shrink, rank_file(self.run.state, self.run.options.rank, "sqlite3"))

    def _heed_lease(self, loop: asyncio.AbstractEventLoop) -> None:
        """End at once when another process takes the rank."""
        if isinstance(lease := self.run.output.fence, Lease):

            def stop() -> None:
                if self.stop in self._everything.parts:  # otherwise its work has ended meanwhile
                    self.stop(lease.error())

            def lost() -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(stop)

            lease.on_loss = lost

    def _explained(self, exc: BaseException) -> BaseException:
        """The exception to report: whatever fails after the rank was lost fails for that reason."""
        exc = sdg.first_cause(exc)
        if isinstance(lease := self.run.output.fence, Lease) and lease.is_lost():
            return exc if isinstance(exc, Fenced) else lease.error()
        return explained(exc, self.run)

    async def _work(self, servers: Mapping[str, Servers]) -> None:
        check_state_dir(self.run)
        check_beside(self.run)
        if self.run.options.fresh or discarded(self.run):
            start_over(self.run)
        remember_source(self.run)
        async with self._engine(await self._reader(), servers) as engine:
            await self._observe()
            tune_memory()
            engine.intake.on_first = lambda: before_the_first_request(alone=len(self._everything.parts) == 1)
            async with self._present(engine, self.stop):
                self.stop.gently = engine.stop
                try:
                    with same_folder():
                        await engine.work()
                finally:
                    self.stop.gently = lambda: None  # what is left is to record the end

    async def _reader(self) -> sdg.Reader:
        """Open the input; sets `run.schema`."""
        run, options = self.run, self.run.options
        entry = run.plugins.readers[options.reader]
        with reading(options.input, entry.factory):
            reader: sdg.Reader = await asyncio.to_thread(created, entry.factory, run)
        check_reader(reader, f"the reader {options.reader!r} of plugin {entry.plugin}")
        with columns_of(run, reader):
            check_columns(reader.schema, options, promised_fields(run) or ())
        run.schema = reader.schema
        return reader

    @contextlib.asynccontextmanager
    async def _engine(self, reader: sdg.Reader, servers: Mapping[str, Servers]) -> AsyncIterator[sdg.Engine]:
        """An engine with all that it needs: client, state, resources."""
        run = self.run
        async with contextlib.AsyncExitStack() as stack:
            async with recording_the_start(run, servers.get("", [])):
                await connect_models(run, servers, self._connecting, stack)
                only_failed = claim_state(run, reader, functools.partial(changed_rows, run, reader))
                check_number_of_files(run, reader)
            path = rank_file(run.state, run.options.rank, "sqlite3")
            await asyncio.to_thread(create, path, private_folder(run))
            opening = sdg.Store.open(path, run.counts, functools.partial(confirm, run))
            store = await stack.enter_async_context(opening)
            brakes = [of.client.transport.brake for of in (run, *run.models.values()) if of.client]
            stack.enter_context(watching(store, brakes))
            send = run.plugins.linked(run)
            resources = await self._resources(stack)
            intake, outlet = Intake(run, reader), Outlet(run, self._writer)
            outlet.check(reader.schema)
            await retrying.begin(run, store)
            if only_failed:
                intake.chosen, intake.retrying = await retrying.failed_documents(store), True
            crew = Crew(run.options.max_concurrent_documents, self._places, self.begun_all, self.abreast)
            yield sdg.Engine(run, store, crew, intake, outlet, send, resources)

    async def _resources(self, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
        """Enter the resources that the rollout has parameters for."""
        entered = {}
        for name, entry in self.run.plugins.resources_of(self.run.options.rollout).items():
            with sdg.at_work(f"the resource {name!r}", entry.factory):
                entered[name] = await stack.enter_async_context(entering(entry, "resource", name, self.run))
        return entered

    async def _observe(self) -> None:
        """Enter the observers."""
        if self.run.plugins.quiet:
            return
        for impl, call in self.run.plugins.calls("observe", run=self.run):
            with sdg.at_work(f"plugin {impl.plugin_name}: observe", impl.plugin):
                if (observer := call()) is not None:
                    await self._observers.enter_async_context(observer)

    async def following(self, at_the_end: bool) -> Job | None:
        """The job to do next with the same config, if there is one; asked before this one has ended, and then again."""
        return None

    def may_overlap(self, before: Job) -> bool:
        """True if it may begin while the job before it still has documents in flight."""
        if self.abreast:
            return True
        options, others = self.run.options, before.run.options
        whole = before.begun_all.is_set() and options.sample is None and not options.preview
        return whole and options.reader != SCHEME and limits_of(options) == limits_of(others)

    @property
    def is_step(self) -> bool:
        """True if it works on what the job before it has written."""
        return bool(self.run.options.reader == SCHEME)

    async def end(self) -> None:
        """Called when its work has ended, while the server goes on."""

    async def leave(self) -> None:
        """Leave the observers; with several configs, say how this one ended."""
        try:
            async with self._observers:
                if problem := self.problem or self._everything.reason:
                    raise problem
        except (asyncio.CancelledError, Exception) as exc:  # noqa: BLE001 - it is raised when all jobs are left
            raised, ended = self._explained(exc), self._everything.reason or self.problem
            if isinstance(raised, Fenced):
                self.problem = raised
                return
            if ended and raised is not ended and not isinstance(raised, asyncio.CancelledError):
                sdg.say(f"{self._name}an observer failed, too: {sdg.describe(raised)}")
            self.problem = ended or raised
            if self._name and isinstance(self.problem, sdg.Error) and not self.problem.said:
                sdg.say(f"{self._name}{self.problem}")
                self.problem.said = True


class FreeRank(Job):
    """One of the ranks that a process with `--rank any` takes, one after the other."""

    def __init__(self, share: Share, shares: Shares, everything: Stop, name: str, **setting: Any) -> None:
        super().__init__(share.config, everything, name, lock=share.held, **setting)
        self._shares, self._setting = shares, setting

    @classmethod
    async def first(cls, config: Config, everything: Stop, name: str, **setting: Any) -> FreeRank | None:
        """A job for a rank of this config; None if none is free, which is said."""
        shares = Shares(config, open_run(config, everything))
        if not config.options.part:  # else its parent has done it
            if job := await cls._take(shares, False, everything, name, **setting):
                return job
            await asyncio.to_thread(shares.reopen)
        return await cls._take(shares, True, everything, name, **setting)

    @classmethod
    async def _take(
        cls, shares: Shares, at_the_end: bool, everything: Stop, name: str, **setting: Any
    ) -> FreeRank | None:
        if not (share := await shares.take(at_the_end)):
            if at_the_end:
                shares.say(f"{name}no rank is free: {shares.summary()}")
            return None
        shares.say(f"{name}rank {share.config.options.rank} of {share.config.options.world_size}")
        job = cls(share, shares, everything, name, **setting)
        await job.prepare()
        return job

    async def following(self, at_the_end: bool) -> FreeRank | None:
        """Take the next rank, unless one of this process has ended early."""
        if self._shares.closed or self._everything.reason:
            return None
        return await self._take(self._shares, at_the_end, self._everything, self._name, **self._setting)

    async def end(self) -> None:
        """Leave this rank's observers. A rank that another process has taken is no problem of this one."""
        await self.leave()
        if isinstance(self.problem, Fenced):
            if not self.problem.said:
                sdg.say(f"{self._name}{self.problem}")
            self.problem = None
        self._shares.closed = self._shares.closed or self.problem is not None


def _probe(run: sdg.Run) -> str:
    """The file that tries the rights on an output: states have one each, so that no run deletes another one's."""
    config, rank = run.options.output_config.replace("/", "-"), run.options.rank
    return f".sdg-access-{config}-{rank:05d}-{xxhash.xxh3_64_hexdigest(bytes(run.state) + platform.node().encode())}"


def open_run(config: Config, stop: Stop) -> sdg.Run:
    """The run of a config, with its output and state folders created."""
    options, state = config.options, Path(config.options.state_dir).absolute()
    hide_secrets(options)
    run = sdg.Run(options, config.plugins, output_place(options, state), state, stop, stop.stopping)
    try:
        run.state.mkdir(parents=True, exist_ok=True)
        if run.output.local:
            os.makedirs(run.output.path(options.output_config), exist_ok=True)
    except OSError as exc:
        message = f"{exc.filename} cannot be created: {sdg.reason_of(exc)}; choose another --output"
        raise sdg.OutputError(message) from exc
    return run


async def first_job(config: Config, everything: Stop, name: str, **setting: Any) -> Job | None:
    """The first job of a config; None if there is nothing for this process to do."""
    if config.options.any_rank:
        return await FreeRank.first(config, everything, name, **setting)
    job = Job(config, everything, name, **setting)
    await job.prepare()
    return job


async def run_all(
    configs: list[Config],
    present: Present = reported,
    called: Callable[[Stop], object] | None = None,
    first: FirstJob = first_job,
    starting: Starting = start,
) -> None:
    """Run the jobs of some configs; raises the worst of their errors.

    Args:
        configs: each is a job.
        present: a context manager around each engine's work: shows it.
        called: for calls in Python: given what stops all jobs, instead of signals.
        first: makes the first job of a config.
        starting: enters the servers.
    """
    if present is reported:
        course = Course([config.name for config in configs])
        present = functools.partial(reported, course=course)
    jobs: list[Job] = []
    problem: BaseException | None = None
    try:
        await _run_jobs(configs, jobs, present, called, first, starting)
    except BaseException as exc:
        problem = exc
        raise
    finally:
        for job in jobs:  # the last thing that is written
            end_attempt(job.run, job.problem or (None if job.finished else problem))


async def _run_jobs(
    configs: list[Config],
    jobs: list[Job],
    present: Present,
    called: Callable[[Stop], object] | None,
    first: FirstJob,
    starting: Starting,
) -> None:
    """Run the jobs of some configs, and add them to `jobs`; see `run_all`."""
    task = asyncio.current_task()
    assert task
    stop, connections = Stop(task.cancel, quiet=called is not None), Connections()
    setting: dict[str, Any] = {"present": present, "connecting": connections.connect, "places": Places()}
    try:
        with signals(stop) if called is None else contextlib.nullcontext(called(stop)):
            for config in configs:
                name = f"config {config.name}: " if len(configs) > 1 else ""
                jobs += filter(None, [await first(config, stop, name, **setting)])
            options = configs[0].options
            if options.interleave_configs and options.sample is None and not options.preview:
                together = Abreast([job.begun_all for job in jobs], options.max_concurrent_documents)
                for job in jobs:
                    job.abreast = together
            if jobs:
                await serve(jobs, stop, connections, starting)
            for job in jobs:
                await job.leave()
    except (asyncio.CancelledError, Exception) as exc:
        if stop.reason is None or exc is stop.reason:
            raise
        raise stop.reason from exc
    finally:
        for stopping in [stop, *(job.stop for job in jobs)]:
            stopping.stopping.set()  # threads that still wait for a remote server keep the process from ending
    problems = [problem for problem in [stop.reason, *(job.problem for job in jobs)] if problem]
    if problems:
        raise max(problems, key=lambda problem: getattr(problem, "exit_code", 1))


async def serve(jobs: list[Job], stop: Stop, connections: Connections, starting: Starting = start) -> None:
    """Start the servers, and have the jobs use them in their turn, until something stops them all.

    Args:
        jobs: those that follow are added.
        stop: ends all of them.
        connections: of the jobs with the servers.
        starting: enters the servers.
    """
    run = dataclasses.replace(jobs[0].run, stop=stop, stopping=stop.stopping)
    try:
        with same_folder():
            async with contextlib.AsyncExitStack() as stack:
                servers = await starting(run, stack)
                await stack.enter_async_context(connections)
                if servers[""]:  # otherwise our GPUs were lent to a run elsewhere, which has ended
                    await Relay(jobs, servers, lambda: stop.reason).run()
    except (asyncio.CancelledError, Exception) as exc:  # noqa: BLE001 - raised when all observers are left
        problem = stop.reason or (canceled(run) if isinstance(exc, asyncio.CancelledError) else explained(exc, run))
        for job in jobs:
            job.problem = job.problem or problem
