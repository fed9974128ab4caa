"""Runs `sdg.py` as a subprocess, as people run it, and reads what it left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forking
import pyarrow as pa
import pyarrow.parquet as pq
from fake_server import FakeServer

ROOT = Path(__file__).resolve().parents[2]

ECHO = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("echo", echo)

    async def echo(document, generate):
        \"\"\"Ask what the document says.\"\"\"
        return await generate(document.messages or document.text)
"""


def rollout(body: str) -> str:
    """A plugin with one rollout, whose body is given."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return (
        "import asyncio\nimport sdg\n\n@sdg.hookimpl\ndef register_rollouts(register):\n    register('mine', mine)\n\n"
        f"async def mine(document, generate):\n    '''Mine.'''\n{lines}"
    )


# Signs that something went wrong which nobody meant to show.
SIGNS_OF_A_BUG = (
    "Traceback",
    "was never awaited",
    "was never retrieved",
    "was destroyed but it is pending",
    "Unclosed",
    "ResourceWarning",
    "RuntimeWarning",
    "Exception ignored",
)


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Return as soon as the condition holds; fail if it does not within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.005)


@dataclass(frozen=True)
class Finished:
    """How a run of `sdg.py` ended."""

    rc: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]

    @property
    def message(self) -> str:
        """The last thing said on standard error."""
        return self.lines[-1] if self.lines else ""

    def says(self, *words: str) -> bool:
        """Whether the last line has all these words, and is the only line of the error (usage lines aside)."""
        missing = [word for word in words if word.lower() not in self.message.lower()]
        assert not missing, f"no {missing} in {self.message!r}; all of it:\n{self.stderr}"
        others = [line for line in self.lines[:-1] if not line.startswith(("usage:", " "))]
        assert not others, f"more than one line:\n{self.stderr}"
        return True


def usual_environment() -> dict[str, str]:
    """An environment without a key, a proxy and a cluster."""
    unwanted = ("AWS_", "OPENAI_", "SLURM_", "SDG_", "HF_", "PYTHON")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(unwanted) and not name.lower().endswith("_proxy")
    }
    warnings = "default::ResourceWarning,default::RuntimeWarning"
    path = str(ROOT / "tests" / "support" / "without")
    return {**kept, "PYTHONWARNINGS": warnings, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": path}


class Started:
    """A run of `sdg.py` in progress."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
        self.began = time.monotonic()
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        how: Any = {"cwd": folder, "env": env, "text": True, "errors": "replace", **pipes}
        self.process: subprocess.Popen[str]
        if forking.needs_interpreter(env, usual_environment()):
            self.process = subprocess.Popen([sys.executable, forking.PROGRAM, *arguments], **how)
        else:
            self.process = forking.Fork([forking.PROGRAM, *arguments], **how)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def finish(self, timeout: float = 180.0, bugs: bool = False) -> Finished:
        """Wait for the end. `bugs` allows what is otherwise taken for the sign of a bug."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGABRT)  # faulthandler says where it hangs
            stdout, stderr = self._rest()
            raise AssertionError(f"still running after {timeout} s:\n{stdout}\n{stderr}") from None
        finished = Finished(self.process.returncode, stdout, stderr, time.monotonic() - self.began)
        signs = [sign for sign in SIGNS_OF_A_BUG if sign in stderr]
        assert bugs or not signs, f"{signs} in standard error:\n{stderr}"
        return finished

    def _rest(self) -> tuple[str, str]:
        """What it still writes. A process that it has left behind may hold the streams for ever."""
        try:
            return self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired as exc:
            self.process.kill()
            return tuple((text or b"").decode(errors="replace") for text in (exc.stdout, exc.stderr))  # type: ignore[return-value]

    def close(self) -> None:
        if self.running:
            self.process.kill()
        self._rest()


@dataclass(frozen=True)
class Output:
    """What a run left in its output folder."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / ".sdg"

    def table(self) -> pa.Table:
        """All data files in the order of their names; it is an error if their schemas differ."""
        tables = [pq.read_table(self.path / name) for name in self.written()]
        return pa.concat_tables(tables)

    def rows(self) -> list[dict[str, Any]]:
        return self.table().to_pylist() if self.written() else []

    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows()]

    def texts(self) -> dict[str, list[str]]:
        """The texts of each document's results, by id."""
        return {row["id"]: [result["text"] for result in row["rollout_results"]] for row in self.rows()}

    def failures(self) -> list[dict[str, Any]]:
        files = sorted((self.path / "failed").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]

    def failed(self) -> dict[str, dict[str, Any]]:
        records = self.failures()
        by_id = {record["id"]: record for record in records}
        assert len(by_id) == len(records), f"a document failed twice: {records}"
        return by_id

    def stats(self) -> dict[str, Any]:
        stats = json.loads((self.state / "stats.json").read_text())
        assert isinstance(stats, dict)
        return stats

    def data(self) -> dict[str, bytes]:
        """The data files by name, as bytes."""
        return {name: content for name, content in self.files().items() if name.startswith("data/")}

    def written(self) -> list[str]:
        """The data files that are whole, without looking into them: for runs that are still at it."""
        return [str(path.relative_to(self.path)) for path in sorted(self.path.glob("data/[!.]*"))]

    def files(self) -> dict[str, bytes]:
        """All files by name, as bytes, the state aside."""
        files = [path for path in self.path.rglob("*") if path.is_file() and self.state not in path.parents]
        return {str(path.relative_to(self.path)): path.read_bytes() for path in sorted(files)}

    def durable(self, rank: int = 0) -> set[int]:
        """Rows of the input that a crash cannot undo: in a chunk's file, or with an answer in the state of a rank."""
        uri = f"file:{self.state}/{rank:05d}.sqlite3?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as state:
            chunks = state.execute("SELECT chunk, start, count, written FROM chunks").fetchall()
            kept = "SELECT id FROM documents UNION SELECT document FROM requests"
            starts = {chunk: start for chunk, start, _, _ in chunks}
            rows = {starts[id_ >> 32] + (id_ & 0xFFFFFFFF) for (id_,) in state.execute(kept)}
        return rows.union(*[range(start, start + count) for _, start, count, written in chunks if written])


