"""Place instances on the GPUs of a fleet: packed, spread for availability, stable over changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from inferfleet.capacity.dimensions import CapacityError
from inferfleet.capacity.packing import Fleet
from inferfleet.capacity.spots import Layout, Request, Site, Spot, cost

__all__ = ["Layout", "Request", "Site", "Spot", "cost", "place"]


_SMALL = 400  # instances x sites up to which every single move is also tried with its consequences


def place(
    sites: Sequence[Site], requests: Sequence[Request], before: Iterable[Spot] = ()
) -> Layout:
    """Place every request's instances, keeping those of `before` that still have their GPUs.

    What ran before and larger instances first, each where it costs least (see `cost`), ties broken
    by a hash of the names, so that adding or removing a host moves nothing else; then, when
    something found no place, instances no larger make room; then single moves as long as they
    save, in a small fleet also those that pay only once others follow. Raises CapacityError for a
    request of no GPUs, names given twice, and sites that do not exist.
    """
    _check(sites, requests)
    sites, ran = sorted(sites, key=lambda each: each.name), tuple(before)
    order = sorted(requests, key=lambda each: (-each.gpus, len(each.sites) or 1 << 30, each.name))
    fleet = Fleet(sites, requests, ran)
    fleet.keep(ran)
    best = _settle(fleet, order)
    if len(sites) * sum(request.instances for request in requests) > _SMALL:
        return best
    while (better := _follow(best, sites, order, ran)) is not None:
        best = better
    return best


def _settle(fleet: Fleet, order: Sequence[Request]) -> Layout:
    """Fill up what a fleet holds and lower its cost."""
    for lost_only in (True, False):
        for request in order:
            fleet.fill(request, lost_only=lost_only)
    for request in order:
        fleet.make_room(request)
    fleet.improve()
    return fleet.layout()


def _follow(
    layout: Layout, sites: Sequence[Site], order: Sequence[Request], ran: Sequence[Spot]
) -> Layout | None:
    """The first placement that costs less after one instance was moved and all others answered."""
    lowest = cost(layout, sites, order, ran)
    alike = _alike(layout, sites, order)
    placed = {(each.request, alike[each.site]): each for each in layout.spots}
    for spot in (*placed.values(), *_homeless(layout, order, ran)):
        for site in {alike[each.name]: each.name for each in sites}.values():
            fleet = Fleet(sites, order, ran)
            fleet.keep(layout.spots)
            if site == spot.site or not fleet.force(spot, site):
                continue
            found = _settle(fleet, order)
            if cost(found, sites, order, ran) < lowest - 1e-9:
                return found
    return None


def _homeless(layout: Layout, order: Sequence[Request], ran: Sequence[Spot]) -> Iterator[Spot]:
    """The instances without a place, as spots on no site: of each request what ran before first."""
    before = {(spot.request, spot.index) for spot in ran}
    placed = {(spot.request, spot.index) for spot in layout.spots}
    for request in order:
        missing = [n for n in range(request.instances) if (request.name, n) not in placed]
        missing.sort(key=lambda n: (request.name, n) not in before)
        yield from (Spot(request.name, n, "", ()) for n in missing[:1])


def _alike(
    layout: Layout, sites: Sequence[Site], order: Sequence[Request]
) -> dict[str, tuple[object, ...]]:
    """What tells a site from others for the purpose of moving: shape, kind, guests, wishes."""
    guests: dict[str, list[tuple[str, tuple[int, ...]]]] = {site.name: [] for site in sites}
    for spot in layout.spots:
        guests[spot.site].append((spot.request, spot.gpus))
    return {
        site.name: (
            site.kind,
            tuple(map(len, site.islands)),
            tuple(sorted(guests[site.name])),
            tuple(site.name in request.sites for request in order),
        )
        for site in sites
    }


def _check(sites: Sequence[Site], requests: Sequence[Request]) -> None:
    names = {site.name for site in sites}
    if len(names) < len(sites) or len({each.name for each in requests}) < len(requests):
        raise CapacityError("sites and requests must have names of their own")
    for request in requests:
        if request.gpus < 1 or request.instances < 0:
            raise CapacityError(f"{request.name}: an instance takes at least one GPU")
        if missing := request.sites - names:
            raise CapacityError(f"{request.name}: unknown site {min(missing)}")
