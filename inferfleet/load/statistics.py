"""Exact statistics of requests; docs/bench.md has the formulas. Pure. Times are seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

PERCENTILES = (50, 95, 99)


@dataclass(slots=True)
class Sample:
    """One request: when it began and ended, and when each chunk with tokens arrived.

    `tokens` is what the server counted, else (`counted`) the number of chunks. With an `error`
    (its kind) it counts as failed; `detail` is what was said.
    """

    begun: float
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    counted: bool = False
    error: str = ""
    detail: str = ""

    @property
    def first_token(self) -> float:
        """From sending to the first chunk with tokens."""
        return self.arrivals[0] - self.begun

    @property
    def per_token(self) -> float | None:
        """(last - first) / (tokens - 1); None for an answer of one token."""
        if self.tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)


@dataclass(slots=True)
class Round:
    """One visit to one step: `concurrency` clients at `target` between `begun` and `until`."""

    target: int
    concurrency: int
    begun: float = 0.0
    until: float = 0.0  # the end of the window in which rates are counted
    samples: list[Sample] = field(default_factory=list)
    cpu: float = 0.0  # share of one core that we ourselves took
    lags: list[float] = field(default_factory=list)  # how late our own timers came
    whole: bool = False  # it ended by itself

    @property
    def window(self) -> float:
        return max(self.until - self.begun, 1e-9)

    @property
    def answered(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.error]


@dataclass(frozen=True, slots=True)
class Summary:
    """A distribution: every value is one that was measured, but for the mean."""

    count: int
    mean: float
    low: float
    p50: float
    p95: float
    p99: float
    high: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What one round, or all rounds of a step, came to; what comparisons compare."""

    requests_per_second: float
    output_tokens_per_second: float
    first_token: Summary | None
    inter_token: Summary | None


@dataclass(frozen=True, slots=True)
class Step:
    """All rounds of one concurrency at one target; `rounds` has the rates of each."""

    concurrency: int
    requests: int
    errors: dict[str, int]
    rates: Rates
    gap: Summary | None
    whole_answer: Summary | None
    prompt_tokens: float | None
    output_tokens: float
    counted_chunks: bool  # some answers came without the server's own count
    client_cpu: float
    client_lag_p99: float
    complete: bool
    rounds: tuple[Rates, ...]


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Nearest rank: the least value that at least `percent` % of all do not exceed."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(0, rank - 1)]


def summary(values: Iterable[float]) -> Summary | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p95, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Summary(len(ordered), fmean(ordered), ordered[0], p50, p95, p99, ordered[-1])


def within(sample: Sample, measured: Round) -> float:
    """The share of a request's time that lies in the round's window."""
    overlap = min(sample.ended, measured.until) - max(sample.begun, measured.begun)
    lasted = sample.ended - sample.begun
    return min(1.0, max(0.0, overlap) / lasted) if lasted > 0 else 1.0


def tokens_within(sample: Sample, measured: Round) -> float:
    """Its tokens that arrived in the window, when each chunk brings as many as the others."""
    if not sample.arrivals:
        return 0.0
    inside = sum(measured.begun <= at <= measured.until for at in sample.arrivals)
    return sample.tokens * inside / len(sample.arrivals)


def rates(rounds: Sequence[Round]) -> Rates:
    """Rates over the windows together, latencies over all answers."""
    seconds = sum(each.window for each in rounds)
    answered = [(sample, each) for each in rounds for sample in each.answered]
    per_token = (sample.per_token for sample, _ in answered)
    return Rates(
        sum(within(*pair) for pair in answered) / seconds,
        sum(tokens_within(*pair) for pair in answered) / seconds,
        summary(sample.first_token for sample, _ in answered if sample.arrivals),
        summary(value for value in per_token if value is not None),
    )


def step(rounds: Sequence[Round]) -> Step:
    """What the rounds of one concurrency at one target came to."""
    samples = [sample for each in rounds for sample in each.samples]
    answered = [sample for sample in samples if not sample.error]
    prompts = [sample.prompt_tokens for sample in answered if sample.prompt_tokens is not None]
    lags = summary(lag for each in rounds for lag in each.lags)
    return Step(
        concurrency=rounds[0].concurrency,
        requests=len(samples),
        errors=errors(samples),
        rates=rates(rounds),
        gap=summary(b - a for s in answered for a, b in pairwise(s.arrivals)),
        whole_answer=summary(sample.ended - sample.begun for sample in answered),
        prompt_tokens=fmean(prompts) if prompts else None,
        output_tokens=fmean(s.tokens for s in answered) if answered else 0.0,
        counted_chunks=any(sample.counted for sample in answered),
        client_cpu=max(each.cpu for each in rounds),
        client_lag_p99=lags.p99 if lags else 0.0,
        complete=all(each.whole for each in rounds),
        rounds=tuple(rates([each]) for each in rounds if each.whole),
    )


def errors(samples: Iterable[Sample]) -> dict[str, int]:
    """Failed requests by kind, the most frequent first."""
    counts: dict[str, int] = {}
    for sample in samples:
        if sample.error:
            counts[sample.error] = counts.get(sample.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def examples(samples: Iterable[Sample]) -> dict[str, str]:
    """What was said with the first failure of each kind."""
    found: dict[str, str] = {}
    for sample in samples:
        if sample.error:
            found.setdefault(sample.error, sample.detail)
    return found
