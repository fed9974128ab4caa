"""The dataset card: what it says, that text written by hand stays, and that nothing breaks out of its section."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_server import FakeServer, Hang, Status, prompt_of
from huggingface_hub import DatasetCard
from hypothesis import Phase, example, given, settings, strategies as st
from running import ROOT, Job, Output, documents, program, wait_until

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.markdown import short_line, visible
from sdg_plugins.publishing import card as cards
from sdg_plugins.publishing.dataset_info import with_features
from sdg_plugins.publishing.front_matter import BrokenCard, config_entry, size_category

BEGIN, END = "<!-- sdg: begin data -->", "<!-- sdg: end data -->"
SOURCE = {"dataset": "owner/source", "revision": "0123abcd", "license": "odc-by", "language": ["en", "no"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """The output of a run over 30 documents of which 5 failed."""
    folder = tmp_path_factory.mktemp("finished")
    with FakeServer() as server:
        server.behave(lambda payload, n: Status(400) if int(prompt_of(payload).split()[1]) % 6 == 0 else None)
        job = Job(folder, server)
        job.input(documents(30))
        output = job.succeed(records_per_chunk=4)
        job.sdg.close()
    (output.path / "README.md").unlink()
    return output


class Past:
    """A copy of a finished run whose state a test may change."""

    def __init__(self, output: Output, folder: Path) -> None:
        shutil.copytree(output.path, folder)
        self.output = Output(folder)
        self.original = (self.output.state / "run.json").read_text()

    def run(self, source: dict[str, Any] | None = None, model: str = "", config: str = "data", **options: Any) -> Any:
        """The run with other options, as the command `card` finds it."""
        record = json.loads(self.original)
        record["source"] = source or {}
        record["options"] |= options
        record["identity"]["model"] = model or record["identity"]["model"]
        (self.output.state / "run.json").write_text(json.dumps(record))
        parser = argparse.ArgumentParser()
        recorded.add_run_options(parser)
        run = recorded.load_run(parser.parse_args(["--output", str(self.output.path)]))
        run.options.output_config = config
        path = Path(run.output.path(run.path_of(sdg.Chunk(0, 0))))
        if not path.exists():  # a config without files is not listed beside others
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return run

    def rows(self, rows: list[dict[str, Any]] | pa.Table) -> None:
        """Put other rows into the first file."""
        table = pa.Table.from_pylist(rows) if isinstance(rows, list) else rows
        pq.write_table(table, self.output.path / "data/00000_00000.parquet")

    def figures(self, **figures: Any) -> None:
        """Change the figures of the rank."""
        path = self.output.state / "00000.stats.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | figures))


@pytest.fixture
def past(finished: Output, tmp_path: Path) -> Past:
    return Past(finished, tmp_path / "past")


def front_of(card: str) -> dict[str, Any]:
    """The front matter, read as the Hub's client does."""
    front = DatasetCard(card).data.to_dict()
    (block,) = re.match(r"---\r?\n(.*?)\n---\r?\n", card, re.DOTALL).groups()  # type: ignore[union-attr]
    assert front == {key: value for key, value in yaml.safe_load(block).items() if value is not None}
    return front


def paths_of(card: str) -> dict[str, Any]:
    """The files of each config."""
    return {config["config_name"]: config["data_files"][0]["path"] for config in front_of(card)["configs"]}


def cells_of(card: str) -> dict[str, str]:
    """Names and values in the tables."""
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", card, re.MULTILINE))


