"""Versions of code that has none: hashes of a plugin's file with what it imports, or of a function with what it uses.

Equal code has the same version in every process. Therefore nothing counts that may differ from one process to the next,
such as the address of an object.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import decimal
import dis
import enum
import functools
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import xxhash

PLAIN = (bool, int, float, complex, str, bytes, decimal.Decimal)  # count by their values
AS_JSON = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
INSTALLED = {"site-packages", "dist-packages"}
BUNDLED = {"sdg", "sdg_plugins"}  # have a version

_begun: dict[str, str] = {}  # by the version of a function after a run that before it, if the run has changed a value
_seen: dict[str, tuple[object, str]] = {}  # by the name of a module its spec and its version


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def version_of_module(module: types.ModuleType) -> str:
    """The version of a module's file when it was first asked for: a later edit is not loaded, unless by a reload."""
    file, spec = getattr(module, "__file__", None), module.__spec__
    known = _seen.get(module.__name__)
    if known is None or known[0] is not spec:
        known = _seen[module.__name__] = spec, version_of_file(Path(file), module.__name__) if file else ""
    return known[1]


def note_version(module: types.ModuleType, version: str) -> None:
    """Set the version of a module that has just been loaded."""
    _seen[module.__name__] = module.__spec__, version


def version_of_file(path: Path, name: str = "") -> str:
    """A hash of a module's text and of those of the modules beside it, or in its package, that it imports.

    Modules that are empty do not count, nor do those of installed packages beside it.

    Args:
        path: of the module.
        name: its dotted name if it is in a package.
    """
    texts = {file: text for file, text in texts_of(path, name).items() if text.strip() or file == path}
    own = texts.pop(path)
    if not texts:
        return xxhash.xxh3_64_hexdigest(own)
    digest, root = xxhash.xxh3_64(own), _place_of(path, name)[0]
    for file, text in sorted(texts.items()):
        digest.update(f"\n{file.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def texts_of(path: Path, name: str = "") -> dict[Path, bytes]:
    """The texts of a module and of those that it imports, by their files; see `version_of_file`."""
    root, package = _place_of(path, name)
    within = package.partition(".")[0] if _is_installed(path) else ""  # beside it are other packages
    found: dict[Path, bytes] = {}
    waiting = [(path, package), *_files(root, package, within)]
    while waiting:
        file, package = waiting.pop()
        if file not in found:
            found[file] = file.read_bytes()
            waiting += [pair for module in _imports(found[file], package) for pair in _files(root, module, within)]
    return found


def _place_of(path: Path, name: str) -> tuple[Path, str]:
    """The folder that a module is imported from, and its package; "" if it is in none."""
    base = path.parent if path.name == "__init__.py" else path.with_suffix("")
    parts = name.split(".")
    if list(base.parts[-len(parts) :]) != parts:  # a file that was loaded under another name
        return path.parent, ""
    return base.parents[len(parts) - 1], name if path.name == "__init__.py" else name.rpartition(".")[0]


def _is_installed(path: Path) -> bool:
    """True for files of installed packages and of Python itself."""
    return not INSTALLED.isdisjoint(path.parts) or path.is_relative_to(sysconfig.get_path("stdlib"))


def _imports(text: bytes, package: str) -> Iterator[str]:
    """The dotted names that a module imports anywhere; `from a import b` gives `a.b`, which may not be a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (package or not node.level):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def _files(root: Path, module: str, within: str) -> Iterator[tuple[Path, str]]:
    """The files below a folder that an import of a module runs, each with the package of its own relative imports."""
    parts = module.split(".")
    if not module or parts[0] in BUNDLED or (within and parts[0] != within):
        return
    for i in range(1, len(parts) + 1):
        base, name = root.joinpath(*parts[:i]), ".".join(parts[:i])
        for file, package in ((base / "__init__.py", name), (base.with_suffix(".py"), name.rpartition(".")[0])):
            if file.is_file():
                yield file, package


# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def version_of_function(function: Any) -> str:
    """A hash of a function's source and of what it uses: default values, closure, attributes, and global names.

    Numbers, texts, and lists, tuples, sets, dicts and dataclasses of them count by their values; functions, classes and
    modules by their source, unless they are installed. Of other objects only the type counts. What the function itself
    has changed in an earlier run of this process does not count; see `note_run`.
    """
    version = _hash_of(function)
    return _begun.get(version, version)


def note_run(function: Any, version: str) -> None:
    """Remember what a run of a function has changed, such as a list of what it has seen, as the same version."""
    if (after := _hash_of(function)) != version:
        _begun[after] = version


def _hash_of(function: Any) -> str:
    try:
        text = "\n".join(_parts(function, set()))
    except RecursionError:  # a value is too deep
        text = _source(function)
    return xxhash.xxh3_64_hexdigest(text.encode(errors="replace"))


def _parts(thing: Any, seen: set[int]) -> Iterator[str]:
    """What a value consists of, as texts.

    Args:
        thing: the value.
        seen: ids of functions and objects that have been looked at, and of the containers around the value.
    """
    if isinstance(thing, enum.Enum):
        yield str(thing)
    elif isinstance(thing, re.Pattern):
        yield f"{thing.pattern!r} {thing.flags}"  # its own text is shortened
    elif thing is None or isinstance(thing, PLAIN):
        yield repr(thing)
    elif id(thing) not in seen:
        seen.add(id(thing))
        if type(thing) in {list, tuple, dict, set, frozenset}:
            yield from _items(thing, seen)
            seen.remove(id(thing))  # an equal one elsewhere may be the same object, or not
        elif isinstance(thing, types.FunctionType | types.MethodType | functools.partial):
            yield from _callable(thing, seen)
        elif isinstance(thing, type):
            yield _source(thing) if _is_own(thing.__module__) else thing.__qualname__
        elif isinstance(thing, types.ModuleType):
            yield version_of_module(thing) if _is_own(thing.__name__) else thing.__name__
        elif dataclasses.is_dataclass(thing) or inspect.iscoroutinefunction(type(thing).__call__):
            yield from _object(thing, seen)
        else:
            yield type(thing).__qualname__


def _items(container: Any, seen: set[int]) -> Iterator[str]:
    kind = type(container)
    with contextlib.suppress(TypeError):  # a million rows take a second, and ten times as long one by one
        text = orjson.dumps(container, option=AS_JSON)
        yield f"{kind.__name__} {xxhash.xxh3_128_hexdigest(text)}"
        return
    yield f"{kind.__name__} {len(container)}"
    if kind in {set, frozenset}:
        yield from sorted("\n".join(_parts(item, seen)) for item in list(container))
        return
    for item in list(container.items() if kind is dict else container):  # another thread may change it
        for part in item if kind is dict else (item,):
            yield from _parts(part, seen)


def _callable(thing: Any, seen: set[int]) -> Iterator[str]:
    """The function that is called, and what is bound to it."""
    if isinstance(thing, types.FunctionType):
        yield from _function(thing, seen)
    elif isinstance(thing, types.MethodType):
        yield from _parts(thing.__func__, seen)
        yield from _object(thing.__self__, seen)
    else:
        for part in (thing.func, thing.args, thing.keywords):
            yield from _parts(part, seen)


def _object(thing: Any, seen: set[int]) -> Iterator[str]:
    """The class of a callable object or a dataclass, what it does when it is called, and its attributes."""
    kind = type(thing)
    yield from _parts(kind, seen)
    call = inspect.getattr_static(kind, "__call__", None)
    if isinstance(call, types.FunctionType):
        yield from _parts(call, seen)
    slots = {name: getattr(thing, name) for name in getattr(kind, "__slots__", ()) if hasattr(thing, name)}
    yield from _parts({**slots, **getattr(thing, "__dict__", {})}, seen)


def _function(function: types.FunctionType, seen: set[int]) -> Iterator[str]:
    """The source of a function, and what it uses beside its arguments."""
    code = function.__code__
    if function.__module__ in sys.modules and not _is_own(function.__module__) and code.co_filename[0] != "<":
        yield f"{function.__module__}.{function.__qualname__}"
        return
    yield _source(function)
    values = {name: function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    defaults = {"defaults": function.__defaults__, "named defaults": function.__kwdefaults__}
    for name, value in {**values, **{name: value for name, value in defaults.items() if value}}.items():
        yield name
        yield from _parts(value, seen)


def _names(code: types.CodeType) -> set[str]:
    """The global names that a function uses, those of functions in it included."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}}
    return found.union(*[_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)])


def _source(thing: Any) -> str:
    """The source of a function or a class; if it was typed at a prompt, what it was compiled to."""
    code = getattr(thing, "__code__", None)
    try:
        return inspect.getsource(code or thing)
    except (OSError, TypeError):
        return "\n".join(_compiled(code)) if code else str(thing.__qualname__)


def _compiled(code: types.CodeType) -> Iterator[str]:
    yield repr((code.co_code, code.co_names))
    for value in code.co_consts:
        yield "\n".join(_compiled(value)) if isinstance(value, types.CodeType) else repr(value)


def _is_own(module: str) -> bool:
    """True if a module has no version: it is neither installed nor part of Python or of sdg."""
    if module.partition(".")[0] in BUNDLED:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    return not _is_installed(Path(file)) if file else module == "__main__" or module not in sys.modules
