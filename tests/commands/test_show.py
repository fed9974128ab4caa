"""`show` prints what a run has made so far as a person reads it, and the commands find the run without --output."""

from __future__ import annotations

import json
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import Hang
from running import Finished, Job, documents, wait_until

import sdg
from sdg_plugins.common.records import Records
from sdg_plugins.common.terminal import shorten

CRITIC = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("critic", critic)

    async def critic(document, generate):
        if document.text.startswith("dull"):
            return None
        if document.text.startswith("trips"):
            raise ValueError("fell over the carpet")
        reply = await generate(document.text)
        return {"text": reply.text, "score": 4.5, "comment": None, "parts": {"nested": "yes"}}
"""


def show(job: Job, *arguments: object) -> Finished:
    return job.sdg("show", "--output", job.output.path, *arguments, **job.env)


@pytest.fixture
def critic(job: Job) -> Job:
    """A run with rows, a filtered and a failed document."""
    texts = ["fine", "dull", "trips", "x" * 5000]
    job.input([{"id": f"d{i}", "text": text, "url": f"http://site/{i}"} for i, text in enumerate(texts)])
    job.options["plugin"] = job.plugin("critic", CRITIC)
    job.succeed()
    return job


def test_prompt_and_results_are_shown_without_nested_and_null_fields(critic: Job) -> None:
    out = show(critic).stdout
    assert "document 1 · d0" in out
    assert "text: fine" in out
    assert "score: 4.5" in out
    assert "[… 3,500 of 5,000 characters are not shown …]" in out
    assert "nested" not in out
    assert "comment" not in out
    assert "http://site" not in out
    assert "not shown: finish_reason, parts, truncated, url, usage; --full shows all" in out
    assert "\x1b" not in out


def test_number_of_documents_failures_and_single_documents_can_be_chosen(critic: Job) -> None:
    assert "d3" not in show(critic, "-n", 1).stdout
    failed = show(critic, "--failed").stdout
    assert "document 1 · d2" in failed
    assert "FAILED after 1 attempt: ValueError: fell over the carpet" in failed
    assert "d0" not in failed
    whole = show(critic, "--id", "d3").stdout
    assert "x" * 5000 in whole
    assert "http://site/3" in whole
    assert "nested: yes" in whole
    assert "fell over the carpet" in show(critic, "--id", "d2").stdout
    assert "filtered" in show(critic, "--id", "d1").stdout


def test_document_that_does_not_exist_is_one_line(critic: Job) -> None:
    shown = show(critic, "--id", "d9")
    assert shown.rc == 1
    assert shown.stderr.endswith("has no document 'd9', and no failed or filtered one of this id\n")
    assert shown.stdout == ""


def test_a_file_that_cannot_be_read_is_one_line(critic: Job) -> None:
    first = critic.output.path / critic.output.written()[0]
    first.write_bytes(b"PAR1")

    for options in ([], ["--id", "d2"]):
        shown = critic.sdg("show", "--output", critic.output.path, *options)
        assert shown.rc == 1
        assert shown.says(critic.output.path.name, "cannot be")
        assert "report" not in shown.stderr


def test_folder_of_another_tool_is_one_line(job: Job) -> None:
    (job.folder / "output" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), job.folder / "output" / "data" / "x.parquet")
    shown = show(job)
    assert shown.rc == 1
    assert "is --output correct" in shown.stderr
    assert shown.stderr.count("\n") == 1


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.loads, self.tags = "", [], []
        self.feed(content)

    loads: list[str]
    tags: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_loads_nothing_and_shows_markup_as_text(critic: Job) -> None:
    critic.input([{"id": "<b>1</b>", "text": "<script>alert('&')</script>"}])
    critic.succeed(fresh=True)
    shown = show(critic, "--html", critic.folder / "page.html")
    assert shown.rc == 0, shown
    content = (critic.folder / "page.html").read_text()
    page = Page(content)
    assert "<script>alert('&')</script>" in page.text
    assert "<b>1</b>" in page.text
    assert "script" not in page.tags
    assert all(target.startswith("#") for target in page.loads)
    assert "url(" not in content
    assert "@import" not in content
    assert "score4.5" in page.text


def test_chats_are_shown_by_role(job: Job) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    job.input([{"id": "c", "text": chat}])
    job.succeed()
    out = show(job).stdout
    assert "1. system: Be brief." in out
    assert "2. user: Why?" in out


def test_jsonl_output_and_several_configs_are_shown(job: Job) -> None:
    job.documents("one")
    job.succeed(output_filename="${chunk_index}.jsonl.gz", output_config="faq")
    assert show(job, "--config", "faq").stdout.count("one") >= 2
    refused = show(job)
    assert refused.rc == 1
    assert "faq" in refused.stderr
    assert "one" in show(job, "--config", "faq", "--id", "one").stdout


def test_interrupted_run_can_be_looked_at_before_its_first_file(job: Job) -> None:
    job.input(documents(20))
    job.server.behave(lambda payload, n: Hang() if "document 1" in str(payload) else None)
    started = job.start()
    wait_until(lambda: any((job.output.state / "open").glob("*")))  # a chunk is open
    wait_until(lambda: len(job.output.durable()) == 9)
    running = show(job, "-n", 3)
    assert running.stdout.count("text: document") >= 3, running
    assert "not in a file yet" in running.stdout
    started.send(signal.SIGINT)
    stopped = started.finish()
    assert stopped.rc == 130
    assert "11 documents: run the same command again to go on" in stopped.stdout
    assert "9 finished documents in the state" in stopped.stdout
    assert "sdg.py show --output output" in stopped.stdout
    assert "rows    " not in stopped.stdout
    assert "not finished" in show(job, "--id", "d0019").stdout


def test_commands_find_the_latest_run(job: Job) -> None:
    job.documents("one")
    assert job(output=None).rc == 0
    (path,) = job.folder.glob("output/*")
    assert path.name == "echo"
    for command in ("show", "verify", "status", "card"):
        found = job.sdg(command)
        assert found.rc == 0, found
        assert found.says("this is output/echo, the only run here")
    job.documents("two")
    job.succeed(output="output/later")
    found = job.sdg("show")
    assert "two" in found.stdout
    assert "output/later, the latest of 2 runs here" in found.stderr


def test_without_any_run_the_message_names_the_option(job: Job) -> None:
    for command in ("show", "verify", "status", "card"):
        found = job.sdg(command)
        assert found.rc == 1
        assert found.stderr == "sdg: there is no run below ./output or ./.sdg: name its output with --output\n"


def test_ten_thousand_chunks_are_not_read_to_show_five_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.input(documents(300))
    job.succeed(records_per_chunk=1)
    reads: list[Any] = []
    run = load(job.output.path)
    records = Records(run)
    read = records._writer.read
    monkeypatch.setattr(records._writer, "read", lambda chunk: reads.append(chunk) or read(chunk))
    assert [record.id for record in records.rows(5)] == [f"d{i:04}" for i in range(5)]
    assert len(reads) == 5
    found = records.find("d0250")
    assert found
    assert found.status == "row"
    assert len(reads) == 6


def load(output: Path) -> sdg.Run:
    import argparse

    from sdg_plugins.common import recorded

    return recorded.load_run(argparse.Namespace(output=str(output), output_config="data", state_dir=None))


def test_cut_text_keeps_both_ends_and_counts_what_is_cut() -> None:
    text = json.dumps(list(range(1000)))
    cut = shorten(text, 100)
    assert cut.startswith(text[:80])
    assert cut.endswith(text[-20:])
    assert f"{len(text) - 100:,} of {len(text):,} characters are not shown" in cut
    assert shorten(text, 0) == text
