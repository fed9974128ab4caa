"""The fake Hub behaves as its real clients expect: `huggingface_hub` and `datasets` work against it."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
pytest.importorskip("huggingface_hub")  # which also brings yaml

from fake_hub import FakeHub, Rights
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    errors,
)
from huggingface_hub.utils import close_session
from running import program

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's way to upload a file
CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.parquet\n---\n# Docs"


def parquet(rows: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(rows))}), sink, row_group_size=100)
    return sink.getvalue()


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's back-off
    with FakeHub() as hub:
        hub.tokens = {
            "hf_write": Rights("alice", orgs=["lab"]),
            "hf_read": Rights("alice", write=False),
            "hf_bob": Rights("bob"),
        }
        yield hub
        close_session()
    assert not hub.errors


@pytest.fixture
def api(hub: FakeHub) -> Callable[..., HfApi]:
    return lambda token="hf_write": HfApi(endpoint=hub.url, token=token)


def commit(api: HfApi, operations: list[Any], **more: Any) -> Any:
    return api.create_commit("alice/docs", operations, commit_message="m", repo_type="dataset", **more)


def test_create_commit_and_read_back(hub, api):
    api().create_repo("alice/docs", repo_type="dataset")
    empty = hub.head("alice/docs")
    data = parquet(10)
    done = commit(api(), [add("data/a.parquet", data), add("README.md", CARD)], parent_commit=empty)
    assert done.oid == hub.head("alice/docs") != empty
    assert hub.files("alice/docs") == {
        ".gitattributes": hub.files("alice/docs", empty)[".gitattributes"],
        "data/a.parquet": data,
        "README.md": CARD,
    }
    info = api().dataset_info("alice/docs", files_metadata=True)
    assert info.sha == done.oid
    assert info.card_data.configs[0]["config_name"] == "default"
    assert {file.rfilename: file.size for file in info.siblings}["data/a.parquet"] == len(data)
    assert [c.commit_id for c in api().list_repo_commits("alice/docs", repo_type="dataset")] == [done.oid, empty]
    assert [c.oid for c in hub.commits("alice/docs")] == [empty, done.oid]
    assert hub.counts["commit"] == 1


def test_an_unchanged_commit_is_not_sent(hub, api):
    hub.create("alice/docs")
    head = hub.push("alice/docs", {"data/a.parquet": parquet(3), "notes.txt": b"x"})
    done = commit(api(), [add("data/a.parquet", parquet(3)), add("notes.txt", b"x")])
    assert done.oid == head
    assert hub.counts["commit"] == 0


def test_expand_answers_with_what_was_asked(hub, api):
    hub.create("alice/docs")
    hub.push("alice/docs", {"README.md": CARD})
    info = api().dataset_info("alice/docs", expand=["sha", "cardData"])
    assert (info.sha, info.private) == (hub.head("alice/docs"), None)


def test_create_twice_is_a_conflict(hub, api):
    api().create_repo("lab/docs", repo_type="dataset", private=True)
    assert hub.repos["lab/docs"].private
    with pytest.raises(errors.HfHubHTTPError) as raised:
        api().create_repo("lab/docs", repo_type="dataset")
    assert raised.value.response.status_code == 409
    assert str(api().create_repo("lab/docs", repo_type="dataset", exist_ok=True)).endswith("/datasets/lab/docs")
    with pytest.raises(errors.HfHubHTTPError) as raised:
        api().create_repo("other/docs", repo_type="dataset")
    assert raised.value.response.status_code == 403


def test_a_stale_parent_is_refused(hub, api):
    stale = hub.create("alice/docs")
    hub.push("alice/docs", {"a.txt": b"rival"})
    with pytest.raises(errors.HfHubHTTPError) as raised:
        commit(api(), [add("b.txt", b"mine")], parent_commit=stale)
    assert raised.value.response.status_code == 412
    assert "b.txt" not in hub.files("alice/docs")


def test_a_rival_commits_first(hub, api):
    head = hub.create("alice/docs")

    def rival(repo_id: str) -> None:
        hub.before_commit = None
        hub.push(repo_id, {"rival.txt": b"first"})

    hub.before_commit = rival
    with pytest.raises(errors.HfHubHTTPError) as raised:
        commit(api(), [add("b.txt", b"mine")], parent_commit=head)
    assert raised.value.response.status_code == 412
    commit(api(), [add("b.txt", b"mine")], parent_commit=hub.head("alice/docs"))
    assert {"rival.txt", "b.txt"} <= hub.files("alice/docs").keys()


def test_delete(hub, api):
    hub.create("alice/docs")
    hub.push("alice/docs", {"a.txt": b"a", "old/b.txt": b"b", "old/c.txt": b"c"})
    commit(api(), [CommitOperationDelete("a.txt"), CommitOperationDelete("old/")])
    assert set(hub.files("alice/docs")) == {".gitattributes"}
    with pytest.raises(errors.RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        commit(api(), [CommitOperationDelete("a.txt")])


def test_listings_come_in_pages(hub, api):
    hub.create("alice/docs")
    hub.push("alice/docs", {f"data/part{n}/x{n}.parquet": parquet(n) for n in range(7)})
    hub.page_size = 2
    tree = list(api().list_repo_tree("alice/docs", recursive=True, expand=True, repo_type="dataset"))
    assert [entry.path for entry in tree] == sorted(entry.path for entry in tree)
    assert len(tree) == 1 + 1 + 7 + 7
    assert hub.counts["tree"] == 8
    flat = list(api().list_repo_tree("alice/docs", "data/part3", repo_type="dataset"))
    assert [(entry.path, entry.lfs.size) for entry in flat] == [("data/part3/x3.parquet", len(parquet(3)))]
    assert flat[0].lfs.sha256 in hub.repos["alice/docs"].lfs
    with pytest.raises(errors.RemoteEntryNotFoundError):
        list(api().list_repo_tree("alice/docs", "nowhere", repo_type="dataset"))
    asked = ["data", "no", "data/part1/x1.parquet"]
    found = api().get_paths_info("alice/docs", asked, repo_type="dataset", expand=True)
    assert [entry.path for entry in found] == ["data", "data/part1/x1.parquet"]


def test_refs(hub, api):
    hub.create("alice/docs")
    hub.push("alice/docs", {"default/train/0000.parquet": parquet(5)}, revision="refs/convert/parquet")
    refs = api().list_repo_refs("alice/docs", repo_type="dataset")
    assert [(ref.name, ref.ref) for ref in refs.converts] == [("parquet", "refs/convert/parquet")]
    assert [ref.target_commit for ref in refs.branches] == [hub.head("alice/docs")]
    tree = api().list_repo_tree("alice/docs", revision="refs/convert/parquet", recursive=True, repo_type="dataset")
    assert [entry.path for entry in tree][-1] == "default/train/0000.parquet"
    with pytest.raises(errors.RevisionNotFoundError):
        api().dataset_info("alice/docs", revision="nowhere")


def test_parquet_is_read_by_ranges(hub, api):
    hub.create("alice/docs", private=True)
    data = parquet(100_000)
    sha = hub.push("alice/docs", {"data/a.parquet": data, "notes.txt": b"0123456789"})
    fs = HfFileSystem(endpoint=hub.url, token="hf_read", skip_instance_cache=True)
    assert fs.cat_file(f"datasets/alice/docs@{sha}/notes.txt", start=2, end=5) == b"234"
    with fs.open(f"datasets/alice/docs@{sha}/data/a.parquet", block_size=4096) as file:
        group = pq.ParquetFile(file).read_row_group(7)
    assert group["n"].to_pylist() == list(range(700, 800))
    assert 206 in hub.statuses("cdn")
    assert set(hub.statuses("resolve")) == {206, 302}


def test_downloads(hub, api, tmp_path):
    hub.create("alice/docs")
    hub.push("alice/docs", {"data/a.parquet": parquet(9), "notes.txt": b"text"})
    for name, content in [("data/a.parquet", parquet(9)), ("notes.txt", b"text")]:
        path = api().hf_hub_download("alice/docs", name, repo_type="dataset", cache_dir=tmp_path)
        assert Path(path).read_bytes() == content
    with pytest.raises(errors.RemoteEntryNotFoundError):
        api().hf_hub_download("alice/docs", "no.txt", repo_type="dataset", cache_dir=tmp_path)


@pytest.mark.parametrize("card", [CARD, None])
def test_datasets_loads(hub, tmp_path, card):
    pytest.importorskip("datasets")
    hub.create("alice/docs", private=True)
    hub.push("alice/docs", {"data/train-0.parquet": parquet(10), "data/train-1.parquet": parquet(5)})
    if card:
        hub.push("alice/docs", {"README.md": card})
    code = "import datasets; print(datasets.load_dataset('alice/docs', split='train').num_rows)"
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_read", "HF_HOME": str(tmp_path)}
    environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "PATH": os.environ["PATH"], "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(program(code), env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "15", done.stderr


def test_large_files_go_up_in_parts(hub, api):
    hub.create("alice/docs")
    hub.part_bytes = 1000
    data = os.urandom(2500)
    commit(api(), [add("a.bin", data)])
    assert hub.files("alice/docs")["a.bin"] == data
    assert (hub.counts["lfs_put"], hub.counts["lfs_complete"]) == (3, 1)


def test_an_upload_with_another_checksum_is_refused(hub, api):
    hub.create("alice/docs")
    operation = add("a.bin", b"announced")
    operation.path_or_fileobj = b"but other"
    with pytest.raises(RuntimeError) as raised:
        commit(api(), [operation])
    assert isinstance(raised.value.__cause__, errors.BadRequestError)
    assert "another sha256" in hub.errors.pop()
    assert hub.counts["commit"] == 0


def test_more_than_256_files_are_asked_in_calls_of_256(hub, api):
    hub.create("alice/docs")
    commit(api(), [add(f"{n}.txt", b"%d" % n) for n in range(300)])
    assert hub.statuses("preupload") == [200, 200]


def test_a_card_is_checked(hub, api):
    hub.create("alice/docs")
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api(), [add("README.md", b"---\nconfigs: {\n---\n")])
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit(api(), [add("README.md", b"# docs")])


def test_rights(hub, api):
    hub.create("alice/docs", private=True)
    hub.create("alice/open", gated=True)
    assert api("hf_read").whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(errors.RepositoryNotFoundError) as raised:
        api("hf_bob").dataset_info("alice/docs")
    assert raised.value.response.status_code == 404
    with pytest.raises(errors.RepositoryNotFoundError) as raised:
        api(False).dataset_info("alice/docs")
    assert raised.value.response.status_code == 401
    with pytest.raises(errors.HfHubHTTPError) as raised:
        commit(api("hf_read"), [add("a.txt", b"a")])
    assert raised.value.response.status_code == 403
    with pytest.raises(errors.GatedRepoError) as raised:
        api("hf_bob").auth_check("alice/open", repo_type="dataset")
    assert raised.value.response.status_code == 403
    del hub.tokens["hf_write"]
    with pytest.raises(errors.HfHubHTTPError) as raised:
        api().dataset_info("alice/docs")
    assert type(raised.value) is errors.HfHubHTTPError
    assert raised.value.response.status_code == 401


def test_a_quota_of_storage(hub, api):
    hub.create("alice/docs", private=True)
    hub.quota_bytes = 1000
    commit(api(), [add("a.bin", bytes(800))])
    with pytest.raises(errors.HfHubHTTPError, match="storage limit reached") as raised:
        commit(api(), [add("b.bin", bytes(300))])
    assert raised.value.response.status_code == 403


def test_a_quota_of_commits(hub, api):
    now = 0.0
    hub.clock = lambda: now
    hub.commits_per_hour = 2
    hub.create("alice/docs")
    commit(api(), [add("0.txt", b"0")])
    now = 1000.0
    commit(api(), [add("1.txt", b"1")])
    with pytest.raises(errors.HfHubHTTPError, match="retry this action in 43 minutes") as raised:
        commit(api(), [add("2.txt", b"2")])
    assert raised.value.response.status_code == 429
    now = 3601.0
    commit(api(), [add("2.txt", b"2")])


def test_faults(hub, api):
    hub.create("alice/docs")
    hub.fail("commit", status=500)
    hub.fail("commit", status=504, landed=True)
    hub.fail("commit", status=409, error="Another commit operation is in progress")
    statuses = []
    for n in range(4):
        try:
            commit(api(), [add(f"{n}.txt", b"%d" % n)])
        except errors.HfHubHTTPError as error:
            statuses.append(error.response.status_code)
    assert statuses == [500, 504, 409]
    assert set(hub.files("alice/docs")) == {".gitattributes", "1.txt", "3.txt"}
    hub.fail("preupload", status=429, headers={"Retry-After": "1"}, text="slow down", times=2)
    commit(api(), [add("4.txt", b"4")])
    assert hub.statuses("preupload")[-3:] == [429, 429, 200]


def test_a_refusal_has_not_landed(hub, api):
    stale = hub.create("alice/docs")
    hub.push("alice/docs", {"a.txt": b"rival"})
    hub.fail("commit", status=504, landed=True)
    with pytest.raises(errors.HfHubHTTPError) as raised:
        commit(api(), [add("b.txt", b"mine")], parent_commit=stale)
    assert raised.value.response.status_code == 412


@pytest.mark.parametrize("landed", [False, True])
def test_a_client_that_dies_after_its_request(hub, landed):
    """A request that arrived whole is processed, one that was cut short is not, and neither is an error of the Hub."""
    hub.create("alice/docs")
    hub.fail("commit", delay=0.2, landed=landed)
    line = b'{"key": "header", "value": {"summary": "m"}}\n'
    head = b"POST /api/datasets/alice/docs/commit/main HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer hf_write\r\n"
    head += b"Content-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n" % len(line)
    for sent in (head + line, head + line[:9]):
        with socket.create_connection(("127.0.0.1", hub.port)) as connection:
            connection.sendall(sent)
    deadline = time.monotonic() + 10
    while len(hub.requests) < 2 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert sorted(hub.statuses("commit")) == [0, 200]
    assert len(hub.commits("alice/docs")) == 2


def test_lost_answers_and_a_lost_network(hub, api):
    hub.create("alice/docs")
    transport_error = errors.HTTPError
    hub.fail("commit", drop=True, landed=True)
    hub.fail("commit", drop=True)
    for name in ("landed.txt", "lost.txt"):
        with pytest.raises(transport_error) as raised:
            commit(api(), [add(name, b"x")])
        assert not isinstance(raised.value, errors.HfHubHTTPError)
    assert "landed.txt" in hub.files("alice/docs")
    assert "lost.txt" not in hub.files("alice/docs")
    hub.down = True
    with pytest.raises(transport_error):
        api().dataset_info("alice/docs")
    hub.down = False
    hub.stop()
    with pytest.raises(transport_error):
        api().dataset_info("alice/docs")
    hub.start()
    assert api().dataset_info("alice/docs").sha == hub.head("alice/docs")


def test_readers_lag_behind(hub, api):
    now = 0.0
    hub.clock = lambda: now
    first = hub.create("alice/docs")
    hub.lag = 5.0
    second = commit(api(), [add("a.txt", b"a")]).oid
    assert "a.txt" in hub.files("alice/docs")
    assert api().dataset_info("alice/docs").sha == first
    assert api().dataset_info("alice/docs", revision=second).sha == second
    now = 6.0
    assert api().dataset_info("alice/docs").sha == second


def test_an_unknown_route_is_an_error(hub, api):
    with pytest.raises(errors.HfHubHTTPError):
        api().model_info("alice/docs")
    assert "no route" in hub.errors.pop()
