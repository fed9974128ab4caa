"""Datasets on the Hub as input: which files are read, at which revision, and through which failures."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from fake_hub import FakeHub, Rights
from fake_server import Delay, FakeServer, Hang
from hub_layouts import LAYOUTS, TWICE, Layout
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from hypothesis import given, settings, strategies as st
from running import Job, Output, program, wait_until

import sdg

DOCS = "lab/docs"


def parquet(texts: list[str], rows_per_group: int = 1000, **more: Any) -> bytes:
    """A parquet file. A column `pad` can make its row groups so large that reading the footer does not fetch them."""
    sink = io.BytesIO()
    table = pa.table({"id": pa.array(texts, pa.string()), "text": pa.array(texts, pa.string()), **more})
    pq.write_table(table, sink, row_group_size=rows_per_group, compression="none", use_dictionary=False)
    return sink.getvalue()


def content_of(path: str) -> bytes:
    """A file of two rows that name it; a note if it is not data."""
    rows = [f"{path}#{row}" for row in range(2)]
    if path.endswith(".parquet"):
        return parquet(rows)
    if path.endswith(".csv"):
        return "\n".join(["text", *rows]).encode()
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode() if path.endswith(".jsonl") else b"note"


def publish(hub: FakeHub, repo: str, layout: Layout) -> None:
    hub.create(repo)
    card = {"README.md": layout.readme} if layout.card else {}
    hub.push(repo, {path: content_of(path) for path in layout.files} | card)


@pytest.fixture
def docs(hub: FakeHub) -> FakeHub:
    """A public dataset of 3 × 20 documents in row groups of 5, and the rights of some tokens."""
    hub.tokens = {"hf_lab": Rights("lab"), "hf_bob": Rights("bob")}
    hub.create(DOCS)
    hub.push(DOCS, {f"data/train-{n:05}-of-00003.parquet": parquet(texts(n), 5) for n in range(3)})
    return hub


def texts(file: int, rows: int = 20) -> list[str]:
    return [f"document {file} {row}" for row in range(rows)]


ALL = [text for file in range(3) for text in texts(file)]


@pytest.fixture
def hub_job(job: Job, docs: FakeHub) -> Job:
    """A job that reads the dataset."""
    job.env |= docs.environment(job.folder)
    job.options |= {"input": f"hf://datasets/{DOCS}", "records_per_chunk": 4}
    return job


class Here:
    """Opens readers in this process."""

    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub
        self.readers = sdg.Plugins.load([])[0].readers
        self.ended = threading.Event()

    def open(self, repo: str = DOCS, revision: str = "", source: Any = None, **options: Any) -> Any:
        defaults = {"input_config": None, "input_split": "train", "prompt_column": "text", "max_documents": None}
        defaults |= {"records_per_chunk": 10, "rank": 0, "world_size": 1, "input": f"hf://datasets/{repo}{revision}"}
        run = SimpleNamespace(options=SimpleNamespace(**defaults | options), source=source or {}, source_schema=None)
        run.stopping = self.ended
        return self.readers["hf"].factory(run)

    def texts(self, repo: str = DOCS, **options: Any) -> list[str]:
        return texts_of(self.open(repo, **options))


def texts_of(reader: Any, start: int = 0, rows: int = 1 << 40) -> list[str]:
    reader.seek(start, None)
    return [text for block in reader.read(rows) for text in block.batch.column("text").to_pylist()]


@pytest.fixture
def here(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    here = Here(hub)
    monkeypatch.setattr("sdg_plugins.common.hub.open_client", lambda: HfApi(endpoint=hub.url))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub.utils._http"), "disabled", True)
    yield here
    here.ended.set()


# ── The same files as `datasets` ─────────────────────────────────────────────────────────────────────────────────────

LOAD = """
import json, sys
import datasets

datasets.disable_progress_bars()
loaded = {}
for repo in json.load(sys.stdin):
    loaded[repo] = {}
    configs = datasets.get_dataset_config_names(repo)
    for config in [None, *configs]:
        try:
            splits = datasets.load_dataset(repo, config, streaming=True)
            loaded[repo][config or ""] = {split: [row["text"] for row in rows] for split, rows in splits.items()}
        except ValueError as exc:
            loaded[repo][config or ""] = str(exc)
