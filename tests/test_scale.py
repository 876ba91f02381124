"""A fleet of ten thousand hosts takes seconds, and ten times the hosts ten times as long.

Bounds are CPU seconds of this process, several times what it takes, so that a busy machine does
not fail them; `bench/fleet_scale.py` measures.
"""

from time import process_time

import make
import pytest

from inferfleet.inventory import load
from inferfleet.project import Project
from inferfleet.roles import Library


def cpu_seconds(folder, hosts):
    """To load, check, plan and render a fleet in many phases."""
    project = Project(make.fleet(folder, hosts))
    began = process_time()
    count = 0
    for name in project.inventory.phases:
        plan = project.plan(name)
        count += len(project.bundles(plan, plan.hosts))
    assert count == hosts
    return process_time() - began


def test_ten_thousand_hosts_take_seconds(tmp_path):
    cpu_seconds(tmp_path / "warm", 50)  # imports and the schema's own cost
    some, many = (cpu_seconds(tmp_path / str(hosts), hosts) for hosts in (1_000, 10_000))
    assert many < 25
    assert many / some < 15


@pytest.mark.parametrize("cells", [1, 20])
def test_a_phase_of_a_thousand_hosts_is_no_slower_than_many_of_fifty(tmp_path, cells):
    project = Project(make.fleet(tmp_path, 1_000, cells=cells))
    began = process_time()
    assert len(project.inventory.phases) == cells
    for name in project.inventory.phases:
        plan = project.plan(name)
        project.bundles(plan, plan.hosts)
    assert process_time() - began < 6


def test_a_thousand_mistakes_are_found_in_seconds(tmp_path):
    """A misspelled group in every host: each is told, with its place and what was meant."""
    inventory = make.fleet(tmp_path, 1_000)
    hosts = inventory / "hosts.yml"
    hosts.write_text(hosts.read_text().replace("groups: [cell-", "groups: [cel-"))
    began = process_time()
    told = make.problems(inventory)
    assert process_time() - began < 6
    assert len([line for line in told if "(did you mean cell-" in line]) == 980


def test_no_position_is_looked_up_where_nothing_is_wrong(tmp_path, monkeypatch):
    """Positions need each file composed once more, which costs what loading costs."""
    monkeypatch.setattr("inferfleet.yamlfile.Document.position", None)
    assert len(load(make.fleet(tmp_path, 100), Library()).hosts) == 100
