"""Options as data: what a plugin or a command declares, and converters for their values."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import orjson

import sdg

# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def text_or_file(value: str) -> str:
    """An option's text, or with a leading `@` the content of a file."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise argparse.ArgumentTypeError(f"cannot read {value[1:]}: {exc}") from exc


def json_object(value: str) -> dict[str, Any]:
    """An option's JSON object, with sorted keys."""
    try:
        parsed = orjson.loads(value)  # strict: json.loads accepts NaN, which servers reject
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"invalid JSON: {exc}") from exc
    if not isinstance(parsed, dict) or "stream" in parsed:
        raise argparse.ArgumentTypeError("expected a JSON object without `stream`")
    return dict(sorted(parsed.items()))


def further_fields(value: str) -> dict[str, Any]:
    """The JSON object of --generation."""
    fields = json_object(value)
    for name, origin in {"model": "--model", "messages": "the rollout", "prompt": "the rollout"}.items():
        if name in fields:
            raise argparse.ArgumentTypeError(f"`{name}` comes from {origin}")
    return fields


def name_and_variable(value: str) -> tuple[str, str]:
    """A header's name and the environment variable that holds its value, as NAME=VARIABLE."""
    name, mark, variable = value.partition("=")
    if not mark or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not re.fullmatch(r"\w+", variable):
        raise argparse.ArgumentTypeError(f"{value!r}: expected NAME=VARIABLE, with the name of an environment variable")
    if name.lower() in {"connection", "content-length", "transfer-encoding"}:
        raise argparse.ArgumentTypeError(f"{value!r}: {name} cannot be set, because it says how a request is sent")
    return name, variable


