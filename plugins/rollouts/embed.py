"""The rollout `embed`: the vector of a document, from the server's endpoint for embeddings."""

from __future__ import annotations

from typing import Any, TypedDict

import sdg
from sdg_plugins.common.results import Float32


class Embedded(TypedDict):
    embedding: list[Float32]


@sdg.hookimpl
def add_options(parser: sdg.Options) -> None:
    kind = sdg.number(int, 1)
    parser.add_argument("--dimensions", metavar="N", type=kind, help="length of the vectors; default: the model's own")


@sdg.hookimpl
def register_rollouts(register: sdg.RegisterRollouts) -> None:
    register("embed", embed)


async def embed(document: sdg.Document, generate: sdg.Generate, run: sdg.Run) -> Embedded:
    """Embed a document: a vector of 32-bit numbers."""
    payload: dict[str, Any] = {"input": document.text}
    if run.options.dimensions:
        payload["dimensions"] = run.options.dimensions
    answer = await generate.post("/embeddings", payload)
    return {"embedding": [float(number) for number in answer["data"][0]["embedding"]]}
