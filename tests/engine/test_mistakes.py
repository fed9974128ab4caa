"""Mistakes in plugins are reported in one line, in the plugin's terms, with its file and line."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
import types

import pytest
from fake_server import FakeServer
from running import Job, documents, rollout

import sdg

# The message must name the line that ends with `# !`.
MISTAKES = {
    "import": ("import sdg\nimport no_such_module  # !\n", ["no_such_module", "cannot be imported"]),
    "import_of_a_name": ("import sdg\nfrom sdg import no_such_name  # !\n", ["no_such_name"]),
    "import_elsewhere": (
        "import sdg\nimport json\nSETTINGS = json.loads('{')  # !\n",
        ["JSONDecodeError"],
    ),
    "syntax": ("import sdg\n\ndef broken(:  # !\n    pass\n", ["SyntaxError"]),
    "indentation": ("import sdg\ndef broken():\npass  # !\n", ["IndentationError"]),
    "exit": ("import sys\nsys.exit('no')  # !\n", ["SystemExit"]),
    "hook_name": (
        """
        import sdg

        @sdg.hookimpl  # !
        def register_rollout(register):
            register("mine", mine)
        """,
        ["register_rollout", "is not a hook", "did you mean register_rollouts"],
    ),
    "hook_name_far_off": (
        """
        import sdg

        @sdg.hookimpl  # !
        def begin(run):
            pass
        """,
        ["begin", "is not a hook", "observe", "chunk_written"],
    ),
    "hook_arguments": (
        """
        import sdg

        @sdg.hookimpl  # !
        def chunk_written(run, piece):
            pass
        """,
        ["chunk_written", "has unknown parameter piece", "run, chunk"],
    ),
    "hook_raises": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", helper())

        def helper():
            return {}["nothing"]  # !
        """,
        ["register_rollouts failed", "KeyError"],
    ),
    "add_options_raises": (
        """
        import sdg

        @sdg.hookimpl
        def add_options(parser):
            parser.add_argument("--mine", typ=int)  # !
        """,
        ["add_options failed", "typ"],
    ),
    "option_is_taken": (
        """
        import sdg

        @sdg.hookimpl
        def add_options(parser):
            parser.add_argument("--model")
        """,
        ["option_is_taken", "--model", "rename"],
    ),
    "register_without_a_factory": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine")  # !
        """,
        ["register_rollouts failed", "factory"],
    ),
    "not_a_function": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", "mine")
        """,
        ["not_a_function", "rollout 'mine'", "str", "async function"],
    ),
    "not_async": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", mine)

        def mine(document, generate):  # !
            return generate(document.text)
        """,
        ["rollout 'mine'", "not async", "async def"],
    ),
    "async_generator": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", mine)

        async def mine(document, generate):  # !
            yield await generate(document.text)
        """,
        ["rollout 'mine'", "uses `yield`", "list"],
    ),
    "too_few_parameters": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", mine)

        async def mine(document):  # !
            return document.text
        """,
        ["rollout 'mine'", "(document)", "(document, generate"],
    ),
    "parameters_swapped": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", mine)

        async def mine(generate, document):  # !
            return document.text
        """,
        ["rollout 'mine'", "(generate, document)", "(document, generate"],
    ),
    "unknown_resource": (
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("mine", mine)

        @sdg.hookimpl
        def register_resources(register):
            register("calendar", mine)

        async def mine(document, generate, calender):  # !
            return document.text
        """,
        ["rollout 'mine'", "calender", "did you mean calendar"],
    ),
}


def line_of(source: str) -> int:
    """The number of the marked line; 0 if there is none."""
    (number,) = [i for i, line in enumerate(source.splitlines(), 1) if line.endswith("# !")] or [0]
    return number


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_before_anything_runs_with_file_and_line(name: str, job: Job) -> None:
    source, words = MISTAKES[name]
    job.documents("one")
    plugin = job.plugin(name, source)

    finished = job(plugin=plugin if "register_rollouts" in source else [plugin, job.options["plugin"]])

    assert finished.rc == 1
    assert finished.says(*words)
    if line := line_of(plugin.read_text()):
        assert f"{name}.py:{line})" in finished.message
    assert not job.server.requests
    assert not (job.folder / "output").exists()


RESULTS = {
    "an_object": ("return object()", "object", "a str, dict, Reply, list or None"),
    "a_list_with_an_object": ("return ['fine', object()]", "object", "a str, dict, Reply, list or None"),
    "no_await": ("return generate(document.text)", "coroutine", "is await missing?"),
    "a_generator": ("return (word for word in document.text)", "generator", "is list(…) missing?"),
    "keys_that_are_not_names": ("return {5: 'five'}", "dict", "are not str"),
    "not_json": ("return {'what': {1, 2}}", "set", "not JSON"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_of_a_wrong_kind_names_the_rollouts_definition(name: str, job: Job) -> None:
    statement, kind, hint = RESULTS[name]
    plugin = job.plugin(
        "wrong",
        f"""
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("wrong", wrong)

        async def wrong(document, generate):
            {statement}
        """,
    )
    job.documents("one")

    output = job.succeed(plugin=plugin)

    (failed,) = output.failures()
    assert failed["error_type"] == "TypeError"
    assert f"wrong.py:{line_containing(plugin.read_text(), 'async def wrong')})" in failed["error"]
    assert kind in failed["error"]
    assert hint in failed["error"]


def line_containing(source: str, text: str) -> int:
    """The number of the first line that contains a text."""
    return next(i for i, line in enumerate(source.splitlines(), 1) if text in line)


PARTS = """
import contextlib
import pyarrow as pa
import sdg

@sdg.hookimpl
def register_readers(register):
    register("few", FewReader)

class FewReader:
    schema = pa.schema([("text", pa.string())])
    identity = {"few": 1}

    def __init__(self, run):
        self.left = 2

    def seek(self, row, bookmark):
        self.left = 2 - row

    def tell(self):
        return None

    def read(self, rows):
        some, self.left = min(rows, self.left), self.left - min(rows, self.left)
        return [sdg.Block(pa.RecordBatch.from_pydict({"text": ["a"] * some}), "few", 0)] if some else []

    def total(self):
        return 2

    def continues(self, earlier):
        return False

@sdg.hookimpl
def register_writers(register):
    register("lines", LinesWriter)

class LinesWriter:
    def __init__(self, run):
        self.run = run

    def write(self, chunk, rows):
        self.run.output.write(self.run.path_of(chunk), lambda file: file.write(b"lines"))

    def read(self, chunk):
        return None

@sdg.hookimpl
def register_servers(register):
    register("here", here)

@contextlib.asynccontextmanager
async def here(run):
    yield ["SERVER"]

@sdg.hookimpl
def register_rollouts(register):
    register("mine", mine)

async def mine(document, generate, thing):
    return await generate(document.text + thing)

@sdg.hookimpl
def register_resources(register):
    register("thing", thing)

@contextlib.asynccontextmanager
async def thing(run):
    yield "!"

@sdg.hookimpl
def observe(run):
    return contextlib.nullcontext()
"""

# What is replaced in PARTS and by what, words of the message, and a part of the line that it must name.
SHAPES = {
    "fine": ("", "", [], ""),
    "reader_without_schema": (
        '    schema = pa.schema([("text", pa.string())])\n', "",
        ["reader 'few'", "has no `schema`", "sdg.Reader", "every batch"], "class FewReader",
    ),
    "reader_without_read": (
        "def read(self", "def reed(self", ["reader 'few'", "has no `read(rows)`"], "class FewReader",
    ),
    "reader_with_other_arguments": (
        "def seek(self, row, bookmark)", "def seek(self, row)",
        ["reader 'few'", "`seek`", "seek(row, bookmark)"], "class FewReader",
    ),
    "schema_of_another_kind": (
        'schema = pa.schema([("text", pa.string())])', "schema = ['text']",
        ["reader 'few'", "`schema`", "list", "pyarrow.Schema"], "class FewReader",
    ),
    "identity_that_is_not_json": (
        '{"few": 1}', '{"few": {1}}', ["reader 'few'", "`identity`", "JSON"], "class FewReader",
    ),
    "reader_that_returns_dicts": (
        'sdg.Block(pa.RecordBatch.from_pydict({"text": ["a"] * some}), "few", 0)', '{"text": "a"}',
        ["read() returned", "dict", "sdg.Block"], "class FewReader",
    ),
    "reader_with_other_columns": (
        '{"text": ["a"] * some}', '{"texts": ["a"] * some}', ["read() returned", "texts: string", "`schema`"],
        "class FewReader",
    ),
    "reader_that_returns_too_much": (
        "[\"a\"] * some", "[\"a\"] * 5", ["read() returned batches of [5] rows when asked for 1"], "class FewReader",
    ),
    "reader_that_raises": (
        "self.left = 2\n\n", "self.left = {}['nothing']\n\n", ["reader", "few://", "KeyError"], "{}['nothing']",
    ),
    "reader_that_raises_later": (
        "return None\n\n    def read(", "return {}['nothing']\n\n    def read(", ["reader", "few://", "KeyError"],
        "{}['nothing']",
    ),
    "writer_without_read": (
        "    def read(self, chunk):\n        return None\n", "", ["writer 'lines'", "has no `read(chunk)`"],
        "class LinesWriter",
    ),
    "writer_that_raises": (
        'file.write(b"lines")', 'file.write({}["nothing"])', ["the writer of", "KeyError"], '{}["nothing"]',
    ),
    "server_without_decorator": (
        "@contextlib.asynccontextmanager\nasync def here", "async def here",
        ["server 'here'", "async_generator", "@contextlib.asynccontextmanager"], "async def here",
    ),
    "server_that_yields_text": (
        'yield ["SERVER"]', 'yield "SERVER"', ["server 'here'", "yielded a str", "list"],
        "asynccontextmanager\nasync def here",
    ),
    "server_that_yields_other_things": (
        'yield ["SERVER"]', "yield [5]", ["server 'here'", "int", "URLs"], "asynccontextmanager\nasync def here",
    ),
    "server_that_raises": (
        'yield ["SERVER"]', "yield [{}['nothing']]", ["server 'here'", "KeyError"], "{}['nothing']",
    ),
    "resource_without_decorator": (
        "@contextlib.asynccontextmanager\nasync def thing", "async def thing",
        ["resource 'thing'", "async_generator", "@contextlib.asynccontextmanager"], "async def thing",
    ),
    "resource_that_raises": (
        'yield "!"', "yield {}['nothing']", ["resource 'thing'", "KeyError"], "{}['nothing']",
    ),
    "observer_that_raises": (
        "return contextlib.nullcontext()", "return {}['nothing']", ["observe", "KeyError"], "{}['nothing']",
    ),
    "observer_of_another_kind": ("return contextlib.nullcontext()", "return 5", ["observe", "int"], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_an_object_of_a_wrong_shape_is_reported_with_what_it_lacks(name: str, job: Job) -> None:
    old, new, words, place = SHAPES[name]
    assert old in PARTS
    source = PARTS.replace(old, new, 1).replace("SERVER", job.server.url)
    plugin = job.plugin("parts", textwrap.dedent(source))

    finished = job(
        plugin=plugin, base_url=None, server="here", input="few://", output_filename="${chunk_index}.lines",
        records_per_chunk=1,
    )  # fmt: skip

    if name == "fine":
        assert finished.rc == 0, finished
        return
    assert finished.rc == 1
    assert finished.says(*words)
    if place:
        text = plugin.read_text()
        line = text[: text.index(place)].count("\n") + 1
        assert f"parts.py:{line})" in finished.message, (line, finished.message)


def test_an_installed_packages_command_that_raises_is_reported_with_file_and_line(job: Job) -> None:
    site = job.folder / "site"
    (site / "broken_commands-1.0.dist-info").mkdir(parents=True)
    (site / "broken_commands-1.0.dist-info" / "METADATA").write_text("Name: broken-commands\nVersion: 1.0\n")
    (site / "broken_commands-1.0.dist-info" / "entry_points.txt").write_text("[sdg]\nbroken = broken_commands\n")
    (site / "broken_commands.py").write_text(
        "import sdg\n@sdg.hookimpl\ndef register_commands(register):\n    register('break', main)\n"
        "def main(argv):\n    return {}[argv[0]]\n"
    )
    finished = job.sdg("break", "it", PYTHONPATH=str(site))
    assert finished.rc == 1
    assert finished.says("the command break of broken-commands", "KeyError", "broken_commands.py:6)")

    (site / "broken_commands.py").write_text("import no_such_module\n")
    finished = job.sdg("plugins", PYTHONPATH=str(site))
    assert finished.rc == 1
    assert finished.says("the installed package broken-commands", "no_such_module", "broken_commands.py:1)")


def test_a_traceback_is_shown_on_request(job: Job) -> None:
    job.documents("one")
    source, _ = MISTAKES["hook_raises"]
    finished = job(plugin=job.plugin("wrong", source), env={"SDG_TRACEBACK": "1"}, bugs=True)
    assert finished.rc == 1
    assert "Traceback" in finished.stderr
    assert 'in helper\n    return {}["nothing"]' in finished.stderr


def test_two_files_with_the_same_name_are_two_plugins(job: Job) -> None:
    for folder, name in (("a", "first"), ("b", "second")):
        (job.folder / folder).mkdir()
        job.plugin(
            f"{folder}/same",
            f"""
            import sdg

            @sdg.hookimpl
            def register_rollouts(register):
                register("{name}", {name})

            async def {name}(document, generate):
                return "{name}"
            """,
        )
    job.documents("one")
    assert job.succeed(plugin=["a/same.py", "b/same.py"]).texts() == {"one": ["second"]}


def test_a_task_that_a_rollout_cancels_itself_fails_only_its_document(job: Job) -> None:
    job.input(documents(20))
    body = (
        "if document.id in ('d0003', 'd0017'):\n    task = asyncio.ensure_future(asyncio.sleep(9))\n"
        "    task.cancel()\n    await task\nreturn await generate(document.text)"
    )
    output = job.succeed(plugin=job.plugin("mine", rollout(body)), records_per_chunk=5)
    assert len(output.rows()) == 18
    assert {record["error_type"] for record in output.failures()} == {"CancelledError"}
    assert job.verify().rc == 0


def test_a_rollout_that_cancels_the_tasks_of_the_run_is_named(job: Job, server: FakeServer) -> None:
    job.input(documents(4))
    body = "for task in asyncio.all_tasks():\n    task.cancel()\nreturn await generate(document.text)"
    finished = job(plugin=job.plugin("mine", rollout(body)))

    assert finished.rc == 1
    assert finished.says("'mine'", "mine.py", "must cancel only its own tasks")


def test_a_resource_that_fails_is_named(job: Job) -> None:
    code = rollout("return ''").replace("(document, generate)", "(document, generate, broken)") + (
        "\n@sdg.hookimpl\ndef register_resources(register):\n    register('broken', broken)\n\n"
        "def broken(run):\n    '''Broken.'''\n    raise ValueError('no such thing')\n"
    )
    job.documents("one")
    finished = job(plugin=job.plugin("mine", code))
    assert finished.rc == 1
    assert finished.says("broken", "no such thing", "mine.py")


BREAKING = """
    import contextlib
    import sdg

    @sdg.hookimpl
    def register_readers(register):
        register("stop", lambda run: next(iter(())))

    @sdg.hookimpl
    def register_resources(register):
        register("leaving", leaving)

    @sdg.hookimpl
    def register_rollouts(register):
        register("breaking", breaking)
        register("with_resource", with_resource)

    @contextlib.asynccontextmanager
    async def leaving(run):
        raise SystemExit(0)
        yield

    class Speechless(Exception):
        def __str__(self):
            raise ValueError("no words")

    async def breaking(document, generate):
        if document.text == "document 1":
            raise Speechless
        return await generate(document.text)

    async def with_resource(document, generate, leaving):
        return "never"

    @sdg.hookimpl
    def chunk_written(run, chunk):
        raise SystemExit("bye")
"""


def test_exits_in_plugins_are_reported_and_end_no_more_than_they_must(job: Job) -> None:
    file = job.plugin("breaking", BREAKING)
    job.input(documents(5))

    output = job.succeed(plugin=f"{file}:breaking")
    leaving = job(plugin=f"{file}:with_resource", output="leaving")
    reader = job(plugin=f"{file}:breaking", input="stop://x", output="stop")

    assert len(output.rows()) == 4
    assert [record["error_type"] for record in output.failures()] == ["Speechless"]
    assert leaving.rc == 1
    assert "SystemExit" in leaving.message
    assert reader.rc == 1
    assert "StopIteration" in reader.message


def test_say_works_while_tqdm_is_being_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))  # as a signal during its import finds it
    sdg.say("interrupted")
    assert capsys.readouterr().err == "sdg: interrupted\n"


def test_a_plugin_that_blocks_cannot_delay_the_end_of_the_run(job: Job, server: FakeServer) -> None:
    job.documents("one", "two")
    body = "await asyncio.to_thread(__import__('time').sleep, 60)\nreturn 'x'"
    started = job.start(plugin=job.plugin("mine", rollout(body)))
    while not (job.output.state / "00000.sqlite3").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    started.send(signal.SIGTERM)
    assert started.finish().rc == 143
    assert time.monotonic() - began < 20
