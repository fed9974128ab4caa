"""The command `run`, which is the default one."""

from __future__ import annotations

import sdg
from sdg_plugins.common.command_line import parse_configs
from sdg_plugins.common.ending import run_to_the_end


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("run", run)


def run(argv: list[str]) -> int:
    """Generate: the default command."""
    configs = parse_configs(argv)
    if configs[0].options.preview:
        from sdg_plugins.commands.preview import preview

        preview(configs)
    else:
        from sdg_plugins.commands.jobs import run_all

        run_to_the_end(run_all(configs))
    return 0
