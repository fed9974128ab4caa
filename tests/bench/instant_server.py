"""An OpenAI-compatible server that answers at once (or after an exact delay): what is measured is the client.

    python tests/bench/instant_server.py --port 8000
    curl -s localhost:8000/v1/chat/completions -d '{"messages": []}'
    curl -s localhost:8000/stats

It parses HTTP/1.1 by hand (keep-alive, pipelining, Content-Length bodies), never looks into a body, and gives every
answer a number of its own. `--port 0` takes a free port and prints `{"port": N}`. `--slow-share 0.01` makes exactly
every 100th request slow. `POST /reset?limit=N` forgets all counts and names the concurrency that the client was given.

`GET /stats` tells how many requests were in flight, as seen from here: a request counts from the moment when its last
byte was read until its answer is written. `mean_in_flight` is the time-weighted mean between the moment when the
limit was first reached and the arrival of the last request: it leaves out how the client starts and how it drains,
and nothing in between. It is null if the limit was never reached. `full_at` and `last_at` are these two moments on the
monotonic clock, `cpu_seconds` is what the server has used itself.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import resource
import sys
import time
from urllib.parse import parse_qs, urlsplit

import uvloop

MODEL = "instant"
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
SENTENCE = "the model reads a long page and says in plain words what its author wanted the reader to keep in mind"


class Ledger:
    """Requests in flight over time, as the integral of their number."""

    def __init__(self, limit: int = 0, in_flight: int = 0) -> None:
        self.limit, self.in_flight, self.peak = limit, in_flight, in_flight
        self.requests = self.answered = 0
        self.area, self.now, self.cpu = 0.0, time.monotonic(), time.process_time()
        self.first_request: float | None = None  # unix time
        self.first = self.full = self.last = (self.now, 0.0)  # (time, area) at three moments

    def arrive(self) -> None:
        """Count a request that was read to its end."""
        self.advance()
        if not self.requests:
            self.first_request = time.time()
            self.first = (self.now, self.area)
        self.requests += 1
        self.in_flight += 1
        self.last = (self.now, self.area)
        if self.in_flight > self.peak:
            self.peak = self.in_flight
            if self.peak == self.limit:
                self.full = self.last

    def leave(self, answered: bool) -> None:
        """Count a request that was answered, or given up by the client."""
        self.advance()
        self.in_flight -= 1
        self.answered += answered

    def advance(self) -> None:
        """Add the time since the last change to the integral."""
        now = time.monotonic()
        self.area += self.in_flight * (now - self.now)
        self.now = now

    def stats(self) -> dict[str, float | int | None]:
        """What `GET /stats` answers."""
        reached = 0 < self.limit <= self.peak
        return {
            "requests": self.requests,
            "answered": self.answered,
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak,
            "mean_in_flight": mean(self.full, self.last) if reached else None,
            "mean_in_flight_with_ramp": mean(self.first, self.last),
            "ramp_seconds": self.full[0] - self.first[0] if reached else None,
            "seconds": self.last[0] - self.first[0],
            "first_request": self.first_request,
            "full_at": self.full[0] if reached else None,
            "last_at": self.last[0],
            "cpu_seconds": time.process_time() - self.cpu,
        }


def mean(start: tuple[float, float], end: tuple[float, float]) -> float:
    """Return the mean height between two points (time, area) of an integral."""
    return (end[1] - start[1]) / (end[0] - start[0]) if end[0] > start[0] else 0.0


def response(body: bytes, status: str = "200 OK") -> bytes:
    """Return a whole HTTP response with a JSON body."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def completion(kind: str, tokens: int) -> bytes:
    """Return a response of OpenAI's API with `%010d` where the number of the answer goes."""
    words = itertools.islice(itertools.cycle(SENTENCE.split()), tokens)
    text = "Answer {number}: " + " ".join(words)
    content = {"message": {"role": "assistant", "content": text}} if kind == "chat.completion" else {"text": text}
    answer = {
        "id": f"{kind}-instant",
        "object": kind,
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 500, "completion_tokens": tokens, "total_tokens": 500 + tokens},
    }
    return response(json.dumps(answer).replace("{number}", "0" * 10).encode()).replace(b"0" * 10, b"%010d")


