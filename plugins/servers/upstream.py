"""The state of one server, shared by the pool, the engine and the plugin that launched it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdg_plugins.servers.limit import Limit
    from sdg_plugins.servers.pool import Quarantine


class Upstream:
    """State of one server, shared by the pool, the engine and the plugin that launched it.

    A plugin that launches servers yields these. It calls `rise` when the server is ready, `fall` when it no longer is,
    `give_up` when it will not come back, and describes in `status` what is happening meanwhile. While the server is
    down no request is sent to it, and none times out.

    Args:
        url: the API root: ends in /v1, or in whatever the endpoint has instead.
        examine: `await examine(crashes)` returns True if a failure just now was the server's death rather than one
            request's; `crashes` is their number when the request was sent. None for servers that we did not launch.
        model: the name by which requests find the model, if it is known before the server is up.

    Attributes:
        active: requests in flight.
        answers: responses received; with `progressed` it tells the plugin whether the server still works.
        progressed: loop time of the last response or token, or of the first request after an idle period.
        failures: failed requests in a row, of requests that were sent one after the other.
        overloaded_at: loop time since which it has had no capacity for any request; 0 if it has some.
        until: loop time before which no request is sent, for this `reason`.
        convicted: requests that have crashed the server with no other request in flight.
    """

    limit: Limit  # set by the pool
    quarantine: Quarantine

    def __init__(
        self, url: str, examine: Callable[[int], Awaitable[bool]] | None = None, model: str | None = None
    ) -> None:
        self.url, self.examine, self.model = url, examine, model
        self.up = asyncio.Event()
        self.gone = False
        self.status = ""
        self.crashes = self.active = self.answers = self.failures = self.convicted = 0
        self.reason = ""
        self.progressed = self.until = self.failed_at = self.overloaded_at = 0.0
        self.changed: Callable[[bool], None] = lambda risen: None  # set by the pool
        if examine is None:
            self.up.set()

    def rise(self) -> None:
        """The server is ready for requests."""
        self.failures, self.overloaded_at = 0, 0.0
        self.until = 0.0
        self.up.set()
        self.changed(True)

    def fall(self, crashed: bool) -> None:
        """The server takes no requests now. `crashed`: those in flight are lost, and one of them may be the cause."""
        if self.up.is_set():
            self.crashes += crashed
        self.up.clear()

    def give_up(self) -> None:
        """The server will not come back: the other servers take over its work."""
        self.gone = True
        self.changed(False)
