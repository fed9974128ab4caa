"""Rollouts: steps, branches, samples and replays, and the bundled rollouts with their prompts."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Hang, Status, prompt_of, usual_text
from hypothesis import given, strategies as st
from replaying import check_replay, own
from running import ROOT, Job, Output, Started, wait_until

import sdg
from sdg_plugins.common import templates
from sdg_plugins.common.results import annotated_fields
from sdg_plugins.servers import demo

LOADED, _ = sdg.Plugins.load([])
BUNDLED = sorted(LOADED.rollouts)


def as_asked(payload: dict[str, Any], n: int) -> str | None:
    """An answer of the requested shape, if one is requested."""
    wanted = payload.get("response_format")
    return json.dumps(demo.by_schema(wanted["json_schema"]["schema"], prompt_of(payload))) if wanted else None


# ── Steps, branches, samples ─────────────────────────────────────────────────────────────────────────────────────────


def test_steps_and_branches_of_a_rollout_come_together(job: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: f"<{prompt_of(payload)}>")
    own(
        job,
        """
        async def own(document, generate):
            draft = await generate(document.text)
            async with asyncio.TaskGroup() as group:
                views = [group.create_task(generate(f"{draft} by {who}")) for who in ("a", "b")]
            more = await asyncio.gather(*[generate(f"{draft} in {where}") for where in ("c", "d")])
            return " ".join(map(str, [*[view.result() for view in views], *more]))
        """,
    )
    job.documents("x", "y")

    output = job.succeed()

    assert output.texts() == {
        name: [f"<<{name}> by a> <<{name}> by b> <<{name}> in c> <<{name}> in d>"] for name in "xy"
    }
    assert [row["rollout_results"][0]["usage"]["completion_tokens"] for row in output.rows()] == [13, 13]
    assert len(server.requests) == 10


@pytest.mark.parametrize(
    "fan_out",
    [
        "await asyncio.gather(*[ask(prompt) for prompt in prompts])",
        "[task.result() for task in await in_group([ask(prompt) for prompt in prompts])]",
    ],
    ids=["gather", "TaskGroup"],
)
def test_a_failed_branch_fails_its_document_and_takes_its_siblings_along(
    fan_out: str, job: Job, server: FakeServer
) -> None:
    def answer(payload: dict[str, Any], n: int) -> Any:
        prompt = prompt_of(payload)
        return Status(400, message="no, thanks") if prompt.startswith("reject") else Hang()

    server.behave(answer)
    own(
        job,
        f"""
        async def in_group(calls):
            async with asyncio.TaskGroup() as group:
                return [group.create_task(call) for call in calls]

        async def own(document, generate):
            async def ask(prompt):
                while prompt == "reject" and not os.path.exists("siblings are in flight"):
                    await asyncio.sleep(0.01)
                return await generate(prompt)

            prompts = [document.text, document.text.replace("reject", "sibling"), "another"]
            return [reply.text for reply in {fan_out}]
        """,
    )
    job.documents("reject", "fine")

    running = job.start()
    wait_until(lambda: len(server.requests) == 5)
    (job.folder / "siblings are in flight").touch()
    wait_until(lambda: server.in_flight == 3)  # those of "fine": the others have been canceled
    server.release()
    finished = running.finish()

    assert finished.rc == 0
    assert len(job.output.texts()["fine"]) == 3
    record = job.output.failed()["reject"]
    assert record["error_type"] == "RequestFailed"
    assert "no, thanks" in record["error"]
    assert job.verify().rc == 0


def test_a_rollout_may_do_without_a_failed_branch(job: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Status(400) if prompt_of(payload) == "b" else None)
    own(
        job,
        """
        async def own(document, generate):
            replies = await asyncio.gather(*[generate(name) for name in "abc"], return_exceptions=True)
            return [reply for reply in replies if not isinstance(reply, sdg.RequestFailed)]
        """,
    )
    job.documents("one")

    assert len(job.succeed().texts()["one"]) == 2


def test_a_branch_that_is_left_behind_sends_nothing_more(job: Job, server: FakeServer) -> None:
    own(
        job,
        """
        async def late(generate, tried):
            await tried.wait()
            open("tried", "w").close()
            await generate("too late")

        async def own(document, generate):
            if document.text == "waits":
                return await generate("last")
            tried = asyncio.Event()
            own.task = asyncio.create_task(late(generate, tried))
            asyncio.get_running_loop().call_later(0.1, tried.set)
            return "at once"
        """,
    )
    job.documents("leaves", "waits")
    server.behave(lambda payload, n: Hang())

    running = job.start()
    wait_until((job.folder / "tried").exists)
    wait_until(lambda: server.requests)
    server.release()

    assert running.finish().rc == 0
    assert server.prompts == ["last"]
    assert job.output.texts()["leaves"] == ["at once"]


def test_an_error_of_the_run_in_a_branch_ends_the_run(job: Job) -> None:
    own(
        job,
        """
        async def fail():
            raise sdg.PluginError("the plugin cannot go on: fix it")

        async def own(document, generate):
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        """,
    )
    job.documents("one")

    finished = job()

    assert finished.rc == 1
    assert finished.says("the plugin cannot go on: fix it")
    assert not job.output.failures()


def test_no_two_samples_of_a_document_have_the_same_seed(job: Job, server: FakeServer) -> None:
    own(
        job,
        """
        async def own(document, generate):
            one = await generate(document.text)
            return [one, *await asyncio.gather(generate(document.text), generate(document.text))]
        """,
    )
    job.documents("a", "b")

    output = job.succeed(seed=7, rollouts_per_document=3)

    for document in ("a", "b"):
        seeds = [request.payload["seed"] for request in server.requests if request.prompt == document]
        assert sorted(seeds) == [*range(7, 16)]
        assert len(set(output.texts()[document])) == 9  # the server answers equal payloads equally, as a real one would


def test_the_first_sample_of_each_rollout_counts_up_from_the_seed(job: Job, server: FakeServer) -> None:
    job.documents("a")

    job.succeed(seed=7, rollouts_per_document=4)

    assert sorted(request.payload["seed"] for request in server.requests) == [7, 8, 9, 10]


def test_without_a_seed_none_is_sent(job: Job, server: FakeServer) -> None:
    job.documents("a")

    job.succeed(rollouts_per_document=2)

    assert all("seed" not in request.payload for request in server.requests)


def test_a_rollout_knows_which_of_several_it_is(job: Job) -> None:
    own(
        job,
        """
        async def own(document, generate):
            return str(generate.index)
        """,
    )
    job.documents("a")

    assert job.succeed(rollouts_per_document=3).texts() == {"a": ["0", "1", "2"]}


# ── Replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────

FAN_OUT = """
    async def own(document, generate):
        draft = await generate(f"{document.id}: draft")
        views = await asyncio.gather(*[generate(f"{document.id}: view {n} of {draft}") for n in range(3)])
        return [draft, *views, await generate(f"{document.id}: {views}")]
