"""Instances that are counted over a deployment's hosts: packed, spread, steady over changes."""

from __future__ import annotations

from pathlib import Path

import make
import pytest
import yaml

from inferfleet.model import Plan

Placed = set[tuple[str, str, tuple[int, ...]]]


def hosts(count: int, gpus: object = None) -> dict[str, object]:
    return {
        f"gpu-{number:02}": {
            "address": f"192.0.2.{number}",
            "groups": ["gpus"],
            "gpus": gpus or [{"model": "L40S", "count": 4}],
        }
        for number in range(1, count + 1)
    }


def deployment(**settings: object) -> dict[str, object]:
    return {"engine": "simulator", "model": "m", "hosts": ["gpus"], "port": 8000, **settings}


def fleet(machines: dict[str, object], **deployments: dict[str, object]) -> str:
    """An inventory whose one phase has these hosts and deployments."""
    phase = {"users": 1, "why": "w", "hosts": ["gpus"], "deployments": list(deployments)}
    whole = {
        "groups": {"gpus": {}},
        "hosts": machines,
        "models": {"m": {"repository": "example/m"}},
        "deployments": deployments,
        "phases": {"p": phase},
    }
    return yaml.safe_dump(whole, sort_keys=False)


@pytest.fixture
def plan(tmp_path: Path):
    def planned(machines: dict[str, object], **deployments: dict[str, object]) -> Plan:
        return make.project(tmp_path, fleet=fleet(machines, **deployments)).plan("p")

    return planned


def placed(plan: Plan) -> Placed:
    return {(i.deployment.name, i.host.name, i.gpus) for i in plan.instances()}


def test_instances_are_spread_and_never_share_a_gpu(plan) -> None:
    found = list(plan(hosts(3), coder=deployment(instances=6, gpus_per_instance=2)).instances())
    assert len(found) == 6
    assert {i.host.name: i.deployment.instances for i in found}.keys() == hosts(3).keys()
    taken = [(i.host.name, gpu) for i in found for gpu in i.gpus]
    assert len(taken) == len(set(taken)) == 12


def test_names_and_ports_count_up_on_each_host(plan) -> None:
    found = plan(hosts(2), coder=deployment(instances=4, gpus_per_instance=2))
    for host in ("gpu-01", "gpu-02"):
        (step,) = found.steps[host]
        assert [(i.name, i.port) for i in step.instances] == [("coder-0", 8000), ("coder-1", 8001)]
        assert [i.gpus for i in step.instances] == [(0, 1), (2, 3)]


def test_what_is_counted_per_host_keeps_its_gpus(plan) -> None:
    found = plan(
        hosts(2),
        chat=deployment(instances=3, port=9000, gpus_per_instance=2),
        coder=deployment(gpus=[0, 3], gpus_per_instance=2, hosts=["gpu-01"]),
    )
    assert ("coder", "gpu-01", (0, 3)) in placed(found)
    assert ("chat", "gpu-01", (1, 2)) in placed(found)
    assert len(placed(found)) == 4


def test_a_group_of_gpus_stays_on_its_island_and_model(plan) -> None:
    pairs = [{"model": "A100", "island": n % 2} for n in range(4)]  # neighbours: 0 2, 1 3
    assert {gpus for _, _, gpus in placed(plan(hosts(1, pairs), a=deployment(
        instances=2, gpus_per_instance=2)))} == {(0, 2), (1, 3)}  # fmt: skip
    mixed = [{"model": "T4"}, {"model": "L4", "count": 2}, {"model": "T4"}]
    assert {gpus for _, _, gpus in placed(plan(hosts(1, mixed), a=deployment(
        instances=2, gpus_per_instance=2)))} == {(0, 3), (1, 2)}  # fmt: skip


def test_an_engine_that_serves_all_gpus_runs_once_on_a_host(plan) -> None:
    found = plan(hosts(3), local=deployment(engine="ollama", instances=2))
    assert len({host for _, host, _ in placed(found)}) == 2


def test_the_same_inventory_gives_the_same_placement(plan) -> None:
    machines = hosts(7)
    first = placed(plan(machines, a=deployment(instances=9), b=deployment(
        instances=5, gpus_per_instance=2, port=9000)))  # fmt: skip
    backwards = dict(reversed(machines.items()))
    second = placed(plan(backwards, a=deployment(instances=9), b=deployment(
        instances=5, gpus_per_instance=2, port=9000)))  # fmt: skip
    assert first == second


def changed(before: Placed, after: Placed) -> int:
    """Instances that ran before and do not run in the same place any more."""
    return len(before - after)


BASE = {
    "a": deployment(instances=12),
    "b": deployment(instances=10, gpus_per_instance=2, port=9000),
}


def test_a_small_change_moves_little(plan) -> None:
    before = placed(plan(hosts(12), **BASE))
    more = {**BASE, "a": deployment(instances=13)}
    assert changed(before, placed(plan(hosts(12), **more))) <= 1
    new = {**BASE, "c": deployment(instances=2, gpus_per_instance=4, port=9500)}
    assert changed(before, placed(plan(hosts(12), **new))) <= 8
    assert changed(before, placed(plan(hosts(13), **BASE))) <= 4


def test_a_lost_host_moves_what_was_on_it(plan) -> None:
    before = placed(plan(hosts(12), **BASE))
    machines = hosts(12)
    del machines["gpu-05"]
    there = sum(host == "gpu-05" for _, host, _ in before)
    assert changed(before, placed(plan(machines, **BASE))) <= there + 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"instances": 9}, "9 instances of 1 GPU: 8 fit on the free GPUs of its hosts (phase p)"),
        ({"instances": 5, "gpus_per_instance": 3}, "5 instances of 3 GPUs: 2 fit"),
        ({"instances": 2, "gpus_per_instance": 0}, "packed on GPUs: for the CPU, say"),
        ({"instances": 2, "instances_per_host": 1}, "has no meaning beside `instances`"),
        ({"instances": 1, "gpus": [0]}, "has no meaning beside `instances`"),
        ({"instances": 0}, "must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_placed_is_said(tmp_path: Path, settings, said) -> None:
    problems = make.problems(make.write(tmp_path, fleet=fleet(hosts(2), m=deployment(**settings))))
    assert len(problems) == 1
    assert said in problems[0]
    assert "deployments.m.instances" in problems[0] or "gpus" in problems[0]
