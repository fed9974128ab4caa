"""Documents that exceed the model's context: cut, split or failed, by the tokens of a real tokenizer."""

from __future__ import annotations

import asyncio
import collections
import http.server
import json
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import tiny_tokenizer
from fake_server import FakeServer, Hang, Raw, Status, prompt_of
from hypothesis import assume, given, settings, strategies as st
from replaying import answers_in
from running import Job, wait_until

import sdg
from sdg_plugins.resources.tokenizer import Tokenizer
from sdg_plugins.servers.responses import parse_reply
from sdg_plugins.truncation import counting, cutting, fitting, model_files

BEFORE, AFTER = "Summarise the text between the lines.\n-----\n", "\n-----\nUse five words, and no quotes."
SANDWICH = f"""
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("sandwich", sandwich)

    async def sandwich(document, generate):
        return await generate({BEFORE!r} + document.text + {AFTER!r})
"""
CONTEXT, ANSWER = 512, 64


def prose(words: int) -> str:
    """Sentences of eight words, numbered, in paragraphs of five."""
    sentences = [f"This is sentence number {number} of the text." for number in range(words // 8)]
    return "\n\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))


@pytest.fixture
def long(job: Job, server: FakeServer) -> Job:
    """A job with instructions on both sides of the document, a server that counts, and a context of 512 tokens."""
    server.count, server.max_model_len, server.context = tiny_tokenizer.count, CONTEXT, CONTEXT
    job.options |= {"plugin": job.plugin("sandwich", SANDWICH), "max_tokens": ANSWER}
    return job


# ── Any text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class WithoutOffsets(counting.LocalCounter):
    """Counts as a server does, without the positions of tokens."""

    async def guess(self, text: str, tokens: int) -> int | None:
        return None


class Recorder:
    """Takes the place of the client, and records what would be sent."""

    def __init__(self) -> None:
        self.pool = SimpleNamespace(upstreams=[])
        self.counts: collections.Counter[str] = collections.Counter()
        self.sent: list[dict[str, Any]] = []

    async def send(self, request: sdg.Request) -> sdg.Response:
        self.sent.append(request.payload)
        answer = orjson.dumps({"choices": [{"message": {"content": "fine"}}]})
        return sdg.Response(self.parse(answer), answer)

    @staticmethod
    def parse(body: bytes) -> sdg.Reply:
        return parse_reply(orjson.loads(body))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer.save(tmp_path_factory.mktemp("tokenizer") / "model")


Counters = dict[str, counting.TokenCounter]


@pytest.fixture(scope="module")
def counters(model: Path) -> Counters:
    """All ways of counting except the server's."""
    files = {name: model / name for name in model_files.FILES[:2]}
    return {
        "offsets": counting.LocalCounter(files),
        "counts": WithoutOffsets(files),
        "no template": counting.LocalCounter({model_files.FILES[0]: files[model_files.FILES[0]]}),
        "estimate": counting.Estimate(),
    }


def fitter(counter: counting.TokenCounter, limit: int, mode: str = "truncate") -> tuple[fitting.Fitter, Recorder]:
    recorder = Recorder()
    options = SimpleNamespace(long_documents=mode, model_max_context=limit, model="m")
    made = fitting.Fitter(SimpleNamespace(options=options, model="m", client=recorder), recorder.send)
    made.tokens._counter = counter
    return made, recorder


def document_of(text: str, messages: list[dict[str, Any]] | None = None) -> sdg.Document:
    return sdg.Document("d", text, messages, 0, dict)


def post(
    counter: counting.TokenCounter, limit: int, document: sdg.Document, payload: dict[str, Any]
) -> tuple[sdg.Reply | str, dict[str, Any]]:
    """The reply or the reason for the failure, and what was sent."""
    made, recorder = fitter(counter, limit)
    rollout = SimpleNamespace(document=document, room=None)
    try:
        reply, _ = asyncio.run(made.send(sdg.Request("/chat/completions", payload, rollout)))
    except sdg.RequestFailed as exc:
        return f"{exc.cause}: {exc}", {"sent": recorder.sent}
    return reply, recorder.sent[0]


PIECES = [
    *(
        "word",
        " ",
        "\n\n",
        "\x00",
        "\x1b[31m",
        "\r\n",
        "👩‍👩‍👧‍👦",
        "é",
        "e\u0301",
        "\u0344",
        "\U0001d160",
        "漢字。",
        "a" * 300,
        " " * 200,
    ),
    *(
        "<|im_end|>",
        "<|im_start|>system\nYou are",
        "Dr. No said: “Yes.” Then he left.\n",
        "שלום",
        "०१२३",
        "\ufeff",
        "\u2028",
        "...",
        "-" * 80,
    ),
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=20)), min_size=1, max_size=12).map("".join)
documents_of_any_kind = st.tuples(texts, st.integers(1, 60)).map(lambda made: made[0] * made[1])


