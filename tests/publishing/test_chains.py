"""Rows that are published on the Hub, as the input of the next step and as training data."""

from __future__ import annotations

import pytest
from fake_hub import FakeHub, Rights
from running import Job, documents

URI = "hf://datasets/alice/out"
TOKEN = "hf_write_aaaabbbbccccdddd"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_published_rows_are_exported_and_are_the_input_of_a_step_and_of_a_run(job: Job, hub: FakeHub) -> None:
    hub.tokens = {TOKEN: Rights("alice")}
    job.env = hub.environment(job.folder, TOKEN)
    job.input(documents(3))
    (job.folder / "steps.toml").write_text('[[steps]]\nplugin = "summarize"\n[[steps]]\nplugin = "translate"\n')

    ran = job(config="steps.toml", plugin=None, output=URI, publish_interval=0.5)
    assert ran.rc == 0, ran
    arguments = ("--output", URI, "--output-config", "summarize", "--format", "messages", "--to", "chats.jsonl")
    exported = job.sdg("export", *arguments, **job.env)
    assert exported.rc == 0, exported
    chats = (job.folder / "chats.jsonl").read_bytes()
    assert len(chats.splitlines()) == 3
    (job.folder / ".sdg").rename(job.folder / "elsewhere")  # on another machine
    again = job.sdg("export", *arguments, **job.env)
    assert "no state of hf://datasets/alice/out here" in again.stderr
    assert (job.folder / "chats.jsonl").read_bytes() == chats
    job.server.forget()
    follow = {"input_config": "translate", "prompt_column": "translate[0].text", "results_column": "third"}
    assert job(input=URI, output="third", **follow).rc == 0
    assert all(prompt.startswith("answer ") for prompt in job.server.prompts)
