"""The prompt column: a column of the input, or a place inside its values such as `rollout_results[0].text`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

import sdg
from sdg_plugins.common.kinds import is_json
from sdg_plugins.common.unify import is_list, is_text

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT = "text"
OF_FLAT_ROWS = "generated_text"  # the texts of flat results, beside a column `text` of their source
PATH = re.compile(r"([^.\[\]]+)((?:\[-?\d+\]|\.[^.\[\]]+)+)")
STEP = re.compile(r"\[(-?\d+)\]|\.([^.\[\]]+)")
OF_RESULTS = {"text", "reasoning", "finish_reason", "usage", "truncated"}  # fields that every result has


def parse_path(path: str, names: list[str]) -> tuple[str, list[int | str]]:
    """A column, and the steps inside its values. A column that has the whole path as its name wins."""
    found = None if path in names else PATH.fullmatch(path)
    if not found:
        return path, []
    steps = STEP.finditer(found[2])
    return found[1], [int(step[1]) if step[1] else step[2] for step in steps]


def type_at(schema: pa.Schema, path: str, option: str = "--prompt-column") -> pa.DataType:
    """The type of the values at a path, which an option names. Raises InputError, with what there is."""
    import pyarrow.types as t

    root, steps = parse_path(path, schema.names)
    if root not in schema.names:
        known = ", ".join(schema.names)
        raise sdg.InputError(f"{option} {path}: the input has no such column; available: {known}")
    kind = schema.field(root).type
    at = root
    for step in steps:
        if is_json(kind):
            return kind
        inner = kind.value_type if t.is_dictionary(kind) else kind
        if isinstance(step, int):
            if not is_list(inner):
                raise sdg.InputError(f"{option} {path}: {at} holds {inner}, expected lists")
            kind, at = inner.value_type, f"{at}[{step}]"
            continue
        fields = {field.name: field.type for field in inner} if t.is_struct(inner) else {}
        if step not in fields:
            hint = f"available: {', '.join(fields)}" if fields else f"it holds {inner}"
            raise sdg.InputError(f"{option} {path}: {at} has no field {step}; {hint}")
        kind, at = fields[step], f"{at}.{step}"
    return kind


def follow(value: Any, steps: list[int | str]) -> Any:
    """The value at the end of some steps; None if there is none."""
    for step in steps:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and -len(value) <= step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def is_message(kind: pa.DataType) -> bool:
    """True if a type can hold messages of chats."""
    import pyarrow.types as t

    names = {field.name for field in kind} if t.is_struct(kind) else set()
    of_messages = {"role", "content"} <= names or {"from", "value"} <= names
    of_a_map = is_list(kind) and t.is_struct(kind.value_type) and {f.name for f in kind.value_type} == {"key", "value"}
    return is_json(kind) or t.is_map(kind) or of_messages or of_a_map


def results_columns(schema: pa.Schema) -> list[str]:
    """The columns that hold results of an earlier run."""
    import pyarrow.types as t

    found = []
    for field in schema:
        item = field.type.value_type if is_list(field.type) else None
        if item is not None and t.is_struct(item) and {inner.name for inner in item} >= OF_RESULTS:
            found.append(field.name)
    return found


def prompt_column_of(options: argparse.Namespace, schema: pa.Schema) -> str | None:
    """The path of the prompts; None if the template names all the columns that it needs."""
    column: str = options.prompt_column
    if options.reader == "step" and column == OF_FLAT_ROWS and column not in schema.names:
        column = DEFAULT  # the source of the step before has no such column, so its results have the name
    absent = column == DEFAULT and column not in schema.names
    return None if absent and (options.reader == "vary" or names_its_columns(options)) else column


def names_its_columns(options: argparse.Namespace) -> bool:
    """True if the prompts are made by a template that does without the document's text."""
    template = getattr(options, "prompt_template", None) if options.rollout == "prompt" else None
    return bool(template) and needs_no_document(str(template))


def needs_no_document(template: str) -> bool:
    """True if a template does without the document's text."""
    return "[[DOCUMENT]]" not in template and not re.search(r"\{[{%][^}]*\bdocument\b", template)


def check_prompts(options: argparse.Namespace, schema: pa.Schema) -> None:
    """Raise InputError unless the prompts' column exists and holds text or chats."""
    column = prompt_column_of(options, schema)
    if column is None:
        return
    root, steps = parse_path(column, schema.names)
    if schema.names.count(root) > 1:
        raise sdg.InputError(f"--prompt-column {root}: the input has {schema.names.count(root)} columns of this name")
    kind = type_at(schema, column)
    if not is_text(kind) and not is_json(kind) and not (is_list(kind) and is_message(kind.value_type)):
        inside = results_columns(schema)
        hint = f"; the texts are in --prompt-column {root}[0].text" if root in inside and not steps else ""
        message = f"--prompt-column {column} holds {kind}, expected text or lists of {{role, content}}"
        raise sdg.InputError(message + hint)


def carried_through(options: argparse.Namespace, schema: pa.Schema) -> str:
    """What to say if the prompts are a column that an earlier run only carried through; "" if they are not."""
    inside = results_columns(schema)
    column = prompt_column_of(options, schema)
    if not inside or column is None or names_its_columns(options) or parse_path(column, schema.names)[0] in inside:
        return ""
    return (
        f"the input is the output of an earlier run, and --prompt-column {column} is what that run was given: "
        f"what it generated is in --prompt-column {inside[-1]}[0].text"
    )


def free_name(name: str, taken: list[str]) -> str:
    """A name for a column that is not taken yet."""
    return next(found for number in range(2, len(taken) + 3) if (found := f"{name}_{number}") not in taken)