# ── What it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_of_a_finished_run_says_what_was_made_and_how(past: Past) -> None:
    run = past.run(
        {**SOURCE, "config": "default", "split": "train"},
        model="Qwen/Qwen3-8B",
        prompt_template="Translate:\n[[DOCUMENT]]",
        system_prompt="Be terse.",
        temperature=0.7,
        generation={"min_p": 0.1},
        server="vllm",
        tp=4,
        replicas=2,
        server_arg=[["revision", "feedbeef"]],
    )
    past.figures(seconds=7200.0, prompt_tokens=3000, completion_tokens=6000, tokens_per_second=0.8)

    card = cards.render(None, run, dataset="me/mine")

    assert front_of(card) == {
        "license": "odc-by",
        "language": ["en", "no"],
        "pretty_name": "Mine",
        "task_categories": ["text-generation"],
        "annotations_creators": ["machine-generated"],
        "language_creators": ["machine-generated"],
        "size_categories": ["n<1K"],
        "tags": ["synthetic", "sdg"],
        "source_datasets": ["owner/source"],
        "configs": [{"config_name": "data", "data_files": [{"split": "train", "path": "data/**/*.parquet"}]}],
    }
    cells = cells_of(card)
    assert cells["Model"] == "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B)"
    assert cells["Model revision"] == "feedbeef"
    assert "https://huggingface.co/datasets/owner/source" in cells["Source"]
    assert "0123abcd" in cells["Source"]
    assert cells["Sampling"].replace("\\", "") == "temperature 0.7, min_p 0.1"
    assert "echo" in cells["Rollout"]
    assert cells["`sdg` version"] == sdg.__version__
    assert cells["Fingerprint of the run"] == run.fingerprint
    assert (cells["Documents"], cells["Rows"], cells["Filtered"], cells["Failed"]) == ("30", "25", "0", "5")
    assert cells["Completion rate"] == "83.33 %"
    assert cells["Completion tokens"] == "6,000; mean 200.0 per document"
    assert cells["Total tokens"] == "9,000; mean 300.0 per document"
    assert cells["GPU hours, all ranks and attempts"] == "16.00"
    assert "```\nTranslate:\n[[DOCUMENT]]\n```" in card
    assert "```\nBe terse.\n```" in card
    assert 'load_dataset("me/mine", "data", split="train")' in card
    assert '"id": "d0001"' in card
    assert "# mine" in card
    assert "Not finished" not in card


def test_the_card_has_the_prompts_and_options_of_a_bundled_rollout_and_the_command(past: Past) -> None:
    identity = ["style", "temperature", "prompt_column", "target_language"]
    past.rows(
        [{"id": "d0", "text": "A question?", "rollout_results": [{"text": "An answer.", "score": 4, "extra": None}]}]
    )

    card = cards.render(None, past.run(rollout="rephrase", style=["faq", "table"], temperature=0.5, identity=identity))

    assert "as questions that a reader would have" in card
    assert "as a table in Markdown" in card
    assert "as an encyclopedia would" not in card
    cells = cells_of(card)
    assert cells["--style"] == "faq, table"
    assert "--target-language" not in cells  # has its default
    assert cells[r"rollout\_results\[\].finish\_reason"].startswith("string: why the model stopped")
    assert "--plugin rephrase --input YOUR_FILES" in card
    assert "--temperature 0.5 --style faq --style table" in card
    assert "```\nA question?\n```" in card
    assert "```\nAn answer.\n```" in card
    assert "8–15 ██████████████████████████████ 1" in card
    assert "\n4 ██████████████████████████████ 1" in card
    assert "null" not in card


def test_options_of_a_plugin_that_may_be_paths_are_not_on_the_card(past: Past) -> None:
    card = cards.render(None, past.run(glossary="/secret/terms.json", strength=3, identity=["glossary", "strength"]))

    assert "secret" not in card
    assert cells_of(card)["--strength"] == "3"
    assert "YOUR_PLUGIN.py" in card


def test_the_same_run_gives_the_same_card(past: Past) -> None:
    first = cards.render(None, past.run(SOURCE))

    assert cards.render(first, past.run(SOURCE)) == first
    assert cards.render(None, past.run(SOURCE)) == first


def test_wall_time_is_given_if_the_server_was_not_launched_by_the_run(past: Past) -> None:
    past.figures(seconds=90.0)

    assert cells_of(cards.render(None, past.run()))["Wall time, all ranks and attempts"] == "1.5 minutes"


def test_progress_is_shown_during_the_run_and_removed_at_its_end(past: Past) -> None:
    during = cards.render(None, past.run(), progress="**Half** of it <!-- sdg: end data -->")
    after = cards.render(during, past.run())

    assert during.index("**Half** of it") < during.index("### How it was made")
    assert during.count(END) == 1
    assert "Half" not in after
    assert after == cards.render(None, past.run())


def test_a_run_that_was_stopped_says_so(past: Past) -> None:
    past.figures(rank={"status": "stopped"})

    assert "Not finished" in cards.render(None, past.run())
    assert "0 of 3 ranks have" in cards.render(None, past.run(world_size=3))


