from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdg

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEMPLATE_FIELDS = ("reasoning_effort", "documents")  # that servers hand on to the template


class Unusable(Exception):
    """A tokenizer that cannot be had, or does not work any more."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def model_files(run: sdg.Run) -> dict[str, Path]:
    """The model's tokenizer and chat template: in its folder, the Hub's cache, or from the Hub. Raises Unusable."""
    for name in dict.fromkeys([run.options.model or run.model, run.model]):
        folder = Path(name).expanduser()
        if (folder / FILES[0]).exists():
            return {file: folder / file for file in FILES if (folder / file).exists()}
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not folder.exists():
            return files_on_the_hub(name)
    raise Unusable(f"{run.model} is no folder with a {FILES[0]}, and no name on the Hub")


def files_on_the_hub(model: str) -> dict[str, Path]:
    """The files of a model on the Hub, from the Hub's cache where they are there. Raises Unusable."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    reason = "there is no such file"
    for cached in (True, False):
        try:
            found = huggingface_hub.snapshot_download(model, allow_patterns=list(FILES), local_files_only=cached)
        except (HfHubHTTPError, OSError, ValueError) as problem:
            reason = type(problem).__name__
            continue
        if (Path(found) / FILES[0]).exists():
            return {file: Path(found) / file for file in FILES if (Path(found) / file).exists()}
    raise Unusable(f"{model} has no {FILES[0]} here or on the Hub: {reason}")


def chat_template(files: dict[str, Path]) -> Callable[[dict[str, Any]], str] | None:
    """A function that makes the prompt of a payload as `transformers` does; None without a template, or Jinja.

    It returns "" where the template refuses the messages.
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
    environment.globals.update(raise_exception=_refuse, strftime_now=time.strftime)
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
    """What a payload says to the chat template beside messages and tools."""
    named = {name: payload[name] for name in TEMPLATE_FIELDS if name in payload}
    return named | (payload.get("chat_template_kwargs") or {})


def _refuse(message: str) -> None:
    raise ValueError(message)


def token_text(value: Any) -> str:
    """A special token as the tokenizer's configuration has it: a text, or an object with one."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
