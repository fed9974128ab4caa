"""`--preview N`: show on the terminal what a run sends and writes for a few documents, and write nothing.

A preview is a run like any other, by the same engine. Only its output and state are in a folder that is deleted at the
end, observers are not called, and `Notes` records what the rollouts send and receive.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.commands.jobs import run_all
from sdg_plugins.commands.stop import Stop
from sdg_plugins.common.command_line import Config
from sdg_plugins.common.ending import run_to_the_end
from sdg_plugins.common.files import file_writer, uses_spool
from sdg_plugins.common.markdown import counted
from sdg_plugins.common.notes import DocumentRecord, Exchange, Notes
from sdg_plugins.common.options import program
from sdg_plugins.common.prices import cost_of, in_money, tokens_of
from sdg_plugins.common.secrets import secrets_of
from sdg_plugins.common.terminal import field_lines, heading, printable

PREFIX, LOCK = "sdg-preview-", "lock"  # of temporary folders; the file in them
LOG_LINES = 20  # of a server's log, if the preview fails


def preview_config(config: Config, folder: str, documents: int) -> Config:
    """A config that runs only the first documents of another one, as a single rank, below a temporary folder."""
    options = argparse.Namespace(**vars(config.options))
    options.output, options.state_dir = f"{folder}/output", f"{folder}/output/.sdg/{config.name}"
    writers = config.plugins.writers
    if options.writer not in writers or uses_spool(config.options):
        name = file_writer(options)  # the real output is not touched
        options.writer = options.file_writer = name if name in writers else "parquet"
    options.max_documents = min(documents, options.max_documents or documents)
    options.rank, options.world_size = 0, 1
    options.fresh = options.retry_failed = False
    options.no_progress, options.max_failure_rate = True, 1.0
    config.plugins.quiet = True
    return Config(options, config.plugins)


@contextlib.contextmanager
def preview_folder() -> Iterator[str]:
    """A temporary folder that is deleted at the end, as are those that previews have left which were killed.

    A preview holds the lock of its folder, which the kernel takes back from a process that is gone.
    """
    import filelock

    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError, filelock.Timeout):
            if left.parent.lstat().st_uid == os.getuid():  # others cannot have put a link there
                with filelock.FileLock(left, timeout=0):
                    shutil.rmtree(left.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder, filelock.FileLock(f"{folder}/{LOCK}"):
        yield folder


def preview(configs: list[Config]) -> None:
    """Run and show the first documents of each config."""

    @contextlib.asynccontextmanager
    async def shown(engine: sdg.Engine, stop: Stop) -> AsyncIterator[None]:
        yield
        notes = notes_of[engine.run.options.output_config]
        await notes.finish(engine)
        if len(configs) > 1:
            print(heading(f"config {engine.run.options.output_config}", "━"))
        text = "\n".join([text_of(notes), *token_lines(engine, notes, totals[engine.run.options.output_config])])
        print(secrets_of(engine.run.options).hidden_in(text), flush=True)

    with preview_folder() as folder:
        totals = {config.name: config.options.max_documents for config in configs}
        previews = [preview_config(config, folder, config.options.preview) for config in configs]
        notes_of = {config.name: Notes() for config in previews}
        for config in previews:
            notes_of[config.name].attach(config.plugins, config.options.rollout, config.options.writer)
        try:
            run_to_the_end(run_all(previews, shown))
        except BaseException as exc:
            failed = isinstance(sdg.first_cause(exc), sdg.ServerError)
            for log in Path(folder).rglob("logs/*.log") if failed else ():  # the folder is about to be deleted
                lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                sdg.say(secrets_of(configs[0].options).hidden_in("\n".join([f"the end of {log.name}:", *lines])))
            raise


# ── On the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────


def text_of(notes: Notes) -> str:
    """All documents of a run, and a summary."""
    lines = [line for number, outcome in enumerate(notes.outcomes, 1) for line in document_lines(number, outcome)]
    return "\n".join([*lines, *summary_lines(notes)])


def summary_lines(notes: Notes) -> Iterator[str]:
    """The columns of the rows, and how many documents had which outcome."""
    yield heading("summary")
    if notes.schema is not None:
        yield "columns"
        yield from (f"    {field.name}: {field.type}" for field in notes.schema)
    statuses = [outcome.status for outcome in notes.outcomes]
    names = {"row": "rows", "filtered": "filtered", "failed": "failed", "": "not finished"}
    counts = [f"{name}: {statuses.count(status)}" for status, name in names.items() if status or "" in statuses]
    counts = [f"documents: {len(statuses)}", f"requests: {len(notes.requests)}", *counts]
    yield f"{', '.join(counts)}. Nothing was written."


def token_lines(engine: sdg.Engine, notes: Notes, most: int | None) -> Iterator[str]:
    """The tokens of the requests, and what the whole input would take at that rate.

    Args:
        engine: that has run the preview.
        notes: what it did.
        most: --max-documents of the run.
    """
    run, ended = engine.run, sum(1 for outcome in notes.outcomes if outcome.status)
    spent = tokens_of(run.counts, run.models)
    if not ended or not any(tokens.total for tokens in spent.values()):
        return
    lines = [("tokens", spent)]
    total = engine.intake.reader.total()
    if total is not None:
        total = min(total, most or total)
        whole = {name: tokens.times(total / ended) for name, tokens in spent.items()}
        lines.append((f"all {counted(total, 'document')}", whole))
    for name, models in lines:
        prompt, completion = (sum(tokens[kind] for tokens in models.values()) for kind in (0, 1))
        cost = cost_of(run.options, models)
        money = "" if cost is None else f", cost {in_money(cost)}"
        yield f"{name}: {prompt:,.0f} prompt, {completion:,.0f} completion tokens{money}"
    if total is not None and total > ended:
        yield f"`{program()} estimate` with the same options says it with ranges, from a sample of the input"


def document_lines(number: int, outcome: DocumentRecord) -> Iterator[str]:
    """A document's requests and its outcome."""
    yield heading(f"document {number}{outcome.id and f' · {outcome.id}'}")
    for i, requests in enumerate(outcome.rollouts, 1):
        if len(outcome.rollouts) > 1:
            yield f"rollout {i} of {len(outcome.rollouts)}"
        for request in requests:
            yield from request_lines(request, outcome.row)
    if outcome.row is not None:
        yield "row"
        yield from field_lines(outcome.row, 4)
    elif outcome.failure is not None:
        record = outcome.failure
        attempts = f"{record['attempts']} attempt{'s' * (record['attempts'] != 1)}"
        yield f"FAILED after {attempts}: {printable(record['error'])} [{record['error_type']}]"
        yield from field_lines({"document": record["document"]} if not outcome.rollouts else {}, 4)
    else:
        yield "FILTERED: the rollout returned nothing" if outcome.status else "NOT FINISHED"
    yield ""