def test_a_card_names_no_paths_hosts_or_urls_of_the_machine(past: Past) -> None:
    run = past.run(
        model="/secret/models/Qwen3-8B/",
        input="/secret/docs",
        base_url=["http://secret:1/v1"],
        api_key_env="SECRET_KEY",
    )

    card = cards.render(None, run)

    assert cells_of(card)["Model"] == "Qwen3-8B"
    assert cells_of(card)["Source"] == "local files"
    record = json.loads((past.output.state / "00000.stats.json").read_text())["rank"]
    secrets = [
        "secret",
        "SECRET",
        str(past.output.path),
        str(past.output.path.parent),
        record["host"],
        ".sdg",
        "127.0.0.1",
    ]
    assert [secret for secret in secrets if secret in card] == []


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("demo-extractive", "demo-extractive"),
        ("models/sub/Qwen", "Qwen"),
        ("C:\\models\\Qwen", "Qwen"),
        ("gpt|5\n`x`", "gpt\\|5 \\`x\\`"),
        ("/cache/models--Qwen--Qwen3-8B/snapshots/feed", "[Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B)"),
        ("../Qwen", "Qwen"),
    ],
)
def test_a_model_is_linked_only_if_it_may_be_on_the_hub(past: Past, model: str, shown: str) -> None:
    assert cells_of(cards.render(None, past.run(model=model)))["Model"] == shown


def test_a_model_in_the_hubs_cache_has_a_revision(past: Past) -> None:
    card = cards.render(None, past.run(model="/cache/models--Qwen--Qwen3-8B/snapshots/feedbeef/"))

    assert cells_of(card)["Model revision"] == "feedbeef"


