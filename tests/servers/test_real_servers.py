"""Real servers (vLLM, SGLang, Ray, `transformers serve`) on CPU with a tiny model. Slow: `pytest -m real`."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import real_engines
import real_sglang
from fake_server import free_port
from launching import ENGINE, Launch, everything
from running import Finished, Job, Started, documents, wait_until

pytestmark = pytest.mark.real

CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",  # servers need the numpy that other runs do without
    "PYTHONWARNINGS": "ignore",  # tests take warnings for bugs of ours
}
SGLANG_FLAGS = ["device=cpu", "attention-backend=torch_native", "max-total-tokens=65536", "sleep-on-idle"]


class Real(Launch):
    """A job with a real server."""

    def __init__(self, folder: Path, bin_folder: Path, model: Path, **options: Any) -> None:
        Job.__init__(self, folder, None)
        self.mark = folder.name
        self.engine = folder / "engine"
        self.bin_folder = bin_folder
        self.options |= {"base_url": None, "model": model, "max_tokens": 16, "no_progress": None, **options}

    def start(self, env: dict[str, str] | None = None, **options: Any) -> Started:
        path = f"{self.bin_folder}:{os.environ['PATH']}"
        cache = {"VLLM_CACHE_ROOT": str(self.folder / "cache"), "HF_HOME": str(self.folder)}
        return super().start({**CPU, "PATH": path, **cache, **(env or {})}, **options)

    def __call__(self, *args: Any, **options: Any) -> Finished:
        return self.start(**options).finish(300)

    def pid_of(self, name: str) -> int:
        """The process whose title has this name."""
        found = [pid for pid, title in self.processes().items() if title.startswith(name)]
        assert found, self.processes()
        return found[0]


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Real]:
    job = Real(tmp_path, real_engines.vllm(), real_engines.tiny_model(), server="vllm", server_arg=["enforce-eager"])
    yield job
    job.sdg.close()
    wait_until(lambda: not job.processes(), 20)


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[Real]:
    flags = {"server": "sglang", "server_arg": SGLANG_FLAGS}
    job = Real(tmp_path, real_engines.sglang(), real_engines.tiny_model(), **flags)
    yield job
    job.sdg.close()
    wait_until(lambda: not job.processes(), 20)
    real_sglang.clean_shared_memory()


SHAPE = """
    from dataclasses import dataclass
    from typing import Literal

    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("own", own)

    @dataclass
    class Part:
        kind: Literal["good", "bad"]
        sure: bool

    @dataclass
    class Whole:
        parts: tuple[Part, Part]
        score: Literal[0, 1, 2, 3, 4, 5]

    async def own(document, generate, ask):
        whole = await ask(document.text, Whole, reasks=0)
        return {"score": whole.score, "kinds": [part.kind for part in whole.parts]}
