"""Plugins: the hooks through a plugin that uses nearly all of them, and what the registry refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_server import FakeServer, Status
from running import Job, Sdg

import sdg

EVERYTHING = '''
import asyncio, contextlib, json, pathlib
import pyarrow as pa
import sdg

LOG = pathlib.Path("log.txt")

def log(*words):
    with LOG.open("a") as file:
        print(*words, file=file)

@sdg.hookimpl
def add_options(parser):
    parser.add_argument("--shout", default="!", help="what to shout")

@sdg.hookimpl
def register_readers(register):
    register("count", CountReader)

class CountReader:
    """Count."""
    schema = pa.schema([("text", pa.string())])
    identity = {"counts": 1}
    def __init__(self, run):
        self.row, self.rows = 0, int(run.options.input.partition("://")[2])
    def seek(self, row, bookmark):
        self.row = row
    def tell(self):
        return None
    def read(self, rows):
        start, self.row = self.row, min(self.rows, self.row + rows)
        texts = [f"number {i}" for i in range(start, self.row)]
        return [sdg.Block(pa.RecordBatch.from_pydict({"text": texts}), "count", start)] if texts else []
    def total(self):
        return self.rows
    def continues(self, earlier):
        return False

@sdg.hookimpl
def register_rollouts(register):
    register("shout", shout)

async def shout(document, generate, loudness, run):
    """Shout."""
    reply = await generate(document.text)
    return {"text": reply.text, "shouted": document.text.upper() * loudness + run.options.shout}

@sdg.hookimpl
def register_resources(register):
    register("loudness", loudness)

@contextlib.asynccontextmanager
async def loudness(run):
    """How loud."""
    log("resource opened")
    yield 2
    log("resource closed")

@sdg.hookimpl
def register_writers(register):
    register("lines", LinesWriter)

class LinesWriter:
    """Write lines."""
    def __init__(self, run):
        self.run = run
    def write(self, chunk, rows):
        lines = "".join(json.dumps(row) + "\\n" for row in rows.to_pylist())
        self.run.output.write(self.run.path_of(chunk), lambda file: file.write(lines.encode()))
    def read(self, chunk):
        return None

@sdg.hookimpl
def register_servers(register):
    register("mine", mine)

@contextlib.asynccontextmanager
async def mine(run):
    """The test's server."""
    log("server started")
    yield [pathlib.Path("server").read_text()]
    log("server stopped")

@sdg.hookimpl
def register_commands(register):
    register("hello", hello)

def hello(argv):
    """Say hello."""
    print("hello", *argv)
    return 7

@sdg.hookimpl
def observe(run):
    @contextlib.asynccontextmanager
    async def observer():
        log("observed", run.model)
        yield
        log("observed the end")
    return observer()

@sdg.hookimpl
def chunk_written(chunk):
    log("written", chunk.index, chunk.rows)
