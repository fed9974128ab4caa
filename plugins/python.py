"""`sdg.run`: a run as a call in Python, in a script or a notebook, on documents in memory or in files."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import sys
import tempfile
import threading
import types
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import sdg
from sdg_plugins.commands.jobs import Present, record_end, run_all
from sdg_plugins.commands.stop import Stop
from sdg_plugins.common.command_line import Config, as_arguments, parse_with
from sdg_plugins.common.ending import run_to_the_end
from sdg_plugins.common.options import refusing
from sdg_plugins.common.progress import Course, progress
from sdg_plugins.common.recorded import MEMORY
from sdg_plugins.common.records import Records
from sdg_plugins.common.statistics import heartbeat, rank_statistics, rows_in, sum_statistics
from sdg_plugins.common.tables import TableReader, without_views
from sdg_plugins.common.versions import note_run, version_of_function

if TYPE_CHECKING:
    import pyarrow as pa


class Result:
    """What a run has made.

    Attributes:
        failed: the records of failed documents: `{"id", "error", "error_type", "attempts", "document"}`.
        stats: the figures, as in `stats.json`.
        output: the folder or URI of the rows; None if they are only here.
    """

    def __init__(self, run: sdg.Run, output: str | None) -> None:
        self.output = output
        self.stats: dict[str, Any] = sum_statistics(rank_statistics(run.state))
        self._figures = {"rows": rows_in(self.stats, run.options)}
        self._figures |= {name: self.stats.get(name, 0) for name in ("filtered", "failed")}
        records = Records(run)
        self.failed = [{"id": record.id, **(record.failure or {})} for record in records.failed()]
        self._table: pa.Table | None = None
        self._load = functools.partial(_table_of, records, list(records.written), list(records.waiting()))
        if output is None:
            self.table()  # before the folder is deleted

    def table(self) -> pa.Table:
        """All rows as an Arrow table, in the order of the input."""
        if self._table is None:
            self._table = self._load()
        return self._table

    def rows(self) -> list[dict[str, Any]]:
        """All rows as dicts, in the order of the input."""
        from sdg_plugins.common.values import rows_of

        return rows_of(self.table())

    def __len__(self) -> int:
        return int(self.table().num_rows)

    def __repr__(self) -> str:
        figures = ", ".join(f"{number:,} {name}" for name, number in self._figures.items())
        return f"<sdg.run: {figures}{f', in {self.output}' if self.output else ''}>"


def _table_of(records: Records, written: list[sdg.Chunk], waiting: list[tuple[sdg.Chunk, pa.Table]]) -> pa.Table:
    import pyarrow as pa

    parts = [*records.tables(written), *waiting]
    tables = [table for _, table in sorted(parts, key=lambda part: part[0].index)]
    if not tables:
        return pa.table({})
    return pa.concat_tables(tables, promote_options="permissive").replace_schema_metadata(None)


def run(
    rollout: sdg.Rollout | str,
    input: str | Path | Sequence[Mapping[str, Any]] | Any = None,
    output: str | Path | None = None,
    *,
    name: str | None = None,
    progress: bool = True,
    **options: Any,
) -> Result:
    """Run a rollout on documents, and return the rows.

    Args:
        rollout: an async function of (document, generate), the name of a rollout, or a plugin file.
        input: as for `--input`, a list of dicts, an Arrow table, a `datasets.Dataset`, or a data frame; None for the
            demo's documents.
        output: as for `--output`; None for rows in memory.
        name: without `output`: keep the state in `.sdg/runs/NAME`, so that the same call continues after an
            interruption instead of starting again.
        progress: show a progress bar.
        options: those of the command, with underscores: `max_tokens=200`, `base_url="http://localhost:8000"`.

    Raises:
        sdg.Error: what would have ended the command; its subclass says what kind of problem it is, and its attribute
            `result` has what was made before.
        KeyboardInterrupt: completed responses are saved if there is an `output` or a `name`.
    """
    _check_call(output, name, options)
    with contextlib.ExitStack() as stack:
        folder = str(output) if output is not None else ""
        if output is None:
            folder = f".sdg/runs/{name}" if name else stack.enter_context(tempfile.TemporaryDirectory(prefix="sdg-"))
        config = _config_of(rollout, input, {"output": folder, "no-progress": not progress, **options})
        config.plugins.quiet = output is None
        shown = None if output is None else str(output)
        ended: list[sdg.Run] = []
        try:
            _in_thread(config, ended)
        except sdg.Error as exc:
            with contextlib.suppress(sdg.Error):  # what ended the run says more, for example that the input is broken
                exc.result = Result(ended[0], shown) if ended else None
            raise
        finally:
            if callable(rollout):
                note_run(rollout, config.plugins.rollouts[config.options.rollout].version)
        return Result(ended[0], shown)


def _check_call(output: str | Path | None, name: str | None, options: Mapping[str, Any]) -> None:
    """Raise UsageError for what the command has and a call has not, or a name that is no name of a folder."""
    if name and output is not None:
        raise sdg.UsageError("name=… keeps the state of a run without an output: give name or output, not both")
    if name and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise sdg.UsageError(f"name={name!r}: expected the name of a folder below .sdg/runs")
    if options.get("config") is not None:
        raise sdg.UsageError("config=… is not read by sdg.run: give the options in the call, **tomllib.load(file)")
    if options.get("preview") is not None:
        raise sdg.UsageError("preview=… is for the terminal: run a few documents, such as max_documents=3")


# ── The run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_thread(config: Config, ended: list[sdg.Run]) -> None:
    """Run a config in a thread of its own, because the caller's may have a running event loop.

    Args:
        config: what to run.
        ended: its run is added when the engine has ended, even if not all went well.
    """
    problems: list[BaseException] = []
    over = threading.Event()  # a thread's own `join` breaks when it is interrupted
    stops: list[tuple[asyncio.AbstractEventLoop, Stop]] = []
    course = Course([config.name])

    @contextlib.asynccontextmanager
    async def shown(engine: sdg.Engine, stop: Stop) -> AsyncIterator[None]:
        async with progress(engine, course), heartbeat(engine):
            yield
        await record_end(engine, stop)
        ended.append(engine.run)

    def work() -> None:
        try:
            run_to_the_end(run_all([config], cast("Present", shown), lambda stop: stops.append((_loop(), stop))))
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread
            problems.append(exc)
        finally:
            over.set()

    with _collector_restored():
        thread = threading.Thread(target=work, name="sdg-run")
        thread.start()
        interrupted = _wait(over, stops)
        thread.join()
    if interrupted:
        raise KeyboardInterrupt(str(problems[0]) if problems else "") from None
    if problems:
        raise sdg.first_cause(problems[0])


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def _wait(over: threading.Event, stops: list[tuple[asyncio.AbstractEventLoop, Stop]]) -> bool:
    """Wait for a run; Ctrl-C stops it, a second one at once. Returns whether there was one."""
    import signal

    interrupted = False
    while not over.is_set():
        try:
            over.wait()
        except KeyboardInterrupt:
            interrupted = True
            for loop, stop in stops:
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(stop, sdg.Interrupted(signal.SIGINT))
    return interrupted


@contextlib.contextmanager
def _collector_restored() -> Iterator[None]:
    """Undo what a run does to the garbage collector of its process."""
    thresholds = gc.get_threshold()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


# ── What is given as values ──────────────────────────────────────────────────────────────────────────────────────────


def _config_of(rollout: Any, input: Any, options: Mapping[str, Any]) -> Config:
    """The config of a call. Raises UsageError, InputError, PluginError."""
    given = {key.replace("_", "-"): value for key, value in options.items() if value is not None}
    specs = given.pop("plugin", [])
    specs = [*([specs] if isinstance(specs, str | Path) else specs), *([] if callable(rollout) else [rollout])]
    specs = [str(spec) for spec in specs]
    plugins, named = sdg.Plugins.load(specs)
    if callable(rollout):
        named = _add_function(plugins, rollout)
    if input is not None and not isinstance(input, str | Path):
        _add_module(plugins, f"{MEMORY}_input", reader=TableReader(_table_from(input)))
        input = f"{MEMORY}://rows"
    if input is not None:
        given["input"] = str(input)
    with refusing():
        config = parse_with(plugins, named or "summarize", as_arguments({**given, "plugin": specs}, []))
    if config.options.processes:
        raise sdg.UsageError(
            "--processes starts the command again in several processes, which a function of this one cannot do: "
            "write the rollout to a plugin file, and run it with sdg.py --plugin FILE.py --processes N"
        )
    return config


def _add_function(plugins: sdg.Plugins, function: Any) -> str:
    """Register a function as a rollout; returns its name. See `version_of_function`."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        message = "a lambda cannot be a rollout: write an `async def` function of (document, generate)"
        raise sdg.PluginError(message)
    if isinstance(function, type):
        raise sdg.PluginError(f"the class {name} cannot be a rollout: give an object of it, or an `async def` function")
    plugins.rollouts.pop(name, None)
    version = version_of_function(function)
    file = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
    _add_module(plugins, name, version, file, rollout=function)
    return name


