"""Rows for the dataset card: samples as question and answer, and how long results are."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import codec_of, file_writer, format_of, rank_file
from sdg_plugins.common.markdown import fence, inline
from sdg_plugins.common.outputs import output_files
from sdg_plugins.common.rows import flat_names
from sdg_plugins.common.state import recorded_fields, schema_of
from sdg_plugins.common.values import plain, rows_of

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES, COLUMNS = 2, 20  # rows, and columns of each
MEASURED, MEASURED_BYTES, STEP = 1000, 16 << 20, 10  # rows whose results are measured; rows read at a time
SAMPLE_LIMITS = (600, 120, 30)  # characters of a string: the first limit with which the samples are short enough
LONGEST_SAMPLE = 20_000  # characters of all samples
FILES_TRIED = 100  # files searched for sample rows: all documents of a chunk may be filtered
BAR = 30  # characters of the longest bar
NO_ANSWER = {"finish_reason", "reasoning", "extra", "id"}  # strings of a result that are no part of the answer


def samples(run: sdg.Run) -> str:
    """What the rows look like, as markdown; "" if there are none."""
    rows = first_rows(run)
    if not rows:
        return ""
    shown = rows[:SAMPLES]
    whole = ["<details><summary>These rows in full</summary>\n", fence(samples_as_json(shown), "json"), "</details>\n"]
    return "\n".join([*figures(rows, run), *questions_and_answers(shown, run), *whole])


def results_of(row: dict[str, Any], run: sdg.Run) -> list[dict[str, Any]]:
    """The results in a row."""
    if getattr(run.options, "flat", False):
        names = flat_names([name for name in row if name in source_columns(run)], recorded_fields(run.state) or {})
        return [{field: row.get(name) for field, name in names.items()}]
    results = row.get(run.options.results_column)
    return [result for result in results if isinstance(result, dict)] if isinstance(results, list) else []


def source_columns(run: sdg.Run) -> list[str]:
    """The columns of the source."""
    names: list[str] = schema_of(recorded.load_record(run.state)["source_schema"]).names
    return names


def answer_of(result: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result that are the answer."""
    hidden = NO_ANSWER | {"usage", "truncated", "messages"}
    return {name: value for name, value in result.items() if name not in hidden and value not in (None, [], {}, "")}


def figures(rows: list[dict[str, Any]], run: sdg.Run) -> Iterator[str]:
    """How long results are, and their scores, each as a histogram in text."""
    results = [result for row in rows for result in results_of(row, run)]
    lengths = [sum(len(text) for text in answer_of(result).values() if isinstance(text, str)) for result in results]
    scores = Counter(result["score"] for result in results if isinstance(result.get("score"), int))
    if any(lengths):
        powers = Counter(max(length, 1).bit_length() - 1 for length in lengths)
        bins = {f"{1 << power:,}–{(2 << power) - 1:,}": powers[power] for power in range(min(powers), max(powers) + 1)}
        yield f"Characters of the results, in the first {len(rows):,} rows:\n\n{fence(histogram(bins))}"
    if scores:
        yield f"Scores:\n\n{fence(histogram({str(score): scores[score] for score in sorted(scores)}))}"


def histogram(bins: dict[str, int]) -> str:
    """Bars for numbers, a line each."""
    wide, most = max(map(len, bins)), max(bins.values())
    return "\n".join(f"{name:>{wide}} {'█' * -(-number * BAR // most)} {number:,}" for name, number in bins.items())


def questions_and_answers(rows: list[dict[str, Any]], run: sdg.Run) -> Iterator[str]:
    """The text of each document, and its first results."""
    limit = SAMPLE_LIMITS[0]
    for number, row in enumerate(rows, 1):
        document = row.get(run.options.prompt_column)
        yield f"**Row {number}**, {inline(row.get('id'))}\n"
        if document:
            yield fence(as_text(shortened(document, limit)))
        for result in results_of(row, run)[:SAMPLES]:
            for name, value in answer_of(result).items():
                yield f"→ {inline(name)}\n\n{fence(as_text(shortened(value, limit)))}"


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)