"""


def durable_answers(job: Job) -> set[str]:
    """The server's answers in the state."""
    uri = f"file:{job.output.state}/00000.sqlite3?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as state:
        bodies = [body for (body,) in state.execute("SELECT CAST(body AS TEXT) FROM requests")]
    return {answer for body in bodies for answer in re.findall(r"answer [0-9a-f]{16}", body)}


@pytest.mark.slow
@pytest.mark.parametrize("chance", [random.Random(1), random.Random(2)], ids=["1", "2"])
def test_kills_between_branches_lose_nothing_and_send_no_durable_answer_again(
    chance: random.Random, job: Job, server: FakeServer
) -> None:
    own(job, FAN_OUT)
    job.input([{"id": f"d{number:03}", "text": "x"} for number in range(40)])
    victim: list[Started] = []
    fatal = 0

    def answer(payload: dict[str, Any], n: int) -> Any:
        nonlocal fatal
        fatal -= 1
        if fatal == 0:
            victim[-1].process.kill()
        return Status(400) if re.match("d0.7: view 1", prompt_of(payload)) else None

    server.behave(answer)
    options = {"records_per_chunk": 7, "max_concurrent_documents": 6, "rollouts_per_document": 2, "seed": 1}
    undisturbed = job.succeed(output="undisturbed", **options)
    assert len(undisturbed.failures()) == 4
    durable: set[str] = set()
    codes = []
    for round_ in range(7):
        fatal = chance.randrange(10, 90) if round_ < 6 else 0
        server.forget()
        victim.append(job.start(**options))
        codes.append(victim[-1].finish().rc)
        sent = {usual_text(request.payload)[:23] for request in server.requests}
        assert not durable & sent
        durable = durable_answers(job)

    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 4
    assert job.output.data() == undisturbed.data()
    assert job.output.failed().keys() == undisturbed.failed().keys()
    assert job.verify().rc == 0


