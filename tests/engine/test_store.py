"""The store, the slicing among ranks and the schema of results, under hypothesis."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings, strategies as st

import sdg
from sdg_plugins.common import files
from sdg_plugins.common.chunks import Intake
from sdg_plugins.common.database import create, shrink
from sdg_plugins.common.identity import differences
from sdg_plugins.common.kinds import array_of
from sdg_plugins.common.recorded import chunks_in
from sdg_plugins.common.results import fit, infer_fields, results_type, unfit
from sdg_plugins.common.values import values_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(["text", "usage", "score", "tags", "extra", "tool_calls", "x"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("answer"), st.integers(0, 3), st.integers(0, 4), st.binary(min_size=1, max_size=4)),
        st.tuples(
            st.just("finish"), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["row", "filtered", "failed"])
        ),
        st.tuples(st.just("write"), st.integers(0, 3)),
        st.tuples(st.just("restart")),
        st.tuples(st.just("flush")),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_the_store_has_what_was_handed_in_and_nothing_else(steps: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(against_a_model(Path(folder) / "state.sqlite3", steps))


async def against_a_model(path: Path, steps: list[tuple[Any, ...]]) -> None:
    """Apply steps to a store and to plain dictionaries. Both must agree each time the store is opened."""
    answers: dict[int, dict[bytes, bytes]] = {}
    finished: dict[int, str] = {}
    written: set[int] = set()
    pending = list(steps)
    while pending:
        counts: Counter[str] = Counter()
        async with sdg.Store.open(path, counts) as store:
            while pending and (step := pending.pop(0))[0] != "restart":
                kind, chunk, position, value = (*step, None, None, None)[:4]
                if kind == "flush":
                    await store.flush()
                    continue
                document = chunk << 32 | (position or 0)
                if kind == "answer" and document not in finished and chunk not in written:
                    store.answered(document, value, b'"a"')
                    answers.setdefault(document, {})[value] = b'"a"'
                elif kind == "finish" and document not in finished and chunk not in written:
                    store.finished(document, value, b"null")
                    finished[document] = value
                elif kind == "write":
                    await store.flush()
                    await store.written(sdg.Chunk(chunk, chunk * 5, 5, written=True))
                    written.add(chunk)
                    for some in (answers, finished):
                        for key in [key for key in some if key >> 32 == chunk]:
                            del some[key]
        async with sdg.Store.open(path, Counter()) as store:
            for chunk in range(4):
                expected = {key & 0xFFFFFFFF: status for key, status in finished.items() if key >> 32 == chunk}
                assert await store.finished_in(sdg.Chunk(chunk, 0)) == expected
                lists = await store.outcomes_of(sdg.Chunk(chunk, 0, 5))
                outcomes = [outcome for text in lists for outcome in orjson.loads(text)]
                assert [(position, status) for position, status, _ in outcomes] == sorted(expected.items())
            for document, known in answers.items():
                if document not in finished:
                    assert await store.answers_to(document) == known
            assert {index for index, chunk in (await store.chunks()).items() if chunk.written} == written


def test_at_most_two_bytes_are_written_for_each_byte_of_a_response(tmp_path: Path) -> None:
    """Responses are deleted once their chunk is written; most of them need never get into the file."""
    body, documents, size = b"x" * 5000, 6000, 500

    async def work() -> None:
        async with sdg.Store.open(tmp_path / "state.sqlite3", Counter()) as store:
            for first in range(0, documents, size):
                chunk = sdg.Chunk(first // size, first, size, written=True)
                for position in range(size):
                    store.answered(chunk.index << 32 | position, b"key", body)
                    store.finished(chunk.index << 32 | position, "row", body)
                await store.flush()
                await store.written(chunk)

    before = bytes_written()
    asyncio.run(work())
    assert bytes_written() - before <= 2.2 * documents * len(body)


def bytes_written() -> int:
    """By this process so far, to files and elsewhere."""
    figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(figures["wchar"])


def test_the_space_of_deleted_responses_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"

    async def work() -> None:
        async with sdg.Store.open(path, Counter()) as store:
            for number in range(40):
                store.finished(number, "row", b"x" * 1_000_000)
            await store.flush()
            await store.written(sdg.Chunk(0, 0, 40, written=True))

    asyncio.run(work())
    assert path.stat().st_size > 40_000_000
    shrink(path)
    assert path.stat().st_size < 1_000_000
    assert sqlite3.connect(path).execute("SELECT count FROM chunks").fetchall() == [(40,)]


def test_a_database_appears_with_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sync, seen = tmp_path / "state.sqlite3", files.sync, list[bool]()

    def look(name: str | Path) -> None:
        seen.append(path.exists())
        sync(name)

    monkeypatch.setattr(files, "sync", look)
    (tmp_path / f".{path.name}.new").write_bytes(b"left by a process that was killed")
    create(path, tmp_path)

    assert seen == [False, True]
    assert chunks_in(path) == {}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_process_that_has_lost_its_rank_changes_nothing_in_the_database(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    create(path, tmp_path)
    before = path.read_bytes()

    def lost() -> None:
        raise sdg.StateError("the rank is lost")

    async def work() -> None:
        with pytest.raises(sdg.StateError):
            async with sdg.Store.open(path, Counter(requests=1), lost):
                raise AssertionError

    asyncio.run(work())
    assert path.read_bytes() == before


def test_totals_add_up_over_processes(tmp_path: Path) -> None:
    async def once(number: int) -> Counter[str]:
        counts = Counter({"requests": number})
        async with sdg.Store.open(tmp_path / "state.sqlite3", counts) as store:
            store.finished(number, "row", b"[]")
            await store.flush()
            counts["requests"] += 1
            return store.totals()

    asyncio.run(once(10))
    assert asyncio.run(once(100))["requests"] == 10 + 1 + 100 + 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(NAMES, JSON, max_size=5), min_size=1, max_size=5), st.integers(1, 5))
def test_any_results_fit_one_schema_and_lose_nothing(results: list[dict[str, Any]], known: int) -> None:
    special = {*sdg.base_fields(), "extra", "tool_calls", "logprobs"}
    inferred = {name: kind for name, kind in infer_fields(results[:known]).items() if name not in special}
    fields = sdg.base_fields() | inferred
    checks = {name: sdg.checker(kind) for name, kind in fields.items()}
    column = array_of([[fit(result, checks) for result in results]], results_type(fields))
    back = [unfit(result) for result in values_of(column)[0]]
    assert [without_nulls(result) for result in back] == [without_nulls(result) for result in results]


def without_nulls(value: Any) -> Any:
    """Remove nulls: Arrow has every field in every struct, so a missing key and a null are the same."""
    if isinstance(value, dict):
        return {
            key: without_nulls(item) for key, item in value.items() if item is not None and without_nulls(item) != {}
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 5), st.none() | st.integers(1, 45))
def test_ranks_expect_every_document_once(total: int, size: int, world: int, most: int | None) -> None:
    expected = 0
    for rank in range(world):
        options = SimpleNamespace(rank=rank, world_size=world, records_per_chunk=size, max_documents=most)
        intake = SimpleNamespace(_run=SimpleNamespace(options=options), reader=FixedReader(total), chosen=None)
        expected += Intake.expected(intake) or 0  # type: ignore[arg-type]
    assert expected == min(total, most or total)


class FixedReader:
    """A reader that knows its total."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def total(self) -> int:
        return self._rows


@given(JSON, JSON)
def test_two_json_values_differ_exactly_if_a_difference_is_named(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    named = list(differences(one, other))
    assert not named if same else True
    assert same or named or one == other or without_nulls(one) == without_nulls(other)


def test_results_of_more_than_a_gigabyte_are_written_in_pieces(tmp_path: Path) -> None:
    async def outcomes() -> tuple[list[bytes], int]:
        async with sdg.Store.open(tmp_path / "state.sqlite3", Counter()) as store:
            limit = store._db._conn.setlimit  # must be called in the connection's thread
            await store._db._execute(limit, sqlite3.SQLITE_LIMIT_LENGTH, 5000)  # the real one is too large for a test
            chunk = sdg.Chunk(1, 0, 100)
            for position in range(100):
                store.finished(1 << 32 | position, "row", b'"%s"' % (b"x" * 500))
            await store.flush()
            lists = await store.outcomes_of(chunk)
            return lists, len(await store.finished_in(chunk))

    lists, count = asyncio.run(outcomes())

    assert count == 100
    assert [position for part in lists for position, _, _ in json.loads(part)] == list(range(100))
