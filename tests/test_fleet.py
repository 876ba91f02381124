"""The hosts of a phase together: the order in which they are pushed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from inferfleet.fleet import Fleet
from inferfleet.project import Project

ROOT = Path(__file__).parents[1]


def test_balancers_come_after_the_engines_they_point_at() -> None:
    project = Project(ROOT / "inventory")
    plan = project.plan("production", rehearse=True)
    hosts: list[Any] = [SimpleNamespace(name=host.name) for host in reversed(plan.hosts)]
    waves = Fleet(project, plan, surveyed=hosts)._waves()
    assert [[host.name for host in wave] for wave in waves] == [
        ["gpu-03", "gpu-02", "gpu-01"],
        ["lb-02", "lb-01"],
    ]


def test_a_lone_server_is_one_wave() -> None:
    project = Project(ROOT / "inventory")
    plan = project.plan("pilot")
    hosts: list[Any] = [SimpleNamespace(name=host.name) for host in plan.hosts]
    assert len(Fleet(project, plan, surveyed=hosts)._waves()) == 1
