"""A host with nothing on it becomes one with a real Docker, and an engine that runs in it.

Packages come from a repository that the test serves, the image from a registry mirror of its own.
The engine in the image is the simulator, and the GPU a device node that systemd denies by default;
all else is as on any host. The tests go on from each other, in order.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make
import pytest
import yaml
from aptkit import Served, Signer, publish, served
from fleetkit import TOOL, said, until
from imagekit import Registry, image
from labkit import require_lab, take_down_remains
from readers import missing
from test_reload_guard_lab import let_in

from inferfleet import lab as labs
from inferfleet.lab import rootfs

pytestmark = pytest.mark.lab
LABEL = "docker"
IMAGE, TAG = "vllm/vllm-openai", "v0.33.0"
UNIT = "inferfleet-coder-0"
KEY = "engine-key"
SIMULATOR = Path(__file__).parents[1] / "roles" / "simulator" / "simulator.py"
NODE = (10, 229)  # FUSE's: it can be opened, and no container may open it unless told so
CDI = f"""\
cdiVersion: "0.5.0"
kind: nvidia.com/gpu
devices:
  - name: "0"
    containerEdits:
      deviceNodes: [{{path: /dev/nvidia0, type: c, major: {NODE[0]}, minor: {NODE[1]}}}]
"""
# as the image's own program: it takes vLLM's command line, of which the simulator knows some
VLLM = """\
#!/usr/bin/python3
import runpy, sys
known = {"--host", "--port", "--served-model-name", "--max-model-len", "--shutdown-timeout"}
given = sys.argv[3:]
pairs = [(a, b) for a, b in zip(given, given[1:]) if a in known]
sys.argv[1:] = [word for pair in pairs for word in pair]
open("/dev/nvidia0").close()
runpy.run_path("/opt/simulator.py", run_name="__main__")
"""
# A host of the lab may not make keyrings, and sees the whole machine's settings, read-only: those
# of its own network are let in, as Docker sets some.
RUNTIME = {"runtimeType": "io.containerd.runc.v2"}
RUNTIME |= {"options": {"NoNewKeyring": True, "SystemdCgroup": True}}  # type: ignore[dict-item]
LAB = {"default-runtime": "lab", "runtimes": {"lab": RUNTIME}, "features": {"cdi": True}}
PREPARE = f"""
mkdir /run/settings && mount -t proc proc /run/settings
mount --bind /run/settings/sys/net /proc/sys/net && umount -l /run/settings
mkdir /srv/docker && mount -t tmpfs -o size=1G images /srv/docker
mknod -m 0666 /dev/nvidia0 c {NODE[0]} {NODE[1]}
rm -rf /etc/apt/sources.list*
"""


@dataclass(frozen=True)
class Docked:
    """The host, the inventory's folder, and where its packages and images come from."""

    lab: labs.Lab
    inventory: Path
    packages: Served
    images: Served

    @property
    def host(self) -> labs.LabHost:
        return self.lab.hosts["gpu-01"]

    def run(self, *words: str, code: int = 0) -> Any:
        argv = [TOOL, *words, "--json", "--inventory", self.inventory, "--phase", "p"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def provision(self) -> str:
        (status,) = {
            host["status"]
            for host in self.run("provision", "--yes", "--skip-doctor")["hosts"].values()
        }
        return str(status)

    def docker(self, command: str) -> str:
        return said(self.host, f"docker {command}")


def tool(name: str) -> Path:
    script = Path(__file__).parent / "tools" / name
    done = subprocess.run([script], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        missing(f"no Docker packages: {done.stderr.strip()[-300:]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def docked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docked]:
    require_lab()
    take_down_remains(LABEL)
    folder = tmp_path_factory.mktemp("docked")
    with ExitStack() as stack:
        keys = stack.enter_context(tempfile.TemporaryDirectory())  # GnuPG needs a short path
        signer = Signer.make(Path(keys, "gnupg"))
        stack.callback(signer.close)
        shutil.copytree(tool("docker_packages"), folder / "packages")
        publish(folder / "packages", signer)
        programs = {"usr/local/bin/vllm": VLLM, "opt/simulator.py": SIMULATOR.read_text()}
        image(folder, IMAGE, TAG, rootfs.tree(print), programs)
        lab = stack.enter_context(labs.Lab.boot(["gpu-01"], name=f"{LABEL}-{os.getpid()}"))
        packages = stack.enter_context(served(folder / "packages", lab.gateway))
        images = stack.enter_context(served(folder, lab.gateway, Registry))
        inventory = written(folder, lab, images.url)
        made = Docked(lab, inventory, packages, images)
        said(made.host, PREPARE)
        (made.host.root / "etc/apt/lab.asc").write_text(signer.key)
        source = f"deb [signed-by=/etc/apt/lab.asc] {packages.url} /\n"
        (made.host.root / "etc/apt/sources.list").write_text(source)
        (made.host.root / "etc/cdi").mkdir()
        (made.host.root / "etc/cdi/nvidia.yaml").write_text(CDI)
        yield made


def written(folder: Path, lab: labs.Lab, mirror: str) -> Path:
    host = lab.hosts["gpu-01"]
    reached = {"address": host.address, "user": "deploy", "become": "sudo"}
    reached |= {"key": str(lab.ssh_key), "host_keys": list(host.fingerprints)}  # type: ignore[dict-item]
    options = {"runtime": "docker", "gpu_access": "cdi", "shutdown_timeout": 5}
    options["version"] = TAG.removeprefix("v")
    deployment = {"engine": "vllm", "model": "coder", "hosts": ["all"], "port": 8000}
    deployment |= {"gpus_per_instance": 1, "if_too_large": "warn", "options": options}
    docker = {"hosts": ["all"], "data_root": "/srv/docker", "registry_mirrors": [mirror]}
    phase = {"users": 1, "why": "w", "hosts": ["all"], "deployments": ["coder"]}
    fleet = {
        "hosts": {"gpu-01": {**reached, "gpus": [{"model": "L40S"}]}},
        "models": {"coder": {"repository": "org/coder", "revision": "8e8ed243" * 5}},
        "deployments": {"coder": {**deployment, "api_key": "!file engine.key"}},
        "phases": {"p": {**phase, "roles": {"docker": {**docker, "daemon": LAB}}}},
    }
    text = yaml.safe_dump(fleet, sort_keys=False).replace("'!file engine.key'", "!file engine.key")
    inventory = make.write(folder, fleet=text)
    (inventory / "engine.key").write_text(KEY)
    (inventory / "engine.key").chmod(0o600)
    return inventory


def test_one_push_leads_from_nothing_to_an_engine_that_answers(docked: Docked) -> None:
    assert docked.provision() == "changed"
    assert docked.docker("version --format '{{.Server.Version}}'").startswith("26.1")
    assert docked.docker("compose version --short").startswith("2.")
    asked = f"curl -sf -H 'Authorization: Bearer {KEY}' http://127.0.0.1:8000/v1/models"
    assert json.loads(said(docked.host, asked))["data"][0]["id"] == "coder"
    assert docked.docker("ps --format '{{.Image}}'") == f"{IMAGE}:{TAG}"


def test_the_image_came_once_by_the_mirror_to_where_it_should_lie(docked: Docked) -> None:
    layers = [one for one in docked.images.asked if one.startswith(f"GET /v2/{IMAGE}/blobs/")]
    assert len(layers) == 2, "a configuration and a layer"
    assert docked.docker("info --format '{{.DockerRootDir}}'") == "/srv/docker"
    assert not (docked.host.root / "var/lib/docker").exists(), "nor was it anywhere else before"


def test_nothing_is_left_to_do_and_the_roles_proofs_hold(docked: Docked) -> None:
    assert docked.provision() == "unchanged"
    proofs = docked.run("verify", code=1)["proofs"]
    assert len(proofs) == 11
    failed = {proof["proves"]: proof["message"] for proof in proofs if not proof["passed"]}
    assert list(failed) == ["coder-0: a chat request brings real tokens"], "and no others"
    assert "the simulator of a rehearsal answered" in "".join(failed.values())


def test_a_push_leaves_a_real_container_the_gpu_that_a_hook_let_it_at(docked: Docked) -> None:
    trainer = f"run --detach --name trainer {IMAGE}:{TAG} sleep 600"
    for name, protected in (("plain", False), ("pushed", True)):
        docked.docker(trainer.replace("trainer", name))
        hooked(docked, name)
        if protected:
            path = docked.inventory / "fleet.yml"
            path.write_text(path.read_text().replace("shutdown_timeout: 5", "shutdown_timeout: 6"))
            assert docked.provision() == "changed"
        else:
            said(docked.host, "systemctl daemon-reload")
        assert sees(docked, name) is protected
        docked.docker(f"rm --force {name}")


def hooked(docked: Docked, name: str) -> None:
    """Let a container at the GPU as NVIDIA's hook does: behind Docker's and systemd's backs."""
    form = "inspect --format '{{.State.Pid}} {{.Id}}'"
    pid, identity = docked.docker(f"{form} {name}").split()
    said(docked.host, f"mknod -m 0666 /proc/{pid}/root/dev/nvidia0 c {NODE[0]} {NODE[1]}")
    assert not sees(docked, name), "Docker's list holds, or nothing here would be shown"
    scope = docked.host.cgroup / f"payload/system.slice/docker-{identity}.scope"
    assert let_in(scope) > 0
    assert sees(docked, name)


def sees(docked: Docked, name: str) -> bool:
    return docked.host.exec(f"docker exec {name} sh -c ': </dev/nvidia0'").returncode == 0


def test_the_engine_keeps_its_cdi_device_and_stops_in_good_order(docked: Docked) -> None:
    container = docked.docker("ps --quiet")
    said(docked.host, "systemctl daemon-reload")
    assert sees(docked, container)
    said(docked.host, f"systemctl stop {UNIT}")
    assert docked.docker("ps --all --quiet") == ""
    assert said(docked.host, f"systemctl show -p Result --value {UNIT}") == "success"
    said(docked.host, f"systemctl start {UNIT}")
    until(lambda: docked.docker("ps --quiet"), "it runs again")