STEPS = {"best-of": 8, "continue": 4, "refine": 3}


@pytest.mark.parametrize("rollout", BUNDLED)
def test_a_bundled_rollout_is_replayed_without_a_request_to_the_same_bytes(
    rollout: str, job: Job, server: FakeServer
) -> None:
    def answer(payload: dict[str, Any], n: int) -> Any:  # one document needs a second attempt at its JSON
        good = as_asked(payload, n)
        return "none" if good and "second" in prompt_of(payload) and len(payload["messages"]) == 1 else good

    server.behave(answer)
    job.documents("the first text", "the second text", "the third text. It has two sentences.")
    entry = LOADED.rollouts[rollout]
    again = {"qa": 2, "judge": 2, "best-of": 8}.get(rollout, 0)

    count = check_replay(job, server, entry.plugin, entry.factory.__name__, rollouts_per_document=2, seed=1)

    assert count == 3 * 2 * STEPS.get(rollout, 1) + again


# ── The bundled ones ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rollout", BUNDLED)
def test_a_bundled_rollout_runs_in_the_demonstration_with_fields_as_annotated(rollout: str, run_sdg: Any) -> None:
    finished = run_sdg("--plugin", rollout, "--max-documents", 5, "--no-progress", "--output", "out")

    assert finished.rc == 0
    assert "5 rows, 0 filtered, 0 failed" in finished.stdout
    function = LOADED.rollouts[rollout].factory
    assert annotated_fields(function) is not None or hasattr(function, "fields")  # those of --schema
    results = [result for row in Output(run_sdg.folder / "out").rows() for result in row["rollout_results"]]
    assert {result["extra"] for result in results} == {None}  # where unexpected fields would be


def test_a_copy_of_a_bundled_rollout_runs_under_a_name_of_its_own(run_sdg: Any) -> None:
    source = (ROOT / "plugins/rollouts/summarize.py").read_text()
    (run_sdg.folder / "summarize.py").write_text(source.replace('register("summarize"', 'register("mine"'))

    finished = run_sdg("--plugin", "summarize.py", "--max-documents", 5, "--no-progress", "--output", "out")

    assert finished.rc == 0, finished
    assert "5 rows, 0 filtered, 0 failed" in finished.stdout


def test_a_copy_of_a_bundled_plugin_finds_what_the_original_imports(run_sdg: Any) -> None:
    source = (ROOT / "plugins/servers/command.py").read_text()
    (run_sdg.folder / "mine.py").write_text(source.replace('register("command"', 'register("mine"'))

    finished = run_sdg("plugins", "--plugin", "mine.py", "--plugin", "summarize")

    assert finished.rc == 0, finished
    assert re.search(r"^  mine +mine\.py", finished.stdout, re.MULTILINE)


@pytest.mark.parametrize("rollout", BUNDLED)
def test_a_bundled_rollout_has_at_most_90_lines(rollout: str) -> None:
    path = Path(sys.modules[LOADED.rollouts[rollout].plugin].__file__ or "")
    assert len(path.read_text().splitlines()) <= 90


def test_translate_names_the_language(job: Job, server: FakeServer) -> None:
    job.documents("hello {there}")

    job.succeed(plugin="translate", target_language="Icelandic")

    assert "Icelandic" in server.prompts[0]
    assert server.prompts[0].startswith("hello {there}\n\n")


