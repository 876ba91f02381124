"""Packing: hosts with what is free on them, and the moves that lower a placement's cost."""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from inferfleet.capacity.spots import (
    BROKEN,
    CROSSED,
    MOVED,
    OPENED,
    TOGETHER,
    Layout,
    Request,
    Site,
    Spot,
)


@lru_cache(maxsize=1 << 16)
def _order(request: str, site: str) -> int:
    return zlib.crc32(f"{request}\0{site}".encode())


class Host:
    """A site with what is free on each of its islands."""

    __slots__ = ("count", "free", "held", "islands", "site", "spots")

    def __init__(self, site: Site) -> None:
        self.site = site
        self.islands = [frozenset(island) for island in site.islands]
        self.free = [sorted(island) for island in site.islands]
        self.count = site.gpus
        self.held: Counter[str] = Counter()
        self.spots: set[Spot] = set()

    def take(self, spot: Spot) -> None:
        for index, free in enumerate(self.free):
            self.free[index] = [gpu for gpu in free if gpu not in spot.gpus]
        self.count -= len(spot.gpus)
        self.held[spot.request] += 1
        self.spots.add(spot)

    def release(self, spot: Spot) -> None:
        for index, island in enumerate(self.islands):
            self.free[index] = sorted({*self.free[index], *island.intersection(spot.gpus)})
        self.count += len(spot.gpus)
        self.held[spot.request] -= 1
        self.spots.remove(spot)

    def choose(self, wanted: int) -> list[tuple[int, int]]:
        """(island, GPUs of it) for an instance: the tightest island it fits, else the largest."""
        sizes = [(len(free), index) for index, free in enumerate(self.free) if free]
        enough = [each for each in sizes if each[0] >= wanted]
        if enough:
            return [(min(enough)[1], wanted)]
        chosen = []
        for size, index in sorted(sizes, reverse=True):
            chosen.append((index, min(size, wanted)))
            wanted -= chosen[-1][1]
            if not wanted:
                break
        return chosen

    def price(self, request: Request) -> float | None:
        """What one more instance here adds to the cost; None when there is no place."""
        if request.gpus > self.count:
            return None
        held = self.held[request.name]
        if request.per_site and held >= request.per_site:
            return None
        chosen = self.choose(request.gpus)
        price: float = TOGETHER * held + CROSSED * (len(chosen) - 1) + (0 if self.spots else OPENED)
        for index, size in chosen:
            free = len(self.free[index])
            whole = free == len(self.islands[index])
            price += BROKEN * ((size < free) - (not whole))
        return price

    def spot(self, request: Request, index: int) -> Spot:
        gpus = [gpu for at, size in self.choose(request.gpus) for gpu in self.free[at][:size]]
        return Spot(request.name, index, self.site.name, tuple(sorted(gpus)))


