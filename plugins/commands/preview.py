"""`--preview N`: shows on the terminal what a run sends and writes for a few documents, and writes nothing else.

A preview is a run like any other, by the same engine. But its output and state are a folder that is deleted at its end,
it has no observers, and notes are taken of what the rollouts send and receive.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

import sdg
from sdg_plugins.commands.run import Stop, run_all
from sdg_plugins.common.chunks import plain
from sdg_plugins.common.command_line import Config
from sdg_plugins.common.files import format_of, split_uri
from sdg_plugins.common.notes import Exchange, Notes, Outcome
from sdg_plugins.servers.responses import SHORTEST_KEY

LONGEST = 10_000  # characters of a text that are shown: some pages
LOG_LINES = 20  # of a server's log, if the preview fails
TAIL = 2_000  # of these, from its end


def rehearsed(config: Config, folder: str, documents: int) -> Config:
    """A config that runs only its first documents, as a single rank, in a folder of its own."""
    options = argparse.Namespace(**vars(config.options))
    options.output, options.state_dir = f"{folder}/{config.name}", f"{folder}/{config.name}/.sdg"
    writers = config.plugins.writers
    if options.writer not in writers or options.writer == split_uri(config.options.output)[0]:
        kind = format_of(options.output_filename)  # the configured place is not touched
        options.writer = kind if kind in writers else "parquet"
    options.max_documents = min(documents, options.max_documents or documents)
    options.rank, options.world_size = 0, 1
    options.fresh = options.retry_failed = False
    options.no_progress, options.max_failure_rate = True, 1.0
    config.plugins.quiet = True
    return Config(options, config.plugins)


def preview(configs: list[Config]) -> None:
    """Show the first documents of each config."""
    import uvloop

    @contextlib.asynccontextmanager
    async def shown(engine: sdg.Engine, stop: Stop) -> AsyncIterator[None]:
        yield
        notes = notes_of[engine.run.options.output_config]
        await notes.finish(engine)
        if len(configs) > 1:
            print(heading(f"config {engine.run.options.output_config}", "━"))
        print(without_keys(Page(notes).text(), engine.run.options.api_key_env), flush=True)

    with tempfile.TemporaryDirectory(prefix="sdg-preview-") as folder:
        rehearsals = [rehearsed(config, folder, config.options.preview) for config in configs]
        notes_of = {config.name: Notes() for config in rehearsals}
        for config in rehearsals:
            notes_of[config.name].attach(config.plugins, config.options.rollout, config.options.writer)
        try:
            uvloop.run(run_all(rehearsals, shown))
        except BaseException as exc:
            failed = isinstance(sdg.first_cause(exc), sdg.ServerError)
            for log in Path(folder).rglob("logs/*.log") if failed else ():  # it is about to be deleted
                ends = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                sdg.say(without_keys("\n".join([f"the end of {log.name}:", *ends])))
            raise


# ── On the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────


class Page:
    """The notes as text."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def text(self) -> str:
        """All documents, and how many of them are what."""
        lines = [line for number, outcome in enumerate(self.notes.outcomes, 1) for line in document(number, outcome)]
        return "\n".join([*lines, *self.summary()])

    def summary(self) -> Iterator[str]:
        """What the rows are made of, and the count."""
        yield heading("in all")
        if self.notes.schema is not None:
            yield "columns"
            yield from (f"    {field.name}: {field.type}" for field in self.notes.schema)
        statuses = [outcome.status for outcome in self.notes.outcomes]
        names = {"row": "rows", "filtered": "filtered", "failed": "failed", "": "not finished"}
        counts = [f"{name}: {statuses.count(status)}" for status, name in names.items() if status or "" in statuses]
        counts = [f"documents: {len(statuses)}", f"requests: {len(self.notes.requests)}", *counts]
        yield f"{', '.join(counts)}. Nothing was written."


