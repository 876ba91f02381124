"""The exact placement of a small fleet, by branch and bound over GPU counts of islands."""

from collections import Counter
from collections.abc import Iterator, Sequence

from inferfleet.capacity.spots import (
    BROKEN,
    CROSSED,
    EVICTED,
    MOVED,
    OPENED,
    TOGETHER,
    UNPLACED,
    Request,
    Site,
    Spot,
)

Choice = tuple[int, tuple[int, ...]]  # a site's number, and how many GPUs of each of its islands


def _splits(free: Sequence[int], wanted: int) -> Iterator[tuple[int, ...]]:
    if not free:
        if wanted == 0:
            yield ()
        return
    for taken in range(min(free[0], wanted) + 1):
        for rest in _splits(free[1:], wanted - taken):
            yield (taken, *rest)


def _broken(sites: Sequence[Site], free: list[list[int]]) -> float:
    return BROKEN * sum(
        0 < left < len(island)
        for site, lefts in zip(sites, free, strict=True)
        for island, left in zip(site.islands, lefts, strict=True)
    )


def _choices(
    site: Site, left: list[int], request: Request, ran: Spot | None
) -> Iterator[tuple[tuple[int, ...], float]]:
    """(GPUs of each island, cost of moving there) on one site."""
    for split in _splits(left, request.gpus):
        moved = 0.0 if ran is None else MOVED * request.gpus
        if ran is not None and ran.site == site.name:
            old = tuple(len(set(island) & set(ran.gpus)) for island in site.islands)
            moved = 0.0 if old == split else moved
        yield split, moved


def optimum(
    sites: Sequence[Site], requests: Sequence[Request], before: Sequence[Spot] = ()
) -> float:
    """The least cost of any placement."""
    ran = {(spot.request, spot.index): spot for spot in before}
    order = [
        (request, index)
        for request in sorted(requests, key=lambda each: -each.gpus)
        for index in range(request.instances)
    ]
    best = float("inf")
    free = [[len(island) for island in site.islands] for site in sites]
    held: Counter[tuple[str, int]] = Counter()

    def search(at: int, total: float, last: Choice | None) -> None:
        nonlocal best
        if total >= best:
            return
        if at == len(order):
            best = min(best, total + _broken(sites, free))
            return
        request, index = order[at]
        alike = at > 0 and order[at - 1][0] is request and not before
        for number, site in enumerate(sites):
            if request.kinds and site.kind not in request.kinds:
                continue
            if request.sites and site.name not in request.sites:
                continue
            together = held[request.name, number]
            if request.per_site and together >= request.per_site:
                continue
            opened = all(
                left == len(island) for left, island in zip(free[number], site.islands, strict=True)
            )
            for split, moved in list(
                _choices(site, free[number], request, ran.get((request.name, index)))
            ):
                if alike and last is not None and (number, split) < last:
                    continue
                crossed = sum(map(bool, split)) - 1
                price = TOGETHER * together + CROSSED * crossed + OPENED * opened + moved
                free[number] = [a - b for a, b in zip(free[number], split, strict=True)]
                held[request.name, number] += 1
                search(at + 1, total + price, (number, split))
                held[request.name, number] -= 1
                free[number] = [a + b for a, b in zip(free[number], split, strict=True)]
        lost = UNPLACED + (EVICTED if (request.name, index) in ran else 0)
        search(at + 1, total + lost * request.gpus, (len(sites), ()))

    search(0, 0.0, None)
    return best
