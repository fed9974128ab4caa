"""Resources: those of plugins, and the bundled process_pool, temp_dir, rng and openai."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, FakeServer, Hang, Status, prompt_of
from replaying import answers_in, check_replay, own
from running import ROOT, Job, documents, wait_until

from sdg_plugins.common.workers import WorkerFuture

# ── Of plugins ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_resource_of_a_plugin_is_entered_once_and_left_after_the_last_document(job: Job) -> None:
    own(
        job,
        """
        import contextlib

        @sdg.hookimpl
        def register_resources(register):
            register("counter", counter)

        @contextlib.asynccontextmanager
        async def counter(run):
            counts = {"documents": 0}
            with open("entered", "a") as file:
                file.write(run.options.prompt_column + str(len(run.schema)))
            yield counts
            with open("left", "a") as file:
                file.write(str(counts["documents"]))

        async def own(document, generate, counter, missing=None):
            counter["documents"] += 1
            return str(missing)
        """,
    )
    job.input(documents(7))

    output = job.succeed(records_per_chunk=3)

    assert (job.folder / "entered").read_text() == "text2"
    assert (job.folder / "left").read_text() == "7"
    assert {text for texts in output.texts().values() for text in texts} == {"None"}


def test_a_resource_may_give_each_rollout_a_value_of_its_own(job: Job) -> None:
    own(
        job,
        """
        import contextlib

        @sdg.hookimpl
        def register_resources(register):
            register("name", name)

        @contextlib.asynccontextmanager
        async def name(run):
            def make(document, generate):
                if document.text == "b":
                    raise ValueError("b has no name")
                return f"{document.id}{generate.index}"
            yield sdg.PerRollout(make)

        async def own(document, generate, name):
            return name
        """,
    )
    job.documents("a", "b")

    output = job.succeed(rollouts_per_document=2)

    assert output.texts() == {"a": ["a0", "a1"]}
    assert "b has no name" in output.failed()["b"]["error"]


# ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

PROCESSES = """
    import os, time

    def note(name):
        with open(f"{name}.{os.getpid()}", "w"):
            return os.getpid()

    def work(text):
        if "dies" in text:
            os._exit(9)
        note("worker")
        while "long" in text:
            time.sleep(0.05)
        return text.upper()

    async def own(document, generate, process_pool):
        note("run")
        return await asyncio.get_running_loop().run_in_executor(process_pool, work, document.text)
"""


def pids(job: Job, name: str) -> set[int]:
    return {int(path.suffix[1:]) for path in job.folder.glob(f"{name}.*") if path.suffix != ".py"}


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_functions_of_a_plugin_file_run_in_other_processes_that_end_with_the_run(job: Job) -> None:
    own(job, PROCESSES)
    job.input(documents(20))

    output = job.succeed()

    assert output.texts() == {row["id"]: [row["text"].upper()] for row in documents(20)}
    workers = pids(job, "worker")
    assert workers
    assert not workers & pids(job, "run")
    assert not [pid for pid in workers if alive(pid)]


def test_no_process_outlives_a_killed_run(job: Job) -> None:
    own(job, PROCESSES)
    job.documents("long 1", "long 2")
    running = job.start()
    wait_until(lambda: pids(job, "worker"))

    running.process.kill()
    running.finish()

    wait_until(lambda: not [pid for pid in pids(job, "worker") if alive(pid)])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_fails_no_document(signum: signal.Signals, job: Job) -> None:
    own(job, PROCESSES)
    job.documents("long 1", "long 2")
    running = job.start()
    wait_until(lambda: pids(job, "worker"))

    for pid in pids(job, "worker"):  # as schedulers and terminals do
        os.kill(pid, signum)
    running.send(signum)
    finished = running.finish()

    assert finished.rc in {130, 143}
    assert finished.says("interrupted", "run the same command")
    assert not job.output.failures()
    wait_until(lambda: not [pid for pid in pids(job, "worker") if alive(pid)])


def test_a_process_that_dies_ends_the_run_with_the_way_out(job: Job, server: FakeServer) -> None:
    own(job, PROCESSES)
    job.documents("dies", *[f"fine {number}" for number in range(200)])

    finished = job(max_concurrent_documents=1)

    assert finished.rc == 1
    assert finished.says("process_pool", "run again")
    assert (job.output.rows(), job.output.failures()) == ([], [])


FRAIL = """
    import os, time

    def work(text):
        while not os.path.exists("go"):
            time.sleep(0.05)
        if not os.path.exists("fixed"):
            os._exit(9)
        return text.upper()

    async def own(document, generate, process_pool):
        reply = await generate(document.text)
        return await asyncio.get_running_loop().run_in_executor(process_pool, work, f"{document.text} {reply}")
