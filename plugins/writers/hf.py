"""Datasets of the Hugging Face Hub as output: `--output hf://datasets/OWNER/NAME[/FOLDER]`.

Chunks are written to a folder of the state, `spool`, as to any other folder. A run of one process publishes them by
itself, in a thread that the engine never waits for; beside many ranks `sdg.py monitor` does it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import sdg
from sdg_plugins.common.files import format_of
from sdg_plugins.common.options import number
from sdg_plugins.common.ranks import progress_section
from sdg_plugins.publishing import hub
from sdg_plugins.publishing.publisher import Publisher
from sdg_plugins.publishing.quota import FILES

LOOK = 5.0  # s between two looks at what has been written


def size(value: str) -> int:
    """An option's size, such as 500MB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)i?B?", value, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{value}: a size such as 500MB is wanted")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument("--output-public", action="store_true", help="make a new repository public; default: private")
    parser.add_argument(
        "--max-file-size", metavar="SIZE", type=size, help="merge chunks into files of at most this size, such as 500MB"
    )
    parser.add_argument(
        "--publish-interval",
        metavar="S",
        type=number(float, 0.1),
        default=300.0,
        help=f"seconds between two commits, unless {FILES} files are waiting [300]",
    )
    parser.add_argument(
        "--no-publish", action="store_true", help="leave it to `sdg.py monitor`, also for a single rank"
    )


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("hf", open_output)


@sdg.hookimpl
def observe(run: sdg.Run) -> contextlib.AbstractAsyncContextManager[None] | None:
    return publishing(run) if run.options.writer == "hf" else None


def open_output(run: sdg.Run) -> sdg.Writer:
    """Write to a dataset on the Hugging Face Hub, while the run goes on."""
    publisher = Publisher(run)  # also tells a wrong URI
    with contextlib.closing(publisher):
        if publishes(run):
            try:
                publisher.prepare(make=False)
                visible = "private" if publisher.private else "public"
                sdg.say(f"publishing to {publisher.url} ({visible})")
            except sdg.Error:
                raise
            except Exception as problem:
                if reason := hub.refusal(problem, publisher.address):
                    raise sdg.OutputError(reason) from problem
                if not hub.is_transient(problem):
                    raise
                sdg.say(f"{hub.transient_message(problem)}; the run begins, and publishes when the Hub is back")
    writer: sdg.Writer = run.plugins.find("writers", format_of(run.options.output_filename)).factory(run)
    return writer


def publishes(run: sdg.Run) -> bool:
    """Whether this process publishes what it writes."""
    return bool(run.options.world_size == 1 and not run.options.no_publish)


@contextlib.asynccontextmanager
async def publishing(run: sdg.Run) -> AsyncIterator[None]:
    """Publish while the run goes on, and what is left when it has ended by itself."""
    if not publishes(run):
        yield
        sdg.say(f"the rows are in {run.output.root}; `sdg.py monitor --output {run.options.output}` publishes them")
        return
    worker = Worker(run, asyncio.get_running_loop())
    worker.start()
    try:
        yield
        published = await worker.finish()
    except BaseException:  # the thread is left behind: nothing is lost
        sdg.say(f"what is not published yet waits in {run.output.root} for the next run of this command")
        raise
    print(published, flush=True)


class Worker(threading.Thread):
    """Publishes in the background. A daemon: an upload that hangs must not keep a process from ending."""

    def __init__(self, run: sdg.Run, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name=sdg.PUBLISHER, daemon=True)
        self._run, self._loop = run, loop
        self._over = threading.Event()
        self._result: asyncio.Future[str] = loop.create_future()

    async def finish(self) -> str:
        """Wait until everything is published; returns what to tell people. Raises what stands in the way."""
        self._over.set()
        return await self._result

    def run(self) -> None:
        try:
            with contextlib.closing(Publisher(self._run)) as publisher:
                self._while_it_runs(publisher)
                result = f"published {publisher.finish()}"
        except BaseException as problem:  # noqa: BLE001 - it is raised where somebody waits for it
            self._tell(self._result.set_exception, problem)
        else:
            self._tell(self._result.set_result, result)

    def _tell(self, settle: Callable[[Any], None], value: Any) -> None:
        def unless_cancelled() -> None:
            if not self._result.done():
                settle(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(unless_cancelled)

    def _while_it_runs(self, publisher: Publisher) -> None:
        """Look now and then whether a commit is due. A refusal is said, and tried again."""
        interval = self._run.options.publish_interval
        due, told, pause = 0.0, "", min(LOOK, interval)
        while not self._over.wait(pause) and not self._run.stopping.is_set():
            began = time.monotonic()
            try:
                waiting = publisher.waiting()
                pause = max(min(LOOK, interval), 20 * (time.monotonic() - began))  # many files take long to look at
                if not (waiting or self._run.counts) or (began < due and waiting < FILES):
                    continue
                publisher.publish_all(lambda: progress_section(self._run))
                told = ""
            except Exception as problem:  # noqa: BLE001 - the run has days to go, and the end raises what lasts
                word = str(problem) if isinstance(problem, sdg.Error) else sdg.describe(problem)
                if word != told:
                    told = word
                    sdg.say(f"{word}. The run goes on, its files wait in {self._run.output.root}")
            due = time.monotonic() + interval