"""


def test_vllm_decodes_the_requested_shape(vllm: Real) -> None:
    vllm.options["plugin"] = vllm.plugin("own", SHAPE)
    vllm.input(documents(20))

    finished = vllm(max_tokens=1500)

    assert finished.rc == 0
    assert "response_format" not in finished.stderr
    results = [row["rollout_results"][0] for row in vllm.output.rows()]  # the tiny model generates nonsense
    assert {result["score"] for result in results} <= set(range(6))
    assert {kind for result in results for kind in result["kinds"]} <= {"good", "bad"}
    # It often generates spaces between two keys up to --max-tokens: such responses are cut off, but none is invalid.
    assert len(results) >= 10
    assert all("--max-tokens" in record["error"] for record in vllm.output.failures())


def kill_in_the_middle(job: Real, process: str) -> Finished:
    """Run 500 documents, one of them too long, and kill a process of the server after some of them."""
    rows = documents(500)
    rows[100]["text"] = "These are words of a long document. " * 1000
    job.input(rows)
    started = job.start(records_per_chunk=50, empty_answers="keep")  # the tiny model sometimes has nothing to say
    data = job.output.path / "data"
    wait_until(lambda: len(list(data.glob("*.parquet"))) >= 2, 200)

    os.kill(job.pid_of(process), signal.SIGKILL)

    finished = started.finish(300)
    assert finished.rc == 0, finished
    assert "died and is being restarted" in finished.stderr
    assert job.output.ids() == [row["id"] for row in rows]
    truncated = {row["id"]: row for row in job.output.rows() if row["rollout_results"][0]["truncated"]}
    assert list(truncated) == ["d0100"]
    # As counted by the server, with a context of 2,048 tokens and --max-tokens 16.
    assert 0.95 * 2032 < truncated["d0100"]["rollout_results"][0]["usage"]["prompt_tokens"] <= 2032
    stats = job.output.stats()
    assert stats["truncated"] == 1
    assert stats["requests"] <= 500 + sum(stats["retries"].values())
    assert not job.processes()
    return finished


def test_vllm_whose_engine_is_killed_costs_no_document(vllm: Real) -> None:
    finished = kill_in_the_middle(vllm, "VLLM::EngineCore")

    assert "loading weights" in finished.stderr


def test_no_row_holds_a_completion_that_vllm_broke_off(vllm: Real) -> None:
    """Ended by SIGTERM, vLLM's engine responds with the partial texts, a status of 200 and finish_reason abort."""
    vllm.input(documents(60))
    tokens = 1200
    started = vllm.start(max_tokens=tokens, generation='{"ignore_eos": true}', max_concurrent_generations=60)
    state = vllm.output.state / "00000.stats.json"
    wait_until(lambda: state.exists() and generating(vllm), 200)

    os.kill(vllm.pid_of("VLLM::EngineCore"), signal.SIGTERM)

    finished = started.finish(500)
    assert finished.rc == 0, finished
    results = [row["rollout_results"][0] for row in vllm.output.rows()]
    assert [result["usage"]["completion_tokens"] for result in results] == [tokens] * 60
    assert {result["finish_reason"] for result in results} == {"length"}
    assert sum(vllm.output.stats()["retries"].values()) >= 1


def generating(job: Real) -> bool:
    """True if the server has generated some tokens of each request, and none to its end."""
    port = next(iter(re.findall(r"--port[= ](\d+)", " ".join(job.processes().values()))), None)
    if not port:
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            figures = answer.read().decode()
    except OSError:
        return False
    generated = re.search(r"^vllm:generation_tokens_total\{.*\} ([\d.e+]+)$", figures, re.MULTILINE)
    return generated is not None and float(generated[1]) > 60 * 50


FORGETFUL = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("forgetful", forgetful)

    async def forgetful(document, generate, run):
        await run.fitter.context()
        run.fitter._limit = None  # as if the server had not reported it
        return await generate(f"Repeat this: {document.text} Now!")
