"""Templates of prompts: text with `[[DOCUMENT]]` and `[[COLUMN]]`, or Jinja in its sandbox."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

import sdg
from sdg_plugins.common.kinds import Convert, json_text
from sdg_plugins.common.paths import follow, parse_path, prompt_column_of, type_at
from sdg_plugins.common.values import jsonable, prune

PLACEHOLDER = re.compile(r"\[\[([^\[\]]+(?:\[-?\d+\][^\[\]]*)*)\]\]")  # a column, or a path in its values


class Jinja(str):
    """The text of a Jinja template."""

    __slots__ = ()


def parse_template(value: str) -> str:
    """The text of a template, which is given as text or @FILE."""
    text = sdg.text_or_file(value)
    if not (value.startswith("@") and value.endswith(".j2")):
        return text
    import jinja2

    try:
        environment().parse(text)
    except jinja2.TemplateSyntaxError as exc:
        raise argparse.ArgumentTypeError(f"{value[1:]} line {exc.lineno}: {exc.message}") from exc
    return Jinja(text)


def filler_of(template: str, run: sdg.Run) -> Callable[[sdg.Document], str]:
    """A function that fills the template; raises UsageError if it cannot."""
    check_places(template, run)
    if not isinstance(template, Jinja):
        clean = {field.name: convert for field in run.schema or () if (convert := prune(field.type))}
        return functools.partial(fill, template, clean=clean)
    compiled = environment().from_string(template)
    return lambda document: str(compiled.render({**document.row, "id": document.id, "document": document.text}))


@functools.cache
def environment() -> Any:
    """Jinja's sandbox: templates may come from anywhere. An undefined name is an error, not an empty text."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError as exc:
        raise sdg.PluginError("a template in a file .j2 needs a package that is missing: pip install jinja2") from exc
    return jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


def names_in(template: str) -> set[str]:
    """The columns that a template names; DOCUMENT, in Jinja `document`, is the text."""
    if not isinstance(template, Jinja):
        return set(PLACEHOLDER.findall(template))
    import jinja2.meta

    return set(jinja2.meta.find_undeclared_variables(environment().parse(template)))


def check_places(template: str, run: sdg.Run) -> None:
    """Raise UsageError if a template names a column that the input lacks, or if it says nothing about documents."""
    import pyarrow.types as t

    assert run.schema is not None
    options, used = run.options, names_in(template)
    text = "document" if isinstance(template, Jinja) else "DOCUMENT"
    names = [text, *dict.fromkeys(["id", *run.schema.names])]
    for name in sorted(used):
        if not isinstance(template, Jinja) and parse_path(name, names)[0] in run.schema.names:
            type_at(run.schema, name, "--prompt-template")
        elif name not in names:
            shown = name if isinstance(template, Jinja) else f"[[{name}]]"
            known = ", ".join(names if isinstance(template, Jinja) else [f"[[{known}]]" for known in names])
            raise sdg.UsageError(f"--prompt-template: the input has no column for {shown}; available: {known}")
    if not used and not options.max_documents and options.rollouts_per_document == 1:
        message = "--prompt-template has no [[DOCUMENT]] and no [[COLUMN]], so all prompts would be the same"
        raise sdg.UsageError(f"{message}: add one, or say how many with --max-documents or --rollouts-per-document")
    column = prompt_column_of(options, run.schema)
    if column is not None and t.is_nested(type_at(run.schema, column)):
        message = f"--prompt-template has no effect: --prompt-column {column} holds lists of messages"
        raise sdg.UsageError(f"{message}; omit the template, or name a column of text")


def fill(template: str, document: sdg.Document, clean: Mapping[str, Convert] | None = None) -> str:
    """The template with its placeholders replaced. Placeholders in the replacements are left alone.

    Args:
        template: the text.
        document: whose values replace them.
        clean: what to do with the values of a column first, by its name.
    """
    others = set(PLACEHOLDER.findall(template)) - {"DOCUMENT"}
    row: Mapping[str, Any] = {"id": document.id, **document.row} if others else {}
    values = {"DOCUMENT": document.text, **{name: text_of(value_at(row, name, clean or {})) for name in others}}
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def value_at(row: Mapping[str, Any], path: str, clean: Mapping[str, Convert]) -> Any:
    """The value at a path in a row, which may be a column."""
    root, steps = parse_path(path, list(row))
    value = clean[root](row[root]) if root in clean else row[root]
    return follow(value, steps)


def text_of(value: Any) -> str:
    """A column's value for a prompt: text unchanged, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value, default=sdg.plain).decode()
    except TypeError:  # integers beyond 64 bits
        return json_text(jsonable(value))