def test_a_folder_named_like_a_model_on_the_hub_is_not_linked(past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
    (past.output.path / "owner/model").mkdir(parents=True)
    monkeypatch.chdir(past.output.path)

    assert cells_of(cards.render(None, past.run(model="owner/model")))["Model"] == "model"


def test_an_input_on_the_hub_is_named_even_if_the_reader_says_nothing(past: Past) -> None:
    card = cards.render(None, past.run(input="hf://datasets/owner/name@main"))

    assert "[owner/name](https://huggingface.co/datasets/owner/name)" in card


def test_long_prompts_are_shortened(past: Past) -> None:
    card = cards.render(None, past.run(system_prompt="x" * 5000))

    assert "x" * 4000 in card
    assert "x" * 4001 not in card
    assert "4,000 of 5,000 characters" in card


def test_sample_rows_are_short_and_without_binary_columns(past: Past) -> None:
    struct = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    columns = {
        "text": ["t" * 10_000] * 3,
        "image": [{"path": "p", "bytes": b"SECRET"}] * 3,
        "vector": [[0.5] * 1000] * 3,
    }
    many = {f"column{number}": ["x"] * 3 for number in range(30)}
    schema = [("text", pa.string()), ("image", struct), ("vector", pa.list_(pa.float64()))]
    past.rows(pa.table({**columns, **many}, schema=pa.schema([*schema, *[(name, pa.string()) for name in many]])))

    card = cards.render(None, past.run())
    samples = sample_rows(card)

    assert len(samples) == 2
    assert samples[0]["text"] == "t" * 600 + "…"
    assert samples[0]["vector"][-1] == "… 970 more"
    assert "image" not in samples[0]
    assert len(samples[0]) == 20


def sample_rows(card: str) -> list[dict[str, Any]]:
    (text,) = re.findall(
        r"^(`{3,})json\n(.*?)\n\1$", card.rpartition("\n### Sample rows\n")[2], re.DOTALL | re.MULTILINE
    )
    decoder, rows, rest = json.JSONDecoder(), [], text[1]
    while rest:
        row, end = decoder.raw_decode(rest)
        rows.append(row)
        rest = rest[end:].lstrip()
    return rows


def test_sample_rows_come_from_the_first_file_with_rows(past: Past) -> None:
    schema = pq.read_schema(past.output.path / "data/00000_00000.parquet")
    past.rows(schema.empty_table())

    assert sample_rows(cards.render(None, past.run()))[0]["id"] == "d0004"


def test_sample_rows_stay_when_the_files_have_been_published_and_are_gone(past: Past) -> None:
    before = cards.render(None, past.run())
    shutil.rmtree(past.output.path / "data")
    windows = before.replace("\n", "\r\n")

    assert cards.render(before, past.run(), published=True) == before
    assert cards.render(windows, past.run(), published=True) == windows
    assert "Sample rows" not in cards.render(None, past.run())


def test_a_broken_file_is_skipped_for_sample_rows(past: Past) -> None:
    (past.output.path / "data/00000_00000.parquet").write_bytes(b"PAR1")

    assert sample_rows(cards.render(None, past.run()))[0]["id"] == "d0004"


# ── Text that was written by hand ────────────────────────────────────────────────────────────────────────────────────

BY_HAND = """\
---
# what we ship
pretty_name: "By hand"   # quoted
license: cc-by-4.0

tags:
- mine   # first
# after the tags
language: de
on: {x: 1}
date: 2024-01-01
empty:
configs:
- config_name: theirs
  data_files: extra/*.csv
---
# Ours, by hand

Text *before*.
"""


def test_text_and_keys_by_hand_survive(past: Past) -> None:
    card = cards.render(BY_HAND, past.run(SOURCE)) + "\nText after.\n"
    again = cards.render(card, past.run(SOURCE, system_prompt="Another"))

    assert again.startswith(
        '---\n# what we ship\npretty_name: "By hand"   # quoted\nlicense: cc-by-4.0\n\ntags:\n- mine\n'
    )
    assert "# after the tags\nlanguage: de\non: {x: 1}\ndate: 2024-01-01\nempty:\nconfigs:\n" in again
    assert "---\n# Ours, by hand\n\nText *before*.\n\n" + BEGIN in again
    assert again.endswith(END + "\n\nText after.\n")
    front = yaml.safe_load(again.split("---")[1])
    assert list(front)[:7] == ["pretty_name", "license", "tags", "language", True, "date", "empty"]
    assert front["tags"] == ["mine", "synthetic", "sdg"]
    assert [config["config_name"] for config in front["configs"]] == ["theirs", "data"]
    assert front["configs"][0] == {"config_name": "theirs", "data_files": "extra/*.csv"}
    assert "Another" in again


@pytest.mark.parametrize(
    "front",
    [
        "{license: mit, tags: [x]}",
        "  license: mit\n  tags: [x]",
        "a: &a mit\nlicense: *a\ntags: &t [x]\nother: *t",
        "",
        "# none",
    ],
)
def test_front_matter_in_any_style_keeps_its_values(past: Past, front: str) -> None:
    before = yaml.safe_load(front) or {}

    after = front_of(cards.render(f"---\n{front}\n---\nText\n", past.run(SOURCE)))

    assert after["license"] == before.get("license", "odc-by")
    assert after["tags"] == [*before.get("tags", []), "synthetic", "sdg"]
    assert {key: after[key] for key in before if key != "tags"} == {key: before[key] for key in before if key != "tags"}


def test_a_card_without_front_matter_gets_some(past: Past) -> None:
    card = cards.render("Just text", past.run())

    assert front_of(card)["tags"] == ["synthetic", "sdg"]
    assert f"---\nJust text\n\n{BEGIN}" in card


def test_line_ends_survive(past: Past) -> None:
    unix = cards.render(BY_HAND, past.run(SOURCE))
    windows = cards.render(BY_HAND.replace("\n", "\r\n"), past.run(SOURCE))

    assert windows == unix.replace("\n", "\r\n")
    assert cards.render(windows, past.run(SOURCE)) == windows


def test_marks_without_their_counterpart_are_text(past: Past) -> None:
    before = f"{BEGIN}\nkept 1\n{END.replace('data', 'other')}\nkept 2\n{END}\nkept 3\n"

    once = cards.render(before, past.run())
    twice = cards.render(once, past.run())

    assert once == twice
    assert before in twice


@pytest.mark.parametrize(
    "front",
    [
        "a: [",
        "- a\n- b",
        "just text",
        "a: 1\n...\nb: 2",
        "x: !!python/object:os.system 1",
        "configs: data",
        "d: 2024-99-99",
    ],
)
def test_broken_front_matter_is_reported_and_left_unchanged(past: Past, front: str) -> None:
    with pytest.raises(BrokenCard, match=r"README\.md.*fix it"):
        cards.render(f"---\n{front}\n---\nText\n", past.run())


def test_front_matter_without_an_end_is_broken(past: Past) -> None:
    with pytest.raises(BrokenCard, match=r"me/mine README\.md: the front matter has no closing line"):
        cards.render("---\nlicense: mit\n\n# Title\n", past.run(), dataset="me/mine")


# ── Several configs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_several_configs_share_a_card_and_get_a_config_of_all(past: Past) -> None:
    one = cards.render(None, past.run(SOURCE))
    two = cards.render(one, past.run(SOURCE, config="terse"))
    three = cards.render(two, past.run(SOURCE, config="2024"), folder="sub/dir")

    assert list(paths_of(one)) == ["data"]
    files = ["data/**/*.parquet", "terse/**/*.parquet", "sub/dir/2024/**/*.parquet"]
    assert paths_of(two) == {"data": files[0], "terse": files[1], "all": files[:2]}
    assert paths_of(three) == {"data": files[0], "terse": files[1], "all": files, "2024": files[2]}
    assert [config.get("default") for config in front_of(three)["configs"]] == [True, None, None, None]
    assert [section.name for section in cards.sections(three)] == ["data", "terse", "2024"]
    assert cards.render(three, past.run(SOURCE, config="terse")) == three


def test_the_size_category_counts_the_rows_of_all_configs(past: Past) -> None:
    past.figures(rows=600)
    one = cards.render(None, past.run())
    two = cards.render(one, past.run(config="terse"))

    assert front_of(one)["size_categories"] == ["n<1K"]
    assert front_of(two)["size_categories"] == ["1K<n<10K"]


@pytest.mark.parametrize(
    ("rows", "category"),
    [
        *[(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9999, "1K<n<10K"), (10_000, "10K<n<100K")],
        *[(10**6, "1M<n<10M"), (10**9, "1B<n<10B"), (10**11, "100B<n<1T"), (10**12, "n>1T")],
    ],
)
def test_size_categories_are_the_hubs(rows: int, category: str) -> None:
    assert size_category(rows) == category


def test_a_config_named_all_by_hand_is_left_unchanged(past: Past) -> None:
    by_hand = "---\nconfigs:\n- config_name: all\n  data_files: '**/*.csv'\n---\n"
    card = cards.render(cards.render(by_hand, past.run()), past.run(config="terse"))

    assert front_of(card)["configs"][0] == {"config_name": "all", "data_files": "**/*.csv"}
    assert [config["config_name"] for config in front_of(card)["configs"]] == ["all", "data", "terse"]


def test_a_config_of_a_run_named_all_holds_only_its_own_files(past: Past) -> None:
    two = cards.render(cards.render(None, past.run()), past.run(config="terse"))

    assert paths_of(cards.render(two, past.run(config="all")))["all"] == "all/**/*.parquet"


def test_configs_of_different_columns_or_formats_are_not_offered_as_one(past: Past) -> None:
    two = cards.render(cards.render(None, past.run()), past.run(config="terse"))
    formats = cards.render(two, past.run(config="terse", output_filename="${chunk_index}.jsonl.gz"))

    assert paths_of(formats) == {"data": "data/**/*.parquet", "terse": "terse/**/*.jsonl.gz"}
    for shape in ({"results_column": "other"}, {"flat": True}, {"drop_columns": ["text"]}, {"keep_columns": ["id"]}):
        columns = cards.render(two, past.run(config="terse", **shape))
        assert list(paths_of(columns)) == ["data", "terse"]
        assert list(paths_of(cards.render(columns, past.run(**shape)))) == ["data", "terse", "all"]


def test_a_default_set_by_hand_is_kept(past: Past) -> None:
    two = cards.render(cards.render(None, past.run()), past.run(config="terse"))
    moved = two.replace("  default: true\n", "").replace(
        "- config_name: terse\n", "- config_name: terse\n  default: true\n"
    )
    theirs = two.replace("configs:\n", "configs:\n- config_name: x\n  data_files: x.csv\n  default: true\n")

    def defaults(card: str) -> list[str]:
        return [config["config_name"] for config in front_of(card)["configs"] if config.get("default")]

    assert defaults(cards.render(two, past.run())) == ["data"]
    assert defaults(cards.render(moved, past.run())) == ["terse"]
    assert defaults(cards.render(theirs, past.run())) == ["x"]


@pytest.mark.parametrize("name", ["on", "1", "null", "2024", "1e3", "0o17", "-", "1.5", "y", "data-1", "default"])
def test_names_of_configs_stay_strings_in_yaml(past: Past, name: str) -> None:
    card = cards.render(cards.render(None, past.run(config=name)), past.run())

    assert name in paths_of(card)
    assert re.search(rf"config_name: (['\"]){re.escape(name)}\1$", card, re.MULTILINE) or not name[0].isdigit()


# ── Nothing breaks out ───────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE = [
    END,
    f"\n{END}\n# Forged",
    BEGIN,
    "\n---\n",
    "---\nlicense: forged\n---",
    "```",
    "\n```\n\n# Forged\n",
    "````json\n`",
    "~~~",
    "| a | b |",
    "<script>alert(1)</script>",
    "<!--",
    "-->",
    "\r\n",
    "\r" + END + "\r",
    "\u2028" + END,
    "\x00\x1b[31m",
    "\ud800",
    "&lt;!-- &#96;",
    "[x](javascript:alert(1))",
    "### Sample rows",
    "\n### Sample rows\n",
    '": {}}',
    "\\`\\|",
]
TEXT = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=10), min_size=1, max_size=5).map("".join)
JSON_TEXT = TEXT.map(lambda text: text.encode(errors="replace").decode())