class Sdg:
    """Runs `sdg.py` in a folder, with an environment that has no key, no proxy and no cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Started] = []

    def environment(self, **env: str) -> dict[str, str]:
        return {**usual_environment(), **env}

    def start(self, *arguments: object, **env: str) -> Started:
        started = Started([str(argument) for argument in arguments], self.folder, self.environment(**env))
        self.started.append(started)
        return started

    def __call__(self, *arguments: object, timeout: float = 180.0, bugs: bool = False, **env: str) -> Finished:
        return self.start(*arguments, **env).finish(timeout, bugs)

    def close(self) -> None:
        for started in self.started:
            started.close()


def program(source: str) -> list[str]:
    """A program for a process of its own, which uses a library such as `datasets`.

    It leaves without the end of the interpreter, in which native threads of such libraries can abort it.
    """
    leave = "import os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
    return [sys.executable, "-c", f"{textwrap.dedent(source)}\n{leave}\n"]


class Job:
    """A run with defaults: `job(records_per_chunk=2)` is `sdg.py ... --records-per-chunk 2`; None leaves one out."""

    def __init__(self, folder: Path, server: FakeServer | None) -> None:
        self.folder = folder
        self.sdg = Sdg(folder)
        self.server: Any = server
        self.env: dict[str, str] = {}  # of every run: see `FakeHub.environment`
        self.options: dict[str, Any] = {"base_url": server and server.url, "output": "output", "no_progress": True}
        self.options["max_failure_rate"] = 1  # a test of failures judges them itself
        self.options["plugin"] = self.plugin("echo", ECHO)

    def plugin(self, name: str, source: str) -> Path:
        """Write a plugin file."""
        path = self.folder / f"{name}.py"
        path.write_text(textwrap.dedent(source))
        return path

    def documents(self, *texts: str) -> None:
        """Write the input: a document per text, named by its text."""
        self.input([{"id": text, "text": text} for text in texts])

    def input(self, rows: list[dict[str, Any]] | pa.Table, name: str = "input.parquet", **options: Any) -> Path:
        """Write a parquet or jsonl file and make it the input."""
        path = self.folder / name
        if name.endswith(".jsonl"):
            assert isinstance(rows, list)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path, **options)
        self.options["input"] = path
        return path

    def command_line(self, options: dict[str, Any]) -> list[str]:
        arguments: list[str] = []
        for name, value in {**self.options, **options}.items():
            flag = "--" + name.replace("_", "-")
            for item in value if isinstance(value, list) else [value]:
                if item is True:
                    arguments.append(flag)
                elif item is not None:
                    arguments += [flag, str(item)]
        return arguments

    def start(self, env: dict[str, str] | None = None, **options: Any) -> Started:
        return self.sdg.start(*self.command_line(options), **{**self.env, **(env or {})})

    def __call__(
        self, env: dict[str, str] | None = None, timeout: float = 180.0, bugs: bool = False, **options: Any
    ) -> Finished:
        return self.start(env, **options).finish(timeout, bugs)

    def succeed(self, **options: Any) -> Output:
        """Run to exit 0 and return the output."""
        finished = self(**options)
        assert finished.rc == 0, finished
        return self.output_of(**options)

    def verify(self, **options: Any) -> Finished:
        return self.sdg("verify", "--output", self.output_of(**options).path, **self.env)

    def output_of(self, **options: Any) -> Output:
        return Output(self.folder / {**self.options, **options}["output"])

    @property
    def output(self) -> Output:
        return self.output_of()


def documents(count: int) -> list[dict[str, str]]:
    """Rows that differ."""
    return [{"id": f"d{number:04}", "text": f"document {number}"} for number in range(count)]
