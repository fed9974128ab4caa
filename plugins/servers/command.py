"""Any OpenAI-compatible server, launched by a command of the user's."""

import contextlib
import shlex
from collections.abc import AsyncIterator

import sdg
from sdg_plugins.servers import sglang, vllm
from sdg_plugins.servers.launching import launching
from sdg_plugins.servers.launching.processes import Placement, Program


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("command", command)


@contextlib.asynccontextmanager
async def command(run: sdg.Run) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch --server-command; {port} and {model} in it are filled in."""
    words = words_of(run)

    def arguments(placement: Placement) -> list[str]:
        model, port = run.options.model or "", str(placement.port)
        filled = [word.replace("{port}", port).replace("{model}", model) for word in words]
        return filled + launching.as_flags({}, run.options.server_arg)

    # The command may be vLLM or SGLang in a container. Lists of models are not reliable: that of `transformers serve`
    # has the models in its cache, not the one that it serves.
    phases, fatal = vllm.PHASES + sglang.PHASES, vllm.FATAL + sglang.FATAL
    program = Program("command", arguments, run.options.model, phases, fatal, lists_model=False)
    async with launching.serve(run, program) as replicas:
        yield replicas


def words_of(run: sdg.Run) -> list[str]:
    """The words of --server-command; UsageError if they cannot be launched with these options."""
    words = shlex.split(run.options.server_command or "")
    if not any("{port}" in word for word in words):
        raise sdg.UsageError("--server command requires --server-command 'PROGRAM … {port} {model}' with {port} in it")
    if any("{model}" in word for word in words):
        launching.model_of(run)
    if run.options.nodes > 1:
        raise sdg.UsageError("--nodes requires --server vllm or sglang: other servers cannot connect their nodes")
    return words
