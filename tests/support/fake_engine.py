"""A program that plays an inference server with the faults that real ones have, for the tests of supervision.

    python fake_engine.py serve MODEL --port P --folder F [FAULTS]

It takes the arguments of `vllm serve` and ignores those that it does not know. In the folder, which outlives it, it
writes a line for each start (`starts.jsonl`) and for each request, when it comes and when it is answered
(`requests.jsonl`). Faults are flags, so that a command line says what is played; `--only-life N` limits them to
the N-th start. Prompts that contain `poison` kill it, those that contain `wedge` stop it from answering anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATUSES = {200: "OK", 404: "Not Found", 503: "Service Unavailable"}


class Engine:
    """A server with `slots` requests running at a time, `seconds` each; the others wait."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.folder.mkdir(exist_ok=True)
        self.running = self.waiting = self.tokens = self.answers = 0
        self.most_waiting = 0
        self.wedged = asyncio.Event()
        self.slots = asyncio.Semaphore(options.slots)
        self.ready_at = time.monotonic() + options.start_seconds

    def record(self, name: str, **fields: object) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps({"time": time.time(), "pid": os.getpid(), **fields}) + "\n")

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection. Engines start often, and to import aiohttp takes longer than all that they do."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, content = await self.respond(first.split()[1], body)
                head = f"HTTP/1.1 {status} {STATUSES[status]}\r\nContent-Length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
                await writer.drain()
        writer.close()

    async def respond(self, path: str, body: bytes) -> tuple[int, bytes]:
        match path:
            case "/health":
                ready = time.monotonic() >= self.ready_at and not (self.options.sick and self.answers)
                return 200 if ready else 503, b""
            case "/v1/models":
                name = self.options.served_model_name or self.options.model
                return 200, json.dumps({"data": [{"id": name}]}).encode()
            case "/metrics" if self.options.metrics:
                return 200, self.metrics().encode()
            case "/v1/chat/completions":
                return 200, json.dumps(await self.complete(json.loads(body))).encode()
        return 404, b""

    async def serve(self) -> None:
        server = await asyncio.start_server(self.connected, "127.0.0.1", self.options.port, limit=1 << 20)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        server.close()

    def metrics(self) -> str:
        figures = {"num_requests_running": self.running, "num_requests_waiting": self.waiting}
        figures |= {"kv_cache_usage_perc": 0.5}
        figures |= {} if self.options.no_tokens else {"generation_tokens_total": self.tokens}
        lines = [f'vllm:{name}{{engine="0",model_name="m"}} {float(value)}' for name, value in figures.items()]
        return "# HELP vllm:num_requests_running Number\n" + "\n".join(lines) + "\n"

    async def complete(self, payload: dict[str, Any]) -> dict[str, Any]:
        prompt = payload["messages"][-1]["content"]
        if prompt == self.options.quick_word:
            return {"choices": [{"message": {"content": "quick"}}]}
        self.record("requests.jsonl", prompt=prompt, event="came", together=self.running + self.waiting + 1)
        if "poison" in prompt:
            await asyncio.sleep(self.options.seconds)
            self.die()
        if "wedge" in prompt and self.options.faulty:
            self.wedged.set()
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        async with self.slots:
            self.waiting -= 1
            self.running += 1
            await self.generate()
            self.running -= 1
        self.answers += 1
        if self.options.crash_after and self.answers >= self.options.crash_after and self.options.faulty:
            self.die()
        self.record("requests.jsonl", prompt=prompt, event="answered", most_waiting=self.most_waiting)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"re: {prompt}"}}
        usage = {"prompt_tokens": 1, "completion_tokens": 10, "total_tokens": 11}
        return {"model": payload["model"], "choices": [choice], "usage": usage}

    async def generate(self) -> None:
        for _ in range(10):
            await asyncio.sleep(self.options.seconds / 10)
            if self.wedged.is_set():
                await asyncio.Event().wait()
            self.tokens += 1

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--model", "--model-path")
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(os.environ.get("FAKE_ENGINE_FOLDER", "engine")))
    parser.add_argument("--seconds", type=float, default=0.02, help="for an answer")
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--metrics", action="store_true")
    parser.add_argument("--no-tokens", action="store_true", help="leave the counter out of the metrics")
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--say", action="append", default=[], help="a word in the log at the start")
    parser.add_argument("--say-file", type=Path, help="lines for the log")
    parser.add_argument("--babble", action="store_true", help="begin with a line of a megabyte")
    parser.add_argument("--exit", type=int, help="end at the start with this status")
    parser.add_argument("--hang", action="store_true", help="never get ready")
    parser.add_argument("--crash-after", type=int, help="answers")
    parser.add_argument("--sick", action="store_true", help="/health refuses after the first answer")
    parser.add_argument("--quick-word", help="a prompt that is answered at once")
    parser.add_argument("--only-life", type=int)
    parser.add_argument("--children", action="store_true", help="have some that do not want to end")
    parser.add_argument("--headless", action="store_true", help="serve nothing: the part of another node")
    options, rest = parser.parse_known_args(os.environ.get("FAKE_ENGINE", "").split() + sys.argv[1:])
    options.model = options.model or (options.words[1] if options.words[:1] == ["serve"] else None)
    starts = options.folder / "starts.jsonl"
    life = len(starts.read_text().splitlines()) + 1 if starts.exists() else 1
    options.faulty = options.only_life in {None, life}
    options.rest = rest
    return options


def main() -> None:
    options = parse()
    engine = Engine(options)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    engine.record("starts.jsonl", port=options.port, gpus=gpus, arguments=sys.argv[1:])
    if options.babble:
        print("x" * (1 << 20), end=" ", flush=True)
        print("end of the long line", flush=True)
    for line in options.say if options.faulty else []:
        print(line, flush=True)
    if options.say_file and options.faulty:
        print(options.say_file.read_text(), flush=True)
    if options.exit is not None and options.faulty:
        sys.exit(options.exit)
    if options.children:
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
        subprocess.Popen([sys.executable, "-c", stubborn])
        subprocess.Popen(["sh", "-c", "setsid sleep 300 & exec sleep 300"], start_new_session=True)
    if (options.hang and options.faulty) or options.headless:
        while True:
            time.sleep(0.1)
    asyncio.run(engine.serve())


if __name__ == "__main__":
    main()
