"""What the rows of a run look like: which columns of the source they keep, and how results stand in them.

A row is a document with a list of results; with --flat it is one result, whose fields are columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.kinds import array_of, checker, relaxed
from sdg_plugins.common.results import fit, results_type, unfit
from sdg_plugins.common.values import rows_of, values_of

if TYPE_CHECKING:
    import pyarrow as pa

NUMBER = "_rollout"  # key of a result with the index of its rollout, until it is a column
NUMBERS = ("rollout", "sample")  # columns of flat rows
Results = list[dict[str, Any]]


class Shape:
    """Rows with a list of results for each document.

    Args:
        options: of the run.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.column: str = getattr(options, "results_column", "rollout_results")

    def table(self, source: pa.Table, ids: list[str], bodies: list[Results], fields: Mapping[str, Any]) -> pa.Table:
        """The rows of some documents.

        Args:
            source: the rows of the input, one for each document.
            ids: of the documents.
            bodies: their results.
            fields: Arrow types of the fields of results.
        """

        checks = {name: checker(kind) for name, kind in fields.items()}
        fitted = [[fit(result, checks) for result in results] for results in bodies]
        rows = self._kept(source, ids)
        return rows.append_column(self.column, array_of(fitted, results_type(fields)))

    def results(self, rows: pa.Table, fields: Mapping[str, Any]) -> list[Results]:
        """The results of each document, from rows that were written."""
        column = values_of(rows.column(self.column)) if rows.num_rows else []
        return [[unfit(result) for result in results] for results in column]

    def firsts(self, rows: pa.Table) -> list[int]:
        """The position of each document's first row."""
        return list(range(rows.num_rows))

    def _kept(self, source: pa.Table, ids: list[str]) -> pa.Table:
        import pyarrow as pa

        rows = source.select(kept_columns(self.options, source.column_names))
        return rows if "id" in rows.column_names else rows.append_column("id", array_of(ids, pa.string()))


class Flat(Shape):
    """Rows that are one result each."""

    def table(self, source: pa.Table, ids: list[str], bodies: list[Results], fields: Mapping[str, Any]) -> pa.Table:
        """See `Shape`."""
        import pyarrow as pa

        rows = self._kept(source, ids)
        names = flat_names(rows.column_names, fields)
        parts = [rows.slice(i, 1) for i, results in enumerate(bodies) for _ in results]
        rows = pa.concat_tables(parts).combine_chunks() if parts else rows.slice(0, 0)
        results = [dict(result) for each in bodies for result in each]
        numbers = {
            "rollout": [result.pop(NUMBER, 0) for result in results],
            "sample": [i for each in bodies for i in range(len(each))],
        }
        for name, values in numbers.items():
            rows = rows.append_column(name, array_of(values, pa.int32()))
        checks = {name: checker(kind) for name, kind in fields.items()}
        fitted = [fit(result, checks) for result in results]
        for name, kind in [*fields.items(), ("extra", pa.string())]:
            rows = rows.append_column(names[name], array_of([result.get(name) for result in fitted], kind))
        return rows

    def results(self, rows: pa.Table, fields: Mapping[str, Any]) -> list[Results]:
        """See `Shape`."""
        source = rows.column_names[: rows.column_names.index(NUMBERS[0])]
        names = flat_names(source, fields)
        columns = rows_of(rows.select([*names.values(), *NUMBERS]))
        found: list[Results] = []
        for row in columns:
            if not row["sample"]:
                found.append([])
            result = unfit({name: row[column] for name, column in names.items()})
            found[-1].append({**result, NUMBER: row["rollout"]})
        return found

    def firsts(self, rows: pa.Table) -> list[int]:
        """See `Shape`."""
        return [position for position, sample in enumerate(rows.column("sample").to_pylist()) if not sample]


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape of a run's rows."""
    return Flat(options) if getattr(options, "flat", False) else Shape(options)


