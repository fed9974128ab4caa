"""How datasets lie on the Hub: cards and names of files, for `test_hub_input.py` and for `datasets` itself."""

from __future__ import annotations

import textwrap
from typing import NamedTuple

SHARD = "{}-{:05}-of-{:05}.parquet"


class Layout(NamedTuple):
    """The files of a repository, and the front matter of its card."""

    files: list[str]
    card: str = ""

    @property
    def readme(self) -> bytes:
        return f"---\n{textwrap.dedent(self.card).strip()}\n---\n# Docs\n".encode()


def shards(split: str, count: int, folder: str = "data") -> list[str]:
    return [f"{folder}/{SHARD.format(split, number, count)}" for number in range(count)]


LAYOUTS = {
    # No card: names tell the splits.
    "shards": Layout([*shards("train", 2), *shards("test", 1), *shards("my.own_split", 1), "other/train.parquet"]),
    "shards of an odd order": Layout([*shards("train", 12), *shards("validation", 1)]),
    "shards with hashes": Layout(["data/train-00000-of-00002-0a1b.parquet", "data/train-00001-of-00002-9f.parquet"]),
    "folders": Layout(["train/b.parquet", "train/a.parquet", "test/a.parquet", "dev/x/y.parquet", "a.parquet"]),
    "folders with more words": Layout(
        ["my-train/a.parquet", "train_2/a.parquet", "x/testing 1/a.parquet", "b.parquet"]
    ),
    "folders in folders": Layout(["en/train/a.parquet", "de/train/b.parquet", "en/test/a.parquet"]),
    "folders of two keywords": Layout(["training/a.parquet", "train/b.parquet", "val/a.parquet", "dev/b.parquet"]),
    "file names": Layout(["my-train.parquet", "dev.parquet", "x/eval_3.parquet", "train.v2.parquet", "other.parquet"]),
    "file names of two keywords": Layout(["training.parquet", "z_train.parquet", "train.parquet", "a-train.parquet"]),
    "words that only look like splits": Layout(["trainer.parquet", "contest.parquet", "x/latest.parquet"]),
    "capitals are no keywords": Layout(["TRAIN/a.parquet", "Test.parquet"]),
    "nothing said": Layout(["b.parquet", "a/c.parquet", "a/b/d.parquet", "part.0.parquet", "part.1.parquet"]),
    "hidden": Layout(["a.parquet", ".b.parquet", ".c/d.parquet", "__e__/f.parquet", "g/__h/i.parquet", "__j.parquet"]),
    "hidden shards": Layout([*shards("train", 1), "data/.train-00000-of-00001.parquet"]),
    "not data": Layout(["train/README.md", "config.json", "a.parquet", "dataset_infos.md"]),
    # A card that names nothing, or only a part of it.
    "card without configs": Layout([*shards("train", 1), *shards("test", 1)], "license: mit"),
    "config without files": Layout([*shards("train", 1), *shards("test", 1)], "configs:\n- config_name: all"),
    "data_dir": Layout(
        ["en/train/a.parquet", "en/test/a.parquet", "de/train.parquet", "de/b-validation.parquet", "c.parquet"],
        """
        configs:
        - config_name: en
          data_dir: en
          default: true
        - config_name: de
          data_dir: de
        """,
    ),
    "data_dir with data_files": Layout(
        ["en/a/x.parquet", "en/b/x.parquet", "a/x.parquet", "b/y.parquet"],
        """
        configs:
        - config_name: en
          data_dir: en
          data_files:
          - split: train
            path: a/*
          - split: test
            path: [b/*.parquet]
        """,
    ),
    # Cards that name files.
    "a string": Layout(["x/a.parquet", "b.parquet"], "configs:\n- config_name: x\n  data_files: x/*.parquet"),
    "one file": Layout(["a.parquet", "b.parquet"], "configs:\n- config_name: x\n  data_files: b.parquet"),
    "a list, in its order": Layout(
        ["a.parquet", "b.parquet", "c/1.parquet", "c/0.parquet"],
        "configs:\n- config_name: x\n  data_files: [c/*, b.parquet, a.parquet]",
    ),
    "splits and paths": Layout(
        [*shards("train", 3), "b/test.parquet", "b/more.parquet", "a/train.parquet"],
        """
        configs:
        - config_name: default
          data_files:
          - split: train
            path: data/train-*
          - split: test.part_2
            path: [b/*.parquet, a/train.parquet]
        """,
    ),
    "several configs, one is the default": Layout(
        ["en/a.parquet", "en/x/b.parquet", "de/a.parquet", "fr/a.parquet"],
        """
        configs:
        - config_name: en
          data_files: en/**
        - config_name: de
          data_files:
          - split: validation
            path: de/*
          default: true
        - config_name: fr-fr
          data_files: "fr/[ab].parquet"
        """,
    ),
    "several configs, one is called default": Layout(
        ["a.parquet", "b.parquet"],
        """
        configs:
        - config_name: a
          data_files: a.parquet
        - config_name: default
          data_files: b.parquet
        """,
    ),
    "stars": Layout(
        ["a.parquet", "d/a.parquet", "d/e/a.parquet", "d/e/f/b.parquet", "d/.h/a.parquet", "d/__s/a.parquet"],
        """
        configs:
        - config_name: one
          data_files: "*.parquet"
        - config_name: deep
          data_files: "**/*.parquet"
        - config_name: below
          data_files: d/**
        - config_name: middle
          data_files: d/*/a.parquet
        - config_name: mixed
          data_files: "**/f/*"
        - config_name: hidden
          data_files: d/.h/*
        - config_name: special
          data_files: "d/__*/*"
        - config_name: marks
          data_files: "d/?/a.parquet"
        """,
    ),
    "a pattern that matches nothing beside one that does": Layout(
        ["a.parquet"], 'configs:\n- config_name: x\n  data_files: ["b/*", "a.parquet"]'
    ),
    # Several formats: the one that most files have.
    "as much csv as parquet": Layout(["a.csv", "c.parquet"]),
    "more parquet than jsonl": Layout(["a.jsonl", "c.parquet", "b.parquet"]),
}

# `datasets` reads a file as often as a pattern matches it. Documents are not generated twice, so that here it is once.
TWICE = {
    "a file that two patterns match": Layout(
        ["a.parquet", "b.parquet"], 'configs:\n- config_name: x\n  data_files: ["b*", "*.parquet"]'
    ),
    "a file of two keywords": Layout(["train.train.parquet", "test.parquet"]),
}
