"""The recipes of plugins/rollouts/README.md run as they stand there, with servers in place of those they name."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import Answer, FakeServer
from running import ROOT, Job

from sdg_plugins.servers.demo import by_schema

PAGE = (ROOT / "plugins" / "rollouts" / "README.md").read_text()
RECIPES = dict(re.findall(r"^### ([^\n]+)\n\n(.*?)(?=^##)", PAGE.partition("## Recipes")[2], re.MULTILINE | re.DOTALL))
LABELS = {"type": "object", "properties": {"label": {"enum": ["good", "bad"]}}, "required": ["label"]}


def answered(payload: dict[str, Any], n: int) -> Answer | None:
    """JSON by the schema that is asked for."""
    form = payload.get("response_format")
    if not form:
        return None
    value = by_schema(form["json_schema"]["schema"], "Some text. " + "x" * (len(str(payload)) % 7 + 2))
    if "score" in value:
        value["score"] = 3 + len(str(payload["messages"])) % 3
    return Answer(json.dumps(value))


@pytest.fixture
def kitchen(job: Job, server: FakeServer, servers: Callable[[], FakeServer]) -> Callable[[str], None]:
    """Runs the commands of a recipe in a folder that has the files they name."""
    judge = servers()
    for each in (server, judge):
        each.behave(answered)
    folder = job.folder
    (folder / "letters").mkdir()
    (folder / "letters" / "a.txt").write_text("A letter about the tides, and what they do to ships.")
    (folder / "letters" / "b.txt").write_text("A letter about bread.")
    (folder / "questions.csv").write_text("question\nWhy is the sky blue?\nHow are ships built?\n")
    chat = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
    (folder / "sharegpt.jsonl").write_text(json.dumps({"conversations": chat}) + "\n")
    (folder / "reviews.jsonl").write_text('{"text": "A fine book."}\n{"text": "I fell asleep over it."}\n')
    (folder / "labels.json").write_text(json.dumps(LABELS))
    (folder / "personas.txt").write_text("a child, six years old\na sailor\n")

    def here(text: str) -> str:
        return text.replace("http://localhost:8000", server.url).replace("http://judge:8000", judge.url)

    def cook(recipe: str) -> None:
        for name, text in re.findall(r"```toml\n# (\S+)\n(.*?)```", recipe, re.DOTALL):
            (folder / name).write_text(here(text))
        commands = [line for block in re.findall(r"```sh\n(.*?)```", recipe, re.DOTALL) for line in block.splitlines()]
        assert 1 <= len(commands) <= 2
        for command in commands:
            words = shlex.split(here(command))
            assert words[:2] == ["python", "sdg.py"]
            finished = job.sdg(*words[2:])
            assert finished.rc == 0, finished

    return cook


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_stands(kitchen: Callable[[str], None], job: Job, name: str) -> None:
    kitchen(RECIPES[name])

    files = [path for path in job.folder.rglob("*.parquet") if ".sdg" not in path.parts]
    assert files
    assert all(pq.read_table(path).num_rows for path in files)
    for path in job.folder.glob("*.jsonl"):
        assert path.read_text()


def test_there_are_at_least_ten_recipes() -> None:
    assert len(RECIPES) >= 10