def request_lines(request: Exchange, row: Mapping[str, Any] | None) -> Iterator[str]:
    """A request as it was sent, and its response unless the row has the same text."""
    payload = dict(request.payload)
    messages = payload.pop("messages", None)
    prompt = payload.pop("prompt", None)
    yield f"request POST {request.path}{f' to the model {request.to}' if request.to else ''}"
    yield from field_lines(payload, 4)
    for message in messages if isinstance(messages, list) else []:
        rest = {key: value for key, value in message.items() if key not in {"role", "content"}}
        yield from field_lines({f"[{message.get('role')}]": message.get("content"), **rest}, 4)
    if prompt is not None:
        yield from field_lines({"prompt": prompt}, 4)
    if request.reply is None:
        yield f"no response: {printable(request.error or 'the run ended first')}"
        return
    results = [result for value in (row or {}).values() if isinstance(value, list) for result in value]
    if any(isinstance(result, dict) and result.get("text") == request.reply.text for result in results):
        yield "response: see the row"
        return
    reply = dataclasses.asdict(request.reply)
    choices = {f"choice {i}": choice["text"] for i, choice in enumerate(reply.pop("choices"), 1)}
    yield "response"
    yield from field_lines({name: value for name, value in {**reply, **choices}.items() if value is not None}, 4)
