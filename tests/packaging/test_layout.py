"""The tree keeps the shape that CONTRIBUTING.md describes: sizes, and imports that point downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from running import ROOT

ENGINE = ROOT / "sdg.py"
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """The modules of `plugins/` that a file imports anywhere, for types only too, by their paths without `.py`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sdg_plugins":
            module = (node.module or "").removeprefix("sdg_plugins").lstrip(".").replace(".", "/")
            for alias in node.names:
                inner = f"{module}/{alias.name}".lstrip("/")
                names.add(inner if (ROOT / "plugins" / f"{inner}.py").exists() else module)
    return names


def test_nothing_is_longer_than_it_may_be() -> None:
    def lengths(path: Path) -> Iterator[tuple[str, int, int]]:
        yield str(path), len(path.read_text().splitlines()), 1900 if path == ENGINE else 500
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                most = 300 if isinstance(node, ast.ClassDef) else 50
                yield f"{path}: {node.name}", (node.end_lineno or 0) - node.lineno + 1, most

    too_long = [
        f"{name}: {lines}" for path in [ENGINE, *PLUGINS] for name, lines, most in lengths(path) if lines > most
    ]
    assert not too_long


def test_imports_have_no_circles_and_the_shared_room_imports_no_other() -> None:
    graph = {str(path.relative_to(ROOT / "plugins").with_suffix("")): imports_of(path) for path in PLUGINS}
    assert sum(map(len, graph.values())) > 100

    upwards = [
        f"{name} -> {other}"
        for name, others in graph.items()
        if name.startswith("common/")
        for other in others
        if not other.startswith("common")
    ]
    assert not upwards

    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        assert name not in path, f"imports in a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in graph.get(name, ()):
                walk(other, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])


def test_the_engine_imports_plugins_only_where_it_runs_them() -> None:
    tree = ast.parse(ENGINE.read_text())
    outside = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in outside if (node.module or "").startswith("sdg_plugins")]
