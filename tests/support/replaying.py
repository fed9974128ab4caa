"""Rollouts of a test's own, and the replay of responses that a killed run has stored."""

from __future__ import annotations

import contextlib
import sqlite3
import textwrap
from pathlib import Path
from typing import Any

from fake_server import FakeServer
from running import Job, wait_until

REGISTER = """
    import asyncio
    import os

    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("own", own)
"""

HELD = """
    import asyncio, functools, pathlib, sys

    import sdg

    original = sys.modules["{module}"].{function}

    @sdg.hookimpl
    def register_rollouts(register):
        register("held", held)

    @functools.wraps(original)
    async def held(document, generate, **resources):
        results = await original(document, generate, **resources)
        if pathlib.Path("hold").exists():
            await asyncio.Event().wait()
        return results
"""


def own(job: Job, body: str) -> None:
    """Make a rollout `own` of this source the job's."""
    job.options["plugin"] = job.plugin("own", textwrap.dedent(REGISTER) + textwrap.dedent(body))


def answers_in(state: Path) -> int:
    """Durable answers of requests."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/00000.sqlite3?mode=ro", uri=True, timeout=30)) as db:
        return int(db.execute("SELECT count(*) FROM requests WHERE length(key) = 20").fetchone()[0])


def requests_in(state: Path) -> int:
    """Durable responses and notes of rollouts."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/00000.sqlite3?mode=ro", uri=True, timeout=30)) as db:
        return int(db.execute("SELECT count(*) FROM requests").fetchone()[0])


def check_replay(job: Job, server: FakeServer, module: str, function: str, **options: Any) -> int:
    """Kill a run when all is answered and nothing written, and see that the next one asks nothing and writes the same.

    Returns how many requests the rollout makes.
    """
    before = job.options["plugin"] if module.startswith("sdg_plugin_files") else None
    held = job.plugin("held", HELD.format(module=module, function=function))
    options["plugin"] = [before, held] if before else [held]
    undisturbed = job.succeed(output="undisturbed", **options)
    count = len(server.requests)
    assert count
    assert not undisturbed.failures()

    server.forget()
    (job.folder / "hold").touch()
    running = job.start(**options)
    wait_until(lambda: len(server.answered) == count)
    wait_until(lambda: requests_in(job.output.state) == count)
    running.process.kill()
    running.finish()
    assert not job.output.data()

    (job.folder / "hold").unlink()
    server.forget()
    output = job.succeed(**options)
    assert server.requests == []
    assert output.data() == undisturbed.data()
    assert output.stats()["cache_hits"] == count
    return count
