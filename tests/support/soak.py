"""Runs that are disturbed at random: what they leave must be, byte for byte, what undisturbed runs leave.

    python tests/support/soak.py --seconds 3600 --first 1

A seed decides on everything: the input, its format, the options, whether it goes to the Hub, the faults of servers and
Hub, and when which signal comes. `test_soak.py` plays some of them; this goes on with others for as long as wanted.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fake_hub import FakeHub, Rights
from fake_server import PROBE, Behaviour, Delay, Drop, FakeServer, Raw, Status, prompt_of
from running import Finished, Job, Started

# All that a rollout may do with a document, decided by its text.
MIXED = """
    import asyncio, hashlib, os, sys
    from typing import NotRequired, TypedDict
    import sdg

    class PanicException(BaseException):  # as libraries in Rust raise it
        pass

    class Result(TypedDict):
        text: str
        steps: int
        tags: list[str]
        score: NotRequired[float]

    @sdg.hookimpl
    def register_rollouts(register):
        register("mixed", mixed)

    def number(text):
        return hashlib.sha256(text.encode()).digest()[0]

    fault, _, moment = os.environ.get("SOAK_FAULT", "").partition(":")
    begun = 0

    def misbehave():  # at one document: what ends the process, or leaves it crippled
        global begun
        begun += 1
        if begun == int(moment or 0):
            match fault:
                case "closefds": os.closerange(3, 200)
                case "exit": os._exit(9)
                case "abort": os.abort()
                case "streams": sys.stdout.close(), sys.stderr.close()
                case "chdir": os.chdir("/")
                case "stop": asyncio.get_running_loop().stop()

    async def tool(seconds):
        try:
            await asyncio.sleep(seconds)
            return "tool"
        except:
            return "THE TOOL WAS CANCELED"

    async def mixed(document, generate) -> list[Result] | None:
        misbehave()
        match number(document.text) % 8:
            case 0:
                await generate(document.text)
                return None
            case 1:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(generate("the same: " + document.text)) for _ in range(3)]
                return [{"text": task.result().text, "steps": i, "tags": ["x"] * i} for i, task in enumerate(tasks)]
            case 2:
                draft = await generate("draft: " + document.text)
                if number(draft.text) % 3 == 0:
                    raise ValueError("the draft does not please")
                chat = [("user", document.text), ("assistant", draft.text), ("user", "better")]
                final = await generate([{"role": role, "content": text} for role, text in chat], temperature=0.5)
                return [{"text": final.text, "steps": 2, "tags": [], "score": 0.5}]
            case 3:
                reply = await generate({"prompt": document.text, "max_tokens": 5})
                await asyncio.sleep(number(reply.text) / 1000)
                return [{"text": reply.text, "steps": 1, "tags": [], "unexpected": number(reply.text)}]
            case 4:
                reply = await generate(document.text)
                used = await asyncio.gather(*[tool(number(reply.text) / 500) for _ in range(3)], return_exceptions=True)
                more = await generate(f"{reply.text} {used}")
                return [{"text": f"{more.text} {used}", "steps": 3, "tags": []}]
            case 5:
                reply = await generate(document.text)
                match number(reply.text) % 4:
                    case 0: raise PanicException("index out of bounds")
                    case 1: asyncio.current_task().cancel(); await asyncio.sleep(1)
                    case 2: raise KeyboardInterrupt
                return [{"text": reply.text, "steps": 4, "tags": []}]
            case _:
                reply = await generate(document.text)
                return [{"text": reply.text, "steps": 0, "tags": []}]
