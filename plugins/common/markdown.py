"""Text for cards, logs and terminals: whatever it contains, it stays in its line, cell or block of code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import sdg

LONGEST_LINE = 300  # characters
# URLs, IP addresses, hosts with ports, logs, absolute paths, and relative ones (a model's name has one slash)
WHEREABOUTS = re.compile(
    r" ?\(log: [^)]*\)|\w+://[^\s'\")\]]+"
    r"|\[?\b(?:\d{1,3}\.){3}\d{1,3}\b\]?(?::\d+)?|\[[0-9a-fA-F:]*::?[0-9a-fA-F:.]*\](?::\d+)?"
    r"|(?<=host )[\w.-]+(?::\d+)?|\b[\w-]+(?:\.[\w-]+)*:\d{2,5}\b"
    r"|(?<![\w/])~?/[^\s'\":;,()\[\]]+(?::\d+)?|(?<![\w./-])[\w.-]+(?:/[\w.-]+){2,}"
)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 file`, `2,000 files`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def table(title: str, rows: Iterable[tuple[str, str]], heads: tuple[str, str]) -> Iterator[str]:
    """A table of names and values under a title; the values are markdown."""
    yield f"### {title}\n"
    yield from rows_in_table(rows, heads)


def rows_in_table(rows: Iterable[tuple[str, str]], heads: tuple[str, str]) -> Iterator[str]:
    """A table of names and values; the values are markdown."""
    yield f"|{heads[0]}|{heads[1]}|\n|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"
    yield ""


def visible(text: str) -> str:
    """Text with normalized line ends, and without control characters other than tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", text)


def short_line(value: object) -> str:
    """Text in one line of at most LONGEST_LINE characters, without control characters."""
    text = sdg.one_line(visible(str(value)))
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "…"


def inline(value: object) -> str:
    """Text for a line or a table's cell, escaped so that markdown shows it as it is."""
    text = short_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def public(text: str) -> str:
    """Text for a card that anyone may read: `…` instead of URLs, hosts, addresses and paths."""
    return WHEREABOUTS.sub("…", text)


def fence(text: str, language: str = "") -> str:
    """Text as a block of code, with a fence that the text cannot close."""
    text = visible(text).replace("<!--", r"<\!--").strip("\n")
    marks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{marks}{language}\n{text}\n{marks}\n"
