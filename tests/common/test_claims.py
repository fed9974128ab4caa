"""The claim of an output by a run."""

from __future__ import annotations

import argparse
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


def rank_of_run(folder: Path, rank: int) -> sdg.Run:
    (folder / "out").mkdir(exist_ok=True)
    options = argparse.Namespace(output=str(folder / "out"), output_config="data", writer="parquet", rank=rank)
    plugins, _ = sdg.Plugins.load([])
    return sdg.Run(options, plugins, output_place(options, folder / "state"), folder / "state", lambda reason: None)
