"""Responses are trusted no further than they deserve: broken-off, empty, wrong, refused, overloaded, odd."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from fake_server import PROBE, Answer, FakeServer, Raw, Status, prompt_of
from hypothesis import given, strategies as st
from running import Job, documents, wait_until

import sdg
from sdg_plugins.common.secrets import Secrets, forms_of
from sdg_plugins.common.waiting import duration, quota_pause, retry_after
from sdg_plugins.servers.connecting import candidates_of, models_in
from sdg_plugins.servers.load import parse_load
from sdg_plugins.servers.refusals import refused
from sdg_plugins.servers.responses import error_text, merged, parse_reply, read_json, worst
from sdg_plugins.servers.streaming import Assembly
from sdg_plugins.servers.transport import Answer as Reception, address, root_of

KEY = "sk-test-0123456789abcdefghijklmnop"


def choice(text: str | None, reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    """One choice of a chat response; `more` are fields of the message."""
    return {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, **more}}


def raw(content: Any, status: int = 200) -> Raw:
    return Raw(json.dumps(content).encode(), status)


# ── Completions that are none ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reason", ["abort", "error", "network_error", "TIMEOUT", "USER_CANCEL", "ERROR_TOXIC"])
def test_a_completion_that_the_server_broke_off_is_requested_again(job: Job, server: FakeServer, reason: str) -> None:
    job.documents("a", "b")
    server.behave(lambda payload, n: Answer("A part", finish_reason=reason) if n <= 2 else "Whole.")

    output = job.succeed()

    assert output.texts() == {"a": ["Whole."], "b": ["Whole."]}
    assert output.stats()["retries"] == {"aborted": 4}
    assert output.stats()["finish_reasons"] == {"stop": 2}


def test_an_error_in_a_choice_breaks_it_off_whatever_its_reason(job: Job, server: FakeServer) -> None:
    job.documents("a")
    broken = {**choice("A part", "stop"), "error": {"code": 502, "message": "Provider disconnected"}}
    server.behave(lambda payload, n: Answer(choices=[broken]))

    finished = job(max_retries=1, max_failure_rate=0.1)

    assert finished.rc == 3
    (record,) = job.output.failures()
    assert "Provider disconnected" in record["error"]
    assert (record["attempts"], record["finish_reason"]) == (2, "stop")


def test_an_error_beside_completions_breaks_them_off_whatever_its_code(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")
    beside = {"choices": [choice("A part")], "error": {"code": 400, "message": "upstream died"}}
    server.behave(lambda payload, n: raw(beside) if n == 1 else "Whole.")

    output = job.succeed()

    assert output.texts() == {"a": ["Whole."], "b": ["Whole."]}
    assert output.stats()["retries"] == {"aborted": 2}


def test_unusual_final_reasons_are_kept_and_counted(job: Job, server: FakeServer) -> None:
    reasons = ["content_filter", "repetition", "odd_one", "length", "stop"]
    job.documents(*reasons)
    server.behave(lambda payload, n: Answer("Text.", finish_reason=prompt_of(payload)))

    finished = job()

    assert finished.rc == 0
    assert {row["id"]: row["rollout_results"][0]["finish_reason"] for row in job.output.rows()} == {
        reason: reason for reason in reasons
    }
    assert job.output.stats()["finish_reasons"] == dict.fromkeys(sorted(reasons), 1)
    assert "1 content_filter" in finished.stdout
    assert "1 odd_one" in finished.stdout
    assert r"content\_filter 1" in (job.output.path / "README.md").read_text()


def test_results_without_a_reason_of_their_own_get_the_worst_of_their_replies(job: Job, server: FakeServer) -> None:
    job.options["plugin"] = job.plugin(
        "two",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("two", two)

        async def two(document, generate):
            first = await generate(f"one {document.text}")
            second = await generate(f"two {document.text}")
            return {"both": f"{first}{second}"}
        """,
    )
    job.documents("same", "cut")
    cut = Answer("x", finish_reason="length")
    server.behave(lambda payload, n: cut if prompt_of(payload) == "one cut" else "x")

    output = job.succeed()

    reasons = {row["id"]: row["rollout_results"][0]["finish_reason"] for row in output.rows()}
    assert reasons == {"same": "stop", "cut": "length"}


def test_the_worst_reason_is_the_one_that_spoils_most() -> None:
    assert worst(["stop", None, "length", "stop"]) == "length"
    assert worst(["stop", "content_filter", "length"]) == "content_filter"
    assert worst(["stop", "unheard_of"]) == "unheard_of"
    assert worst([None]) is None


