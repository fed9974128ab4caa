"""The rows of the step before, in a file with `[[steps]]`: see `plugins/common/steps.py`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import file_writer, split_uri
from sdg_plugins.common.outputs import read_rows
from sdg_plugins.common.paths import OF_RESULTS, follow, parse_path, prompt_column_of, type_at
from sdg_plugins.common.statistics import rank_statistics
from sdg_plugins.common.steps import SCHEME
from sdg_plugins.common.values import values_of

if TYPE_CHECKING:
    import pyarrow as pa


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register(SCHEME, StepReader)


class StepReader:
    """Read what the step before has written."""

    def __init__(self, run: sdg.Run) -> None:
        self._name = split_uri(run.options.input)[1].strip("/")
        self._step = run.options.output_config
        state = str(Path(run.options.state_dir).parent / self._name)
        args = argparse.Namespace(output=run.options.output, output_config=self._name, state_dir=state)
        try:
            self._before = recorded.load_run(args)
        except sdg.StateError as exc:
            message = f"step {self._step} works on the step {self._name}, which has not run"
            raise sdg.InputError(f"{message}: run all steps") from exc
        if not run.plugins.quiet:  # as in a preview, which runs a part of each step
            self._check_finished()
        self._chunks = list(recorded.chunks_of(self._before, "written"))
        before = self._before
        self._writer: sdg.Writer = before.plugins.find("writers", file_writer(before.options)).factory(before)
        self._sizes: dict[int, int] = {}
        self._table: tuple[int, pa.Table] | None = None
        first = next((chunk for chunk in self._chunks if chunk.rows), None)
        if first is None:
            raise sdg.InputError(f"step {self._step}: the step before it, {self._name}, has no rows")
        self.schema: pa.Schema = self._rows_of(first).schema.remove_metadata()
        chunks = [[chunk.count, len(chunk.filtered), len(chunk.failed)] for chunk in self._chunks]
        self.identity: Mapping[str, Any] = {"step": before.fingerprint, "chunks": chunks}
        self._row = 0
        self._check_prompts(run, self._rows_of(first))

    def _check_prompts(self, run: sdg.Run, rows: pa.Table) -> None:
        """Raise InputError if no row has a prompt: the results of a judge, for example, have fields but no text."""
        path = prompt_column_of(run.options, self.schema)
        if path is None:
            return
        type_at(self.schema, path)
        root, steps = parse_path(path, self.schema.names)
        values = values_of(rows.column(root))
        if any(follow(value, steps) is not None for value in values):
            return
        results = values[0] if root == self._before.options.results_column else []
        fields = {name: value for result in results for name, value in result.items() if name not in OF_RESULTS}
        texts = [f"{root}[0].{name}" for name, value in fields.items() if isinstance(value, str)]
        message = f"step {self._step}: {path} is null in the rows of the step before it, {self._name}"
        known = f", such as {', '.join(texts)}" if texts else ""
        raise sdg.InputError(f"{message}: give it another prompt-column{known}; or a prompt-template")

    def _check_finished(self) -> None:
        options = self._before.options
        ranks = rank_statistics(self._before.state)
        finished = sum(rank.get("rank", {}).get("status") == "finished" for rank in ranks)
        if finished < options.world_size:
            message = f"step {self._step}: {finished} of {options.world_size} ranks of the step before it"
            raise sdg.InputError(f"{message}, {self._name}, have finished: run again when all have")

    def _rows_of(self, chunk: sdg.Chunk) -> pa.Table:
        """The rows of one chunk of the step before; the last one is kept."""
        if self._table is None or self._table[0] != chunk.index:
            table = read_rows(self._before, self._writer, chunk)
            if table is None:
                path = self._before.output.path(self._before.path_of(chunk))
                raise sdg.InputError(f"step {self._step}: {path}, of the step {self._name}, is gone")
            self._table = chunk.index, table
        return self._table[1]

    def _size(self, chunk: sdg.Chunk) -> int:
        """The rows of a chunk; flat ones have to be counted."""
        if not chunk.rows or not self._before.options.flat:
            return chunk.rows
        if chunk.index not in self._sizes:
            self._sizes[chunk.index] = self._rows_of(chunk).num_rows
        return self._sizes[chunk.index]

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        self._row = row

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        blocks: list[sdg.Block | sdg.BadRow] = []
        first = 0
        for chunk in self._chunks:
            size = self._size(chunk)
            if rows and size and first <= self._row < first + size:
                part = self._rows_of(chunk).slice(self._row - first, rows).replace_schema_metadata(None)
                for batch in part.combine_chunks().to_batches():  # several above 2 GiB
                    blocks.append(sdg.Block(batch, f"{self._name}/{chunk.index}", self._row - first))
                    self._row += batch.num_rows
                    rows -= batch.num_rows
            first += size
        return blocks

    def stamp(self, files: int) -> list[Any]:
        """What changes when chunks of the step before are written again, with other rows or as more than before."""
        *others, last = [(chunk.index, chunk.count, chunk.hash) for chunk in self._chunks]
        return [xxhash.xxh3_64_hexdigest(repr(others).encode()), *last[1:]]

    def total(self) -> int | None:
        """See `sdg.Reader`. Of flat rows it is known as far as they were read."""
        known = [self._sizes.get(chunk.index) if self._before.options.flat else chunk.rows for chunk in self._chunks]
        return None if None in known else sum(size or 0 for size in known)

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`: the step before has got more documents."""
        old, new = earlier.get("chunks"), self.identity["chunks"]
        if earlier.get("step") != self.identity["step"] or not old or len(old) > len(new):
            return False
        last = len(old) - 1
        return old[:last] == new[:last] and all(a <= b for a, b in zip(old[last], new[last], strict=True))
