"""The dataset card: README.md of the output, with a section for each config that a run wrote.

A section stands between `<!-- sdg: begin NAME -->` and `<!-- sdg: end NAME -->` and is replaced by each run of its
config; all other text of the card belongs to its authors and is never changed. In the front matter only keys whose
values differ are rewritten (without the comments inside them), and a license, language or tag is never removed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sdg
from sdg_plugins.common import recorded
from sdg_plugins.common.files import default_state_dir, format_of, uses_spool
from sdg_plugins.common.markdown import counted, fence, inline, rows_in_table, table, visible
from sdg_plugins.common.outputs import has_output
from sdg_plugins.common.prices import in_money
from sdg_plugins.common.rows import kept_columns
from sdg_plugins.common.state import recorded_fields, schema_of
from sdg_plugins.common.statistics import rank_statistics, rows_in, sum_statistics
from sdg_plugins.publishing.dataset_info import features_of, with_features
from sdg_plugins.publishing.front_matter import BrokenCard, split_card, updated, with_values
from sdg_plugins.publishing.making import Making, tasks_of
from sdg_plugins.publishing.samples import samples

NAME = "README.md"
LONGEST_PROMPT = 4000  # characters of a prompt that are shown
SAMPLES, COLUMNS = 2, 20  # rows, and columns of each
SAMPLE_LIMITS = (600, 120, 30)  # characters of a string: the first limit with which the samples are short enough
LONGEST_SAMPLE = 20_000  # characters of all samples
FILES_TRIED = 100  # files searched for sample rows: all documents of a chunk may be filtered
LOCK_PATIENCE = 60.0  # s: ranks that end at the same time write the card one after the other
MARK = re.compile(r"^<!-- sdg: (begin|end) ([\w.-]+) -->[ \t]*\r?$", re.MULTILINE)
FACTS = re.compile(r"^<!-- sdg: facts (\{.*\}) -->", re.MULTILINE)
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/(\w+)/?$")  # a model in the Hub client's cache
SAMPLES_HEADING = "\n### Sample rows\n"
NO_FACTS: dict[str, Any] = {"rows": 0, "files": "", "exist": True, "columns": "", "run": ""}


def write(run: sdg.Run, progress: str = "") -> None:
    """Bring the card in the output up to date; the last rank to write it includes the figures of all ranks."""
    import filelock

    shared = Path(default_state_dir(run.options.output, "data"))  # all configs of an output have one card
    with filelock.FileLock((shared if shared.is_dir() else run.state) / "card.lock", timeout=LOCK_PATIENCE):
        before = read(run)
        after = render(before, run, progress)
        if after != before:
            run.output.write(NAME, lambda file: file.write(after.encode()))


def read(run: sdg.Run) -> str | None:
    """The card in the output, None if it has none. Raises BrokenCard."""
    try:
        with run.output.open(NAME) as file:
            return bytes(file.read()).decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as exc:
        raise BrokenCard(f"{run.output.path(NAME)} is not UTF-8 ({exc}): it is left unchanged") from exc


def check_beside(run: sdg.Run) -> None:
    """Raise OutputError if a run that begins, on local disks or S3, cannot have a card with those before it."""
    if uses_spool(run.options) or ((run.state / "run.json").exists() and not run.options.fresh):
        return
    with contextlib.suppress(BrokenCard):  # it is left unchanged, and reported at the end
        check_others(read(run) or "", run, "")


def check_others(readme: str, run: sdg.Run, folder: str) -> None:
    """Raise OutputError if `load_dataset` would fail to load a run's rows, or mix them with those of another run.

    Args:
        readme: the card as it is.
        run: whose rows are to come.
        folder: folder of the repository for its output, "" for its root.
    """
    ours = files_of(run, folder)
    for section in sections(readme):
        theirs, place = section.facts["files"], section.facts["files"].partition("**/")[0]
        if not theirs or not section.facts["exist"] or ours.partition("**/")[0] == place:
            continue
        name, output = section.name, sdg.redact(run.options.output)
        if ours.startswith(place):
            raise sdg.OutputError(f"--output {output}: the config {name} would have its rows, too: choose another")
        mine, format = format_of(ours), format_of(theirs)
        if mine and format and mine != format:
            raise sdg.OutputError(
                f"{output} has the config {name} in {format}, and `datasets` loads all configs of a dataset in one "
                f"format: choose another --output, or an --output-filename in {format}"
            )


def render(
    readme: str | None, run: sdg.Run, progress: str = "", folder: str = "", dataset: str = "", published: bool = False
) -> str:
    """Return the card with the section of the run's config up to date; the same input gives the same text.

    Args:
        readme: the card as it is, None if it does not exist.
        run: only its state, and two rows of its output, are read.
        progress: markdown for the top of the section.
        folder: folder of the repository for the run's output, "" for its root.
        dataset: OWNER/NAME on the Hub, or buckets/OWNER/NAME; "" for an output elsewhere.
        published: data files of this config are on the Hub, even if the run's output has none of them any more.

    Raises:
        BrokenCard: its front matter cannot be read.
    """
    text = (readme or "").removeprefix("\ufeff")
    end = re.search(r"\r?\n", text)
    newline = end[0] if end else "\n"
    front, body = split_card(text, f"{dataset} {NAME}".strip() if dataset else run.output.path(NAME))
    if not text.strip():
        body = f"\n# {inline(dataset.rpartition('/')[2] or title_of(run.options.output))}\n"
    record = recorded.load_record(run.state)
    present = {section.name: section for section in sections(body)}
    name = config_on_card(run.options.output_config, folder, present)
    lines = SectionRenderer(run, record, facts_of(run, record, folder, published), dataset, name).lines(
        progress, present[name].text if name in present else ""
    )
    body = with_section(body, name, "\n".join(lines).replace("\n", newline), newline)
    configs = {section.name: section.facts for section in sections(body)}
    values = updated(front.values, configs, record["source"], dataset)
    values = with_features(values, name, configs[name]["files"], features_of(run, record))
    return f"---{newline}{with_values(front, values, newline)}---{newline}{body}"


def title_of(output: str) -> str:
    """The title of a card that is not on the Hub: the name of the output's folder, as a heading."""
    name = re.sub(r"[-_.\s]+", " ", posixpath.basename(output.rstrip("/"))).strip()
    return f"{name[:1].upper()}{name[1:]}: synthetic data" if name else "Synthetic data"


# ── Sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Section(NamedTuple):
    """The section of one config in a card, from `start` to `end` of the card's text."""

    name: str
    start: int
    end: int
    text: str

    @property
    def facts(self) -> dict[str, Any]:
        """What the front matter needs of this config; see `facts_of`."""
        found = FACTS.search(self.text)
        with contextlib.suppress(ValueError):  # broken by an edit: the next run of this config writes them again
            return {**NO_FACTS, **(json.loads(found[1]) if found else {})}
        return NO_FACTS


def sections(body: str) -> Iterator[Section]:
    """The complete sections in a card; a mark without its counterpart is ordinary text."""
    opened: re.Match[str] | None = None
    seen = set()
    for mark in MARK.finditer(body):
        if mark[1] == "begin":
            opened = mark
            continue
        if opened and opened[2] == mark[2] and mark[2] not in seen:
            seen.add(mark[2])
            end = mark.start() + len(mark[0].rstrip())
            yield Section(mark[2], opened.start(), end, body[opened.start() : end])
        opened = None


def config_on_card(config: str, folder: str, present: dict[str, Section]) -> str:
    """The name of a run's config on a card that it may share with runs whose outputs are in other folders.

    It is --output-config unless a run in another folder came first: then the folder is put before it.
    """
    files = f"{posixpath.join(glob.escape(folder), config)}/"
    for section in present.values():
        if section.facts["files"].startswith(files):
            return section.name
    if config not in present or not present[config].facts["files"]:
        return config
    place = re.sub(r"[^\w.-]+", "-", folder) or "root"
    return f"{place}-{config}"


