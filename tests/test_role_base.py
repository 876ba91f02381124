"""The base role: its files by their readers, its guarded commands run, its preflight."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import make
import pytest
import readers

from inferfleet.errors import InventoryError
from inferfleet.facts import Disk, Facts
from inferfleet.model import Bundle, Ensure, Finding
from inferfleet.project import Project

FLEET = """\
hosts:
  one: {address: 192.0.2.11}
models: {}
deployments: {}
phases:
  p: {users: 1, why: w, hosts: [all], roles: {base: %s}}
"""
HEALTHY = Facts(
    "one", python="3.11.2", machine="x86_64", disks=(Disk("/", total=99 << 30, free=50 << 30),)
)


def project(folder: Path, settings: str = "") -> Project:
    wanted = f"{{hosts: [all]{settings and ', ' + settings}}}"
    return make.project(folder, fleet=FLEET % wanted)


def bundle(folder: Path, settings: str = "") -> Bundle:
    made = project(folder, settings)
    plan = made.plan("p")
    (found,) = made.bundles(plan, plan.hosts)
    return found


def text(found: Bundle, path: str) -> str:
    (artefact,) = [a for a in found.artefacts if a.path == path]
    return artefact.content.decode()


def ensure(found: Bundle, words: str) -> Ensure:
    (wanted,) = [e for e in found.ensures if words in e.title]
    return wanted


def sh(script: str, **more: str) -> int:
    return subprocess.run(["sh", "-c", script], env={**os.environ, **more}, check=False).returncode


def tool(folder: Path, name: str, script: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_limits_hold_for_all_our_services(tmp_path: Path) -> None:
    found = text(bundle(tmp_path), "/etc/systemd/system/inferfleet-.service.d/50-limits.conf")
    assert readers.unit(found)["Service"] == [
        ("LimitNOFILE", "524288"),
        ("LimitMEMLOCK", "infinity"),
    ]


def test_systemd_reads_the_limits(tmp_path: Path) -> None:
    unit = tmp_path / "inferfleet-a.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    dropin = tmp_path / "inferfleet-.service.d/50-limits.conf"
    dropin.parent.mkdir()
    path = "/etc/systemd/system/inferfleet-.service.d/50-limits.conf"
    dropin.write_text(text(bundle(tmp_path), path) + "LimitNOTHING=1\n")
    argv = [readers.program("systemd-analyze"), "verify", "--man=no", str(unit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    faults = [line for line in done.stderr.splitlines() if "50-limits.conf" in line]
    assert len(faults) == 1, "the file was read, and only what was added is wrong"
    assert "LimitNOTHING" in faults[0]


def test_kernel_settings_are_compared_as_the_kernel_shows_them(tmp_path: Path) -> None:
    found = bundle(tmp_path, "sysctl: {net.ipv4.tcp_rmem: 4096 87380 6291456, vm.swappiness: 10}")
    path = "/etc/sysctl.d/60-inferfleet.conf"
    assert text(found, path).splitlines()[1:] == [
        "net.ipv4.tcp_rmem = 4096 87380 6291456",
        "vm.swappiness = 10",
    ]
    test = ensure(found, "kernel settings").test.replace("/proc/sys/", f"{tmp_path}/")
    rmem, swappiness = tmp_path / "net/ipv4/tcp_rmem", tmp_path / "vm/swappiness"
    for file, value in ((rmem, "4096\t87380\t6291456\n"), (swappiness, "10\n")):
        file.parent.mkdir(parents=True)
        file.write_text(value)
    assert sh(test) == 0
    swappiness.write_text("60\n")
    assert sh(test) != 0
    swappiness.unlink()
    assert sh(test) == 0, "what cannot be written is the machine's affair"


def test_the_kernels_own_tool_reads_the_settings(tmp_path: Path) -> None:
    """With values that the kernel has already, since tests must not change it."""
    value = Path("/proc/sys/net/core/somaxconn").read_text().strip()
    found = bundle(tmp_path, f"sysctl: {{net.core.somaxconn: {value}}}")
    file = tmp_path / "sysctl.conf"
    file.write_text(text(found, "/etc/sysctl.d/60-inferfleet.conf"))
    run = ensure(found, "kernel settings").run.replace(
        "/etc/sysctl.d/60-inferfleet.conf", f"{file}"
    )
    assert sh(run.replace("sysctl ", "sysctl --dry-run ")) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_folders_are_made_and_made_right(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    wanted = ensure(
        bundle(tmp_path, f"directories: {{{folder}: {{owner: nobody, mode: '0750'}}}}"), f"{folder}"
    )
    assert sh(wanted.test) != 0
    assert sh(wanted.run) == 0
    assert sh(wanted.test) == 0
    assert (folder.owner(), folder.stat().st_mode & 0o7777) == ("nobody", 0o750)
    folder.chmod(0o777)
    assert sh(wanted.test) != 0


def test_packages_are_known_by_the_package_manager(tmp_path: Path) -> None:
    found = bundle(tmp_path, "packages: [jq, libc6]")
    path = tool(tmp_path / "bin", "dpkg-query", '[ "$4" = jq ] && echo "install ok installed"')
    assert sh(ensure(found, "package jq").test, PATH=path) == 0
    assert sh(ensure(found, "package libc6").test, PATH=path) != 0


@pytest.mark.parametrize(
    ("service", "active", "kept"),
    [
        ("any", "chronyd", True),
        ("any", "ntpsec", True),
        ("any", "cron", False),
        ("chrony", "chronyd", True),
        ("chrony", "systemd-timesyncd", False),
        ("systemd-timesyncd", "systemd-timesyncd", True),
        ("systemd-timesyncd", "chrony", False),
    ],
)
def test_a_time_service_runs(tmp_path: Path, service: str, active: str, kept: bool) -> None:
    folder = tmp_path / "bin"
    tool(folder, "systemd-detect-virt", "exit 1")
    path = tool(folder, "systemctl", f'shift 2; case " $* " in *" {active} "*) ;; *) exit 3;; esac')
    (wanted,) = [e for e in bundle(tmp_path, f"time_service: {service}").ensures if not e.before
                 and "kernel" not in e.title]  # fmt: skip
    assert (sh(wanted.test, PATH=path) == 0) is kept
    tool(folder, "systemd-detect-virt", "exit 0")
    assert sh(wanted.test, PATH=path) == 0, "a container has the clock of its machine"


@pytest.mark.parametrize(
    ("service", "path", "said"),
    [
        (
            "systemd-timesyncd",
            "/etc/systemd/timesyncd.conf.d/50-inferfleet.conf",
            "[Time]\nNTP=192.0.2.1 ntp.example.com\n",
        ),
        (
            "chrony",
            "/etc/chrony/sources.d/inferfleet.sources",
            "server 192.0.2.1 iburst\nserver ntp.example.com iburst\n",
        ),
    ],
)
def test_time_servers_of_ones_own(tmp_path: Path, service: str, path: str, said: str) -> None:
    servers = f"time_service: {service}, time_servers: [192.0.2.1, ntp.example.com]"
    found = text(bundle(tmp_path, servers), path)
    assert found.split("\n", 1)[1].strip() == said.strip()


def test_servers_without_a_service_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match="which service is to ask them"):
        _ = project(tmp_path, "time_servers: [192.0.2.1]").inventory


def preflight(folder: Path, **facts: object) -> list[Finding]:
    made = project(folder)
    plan = made.plan("p")
    (step,) = plan.steps["one"]
    found = {**{f: getattr(HEALTHY, f) for f in ("host", "python", "machine", "disks")}, **facts}
    return list(made.library.role("base").preflight(step, plan, Facts(**found)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "check"),
    [
        ({"python": "3.7.3"}, "python"),
        ({"machine": "ppc64le"}, "machine"),
        ({"disks": (Disk("/", total=9 << 30, free=1 << 30),)}, "disk"),
    ],
)
def test_what_a_host_has_to_be(tmp_path: Path, facts: dict[str, object], check: str) -> None:
    assert preflight(tmp_path) == []
    assert [finding.check for finding in preflight(tmp_path, **facts)] == [check]