"""


def test_a_process_that_dies_fails_no_document_and_no_request_is_sent_again(job: Job, server: FakeServer) -> None:
    own(job, FRAIL)
    job.input(documents(10))
    running = job.start()
    wait_until(lambda: len(server.answered) == 10 and answers_in(job.output.state) == 10)

    (job.folder / "go").touch()
    finished = running.finish()

    assert finished.rc == 1
    assert finished.says("process_pool", "run again")
    assert (job.output.rows(), job.output.failures()) == ([], [])
    (job.folder / "fixed").touch()
    assert len(job.succeed().rows()) == 10
    assert len(server.requests) == 10


def test_the_future_of_a_worker_can_be_canceled_from_both_ends() -> None:
    inner: Future[Any] = Future()
    work = WorkerFuture(inner)
    assert work.cancel()
    assert inner.cancelled()
    assert wait([work], timeout=30).done == {work}

    inner = Future()
    work = WorkerFuture(inner)
    inner.cancel()
    assert work.cancelled()
    assert wait([work], timeout=30).done == {work}

    inner = Future()
    work = WorkerFuture(inner)
    inner.set_running_or_notify_cancel()
    assert work.running()
    assert not work.cancel()
    inner.set_result(5)
    assert work.result(timeout=30) == 5


# ── temp_dir and rng ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_temporary_folder_is_gone_when_the_run_has_ended(job: Job) -> None:
    own(
        job,
        """
        async def own(document, generate, temp_dir):
            (temp_dir / document.id).write_text("x")
            return f"{temp_dir} {len(list(temp_dir.iterdir())) > 0}"
        """,
    )
    job.documents("a", "b")

    texts = job.succeed().texts()

    folder, there = texts["a"][0].split()
    assert texts["b"] == texts["a"]
    assert there == "True"
    assert not Path(folder).exists()


RANDOM = """
    async def own(document, generate, rng):
        reply = await generate(f"{rng.random()}")
        return f"{rng.random()} {rng.choice(range(10**9))}"
"""


def test_random_numbers_are_reproducible_and_differ_by_document_rollout_and_seed(job: Job, server: FakeServer) -> None:
    own(job, RANDOM)
    job.documents("a", "b")

    first = job.succeed(rollouts_per_document=2).texts()
    again = job.succeed(rollouts_per_document=2, output="again").texts()
    other = job.succeed(rollouts_per_document=2, output="other", seed=1).texts()

    assert again == first
    drawn = [text for texts in [*first.values(), *other.values()] for text in texts]
    assert len(set(drawn)) == len(drawn) >= 8


def test_random_numbers_are_replayed(job: Job, server: FakeServer) -> None:
    own(job, RANDOM)
    job.documents("a", "b")

    assert check_replay(job, server, "sdg_plugin_files.own", "own", seed=3) == 2


# ── An OpenAI client ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_openai_client_sends_through_the_engine(job: Job, server: FakeServer) -> None:
    own(
        job,
        """
        async def own(document, generate, openai):
            chat = [{"role": "user", "content": document.text}]
            answer = await openai.chat.completions.create(model="", messages=chat, n=2, temperature=0.5)
            assert answer.model == "test-model" and answer.usage.total_tokens
            other = await openai.completions.create(model="test-model", prompt=document.text)
            return " ".join([*[choice.message.content for choice in answer.choices], other.choices[0].text])
        """,
    )
    server.behave(lambda payload, n: prompt_of(payload).upper())
    job.documents("a", "b")

    output = job.succeed(seed=3, max_concurrent_generations=1)

    assert output.texts() == {"a": ["A A #1 A"], "b": ["B B #1 B"]}
    assert output.rows()[0]["rollout_results"][0]["usage"]["completion_tokens"] > 0
    assert output.stats()["requests"] == len(server.requests) == 4
    assert server.max_in_flight == 1
    chat = next(request for request in server.requests if request.path.endswith("/chat/completions"))
    assert {"model": "test-model", "n": 2, "temperature": 0.5, "seed": 3}.items() <= chat.payload.items()


TOOLS = [{"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "sdg"}'}}]


def test_tools_and_parsed_formats_come_back_as_openais_types(job: Job, server: FakeServer) -> None:
    own(
        job,
        """
        import pydantic

        class Score(pydantic.BaseModel):
            score: int

        def look_up(word: str) -> str: ...

        async def own(document, generate, openai):
            chat = [{"role": "user", "content": document.text}]
            tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
            answer = await openai.chat.completions.create(model="", messages=chat, tools=[tool])
            call = answer.choices[0].message.tool_calls[0].function
            parsed = await openai.chat.completions.parse(model="", messages=chat, response_format=Score)
            return f"{call.name} {call.arguments} {parsed.choices[0].message.parsed.score + 1}"
        """,
    )
    server.behave(
        lambda payload, n: (
            Answer(None, tool_calls=TOOLS, finish_reason="tool_calls") if "tools" in payload else '{"score": 4}'
        )
    )
    job.documents("a")

    assert job.succeed().texts() == {"a": ['look_up {"word": "sdg"} 5']}
    assert server.requests[1].payload["response_format"]["json_schema"]["strict"] is True


ERRORS = """
    async def own(document, generate, openai):
        chat = [{"role": "user", "content": document.text}]
        kind, _, retries = document.text.partition(" ")
        client = openai.with_options(max_retries=int(retries)) if retries else openai
        if kind == "stream":
            return await client.chat.completions.create(model="", messages=chat, stream=True)
        if kind == "embed":
            return await client.embeddings.create(model="", input="x")
        return await client.chat.completions.create(model="", messages=chat)
