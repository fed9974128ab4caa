"""`--preview N` shows what a run would send and write, and leaves nothing behind."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from fake_server import Delay, Hang, Status
from running import ROOT, Job, documents, wait_until


def everything_in(folder: Path) -> dict[str, float]:
    """The modification times of all files and folders, except those that Python writes."""
    paths = [path for path in folder.rglob("*") if not {"__pycache__", "scratch"} & set(path.parts)]
    return {str(path): path.stat().st_mtime for path in paths}


@pytest.fixture
def scratch(job: Job) -> Path:
    """The folder for temporary files."""
    folder = job.folder / "scratch"
    folder.mkdir()
    job.env["TMPDIR"] = str(folder)
    return folder


def test_requests_rows_filtered_and_failed_documents_are_shown(job: Job, scratch: Path) -> None:
    plugin = job.plugin(
        "picky",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("picky", picky)

        async def picky(document, generate):
            if document.text == "dull":
                return None
            if document.text == "trips":
                raise ValueError("fell over the carpet")
            draft = await generate(f"Draft: {document.text}", temperature=0.5)
            system = {"role": "system", "content": "Be brief."}
            final = await generate([system, {"role": "user", "content": draft.text}])
            return {"final": final.text, "score": 3}
        """,
    )
    job.documents("fine", "dull", "trips", "refused")
    job.server.behave(lambda payload, n: Status(400, message="no!") if "refused" in str(payload) else None)
    before = everything_in(job.folder)

    shown = job(preview=4, plugin=plugin, max_tokens=77)

    assert shown.rc == 0, shown
    out = shown.stdout
    for payload in [request.payload for request in job.server.requests]:
        assert payload["messages"][-1]["content"] in out
        assert payload["max_tokens"] == 77
    assert "POST /chat/completions" in out
    assert "temperature: 0.5" in out
    assert "max_tokens: 77" in out
    assert "Be brief." in out
    assert "score: 3" in out
    assert "FILTERED" in out
    assert "fell over the carpet" in out
    assert "picky.py:" in out
    assert "no!" in out
    assert "documents: 4, requests: 3, rows: 1, filtered: 1, failed: 2" in out
    assert "final: string" in out
    assert everything_in(job.folder) == before
    assert not list(scratch.iterdir())


def test_the_row_is_the_one_that_a_run_writes(job: Job) -> None:
    job.documents("one")
    shown = job(preview=1)
    (row,) = job.succeed().rows()
    assert row["rollout_results"][0]["text"] in shown.stdout
    previewed, run = (request.payload for request in job.server.requests)
    assert previewed == run


def test_no_more_documents_are_run_than_requested(job: Job) -> None:
    job.input(documents(50))
    job(preview=3, records_per_chunk=2)
    assert len(job.server.requests) == 3
    job(preview=3, max_documents=1)
    assert len(job.server.requests) == 4


def test_rows_are_shown_as_the_writer_in_use_writes_them(job: Job, scratch: Path) -> None:
    job.documents("one")
    shown = job(preview=1, output_filename="${chunk_index}.jsonl.gz")
    assert "text: one" in shown.stdout
    assert not list(scratch.iterdir())


def test_each_rollout_of_a_document_has_its_requests(job: Job) -> None:
    job.documents("one")
    out = job(preview=1, rollouts_per_document=2, seed=5).stdout
    first, second = out.partition("rollout 2 of 2")[::2]
    assert "rollout 1 of 2" in first
    assert "seed: 5" in first
    assert "seed: 6" in second


def test_a_preview_works_beside_a_run_and_leaves_its_state_alone(job: Job) -> None:
    job.input(documents(4))
    job.server.behave(lambda payload, n: Hang() if n == 1 else None)
    started = job.start()
    wait_until(lambda: len(job.server.requests) == 4)

    shown = job(preview=2)

    assert shown.rc == 0, shown
    assert "rows: 2" in shown.stdout
    job.server.release()
    assert started.finish().rc == 0
    assert len(job.output.rows()) == 4


def test_a_state_with_other_options_does_not_matter(job: Job) -> None:
    job.documents("one")
    output = job.succeed()
    before = everything_in(output.path)
    assert job(preview=1, temperature=0.9, fresh=True, retry_failed=True).rc == 0
    assert everything_in(output.path) == before


def test_observers_are_not_called(job: Job) -> None:
    observer = job.plugin(
        "nosy",
        """
        import pathlib
        import sdg

        @sdg.hookimpl
        def observe(run):
            pathlib.Path("observed").touch()

        @sdg.hookimpl
        def chunk_written(chunk):
            pathlib.Path("written").touch()
        """,
    )
    job.documents("one")
    assert job(preview=1, plugin=[observer, job.options["plugin"]]).rc == 0
    assert not (job.folder / "observed").exists()
    assert not (job.folder / "written").exists()


