"""Every model is whole, engines will find it so at boot, and readers cannot write."""

import pytest
from testinfra.host import Host

from inferfleet.model import Plan, Step
from inferfleet.modelpath import (
    FETCH_UNIT,
    PROGRAM,
    STAGE_UNIT,
    cached,
    escaped,
    fetches,
    mounts,
)


@pytest.fixture
def folders(step: Step, plan: Plan) -> list[str]:
    """Where this host's engines read."""
    own = [i for i in plan.instances() if i.host.name == step.host.name]
    return sorted({found.folder for i in own if (found := cached(i, plan))})


def test_every_model_of_the_host_is_complete(host: Host, folders: list[str]) -> None:
    """every model its engines read is complete, by its manifest"""
    for folder in folders:
        done = host.run("python3 -I %s check %s", PROGRAM, folder)
        assert done.rc == 0, done.stderr


def test_it_will_be_there_after_a_reboot(host: Host, step: Step) -> None:
    """fetching, staging and mounting are enabled"""
    units = [FETCH_UNIT] if fetches(step) else []
    if mounts(step):
        units.append(f"{escaped(step.settings['path'])}.automount")
    if host.file(f"/etc/systemd/system/{STAGE_UNIT}").exists:
        units.append(STAGE_UNIT)
    for unit in units:
        assert host.run("systemctl is-enabled %s", unit).stdout.strip() == "enabled", unit
        assert host.run("systemctl is-failed %s", unit).stdout.strip() != "failed", unit


def test_readers_cannot_write(host: Host, step: Step) -> None:
    """where the models are mounted, nobody but the writer can write"""
    if fetches(step):
        return
    path = step.settings["path"]
    shown = host.check_output("ls %s >/dev/null && findmnt -n -o OPTIONS %s", path, path)
    options = shown.splitlines()[-1]  # the first line is the automount's
    assert "ro" in options.split(","), options


def test_only_the_writers_host_exports_and_only_to_the_phase(host: Host, step: Step) -> None:
    """the export is read-only"""
    exports = host.file("/etc/exports.d/inferfleet-models.exports")
    if not exports.exists:
        return
    shown = host.check_output(
        "PATH=$PATH:/usr/sbin exportfs -s | grep -F %s", step.settings["path"]
    )
    assert shown, "nothing is exported"
    for line in shown.splitlines():
        assert ",ro," in line.replace("(", ",").replace(")", ","), line
