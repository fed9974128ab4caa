"""Requests and responses: retries, how servers share the load, and what is kept of a response."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate, parsedate_to_datetime
from typing import Any

import pytest
from fake_server import PROBE, Answer, Delay, Drop, FakeServer, Hang, Raw, Status, prompt_of
from running import Job, documents, wait_until

from sdg_plugins.common.waiting import quota_pause, retry_after

KEY = "sk-test-0123456789abcdefghijklmnop"


# ── Retries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("each_client")
def test_transient_statuses_are_retried_and_counted_by_cause(job: Job, server: FakeServer) -> None:
    statuses = ["408", "409", "425", "429", "500", "502", "503", "504"]
    job.documents(*statuses)
    server.behave(lambda payload, n: Status(int(prompt_of(payload))) if n == 1 else "fine")

    output = job.succeed()

    assert output.texts() == {status: ["fine"] for status in statuses}
    assert Counter(server.prompts) == dict.fromkeys(statuses, 2)
    assert output.stats()["retries"] == dict.fromkeys(statuses, 1)
    assert output.stats()["requests"] == 16


def test_rejected_request_is_not_retried(job: Job, server: FakeServer) -> None:
    statuses = ["400", "403", "404", "413", "422"]
    job.documents(*statuses, "fine")

    def reject(payload: dict[str, Any], n: int) -> Any:
        return None if prompt_of(payload) == "fine" else Status(int(prompt_of(payload)), message="too odd for me")

    server.behave(reject)

    output = job.succeed()

    assert Counter(server.prompts) == dict.fromkeys([*statuses, "fine"], 1)
    assert output.ids() == ["fine"]
    assert sorted(output.failed()) == statuses
    for status, record in output.failed().items():
        assert record["error_type"] == "RequestFailed"
        assert record["attempts"] == 1
        assert status in record["error"]
        assert "too odd for me" in record["error"]


def test_retries_end_in_a_failed_document(job: Job, server: FakeServer) -> None:
    job.documents("500", "fine")
    server.behave(lambda payload, n: Status(500, message="out of order") if prompt_of(payload) == "500" else None)

    output = job.succeed(max_retries=2)

    assert Counter(server.prompts) == {"500": 3, "fine": 1}
    assert output.ids() == ["fine"]
    record = output.failed()["500"]
    assert record["attempts"] == 3
    assert record["error_type"] == "RequestFailed"
    assert "500" in record["error"]
    assert "out of order" in record["error"]


def test_the_text_of_an_error_does_not_decide_whether_it_is_retried(job: Job, server: FakeServer) -> None:
    job.documents("BadRequestError 400 invalid_request_error", "RateLimitError 429")

    def quote(payload: dict[str, Any], n: int) -> Any:
        prompt = prompt_of(payload)
        return None if n > 1 else Status(503 if prompt.startswith("Bad") else 400, message=f"cannot serve: {prompt}")

    server.behave(quote)

    output = job.succeed()

    assert output.ids() == ["BadRequestError 400 invalid_request_error"]
    assert list(output.failed()) == ["RateLimitError 429"]


def test_a_refused_key_stops_the_run(job: Job, server: FakeServer) -> None:
    job.input(documents(100))
    expired = Status(401, message="key expired")
    server.behave(lambda payload, n: expired if prompt_of(payload) in {"document 3", PROBE} else None)

    finished = job(env={"OPENAI_API_KEY": KEY}, max_concurrent_generations=1)

    assert finished.rc == 1
    assert finished.says("401", "OPENAI_API_KEY")
    assert len(server.requests) < 20
    assert not job.output.failures()

    server.behave(lambda payload, n: None)
    before = set(server.prompts) - {"document 3"}
    server.forget()
    output = job.succeed()
    assert output.ids() == [row["id"] for row in documents(100)]
    assert not before & set(server.prompts)


def test_a_key_that_is_a_word_is_not_removed_from_responses(job: Job, server: FakeServer) -> None:
    job.documents("one")
    server.behave(lambda payload, n: Answer("The cup is EMPTY."))

    finished = job(env={"OPENAI_API_KEY": "EMPTY"})

    assert finished.rc == 0
    assert job.output.texts() == {"one": ["The cup is EMPTY."]}


def test_a_missing_key_is_named(job: Job, server: FakeServer) -> None:
    job.input(documents(3))
    server.api_key = KEY

    finished = job(api_key_env="MY_KEY")

    assert finished.rc == 1
    assert finished.says("401", "$MY_KEY is not set", "127.0.0.1")
    assert not server.answered


def test_retry_after_is_honored_in_seconds_and_as_a_date(job: Job, server: FakeServer) -> None:
    prompts = [f"{status} {form}" for status in (429, 503) for form in ("seconds", "date")]
    job.documents(*prompts)
    not_before: dict[str, float] = {}
    came: dict[str, float] = {}

    def ask_for_patience(payload: dict[str, Any], n: int) -> Any:
        prompt = prompt_of(payload)
        if n > 1:
            came.setdefault(prompt, time.time())
            return None
        status, form = prompt.split()
        value = "2" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
        not_before[prompt] = time.time() + 2 if form == "seconds" else parsedate_to_datetime(value).timestamp()
        return Status(int(status), {"Retry-After": value})

    server.behave(ask_for_patience)

    output = job.succeed()

    assert output.ids() == prompts
    assert {prompt: came[prompt] >= not_before[prompt] - 0.02 for prompt in prompts} == dict.fromkeys(prompts, True)
    assert len(server.requests) == 2 * len(prompts)


def test_a_short_retry_after_fails_nothing(job: Job, server: FakeServer) -> None:
    job.input(documents(300))
    pauses = ["0", "0.0002", "0.0005", "0.001", "0.01", "-1", "soon", "", formatdate(0, usegmt=True)]

    def ask_for_patience(payload: dict[str, Any], n: int) -> Any:
        number = int(prompt_of(payload).split()[1])
        return Status(429, {"Retry-After": pauses[number % len(pauses)]}) if n == 1 and number % 3 else None

    server.behave(ask_for_patience)

    output = job.succeed(max_concurrent_generations=30)

    assert len(output.rows()) == 300
    assert not output.failures()


def test_a_slot_is_free_while_its_request_waits_for_a_retry(job: Job, server: FakeServer) -> None:
    waiting = ["409", "500"]
    others = [f"other {number}" for number in range(5)]
    job.documents(*waiting, *others)

    def ask_for_patience(payload: dict[str, Any], n: int) -> Any:
        status = prompt_of(payload)
        return Status(int(status), {"Retry-After": "2"}) if n == 1 and status in waiting else None

    server.behave(ask_for_patience)

    output = job.succeed(max_concurrent_generations=1, max_concurrent_documents=10)

    assert output.ids() == [*waiting, *others]
    assert server.max_in_flight == 1
    assert sorted(server.prompts[-2:]) == waiting


def test_a_server_whose_quota_is_exhausted_gets_no_request_until_the_reset(job: Job, server: FakeServer) -> None:
    job.documents("1", "2", "3")
    spent = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s"}
    server.behave(lambda payload, n: Answer("fine", headers=spent if prompt_of(payload) == "2" else {}))

    job.succeed(max_concurrent_generations=1)

    first, second, third = (request.time for request in server.requests)
    assert third - second >= 2
    assert second - first < third - second


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "9s"}, 0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "12.5"}, 12.5),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9d"}, 86_400),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "soon"}, 0),
        ({"x-ratelimit-remaining-requests": "0"}, 0),
    ],
)
def test_quota_headers_are_parsed(headers: dict[str, str], seconds: float) -> None:
    assert quota_pause(headers) == pytest.approx(seconds)


def test_retry_after_in_milliseconds_is_preferred() -> None:
    assert retry_after({"retry-after-ms": "250", "Retry-After": "1"}) == 0.25
    assert retry_after({"retry-after-ms": "soon", "Retry-After": "1"}) is None


@pytest.mark.usefixtures("each_client")
def test_a_request_that_takes_too_long_is_sent_again(job: Job, server: FakeServer) -> None:
    job.documents("once", "always", "fine")

    def hang(payload: dict[str, Any], n: int) -> Any:
        prompt = prompt_of(payload)
        return Hang() if prompt == "always" or (prompt == "once" and n == 1) else None

    server.behave(hang)

    output = job.succeed(request_timeout=1, max_retries=1)

    assert output.ids() == ["once", "fine"]
    record = output.failed()["always"]
    assert record["attempts"] == 2
    assert "1 s" in record["error"]
    assert output.stats()["retries"] == {"timeout": 2}
    first, second = [request.time for request in server.requests if request.prompt == "always"]
    assert second - first >= 0.99


BROKEN = {
    "not json": Raw(b"<html>502 Bad Gateway</html>"),
    "half json": Raw(b'{"choices": [{"message": {"content": "half'),
    "no bytes": Raw(b""),
    "a list": Raw(b"[]"),
    "null": Raw(b"null"),
    "not utf-8": Raw(b'{"choices": [{"index": 0, "message": {"content": "\xff"}}]}'),
    "no choices": Raw(b'{"id": "x"}'),
    "choices of text": Raw(b'{"choices": ["text"]}'),
    "text is a number": Raw(b'{"choices": [{"index": 0, "message": {"content": 5}}]}'),
    "empty choices": Answer(choices=[]),
    "null choices": Raw(b'{"choices": null}'),
    "empty text": Answer(""),
    "null text": Raw(b'{"choices": [{"index": 0, "message": {"content": null}, "finish_reason": "stop"}]}'),
    "connection closed": Drop(),
    "connection closed in the body": Drop(sent=100),
}
COMPLETE = {"text is a number", "empty text", "null text"}  # an answer, if not one of any use


@pytest.mark.usefixtures("each_client")
def test_a_broken_response_is_retried_then_recorded(job: Job, server: FakeServer) -> None:
    job.documents("fine", *[f"{fault}, {times}" for fault in BROKEN for times in ("once", "always")])

    def break_it(payload: dict[str, Any], n: int) -> Any:
        fault, _, times = prompt_of(payload).partition(", ")
        return None if fault == "fine" or (times == "once" and n > 1) else BROKEN[fault]

    server.behave(break_it)

    output = job.succeed(max_retries=2)

    assert output.ids() == ["fine", *[f"{fault}, once" for fault in BROKEN]]
    assert list(output.failed()) == [f"{fault}, always" for fault in BROKEN]
    sent = Counter(server.prompts)
    assert {sent[f"{fault}, once"] for fault in BROKEN} == {2}
    attempts = {fault: sent[f"{fault}, always"] for fault in BROKEN}
    assert attempts == {fault: 2 if fault in COMPLETE else 3 for fault in BROKEN}
    assert [record["attempts"] for record in output.failures()] == [*attempts.values()]
    assert {record["error_type"] for record in output.failures()} == {"RequestFailed"}
    assert all(record["error"] for record in output.failures())
    retries = output.stats()["retries"]
    assert set(retries) == {"body", "empty", "connection"}
    assert sum(retries.values()) == sum(attempts.values())
    assert retries["connection"] == 3 * 2


def test_an_empty_completion_is_not_retried_if_it_reached_max_tokens(job: Job, server: FakeServer) -> None:
    job.documents("long")
    server.behave(lambda payload, n: Answer("", finish_reason="length"))

    job.succeed(max_retries=3)

    assert len(server.requests) == 1


# ── Load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("each_client")
def test_requests_in_flight_reach_the_limit_and_no_more_over_kept_connections(job: Job, server: FakeServer) -> None:
    job.input(documents(60))

    def wait_for_company(payload: dict[str, Any], n: int) -> Any:
        if server.in_flight >= 7:
            server.release()
        return Hang(then=Delay(0.01))

    server.behave(wait_for_company)

    job.succeed(max_concurrent_generations=7)

    assert server.max_in_flight == 7
    assert len({request.connection for request in server.requests}) <= 7


def test_a_storm_of_429_fails_nothing_and_stays_bounded(job: Job, server: FakeServer) -> None:
    job.input(documents(120))

    def serve_four(payload: dict[str, Any], n: int) -> Any:
        return Status(429) if server.in_flight > 4 else Delay(0.02)

    server.behave(serve_four)

    output = job.succeed(max_concurrent_generations=60, max_retries=2)

    assert output.ids() == [row["id"] for row in documents(120)]
    assert not output.failures()
    assert len(server.requests) <= 5 * 120
    assert output.stats()["retries"] == {"429": len(server.requests) - 120}


def test_the_load_grows_back_after_a_storm(job: Job, server: FakeServer) -> None:
    job.input(documents(600))
    storm_s = 2
    busy_again = []

    def calm_down(payload: dict[str, Any], n: int) -> Any:
        if time.monotonic() < began + storm_s:
            return Status(503)
        if server.in_flight == 20:
            busy_again.append(payload)
        return Delay(0.005) if busy_again else Delay(0.02)

    server.behave(calm_down)
    began = time.monotonic()

    output = job.succeed(max_concurrent_generations=20)

    assert not output.failures()
    assert busy_again


def test_a_request_for_which_a_server_never_has_capacity_fails(job: Job, server: FakeServer) -> None:
    job.documents("fine", "never")
    server.behave(lambda payload, n: Status(503) if prompt_of(payload) == "never" else None)

    output = job.succeed(max_retries=2)

    assert list(output.failed()) == ["never"]
    assert server.prompts.count("never") == output.failures()[0]["attempts"] <= 10 * 2 + 1


@pytest.mark.parametrize("crowded", [False, True], ids=["with room", "with requests that wait"])
def test_requests_of_a_document_go_to_the_server_that_has_it_in_its_cache(
    job: Job, servers: Callable[[], FakeServer], crowded: bool
) -> None:
    several = [servers() for _ in range(3)]
    for server in several:
        server.behave(lambda payload, n: Delay(0.01 + 0.02 * (n % 3)))
    job.input(documents(60))
    limits = {"max_concurrent_generations": 24, "max_concurrent_documents": 40 if crowded else 3}

    job.succeed(base_url=[server.url for server in several], plugin="rephrase", style="all", **limits)

    homes = [Counter(prompt.partition("\n")[0] for prompt in server.prompts) for server in several]
    numbers = [len(server.prompts) for server in several]
    assert sum(numbers) == 60 * 8
    most = sum(max(home[f"document {i}"] for home in homes) for i in range(60))
    assert most >= 0.8 * sum(numbers)  # half of them go to the least loaded one by chance
    assert min(numbers) >= 0.5 * max(numbers)


def test_requests_go_to_the_least_loaded_server(
    job: Job, server: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    slow, fast = server, servers()
    job.input(documents(60))
    slow.behave(lambda payload, n: Hang())

    def release_the_slow_one_at_the_end(payload: dict[str, Any], n: int) -> Any:
        if len(fast.requests) + len(slow.requests) == 60:
            slow.release()
        return None

    fast.behave(release_the_slow_one_at_the_end)

    output = job.succeed(base_url=[slow.url, fast.url], max_concurrent_generations=8)

    assert len(output.rows()) == 60
    assert 1 <= len(slow.requests) <= 8 // 2 + 1
    assert len(fast.requests) == 60 - len(slow.requests)


@pytest.mark.usefixtures("each_client")
def test_a_dead_server_is_set_aside_and_comes_back(
    job: Job, server: FakeServer, servers: Callable[[], FakeServer]
) -> None:
    steady, shaky = server, servers()
    job.input(documents(3000))
    steady.behave(lambda payload, n: Delay(0.01))

    running = job.start(base_url=[steady.url, shaky.url], max_concurrent_generations=4)
    wait_until(lambda: shaky.requests)
    shaky.stop()
    done = len(steady.requests)
    wait_until(lambda: len(steady.requests) > done + 20)
    shaky.forget()
    shaky.start()
    wait_until(lambda: shaky.answered)
    steady.behave(lambda payload, n: None)
    finished = running.finish()

    assert finished.rc == 0
    assert job.output.ids() == [row["id"] for row in documents(3000)]
    assert not job.output.failures()


@pytest.mark.usefixtures("each_client")
def test_requests_wait_for_the_only_server_to_come_back(job: Job, server: FakeServer) -> None:
    job.input(documents(40))
    server.behave(lambda payload, n: Hang())

    running = job.start(max_concurrent_generations=4, max_retries=1)
    wait_until(lambda: len(server.requests) == 4)
    server.stop()
    server.behave(lambda payload, n: None)
    server.start()
    finished = running.finish()

    assert finished.rc == 0
    assert job.output.ids() == [row["id"] for row in documents(40)]
    assert not job.output.failures()


@pytest.mark.usefixtures("each_client")
def test_a_server_that_does_not_come_back_ends_the_run_and_nothing_is_lost(job: Job, server: FakeServer) -> None:
    job.input(documents(40))
    server.behave(lambda payload, n: None if len(server.requests) <= 20 else Hang())

    running = job.start(max_concurrent_generations=2, request_timeout=2)
    wait_until(lambda: len(server.requests) == 22)
    completed = {request.prompt for request in server.answered}
    server.stop()
    finished = running.finish()
    assert finished.rc == 1
    assert finished.says(f"127.0.0.1:{server.port}")
    assert not job.output.failures()

    server.behave(lambda payload, n: None)
    server.forget()
    server.start()
    output = job.succeed()
    assert output.ids() == [row["id"] for row in documents(40)]
    assert not completed & set(server.prompts)


# ── Addresses, keys, models ──────────────────────────────────────────────────────────────────────────────────────────


def test_base_urls_work_with_and_without_v1(job: Job, server: FakeServer, servers: Callable[[], FakeServer]) -> None:
    four = [server, servers(), servers(), servers()]
    host = "http://127.0.0.1:"
    urls = [f"{host}{each.port}{path}" for each, path in zip(four, ["/v1", "", "/v1/", "/"], strict=True)]
    job.input(documents(40))
    for each in four:
        each.behave(lambda payload, n: Delay(0.05))

    job.succeed(base_url=urls, max_concurrent_generations=8)

    for each in four:
        assert {request.path for request in each.requests} == {"/v1/chat/completions"}


def test_a_base_url_may_have_a_path_of_its_own(job: Job, server: FakeServer) -> None:
    job.documents("fine")

    job.succeed(base_url=f"http://127.0.0.1:{server.port}/tenants/7/v1")

    assert [request.path for request in server.requests] == ["/tenants/7/v1/chat/completions"]


def test_the_address_may_come_from_the_environment(job: Job, server: FakeServer) -> None:
    job.documents("fine")

    finished = job(env={"OPENAI_BASE_URL": server.url}, base_url=None, server="endpoint")

    assert finished.rc == 0
    assert server.prompts == ["fine"]


@pytest.mark.usefixtures("each_client")
def test_the_key_is_sent_but_written_nowhere(job: Job, server: FakeServer) -> None:
    server.api_key = KEY
    job.documents("fine", "echoed", "once")

    def echo_the_key(payload: dict[str, Any], n: int) -> Any:
        if prompt_of(payload) == "echoed":
            return Status(400, message=f"project of key {KEY} has no right to do this")
        if prompt_of(payload) == "once" and n == 1:
            return Status(500, message=f"Bearer {KEY} made me stumble")
        return None

    server.behave(echo_the_key)

    finished = job(env={"THE_KEY": KEY}, api_key_env="THE_KEY")

    assert finished.rc == 0, finished
    assert job.output.ids() == ["fine", "once"]
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in finished.stdout + finished.stderr
    files = [path for path in job.output.path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_no_authorization_is_sent_without_a_key(job: Job, server: FakeServer) -> None:
    job.documents("fine")

    job.succeed()

    assert server.requests[0].headers.get("Authorization", "none").strip() != "Bearer"


def test_an_unknown_model_names_those_that_are_served(job: Job, server: FakeServer) -> None:
    server.models = ["small-model", "large-model"]
    job.documents("fine")

    finished = job(model="smal-model")

    assert finished.rc == 1
    assert finished.says("the model smal-model does not exist", "small-model", "large-model", "did you mean")
    assert not job.output.failures()


def test_several_models_require_a_choice(job: Job, server: FakeServer) -> None:
    server.models = ["small-model", "large-model"]
    job.documents("fine")

    finished = job()
    assert finished.rc in {1, 2}
    assert finished.says("small-model", "large-model", "--model")

    job.succeed(model="large-model")
    assert [request.payload["model"] for request in server.requests] == ["large-model"]


# ── Payloads and replies ─────────────────────────────────────────────────────────────────────────────────────────────


def test_options_and_overrides_make_the_payload(job: Job, server: FakeServer) -> None:
    job.documents("fine")
    job.options["plugin"] = job.plugin(
        "cooler",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("cooler", cooler)

        async def cooler(document, generate):
            return await generate(document.text, temperature=0.25)
        """,
    )
    options = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "max_tokens": 7}

    job.succeed(**options, generation='{"stop": ["END"], "min_p": 0.1}')

    payload = server.requests[0].payload
    expected = {**options, "temperature": 0.25, "stop": ["END"], "min_p": 0.1, "model": "test-model"}
    assert {name: payload.get(name) for name in expected} == expected
    assert payload["messages"] == [{"role": "user", "content": "fine"}]