@pytest.fixture(scope="module")
def hostile(finished: Output, tmp_path_factory: pytest.TempPathFactory) -> Past:
    return Past(finished, tmp_path_factory.mktemp("hostile") / "past")


# Without shrinking: with so many texts it takes minutes.
@settings(max_examples=150, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(prompt="a", system="b", model="c", words="d", row="e", column="f", folder="<!--")
@example(prompt="a", system="b", model="c", words="\r\n", row="e", column="f", folder="g")
@example(prompt=END, system="", model="c", words="d", row="e", column="f", folder="g")
@given(prompt=TEXT, system=TEXT, model=TEXT, words=TEXT, row=JSON_TEXT, column=JSON_TEXT, folder=TEXT)
def test_nothing_from_data_or_options_breaks_out(
    hostile: Past, prompt: str, system: str, model: str, words: str, row: str, column: str, folder: str
) -> None:
    hostile.rows([{column: row, "id": row}])
    before, after = "Text by hand, before.\n", "\n\nText by hand, after.\n"
    source = {
        "dataset": words,
        "license": words,
        "language": [words],
        "revision": words,
        "config": words,
        "split": words,
    }
    run = hostile.run(
        source, model=model, prompt_template=prompt, system_prompt=system, rollout=words, generation={words: words}
    )

    card = cards.render(before, run, progress=words, folder=folder, dataset="me/mine") + after[1:]

    text = DatasetCard(card).text
    marks = [line for line in text.splitlines() if "<!-- sdg: " in line]
    assert [line for line in marks if "facts" not in line] == [BEGIN, END]
    assert text.count("<!--") == 3
    assert text.startswith(before)
    assert text.endswith(f"{END}{after}")
    front = front_of(card)
    made = {"pretty_name", "task_categories", "annotations_creators", "language_creators"}
    assert set(front) <= {"license", "language", "size_categories", "tags", "source_datasets", "configs", *made}
    assert front.get("license", "") == short_line(words)
    assert front.get("language", [""]) == [short_line(words)]
    assert front.get("source_datasets", [words]) == [words]
    assert front["configs"][0]["config_name"] == "data"
    absent = {"### Prompt": not prompt, "### System prompt": not system}
    assert headings_of(text) == [heading for heading in HEADINGS if not absent.get(heading)]
    samples = sample_rows(card)
    assert len(samples) == 1
    assert visible(samples[0]["id"]) == visible(row)
    assert cards.render(card, run, progress=words, folder=folder, dataset="me/mine") == card
    card.encode()


HEADINGS = [
    "## Config `data`",
    *[
        "### How it was made",
        "### System prompt",
        "### Prompt",
        "### Columns",
        "### Statistics",
        "### How to load it",
        "### How to make it again",
        "### Sample rows",
    ],
]


def headings_of(text: str) -> list[str]:
    """The headings outside of fences. Those in the progress do not count: it is the monitor's markdown."""
    lines, fence, headings = text.split("\n"), "", []
    inside = lines[lines.index("### How it was made") :]
    for row in ["## Config `data`", *inside]:
        mark = re.match(r"`{3,}", row)
        if mark and not fence:
            fence = mark[0]
        elif fence and row == fence:
            fence = ""
        elif not fence and row.startswith("#"):
            headings.append(row)
        elif not fence and row.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3, row
    return headings


@settings(max_examples=100, deadline=None)
@given(
    before=st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])),
    after=st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])),
    extra=st.dictionaries(
        st.text(min_size=1, max_size=8).map("x".__add__),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
        max_size=4,
    ),
)
def test_any_text_and_any_keys_by_hand_survive(hostile: Past, before: str, after: str, extra: dict[str, Any]) -> None:
    front = f"---\n{yaml.safe_dump(extra, sort_keys=False)}---\n" if extra else "---\n# none\n---\n"
    run = hostile.run(SOURCE)

    once = cards.render(front + before + "\n", run)
    twice = cards.render(once + after, hostile.run(SOURCE, system_prompt="other"))

    block, text = re.fullmatch(r"---\n(.*?\n)---\n(.*)", twice, re.DOTALL).groups()  # type: ignore[union-attr]
    values = yaml.safe_load(block)
    assert {key: values[key] for key in extra} == extra
    assert text.startswith(before + "\n")
    assert text.endswith(END + "\n" + after)


