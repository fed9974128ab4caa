"""A package of plugins, installed with `sdg` from wheels into a fresh virtual environment, as users would do."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOT

EXAMPLE = ROOT / "tests" / "example_plugin"
SOURCES = ("sdg.py", "plugins", "pyproject.toml", "README.md", "LICENSE", ".packages", "slurm")

WRONG = """
import contextlib
from collections.abc import AsyncIterator

import sdg


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("sync", sync)
    register("number", number)
    register("few", few)


def sync(document: sdg.Document, generate: sdg.Generate) -> str:
    return document.text


async def number(document: sdg.Document, generate: sdg.Generate) -> int:
    return 5


async def few(document: sdg.Document) -> str:
    return document.txt


@sdg.hookimpl
def register_readers(register: sdg.RegisterReaders) -> None:
    register("nothing", Nothing)


class Nothing:
    def __init__(self, run: sdg.Run) -> None: ...


@sdg.hookimpl
def register_servers(register: sdg.RegisterServers) -> None:
    register("undecorated", undecorated)


async def undecorated(run: sdg.Run) -> AsyncIterator[list[str]]:
    yield [5]
"""


class Environment:
    """A virtual environment with only what the test installs; it sees the packages of the current one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        there = self("-c", "import site; print(site.getsitepackages()[0])").strip()
        # Editable installs are not visible there: .pth files have no effect in a folder that a .pth file names.
        Path(there, "dependencies.pth").write_text("\n".join(site.getsitepackages()))

    def __call__(self, *arguments: object, folder: Path | None = None, rc: int = 0, stream: str = "stdout") -> str:
        """Run this environment's Python and return what it wrote to a stream."""
        unwanted = ("PYTHON", "SDG_", "OPENAI_", "SLURM_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder or self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == rc, (command, done.stdout, done.stderr)
        return str(getattr(done, stream))

    def sdg(self, *arguments: object, folder: Path) -> str:
        """Run the installed console script."""
        return self(self.folder / "bin" / "sdg", *arguments, folder=folder)


def wheel(source: Path, folder: Path) -> Path:
    """Build a wheel of a project, without its dependencies and without a network."""
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *how, str(source)], check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    shutil.copytree(EXAMPLE, folder / "example", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    wheels = [wheel(source, folder / "sdg"), wheel(folder / "example", folder / "wheels")]
    environment = Environment(folder / "venv")
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python), "install", "--no-deps", "--quiet"]
    subprocess.run([*pip, *map(str, wheels)], check=True, capture_output=True)
    yield environment
    for name in ("source", "venv"):
        shutil.rmtree(folder / name)


def test_the_wheel_is_what_runs(environment: Environment, tmp_path: Path) -> None:
    where = environment("-c", "import sdg, sdg_plugins; print(sdg.__file__, sdg_plugins.__file__)", folder=tmp_path)
    assert all(path.startswith(str(environment.folder)) for path in where.split()), where


def test_plugins_lists_what_a_package_registers_with_its_version(environment: Environment, tmp_path: Path) -> None:
    lines = environment.sdg("plugins", folder=tmp_path).splitlines()
    for name in ("txt", "explain", "glossary", "orc", "mirror"):
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert "sdg-example 1.2.3" in line


def test_the_scripts_for_slurm_are_in_the_wheel(environment: Environment, tmp_path: Path) -> None:
    environment.sdg("slurm", "scripts", folder=tmp_path)
    written = {path.name for path in (tmp_path / "scripts").iterdir()}
    assert written == {path.name for path in (ROOT / "slurm").iterdir()}


def test_help_shows_a_plugins_options_under_its_name(environment: Environment, tmp_path: Path) -> None:
    text = environment.sdg("--help", folder=tmp_path)
    group = text.partition("\nexplain:\n")[2].partition("\n\n")[0]
    assert "--glossary FILE.json" in group


