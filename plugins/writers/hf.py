"""Datasets of the Hugging Face Hub as output: `--output hf://datasets/OWNER/NAME[/FOLDER]`.

Chunks are written to the folder `spool` of the state. A run of a single rank publishes them in a thread that the engine
never waits for during the run. With many ranks, `sdg.py monitor` publishes them.
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
from sdg_plugins.common import hub
from sdg_plugins.common.files import file_writer
from sdg_plugins.common.options import number, program
from sdg_plugins.common.published import record
from sdg_plugins.common.ranks import progress_section
from sdg_plugins.publishing.publisher import Publisher
from sdg_plugins.publishing.quota import FILES

POLL = 5.0  # s between two checks for new files


def byte_count(value: str) -> int:
    """An option's size, such as 500MB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)i?B?", value, re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{value}: expected a size such as 500MB")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument(
        "--output-public",
        action="store_true",
        help="make a new repository public; default: private",
        identity=False,
    )
    parser.add_argument(
        "--max-file-size",
        metavar="SIZE",
        type=byte_count,
        help="merge chunks into files of at most this size, such as 500MB",
        identity=False,
    )
    parser.add_argument(
        "--publish-interval",
        metavar="S",
        type=number(float, 0.1),
        default=300.0,
        help=f"seconds between two commits, unless {FILES} files are waiting [300]",
        identity=False,
    )
    parser.add_argument(
        "--no-publish",
        action="store_true",
        help="do not publish, even with a single rank: `sdg.py monitor` does",
        identity=False,
    )


@sdg.hookimpl
def register_writers(register: sdg.RegisterWriters) -> None:
    register("hf", open_output)


@sdg.hookimpl
def observe(run: sdg.Run) -> contextlib.AbstractAsyncContextManager[None] | None:
    return publish_during(run) if run.options.writer == "hf" and not run.options.part else None


def open_output(run: sdg.Run) -> sdg.Writer:
    """Publish to a dataset on the Hugging Face Hub during the run."""
    publisher = Publisher(run)  # raises UsageError for an invalid URI
    with contextlib.closing(publisher):
        if publishes_itself(run):
            try:
                publisher.prepare(make=False)
                visibility = "private" if publisher.private else "public"
                sdg.say(f"publishing to {publisher.url} ({visibility})")
            except sdg.Error:
                raise
            except Exception as exc:
                if reason := hub.refusal(exc, publisher.address):
                    raise sdg.OutputError(reason) from exc
                if not hub.is_transient(exc):
                    raise
                sdg.say(f"{hub.transient_message(exc)}; the run starts, and publishes once the Hub is available again")
    writer: sdg.Writer = run.plugins.find("writers", file_writer(run.options)).factory(run)
    return writer


def publishes_itself(run: sdg.Run) -> bool:
    """True if this process publishes its files, rather than a monitor or its parent."""
    options = run.options
    parent = options.processes and not options.part and not options.any_rank
    return bool((options.world_size == 1 or parent) and not options.no_publish)


@contextlib.asynccontextmanager
async def publish_during(run: sdg.Run) -> AsyncIterator[None]:
    """Publish in the background during the run, and the remaining files at its end unless it was ended early."""
    if not publishes_itself(run):
        yield
        publishes = f"`{program()} monitor --output {run.options.output}` publishes them"
        sdg.say(f"the rows are in {run.output.root}; {publishes}")
        return
    thread = PublisherThread(run, asyncio.get_running_loop())
    thread.start()
    try:
        yield
        published = await thread.finish()
    except BaseException:  # the thread is abandoned: its files are kept
        sdg.say(f"files that are not published yet are kept in {run.output.root}: run the same command again")
        raise
    print(published, flush=True)


class PublisherThread(threading.Thread):
    """Publishes in the background. A daemon: an upload that hangs must not keep the process from ending."""

    def __init__(self, run: sdg.Run, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name=sdg.PUBLISHER, daemon=True)
        self._run, self._loop = run, loop
        self._run_ended = threading.Event()
        self._result: asyncio.Future[str] = loop.create_future()

    async def finish(self) -> str:
        """Wait until everything is published. Returns the message to print; raises what prevents publishing."""
        self._run_ended.set()
        return await self._result

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            with contextlib.closing(Publisher(self._run)) as publisher:
                self._publish_until_end(publisher)
                result = f"published {publisher.finish()}"
        except BaseException as exc:  # noqa: BLE001 - `finish` raises it
            self._deliver(self._result.set_exception, exc)
        else:
            self._deliver(self._result.set_result, result)

    def _deliver(self, settle: Callable[[Any], None], value: Any) -> None:
        """Settle the result in the event loop, unless the loop is closed or `finish` was canceled."""

        def unless_canceled() -> None:
            if not self._result.done():
                settle(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(unless_canceled)

    def _progress(self) -> str | None:
        """The progress for the card; None if this process has done nothing yet, and perhaps has nothing to do."""
        return progress_section(self._run) if self._run.counts.total() else None

    def _publish_until_end(self, publisher: Publisher) -> None:
        """Check now and then whether a commit is due. A failure is reported, and retried after the interval."""
        interval = self._run.options.publish_interval
        due, reported, pause = 0.0, "", min(POLL, interval)
        while not self._run_ended.wait(pause) and not self._run.stopping.is_set():
            began = time.monotonic()
            try:
                waiting = publisher.waiting()
                pause = max(min(POLL, interval), 20 * (time.monotonic() - began))  # with many files a check takes long
                if not reported:
                    record(self._run.state, interval=max(0.0, due - began))
                if not (waiting or self._run.counts.total()) or (began < due and waiting < FILES):
                    continue
                publisher.publish_all(self._progress)
                reported = ""
            except Exception as exc:  # noqa: BLE001 - the run may last for days, and `finish` raises what persists
                message = str(exc) if isinstance(exc, sdg.Error) else sdg.describe(exc)
                record(self._run.state, problem=message, until=time.time() + interval)
                if message != reported:
                    reported = message
                    sdg.say(f"{message}. The run continues; its files are kept in {self._run.output.root}")
            due = time.monotonic() + interval