@pytest.mark.parametrize(
    ("message", "attempts", "words"),
    [
        ({"content": None, "refusal": "I cannot help with that."}, 1, "I cannot help with that."),
        ({"content": "", "reason": "content_filter"}, 1, "content_filter"),
        ({"content": "", "reason": "length", "reasoning_content": "Long thoughts"}, 1, "--max-tokens"),
        ({"content": "", "reason": "SAFETY"}, 1, "SAFETY"),
        ({"content": "", "reason": "MAX_TOKENS"}, 1, "--max-tokens"),
        ({"content": None, "reasoning_content": "All of it"}, 2, "reasoning"),
        ({"content": ""}, 2, "empty"),
    ],
)
def test_empty_completions_cost_few_attempts_and_leave_what_there_was(
    job: Job, server: FakeServer, message: dict[str, Any], attempts: int, words: str
) -> None:
    job.documents("a")
    reason = message.pop("reason", "stop")
    server.behave(lambda payload, n: Answer(choices=[choice(message.pop("text", None), reason, **message)]))

    assert job(max_failure_rate=0.1).rc == 3

    (record,) = job.output.failures()
    assert len(server.requests) == record["attempts"] == attempts
    assert words in record["error"]
    assert ("--max-tokens" in record["error"]) is (reason in {"length", "MAX_TOKENS"})
    assert record["finish_reason"] == reason
    assert record["usage"]["prompt_tokens"] == 1
    assert record.get("reasoning") == message.get("reasoning_content")
    assert record.get("refusal") == message.get("refusal")


