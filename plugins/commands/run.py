"""The command `run`, which is the default one."""

from __future__ import annotations

import os

import sdg
from sdg_plugins.common.command_line import parse_configs
from sdg_plugins.common.ending import run_to_the_end
from sdg_plugins.common.processes import PART


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("run", run)


def run(argv: list[str]) -> int:
    """Generate: the default command."""
    if os.environ.get(PART):
        from sdg_plugins.commands.part import work

        return work(argv)
    configs = parse_configs(argv)
    if configs[0].options.preview:
        from sdg_plugins.commands.preview import preview

        preview(configs)
    elif any(config.options.processes for config in configs):
        from sdg_plugins.commands import processes

        for config in configs:
            config.options.command = argv
        run_to_the_end(processes.run_all(configs))
    else:
        from sdg_plugins.commands.jobs import run_all

        run_to_the_end(run_all(configs))
    return 0