# ── Through sdg.py ───────────────────────────────────────────────────────────────────────────────────────────────────


def readme_of(output: Output) -> str:
    return (output.path / "README.md").read_bytes().decode()


def test_every_run_writes_a_card_and_a_rerun_the_same_one(job: Job) -> None:
    job.input(documents(6))

    output = job.succeed(records_per_chunk=2)
    first = readme_of(output)
    assert cells_of(first)["Rows"] == "6"
    assert "Not finished" not in first

    assert readme_of(job.succeed(records_per_chunk=2)) == first
    (output.path / "README.md").unlink()
    written = job.sdg("card", "--output", output.path)
    assert written.rc == 0
    assert readme_of(output) == first


def test_the_card_of_flat_rows_describes_their_columns_and_shows_them(job: Job) -> None:
    job.server.behave(lambda payload, n: "An answer of the model.")
    job.documents("A document.")

    card = (job.succeed(flat=True, rollouts_per_document=2).path / "README.md").read_text()

    cells = cells_of(card)
    assert (cells["Documents"], cells["Rows"]) == ("1", "2")
    assert "2 rows of synthetic data" in card
    assert cells["text"] == "string: from the source; the text for the prompt"
    assert cells["generated\\_text"] == "string: the completion"
    assert cells["sample"].startswith("number of the result")
    assert card.count("```\nAn answer of the model.\n```") == 2
    assert "16–31" in card


