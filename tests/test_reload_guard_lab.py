"""A real systemd takes a container's devices away at a daemon-reload, and a push does not let it.

The container is a scope with Docker's name and a list of devices without the GPU, and a real
process in it; like NVIDIA's hook, the test lets it at the device behind systemd's back.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleetkit import said, until
from labkit import require_lab, take_down_remains
from make import write

from inferfleet import lab as labs
from inferfleet import push
from inferfleet.errors import HostError
from inferfleet.model import Result
from inferfleet.project import Project

pytestmark = pytest.mark.lab

LABEL = "reloadguard"
ID = "c0ffee" + "0" * 58
SCOPE = f"docker-{ID}.scope"
DOCKER = f"""\
#!/bin/sh
procs=/sys/fs/cgroup/system.slice/{SCOPE}/cgroup.procs
case $1 in
  ps) [ ! -e $procs ] || echo {ID};;
  inspect) echo "{ID} /trainer $(head -n 1 $procs) 2026-01-01T00:00:00Z";;
  exec) sh -c "echo \\$\\$ >$procs && : </dev/nvidia0" || exit 255;;
  *) exit 1;;
esac
"""
INVENTORY = """\
hosts:
  alpha:
    {address: %s, user: deploy, become: sudo, key: %s, host_keys: ['%s']}
models: {}
deployments: {}
phases:
  p: {users: 1, why: w, hosts: [all], roles: {base: {hosts: [all], open_files: %d}}}
"""

DEVICES = 6  # BPF_CGROUP_DEVICE
SYSCALL = {"x86_64": 321, "aarch64": 280}


def bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """The bpf(2) system call: its result, and what it made of its attributes."""
    buffer = ctypes.create_string_buffer(attributes, 128)
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(SYSCALL[platform.machine()], command, buffer, 128)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result, buffer.raw


def let_in(cgroup: Path) -> int:
    """Take systemd's device programs off a cgroup; how many there were."""
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    ids = (ctypes.c_uint32 * 16)()
    query = struct.pack("IIIIQI", directory, DEVICES, 0, 0, ctypes.addressof(ids), 16)
    count: int = struct.unpack_from("I", bpf(16, query)[1], 24)[0]
    for program in ids[:count]:
        descriptor = bpf(13, struct.pack("III", program, 0, 0))[0]
        bpf(9, struct.pack("IIII", directory, descriptor, DEVICES, 0))
        os.close(descriptor)
    os.close(directory)
    return count


@pytest.fixture(scope="module")
def host() -> Iterator[tuple[labs.Lab, labs.LabHost]]:
    require_lab()
    take_down_remains(LABEL)
    with labs.Lab.boot(["alpha"], name=f"{LABEL}-{os.getpid()}") as lab:
        alpha = lab.hosts["alpha"]
        said(alpha, "mknod -m 0666 /dev/nvidia0 c 1 7")
        docker = alpha.root / "usr/local/bin/docker"
        docker.write_text(DOCKER)
        docker.chmod(0o755)
        yield lab, alpha


def started(alpha: labs.LabHost) -> None:
    """A fresh container that sees its GPU, of which systemd does not know."""
    alpha.exec(f"systemctl stop {SCOPE}; systemctl reset-failed")
    said(
        alpha,
        f"systemd-run -q --scope --unit={SCOPE} -p DevicePolicy=strict"
        " -p 'DeviceAllow=/dev/null rw' sleep 600 </dev/null >/dev/null 2>&1 &",
    )
    until(lambda: alpha.exec("docker ps").stdout.strip() == ID, "the container runs")
    assert not sees(alpha), "systemd's list holds, or nothing here would be shown"
    assert let_in(alpha.cgroup / "payload/system.slice" / SCOPE) > 0
    assert sees(alpha)


def sees(alpha: labs.LabHost) -> bool:
    return alpha.exec(f"docker exec {ID} nvidia-smi -L").returncode == 0


def provision(lab: labs.Lab, alpha: labs.LabHost, folder: Path, files: int) -> Result | HostError:
    text = INVENTORY % (alpha.address, lab.ssh_key, alpha.fingerprints[0], files)
    project = Project(write(folder, fleet=text))
    plan = project.plan("p")
    (bundle,) = project.bundles(plan, plan.hosts, project.secrets)
    surveyed = push.survey(bundle, project.options())
    try:
        return push.apply(surveyed, "provision p", lambda *_: None)
    finally:
        surveyed.close()


def test_a_daemon_reload_takes_the_gpu_away(host: tuple[labs.Lab, labs.LabHost]) -> None:
    _, alpha = host
    started(alpha)
    said(alpha, "systemctl daemon-reload")
    assert not sees(alpha)


def test_a_push_that_reloads_leaves_it(host: tuple[labs.Lab, labs.LabHost], tmp_path: Path) -> None:
    lab, alpha = host
    started(alpha)
    outcome = provision(lab, alpha, tmp_path, 4096)
    assert isinstance(outcome, Result), outcome
    assert sees(alpha)
    said(alpha, "systemctl daemon-reload")
    assert sees(alpha), "whoever reloads next does no harm either"


def test_the_base_role_holds_and_stays(host: tuple[labs.Lab, labs.LabHost], tmp_path: Path) -> None:
    lab, alpha = host
    provision(lab, alpha, tmp_path, 4096)
    again = provision(lab, alpha, tmp_path, 4096)
    assert isinstance(again, Result)
    assert again.status == "unchanged"
    unit = alpha.root / "etc/systemd/system/inferfleet-probe.service"
    unit.write_text("[Service]\nExecStart=/bin/sleep 60\n")
    said(alpha, "systemctl daemon-reload && systemctl start inferfleet-probe")
    assert said(alpha, "systemctl show -p LimitNOFILE --value inferfleet-probe") == "4096"
    assert said(alpha, "id -un inferfleet") == "inferfleet"
