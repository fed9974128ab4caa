"""Ids that occur more than once."""

from __future__ import annotations

import random

import pytest

from sdg_plugins.common import ids


@pytest.mark.parametrize("recent", [3, 10, 10_000])
def test_each_repeated_id_is_counted_once_however_often_it_occurs(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "RECENT", recent)
    choose = random.Random(recent)
    chunks = [[f"id {choose.randrange(300)}" for _ in range(choose.randrange(9))] for _ in range(120)]
    seen, before = ids.SeenIds(), set[str]()
    for chunk in chunks:
        assert seen.add(chunk) == len(chunk) - len(set(chunk) - before)
        before |= set(chunk)
