"""Chains in one file: each of `[[steps]]` works on what the step before it has written."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fake_server import Answer, Delay, FakeServer, Status
from running import ROOT, Job, documents, wait_until

STEPS = """
plugin = "summarize"
records-per-chunk = 2

[[steps]]

[[steps]]
name = "french"
plugin = "translate"

[[steps]]
plugin = "prompt"
prompt-template = "Compare: [[text]]"
max-tokens = 5
"""


@pytest.fixture
def chain(job: Job) -> Job:
    path = job.folder / "steps.toml"
    path.write_text(STEPS)
    job.options |= {"plugin": None, "config": path, "output": "chained"}
    job.input(documents(5))
    return job


def columns(folder: Path) -> list[str]:
    return list(pq.read_table(folder).column_names)


def test_steps_run_in_order_and_one_card_tells_of_them_all(chain: Job, server: FakeServer) -> None:
    output = chain.succeed()

    texts = [row["rollout_results"][0]["text"] for row in pq.read_table(output.path / "summarize").to_pylist()]
    for text in texts:
        assert any(prompt.startswith(text) and "\n\nTranslate" in prompt for prompt in server.prompts)
    assert sum(prompt.startswith("Compare: document ") for prompt in server.prompts) == 5
    assert columns(output.path / "prompt") == ["id", "text", "rollout_results", "french", "prompt"]
    card = (output.path / "README.md").read_text()
    assert "\n# Chained: synthetic data\n" in card
    assert "from documents from the config summarize of this dataset" in card
    assert card.count("sdg --config YOUR_STEPS.toml") == 2
    assert re.findall(r"## Config `(\w+)`", card) == ["summarize", "french", "prompt"]
    for name in ("summarize", "french", "prompt"):
        assert chain.sdg("verify", "--output", output.path, "--output-config", name).rc == 0
    sent = len(server.requests)
    chain.succeed()
    assert len(server.requests) == sent


@pytest.mark.slow
def test_all_steps_share_one_display(chain: Job) -> None:
    master, slave = pty.openpty()
    words = [sys.executable, str(ROOT / "sdg.py"), *chain.command_line({"no_progress": None})]
    with subprocess.Popen(words, cwd=chain.folder, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # how the end of a terminal shows on Linux
            while part := os.read(master, 65536):
                shown += part
    os.close(master)

    assert process.returncode == 0, shown
    frames = re.findall(r"(\d+)/(\d+) [^|]*\|[^|]*\| (\w+) \((\d) of 3\)", shown.decode())
    assert [frame for frame in dict.fromkeys(frames) if frame[:2] == ("5", "15")] == [("5", "15", "summarize", "1")]
    assert ("10", "15", "french", "2") in frames
    assert frames[-1] == ("15", "15", "prompt", "3")
    assert "what that run was given" not in shown.decode()  # the last step's template names its column


def test_a_step_is_durable_by_itself_and_the_chain_goes_on_after_a_kill(chain: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Delay(0.05))
    started = chain.start(max_concurrent_generations=1)
    wait_until(lambda: any("\n\nTranslate" in prompt for prompt in server.prompts))
    started.send(signal.SIGKILL)
    started.finish(bugs=True)
    server.behave(lambda payload, n: None)

    output = chain.succeed()

    assert sum("\n\nSummarize" in prompt for prompt in server.prompts) == 5
    assert pq.read_table(output.path / "prompt").num_rows == 5


def test_a_step_that_fails_ends_the_chain_before_the_next_one(chain: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Status(400) if "Summarize" in str(payload) else None)

    finished = chain(max_failure_rate=0.5)

    assert finished.rc == 3
    assert all("\n\nSummarize" in prompt for prompt in server.prompts)


def test_more_documents_pass_through_all_steps(chain: Job, server: FakeServer) -> None:
    chain.succeed(max_documents=3)
    output = chain.succeed()

    assert pq.read_table(output.path / "prompt").column("id").to_pylist() == [row["id"] for row in documents(5)]
    assert len(server.requests) == 15


def test_a_step_is_refused_when_the_rows_of_the_one_before_have_changed(chain: Job, server: FakeServer) -> None:
    chain.succeed()
    server.forget()
    server.behave(lambda payload, n: Answer("other words"))
    chain.succeed(fresh=True, output_config="summarize")

    finished = chain()

    assert finished.rc == 1
    assert finished.says("summarize", "are not those that chunk 0 was made of", "--fresh --output-config french")
    assert len(server.requests) == 5
    chain.succeed(fresh=True, output_config="french")
    chain.succeed(fresh=True, output_config="prompt")
    assert chain().rc == 0


def test_a_step_is_checked_for_slurm_alone_when_the_one_before_has_run(chain: Job) -> None:
    arguments = ["check", *chain.command_line({})]

    whole = chain.sdg(*arguments)
    too_early = chain.sdg(*arguments, "--output-config", "french")
    chain.succeed()
    alone = chain.sdg(*arguments, "--output-config", "french")

    configs = [line.split()[1] for line in whole.stdout.splitlines() if line.startswith("output-config")]
    assert configs == ["summarize", "french", "prompt"]
    assert too_early.rc == 1
    assert too_early.says("step french works on the step summarize, which has not run")
    assert "open-ranks none" in alone.stdout


@pytest.mark.parametrize(
    ("above", "first", "shape"),
    [("", "flat = true", {}), ("flat = true", "", {}), ("", "", {"flat": True})],
)
def test_the_text_of_a_flat_step_is_found_whether_its_source_has_a_text_or_not(
    chain: Job, server: FakeServer, above: str, first: str, shape: dict[str, bool]
) -> None:
    chain.options["config"].write_text(
        f"prompt-column = 'question'\n{above}\n[[steps]]\n{first}\n"
        "[[steps]]\nplugin = 'translate'\ndrop-columns = 'rollout,sample'\n"
    )
    chain.input([{"id": "one", "question": "Why?"}])

    output = chain.succeed(**shape)

    (text,) = pq.read_table(output.path / "summarize")["text"].to_pylist()
    assert server.prompts[-1].startswith(text)


def test_a_chain_can_be_previewed(chain: Job) -> None:
    finished = chain(preview=1)

    assert finished.rc == 0, finished
    assert "config french" in finished.stdout
    assert not chain.output_of(output="chained").written()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[steps]\nplugin = 'summarize'\n", ("steps must be tables", "[[steps]]")),
        ("[[steps]]\n[configs.a]\nmax-tokens = 5\n", ("configs and steps",)),
        ("[[steps]]\nplugin = 'summarise'\n", ("unknown rollout 'summarise'",)),
        ("flat = true\n[[steps]]\n[[steps]]\n", ("both flat", 'drop-columns = "rollout,sample" to summarize-2')),
        (
            "results-column = 'x'\n[[steps]]\n[[steps]]\nresults-column = 'x'\n",
            ("both have their results in a column x",),
        ),
        ("[[steps]]\n[[steps]]\nprompt-column = 'rollout_results[0].txet'\n", ("no field txet", "available: text")),
    ],
)
def test_mistakes_in_steps_are_named(chain: Job, toml: str, words: tuple[str, ...]) -> None:
    chain.options["config"].write_text(toml)

    finished = chain()

    assert finished.rc in {1, 2}
    assert all(word in finished.message for word in words), finished


def test_a_step_after_results_without_a_text_says_what_they_have(chain: Job, server: FakeServer) -> None:
    chain.options["config"].write_text("[[steps]]\nplugin = 'judge'\n[[steps]]\nplugin = 'summarize'\n")
    server.behave(lambda payload, n: Answer('{"reason": "dull", "score": 1}'))

    finished = chain()

    assert finished.rc == 1
    assert finished.says("rollout_results[0].text is null in the rows of the step before it, judge", "[0].reason")
    assert len(server.requests) == 5


def test_a_step_whose_input_has_no_rows_says_so(chain: Job, server: FakeServer) -> None:
    chain.options["config"].write_text("[[steps]]\nplugin = 'judge'\nmin-score = 5\n[[steps]]\nplugin = 'summarize'\n")
    server.behave(lambda payload, n: Answer('{"reason": "dull", "score": 1}'))

    finished = chain()

    assert finished.rc == 1
    assert "step summarize: the step before it, judge, has no rows" in finished.stderr
    assert len(server.requests) == 5
