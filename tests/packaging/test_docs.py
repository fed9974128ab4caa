"""The documentation's generated parts are up to date, its snippets work, and no link in it is dead.

`python tests/packaging/test_docs.py` writes the generated parts again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.orc
import pytest

if TYPE_CHECKING:
    from running import Job

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]

from drawings import THEMES, draw

import sdg
from sdg_plugins.common.command_line import build_parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / ".github").glob("*.md"), *(ROOT / "slurm").glob("*.md"), ROOT / "tests" / "README.md"])
PAGES += sorted((ROOT / "plugins").rglob("*.md"))
GUIDE = ROOT / "plugins" / "README.md"


def hooks() -> str:
    """A list of the hooks with their docstrings."""
    items = []
    for name, hook in vars(sdg.Hooks).items():
        if not name.startswith("_"):
            parameters = ", ".join(list(inspect.signature(hook).parameters)[1:])
            items.append(f"- **`{name}({parameters})`**: {sdg.one_line(inspect.getdoc(hook) or '')}")
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
    """A table of options for each group of `--help`, those of the bundled plugins included."""
    loaded, _ = sdg.Plugins.load([])
    parser, _ = build_parser(loaded)
    tables = []
    for group in parser._action_groups[2:]:
        rows = []
        for action in group._group_actions:
            default = "" if action.default is None or action.default is False else f"`{action.default}`"
            name = f"{action.option_strings[0]} {action.metavar or ''}".strip()
            text = (action.help or "").partition(f" [{action.default}]")[0].replace("|", "\\|")
            rows.append(f"| `{name}` | {default} | {text} |")
        if rows:
            tables.append(
                "\n".join([f"### {group.title}", "", "| option | default | meaning |", "|---|---|---|", *rows])
            )
    return "\n\n".join(tables)


def protocols() -> str:
    """A list of what plugins register, and of the protocols for what that creates, with their members' docstrings."""
    items = []
    for name in PROTOCOLS:
        protocol = getattr(sdg, name)
        if not isinstance(protocol, type):  # an alias, described by the comment in its line
            described = re.search(rf"^{name} = (.+?)  # (.+)$", inspect.getsource(sdg), re.MULTILINE)
            assert described, name
            items.append(f"- **`{name}`**: `{described[1].replace(chr(34), '')}`: {described[2]}.")
            continue
        items.append(f"- **`{name}`**: {sdg.one_line(inspect.getdoc(protocol) or '')}")
        for member, thing in vars(protocol).items():
            if member.startswith("_") and member != "__call__":
                continue
            text = sdg.one_line((inspect.getdoc(thing) or "").partition("\n\nArgs:")[0])
            items.append(f"  - `{signature(member, thing)}`: {text}")
    return "\n".join(items)


PROTOCOLS = (
    *("Rollout", "Generate", "OpenReader", "Reader", "OpenWriter", "Writer", "OpenServer", "OpenResource", "Command"),
)


OBJECTS = ("Document", "Reply", "RequestFailed", "Run", "Chunk", "Block", "BadRow", "Upstream", "Request", "Response")
OBJECTS += ("PerRollout",)
FIELD = re.compile(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+?)?(?:  # (.*))?$", re.MULTILINE)


def objects() -> str:
    """A list of the objects that plugins get and make, with their attributes and methods."""
    items = []
    for name in OBJECTS:
        thing = getattr(sdg, name)
        document = inspect.getdoc(thing) or ""
        summary = re.split(r"\n\n(?:Args|Attributes):", document)[0]
        items.append(f"- **`{name}`**: {sdg.one_line(summary)}")
        described = attributes_in(document)
        fields = FIELD.findall(inspect.getsource(thing))
        for field, kind, comment in fields:
            if not field.startswith("_") and field in getattr(thing, "__annotations__", {}):
                text = described.pop(field, comment)
                items.append(f"  - `{field}: {kind}`" + f": {text.rstrip('.')}." * bool(text))
        items += [f"  - `{field}`: {text}" for field, text in described.items()]
        for member, value in vars(thing).items():
            function = value.fget if isinstance(value, property) else value
            if not member.startswith("_") and inspect.isfunction(function):
                text = sdg.one_line((inspect.getdoc(function) or "").partition("\n\nArgs:")[0])
                items.append(f"  - `{member if isinstance(value, property) else signature(member, value)}`: {text}")
    return "\n".join(items)


def attributes_in(document: str) -> dict[str, str]:
    """What a docstring's sections Args and Attributes say of each name."""
    found: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?)+)", document, re.MULTILINE):
        for name, text in re.findall(r"^    (\w+): ((?:.*\n?)(?:        .*\n?)*)", section, re.MULTILINE):
            found[name] = sdg.one_line(text)
    return found


def signature(name: str, member: object) -> str:
    """How a member of a protocol is used: `seek(row, bookmark)`."""
    if not inspect.isfunction(member):
        return name
    parameters = list(inspect.signature(member).parameters.values())[1:]
    words = [f"{'**' if p.kind is p.VAR_KEYWORD else ''}{p.name}" for p in parameters if p.name != "args"]
    return f"{'' if name == '__call__' else name}({', '.join(words)})"


