"""The servers and clients of further models, which a rollout asks by `generate(prompt, to="NAME")`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sdg
from sdg_plugins.common.checks import check_servers, entering
from sdg_plugins.common.models import NOT_LAUNCHED
from sdg_plugins.servers.connecting import limit_of_files
from sdg_plugins.servers.launching import launching

Servers = Sequence[str | sdg.Upstream]
Connect = Callable[[sdg.Run, Servers], contextlib.AbstractAsyncContextManager[Any]]


class CountsOfModel(Counter[str]):
    """The counts of a further model. Each is also added to those of the run, under its own name and the model's."""

    def __init__(self, name: str = "", whole: Counter[str] | None = None) -> None:
        super().__init__()
        self._name, self._whole = name, Counter() if whole is None else whole

    def __setitem__(self, key: str, value: int) -> None:
        more = value - self.get(key, 0)
        self._whole[key] += more
        self._whole[f"models.{self._name}.{key}"] += more
        super().__setitem__(key, value)

    def update(self, *arguments: Any, **named: int) -> None:
        """See `Counter`, which goes around `__setitem__` at first."""
        for key, value in Counter(*arguments, **named).items():
            self[key] += value


def runs_of(run: sdg.Run) -> dict[str, sdg.Run]:
    """A run for each further model, with its options, and a state for the logs of its server."""
    found = {}
    for name, options in run.options.models.items():
        counts = CountsOfModel(name, run.counts)
        state = run.state / "models" / name
        found[name] = dataclasses.replace(
            run, options=options, state=state, counts=counts, models={}, client=None, fitter=None, model=""
        )
    return found


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Name the model in errors of its server; "" is the run's own."""
    try:
        yield
    except sdg.Error as exc:
        if name and not exc.said and f"models.{name}" not in str(exc):
            exc.args = (f"[models.{name}]: {exc}",)
        raise


async def start(run: sdg.Run, stack: contextlib.AsyncExitStack) -> dict[str, Servers]:
    """Enter the servers of a run and of its further models, each under its name; "" is the run's own."""
    runs = {"": run, **runs_of(run)}
    if run.options.models:
        share_gpus(runs)
    started: dict[str, Servers] = {}
    for name, each in runs.items():
        if name and not started[""]:  # this process only lends its GPUs
            break
        server = each.options.server
        entry = run.plugins.servers[server]
        with named(name), sdg.at_work(f"the server {server!r}", entry.factory):
            started[name] = servers = await stack.enter_async_context(entering(entry, "server", server, each))
            check_servers(servers, f"the server {server!r} of plugin {entry.plugin}{sdg.place_of(entry.factory)}")
    return started


def share_gpus(runs: Mapping[str, sdg.Run]) -> None:
    """Give each model that is launched GPUs of its own. Raises ServerError if there are too few."""
    launched = {name: run for name, run in runs.items() if run.options.server not in NOT_LAUNCHED}
    gpus = launching.visible_gpus() if len(launched) > 1 else []
    needed = {name: launching.gpus_needed(run.options) for name, run in launched.items()}
    if gpus and sum(needed.values()) > len(gpus):
        each = ", ".join(f"{name or 'the first model'} {number}" for name, number in needed.items())
        total = sum(needed.values())
        message = f"the models need {total} GPUs on this machine ({each}), but {len(gpus)} are visible"
        raise sdg.ServerError(f"{message}: lower --tp, --pp, --dp or --replicas, or give one of them a base-url")
    for name, run in launched.items():
        run.options.gpus, gpus = gpus[: needed[name]], gpus[needed[name] :]


async def connect_models(
    run: sdg.Run, servers: Mapping[str, Servers], connecting: Connect, stack: contextlib.AsyncExitStack
) -> None:
    """Connect the run's client and those of its further models: sets `run.client` and `run.models`."""
    runs = {"": run, **runs_of(run)}
    limit_of_files(sum(each.options.max_concurrent_generations for each in runs.values()))
    for name, each in runs.items():
        with named(name):
            each.client = await stack.enter_async_context(connecting(each, servers.get(name, [])))
    run.models = {name: each for name, each in runs.items() if name}