def test_the_key_is_never_shown_even_if_a_plugin_sends_it(job: Job) -> None:
    plugin = job.plugin(
        "leaky",
        """
        import os
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("leaky", leaky)

        async def leaky(document, generate):
            return await generate("the key is " + os.environ["OPENAI_API_KEY"])
        """,
    )
    job.documents("one")
    job.server.api_key = "sk-very-secret"
    shown = job(preview=1, plugin=plugin, env={"OPENAI_API_KEY": "sk-very-secret"})
    assert shown.rc == 0, shown
    assert "the key is ***" in shown.stdout
    assert "sk-very-secret" not in shown.stdout + shown.stderr


def test_a_long_text_is_whole_and_a_very_long_one_is_cut_with_its_end(job: Job) -> None:
    job.input([{"id": "long", "text": "x" * 9000 + "END"}, {"id": "longer", "text": "y" * 50_000 + "FINISH"}])
    out = job(preview=2).stdout
    assert "x" * 9000 + "END" in out
    assert "y" * 10_000 not in out
    assert "of 50,006 characters are not shown" in out
    assert "FINISH" in out


def test_control_characters_in_a_document_are_escaped(job: Job) -> None:
    job.documents("red \x1b[31m bell \x07")
    out = job(preview=1).stdout
    assert "\x1b" not in out
    assert "\\x1b[31m" in out


def test_a_hub_or_bucket_as_output_is_not_touched(job: Job, hub: FakeHub, scratch: Path) -> None:
    job.documents("one")
    job.env |= hub.environment(job.folder, None)
    for output in ("hf://datasets/me/rows", "s3://no-such-bucket/rows"):
        shown = job(preview=1, output=output)
        assert shown.rc == 0, shown
        assert "rows: 1" in shown.stdout
    assert not hub.requests
    assert not (job.folder / ".sdg").exists()
    assert not list(scratch.iterdir())


def test_a_launched_server_is_started_shown_and_stopped(job: Job, scratch: Path) -> None:
    engine = job.folder / "engine"
    command = [
        sys.executable,
        ROOT / "tests" / "support" / "fake_engine.py",
        "serve",
        "{model}",
        "--port",
        "{port}",
        "--folder",
        engine,
    ]
    job.documents("one")
    job.options |= {"server": "command", "base_url": None, "model": "m"}
    shown = job(preview=1, server_command=shlex.join(map(str, command)))
    assert shown.rc == 0, shown
    assert "rows: 1" in shown.stdout
    assert len((engine / "starts.jsonl").read_text().splitlines()) == 1
    assert [path.name[:10] for path in scratch.iterdir()] == ["sdg-ports-"]  # shared by all processes of a machine


def test_the_log_of_a_server_that_does_not_start_is_shown(job: Job) -> None:
    job.documents("one")
    job.options |= {"server": "command", "base_url": None, "model": "m"}

    shown = job(preview=1, server_command="sh -c 'echo kaboom; exit 3' {port}")

    assert shown.rc == 1
    assert "kaboom" in shown.stderr


def test_a_refused_key_ends_the_preview_with_one_line(job: Job, scratch: Path) -> None:
    job.documents("one")
    job.server.api_key = "another"
    shown = job(preview=1)
    assert shown.rc == 1
    assert shown.says("OPENAI_API_KEY")
    assert not list(scratch.iterdir())


def test_ctrl_c_shows_what_there_is_and_leaves_nothing(job: Job, scratch: Path) -> None:
    job.documents("one", "two")
    job.server.behave(lambda payload, n: Delay(1.0) if "two" in str(payload) else None)
    started = job.start(preview=2)
    wait_until(lambda: len(job.server.requests) == 2)
    started.send(signal.SIGINT)
    shown = started.finish()
    assert shown.rc == 130
    assert "document 1 · one" in shown.stdout
    assert "document 2 · two" in shown.stdout
    assert not list(scratch.iterdir())


def test_the_next_preview_deletes_what_a_killed_one_has_left_but_not_the_folder_of_one_at_work(
    job: Job, scratch: Path
) -> None:
    job.documents("one")
    job.server.behave(lambda payload, n: Hang() if n <= 2 else None)
    killed, at_work = job.start(preview=1), job.start(preview=1)
    wait_until(lambda: len(job.server.requests) == 2 and len(list(scratch.iterdir())) == 2)
    killed.close()  # kill -9

    assert job(preview=1).rc == 0

    assert len(list(scratch.iterdir())) == 1
    job.server.release()
    assert at_work.finish().rc == 0
    assert not list(scratch.iterdir())
