"""Make the drawings of README.md: a run that is killed and resumed, recorded in a terminal, and how a run works.

python tests/support/drawings.py [FOLDER]     default: .github/images
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COLUMNS = 92
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Theme(NamedTuple):
    """Colors of a drawing."""

    name: str
    back: str
    text: str
    faint: str
    strong: str
    bad: str
    box: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#6e7781", "#0969da", "#cf222e", "#f6f8fa"),
    Theme("dark", "#0d1117", "#e6edf3", "#8d96a0", "#58a6ff", "#ff7b72", "#161b22"),
)


# ── The session ──────────────────────────────────────────────────────────────────────────────────────────────────────


def record(documents: int) -> list[tuple[str, str]]:
    """Kill a run with SIGKILL after a third of its documents, resume it, and verify it; lines with their styles."""
    command = f"python sdg.py --plugin summarize --max-documents {documents}"
    for _ in range(10):
        with tempfile.TemporaryDirectory() as folder:
            killed = in_terminal(command, folder, lambda screen: _done(screen) >= documents // 3)
            if not any("of them now" in line for line in killed):  # on a busy machine it may have ended before
                resumed = in_terminal(command, folder)
                verified = in_terminal("python sdg.py verify", folder)
                break
    else:
        raise RuntimeError("the machine is too busy for a kill in the middle of a run")
    bar = [line for line in killed if "|" in line][-1]
    lines = [("prompt", f"$ {command}"), ("text", bar), ("bad", "Killed"), ("faint", "")]
    lines += [("prompt", f"$ {command}"), *_kept(resumed), ("faint", "")]
    return [*lines, ("prompt", "$ python sdg.py verify"), *_kept(verified)]


def _kept(screen: list[str]) -> Iterator[tuple[str, str]]:
    """What a command printed, without what says that this is a demonstration, and how to look at rows."""
    for line in screen:
        if line.strip() and not line.startswith(("sdg: this is a demonstration", "look ", "state ")):
            yield "text", line


def _done(screen: list[str]) -> int:
    """How many documents a progress bar says are done."""
    counts = [re.search(r"(\d[\d,]*)/", line) for line in screen if "|" in line]
    return max((int(found[1].replace(",", "")) for found in counts if found), default=0)


def in_terminal(command: str, folder: str, kill: Callable[[list[str]], bool] | None = None) -> list[str]:
    """Run `python sdg.py …` in a terminal, and return the lines on its screen.

    Args:
        command: as a person types it.
        folder: the working directory.
        kill: of the screen, True when SIGKILL is to be sent.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    words = [sys.executable, str(ROOT / "sdg.py"), *command.split()[2:]]
    env = {"PATH": os.environ["PATH"], "HOME": folder, "TERM": "xterm", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
    run = subprocess.Popen(words, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 300
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                said += os.read(ours, 65536)
            if kill and kill(screen_of(said)):
                run.send_signal(signal.SIGKILL)
                kill = None
    run.wait(10)
    os.close(ours)
    return screen_of(said)


def screen_of(said: bytes) -> list[str]:
    """The lines that a terminal shows: what follows a carriage return overwrites its line."""
    lines = []
    for line in ESCAPES.sub("", said.decode(errors="replace")).replace("\r\n", "\n").split("\n"):
        lines.append([part for part in line.split("\r") if part.strip()][-1:] or [""])
    return [line[0].rstrip()[:COLUMNS] for line in lines]


def session(lines: list[tuple[str, str]], theme: Theme) -> str:
    """A terminal as SVG."""
    colors = {"prompt": theme.strong, "text": theme.text, "bad": theme.bad, "faint": theme.faint}
    width, height, pitch = 16 + COLUMNS * 7.83, 24 + 19 * len(lines), 19
    texts = [
        f'<text x="12" y="{22 + pitch * i}" fill="{colors[style]}" xml:space="preserve">{html.escape(line)}</text>'
        for i, (style, line) in enumerate(lines)
    ]
    return svg(width, height, theme, "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace", texts)


# ── How it works ─────────────────────────────────────────────────────────────────────────────────────────────────────

BOXES = {  # column, row, columns wide, title, lines
    "input": (0, 1, 1, "input", ["parquet, jsonl, csv", "Hub, S3, a reader of yours"]),
    "rollout": (1, 1, 1, "rollout", ["your async function,", "for many documents at once"]),
    "servers": (1, 0, 1, "servers", ["vLLM, SGLang, any", "OpenAI-compatible API"]),
    "chunk": (2, 1, 1, "chunk", ["1,000 documents,", "in the order of the input"]),
    "file": (3, 1, 1, "file", ["whole or not at all:", "disk, S3, Hub"]),
    "card": (3, 0, 1, "card", ["dataset card: progress,", "figures, how to load"]),
    "state": (
        1,
        2,
        3,
        "state",
        ["one SQLite file per rank: each response, each finished document, each chunk written"],
    ),
}
ARROWS = [  # from, to, both ways
    ("input", "rollout", False),
    ("rollout", "servers", True),
    ("rollout", "chunk", False),
    ("chunk", "file", False),
    ("file", "card", False),
    ("rollout", "state", True),
    ("chunk", "state", True),
    ("file", "state", False),
]
CELL, GAP, TALL, RISE = 186, 34, 66, 40


def diagram(theme: Theme) -> str:
    """The way of a document through a run, as SVG."""
    parts = [
        f'<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{theme.faint}"/></marker>'
    ]
    for name, (column, row, wide, title, lines) in BOXES.items():
        x, y = 10 + column * (CELL + GAP), 10 + row * (TALL + RISE)
        width = wide * CELL + (wide - 1) * GAP
        edge = theme.strong if name in {"rollout", "state"} else theme.faint
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{TALL}" rx="6" fill="{theme.box}" stroke="{edge}"/>'
        )
        middle = x + width / 2
        parts.append(f'<text x="{middle}" y="{y + 21}" fill="{theme.text}" class="t">{title}</text>')
        parts += [
            f'<text x="{middle}" y="{y + 39 + 16 * i}" fill="{theme.faint}" class="s">{html.escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
    parts += [_arrow(*arrow, theme) for arrow in ARROWS]
    style = "<style>.t{font-weight:600;text-anchor:middle}.s{font-size:12px;text-anchor:middle}</style>"
    return svg(
        20 + 4 * CELL + 3 * GAP, 20 + 3 * TALL + 2 * RISE, theme, "system-ui,Helvetica,sans-serif", [style, *parts]
    )


def _arrow(start: str, end: str, both: bool, theme: Theme) -> str:
    """An arrow between two boxes that are beside each other, or above each other in the column of `start`."""
    (column, row, *_), (to_column, to_row, *_) = BOXES[start], BOXES[end]
    if row == to_row:
        y = 10 + row * (TALL + RISE) + TALL / 2
        x1, x2 = 10 + column * (CELL + GAP) + CELL, 10 + to_column * (CELL + GAP)
        points = f'x1="{x1 + 2}" y1="{y}" x2="{x2 - 2}" y2="{y}"'
    else:
        x = 10 + column * (CELL + GAP) + CELL / 2
        below = max(row, to_row) * (TALL + RISE) + 10
        ends = (below - RISE + 2, below - 2) if to_row > row else (below - 2, below - RISE + 2)
        points = f'x1="{x}" y1="{ends[0]}" x2="{x}" y2="{ends[1]}"'
    start_mark = ' marker-start="url(#a)"' if both else ""
    return f'<line {points} stroke="{theme.faint}" stroke-width="1.5" marker-end="url(#a)"{start_mark}/>'


def svg(width: float, height: float, theme: Theme, font: str, parts: list[str]) -> str:
    """An SVG image with a background."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'font-family="{font}" font-size="13">',
            f'<rect width="100%" height="100%" rx="8" fill="{theme.back}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def draw(folder: Path, documents: int = 600) -> None:
    """Write all drawings to a folder."""
    lines = record(documents)
    for theme in THEMES:
        (folder / f"resume-{theme.name}.svg").write_text(session(lines, theme))
        (folder / f"how-{theme.name}.svg").write_text(diagram(theme))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else ROOT / ".github" / "images")
