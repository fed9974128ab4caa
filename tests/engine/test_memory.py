"""Memory is bounded in bytes, whatever the size of responses."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_server import FakeServer
from running import Job, documents

PEAK = """
    import contextlib, pathlib, sdg

    @sdg.hookimpl
    def observe(run):
        return record(run)

    @contextlib.asynccontextmanager
    async def record(run):
        yield
        status = pathlib.Path("/proc/self/status").read_text()
        pathlib.Path(run.options.output, "peak").write_text(status.partition("VmHWM:")[2].split()[0])  # KiB
"""


@pytest.mark.slow
@pytest.mark.parametrize("client", ["lean", "aiohttp"])
@pytest.mark.parametrize("rollouts", [1, 4])
def test_four_hundred_responses_of_a_megabyte_fit_into_600_megabytes(
    job: Job, server: FakeServer, client: str, rollouts: int
) -> None:
    server.behave(lambda payload, n: "one million characters " * 43_500)
    job.options["plugin"] = [job.plugin("peak", PEAK), job.options["plugin"]]
    job.input(documents(400 // rollouts))

    finished = job({"SDG_HTTP": client}, rollouts_per_document=rollouts, timeout=300)

    assert finished.rc == 0, finished
    output = job.output

    assert len(output.rows()) == 400 // rollouts
    assert int(Path(output.path, "peak").read_text()) <= 600_000
