from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

WHEREABOUTS = re.compile(
    r"\w+://[^\s'\")\]]+"
    r"|\[?\b(?:\d{1,3}\.){3}\d{1,3}\b\]?(?::\d+)?|\[[0-9a-fA-F:]*::?[0-9a-fA-F:.]*\](?::\d+)?"
    r"|(?<=host )[\w.-]+(?::\d+)?|\b[\w-]+(?:\.[\w-]+)*:\d{2,5}\b"
    r"|(?<![\w/])~?/[^\s'\":;,()\[\]]+(?::\d+)?"
)


def table(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A table of names and values, these in markdown."""
    yield f"### {title}\n\n| | |\n|---|---|"
    for name, value in rows:
        yield f"| {name} | {value} |"
    yield ""


def visible(text: str) -> str:
    """Text without characters that no file of markdown may have."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", text)


def line(value: Any) -> str:
    """Text in one line, and not a long one."""
    text = " ".join(visible(str(value)).split())
    return text if len(text) <= 300 else text[:300] + "…"


def inline(value: Any) -> str:
    """Text as part of a line or a table's cell: it reads the same, and has no other meaning."""
    text = line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def public(text: str) -> str:
    """An error's text without what it tells of machines: URLs, hosts with ports, addresses, paths."""
    return WHEREABOUTS.sub("…", text)


def fence(text: str, language: str = "") -> str:
    """Text as a block of code that it cannot close."""
    text = visible(text).replace("<!--", r"<\!--").strip("\n")
    marks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{marks}{language}\n{text}\n{marks}\n"