def with_section(body: str, name: str, text: str, newline: str) -> str:
    """Put a config's section into a card: in its place, or behind the last section, or at the end."""
    text = text.removesuffix(newline)
    present = list(sections(body))
    for section in present:
        if section.name == name:
            return body[: section.start] + text + body[section.end :]
    at = present[-1].end if present else len(body)
    before, after = body[:at], body[at:]
    gap = newline * (2 if present else 0 if not before else 1 if before.endswith("\n") else 2)
    return f"{before}{gap}{text}{after if present else newline}"


def facts_of(run: sdg.Run, record: dict[str, Any], folder: str, published: bool) -> dict[str, Any]:
    """What the front matter needs of a config: number of rows, its files as a glob, and a hash of its columns."""
    import xxhash

    results, source = recorded_fields(run.state) or {}, schema_of(record["source_schema"])
    kept = kept_columns(run.options, source.names)
    columns = [(field.name, str(field.type)) for field in source if field.name in kept]
    columns += [(name, str(kind)) for name, kind in results.items()]
    place = True if getattr(run.options, "flat", False) else run.options.results_column  # of results in a row
    return {
        "rows": rows_in(sum_statistics(rank_statistics(run.state)), run.options),
        "files": files_of(run, folder),
        "exist": published or has_output(run),
        "columns": xxhash.xxh3_64_hexdigest(json.dumps([*columns, place]).encode()),
        "tasks": tasks_of(record["options"]),
        "run": record["run"][:12],
    }


def files_of(run: sdg.Run, folder: str) -> str:
    """The files of a config, as a glob in the repository."""
    suffix = re.search(r"\.\w+(\.(gz|zst))?$", run.options.output_filename)
    return posixpath.join(glob.escape(folder), run.options.output_config, f"**/*{suffix[0] if suffix else ''}")


