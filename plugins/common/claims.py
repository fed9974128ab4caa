"""Files that only the first of several processes creates, and the claim of an output by a run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
from pathlib import Path

import sdg
from sdg_plugins.common.files import default_state_dir, rank_file, split_uri, sync

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
        except OSError as exc:
            if exc.errno in {errno.EEXIST, errno.ENOSPC, errno.EDQUOT}:
                raise
            # A file system without hard links: the lock decides who is the first.
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


def writer_of(run: sdg.Run) -> str:
    """What the names of a process's temporary files begin with: its rank, which it has locked.

    The parents of --processes on several machines lock none, and one of the processes clears up after rank 0.
    """
    if getattr(run.options, "processes", None) and not getattr(run.options, "part", None):
        return f"{platform.node()}-{os.getpid()}"
    return f"{run.options.rank:05d}"


def write_temporary(folder: Path, name: str, content: bytes, by: str) -> Path:
    # `by` is one process; see `writer_of`. A rerun overwrites what a crash has left.
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


def refuse_nested(run: sdg.Run) -> None:
    """Raise OutputError if a local output lies in a config's folder of another one: it would have both rows."""
    if not run.output.local or split_uri(run.options.output)[0] != "file":
        return
    inner = Path(os.path.realpath(run.output.root))
    for folder in (inner, *inner.parents)[:-1]:
        if (Path(default_state_dir(str(folder.parent), folder.name)) / "run.json").exists():
            raise sdg.OutputError(
                f"--output {run.options.output} lies in the folder {folder} of another output, whose rows are loaded "
                "from it: choose another --output"
            )


def claim_output(run: sdg.Run, mine: str) -> None:
    """Make the output this run's. A state in the default folder is a claim by itself.

    Raises:
        OutputError: it is another run's. Of two that begin at the same time at most one goes on.
    """
    if not run.output.local:
        _claim_objects(run, mine)
        return
    default = Path(default_state_dir(run.options.output, run.options.output_config)).absolute()
    if (owner := owner_of(run)) and run.state != default:
        content = json.dumps({"run": mine, "state": str(run.state)}).encode()
        publish_in(owner.parent, owner.name, content, f"{mine}-{writer_of(run)}")  # ranks begin at the same time
    refuse_owned(run, mine)  # another process may have claimed it just now


def release_output(run: sdg.Run) -> None:
    """Take back what `claim_output` has claimed in a local folder."""
    owner = owner_of(run)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if owner and json.loads(owner.read_bytes())["state"] == str(run.state):
            owner.unlink()


# ── Object stores ────────────────────────────────────────────────────────────────────────────────────────────────────

# pyarrow cannot put an object only if it does not exist. So each rank puts a claim of its own, and then looks for those
# of other runs: of two that begin at the same time, the one that lists later sees both. At the end claims are deleted.
CLAIM = ".sdg-{}-{}-{:05d}.json"  # config, ID of the run, rank
CLAIMED = "claimed"  # suffix of a rank's file in the state: there was no other claim beside this rank's


def _config_of(run: sdg.Run) -> str:
    return str(run.options.output_config).replace("/", "-")


def _claims_in(run: sdg.Run) -> dict[str, str]:
    """The IDs of the runs that claim the output, by the names of the objects. Empty ones could not be deleted."""
    pattern = re.compile(CLAIM.replace("{:05d}", r"\d{{5,}}").format(re.escape(_config_of(run)), "([0-9a-f]+)"))
    sizes = run.output.sizes("")
    names = {name.strip("/"): size for name, size in sizes.items()}
    return {name: found[1] for name, size in names.items() if size and (found := pattern.fullmatch(name))}


def _claim_objects(run: sdg.Run, mine: str) -> None:
    own = CLAIM.format(_config_of(run), mine, run.options.rank)
    mark = rank_file(run.state, run.options.rank, CLAIMED)
    if mark.exists() and mark.read_text() == own and run.output.exists(own):
        return
    content = json.dumps({"run": mine, "state": str(run.state), "host": platform.node()}).encode()
    run.output.write(own, lambda file: file.write(content))
    run.output.stamps.pop(own, None)
    if others := [name for name, owner in _claims_in(run).items() if owner != mine]:
        run.output.clear(own)
        raise sdg.OutputError(
            f"{run.options.output} is in use by another run{_described(run, others[0])}: choose another --output. If "
            f"that run is gone, delete {run.output.path(others[0])}, or start over with --fresh"
        )
    os.replace(write_temporary(run.state, mark.name, own.encode(), writer_of(run)), mark)


def _described(run: sdg.Run, name: str) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), run.output.open(name) as file:
        other = json.loads(file.read())
        return f" (state {other['state']} on {other['host']})"
    return ""


def check_claim(run: sdg.Run) -> None:
    """Call before a file is written. Raises OutputError if another run has taken over an object store with --fresh."""
    if run.output.local:
        return
    with contextlib.suppress(FileNotFoundError):  # as in tests of writers
        own = rank_file(run.state, run.options.rank, CLAIMED).read_text()
        if not run.output.exists(own):
            raise sdg.OutputError(
                f"{run.options.output} was taken over by another run, or {run.output.path(own)} was deleted: "
                "run again, which finds out"
            )


def release_claims(run: sdg.Run) -> None:
    """Delete the claim of a rank that has finished."""
    mark = rank_file(run.state, run.options.rank, CLAIMED)
    with contextlib.suppress(FileNotFoundError):
        run.output.clear(mark.read_text())
        mark.unlink()


def revoke_claims(run: sdg.Run) -> None:
    """Delete the claims of all runs: one that still works on this output stops before it writes a file."""
    if not run.output.local:
        for name in _claims_in(run):
            run.output.delete(name)
