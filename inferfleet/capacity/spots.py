"""The nouns of placement, and what a placement costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

UNPLACED, EVICTED, MOVED, CROSSED, TOGETHER, OPENED, BROKEN = 1000, 100_000, 20, 10, 3, 1, 0.1


@dataclass(frozen=True, slots=True)
class Site:
    """A host that can take instances. `islands` are its free GPUs' indexes by NVLink or NUMA
    neighbourhood, one island when that is not known; `kind` is what requests ask for."""

    name: str
    islands: tuple[tuple[int, ...], ...]
    kind: str = ""

    @property
    def gpus(self) -> int:
        return sum(map(len, self.islands))


@dataclass(frozen=True, slots=True)
class Request:
    """A deployment's wish: so many instances of `gpus` GPUs each, on GPUs of these kinds (empty:
    any) and these sites (empty: any), at most `per_site` on one (0: no limit)."""

    name: str
    instances: int
    gpus: int = 1
    kinds: tuple[str, ...] = ()
    sites: frozenset[str] = frozenset()
    per_site: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Spot:
    """One placed instance: a deployment's n-th, on a site's GPUs."""

    request: str
    index: int
    site: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement: the spots in order, and how many instances of a request found no place."""

    spots: tuple[Spot, ...]
    unplaced: Mapping[str, int] = field(default_factory=dict)


def cost(
    layout: Layout, sites: Sequence[Site], requests: Sequence[Request], before: Iterable[Spot] = ()
) -> float:
    """What a placement costs; `place` keeps it low and the tests' exact solver minimises it.

    1000 for each GPU of an unplaced instance, a hundred times that more if it ran before, 20 for
    each of a running one that moves, 10 for each further island an instance's GPUs lie on, 3 for
    each two instances of a deployment on one host, 1 for each host in use, 0.1 for each island in
    use but not full.
    """
    size = {request.name: request.gpus for request in requests}
    wanted = {request.name: request.instances for request in requests}
    total = UNPLACED * sum(size[name] * count for name, count in layout.unplaced.items())
    islands = {site.name: site.islands for site in sites}
    kept = {(spot.request, spot.index): spot for spot in layout.spots}
    for spot in before:
        if spot.index >= wanted.get(spot.request, 0):
            continue
        now = kept.get((spot.request, spot.index))
        if now != spot:
            total += (MOVED if now else EVICTED) * size[spot.request]
    pairs = Counter((spot.request, spot.site) for spot in layout.spots)
    total += TOGETHER * sum(count * (count - 1) // 2 for count in pairs.values())
    used: dict[str, set[int]] = defaultdict(set)
    for spot in layout.spots:
        used[spot.site].update(spot.gpus)
        reached = sum(1 for island in islands[spot.site] if not set(island).isdisjoint(spot.gpus))
        total += CROSSED * (reached - 1)
    broken = sum(
        0 < len(taken.intersection(island)) < len(island)
        for name, taken in used.items()
        for island in islands[name]
    )
    return total + OPENED * len(used) + BROKEN * broken