class SectionRenderer(NamedTuple):
    """Renders the section of a config. Text from options or data passes `inline` or `fence`, so it stays in its place.

    Attributes:
        record: the content of the run's `run.json`.
        facts: see `facts_of`.
        dataset: OWNER/NAME on the Hub, "" for an output elsewhere.
        name: of the config on the card.
    """

    run: sdg.Run
    record: dict[str, Any]
    facts: dict[str, Any]
    dataset: str
    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The recorded options."""
        options: dict[str, Any] = self.record["options"]
        return options

    def lines(self, progress: str, earlier: str) -> Iterator[str]:
        """The lines of the section; `earlier` is the text of the one that it replaces, "" if there was none."""
        name = self.name
        yield f"<!-- sdg: begin {name} -->"
        facts = json.dumps(self.facts).replace("<", r"\u003c").replace(">", r"\u003e")
        yield f"<!-- sdg: facts {facts} -->"
        yield f"## Config `{name}`\n"
        ranks = rank_statistics(self.run.state)
        total, making = sum_statistics(ranks), Making(self.run, self.record)
        yield making.summary(rows_in(total, self.run.options))
        if progress:
            yield visible(progress).replace("<!--", "&lt;!--").strip("\n") + "\n"
        elif missing := self.unfinished(ranks):
            yield missing
        yield "### How it was made\n"
        yield from making.steps()
        yield from rows_in_table(making.origin(), ("Part", "What it was"))
        yield from making.prompts()
        yield from table("Columns", making.columns(), ("Column", "Content"))
        yield "### Statistics\n"
        yield from rows_in_table(self.figures(total), ("Figure", "Value"))
        yield "<details><summary>All figures</summary>\n"
        yield from rows_in_table(self.statistics(total), ("Figure", "Value"))
        yield "</details>\n"
        yield "### How to load it\n\n" + fence(self.loading_code(), "python")
        yield "### How to make it again\n\n" + fence(making.command(), "sh")
        yield from self.samples(earlier)
        yield f"<!-- sdg: end {name} -->\n"

    def unfinished(self, ranks: list[dict[str, Any]]) -> str:
        """A note that the run has not finished, "" if it has."""
        total = self.options["world_size"]
        finished = sum(rank.get("rank", {}).get("status") == "finished" for rank in ranks)
        how = "the run has not ended" if total == 1 else f"{finished} of {total} ranks have finished"
        return "" if finished >= total else f"> **Not finished**: {how}.\n"

    def figures(self, total: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The figures that a reader of the data needs, over all ranks and processes."""
        documents, failed = total.get("documents", 0), total.get("failed", 0)
        for name in ("documents", "rows", "filtered", "failed"):
            number = rows_in(total, self.run.options) if name == "rows" else total.get(name, 0)
            yield name.capitalize(), f"{number:,}"
        # Rounded down: only complete runs have 100 %.
        yield "Completion rate", f"{math.floor(10_000 * (documents - failed) / max(documents, 1)) / 100:.2f} %"
        if truncated := total.get("truncated", 0):
            yield "Truncated to the model's context", f"{truncated:,}"
        if reasons := total.get("finish_reasons"):
            most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
            yield "Completions by finish reason", ", ".join(f"{inline(name)} {number:,}" for name, number in most)
        tokens = total.get("completion_tokens", 0)
        yield "Completion tokens", f"{tokens:,}; mean {tokens / max(documents, 1):,.1f} per document"

    def statistics(self, total: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """The other figures, over all ranks and processes."""
        seconds, of = total.get("seconds", 0.0), max(total.get("documents", 0), 1)
        prompt, completion = total.get("prompt_tokens", 0), total.get("completion_tokens", 0)
        for kind, tokens in (("Prompt", prompt), ("Total", prompt + completion)):
            yield f"{kind} tokens", f"{tokens:,}; mean {tokens / of:,.1f} per document"
        for name, model in total.get("models", {}).items():
            spent = f"{model['prompt_tokens']:,} prompt and {model['completion_tokens']:,} completion tokens"
            yield f"Of these at the model `{inline(name)}`", f"{counted(model['requests'], 'request')}, {spent}"
        if "cost" in total:
            guessed = "; estimated in part, because the server reports no usage" * ("estimated_tokens" in total)
            yield "Cost", f"{in_money(total['cost'])}{guessed}"
        yield "Completion tokens per second", f"{total.get('tokens_per_second', 0.0):,.1f}"
        if gpus := gpus_per_rank(self.options):
            hours = gpus * seconds / 3600
            yield "GPU hours, all ranks and attempts", f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"
        else:
            yield "Wall time, all ranks and attempts", precise_duration(seconds)

    def loading_code(self) -> str:
        """Python code that loads the rows."""
        name = json.dumps(self.name, ensure_ascii=False)
        first = "from datasets import load_dataset\n\n"
        kind = "parquet" if format_of(self.facts["files"]) == "parquet" else "json"
        if self.dataset.startswith("buckets/"):
            files = json.dumps(f"hf://{self.dataset}/{self.facts['files']}", ensure_ascii=False)
            return f'{first}rows = load_dataset("{kind}", data_files={files}, split="train")'
        if self.dataset or self.run.output.local:
            place = json.dumps(self.dataset or "path/to/this/folder", ensure_ascii=False)
            return f'{first}rows = load_dataset({place}, {name}, split="train")'
        files = json.dumps(f"s3://path/to/this/folder/{self.facts['files']}", ensure_ascii=False)
        return f'{first}rows = load_dataset("{kind}", data_files={files}, split="train")'

    def samples(self, earlier: str) -> Iterator[str]:
        """The first rows; those of the earlier section once the files have been moved away."""
        if text := samples(self.run):
            yield SAMPLES_HEADING.removeprefix("\n") + "\n" + text
            return
        earlier = earlier.replace("\r\n", "\n")
        kept = earlier.rpartition(SAMPLES_HEADING)[2]
        if kept != earlier:
            yield SAMPLES_HEADING.removeprefix("\n") + kept.rpartition("<!-- sdg: end")[0].removesuffix("\n")


def gpus_per_rank(options: dict[str, Any]) -> int:
    """The GPUs that a rank uses; 0 if the run did not launch the server."""
    if options["server"] not in {"vllm", "sglang"}:
        return 0
    return math.prod(int(options.get(name) or 1) for name in ("tp", "pp", "dp", "replicas"))


def precise_duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours with one decimal, such as `1.5 minutes`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:,.1f} hours"
