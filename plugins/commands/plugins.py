"""The command `plugins`: what is registered, and by which package."""

from __future__ import annotations

import sdg
from sdg_plugins.common.options import Parser


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("plugins", plugins)


def plugins(argv: list[str]) -> int:
    """List what is registered, and by which package."""
    parser = Parser(
        prog="sdg.py plugins", description=plugins.__doc__, epilog="example: sdg.py plugins --plugin ./my_plugin.py"
    )
    parser.add_argument("--plugin", action="append", metavar="FILE.py|MODULE", help="also load this one; repeatable")
    loaded, _ = sdg.Plugins.load([*(parser.parse_args(argv).plugin or []), "summarize"])
    for kind in sdg.Plugins.kinds:
        print(f"{kind}:")
        for name, entry in sorted(getattr(loaded, kind).items()):
            print(f"  {name:<12} {f'{entry.package} {entry.version}':<24} {entry.help}")
    return 0
