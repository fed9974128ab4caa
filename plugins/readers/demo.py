"""The demo input: documents that every Python installation has."""

from __future__ import annotations

import ast
import inspect
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sdg

PER_FILE = 4 / 3  # documents, until some files are read
SHORTEST = 100  # characters of a docstring that is worth a rollout
# Of a module or a class, as nearly all are written. To parse all of the standard library takes ten seconds of CPU.
DOCSTRING = re.compile(
    r"(?:\A(?:\s*#.*\n)*\s*|^class (?P<name>\w+).*:\s*\n\s+)"
    r"(?P<docstring>[rR]?(?P<quotes>\"{3}|'{3})(?:[^\\]|\\[\s\S])*?(?P=quotes))",
    re.MULTILINE,
)


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("demo", DemoReader)


class DemoReader:
    """Read the docstrings of the standard library's modules and classes."""

    def __init__(self, run: sdg.Run) -> None:
        import pyarrow as pa

        self.schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        self.identity = {"python": platform.python_version()}
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = sorted(
            path
            for path in self._root.rglob("*.py")
            if not {"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"} & set(path.parts)
        )
        self._files_read = 0
        self.seek(0, None)

    def seek(self, row: int, bookmark: str | None) -> None:
        """See `sdg.Reader`."""
        self._row, self._files_read = 0, 0
        self._documents = self._all()
        while self._row < row and next(self._documents, None):
            self._row += 1

    def tell(self) -> str | None:
        """See `sdg.Reader`."""
        return None

    def read(self, rows: int) -> list[sdg.Block | sdg.BadRow]:
        """See `sdg.Reader`."""
        import pyarrow as pa

        found = [row for _, row in zip(range(rows), self._documents, strict=False)]
        start, self._row = self._row, self._row + len(found)
        batch = pa.RecordBatch.from_pylist(found, schema=self.schema)
        return [sdg.Block(batch, "demo", start)] if found else []

    def total(self) -> int | None:
        """See `sdg.Reader`."""
        per_file = self._row / self._files_read if self._files_read else PER_FILE
        return round(per_file * len(self._files))

    def continues(self, earlier: Mapping[str, Any]) -> bool:
        """See `sdg.Reader`."""
        return False

    def _all(self) -> Iterator[dict[str, str]]:
        for path in self._files:
            content = path.read_text("utf-8", errors="replace")
            self._files_read += 1
            name = ".".join(path.relative_to(self._root).with_suffix("").parts).removesuffix(".__init__")
            for found in DOCSTRING.finditer(content):
                text = inspect.cleandoc(ast.literal_eval(found["docstring"]))
                if len(text) >= SHORTEST:
                    yield {"id": f"{name}.{found['name']}" if found["name"] else name, "text": text}
