"""A few scenarios of `soak.py` that together cover all of its choices."""

from __future__ import annotations

from pathlib import Path

import pytest
import soak


@pytest.mark.slow
@pytest.mark.parametrize("seed", [5, 18, 20, 42, 49, 52])
def test_disturbances_of_any_kind_make_no_difference(seed: int, tmp_path: Path) -> None:
    soak.check(seed, tmp_path)
