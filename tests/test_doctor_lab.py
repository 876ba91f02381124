"""Discover and doctor on a real host, with a stand-in for the driver's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nvmlkit
import pytest
import yaml
from fleetkit import said, tree, until
from labkit import require_lab, take_down_remains

from inferfleet import lab as labs

pytestmark = pytest.mark.lab
LABEL = "doctor"
GIB = 1 << 30
FUSSY = """
from inferfleet.model import Artefact, Finding

def artefacts(step, plan, render):
    yield Artefact("/etc/inferfleet/fussy", b"content")

def preflight(step, plan, facts):
    what = f"driver {facts.driver} has an odd number"
    yield Finding(step.host.name, "fussy", "error", what, "it looks bad", "take another")
"""


@dataclass(frozen=True)
class Ward:
    """One host, an inventory for it, and the tool."""

    host: labs.LabHost
    inventory: Path

    def run(self, *words: str, code: int = 0) -> str:
        tool = Path(sys.executable).with_name("inferfleet")
        argv = [str(tool), *words, "--inventory", str(self.inventory)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def doctor(self, *words: str, code: int) -> dict[str, Any]:
        return json.loads(self.run("doctor", "--phase", "pilot", "--json", *words, code=code))

    def gpus(self, *processes: tuple[int, int]) -> None:
        """Two L4 whose driver is new enough; the first is held by processes: pid, bytes."""
        answers = json.loads((nvmlkit.FIXTURES / "l4.json").read_text())
        first = answers["gpus"][0]
        first["processes"] = processes
        first["memory"][1] -= sum(size for _, size in processes)
        (self.host.root / "etc/nvml.json").write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    require_lab()
    take_down_remains(LABEL)
    folder = tmp_path_factory.mktemp("doctor")
    with labs.Lab.boot(["gpu-01"], name=f"{LABEL}-{os.getpid()}") as lab:
        host = lab.hosts["gpu-01"]
        nvmlkit.build(host.root / "usr/lib" / str(sysconfig.get_config_var("MULTIARCH")))
        yield Ward(host, inventory(lab, host, folder / "inventory"))


def inventory(lab: labs.Lab, host: labs.LabHost, folder: Path) -> Path:
    folder.mkdir()
    entry = {
        "address": host.address,
        "user": "deploy",
        "become": "sudo",
        "key": str(lab.ssh_key),
        "host_keys": list(host.fingerprints),
    }
    rest = {
        "models": {"qwen": {"repository": "/srv/models/qwen", "served_name": "qwen"}},
        "deployments": {
            "coder": {
                "engine": "vllm",
                "model": "qwen",
                "hosts": ["gpu-01"],
                "port": 8000,
                "options": {"runtime": "native", "version": "0.32.0", "venv": "/opt/vllm"},
            }
        },
        "phases": {
            "pilot": {"users": 1, "why": "x", "hosts": ["gpu-01"], "deployments": ["coder"]},
            "picky": {
                "users": 1,
                "why": "x",
                "hosts": ["gpu-01"],
                "deployments": [],
                "roles": {"fussy": {"hosts": ["gpu-01"]}},
            },
        },
    }
    role = folder.parent / "roles/fussy"
    role.mkdir(parents=True)
    (role / "role.py").write_text(FUSSY)
    (role / "schema.yml").write_text("type: object\ndescription: x\nadditionalProperties: false\n")
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in entry.items())
    hosts = f"hosts:\n  gpu-01:   # the only one\n{lines}    gpus: [{{model: H200}}]   # ordered\n"
    (folder / "hosts.yml").write_text(hosts)
    (folder / "rest.yml").write_text(yaml.safe_dump(rest))
    return folder


@pytest.fixture
def ward(booted: Ward) -> Ward:
    booted.gpus()
    return booted


@pytest.fixture
def orphan(ward: Ward) -> Iterator[int]:
    """A process as a killed vLLM leaves it: its parent gone, its name its own; its pid."""
    script = "exec -a VLLM::EngineCore sleep 1000"
    said(ward.host, f"setsid --fork bash -c {json.dumps(script)} >/dev/null 2>&1 </dev/null")
    find = "pgrep -f ^VLLM::EngineCore || true"
    pid = int(until(lambda: said(ward.host, find), "the process is there"))
    until(lambda: said(ward.host, f"ps -o ppid= -p {pid}") == "1", "init has adopted it")
    yield pid
    said(ward.host, f"kill {pid}")


@pytest.fixture
def squatter(ward: Ward) -> Iterator[int]:
    """A web server of somebody's on the port that the engine wants; its pid."""
    said(ward.host, "systemd-run -q --unit squatter python3 -m http.server 8000")
    until(lambda: said(ward.host, "ss -ltnH 'sport = 8000'"), "the port is taken")
    yield int(said(ward.host, "systemctl show --value -p MainPID squatter"))
    said(ward.host, "systemctl stop squatter")


