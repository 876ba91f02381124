"""The project that a lab's hosts get: nothing in it is this machine, and it has its own place."""

from pathlib import Path

import pytest

from inferfleet.lab import fleet
from inferfleet.project import Project


def made(folder: Path, count: int) -> Project:
    hosts = [
        fleet.Made(name, f"192.0.2.{n}", 22, "deploy", "sudo", ("SHA256:" + "A" * 43,))
        for n, name in enumerate(fleet.names(count), 1)
    ]
    return Project(fleet.make(folder, hosts, folder.parent / "key"))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_phase_runs_on_the_labs_own_hosts(tmp_path: Path, count: int) -> None:
    project = made(tmp_path / "p", count)
    assert set(project.inventory.hosts) == set(fleet.names(count))
    assert {host.connection for host in project.inventory.hosts.values()} == {"ssh"}
    assert project.inventory.phases["local"].hosts == ("gpu-01",)
    for phase in project.inventory.phases:
        assert project.plan(phase, rehearse=True).hosts


def test_a_labs_place_is_no_phases_and_stays_out_of_git(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = fleet.place("pilot")
    assert place.parent.name == "labs"
    assert Path("build") not in place.parents, "a phase named pilot is rendered to build/pilot"
    assert (place.parent / ".gitignore").read_text() == "*\n"
    assert fleet.place("pilot") == place