"""


def test_errors_are_openais_and_only_the_engine_retries(job: Job, server: FakeServer) -> None:
    own(job, ERRORS)
    faults = {"400": Status(400, message="bad, bad"), "403": Status(403), "422": Status(422), "429": Status(429)}
    faults |= {"500": Status(500), "slow": Hang(), "empty": Answer("")}
    server.behave(lambda payload, n: faults[prompt_of(payload).partition(" ")[0]])
    job.documents("400", "403", "422", "429 3", "500", "500 5", "slow", "empty", "stream", "embed")

    failed = job.succeed(max_retries=1, request_timeout=2).failed()

    assert {name: record["error_type"] for name, record in failed.items()} == {
        "400": "BadRequestError",
        "403": "PermissionDeniedError",
        "422": "UnprocessableEntityError",
        "429 3": "RateLimitError",
        "500": "InternalServerError",
        "500 5": "InternalServerError",
        "slow": "APITimeoutError",
        "empty": "InternalServerError",
        "stream": "BadRequestError",
        "embed": "NotFoundError",
    }
    assert "bad, bad" in failed["400"]["error"]
    assert "stream=True" in failed["stream"]["error"]
    assert "/v1/embeddings" in failed["embed"]["error"]
    sent = {name: server.prompts.count(name) for name in failed}
    assert sent.pop("429 3") > 1
    once, twice, never = ("400", "403", "422"), ("500", "500 5", "slow", "empty"), ("stream", "embed")
    assert sent == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2) | dict.fromkeys(never, 0)


def test_a_document_that_does_not_fit_has_openais_error_code(job: Job, server: FakeServer) -> None:
    own(
        job,
        """
        async def own(document, generate, openai):
            import openai as sdk

            try:
                await openai.chat.completions.create(
                    model="", messages=[{"role": "user", "content": document.text}], max_tokens=16
                )
            except sdk.BadRequestError as exc:
                return f"{exc.status_code} {exc.code}"
        """,
    )
    server.count, server.max_model_len = lambda payload: len(prompt_of(payload).split()), 100
    job.input([{"id": "long", "text": "some words " * 400}])

    assert job.succeed(long_documents="fail").texts() == {"long": ["400 context_length_exceeded"]}


INSTRUCTOR = """
    import instructor, pydantic

    class Person(pydantic.BaseModel):
        name: str
        age: int = pydantic.Field(ge=0)

    async def own(document, generate, openai) -> Person:
        client = instructor.from_openai(openai, mode=instructor.Mode[document.id])
        chat = [{"role": "user", "content": document.text}]
        return await client.chat.completions.create(model="", messages=chat, response_model=Person, max_retries=2)
"""


def test_instructor_gets_its_models_and_asks_again_through_the_engine(job: Job, server: FakeServer) -> None:
    modes: Counter[bool] = Counter()

    def answer(payload: dict[str, Any], n: int) -> Answer:
        modes["tools" in payload] += 1
        corrected = "greater than or equal to 0" in json.dumps(payload["messages"])  # pydantic's words
        person = json.dumps({"name": "Ada", "age": 36 if corrected else -1})
        if "tools" not in payload:
            return Answer(person)
        function = {"name": payload["tools"][0]["function"]["name"], "arguments": person}
        return Answer(None, tool_calls=[{"id": "1", "type": "function", "function": function}], finish_reason="stop")

    server.behave(answer)
    own(job, INSTRUCTOR)
    job.input([{"id": mode, "text": "Ada, 36"} for mode in ("TOOLS", "JSON")])

    count = check_replay(job, server, "sdg_plugin_files.own", "own")

    assert count == 4
    results = [row["rollout_results"][0] for row in job.output.rows()]
    assert [(result["name"], result["age"]) for result in results] == [("Ada", 36)] * 2
    assert modes == {True: 4, False: 4}  # in two runs


def test_without_the_package_the_message_says_how_to_get_it(job: Job, server: FakeServer) -> None:
    own(job, "async def own(document, generate, openai): ...\n")
    package = job.folder / "without" / "openai"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('No module named openai')")
    job.documents("a")

    finished = job(env={"PYTHONPATH": str(package.parent)})

    assert finished.rc == 1
    assert finished.says("openai", "pip install 'sdg-engine[openai]'")


HEAVY = ("openai", "httpx", "pydantic", "jsonschema", "concurrent.futures.process", "pyarrow", "aiohttp")


def test_help_imports_nothing_heavy() -> None:
    code = f"import contextlib, sys, sdg\nwith contextlib.suppress(SystemExit): sdg.main(['--help'])\n" \
           f"print([name for name in {HEAVY} if name in sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_without_the_client_does_not_import_it(job: Job) -> None:
    own(
        job,
        f"""
        import sys

        async def own(document, generate):
            await generate(document.text)
            return str([name for name in {HEAVY[:5]} if name in sys.modules])
        """,
    )
    job.documents("a")
    job.env["SDG_TEST_START"] = "interpreter"  # forks may find more imported

    assert job.succeed().texts() == {"a": ["[]"]}
