"""Rows and requests on a terminal: names and values line by line, long texts cut, control characters escaped."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from sdg_plugins.common.values import plain

LONGEST = 10_000  # characters of a text that are shown: a few pages
BOLD, DIM, RED = "1", "2", "31"


def field_lines(values: Mapping[str, Any], indent: int, longest: int = LONGEST) -> Iterator[str]:
    """Names and values, one per line. Long texts, lists and structs follow below their names.

    Args:
        values: by name.
        indent: columns.
        longest: characters of a text that are shown; 0 for all.
    """
    width = shutil.get_terminal_size().columns
    for name, value in values.items():
        lead = f"{' ' * indent}{printable(name)}:"
        if isinstance(value, str):
            text = printable(shorten(value, longest))
            if "\n" not in text and len(lead) + len(text) < max(width, 60):
                yield f"{styled(lead, DIM)} {text}"
            else:
                yield styled(lead, DIM)
                yield textwrap.indent(text, " " * (indent + 4))
        elif isinstance(value, dict) and value:
            yield styled(lead, DIM)
            yield from field_lines(value, indent + 4, longest)
        elif isinstance(value, list) and any(isinstance(item, dict | list | str) for item in value):
            yield styled(lead, DIM)
            yield from field_lines({f"- {i}": item for i, item in enumerate(value, 1)}, indent + 4, longest)
        else:
            text = shorten(orjson.dumps(value, default=plain, option=orjson.OPT_NON_STR_KEYS).decode(), longest)
            yield f"{styled(lead, DIM)} {printable(text)}"


def shorten(text: str, longest: int = LONGEST) -> str:
    """A text, or the beginning and the end of one that is longer than `longest` characters."""
    if not longest or len(text) <= longest:
        return text
    tail = longest // 5
    hidden = len(text) - longest
    return f"{text[: longest - tail]}\n[… {hidden:,} of {len(text):,} characters are not shown …]\n{text[-tail:]}"


def printable(text: str) -> str:
    """A text with its control characters escaped, because a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def heading(text: str, line: str = "─") -> str:
    """A line across the terminal that contains a text."""
    width = max(40, min(120, shutil.get_terminal_size().columns))
    text = printable(text)
    return styled(f"{line * 3} {text} {line * max(3, width - len(text) - 5)}", BOLD)


def styled(text: str, style: str) -> str:
    """Text in an ANSI style, if standard output is a terminal that shows it."""
    return f"\x1b[{style}m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
