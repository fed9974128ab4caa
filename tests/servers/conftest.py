"""What the tests of servers share."""

from __future__ import annotations

import pytest
from running import Job


@pytest.fixture(params=["lean", "aiohttp"])
def each_client(request: pytest.FixtureRequest, job: Job) -> str:
    """Runs of a test send their requests through one of the two HTTP clients."""
    job.env["SDG_HTTP"] = request.param
    return str(request.param)
