"""Launch servers: the options, what server plugins share, and `serve`, which runs the servers of a plugin.

`vllm`, `sglang` and `command` each describe their server as a `Program` and `serve` it; nothing here depends on one of
them. `supervision.py` keeps a server running, `processes.py` and `guard.py` start and end its processes, and `nodes.py`
lets several machines work together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.common.options import json_object, number, one_of, setting
from sdg_plugins.servers.launching.processes import Program

# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_count, _natural, _seconds = number(int, 1), number(int, 0), number(float, 0.1)


def server_argument(value: str) -> tuple[str, Any]:
    """A converter for `KEY=VALUE`: the flag's name, and True, False, or text (JSON is passed on as it is)."""
    name, _, text = value.partition("=")
    name = name.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{value!r}: expected KEY=VALUE")
    if re.search(r"(^|-)(key|token|secret|password)$", name) and "=" in value:
        raise argparse.ArgumentTypeError(
            f"{name}: other users can see command lines; set HF_TOKEN or VLLM_API_KEY instead"
        )
    return name, {"": True, "true": True, "false": False}.get(text.lower(), text) if "=" in value else True


OPTIONS = [
    setting("--tp", "N", "tensor parallelism: GPUs that share each layer", 1, _count),
    setting("--pp", "N", "pipeline parallelism: stages that the layers are divided into", 1, _count),
    setting("--dp", "N", "data parallelism inside one server", 1, _count),
    setting("--replicas", "N", "servers to launch on this machine, each on its own GPUs", 1, _count),
    setting(
        "--gpu-memory-utilization", "X", "share of GPU memory that the server may use", type=number(float, 0.01, 1)
    ),
    setting("--quantization", "NAME", "quantization of the weights, by the server's name for it"),
    setting("--kv-cache-dtype", "NAME", "data type of the KV cache, such as fp8"),
    setting("--chunked-prefill", "N", "tokens per prefill step; or on, or off", type=one_of("on", "off", more=True)),
    setting("--speculative-config", "JSON", "speculative decoding, in the server's own terms", type=json_object),
    setting(
        "--server-arg",
        "K=V",
        "any other flag of the server, without its dashes; repeatable",
        action="append",
        type=server_argument,
    ),
    setting("--server-command", "C", "the command for --server command; {port} and {model} are filled in"),
    setting("--nodes", "N", "machines that hold one model together, with one process on each", 1, _count),
    setting("--node-rank", "I", "number of this node, from 0; default: SLURM_NODEID, else 0", type=_natural),
    setting("--head-address", "H[:PORT]", "address of node 0, where the others join; default: Slurm's first node"),
    setting("--node-backend", "NAME", "how vLLM connects the nodes: native or ray", "native", one_of("native", "ray")),
    setting("--start-timeout", "S", "maximum seconds until a launched server is ready", 3600.0, _seconds),
    setting("--stall-timeout", "S", "seconds without a token or response until a server is restarted", 300.0, _seconds),
    setting("--max-restarts", "N", "maximum restarts of a server in a row without a response", 6, _natural),
    setting("--no-compile-lock", None, "let servers with the same configuration compile at once", action="store_true"),
]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    for option in OPTIONS:
        parser.add(option)


def check_layout(options: argparse.Namespace) -> None:
    """Raise UsageError if replicas, nodes and parallelism contradict each other, whatever the machine."""
    if options.nodes > 1 and options.replicas > 1:
        raise sdg.UsageError("--replicas requires --nodes 1: with several nodes, start several runs")
    if options.replicas > 1 and "port" in dict(options.server_arg or []):
        raise sdg.UsageError("--server-arg port cannot be shared by several --replicas: omit it")
    if options.node_backend == "native" and options.dp == 1 and options.tp * options.pp % options.nodes:
        raise sdg.UsageError(
            f"--tp {options.tp} × --pp {options.pp} cannot be divided evenly among --nodes {options.nodes}"
        )


# ── What servers have in common ──────────────────────────────────────────────────────────────────────────────────────

# Lines of libraries that all servers use, and hints
COMMON_FATAL = (
    (r"unrecognized arguments|error: argument|invalid choice", "compare --server-arg with the server's own --help"),
    (r"[Aa]ddress already in use", "omit --server-arg port to use a free port"),
    (r"Invalid repository ID|is not a local folder and is not a valid model|Repo id must", "check --model"),
    (r"(LocalEntry|Repository)NotFoundError", "--model was found neither on this machine nor on the Hub"),
    (r"401 Client Error|gated repo|GatedRepoError", "set HF_TOKEN, and request access to --model on the Hub"),
)


