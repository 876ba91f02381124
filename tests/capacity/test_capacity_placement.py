"""Placement: valid, near the exact optimum, stable, spread, on neighbouring GPUs, and quick."""

import random
import time
from collections import Counter

import pytest
from oracle import optimum

from inferfleet.capacity import CapacityError, Layout, Request, Site, Spot, cost, place

Case = tuple[list[Site], list[Request], tuple[Spot, ...]]


def assert_valid(layout: Layout, sites: list[Site], requests: list[Request]) -> None:
    """No GPU twice, only GPUs that exist, every instance placed once or reported."""
    there = {(site.name, gpu) for site in sites for island in site.islands for gpu in island}
    used = [(spot.site, gpu) for spot in layout.spots for gpu in spot.gpus]
    assert len(used) == len(set(used))
    assert set(used) <= there
    kinds = {site.name: site.kind for site in sites}
    for request in requests:
        mine = [spot for spot in layout.spots if spot.request == request.name]
        assert len(mine) + layout.unplaced.get(request.name, 0) == request.instances
        assert len({spot.index for spot in mine}) == len(mine)
        assert all(len(spot.gpus) == request.gpus for spot in mine)
        assert all(not request.kinds or kinds[spot.site] in request.kinds for spot in mine)
        assert all(not request.sites or spot.site in request.sites for spot in mine)
        most = max(Counter(spot.site for spot in mine).values(), default=0)
        assert not request.per_site or most <= request.per_site


def small_case(seed: int) -> Case:
    """Up to four hosts and three deployments; half of them with instances that already run."""
    rng = random.Random(seed)
    sites = []
    for number in range(rng.randint(1, 4)):
        count = rng.choice([1, 2, 4])
        paired = tuple(tuple(range(at, min(at + 2, count))) for at in range(0, count, 2))
        islands = paired if rng.random() < 0.7 else (tuple(range(count)),)
        sites.append(Site(f"host-{number}", islands, rng.choice("ab")))
    requests = [
        Request(
            f"model-{number}",
            rng.randint(1, 3),
            rng.choice([1, 1, 2, 2, 4]),
            kinds=rng.choice([(), (), ("a",)]),
            per_site=rng.choice([0, 0, 1]),
        )
        for number in range(rng.randint(1, 3))
    ]
    before: tuple[Spot, ...] = ()
    if seed % 2:
        before = place(sites, requests).spots
        if len(sites) > 1 and rng.random() < 0.5:
            sites.pop()
        if rng.random() < 0.6:
            requests.append(Request("new", 1, rng.choice([1, 2, 4])))
    return sites, requests, before


@pytest.mark.parametrize("block", range(6))
def test_within_five_percent_of_the_exact_optimum(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        sites, requests, before = small_case(seed)
        layout = place(sites, requests, before)
        assert_valid(layout, sites, requests)
        best = optimum(sites, requests, before)
        mine = cost(layout, sites, requests, before)
        assert best - 1e-6 <= mine <= best * 1.05 + 1e-6, seed


def fleet(count: int = 500) -> tuple[list[Site], list[Request]]:
    islands = ((0, 1, 2, 3), (4, 5, 6, 7))
    sites = [
        Site(f"gpu-{number:03}", islands, "H100" if number % 2 else "L40S")
        for number in range(count)
    ]
    rng = random.Random(7)
    requests = [Request(f"model-{n:02}", 20, rng.choice([1, 1, 2, 4, 8])) for n in range(50)]
    return sites, requests


def test_a_thousand_instances_on_five_hundred_hosts() -> None:
    sites, requests = fleet()
    began = time.perf_counter()
    layout = place(sites, requests)
    assert time.perf_counter() - began < 1.0
    assert len(layout.spots) == 1000
    assert_valid(layout, sites, requests)


def test_losing_one_host_moves_only_what_ran_there() -> None:
    sites, requests = fleet(440)
    before = place(sites, requests)
    lost = sites.pop(100).name
    sites.append(Site("gpu-new", ((0, 1, 2, 3),), "H100"))
    after = place(sites, requests, before.spots)
    moved = set(before.spots) - set(after.spots)
    assert {spot.site for spot in moved} <= {lost}
    assert not after.unplaced


def test_a_new_deployment_moves_nothing() -> None:
    sites, requests = fleet(440)
    before = place(sites, requests)
    after = place(sites, [*requests, Request("extra", 10, 2)], before.spots)
    assert set(before.spots) <= set(after.spots)


def test_order_of_the_inventory_does_not_matter() -> None:
    sites, requests = fleet(60)
    requests = requests[:12]
    assert place(sites[::-1], requests[::-1]) == place(sites, requests)


def test_placing_again_changes_nothing() -> None:
    sites, requests = fleet(60)
    once = place(sites, requests[:12])
    assert place(sites, requests[:12], once.spots) == once


def test_instances_of_a_deployment_are_spread() -> None:
    sites = [Site(f"host-{n}", ((0, 1, 2, 3),)) for n in range(4)]
    layout = place(sites, [Request("coder", 4, 1)])
    assert len({spot.site for spot in layout.spots}) == 4


def test_different_deployments_share_hosts() -> None:
    sites = [Site(f"host-{n}", ((0, 1, 2, 3),)) for n in range(8)]
    layout = place(sites, [Request(name, 2, 1) for name in ("a", "b", "c", "d")])
    assert len({spot.site for spot in layout.spots}) == 2


def test_tensor_parallel_groups_stay_on_neighbours() -> None:
    sites = [Site("one", ((0, 1, 2), (3, 4, 5)))]
    layout = place(sites, [Request("pairs", 2, 2), Request("single", 2, 1)])
    islands = [{0, 1, 2}, {3, 4, 5}]
    for spot in layout.spots:
        assert any(set(spot.gpus) <= island for island in islands)


def test_a_group_crosses_islands_rather_than_fail() -> None:
    layout = place([Site("one", ((0, 1), (2, 3)))], [Request("large", 1, 4)])
    assert layout.spots[0].gpus == (0, 1, 2, 3)


def test_small_instances_make_room_for_a_large_one() -> None:
    """Two hosts with half used: the running pair moves together, the four GPUs go to the new."""
    sites = [Site("one", ((0, 1, 2, 3),)), Site("two", ((0, 1, 2, 3),))]
    running = (Spot("small", 0, "one", (0, 1)), Spot("small", 1, "two", (0, 1)))
    layout = place(sites, [Request("small", 2, 2), Request("large", 1, 4)], running)
    assert not layout.unplaced
    assert len(set(running) & set(layout.spots)) == 1


def test_a_running_instance_is_not_given_up_for_a_new_one() -> None:
    sites = [Site("one", ((0, 1, 2, 3),))]
    running = (Spot("small", 0, "one", (2,)),)
    layout = place(sites, [Request("small", 1, 1), Request("large", 1, 4)], running)
    assert layout.spots == running
    assert layout.unplaced == {"large": 1}


@pytest.mark.parametrize(
    ("requests", "rule"),
    [
        ([Request("a", 1, 0)], "at least one GPU"),
        ([Request("a", -1, 1)], "at least one GPU"),
        ([Request("a", 1, 1), Request("a", 1, 1)], "names of their own"),
        ([Request("a", 1, 1, sites=frozenset({"mars"}))], "unknown site mars"),
    ],
)
def test_nonsense_names_the_rule(requests: list[Request], rule: str) -> None:
    with pytest.raises(CapacityError, match=rule):
        place([Site("one", ((0,),))], requests)
