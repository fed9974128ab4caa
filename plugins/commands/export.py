"""The command `export`: the rows of a run as training wants them."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.exported import Source, source_of
from sdg_plugins.common.files import ALIASES, codec_of, expanded, split_uri, suffix_of, sync
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.options import Parser, number
from sdg_plugins.common.paths import follow, parse_path
from sdg_plugins.common.rows import NUMBERS, Flat, Results, shape_of
from sdg_plugins.common.values import Chat, id_text, in_base64, json_line, parse_prompt, rows_of, values_of

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("flat", "messages", "preference")
OF_TOOLS = ("tool_calls", "tool_call_id", "function_call")  # of messages that are more than text


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("export", export)


def export(argv: list[str]) -> int:
    """Write the rows of a run for training: one row a result, lists of messages, or pairs of chosen and rejected.

    A file (.parquet or .jsonl) is written as a whole. A folder gets a file for each chunk, and those that hold
    the same rows already stay: run the command again to go on.
    """
    example = "example: sdg.py export --output ./summaries --format messages --to chats.jsonl"
    parser = Parser(prog="sdg.py export", description=export.__doc__, epilog=example)
    recorded.add_run_options(parser)
    text = "a .parquet or .jsonl file, or a folder for a file of each chunk"
    parser.add_argument("--to", required=True, type=place, metavar="PATH", help=text)
    text = "flat: a row for each result; messages: chats; preference: the best and the worst result of each document"
    parser.add_argument("--format", required=True, choices=FORMATS, help=text)
    text = "column of what was asked, such as text or messages [--prompt-column of the run]"
    parser.add_argument("--prompt-column", metavar="PATH", help=text)
    text = "field of the results by which pairs are made [score]"
    parser.add_argument("--score", default="score", metavar="NAME", help=text)
    text = "leave out pairs whose scores differ by less [more than 0]"
    parser.add_argument("--min-margin", type=number(float, 0), default=0.0, metavar="X", help=text)
    args = parser.parse_args(argv)
    exporter = Exporter(source_of(args), args)
    written, rows = write_all(exporter.parts(), Path(args.to))
    if remark := exporter.remark():
        sdg.say(remark)
    print(f"{counted(rows, 'row')} in {counted(written, 'file')}: {args.to}")
    return 0


def place(path: str) -> str:
    """A converter for --to: where an export goes."""
    known = {*ALIASES, *ALIASES.values()} - {"parquet", "jsonl"}
    if split_uri(path)[0] != "file":
        raise argparse.ArgumentTypeError(f"{sdg.redact(path)}: an export is a local file or folder: copy it afterwards")
    if (suffix_of(path) in known or codec_of(path)) and not Path(expanded(path)).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: expected a .parquet or .jsonl file, or a folder")
    return expanded(path)


class Exporter:
    """Converts the rows of a run's files.

    Raises:
        UsageError: the run has no scores, or cannot be converted.
    """

    def __init__(self, source: Source, args: argparse.Namespace) -> None:
        self.source, self.args = source, args
        self.shape, self.fields = shape_of(source.options), source.fields
        self.prompt_column = args.prompt_column or source.options.prompt_column
        self.single = self.without_messages = self.without_text = 0
        self.dropped: list[str] = []
        if args.format == "preference" and args.score not in self.fields:
            known = ", ".join(self.fields) or "none, because nothing is written yet"
            message = f"--format preference needs scores, and the results have no field {args.score}"
            raise sdg.UsageError(f"{message}; available for --score: {known}")

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """The name of each chunk's file without its suffix, and its rows."""
        for name, table in self.source.parts():
            yield name, self.converted(table)

    def converted(self, table: pa.Table) -> pa.Table:
        """A chunk's rows in the format that was asked for."""
        import pyarrow as pa

        if self.args.format == "flat" and isinstance(self.shape, Flat):
            return table
        results = self.shape.results(table, self.fields)
        rows = table.take(pa.array(self.shape.firsts(table), pa.int64())) if isinstance(self.shape, Flat) else table
        ids = [id_text(value) for value in values_of(rows.column("id"))]
        if self.args.format == "flat":
            options = argparse.Namespace(**{**vars(self.source.options), "flat": True, "keep_columns": None})
            options.drop_columns = [self.shape.column, *(name for name in NUMBERS if name in rows.column_names)]
            self.dropped = options.drop_columns[1:]
            return Flat(options).table(rows, ids, results, self.fields).replace_schema_metadata(None)
        prompts = self.prompts(rows)
        convert = self.messages if self.args.format == "messages" else self.preference
        documents = zip(ids, prompts, results, strict=True)
        found = [{"id": id_, **row} for id_, prompt, each in documents for row in convert(prompt, each)]
        return pa.Table.from_pylist(found, schema=self.schema())

    def schema(self) -> pa.Schema:
        """The columns of chats."""
        import pyarrow as pa

        chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        if self.args.format == "messages":
            return pa.schema([("id", pa.string()), ("messages", chat)])
        numbers = [(name, pa.float64()) for name in ("score_chosen", "score_rejected", "margin")]
        return pa.schema([("id", pa.string()), ("prompt", chat), ("chosen", chat), ("rejected", chat), *numbers])

    def prompts(self, rows: pa.Table) -> list[Chat]:
        """What each document asked, as messages: the prompt column."""
        flat = isinstance(self.shape, Flat)  # columns behind the numbers hold results: their `text` is not the prompt
        names = rows.column_names[: rows.column_names.index(NUMBERS[0])] if flat else rows.column_names
        root, steps = parse_path(self.prompt_column, names)
        if root not in names:
            if "messages" not in self.fields:
                message = f"--prompt-column {self.prompt_column}: the source has no such column"
                raise sdg.UsageError(f"{message}; {sdg.nearest(root, names)}")
            return [[] for _ in range(rows.num_rows)]
        found: list[Chat] = []
        for value in values_of(rows.column(root)):
            try:
                text, messages = parse_prompt(follow(value, steps))
            except sdg.BadDocument:
                text, messages = "", None
            found.append(messages or [{"role": "user", "content": text}])
        return found

    def messages(self, prompt: Chat, results: Results) -> Iterator[dict[str, Any]]:
        """A chat for each result with a text."""
        for result in results:
            if chat := self.chat(prompt, result):
                yield {"messages": chat}

    def chat(self, prompt: Chat, result: dict[str, Any]) -> Chat:
        """The messages of a result: those that were kept, else the prompt column and the text. [] if it has none."""
        chat: Chat = result.get("messages") or []
        if not chat:
            self.without_messages += 1
            text = result.get("text")
            chat = [*prompt, {"role": "assistant", "content": text}] if prompt and text else []
        told = plain_chat(chat)
        if not told or not told[-1]["content"]:
            self.without_text += 1
            return []
        return told

    def preference(self, prompt: Chat, results: Results) -> Iterator[dict[str, Any]]:
        """The best and the worst result of a document; of several prompts the one whose results differ most."""
        answers: dict[str, list[tuple[float, Chat]]] = {}
        for result in results:
            score = result.get(self.args.score)
            if isinstance(score, int | float) and not math.isnan(score) and (chat := self.chat(prompt, result)):
                answers.setdefault(repr(chat[:-1]), []).append((float(score), chat))
        ranked = [sorted(each, key=lambda answer: -answer[0]) for each in answers.values()]
        best, worst = max(
            ((each[0], each[-1]) for each in ranked), key=lambda pair: pair[0][0] - pair[1][0], default=((0.0, []),) * 2
        )
        margin = best[0] - worst[0]
        if not margin > 0 or margin < self.args.min_margin or best[1] == worst[1]:
            self.single += 1
            return
        *asked, chosen = best[1]
        scores = {"score_chosen": best[0], "score_rejected": worst[0], "margin": margin}
        yield {"prompt": asked, "chosen": [chosen], "rejected": worst[1][-1:], **scores}

    def remark(self) -> str:
        """What a user should know of the rows; "" if there is nothing."""
        if self.dropped:
            return f"the source's columns {', '.join(self.dropped)} are left out: the names are those of the numbers"
        said = []
        if self.single:
            said.append(f"{counted(self.single, 'document')} left out: no two results whose scores differ enough")
        if self.without_text:
            what = "no text, or a chat with tool calls or images"
            said.append(f"{counted(self.without_text, 'result')} left out: {what}")
        if self.without_messages and self.args.format == "messages":
            said.append(
                "the prompts are those of the prompt column, without templates: --keep-messages keeps what was sent"
            )
        return "; ".join(said)