def test_rephrase_gives_a_result_for_each_style(job: Job, server: FakeServer) -> None:
    job.documents("hello")

    output = job.succeed(plugin="rephrase", style=["table", "faq", "table"])

    results = output.rows()[0]["rollout_results"]
    assert [result["style"] for result in results] == ["table", "faq"]
    assert len({result["text"] for result in results}) == len(server.requests) == 2
    assert all(result["usage"]["completion_tokens"] for result in results)


def test_rephrase_knows_all_styles(job: Job, server: FakeServer) -> None:
    job.documents("hello")

    results = job.succeed(plugin="rephrase", style="all").rows()[0]["rollout_results"]

    assert {"faq", "math", "table", "tutorial"} < {result["style"] for result in results}
    assert len(set(server.prompts)) == len(results) == 8


def test_a_style_that_fails_leaves_the_others(job: Job, server: FakeServer) -> None:
    refused = re.compile("partly(.|\n)*as a table|fully")
    server.behave(lambda payload, n: Status(400) if refused.search(prompt_of(payload)) else None)
    job.documents("partly", "fully")

    output = job.succeed(plugin="rephrase", style=["table", "faq"])

    assert [result["style"] for result in output.rows()[0]["rollout_results"]] == ["faq"]
    assert list(output.failed()) == ["fully"]


def test_qa_gives_a_result_for_each_pair(job: Job, server: FakeServer) -> None:
    pairs = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(3)]
    server.behave(lambda payload, n: json.dumps({"pairs": pairs}))
    job.documents("numbers")

    output = job.succeed(plugin="qa", pairs=3)

    results = output.rows()[0]["rollout_results"]
    assert [{name: result[name] for name in ("question", "answer")} for result in results] == pairs
    assert results[0]["usage"]["prompt_tokens"] > 0
    assert "Write 3 questions" in server.prompts[0]


def test_judge_keeps_score_and_reason_and_filters_low_scores(job: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: json.dumps({"reason": "because", "score": int(prompt_of(payload)[5])}))
    job.documents("text 2", "text 3", "text 5")

    output = job.succeed(plugin="judge", min_score=3, rubric="0 for short, 5 for long")

    assert [(row["id"], row["rollout_results"][0]["score"]) for row in output.rows()] == [("text 3", 3), ("text 5", 5)]
    assert {row["rollout_results"][0]["reason"] for row in output.rows()} == {"because"}
    assert output.stats()["filtered"] == 1
    assert "0 for short, 5 for long" in server.prompts[0]
    assert job.verify().rc == 0