def _add_module(plugins: sdg.Plugins, name: str, version: str = "", file: str | None = None, **things: Any) -> None:
    """Register a rollout, or a reader under the scheme MEMORY, as a plugin module of its own."""
    module: Any = types.ModuleType(f"sdg_called.{name}")
    module.__file__ = file
    if "rollout" in things:
        module.register_rollouts = sdg.hookimpl(lambda register: register(name, things["rollout"]))
    else:
        module.register_readers = sdg.hookimpl(lambda register: register(MEMORY, lambda run: things["reader"]))
    sys.modules[module.__name__] = module  # the engine finds a rollout's file there
    plugins.add(module, version, "python")


def _table_from(given: Any) -> pa.Table:
    """Documents in memory as an Arrow table. Raises InputError."""
    import pyarrow as pa

    if isinstance(given, pa.Table | pa.RecordBatch):
        table = given if isinstance(given, pa.Table) else pa.Table.from_batches([given])
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        table = _from_rows(given)
    elif isinstance(given, Mapping):  # a datasets.DatasetDict, or columns
        kind = type(given).__name__
        raise sdg.InputError(f"the input is a {kind}: give one of its splits, or a table: pyarrow.table(columns)")
    elif hasattr(given, "with_format") and hasattr(given, "column_names"):  # datasets.Dataset
        if not hasattr(given, "__len__"):
            raise sdg.InputError("the input is an iterable dataset: give it as a path, hf://datasets/OWNER/NAME")
        table = given.with_format("arrow")[:]
    elif hasattr(given, "__arrow_c_stream__"):  # data frames
        try:
            table = pa.table(given)
        except pa.ArrowException as exc:
            message = f"the input is a {type(given).__name__}: give a data frame, such as df[['text']]"
            raise sdg.InputError(message) from exc
    else:
        kinds = "a path, a list of dicts, an Arrow table, a datasets.Dataset or a data frame"
        raise sdg.InputError(f"the input is a {type(given).__name__}, expected {kinds}")
    if not table.num_rows:
        raise sdg.InputError("the input is empty: it has no rows")
    return without_views(table.replace_schema_metadata(None).combine_chunks())


def _from_rows(rows: Sequence[Any]) -> pa.Table:
    import pyarrow as pa

    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            hint = "; for texts write [{'text': text} for text in texts]" if isinstance(row, str) else ""
            raise sdg.InputError(f"item {i} of the input is a {type(row).__name__}, expected a dict{hint}")
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[str(name)] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, ValueError, OverflowError) as exc:
            message = f"the input's column {name!r} has values of several types, or an invalid one: {exc}"
            raise sdg.InputError(message) from exc
    return pa.table(columns)
