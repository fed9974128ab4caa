"""The files of a model that are needed to count tokens: its tokenizer and its chat template."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import sdg

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE_FIELDS = ("reasoning_effort", "documents")  # fields of a payload that servers pass to the template


class Unusable(Exception):
    """A way of counting tokens is not available, or has stopped working.

    Attributes:
        status: the HTTP status with which a server refused; 0 if it did not.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def model_files(run: sdg.Run) -> dict[str, Path]:
    """The model's files by name: from its folder, from the Hub's cache, or from the Hub. Raises Unusable."""
    for name in dict.fromkeys([run.options.model or run.model, run.model]):
        folder = Path(name).expanduser()
        if (folder / FILES[0]).exists():
            return _files_in(folder)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists():
            return files_on_the_hub(name)
    raise Unusable(f"{run.model} is neither a folder with a {FILES[0]} nor a name on the Hub")


def files_on_the_hub(model: str) -> dict[str, Path]:
    """The files of a model on the Hub, from its cache if possible. Raises Unusable."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    reason = "no such file"
    for cached in (True, False):
        try:
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=[*FILES], local_files_only=cached))
        except (HfHubHTTPError, OSError, ValueError) as exc:
            reason = type(exc).__name__
            continue
        if (folder / FILES[0]).exists():
            return _files_in(folder)
    raise Unusable(f"{model} has no {FILES[0]}, neither in the cache nor on the Hub: {reason}")


def _files_in(folder: Path) -> dict[str, Path]:
    return {file: folder / file for file in FILES if (folder / file).exists()}


def chat_template(files: dict[str, Path]) -> Callable[[dict[str, Any]], str] | None:
    """Return a function that renders a payload as `transformers` does; None without a template, or without Jinja.

    It returns "" if the template rejects the messages.
    """
    config = json.loads(files[FILES[1]].read_bytes()) if FILES[1] in files else {}
    template = files[FILES[2]].read_text(encoding="utf-8") if FILES[2] in files else config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    try:
        import jinja2.sandbox
    except ImportError:
        return None
    if not isinstance(template, str):
        return None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals.update(raise_exception=_reject, strftime_now=time.strftime)
    tokens = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
    try:
        compiled = environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except jinja2.TemplateError:
        return None

    def render(payload: dict[str, Any]) -> str:
        given = {"add_generation_prompt": payload.get("add_generation_prompt", True), "tools": payload.get("tools")}
        try:
            return compiled.render(**{**tokens, **given, **template_arguments(payload)}, messages=payload["messages"])
        except (jinja2.TemplateError, TypeError, ValueError, LookupError):
            return ""

    return render


def template_arguments(payload: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a payload has for the chat template, beside messages and tools."""
    named = {name: payload[name] for name in TEMPLATE_FIELDS if name in payload}
    return named | (payload.get("chat_template_kwargs") or {})


def _reject(message: str) -> NoReturn:
    """The function `raise_exception` of templates."""
    raise ValueError(message)


def token_text(value: Any) -> str:
    """The text of a special token, which the tokenizer's configuration has as text or as an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
