"""vLLM on this machine's GPUs, or on those of several machines (https://docs.vllm.ai)."""

from __future__ import annotations

import contextlib
import shlex
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.servers.launching import launching, nodes

PHASES = (
    (r"Downloading|Fetching \d+ files", "downloading the model"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model|Loading safetensors|Loading weights", "loading weights"),
    (r"torch\.compile takes|Dynamo bytecode|[Cc]ompiling a graph", "compiling"),
    (r"KV cache size|Maximum concurrency", "warming up"),
    (r"[Cc]apturing CUDA graph|Graph capturing", "capturing CUDA graphs"),
    (r"Starting vLLM server|Application startup", "opening its port"),
    (r"the Ray cluster has", "gathering GPUs"),
)
MEMORY = "raise --gpu-memory-utilization, lower --model-max-context, or use more GPUs (--tp)"
FATAL = (
    (r"Free memory on device .* less than desired", "another process uses the GPU, or lower --gpu-memory-utilization"),
    (r"No available memory for the cache blocks|larger than the available KV cache memory", MEMORY),
    (r"CUDA out of memory|OutOfMemoryError", MEMORY),
    (r"is greater than the derived max_model_len", "lower --model-max-context"),
    (r"must be divisible by tensor parallel size|divisible by.*tensor", "choose another --tp"),
    (r"World size .* is larger than the number of available GPUs", "lower --tp and --pp, or add --nodes"),
    *launching.COMMON_FATAL,
    (r"WorkerProc initialization failed|EngineCore failed to start|Engine core initialization failed", ""),
    (r"died unexpectedly|EngineDeadError", ""),
)


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("vllm", vllm)


@contextlib.asynccontextmanager
async def vllm(run: sdg.Run) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch vLLM with --model on this machine's GPUs, or on those of --nodes."""
    model = launching.model_of(run)
    program = launching.executable("vllm", "vllm")

    def command(spot: launching.Spot) -> list[str]:
        arguments = launching.flags(settings(run, spot), run.options.server_arg, negate=True)
        serve = [str(program), "serve", model, *arguments]
        if run.options.node_backend == "ray":
            return over_ray(run, spot, launching.interpreter(program), serve)
        return serve

    description = launching.Program(
        "vllm",
        command,
        launching.served_name(run),
        PHASES,
        FATAL,
        launching.version_of("vllm", program),
        launching.cache_folder("vllm", "VLLM_CACHE_ROOT"),
    )
    async with launching.serve(run, description) as replicas:
        yield replicas


def settings(run: sdg.Run, spot: launching.Spot) -> dict[str, Any]:
    """The flags of `vllm serve` on one machine."""
    options = run.options
    chunked = options.chunked_prefill
    return {
        **({"host": "127.0.0.1", "port": spot.port} if not spot.node else {"headless": True}),
        "tensor-parallel-size": options.tp if options.tp > 1 else None,
        "pipeline-parallel-size": options.pp if options.pp > 1 else None,
        "data-parallel-size": options.dp if options.dp > 1 else None,
        **(across(options, spot) if spot.nodes > 1 else {}),
        "max-model-len": options.model_max_context,
        "gpu-memory-utilization": options.gpu_memory_utilization,
        "quantization": options.quantization,
        "kv-cache-dtype": options.kv_cache_dtype,
        "enable-chunked-prefill": None if chunked is None else chunked != "off",
        "max-num-batched-tokens": chunked if chunked and chunked.isdigit() else None,
        "speculative-config": options.speculative_config,
        "disable-uvicorn-access-log": True,
    }


def across(options: Any, spot: launching.Spot) -> dict[str, Any]:
    """The flags that let machines find each other: replicas on each, or one replica over all of them."""
    if options.node_backend == "ray":
        return {"distributed-executor-backend": "ray"}
    if options.dp == 1:
        place = {"nnodes": spot.nodes, "node-rank": spot.node}
        return {**place, "master-addr": spot.head, "master-port": spot.meeting_port}
    if options.dp % spot.nodes:
        raise sdg.UsageError(f"--dp {options.dp} cannot be shared evenly by --nodes {spot.nodes}")
    local = options.dp // spot.nodes
    return {
        "data-parallel-size-local": local,
        "data-parallel-start-rank": spot.node * local if spot.node else None,
        "data-parallel-address": spot.head,
        "data-parallel-rpc-port": spot.meeting_port,
    }


def over_ray(run: sdg.Run, spot: launching.Spot, python: Path, serve: list[str]) -> list[str]:
    """Start Ray here, and on the first machine vLLM, once all GPUs are there. All of it ends with the guard."""
    ray = shlex.quote(str(launching.executable("ray", "ray")))
    if spot.node:
        meeting = f"{socket.gethostbyname(spot.head)}:{spot.meeting_port}"  # Ray does not look names up as others do
        wait = f"until (exec 3<>/dev/tcp/{spot.head}/{spot.meeting_port}) 2>/dev/null; do sleep 0.5; done"
        return ["bash", "-c", f"{wait}; exec {ray} start --address={meeting} --disable-usage-stats --block"]
    own = nodes.own_address(spot.head)
    meeting = f"{own}:{spot.meeting_port}"
    start = f"{ray} start --head --node-ip-address={own} --port={spot.meeting_port} --include-dashboard=false"
    gpus = run.options.tp * run.options.pp * run.options.dp
    wait = shlex.join(
        [str(python), "-I", str(Path(nodes.__file__).with_name("ray_wait.py")), str(gpus), str(spot.nodes)]
    )
    steps = [f"{start} --disable-usage-stats", f"export RAY_ADDRESS={meeting}", wait, f"exec {shlex.join(serve)}"]
    return ["bash", "-c", " && ".join(steps)]
