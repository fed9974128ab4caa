"""CSV files with a header, plain or compressed. Every column is text, because CSV has no types.

Separator, line ends, encoding and the way quotes are escaped are found in the beginning of each file, or given.
A record that is broken is one failed document: reading continues with the next record that is whole.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common.files import suffix_of
from sdg_plugins.common.inputs import InputFiles
from sdg_plugins.common.options import one_of
from sdg_plugins.common.streams import BROKEN, Stream
from sdg_plugins.readers.lines import Lines, LinesReader, split_lines
from sdg_plugins.readers.partitions import partitioned

SEPARATORS = {"tsv": "\t", "tab": "\t", "psv": "|"}  # by suffix
CANDIDATES = (",", ";", "\t", "|")
SAMPLE = 100  # lines that the separator is found in
BLANK = b"\xef\xbb\xbf \t\r\n"
HEADERS = 200  # files whose headers are read at the beginning
LONGEST = 64 << 20  # bytes of a record: a longer one has a quote that is never closed
NEAR = 50  # lines in which the end of a broken record is looked for
BARE_CR = "\ue00d"  # stands for a carriage return that does not end a line, which Python's csv refuses
ESCAPED = re.compile(r'(?<!\\)((?:\\\\)*)\\"')


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    parser.add_argument(
        "--csv-separator",
        metavar="C",
        type=lambda value: value.encode().decode("unicode_escape"),
        help=r"separator of csv files, such as ';' or '\t' [found in each file]",
    )
    parser.add_argument("--csv-quote", metavar="C", type=one_of('"', "'"), default='"', help="quote of csv files")


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("csv", partitioned(CsvReader))


class Form(NamedTuple):
    """How a file is written."""

    separator: str
    quote: str
    spaces: bool  # there is a space after each separator
    header: list[str]
    before: int  # lines before the header

    def parse(self, texts: Iterator[str]) -> Iterator[list[str]]:
        """The records in lines of text. Raises csv.Error."""
        how: dict[str, Any] = {"delimiter": self.separator, "quotechar": self.quote, "skipinitialspace": self.spaces}
        return csv.reader(texts, strict=True, **how)


class Broken(NamedTuple):
    """A record that cannot be parsed."""

    text: str
    reason: str


class CsvReader(LinesReader):
    """Read CSV files, each with a header."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        files = InputFiles.of_run(run, "csv")
        self._given = getattr(run.options, "csv_separator", None)
        self._quote = getattr(run.options, "csv_quote", '"')
        self._encoding = getattr(run.options, "input_encoding", None)
        self._form: Form
        if run.source_schema:
            self.schema = run.source_schema
        else:
            with ThreadPoolExecutor(16) as pool:
                forms = pool.map(functools.partial(self._form_of_file, files), range(min(HEADERS, len(files.names))))
                names = dict.fromkeys(name for form in forms if form for name in form.header)
            if not names:
                raise sdg.InputError(f"--input: {files.names[0]} has no header")
            self.schema = pa.schema([(name, pa.string()) for name in names])
        self._prompt = run.options.prompt_column
        super().__init__(files, Lines(files, self._encoding, legacy=True, splitter=line_splitter))

    def _form_of_file(self, files: InputFiles, i: int) -> Form | None:
        """How a file is written; None if it is empty, as Spark writes partitions without rows."""
        with files.open(i) as file:
            try:
                head = Stream(file, self._encoding, legacy=True).head
            except BROKEN as exc:
                raise sdg.InputError(f"{files.names[i]} cannot be read: {sdg.one_line(exc)}") from exc
        return self._form_of(head, files.names[i]) if head.strip(BLANK) else None

    def _form_of(self, head: bytes, name: str) -> Form:
        """How a file is written that begins with `head`."""
        lines = (
            head.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n").split("\n")[:SAMPLE]
        )
        given = self._given or SEPARATORS.get(suffix_of(name))
        before = 0
        if found := re.fullmatch(r"sep=(.)", lines[0]):
            given, before = given or found[1], 1
        sample = [f"{line}\n" for line in lines[before:]]
        forms = [self._try(separator, sample, before) for separator in ([given] if given else CANDIDATES)]
        form = max(forms, key=lambda item: item[0])[1]
        if not form.header:
            raise sdg.InputError(f"--input: {name} has no header")
        if len(set(form.header)) < len(form.header):
            raise sdg.InputError(f"--input: the header of {name} has a duplicate name: rename one column")
        return form

    def _try(self, separator: str, lines: list[str], before: int) -> tuple[float, Form]:
        """A separator, and how well it divides the lines: records with as many fields as the header."""
        form = Form(separator, self._quote, False, [], before)
        records = [record for record in parsed(form, lines) if record]
        header = records[0] if records else []
        spaces = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
        if spaces:
            records = [record for record in parsed(form._replace(spaces=True), lines) if record]
        header = [name.strip() if spaces else name for name in header]
        header = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
        good = sum(len(record) == len(header) for record in records) / max(1, len(records))
        return good if len(header) > 1 else 0.0, form._replace(spaces=spaces, header=header)

    def rows_of_file(self) -> Iterator[list[str] | Broken]:
        """See `LinesReader`."""
        if self.lines.file == len(self.files.names):
            return
        name, at_start = self.lines.name, self.lines.offset == 0
        if not self.lines.stream.head.strip(BLANK):
            return
        self._form = self._form_of(self.lines.stream.head, name)
        missing = set(self._form.header) - set(self.schema.names)
        if self._prompt in set(self.schema.names) - set(self._form.header):
            missing = {self._prompt}
        if missing:
            different = f"{name} has different columns than {self.files.names[0]} ({', '.join(sorted(missing))})"
            raise sdg.InputError(f"{different}: choose files with the same columns")
        rows = records(self.lines, self._form)
        if at_start:
            for _ in zip(range(self._form.before), self.lines, strict=False):
                pass
            next(rows, None)
        yield from rows

    def parse(self, raw: list[str] | Broken) -> dict[str, Any]:
        """See `LinesReader`."""
        if isinstance(raw, Broken):
            raise ValueError(raw.reason)
        if any("\udc80" <= char <= "\udcff" for value in raw if not value.isascii() for char in value):
            raise ValueError("not UTF-8")
        header = self._form.header
        if not fits(raw, self._form):
            raise ValueError(f"{len(raw)} fields, expected {len(header)}")
        return dict(zip(header, raw, strict=False))

    def shown(self, raw: list[str] | Broken) -> str:
        """See `LinesReader`."""
        text = raw.text if isinstance(raw, Broken) else self._form.separator.join(raw)
        return super().shown(text.encode("utf-8", "surrogateescape"))


