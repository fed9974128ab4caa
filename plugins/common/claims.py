"""Files that only the first of several processes creates, and the claim of an output by a run."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import sdg
from sdg_plugins.common.files import default_state_dir, split_uri, sync

OWNER = ".sdg-{}.json"  # in an output: the state of its run, if that is not in the output's `.sdg`


def publish_in(folder: Path, name: str, content: bytes, by: str, within: Path | None = None) -> bytes:
    """Create a file in a folder atomically unless it exists. Returns its content.

    Args:
        folder: where it appears.
        name: of the file.
        content: of it.
        by: names this process.
        within: another folder, in which it is written first.
    """
    temporary = write_temporary(within or folder, name, content, by)
    with contextlib.suppress(FileExistsError):
        try:
            os.link(temporary, folder / name)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: the lock decides who is the first
            _rename_unless_exists(temporary, folder / name)
    temporary.unlink(missing_ok=True)
    sync(folder)
    return (folder / name).read_bytes()


def _rename_unless_exists(temporary: Path, target: Path) -> None:
    """Give a file its name unless there is one. Several processes do this one after the other."""
    import filelock

    with filelock.FileLock(f"{target}.lock"):
        if not target.exists():
            os.rename(temporary, target)


def write_temporary(folder: Path, name: str, content: bytes, by: str) -> Path:
    # The rank's lock keeps the name from being used twice, and a rerun overwrites what a crash left.
    temporary = folder / f".{by}.{name}.tmp"
    temporary.unlink(missing_ok=True)  # it may be a link that someone else has put there
    with open(temporary, "xb") as file:  # nothing that has been put there since then, either
        file.write(content)
    sync(temporary)
    return temporary


def owner_of(run: sdg.Run) -> Path | None:
    """The file by which a run whose state is elsewhere claims a local output."""
    if not run.output.local or split_uri(run.options.output)[0] != "file":
        return None
    return Path(run.output.path(OWNER.format(run.options.output_config.replace("/", "-"))))


def refuse_owned(run: sdg.Run, mine: str | None) -> None:
    """Raise OutputError if the output belongs to another run than `mine`, whose state is in another folder."""
    default = Path(default_state_dir(run.options.output, run.options.output_config)).absolute()
    if (owner := owner_of(run)) is None:
        return
    for path in [owner, default / "run.json"] if run.state != default else [owner]:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            other = json.loads(path.read_bytes())
            if other["run"] != mine:
                raise sdg.OutputError(
                    f"{run.options.output} belongs to the run with the state {other.get('state', default)}: "
                    "choose another --output, or that --state-dir"
                )


def claim_output(run: sdg.Run, mine: str) -> None:
    """Make the output this run's. A state in the default folder is a claim by itself."""
    default = Path(default_state_dir(run.options.output, run.options.output_config)).absolute()
    if (owner := owner_of(run)) and run.state != default:
        content = json.dumps({"run": mine, "state": str(run.state)}).encode()
        publish_in(owner.parent, owner.name, content, f"{mine}-{run.options.rank:05d}")  # ranks begin at the same time
    refuse_owned(run, mine)  # another process may have claimed it just now


def release_output(run: sdg.Run) -> None:
    """Take back what `claim_output` has claimed."""
    owner = owner_of(run)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if owner and json.loads(owner.read_bytes())["state"] == str(run.state):
            owner.unlink()