def names(value: str) -> list[str]:
    """An option's list of names, as A,B."""
    found = [name.strip() for name in value.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{value!r}: expected names separated by commas")
    return found


def number(kind: type[int] | type[float], low: float, high: float = 1e9) -> Callable[[str], float]:
    """A converter for options that are numbers between two others, inclusive."""

    def convert(value: str) -> float:
        number = kind(value)
        if not low <= number <= high:
            least, most = f"at least {low:,}", f"at most {high:,.0f}"
            bounds = f"between {low:,} and {high:,}" if high < 1e9 else most if number > high else least
            raise argparse.ArgumentTypeError(f"{value}: must be {bounds}")
        return number

    convert.__name__ = "number" if kind is float else "whole number"
    return convert


def one_of(*names: str, more: bool = False) -> Callable[[str], str]:
    """A converter for options that take one of some names; with `more` also a whole number."""

    def convert(value: str) -> str:
        if value not in names and not (more and value.isdigit()):
            raise argparse.ArgumentTypeError(f"{value!r}: expected {', '.join(names)}{', or a number' * more}")
        return value

    return convert


# ── Options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Option(NamedTuple):
    """One option, as data; see `setting` for those that do not change the data.

    Attributes:
        identity: another value gives other data, so it is part of the fingerprint.
        shared: all `[configs.NAME]` of a process have the same value.
    """

    name: str
    metavar: str | None
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    identity: bool = True
    action: str = "store"
    shared: bool = False

    @property
    def dest(self) -> str:
        """Its name in the namespace of options."""
        return self.name[2:].replace("-", "_")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `argparse` for it."""
        text = self.help if self.default is None else f"{self.help} [{self.default}]"
        if self.action == "store_true":
            return {"help": self.help, "action": self.action}
        how = {"metavar": self.metavar, "default": self.default, "action": self.action, "type": self.type}
        return {"help": text, **how}


setting = functools.partial(Option, identity=False)


class Options:
    """A group of options in `--help`, as handed to the hook `add_options`.

    Attributes:
        identity: for each option in it, whether another value makes it another run.
    """

    def __init__(self, parser: Parser, group: Any) -> None:
        self._parser, self._group = parser, group
        self.identity: dict[str, bool] = {}

    def add_argument(self, *flags: str, identity: bool = True, **settings: Any) -> Any:
        """Add an option as `argparse` does.

        Args:
            flags: names, such as `--style`.
            identity: another value gives other data; False for options such as a time-out.
            settings: as for `argparse.ArgumentParser.add_argument`.
        """
        action = self._group.add_argument(*flags, **settings)
        self._parser.flags.extend(flags)
        self.identity[action.dest] = identity
        return action

    def add(self, option: Option) -> None:
        """Add an option that is data."""
        self.add_argument(option.name, identity=option.identity, **option.settings)

    def add_mutually_exclusive_group(self, **settings: Any) -> Options:
        """A group of options of which only one may be given, as in `argparse`."""
        inner = Options(self._parser, self._group.add_mutually_exclusive_group(**settings))
        inner.identity = self.identity
        return inner


def program() -> str:
    """The name by which this program was called: `sdg` if it is installed, else `sdg.py`."""
    return "sdg" if Path(sys.argv[0]).name == "sdg" else "sdg.py"


# Option names of datatrove's generation script and inference pipeline, and what they are called here
DATATROVE = {
    "--input-dataset-name": "--input",
    "--input-dataset-config": "--input-config",
    "--input-dataset-split": "--input-split",
    "--output-dataset-name": "--output",
    "--output-dir": "--output",
    "--prompt-template-file": "--prompt-template",
    "--model-name-or-path": "--model",
    "--model-kwargs": "--server-arg",
    "--server-type": "--server",
    "--endpoint-url": "--base-url",
    "--max-examples": "--max-documents",
    "--limit": "--max-documents",
    "--examples-per-chunk": "--records-per-chunk",
    "--tasks": "--world-size",
    "--checkpoints-local-dir": "--state-dir",
    "--logging-dir": "--state-dir",
    "--default-generation-params": "--generation",
    "--rollout-fn": "--plugin",
}
DATATROVE |= {name.replace("-", "_").replace("__", "--", 1): ours for name, ours in DATATROVE.items()}

_refusing: ContextVar[bool] = ContextVar("refusing", default=False)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Let parsers raise UsageError for wrong options, instead of printing their usage and ending the program."""
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


class Item(str):
    """An argument that is one of several items of a list, in a file or in Python."""

    __slots__ = ()


class Parser(argparse.ArgumentParser):
    """A parser that suggests close matches for unknown options, and calls the program as it was called."""

    def __init__(self, *, prog: str, usage: str | None = None, **settings: Any) -> None:
        self.flags: list[str] = []
        usage = usage and usage.replace("sdg.py", program())
        super().__init__(allow_abbrev=False, prog=prog.replace("sdg.py", program(), 1), usage=usage, **settings)

    def add_argument(self, *flags: Any, **settings: Any) -> argparse.Action:
        """See `argparse`."""
        self.flags.extend(flags)
        return super().add_argument(*flags, **settings)

    def error(self, message: str) -> NoReturn:
        """See `argparse`."""
        if _refusing.get():
            raise sdg.UsageError(message)
        super().error(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`."""
        options, unknown = self.parse_known_args(args and self._joined(args), namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = [DATATROVE[word]] if DATATROVE.get(word) in self.flags else []
            near = near or difflib.get_close_matches(word, self.flags, n=2, cutoff=0.7)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            if not word.startswith("-"):
                hint = "; put a glob in quotes, otherwise the shell expands it to several words"
                if "--output" in self.flags and "--input" not in self.flags:
                    hint = f"; did you mean --output {word}?"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def _joined(self, args: Sequence[str]) -> list[str]:
        """Arguments with the items of a list of names as one; `argparse` would only keep the last one."""
        words: dict[str, str] = {}
        for number, word in enumerate(args):
            flag, _, value = word.partition("=")
            action = self._option_string_actions.get(flag) if isinstance(word, Item) else None
            if action is None or type(action) is not argparse._StoreAction:
                words[f"{number}"] = word
            elif action.type is names:
                words[flag] = f"{words[flag]},{value}" if flag in words else word
            else:
                self.error(f"{flag} takes one value, not a list")
        return list(words.values())


class BriefHelp(argparse.Action):
    """`--help`: the options whose names are in `const`."""

    const: set[str]

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Hide the other options, and print what is left."""
        for action in parser._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            if flags and flags[0][2:].replace("-", "_") not in self.const:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()
