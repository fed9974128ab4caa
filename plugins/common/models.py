"""The options of further models: `[models.NAME]` in --config, or `--models NAME.KEY=VALUE`.

Each has the options of servers and sampling for itself: what is not given has its usual default, whatever the run's own
model has. A model with neither `base-url` nor `server` is at the run's endpoint.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import sdg

OF_THE_RUN = {"max_concurrent_documents", "models", "rollouts_per_document"}
NOT_LAUNCHED = {"endpoint", "demo"}
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "generation")


def setting(value: str) -> tuple[str, str, str]:
    """A converter for NAME.KEY=VALUE."""
    found = re.fullmatch(r"([A-Za-z][\w-]*)\.([\w-]+)(?:=(.*))?", value, re.DOTALL)
    if not found:
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME.KEY=VALUE, such as judge.base-url=http://HOST:PORT")
    return found[1], found[2].replace("_", "-"), "" if found[3] is None else found[3]


def file_settings(tables: Any, argv: list[str], as_arguments: Callable[..., list[str]]) -> list[str]:
    """The tables `[models.NAME]` of a file as arguments; what the command line also gives is left out.

    Raises:
        UsageError: they are not tables.
    """
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise sdg.UsageError("models must be tables, such as [models.judge]")
    words = zip([*argv, ""], [*argv[1:], "", ""], strict=False)
    given = [word[9:] if word.startswith("--models=") else after for word, after in words if word[:8] == "--models"]
    taken = {word.partition("=")[0].replace("_", "-") for word in given}
    arguments = []
    for name, table in tables.items():
        named = {key: value for key, value in table.items() if f"{name}.{key}".replace("_", "-") not in taken}
        for key, value in named.items():
            if isinstance(value, list) and key.replace("-", "_") in {"model", *SAMPLING}:
                raise sdg.UsageError(f"[models.{name}]: {key} takes one value, not a list")
        arguments += [f"--models={name}.{word[2:]}" for word in as_arguments(named, [])]
    return arguments


def namespaces(
    options: argparse.Namespace,
    settings: list[tuple[str, str, str]],
    parser: argparse.ArgumentParser,
    own: Mapping[str, bool],
    derive: Callable[[argparse.Namespace, list[str]], None],
) -> dict[str, argparse.Namespace]:
    """The options of each further model: those of the run, with its own in place of those that models have.

    Args:
        options: of the run.
        settings: as name, key and value.
        parser: of the run's options.
        own: the names in the namespace that a model may have for itself, and whether it is a flag.
        derive: fills in the other defaults, and checks.

    Raises:
        UsageError: an option is unknown, or no server is given.
    """
    own = {dest: flag for dest, flag in own.items() if dest not in OF_THE_RUN}
    models: dict[str, list[str]] = {}
    for name, key, value in settings:
        if key.replace("-", "_") not in own:
            near = sdg.nearest(key, [dest.replace("_", "-") for dest in own])
            raise sdg.UsageError(f"models.{name}.{key}: a model has no such option; {near}")
        flag = own[key.replace("-", "_")]
        if value == "true" or (flag and not value):
            models.setdefault(name, []).append(f"--{key}")
        elif not (flag and value == "false"):
            models.setdefault(name, []).append(f"--{key}={value}")
    found, program = {}, parser.prog
    for name, words in models.items():
        parser.prog = f"{program}: [models.{name}]"
        parsed = vars(parser.parse_args(words))
        merged = argparse.Namespace(**{**vars(options), **{dest: parsed[dest] for dest in own}, "models": {}})
        place_of(merged, options, name)
        derive(merged, words)
        found[name] = merged
    parser.prog = program
    if options.max_concurrent_documents is None:  # more than requests: some documents wait for a retry, or compute
        requests = sum(each.max_concurrent_generations for each in (options, *found.values()))
        options.max_concurrent_documents = math.ceil(1.5 * requests / options.rollouts_per_document) + 16
    return found


def place_of(model: argparse.Namespace, run: argparse.Namespace, name: str) -> None:
    """Settle which server a model has."""
    if model.server is None and not model.base_url:
        if run.server not in NOT_LAUNCHED:
            message = f"the GPUs of --server {run.server} hold one model: add base-url or server"
            raise sdg.UsageError(f"[models.{name}]: {message}")
        model.server, model.base_url = run.server, run.base_url
        if model.api_key_env == "OPENAI_API_KEY":
            model.api_key_env, model.header_env = run.api_key_env, model.header_env or run.header_env
    if getattr(model, "nodes", 1) > 1:
        raise sdg.UsageError(f"[models.{name}]: nodes: a further model cannot span several machines")


def recordable(models: Mapping[str, argparse.Namespace]) -> dict[str, dict[str, Any]]:
    """What a run's state records of its further models: no secrets."""
    names = ("server", "base_url", "model", "tp", "pp", "dp", "replicas", "server_arg", *SAMPLING)
    found = {}
    for name, options in models.items():
        kept = {key: value for key in names if (value := getattr(options, key, None)) is not None}
        found[name] = {**kept, "base_url": [sdg.redact(url) for url in kept.get("base_url", [])]}
    return found