"""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.large_string()),
        ("sometimes", pa.int32()),
        ("nested", pa.struct([("a", pa.list_(pa.int64())), ("b", pa.string())])),
        ("floats", pa.list_(pa.float32())),
    ]
)
REPO, TOKEN = "alice/out", "hf_write_aaaabbbbccccdddd"
CONTEXT = 150  # tokens, which are words here
CRASHES = (1, 9, 134, 139, -signal.SIGABRT, -signal.SIGSEGV)  # ends of crippled processes
FAULTS = ("closefds", "exit", "abort", "streams", "chdir", "stop")
GENTLE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Scenario:
    """What a seed decides on, but for the moments of the disturbances."""

    seed: int
    count: int  # documents
    format: str
    ranks: int
    hub: bool
    grows: bool  # a part of the input first
    refusals: bool  # some requests are never answered
    retries: bool  # ... until --retry-failed
    fault_rate: float
    options: dict[str, Any]

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        chance = random.Random(seed)
        hub, refusals = chance.random() < 0.3, chance.random() < 0.5
        options = {
            "records_per_chunk": chance.choice([1, 5, 20, 100]),
            "max_concurrent_documents": chance.choice([2, 10, 50]),
            "max_concurrent_generations": chance.choice([3, 20, 500]),
            "rollouts_per_document": chance.choice([1, 1, 3]),
            "output_filename": chance.choice([None, None, "${rank}_${chunk_index}.jsonl"]),
            "seed": chance.choice([None, 7]),
            "max_tokens": chance.choice([20, 40]),
            "long_documents": chance.choice(["split", "truncate", "fail"]),
            "max_failure_rate": 1,
        }
        return cls(
            seed=seed,
            count=chance.choice([1, 3, 17, 60, 150]),
            format=chance.choice(["parquet", "folder", "jsonl", "jsonl.gz"]),
            ranks=chance.choice([1, 1, 2, 3]),
            hub=hub,
            grows=chance.random() < 0.3,
            refusals=refusals,
            retries=refusals and not hub and chance.random() < 0.5,
            fault_rate=chance.choice([0.0, 0.1, 0.3]),
            options=options,
        )

    def write_input(self, folder: Path) -> Path:
        """Write the documents; returns where."""
        chance, words = random.Random(self.seed), ["one", "two", "three", "four"]
        rows = [
            {
                "id": f"d{number:05}",
                "text": " ".join(chance.choices(words, k=chance.choice([5, 30, 200, 600]))) + f" {number}",
                "sometimes": chance.choice([None, number]),
                "nested": chance.choice([None, {"a": [1, None], "b": "ü"}]),
                "floats": [chance.random() for _ in range(chance.randint(0, 3))],
            }
            for number in range(self.count)
        ]
        path = folder / f"in.{self.format}"
        if self.format.startswith("jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(content) if self.format == "jsonl.gz" else content)
            return path
        table = pa.Table.from_pylist(rows, SCHEMA)
        if self.format == "parquet":
            pq.write_table(table, path, row_group_size=chance.choice([1, 7, 100]))
            return path
        path.mkdir()
        for start in range(0, self.count, 23):
            pq.write_table(table.slice(start, 23), path / f"{start:05}.parquet", row_group_size=11)
        return path

    def behaviour(self, fault_rate: float, refusals: bool) -> Behaviour:
        """A server that answers soon or late, and fails at most three times in a row."""

        def behave(payload: dict[str, Any], n: int) -> Any:
            # How an answer is transported must not decide on it: a client that is refused at first tries streams.
            asked = {name: value for name, value in payload.items() if name not in {"stream", "stream_options"}}
            body = json.dumps(asked, sort_keys=True).encode()
            if refusals and hashlib.sha256(body).digest()[0] % 29 == 0:
                return Status(400)
            chance = random.Random(body + b"%d %d" % (self.seed, n))
            late = 0.3 * chance.random() ** 3
            if n <= 3 and chance.random() < fault_rate:
                faults = [Status(500), Status(503), Status(429, {"Retry-After": "0.1"}), Delay(late, Status(502))]
                return chance.choice([*faults, Drop(), Drop(10), Raw(b"{no")])
            return Delay(late)

        return behave


@dataclass
class Counts:
    """What disturbances have done to a scenario; see `compared`."""

    scenarios: int = 0
    lost: int = 0  # documents that are neither rows nor failed nor filtered
    doubled: int = 0  # documents that are there twice
    stale: int = 0  # documents with another row or failure than without disturbances
    rebought: int = 0  # responses that were sent again, beyond those that were sent without disturbances
    ends: int = 0  # kills and crashes, by which what was in flight is lost

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __str__(self) -> str:
        told = f"{self.lost} lost, {self.doubled} doubled, {self.stale} stale, {self.rebought} re-bought"
        return f"{self.scenarios} scenarios: {told} by {self.ends} kills and crashes"


class Play:
    """One run of a scenario to its end, disturbed or not; `data` and `failed` are what it left.

    Attributes:
        bought: how many responses to each request were sent, faults aside.
        ends: kills and crashes.
        doubled: documents that are there twice.
        documents: rows and failures, as text, by the documents' IDs.
    """

    def __init__(self, scenario: Scenario, folder: Path, source: Path, disturbed: bool) -> None:
        self.scenario, self.disturbed = scenario, disturbed
        self.chance = random.Random(scenario.seed + 1)
        self.data: dict[str, bytes] = {}
        self.failed: dict[str, str] = {}
        self.bought: Counter[str] = Counter()
        self.ends = self.doubled = 0
        self.documents: dict[str, str] = {}
        folder.mkdir()
        with FakeServer() as self.server, FakeHub() as self.hub:
            self.job = Job(folder, self.server)
            with contextlib.closing(self.job.sdg):
                self._prepare(source)
                self._play()
                self._collect()
            assert not self.server.errors
            assert not self.hub.errors

    def _prepare(self, source: Path) -> None:
        scenario = self.scenario
        self.server.count = words_in
        self.server.max_model_len = self.server.context = CONTEXT
        self._behave(scenario.fault_rate * self.disturbed, scenario.refusals)
        self.job.options |= {**scenario.options, "input": source, "world_size": scenario.ranks}
        self.job.options["plugin"] = self.job.plugin("mixed", MIXED)
        if scenario.hub:
            self.hub.tokens = {TOKEN: Rights("alice")}
            self.job.env = self.hub.environment(self.job.folder, TOKEN)
            self.job.options |= {"output": f"hf://datasets/{REPO}", "publish_interval": 1, "state_dir": "state"}
        for operation in self.chance.sample(["commit", "preupload", "lfs_put", "info", "tree"], 3 * self.disturbed):
            status, after = self.chance.choice([500, 502, 429]), self.chance.randint(0, 2)
            self.hub.fail(operation, status=status, times=self.chance.randint(1, 2), after=after)

    def _behave(self, fault_rate: float, refusals: bool) -> None:
        answer = self.scenario.behaviour(fault_rate, refusals)

        def behave(payload: dict[str, Any], n: int) -> Any:
            answered = answer(payload, n)
            if isinstance(answered, Delay) and answered.then is None and prompt_of(payload) != PROBE:
                asked = {name: value for name, value in payload.items() if name not in {"stream", "stream_options"}}
                self.bought[json.dumps(asked, sort_keys=True)] += 1
            return answered

        self.server.behave(behave)

    def _play(self) -> None:
        if self.scenario.grows:
            self._finish(max_documents=max(1, self.scenario.count // 3))
        self._finish()
        if self.scenario.retries:
            # Each --retry-failed asks again for what fails whatever is answered: that is not counted.
            self.server.behave(self.scenario.behaviour(0.0, refusals=False))
            self._finish(retry_failed=True)
        where = {name: self.job.options.get(name) for name in ("output", "state_dir")}
        arguments = [word for name, value in where.items() if value for word in (f"--{name.replace('_', '-')}", value)]
        if self.scenario.hub and self.scenario.ranks > 1:
            succeeded(self.job.sdg("monitor", *arguments, "--interval", "1", timeout=120, **self.job.env))
        succeeded(self.job.sdg("verify", *arguments, **self.job.env))
        sent = len(self.server.requests)
        for finished in self._run():
            succeeded(finished)
        assert len(self.server.requests) == sent, "a run that has finished asks again"

    def _finish(self, **options: Any) -> None:
        """Disturb some runs, and let one be."""
        for _ in range(self.chance.randint(1, 4) if self.disturbed else 0):
            self._run(disturbed=True, **options)
        for finished in self._run(**options):
            succeeded(finished)

    def _run(self, disturbed: bool = False, **options: Any) -> list[Finished]:
        """All ranks, at once."""
        fault = self.chance.choice(FAULTS) if disturbed and self.chance.random() < 0.3 else ""
        env = {"SOAK_FAULT": f"{fault}:{self.chance.randint(1, self.scenario.count)}"} if fault else {}
        started = [self.job.start(env, rank=rank, **options) for rank in range(self.scenario.ranks)]
        threads = []
        for one in started if disturbed else []:
            seconds, signum = self.chance.uniform(0.2, 3.0), self.chance.choice([signal.SIGKILL, *GENTLE])
            threads.append(threading.Thread(target=self._disturb, args=(one, seconds, signum)))
            threads[-1].start()
        finished = [one.finish(120, bugs=bool(fault)) for one in started]
        for thread in threads:
            thread.join()
        self.ends += sum(one.rc not in {0, 130, 143} for one in finished)
        legal = {0, 130, 143, -signal.SIGKILL, *(CRASHES if fault else ())}
        assert not disturbed or all(one.rc in legal for one in finished), finished
        return finished

    def _disturb(self, started: Started, seconds: float, signum: signal.Signals) -> None:
        """Send a signal after some time; the gentle ones while there is somebody to take them."""
        time.sleep(seconds)
        while started.running:
            if signum == signal.SIGKILL or catches(started.process.pid, signal.SIGUSR1):
                started.send(signum)
                return
            time.sleep(0.01)

    def _collect(self) -> None:
        files = self.hub.files(REPO) if self.scenario.hub else self.job.output.files()
        self.data = {name: content for name, content in files.items() if name.startswith("data/")}
        for name, content in files.items():
            if name.startswith("failed/"):
                for record in map(json.loads, content.splitlines()):
                    self.failed[record["id"]] = record["error_type"]
                    self._note(record["id"], record["error_type"])
            elif name.startswith("data/"):
                jsonl = name.endswith(".jsonl")
                rows = (
                    map(json.loads, content.splitlines()) if jsonl else pq.read_table(io.BytesIO(content)).to_pylist()
                )
                for row in rows:
                    self._note(row["id"], repr(row))

    def _note(self, document: str, outcome: str) -> None:
        self.doubled += document in self.documents
        self.documents[document] = outcome


def compared(undisturbed: Play, disturbed: Play) -> Counts:
    """What the disturbances of a scenario have done."""
    expected, found = undisturbed.documents, disturbed.documents
    more = disturbed.bought - undisturbed.bought
    # Of the three equal requests of a document one may be refused: the others are canceled, sent or not.
    rebought = sum(number for asked, number in more.items() if "the same: " not in asked)
    return Counts(
        scenarios=1,
        lost=len(expected.keys() - found.keys()),
        doubled=undisturbed.doubled + disturbed.doubled,
        stale=sum(expected.get(document) != outcome for document, outcome in found.items()),
        rebought=rebought,
        ends=disturbed.ends,
    )


def words_in(payload: dict[str, Any]) -> int:
    """Tokens of a prompt, as the server counts them."""
    messages = payload.get("messages") or [{"content": payload.get("prompt", "")}]
    return 3 + sum(4 + len(message["content"].split()) for message in messages)


def catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as proc(5) tells it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signum - 1) & 1)


def succeeded(finished: Finished) -> None:
    """See that a run ended well."""
    assert finished.rc == 0, finished


def check(seed: int, folder: Path) -> Counts:
    """Play a seed's scenario twice; raises AssertionError if the disturbances made any difference.

    Nothing is sent again but what was in flight, or just received, when a process was killed.
    """
    scenario = Scenario.of(seed)
    source = scenario.write_input(folder)
    undisturbed = Play(scenario, folder / "undisturbed", source, disturbed=False)
    disturbed = Play(scenario, folder / "disturbed", source, disturbed=True)
    counts = compared(undisturbed, disturbed)
    assert (counts.lost, counts.doubled, counts.stale) == (0, 0, 0), counts
    assert counts.rebought <= counts.ends * 2 * disturbed.server.max_in_flight, counts
    assert disturbed.failed == undisturbed.failed
    assert disturbed.data.keys() == undisturbed.data.keys(), disturbed.data.keys() ^ undisturbed.data.keys()
    assert [name for name, content in disturbed.data.items() if content != undisturbed.data[name]] == []
    return counts


@contextlib.contextmanager
def folder_of(seed: int) -> Iterator[Path]:
    """A folder that stays if something went wrong."""
    folder = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
    yield folder
    shutil.rmtree(folder)


def main() -> int:
    """Play seeds for a while. Returns 1 if one made a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--first", type=int, default=1, metavar="SEED")
    options = parser.parse_args()
    seed, until, wrong, counts = options.first, time.monotonic() + options.seconds, 0, Counts()
    while time.monotonic() < until:
        try:
            with folder_of(seed) as folder:
                counts += (found := check(seed, folder))
                print(f"{seed}: {Scenario.of(seed)}: {found}", flush=True)
        except AssertionError as problem:
            wrong += 1
            print(f"{seed}: WRONG, see {folder}: {problem}", flush=True)
        seed += 1
    print(f"{counts}; {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
