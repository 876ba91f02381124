"""What the gateway counts: plain numbers while requests run, Prometheus' text when asked.

The relay binds the objects here once for each model, pool and instance and adds to their
attributes; prometheus_client sees them only at a scrape. Labels are names of the configuration,
never what a client wrote.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import accumulate, chain
from typing import Literal, TypeVar, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector
from prometheus_client import generate_latest as _text
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "inferfleet_gateway_"

Refused = Literal["key", "model", "rate", "concurrency", "budget", "queue", "body"]
Ejected = Literal["passive", "probe", "hung"]
Shadowed = Literal["answered", "failed", "dropped"]
# seconds: to the first token and for all; between two chunks
_LONG = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 900.0)
_SHORT = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)

_Key = TypeVar("_Key")
_Made = TypeVar("_Made")


class Histogram:
    """Counts of seconds by upper bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus writes them: each bound with all that is not above it."""
        names = (*map(str, self.bounds), "+Inf")
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


class Series:
    """Requests for one model that went to one instance of one pool.

    `seconds` and `inter_chunk` are the pool's: a series of buckets for each instance would make
    a scrape stop the worker for long.
    """

    __slots__ = ("client_left", "codes", "cut", "first_token", "inter_chunk", "seconds")

    def __init__(self, seconds: Histogram, inter_chunk: Histogram) -> None:
        self.codes: Counter[int] = Counter()  # by status sent; 0: the client left before
        self.seconds = seconds  # from a request's coming to its end
        self.first_token = Histogram(_LONG)  # from its coming to the answer's first byte
        self.inter_chunk = inter_chunk
        self.cut = 0  # streams that the backend broke in the middle
        self.client_left = 0


class ModelSeries:
    """One model: tokens as the engines report them, and how many requests wait for a place."""

    __slots__ = ("completion_tokens", "prompt_tokens", "queued")

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = self.queued = 0


class InstanceSeries:
    """One instance: requests it has now, whether it is asked at all, and why it was not."""

    __slots__ = ("ejections", "outstanding", "up")

    def __init__(self) -> None:
        self.outstanding = 0
        self.up = True
        self.ejections: dict[Ejected, int] = dict.fromkeys(get_args(Ejected), 0)


class ShadowSeries:
    """Copies of one model's requests, sent to a pool whose answers nobody gets."""

    __slots__ = ("outcomes", "seconds")

    def __init__(self) -> None:
        self.outcomes: dict[Shadowed, int] = dict.fromkeys(get_args(Shadowed), 0)
        self.seconds = Histogram(_LONG)


