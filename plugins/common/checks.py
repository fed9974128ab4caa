"""Checks of what plugins register and return: a mistake is reported with its file and line before work begins."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import sdg
from sdg_plugins.common.paths import carried_through, check_prompts, free_name
from sdg_plugins.common.results import base_fields
from sdg_plugins.common.rows import check_kept, kept_columns

if TYPE_CHECKING:
    import pyarrow as pa


def check_rollout(name: str, plugins: sdg.Plugins) -> None:
    """Raise PluginError unless a rollout is an async function of (document, generate) and of known resources."""
    entry = plugins.rollouts[name]
    rollout = entry.factory
    where = f"the rollout {name!r} of plugin {entry.plugin}{sdg.place_of(rollout)}"
    plain = inspect.unwrap(rollout)
    plain = plain if inspect.isroutine(plain) or isinstance(plain, functools.partial) else type(plain).__call__
    if inspect.isasyncgenfunction(plain):
        raise sdg.PluginError(f"{where} uses `yield`: return a list of the results instead")
    if not inspect.iscoroutinefunction(plain):
        raise sdg.PluginError(f"{where} is not async: begin it with `async def`")
    parameters = list(inspect.signature(rollout).parameters.values())
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    given = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters[:2])
    if (len(named) < 2 and not given) or named[:2] == ["generate", "document"]:
        raise sdg.PluginError(f"{where} takes ({', '.join(named)}), expected (document, generate, …)")
    for parameter in parameters[2:]:
        optional = parameter.default is not parameter.empty
        if not optional and parameter.name not in plugins.resources and "VAR" not in parameter.kind.name:
            hint = sdg.nearest(parameter.name, plugins.resources)
            raise sdg.PluginError(f"{where} needs the unknown resource {parameter.name!r}; {hint}")


def check_shape(thing: object, shape: type, what: str) -> None:
    """Raise PluginError if what a plugin created lacks a member of a Protocol, or takes other arguments.

    Args:
        thing: what the plugin created.
        shape: the Protocol.
        what: the thing's name in messages.
    """
    of = f"{what}{sdg.place_of(thing)}"
    for name, member in vars(shape).items():
        if name.startswith("_"):
            continue
        asked = list(inspect.signature(member).parameters)[1:] if inspect.isfunction(member) else None
        shown = name if asked is None else f"{name}({', '.join(asked)})"
        if not hasattr(thing, name):
            hint = (inspect.getdoc(member) or "").partition("\n")[0]
            raise sdg.PluginError(f"{of} has no `{shown}`, which sdg.{shape.__name__} requires: {hint}")
        if asked is None:
            continue
        try:
            inspect.signature(getattr(thing, name)).bind(*asked)
        except (TypeError, ValueError) as exc:
            raise sdg.PluginError(f"{of}: `{name}` differs from sdg.{shape.__name__}, {shown}: {exc}") from exc


def check_reader(reader: sdg.Reader, what: str) -> None:
    """Raise PluginError unless a plugin's reader has the members of `Reader`, with a valid schema and identity."""
    import pyarrow as pa

    check_shape(reader, sdg.Reader, what)
    of = f"{what}{sdg.place_of(reader)}"
    if not isinstance(reader.schema, pa.Schema):
        raise sdg.PluginError(f"{of}: `schema` is a {type(reader.schema).__name__}, expected a pyarrow.Schema")
    if not isinstance(reader.identity, Mapping):
        kind = type(reader.identity).__name__
        raise sdg.PluginError(f"{of}: `identity` is a {kind}, expected a mapping, such as {{'file': 'a hash'}}")
    try:
        json.dumps(dict(reader.identity))
    except (TypeError, ValueError) as exc:
        raise sdg.PluginError(f"{of}: `identity` is not a mapping that JSON can hold: {exc}") from exc


