"""Tokens per second through sdg, against `vllm bench serve`, on the same vLLM server.

    python tests/bench/served.py --vllm ENVIRONMENT/bin/vllm --model MODEL
    python tests/bench/served.py --vllm … --model … --server-args '--enforce-eager' --concurrency 500

Both send the same prompts as chats, at the same concurrency, for the same number of tokens each, in turns. The clock is
the server's: from the first to the last token that it counts. The ceiling is what vLLM's own load generator gets out of
it; sdg writes everything durably meanwhile. `vllm[bench]` must be installed there.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from harness import SDG, BenchError, Result, main, make_input, middle, number, run, say, spread, stop, workplace

QUICK = {"documents": 500, "rounds": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this bench."""
    parser.add_argument("--vllm", type=Path, help="the program; without it this bench is left out")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--server-args", type=shlex.split, default=[])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=1000, help="of a document")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8123)


class Tokens(threading.Thread):
    """Watches how many tokens the server has generated; `rate` is per second, from the first to the last of them."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.samples, self.done = url, [], threading.Event()

    def __enter__(self) -> "Tokens":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        """Look twenty times a second."""
        while not self.done.wait(0.05):
            self.samples.append((time.monotonic(), self.count()))
        self.samples.append((time.monotonic(), self.count()))

    def count(self) -> float:
        """Return the tokens that the server has ever generated."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(r"^vllm:generation_tokens_total\S* (\S+)", text, re.MULTILINE))

    @property
    def total(self) -> float:
        """Return the tokens of this watch."""
        return self.samples[-1][1] - self.samples[0][1]

    @property
    def rate(self) -> float:
        """Return tokens per second."""
        first = next(moment for moment, count in self.samples if count > self.samples[0][1])
        last = next(moment for moment, count in self.samples if count == self.samples[-1][1])
        return self.total / (last - first)


def measure(options: argparse.Namespace) -> list[Result]:
    """Let both take turns on one server."""
    if options.vllm is None:
        say("served: left out, without --vllm")
        return []
    url = f"http://127.0.0.1:{options.port}"
    with workplace() as folder:
        source = make_input(folder / "input.parquet", options.documents, options.bytes)
        prompts = folder / "prompts.jsonl"
        convert = (
            "import sys, json, pyarrow.parquet as pq\n"
            "for text in pq.read_table(sys.argv[1])['text'].to_pylist(): print(json.dumps({'prompt': text}))"
        )
        with prompts.open("w") as file:
            subprocess.run([sys.executable, "-c", convert, source], stdout=file, check=True)
        serve = [options.vllm, "serve", options.model, "--port", options.port, "--served-model-name", "model"]
        words = [str(word) for word in [*serve, "--disable-uvicorn-access-log", *options.server_args]]
        with (folder / "server.log").open("w") as log:
            server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_ready(server, url, folder / "server.log")
            rates: dict[str, list[float]] = {"sdg": [], "vllm": []}
            for turn in range(options.rounds + 1):  # the first one warms the server up
                for name, command in commands(options, folder, source, prompts, url, turn).items():
                    with Tokens(url) as tokens:
                        run(command, folder)
                    if tokens.total != options.documents * options.tokens:
                        raise BenchError(f"{name} got {tokens.total:.0f} tokens")
                    say(f"served: {name} {tokens.rate:,.0f} tokens/s")
                    if turn:
                        rates[name].append(tokens.rate)
        finally:
            stop(server.pid)
            server.wait()
    ratios = [mine / theirs for mine, theirs in zip(rates["sdg"], rates["vllm"], strict=True)]
    note = f"{spread(ratios)}; {number(middle(rates['sdg']))} tokens/s, concurrency {options.concurrency}"
    return [Result("tokens/s against `vllm bench serve`", middle(ratios), "x", 0.97, 1.0, True, note)]


def commands(
    options: argparse.Namespace, folder: Path, source: Path, prompts: Path, url: str, turn: int
) -> dict[str, list[object]]:
    """Return the two command lines."""
    mine: list[object] = [sys.executable, SDG, "--plugin", "prompt", "--input", source, "--base-url", url]
    mine += ["--output", folder / f"out{turn}", "--max-concurrent-generations", options.concurrency]
    mine += ["--max-tokens", options.tokens, "--generation", json.dumps({"ignore_eos": True}), "--no-progress"]
    theirs: list[object] = [options.vllm, "bench", "serve", "--backend", "openai-chat", "--base-url", url]
    theirs += ["--endpoint", "/v1/chat/completions", "--model", "model", "--tokenizer", options.model]
    theirs += ["--dataset-name", "custom", "--dataset-path", prompts, "--custom-output-len", options.tokens]
    theirs += ["--num-prompts", options.documents, "--max-concurrency", options.concurrency, "--ignore-eos"]
    theirs += ["--skip-chat-template", "--disable-shuffle", "--disable-tqdm"]
    return {"vllm": theirs, "sdg": mine}


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for /health."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise BenchError(f"vLLM has ended:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main(__doc__, add_options, measure))