def test_a_rollout_learns_what_there_was_of_a_completion(job: Job, server: FakeServer) -> None:
    job.options["plugin"] = job.plugin(
        "careful",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("careful", careful)

        async def careful(document, generate):
            try:
                return await generate(document.text)
            except sdg.RequestFailed as exc:
                return f"{exc.cause}: {exc.refusal}, {exc.reply.finish_reason}"
        """,
    )
    job.documents("a")
    server.behave(lambda payload, n: Answer(choices=[choice(None, refusal="No.")]))

    assert job.succeed().texts() == {"a": ["refusal: No., stop"]}


def test_empty_answers_can_be_kept_with_their_reasoning(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")
    thought = Answer(choices=[choice(None, "length", reasoning_content="Thoughts")])
    server.behave(lambda payload, n: thought if prompt_of(payload) == "a" else "Text.")

    output = job.succeed(empty_answers="keep")

    first, second = (row["rollout_results"][0] for row in output.rows())
    assert (first["text"], first["reasoning"], first["finish_reason"]) == ("", "Thoughts", "length")
    assert second["text"] == "Text."
    assert len(server.requests) == 2
    assert job(empty_answers="fail").says("belongs to a different run", "empty_answers")


def test_a_function_call_of_the_old_form_is_a_tool_call() -> None:
    call = {"name": "look_up", "arguments": "{}"}
    reply = parse_reply({"choices": [choice(None, "function_call", function_call=call)]})
    assert reply.tool_calls == [{"type": "function", "function": call}]
    assert reply.choices == (reply.__class__(**{**_fields(reply), "choices": ()}),)


def _fields(reply: sdg.Reply) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in reply.__dataclass_fields__}


# ── Errors inside a 200 ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_code_of_an_error_inside_a_200_decides(job: Job, server: FakeServer) -> None:
    job.documents("busy", "flat", "words", "bad", "odd", "fine")
    errors = {
        "flat": {"object": "error", "message": "Rate limit reached", "type": "RateLimit", "code": 429},
        "words": {"error": {"message": "Rate limit reached", "type": "x", "code": "rate_limit_exceeded"}},
        "busy": {"choices": None, "error": {"message": "Provider returned error", "code": 429}},
        "bad": {"error": {"message": "not like this", "code": "400"}},
        "odd": {"status": "FAILED", "error": "err.supplier_error"},
    }

    def behave(payload: dict[str, Any], n: int) -> Any:
        name = prompt_of(payload)
        return None if name == "fine" or (name in {"busy", "flat", "words"} and n > 3) else raw(errors[name])

    server.behave(behave)
    output_of_run = job(max_failure_rate=1)

    assert output_of_run.rc == 0
    assert sorted(job.output.ids()) == ["busy", "fine", "flat", "words"]
    failed = job.output.failed()
    assert (failed["bad"]["attempts"], failed["odd"]["attempts"]) == (1, 2)
    assert "not like this" in failed["bad"]["error"]
    assert "err.supplier_error" in failed["odd"]["error"]
    assert job.output.stats()["retries"] == {"429": 9, "body": 1}


@pytest.mark.parametrize("odd", [raw({"choices": [choice("")]}), raw({"error": {"message": "oops"}})])
def test_another_failure_before_leaves_an_empty_or_odd_response_its_attempts(
    job: Job, server: FakeServer, odd: Raw
) -> None:
    job.documents("a")
    server.behave(lambda payload, n: [Status(502), odd, "Text."][n - 1])
    assert job.succeed().texts() == {"a": ["Text."]}


def test_a_completion_with_another_status_of_success_is_one(job: Job, server: FakeServer) -> None:
    job.documents("201", "203")
    server.behave(lambda payload, n: raw({"choices": [choice("fine")]}, int(prompt_of(payload))))
    assert job.succeed().texts() == {"201": ["fine"], "203": ["fine"]}


def test_an_error_is_no_response_of_another_endpoint(job: Job, server: FakeServer) -> None:
    job.documents("a")
    error = {"object": "error", "message": "busy", "code": 503}
    server.behave(lambda payload, n: raw(error) if n == 1 else None)

    output = job.succeed(plugin="embed")

    assert output.stats()["retries"] == {"503": 1}
    assert "embedding" in str(output.rows())


def test_an_overloaded_request_is_sent_again_though_failures_are_not(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    server.behave(lambda payload, n: Status(498) if n == 1 and "7" in prompt_of(payload) else None)
    assert len(job.succeed(max_retries=0).rows()) == 30


# ── Overload ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [429, 503, 522])
def test_an_outage_costs_time_and_no_document(job: Job, server: FakeServer, status: int) -> None:
    job.input(documents(40))
    began: list[float] = []

    def behave(payload: dict[str, Any], n: int) -> Any:
        began.append(time.monotonic())
        return Status(status) if began[-1] < began[0] + 6 else None

    server.behave(behave)
    output = job.succeed(max_concurrent_generations=8, max_retries=1)

    assert len(output.rows()) == 40
    assert len(server.requests) <= 40 + 8 + 6  # those in flight when it began, then one probe a second at most
    assert output.stats()["given_up"] == {}


@pytest.mark.slow
def test_a_free_tier_ends_with_all_rows(job: Job, server: FakeServer) -> None:
    """A quota of 10 in each two seconds; the rest is refused without a word on when to come back."""
    job.input(documents(40))
    sent: list[float] = []

    def behave(payload: dict[str, Any], n: int) -> Any:
        now = time.monotonic()
        if len([moment for moment in sent if moment > now - 2]) >= 10:
            return Status(429)
        sent.append(now)
        return None

    server.behave(behave)
    output = job.succeed(timeout=120, max_retries=2)

    assert len(output.rows()) == 40
    assert output.failures() == []


def test_a_delay_in_the_body_is_kept(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")
    body = {"error": {"code": 429, "message": "Quota exceeded. Please retry in 2.5s."}}
    server.behave(lambda payload, n: raw(body, 429) if n == 1 and prompt_of(payload) == "a" else None)

    assert len(job.succeed(max_concurrent_generations=1).rows()) == 2

    first, second = server.requests[:2]
    assert second.time - first.time >= 2.4


def test_a_long_wait_is_shown_with_its_reason(job: Job, server: FakeServer) -> None:
    job.documents("a")
    words = "Rate limit reached for requests per day. Please try again in 4h."
    server.behave(lambda payload, n: Status(429, {"Retry-After": "14400"}, words))

    running = job.start(no_progress=None)
    record = job.output.state / "00000.stats.json"
    wait_until(lambda: record.exists() and "waiting" in json.loads(record.read_text())["rank"])
    waiting = json.loads(record.read_text())["rank"]["waiting"]
    report = job.sdg("status", "--output", job.output.path).stdout
    running.send(15)
    finished = running.finish()

    assert abs(waiting["until"] - time.time() - 14400) < 60
    assert words in waiting["reason"]
    assert "waiting   rank 0: nothing is sent until" in report
    assert words in report
    assert "nothing is sent to" in finished.stderr
    assert words in finished.stderr
    assert finished.rc == 143


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m0s", 360), ("20ms", 0.02), ("1m30.5s", 90.5), ("4h", 14_400), ("2 hours and 3 minutes", 7380), ("soon", 0)],
)
def test_durations_are_read_in_each_form(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


def test_waiting_times_are_read_from_headers_and_bodies() -> None:
    google = {"details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}]}
    assert retry_after({}, google) == 34
    assert retry_after({}, {"message": "You can retry this action in about 1 hour."}) == 3600
    assert retry_after({}, {"message": "We are retrying in vain."}) is None
    assert retry_after({"Retry-After": str(time.time() + 50)}) == pytest.approx(50, abs=5)
    exhausted = {"x-ratelimit-remaining-requests": "0"}
    in_ms = str(int((time.time() + 50) * 1000))
    assert quota_pause({**exhausted, "x-ratelimit-reset-requests": in_ms}) == pytest.approx(50, abs=5)
    assert quota_pause({**exhausted, "x-ratelimit-reset-requests": str(time.time() + 50)}) == pytest.approx(50, abs=5)
    assert quota_pause({**exhausted, "x-ratelimit-reset-requests": "12"}) == 12


@pytest.mark.parametrize(("status", "seconds"), [(429, 18_000), (498, 18_000), (502, 18_000), (400, None), (409, None)])
def test_a_refusal_that_quotes_the_document_does_not_ask_to_wait(status: int, seconds: float | None) -> None:
    body = json.dumps({"error": {"message": "flagged: 'Please try again in 5 hours'"}}).encode()
    assert refused(Reception(status, {}, body), status, "http://h", Secrets([])).retry_after == seconds


# ── The account ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": "this key was revoked"}}),
        (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}),
        (403, {"error": {"message": "your plan has ended"}}),
        (412, {"error": {"message": "the account is suspended"}}),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
        (200, {"error": {"message": "Insufficient credits", "code": 402}}),
    ],
)
def test_an_account_that_cannot_go_on_ends_the_run_and_fails_no_document(
    job: Job, server: FakeServer, status: int, body: dict[str, Any]
) -> None:
    job.input(documents(60))
    left = [20]

    def behave(payload: dict[str, Any], n: int) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return None
        return Status(status, message=body["error"]["message"]) if 401 <= status <= 412 else raw(body, status)

    server.behave(behave)
    finished = job(max_concurrent_generations=4)

    assert finished.rc == 1
    assert finished.says(body["error"]["message"])
    assert job.output.failures() == []

    left[0] = 1000
    assert len(job.succeed(max_concurrent_generations=4).rows()) == 60


@pytest.mark.parametrize("every", [True, False])
def test_refusals_in_a_row_with_the_same_words_end_the_run_if_nothing_is_answered(
    job: Job, server: FakeServer, every: bool
) -> None:
    job.input(documents(60))
    poor = Status(400, message="Your credit balance is too low")

    def behave(payload: dict[str, Any], n: int) -> Any:
        refused = (
            len(server.requests) > 10 if every else 10 < len(server.requests) <= 35 and prompt_of(payload) != PROBE
        )
        return poor if refused else None

    server.behave(behave)
    finished = job(max_concurrent_generations=1, max_failure_rate=1)

    assert finished.rc == every
    assert len(server.probes) == 1 + every  # the second one asks for a stream
    if every:
        assert finished.says("Your credit balance is too low", "even the smallest request is refused")
        server.behave(lambda payload, n: None)
        assert len(job.succeed(max_failure_rate=1).rows()) == 60 - 19


@pytest.mark.parametrize("status", [401, 402, 403, 404, 412])
def test_a_refusal_of_one_document_is_its_own(job: Job, server: FakeServer, status: int) -> None:
    job.documents("flagged")
    server.behave(lambda payload, n: Status(status, message="flagged") if prompt_of(payload) == "flagged" else None)

    assert job(max_failure_rate=0.1).rc == 3

    assert job.output.failed()["flagged"]["attempts"] == 1
    assert len(server.probes) == 1
    assert job.output.stats()["finish_reasons"] == {}


def test_a_long_run_stops_soon_when_all_goes_wrong(job: Job, server: FakeServer) -> None:
    job.input(documents(9000))
    job.options["plugin"] = job.plugin(
        "half",
        """
        import sdg

        @sdg.hookimpl
        def register_rollouts(register):
            register("half", half)

        async def half(document, generate):
            if document.index >= 6000:
                raise ValueError("no more")
            return document.text
        """,
    )

    finished = job(max_concurrent_documents=50, max_failure_rate=0.1)

    assert finished.rc == 3
    assert "of the last 1,000 documents failed" in finished.stderr
    assert 100 < job.output.stats()["failed"] < 700


def test_reasons_that_differ_in_numbers_are_one(job: Job, server: FakeServer) -> None:
    job.input(documents(30))
    server.behave(lambda payload, n: Status(400, message=f"request {hash(prompt_of(payload)) % 99999} is odd"))

    finished = job(max_failure_rate=1)

    assert "30 × 400 from" in finished.stdout


# ── Fewer completions than asked for ─────────────────────────────────────────────────────────────────────────────────

SAMPLES = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("samples", samples)

    async def samples(document, generate):
        reply = await generate(document.text, n=4)
        return [choice.text for choice in reply.choices]
"""


@pytest.mark.parametrize("seed", [None, 7])
def test_missing_completions_are_requested_one_by_one(job: Job, server: FakeServer, seed: int | None) -> None:
    job.options["plugin"] = job.plugin("samples", SAMPLES)
    job.documents("a", "b")
    texts: Counter[str] = Counter()

    def behave(payload: dict[str, Any], n: int) -> Any:
        texts[prompt_of(payload)] += 1
        return Answer(choices=[choice(f"{prompt_of(payload)} {texts[prompt_of(payload)]}")])

    server.behave(behave)
    finished = job(seed=seed)

    assert finished.rc == 0
    assert {name: len(texts) for name, texts in job.output.texts().items()} == {"a": 4, "b": 4}
    assert len({text for texts in job.output.texts().values() for text in texts}) == 8
    assert finished.stderr.count("completions: the others are requested one by one") == 1
    assert job.output.stats()["requests"] == 8
    if seed is not None:
        seeds = [request.payload["seed"] for request in server.requests if request.prompt == "a"]
        assert len(set(seeds)) == 4


def test_choices_are_never_empty(job: Job, server: FakeServer) -> None:
    job.options["plugin"] = job.plugin("samples", SAMPLES.replace(", n=4", ""))
    job.documents("a")
    assert [len(texts) for texts in job.succeed().texts().values()] == [1]


def test_merged_responses_have_all_choices_and_the_sum_of_tokens() -> None:
    one = {"choices": [choice("a")], "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
    content = json.loads(merged([json.dumps(one).encode()] * 3))
    assert [item["index"] for item in content["choices"]] == [0, 1, 2]
    assert content["usage"] == {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


# ── Before the run ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_with_a_model_named_the_list_of_models_is_a_hint(job: Job, server: FakeServer) -> None:
    server.models = ["llama3.2:latest", "llama3.2"]
    job.documents("a")
    server.listed = ["llama3.2:latest"]

    finished = job(model="llama3.2")

    assert finished.rc == 0
    assert "does not list --model llama3.2" in finished.stderr


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_list_of_models_that_is_refused_is_no_obstacle(job: Job, server: FakeServer, status: int) -> None:
    server.list_status = status
    job.documents("a")
    assert job.succeed(model="test-model").ids() == ["a"]


def test_a_model_that_the_server_does_not_know_ends_the_run_in_its_words(job: Job, server: FakeServer) -> None:
    job.input(documents(200))

    finished = job(model="other")

    assert finished.rc == 1
    assert "the model other does not exist" in finished.message
    assert job.output.failures() == []


@pytest.mark.parametrize("form", ["{root}/v1", "{root}", "{root}/v1/chat/completions", "{root}/v1/?api-version=1"])
@pytest.mark.parametrize("env", [False, True])
def test_a_base_url_may_have_each_form_wherever_it_comes_from(
    job: Job, server: FakeServer, form: str, env: bool
) -> None:
    job.documents("a")
    url = form.format(root=server.url.removesuffix("/v1"))
    options = {"base_url": None, "env": {"OPENAI_BASE_URL": url}} if env else {"base_url": url}

    assert job(**options, model="test-model").rc == 0

    assert [request.path for request in server.requests] == ["/v1/chat/completions"]


def test_a_query_of_the_base_url_is_kept() -> None:
    url = "https://x.example/openai/deployments/d?api-version=2"
    assert candidates_of(url)[0] == url
    assert address(url, "/chat/completions") == (
        "https://x.example/openai/deployments/d/chat/completions?api-version=2"
    )
    assert candidates_of("http://h:1/v1/completions?a=b") == ["http://h:1/v1?a=b"]
    assert root_of("http://h:1/v1") == "http://h:1"


def test_lists_of_models_are_read_in_each_form() -> None:
    assert models_in(b'{"data": [{"id": "m"}]}') == ["m"]
    assert models_in(b'[{"id": "m"}, {"id": "n"}]') == ["m", "n"]
    assert models_in(b'{"models": ["m"]}') == ["m"]
    assert models_in(b"<html>") is None
    assert models_in(b'{"data": null}') is None


@pytest.mark.usefixtures("each_client")
def test_a_redirect_is_named_and_not_followed(job: Job, server: FakeServer) -> None:
    job.documents("a")
    server.redirect = "https://elsewhere.example/v1"

    finished = job(model="test-model", env={"OPENAI_API_KEY": KEY})

    assert finished.rc == 1
    assert finished.says("redirected to https://elsewhere.example/v1", "--base-url")
    assert server.requests == []


def test_headers_come_from_the_environment_and_stay_secret(job: Job, server: FakeServer) -> None:
    job.documents("a", "b")

    def behave(payload: dict[str, Any], n: int) -> Any:
        return Status(400, message=f"your key is {KEY}") if prompt_of(payload) == "b" else None

    server.behave(behave)
    finished = job(header_env="api-key=AZURE_KEY", env={"AZURE_KEY": KEY}, max_failure_rate=1)

    assert finished.rc == 0
    assert {request.headers["api-key"] for request in server.requests} == {KEY}
    everything = finished.stdout + finished.stderr + (job.folder / "output/failed/00000_00000.jsonl").read_text()
    assert KEY not in everything
    assert "your key is ***" in everything
    assert job(header_env="api-key=NO_KEY").says("NO_KEY is not set")
    assert job(header_env="api-key").says("--header-env", "NAME=VARIABLE")
    assert job(header_env="api key=HOME").says("--header-env", "NAME=VARIABLE")
    assert job(header_env="content-length=HOME").says("--header-env", "cannot be set")


# ── Rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_requests_per_minute_are_never_exceeded(job: Job, server: FakeServer) -> None:
    job.input(documents(20))

    job.succeed(requests_per_minute=300)

    times = [request.time for request in server.requests]
    assert times[-1] - times[0] >= 19 * 0.2 - 0.1


def test_tokens_per_minute_hold_requests_back(job: Job, server: FakeServer) -> None:
    job.input([{"id": str(i), "text": "word " * 100 + str(i)} for i in range(20)])

    job.succeed(tokens_per_minute=60_000)

    times = [request.time for request in server.requests]
    assert times[-1] - times[0] >= 1.5  # 20 requests of 100 tokens and more at 1,000 a second


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

ODD = {
    "nan": b'{"choices": [{"message": {"content": "fine"}, "logprobs": {"x": NaN}}]}',
    "infinity": b'{"choices": [{"message": {"content": "fine"}, "logprobs": {"x": -Infinity}}]}',
    "surrogate": b'{"choices": [{"message": {"content": "fine", "reasoning": "\\ud83d"}}]}',
    "bom": b'\xef\xbb\xbf{"choices": [{"message": {"content": "fine"}}]}',
    "integer": b'{"choices": [{"message": {"content": "fine"}, "logprobs": {"x": NaN, "y": 184467440737095516160}}]}',
    "utf16": '{"choices": [{"message": {"content": "fine"}}]}'.encode("utf-16"),
}


def test_json_is_read_as_servers_write_it(job: Job, server: FakeServer) -> None:
    job.documents(*ODD)
    server.behave(lambda payload, n: Raw(ODD[prompt_of(payload)]))

    finished = job()

    assert finished.rc == 0
    assert job.output.texts() == {name: ["fine"] for name in ODD}
    assert f"by finish_reason: {len(ODD)} without one" in finished.stdout


@given(st.recursive(st.none() | st.floats() | st.text() | st.integers(-(2**53), 2**53), st.lists, max_leaves=8))
def test_whatever_python_writes_as_json_is_read(value: Any) -> None:
    text = json.dumps({"value": value})
    parsed, body = read_json(text.encode())
    assert json.loads(body) == parsed


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_what_is_nested_too_deeply_is_no_completion_and_has_no_message(depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    assert error_text(b'{"error": %b}' % deep)
    with pytest.raises((ValueError, sdg.RequestFailed)):
        parse_reply(read_json(deep)[0])
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(deep.replace(b"[]", b"[NaN]"))


def test_a_page_is_shown_by_its_title() -> None:
    page = b"<!DOCTYPE html><html><head><title>502 Bad\n Gateway</title></head><body>" + b"x" * 5000 + b"</body></html>"
    assert error_text(page) == "502 Bad Gateway"
    assert error_text(b'[{"error": {"message": "in a list"}}]') == "in a list"
    assert error_text(b'{"detail": [{"msg": "field required"}]}') == '[{"msg":"field required"}]'


@given(st.text('abcdefghijklmnopqrstuvwxyz0123456789+/=-_"\\ é', min_size=12, max_size=40), st.text(), st.text())
def test_a_key_is_hidden_in_each_form(key: str, before: str, after: str) -> None:
    secrets = Secrets([])
    secrets._forms = sorted(set(forms_of(key)), key=len, reverse=True)
    for form in forms_of(key):
        assert form not in secrets.hidden(before.encode() + form + after.encode()).replace(b"***", b"\0")


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("each_client")
def test_a_stream_gives_the_same_rows_and_tokens(job: Job, server: FakeServer) -> None:
    job.input(documents(10))
    server.behave(lambda payload, n: f"It says: {prompt_of(payload)}.")
    at_once = job.succeed(output="at_once")
    server.forget()

    streamed = job.succeed(output="streamed", stream=True)

    assert all(request.payload["stream"] for request in server.requests)
    assert streamed.table().equals(at_once.table())
    for name in ("prompt_tokens", "completion_tokens"):
        assert streamed.stats()[name] == at_once.stats()[name]


@pytest.mark.usefixtures("each_client")
def test_a_server_that_only_streams_is_used_by_streaming(job: Job, server: FakeServer) -> None:
    job.input(documents(10))
    server.only_streams = True

    finished = job()

    assert finished.rc == 0
    assert len(job.output.rows()) == 10
    assert "--stream is on" in finished.stderr


@pytest.mark.usefixtures("each_client")
def test_a_stream_that_breaks_off_is_requested_again(job: Job, server: FakeServer) -> None:
    job.documents("a")
    server.break_streams = 2

    output = job.succeed(stream=True)

    assert len(output.rows()) == 1
    assert output.stats()["retries"] == {"connection": 2}


@pytest.mark.usefixtures("each_client")
def test_a_stream_that_stalls_times_out_between_two_tokens(job: Job, server: FakeServer) -> None:
    job.documents("a")
    server.stall_streams = 1

    output = job.succeed(stream=True, request_timeout=1)

    assert output.stats()["retries"] == {"timeout": 1}


@given(st.data())
def test_a_stream_may_be_cut_into_pieces_anywhere(data: st.DataObject) -> None:
    parts: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Ĩt "}}]},
        {"choices": [{"index": 1, "delta": {"content": "second", "reasoning_content": "hm"}}]},
        {"choices": [{"index": 0, "delta": {"content": "rains."}, "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3}},
    ]
    stream = b": comment\n\n" + b"".join(b"data: " + json.dumps(p).encode() + b"\r\n\r\n" for p in parts)
    stream += b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    assembly = Assembly()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        assembly.feed(stream[start:end])
    reply = parse_reply(json.loads(assembly.body()))
    assert assembly.complete
    assert [each.text for each in reply.choices] == ["Ĩt rains.", "second"]
    assert [each.finish_reason for each in reply.choices] == ["stop", "length"]
    assert reply.usage == {"prompt_tokens": 3}
    assert reply.choices[1].reasoning == "hm"


def assembled(*parts: dict[str, Any]) -> Assembly:
    """What a stream of events amounts to."""
    assembly = Assembly()
    assembly.feed(b"".join(b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts) + b"data: [DONE]\n\n")
    return assembly


def delta(content: Any, reason: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    """An event of a stream."""
    return {"choices": [{"index": index, "delta": {"content": content}, "finish_reason": reason, **more}]}


@pytest.mark.parametrize("reason", [None, "stop"])
@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "EngineCore died", "code": 500}},
        {"object": "error", "message": "EngineCore died", "code": "x"},
        {"message": "EngineCore died", "code": 500},
    ],
)
def test_an_error_ends_a_stream_and_breaks_the_completion_off(error: dict[str, Any], reason: str | None) -> None:
    assembly = assembled(delta("half of it", reason), error)
    assert assembly.complete
    with pytest.raises(sdg.RequestFailed, match="EngineCore died") as caught:
        parse_reply(json.loads(assembly.body()))
    assert (caught.value.cause, caught.value.retry) == ("aborted", True)


def test_a_stream_without_a_reason_for_each_completion_is_incomplete() -> None:
    assert not assembled(delta("half")).complete
    assert not assembled(delta("whole", "stop"), delta("half", index=1)).complete
    assert assembled(delta("whole", "stop"), delta("whole", "stop", index=1)).complete


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "reasoning", "text": "So."}]
PARTS += [{"type": "text", "text": "It "}, {"text": "rains"}, {"type": "output_text", "text": "."}]


def test_parts_of_a_message_are_text_or_reasoning() -> None:
    at_once = {"choices": [choice(PARTS)]}  # type: ignore[arg-type]
    streamed = assembled(delta(PARTS[:3]), delta("rains"), delta(PARTS[4:], "stop"))
    for content in (at_once, json.loads(streamed.body())):
        reply = parse_reply(content)
        assert (reply.text, reply.reasoning, reply.finish_reason) == ("It rains.", "Hm.So.", "stop")


def test_a_stream_may_repeat_the_whole_message_at_its_end() -> None:
    repeated = {**delta("", "stop")["choices"][0], "delta": {}, "message": {"content": "It rains."}}
    stream = assembled(delta("It "), delta("rains."), {"choices": [repeated]})
    assert parse_reply(json.loads(stream.body())).text == "It rains."


def test_events_of_a_stream_are_read_as_servers_write_json() -> None:
    stream = assembled(delta("It rains.", "stop", logprobs={"content": [{"logprob": float("-inf")}]}))
    assert parse_reply(json.loads(stream.body())).text == "It rains."


def test_tool_calls_of_a_stream_are_put_together() -> None:
    assembly = Assembly()
    for function in ({"name": "f", "arguments": ""}, {"arguments": '{"a"'}, {"arguments": ": 1}"}):
        call = {"index": 0, "id": "c1", "function": function}
        assembly.feed(b"data: " + json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]}).encode() + b"\n\n")
    content = json.loads(assembly.body())
    (made,) = content["choices"][0]["message"]["tool_calls"]
    assert (made["id"], made["function"]) == ("c1", {"name": "f", "arguments": '{"a": 1}'})


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_totals_beside_series_of_priorities_count_once() -> None:
    page = """
sglang:num_running_reqs{model_name="m",tp_rank="0"} 5.0
sglang:num_running_reqs{model_name="m",tp_rank="0",priority="1"} 3.0
sglang:num_running_reqs{model_name="m",tp_rank="0",priority="2"} 2.0
sglang:num_queue_reqs{model_name="m"} 1.0
"""
    load = parse_load(page)
    assert load is not None
    assert (load.running, load.waiting) == (5, 1)


