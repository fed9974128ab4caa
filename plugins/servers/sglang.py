"""SGLang on this machine's GPUs, or on those of several nodes (https://docs.sglang.ai)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import sdg
from sdg_plugins.servers.launching import launching
from sdg_plugins.servers.launching.processes import Placement, Program

PHASES = (
    (r"Downloading|Fetching \d+ files", "downloading the model"),
    (r"Load weight begin|Loading safetensors", "loading weights"),
    (r"KV Cache is allocated", "allocating the KV cache"),
    (r"Capture .*graph begin|[Cc]apturing batches", "capturing CUDA graphs"),
    (r"Application startup|Uvicorn running", "warming up"),
)
MEMORY = "change --gpu-memory-utilization (--mem-fraction-static), lower --model-max-context, or use more GPUs (--tp)"
FATAL = (
    (r"no GPU memory for the KV cache|Not enough memory|CUDA out of memory|OutOfMemoryError", MEMORY),
    (r"User-specified context_length .* is greater than", "lower --model-max-context"),
    (r"divisible by.*t(ensor|p)|invalid device ordinal", "choose another --tp"),
    *launching.COMMON_FATAL,
    (r"Capture cuda graph failed", "add --server-arg disable-cuda-graph, or " + MEMORY),
    (r"scheduler died during initialization|watchdog timeout|Received sigquit from a child process", ""),
)


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("sglang", sglang)


@contextlib.asynccontextmanager
async def sglang(run: sdg.Run) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch SGLang with --model on this machine's GPUs, or on those of --nodes."""
    model = checked_model(run)
    path = launching.find_program("sglang", "sglang")

    def command(placement: Placement) -> list[str]:
        flags = launching.as_flags(server_flags(run, placement), run.options.server_arg)
        return [str(launching.python_of(path)), "-m", "sglang.launch_server", "--model-path", model, *flags]

    program = Program(
        "sglang",
        command,
        launching.served_name(run),
        PHASES,
        FATAL,
        launching.version_of("sglang", path),
        launching.cache_folder("sglang", "SGLANG_CACHE_DIR"),
        {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},  # otherwise /health generates a token, which takes a second
    )
    async with launching.serve(run, program) as replicas:
        yield replicas


def checked_model(run: sdg.Run) -> str:
    """The model to load; UsageError if SGLang cannot be launched with these options."""
    if run.options.node_backend != "native":
        raise sdg.UsageError("--node-backend ray requires --server vllm; SGLang connects nodes by itself")
    return launching.model_of(run)


def server_flags(run: sdg.Run, placement: Placement) -> dict[str, Any]:
    """The flags of SGLang's server on one node."""
    options = run.options
    chunked = options.chunked_prefill
    across = {
        "nnodes": placement.nodes,
        "node-rank": placement.node,
        "dist-init-addr": f"{placement.head}:{placement.rendezvous_port}",
    }
    return {
        "host": "127.0.0.1",
        "port": placement.port or None,
        "tp-size": options.tp if options.tp > 1 else None,
        "pp-size": options.pp if options.pp > 1 else None,
        "dp-size": options.dp if options.dp > 1 else None,
        **(across if placement.nodes > 1 else {}),
        # SGLang's own choice may be taken before it uses it; ranks of data parallelism need one port each.
        "nccl-port": placement.rendezvous_port if placement.nodes == options.dp == 1 else None,
        "context-length": options.model_max_context,
        "mem-fraction-static": options.gpu_memory_utilization,
        "quantization": options.quantization,
        "kv-cache-dtype": options.kv_cache_dtype,
        "chunked-prefill-size": {"on": None, "off": -1}.get(chunked, chunked),
        **{f"speculative-{name}": value for name, value in (options.speculative_config or {}).items()},
        "enable-metrics": True,
        "log-level-http": "warning",
    }