def test_a_template_and_a_system_prompt_frame_the_document(job: Job, server: FakeServer) -> None:
    (job.folder / "template.txt").write_text("Say it twice: [[DOCUMENT]] — twice!\n")
    job.documents("fine")

    job.succeed(plugin="prompt", prompt_template="@template.txt", system_prompt="You are an echo.")

    system, user = server.requests[0].payload["messages"]
    assert system == {"role": "system", "content": "You are an echo."}
    assert user["role"] == "user"
    assert user["content"].strip() == "Say it twice: fine — twice!"


def test_a_column_of_messages_is_sent_as_it_is(job: Job, server: FakeServer) -> None:
    chats = [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    job.input([{"id": str(number), "chat": chat} for number, chat in enumerate(chats)])

    output = job.succeed(prompt_column="chat")

    sent = sorted((request.payload["messages"] for request in server.requests), key=len)
    assert sent == chats
    assert [row["chat"] for row in output.rows()] == chats


REPLIES = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("replies", replies)

    async def replies(document, generate):
        if document.text == "three":
            reply = await generate(document.text, n=3)
            assert [choice.text for choice in reply.choices] == ["choice", "choice #1", "choice #2"]
            return reply
        if document.text == "completion":
            return await generate({"prompt": "Once upon"}, max_tokens=5)
        if document.text == "payload":
            return await generate({"messages": [{"role": "user", "content": "payload"}], "temperature": 0})
        if document.text == "list":
            return [await generate("one"), "two", {"text": "three", "score": 3}]
        reply = await generate(document.text)
        if document.text == "tools":
            assert reply.tool_calls[0]["function"]["name"] == "look_up"
        if document.text == "logprobs":
            assert reply.logprobs["content"][0]["logprob"] == -0.5
        if document.text.startswith("reasoning"):
            assert reply.reasoning == "because"
        return reply
"""

TOOL_CALLS = [{"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "sdg"}'}}]
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}


def test_choices_tool_calls_logprobs_and_reasoning_are_kept(job: Job, server: FakeServer) -> None:
    answers = {
        "three": Answer("choice"),
        "tools": Answer(None, tool_calls=TOOL_CALLS, finish_reason="tool_calls"),
        "logprobs": Answer("a", logprobs=LOGPROBS),
        "reasoning_content": Answer("so", reasoning="because"),
        "reasoning": Answer("so", reasoning="because", reasoning_key="reasoning"),
        "completion": None,
        "payload": None,
        "list": None,
    }
    server.behave(lambda payload, n: answers.get(prompt_of(payload)))
    job.options["plugin"] = job.plugin("replies", REPLIES)
    job.documents(*answers)

    output = job.succeed()

    assert not output.failures()
    results = {row["id"]: row["rollout_results"] for row in output.rows()}
    assert [result["text"] for result in results["three"]] == ["choice", "choice #1", "choice #2"]
    assert json.loads(results["tools"][0]["extra"])["tool_calls"] == TOOL_CALLS
    assert results["tools"][0]["finish_reason"] == "tool_calls"
    assert json.loads(results["logprobs"][0]["extra"])["logprobs"] == LOGPROBS
    assert [results[name][0]["reasoning"] for name in ("reasoning_content", "reasoning")] == ["because"] * 2
    assert [result["text"] for result in results["list"]][1:] == ["two", "three"]
    usages = [result["usage"] for result in results["three"]]
    assert sum(usage["completion_tokens"] for usage in usages if usage) == 3
    paths = {request.prompt: request.path for request in server.requests}
    assert paths["Once upon"] == "/v1/completions"
    assert paths["payload"] == "/v1/chat/completions"
    completion = next(request for request in server.requests if request.prompt == "Once upon")
    assert completion.payload["max_tokens"] == 5
    assert "messages" not in completion.payload
    assert results["completion"][0]["text"].startswith("answer ")


def test_equal_calls_of_a_rollout_are_different_samples(job: Job, server: FakeServer) -> None:
    numbers = itertools.count()
    server.behave(lambda payload, n: f"sample {next(numbers)}")
    job.documents("fine", "fine too")
    job.options["plugin"] = job.plugin(
        "samples",
        """
        import asyncio

        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("samples", samples)

        async def samples(document, generate):
            return list(await asyncio.gather(*[generate("the same") for _ in range(3)]))
        """,
    )

    output = job.succeed(rollouts_per_document=2)

    assert len(server.requests) == 12
    texts = [text for texts in output.texts().values() for text in texts]
    assert sorted(texts) == sorted(f"sample {number}" for number in range(12))


def test_an_input_uses_the_endpoint_in_the_environment(job: Job, server: FakeServer) -> None:
    job.documents("a")

    finished = job({"OPENAI_BASE_URL": server.url}, base_url=None)
    wrong = job({"OPENAI_BASE_URL": "localhost:1"}, base_url=None, output="other")

    assert finished.rc == 0, finished
    assert server.prompts == ["a"]
    assert wrong.says("OPENAI_BASE_URL", "http://")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("inf", None), ("nan", None), ("3e6", 86_400), ("-5", 0), ("2.5", 2.5), ("soon", None), ("", None)],
)
def test_any_retry_after_is_a_bounded_pause_or_none(value: str, seconds: float | None) -> None:
    assert retry_after({} if value is None else {"Retry-After": value}) == seconds


def test_servers_with_different_models_are_refused(job: Job, servers: Any) -> None:
    job.documents("one")
    other = servers()
    other.models = ["another"]
    finished = job(base_url=[job.server.url, other.url], model=job.server.models[0])
    assert finished.rc == 1
    assert finished.says("another", job.server.models[0])


def test_a_run_starts_without_one_dead_server_of_two(job: Job) -> None:
    job.documents("one", "two", "three")
    finished = job(base_url=["http://127.0.0.1:9", job.server.url])
    assert finished.rc == 0
    assert "127.0.0.1:9" in finished.stderr
    assert len(job.output.rows()) == 3


@pytest.mark.parametrize("path", ["/chat/completions", "/completions/"])
def test_a_base_url_may_be_the_url_of_an_endpoint(job: Job, server: FakeServer, path: str) -> None:
    job.input(documents(3))
    job.succeed(base_url=server.url + path)
    assert len(server.answered) == 3


def test_a_proxy_is_used_for_remote_servers_only(job: Job, servers: Callable[[], FakeServer]) -> None:
    local, proxy = servers(), servers()
    job.input(documents(20))
    urls = [local.url, "http://api.example/v1"]

    finished = job({"http_proxy": f"http://127.0.0.1:{proxy.port}"}, base_url=urls, max_concurrent_generations=2)

    assert finished.rc == 0, finished
    assert {request.headers["Host"] for request in proxy.requests} == {"api.example"}
    assert local.requests
    assert {request.headers["Host"] for request in local.requests} == {f"127.0.0.1:{local.port}"}
