"""What the benches share: processes that are measured, a server that ends with its bench, and a table of results.

    python tests/bench            all benches, one table
    python tests/bench --quick    the same in a few minutes, less exact

This module imports nothing heavy: on Linux the peak memory of a child includes what its parent had when it started it.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SDG = HERE.parents[1] / "sdg.py"
AddOptions = Callable[[argparse.ArgumentParser], None]


class BenchError(Exception):
    """A measurement that cannot be trusted: something failed, or rows are missing."""


@dataclass(frozen=True)
class Result:
    """One line of the table. Without bounds it is there for information."""

    name: str
    value: float
    unit: str = "x"
    at_least: float | None = None
    aim: float | None = None
    more_is_better: bool = True
    note: str = ""

    def reaches(self, bound: float) -> bool:
        """Tell whether the value is at least as good as a bound."""
        return self.value >= bound if self.more_is_better else self.value <= bound

    def verdict(self) -> str:
        """Return one word for the last column."""
        if self.at_least is None or self.aim is None:
            return ""
        if self.reaches(self.aim):
            return "aim"
        return "ok" if self.reaches(self.at_least) else "MISSED"


@dataclass(frozen=True)
class Finished:
    """A process that has ended, in unix time, seconds of CPU time and bytes; `busy` is the CPU time of the machine."""

    started: float
    ended: float
    cpu_seconds: float
    peak_memory: int
    busy: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started

    def cores(self, server: float) -> str:
        """Tell which part of the cores it used, the server with some seconds of CPU time, and all other processes."""
        others = max(0.0, self.busy - self.cpu_seconds - server)
        shares = [part / self.seconds for part in (self.cpu_seconds, server, others)]
        return f"cores: client {shares[0]:.2f}, server {shares[1]:.2f}, others {shares[2]:.2f} of {os.cpu_count()}"


def busy_seconds() -> float:
    """Return the CPU time that all processes of the machine have ever used; 0 if it is not known."""
    try:
        times = [int(time) for time in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(times) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, str]:
    """Return the environment for what is measured: this one without what would change a run."""
    unwanted = ("SLURM_", "OPENAI_", "SDG_", "PYTHONDONTWRITEBYTECODE")
    names = [name for name in os.environ if not name.startswith(unwanted) and not name.lower().endswith("_proxy")]
    return {"HF_HUB_OFFLINE": "1"} | {name: os.environ[name] for name in names}


def run(
    command: Sequence[object],
    folder: Path,
    timeout: float = 3600,
    env: Mapping[str, str] | None = None,
    files: int | None = None,
) -> Finished:
    """Run a command in a folder to its end; it and what it started are stopped if it takes too long.

    `files` is its limit of open files, and that of each process that it starts.
    """
    words = [str(word) for word in command]
    if files:
        words = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *words]
    with tempfile.TemporaryFile(dir=folder) as log:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        started, busy = time.time(), busy_seconds()
        given = {**environment(), **(env or {})}
        process = subprocess.Popen(words, cwd=folder, env=given, start_new_session=True, **pipes)
        timer = threading.Timer(timeout, stop, [process.pid])
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            ended = time.time()
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            stop(process.pid)
            process.wait()
        if process.returncode:
            log.seek(0)
            tail = log.read().decode(errors="replace")[-2000:]
            raise BenchError(f"exit status {process.returncode} of {' '.join(words)}\n{tail}")
    scale = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return Finished(started, ended, cpu, usage.ru_maxrss * scale, busy_seconds() - busy)


def stop(group: int) -> None:
    """Kill a process group that may have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


class Server:
    """The instant server, as seen from a bench."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method: str, target: str) -> dict[str, float]:
        """Send a request and return the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, target)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def reset(self, limit: int = 0) -> None:
        """Forget all counts."""
        self.request("POST", f"/reset?limit={limit}")

    def stats(self, requests: int | None = None) -> dict[str, float]:
        """Return the counts, and insist on their number of requests."""
        stats = self.request("GET", "/stats")
        if requests is not None and stats["requests"] != requests:
            raise BenchError(f"the server got {stats['requests']} requests instead of {requests}")
        return stats


@contextlib.contextmanager
def instant_server(*options: object) -> Iterator[Server]:
    """Run the instant server in a process of its own, which ends with this one whatever happens."""
    command = [sys.executable, HERE / "instant_server.py", "--until-eof", *options]
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            yield Server(json.loads(process.stdout.readline())["port"])
        finally:
            stop(process.pid)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Give a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sdg-bench-") as folder:
        yield Path(folder)


def make_input(path: Path, count: int, size: int) -> Path:
    """Write an input (see corpus.py)."""
    run([sys.executable, HERE / "corpus.py", "make", path, "--documents", count, "--bytes", size], path.parent)
    return path


def expect_rows(folder: Path, count: int) -> None:
    """Insist on the number of rows below a folder: a speed with lost rows does not count."""
    command = [sys.executable, str(HERE / "corpus.py"), "count", str(folder)]
    found = int(subprocess.check_output(command, timeout=600))
    if found != count:
        raise BenchError(f"{found} rows instead of {count} in the output")


def run_sdg(
    folder: Path,
    source: Path,
    output: str,
    server: Server,
    concurrency: int,
    *options: object,
    env: Mapping[str, str] | None = None,
    files: int | None = None,
) -> Finished:
    """Run sdg on an input against the server; `output` is a name within the folder."""
    command = [sys.executable, SDG, "--plugin", "summarize", "--input", source, "--base-url", server.url]
    command += ["--output", folder / output, "--max-concurrent-generations", concurrency, "--no-progress", *options]
    return run(command, folder, env=env, files=files)


def say(text: str) -> None:
    """Tell on standard error what is going on."""
    print(text, file=sys.stderr, flush=True)


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Return the smallest and the largest of several values."""
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else "one run"


def number(value: float | None) -> str:
    """Write a number with three significant digits."""
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def table(results: Sequence[Result]) -> str:
    """Return the results as a table in Markdown."""
    lines = [["measured", "value", "", "at least", "aim", "", "note"]]
    for r in results:
        lines.append([r.name, number(r.value), r.unit, number(r.at_least), number(r.aim), r.verdict(), r.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def interrupt(_signal: int, _frame: object) -> None:
    """Let SIGTERM unwind like Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt


def defaults(add_options: AddOptions, changed: Mapping[str, object]) -> argparse.Namespace:
    """Return a bench's options with some of them changed."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | changed)


def main(description: str, add_options: AddOptions, measure: Callable[[argparse.Namespace], list[Result]]) -> int:
    """Run one bench from the command line."""
    signal.signal(signal.SIGTERM, interrupt)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    try:
        results = measure(options)
    except BenchError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    print(heading(), table(results), sep="\n\n")
    return 0


def heading() -> str:
    """Name what the numbers depend on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
