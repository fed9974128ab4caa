"""The command `show`: rows and failures as a person reads them, on the terminal or as a page to send to someone."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common import html, recorded
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import Parser, number
from sdg_plugins.common.records import Record, Records, View
from sdg_plugins.common.results import unfit
from sdg_plugins.common.secrets import secrets_of
from sdg_plugins.common.terminal import DIM, RED, field_lines, heading, printable, styled

LONGEST = 1_500  # characters of a text that are shown: a screen for a document and its result
USUAL = {"truncated": False, "finish_reason": "stop"}  # values that say nothing


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("show", show)


def show(argv: list[str]) -> int:
    """Show rows of a run as a person reads them: the prompt column, then each result."""
    parser = Parser(prog="sdg.py show", description=show.__doc__, epilog="example: sdg.py show -n 3 --failed")
    recorded.add_run_options(parser)
    parser.add_argument("--config", dest="output_config", metavar="NAME", help="the same as --output-config")
    parser.add_argument("-n", type=number(int, 1), default=5, metavar="N", help="documents [5]")
    parser.add_argument("--id", metavar="ID", help="show the document with this id, with all its columns, uncut")
    parser.add_argument("--failed", action="store_true", help="show documents that failed, with their errors")
    parser.add_argument("--full", action="store_true", help="show all columns and fields, uncut")
    parser.add_argument("--html", metavar="FILE", help="write a page that can be sent to someone")
    args = parser.parse_args(argv)
    run = recorded.load_run(args)
    full = args.full or args.id is not None
    shown = [view_of(run, record, full) for record in chosen(Records(run), args)]
    secrets = secrets_of(run.options)
    if args.html:
        text = secrets.hidden_in(html.page(title_of(run), shown, full))
        try:
            Path(args.html).write_text(text, encoding="utf-8")
        except OSError as exc:
            raise sdg.OutputError(f"--html {args.html} cannot be written: {sdg.reason_of(exc)}") from exc
        print(f"{args.html}: {counted(len(shown), 'document')}")
        return 0
    for number_, view in enumerate(shown, 1):
        for line in document_lines(number_, view, 0 if full else LONGEST):
            print(secrets.hidden_in(line))
    if more := sorted({column for view in shown for column in view.left_out}):
        print(styled(f"not shown: {', '.join(map(printable, more))}; --full shows all", DIM))
    return 0


def chosen(records: Records, args: argparse.Namespace) -> list[Record]:
    """The documents to show. Raises StateError if there are none."""
    output = records.run.options.output
    if args.id is not None:
        found = records.find(args.id)
        if found is None:
            raise sdg.StateError(f"{output} has no document {args.id!r}, and no failed or filtered one of this id")
        return [found]
    some = list(itertools.islice(records.failed() if args.failed else records.rows(args.n), args.n))
    if not some:
        done = sum(chunk.count for chunk in records.written)
        what = "no failed documents" if args.failed else "no rows yet"
        gone = any(chunk.rows for chunk in records.written) and not args.failed
        where = "; the files of its rows are not here: they were moved, or published" if gone else ""
        raise sdg.StateError(f"{output} has {what} ({counted(done, 'document')} in finished chunks){where}")
    return some


def title_of(run: sdg.Run) -> str:
    """What a page of rows is called."""
    return f"{run.options.output.rstrip('/').rpartition('/')[2]} · {run.options.rollout} · {run.model}"


# ── What a person reads ──────────────────────────────────────────────────────────────────────────────────────────────

NOTES = {
    "filtered": "filtered: the rollout returned nothing",
    "unfinished": "not finished: run the same command again",
    "failed": "failed",
}


def view_of(run: sdg.Run, record: Record, full: bool) -> View:
    """What is shown of a document; with `full` everything."""
    row = record.row or (record.failure or {}).get("document") or {}
    failure = {name: value for name, value in (record.failure or {}).items() if name != "document" and value}
    results, columns = results_in(run, row) if record.row else ([], set())
    source = {name: value for name, value in row.items() if name not in columns and name != "id"}
    prompt = run.options.prompt_column
    shown = {name: spoken(value) if name == prompt else value for name, value in source.items()}
    if not full and prompt in shown:
        shown = {prompt: shown[prompt]}
    note = NOTES.get(record.status, "" if record.place else "not in a file yet: its chunk is not finished")
    kept = results if full else [plain_fields(result) for result in results]
    hidden = {
        name
        for before, after in zip(results, kept, strict=True)
        for name, value in before.items()
        if value is not None and name not in after
    }
    left_out = sorted({*source, *hidden} - shown.keys())
    return View(record.id, note, prompt, shown, kept, failure, left_out)


def results_in(run: sdg.Run, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], set[str]]:
    """The results in a row, without nulls, and the columns that hold them: one, or a column for each field."""
    column = run.options.results_column
    if isinstance(row.get(column), list):
        return [unfit(result) for result in row[column]], {column}
    source = set(run.source_schema.names) if run.source_schema is not None else set()
    fields = {name: value for name, value in row.items() if name not in source and name != "id"}
    return [unfit(fields)], set(fields)


def plain_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a result that a person reads: not null, not nested, and saying something."""
    known = {name: value for name, value in result.items() if value is not None and USUAL.get(name, ...) != value}
    return {name: value for name, value in known.items() if not is_nested(value)}


def is_nested(value: Any) -> bool:
    """True for structs and for lists of anything but texts and numbers."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict | list) for part in value))


def spoken(value: Any) -> Any:
    """A chat as its messages by role; anything else unchanged."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "role" in part for part in value):
        return {f"{i}. {message['role']}": message.get("content") for i, message in enumerate(value, 1)}
    return value


# ── On the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────


def document_lines(number: int, view: View, longest: int) -> Iterator[str]:
    """The lines of a document; its texts are cut after `longest` characters, 0 shows all."""
    yield heading(f"document {number} · {view.id}")
    if view.note and not view.error:
        yield styled(view.note, RED)
    yield from field_lines(view.source, 0, longest)
    for i, result in enumerate(view.results, 1):
        yield styled("result" if len(view.results) == 1 else f"result {i} of {len(view.results)}", "1;36")
        yield from field_lines(result, 4, longest)
    if view.error:
        attempts = counted(int(view.error.pop("attempts", 0)), "attempt")
        error, kind = view.error.pop("error", ""), view.error.pop("error_type", "")
        yield styled(f"FAILED after {attempts}: {printable(str(error))} [{kind}]", RED)
        yield from field_lines(view.error, 4, longest)
    yield ""
