"""A run's state folder: its identity, its lock, the files that all ranks share, and how to start over."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash

import sdg
from sdg_plugins.common.claims import (
    claim_output,
    publish_in,
    refuse_nested,
    refuse_owned,
    release_output,
    revoke_claims,
    write_temporary,
    writer_of,
)
from sdg_plugins.common.defaults import DEMO_OUTPUT
from sdg_plugins.common.files import default_state_dir, expanded, rank_file, split_uri, sync
from sdg_plugins.common.identity import EDITED, changes_since, different_run, identity_of, with_edits
from sdg_plugins.common.models import recordable
from sdg_plugins.common.outputs import chunk_files, has_output, output_files, refuse_others, untouched
from sdg_plugins.common.processes import asked_for
from sdg_plugins.common.results import annotated_fields, base_fields
from sdg_plugins.common.rows import messages_type

if TYPE_CHECKING:
    import pyarrow as pa

HUB_FILES = 100_000  # in a repository
LOOK = 1000  # rows that are read to estimate the number of all
# Files of the state that belong to the data.
OWN = re.compile(r"(schema|stats|marks|\d{5,}\.(stats|attempt|meeting))\.json|\d{5,}\.(retry|claimed|sqlite3(-\w+)?)")
DEMO_MODEL = "demo-extractive"  # of the server `demo`


# ── Shared files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def publish_once(run: sdg.Run, name: str, content: bytes) -> bytes:
    """Create a file of the state atomically unless it exists. Returns its content: the first of many ranks wins."""
    return publish_in(run.state, name, content, writer_of(run), private_folder(run))


def private_folder(run: sdg.Run) -> Path:
    """Where a rank writes what it renames into the state: with a lease, a folder that is gone when that is lost."""
    return run.output.fence.folder if run.output.fence else run.state


def spool_folder(run: sdg.Run) -> Path:
    """Where the rows of open chunks wait."""
    return run.output.fence.folder if run.output.fence else run.state / "open"


def replace_file(run: sdg.Run, name: str, content: bytes) -> None:
    """Write a file of the state, whole and durable."""
    temporary = write_temporary(private_folder(run), name, content, writer_of(run))
    os.replace(temporary, run.state / name)
    sync(run.state)


# ── Schema of results ────────────────────────────────────────────────────────────────────────────────────────────────


def as_text(schema: pa.Schema) -> str:
    """An Arrow schema as text for JSON."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_of(text: str) -> pa.Schema:
    """The Arrow schema of a text from `as_text`."""
    import pyarrow as pa

    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def recorded_fields(state: Path) -> dict[str, pa.DataType] | None:
    """The fields of results that this run settled on; None if it has not yet. Raises StateError."""
    path = state / "schema.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return {field.name: field.type for field in schema_of(json.loads(content)["arrow"])}
    except (ValueError, KeyError, TypeError, OSError) as exc:  # the last one is Arrow's
        raise broken(path) from exc


def broken(path: Path) -> sdg.StateError:
    """The error for a file of the state that cannot be read."""
    return sdg.StateError(f"state {path} is broken: restore it from a backup, or start over with --fresh")


def fixed_fields(options: argparse.Namespace) -> dict[str, pa.DataType]:
    """The fields that results have whatever the rollout is."""
    import pyarrow as pa

    fields = {**base_fields(), **({"messages": messages_type()} if options.keep_messages else {})}
    several = options.rollouts_per_document > 1 and not options.flat
    return {**fields, "rollout": pa.int64()} if several else fields


def promised_fields(run: sdg.Run) -> dict[str, pa.DataType] | None:
    """The fields that are known before the first result: by the rollout's annotation, or its function `fields`."""
    rollout = run.plugins.rollouts[run.options.rollout].factory
    told = getattr(rollout, "fields", None)
    own: dict[str, pa.DataType] | None = told(run) if told else None
    return annotated_fields(rollout) if own is None else own


def settle_fields(run: sdg.Run, own: dict[str, pa.DataType] | None) -> dict[str, pa.DataType] | None:
    """Record the fields of results for all ranks, unless another rank was first. Returns the recorded ones."""
    import pyarrow as pa

    if own is None:
        return None
    base = fixed_fields(run.options)
    special = {*base, "extra", "tool_calls", "logprobs", EDITED}
    fields = {**base, **{name: kind for name, kind in own.items() if name not in special}}
    names = {name: str(kind) for name, kind in fields.items()}
    content = {"fields": names, "arrow": as_text(pa.schema(list(fields.items())))}
    publish_once(run, "schema.json", json.dumps(content, indent=2).encode())
    return recorded_fields(run.state)


# ── Identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def claim_state(run: sdg.Run, reader: sdg.Reader, changed_rows: Callable[[], str | None] = lambda: None) -> bool:
    """Make the state this run's, or check that it is; sets the fingerprint.

    Args:
        run: whose.
        reader: of its input.
        changed_rows: says which of the rows have changed that chunks were made of; called if files have.

    Returns:
        Whether only documents that have failed are to be run: those are all that --retry-failed runs with edited code.

    Raises:
        StateError: the state belongs to a different run; each difference is named.
        OutputError: there is output without a state.
    """
    path = run.state / "run.json"
    derived = run.options.records_per_chunk is None
    if derived:
        run.options.records_per_chunk = recorded_size(run) or size_of_chunks(documents_in(reader))
    run.source = getattr(reader, "source", {})
    run.input_revision = revision_of(reader)
    mine = record_of(run, reader)
    if not path.exists():
        check_beginning(run)
    recorded = parse_run(path, publish_once(run, path.name, json.dumps(mine, indent=2).encode()))
    run.fingerprint = recorded["fingerprint"]
    if derived and recorded["identity"]["records_per_chunk"] != run.options.records_per_chunk:  # another rank was first
        run.options.records_per_chunk = None
        return claim_state(run, reader, changed_rows)
    changes = changes_since(run, reader, recorded)
    if files_changed(reader, recorded, changes) and not untouched(run):
        changes = [*changes, rows] if (rows := changed_rows()) else []
    if changes and not run.options.part and (kind := replaceable(run, recorded)):
        if kind != "nothing":
            sdg.say(f"{run.options.output} holds {kind} with other options ({'; '.join(changes[:3])}): it is replaced")
        start_over(run)
        run.options.records_per_chunk = None if derived else run.options.records_per_chunk
        return claim_state(run, reader, changed_rows)
    if changes:
        raise different_run(run, changes)
    claim_output(run, recorded["run"])
    mine["options"]["max_documents"] = most_documents(recorded["options"]["max_documents"], run.options.max_documents)
    # Later processes find the ranks by it, also if one of them was called for a single rank.
    mine["options"]["processes"] = mine["options"]["processes"] or recorded["options"].get("processes")
    now = with_edits(run, recorded | {name: mine[name] for name in ("identity", "options", "stamp")}, recorded)
    now["estimate"] = recorded.get("estimate", False) and mine["estimate"]
    if now != recorded:
        replace_file(run, path.name, json.dumps(now, indent=2).encode())
    return bool(now["identity"] != mine["identity"])


def most_documents(before: int | None, now: int | None) -> int | None:
    """The --max-documents to record: it never shrinks, because existing rows are kept."""
    most = max(before, now) if before and now else None
    if now and most != now:
        sdg.say(f"--max-documents {now:,} is less than before ({before or 'all'}): existing rows are kept")
    return most


def record_of(run: sdg.Run, reader: sdg.Reader) -> dict[str, Any]:
    """What `run.json` holds of a run that begins now."""
    identity = identity_of(run, reader)
    return {
        "sdg": sdg.__version__,
        "state_version": sdg.STATE_VERSION,
        "fingerprint": xxhash.xxh3_64_hexdigest(json.dumps(identity).encode()),
        "run": uuid.uuid4().hex,
        "identity": identity,
        "options": recordable_options(run),
        "source": dict(run.source),
        "source_schema": as_text(reader.schema),
        "stamp": stamp_of(reader, len(identity["input"])),
        "estimate": run.options.sample is not None,
    }


def check_beginning(run: sdg.Run) -> None:
    """Raise OutputError or StateError if there are things of a run, which this one does not continue."""
    refuse_strangers(run)
    refuse_owned(run, None)
    refuse_nested(run)
    if orphans := sorted(run.state.glob("[0-9]*.sqlite3")):
        missing = f"{run.state / 'run.json'} does not: restore it, or start over with --fresh"
        raise sdg.StateError(f"{orphans[0]} exists, but {missing}")
    if run.options.retry_failed:
        raise sdg.StateError(f"there is no run in {run.state} that --retry-failed could complete: is --output correct?")


def recorded_size(run: sdg.Run) -> int | None:
    """Documents per chunk as the run began; None if it has not."""
    path = run.state / "run.json"
    return int(parse_run(path, path.read_bytes())["identity"]["records_per_chunk"]) if path.exists() else None


def size_of_chunks(documents: int | None) -> int:
    """Documents per chunk for an input: a hundredth of it, so that the first file comes early, within limits."""
    sizes = (100, 200, 500, 1000)
    return max(size for size in sizes if size == sizes[0] or documents is None or 100 * size <= documents)