def test_refine_criticizes_its_draft_and_rewrites_it(job: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: ["draft", "critique", "final"][len(payload["messages"]) // 2])
    job.documents("hello")

    result = job.succeed(plugin="refine", task="Write a poem.").rows()[0]["rollout_results"][0]

    assert (result["draft"], result["critique"], result["text"]) == ("draft", "critique", "final")
    said = [message["content"] for message in server.requests[-1].payload["messages"]]
    assert said[0] == "hello\n\nWrite a poem."
    assert (said[1], said[3]) == ("draft", "critique")
    assert result["usage"]["completion_tokens"] == 3


def test_continue_adds_parts_until_there_are_enough_or_the_text_ends(job: Job, server: FakeServer) -> None:
    def answer(payload: dict[str, Any], n: int) -> str:
        number = len(payload["messages"]) // 2
        return "END." if number == 2 and "short" in payload["messages"][0]["content"] else f"part {number}"

    server.behave(answer)
    job.documents("long", "short")

    output = job.succeed(plugin="continue", parts=3)

    assert output.texts() == {"long": ["part 0\n\npart 1\n\npart 2"], "short": ["part 0\n\npart 1"]}
    assert [row["rollout_results"][0]["parts"] for row in output.rows()] == [3, 2]


# ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_may_name_any_column(job: Job, server: FakeServer) -> None:
    row = {"text": "body", "title": "A [[text]] in a title", "tags": ["a", "é"], "page": 7, "none": None, "it s": "odd"}
    job.input([row])

    job.succeed(
        plugin="prompt",
        prompt_template="[[title]]|[[tags]]|[[page]]|[[none]]|[[it s]]|[[id]]|[[DOCUMENT]]|[[text]]|[not] [[1], [2]]",
    )

    expected = 'A [[text]] in a title|["a","é"]|7|null|odd|input.parquet/0|body|body|[not] [[1], [2]]'
    assert server.prompts == [expected]


def test_an_unknown_column_is_refused_before_anything_is_sent(job: Job, server: FakeServer) -> None:
    job.input([{"text": "body", "title": "x"}])

    finished = job(plugin="prompt", prompt_template="[[titel]]: [[DOCUMENT]]")

    assert finished.rc == 2
    assert finished.says("[[titel]]", "[[title]]", "[[DOCUMENT]]", "--prompt-template")
    assert not server.requests


def test_a_template_without_any_placeholder_is_refused(job: Job, server: FakeServer) -> None:
    job.documents("a")

    finished = job(plugin="prompt", prompt_template="Tell me something")

    assert finished.rc == 2
    assert finished.says("--prompt-template", "[[DOCUMENT]]")
    assert not server.requests


def test_template_and_system_prompt_may_be_files(job: Job, server: FakeServer) -> None:
    (job.folder / "t.txt").write_text("Zwölf: [[DOCUMENT]]", encoding="utf-8")
    (job.folder / "s.txt").write_text("Be brief.\n")
    job.documents("a")

    job.succeed(plugin="prompt", prompt_template="@t.txt", system_prompt="@s.txt")
    missing = job(plugin="prompt", prompt_template="@gone.txt", output="other")

    assert server.requests[0].payload["messages"] == [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "Zwölf: a"},
    ]
    assert missing.rc == 2
    assert missing.says("gone.txt")


CHATS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "d"}],
]


def test_a_system_prompt_goes_before_a_column_of_messages(job: Job, server: FakeServer) -> None:
    job.input([{"chat": chat} for chat in CHATS])

    job.succeed(plugin="prompt", prompt_column="chat", system_prompt="Be brief.")

    sent = sorted((request.payload["messages"] for request in server.requests), key=len, reverse=True)
    assert sent == [[{"role": "system", "content": "Be brief."}, *chat] for chat in CHATS]


def test_a_template_for_a_column_of_messages_is_refused_with_the_reason(job: Job, server: FakeServer) -> None:
    job.input([{"chat": chat} for chat in CHATS])

    finished = job(plugin="prompt", prompt_column="chat", prompt_template="Say: [[DOCUMENT]]")

    assert finished.rc == 2
    assert finished.says("--prompt-template", "chat", "messages")
    assert not server.requests


def test_a_template_names_places_inside_values_and_shows_what_the_row_has(job: Job, server: FakeServer) -> None:
    rows = [{"meta": {"a": 1}, "found": [{"why": "short"}]}, {"meta": {"b": 2}, "found": [{"why": "long"}]}]
    (job.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"input": job.folder / "rows.jsonl", "plugin": "prompt"}

    job.succeed(**options, prompt_template="[[meta]] because [[found[0].why]]")
    refused = job(**options, prompt_template="because [[found[0].what]]", output="other")

    assert sorted(server.prompts) == ['{"a":1} because short', '{"b":2} because long']
    assert refused.rc == 1
    assert refused.says("--prompt-template found[0].what", "no field what", "available: why")


TEXTS = st.text(st.sampled_from("[]aDOCUMENTid{}\\g<1> "), max_size=30)


@given(TEXTS, TEXTS, TEXTS)
def test_replacements_in_a_template_are_not_expanded(before: str, after: str, text: str) -> None:
    before, after = (
        templates.PLACEHOLDER.sub("", part) for part in (before.replace("[", "("), after.replace("]", ")"))
    )
    document = sdg.Document("id", text, None, 0, dict)

    filled = templates.fill(f"{before}[[DOCUMENT]]{after}", document)

    assert filled == f"{before}{text}{after}"
