"""A run with a launched server of its own: the fake engine, as a program."""

from __future__ import annotations

import json
import os
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

from fake_server import FakeServer
from running import ROOT, Finished, Job, Started, documents

ENGINE = ROOT / "tests" / "support" / "fake_engine.py"


class Launch(Job):
    """A job with a server of its own: `launch(faults="--crash-after 5", …)`."""

    def __init__(self, folder: Path, server: FakeServer) -> None:
        super().__init__(folder, server)
        self.mark = uuid.uuid4().hex
        self.engine = folder / "engine"
        self.options |= {"base_url": None, "server": "command", "model": "m"}

    def command_line(self, options: dict[str, Any]) -> list[str]:
        options = dict(options)
        if {**self.options, **options}["server"] == "command":
            faults = options.pop("faults", "")
            words = [sys.executable, str(ENGINE), "--folder", str(self.engine), "--port", "{port}", "--model", "m"]
            options.setdefault("server_command", f"{shlex.join(words)} {faults}")
        return super().command_line(options)

    def start(self, env: dict[str, str] | None = None, **options: Any) -> Started:
        return super().start({"SDG_TEST_MARK": self.mark, **(env or {})}, **options)

    def program(self, *names: str) -> dict[str, str]:
        """Put fake programs of these names into PATH; returns the environment that has them."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        for name in names:
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {ENGINE} "$@"\n')
            path.chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_ENGINE_FOLDER": str(self.engine)}

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.engine / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def starts(self) -> list[dict[str, Any]]:
        return self.records("starts.jsonl")

    def requests(self, event: str = "came") -> list[dict[str, Any]]:
        return [record for record in self.records("requests.jsonl") if record["event"] == event]

    def processes(self) -> dict[int, str]:
        """Everything alive that this test has started, as command lines by process id.

        The mark is in its environment; programs that change their titles lose that, but work in the test's folder.
        """
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                here = Path(os.readlink(path / "cwd")).is_relative_to(self.folder)
                if here or self.mark.encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended meanwhile
                continue
        return {pid: command for pid, command in found.items() if command}


def everything(launch: Launch, count: int, finished: Finished | None = None) -> None:
    """All of `documents(count)` have a row."""
    assert finished is None or finished.rc == 0, finished
    assert launch.output.ids() == [row["id"] for row in documents(count)]