json.dump(loaded, sys.stdout)
"""
NAMES = {title: f"lab/layout-{number}" for number, title in enumerate(LAYOUTS | TWICE)}


@pytest.fixture(scope="module")
def published() -> Iterator[FakeHub]:
    """A Hub with all layouts."""
    with FakeHub() as hub:
        for title, layout in (LAYOUTS | TWICE).items():
            publish(hub, NAMES[title], layout)
        yield hub
        close_session()
    assert not hub.errors


@pytest.fixture(scope="module")
def loaded(published: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `datasets.load_dataset` finds in each layout: rows of each split of each config, "" being the default."""
    environment = published.environment(tmp_path_factory.mktemp("datasets")) | {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    done = subprocess.run(
        program(LOAD),
        env=environment,
        input=json.dumps(list(NAMES.values())),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("title", NAMES)
def test_configs_splits_and_order_are_those_of_load_dataset(
    title: str, loaded: Any, published: FakeHub, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdg_plugins.common.hub.open_client", lambda: HfApi(endpoint=published.url))

    for config, splits in loaded[NAMES[title]].items():
        if isinstance(splits, str):
            assert "Config name is missing" in splits
            with pytest.raises(sdg.InputError, match="several configs"):
                here.open(NAMES[title])
            continue
        for split, rows in splits.items():
            expected = list(dict.fromkeys(rows)) if title in TWICE else rows
            assert here.texts(NAMES[title], input_config=config or None, input_split=split) == expected
        with pytest.raises(sdg.InputError) as caught:
            here.open(NAMES[title], input_config=config or None, input_split="none")
        assert set(str(caught.value).partition("available: ")[2].split(", ")) == set(splits)


# ── Conversions by the Hub ───────────────────────────────────────────────────────────────────────────────────────────

LINES = b'{"text": "as it lies"}\n'
CONVERTED = "refs/convert/parquet"


@pytest.fixture
def lines(hub: FakeHub) -> FakeHub:
    """A dataset of jsonl with two configs; the Hub has converted all of one, and the beginning of the other."""
    card = "configs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n  data_files: de.jsonl"
    hub.create(DOCS)
    hub.push(DOCS, {"en.jsonl": LINES, "de.jsonl": LINES, "README.md": Layout([], card).readme})
    converted = {f"en/train/000{number}.parquet": parquet([f"en {number}"]) for number in range(3)}
    converted["en/test/0000.parquet"] = parquet(["en test"])
    converted["de/partial-train/0000.parquet"] = parquet(["de"])
    hub.push(DOCS, converted, revision=CONVERTED)
    return hub


@pytest.mark.parametrize("named", ["", "@main"])
def test_other_formats_are_read_as_the_hub_has_converted_them(named: str, lines: FakeHub, here: Here) -> None:
    assert here.texts(revision=named, input_config="en") == ["en 0", "en 1", "en 2"]
    assert here.texts(revision=named, input_config="en", input_split="test") == ["en test"]
    identity = here.open(revision=named, input_config="en").identity
    assert identity == {"dataset": DOCS, "revision": lines.head(DOCS), "parquet": lines.head(DOCS, CONVERTED)}


def test_a_partial_conversion_is_reported(lines: FakeHub, job: Job) -> None:
    job.env |= lines.environment(job.folder)

    finished = job(input=f"hf://datasets/{DOCS}", input_config="de")

    assert finished.rc == 0
    assert "first 5 GB of de/train" in finished.stderr
    assert list(job.output.texts()) == ["de"]


def test_configs_and_splits_of_converted_datasets_are_named(lines: FakeHub, here: Here) -> None:
    assert refused(here).endswith("has several configs: choose one with --input-config; available: en, de")
    assert refused(here, input_config="fr").endswith("no such config; available: en, de")
    assert refused(here, input_config="en", input_split="dev").endswith("has no such split; available: test, train")
    assert refused(here, input_config="de", input_split="dev").endswith("has no such split; available: train")

    lines.push(DOCS, dict.fromkeys([f for f in lines.files(DOCS, CONVERTED) if f.startswith("en")]), CONVERTED)
    assert refused(here, input_config="en") == (
        f"dataset {DOCS} (config en) is not parquet, and the Hub has not converted it: download its files"
    )


def test_without_a_card_the_configs_are_those_of_the_conversion(hub: FakeHub, here: Here) -> None:
    hub.create(DOCS)
    hub.push(DOCS, {"docs.py": b"a loading script", "en.csv": b"text\nas it lies\n"})
    hub.push(DOCS, {"en/train/0000.parquet": parquet(["en"]), "de/train/0000.parquet": parquet(["de"])}, CONVERTED)

    assert here.texts(input_config="de") == ["de"]
    assert refused(here, input_config="fr").endswith("no such config; available: de, en")


def test_the_format_of_most_files_counts(hub: FakeHub, here: Here) -> None:
    publish(hub, DOCS, Layout(["a.csv", "b.csv", "c.parquet"]))
    hub.push(DOCS, {"default/train/0000.parquet": parquet(["converted"])}, CONVERTED)

    assert here.texts() == ["converted"]


def test_a_dataset_without_conversion_is_named(hub: FakeHub, here: Here) -> None:
    hub.create(DOCS)
    hub.push(DOCS, {"en.jsonl": LINES}, revision="v1")
    assert refused(here, revision="@v1") == (
        f"dataset {DOCS} has no parquet files at v1, and the Hub converts only `main`"
    )

    hub.push(DOCS, {"en.jsonl": LINES})
    expected = f"dataset {DOCS} is not parquet, and the Hub has not converted it: download its files"
    assert refused(here) == expected
    hub.push(DOCS, {"notes.md": b"empty"}, revision=CONVERTED)
    assert refused(here) == expected
    assert refused(here, input_config="en").endswith(
        "--input-config en: dataset lab/docs has no such config; available: default"
    )


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(here: Here, repo: str = DOCS, **options: Any) -> str:
    """The one line with which a dataset is refused."""
    with pytest.raises(sdg.Error) as caught:
        here.open(repo, **options).read(1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("uri", "token", "rc", "words"),
    [
        ("hf://datasets/docs", None, 2, ["hf://datasets/docs", "OWNER/NAME"]),
        ("hf://models/lab/docs", None, 2, ["hf://models/lab/docs", "hf://datasets/OWNER/NAME"]),
        ("hf://datasets/lab/docs/data", None, 2, ["hf://datasets/lab/docs/data", "folder", "--input-config"]),
        ("hf://datasets/lab/secret", None, 1, ["lab/secret", "private", "HF_TOKEN"]),
        ("hf://datasets/lab/secret", "hf_typo", 1, ["lab/secret", "HF_TOKEN", "mistyped"]),
        ("hf://datasets/lab/secret", "hf_t\u00fcpo", 1, ["HF_TOKEN", "character"]),
        ("hf://datasets/lab/secret", "hf_ty\x01po", 1, ["HF_TOKEN", "character"]),
        ("hf://datasets/lab/gated", "hf_bob", 1, ["lab/gated", "gated", "conditions"]),
    ],
)
def test_missing_permission_is_explained(
    uri: str, token: str | None, rc: int, words: list[str], hub_job: Job, docs: FakeHub, server: FakeServer
) -> None:
    docs.create("lab/secret", private=True)
    docs.create("lab/gated", gated=True)
    for repo in ("lab/secret", "lab/gated"):
        docs.push(repo, {"a.parquet": parquet(["a"])})

    finished = hub_job(docs.environment(hub_job.folder, token), input=uri, timeout=20)

    assert finished.rc == rc, finished
    assert finished.says(*words)
    assert not token or token not in finished.stdout + finished.stderr
    assert not server.requests


@pytest.mark.parametrize(
    ("repo", "token", "words"),
    [
        ("lab/nowhere", None, "dataset lab/nowhere does not exist, or it is private: set HF_TOKEN"),
        ("lab/nowhere", "hf_bob", "dataset lab/nowhere does not exist, or the token has no access to it"),
        ("lab/secret", "hf_bob", "dataset lab/secret does not exist, or the token has no access to it"),
        ("lab/gated", None, "dataset lab/gated is gated: accept its conditions"),
        ("lab/docs@v9", "hf_lab", "dataset lab/docs has no revision v9"),
        ("lab/docs@refs/pr/7", None, "dataset lab/docs has no revision refs/pr/7"),
    ],
)
def test_refusals_name_the_repository(
    repo: str, token: str | None, words: str, here: Here, docs: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs.create("lab/secret", private=True)
    docs.create("lab/gated", gated=True)
    docs.push("lab/gated", {"a.parquet": parquet(["a"])})
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    assert refused(here, repo).startswith(words)


@pytest.mark.parametrize("status", [403, 416])
def test_a_range_that_is_refused_once_is_asked_for_again(status: int, here: Here, docs: FakeHub) -> None:
    docs.fail("resolve", status=503, times=1, after=1)
    docs.fail("resolve", status=status, times=1, after=1)

    assert here.texts() == ALL


@pytest.mark.parametrize(("status", "words"), [(403, "does HF_TOKEN have read access"), (416, "the Hub refused (416)")])
def test_a_refused_read_says_what_was_asked_for(status: int, words: str, here: Here, docs: FakeHub) -> None:
    docs.fail("resolve", status=status, times=1000)

    message = refused(here)

    assert words in message
    assert f"GET {docs.url}/datasets/{DOCS}/resolve/" in message
    assert "data/train-0000" in message
    assert "write" not in message
    assert docs.statuses("resolve").count(status) < 20  # once more for each file, and no more


def test_permitted_tokens_can_read(hub_job: Job, docs: FakeHub) -> None:
    docs.create("lab/secret", private=True, gated=True)
    docs.push("lab/secret", {"a.parquet": parquet(["a"])})
    docs.tokens["hf_guest"] = Rights("guest", gated=[DOCS])
    docs.repos[DOCS].gated = True

    for repo, token, rows in (("lab/secret", "hf_lab", 1), (DOCS, "hf_guest", 60)):
        output = hub_job.succeed(
            env=docs.environment(hub_job.folder, token), input=f"hf://datasets/{repo}", output=repo
        )
        assert len(output.rows()) == rows
    written = b"".join(path.read_bytes() for path in hub_job.folder.rglob("*") if path.is_file())
    assert b"hf_guest" not in written
    assert b"hf_lab" not in written


def test_a_missing_column_is_named_with_the_available_ones(hub_job: Job) -> None:
    finished = hub_job(prompt_column="txet")

    assert finished.rc == 1
    assert finished.says("txet", "id, text", "--prompt-column")


def test_configs_and_splits_that_exist_are_named(here: Here, docs: FakeHub) -> None:
    assert refused(here, input_split="trian") == (
        "--input-split trian: dataset lab/docs (config default) has no such split; available: train"
    )
    assert (
        refused(here, input_config="en") == "--input-config en: dataset lab/docs has no such config; available: default"
    )


@pytest.mark.parametrize(
    "card",
    [
        "configs: all",
        "configs:\n- data_files: x",
        "configs:\n- config_name: x\n  data_files: 7",
        "configs:\n- config_name: x\n  data_files:\n  - split: train",
        "configs:\n- config_name: x\n  data_files:\n  - split: train\n    path: [7]",
        "configs:\n  config_name: x",
    ],
)
def test_an_invalid_card_is_named(card: str, here: Here, docs: FakeHub) -> None:
    docs.push(DOCS, {"README.md": Layout([], card).readme})

    assert refused(here).startswith("dataset lab/docs: the `configs` of its card")


def test_a_file_that_the_card_names_must_exist(here: Here, docs: FakeHub) -> None:
    card = "configs:\n- config_name: x\n  data_dir: data\n  data_files: a.parquet"
    docs.push(DOCS, {"README.md": Layout([], card).readme})

    assert refused(here) == "dataset lab/docs: its card names data/a.parquet (config x), which does not exist"


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1" + bytes(100) + b"PAR1", parquet(["a"])[:-9]])
def test_an_invalid_parquet_file_is_named(content: bytes, here: Here, docs: FakeHub) -> None:
    docs.push(DOCS, {"data/train-00001-of-00003.parquet": content})

    assert "data/train-00001-of-00003.parquet" in refused(here)


def test_files_of_one_split_may_differ_as_much_as_datasets_allows(here: Here, docs: FakeHub) -> None:
    first = pa.table({"id": ["a"], "text": ["a"], "year": pa.array([1], pa.int64()), "more": [1.5]})
    other = pa.table({"year": pa.array([2], pa.int8()), "text": pa.array(["b"], pa.large_string()), "id": ["b"]})
    files = {}
    for name, table in {"a": first, "b": other}.items():
        sink = io.BytesIO()
        pq.write_table(table, sink)
        files[f"train/{name}.parquet"] = sink.getvalue()
    docs.create("lab/mixed")
    docs.push("lab/mixed", files)

    reader = here.open("lab/mixed")
    rows = [row for block in reader.read(9) for row in block.batch.to_pylist()]

    assert rows == [
        {"id": "a", "text": "a", "year": 1, "more": 1.5},
        {"id": "b", "text": "b", "year": 2, "more": None},
    ]
    assert all(block.batch.schema.equals(reader.schema) for block in here.open("lab/mixed").read(9))

    docs.push("lab/mixed", {"train/b.parquet": parquet(["b"], strange=["x"])})
    rows = [row for block in here.open("lab/mixed").read(9) for row in block.batch.to_pylist()]
    assert [row["strange"] for row in rows] == [None, "x"]
    docs.push("lab/mixed", {"train/b.parquet": parquet(["b"], year=[{"x": 1}])})
    assert "(year: struct<x: int64> instead of int64)" in refused(here, "lab/mixed")
    docs.push("lab/mixed", {"train/b.parquet": parquet(["b"], year=["MM"])})
    assert "(year: string instead of int64)" in refused(here, "lab/mixed")


# ── The revision that a run began with ───────────────────────────────────────────────────────────────────────────────


def replace_all(hub: FakeHub) -> str:
    """Push other documents to `main`."""
    changed = {
        f"data/train-{n:05}-of-00003.parquet": parquet([f"new {n} {row}" for row in range(20)]) for n in range(3)
    }
    return hub.push(DOCS, changed)


def record(output: Output) -> Any:
    return json.loads((output.state / "run.json").read_text())


def revisions(output: Output) -> set[str]:
    """The input revisions in the metadata of the output files."""
    metadata = [pq.read_schema(output.path / name).metadata for name in output.data()]
    return {entries[b"sdg.input_revision"].decode() for entries in metadata}


@pytest.mark.slow
def test_a_run_stays_with_the_revision_it_began_with_until_fresh(hub_job: Job, docs: FakeHub) -> None:
    began = docs.head(DOCS)
    hub_job.succeed(max_documents=10)
    now = replace_all(docs)

    output = hub_job.succeed()

    assert list(output.texts()) == ALL
    assert revisions(output) == {began}
    assert record(output)["source"]["revision"] == record(output)["identity"]["input"]["revision"] == began
    assert hub_job.verify().rc == 0

    output = hub_job.succeed(fresh=True, max_documents=1)
    assert output.ids() == ["new 0 0"]
    assert revisions(output) == {now}


@pytest.mark.parametrize("asked", ["", "@main", "@v1"])
def test_a_run_stays_with_the_commit_that_a_name_referred_to(asked: str, here: Here, docs: FakeHub) -> None:
    docs.move(DOCS, "refs/tags/v1", docs.head(DOCS))
    first = here.open(revision=asked)
    docs.move(DOCS, "refs/tags/v1", replace_all(docs))

    again = here.open(revision=asked, source=first.source)

    assert again.identity == first.identity
    assert texts_of(again) == ALL
    assert here.texts(revision=asked)[0] == "new 0 0"
    assert here.texts(revision=f"@{first.source['revision']}") == ALL


def test_the_revision_of_a_conversion_is_kept(lines: FakeHub, here: Here) -> None:
    first = here.open(input_config="en")
    lines.push(DOCS, {"en.jsonl": LINES * 2})
    lines.push(DOCS, {"en/train/0001.parquet": parquet(["changed"])}, revision=CONVERTED)

    again = here.open(input_config="en", source=first.source)

    assert again.identity == first.identity
    assert texts_of(again) == ["en 0", "en 1", "en 2"]
    assert here.texts(input_config="en") == ["en 0", "changed", "en 2"]


def test_another_split_or_revision_is_another_run(hub_job: Job, docs: FakeHub) -> None:
    docs.push(DOCS, {"data/test-00000-of-00001.parquet": parquet(["test"])})
    hub_job.succeed()
    docs.move(DOCS, "v2", docs.push(DOCS, {"notes.md": b"more"}))

    for other in ({"input_split": "test"}, {"input": f"hf://datasets/{DOCS}@v2"}):
        finished = hub_job(**other)
        assert finished.rc == 1
        assert finished.says("belongs to a different run", *({"input", "revision"} if "input" in other else other))


def test_a_revision_that_is_gone_is_named(here: Here, docs: FakeHub) -> None:
    source = here.open().source
    replace_all(docs)
    del docs.repos[DOCS].commits[source["revision"]]

    message = refused(here, source=source)

    assert source["revision"] in message
    assert "--fresh" in message


def test_ranks_that_begin_one_after_the_other_read_one_revision(hub_job: Job, docs: FakeHub) -> None:
    hub_job.succeed(rank=0, world_size=2)
    replace_all(docs)

    output = hub_job.succeed(rank=1, world_size=2)

    assert sorted(output.ids()) == sorted(ALL)
    assert len(revisions(output)) == 1


# ── Seeking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_run_resumes_in_the_middle_of_a_file(hub_job: Job, docs: FakeHub, server: FakeServer) -> None:
    server.behave(slowly)
    running = hub_job.start(max_concurrent_generations=2)
    wait_until(lambda: len(hub_job.output.written()) >= 3)
    running.process.kill()
    running.process.wait()
    kept, answered = hub_job.output.durable(), len(server.requests)
    docs.forget()

    output = hub_job.succeed()

    assert output.ids() == ALL
    assert len(server.requests) - answered == len(ALL) - len(kept)
    assert len(kept) >= 12
    assert hub_job.verify().rc == 0


def slowly(payload: Any, n: int) -> Delay:
    return Delay(0.05)


class Shelf:
    """Files in memory that count as remote."""

    local = False

    def __init__(self, files: dict[str, bytes]) -> None:
        self.names, self.contents = list(files), list(files.values())
        self.sizes = [len(content) for content in self.contents]
        self.opened: list[int] = []

    def open(self, i: int) -> Any:
        self.opened.append(i)
        return io.BytesIO(self.contents[i])


def reader_of(shelf: Any, **options: Any) -> Any:
    sdg.Plugins.load([])
    from sdg_plugins.readers.parquet import ParquetReader

    defaults = {"records_per_chunk": 10, "world_size": 1, "rank": 0, "max_documents": None, "prompt_column": "text"}
    return ParquetReader(SimpleNamespace(options=SimpleNamespace(**defaults | options), source_schema=None), shelf, {})


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    rows_per_group=st.integers(1, 12),
    chunk=st.integers(1, 13),
    world=st.integers(1, 4),
    most=st.none() | st.integers(1, 100),
    reopened=st.sets(st.integers(0, 40)),
    bookmarks=st.booleans(),
    eager=st.integers(1, 3),
)
def test_chunks_of_all_ranks_partition_a_remote_dataset(
    sizes: list[int],
    rows_per_group: int,
    chunk: int,
    world: int,
    most: int | None,
    reopened: set[int],
    bookmarks: bool,
    eager: int,
) -> None:
    contents = [[f"{number} {row}" for row in range(size)] for number, size in enumerate(sizes)]
    shelf = Shelf({f"{number}": parquet(rows, rows_per_group) for number, rows in enumerate(contents)})
    whole = [
        (name, int(text.split()[1]), text) for name, rows in zip(shelf.names, contents, strict=True) for text in rows
    ]
    found: dict[int, list[Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        sdg.Plugins.load([])
        patch.setattr("sdg_plugins.readers.parquet.EAGER", eager)
        patch.setattr("sdg_plugins.readers.parquet.FOOTERS", 2)
        for rank in range(world):
            options = {"records_per_chunk": chunk, "world_size": world, "rank": rank, "max_documents": most}
            reader, bookmark = reader_of(shelf, **options), None
            for index in range(rank, len(whole) // chunk + 1 + world, world):
                if index in reopened:  # as after a crash
                    reader = reader_of(shelf, **options)
                reader.seek(index * chunk, bookmark if bookmarks else None)
                bookmark = reader.tell()
                blocks = reader.read(chunk)
                found[index] = [
                    (block.file, block.row + number, text)
                    for block in blocks
                    for number, text in enumerate(block.batch.column("text").to_pylist())
                ]
            assert bookmarks or reader.total() == len(whole)

    assert [row for index in sorted(found) for row in found[index]] == whole


def test_footers_of_many_files_are_read_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[f"{number} {row}" for row in range(10 + number % 3)] for number in range(50)]
    shelf = Shelf({f"{number}": parquet(rows[number]) for number in range(50)})
    whole = [text for file in rows for text in file]
    sdg.Plugins.load([])
    for name in ("EAGER", "EAGER_REMOTE"):
        monkeypatch.setattr(f"sdg_plugins.readers.parquet.{name}", 2)
    monkeypatch.setattr("sdg_plugins.readers.parquet.FOOTERS", 4)

    reader = reader_of(shelf)
    assert max(shelf.opened) == 1
    assert reader.total() != len(whole)
    assert reader.total() == pytest.approx(len(whole), rel=0.1)
    reader.seek(300, None)
    bookmark = reader.tell()
    assert 20 <= max(shelf.opened) < 40
    assert texts_of(reader, 300, 40) == whole[300:340]
    texts_of(reader, 300)
    assert reader.total() == len(whole)

    other = reader_of(shelf)
    shelf.opened.clear()
    other.seek(300, bookmark)
    assert other.read(1)[0].batch.column("text").to_pylist() == [whole[300]]
    assert min(shelf.opened) > 20
    assert other.total() == pytest.approx(len(whole), rel=0.1)
    assert texts_of(other, 5, 1) == [whole[5]]


# ── Requests to the Hub ──────────────────────────────────────────────────────────────────────────────────────────────


def large(hub: FakeHub, repo: str, files: int = 4, groups: int = 4, rows_per_group: int = 10) -> list[str]:
    """A dataset with row groups of 100 KB, so that reading a footer fetches at most one of them."""
    rows = [[f"{file} {row}" for row in range(groups * rows_per_group)] for file in range(files)]
    hub.create(repo)
    pads = [f"{number:04}".encode() * (25_000 // rows_per_group) for number in range(groups * rows_per_group)]
    hub.push(repo, {f"{n}.parquet": parquet(texts, rows_per_group, pad=pads) for n, texts in enumerate(rows)})
    return [text for file in rows for text in file]


def test_few_requests_are_made_for_each_row_group(hub: FakeHub, here: Here) -> None:
    whole = large(hub, "lab/large")

    assert here.texts("lab/large") == whole

    assert hub.counts["info"] == 1
    assert hub.counts["tree"] == 1
    assert set(hub.counts) == {"info", "tree", "resolve", "cdn"}
    assert hub.counts["resolve"] <= 4 * 2 + 16 * 2  # footers, row groups


def test_a_rank_reads_only_its_row_groups(hub: FakeHub, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = large(hub, "lab/large")
    fetched = Counter[str]()
    reader = here.open("lab/large", world_size=4, rank=1, records_per_chunk=10)
    opened = reader._open
    monkeypatch.setattr(
        reader, "_open", lambda piece: (fetched.update([f"{piece.file}/{piece.group}"]), opened(piece))[1]
    )

    found = [text for chunk in range(1, 16, 4) for text in texts_of(reader, chunk * 10, 10)]

    assert found == [text for chunk in range(1, 16, 4) for text in whole[chunk * 10 : chunk * 10 + 10]]
    assert fetched == {f"{file}/1": 1 for file in range(4)}


# ── Failures of the Hub ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "faults",
    [
        [("info", {"drop": True}), ("tree", {"status": 500}), ("cdn", {"drop": True, "times": 3, "after": 4})],
        [("info", {"status": 503}), ("resolve", {"drop": True}), ("cdn", {"status": 500, "times": 2, "after": 5})],
        [("tree", {"drop": True}), ("resolve", {"status": 429, "headers": {"Retry-After": "1"}, "after": 5})],
    ],
)
def test_transient_errors_are_retried(faults: list[Any], hub: FakeHub, job: Job) -> None:
    whole = large(hub, "lab/large", files=2)
    job.env |= hub.environment(job.folder)
    for operation, fault in faults:
        hub.fail(operation, **fault)

    output = job.succeed(input="hf://datasets/lab/large")

    assert output.ids() == whole
    assert all(fault.times == 0 for fault in hub._faults)


@pytest.mark.slow
def test_a_run_survives_an_outage_of_the_hub(hub: FakeHub, job: Job, server: FakeServer) -> None:
    whole = large(hub, "lab/large", files=6)
    job.env |= hub.environment(job.folder)
    server.behave(slowly)
    running = job.start(input="hf://datasets/lab/large", records_per_chunk=5, max_concurrent_documents=5)
    wait_until(lambda: len(job.output.written()) >= 2)
    hub.stop()
    threading.Event().wait(2)
    hub.start()
    finished = running.finish()

    assert finished.rc == 0
    assert job.output.ids() == whole


def test_a_cdn_without_ranges_works(hub: FakeHub, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = large(hub, "lab/large", files=2)
    monkeypatch.setattr("fake_hub._ranged", lambda call, content, headers: web.Response(body=content, headers=headers))

    assert here.texts("lab/large") == whole


def test_an_interrupted_run_ends_while_the_hub_is_unreachable(hub: FakeHub, job: Job, server: FakeServer) -> None:
    whole = large(hub, "lab/large", files=6)
    job.env |= hub.environment(job.folder)
    job.options |= {"input": "hf://datasets/lab/large", "records_per_chunk": 5}
    hub.fail("resolve", drop=True, times=1 << 30, after=1, match="/3.parquet")  # its footer can be read
    running = job.start()
    wait_until(lambda: len(server.requests) == 3 * 40)
    threading.Event().wait(2)
    running.send(signal.SIGINT)
    finished = running.finish(timeout=20)

    assert finished.rc == 130
    hub._faults.clear()
    assert job.succeed().ids() == whole
    assert len(server.requests) == len(whole)


def test_a_run_that_needs_no_more_rows_ends_while_the_hub_is_unreachable(hub: FakeHub, job: Job) -> None:
    whole = large(hub, "lab/large", files=2)
    job.env |= hub.environment(job.folder)
    hub.fail("cdn", drop=True, times=1 << 30, after=2 + 2)

    assert job.succeed(input="hf://datasets/lab/large", max_documents=10).ids() == whole[:10]


def test_remote_input_is_read_ahead_of_the_documents(hub: FakeHub, job: Job, server: FakeServer) -> None:
    """So that requests stay in flight however far away the Hub is; how many stand in a benchmark, not in a test."""
    large(hub, "lab/large", files=4, groups=8, rows_per_group=25)
    server.behave(lambda payload, n: Hang())
    job.env |= hub.environment(job.folder)
    job.options |= {"input": "hf://datasets/lab/large", "records_per_chunk": 10}

    running = job.start(max_concurrent_generations=20, max_concurrent_documents=20)
    wait_until(lambda: len(server.requests) == 20)
    wait_until(lambda: hub.counts["cdn"] >= 4 + 16)  # all footers, and as many row groups as are fetched ahead
    assert not server.answered
    server.release()

    assert running.finish().rc == 0
    assert len(job.output.rows()) == 800