def plain_chat(messages: Chat) -> Chat:
    """Messages with role and text alone; [] if they have more, which would be lost."""
    found = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
            content = "\n".join(texts) if len(texts) == len(content) else None
        if not isinstance(content, str) or any(message.get(key) for key in OF_TOOLS):
            return []
        found.append({"role": str(message["role"]), "content": content})
    return found


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_all(parts: Iterator[tuple[str, pa.Table]], to: Path) -> tuple[int, int]:
    """Write all parts to a file, or each to its own in a folder. Returns the numbers of files and rows."""
    import pyarrow.parquet as pq

    suffix = to.suffix.lower()
    if suffix in {".parquet", ".jsonl"}:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = to.with_name(f".{to.name}.tmp")
        total = 0
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(open(temporary, "wb"))
            writer: Any = None
            for _, table in parts:
                total += table.num_rows
                if suffix == ".jsonl":
                    sink.write(lines_of(table))
                    continue
                writer = writer or stack.enter_context(pq.ParquetWriter(sink, table.schema, compression="zstd"))
                writer.write_table(table)
        sync(temporary)
        os.replace(temporary, to)
        return 1, total
    to.mkdir(parents=True, exist_ok=True)
    files = total = 0
    others, made = {path.name for path in to.glob("*.parquet")}, set[Path]()
    for name, table in parts:
        path = to / f"{name}.parquet"
        if path in made:
            raise sdg.UsageError(f"two files of rows would be {path}: export to one file, such as --to {to}.parquet")
        made.add(path)
        files, total = files + 1, total + table.num_rows
        others.discard(path.name)
        if holds(path, table):
            continue
        pq.write_table(table, temporary := to / f".{path.name}.tmp", compression="zstd")
        sync(temporary)
        os.replace(temporary, path)
    if others:
        sdg.say(f"{to} also has files that are not of this export: {', '.join(sorted(others)[:3])}")
    return files, total


def holds(path: Path, table: pa.Table) -> bool:
    """True if a file has these rows: an earlier export of the same rows goes on where it was interrupted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return path.exists() and bool(pq.ParquetFile(path).read().equals(table))
    except pa.ArrowException:
        return False  # it is broken


def lines_of(table: pa.Table) -> bytes:
    """Rows as JSON lines, as the writer of outputs has them."""
    return b"".join(json_line(row, in_base64) for row in rows_of(table))
