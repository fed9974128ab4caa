"""A bound on the bytes of responses in memory: while there are more, only one response is received.

What counts are the bytes of responses that are not received in full, and those that the store has not made durable.
Requests in flight cannot be taken back, so 500 responses of a megabyte may come at once, faster than a disk takes them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import sdg

MOST = 48 << 20  # bytes above which only one response is received; all are again at half of it


class Receiving(Protocol):
    """A response that is being received."""

    def pause(self) -> None:
        """Receive nothing for now. May be called again."""

    def resume(self) -> None:
        """Go on. May be called without a pause."""


class Brake:
    """Pauses the responses of one client.

    The response that began first is paused only while the store has much that is not durable, which it makes so
    whatever happens here. So there is always something that goes on, and a response of any size is received.

    Args:
        most: bytes above which all other responses are paused.

    Attributes:
        most: as above.
        on: they are paused.
        stores: each returns the bytes of responses that are not durable; call `look` when they become fewer.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._requests: dict[Receiving, None] = {}
        self._begun: dict[Receiving, int] = {}  # bytes of those that have any
        self._bytes = 0
        self.on = False
        self.stores: list[Callable[[], int]] = []

    def unsaved(self) -> int:
        """The bytes of responses that are not durable."""
        return sum(store() for store in self.stores)

    def begin(self, response: Receiving) -> None:
        """A request is sent, or its response begins."""
        self._requests[response] = None
        if self.on:
            response.pause()

    def grew(self, response: Receiving, size: int) -> None:
        """Some bytes of a response have come, and are kept."""
        self._begun[response] = self._begun.get(response, 0) + size
        self._bytes += size
        if self.on and response is not next(iter(self._begun)):
            response.pause()
        elif self.on:
            self._lead()
        elif self._bytes + self.unsaved() > self.most:
            self.on = True
            for other in self._requests:
                other.pause()
            self._lead()

    def _lead(self) -> None:
        """Let the first response go on, or wait for the store."""
        for first in self._begun:
            (first.pause if self.unsaved() > self.most // 2 else first.resume)()
            break

    def end(self, response: Receiving) -> None:
        """A response was received and handed on, or there will be none."""
        del self._requests[response]
        self._bytes -= self._begun.pop(response, 0)
        if self.on:
            response.resume()  # its connection is used again
            self.look()

    def look(self) -> None:
        """There may be fewer bytes than before."""
        if not self.on:
            return
        self.on = self._bytes + self.unsaved() > self.most // 2
        if self.on:
            self._lead()
            return
        for response in self._requests:
            response.resume()


class Pausable:
    """A connection whose response may be paused; that time does not count.

    Attributes:
        deadline: loop time at which the request in flight has failed.
        paused_at: loop time; None if it is not.
    """

    deadline = 0.0
    paused_at: float | None = None
    _loop: asyncio.AbstractEventLoop
    _transport: asyncio.Transport | None = None

    def pause(self) -> None:
        """See `Receiving`."""
        if self.paused_at is None and self._transport and not self._transport.is_closing():
            self.paused_at = self._loop.time()
            self._transport.pause_reading()

    def resume(self) -> None:
        """See `Receiving`."""
        if self.paused_at is not None and self._transport:
            self.deadline += self._loop.time() - self.paused_at
            self.paused_at = None
            if not self._transport.is_closing():
                self._transport.resume_reading()


@contextlib.contextmanager
def watching(store: sdg.Store, brakes: Sequence[Brake]) -> Iterator[None]:
    """Have brakes count what a store has not made durable. Those of clients that jobs share count several stores."""

    def unsaved() -> int:
        return store.unsaved["bytes"]

    def look() -> None:
        for brake in brakes:
            brake.look()

    store.on_room = look
    for brake in brakes:
        brake.stores.append(unsaved)
    try:
        yield
    finally:
        for brake in brakes:
            brake.stores.remove(unsaved)
            brake.look()


class Turns:
    """A response that is received by awaiting each of its pieces, within a time."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._go = asyncio.Event()
        self._go.set()
        self._time = asyncio.get_running_loop().time

    def pause(self) -> None:
        """See `Receiving`."""
        self._go.clear()

    def resume(self) -> None:
        """See `Receiving`."""
        self._go.set()

    async def next(self) -> bool:
        """Wait until the next piece may be received; that time does not count. Returns True."""
        if not self._go.is_set():
            until, began = self._limit.when(), self._time()
            self._limit.reschedule(None)
            await self._go.wait()
            self._limit.reschedule(until and until + self._time() - began)
        return True
