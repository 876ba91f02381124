"""Docker runs as it is configured, and starts engines as compose files say."""

import json

import pytest
from testinfra.host import Host

from inferfleet.model import Step
from inferfleet.verify.proofs import steady


@pytest.fixture
def info(host: Host) -> dict[str, object]:
    """What Docker says of itself."""
    found: dict[str, object] = json.loads(host.check_output("docker info --format '{{json .}}'"))
    return found


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """Docker runs and starts at boot"""
    steady(host, "docker.service")


def test_compose_is_there(host: Host, step: Step) -> None:
    """Docker Compose 2 or newer reads our files"""
    shown = host.check_output("docker compose version --short").strip().lstrip("v")
    assert int(shown.split(".")[0]) >= 2, shown


def test_containers_outlive_a_restart_of_docker(info: dict[str, object], step: Step) -> None:
    """live-restore is as configured"""
    assert info["LiveRestoreEnabled"] == step.settings["live_restore"]


def test_the_cgroup_driver_is_the_one_that_was_chosen(info: dict[str, object], step: Step) -> None:
    """the cgroup driver is the one that was chosen"""
    wanted = step.settings.get("cgroup_driver", info["CgroupDriver"])
    assert info["CgroupDriver"] == wanted


def test_images_come_from_the_mirrors(info: dict[str, object], step: Step) -> None:
    """its registry mirrors are those of the inventory"""
    registry = info["RegistryConfig"]
    assert isinstance(registry, dict)
    found = {mirror.rstrip("/") for mirror in registry.get("Mirrors") or ()}
    assert found == {mirror.rstrip("/") for mirror in step.settings["registry_mirrors"]}
