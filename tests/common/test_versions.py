"""Versions of code that has none: what counts as an edit, and what does not."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

import sdg
from sdg_plugins.common import loading
from sdg_plugins.common.versions import version_of_file, version_of_function

FUNCTION = """
import asyncio, dataclasses, enum, functools, re, threading

class Tone(enum.Enum):
    DRY, WET = 1, 2

@dataclasses.dataclass(slots=True)
class Style:
    words: int
    tone: Tone = Tone.DRY

class Rollout:
    def __init__(self, prompt): self.prompt, self.lock = prompt, threading.Lock()
    async def __call__(self, document, generate): return await generate(self.prompt + OTHER)
    async def method(self, document, generate): return await generate(self.prompt)

PROMPT, OTHER, UNUSED, LOCK, STYLE = "one", "x", 1, threading.Lock(), Style(3)
PATTERN, TONE = re.compile("a|" * 300 + "b"), Tone.DRY
SETS = {"some", "words", "in", "any", "order"}

def helper(text):
    return [text + PROMPT for _ in range(2)]

async def direct(document, generate, style="plain", *, loud=False):
    asyncio.sleep, LOCK, SETS, STYLE.words, PATTERN, TONE
    return await generate(PROMPT + document.UNUSED)

async def helped(document, generate):
    return await generate(helper(document.text))

def enclosing(prompt):
    async def inner(document, generate): return await generate(prompt)
    return inner
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Load FUNCTION, edited, as a module of its own."""
    numbers = itertools.count()

    def loaded(before: str = "", after: str = "") -> Any:
        assert before in FUNCTION
        path = tmp_path / f"loaded{next(numbers)}.py"
        path.write_text(FUNCTION.replace(before, after, 1))
        return sdg.exec_file(f"versions_{path.stem}", path)

    before = {*sys.modules}
    yield loaded
    for name in {*sys.modules} - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "before", "after", "same"),
    [
        ("direct", "", "", True),  # another lock at another address, another order of the set
        ("direct", '"one"', '"two"', False),
        ("direct", "Style(3)", "Style(4)", False),
        ("direct", '300 + "b"', '300 + "c"', False),
        ("direct", '"b"), Tone.DRY', '"b"), Tone.WET', False),
        ("direct", '"order"', '"row"', False),
        ("direct", 'style="plain"', "style=PROMPT", False),
        ("direct", '"x", 1', '"y", 2', True),  # an attribute has the same name
        ("helped", '"one"', '"two"', False),
        ("helped", "range(2)", "range(3)", False),
        ("direct", "range(2)", "range(3)", True),
    ],
)
def test_globals_that_a_function_uses_belong_to_its_version(
    load: Any, name: str, before: str, after: str, same: bool
) -> None:
    versions = {version_of_function(getattr(module, name)) for module in (load(), load(before, after))}
    assert len(versions) == (1 if same else 2)


def test_what_a_function_is_bound_to_belongs_to_its_version(load: Any) -> None:
    module, again = load(), load()

    def made(of: Any, prompt: str) -> list[Any]:
        object_ = of.Rollout(prompt)
        return [of.enclosing(prompt), of.functools.partial(of.direct, style=prompt), object_, object_.method]

    versions = [[version_of_function(one) for one in made(of, prompt)] for of, prompt in ((module, "a"), (again, "a"))]
    assert versions[0] == versions[1]
    others = [version_of_function(one) for one in made(module, "b")]
    assert not set(others) & set(versions[0])
    other = load('OTHER, UNUSED, LOCK, STYLE = "one", "x"', 'OTHER, UNUSED, LOCK, STYLE = "one", "z"')
    assert version_of_function(other.Rollout("a")) != versions[0][2]


def test_functions_typed_at_a_prompt_have_stable_versions() -> None:
    def typed(text: str) -> Any:
        space: dict[str, Any] = {}
        source = f"async def f(document, generate):\n def inner(): return {text!r}\n return await generate(inner())"
        exec(source, space)
        return space["f"]

    assert version_of_function(typed("a")) == version_of_function(typed("a")) != version_of_function(typed("b"))


def test_modules_that_a_file_imports_from_beside_it_belong_to_its_version(tmp_path: Path) -> None:
    for name, text in {
        "plain.py": "import json, sdg\n",
        "plugin.py": "import helper\n\ndef f():\n    from parts import late\n",
        "helper.py": "import json, sdg, missing\nfrom . import nothing\n",
        "parts/__init__.py": "",
        "parts/late.py": "from .deep import *\n",
        "parts/deep/__init__.py": "from ...plugin import x\nfrom .. import late\n",
        "parts/main.py": "from . import late\nimport helper\n",
        "other.py": "",
        "sdg.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = {"plain": "", "plugin": "", "parts/main": "parts.main"}

    def versions() -> list[str]:
        return [version_of_file(tmp_path / f"{file}.py", name) for file, name in files.items()]

    def after(name: str) -> list[bool]:
        before = versions()
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# edited\n")
        return [one != other for one, other in zip(before, versions(), strict=True)]

    assert after("other.py") == after("sdg.py") == [False, False, False]
    assert after("helper.py") == after("parts/late.py") == after("parts/deep/__init__.py") == [False, True, True]
    assert after("parts/__init__.py") == [False, True, True]
    assert after("parts/main.py") == [False, False, True]
    (tmp_path / "plain.py").write_text("import json, sdg\n#")
    assert after("plain.py") == [True, False, False]


def test_edited_file_is_loaded_again_with_the_modules_that_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    plugin, helper = tmp_path / "plugin_edited.py", tmp_path / "helper_edited.py"
    found = []  # the texts have equal lengths, and are edited within a second
    for number, prompt in (
        ("1", "one"),
        ("1", "one"),
        ("2", "one"),
        ("2", "two"),
    ):  # each text is as long as the others
        plugin.write_text(f"import sdg\nfrom helper_edited import PROMPT\nNUMBER = {number}\n")
        helper.write_text(f"PROMPT = '{prompt}'\n")
        module, version = loading._import_file(plugin)
        found.append((module.NUMBER, module.PROMPT, version, id(module)))
    assert [one[:2] for one in found] == [(1, "one"), (1, "one"), (2, "one"), (2, "two")]
    assert found[0] == found[1]
    assert len({one[2] for one in found}) == 3
    for name in ("sdg_plugin_files.plugin_edited", "helper_edited"):
        del sys.modules[name]