def check_blocks(parts: list[sdg.Block | sdg.BadRow], asked: int, reader: sdg.Reader) -> None:
    """Raise PluginError unless a reader returned rows of its schema, `asked` at most."""

    def problem(what: str) -> sdg.PluginError:  # where the reader is defined takes milliseconds to find out
        return sdg.PluginError(f"the reader{sdg.place_of(reader)}: read() returned {what}")

    if not isinstance(parts, list) or not all(isinstance(part, sdg.Block | sdg.BadRow) for part in parts):
        kinds = " of ".join({type(parts).__name__: 0, **{type(part).__name__: 0 for part in parts or ()}})
        raise problem(f"{kinds}, expected a list of sdg.Block and sdg.BadRow")
    for part in parts:
        if isinstance(part, sdg.Block) and not part.batch.schema.equals(reader.schema):
            there = ", ".join(f"{field.name}: {field.type}" for field in part.batch.schema)
            raise problem(f"a batch of ({there}), which differs from its `schema`")
    rows = [part.batch.num_rows if isinstance(part, sdg.Block) else 1 for part in parts]
    if 0 in rows or sum(rows) > asked:
        raise problem(f"batches of {rows} rows when asked for {asked}; after the end it must return []")


def check_columns(schema: pa.Schema, options: argparse.Namespace, fields: Iterable[str] = ()) -> None:
    """Raise InputError unless the columns that the options name exist and have suitable types."""
    check_prompts(options, schema)
    name = options.id_column
    if name is not None and name not in schema.names:
        raise sdg.InputError(f"--id-column {name}: the input has no such column; available: {', '.join(schema.names)}")
    if schema.names.count(name) > 1:
        raise sdg.InputError(f"--id-column {name}: the input has {schema.names.count(name)} columns of this name")
    kept = kept_columns(options, schema.names)
    if double := next((name for name in kept if kept.count(name) > 1), None):
        message = f"the input has {kept.count(double)} columns {double}: rename them"
        raise sdg.InputError(f"{message}, or leave them out with --drop-columns {double}")
    if options.results_column in kept and not options.flat:
        other = free_name(options.results_column, schema.names)
        message = f"the input already has a column {options.results_column}: choose another"
        raise sdg.InputError(f"{message}, such as --results-column {other}")
    check_kept(options, schema.names, [*base_fields(), *fields])
    if remark := carried_through(options, schema):
        sdg.say(remark)


def check_servers(servers: Any, what: str) -> None:
    """Raise PluginError unless a server's plugin yielded a list of URLs or Upstreams."""
    if isinstance(servers, str) or not isinstance(servers, Sequence):
        raise sdg.PluginError(f"{what} yielded a {type(servers).__name__}, expected a list of URLs")
    for server in servers:
        if not isinstance(server, str | sdg.Upstream):
            message = f"{what} yielded a list with a {type(server).__name__}, expected URLs or sdg.Upstreams"
            raise sdg.PluginError(message)


# ── Calling plugins ──────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(uri: str | None, reader: object = None) -> Iterator[None]:
    """Name the input in errors of a reader, or of the factory that opens it."""
    import pyarrow as pa

    try:
        yield
    except sdg.Error:
        raise
    except (OSError, pa.ArrowException) as exc:
        raise sdg.InputError(f"--input {uri} cannot be read: {sdg.one_line(exc)}") from exc
    except (Exception, SystemExit) as exc:
        where = sdg.describe(exc, sdg.file_of(reader))
        raise sdg.PluginError(f"the reader of --input {uri} failed: {where}") from exc


def entering(entry: sdg.Entry, kind: str, name: str, run: sdg.Run) -> contextlib.AbstractAsyncContextManager[Any]:
    """The context manager of a registered server or resource."""
    what = f"the {kind} {name!r} of plugin {entry.plugin}{sdg.place_of(entry.factory)}"
    manager = entry.factory(run)
    if not hasattr(manager, "__aenter__"):
        if inspect.iscoroutine(manager):
            manager.close()
        message = f"{what} is not an async context manager, but a {type(manager).__name__}"
        raise sdg.PluginError(f"{message}: is @contextlib.asynccontextmanager missing?")
    return cast("contextlib.AbstractAsyncContextManager[Any]", manager)


def created(factory: Callable[[sdg.Run], Any], run: sdg.Run) -> Any:
    """Call a plugin's factory; a StopIteration would get lost between threads, and the caller would wait forever."""
    try:
        return factory(run)
    except StopIteration as exc:
        raise RuntimeError("StopIteration") from exc
