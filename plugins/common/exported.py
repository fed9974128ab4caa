"""Where `export` takes rows from: the files that a state records, or those of an output whose state is elsewhere."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.command_line import parse_config
from sdg_plugins.common.files import file_writer, split_uri, suffix_of
from sdg_plugins.common.outputs import read_rows
from sdg_plugins.common.rows import NUMBERS
from sdg_plugins.common.state import recorded_fields

if TYPE_CHECKING:
    import pyarrow as pa

READ_ROWS = 1000  # that are asked of a reader at a time


class Source(Protocol):
    """Rows of a run.

    Attributes:
        options: of the run: those of the shape of its rows, and the prompt column.
        fields: Arrow types of the fields of results.
    """

    options: argparse.Namespace
    fields: dict[str, pa.DataType]

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """The name of each file without its suffix, and its rows."""


def source_of(args: argparse.Namespace) -> Source:
    """The rows that the options of `recorded.add_run_options` select.

    Raises:
        StateError: there is neither a state nor a file with rows.
    """
    state = recorded.state_folder(args)
    if args.state_dir or state.exists():
        return Recorded(recorded.load_run(args))
    try:
        found = Found(args)
    except sdg.Error as exc:
        message = f"{state} has no run.json, and the files of {sdg.redact(args.output)} cannot be read without it"
        raise sdg.StateError(f"{message}: {str(exc).removeprefix('--input ')}") from exc
    sdg.say(f"found no state of {sdg.redact(args.output)} here: its files are exported as they are")
    return found


class Recorded:
    """The chunks that a state records. See `Source`."""

    def __init__(self, run: sdg.Run) -> None:
        self._run, self.options = run, run.options
        self.fields = recorded_fields(run.state) or {}
        self._writer: sdg.Writer = run.plugins.writers[file_writer(run.options)].factory(run)

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """See `Source`. Raises OutputError if a file is gone."""
        for chunk in recorded.chunks_of(self._run, "written"):
            if not chunk.rows:
                continue
            table = read_rows(self._run, self._writer, chunk)
            if table is None:
                path = self._run.output.path(self._run.path_of(chunk))
                raise sdg.OutputError(f"{path} is gone: run the same command as before to write it again")
            yield stem(self._run.path_of(chunk)), table


class Found:
    """The files of an output, read as an input is: what the state would say follows from columns. See `Source`."""

    def __init__(self, args: argparse.Namespace) -> None:
        scheme, rest = split_uri(args.output)
        folder = f"{args.output.rstrip('/')}/{args.output_config}"
        argv = ["--input", folder, "--output", args.output, f"--records-per-chunk={READ_ROWS}"]
        if scheme == "hf" and rest.startswith("datasets/"):
            repository = "/".join(rest.split("/")[:3])
            argv[1:2] = [f"hf://{repository}", "--input-config", args.output_config]
        config = parse_config(argv, {})
        self.options, state = config.options, Path(config.options.state_dir)
        run = sdg.Run(self.options, config.plugins, None, state, lambda reason: None)  # type: ignore[arg-type]
        self._reader = recorded.reader_of(run)
        self.fields = self._shape(self._reader.schema)

    def _shape(self, schema: pa.Schema) -> dict[str, pa.DataType]:
        """Set the options that follow from the columns. Returns the types of the fields of results."""
        import pyarrow.types as t

        names, last = schema.names, NUMBERS[-1]
        options = self.options
        lists = [field for field in schema if t.is_list(field.type) and t.is_struct(field.type.value_type)]
        results = [field for field in lists if field.type.value_type.get_field_index("extra") >= 0]
        numbered = last in names and names[names.index(last) - 1] == NUMBERS[0]
        # Flat rows may be the input of a run whose own results are lists, and the other way round: what is last counts.
        if numbered and not (results and names.index(results[-1].name) > names.index(last)):
            options.flat, start = True, names.index(last) + 1
            source = names[: start - 2]
            return {own_name(name, source): schema.field(name).type for name in names[start:-1]}
        if not results:
            raise sdg.InputError(f"no column holds results; the columns are {', '.join(names)}")
        options.results_column = results[-1].name
        kinds = results[-1].type.value_type
        return {kinds.field(i).name: kinds.field(i).type for i in range(kinds.num_fields) if kinds[i].name != "extra"}

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """See `Source`. Raises OutputError if a row cannot be read."""
        import pyarrow as pa

        for file, blocks in itertools.groupby(self._blocks(), key=lambda block: block.file):
            yield stem(file), pa.Table.from_batches([block.batch for block in blocks])

    def _blocks(self) -> Iterator[sdg.Block]:
        while found := self._reader.read(READ_ROWS):
            for part in found:
                if isinstance(part, sdg.BadRow):
                    raise sdg.OutputError(f"{part.file}, row {part.row}: {part.reason}")
                yield part


def stem(path: str) -> str:
    """The name of a file without its suffix, whatever other dots are in it, and without one for compression."""
    name = os.path.basename(path)
    suffix = suffix_of(name)
    return name[: name.lower().rindex(f".{suffix}")] if suffix else name


def own_name(column: str, source: list[str]) -> str:
    """The field of results that a column of flat rows holds: without `generated_` if the source has the rest."""
    name = column
    while name.startswith("generated_") and name.removeprefix("generated_") in {*source, "id", *NUMBERS}:
        name = name.removeprefix("generated_")
    return name