def empty_rows(options: argparse.Namespace, source: pa.Schema, fields: Mapping[str, Any]) -> pa.Table:
    """The columns of a run's rows, without rows.

    Args:
        options: of the run.
        source: the schema of its input.
        fields: Arrow types of the fields of results.
    """
    import pyarrow as pa

    columns = pa.schema([relaxed(field) for field in source])
    empty = pa.Table.from_arrays([pa.nulls(0, field.type) for field in columns], schema=columns)
    return shape_of(options).table(empty, [], [], fields)


def flat_names(source: Iterable[str], fields: Iterable[str]) -> dict[str, str]:
    """The column of each field of results, beside the columns of the source: `generated_NAME` where that is taken."""
    taken = {*source, "id", *NUMBERS}
    names = {}
    for field in [*fields, "extra"]:
        name = field
        while name in taken:
            name = f"generated_{name}"
        taken.add(name)
        names[field] = name
    return names


def kept_columns(options: argparse.Namespace, source: Sequence[str]) -> list[str]:
    """The columns of the source that rows have."""
    keep, drop = getattr(options, "keep_columns", None), getattr(options, "drop_columns", None)
    return [name for name in source if (keep is None or name in keep) and name not in (drop or [])]


def check_kept(options: argparse.Namespace, source: Sequence[str], fields: Iterable[str]) -> None:
    """Raise an error if a column is unknown, or if flat rows would have two columns of one name.

    Args:
        options: of the run.
        source: names of the input's columns.
        fields: those of results that are known.
    """
    for option in ("keep_columns", "drop_columns"):
        for name in getattr(options, option) or []:
            if name not in source:
                flag = f"--{option.replace('_', '-')} {name}"
                raise sdg.InputError(f"{flag}: the input has no such column; {sdg.nearest(name, source)}")
    if not options.flat:
        return
    kept = set(kept_columns(options, source))
    for name in NUMBERS:
        if name in kept:
            message = f"--flat numbers results in a column {name}, and the input has one of this name"
            raise sdg.InputError(f"{message}: add --drop-columns {name}")
    for name in fields:
        if {name, f"generated_{name}"} <= kept:
            message = f"--flat: the input has columns {name} and generated_{name}, the names for what is generated"
            raise sdg.InputError(f"{message}: add --drop-columns generated_{name}")


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbered(outcomes: Sequence[Any]) -> Results:
    """The results of a document's rollouts that did not fail, each with the index of its rollout."""
    return [
        {**result, NUMBER: i} for i, results in enumerate(outcomes) if isinstance(results, list) for result in results
    ]


def with_messages(results: Results, asked: Sequence[Sequence[Any]]) -> Results:
    """Results with the messages of the request that they come from, and the answer: the last request if that is open.

    Args:
        results: of one rollout.
        asked: the payload and the reply of each of its requests, in their order.
    """
    answered = [(payload, reply) for payload, *replies in asked for reply in replies if reply.choices]
    if not answered:
        return results
    found = []
    for result in results:
        text = result.get("text")
        same = [pair for pair in answered if any(choice.text == text for choice in pair[1].choices)]
        payload, reply = (same or holding(result, answered) or answered)[-1]
        prompt = payload.get("messages") or [{"role": "user", "content": payload.get("prompt")}]
        answer = {"role": "assistant", "content": text if same else reply.text}
        if reply.tool_calls:
            answer["tool_calls"] = reply.tool_calls
        found.append({"messages": [*prompt, answer], **result})
    return found


def holding(result: Mapping[str, Any], answered: list[Any]) -> list[Any]:
    """The one request whose answer holds the texts of a result, which was stripped or taken apart; [] if it is open."""
    own = {name: value for name, value in result.items() if name not in {"reasoning", "finish_reason"}}
    texts = [
        value.strip()
        for value in ([result.get("text")] if result.get("text") else own.values())
        if isinstance(value, str)
    ]
    found = [pair for pair in answered if any(texts) and all(text in pair[1].text for text in texts)]
    return found if len(found) == 1 else []


def messages_type() -> pa.DataType:
    """The Arrow type of `messages` with --keep-messages."""
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
