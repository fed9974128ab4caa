"""Options of plugins that are not in use: they would have no effect, so they are refused."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import sdg
from sdg_plugins.common.options import Options


def check_idle(
    options: argparse.Namespace, plugins: sdg.Plugins, added: Mapping[str, Options], argv: list[str], serving: set[str]
) -> None:
    """Raise UsageError if an option of a plugin is given that is not in use."""
    given = {word.partition("=")[0] for word in argv}
    in_use = {plugins.servers[options.server].plugin, plugins.find("writers", options.writer).plugin}
    for plugin, group in added.items():
        if owners := _idle(plugins, plugin, serving | in_use):
            for dest in sorted(group.identity):
                if (flag := f"--{dest.replace('_', '-')}") in given:
                    raise sdg.UsageError(f"{flag} requires {owners}")


def _idle(plugins: sdg.Plugins, plugin: str, used: set[str]) -> str:
    """Who uses a plugin's options, if none of them is in use; "" if the options have an effect."""
    idle = []
    kinds = {"rollouts": "--plugin ", "servers": "--server ", "readers": "an --input of ", "writers": "an --output of "}
    for kind, option in kinds.items():
        entries: dict[str, sdg.Entry] = getattr(plugins, kind)
        users = {name: entry.plugin for name, entry in entries.items() if uses(plugins, entry, plugin)}
        if used & {*users.values(), plugin}:
            return ""
        if users:
            idle.append(f"{option}{' or '.join(sorted(users))}, which is not in use")
    return "; ".join(idle)


def uses(plugins: sdg.Plugins, entry: sdg.Entry, plugin: str) -> bool:
    """True if a plugin's options concern an entry: those of a module that several plugins import belong to them all."""
    module = plugins.manager.get_plugin(plugin)
    return entry.plugin == plugin or any(
        value is module for value in vars(plugins.manager.get_plugin(entry.plugin)).values()
    )
