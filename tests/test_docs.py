"""The README's generated parts are up to date, and its snippets work.

`python tests/test_docs.py` writes the generated parts anew.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import sdg

README = Path(__file__).parents[1] / "README.md"


def hooks() -> str:
    """A list of the hooks with their docstrings."""
    items = []
    for name, hook in vars(sdg.Hooks).items():
        if not name.startswith("_"):
            parameters = ", ".join(list(inspect.signature(hook).parameters)[1:])
            items.append(f"- **`{name}({parameters})`**: {' '.join((inspect.getdoc(hook) or '').split())}")
    return "\n".join(items)


def plugins() -> str:
    """A table of what the bundled plugins register."""
    loaded, _ = sdg.Plugins.load([])
    rows = [
        f"| {kind[:-1]} | `{name}` | {entry.help} |"
        for kind in sdg.Plugins.kinds
        for name, entry in sorted(getattr(loaded, kind).items())
        if entry.plugin.partition(".")[0] in {"sdg", "sdg_plugins"}
    ]
    return "\n".join(["| kind | name | what it does |", "|---|---|---|", *rows])


def options() -> str:
    """A table of all options, those of the bundled plugins included."""
    loaded, _ = sdg.Plugins.load([])
    parser, _ = sdg.build_parser(loaded)
    rows = []
    for group in parser._action_groups[2:]:
        for action in group._group_actions:
            default = "" if action.default in {None, False} else f"`{action.default}`"
            name = f"{action.option_strings[0]} {action.metavar or ''}".strip()
            text = (action.help or "").replace("|", "\\|")
            rows.append(f"| {group.title} | `{name}` | {default} | {text} |")
    return "\n".join(["| group | option | default | meaning |", "|---|---|---|---|", *rows])


PARTS = {"hooks": hooks, "plugins": plugins, "options": options}


def generated(text: str) -> str:
    """The README with its generated parts made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
        assert found == 1, name
    return text


def test_generated_parts_are_up_to_date() -> None:
    assert generated(README.read_text()) == README.read_text(), "run: python tests/test_docs.py"


def test_every_hook_is_documented() -> None:
    for name, hook in vars(sdg.Hooks).items():
        if not name.startswith("_"):
            assert len((inspect.getdoc(hook) or "").split()) > 8, name


def test_every_registered_name_has_one_line_of_help() -> None:
    loaded, _ = sdg.Plugins.load([])
    for kind in sdg.Plugins.kinds:
        for name, entry in getattr(loaded, kind).items():
            assert entry.help.endswith((".", "?")), (kind, name)


def test_every_public_function_and_class_is_documented() -> None:
    for name, thing in vars(sdg).items():
        own = getattr(thing, "__module__", None) == "sdg" and not name.startswith("_")
        if own and (inspect.isfunction(thing) or inspect.isclass(thing)) and not issubclass_of_error(thing):
            assert inspect.getdoc(thing), name


def issubclass_of_error(thing: object) -> bool:
    """Errors are documented as a tree, in their base."""
    return inspect.isclass(thing) and issubclass(thing, sdg.Error)


def test_the_options_of_every_command_in_the_readme_exist() -> None:
    loaded, _ = sdg.Plugins.load([])
    parser, _ = sdg.build_parser(loaded)
    known = set(parser._option_string_actions) | {"--output"}
    joined = README.read_text().replace("\\\n", " ")
    commands = [line for line in joined.splitlines() if re.search(r"(python|sdg) ?(sdg)?\.py ", line) and "--" in line]
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line.partition("#")[0].replace("`", " "), posix=False)
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert not [word for word in unknown if word not in {"--check"}], line


def test_the_readmes_plugin_runs(job, server) -> None:  # type: ignore[no-untyped-def]
    (snippet,) = [code for code in snippets("python") if "headline" in code]
    (job.folder / "headline.py").write_text(snippet)
    job.documents("one", "two")
    output = job.succeed(plugin="./headline.py")
    assert len(output.rows()) == 2
    assert all("Write a headline" in prompt for prompt in server.prompts)


def snippets(language: str) -> list[str]:
    """The README's code in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("command", ["run", "verify", "card", "check", "monitor", "plugins", "status"])
def test_every_command_has_help(run_sdg, command: str) -> None:  # type: ignore[no-untyped-def]
    finished = run_sdg(command, "--help")
    assert finished.rc == 0
    assert "usage" in finished.stdout


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(generated(README.read_text()))