def kinds(document: dict[str, Any]) -> list[str]:
    return [failure["check"] for failure in document["failures"]]


def test_discover_shows_a_host_and_writes_its_entry(ward):
    shown = ward.run("discover", "--host", "gpu-01")
    assert "NVIDIA L4  22.5 GiB" in shown
    assert "22 sshd" in shown
    path = ward.inventory / "hosts.yml"
    before = path.read_text()
    assert kinds(ward.doctor(code=1)) == ["gpus"]  # an H200 was ordered, two L4 came
    ward.run("discover", "--host", "gpu-01", "--write")
    new = before.replace("[{model: H200}]", "[{model: L4, count: 2}]")
    written = path.read_text()
    assert written.startswith(new)
    assert [line.split(":")[0].strip() for line in written[len(new) :].splitlines()] == [
        "ram_gib",
        "disk_gib",
    ]
    assert ward.doctor(code=0) == {"ok": True, "failures": [], "warnings": []}


def test_an_orphan_and_a_taken_port_stop_provisioning_before_it_changes_anything(
    ward, orphan, squatter
):
    ward.run("discover", "--host", "gpu-01", "--write")
    ward.gpus((orphan, 18 * GIB))
    document = ward.doctor(code=1)
    assert kinds(document) == ["orphan", "memory", "port"]
    what = [failure["what"] for failure in document["failures"]]
    assert what[0].startswith(f"VLLM::EngineCore (pid {orphan}, root, ")
    assert what[0].endswith("is orphaned and holds memory of 18.0 GiB on GPU 0")
    assert what[2].startswith(f"port 8000 of coder-0 is taken by python3 (pid {squatter}, root, ")
    assert "systemctl disable --now squatter.service" in document["failures"][2]["remedy"]
    before = tree(ward.host)
    stopped = ward.run("provision", "--phase", "pilot", "--yes", code=1)
    assert stopped.count("gpu-01: error: ") == 3
    assert "(and 2 more errors); nothing was changed (--skip-doctor pushes all the same)" in stopped
    stopped = json.loads(ward.run("provision", "--phase", "pilot", "--yes", "--json", code=1))
    assert (stopped["ok"], kinds(stopped)) == (False, ["orphan", "memory", "port"])
    assert tree(ward.host) == before == {}


def test_a_rehearsal_minds_the_port_but_not_the_gpus(ward, orphan):
    ward.gpus((orphan, 18 * GIB))
    assert ward.doctor("--rehearse", code=0)["ok"]
    ward.run("provision", "--phase", "pilot", "--rehearse", "--yes")
    try:  # the port is our own unit's now
        assert ward.doctor("--rehearse", code=0)["ok"]
        again = ward.run("provision", "--phase", "pilot", "--rehearse", "--yes")
        assert "No changes" in again
    finally:
        said(ward.host, "systemctl disable -q --now inferfleet-coder-0.service")


def test_skip_doctor_pushes_what_a_role_itself_objects_to(ward):
    words = ["provision", "--phase", "picky", "--yes"]
    assert "gpu-01: error: driver 580.95.05 has an odd number" in ward.run(*words, code=1)
    assert "/etc/inferfleet/fussy" not in tree(ward.host)
    ward.run(*words, "--skip-doctor")
    assert "/etc/inferfleet/fussy" in tree(ward.host)
    assert "No changes" in ward.run(*words)  # nothing to change, nothing to ask


def test_a_host_that_is_off_is_a_finding(ward):
    path = ward.inventory / "hosts.yml"
    before = path.read_text()
    path.write_text(before.replace(ward.host.address, "127.0.0.1"))
    try:
        document = ward.doctor(code=1)
    finally:
        path.write_text(before)
    assert kinds(document) == ["connection"]