def test_only_requests_that_wait_for_capacity_are_a_queue() -> None:
    page = """
vllm:num_requests_running{engine="0"} 5.0
vllm:num_requests_waiting{engine="0"} 9.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="deferred"} 7.0
"""
    load = parse_load(page)
    assert load is not None
    assert load.waiting == 2


def test_what_servers_found_in_their_prefix_caches_is_counted(job: Job, server: FakeServer) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 75}}
    message = {"role": "assistant", "content": "fine"}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    server.behave(lambda payload, n: Raw(json.dumps(body).encode()))
    job.documents("one", "two")

    finished = job()

    assert finished.rc == 0
    assert job.output_of().stats()["cached_tokens"] == 150
    assert "reused  75% of the prompt tokens" in finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "names",
    [
        "vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:num_requests_"
        "running vllm:num_requests_waiting",
        "sglang:prompt_tokens_total sglang:cached_tokens_total sglang:num_running_reqs sglang:num_queue_reqs",
    ],
)
def test_the_prefix_cache_of_a_server_is_in_its_metrics(names: str) -> None:
    load = parse_load("".join(f'{name}{{engine="0"}} {number}.0\n' for number, name in enumerate(names.split())))
    assert load is not None
    assert (load.sought, load.hits) == (0, 1)


@pytest.mark.parametrize("status", [200, 400, 401, 500])
def test_a_key_that_a_server_echoes_is_written_nowhere(job: Job, server: FakeServer, status: int) -> None:
    job.documents("one", "two")
    text = f"{'x' * 285} bad key {KEY}"
    body = json.dumps({"error": {"message": text}}).encode()
    server.behave(lambda payload, n: Raw(body) if status == 200 else Status(status, message=text))
    finished = job(env={"OPENAI_API_KEY": KEY}, max_retries=0)
    written = finished.stdout + finished.stderr
    written += "".join(path.read_bytes().decode("latin1") for path in job.output.path.rglob("*") if path.is_file())
    assert KEY[:8] not in written


