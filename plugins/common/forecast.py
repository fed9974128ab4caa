"""What a run will take, from a sample of its documents: tokens, cost, time, failures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FEW = 8  # requests that are too few to tell a constant part of their time from one that grows with their tokens
Z = 1.96  # standard errors on each side of an estimate: a range that holds in 95 of 100 samples


class Range(NamedTuple):
    """An estimate, and the range in which the value probably is."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Of as many times as many."""
        return Range(self.value * factor, self.low * factor, self.high * factor)


class Takes(NamedTuple):
    """What a request takes when few others are in flight: the unit of work, in s.

    Attributes:
        request: whatever it asks for.
        token: more for each token of the completion.
    """

    request: float
    token: float

    def work(self, requests: float, tokens: float) -> float:
        """Of some requests with as many completion tokens in all."""
        return self.request * requests + self.token * tokens


class Pace(NamedTuple):
    """How fast a part of a sample went.

    Attributes:
        work: see `Takes`.
        seconds: how long it took.
        area: requests in flight, integrated over this time, in s.
    """

    work: float
    seconds: float
    area: float

    @property
    def in_flight(self) -> float:
        """Mean number of requests in flight."""
        return self.area / max(self.seconds, 1e-9)

    @property
    def each(self) -> float:
        """In-flight seconds for a unit of work."""
        return self.area / max(self.work, 1e-9)


def takes_of(requests: Sequence[tuple[float, float]]) -> Takes:
    """What requests take, from the completion tokens and the seconds of some (least squares, neither part negative)."""
    import statistics

    tokens, seconds = (list(values) for values in zip(*requests, strict=True)) if requests else ([], [])
    if not sum(seconds):
        return Takes(0.0, 1.0) if sum(tokens) else Takes(1.0, 0.0)
    slope, start = statistics.linear_regression(tokens, seconds) if len(set(tokens)) > 2 else (0.0, 0.0)
    if len(requests) < FEW or slope <= 0 or start <= 0:  # the better of time for each token, and for each request
        each = sum(seconds) / sum(tokens) if sum(tokens) else 0.0
        mean = statistics.fmean(seconds)
        by_token = sum((one - each * of) ** 2 for of, one in zip(tokens, seconds, strict=True))
        by_request = sum((one - mean) ** 2 for one in seconds)
        return Takes(0.0, each) if each and by_token < by_request else Takes(mean, 0.0)
    return Takes(start, slope)


def mean_of(
    values: Sequence[float], population: int, sizes: Sequence[float] | None = None, size: float | None = None
) -> Range:
    """The mean of a population, from evenly spread values of it.

    Args:
        values: of the sample.
        population: how many there are.
        sizes: something that is known of each of them and may go with the value, such as the length of a text.
        size: its mean, of many more than the sample. The estimate is corrected by it (regression estimator).
    """
    import statistics

    mean = statistics.fmean(values)
    if len(values) >= population:
        return Range(mean, mean, mean)
    if len(values) < 3:
        return Range(mean, 0.0, math.inf)
    unseen, deviation = max(0.0, 1 - len(values) / max(population, 1)), statistics.stdev(values)
    if sizes and size is not None and len(set(sizes)) > 1 and deviation:
        slope, start = statistics.linear_regression(sizes, values)
        mean = max(0.0, start + slope * size)
        deviation = statistics.stdev(value - slope * of for value, of in zip(values, sizes, strict=True))
    error = Z * deviation / math.sqrt(len(values)) * math.sqrt(unseen)
    return Range(mean, max(0.0, mean - error), mean + error)


def share_of(found: int, values: int, population: int) -> Range:
    """The share of a population that has a property, of which `found` of some values have it (Wilson 1927)."""
    share = found / max(values, 1)
    if values >= population:
        return Range(share, share, share)
    scale = 1 + Z**2 / values
    middle = (share + Z**2 / (2 * values)) / scale
    error = Z / scale * math.sqrt(share * (1 - share) / values + Z**2 / (4 * values**2))
    return Range(share, max(0.0, middle - error), min(1.0, middle + error))


def growth(narrow: Pace, wide: Pace) -> float:
    """How the time of a request grows with the number in flight: 0 not at all, 1 in proportion (the server is full)."""
    if wide.in_flight < 1.5 * narrow.in_flight or not narrow.work or not wide.work:
        return 0.5
    exponent = math.log(max(wide.each, 1e-9) / max(narrow.each, 1e-9)) / math.log(wide.in_flight / narrow.in_flight)
    return min(1.0, max(0.0, exponent))


def duration(work: Range, narrow: Pace, wide: Pace, in_flight: float, last: float) -> Range:
    """Seconds that some work takes.

    Args:
        work: in the units of the paces.
        narrow: with few requests in flight.
        wide: with as many as the sample allowed.
        in_flight: as many as the run may have.
        last: seconds that a document takes: the last ones end when nothing else is left.
    """
    if not wide.work:
        wide = narrow
    elif wide.seconds > 2 * last:  # when nothing is left to send, the server is no longer full
        wide = wide._replace(seconds=wide.seconds - last / 2)
    more = max(1.0, in_flight / max(wide.in_flight, 1e-9))
    exponents = (growth(narrow, wide), 0.0, 1.0) if more > 1.25 else (0.0, 0.0, 0.0)
    likely, fast, slow = (wide.each * more**exponent / max(in_flight, wide.in_flight) for exponent in exponents)
    tail = last / 2
    return Range(*(max(last, amount * each + tail) for amount, each in zip(work, (likely, fast, slow), strict=True)))


def per_document(documents: Iterable[Mapping[str, Sequence[float]]], model: str, kind: int) -> list[float]:
    """What each document has used at a model: 0 tokens of prompts, 1 of completions, 2 requests."""
    return [document[model][kind] if model in document else 0.0 for document in documents]


def in_words(seconds: float) -> str:
    """A duration with two digits: `45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    if math.isinf(seconds):
        return "?"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * length:
            number = seconds / length
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def as_json(ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Estimates for programs."""
    return {name: {"value": r.value, "low": r.low, "high": r.high} for name, r in ranges.items()}