def test_the_last_rank_writes_the_figures_of_all(job: Job) -> None:
    job.input(documents(12))

    job.succeed(records_per_chunk=2, rank=0, world_size=2)
    assert "1 of 2 ranks have" in readme_of(job.output)
    job.succeed(records_per_chunk=2, rank=1, world_size=2)

    assert cells_of(readme_of(job.output))["Rows"] == "12"
    assert "Not finished" not in readme_of(job.output)


def test_an_interrupted_run_writes_a_card_of_what_it_has(job: Job, server: FakeServer) -> None:
    job.input(documents(8))
    server.behave(lambda payload, n: Hang() if prompt_of(payload) == "document 7" else None)
    started = job.start(records_per_chunk=2)
    wait_until(lambda: len(job.output.written()) >= 3)
    started.send(signal.SIGTERM)

    assert started.finish().rc == 143
    assert "**Ended early**" in readme_of(job.output)

    server.behave(lambda payload, n: None)
    card = readme_of(job.succeed(records_per_chunk=2))
    assert "Ended early" not in card
    assert "Not finished" not in card


def test_a_run_without_documents_writes_no_card(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    server.behave(lambda payload, n: Status(401))

    assert job().rc == 1
    assert not (job.output.path / "README.md").exists()


def test_a_broken_card_is_kept_and_reported_and_the_run_succeeds(job: Job) -> None:
    job.input(documents(2))
    job.output.path.mkdir()
    broken = "---\nlicense: [\n---\nBy hand\n"
    (job.output.path / "README.md").write_text(broken)

    finished = job()
    assert finished.rc == 0
    assert finished.says("README.md", "front matter", "fix it")
    assert readme_of(job.output) == broken

    written = job.sdg("card", "--output", job.output.path)
    assert written.rc == 1
    assert written.says("README.md", "front matter", "fix it")
    assert readme_of(job.output) == broken


def test_a_card_that_is_not_utf8_is_kept(job: Job) -> None:
    job.input(documents(2))
    job.output.path.mkdir()
    (job.output.path / "README.md").write_bytes(b"\xff\xfe\x00")

    assert job().says("README.md", "UTF-8")
    assert (job.output.path / "README.md").read_bytes() == b"\xff\xfe\x00"


def test_starting_over_keeps_text_by_hand(job: Job) -> None:
    job.input(documents(4))
    job.succeed()
    path = job.output.path / "README.md"
    path.write_text(path.read_text() + "\nBy hand.\n")

    job.input(documents(2))
    output = job.succeed(fresh=True)

    assert readme_of(output).endswith(f"{END}\n\nBy hand.\n")
    assert cells_of(readme_of(output))["Rows"] == "2"


def test_the_command_reports_that_the_run_does_not_exist(job: Job) -> None:
    assert job.sdg("card", "--output", "nowhere").says("nowhere")


def test_listing_plugins_loads_no_heavy_library(job: Job) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sdg; sdg.main(['plugins'])\n"
    script += "assert not {'huggingface_hub', 'yaml', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def load(folder: Path, *arguments: str) -> list[str]:
    """The ids that `load_dataset` finds in a folder, through its card."""
    pytest.importorskip("datasets")
    script = """
        import json, sys, datasets
        datasets.disable_progress_bars()
        print(json.dumps(datasets.load_dataset(*sys.argv[1:], split="train")["id"][:]))
    """
    cache = folder.parent / "cache"
    env = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [*program(script), str(folder), *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids = json.loads(done.stdout)
    assert isinstance(ids, list)
    return ids


@pytest.mark.parametrize("template", ["${rank}_${chunk_index}.parquet", "part-${chunk_index}.jsonl.gz"])
def test_load_dataset_finds_the_rows_and_nothing_else(job: Job, server: FakeServer, template: str) -> None:
    job.input(documents(9))
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) == "document 3" else None)
    output = job.succeed(records_per_chunk=2, output_filename=template)
    kept = [f"d{number:04}" for number in range(9) if number != 3]
    assert sorted(load(output.path, "data")) == kept

    # as the publisher spreads many files over folders
    (output.path / "data/00001").mkdir()
    moved = sorted(path for path in (output.path / "data").iterdir() if path.is_file())[-1]
    moved.rename(output.path / "data/00001" / moved.name)
    assert sorted(load(output.path)) == kept