@pytest.mark.parametrize("tokens", [2**64 - 1, 2**62, -5, True, None, "7", {}])
def test_absurd_token_counts_are_ignored(job: Job, server: FakeServer, tokens: object) -> None:
    job.input(documents(5))
    body = {"choices": [{"message": {"content": "fine"}}], "usage": {"prompt_tokens": tokens, "completion_tokens": 1}}
    server.behave(lambda payload, n: Raw(json.dumps(body).encode()))
    output = job.succeed()
    assert output.stats()["completion_tokens"] == 5
    assert output.stats()["prompt_tokens"] in {0, 5}


@pytest.mark.parametrize("form", ["slash", "unicode", "reason"])
def test_a_key_that_comes_back_in_another_form_is_written_nowhere(job: Job, server: FakeServer, form: str) -> None:
    key = "sk-se/cret-0123456789abcdef"
    job.input(documents(3))
    written = {"slash": key.replace("/", "\\/"), "unicode": "".join(f"\\u{ord(c):04x}" for c in key), "reason": key}[
        form
    ]
    server.behave(lambda payload, n: Raw(f'{{"error": {{"message": "bad key {written}"}}}}'.encode(), 400))

    finished = job(env={"OPENAI_API_KEY": key}, api_key_env="OPENAI_API_KEY")

    everything = finished.stdout + finished.stderr + json.dumps(job.output.failures())
    assert "bad key ***" in everything
    assert key not in everything


def test_an_error_with_half_a_character_is_retried(job: Job, server: FakeServer) -> None:
    job.input(documents(2))
    body = rb'{"error": {"message": "bad \ud800 x"}}'
    server.behave(lambda payload, n: Raw(body, 503) if n == 1 else None)
    assert len(job.succeed().rows()) == 2