def without_nulls(value: Any) -> Any:
    """A value without the nulls in its structs."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def first_rows(run: sdg.Run) -> list[dict[str, Any]]:
    """The first rows of the first file that has any."""
    import pyarrow as pa

    if file_writer(run.options) not in {"parquet", "jsonl"}:
        return first_rows_by_writer(run)
    for file in first_files(run):
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):  # `verify` reports broken files
            if rows := first_rows_of(run, file):
                return rows
    return []


def first_files(run: sdg.Run) -> Iterator[str]:
    """The first files that may have rows: as the first rank has recorded them, because a list of all takes seconds."""
    path = rank_file(run.state, 0, "sqlite3")
    with contextlib.suppress(sdg.StateError):
        first = recorded.chunks_in(path, "WHERE written ORDER BY chunk LIMIT ?", FILES_TRIED) if path.exists() else {}
        yield from sorted(run.path_of(chunk) for chunk in first.values() if chunk.rows)
    yield from output_files(run)[:FILES_TRIED]


def first_rows_by_writer(run: sdg.Run) -> list[dict[str, Any]]:
    """The first rows as the plugin reads them that has written them."""
    entry = run.plugins.writers.get(file_writer(run.options))
    for chunk in itertools.islice(recorded.chunks_of(run), FILES_TRIED) if entry else ():
        table = entry.factory(run).read(chunk) if entry and chunk.written and chunk.rows else None
        if table is not None:
            columns = [field.name for field in table.schema if not has_binary(field.type)]
            return rows_of(table.select(columns[:COLUMNS]).slice(0, MEASURED))
    return []


def first_rows_of(run: sdg.Run, file: str) -> list[dict[str, Any]]:
    """The first rows of a file, without columns that hold binary values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with run.output.open(file) as source:
        if format_of(file) == "parquet":
            parquet = pq.ParquetFile(source)
            columns = [field.name for field in parquet.schema_arrow if not has_binary(field.type)]
            batches = parquet.iter_batches(STEP, columns=columns[:COLUMNS])
            some = within((batch, batch.num_rows, batch.nbytes) for batch in batches)
            return [row for batch in some for row in rows_of(pa.Table.from_batches([batch]))]
        codec = codec_of(file)
        stream = io.BufferedReader(pa.CompressedInputStream(source, codec) if codec else source)
        rows = [json.loads(line) for line in within((line, 1, len(line)) for line in stream)]
    return [dict(itertools.islice(row.items(), COLUMNS)) for row in rows]


def within(parts: Iterable[tuple[Any, int, int]]) -> Iterator[Any]:
    """The first parts of a file, until there are enough rows or bytes.

    Args:
        parts: each with its rows and bytes.
    """
    rows = size = 0
    for part, count, length in parts:
        yield part
        rows, size = rows + count, size + length
        if rows >= MEASURED or size >= MEASURED_BYTES:
            return


def has_binary(kind: pa.DataType) -> bool:
    """True if a type holds binary values at any depth."""
    import pyarrow.types as t

    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind):
        return True
    if t.is_dictionary(kind):
        return has_binary(kind.value_type)
    return any(has_binary(kind.field(i).type) for i in range(kind.num_fields))


def samples_as_json(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON, shortened to about LONGEST_SAMPLE characters."""
    for limit in SAMPLE_LIMITS:
        cut = [shortened(without_nulls(row), limit) for row in rows]
        text = "\n".join(json.dumps(row, ensure_ascii=False, indent=2, default=plain) for row in cut)
        if len(text) <= LONGEST_SAMPLE:
            break
    # No comment can begin, and the JSON has the same value.
    return text.replace("<!--", r"\u003c!--")


def shortened(value: Any, limit: int) -> Any:
    """A value whose long strings and lists are cut."""
    if isinstance(value, str):
        return value if len(value) <= limit else value[:limit] + "…"
    if isinstance(value, dict):
        return {shortened(str(key), limit): shortened(item, limit) for key, item in value.items()}
    if isinstance(value, list | tuple):
        kept = [shortened(item, limit) for item in value[: limit // 20]]
        return kept if len(kept) == len(value) else [*kept, f"… {len(value) - len(kept):,} more"]
    return value