'''


def test_every_hook_does_what_it_says(job: Job) -> None:
    (job.folder / "everything.py").write_text(EVERYTHING)
    (job.folder / "server").write_text(job.server.url)
    finished = job.sdg(
        "--plugin", "everything.py", "--server", "mine", "--input", "count://5", "--output", "out", "--shout", "?",
        "--output-filename", "${chunk_index}.lines", "--records-per-chunk", 3,
    )  # fmt: skip
    assert finished.rc == 0, finished
    files = sorted((job.folder / "out" / "data").iterdir())
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [file.name for file in files] == ["00000.lines", "00001.lines"]
    assert [row["rollout_results"][0]["shouted"] for row in rows] == [f"NUMBER {i}NUMBER {i}?" for i in range(5)]
    assert [row["id"] for row in rows] == [f"count/{i}" for i in range(5)]
    log = (job.folder / "log.txt").read_text().splitlines()
    order = ["server started", "resource opened", f"observed {job.server.models[0]}"]
    assert log[:3] == order
    assert sorted(log[3:5]) == ["written 0 3", "written 1 2"]
    assert log[5:] == ["resource closed", "server stopped", "observed the end"]


def test_a_plugins_options_are_part_of_the_fingerprint_of_its_rollout(job: Job) -> None:
    (job.folder / "everything.py").write_text(EVERYTHING)
    (job.folder / "server").write_text(job.server.url)
    common = ("--plugin", "everything.py", "--server", "mine", "--input", "count://2", "--output", "out")
    assert job.sdg(*common, "--shout", "?").rc == 0
    changed = job.sdg(*common, "--shout", "!!")
    assert changed.rc == 1
    assert changed.says("shout", "?", "!!", "--fresh")


def test_two_plugins_that_register_one_name_are_an_error(run_sdg: Sdg) -> None:
    for name in ("one", "two"):
        code = (
            "import sdg\n@sdg.hookimpl\ndef register_rollouts(register):\n    register('same', same)\n"
            "async def same(document, generate):\n    return ''\n"
        )
        (run_sdg.folder / f"{name}.py").write_text(code)
    finished = run_sdg("--plugin", "one.py", "--plugin", "two.py")
    assert finished.rc == 1
    assert finished.says("one", "two", "same")


def test_an_option_of_another_plugin_is_refused_not_ignored(job: Job) -> None:
    job.documents("one")
    finished = job.sdg("--input", job.options["input"], "--base-url", job.server.url, "--target-language", "Icelandic")
    assert finished.rc == 2
    assert finished.says("--target-language", "--plugin translate")


def test_options_come_from_a_config_file_and_the_command_line_wins(job: Job) -> None:
    path = job.input([{"text": "one"}])
    (job.folder / "run.toml").write_text(
        f'plugin = "prompt"\ninput = "{path}"\nbase-url = ["{job.server.url}"]\ntemperature = 0.25\n'
        'max-tokens = 50\ngeneration = { stop = ["."] }\nprompt-template = "Say: [[DOCUMENT]]"\nno-progress = true\n'
    )
    assert job.sdg("--config", "run.toml", "--max-tokens", 60).rc == 0
    payload = job.server.requests[-1].payload
    assert payload["temperature"] == 0.25
    assert payload["max_tokens"] == 60
    assert payload["stop"] == ["."]
    assert payload["messages"] == [{"role": "user", "content": "Say: one"}]


def test_an_unknown_key_in_a_config_file_is_named(run_sdg: Sdg) -> None:
    (run_sdg.folder / "run.toml").write_text("max-tokans = 5\n")
    finished = run_sdg("--config", "run.toml")
    assert finished.rc == 2
    assert finished.says("--max-tokans")


def test_every_bundled_plugin_file_is_loaded() -> None:
    root = Path(sdg.__file__).parent / "plugins"
    files = [path for path in root.rglob("*.py") if "\n@sdg.hookimpl\n" in path.read_text()]
    names = {".".join(("sdg_plugins", *path.relative_to(root).with_suffix("").parts)) for path in files}
    loaded, _ = sdg.Plugins.load([])
    assert len(names) > 20
    assert names <= {name for name, _ in loaded.manager.list_name_plugin()}


@pytest.mark.parametrize("command", [["plugins"], ["plugins", "--plugin", "everything.py"]])
def test_plugins_lists_names_with_their_package_and_help(run_sdg: Sdg, command: list[str]) -> None:
    (run_sdg.folder / "everything.py").write_text(EVERYTHING)
    finished = run_sdg(*command)
    assert finished.rc == 0
    assert "summarize" in finished.stdout
    assert "Summarize a document in one paragraph." in finished.stdout
    assert ("Shout." in finished.stdout) == (len(command) > 1)


def test_values_in_a_plugin_that_cannot_be_compared_do_no_harm(job: Job) -> None:
    source = """
        import sdg

        class Array:
            def __eq__(self, other):
                raise ValueError("ambiguous")

        VALUES = Array()

        @sdg.hookimpl
        def register_rollouts(register):
            register("own", own)

        async def own(document, generate):
            return document.text
    """
    job.documents("a")

    assert job.succeed(plugin=job.plugin("own", source)).texts() == {"a": ["a"]}


def test_a_plugin_without_a_rollout_is_loaded_beside_the_one_that_runs(job: Job) -> None:
    source = "import sdg\n@sdg.hookimpl\ndef chunk_written(run, chunk):\n    print('written', chunk.index)\n"
    (job.folder / "watch.py").write_text(source)
    job.documents("one")

    finished = job(plugin=[job.options["plugin"], "watch.py"])
    listed = job.sdg("plugins", "--plugin", "watch.py")

    assert finished.rc == 0, finished
    assert "written 0" in finished.stdout
    assert job.output.ids() == ["one"]
    assert listed.rc == 0


def test_a_plugin_that_registers_nothing_is_refused(job: Job) -> None:
    (job.folder / "empty.py").write_text("def register_rollouts(register):\n    pass\n")
    job.documents("one")

    assert job(plugin="empty.py").says("empty.py registers nothing", "@sdg.hookimpl")


def test_the_name_of_an_existing_file_is_suggested(job: Job) -> None:
    (job.folder / "headline.py").write_text("")
    job.documents("one")

    assert job(plugin="headline").says("headline", "./headline.py")


def test_an_observer_that_fails_does_not_hide_why_the_run_ended(job: Job, server: FakeServer) -> None:
    job.plugin(
        "observer",
        """
        import contextlib
        import sdg

        @sdg.hookimpl
        @contextlib.asynccontextmanager
        async def observe(run):
            try:
                yield
            finally:
                raise ValueError("no room on the board")
        """,
    )
    job.documents(*map(str, range(200)))
    server.behave(lambda payload, n: Status(400))

    finished = job(plugin=["observer.py", job.options["plugin"]], max_failure_rate=0.1)

    assert finished.rc == 3
    assert "no room on the board" in finished.stderr


WRAPPING = """
    import dataclasses
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("plain", plain)

    async def plain(document, generate):
        return await generate(document.text)

    @sdg.hookimpl
    def wrap_requests(run, send):
        async def link(request):
            text = request.payload["messages"][0]["content"]
            if text == "refused":
                raise sdg.RequestFailed("policy", "the link refuses this", retry=False)
            if text == "broken":
                raise ValueError("the link is broken")
            response = await send(request.with_payload({**request.payload, "user": f"model {run.model}"}))
            run.counts["linked"] += 1
            return response._replace(reply=dataclasses.replace(response.reply, text=response.reply.text.upper()))

        return link
"""


def test_a_link_sees_changes_and_refuses_requests(job: Job, server: FakeServer) -> None:
    job.documents("one", "refused", "broken", "two")
    server.behave(lambda payload, n: f"about {payload['messages'][0]['content']}")

    output = job.succeed(plugin=job.plugin("wrapping", WRAPPING), max_failure_rate=1)

    assert output.texts() == {"one": ["ABOUT ONE"], "two": ["ABOUT TWO"]}
    assert {request.payload["user"] for request in server.requests} == {f"model {server.models[0]}"}
    failures = {record["id"]: (record["error_type"], record["error"]) for record in output.failures()}
    assert failures["refused"] == ("RequestFailed", "the link refuses this")
    assert failures["broken"][0] == "ValueError"
    assert "wrapping.py" in failures["broken"][1]


def test_a_hook_that_returns_no_link_is_named(job: Job, server: FakeServer) -> None:
    job.documents("one")
    code = WRAPPING.replace("        return link\n", "")

    finished = job(plugin=job.plugin("wrapping", code))

    assert finished.rc == 1
    assert finished.says("wrapping", "wrap_requests returned None, not a function")
    assert not server.requests
