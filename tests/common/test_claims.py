"""The claim of an output by a run."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path

import pytest

import sdg
from sdg_plugins.common import claims
from sdg_plugins.common.files import output_place, sync


def test_ranks_that_begin_at_the_same_time_claim_an_output_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (rank_of_run(tmp_path, rank) for rank in (0, 1))

    def sync_after_the_other(path: Path) -> None:
        monkeypatch.setattr(claims, "sync", sync)
        claims.claim_output(second, "run")
        sync(path)

    monkeypatch.setattr(claims, "sync", sync_after_the_other)
    claims.claim_output(first, "run")
    with pytest.raises(sdg.OutputError, match="belongs to the run with the state"):
        claims.claim_output(first, "another")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".sdg-data.json"]


def test_a_claim_in_an_object_store_that_a_full_disk_interrupted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    run = rank_of_run(tmp_path, 0, "memory://claimed/out")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.state.mkdir()
    monkeypatch.setattr(claims, "sync", full)
    with pytest.raises(OSError, match="No space"):
        claims.claim_output(run, "abc")
    monkeypatch.setattr(claims, "sync", sync)
    claims.check_claim(run)
    for leave in (lambda mark: None, lambda mark: mark.write_text("")):  # as earlier versions left it
        leave(run.state / "00000.claimed")
        claims.claim_output(run, "abc")
        claims.check_claim(run)
        assert (run.state / "00000.claimed").read_text() == ".sdg-data-abc-00000.json"
    claims.release_claims(run)
    assert run.output.list("") == []


def rank_of_run(folder: Path, rank: int, output: str = "") -> sdg.Run:
    (folder / "out").mkdir(exist_ok=True)
    output = output or str(folder / "out")
    options = argparse.Namespace(output=output, output_config="data", writer="parquet", rank=rank, processes=None)
    plugins, _ = sdg.Plugins.load([])
    return sdg.Run(options, plugins, output_place(options, folder / "state"), folder / "state", lambda reason: None)