class Server:
    """What all connections share: the options, the ledger and the prepared answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.ledger = Ledger()
        self.delay, self.spread, self.slow_delay = options.delay, options.spread, options.slow_delay
        self.chance = random.Random(0)
        self.slow_every = round(1 / options.slow_share) if options.slow_share else 0
        card = {"id": MODEL, "object": "model", "created": 1, "owned_by": "bench", "max_model_len": 32768}
        self.models = response(json.dumps({"object": "list", "data": [card]}).encode())
        self.answers = {
            b"/v1/chat/completions": completion("chat.completion", options.tokens),
            b"/v1/completions": completion("text_completion", options.tokens),
        }

    def next_delay(self) -> float:
        """Return how long the request that has just arrived takes."""
        slow = self.slow_every and self.ledger.requests % self.slow_every == 0
        if slow:
            return self.slow_delay
        return self.delay * self.chance.lognormvariate(0.0, self.spread) if self.spread else self.delay

    def other(self, method: bytes, target: bytes) -> bytes:
        """Answer a request that is not for a completion."""
        url = urlsplit(target.decode())
        if (method, url.path) == (b"GET", "/v1/models"):
            return self.models
        if (method, url.path) == (b"GET", "/stats"):
            return response(json.dumps(self.ledger.stats()).encode())
        if (method, url.path) == (b"POST", "/reset"):
            self.ledger = Ledger(int(parse_qs(url.query).get("limit", ["0"])[0]), self.ledger.in_flight)
            return response(b"{}")
        return response(b'{"error": {"message": "not found"}}', "404 Not Found")


class Connection(asyncio.Protocol):
    """One connection: its requests are answered one after the other, in the order of their arrival."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.loop = server, loop
        self.transport: asyncio.Transport
        self.buffer = b""
        self.waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Remember where answers go."""
        self.transport = transport

    def connection_lost(self, exception: Exception | None) -> None:
        """A client that leaves takes its request with it."""
        self.transport.abort()
        if self.waiting:
            self.waiting.cancel()
            self.waiting = None
            self.server.ledger.leave(answered=False)

    def data_received(self, data: bytes) -> None:
        """Answer what has come in full, unless an answer is still due."""
        self.buffer = self.buffer + data if self.buffer else data
        while not self.waiting and not self.transport.is_closing():
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end]
            length = CONTENT_LENGTH.search(head)
            end += 4 + (int(length[1]) if length else 0)
            if len(self.buffer) < end:
                return
            self.buffer = self.buffer[end:]
            self.handle(head)

    def handle(self, head: bytes) -> None:
        """Answer one request, now or when its time has come."""
        method, target, _ = head.split(b" ", 2)
        close = CLOSE.search(head) is not None
        answer = self.server.answers.get(target) if method == b"POST" else None
        if answer is None:
            self.write(self.server.other(method, target), close)
            return
        ledger = self.server.ledger
        ledger.arrive()
        answer %= ledger.requests
        if delay := self.server.next_delay():
            self.waiting = self.loop.call_later(delay, self.answer_late, answer, close)
        else:
            ledger.leave(answered=True)
            self.write(answer, close)

    def answer_late(self, answer: bytes, close: bool) -> None:
        """Write an answer that is due and go on with what came meanwhile."""
        self.waiting = None
        self.server.ledger.leave(answered=True)
        self.write(answer, close)
        if self.buffer:
            self.data_received(b"")

    def write(self, answer: bytes, close: bool) -> None:
        """Write, and close the connection if the client asked for it."""
        self.transport.write(answer)
        if close:
            self.transport.close()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds until an answer")
    parser.add_argument("--slow-share", type=float, default=0.0, help="share of the requests that are slow: 0.01")
    parser.add_argument("--spread", type=float, default=0.0, help="sigma of lognormal delays around --delay")
    parser.add_argument("--slow-delay", type=float, default=0.0, help="seconds until a slow answer")
    parser.add_argument("--tokens", type=int, default=60, help="words in an answer")
    parser.add_argument("--until-eof", action="store_true", help="end with standard input: no server outlives a bench")
    return parser.parse_args(arguments)


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is stopped, or standard input ends with `--until-eof`."""
    loop = asyncio.get_running_loop()
    server = Server(options)
    listener = await loop.create_server(lambda: Connection(server, loop), "127.0.0.1", options.port, backlog=65535)
    print(json.dumps({"port": listener.sockets[0].getsockname()[1]}), flush=True)
    if options.until_eof:
        await loop.run_in_executor(None, sys.stdin.read)
    else:
        await listener.serve_forever()


def main() -> None:
    """Run the server."""
    options = parse()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(options))


if __name__ == "__main__":
    main()