def as_flags(ours: Mapping[str, Any], given: list[tuple[str, Any]] | None, *, negate: bool = False) -> list[str]:
    """Command-line flags for a server.

    Args:
        ours: names and values that follow from our options. None omits a flag, True gives one without a value.
        given: those of --server-arg; they replace ours.
        negate: False gives `--no-NAME`; otherwise it omits the flag.
    """
    arguments: list[str] = []
    merged: dict[str, list[Any]] = {name: [value] for name, value in ours.items()}
    for name, value in given or []:
        merged[name] = [value] if name in ours else [*merged.get(name, []), value]
    for name, values in merged.items():
        for value in values:
            if value is True:
                arguments.append(f"--{name}")
            elif value is False and negate:
                arguments.append(f"--no-{name}")
            elif value is not None and value is not False:
                text = json.dumps(value) if isinstance(value, dict) else str(value)
                arguments += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return arguments


def find_program(name: str, extra: str) -> Path:
    """The path of a program: beside this Python, else in PATH. `extra` is what installs it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise sdg.ServerError(
            f"{name} is not installed: run `pip install 'sdg-engine[{extra}]'`, or add the bin folder of the "
            "environment that has it to PATH"
        )
    return Path(found)


def python_of(program: Path) -> Path:
    """The Python of the environment that a script belongs to."""
    beside = program.resolve().with_name("python")
    return beside if beside.exists() else Path(sys.executable)


def version_of(package: str, program: Path) -> str:
    """A package's version in the environment of a program, found without starting it; "" if unknown."""
    found = sorted(program.resolve().parent.parent.glob(f"lib/python3*/site-packages/{package}-*.dist-info"))
    return found[-1].name.split("-")[1].removesuffix(".dist") if found else ""


def model_of(run: sdg.Run) -> str:
    """The model to load; UsageError if --model is missing or names a folder that does not exist."""
    model = run.options.model
    if not model:
        raise sdg.UsageError(f"--server {run.options.server} requires --model: a name on the Hub, or a folder")
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise sdg.UsageError(f"--model {model}: no such folder")
    return str(model)


def served_name(run: sdg.Run) -> str:
    """The model's name in requests: --server-arg served-model-name, else --model."""
    return str(dict(run.options.server_arg or []).get("served-model-name", run.options.model))


def cache_folder(name: str, variable: str) -> Path:
    """Where a server caches what it compiles: its own variable, else a folder of the XDG cache directory."""
    given = os.environ.get(variable)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


# ── Serving ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use; empty if there are none, or they are unknown."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split() if done.returncode == 0 else []


def gpus_needed(options: argparse.Namespace) -> int:
    """How many GPUs of this machine the replicas take."""
    return int(options.replicas * -(-options.tp * options.pp * options.dp // options.nodes))


def gpus_of_replicas(options: argparse.Namespace) -> list[list[str]]:
    """The GPUs of each replica on this machine; an empty list leaves the choice to the server."""
    width = -(-options.tp * options.pp * options.dp // options.nodes)
    shared = getattr(options, "gpus", None)  # those of this model, if several are launched
    gpus = shared or visible_gpus()
    if gpus and options.replicas * width > len(gpus):
        spread = f" on {options.nodes} nodes" if options.nodes > 1 else ""
        raise sdg.ServerError(
            f"--replicas {options.replicas} × --tp {options.tp} × --pp {options.pp} × --dp {options.dp}{spread} "
            f"need {options.replicas * width} GPUs on this machine, but {len(gpus)} are visible: lower one of them"
        )
    if options.replicas == 1:
        return [shared or []]
    return [gpus[i * width : (i + 1) * width] for i in range(options.replicas)]


@contextlib.asynccontextmanager
async def serve(run: sdg.Run, program: Program) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch the servers of a program, on this machine or on several, and end them when the context is left.

    Yields one `Upstream` for each replica. On nodes other than node 0 it yields none, after the run there has ended.
    """
    import aiohttp

    from sdg_plugins.servers.launching import nodes
    from sdg_plugins.servers.launching.supervision import Replica, launch

    options = run.options
    nodes.derive_node_options(options)
    check_layout(options)
    if options.node_rank:
        await nodes.follow_head(run, lambda placement: launch(run, program, placement, 0, []))
        yield []
        return
    gpus = gpus_of_replicas(options)
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        replicas = [Replica(run, program, number, own, session) for number, own in enumerate(gpus)]
        if options.nodes > 1:
            replicas[0].head = await stack.enter_async_context(nodes.Head(run))

        def on_failure(replica: Replica, exc: sdg.Error) -> None:
            replica.upstream.give_up()
            if replica.ready_once and not all(other.upstream.gone for other in replicas):
                sdg.say(f"{exc}; the run continues on the other replicas")
            else:
                run.stop(exc)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(replica.supervise(on_failure)) for replica in replicas]
            try:
                yield [replica.upstream for replica in replicas]
            finally:
                for task in tasks:
                    task.cancel()