def parsed(form: Form, lines: list[str]) -> Iterator[list[str]]:
    """The records in some lines, as far as they can be parsed."""
    rows = form.parse(iter(lines))
    while True:
        try:
            record = next(rows, None)
        except csv.Error:
            return
        if record is None:
            return
        yield record


def line_splitter(head: bytes) -> Any:
    """Splits a file at the line ends that its beginning has."""
    old = b"\r" in head and b"\n" not in head
    return functools.partial(split_lines, end=b"\r" if old else b"\n")


# ── Records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def records(lines: Lines, form: Form) -> Iterator[list[str] | Broken]:
    """The remaining records of the current file; a quoted field may span lines."""
    read: list[bytes] = []  # the lines of the current record
    rows = form.parse(texts(lines, read))
    while True:
        read.clear()
        broken = ""
        try:
            record = next(rows, None)
        except csv.Error as exc:
            record, broken = [], str(exc)
        if record is None:
            return
        if len(read) > 1 and not fits(record, form):
            fields = f"{len(record)} fields, expected {len(form.header)}"
            broken = broken or f"{fields}: a quote is not closed, or not escaped"
        if broken:
            if odd(b"".join(read), form):  # it may go on
                read += itertools.islice(lines, max(0, NEAR - len(read)))
            better, used = recovered(read, form, broken)
            lines.take_back(read[used:])
            rows = form.parse(texts(lines, read))
            yield better
        elif record:
            yield record


def fits(record: list[str], form: Form) -> bool:
    """True if a record has a field for each column; empty fields may follow."""
    return len(record) >= len(form.header) and not any(record[len(form.header) :])


def texts(lines: Lines, read: list[bytes]) -> Iterator[str]:
    """The lines as text; they are added to `read`."""
    size = 0
    for line in lines:
        size = size + len(line) if read else len(line)
        read.append(line)
        if size > LONGEST:
            raise csv.Error("a quote is never closed")
        yield line.decode("utf-8-sig" if lines.offset == len(line) else "utf-8", "surrogateescape")


def recovered(read: list[bytes], form: Form, reason: str) -> tuple[list[str] | Broken, int]:
    """What becomes of a broken record, and of how many lines.

    Args:
        read: the lines that were read in the attempt to parse it.
        form: of the file.
        reason: why it is broken.
    """
    lines = [line.decode("utf-8", "surrogateescape") for line in read]
    text = ""
    for count, line in enumerate(lines[:NEAR], 1):
        text += line
        for other in alternatives(text):
            if (record := only_record(other, form)) is not None:
                return [value.replace(BARE_CR, "\r") for value in record], count
    ends = (i for i in range(1, min(len(lines), NEAR)) if begins_record(lines[i:], form))
    count = next(ends, len(lines) if len(lines) < NEAR else 1)
    return Broken("".join(lines[:count]), reason), count


def odd(text: bytes, form: Form) -> bool:
    """True if a text has an odd number of quotes."""
    return text.count(form.quote.encode()) % 2 == 1


def alternatives(text: str) -> Iterator[str]:
    """A record's text as it would be in a file that follows the rules."""
    escaped = ESCAPED.sub(r'\1""', text)
    if escaped != text:
        yield escaped
    if "\r" in (body := escaped.removesuffix("\n").removesuffix("\r")) and BARE_CR not in text:
        yield body.replace("\r\n", "\n").replace("\r", BARE_CR)


def only_record(text: str, form: Form) -> list[str] | None:
    """The record that a text consists of, if it is exactly one with as many fields as the header."""
    try:
        found = list(form.parse(io.StringIO(text, newline="\n")))
    except csv.Error:
        return None
    return found[0] if len(found) == 1 and len(found[0]) == len(form.header) else None


def begins_record(lines: list[str], form: Form) -> bool:
    """True if some lines begin with a whole record. One with an odd number of quotes is the rest of a broken one."""
    text = ""
    for line in lines[:NEAR]:
        text += line
        if text.count(form.quote) % 2 == 0:
            return only_record(text, form) is not None
    return False