def test_load_dataset_finds_each_config_and_all_of_them(job: Job) -> None:
    job.input(documents(3))
    job.succeed()
    job.input([{"id": f"e{number}", "text": "other"} for number in range(2)])
    output = job.succeed(output_config="terse")

    assert sorted(load(output.path)) == ["d0000", "d0001", "d0002"]
    assert sorted(load(output.path, "terse")) == ["e0", "e1"]
    assert len(load(output.path, "all")) == 5


def test_rows_that_could_not_be_loaded_beside_those_of_other_runs_are_refused_before_they_are_paid_for(
    job: Job, server: FakeServer
) -> None:
    job.input(documents(3))
    job.succeed()
    server.forget()
    lines = {"output_config": "lines", "output_filename": "${rank}_${chunk_index}.jsonl"}

    for other in (lines, {**lines, "processes": 2}):
        assert job(**other).says("the config data in parquet", "one format", "another --output")
    assert job(output="output/data/more").says("lies in the folder", "another --output")
    assert job(output="output/inner").rc == 0
    assert job(output_config="inner").says("output/inner/README.md was not written by a run", "--output-config")
    assert job(**{**lines, "output_config": "data"}, fresh=True).rc == 0  # these replace the others
    assert len(server.requests) == 6


@pytest.mark.parametrize("how", ["failures", "signal"])
def test_the_card_of_a_run_that_ended_early_says_so_and_names_no_machine(
    job: Job, server: FakeServer, how: str
) -> None:
    job.options["plugin"] = job.plugin(
        "broken",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("broken", broken)

        async def broken(document, generate) -> sdg.Reply:  # otherwise fields follow from the first chunk
            reply = await generate(document.text)
            if document.text.endswith(("3", "7")):
                raise ValueError("no http://gpu-7.cluster:8000/v1 for /scratch/me/data on host gpu-7:8000, 10.0.0.7")
            return reply
        """,
    )
    job.input(documents(300))
    server.behave(lambda payload, n: Hang() if how == "signal" and prompt_of(payload) > "document 2" else None)
    started = job.start(records_per_chunk=10, max_concurrent_documents=20, max_failure_rate=0.1)
    if how == "signal":
        wait_until(lambda: job.output.written())
        started.send(signal.SIGTERM)

    assert started.finish().rc == {"failures": 3, "signal": 143}[how]

    card = (job.output.path / "README.md").read_text()
    assert "**Ended early**" in card
    assert not [word for word in ("gpu-7", "scratch", "10.0.0.7", str(job.folder)) if word in card]


def test_features_of_a_config_leave_those_of_others() -> None:
    theirs = {"config_name": "theirs", "features": [], "splits": []}
    configs = [config_entry("a", ["a/*"]), config_entry("all", ["a/*", "b/*"])]
    values = {"configs": configs, "dataset_info": [theirs]}
    features = [{"name": "text", "dtype": "string"}]

    described = with_features(values, "a", "a/*", features)

    infos = described["dataset_info"]
    assert infos == [theirs, *({"config_name": name, "features": features} for name in ("a", "all"))]
    assert with_features(described, "a", "a/*", [])["dataset_info"] == [theirs]