"""


def test_context_of_vllm_is_learned_from_a_rejected_prompt(vllm: Real) -> None:
    rows = documents(50)
    rows[20]["text"] = "These are words of a long document. " * 1000
    vllm.input(rows)
    vllm.options["plugin"] = vllm.plugin("forgetful", FORGETFUL)
    wanted = {"kv_cache_dtype": "fp8", "chunked_prefill": "512", "model_max_context": 1024}
    speculation = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'

    everything(vllm, 50, vllm(tp=2, speculative_config=speculation, **wanted))

    (result,) = [row["rollout_results"][0] for row in vllm.output.rows() if row["rollout_results"][0]["truncated"]]
    assert 0.95 * 1008 < result["usage"]["prompt_tokens"] <= 1008
    stats = vllm.output.stats()
    assert (stats["retries"], stats["given_up"]) == ({"context": 1}, {})
    assert not vllm.processes()


def test_vllm_on_two_nodes(vllm: Real) -> None:
    vllm.input(documents(50))
    options = {"nodes": 2, "tp": 2, "head_address": f"127.0.0.1:{free_port()}"}
    head, other = [vllm.start(node_rank=rank, **options) for rank in (0, 1)]

    everything(vllm, 50, head.finish(300))

    assert other.finish(30).rc == 0
    assert not vllm.processes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"server_arg": "no-such-flag=1"}, ["unrecognized arguments", "--server-arg"]),
        ({"model_max_context": 999_999}, ["greater than the derived max_model_len", "--model-max-context"]),
        ({"model": "no-such/model"}, ["--model"]),
    ],
)
def test_reason_is_reported_when_vllm_cannot_start(vllm: Real, options: dict[str, Any], words: list[str]) -> None:
    vllm.input(documents(5))

    finished = vllm(**options)

    assert finished.rc == 1
    missing = [word for word in words if word not in finished.message]
    assert not missing, finished.stderr
    assert not vllm.processes()


def test_taken_port_is_reported_for_vllm(vllm: Real) -> None:
    vllm.input(documents(5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        finished = vllm(server_arg=f"port={listener.getsockname()[1]}")

    assert finished.rc == 1
    assert "Address already in use" in finished.message


def test_ray_connects_the_nodes_before_vllm_starts(vllm: Real) -> None:
    """Ray is real; vLLM is a fake, because its CPU build cannot use Ray's GPUs."""
    programs = vllm.folder / "bin"
    programs.mkdir()
    see = "import ray; ray.init(log_to_driver=False); print('GPUs', ray.cluster_resources()['GPU'], len(ray.nodes()))"
    python = vllm.bin_folder / "python"
    (programs / "vllm").write_text(
        f'#!/bin/sh\n{python} -c "{see}" > {vllm.folder}/seen.txt 2>&1\n'
        f'exec python3 {ENGINE} --folder {vllm.folder}/engine "$@"\n'
    )
    (programs / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    for path in programs.iterdir():
        path.chmod(0o755)
    vllm.input(documents(20))
    vllm.bin_folder = f"{programs}:{Path(os.sys.executable).parent}:{vllm.bin_folder}"  # type: ignore[attr-defined, assignment]
    options = {"nodes": 2, "tp": 2, "node_backend": "ray", "head_address": f"127.0.0.1:{free_port()}"}
    env = {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}', "RAY_TMPDIR": "/tmp"}
    head, other = [vllm.start(env, node_rank=rank, **options) for rank in (0, 1)]

    everything(vllm, 20, head.finish(200))

    assert "GPUs 2.0 2" in (vllm.folder / "seen.txt").read_text()
    assert other.finish(30).rc == 0
    assert not vllm.processes()


def test_sglang_whose_scheduler_is_killed_costs_no_document(sglang: Real) -> None:
    finished = kill_in_the_middle(sglang, "sglang::scheduler")

    assert "loading weights" in finished.stderr


def test_sglang_on_two_nodes(sglang: Real) -> None:
    sglang.input(documents(30))
    options = {"nodes": 2, "tp": 2, "head_address": f"127.0.0.1:{free_port()}"}
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    head, other = [sglang.start(env, node_rank=rank, **options) for rank in (0, 1)]

    everything(sglang, 30, head.finish(300))

    assert other.finish(60).rc == 0
    assert not sglang.processes()


def test_transformers_serve_as_a_command(vllm: Real) -> None:
    vllm.input(documents(5))
    (vllm.folder / "hub").mkdir()
    program = shlex.quote(str(vllm.bin_folder / "transformers"))
    command = f"{program} serve {{model}} --device cpu --host 127.0.0.1 --port {{port}}"

    everything(vllm, 5, vllm(server="command", server_arg=None, server_command=command, max_tokens=8))

    assert not vllm.processes()


TWO_MODELS = """
    import sdg

    @sdg.hookimpl
    def register_rollouts(register):
        register("own", own)

    async def own(document, generate):
        first = await generate(document.text)
        second = await generate(f"Rate: {first.text}", to="judge")
        return {"text": first.text, "rating": second.text}
"""


def test_two_vllms_are_launched_and_each_gets_its_requests(vllm: Real) -> None:
    vllm.options["plugin"] = vllm.plugin("own", TWO_MODELS)
    vllm.input(documents(20))
    of_judge = {"server": "vllm", "model": vllm.options["model"], "max-tokens": 8, "server-arg": "enforce-eager"}

    models = [f"judge.{key}={value}" for key, value in of_judge.items()]
    finished = vllm.start(models=models).finish(600)  # the second one starts when the first has compiled

    assert finished.rc == 0, finished
    stats = vllm.output.stats()
    assert (stats["rows"], stats["requests"], stats["models"]["judge"]["requests"]) == (20, 40, 20)
    assert 0 < stats["models"]["judge"]["completion_tokens"] <= 8 * 20
    logs = vllm.output.path / ".sdg"
    assert all(list(folder.glob("logs/*.log")) for folder in (logs, logs / "models" / "judge"))
