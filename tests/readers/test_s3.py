"""Input and output on S3: no partial file is ever visible, transient errors are retried, mistakes give one line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_s3 import DROP, FakeS3, Fault, Request
from fake_server import FakeServer, Hang, Status, free_port
from running import Finished, Job, Output, Sdg, Started, documents, rollout, wait_until

import sdg
from sdg_plugins.common import s3 as s3_client

pytestmark = pytest.mark.slow  # each starts processes beside a server of S3
SECRET = "a-secret-that-must-not-be-shown"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[FakeS3]:
    with FakeS3() as s3:
        yield s3


@pytest.fixture
def s3(s3_server: FakeS3) -> FakeS3:
    s3_server.begin()
    return s3_server


@pytest.fixture
def env(s3: FakeS3, tmp_path: Path) -> dict[str, str]:
    """A user's environment; the AWS files of the user who runs the tests are not read."""
    return {
        "AWS_ENDPOINT_URL_S3": s3.url,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-2",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{free_port()}",
    }


@pytest.fixture
def here(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same environment, for sdg inside the test process."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    s3_client.client.cache_clear()
    yield
    s3_client.client.cache_clear()


def parquet(rows: list[dict[str, str]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def cloudy(job: Job, s3: FakeS3, env: dict[str, str]) -> Job:
    """A run of 10 documents in 3 chunks, from and to S3."""
    rows = documents(10)
    s3.put("in/a.parquet", parquet(rows[:6]))
    s3.put("in/deep/b.parquet", parquet(rows[6:]))
    job.options |= {"input": s3.uri("in/"), "output": s3.uri("out"), "records_per_chunk": 4}
    return job


class Kept(Output):
    """The state of a run whose output is elsewhere."""

    @property
    def state(self) -> Path:
        return self.path


def chunks(*numbers: int) -> list[str]:
    return ["out/", "out/README.md"] + [  # "out/" is left by the check of the right to delete
        f"out/data/00000_{number:05}.parquet" for number in numbers
    ]


def verify(job: Job, env: dict[str, str]) -> Finished:
    return job.sdg("verify", "--output", job.options["output"], **env)


def is_put(request: Request) -> bool:
    """True if this request sends an object's content."""
    return request.method == "PUT" and "/out/data/" in request.path


# ── Runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_from_s3_to_s3_leaves_files_and_nothing_else_and_verify_reads_them(
    cloudy: Job, s3: FakeS3, env: dict[str, str], tmp_path: Path
) -> None:
    finished = cloudy({**env, "AWS_SESSION_TOKEN": "token"}, output=s3.uri("out/"))

    assert finished.rc == 0, finished
    assert s3.uri("out/data") in finished.stdout
    assert s3.objects("out") == chunks(0, 1, 2)
    assert s3.output("out", tmp_path).ids() == [row["id"] for row in documents(10)]
    assert (tmp_path / ".sdg" / f"{s3.bucket}-out" / "stats.json").exists()
    assert verify(cloudy, env).rc == 0
    (tmp_path / ".sdg").rename(tmp_path / "elsewhere")
    exported = cloudy.sdg("export", "--output", s3.uri("out"), "--format", "flat", "--to", "rows.jsonl", **env)
    assert exported.rc == 0, exported
    assert len((tmp_path / "rows.jsonl").read_bytes().splitlines()) == 10
    (tmp_path / "elsewhere").rename(tmp_path / ".sdg")
    assert all("/eu-west-2/s3/" in request.headers["authorization"] for request in s3.requests)
    assert any(request.headers.get("x-amz-security-token") == "token" for request in s3.requests)

    several = cloudy(env, output=s3.uri("several"), processes=2)
    assert several.rc == 0, several
    assert sorted(s3.output("several", tmp_path).ids()) == [row["id"] for row in documents(10)]

    s3.client.delete_object(Bucket=s3.bucket, Key="out/data/00000_00000.parquet")
    s3.put("out/data/00000_00001.parquet", b"PAR1")
    finished = verify(cloudy, env)
    assert finished.rc == 1
    assert "00000_00000.parquet is gone" in finished.stderr
    assert "00000_00001.parquet or its failed records cannot be read" in finished.stderr


@pytest.mark.parametrize("name", ["docs.jsonl.gz", "docs.csv"])
def test_a_single_object_of_each_format_is_read(name: str, job: Job, s3: FakeS3, env: dict[str, str]) -> None:
    rows = documents(5)
    text = io.StringIO()
    table = csv.DictWriter(text, ["id", "text"])
    table.writeheader()
    table.writerows(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    contents = {"docs.jsonl.gz": gzip.compress(lines.encode()), "docs.csv": text.getvalue().encode()}
    s3.put(f"in/{name}", contents[name])

    finished = job(env, input=s3.uri(f"in/{name}"))

    assert finished.rc == 0, finished
    assert job.output.ids() == [row["id"] for row in rows]


def test_compressed_lines_are_written(cloudy: Job, s3: FakeS3, env: dict[str, str]) -> None:
    finished = cloudy(env, output_filename="${chunk_index}.jsonl.gz")

    assert finished.rc == 0, finished
    assert s3.objects("out/data") == [f"out/data/0000{number}.jsonl.gz" for number in range(3)]
    content = s3.client.get_object(Bucket=s3.bucket, Key="out/data/00002.jsonl.gz")["Body"].read()
    assert [json.loads(line)["id"] for line in gzip.decompress(content).splitlines()] == ["d0008", "d0009"]


def test_a_kill_at_any_request_of_fresh_leaves_what_is_refused_or_starts_clean(
    job: Job, s3: FakeS3, env: dict[str, str], tmp_path: Path
) -> None:
    job.documents(*"abcd")
    job.options["records_per_chunk"] = 2
    expected = {}
    for temperature in (0.5, 0.7):
        where = {"output": s3.uri(f"clean-{temperature}"), "state_dir": f"clean-{temperature}"}
        assert job(env, temperature=temperature, **where).rc == 0
        expected[temperature] = data_below(s3, f"clean-{temperature}")

    def kill_at(number: int) -> int:
        """Start the run with the lower temperature over with the higher one, kill that, and go on with either."""
        for name in s3.objects("clean-0.5"):
            body = s3.client.get_object(Bucket=s3.bucket, Key=name)["Body"].read()
            s3.put(name.replace("clean-0.5", f"at-{number}"), body)
        shutil.copytree(tmp_path / "clean-0.5", tmp_path / f"at-{number}")
        where = {"output": s3.uri(f"at-{number}"), "state_dir": f"at-{number}"}
        left, victim = itertools.count(number, -1), list[Started]()

        def kill(request: Request) -> Fault | None:
            if next(left) != 1:
                return None
            wait_until(lambda: victim)
            victim[0].process.kill()
            return DROP

        s3.behave(kill)
        victim.append(job.start(env, temperature=0.7, fresh=True, **where))
        rc = victim[0].finish().rc
        s3.behave(lambda request: None)
        now = (0.7, 0.5)[number % 2]
        again = job(env, temperature=now, **where)
        if again.rc == 1:
            assert "--fresh" in again.message or "belongs to a different run" in again.message, (number, again)
            again = job(env, temperature=(now := 0.7), fresh=True, **where)
        assert again.rc == 0, (number, again)
        assert data_below(s3, f"at-{number}") == expected[now], number
        assert job.sdg("verify", "--output", where["output"], "--state-dir", where["state_dir"], **env).rc == 0, number
        return rc

    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(kill_at(len(codes) + 1))
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 20


def data_below(s3: FakeS3, prefix: str) -> dict[str, bytes]:
    """The data files below a prefix."""
    names = s3.objects(f"{prefix}/data/")
    bodies = {name: s3.client.get_object(Bucket=s3.bucket, Key=name)["Body"].read() for name in names}
    return {name.removeprefix(prefix): body for name, body in bodies.items() if body}


@pytest.mark.usefixtures("here")
def test_globs_and_folders_on_s3(s3: FakeS3) -> None:
    for key in ("in/a1.parquet", "in/a2.parquet", "in/b1.parquet", "in/deep/a3.parquet", "in/_SUCCESS", "in/"):
        s3.put(key, b"")

    def found(pattern: str) -> list[str]:
        return [path.removeprefix(f"{s3.bucket}/in/") for path, _ in sdg.list_files(s3.uri(pattern))]

    assert found("in/a?.parquet") == ["a1.parquet", "a2.parquet"]
    assert found("in/*/a*.parquet") == ["deep/a3.parquet"]
    assert found("in/[b]1.parquet") == ["b1.parquet"]
    assert found("in") == found("in/") == ["a1.parquet", "a2.parquet", "b1.parquet", "deep/a3.parquet"]
    with pytest.raises(sdg.InputError, match="no files found"):
        found("in/c*.parquet")
    s3.put("in/[b]1.parquet", b"")
    assert found("in/[b]1.parquet") == ["[b]1.parquet"]


@pytest.mark.parametrize(
    ("denied", "words"),
    [
        (lambda request: request.method in {"PUT", "POST"}, "cannot be written"),
        (lambda request: request.method in {"GET", "HEAD"} and ".sdg-access" in request.path, "cannot be"),
        (lambda request: "list-type" in request.query, "ListObjectsV2"),
    ],
    ids=["put", "get", "list"],
)
def test_a_missing_right_is_found_before_anything_is_sent(
    denied: Callable[[Request], bool], words: str, cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    s3.put("docs.csv", b"id,text\na,some text\n")
    s3.behave(
        lambda request: (
            Fault(403, "AccessDenied") if denied(request) and "out" in request.path + request.query else None
        )
    )

    finished = cloudy(env, input=s3.uri("docs.csv"))

    assert finished.rc == 1, finished
    assert words in finished.message
    assert not server.requests


@pytest.mark.usefixtures("here")
def test_objects_are_identified_by_one_listing_and_small_ones_are_fetched_ahead(s3: FakeS3) -> None:
    for number in range(40):
        s3.put(f"in/{number:02}.jsonl", json.dumps({"text": f"document {number}"}).encode() + b"\n")
    files = sdg.InputFiles(s3.uri("in/"), "jsonl")

    identity = files.identity

    assert list(identity) == [f"{number:02}.jsonl" for number in range(40)]
    assert [request.path for request in s3.requests if request.path.endswith(".jsonl")] == []
    contents = [files.open_in_order(number).read() for number in range(20)]
    assert contents == [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(20)]
    assert len({request.path for request in s3.requests if request.path.endswith(".jsonl")}) > 20  # the next ones, too
    seen: Counter[str] = Counter()

    def fail_once(request: Request) -> Fault | None:
        seen[f"{request.method} {request.path}"] += 1
        return Fault(503, "SlowDown") if seen[f"{request.method} {request.path}"] == 1 else None

    s3.behave(fail_once)
    assert files.open_in_order(39).read() == json.dumps({"text": "document 39"}).encode() + b"\n"


def test_an_object_that_is_uploaded_again_is_compared_by_its_rows(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    rows = documents(10)[:6]
    assert cloudy(env).rc == 0
    time.sleep(1.1)  # S3 knows times in seconds
    s3.put("in/a.parquet", parquet(rows))

    again = cloudy(env)
    rows[2]["text"] = rows[2]["text"][::-1]
    time.sleep(1.1)
    s3.put("in/a.parquet", parquet(rows))
    changed = cloudy(env)

    assert again.rc == 0, again
    assert len(server.requests) == 10
    assert changed.rc == 1
    assert "rows 0 to 3 of the input (a.parquet)" in changed.message


def test_failed_documents_are_retried_and_the_output_grows(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer, tmp_path: Path
) -> None:
    server.behave(lambda payload, n: Status(400) if payload["messages"][0]["content"] == "document 2" else None)
    assert cloudy(env, max_documents=6).rc == 0
    assert s3.objects("out/failed") == ["out/failed/00000_00000.jsonl"]
    server.behave(lambda payload, n: None)
    server.forget()

    finished = cloudy(env, retry_failed=True)

    assert finished.rc == 0, finished
    assert sorted(server.prompts) == ["document 2"] + [f"document {number}" for number in range(6, 10)]
    assert not [key for key in s3.objects("out/failed") if key.endswith(".jsonl")]
    assert s3.output("out", tmp_path).ids() == [row["id"] for row in documents(10)]
    assert verify(cloudy, env).rc == 0


def test_records_of_failures_are_emptied_where_deleting_is_not_permitted(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer, tmp_path: Path
) -> None:
    server.behave(lambda payload, n: Status(400) if payload["messages"][0]["content"] == "document 2" else None)
    assert cloudy(env).rc == 0
    server.behave(lambda payload, n: None)
    s3.behave(lambda request: Fault(403, "AccessDenied") if request.method == "DELETE" else None)

    finished = cloudy(env, retry_failed=True)

    assert finished.rc == 0, finished
    assert "goes on without the right to delete" in finished.stderr
    assert "give the right to delete" in finished.stderr
    assert s3.output("out", tmp_path).ids() == [row["id"] for row in documents(10)]
    assert s3.output("out", tmp_path).failures() == []
    assert verify(cloudy, env).rc == 0


def test_a_file_without_rows_that_may_not_be_deleted_is_named_and_ends_no_run(
    cloudy: Job, s3: FakeS3, env: dict[str, str], tmp_path: Path
) -> None:
    plugin = rollout("return await generate(document.text) if document.index > 7 else None")
    cloudy.options["plugin"] = cloudy.plugin("mine", plugin)
    assert cloudy(env, max_documents=4).rc == 0
    s3.behave(lambda request: Fault(403, "AccessDenied") if request.method == "DELETE" else None)

    finished = cloudy(env)

    assert finished.rc == 0, finished
    assert re.search(r"00000_00000.parquet.* This file has no rows: .* delete it", finished.stderr)
    assert s3.output("out", tmp_path).ids() == ["d0008", "d0009"]
    assert verify(cloudy, env).rc == 0


def test_output_without_its_state_is_refused_until_fresh(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    assert cloudy(env).rc == 0
    s3.put("out/notes.txt", b"mine")

    assert cloudy(env, state_dir="other").says("exists, but the state of its run does not", "--fresh")
    server.forget()
    assert cloudy(env, fresh=True).rc == 0

    assert len(server.prompts) == 10
    files = [key for key in s3.objects("out") if not key.endswith("/")]
    assert files == [*chunks(0, 1, 2)[1:], "out/notes.txt"]


def test_ranks_share_an_output_on_s3(cloudy: Job, s3: FakeS3, env: dict[str, str], tmp_path: Path) -> None:
    runs = [cloudy.start(env, rank=rank, world_size=2) for rank in (0, 1)]

    assert [run.finish().rc for run in runs] == [0, 0]

    assert s3.objects("out/data") == [
        f"out/data/{name}.parquet" for name in ("00000_00000", "00000_00002", "00001_00001")
    ]
    assert verify(cloudy, env).rc == 0


# ── Two runs on one output ───────────────────────────────────────────────────────────────────────────────────────────


def visible(s3: FakeS3) -> list[str]:
    """The objects of the output but for the claims of runs that have not finished."""
    return [name for name in s3.objects("out") if "/.sdg-data-" not in name]


def test_of_two_runs_with_states_of_their_own_at_most_one_has_the_output(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    begun = threading.Barrier(2)

    def meet(request: Request) -> Fault | None:
        """Both have found the output empty when they put their claims."""
        if "/.sdg-data-" in request.path and request.method == "PUT" and not begun.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                begun.wait(120)
                begun.abort()
        return None

    s3.behave(meet)
    runs = [cloudy.start(env, state_dir=name) for name in ("one", "two")]
    ended = [run.finish() for run in runs]

    refused = [finished for finished in ended if finished.rc == 1]
    assert refused
    probes = {request.path for request in s3.requests if "/.sdg-access" in request.path and request.method == "PUT"}
    assert len(probes) == 2  # neither deletes the other's, which would be told as a missing right
    assert all("is in use by another run" in finished.message for finished in refused)
    again = "two" if ended[1].rc == 0 else "one"
    assert cloudy(env, state_dir=again).rc == 0
    assert s3.objects("out") == chunks(0, 1, 2)
    assert len(server.prompts) == 10


def test_a_run_whose_output_another_one_has_taken_over_writes_nothing_more(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    server.behave(lambda payload, n: Hang() if n == 1 else None)
    first = cloudy.start(env, state_dir="one")
    wait_until(lambda: server.in_flight == 10)

    refused = cloudy(env, state_dir="two", temperature=0.5)
    assert refused.rc == 1
    assert refused.says("is in use by another run", "--fresh")
    server.behave(lambda payload, n: None)
    assert cloudy(env, state_dir="two", temperature=0.5, fresh=True).rc == 0
    rows = {name: s3.client.get_object(Bucket=s3.bucket, Key=name)["ETag"] for name in chunks(0, 1, 2)}
    server.release()

    ended = first.finish()
    assert ended.rc == 1
    assert ended.says("was taken over by another run")
    assert rows == {name: s3.client.get_object(Bucket=s3.bucket, Key=name)["ETag"] for name in s3.objects("out")}


# ── Atomic writes ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_after_kill_9_in_the_middle_of_a_put_nothing_is_visible_and_a_rerun_finishes(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer, tmp_path: Path
) -> None:
    putting, dead = threading.Event(), threading.Event()

    def hold(request: Request) -> Fault | None:
        if is_put(request):
            putting.set()
            dead.wait(30)
            return DROP
        return None

    s3.behave(hold)
    run = cloudy.start(env)
    assert putting.wait(30)
    wait_until(lambda: len(server.answered) == 10)
    wait_until(lambda: len(Kept(tmp_path / ".sdg" / f"{s3.bucket}-out").durable()) == 10)
    run.send(signal.SIGKILL)
    run.finish()
    dead.set()
    assert visible(s3) == ["out/"]
    s3.behave(lambda request: None)
    server.forget()

    assert cloudy(env).rc == 0

    assert server.prompts == []
    assert s3.objects("out") == chunks(0, 1, 2)
    assert verify(cloudy, env).rc == 0


@pytest.mark.usefixtures("here")
def test_a_file_that_fails_while_it_is_produced_is_not_uploaded(s3: FakeS3) -> None:
    place = sdg.Place(s3.uri("out"))

    def produce(file: io.BytesIO) -> None:
        file.write(bytes(20 << 20))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place.write("data/x", produce)

    assert s3.objects() == []


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("part", [1, 2, 3])
def test_an_upload_with_a_missing_part_is_not_visible(part: int, s3: FakeS3) -> None:
    place = sdg.Place(s3.uri("out"))
    s3.behave(lambda request: Fault(403, "AccessDenied") if f"partNumber={part}&" in request.query else None)

    with pytest.raises(sdg.OutputError, match="out/data/x cannot be written"):
        place.write("data/x", lambda file: file.write(bytes(30 << 20)))

    assert s3.objects() == []


@pytest.mark.usefixtures("here")
def test_a_large_file_arrives_unchanged(s3: FakeS3) -> None:
    place, content = sdg.Place(s3.uri("out")), os.urandom(25 << 20)

    place.write("data/x", lambda file: file.write(content))

    assert place.open("data/x").read() == content
    assert place.list("data") == ["data/x"]


@pytest.mark.usefixtures("here")
def test_an_object_that_arrives_shorter_is_removed(s3: FakeS3) -> None:
    place = sdg.Place(s3.uri("out"))

    def shorten(request: Request) -> None:
        if request.method == "HEAD" and request.path.endswith("/data/x"):
            s3.put("out/data/x", b"hal")

    s3.behave(shorten)

    with pytest.raises(sdg.OutputError, match="4 bytes were uploaded, 3 are stored"):
        place.write("data/x", lambda file: file.write(b"half"))

    assert "out/data/x" not in s3.objects()


# ── Transient errors ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_transient_errors_of_s3_are_retried(cloudy: Job, s3: FakeS3, env: dict[str, str]) -> None:
    faults = [Fault(503, "SlowDown"), DROP, Fault(500, "InternalError")]
    seen: Counter[str] = Counter()

    def stumble(request: Request) -> Fault | None:
        if "/out/" not in request.path and "/in/" not in request.path:
            return None
        seen[request.method] += 1
        return faults[seen[request.method] - 1] if seen[request.method] <= len(faults) else None

    s3.behave(stumble)

    finished = cloudy(env)

    assert finished.rc == 0, finished
    assert seen["PUT"] >= 6
    assert s3.objects("out") == chunks(0, 1, 2)


def test_responses_are_kept_if_s3_stays_unavailable_and_a_rerun_finishes(
    cloudy: Job, s3: FakeS3, env: dict[str, str], server: FakeServer
) -> None:
    s3.behave(lambda request: Fault(503, "SlowDown") if is_put(request) else None)

    finished = cloudy({**env, "AWS_MAX_ATTEMPTS": "2"})

    assert finished.rc == 1
    assert finished.says(f"{s3.bucket}/out/data/00000_0000", "cannot be written")
    assert visible(s3) == ["out/"]
    s3.behave(lambda request: None)
    assert cloudy(env).rc == 0
    assert s3.objects("out") == chunks(0, 1, 2)
    assert sorted(server.prompts) == sorted(row["text"] for row in documents(10))
    assert verify(cloudy, env).rc == 0


# ── Mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_bucket_or_prefix_is_named(cloudy: Job, s3: FakeS3, env: dict[str, str]) -> None:
    finished = cloudy(env, output="s3://no-such-bucket/out")
    assert finished.rc == 1
    assert finished.says("s3://no-such-bucket/out", "bucket does not exist", s3.url)

    finished = cloudy(env, input="s3://no-such-bucket/in/")
    assert finished.rc == 1
    assert finished.says("--input s3://no-such-bucket/in/", "bucket no-such-bucket does not exist")

    finished = cloudy(env, input=s3.uri("nothing/"))
    assert finished.rc == 1
    assert finished.says(s3.uri("nothing/"), "no such file or folder")
    assert "no-such-bucket" not in [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]


def test_a_wrong_key_is_one_line_without_secrets(cloudy: Job, job: Job, s3: FakeS3, env: dict[str, str]) -> None:
    s3.behave(lambda request: Fault(403, "SignatureDoesNotMatch"))

    output = cloudy(env, input=None)
    reading = cloudy(env)

    for finished in (output, reading):
        assert finished.rc == 1
        assert finished.says(s3.bucket, "AWS_ACCESS_KEY_ID", "AWS_PROFILE", s3.url)
        assert SECRET not in finished.stderr
    assert output.says("SIGNATURE_DOES_NOT_MATCH")


def test_without_credentials_the_variables_are_named_soon(cloudy: Job, s3: FakeS3, env: dict[str, str]) -> None:
    s3.behave(lambda request: None if "authorization" in request.headers else Fault(403, "AccessDenied"))
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]

    finished = cloudy(env)

    assert finished.rc == 1
    assert finished.says("ACCESS_DENIED", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    assert finished.seconds < 20


def test_keys_and_region_come_from_a_profile(cloudy: Job, s3: FakeS3, env: dict[str, str]) -> None:
    Path(env["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        f"[work]\naws_access_key_id = of-work\naws_secret_access_key = {SECRET}\n"
    )
    Path(env["AWS_CONFIG_FILE"]).write_text("[profile work]\nregion = eu-north-1\n")
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], env["AWS_REGION"]

    assert cloudy({**env, "AWS_PROFILE": "work"}).rc == 0

    signed = [request.headers["authorization"] for request in s3.requests]
    assert all("Credential=of-work/" in line and "/eu-north-1/s3/" in line for line in signed)


@pytest.mark.parametrize("used", ["input", "output"])
def test_an_endpoint_that_refuses_connections_is_named_within_seconds(
    used: str, cloudy: Job, env: dict[str, str]
) -> None:
    env["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{free_port()}"
    other = {"input": {"output": "output"}, "output": {"input": None}}[used]

    finished = cloudy(env, **other)

    assert finished.rc == 1
    assert finished.says(env["AWS_ENDPOINT_URL_S3"], "cannot be used", "connect")
    assert finished.seconds < 25


@pytest.mark.parametrize("option", ["--input=s3://tester:{}@bucket/x.txt", "--output=s3://tester:{}@bucket/out"])
def test_a_key_in_the_uri_is_refused_and_not_shown(option: str, run_sdg: Sdg) -> None:
    finished = run_sdg(option.format(SECRET))

    assert finished.rc == 2
    assert SECRET not in finished.stderr + finished.stdout


@pytest.mark.usefixtures("here")
def test_the_s3_endpoint_overrides_the_general_one_and_a_uri_overrides_both(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("in/x.parquet", b"x")
    nowhere = f"http://127.0.0.1:{free_port()}"
    uri = s3.uri("in/x.parquet")

    def found(of_s3: str, general: str, uri: str = uri) -> bool:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", of_s3)
        monkeypatch.setenv("AWS_ENDPOINT_URL", general)
        s3_client.client.cache_clear()
        return sdg.list_files(uri) == [(f"{s3.bucket}/in/x.parquet", 1)]

    assert found(s3.url, nowhere)
    assert found("", s3.url)
    assert found(s3.url + "/", "")
    assert found(nowhere, nowhere, f"{uri}?endpoint_override={s3.url}&region=eu-west-1")


# ── Other file systems ───────────────────────────────────────────────────────────────────────────────────────────────


def test_file_systems_that_only_fsspec_supports_are_written_and_read() -> None:
    pytest.importorskip("fsspec")
    place = sdg.Place("memory://a/b")

    place.write("data/x", lambda file: file.write(b"hello"))

    assert place.list("data") == ["data/x"]
    assert place.open("data/x").read() == b"hello"
    place.delete("data/x")
    place.delete("data/x")
    assert place.list("data") == []


def test_an_unknown_scheme_is_a_usage_error(job: Job) -> None:
    job.documents("a")

    finished = job(output="nowhere://bucket/out")

    assert finished.rc == 2
    assert "nowhere://bucket/out" in finished.message
    assert "s3://" in finished.message
