"""Make input for the benches, and count what came out.

    python tests/bench/corpus.py make --documents 10000 --bytes 2048 input.parquet
    python tests/bench/corpus.py count output/data

The text is English-like, the same on every machine, and no two documents are equal. The benches run this file as a
process of its own: a process that starts others should be small, because on Linux a child's peak memory includes
what its parent had.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

VOCABULARY = """
the of and to in a is that for it was on with as be by at this from which an are not have or had but they one all her
she there would their we him been has when who will more no if out so said what up its about than into them can only
other time new some could these two may first then do any like my now over such our man me even most made after also
did many before must through years where much your way well down should because long each just state those people too
mister little good world make very year still see own work men day get here old both between life being under three
never know same last another while us off might great go come since against right came take used himself few house use
during without again place around however small found thought went say part once general high upon school every water
light stone river garden winter letter music ship engine market bridge paper window teacher doctor farmer king soldier
forest island morning summer history science language question answer reason nature
"""
BATCH = 1000


def documents(count: int, size: int, start: int = 0) -> Iterator[str]:
    """Yield `count` texts of about `size` bytes each."""
    draw, words = random.Random(0), VOCABULARY.split()
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    sentences = [
        " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(6, 20))).capitalize() + "."
        for _ in range(2000)
    ]
    for index in range(start, start + count):
        draw.seed(index)
        text = f"Page {index}. " + " ".join(draw.choices(sentences, k=size // 60 + 1))
        while len(text) < size:
            text += " " + draw.choice(sentences)
        yield text[:size]


def rows(count: int, size: int) -> Iterator[dict[str, str]]:
    """Yield the rows of an input."""
    for index, text in enumerate(documents(count, size)):
        yield {"id": f"doc-{index}", "text": text}


def make(path: Path, count: int, size: int) -> None:
    """Write an input as parquet or jsonl, by the ending of its name."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count, size))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    source = rows(count, size)
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(source, 10 * BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema))


def count_rows(folder: Path) -> int:
    """Count the rows of all parquet and jsonl files below a folder."""
    import pyarrow.parquet as pq

    total = sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))
    for path in folder.rglob("*.jsonl"):
        with path.open("rb") as file:
            total += sum(1 for _ in file)
    return total


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "count"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=2048)
    options = parser.parse_args()
    if options.command == "make":
        make(options.path, options.documents, options.bytes)
    else:
        print(count_rows(options.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
