"""Documents without documents: `--input vary:// --vary topic=tides,glaciers --vary persona=@personas.txt`.

Each combination of the values is a document, with a column for each name, in an order that --seed decides. Without
--vary there are --max-documents equal documents, which differ in their number.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import sdg

ROUNDS = 4  # of the permutation; three are enough for one that looks random


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    text = "values of a column for --input vary://: A,B,… or @FILE with one on each line; repeatable"
    parser.add_argument("--vary", metavar="NAME=VALUES", action="append", type=variable, help=text)


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("vary", VaryReader)


def variable(value: str) -> list[Any]:
    """A converter for NAME=A,B,… and NAME=@FILE: the name and its values."""
    name, _, text = value.partition("=")
    if not re.fullmatch(r"\w+", name) or name == "id":
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME=A,B,… with the name of a column")
    values = sdg.text_or_file(text).splitlines() if text.startswith("@") else text.split(",")
    values = [item.strip() for item in values]
    if text.startswith("@"):
        values = [item for item in values if item]
    if not values or not all(values):
        raise argparse.ArgumentTypeError(f"{name} has {'an empty value' if any(values) else 'no values'}")
    return [name, values]


class VaryReader:
    """Combine the values of --vary."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        options = run.options
        given: list[list[Any]] = options.vary or []
        names = [name for name, _ in given]
        if len(set(names)) < len(names):
            raise sdg.UsageError(f"--vary names a column twice: {', '.join(names)}")
        if not given and not options.max_documents:
            raise sdg.UsageError("--input vary:// requires --vary NAME=A,B,…, or --max-documents N")
        self._columns: dict[str, list[str]] = dict(given)
        self._total = math.prod(map(len, self._columns.values())) if given else int(options.max_documents)
        self._key = f"{options.seed or 0}"
        self._row = 0
        self.schema = pa.schema([(name, pa.string()) for name in names] or [("number", pa.int64())])
        content = repr(sorted(self._columns.items())).encode()
        self.identity = {"vary": hashlib.sha256(content).hexdigest()[:16]} if given else {"vary": ""}

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        self._row = row

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        import pyarrow as pa

        start = self._row
        self._row = min(self._total, start + rows)
        found = [self._values(row) for row in range(start, self._row)]
        batch = pa.RecordBatch.from_pylist(found, schema=self.schema)
        return [sdg.Block(batch, "vary", start)] if found else []

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        return self._total

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        return False

    def _values(self, row: int) -> dict[str, Any]:
        if not self._columns:
            return {"number": row + 1}
        number = permuted(row, self._total, self._key)
        values = {}
        for name, choices in self._columns.items():
            number, choice = divmod(number, len(choices))
            values[name] = choices[choice]
        return values


def permuted(number: int, total: int, key: str) -> int:
    """Where a number below `total` goes in a permutation that a key selects: no table of all combinations is needed.

    A Feistel network over the next even number of bits; results beyond `total` are permuted again.
    """
    half = max(1, -(-(total - 1).bit_length() // 2))
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for i in range(ROUNDS):
            digest = hashlib.blake2b(f"{key} {i} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        number = left << half | right
        if number < total:
            return number