@settings(max_examples=150, deadline=None)
@given(text=documents_of_any_kind, before=texts, after=texts, limit=st.integers(150, 700), data=st.data())
def test_a_prompt_of_any_text_fits_and_its_instructions_are_whole(
    counters: Counters, text: str, before: str, after: str, limit: int, data: st.DataObject
) -> None:
    counter = counters[data.draw(st.sampled_from(["offsets", "counts", "no template"]))]
    assume(text.strip() not in before and text.strip() not in after)  # the document could not be found
    before, after = f"{before}\n<text>\n", f"\n</text>\n{after}"
    payload = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": before + text + after}]}

    reply, sent = post(counter, limit, document_of(text), payload)

    budget = limit - 50
    if isinstance(reply, str):
        assert reply.startswith("context")
        assert not sent["sent"]
        empty = {"messages": [{"role": "user", "content": before + after}]}
        template = 0 if counter is not counters["no template"] else fitting.allowance(payload, limit)
        assert tiny_tokenizer.count(empty) + template + 200 > budget, reply
        return
    content = sent["messages"][0]["content"]
    assert content.startswith(before)
    assert content.endswith(after)
    if len(text.strip()) < cutting.SHORTEST:
        assert content == before + text + after
        return
    assert text.strip().startswith(content[len(before) : len(content) - len(after)].strip())
    assert tiny_tokenizer.count(sent) <= budget
    assert reply.truncated == (content != before + text + after)
    if counter is not counters["no template"]:
        assert reply.truncated == (tiny_tokenizer.count(payload) > budget)


turns = st.tuples(st.sampled_from(["user", "assistant", "system"]), documents_of_any_kind)


@settings(max_examples=100, deadline=None)
@given(
    chat=st.lists(turns, min_size=1, max_size=4),
    limit=st.integers(200, 900),
    way=st.sampled_from(["offsets", "counts"]),
)
def test_a_chat_fits_and_only_the_user_is_cut(
    counters: Counters, chat: list[tuple[str, str]], limit: int, way: str
) -> None:
    messages = [{"role": role, "content": text} for role, text in chat]
    payload = {"model": "m", "max_tokens": 50, "messages": [{"role": "system", "content": "Be brief."}, *messages]}

    reply, sent = post(counters[way], limit, document_of("", messages), payload)

    if isinstance(reply, str):
        assert reply.startswith("context")
        return
    assert sent["messages"][0] == payload["messages"][0]
    for was, is_ in zip(messages, sent["messages"][1:], strict=True):
        if was["role"] == "user":
            assert was["content"].strip().startswith(is_["content"].strip())
        else:
            assert was == is_
    if any(role == "user" and len(text.strip()) >= cutting.SHORTEST for role, text in chat):
        assert tiny_tokenizer.count(sent) <= limit - 50
    else:
        assert sent == payload


@settings(max_examples=100, deadline=None)
@given(text=documents_of_any_kind, tokens=st.integers(32, 300), data=st.data())
def test_parts_of_any_text_fit_and_joined_they_are_the_text(
    counters: Counters, text: str, tokens: int, data: st.DataObject
) -> None:
    counter = counters[data.draw(st.sampled_from(["offsets", "counts"]))]
    tokenizer = Tokenizer(fitter(counter, 512)[0])

    parts = asyncio.run(tokenizer.split(text, tokens))

    assert "".join(parts) == text
    assert all(asyncio.run(counter.count(part)) <= tokens for part in parts)


@settings(max_examples=100, deadline=None)
@given(text=documents_of_any_kind, tokens=st.integers(1, 300), data=st.data())
def test_a_rollout_can_cut_any_text_by_itself(counters: Counters, text: str, tokens: int, data: st.DataObject) -> None:
    counter = counters[data.draw(st.sampled_from(["offsets", "counts", "estimate"]))]
    tokenizer = Tokenizer(fitter(counter, 512)[0])

    cut = asyncio.run(tokenizer.cut(text, tokens))

    assert text.startswith(cut)
    assert asyncio.run(tokenizer.count(cut)) <= tokens


@settings(max_examples=200, deadline=None)
@given(text=documents_of_any_kind, budget=st.integers(1, 3000))
def test_what_surely_fits_also_fits_when_normalized(text: str, budget: int) -> None:
    tokens = max(tiny_tokenizer.count({"prompt": form}) for form in (text, unicodedata.normalize("NFC", text)))

    fits = fitting.surely_fits(orjson.dumps({"prompt": text}), budget, tools=False)

    assert tokens <= budget or not fits


