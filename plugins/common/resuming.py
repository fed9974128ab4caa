"""What a rank that is started again finds: which of its chunks are complete, and whose files are gone.

A finished run may have a million chunks. SQLite and Arrow go through them; only those that there is something to do
for become objects.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import orjson

import sdg
from sdg_plugins.common.files import LOOKERS, Sizes, rank_file, split_uri
from sdg_plugins.common.outputs import chunk_names
from sdg_plugins.common.recorded import state_of

BATCH = 50_000  # chunks that are looked at together
UNKNOWN = -1  # size of a file that an earlier version of sdg, or a plugin's writer, has not recorded
# Chunks that need not be read again
COMPLETE = "written AND count >= min(:size, :most - start) AND (failed = '[]' OR NOT :retry)"
ROWS = "(filtered = '[]' AND failed = '[]') OR json_array_length(filtered) + json_array_length(failed) < count"
SIZE = f"CASE WHEN {ROWS} THEN ifnull(size, {UNKNOWN}) END"  # NULL: there are no rows, and so no file
Batch = tuple[list[int], Sizes]  # indices of chunks, and the sizes of their files as recorded; None: no rows


class Span(NamedTuple):
    """Complete chunks that follow each other in a rank, from `first` to `last`; both are indices."""

    first: int
    last: int
    bookmark: str | None = None  # of the last one


class Known:
    """The chunks that earlier processes of a rank have read.

    Args:
        complete: those that need not be read again, in order.
        others: all others, by index.
        lost: indices of those among them that are recorded as written, but whose files are gone.
    """

    def __init__(self, complete: Sequence[Span], others: dict[int, sdg.Chunk], lost: list[int]) -> None:
        self._complete, self._others, self.lost = complete, others, lost

    def get(self, index: int) -> sdg.Chunk | None:
        """A chunk that is not complete, as it is recorded; None if it is new."""
        return self._others.get(index)

    def to_read(self, indices: Iterable[int]) -> Iterator[tuple[int, str | None]]:
        """Those of some chunks that are not complete, each with a bookmark if there is one since the one before it.

        Args:
            indices: of chunks, in order.
        """
        spans, end = iter(self._complete), Span(sys.maxsize, sys.maxsize)
        span, bookmark = next(spans, end), None
        for index in indices:
            while index > span.last:
                bookmark = span.bookmark or bookmark
                span = next(spans, end)
            if index < span.first:
                known = self._others.get(index)
                yield index, (known and known.bookmark) or bookmark
                bookmark = None


def known_chunks(run: sdg.Run, aloud: bool = True) -> Known:
    """What a run's rank has recorded, compared with its output.

    Args:
        run: of the rank.
        aloud: report the chunks whose files are gone or empty.

    Raises:
        OutputError: a file has another size than the one that was written: it may be valuable.
        StateError: the state cannot be read.
    """
    options, lost, spans = run.options, list[int](), list[Span]()
    values = {"size": options.records_per_chunk, "most": options.max_documents or sys.maxsize}
    values["retry"] = options.retry_failed
    with state_of(rank_file(run.state, options.rank, "sqlite3")) as state, ThreadPoolExecutor(LOOKERS) as pool:
        comparing = Comparing(run, pool)
        rest = state.execute(f"SELECT * FROM chunks WHERE NOT ({COMPLETE})", values)
        others = {row[0]: sdg.chunk_of(row) for row in rest}
        written = [chunk for chunk in others.values() if chunk.written]
        sizes: Sizes = [(UNKNOWN if chunk.size is None else chunk.size) if chunk.rows else None for chunk in written]
        for _, gone in comparing.lost([([chunk.index for chunk in written], sizes)]):
            lost += gone
        for indices, gone in comparing.lost(_complete(state, values)):
            lost += gone
            _add_spans(spans, sorted({*indices}.difference(gone)) if gone else indices, options.world_size)
        found = state.execute(
            "SELECT * FROM chunks WHERE chunk IN (SELECT value FROM json_each(?))", (json.dumps(lost),)
        )
        for chunk in map(sdg.chunk_of, found):
            others[chunk.index] = dataclasses.replace(chunk, written=False, filtered=(), failed=())
        sql = "SELECT bookmark FROM chunks WHERE chunk = ?"
        spans = [span._replace(bookmark=state.execute(sql, (span.last,)).fetchone()[0]) for span in spans]
    if lost and aloud:
        others_gone = f" and {len(lost) - 1:,} more" * (len(lost) > 1)
        first = run.output.path(chunk_names(run, [min(lost)])[0])
        sdg.say(f"missing from the output, will be written again: {first}{others_gone}")
    return Known(spans, others, sorted(lost))


def _complete(state: sqlite3.Connection, values: dict[str, int]) -> Iterator[Batch]:
    """Indices of the complete chunks, and sizes of their files. SQLite makes the lists at once, without the GIL."""
    some = f"SELECT chunk, {SIZE} AS size FROM chunks WHERE chunk > :after AND {COMPLETE} ORDER BY chunk LIMIT :batch"
    sql = f"SELECT json_group_array(chunk), json_group_array(size) FROM ({some})"
    indices = [-1]
    while indices:
        texts = state.execute(sql, {**values, "after": indices[-1], "batch": BATCH}).fetchone()
        indices, sizes = map(orjson.loads, texts)
        if indices:
            yield indices, sizes


def _add_spans(spans: list[Span], indices: list[int], step: int) -> None:
    """Add chunks that follow those in some spans; most often they are one span more, or a part of the last one."""
    if not indices:
        return
    gaps = [0]
    if indices[-1] - indices[0] != (len(indices) - 1) * step:
        gaps += [i for i, index in enumerate(indices[1:], 1) if index - indices[i - 1] != step]
    for start, stop in zip(gaps, [*gaps[1:], len(indices)], strict=True):
        first, last = indices[start], indices[stop - 1]
        if spans and spans[-1].last + step == first:
            first = spans.pop().first
        spans.append(Span(first, last))


class Comparing:
    """Compares the files of chunks with what is recorded of them. Those on the Hub are compared by `verify`."""

    def __init__(self, run: sdg.Run, pool: ThreadPoolExecutor) -> None:
        self._run, options = run, run.options
        own_scheme = split_uri(options.output)[0] == options.writer
        self._look: Callable[[Sequence[str]], Callable[[], Sizes]] | None = None
        if not own_scheme and run.plugins.writers[options.writer].package == "sdg":
            self._look = run.output.measuring(os.path.dirname(chunk_names(run, [0])[0]), pool)

    def lost(self, batches: Iterable[Batch]) -> Iterator[tuple[list[int], list[int]]]:
        """The chunks of each batch, and those whose files are gone or empty; meanwhile the next batch is read.

        Raises OutputError if a file has another size.
        """
        waiting: list[Callable[[], tuple[list[int], list[int]]]] = []
        for indices, expected in batches:
            if self._look is None:
                yield indices, []
                continue
            sizes = self._look(chunk_names(self._run, indices))
            waiting.append(functools.partial(self._compared, indices, expected, sizes))
            if len(waiting) > 1:
                yield waiting.pop(0)()
        for compared in waiting:
            yield compared()

    def _compared(
        self, indices: list[int], expected: Sizes, measured: Callable[[], Sizes]
    ) -> tuple[list[int], list[int]]:
        sizes = measured()
        if sizes == expected and 0 not in sizes:  # as almost always
            return indices, []
        lost = []
        for index, size, before in zip(indices, sizes, expected, strict=True):
            if before is None:
                continue
            if not size:
                lost.append(index)
            elif before not in {UNKNOWN, size}:
                path = self._run.output.path(chunk_names(self._run, [index])[0])
                raise sdg.OutputError(
                    f"{path} has {size:,} bytes, but {before:,} were written: "
                    "restore it, or move it away and have it generated again"
                )
        return indices, lost
