"""Where plugins come from: the rooms of this package, installed packages, and `--plugin`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import xxhash

import sdg
from sdg_plugins.common.versions import note_version, texts_of, version_of_file, version_of_module

# Folders of plugins/ whose modules are loaded as plugins if they have hooks.
ROOMS = ("commands", "readers", "resources", "rollouts", "servers", "servers.launching", "truncation", "writers")


def add_bundled(plugins: sdg.Plugins) -> None:
    """Add the modules of the rooms that have hooks."""
    for room in ROOMS:
        package = importlib.import_module(f"sdg_plugins.{room}")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not found.ispkg and _may_have_hooks(found.name) and has_hooks(importlib.import_module(found.name)):
                plugins.add(sys.modules[found.name], sdg.__version__, "sdg")


@functools.cache
def _may_have_hooks(module: str) -> bool:
    """True if a module's text mentions hooks; the others are imported when they are used."""
    spec = importlib.util.find_spec(module)
    return not spec or not spec.origin or b"hookimpl" in Path(spec.origin).read_bytes()


def has_hooks(module: types.ModuleType) -> bool:
    """True if a function of the module is marked with `@sdg.hookimpl`."""
    return any(inspect.isroutine(thing) and hasattr(thing, "sdg_impl") for thing in vars(module).values())


def add_installed(plugins: sdg.Plugins) -> None:
    """Add the plugins announced by installed packages."""
    for point in _entry_points():
        package, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "")
        module = _import(f"the plugin {point.value} of the installed package {package}", point.load)
        plugins.add(module, version, package)


def add_named(plugins: sdg.Plugins, spec: str) -> tuple[str, list[str]]:
    """Add one `--plugin`. Returns the rollout that it names, "" if it leaves that open, and all its rollouts."""
    if spec in plugins.rollouts:
        return spec, [spec]
    target, _, name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if target.endswith(".py"):
        module, version = _import_file(Path(target).expanduser())
        package = target
    elif re.fullmatch(r"\w+(\.\w+)*", target) and importlib.util.find_spec(target.partition(".")[0]):
        module = _import(f"plugin {target}", functools.partial(importlib.import_module, target))
        version, package = str(getattr(module, "__version__", "")) or version_of_module(module), target
    elif Path(f"{spec}.py").is_file():
        raise sdg.UsageError(f"unknown rollout {spec!r}; did you mean --plugin ./{spec}.py?")
    else:
        plugins.find("rollouts", spec)
    plugins.add(module, version, package)
    if not has_hooks(module):
        raise sdg.UsageError(f"--plugin {spec} registers nothing: is @sdg.hookimpl missing?")
    own = [name for name, entry in plugins.rollouts.items() if entry.plugin == module.__name__]
    if name and name not in own:
        raise sdg.UsageError(f"{target} has no rollout {name!r}; available: {', '.join(own) or 'none'}")
    stem = module.__name__.rpartition(".")[2]
    return name or (own[0] if len(own) == 1 else stem if stem in own else ""), own


def named_object(spec: str) -> Any:
    """What MODULE:NAME or FILE.py:NAME names. Raises ImportError, AttributeError or sdg.Error."""
    target, _, name = spec.rpartition(":")
    file = Path(target).expanduser()
    return getattr(_import_file(file)[0] if target.endswith(".py") else importlib.import_module(target), name)


@functools.cache
def _entry_points() -> list[Any]:
    """Plugins announced by installed packages. Cached, because looking through all packages takes 20 ms."""
    import importlib.metadata

    return list(importlib.metadata.entry_points(group="sdg"))


def _import(what: str, load: Callable[[], Any], file: str | None = None) -> types.ModuleType:
    """Import a plugin's module; any exception becomes a PluginError."""
    try:
        module = load()
    except sdg.Error:
        raise
    except (Exception, SystemExit) as exc:
        raise sdg.PluginError(f"{what} cannot be imported: {sdg.describe(exc, file)}") from exc
    if not isinstance(module, types.ModuleType):
        raise sdg.PluginError(f"{what} is a {type(module).__name__}; a plugin must be a module")
    return module


def _import_file(path: Path) -> tuple[types.ModuleType, str]:
    """Import a plugin file, again if its text, or that of a module which it imports, has changed since.

    Returns the module and its version; see `version_of_file`.
    """
    if not path.is_file():
        raise sdg.UsageError(f"--plugin {path}: no such file")
    sys.modules.setdefault("sdg_plugin_files", types.ModuleType("sdg_plugin_files"))  # needed to pickle its contents
    name, file = f"sdg_plugin_files.{path.stem}", str(path.resolve())
    if name in sys.modules and sys.modules[name].__file__ != file:  # another file with the same name
        name += f"_{xxhash.xxh3_64_hexdigest(file.encode())}"
    module, version = sys.modules.get(name), version_of_file(Path(file))
    if module is None or version_of_module(module) != version:
        if module:
            _forget(texts_of(Path(file)))
        module = _import(f"plugin {path}", functools.partial(sdg.exec_file, name, Path(file)), file)
        note_version(module, version)
    return module, version


def _forget(files: Collection[Path]) -> None:
    """Have some files compiled again, and imported again together with what is in the same packages."""
    for file in files:  # Python takes an edit of equal length within a second for no edit
        with contextlib.suppress(OSError):
            Path(importlib.util.cache_from_source(file)).unlink()
    loaded = [(name, getattr(module, "__file__", None)) for name, module in sys.modules.items()]
    tops = {name.partition(".")[0] for name, file in loaded if file and Path(file).resolve() in files}
    for name, _ in loaded:
        if name.partition(".")[0] in tops - {"__main__", "sdg_plugin_files"}:
            del sys.modules[name]


def contributing(plugins: sdg.Plugins, rollout: str) -> set[str]:
    """The plugins that a rollout's requests depend on beside its own: of its resources, and with `wrap_requests`."""
    parameters = list(inspect.signature(plugins.rollouts[rollout].factory).parameters)[2:]
    resources = {plugins.resources[name].plugin for name in parameters if name in plugins.resources}
    return resources | {impl.plugin_name for impl in plugins.manager.hook.wrap_requests.get_hookimpls()}


def option_for(word: str, plugins: sdg.Plugins) -> str:
    """The option of `run` that a word belongs to that stands without one; "" if there is none."""
    if word in plugins.rollouts or word.endswith(".py"):
        return "--plugin"
    return "--input" if "://" in word or Path(word).exists() else ""
