"""The identity of a run: everything that changes its data, and what may be done when some of it has changed.

A plugin that was edited makes a different run. With --accept-edited-plugin the run goes on nevertheless: documents that
are not finished run with the new code, and their results say so (see `edited`). With --retry-failed alone, only the
documents that have failed do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import sdg
from sdg_plugins.common.command_line import CORE, OPTIONS
from sdg_plugins.common.models import OF_THE_RUN
from sdg_plugins.common.steps import SCHEME

CODE = ("plugin_version", "resources", "wrappers")  # what of an identity are versions of code
EDITED = "sdg_plugin_version"  # key of a result of other code than the run began with; kept in `extra`


def identity_of(run: sdg.Run, reader: sdg.Reader) -> dict[str, Any]:
    """Everything that changes the data: input, rollout and the version of its plugin, model, sampling, slicing."""
    entry = run.plugins.rollouts[run.options.rollout]
    options = {name: getattr(run.options, name) for name in run.options.identity}
    own = {"input": dict(reader.identity), "rollout": run.options.rollout, "plugin_version": entry.version}
    others = {name: of for name, of in run.plugins.resources_of(run.options.rollout).items() if of.package != "sdg"}
    if versions := {name: of.version for name, of in others.items() if of.plugin != entry.plugin}:
        own["resources"] = versions
    if versions := {name: run.plugins.versions[name] for name in wrappers(run.plugins) if name != entry.plugin}:
        own["wrappers"] = versions
    if run.models:
        own["models"] = identity_of_models(run)
    identity: dict[str, Any] = json.loads(json.dumps({**own, **options, "model": run.model}))
    return identity


def wrappers(plugins: sdg.Plugins) -> list[str]:
    """The plugins that are links of the chain of requests, without the bundled ones."""
    names = sorted(impl.plugin_name for impl in plugins.manager.hook.wrap_requests.get_hookimpls())
    return [name for name in names if not name.startswith("sdg_plugins.") and name in plugins.versions]


def identity_of_models(run: sdg.Run) -> dict[str, Any]:
    """What of the further models changes the data: names, models, and options of the run's identity that they have."""
    return {
        name: {**{key: getattr(model.options, key) for key in defaults_of_models()}, "model": model.model}
        for name, model in run.models.items()
    }


def defaults_of_models() -> dict[str, Any]:
    """The options of the run's identity that each model has for itself, with their defaults."""
    own = [option for option in OPTIONS["server"] + OPTIONS["sampling"] if option.identity]
    return {option.dest: option.default for option in own if option.dest not in {*OF_THE_RUN, "model"}}


# ── Comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def changes_since(run: sdg.Run, reader: sdg.Reader, recorded: Mapping[str, Any]) -> list[str]:
    """The options that differ from those of a recorded run and would change its data; a line each.

    Edited code is left out if the run is to go on with it.
    """
    identity, earlier = identity_of(run, reader), recorded_identity(recorded)
    if earlier["input"] != identity["input"] and reader.continues(earlier["input"]):
        earlier["input"] = identity["input"]
    options = list(differences(without_code(earlier), without_code(identity)))
    edits = edits_between(earlier, identity)
    accepted, retried = run.options.accept_edited_plugin, run.options.retry_failed
    if edits and not options and (accepted or retried):
        which = "documents that are not finished" if accepted else "only documents that have failed"
        sdg.say(f"{'; '.join(edits)}: {which} run with the new code")
    return [*([] if accepted or retried else edits), *options]


def recorded_identity(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The identity in a `run.json`; what an older sdg has not recorded had its default."""
    identity = {**{option.dest: option.default for option in CORE if option.identity}, **recorded["identity"]}
    if models := identity.get("models"):
        identity["models"] = {name: {**defaults_of_models(), **model} for name, model in models.items()}
    return identity


def code_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The versions of code in an identity."""
    return {name: identity[name] for name in CODE if name in identity}


def without_code(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without versions of code."""
    return {name: value for name, value in identity.items() if name not in CODE}


class Edit(str):
    """A line on code that has changed, among lines on options."""

    __slots__ = ()


def edits_between(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What code has changed, an `Edit` each."""
    found: list[str] = []
    if earlier["plugin_version"] != now["plugin_version"]:
        found.append(Edit("the plugin's code has changed"))
    for kind, what in (("resources", "the resource"), ("wrappers", "the plugin")):
        before, after = earlier.get(kind, {}), now.get(kind, {})
        names = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        found += [Edit(f"the code of {what} {name} has changed") for name in names]
    return found


def different_run(run: sdg.Run, changes: list[str]) -> sdg.StateError:
    """The error for a state of a different run."""
    edited = all(isinstance(change, Edit) for change in changes)
    restore = (
        "Restore it, run the unfinished documents with the new code (--accept-edited-plugin) or the failed ones "
        "(--retry-failed), choose another --output"
        if edited
        else "Restore the original options, choose another --output"
    )
    again = f"--fresh --output-config {run.options.output_config}" if run.options.reader == SCHEME else "--fresh"
    what = "; ".join(changes[:10])
    return sdg.StateError(
        f"state {run.state} belongs to a different run: {what}. {restore}, or start over with {again}"
    )


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """The differences between two JSON values, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


# ── Edits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_edits(run: sdg.Run, now: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on, perhaps with edited code; sets `run.edited`.

    Args:
        run: whose.
        now: the record as it would be without edits.
        recorded: the record of the earlier processes.
    """
    before, after = code_of(recorded["identity"]), code_of(now["identity"])
    versions: list[Any] = recorded.get("code", [before])  # the first is the one that the run began with
    if after not in versions:
        versions = [*versions, after]
    run.edited = "" if after == versions[0] else label_of(after)
    # A run that only retries failures stays one of the earlier code: a plain rerun does not go on with the new one.
    identity = {**without_code(now["identity"]), **(after if run.options.accept_edited_plugin else before)}
    return {**now, "identity": identity, **({"code": versions} if len(versions) > 1 else {})}


def label_of(code: Mapping[str, Any]) -> str:
    """Versions of code as a text for rows and cards."""
    others = {**code.get("resources", {}), **code.get("wrappers", {})}
    return ", ".join([str(code["plugin_version"]), *(f"{name} {version}" for name, version in others.items())])


def edited(run: sdg.Run, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the version of the code that has made them, unless the run began with it."""
    return [{EDITED: run.edited, **result} for result in results] if run.edited else results


def provenance(run: sdg.Run) -> dict[str, str]:
    """Key-value metadata for the files of a run."""
    names = {
        "version": sdg.__version__,
        "fingerprint": run.fingerprint,
        "model": run.model,
        "rollout": run.options.rollout,
        "input_revision": run.input_revision,
    }
    return {f"sdg.{name}": value for name, value in names.items()}
