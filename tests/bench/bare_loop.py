"""The ceiling: the least that an aiohttp client can do.

    python tests/bench/bare_loop.py http://127.0.0.1:8000 --documents 10000 --concurrency 256

It reads nothing, keeps nothing and retries nothing.
"""

import argparse
import asyncio
import gc
import itertools
import resource

import aiohttp
import orjson
import uvloop
from corpus import documents

PROMPT = "Summarise in one paragraph:\n\n{}"
HEADERS = {"Content-Type": "application/json"}


async def work(session: aiohttp.ClientSession, url: str, prompts: list[str], numbers: itertools.count) -> None:
    """Send the next prompt until none is left."""
    for number in numbers:
        if number >= len(prompts):
            return
        payload = {"model": "instant", "messages": [{"role": "user", "content": PROMPT.format(prompts[number])}]}
        async with session.post(url, data=orjson.dumps(payload), headers=HEADERS) as response:
            answer = orjson.loads(await response.read())
            if not answer["choices"][0]["message"]["content"]:
                raise ValueError("an empty answer")


async def run(options: argparse.Namespace, prompts: list[str]) -> None:
    """Send all prompts through one session."""
    url = f"{options.url}/v1/chat/completions"
    numbers = itertools.count()
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(work(session, url, prompts, numbers) for _ in range(options.concurrency)))


def main() -> None:
    """Make the prompts, then send them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=256)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    prompts = list(documents(options.documents, options.bytes))
    gc.freeze()  # a ceiling at its best: thousands of sockets are not worth looking through again and again
    gc.set_threshold(100_000, 50, 50)
    uvloop.run(run(options, prompts))


if __name__ == "__main__":
    main()
