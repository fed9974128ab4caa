"""Where requests go to: a scheme, host and port, with the addresses of the host and the connections that are idle."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import Generic, Protocol, TypeVar

CONNECTING = 512  # connections to a server that are made at once: it drops what it cannot accept soon
IDLE = 4.0  # s after which an idle connection is not used for a while: vLLM closes them after 5 s
LASTING = 6.0  # s after which it is used again, since the server has kept it
KEPT = 60.0  # s for which an idle connection is kept
BRISK = 0.25  # s of idleness after which it is worth a system call to see whether a connection still is idle
NAMES_KEPT = 10.0  # s for which the addresses of a host are remembered


class Kept(Protocol):
    """A connection that is kept for further requests.

    Attributes:
        usable: another request may be sent.
        idle_since: loop time of its last response.
    """

    usable: bool
    idle_since: float

    def disturbed(self) -> bool:
        """True if it is no longer idle."""

    def close(self) -> None:
        """Close it at once."""


C = TypeVar("C", bound=Kept)


class Origin(Generic[C]):
    """A scheme, host and port, its idle connections, and its addresses."""

    def __init__(self, secure: bool, host: str, port: int) -> None:
        self.secure, self.host, self.port = secure, host, port
        self.idle: deque[C] = deque()  # the last one used is on the right
        self.connecting = asyncio.Semaphore(CONNECTING)
        self._addresses: list[str] = []
        self._lookup: asyncio.Task[None] | None = None  # one for all connections that wait for it
        self._looked_up_at = 0.0

    def ready(self, now: float) -> C | None:
        """An idle connection that may be used; those that may not are closed."""
        while self.idle:
            connection = self.idle.pop()
            idle = now - connection.idle_since
            if connection.usable and (idle < BRISK or not (IDLE <= idle < LASTING or connection.disturbed())):
                return connection
            connection.close()
        return None

    def tidy(self, now: float) -> None:
        """Close the connections that have been idle for too long."""
        while self.idle and (now - self.idle[0].idle_since >= KEPT or not self.idle[0].usable):
            self.idle.popleft().close()

    def clear(self) -> int:
        """Close all idle connections; returns their number."""
        number = len(self.idle)
        while self.idle:
            self.idle.pop().close()
        return number

    async def addresses(self) -> list[str]:
        """The addresses of the host; each connection begins with another one. Raises OSError."""
        loop = asyncio.get_running_loop()
        lookup = self._lookup
        known = lookup and lookup.done() and self._addresses and loop.time() - self._looked_up_at < NAMES_KEPT
        if lookup is None or (lookup.done() and not known):
            lookup = self._lookup = loop.create_task(self._look_up(loop))
            lookup.add_done_callback(lambda task: task.cancelled() or task.exception())
        if not lookup.done():
            await asyncio.shield(lookup)
        first, *others = self._addresses
        self._addresses = [*others, first]
        return [first, *others]

    async def _look_up(self, loop: asyncio.AbstractEventLoop) -> None:
        self._addresses = []
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        self._addresses, self._looked_up_at = [str(address[0]) for *_, address in found], loop.time()

    def avoid(self, address: str) -> None:
        """Forget an address that does not respond, until the name is looked up again, if there are others."""
        if len(self._addresses) > 1 and address in self._addresses:
            self._addresses.remove(address)
