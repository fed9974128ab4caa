"""Documents as one page of HTML that loads nothing from elsewhere, so that it can be sent to someone as a file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

import sdg
from sdg_plugins.common.markdown import counted, visible
from sdg_plugins.common.values import plain

if TYPE_CHECKING:
    from sdg_plugins.common.records import View

FOLDED = 1_200  # characters of a text above which it is folded: a reader opens what he wants to read
BEGINNING = 300  # characters of a folded text that stay visible
CHIP = 60  # characters of a value that stands beside others in one line

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5c6672; --line: #d9dee4; --paper: #fff; --back: #f3f5f7;
  --accent: #0b6bcb; --bad: #b3261e; --badback: #fdecea; --chip: #eef2f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #333b45; --paper: #1d232a;
  --back: #14181d; --accent: #6cb2ff; --bad: #ff8a80; --badback: #3a1f1f; --chip: #2a323b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
.about { color: var(--soft); margin: 0 0 1.5rem; }
article { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 1.25rem;
  padding: 1rem 1.25rem; }
h2 { font: 600 .9rem/1.4 ui-monospace, monospace; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 a { color: var(--soft); text-decoration: none; margin-right: .6rem; }
h3 { font-size: .8rem; margin: 1rem 0 .3rem; color: var(--soft); font-weight: 600; }
.role { color: var(--soft); font-size: .8rem; margin: .6rem 0 .1rem; }
section { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .9rem; margin-top: 1rem; }
section > h3:first-child { color: var(--accent); margin-top: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 0; padding: 0; list-style: none; }
.chips li { background: var(--chip); border-radius: 6px; padding: .1rem .55rem; font-size: .85rem; }
.chips b { color: var(--soft); font-weight: 500; margin-right: .35rem; }
.note { background: var(--badback); color: var(--bad); border-radius: 6px; padding: .4rem .7rem; margin: 0 0 .75rem;
  overflow-wrap: anywhere; }
details > summary { cursor: pointer; list-style: none; }
details > summary::-webkit-details-marker { display: none; }
details > summary .more { color: var(--accent); font-size: .85rem; display: block; }
details[open] > summary .text, details[open] > summary .more { display: none; }
details[open] > summary::before { content: "show less"; color: var(--accent); font-size: .85rem; }
@media print { body { background: none; } article { break-inside: avoid; } }
"""


def page(title: str, documents: Sequence[View], full: bool) -> str:
    """A page with some documents.

    Args:
        title: above them.
        documents: what is shown of each.
        full: nothing is folded.
    """
    begin = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    )
    about = f'<h1>{escaped(title)}</h1>\n<p class="about">{counted(len(documents), "document")}, made with sdg '
    about += f"{sdg.__version__}</p>"
    articles = [line for number, view in enumerate(documents, 1) for line in article(number, view, full)]
    return "\n".join([begin, about, *articles, "</main>\n</body>\n</html>\n"])


def article(number: int, view: View, full: bool) -> Iterator[str]:
    """One document."""
    yield f'<article id="d{number}">\n<h2><a href="#d{number}">{number}</a>{escaped(view.id)}</h2>'
    if view.error:
        error, kind = view.error.get("error", ""), view.error.get("error_type", "")
        yield f'<p class="note">failed: {escaped(error)} [{escaped(kind)}]</p>'
    elif view.note:
        yield f'<p class="note">{escaped(view.note)}</p>'
    prompt = {name: value for name, value in view.source.items() if name == view.prompt and isinstance(value, str)}
    for text in prompt.values():
        yield text_block(text, full)
    yield from fields({name: value for name, value in view.source.items() if name not in prompt}, full)
    for i, result in enumerate(view.results, 1):
        name = "result" if len(view.results) == 1 else f"result {i} of {len(view.results)}"
        yield f"<section>\n<h3>{name}</h3>"
        yield from fields(result, full, unnamed="text")
        yield "</section>"
    yield from fields({name: value for name, value in view.error.items() if name not in {"error", "error_type"}}, full)
    yield "</article>"


def fields(values: Mapping[str, Any], full: bool, unnamed: str = "") -> Iterator[str]:
    """Texts under their names, then short values side by side.

    Args:
        values: by name.
        full: nothing is folded.
        unnamed: always a text, without its name.
    """
    short = {name: value for name, value in values.items() if name != unnamed and is_short(value)}
    for name, value in values.items():
        if name in short:
            continue
        if name != unnamed:
            yield f"<h3>{escaped(name)}</h3>"
        if isinstance(value, dict) and value and all(isinstance(part, str) for part in value.values()):
            for role, part in value.items():  # a chat
                yield f'<p class="role">{escaped(role)}</p>\n{text_block(part, full)}'
        else:
            yield text_block(value if isinstance(value, str) else in_json(value), full)
    yield from chips(short.items())


def is_short(value: Any) -> bool:
    """True for numbers, truth values and texts of a few words."""
    if isinstance(value, str):
        return len(value) <= CHIP and "\n" not in value
    return not isinstance(value, dict | list) or len(in_json(value)) <= CHIP


def chips(values: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Short values side by side."""
    items = [
        f"<li><b>{escaped(name)}</b>{escaped(value if isinstance(value, str) else in_json(value))}</li>"
        for name, value in values
    ]
    if items:
        yield f'<ul class="chips">{"".join(items)}</ul>'


def text_block(text: str, full: bool) -> str:
    """A text; one that is long shows its beginning, and opens at a click."""
    whole = f'<div class="text">{escaped(text)}</div>'
    if full or len(text) <= FOLDED:
        return whole
    first = f'<div class="text">{escaped(text[:BEGINNING].rstrip())} …</div>'
    more = f'<span class="more">show all {len(text):,} characters</span>'
    return f"<details><summary>{first}{more}</summary>\n{whole}</details>"


def in_json(value: Any) -> str:
    """A value as JSON, lists and structs with indentation if they are long."""
    text = orjson.dumps(value, default=plain, option=orjson.OPT_NON_STR_KEYS).decode()
    if len(text) <= CHIP:
        return text
    return orjson.dumps(value, default=plain, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_INDENT_2).decode()


def escaped(value: object) -> str:
    """Text for HTML, without control characters."""
    return html.escape(visible(str(value)))
