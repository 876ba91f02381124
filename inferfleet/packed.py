"""Deployments that say how many instances there are in all: packed on their hosts' GPUs. Pure.

The same inventory gives the same placement. Nothing is remembered: what keeps it steady when the
inventory changes a little is that `place` breaks ties by a hash of the names, and that an instance
is named by its host and its rank there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache

from inferfleet.capacity import Layout, Request, Site, place
from inferfleet.model import Host, Inventory, Phase


def layout(
    inventory: Inventory,
    phase: Phase,
    taken: Mapping[str, AbstractSet[int]],
    single: AbstractSet[str] = frozenset(),
) -> Layout:
    """Where the phase's packed instances run, on GPUs that are not `taken` (indexes, by host).

    Engines named in `single` run once on a host.
    """
    requests = tuple(_requests(inventory, phase, single))
    if not requests:
        return Layout(())
    reached = frozenset().union(*(request.sites for request in requests))
    hosts = [inventory.hosts[name] for name in phase.hosts if name in reached]
    sites = tuple(_site(host, taken.get(host.name, frozenset())) for host in hosts)
    return _placed(sites, requests)


def by_host(found: Layout) -> Mapping[tuple[str, str], list[tuple[int, ...]]]:
    """The GPUs of each instance by (host, deployment), in the order the host counts them."""
    gpus: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for spot in found.spots:
        gpus[spot.site, spot.request].append(spot.gpus)
    return {key: sorted(spots) for key, spots in gpus.items()}


@lru_cache(maxsize=16)
def _placed(sites: tuple[Site, ...], requests: tuple[Request, ...]) -> Layout:
    """Remembered, as one command asks for the same phase several times."""
    return place(sites, requests)


def _requests(inventory: Inventory, phase: Phase, single: AbstractSet[str]) -> Iterator[Request]:
    own = frozenset(phase.hosts)
    for name in phase.deployments:
        deployment = inventory.deployments.get(name)
        sites = own.intersection(deployment.hosts) if deployment else frozenset()
        if deployment and sites and deployment.instances and deployment.gpus_per_instance:
            count, size = deployment.instances, deployment.gpus_per_instance
            most = 1 if deployment.engine in single else 0
            yield Request(name, count, size, sites=sites, per_site=most)


def _site(host: Host, taken: AbstractSet[int]) -> Site:
    """Neighbours are GPUs of one model and one island; a MIG slice has none."""
    islands: dict[tuple[str, int, str], list[int]] = {}
    for gpu in host.gpus:
        if gpu.index not in taken:
            alone = gpu.name if gpu.mig else ""
            islands.setdefault((gpu.model, gpu.island, alone), []).append(gpu.index)
    return Site(host.name, tuple(map(tuple, islands.values())))
