"""Memory: what a process with many requests in flight asks of the C library and the garbage collector."""

from __future__ import annotations

import contextlib


def tune_memory() -> None:
    """Set up the C library and the garbage collector, for all jobs of this process. It may be called several times."""
    _tune_allocator()
    _tune_collector()


def _tune_allocator() -> None:
    """Have glibc return the memory of large responses at once.

    It keeps what it believes to need again: 400 responses of a megabyte at once took 1,550 MB instead of 980.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD, which otherwise grows from there to 32 MB
        libc.mallopt(-8, 2)  # M_ARENA_MAX: each thread could have its own


def _tune_collector() -> None:
    """Make garbage collection rare: 10,000 requests in flight are a million objects, and full passes half the time.

    A pass over the youngest objects is due when so many more have been made than deleted. With some hundred requests in
    flight that never happens; passes whenever hundreds begin together took a twentieth of the time. With 10,000 in
    flight it happens often enough: a pass holds the event loop for 30 ms, and those after a longer time for 500 ms.
    """
    import gc

    gc.set_threshold(50_000, 50, 50)


def before_the_first_request(alone: bool) -> None:
    """Do what would hold all requests for a while if it were done in the middle of a run.

    Args:
        alone: no other job of this process is at work, whose requests would wait.
    """
    import gc

    import pyarrow as pa

    pa.array(["if pandas is installed, Arrow imports it here"])
    if alone:
        gc.collect()
        gc.freeze()
