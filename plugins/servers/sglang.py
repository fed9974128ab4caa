"""SGLang on this machine's GPUs, or on those of several machines (https://docs.sglang.ai)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import sdg
from sdg_plugins.servers.launching import launching

PHASES = (
    (r"Downloading|Fetching \d+ files", "downloading the model"),
    (r"Load weight begin|Loading safetensors", "loading weights"),
    (r"KV Cache is allocated", "allocating the KV cache"),
    (r"Capture .*graph begin|[Cc]apturing batches", "capturing CUDA graphs"),
    (r"Application startup|Uvicorn running", "warming up"),
)
MEMORY = (
    "change --gpu-memory-utilization (its --mem-fraction-static), lower --model-max-context, or use more GPUs (--tp)"
)
FATAL = (
    (r"no GPU memory for the KV cache|Not enough memory|CUDA out of memory|OutOfMemoryError", MEMORY),
    (r"User-specified context_length .* is greater than", "lower --model-max-context"),
    (r"divisible by.*t(ensor|p)|invalid device ordinal", "choose another --tp"),
    *launching.COMMON_FATAL,
    (r"Capture cuda graph failed", "--server-arg disable-cuda-graph, or " + MEMORY),
    (r"scheduler died during initialization|watchdog timeout|Received sigquit from a child process", ""),
)


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("sglang", sglang)


@contextlib.asynccontextmanager
async def sglang(run: sdg.Run) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch SGLang with --model on this machine's GPUs, or on those of --nodes."""
    model = check(run)
    program = launching.executable("sglang", "sglang")

    def command(spot: launching.Spot) -> list[str]:
        arguments = launching.flags(settings(run, spot), run.options.server_arg)
        return [str(launching.interpreter(program)), "-m", "sglang.launch_server", "--model-path", model, *arguments]

    cache = launching.cache_folder("sglang", "SGLANG_CACHE_DIR")
    version = launching.version_of("sglang", program)
    description = launching.Program(
        "sglang",
        command,
        launching.served_name(run),
        PHASES,
        FATAL,
        version,
        cache,
        {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},  # /health would generate a token, and take a second
    )
    async with launching.serve(run, description) as replicas:
        yield replicas


def check(run: sdg.Run) -> str:
    """The model; UsageError if the options do not fit."""
    if run.options.node_backend != "native":
        raise sdg.UsageError("--node-backend ray goes with --server vllm; SGLang joins machines by itself")
    return launching.model_of(run)


def settings(run: sdg.Run, spot: launching.Spot) -> dict[str, Any]:
    """The flags of SGLang's server on one machine."""
    options = run.options
    chunked = options.chunked_prefill
    across = {"nnodes": spot.nodes, "node-rank": spot.node, "dist-init-addr": f"{spot.head}:{spot.meeting_port}"}
    return {
        "host": "127.0.0.1",
        "port": spot.port or None,
        "tp-size": options.tp if options.tp > 1 else None,
        "pp-size": options.pp if options.pp > 1 else None,
        "dp-size": options.dp if options.dp > 1 else None,
        **(across if spot.nodes > 1 else {}),
        # Its own choice is free only at that moment; ranks of data parallelism need one each.
        "nccl-port": spot.meeting_port if spot.nodes == options.dp == 1 else None,
        "context-length": options.model_max_context,
        "mem-fraction-static": options.gpu_memory_utilization,
        "quantization": options.quantization,
        "kv-cache-dtype": options.kv_cache_dtype,
        "chunked-prefill-size": {"on": None, "off": -1}.get(chunked, chunked),
        **{f"speculative-{name}": value for name, value in (options.speculative_config or {}).items()},
        "enable-metrics": True,
        "log-level-http": "warning",
    }
