"""The command `slurm`: writes out the job scripts of `slurm/`, and reads files that describe a cluster."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.options import Parser

SCRIPTS = ("*.sh", "*.sbatch", "README.md")
INSTALLED = "share/sdg/slurm"  # in a wheel; see `data-files` in pyproject.toml
SETTINGS = {"env", "container", "mounts", "beside"}  # keys that are not flags of sbatch
COMMON = {"account", "comment", "mail-type", "mail-user", "wckey"}  # flags for the monitor and card jobs, too


@sdg.hookimpl
def register_commands(register: sdg.RegisterCommands) -> None:
    register("slurm", slurm)


def slurm(argv: list[str]) -> int:
    """Write the scripts for Slurm into a folder."""
    parser = Parser(
        prog="sdg.py slurm",
        description=slurm.__doc__,
        epilog="example: sdg slurm ./slurm && ./slurm/submit.sh --ranks 16 --gpus-per-node 8 -- --input docs/ …",
    )
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder to write into; it is created")
    parser.add_argument("--cluster", metavar="FILE", help="for submit.sh: print the settings of a cluster's file")
    args = parser.parse_args(argv)
    if bool(args.folder) == bool(args.cluster):
        parser.error("give the folder for the scripts: sdg slurm DIR")
    if args.cluster:
        for kind, value in settings_of(args.cluster):
            sys.stdout.write(f"{kind}\0{value}\0")
        return 0
    write_scripts(Path(args.folder))
    print(f"{args.folder}/submit.sh --help")
    return 0


def write_scripts(folder: Path) -> None:
    """Copy the scripts into a folder. Raises OutputError if a file there differs, or cannot be written."""
    scripts = [path for pattern in SCRIPTS for path in sorted(scripts_folder().glob(pattern))]
    for path in scripts:
        target = folder / path.name
        if target.exists() and target.read_bytes() != path.read_bytes():
            raise sdg.OutputError(f"{target} exists and differs: move it away, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in scripts:
            shutil.copyfile(path, folder / path.name)
            (folder / path.name).chmod(0o755 if path.suffix == ".sh" else 0o644)
    except OSError as exc:
        raise sdg.OutputError(f"{exc.filename or folder} cannot be written: {sdg.reason_of(exc)}") from exc


def scripts_folder() -> Path:
    """Where the scripts are: beside sdg.py in a checkout, else where the package has installed them."""
    beside = Path(sdg.__file__).resolve().parent / "slurm"
    if (beside / "submit.sh").exists():
        return beside
    for distribution in importlib.metadata.packages_distributions().get("sdg", []):
        for file in importlib.metadata.files(distribution) or []:
            if file.as_posix().endswith(f"{INSTALLED}/submit.sh"):
                return Path(str(file.locate())).resolve().parent
    raise sdg.PluginError("the scripts for Slurm are not installed: take the folder slurm/ of the source code")


def settings_of(file: str) -> Iterator[tuple[str, str]]:
    """The settings in a cluster's file, as pairs: `env`, `container`, `mounts`, `ranks` or `beside`, and a value.

    `ranks` and `beside` are flags of sbatch for the ranks' jobs, and for those of the monitor and the card.

    Raises:
        UsageError: the file cannot be read, or a value is not one of a flag.
    """
    try:
        table = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise sdg.UsageError(f"--cluster {file}: {exc}") from exc
    beside = table.get("beside", {})
    if not isinstance(beside, dict):
        raise sdg.UsageError(f"--cluster {file}: beside must be a table, [beside]")
    for key in ("env", "container"):
        if key in table:
            yield key, str(table[key])
    mounts = table.get("mounts", [])
    for mount in mounts if isinstance(mounts, list) else [mounts]:
        yield "mounts", str(mount)
    flags = {key: value for key, value in table.items() if key not in SETTINGS}
    yield from (("ranks", flag) for flag in flags_of(flags, file))
    common = {key: value for key, value in flags.items() if key in COMMON}
    yield from (("beside", flag) for flag in flags_of({**common, **beside}, file))


def flags_of(table: dict[str, Any], file: str) -> Iterable[str]:
    """A table as long flags of sbatch."""
    for key, value in table.items():
        if isinstance(value, dict | list):
            raise sdg.UsageError(f'--cluster {file}: {key} must be text or a number, such as partition = "gpu"')
        if value is not False:
            yield f"--{key.replace('_', '-')}" if value is True else f"--{key.replace('_', '-')}={value}"
