"""The simplest plugins: readers that yield dicts, writers that are functions; and words for common mistakes."""

from __future__ import annotations

from typing import Any

import pytest
from running import Job

SIMPLE = """
    import csv
    from pathlib import Path

    import pyarrow.orc
    import sdg

    @sdg.hookimpl
    def register_readers(register):
        register("numbers", numbers)

    def numbers(run):
        rows = int(Path("rows.txt").read_text())
        for i in range(rows):
            if i == 1500:
                yield {"text": "strange", "n": "not a number"}
            elif i == 1501:
                yield {"text": "more", "n": i, "new": 1}
            elif i == 1502:
                yield None
            elif i == 1503:
                yield {"text": "large", "n": 2**70}
            else:
                yield {"text": f"number {i}", "n": i}

    @sdg.hookimpl
    def register_writers(register):
        register("orc", write_orc)

    def write_orc(path, rows):
        pyarrow.orc.write_table(rows, path)
"""


@pytest.fixture
def simple(job: Job) -> Job:
    (job.folder / "rows.txt").write_text("30")
    job.options["plugin"] = [job.plugin("simple", SIMPLE), job.options["plugin"]]
    job.options |= {"input": "numbers://", "output_filename": "${chunk_index}.orc", "records_per_chunk": 10}
    return job


def test_generator_of_dicts_is_a_reader_and_a_function_a_writer(simple: Job) -> None:
    finished = simple()
    assert finished.rc == 0, finished
    assert len(simple.server.requests) == 30
    assert len(simple.output.written()) == 3
    assert simple.verify().rc == 0
    assert "number 7" in simple.sdg("show", "--output", simple.output.path, "--id", "numbers/7").stdout
    (simple.folder / "rows.txt").write_text("45")
    grown = simple()
    assert grown.rc == 0, grown
    assert len(simple.server.requests) == 45
    assert "rows: 2" in simple(preview=2).stdout


def test_writer_may_have_a_suffix_of_a_bundled_format(job: Job) -> None:
    source = """
        import sdg

        @sdg.hookimpl
        def register_writers(register):
            register("json", write)
            register("txt", write)

        def write(path, rows):
            with open(path, "w") as file:
                file.write(f"{rows.num_rows} rows")
    """
    job.options["plugin"] = [job.plugin("own", source), job.options["plugin"]]
    job.documents("one", "two")
    for suffix in ("json", "txt"):
        output = job.succeed(output_filename=f"${{chunk_index}}.{suffix}", output=suffix)
        assert (output.path / "data" / f"00000.{suffix}").read_text() == "2 rows"


ONE_READER = """
    import sdg

    @sdg.hookimpl
    def register_readers(register):
        register("log", lines)
        register("trace", lines)

    def lines(run):
        files = sdg.InputFiles.of_run(run, {"log", "trace"})
        for i in range(len(files.paths)):
            with files.open(i) as file:
                for line in file.read().decode().splitlines():
                    yield {"text": line}
"""


def test_one_reader_for_several_suffixes_reads_a_folder_that_has_both(job: Job) -> None:
    folder = job.folder / "mixed"
    folder.mkdir()
    (folder / "a.log").write_text("one\ntwo\n")
    (folder / "b.trace").write_text("three\n")
    (folder / "README.md").write_text("not a document")
    job.options |= {"plugin": [job.plugin("lines", ONE_READER), job.options["plugin"]], "input": folder}

    assert [row["text"] for row in job.succeed().rows()] == ["one", "two", "three"]
    (folder / "c.csv").write_text("text\nfour\n")
    assert job(output="other").says("several formats", "csv and log")


