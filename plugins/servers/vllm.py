"""vLLM on this machine's GPUs, or on those of several nodes (https://docs.vllm.ai)."""

from __future__ import annotations

import contextlib
import shlex
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import sdg
from sdg_plugins.servers.launching import launching, ray_wait
from sdg_plugins.servers.launching.processes import Placement, Program

PHASES = (
    (r"Downloading|Fetching \d+ files", "downloading the model"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model|Loading safetensors|Loading weights", "loading weights"),
    (r"torch\.compile takes|Dynamo bytecode|[Cc]ompiling a graph", "compiling"),
    (r"KV cache size|Maximum concurrency", "warming up"),
    (r"[Cc]apturing CUDA graph|Graph capturing", "capturing CUDA graphs"),
    (r"Starting vLLM server|Application startup", "opening the port"),
    (r"the Ray cluster has", "waiting for the GPUs of all nodes"),
)
MEMORY = "raise --gpu-memory-utilization, lower --model-max-context, or use more GPUs (--tp)"
FATAL = (
    (r"Free memory on device .* less than desired", "free the GPU, or lower --gpu-memory-utilization"),
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
    path = launching.find_program("vllm", "vllm")

    def command(placement: Placement) -> list[str]:
        flags = launching.as_flags(server_flags(run, placement), run.options.server_arg, negate=True)
        serve = [str(path), "serve", model, *flags]
        if run.options.node_backend == "ray":
            return ray_command(run, placement, launching.python_of(path), serve)
        return serve

    program = Program(
        "vllm",
        command,
        launching.served_name(run),
        PHASES,
        FATAL,
        launching.version_of("vllm", path),
        launching.cache_folder("vllm", "VLLM_CACHE_ROOT"),
    )
    async with launching.serve(run, program) as replicas:
        yield replicas


def server_flags(run: sdg.Run, placement: Placement) -> dict[str, Any]:
    """The flags of `vllm serve` on one node."""
    options = run.options
    chunked = options.chunked_prefill
    return {
        **({"host": "127.0.0.1", "port": placement.port} if not placement.node else {"headless": True}),
        "tensor-parallel-size": options.tp if options.tp > 1 else None,
        "pipeline-parallel-size": options.pp if options.pp > 1 else None,
        "data-parallel-size": options.dp if options.dp > 1 else None,
        **(multi_node_flags(options, placement) if placement.nodes > 1 else {}),
        "max-model-len": options.model_max_context,
        "gpu-memory-utilization": options.gpu_memory_utilization,
        "quantization": options.quantization,
        "kv-cache-dtype": options.kv_cache_dtype,
        "enable-chunked-prefill": None if chunked is None else chunked != "off",
        "max-num-batched-tokens": chunked if chunked and chunked.isdigit() else None,
        "speculative-config": options.speculative_config,
        "disable-uvicorn-access-log": True,
    }


def multi_node_flags(options: Any, placement: Placement) -> dict[str, Any]:
    """The flags that connect the nodes: with --dp they share its ranks, otherwise one engine spans them all."""
    if options.node_backend == "ray":
        return {"distributed-executor-backend": "ray"}
    if options.dp == 1:
        numbers = {"nnodes": placement.nodes, "node-rank": placement.node}
        return {**numbers, "master-addr": placement.head, "master-port": placement.rendezvous_port}
    if options.dp % placement.nodes:
        raise sdg.UsageError(f"--dp {options.dp} cannot be divided evenly among --nodes {placement.nodes}")
    local = options.dp // placement.nodes
    return {
        "data-parallel-size-local": local,
        "data-parallel-start-rank": placement.node * local if placement.node else None,
        "data-parallel-address": placement.head,
        "data-parallel-rpc-port": placement.rendezvous_port,
    }


def ray_command(run: sdg.Run, placement: Placement, python: Path, serve: list[str]) -> list[str]:
    """A command that joins a Ray cluster; on node 0 it also runs `serve` when all GPUs have joined.

    The guard ends Ray's daemons with the rest.
    """
    ray = shlex.quote(str(launching.find_program("ray", "ray")))
    port = placement.rendezvous_port
    if placement.node:
        address = socket.gethostbyname(placement.head)  # Ray's own look-up may find another one
        wait = f"until (exec 3<>/dev/tcp/{placement.head}/{port}) 2>/dev/null; do sleep 0.5; done"
        return ["bash", "-c", f"{wait}; exec {ray} start --address={address}:{port} --disable-usage-stats --block"]
    from sdg_plugins.servers.launching import nodes

    own = nodes.own_address(placement.head)
    start = f"{ray} start --head --node-ip-address={own} --port={port} --include-dashboard=false"
    gpus = run.options.tp * run.options.pp * run.options.dp
    wait = shlex.join([str(python), "-I", ray_wait.__file__, str(gpus), str(placement.nodes)])
    steps = [f"{start} --disable-usage-stats", f"export RAY_ADDRESS={own}:{port}", wait, f"exec {shlex.join(serve)}"]
    return ["bash", "-c", " && ".join(steps)]
