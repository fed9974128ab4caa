"""What the tests share: a real server on loopback, and `sdg.py` as a subprocess in a fresh folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

# Before anything imports the Hub's client, which reads them once.
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import forking
from fake_hub import FakeHub
from fake_server import FakeServer
from huggingface_hub.utils import close_session
from running import Job, Sdg

import sdg as _  # noqa: F401 - makes `sdg_plugins` that of this checkout, whatever is installed

# A script's background jobs ignore Ctrl-C, and so would all that is started here: some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["example_plugin"]  # a package of its own: test_example_plugin.py installs it, and runs its tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", metavar="FILE", help="append the CPU seconds of each test to a file, with its processes")


def cpu_seconds() -> float:
    """Of this process and those that have ended."""
    return sum(os.times()[:4]) + forking.seconds


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = cpu_seconds()
    result = yield
    if file := item.config.getoption("--cpu"):
        seconds = cpu_seconds() - before
        with open(file, "a") as lines:
            lines.write(f"{seconds:7.2f} {item.nodeid}\n")
    return result


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server
    assert not server.errors


@pytest.fixture
def servers() -> Iterator[Callable[[], FakeServer]]:
    """Starts as many more servers as a test wants."""
    started: list[FakeServer] = []

    def start() -> FakeServer:
        started.append(FakeServer().__enter__())
        return started[-1]

    yield start
    for server in started:
        server.__exit__()
        assert not server.errors


@pytest.fixture
def run_sdg(tmp_path: Path) -> Iterator[Sdg]:
    """Calls `sdg.py` with plain arguments; keywords are environment variables."""
    sdg = Sdg(tmp_path)
    yield sdg
    sdg.close()


@pytest.fixture
def job(tmp_path: Path, server: FakeServer) -> Iterator[Job]:
    """A run of an echo rollout against the server; a test writes the input."""
    job = Job(tmp_path, server)
    yield job
    job.sdg.close()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """The Hub, on loopback, without datasets and tokens; `job.env |= hub.environment(job.folder, token)`."""
    with FakeHub() as hub:
        yield hub
        close_session()
    assert not hub.errors