def test_rows_that_differ_from_the_first_ones_fail_alone(simple: Job) -> None:
    (simple.folder / "rows.txt").write_text("1600")
    finished = simple(records_per_chunk=400)
    assert finished.rc == 0, finished
    failed = {record["id"]: record["error"] for record in simple.output.failures()}
    assert failed.keys() == {f"numbers/{i}" for i in range(1500, 1504)}
    assert "the column 'new' is not in the first 1,000 rows" in failed["numbers/1501"]
    assert len(simple.server.requests) == 1596
    (simple.folder / "rows.txt").write_text("1603")
    assert simple(records_per_chunk=400).rc == 0  # the rows before are skipped, whatever they are
    assert {"number 1600", "number 1601", "number 1602"} < {*simple.server.prompts}
    assert len(simple.server.requests) == 1599


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("yield 3", "yielded a int, expected dicts"),
        ("return; yield", "yielded no rows"),
        ("yield {'text': 'a'}; yield {'text': 1}", "the column 'text' has values of several types"),
        ("yield {'text': 'a', 'n': 2**70}", "the column 'n' has values of several types, or an invalid one"),
        ("yield {'text': '\\ud800'}", "the column 'text' has values of several types, or an invalid one"),
        ("yield {'text': 'a'}; raise ValueError('feed is down')", "ValueError: feed is down"),
    ],
)
def test_mistakes_of_a_generator_name_its_place(job: Job, body: str, message: str) -> None:
    source = f"""
        import sdg

        @sdg.hookimpl
        def register_readers(register):
            register("feed", feed)

        def feed(run):
            {body}
    """
    finished = job(plugin=[job.plugin("feeds", source), job.options["plugin"]], input="feed://")
    assert finished.rc == 1, finished
    assert message in finished.stderr
    assert "feeds.py:" in finished.stderr
    assert finished.stderr.count("\n") == 1


ROLLOUT = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("wrong", wrong)

    async def wrong(document, generate):
        {}
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "return document.metadata",
            "a document has no `metadata`: the columns of its row are in `document.row`",
        ),
        ("return document['text']", "a document is not a dict: use document.row['text']"),
        ("document.text = 'x'", "a document is read-only: use a variable for the prompt, and return what is new"),
    ],
)
def test_habits_from_elsewhere_are_answered_with_what_to_use(job: Job, line: str, message: str) -> None:
    job.documents("one")
    job(plugin=job.plugin("wrong", ROLLOUT.format(line)))
    (failure,) = job.output.failures()
    assert message in failure["error"]
    assert "wrong.py:" in failure["error"]


def test_dict_of_context_is_refused_with_what_a_resource_is(job: Job) -> None:
    source = """
        import sdg

        @sdg.hookimpl
        def register_resources(register):
            register("context", {"pool": 3})
    """
    job.documents("one")
    refused = job(plugin=[job.plugin("context", source), job.options["plugin"]])
    assert refused.rc == 1
    assert "the resource 'context' is a dict, expected a function that makes an async context manager" in refused.stderr


@pytest.mark.parametrize(
    ("option", "ours"),
    [("--max-examples", "--max-documents"), ("--model-name-or-path", "--model"), ("--tasks", "--world-size")],
)
def test_option_names_of_datatrove_are_known(job: Job, option: str, ours: str) -> None:
    refused = job.sdg(option, "3")
    assert refused.rc == 2
    assert f"did you mean {ours}?" in refused.stderr


def test_prompt_options_work_with_any_rollout_that_takes_prompt_of(job: Job) -> None:
    source = """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("own", own)

        async def own(document, generate, prompt_of):
            return await generate(prompt_of(document))
    """
    job.documents("dog")
    options: dict[str, Any] = {"plugin": job.plugin("own", source), "prompt_template": "Translate: [[DOCUMENT]]"}
    job.succeed(**options)
    assert job.server.prompts == ["Translate: dog"]
    refused = job(**options | {"prompt_template": "Other: [[DOCUMENT]]"})
    assert "prompt_template" in refused.stderr
    assert refused.rc == 1


def test_identity_that_is_not_a_mapping_is_refused_with_its_place(job: Job) -> None:
    source = """
        import pyarrow as pa
        import sdg

        @sdg.hookimpl
        def register_readers(register):
            register("listed", Listed)

        class Listed:
            def __init__(self, run):
                self.schema, self.identity = pa.schema([("text", pa.string())]), [("a", 1)]

            def seek(self, row, bookmark): ...
            def tell(self): ...
            def read(self, rows): return []
            def total(self): ...
            def continues(self, earlier): return False
    """
    refused = job(plugin=[job.plugin("listed", source), job.options["plugin"]], input="listed://")
    assert refused.rc == 1
    assert "`identity` is a list, expected a mapping" in refused.stderr
    assert "listed.py:" in refused.stderr