class Fleet:
    """The state of one placement."""

    def __init__(
        self, sites: Sequence[Site], requests: Sequence[Request], before: Iterable[Spot]
    ) -> None:
        self.hosts = {site.name: Host(site) for site in sites}
        self.requests = {request.name: request for request in requests}
        self.missing = {request.name: set(range(request.instances)) for request in requests}
        self.before = {(spot.request, spot.index): spot for spot in before}

    def allowed(self, request: Request) -> list[Host]:
        return [
            host
            for host in self.hosts.values()
            if (not request.kinds or host.site.kind in request.kinds)
            and (not request.sites or host.site.name in request.sites)
        ]

    def keep(self, spots: Iterable[Spot]) -> None:
        """Take over what runs already, where its GPUs are still there and it is still wanted."""
        for spot in sorted(spots):
            request = self.requests.get(spot.request)
            if request is None or spot.index not in self.missing[spot.request]:
                continue
            host = self.hosts.get(spot.site)
            if host is None or len(spot.gpus) != request.gpus or host not in self.allowed(request):
                continue
            if set(spot.gpus) <= {gpu for free in host.free for gpu in free}:
                self.put(host, spot)

    def put(self, host: Host, spot: Spot) -> None:
        host.take(spot)
        self.missing[spot.request].remove(spot.index)

    def force(self, spot: Spot, site: str) -> bool:
        """Move an instance to a site, pushing off others when there is no room."""
        request, host = self.requests[spot.request], self.hosts[site]
        if host not in self.allowed(request) or host.site.gpus < request.gpus:
            return False
        if spot.site:
            self.remove(self.hosts[spot.site], spot)
        for other in sorted(host.spots, key=lambda each: (len(each.gpus), each)):
            if host.price(request) is not None:
                break
            self.remove(host, other)
        if host.price(request) is None:
            return False
        self.put(host, host.spot(request, spot.index))
        return True

    def remove(self, host: Host, spot: Spot) -> None:
        host.release(spot)
        self.missing[spot.request].add(spot.index)

    def fill(self, request: Request, *, lost_only: bool = False) -> None:
        """Place what is missing of a request, or what ran before; of the heap one price changes."""
        missing = sorted(self.missing[request.name])
        if lost_only:
            missing = [index for index in missing if (request.name, index) in self.before]
        if not missing:
            return
        heap = [
            (price, _order(request.name, host.site.name), host.site.name)
            for host in self.allowed(request)
            if (price := host.price(request)) is not None
        ]
        heapq.heapify(heap)
        for index in missing:
            if not heap:
                return
            _, order, name = heap[0]
            host = self.hosts[name]
            self.put(host, host.spot(request, index))
            price = host.price(request)
            if price is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (price, order, name))

    def make_room(self, request: Request) -> None:
        """For instances without a place, move others, no larger, where that frees enough GPUs."""
        while self.missing[request.name]:
            if not any(self.clear(host, request) for host in self.roomiest(request)):
                return
            self.fill(request)

    def roomiest(self, request: Request) -> list[Host]:
        hosts = [host for host in self.allowed(request) if host.site.gpus >= request.gpus]
        return sorted(hosts, key=lambda host: (-host.count, host.site.name))[:32]

    def clear(self, host: Host, request: Request) -> bool:
        """Move other instances off a host until the request finds room; undone if it cannot."""
        moved: list[tuple[Host, Spot, Spot]] = []
        for spot in sorted(host.spots, key=lambda each: (-len(each.gpus), each)):
            if host.price(request) is not None:
                break
            if len(spot.gpus) > request.gpus or spot.request == request.name:
                continue
            other = self.cheapest(self.requests[spot.request], without=host)
            if other is not None:
                moved.append((other, spot, self.move(host, spot, other)))
        if host.price(request) is not None:
            return True
        for other, old, new in reversed(moved):
            self.remove(other, new)
            self.put(host, old)
        return False

    def cheapest(self, request: Request, without: Host) -> Host | None:
        priced = [
            (price, _order(request.name, host.site.name), host)
            for host in self.allowed(request)
            if host is not without and (price := host.price(request)) is not None
        ]
        return min(priced, key=lambda each: each[:2])[2] if priced else None

    def move(self, host: Host, spot: Spot, other: Host) -> Spot:
        self.remove(host, spot)
        new = other.spot(self.requests[spot.request], spot.index)
        self.put(other, new)
        return new

    def improve(self, most: int = 256) -> None:
        """Single moves that save, until none does; a large fleet is left as the heap placed it."""
        spots = [(host, spot) for host in self.hosts.values() for spot in sorted(host.spots)]
        if len(spots) * len(self.hosts) > most * 64:
            return
        for _ in range(8):
            saved = [self.better(name, index) for name, index in self.placed()]
            if not any(saved):
                return

    def placed(self) -> list[tuple[str, int]]:
        return sorted((s.request, s.index) for host in self.hosts.values() for s in host.spots)

    def better(self, name: str, index: int) -> bool:
        """Put one instance where it costs least, if that is less than where it is."""
        host, spot = next(
            (host, spot)
            for host in self.hosts.values()
            for spot in host.spots
            if (spot.request, spot.index) == (name, index)
        )
        request, ran = self.requests[name], self.before.get((name, index))
        self.remove(host, spot)
        here = self.worth(host, request, spot)
        stays = 0 if ran is None or ran != spot else MOVED * request.gpus
        best = self.cheapest(request, without=host)
        price = None if best is None else best.price(request)
        if best is None or price is None or price + stays >= here - 1e-9:
            self.put(host, spot)
            return False
        self.put(best, best.spot(request, index))
        return True

    def worth(self, host: Host, request: Request, spot: Spot) -> float:
        """What putting this very spot back would cost."""
        reached = [
            (len(free), len(island), len(island.intersection(spot.gpus)))
            for free, island in zip(host.free, host.islands, strict=True)
            if not island.isdisjoint(spot.gpus)
        ]
        price: float = TOGETHER * host.held[request.name] + CROSSED * (len(reached) - 1)
        price += 0 if host.spots else OPENED
        return price + sum(
            BROKEN * ((taken < free) - (free < whole)) for free, whole, taken in reached
        )

    def layout(self) -> Layout:
        spots = sorted(spot for host in self.hosts.values() for spot in host.spots)
        unplaced = {name: len(left) for name, left in sorted(self.missing.items()) if left}
        return Layout(tuple(spots), unplaced)
