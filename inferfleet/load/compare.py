"""Two targets' steps side by side: ratios, and which differences the repeats bear out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from inferfleet.load.statistics import Rates, Step, Summary

ENOUGH = 3  # repeats of each side below which nothing can be said of the noise
Verdict = Literal["higher", "lower", "within noise", "unknown"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a step, in `unit`; `more` of it is better, or less."""

    name: str
    label: str
    unit: str
    more: bool
    of: Callable[[Rates], float | None]


def _of(which: str, percentile: str) -> Callable[[Rates], float | None]:
    def value(rates: Rates) -> float | None:
        found: Summary | None = getattr(rates, which)
        return None if found is None else 1000 * float(getattr(found, percentile))

    return value


METRICS = (
    Metric("requests_per_second", "requests/s", "1/s", True, lambda r: r.requests_per_second),
    Metric(
        "output_tokens_per_second", "tokens/s", "1/s", True, lambda r: r.output_tokens_per_second
    ),
    *(
        Metric(f"{which}_{p}", f"{label} {p}", "ms", False, _of(which, p))
        for which, label in (("first_token", "first token"), ("inter_token", "inter-token"))
        for p in ("p50", "p95", "p99")
    ),
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """`second` over `first` at one concurrency; the verdict is on the second."""

    concurrency: int
    metric: str
    first: float
    second: float
    ratio: float
    verdict: Verdict


def ratios(first: Sequence[Step], second: Sequence[Step]) -> Iterator[Ratio]:
    """Of every metric at every concurrency that both have."""
    others = {step.concurrency: step for step in second}
    for step in first:
        if other := others.get(step.concurrency):
            yield from _of_steps(step, other)


def _of_steps(first: Step, second: Step) -> Iterator[Ratio]:
    for metric in METRICS:
        one, two = metric.of(first.rates), metric.of(second.rates)
        if one and two is not None:
            said = verdict(values(metric, first), values(metric, second))
            yield Ratio(first.concurrency, metric.name, one, two, two / one, said)


def values(metric: Metric, step: Step) -> list[float]:
    """The metric in each repeat of a step."""
    found = (metric.of(rates) for rates in step.rounds)
    return [value for value in found if value is not None]


def verdict(first: Sequence[float], second: Sequence[float]) -> Verdict:
    """Different only where every repeat of one side is above every repeat of the other."""
    if min(len(first), len(second)) < ENOUGH:
        return "unknown"
    if min(second) > max(first):
        return "higher"
    return "lower" if max(second) < min(first) else "within noise"
