"""Any server that speaks the protocol, started by a command of the user's."""

import contextlib
import shlex
from collections.abc import AsyncIterator

import sdg
from sdg_plugins.servers import sglang, vllm
from sdg_plugins.servers.launching import launching


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("command", command)


@contextlib.asynccontextmanager
async def command(run: sdg.Run) -> AsyncIterator[list[sdg.Upstream]]:
    """Launch --server-command; {port} and {model} in it are filled in."""
    words = words_of(run)

    def arguments(spot: launching.Spot) -> list[str]:
        given = launching.flags({}, run.options.server_arg)
        filled = [word.replace("{port}", str(spot.port)).replace("{model}", run.options.model or "") for word in words]
        return filled + given

    # `transformers serve`, for one, lists what lies in its cache, not what it serves.
    phases, fatal = vllm.PHASES + sglang.PHASES, vllm.FATAL + sglang.FATAL  # it may be one of them, in a container
    program = launching.Program("command", arguments, run.options.model, phases, fatal, lists_model=False)
    async with launching.serve(run, program) as replicas:
        yield replicas


def words_of(run: sdg.Run) -> list[str]:
    """The words of --server-command; UsageError if it cannot be launched."""
    words = shlex.split(run.options.server_command or "")
    if not any("{port}" in word for word in words):
        raise sdg.UsageError("--server command needs --server-command 'PROGRAM … {port} {model}', with {port} in it")
    if any("{model}" in word for word in words):
        launching.model_of(run)
    if run.options.nodes > 1:
        raise sdg.UsageError("--nodes goes with --server vllm or sglang: nothing tells other commands of each other")
    return words