class Metrics(Collector):
    """All numbers of one worker. Add to `refused` and `retries` (by reason) directly."""

    def __init__(self, models: Collection[str], log_dropped: Callable[[], int] = lambda: 0) -> None:
        """`models` are the configured names; whatever else is asked for counts under ""."""
        self.refused: dict[Refused, int] = dict.fromkeys(get_args(Refused), 0)
        self.retries: Counter[str] = Counter()  # reasons are the relay's own words
        self._known = frozenset(models)
        self._log_dropped = log_dropped
        self._series: dict[tuple[str, str, str], Series] = {}
        self._pools: dict[tuple[str, str], tuple[Histogram, Histogram]] = {}
        self._models: dict[str, ModelSeries] = {}
        self._instances: dict[str, InstanceSeries] = {}
        self._shadows: dict[tuple[str, str], ShadowSeries] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def of(self, model: str, pool: str, instance: str) -> Series:
        """The one object for these names; "" where a request never came so far."""
        name = self._name(model)
        shared = _kept(self._pools, (name, pool), lambda: (Histogram(_LONG), Histogram(_SHORT)))
        return _kept(self._series, (name, pool, instance), lambda: Series(*shared))

    def model(self, model: str) -> ModelSeries:
        """The one object for this model."""
        return _kept(self._models, self._name(model), ModelSeries)

    def instance(self, instance: str) -> InstanceSeries:
        """The one object for this instance."""
        return _kept(self._instances, instance, InstanceSeries)

    def shadow(self, model: str, pool: str) -> ShadowSeries:
        """The one object for this model's copies to this pool."""
        return _kept(self._shadows, (self._name(model), pool), ShadowSeries)

    def by_pool(self, model: str) -> dict[str, dict[str, int]]:
        """Requests for a model since the start, and those that failed on our side, by pool."""
        found: dict[str, dict[str, int]] = {}
        for (name, pool, _), series in self._series.items():
            if name == model:
                counts = found.setdefault(pool, {"requests": 0, "failed": 0})
                counts["requests"] += series.codes.total()
                failed = sum(n for code, n in series.codes.items() if code >= 500)
                counts["failed"] += failed + series.cut
        return found

    def expose(self) -> bytes:
        """The answer to a scrape, of type `CONTENT_TYPE`."""
        return _text(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        yield from self._requests()
        yield from self._durations()
        yield from self._tokens()
        yield from self._states()
        yield from self._copies()

    def describe(self) -> Iterable[Metric]:
        """Nothing: keeps registering from collecting."""
        return ()

    def _name(self, model: str) -> str:
        return model if model in self._known else ""

    def _requests(self) -> Iterator[Metric]:
        labels = ["model", "pool", "instance"]
        series = self._series.items()
        codes = (((*names, str(code)), n) for names, s in series for code, n in s.codes.items())
        text = "Requests answered, by status; 0: the client left before there was one"
        yield _counter("requests", text, [*labels, "code"], codes)
        first = ((names, s.first_token) for names, s in series)
        text = "From a request's coming to the first byte of its answer"
        yield _histogram("first_token_seconds", text, labels, first)
        cut = ((names, s.cut) for names, s in series)
        yield _counter("streams_cut", "Streams broken by the engine midway", labels, cut)
        left = ((names, s.client_left) for names, s in series)
        yield _counter("client_left", "Requests whose client left before the end", labels, left)

    def _durations(self) -> Iterator[Metric]:
        labels = ["model", "pool"]
        whole = ((names, seconds) for names, (seconds, _) in self._pools.items())
        yield _histogram("request_seconds", "From a request's coming to its end", labels, whole)
        between = ((names, inter) for names, (_, inter) in self._pools.items())
        yield _histogram("inter_chunk_seconds", "Between chunks of a stream", labels, between)

    def _tokens(self) -> Iterator[Metric]:
        models = self._models.items()
        prompt = (((name, "prompt"), m.prompt_tokens) for name, m in models)
        completion = (((name, "completion"), m.completion_tokens) for name, m in models)
        labels = ["model", "kind"]
        text = "Tokens as the engines report them"
        yield _counter("tokens", text, labels, chain(prompt, completion))
        waiting = (((name,), m.queued) for name, m in models)
        yield _gauge("queued", "Requests that wait for an instance", ["model"], waiting)

    def _states(self) -> Iterator[Metric]:
        refused = (((reason,), n) for reason, n in self.refused.items())
        yield _counter("refused", "Requests that were not let in", ["reason"], refused)
        retries = (((reason,), n) for reason, n in self.retries.items())
        yield _counter("retries", "Times a request went to another instance", ["reason"], retries)
        instances = self._instances.items()
        outstanding = (((name,), i.outstanding) for name, i in instances)
        yield _gauge("outstanding", "Requests an instance has now", ["instance"], outstanding)
        up = (((name,), int(i.up)) for name, i in instances)
        yield _gauge("instance_up", "1: the instance is asked", ["instance"], up)
        ejections = (
            ((name, reason), n) for name, i in instances for reason, n in i.ejections.items()
        )
        yield _counter(
            "ejections", "Times an instance was taken out", ["instance", "reason"], ejections
        )
        dropped = [((), self._log_dropped())]
        yield _counter("log_dropped", "Lines of the request log that were lost", [], dropped)

    def _copies(self) -> Iterator[Metric]:
        shadows = self._shadows.items()
        outcomes = (
            ((*names, outcome), n) for names, s in shadows for outcome, n in s.outcomes.items()
        )
        labels = ["model", "pool"]
        yield _counter("shadow_requests", "Copies for comparison", [*labels, "outcome"], outcomes)
        seconds = ((names, s.seconds) for names, s in shadows)
        yield _histogram("shadow_seconds", "Time of an answered copy", labels, seconds)


def _kept(table: dict[_Key, _Made], key: _Key, make: Callable[[], _Made]) -> _Made:
    found = table.get(key)
    if found is None:
        found = table[key] = make()
    return found


_Labels = tuple[str, ...]


def _counter(
    name: str, text: str, labels: list[str], rows: Iterable[tuple[_Labels, int]]
) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _gauge(name: str, text: str, labels: list[str], rows: Iterable[tuple[_Labels, int]]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _histogram(
    name: str, text: str, labels: list[str], rows: Iterable[tuple[_Labels, Histogram]]
) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=labels)
    for values, histogram in rows:
        family.add_metric(values, histogram.buckets(), histogram.sum)
    return family