PARTS = {"hooks": hooks, "protocols": protocols, "objects": objects, "plugins": plugins, "options": options}


def generated() -> dict[Path, str]:
    """All pages with their generated parts updated; each part is on exactly one page."""
    pages = {page: page.read_text() for page in PAGES}
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        (page,) = [page for page, text in pages.items() if pattern.search(text)]
        pages[page], found = pattern.subn(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", pages[page])
        assert found == 1, name
    return pages


def test_generated_parts_are_up_to_date() -> None:
    for page, text in generated().items():
        assert text == page.read_text(), f"{page}; run: python tests/packaging/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|srcset|href)="([^"]+)"', prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_everything_that_hooks_and_protocols_name_is_documented() -> None:
    classes = [sdg.Hooks, *(getattr(sdg, name) for name in PROTOCOLS)]
    members = [member for each in classes if inspect.isclass(each) for member in vars(each).values()]
    annotations = [text for member in members if inspect.isfunction(member) for text in member.__annotations__.values()]
    named = set(re.findall(r"\w+", " ".join(map(str, annotations))))
    ours = {name for name in named if getattr(getattr(sdg, name, None), "__module__", "").startswith("sdg")}
    assert {"Document", "Run", "Chunk"} < ours
    assert ours <= {*OBJECTS, *PROTOCOLS, "Options", "Hooks"}


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


def test_the_options_of_every_command_on_a_page_exist() -> None:
    loaded, _ = sdg.Plugins.load([])
    parser, _ = build_parser(loaded)
    known = set(parser.flags) | {"--output", "--format", "--to", "--score", "--min-margin"}
    joined = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    commands = [line for line in joined.splitlines() if re.search(r"(python|sdg) ?(sdg)?\.py ", line) and "--" in line]
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line.partition("#")[0].replace("`", " "), posix=False)
        unknown = [word for word in words if word.startswith("--") and word not in known]
        elsewhere = {"--check", "--fleet", "--glossary", "--id", "--failed", "--html", "--sample"}
        assert not [word for word in unknown if word not in elsewhere], line


@pytest.fixture
def plugin_files(job: Job) -> dict[str, str]:
    """The files on all pages, in the job's folder: each block of code begins with its name."""
    files = {}
    for language in ("python", "toml"):
        for code in snippets(language):
            if name := re.match(r"# ([\w.]+)\n", code):
                files[name[1]] = code
                (job.folder / name[1]).write_text(code)
    return files


def test_the_pages_rollout_runs(job: Job, plugin_files: dict[str, str]) -> None:
    job.documents("one", "two")
    output = job.succeed(plugin="./headline.py")
    assert len(output.rows()) == 2
    assert all("Write a headline" in prompt for prompt in job.server.prompts)


def test_the_pages_options_and_resource_run(job: Job, plugin_files: dict[str, str]) -> None:
    (job.folder / "terms.json").write_text('{"dog": "Hund", "cat": "Katze"}')
    job.server.behave(lambda payload, n: "Der Hund bellt.")
    job.documents("the dog barks", "the cat sleeps")
    output = job.succeed(plugin="glossary.py", glossary="terms.json")
    assert [(row["id"], row["rollout_results"][0]["terms"]) for row in output.rows()] == [("the dog barks", 1)]


def test_the_pages_reader_writer_server_and_observer_run(job: Job, plugin_files: dict[str, str]) -> None:
    make_texts(job.folder / "texts.db")
    (job.folder / "urls.txt").write_text(job.server.url + "\n")
    names = ["sqlite_rows.py", "orc_files.py", "fleet.py", job.options["plugin"]]
    options = {"input": "sqlite://texts.db", "server": "fleet", "fleet": "urls.txt", "base_url": None}
    finished = job(plugin=names, output_filename="${rank}_${chunk_index}.orc", **options)
    assert finished.rc == 0, finished
    table = pyarrow.orc.read_table(job.folder / "output" / "data" / "00000_00000.orc")
    assert table.column("text").to_pylist() == ["one", "two", "three"]
    assert "data/00000_00000.orc: 3 rows" in finished.stderr
    assert json.loads((job.folder / "facts.json").read_text())["requests"] == 3


def test_the_pages_tests_pass(job: Job, plugin_files: dict[str, str]) -> None:
    make_texts(job.folder / "texts.db")
    path = os.pathsep.join([str(ROOT / ".packages"), str(job.folder)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_plugins.py"]
    env = job.sdg.environment(PYTHONPATH=path)
    done = subprocess.run(command, cwd=job.folder, env=env, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout


def test_the_pages_configs_run(job: Job, plugin_files: dict[str, str]) -> None:
    job.input([{"text": "one"}, {"text": "two"}], "docs.jsonl")
    finished = job.sdg("--config", "prompts.toml", "--base-url", job.server.url)
    assert finished.rc == 0, finished
    assert len(job.server.requests) == 2 + 4
    assert job.sdg("verify", "--output", "./lessons", "--output-config", "math").rc == 0


def test_the_pages_preview_runs(job: Job, plugin_files: dict[str, str]) -> None:
    job.input([{"text": "one"}], "docs.jsonl")
    shown = job.sdg("--plugin", "./headline.py", "--input", "docs.jsonl", "--base-url", job.server.url, "--preview", 3)
    assert shown.rc == 0, shown
    (example,) = re.findall(r"```text\n(request POST.*?)```", GUIDE.read_text(), re.DOTALL)
    assert [line for line in example.splitlines() if line not in shown.stdout] == []


def make_texts(path: Path) -> None:
    """Create the database of the tutorial's reader as described there."""
    (code,) = re.findall(r"^python -c '(.*?)'$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    subprocess.run([sys.executable, "-c", code], cwd=path.parent, check=True)
    assert path.exists()


def test_the_pages_first_plugin_has_ten_lines_at_most(plugin_files: dict[str, str]) -> None:
    assert len([line for line in plugin_files["headline.py"].splitlines() if line.strip()]) <= 10


def test_the_pages_plugin_for_json_runs(job: Job, plugin_files: dict[str, str]) -> None:
    job.server.behave(lambda payload, n: '{"people": ["Ada"], "places": []}')
    job.documents("one")
    (result,) = job.succeed(plugin="./names.py").rows()[0]["rollout_results"]
    assert (result["people"], result["places"]) == (["Ada"], [])


def test_every_resource_is_in_the_guide() -> None:
    loaded, _ = sdg.Plugins.load([])
    rows = GUIDE.read_text().partition("## Options and resources")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) >= {*loaded.resources} - {"prompt_of", "scores_of"}


def snippets(language: str) -> list[str]:
    """The code in one language on all pages."""
    return [code for page in PAGES for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 250
    assert len(README.read_bytes()) <= 14_000


def test_the_readmes_first_minute_prints_what_it_shows(run_sdg) -> None:  # type: ignore[no-untyped-def]
    section = README.read_text().partition("## Your data in a minute\n")[2].partition("\n## ")[0]
    (csv,) = re.findall(r"```csv\n(.*?)```", section, re.DOTALL)
    (run_sdg.folder / "stories.csv").write_text(csv)
    steps = re.findall(r"```sh\npython sdg.py ([^\n]*)\n```\n\n```text\n(.*?)```", section, re.DOTALL)
    assert len(steps) == 3
    for command, shown in steps:
        finished = run_sdg(*shlex.split(command))
        assert finished.rc == 0, finished
        said = finished.stdout + finished.stderr
        for line in filter(None, shown.splitlines()):
            before, found, said = said.partition(line)
            assert found or line == "…", (command, line, before)
            said = said if found else before


def test_the_drawings_are_made_by_their_script(tmp_path: Path) -> None:
    draw(tmp_path, documents=120)
    for theme in THEMES:
        committed = ROOT / ".github" / "images" / f"how-{theme.name}.svg"
        assert (tmp_path / committed.name).read_text() == committed.read_text(), "run: python tests/support/drawings.py"
        for folder, documents in ((tmp_path, 120), (committed.parent, 600)):
            texts = [node.text or "" for node in ElementTree.parse(folder / f"resume-{theme.name}.svg").iter()]
            assert "Killed" in texts
            assert f"{documents} documents: {documents} rows, 0 filtered, 0 failed; all accounted for" in texts
            (now,) = [re.search(r"\((\d+) of them now", text) for text in texts if "of them now" in text]
            assert now
            # On a busy machine the kill may come before the first responses are stored.
            assert 0 < int(now[1]) < documents + (folder == tmp_path)


@pytest.mark.parametrize("command", ["card", "check", "monitor", "plugins", "run", "show", "status", "verify"])
def test_every_command_has_help_with_an_example(run_sdg, command: str) -> None:  # type: ignore[no-untyped-def]
    finished = run_sdg(command, "--help")
    assert finished.rc == 0
    assert "usage" in finished.stdout
    assert "example" in finished.stdout


def test_help_shows_what_is_used_most_and_help_all_the_rest(run_sdg) -> None:  # type: ignore[no-untyped-def]
    parser, _ = build_parser(sdg.Plugins.load([])[0])
    brief, full, judge = (
        set(re.findall(r"^  (--[\w-]+)", run_sdg(*words).stdout, re.MULTILINE))
        for words in (["--help"], ["--help-all"], ["--plugin", "judge", "--help"])
    )
    assert {flag for flag in parser.flags if flag.startswith("--")} - full <= {"--help"}  # stands behind `-h`
    assert {"--input", "--base-url", "--model", "--prompt-template"} < brief
    assert len(brief) < len(full) / 2
    assert judge - brief == {"--rubric", "--min-score"}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, updated in generated().items():
        path.write_text(updated)