@pytest.mark.parametrize("way", ["offsets", "counts"])
def test_prose_is_cut_at_the_end_of_a_sentence_and_fills_the_context(counters: Counters, way: str) -> None:
    text = prose(4000)
    payload = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": BEFORE + text + AFTER}]}

    reply, sent = post(counters[way], 2048, document_of(text), payload)

    assert isinstance(reply, sdg.Reply)
    assert reply.truncated
    kept = sent["messages"][0]["content"].removeprefix(BEFORE).removesuffix(AFTER)
    assert kept.endswith(" of the text.")
    assert 0.95 * 1948 < tiny_tokenizer.count(sent) <= 1948


@pytest.mark.parametrize("way", ["offsets", "counts", "no template", "estimate"])
@pytest.mark.parametrize("words", [1500, 9000])
def test_where_a_document_is_cut_depends_on_no_other_document(counters: Counters, way: str, words: int) -> None:
    made, recorder = fitter(counters[way], 2048)

    async def cut(text: str) -> dict[str, Any]:
        document, payload = document_of(text), {"messages": [{"role": "user", "content": BEFORE + text + AFTER}]}
        rollout = SimpleNamespace(document=document, room=None)
        await made.send(sdg.Request("/chat/completions", payload, rollout, b"x" * 9000))
        return recorder.sent[-1]

    async def before_and_after(text: str, others: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        before = await cut(text)
        for other in others:
            await cut(other)
        return before, await cut(text)

    text = " ".join(f"number {number}" for number in range(words // 2))
    before, after = asyncio.run(before_and_after(text, ["漢字。" * 3000, "word " * 5000] * 5))

    assert before == after


# ── Whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_document_is_cut_to_fit_by_the_servers_tokens(long: Job, server: FakeServer) -> None:
    long.input([{"id": "long", "text": prose(4000)}, {"id": "short", "text": "A short text."}])

    finished = long()

    assert finished.rc == 0, finished
    results = {row["id"]: row["rollout_results"][0] for row in long.output.rows()}
    assert {name: result["truncated"] for name, result in results.items()} == {"long": True, "short": False}
    (sent,) = [request for request in server.requests if "sentence" in request.prompt]
    assert 0.9 * (CONTEXT - ANSWER) < tiny_tokenizer.count(sent.payload) <= CONTEXT - ANSWER
    assert sent.prompt.startswith(BEFORE)
    assert sent.prompt.endswith(" of the text." + AFTER)
    assert long.output.stats()["truncated"] == 1
    assert "1 document did not fit" in finished.stdout
    assert "512 tokens" in finished.stderr
    assert "/tokenize" in finished.stderr
    assert "| Truncated to the model's context | 1 |" in (long.output.path / "README.md").read_text()
    assert long.verify().rc == 0


def test_short_documents_need_no_tokenizer(long: Job, server: FakeServer) -> None:
    long.input([{"id": str(number), "text": f"Text {number}."} for number in range(20)])

    output = long.succeed()

    assert len(output.rows()) == 20
    assert server.tokenize_requests == []
    assert output.stats()["truncated"] == 0


def test_a_document_that_just_fits_is_not_cut(long: Job, server: FakeServer) -> None:
    text = prose(240)
    payload = {"messages": [{"role": "user", "content": BEFORE + text + AFTER}]}
    server.max_model_len = server.context = tiny_tokenizer.count(payload) + ANSWER
    long.documents(text, text + " One.")

    output = long.succeed()

    assert [row["rollout_results"][0]["truncated"] for row in output.rows()] == [False, True]


def test_the_models_own_files_count_where_the_server_does_not(long: Job, server: FakeServer, model: Path) -> None:
    server.models = [str(model)]
    server.behave(lambda payload, n: Status(400) if tiny_tokenizer.count(payload) > CONTEXT - ANSWER else None)
    server.count = None
    long.documents(prose(4000))

    finished = long()

    assert finished.rc == 0, finished
    assert long.output.rows()[0]["rollout_results"][0]["truncated"]
    assert tiny_tokenizer.count(server.requests[0].payload) > 0.9 * (CONTEXT - ANSWER)
    assert "tokenizer.json" in finished.stderr


class ModelHub(http.server.BaseHTTPRequestHandler):
    """A Hub with one model, whose files it serves."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        name = self.path.rpartition("/")[2]
        paths = sorted(self.folder.iterdir())
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name} for path in paths
            ]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/"):
            body = json.dumps({"id": "tiny/model", "sha": "1" * 40}).encode()
        else:
            body = (self.folder / name).read_bytes()
        self.send_response(200)
        for header in (("ETag", f'"{name}"'), ("X-Repo-Commit", "1" * 40), ("Content-Length", str(len(body)))):
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def model_hub(model: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of a Hub with one model, and the requests that it has received."""
    handler = type("Handler", (ModelHub,), {"folder": model, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{hub.server_port}", handler.asked
        hub.shutdown()


def test_a_models_files_come_from_the_hub_and_then_from_its_cache(
    long: Job, server: FakeServer, model_hub: tuple[str, list[str]]
) -> None:
    url, asked = model_hub
    server.models, server.count = ["tiny/model"], None
    server.behave(lambda payload, n: Status(400) if tiny_tokenizer.count(payload) > CONTEXT - ANSWER else None)
    long.env = {"HF_HOME": str(long.folder / "hf"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    long.documents(prose(4000))

    first = long.succeed(output="first")
    assert {request.rpartition("/")[2] for request in asked} >= {"tokenizer.json", "tokenizer_config.json"}
    asked.clear()
    second = long.succeed(output="second")

    assert asked == []
    assert first.rows() == second.rows()
    assert first.rows()[0]["rollout_results"][0]["truncated"]
    assert [tiny_tokenizer.count(request.payload) > 0.9 * (CONTEXT - ANSWER) for request in server.requests] == [
        True
    ] * 2


def test_room_is_left_for_the_template_of_a_server_that_counts_only_texts(long: Job, server: FakeServer) -> None:
    server.context = None
    server.count = lambda payload: tiny_tokenizer.count(payload) if "prompt" in payload else None
    long.documents(prose(4000))

    finished = long()

    assert long.output.rows()[0]["rollout_results"][0]["truncated"]
    assert "/tokenize" in finished.stderr
    allowed = fitting.allowance(server.requests[0].payload, CONTEXT)
    assert CONTEXT - ANSWER - 2 * allowed < tiny_tokenizer.count(server.requests[0].payload) <= CONTEXT - ANSWER


def test_without_any_tokenizer_tokens_are_estimated_and_that_is_reported(long: Job, server: FakeServer) -> None:
    server.behave(lambda payload, n: Status(400) if tiny_tokenizer.count(payload) > CONTEXT - ANSWER else None)
    server.count = None
    long.documents(prose(4000))

    finished = long()

    assert long.output.rows()[0]["rollout_results"][0]["truncated"]
    assert "estimated" in finished.stderr
    assert len(server.requests) == 1


IMPATIENT = """
    import asyncio
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("impatient", impatient)

    async def impatient(document, generate):
        try:
            async with asyncio.timeout(0.5):
                return await generate(document.text)
        except TimeoutError:
            return await generate(document.text)
"""


def test_a_tokenizer_is_not_lost_when_the_first_caller_gives_up(long: Job, server: FakeServer) -> None:
    def count(payload: dict[str, Any]) -> int:
        time.sleep(1.5 if len(server.tokenize_requests) == 1 else 0)
        return tiny_tokenizer.count(payload)

    server.count = count
    long.documents(prose(2000))

    finished = long(plugin=long.plugin("impatient", IMPATIENT))

    assert "/tokenize" in finished.stderr
    assert "estimate" not in finished.stderr
    assert 0.9 * (CONTEXT - ANSWER) < tiny_tokenizer.count(server.requests[0].payload) <= CONTEXT - ANSWER


def test_a_tokenizer_that_fails_in_the_middle_is_replaced(long: Job, server: FakeServer) -> None:
    server.count = lambda payload: tiny_tokenizer.count(payload) if len(server.tokenize_requests) < 3 else "broken"
    server.context = None
    long.documents(prose(4000), prose(3000))

    finished = long()

    assert [row["rollout_results"][0]["truncated"] for row in long.output.rows()] == [True, True]
    assert "no longer works" in finished.stderr
    assert all(tiny_tokenizer.count(request.payload) <= CONTEXT - ANSWER for request in server.requests)


@pytest.mark.parametrize("stated", [None, 100_000])
def test_a_context_that_only_a_refusal_states_is_learned_from_it(
    long: Job, server: FakeServer, stated: int | None
) -> None:
    server.max_model_len = None
    long.documents(*[f"{number} {prose(4000)}" for number in range(4)])

    output = long.succeed(model_max_context=stated, max_concurrent_documents=1)

    assert all(row["rollout_results"][0]["truncated"] for row in output.rows())
    assert len(server.requests) == 5  # one that was refused
    stats = output.stats()
    assert (stats["retries"], stats["given_up"], stats["truncated"]) == ({"context": 1}, {}, 4)


@pytest.mark.parametrize(
    "body",
    [
        {
            "object": "error",
            "message": "The input (15010 tokens) is longer than the model's context length (512 tokens).",
        },
        {"error": {"code": "context_length_exceeded", "message": "Too long."}},
        {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 5000, "n_ctx": 512, "code": 400}},
        {
            "error": {
                "message": "max_tokens is too large: 64. This model's maximum context length is 512 tokens and your "
                "request has 9000 input tokens (64 > 512 - 9000)."
            }
        },
        {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 512. Given: 9000 and 64"},
        {"error": {"code": "context_length_exceeded", "message": "9000 tokens are too many: take 512."}},
        {"error": {"message": "The decoder prompt (length 9000) is longer than the maximum model length of 512."}},
        {"error": "Bad Request", "message": "The context window of 512 tokens is exceeded.", "code": 400},
    ],
)
def test_the_refusals_of_other_servers_are_understood(long: Job, server: FakeServer, body: dict[str, Any]) -> None:
    server.max_model_len = server.context = None
    long.documents(prose(4000))
    server.behave(lambda payload, n: Raw(orjson.dumps(body), 400) if tiny_tokenizer.count(payload) > 448 else None)

    output = long.succeed()

    assert output.rows()[0]["rollout_results"][0]["truncated"]
    assert 150 < tiny_tokenizer.count(server.requests[-1].payload) <= 448
    assert len(server.requests) <= 6


@pytest.mark.parametrize("message", ["no such field", "temperature must be below 2", "at most 99999 images", "400"])
def test_another_refusal_is_not_taken_for_a_context(long: Job, server: FakeServer, message: str) -> None:
    server.max_model_len = server.context = None
    long.documents(prose(4000))
    server.behave(lambda payload, n: Status(400, message=message))

    output = long.succeed()

    assert len(server.requests) == 1
    assert message in output.failures()[0]["error"]


HTML = b"<html><style>body{font-weight:400}</style><h1>413 Request Entity Too Large</h1> context length 300</html>"


@pytest.mark.parametrize(
    "refusal",
    [
        Raw(HTML, 413),
        Status(400, message="Blocked by the content policy, rule 130"),
        Status(422, message="bad input: " + "3" * 5000),
        Status(422, message="bad input: a context length of " + "3" * 5000),
        Raw(orjson.dumps({"error": {"message": "blocked", "input": "the context length is 130 tokens"}}), 400),
        Raw(orjson.dumps({"error": {"message": "it exceeds the context length", "rule": 130}}), 400),
        Raw(orjson.dumps({"detail": [{"msg": "blocked", "input": "the context length is 130 tokens"}]}), 422),
    ],
)
def test_numbers_in_one_documents_refusal_cut_no_document(long: Job, server: FakeServer, refusal: Status | Raw) -> None:
    server.max_model_len = server.context = None
    long.documents(f"bad {prose(1600)}", prose(1600))
    server.behave(lambda payload, n: refusal if "bad" in prompt_of(payload) else None)

    output = long.succeed(max_concurrent_documents=1)

    (failure,) = output.failures()
    assert str(refusal.status) in failure["error"]
    assert [row["rollout_results"][0]["truncated"] for row in output.rows()] == [False]
    assert len(server.requests) <= 2 + fitting.ATTEMPTS  # a refusal in unknown words is tried with half of the document


def test_a_refusal_that_quotes_a_document_about_contexts_is_not_taken_for_one(long: Job, server: FakeServer) -> None:
    server.max_model_len = server.context = None
    long.documents(f"bad: the maximum context length is 300 tokens. {prose(1600)}")
    server.behave(lambda payload, n: Status(400, message=f"I do not like {prompt_of(payload)[:200]}"))

    output = long.succeed()

    assert "I do not like" in output.failures()[0]["error"]
    assert len(server.requests) == 1


def test_a_number_that_is_not_called_the_context_is_tried_and_not_learned(long: Job, server: FakeServer) -> None:
    server.max_model_len = server.context = None
    error = {"code": "context_length_exceeded", "message": "Too long, says rule 300."}
    long.documents(f"bad {prose(1600)}", prose(1600))
    server.behave(
        lambda payload, n: (
            Raw(orjson.dumps({"error": error}), 400)
            if "bad" in prompt_of(payload) and tiny_tokenizer.count(payload) > 448
            else None
        )
    )

    output = long.succeed(max_concurrent_documents=1)

    assert [row["rollout_results"][0]["truncated"] for row in output.rows()] == [True, False]


@pytest.mark.parametrize("how", ["truncate", "split"])
def test_a_document_of_which_almost_nothing_would_be_left_fails(long: Job, server: FakeServer, how: str) -> None:
    empty = tiny_tokenizer.count({"messages": [{"role": "user", "content": BEFORE + AFTER}]})
    server.max_model_len = server.context = empty + ANSWER + fitting.SMALLEST_PART
    long.documents(prose(800))

    output = long.succeed(long_documents=how)

    (failure,) = output.failures()
    assert f"{empty} tokens without the document" in failure["error"]
    assert f"of a context of {server.context}" in failure["error"]
    assert server.requests == []


@settings(max_examples=300, deadline=None)
@given(one=st.text("ab", max_size=30), other=st.text("ab", max_size=30), data=st.data())
def test_what_two_texts_have_in_common_around_two_positions(one: str, other: str, data: st.DataObject) -> None:
    here, there = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
    most = data.draw(st.integers(0, here))

    after = cutting.common_prefix(one, here, other, there)
    before = cutting.common_suffix(one, here, other, there, most)

    assert one[here:].startswith(other[there : there + after])
    assert one[here:][after : after + 1] != other[there:][after : after + 1] or after == len(one) - here
    assert before <= most
    assert one[here - before : here] == other[there - before : there]
    further = before + 1
    assert further > min(most, there) or one[here - further] != other[there - further]


def test_the_smaller_of_two_contexts_counts(long: Job, server: FakeServer, servers: Callable[[], FakeServer]) -> None:
    other = servers()
    other.count, other.max_model_len = server.count, 200
    long.documents(prose(4000))

    long.succeed(model_max_context=300, output="smaller")
    long.succeed(model_max_context=3000, output="larger")

    sizes = [tiny_tokenizer.count(request.payload) for request in server.requests]
    assert len(sizes) == 2
    assert sizes[0] <= 300 - ANSWER < sizes[1] <= CONTEXT - ANSWER

    long.succeed(base_url=[server.url, other.url], output="two servers")

    (request,) = [*server.requests[2:], *other.requests]
    assert 0.8 * (200 - ANSWER) < tiny_tokenizer.count(request.payload) <= 200 - ANSWER


def test_without_max_tokens_a_quarter_is_kept_for_the_answer(long: Job, server: FakeServer) -> None:
    long.documents(prose(4000))

    long.succeed(max_tokens=None)

    assert 0.9 * CONTEXT * 3 / 4 < tiny_tokenizer.count(server.requests[0].payload) <= CONTEXT * 3 / 4


def test_instructions_that_are_too_long_by_themselves_fail_and_are_not_cut(long: Job, server: FakeServer) -> None:
    long.documents(prose(4000))

    output = long.succeed(max_tokens=500)

    (failure,) = output.failures()
    assert failure["error_type"] == "RequestFailed"
    assert "without the document" in failure["error"]
    assert "--max-tokens" in failure["error"]
    assert server.requests == []


def test_a_long_document_can_fail_instead(long: Job, server: FakeServer) -> None:
    long.input([{"id": "long", "text": prose(4000)}, {"id": "short", "text": "A short text."}])

    output = long.succeed(long_documents="fail")

    assert output.ids() == ["short"]
    assert "does not fit" in output.failed()["long"]["error"]
    assert len(server.requests) == 1


STEPS = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("steps", steps)

    async def steps(document, generate):
        draft = await generate({"prompt": f"Draft: {document.text[:3000].strip()} Draft:"})
        messages = [
            {"role": "system", "content": "Fix the summary. " * 10},
            {"role": "user", "content": [{"type": "text", "text": document.text}]},
            {"role": "assistant", "content": draft.text},
            {"role": "user", "content": "Now fix it."},
        ]
        reply = await generate(messages)
        return {"text": reply.text, "draft": draft.text, "cut": [draft.truncated, reply.truncated]}
"""


def test_later_steps_keep_earlier_answers_and_cut_the_document(long: Job, server: FakeServer) -> None:
    def flat(payload: dict[str, Any]) -> dict[str, Any]:
        if "messages" not in payload:
            return payload
        contents = [message["content"] for message in payload["messages"]]
        texts = [content if isinstance(content, str) else content[0]["text"] for content in contents]
        return {"messages": [{"role": "user", "content": text} for text in texts]}

    server.count = lambda payload: tiny_tokenizer.count(flat(payload))
    draft = "An earlier answer, " * 20
    server.behave(lambda payload, n: draft if "prompt" in payload else "fixed")
    long.documents(prose(4000))

    output = long.succeed(plugin=long.plugin("steps", STEPS))

    first, second = [request.payload for request in server.requests]
    assert first["prompt"].startswith("Draft: This is sentence")
    assert first["prompt"].endswith("text. Draft:")
    system, document, answer, last = second["messages"]
    assert (system["content"], answer["content"], last["content"]) == ("Fix the summary. " * 10, draft, "Now fix it.")
    assert document["content"][0]["text"].endswith(" of the text.")
    assert all(tiny_tokenizer.count(flat(payload)) <= CONTEXT - ANSWER for payload in (first, second))
    result = output.rows()[0]["rollout_results"][0]
    assert result["cut"] == [True, True]
    assert result["truncated"]


def test_the_longest_message_of_the_user_in_a_chat_is_cut(long: Job, server: FakeServer) -> None:
    chat = [
        {"role": "system", "content": "Be brief. " * 8},
        {"role": "user", "content": prose(40)},
        {"role": "assistant", "content": "Go on, please. " * 8},
        {"role": "user", "content": prose(4000)},
    ]
    long.input([{"id": "chat", "text": chat}])
    long.options["plugin"] = "prompt"

    long.succeed()

    sent = server.requests[0].payload["messages"]
    assert sent[:3] == chat[:3]
    assert chat[3]["content"].startswith(sent[3]["content"])
    assert 0.9 * (CONTEXT - ANSWER) < tiny_tokenizer.count(server.requests[0].payload) <= CONTEXT - ANSWER


def test_a_prompt_without_the_document_is_sent_unchanged(long: Job, server: FakeServer) -> None:
    source = SANDWICH.replace("document.text", "'other words ' * 1000")
    long.documents("A text that is in no prompt. " * 10)

    output = long.succeed(plugin=long.plugin("other", source))

    assert len(server.requests) == 1
    assert "maximum context length" in output.failures()[0]["error"]


# ── Parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(text: str) -> list[int]:
    """The numbers of the sentences in a prompt or a result."""
    return [int(number) for number in re.findall(r"number (\d+)", text)]


@pytest.fixture
def split(long: Job, server: FakeServer) -> Job:
    """A job that splits documents, with a server whose answers name the sentences in the prompt."""
    long.options["long_documents"] = "split"
    server.behave(lambda payload, n: "number " + " number ".join(map(str, numbers(prompt_of(payload)))))
    return long


def test_the_parts_of_a_document_are_run_and_their_texts_joined(split: Job, server: FakeServer) -> None:
    split.input([{"id": "long", "text": prose(1600)}, {"id": "short", "text": "A short text, number 7."}])

    output = split.succeed()

    results = {row["id"]: row["rollout_results"] for row in output.rows()}
    (result,) = results["long"]
    assert numbers(result["text"]) == list(range(200))
    assert not result["truncated"]
    assert (result["finish_reason"], results["short"][0]["text"]) == ("stop", "number 7")
    parts = [request for request in server.requests if request.prompt.count("sentence")]
    assert len(parts) == result["text"].count("\n\n") + 1
    assert result["usage"]["prompt_tokens"] == sum(len(part.prompt.split()) for part in parts)
    for part in parts:
        assert part.prompt.startswith(BEFORE)
        assert part.prompt.endswith(AFTER)
        assert 0.4 * (CONTEXT - ANSWER) < tiny_tokenizer.count(part.payload) <= CONTEXT - ANSWER
    assert output.stats()["truncated"] == 0
    assert "| Long documents | split into parts" in (output.path / "README.md").read_text()
    assert split.verify().rc == 0


def test_equal_parts_are_different_samples(split: Job, server: FakeServer) -> None:
    answers = iter(range(1000))
    server.behave(lambda payload, n: f"answer {next(answers)}")
    split.documents("The same sentence again and again. " * 300)

    output = split.succeed(rollouts_per_document=2)

    texts = [result["text"].split("\n\n") for result in output.rows()[0]["rollout_results"]]
    assert sorted(text for some in texts for text in some) == sorted(f"answer {n}" for n in range(len(server.requests)))


def test_a_part_that_fails_fails_the_document_and_is_named(split: Job, server: FakeServer) -> None:
    split.input([{"id": "long", "text": prose(1600)}, {"id": "short", "text": "A short text."}])
    server.behave(
        lambda payload, n: Status(400, message="not that one") if "number 150 " in prompt_of(payload) else None
    )

    output = split.succeed()

    assert output.ids() == ["short"]
    error = output.failed()["long"]["error"]
    assert re.search(r"part \d+ of \d+: .*not that one", error), error


RESULTS = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("results", results)

    async def results(document, generate):
        reply = await generate(document.text)
        if "number 0 " in document.text:
            return None
        first, *_, last = document.text.split(".")
        return [{"question": first.strip()}, {"question": reply.text[:6]}]
"""


def test_a_filtered_part_is_left_out_and_lists_follow_each_other(split: Job, server: FakeServer) -> None:
    split.documents(prose(1600))

    output = split.succeed(plugin=split.plugin("results", RESULTS))

    questions = [result["question"] for result in output.rows()[0]["rollout_results"]]
    firsts = [numbers(question + " ")[0] for question in questions[::2]]
    assert len(firsts) == len(server.requests) - 1
    assert firsts == sorted(firsts)
    assert firsts[0] > 0
    assert set(questions[1::2]) == {"number"}


REFINE = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("refine_twice", refine_twice)

    async def refine_twice(document, generate):
        try:
            draft = await generate(f"Draft: {document.text}")
        except sdg.RequestFailed:
            return "I do not care."
        return await generate(f"{document.text} Fix this draft: {draft} {'Now. ' * 40}")
"""


def test_a_part_whose_later_steps_do_not_fit_is_split_again(split: Job, server: FakeServer) -> None:
    split.documents(prose(1600))

    output = split.succeed(plugin=split.plugin("refine_twice", REFINE))

    (result,) = output.rows()[0]["rollout_results"]
    assert list(dict.fromkeys(numbers(result["text"]))) == list(range(200))
    assert all(tiny_tokenizer.count(request.payload) <= CONTEXT - ANSWER for request in server.requests)


def test_a_chat_is_split_in_the_longest_message_of_the_user(split: Job, server: FakeServer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prose(1600)}]
    split.input([{"id": "chat", "text": chat}])

    output = split.succeed(plugin="prompt")

    assert numbers(output.rows()[0]["rollout_results"][0]["text"]) == list(range(200))
    assert {request.payload["messages"][0]["content"] for request in server.requests} == {"Be brief."}


# ── Replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TWO_STEPS = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("two_steps", two_steps)

    async def two_steps(document, generate):
        draft = await generate(f"Draft: {document.text} {'Please. ' * 30}")
        return await generate(f"Again: {document.text} {draft}")
"""


@pytest.mark.parametrize("how", ["truncate", "split"])
def test_a_rerun_asks_neither_server_nor_tokenizer_about_stored_responses(
    long: Job, server: FakeServer, servers: Callable[[], FakeServer], how: str
) -> None:
    long.input([{"id": str(number), "text": f"Text {number}. {prose(1600)}"} for number in range(3)])
    long.options |= {"long_documents": how, "plugin": long.plugin("two_steps", TWO_STEPS)}
    other = servers()
    other.count, other.max_model_len = server.count, server.max_model_len
    expected = long.succeed(output="undisturbed", base_url=other.url)
    half = len(other.requests) // 2
    server.behave(lambda payload, n: Hang() if prompt_of(payload).startswith("Again") else None)
    started = long.start()
    wait_until(lambda: server.in_flight == half and len(server.answered) == half)
    wait_until(lambda: answers_in(long.output.state) == half)
    started.process.kill()
    started.finish()
    server.forget()
    server.behave(lambda payload, n: None)

    output = long.succeed()

    assert [prompt.partition(":")[0] for prompt in server.prompts] == ["Again"] * half
    counted = [tiny_tokenizer.rendered(question) for question in server.tokenize_requests]
    assert counted
    assert not [prompt for prompt in counted if "Draft" in prompt]
    assert output.data() == expected.data()
    assert output.stats()["truncated"] == expected.stats()["truncated"] == (3 if how == "truncate" else 0)
    server.forget()
    assert long.succeed().data() == expected.data()
    assert (server.requests, server.tokenize_requests) == ([], [])


@pytest.mark.parametrize("options", [{"model_max_context": 400}, {"long_documents": "split"}])
def test_another_context_is_another_run(long: Job, server: FakeServer, options: dict[str, Any]) -> None:
    long.documents(prose(1600))
    long.succeed()

    finished = long(**options)

    assert finished.rc == 1
    assert finished.says("belongs to a different run", *options)


# ── The resource ─────────────────────────────────────────────────────────────────────────────────────────────────────

COUNTING = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("counting", counting)

    async def counting(document, generate, tokenizer):
        parts = await tokenizer.split(document.text, 100)
        reply = await generate(await tokenizer.cut(document.text, 50))
        tokens = [await tokenizer.count(part) for part in parts]
        return {"text": reply.text, "tokens": tokens, "parts": parts, "context": await tokenizer.context()}
"""


def test_a_rollout_counts_cuts_and_splits_by_itself(long: Job, server: FakeServer) -> None:
    text = prose(400)
    long.documents(text)

    output = long.succeed(plugin=long.plugin("counting", COUNTING))

    (result,) = output.rows()[0]["rollout_results"]
    assert "".join(result["parts"]) == text
    encode = tiny_tokenizer.tokenizer().encode
    assert result["tokens"] == [len(encode(part)) for part in result["parts"]]
    assert max(result["tokens"]) <= 100
    assert result["context"] == CONTEXT
    assert 25 < len(encode(server.prompts[0])) <= 50
    assert not result["truncated"]