def test_a_run_that_uses_all_five(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("First of all paragraphs.\n\nSecond to none.\n")
    (tmp_path / "glossary.json").write_text('{"none": "not one"}')
    common = ("--input", "a.txt", "--output", "out", "--output-filename", "${rank}_${chunk_index}.orc")
    environment.sdg(
        "--plugin", "explain", "--server", "mirror", "--glossary", "glossary.json", "--no-progress", *common,
        folder=tmp_path,
    )  # fmt: skip
    show = "import sys, json, pyarrow.orc as o; print(json.dumps(o.read_table(sys.argv[1]).to_pylist()))"
    rows = json.loads(environment("-c", show, tmp_path / "out" / "data" / "00000_00000.orc"))
    assert [row["rollout_results"][0]["word"] for row in rows] == ["paragraphs", "none"]
    assert [row["rollout_results"][0]["known"] for row in rows] == [False, True]
    assert "all accounted for" in environment.sdg("verify", "--output", "out", folder=tmp_path)
    recorded = json.loads((tmp_path / "out" / ".sdg" / "run.json").read_text())
    assert recorded["identity"]["plugin_version"] == "1.2.3"


def test_the_packages_own_tests_pass(environment: Environment, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    assert "8 passed" in environment(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "tests", folder=tmp_path
    )


def mypy(environment: Environment, *files: object, folder: Path, rc: int = 0) -> str:
    """The output of mypy for some files, with the environment's packages."""
    cache = environment.folder / "mypy"
    return environment("-m", "mypy", "--strict", "--cache-dir", cache, *files, folder=folder, rc=rc)


def test_the_package_passes_mypy_strict_against_the_wheel(environment: Environment, tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "example")
    assert "no issues" in mypy(environment, "sdg_example", "tests", folder=folder)


def test_mypy_finds_what_a_plugin_gets_wrong(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    said = mypy(environment, "wrong.py", folder=tmp_path, rc=1)
    source = WRONG.splitlines()
    lines = ["    " + f'register("{name}"' for name in ("sync", "number", "few", "nothing", "undecorated")]
    lines += ["    return document.txt", "    yield [5]"]
    for line in lines:
        (number,) = [i for i, text in enumerate(source, 1) if text.startswith(line)]
        assert f"wrong.py:{number}: error" in said, (line, said)


def test_mypy_knows_the_types_in_a_checkout(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(
        "import sdg\nfrom sdg_plugins.testing import document\nreveal_type(document('a').text)\nreveal_type(sdg.say)\n"
    )
    bare = Environment(tmp_path / "venv")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT / '.packages'}\nfollow_imports = silent\n")
    said = mypy(bare, "typed.py", folder=tmp_path)
    assert 'Revealed type is "str"' in said
    assert "def (message: str)" in said


def test_another_projects_package_sdg_is_reported(environment: Environment, tmp_path: Path) -> None:
    site_packages = environment("-c", "import site; print(site.getsitepackages()[0])").strip()
    other = Path(site_packages, "sdg")
    other.mkdir()
    (other / "__init__.py").write_text('"""Metrics of synthetic data."""\n')
    try:
        said = environment(environment.folder / "bin" / "sdg", folder=tmp_path, rc=1, stream="stderr")
    finally:
        shutil.rmtree(other)
    assert said.count("\n") == 1
    assert "pip uninstall sdg" in said
    assert str(other) in said


def test_the_distribution_has_a_name_of_its_own(environment: Environment, tmp_path: Path) -> None:
    show = "import importlib.metadata as m; print(m.version('sdg-engine'), *m.files('sdg-engine'))"
    version, *files = environment("-c", show, folder=tmp_path).split()
    assert environment.sdg("--version", folder=tmp_path).split() == ["sdg", version]
    assert {"sdg.py", "sdg_plugins/__init__.py", "sdg_plugins/servers/pool.py"} <= set(files)
    assert [name for name in files if name.endswith(".md")] == ["../../../share/sdg/slurm/README.md"]  # for `sdg slurm`
