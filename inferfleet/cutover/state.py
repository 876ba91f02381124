"""What all gateways together say of each model. Pure.

Weights are compared as shares: 9 and 1 are 90 and 10. Comparisons of a shadow are merged from the
samples of all workers, so that its quantiles are those of all requests, not means of quantiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median
from typing import Any

from inferfleet.cutover.asking import Site, Weights
from inferfleet.load.statistics import percentile

Workers = Sequence[Mapping[str, Any]]  # what each worker of a gateway says; see onhost
_SAME = ("same_text", "same_end", "same_tools")
_MEDIANS = ("likeness", "length")
_TIMES = ("first_token", "seconds")


@dataclass(frozen=True, slots=True)
class At:
    """A model at one gateway. Weights are as its configuration says, and as each worker has."""

    host: str
    configured: Weights
    in_force: tuple[Weights, ...]
    requests: Mapping[str, Mapping[str, int]]  # pool -> "requests", "failed", since the start

    @property
    def overridden(self) -> bool:
        """Whether weights were set by hand."""
        return any(shares(weights) != shares(self.configured) for weights in self.in_force)


@dataclass(frozen=True)
class Model:
    """A model at all gateways that were asked and know it."""

    name: str
    inventory: Weights
    at: tuple[At, ...]
    lacking: tuple[str, ...] = ()  # gateways that do not know it yet
    shadows: tuple[Mapping[str, Any], ...] = field(default=())  # one for each pool

    @cached_property
    def usual(self) -> dict[str, float]:
        """The shares at most gateways."""
        seen = Counter(tuple(shares(w).items()) for at in self.at for w in at.in_force)
        return dict(seen.most_common(1)[0][0]) if seen else {}

    @property
    def differing(self) -> list[str]:
        """Gateways that do otherwise than most."""
        return [at.host for at in self.at if any(shares(w) != self.usual for w in at.in_force)]

    @property
    def overridden(self) -> list[str]:
        """Gateways whose weights were set by hand."""
        return [at.host for at in self.at if at.overridden]

    @property
    def behind(self) -> list[str]:
        """Gateways whose configuration is not the inventory's."""
        wanted = shares(self.inventory)
        return [at.host for at in self.at if shares(at.configured) != wanted] + list(self.lacking)


def shares(weights: Weights) -> dict[str, float]:
    """Pool -> its part of all requests, from 0 to 1; pools that get nothing are left out."""
    whole = sum(weights.values())
    return {pool: round(weights[pool] / whole, 6) for pool in sorted(weights) if weights[pool]}


def models(found: Sequence[tuple[Site, Workers]]) -> list[Model]:
    """Every model of the inventory, as these gateways have it."""
    names = dict.fromkeys(name for site, _ in found for name in site.models)
    return [_model(name, found) for name in names]


def _model(name: str, found: Sequence[tuple[Site, Workers]]) -> Model:
    knowing = [(site, workers) for site, workers in found if _knows(workers, name)]
    inventory = next(site.models[name]["pools"] for site, _ in found if name in site.models)
    reports = [w["shadow"][name] for _, ws in knowing for w in ws if name in w["shadow"]]
    return Model(
        name,
        inventory,
        tuple(_at(name, site.host.name, workers) for site, workers in knowing),
        tuple(site.host.name for site, workers in found if not _knows(workers, name)),
        tuple(merged(reports)),
    )


def _knows(workers: Workers, name: str) -> bool:
    return all(name in worker["models"] for worker in workers)


def _at(name: str, host: str, workers: Workers) -> At:
    told = [worker["models"][name] for worker in workers]
    requests: dict[str, Counter[str]] = {}
    for each in told:
        for pool, counts in each["requests"].items():
            requests.setdefault(pool, Counter()).update(counts)
    counts = {pool: dict(own) for pool, own in requests.items()}
    return At(host, told[0]["configured"], tuple(each["weights"] for each in told), counts)


def unready(workers: Workers, weights: Weights) -> list[str]:
    """Pools that are to get requests, though some worker can ask none of their instances."""
    return [
        pool
        for pool, weight in weights.items()
        if weight and not all(any(i["usable"] for i in w["pools"][pool]) for w in workers)
    ]


def merged(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reports of many workers as one for each shadowed pool."""
    by_pool: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        by_pool.setdefault(report["pool"], []).append(report)
    return [_merged(pool, own) for pool, own in by_pool.items()]


def _merged(pool: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    samples = [sample for report in reports for sample in report["samples"]]
    found: dict[str, Any] = {"pool": pool, "percent": sorted({r["percent"] for r in reports})}
    found |= {key: sum(r[key] for r in reports) for key in ("asked", "failed", "dropped")}
    found |= {"failures": sorted({r["failure"] for r in reports if r["failure"]})}
    found |= {"compared": len(samples)}
    return found | (_measured(samples) if samples else {})


def _measured(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares from 0 to 1, medians, and seconds of clients and copies at p50 and p95."""
    found: dict[str, Any] = {key: fmean(sample[key] for sample in samples) for key in _SAME}
    found |= {f"{key}_median": median(sample[key] for sample in samples) for key in _MEDIANS}
    for key in _TIMES:
        sides = zip(*(sample[key] for sample in samples), strict=True)
        found[key] = dict(zip(("clients", "copies"), map(_quantiles, sides), strict=True))
    return found


def _quantiles(seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{percent}": percentile(ordered, percent) for percent in (50, 95)}