def documents_in(reader: sdg.Reader) -> int | None:
    """The number of rows, as far as a reader that is at its beginning can know it after a look at the first ones."""
    total = reader.total()
    if total is None:
        rows = sum(1 if isinstance(part, sdg.BadRow) else part.batch.num_rows for part in reader.read(LOOK))
        total = reader.total() if rows == LOOK else rows
        reader.seek(0, None)
    return total


def check_number_of_files(run: sdg.Run, reader: sdg.Reader) -> None:
    """Raise UsageError if a run that has written nothing yet would make more files than the Hub takes.

    Args:
        run: with the number of documents in a chunk.
        reader: of its input, at the beginning.
    """
    options = run.options
    if options.writer != "hf" or options.max_file_size or not options.output.startswith("hf://datasets/"):
        return
    documents = documents_in(reader) or 0
    files = -(-min(documents, options.max_documents or documents) // options.records_per_chunk)
    if files > HUB_FILES and not has_output(run):
        raise sdg.UsageError(
            f"--output {options.output}: {documents:,} documents make about {files:,} files, and the Hub takes "
            f"{HUB_FILES:,} in a repository: merge them with --max-file-size 500MB, or raise --records-per-chunk"
        )


def stamp_of(reader: sdg.Reader, files: int) -> Any:
    """What changes when the first `files` files of an input are written again; None if its reader does not know."""
    stamp = getattr(reader, "stamp", None)
    return stamp(files) if stamp else None


def files_changed(reader: sdg.Reader, recorded: Mapping[str, Any], changes: list[str]) -> bool:
    """True if nothing but files of the input have changed, as far as that can be seen without reading them.

    Args:
        reader: of the input.
        recorded: the content of `run.json`.
        changes: from `changes_since`.
    """
    now, earlier = stamp_of(reader, len(recorded["identity"]["input"])), recorded.get("stamp")
    if now is None or not earlier:
        return False
    if changes:
        return all(change.startswith("input ") for change in changes)
    grown = now[1] != earlier[1]  # the last file: what `Reader.continues` has accepted
    return bool(now[0] != earlier[0] or (not grown and now[2] != earlier[2]))


def revision_of(reader: sdg.Reader) -> str:
    """The revision of the input: the one that its source has, else a hash of its identity."""
    identity = xxhash.xxh3_64_hexdigest(json.dumps(dict(reader.identity)).encode())
    return str(getattr(reader, "source", {}).get("revision", identity))


def goal_of(reader: sdg.Reader, options: argparse.Namespace) -> str:
    """What a rank has done when it has finished: it is open again if the input grows, or if more of it is requested."""
    return f"{options.max_documents or 'all'} of {revision_of(reader)}"


def recordable_input(options: argparse.Namespace) -> str | None:
    """The input as an absolute path, or as the URI that it is; None for the demo."""
    uri: str | None = options.input
    return os.path.abspath(uri) if uri and split_uri(uri)[0] == "file" else uri


def recordable_options(run: sdg.Run) -> dict[str, Any]:
    """The options as JSON, without secrets, and such that other commands can use them in another folder."""
    every = {**asked_for(run.options), "models": recordable(run.options.models)}
    options: dict[str, Any] = json.loads(json.dumps(every, default=str))
    options["base_url"] = [sdg.redact(url) for url in run.options.base_url or []]
    options["input"] = recordable_input(run.options)
    options["plugin"] = [
        os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else name for name in options["plugin"] or []
    ]
    return options


def parse_run(path: Path, content: bytes) -> dict[str, Any]:
    """The content of a state's `run.json`. Raises StateError."""
    try:
        recorded = json.loads(content)
        if recorded.get("discarded"):
            raise sdg.StateError(f"{path.parent} is being deleted by --fresh: run again, which completes that")
        version = recorded["state_version"]
        if version == sdg.STATE_VERSION and not (int(recorded["options"]["world_size"]) and recorded["identity"]):
            raise ValueError("incomplete")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise broken(path) from exc
    if version != sdg.STATE_VERSION:
        raise sdg.wrong_version(path, version)
    return cast("dict[str, Any]", recorded)


@contextlib.contextmanager
def columns_of(run: sdg.Run, reader: sdg.Reader) -> Iterator[None]:
    """Raise StateError for columns that are missing only because they are those of a different run's input."""
    try:
        yield
    except sdg.InputError:
        path = run.state / "run.json"
        if run.source_schema is not None and path.exists():
            recorded = parse_run(path, path.read_bytes())
            before, now = recorded["options"]["input"], recordable_input(run.options)
            content = recorded["identity"]["input"]
            if before != now and reader.identity != content and not reader.continues(content):
                names = [sdg.redact(uri) if uri else "the demo" for uri in (before, now)]
                raise different_run(run, [f"input {' → '.join(names)}"]) from None
        raise


def remember_source(run: sdg.Run) -> None:
    """Set what the first process of this run recorded of the input, if there was one.

    What another input has left is ignored if it may be replaced: its columns are not those of this one.
    """
    path = run.state / "run.json"
    if path.exists():
        recorded = parse_run(path, path.read_bytes())
        if recorded["options"]["input"] != recordable_input(run.options) and replaceable(run, recorded):
            return
        run.source = recorded.get("source", {})
        run.source_schema = schema_of(recorded["source_schema"])


def check_state_dir(run: sdg.Run) -> None:
    """Raise StateError if the state belongs to another output.

    Outputs with similar names, such as s3://a/b-c and s3://a-b/c, have the same default place. A state inside its
    output is moved and copied with it; any other may be used again if its output was moved.
    """
    options, path = run.options, run.state / "run.json"
    default = options.state_dir == default_state_dir(options.output, options.output_config)
    local = split_uri(options.output)[0] == "file"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken file is reported by its readers
        recorded = json.loads(path.read_bytes())
        theirs, config = str(recorded["options"]["output"]), recorded["options"]["output_config"]
        if config != options.output_config and not options.fresh and not replaceable(run, recorded):
            raise sdg.StateError(f"state {run.state} belongs to --output-config {config}: choose another --state-dir")
        if local == default:
            return
        moved = local and not os.path.exists(expanded(theirs))
        here, there = (
            (os.path.realpath if local else str)(expanded(uri).rstrip("/")) for uri in (options.output, theirs)
        )
        if here != there and not moved:
            raise sdg.StateError(f"state {run.state} belongs to the output {theirs}: choose another --state-dir")


def replaceable(run: sdg.Run, recorded: Mapping[str, Any]) -> str:
    """What a state holds that a run with other options may replace; "" if it is another run.

    That is a demo; an estimate, which is made to choose options by; or nothing, for example after a mistyped model.
    """
    if run.options.output == DEMO_OUTPUT and recorded["identity"]["model"] == DEMO_MODEL:
        return "a demo"
    return "an estimate" if recorded.get("estimate") else "nothing" if untouched(run) else ""


# ── Files of the output ──────────────────────────────────────────────────────────────────────────────────────────────


def refuse_strangers(run: sdg.Run) -> None:
    """Raise OutputError if there is output, but no state of the run that wrote it."""
    if not (run.state / "run.json").exists() and (strangers := output_files(run)):
        refuse_others(run, set(chunk_files(run, run.options.output_config, run.options.output_filename)))
        raise sdg.OutputError(
            f"{run.output.path(strangers[0])} exists, but the state of its run does not: "
            "choose another --output, or --fresh, which deletes an earlier run's files"
        )


def start_over(run: sdg.Run) -> None:
    """Delete what this run, or the run that the state belongs to, has written, and nothing else."""
    import filelock

    record: dict[str, Any] = {}
    with contextlib.ExitStack() as locks:
        for path in run.state.glob("*.lock"):
            if path != rank_file(run.state, run.options.rank, "lock"):
                try:
                    locks.enter_context(filelock.FileLock(path, timeout=0))
                except filelock.Timeout as exc:
                    raise sdg.StateError(f"another process is using {run.state} ({path.name}): stop it") from exc
        names = {(run.options.output_config, run.options.output_filename)}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a broken file names nothing
            record = json.loads((run.state / "run.json").read_bytes())
            names.add((record["options"]["output_config"], record["options"]["output_filename"]))
        doomed = {file for config, template in names for file in chunk_files(run, config, template)}
        refuse_others(run, doomed)
        # From here on the state is void until its last file, this one, is gone: whoever finds it goes on deleting.
        replace_file(run, "run.json", json.dumps({**record, "discarded": True}).encode())
        revoke_claims(run)
        for file in sorted(doomed):
            run.output.delete(file)
        for path in sorted(run.state.iterdir()):
            if OWN.fullmatch(path.name) and path.name != f"{run.options.rank:05d}.attempt.json":  # this one
                path.unlink()
        for path in run.state.glob("ranks/*/*.sqlite3*"):
            path.unlink()
        release_output(run)
        sync(run.state)
        (run.state / "run.json").unlink(missing_ok=True)
        sync(run.state)


def discarded(run: sdg.Run) -> bool:
    """True if a process was killed while it deleted this state: that has to be finished."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((run.state / "run.json").read_bytes()).get("discarded"))
    return False