def document(number: int, outcome: Outcome) -> Iterator[str]:
    """A document's requests, and what became of it."""
    yield heading(f"document {number}{outcome.id and f' · {outcome.id}'}")
    for i, requests in enumerate(outcome.rollouts, 1):
        if len(outcome.rollouts) > 1:
            yield f"rollout {i} of {len(outcome.rollouts)}"
        for request in requests:
            yield from request_lines(request, outcome.row)
    if outcome.row is not None:
        yield "row"
        yield from fields(outcome.row, 4)
    elif outcome.failure is not None:
        record = outcome.failure
        yield f"FAILED after {record['attempts']} attempts: {clean(record['error'])} [{record['error_type']}]"
        yield from fields({"document": record["document"]} if not outcome.rollouts else {}, 4)
    else:
        yield "FILTERED: the rollout returned nothing" if outcome.status else "NOT FINISHED"
    yield ""


def request_lines(request: Exchange, row: Mapping[str, Any] | None) -> Iterator[str]:
    """A request as it was sent, and its answer, unless it stands in the row as it is."""
    payload = dict(request.payload)
    messages = payload.pop("messages", None)
    prompt = payload.pop("prompt", None)
    yield f"request POST {request.path}"
    yield from fields(payload, 4)
    for message in messages if isinstance(messages, list) else []:
        rest = {key: value for key, value in message.items() if key not in {"role", "content"}}
        yield from fields({f"[{message.get('role')}]": message.get("content"), **rest}, 4)
    if prompt is not None:
        yield from fields({"prompt": prompt}, 4)
    if request.reply is None:
        yield f"no answer: {clean(request.error or 'the run ended before it came')}"
        return
    results = [result for value in (row or {}).values() if isinstance(value, list) for result in value]
    if any(isinstance(result, dict) and result.get("text") == request.reply.text for result in results):
        yield "answer: see the row"
        return
    reply = dataclasses.asdict(request.reply)
    choices = {f"choice {i}": choice["text"] for i, choice in enumerate(reply.pop("choices"), 1)}
    yield "answer"
    yield from fields({name: value for name, value in {**reply, **choices}.items() if value is not None}, 4)


def fields(values: Mapping[str, Any], indent: int) -> Iterator[str]:
    """Names and values, a line each; texts of several lines, lists and structs stand below their names."""
    width = shutil.get_terminal_size().columns
    for name, value in values.items():
        lead = f"{' ' * indent}{clean(name)}:"
        if isinstance(value, str):
            text = clean(shortened(value))
            if "\n" not in text and len(lead) + len(text) < max(width, 60):
                yield f"{lead} {text}"
            else:
                yield lead
                yield textwrap.indent(text, " " * (indent + 4))
        elif isinstance(value, dict) and value:
            yield lead
            yield from fields(value, indent + 4)
        elif isinstance(value, list) and any(isinstance(item, dict | list | str) for item in value):
            yield lead
            yield from fields({f"- {i}": item for i, item in enumerate(value, 1)}, indent + 4)
        else:
            yield f"{lead} {clean(shortened(orjson.dumps(value, default=plain).decode()))}"


def shortened(text: str) -> str:
    """A text, whole unless it is very long: then its beginning and its end."""
    if len(text) <= LONGEST:
        return text
    left = len(text) - LONGEST
    return f"{text[: LONGEST - TAIL]}\n[… {left:,} of {len(text):,} characters are not shown …]\n{text[-TAIL:]}"


def clean(text: str) -> str:
    """A text without what would make a terminal do something."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def heading(text: str, line: str = "─") -> str:
    """A line across the terminal with a text in it."""
    width = max(40, min(120, shutil.get_terminal_size().columns))
    text = clean(text)
    full = f"{line * 3} {text} {line * max(3, width - len(text) - 5)}"
    return f"\x1b[1m{full}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else full


def without_keys(text: str, *names: str) -> str:
    """A text without the secrets that the environment has, whatever a plugin has sent."""
    for name in (*names, "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        secret = os.environ.get(name, "")
        if len(secret) >= SHORTEST_KEY:
            text = text.replace(secret, "***")
    return text
