"""datatrove's inference pipeline on the same task, at its best settings for an endpoint on this machine.

    VENV/bin/python tests/bench/peer_datatrove.py in.parquet out --base-url http://127.0.0.1:8000 --checkpoints DIR

Run by `throughput.py` with the interpreter of an environment that has datatrove, never sdg's own. What was chosen, and
why (datatrove 0.10.0):

- `server_type="endpoint"` with a plain http URL on loopback takes datatrove's own small HTTP client, which does twice
  as many requests/s as the openai package it uses for other URLs. The URL has no `/v1`: it is added for loopback.
- one task, as sdg is one process; 256 generations and 256 documents at a time, as sdg.
- `--format parquet` is what sdg writes; `jsonl` is written without compression.
- metrics are reported once; the log goes where datatrove sends it, to a file and to standard error.
- `--uvloop` runs it on uvloop, which datatrove itself does not: 15 to 20 % more, for those who want to see.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter


async def summarize(document, generate):
    """Ask what sdg's `summarize` asks."""
    prompt = f"Summarise in one paragraph:\n\n{document.text}"
    return await generate({"messages": [{"role": "user", "content": prompt}]})


def reader(path: Path) -> ParquetReader | JsonlReader:
    """Return datatrove's reader for a file."""
    kind = JsonlReader if path.suffix == ".jsonl" else ParquetReader
    return kind(str(path.parent), glob_pattern=path.name, doc_progress=False)


def writer(folder: Path, kind: str) -> ParquetWriter | JsonlWriter:
    """Return datatrove's writer of one file a chunk."""
    if kind == "jsonl":
        return JsonlWriter(str(folder), output_filename="${rank}_${chunk_index}.jsonl", compression=None)
    return ParquetWriter(str(folder), output_filename="${rank}_${chunk_index}.parquet")


def main() -> int:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--checkpoints", help="folder of the checkpoints; without it nothing is durable until the end")
    parser.add_argument("--format", choices=["parquet", "jsonl"], default="parquet")
    parser.add_argument("--uvloop", action="store_true")
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        uvloop.install()

    config = InferenceConfig(
        server_type="endpoint",
        endpoint_url=options.base_url,
        model_name_or_path="instant",
        max_concurrent_generations=options.concurrency,
        metric_interval=3600,
    )
    runner = InferenceRunner(
        rollout_fn=summarize,
        config=config,
        output_writer=writer(options.output, options.format),
        checkpoints_local_dir=options.checkpoints,
        records_per_chunk=1000,
    )
    with tempfile.TemporaryDirectory() as logs:
        LocalPipelineExecutor([reader(options.input), runner], tasks=1, logging_dir=logs).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
