"""Several configs in one run: the tables `[configs.NAME]` of a `--config` file."""

from __future__ import annotations

import contextlib
import json
import shlex
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import Delay, Status
from running import ROOT, Finished, Job, documents, wait_until

TWO = """
    max-tokens = 50
    plugin = "prompt"

    [configs.faq]
    prompt-template = "Ask about: [[DOCUMENT]]"
    temperature = 0.25

    [configs.math]
    prompt_template = "Count in: [[DOCUMENT]]"
    system-prompt = "You count."
    max-tokens = 99
"""


class Configs:
    """Runs a file of configs against the job's server."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.job.options |= {"plugin": None, "config": "run.toml", "output": "out"}
        self.write(TWO)

    def write(self, text: str) -> None:
        (self.job.folder / "run.toml").write_text(text)

    def __call__(self, **options: Any) -> Finished:
        return self.job(**options)

    def rows(self, config: str) -> list[dict[str, Any]]:
        files = sorted((self.job.folder / "out" / config).glob("*.parquet"))
        return [row for path in files for row in pq.read_table(path).to_pylist()]

    def prompts(self) -> list[str]:
        return [request.prompt for request in self.job.server.requests]


@pytest.fixture
def configs(job: Job) -> Configs:
    job.documents("one", "two")
    return Configs(job)


def test_each_config_has_its_options_and_its_folder(configs: Configs) -> None:
    finished = configs()

    assert finished.rc == 0, finished
    payloads = [request.payload for request in configs.job.server.requests]
    faq = [payload for payload in payloads if payload["messages"][-1]["content"].startswith("Ask about")]
    maths = [payload for payload in payloads if payload["messages"][-1]["content"].startswith("Count in")]
    assert [(payload["temperature"], payload["max_tokens"]) for payload in faq] == [(0.25, 50)] * 2
    assert [("temperature" in payload, payload["max_tokens"]) for payload in maths] == [(False, 99)] * 2
    assert [payload["messages"][0]["content"] for payload in maths] == ["You count."] * 2
    assert [row["id"] for row in configs.rows("faq")] == ["one", "two"]
    assert [row["id"] for row in configs.rows("math")] == ["one", "two"]
    for name in ("faq", "math"):
        verified = configs.job.sdg("verify", "--output", "out", "--output-config", name)
        assert verified.rc == 0, verified


def test_interleaved_configs_take_their_documents_together(configs: Configs) -> None:
    configs.job.input(documents(60))

    finished = configs(interleave_configs=True, max_concurrent_documents=4, records_per_chunk=7)

    assert finished.rc == 0, finished
    places: dict[str, list[int]] = {}
    for place, prompt in enumerate(configs.prompts()):
        places.setdefault(prompt.partition(": ")[2], []).append(place)
    assert len(places) == 60
    assert all(len(both) == 2 and both[1] - both[0] <= 20 for both in places.values())
    assert configs.job.server.max_in_flight <= 4
    assert [row["id"] for row in configs.rows("math")] == [row["id"] for row in configs.rows("faq")]
    assert [row["id"] for row in configs.rows("math")] == [row["id"] for row in documents(60)]


def test_interleaved_configs_go_on_without_one_that_fails_and_from_where_they_were(configs: Configs) -> None:
    configs.job.input(documents(60))
    configs.job.server.behave(lambda payload, n: Status(400) if "Count in" in str(payload) else None)

    failed = configs(interleave_configs=True, max_concurrent_documents=4, max_failure_rate=0.5)

    assert failed.rc == 3
    assert failed.says("config math", "failed")
    assert len(configs.rows("faq")) == 60
    configs.job.server.behave(lambda payload, n: None)
    assert configs(interleave_configs=True, retry_failed=True).rc == 0
    assert len(configs.rows("math")) == 60


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ("input-split = 'test'", {}, ["--interleave-configs", "input-split", "test in [configs.math]"]),
        ("max-concurrent-generations = 3", {}, ["--interleave-configs", "max-concurrent-generations", "3"]),
        ("", {"rank": "any", "world_size": 2}, ["--interleave-configs", "--rank any"]),
        ("interleave-configs = true", {"interleave_configs": None}, ["interleave-configs", "above the tables"]),
    ],
)
def test_configs_that_cannot_be_interleaved_are_refused(
    table: str, options: dict[str, Any], words: list[str], configs: Configs
) -> None:
    configs.write(TWO + table)

    refused = configs(**{"interleave_configs": True, **options})

    assert refused.rc == 2
    assert refused.says(*words)


def test_the_command_line_wins_over_all_configs(configs: Configs) -> None:
    assert configs(max_tokens=7).rc == 0
    assert {request.payload["max_tokens"] for request in configs.job.server.requests} == {7}


def test_output_config_on_the_command_line_selects_one_of_them(configs: Configs) -> None:
    assert configs(output_config="math").rc == 0
    assert configs.rows("math")
    assert not configs.rows("faq")
    assert configs(output_config="maths").says("maths", "math")


def test_the_card_has_all_configs_and_load_dataset_finds_them(configs: Configs) -> None:
    assert configs().rc == 0
    card = (configs.job.folder / "out" / "README.md").read_text()
    assert "## Config `faq`" in card
    assert "## Config `math`" in card
    assert "config_name: faq" in card
    assert "config_name: math" in card
    for command in ("card", "monitor"):
        finished = configs.job.sdg(command, "--output", "out", "--output-config", "math")
        assert finished.rc == 0, finished


def test_a_rerun_sends_nothing_again(configs: Configs) -> None:
    assert configs().rc == 0
    sent = len(configs.job.server.requests)
    files = {path: path.stat().st_mtime_ns for path in configs.job.folder.rglob("*.parquet")}
    again = configs()
    assert again.rc == 0, again
    assert len(configs.job.server.requests) == sent
    assert {path: path.stat().st_mtime_ns for path in configs.job.folder.rglob("*.parquet")} == files


def test_a_killed_run_resumes_in_the_config_where_it_was(configs: Configs) -> None:
    configs.job.input(documents(6))
    configs.job.server.behave(lambda payload, n: Delay(60) if "Count" in str(payload) and "5" in str(payload) else None)
    started = configs.job.start()
    state = configs.job.folder / "out" / ".sdg" / "math" / "00000.sqlite3"
    wait_until(lambda: len(configs.prompts()) == 12 and state.exists() and durable(state) >= 5)
    started.send(9)
    started.finish(bugs=True)
    configs.job.server.behave(lambda payload, n: None)

    assert configs().rc == 0
    assert len(configs.rows("faq")) == len(configs.rows("math")) == 6
    assert configs.prompts()[12:] == ["Count in: document 5"]


def durable(state: Path) -> int:
    """The number of final documents in a state file."""
    uri = f"file:{state}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as db, contextlib.suppress(sqlite3.Error):
        (number,) = db.execute("SELECT count(*) FROM documents").fetchone()
        return int(number)
    return 0  # the table does not exist yet


def test_a_config_that_fails_does_not_stop_the_others_and_decides_the_exit_code(configs: Configs) -> None:
    configs.job.input(documents(150))
    configs.job.server.behave(lambda payload, n: Status(400) if "Ask" in str(payload) else None)

    finished = configs(max_failure_rate=0.1)

    assert finished.rc == 3
    assert "config faq: " in finished.stderr
    assert "--max-failure-rate" in finished.stderr
    assert len(configs.rows("math")) == 150
    assert "150 rows" in finished.stdout


def test_a_config_without_its_input_is_named_and_the_others_run(configs: Configs) -> None:
    configs.job.options["input"] = None
    given = configs.job.folder / "input.parquet"
    column = 'prompt-column = "nothing"\n    prompt-template = "Ask'
    configs.write(f'input = "{given}"\n' + TWO.replace('prompt-template = "Ask', column))

    finished = configs()

    assert finished.rc == 1
    assert finished.says("config faq", "nothing")
    assert len(configs.rows("math")) == 2


def test_a_shared_server_that_is_down_ends_all(configs: Configs) -> None:
    configs.job.server.stop()
    finished = configs()
    assert finished.rc == 1
    assert finished.says("no server responds")
    assert not (configs.job.folder / "out" / ".sdg" / "math" / "run.json").exists()


@pytest.mark.parametrize("command", ["/no/such/program {port}", "sh -c 'sleep 2; exit 1' {port}"])
def test_a_launched_server_that_cannot_start_ends_all_and_is_reported_once(configs: Configs, command: str) -> None:
    finished = configs(server="command", base_url=None, model="m", server_command=command)
    assert finished.rc == 1
    assert finished.stderr.count("command failed to start") == 1
    assert not [*configs.rows("faq"), *configs.rows("math")]
    # The second one may have begun while the server was loading; it is not in the way of other options.
    assert configs().rc == 0
    assert len(configs.rows("faq")) == len(configs.rows("math")) == 2


def test_an_interrupt_ends_all(configs: Configs) -> None:
    configs.job.server.behave(lambda payload, n: Delay(1.0))
    started = configs.job.start()
    wait_until(lambda: len(configs.prompts()) == 2)
    started.send(2)
    finished = started.finish()
    assert finished.rc == 130
    assert len(configs.rows("faq")) == 2
    assert not any("Count" in prompt for prompt in configs.prompts())


def test_a_launched_server_is_started_once(configs: Configs) -> None:
    engine = configs.job.folder / "engine"
    command = [
        sys.executable,
        ROOT / "tests" / "support" / "fake_engine.py",
        "serve",
        "m",
        "--port",
        "{port}",
        "--folder",
        engine,
    ]
    configs.job.options |= {"server": "command", "base_url": None, "model": "m"}
    finished = configs(server_command=shlex.join(map(str, command)))
    assert finished.rc == 0, finished
    assert len((engine / "starts.jsonl").read_text().splitlines()) == 1
    assert len(configs.rows("faq")) == len(configs.rows("math")) == 2


def test_each_config_may_have_a_plugin_of_its_own(configs: Configs) -> None:
    for name in ("alpha", "beta"):
        code = f"""
            import sdg

            @sdg.hookimpl
            def add_options(parser):
                parser.add_argument("--word", default="nothing")

            @sdg.hookimpl
            def register_rollouts(register):
                register("mine", mine)

            async def mine(document, generate, run):
                return await generate("{name} " + run.options.word)
        """
        configs.job.plugin(name, code)
    configs.write('[configs.a]\nplugin = "alpha.py"\nword = "one"\n[configs.b]\nplugin = ["./beta.py"]\nword = "two"\n')
    finished = configs()
    assert finished.rc == 0, finished
    assert sorted(configs.prompts()) == ["alpha one"] * 2 + ["beta two"] * 2


def test_the_state_is_below_a_state_dir_that_is_given(configs: Configs) -> None:
    assert configs(state_dir="elsewhere").rc == 0
    for name in ("faq", "math"):
        assert (configs.job.folder / "elsewhere" / name / "run.json").exists()
        options = ("--output", "out", "--output-config", name, "--state-dir", "elsewhere")
        assert configs.job.sdg("verify", *options).rc == 0


def test_without_output_it_is_named_by_the_file(configs: Configs) -> None:
    assert configs(output=None).rc == 0
    assert (configs.job.folder / "output" / "run" / "faq").is_dir()


def test_a_preview_shows_each_config(configs: Configs) -> None:
    out = configs(preview=1).stdout
    faq, math = out.partition("config math")[::2]
    assert "config faq" in faq
    assert "Ask about: one" in faq
    assert "Count in: one" in math
    assert not (configs.job.folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[configs.faq]\nmodel = "x"\n', ["[configs.faq]", "--model", "above the tables"]),
        ('[configs.faq]\nserver = "vllm"\n', ["[configs.faq]", "--server", "above the tables"]),
        ('[configs.faq]\noutput = "x"\n', ["[configs.faq]", "--output", "above the tables"]),
        ('[configs.faq]\nrank = 0\n', ["[configs.faq]", "--rank", "above the tables"]),
        ('[configs.faq]\npublish-interval = 5\n', ["[configs.faq]", "--publish-interval"]),
        ('[configs.faq]\ntemprature = 0\n', ["[configs.faq]", "--temprature", "--temperature"]),
        ('[configs.faq]\ntemperature = -1\n', ["--temperature", "-1"]),
        ('[configs.failed]\n', ["failed"]),
        (
            '[configs.a]\n[configs.b]\noutput-filename = "${chunk_index}.jsonl"\n',
            ["--output-filename", "[configs.a] is in parquet", "[configs.b] in jsonl", "one format"],
        ),
        ('[configs."a b"]\n', ["a b"]),
        ("configs = 5\n", ["run.toml", "configs"]),
        ('[config.faq]\ntemperature = 0\n', ["run.toml", "[configs.NAME]"]),
        ('[configs.faq]\nplugin = "summarize"\npairs = 3\n', ["--pairs", "qa"]),
        ("[configs]\nfaq = 5\n", ["run.toml", "configs"]),
        ("[configs.faq]\ntemperature = [0.1, 0.9]\n", ["[configs.faq]", "--temperature takes one value"]),
        ("[models.judge]\ntemperature = [0.1, 0.9]\n", ["[models.judge]", "temperature takes one value"]),
    ],
)  # fmt: skip
def test_invalid_options_are_refused_and_the_config_is_named(configs: Configs, text: str, words: list[str]) -> None:
    configs.write(text)
    finished = configs()
    assert finished.rc == 2
    assert finished.says(*words)
    assert not configs.job.server.requests


def test_the_statistics_of_each_config_are_its_own(configs: Configs) -> None:
    assert configs().rc == 0
    for name in ("faq", "math"):
        stats = json.loads((configs.job.folder / "out" / ".sdg" / name / "stats.json").read_text())
        assert stats["requests"] == 2
        assert stats["rows"] == 2


@pytest.mark.parametrize("command", ["verify", "card", "status"])
def test_commands_name_the_available_configs(configs: Configs, command: str) -> None:
    assert configs().rc == 0

    finished = configs.job.sdg(command, "--output", "out")

    assert finished.rc == 1
    assert finished.says("faq, math", "--output-config")
    assert configs.job.sdg(command, "--output", "out", "--output-config", "faq").rc == 0


def test_list_of_names_is_the_same_as_names_with_commas(configs: Configs) -> None:
    configs.job.input([{"text": "a", "secret": 1, "id2": 2, "kept": 3}])
    configs.write('drop-columns = ["secret", "id2"]\nplugin = "prompt"\n[configs.faq]\n')
    assert configs().rc == 0
    assert configs.rows("faq")[0].keys() == {"text", "kept", "id", "rollout_results"}
    assert configs(drop_columns="id2,kept", output="other").rc == 0  # the command line wins
    (path,) = configs.job.folder.glob("other/faq/*")
    assert {*pq.read_schema(path).names} == {"text", "secret", "id", "rollout_results"}


def test_several_inputs_are_refused(configs: Configs) -> None:
    configs.write('input = ["a.jsonl", "b.jsonl"]\n')
    assert configs(input=None).says("input", "several", "glob")
    assert configs(input=["a.jsonl", "b.jsonl"]).says("--input is given twice")
    assert "in quotes" in configs.job.sdg("--input", "a.jsonl", "b.jsonl").message
    for command in ("show", "verify"):
        assert configs.job.sdg(command, "headlines").message.endswith("headlines; did you mean --output headlines?")
