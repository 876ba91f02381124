"""The GPU role: which driver it asks for, slices and their names, and gpus.py on stand-in tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import make
import pytest

from inferfleet.errors import InventoryError
from inferfleet.model import Bundle, Ensure
from inferfleet.project import Project

PROGRAM = Path(__file__).parents[1] / "roles" / "nvidia" / "gpus.py"
FLEET = """\
hosts:
  gpu-01: {address: 192.0.2.11, gpus: %s}
models:
  coder: {repository: org/coder, revision: 8e8ed243bbe6f9a5aff549a0924562fc719b2b8a}
  chat: {repository: "chat:7b"}
deployments:
  coder:
    engine: vllm
    model: coder
    hosts: [gpu-01]
    port: 8000
    gpus_per_instance: 1
    if_too_large: warn
    options: {runtime: %s, version: %s}
  chat:
    engine: ollama
    model: chat
    hosts: [gpu-01]
    port: 9000
    gpus_per_instance: 1
    options: {runtime: %s}
phases:
  p: {users: 1, why: w, hosts: [all], deployments: [coder, chat], roles: {nvidia: %s}}
"""
TWO = "[{model: L40S, count: 2}]"
CUT = "[{model: H200, mig: [4g.71gb, 3g.71gb]}, {model: H200}]"
NEEDED = "580.65.06"


def project(
    folder: Path,
    settings: str = "",
    gpus: str = TWO,
    runtime: str = "docker",
    version: str = "0.33.0",
) -> Project:
    wanted = f"{{hosts: [all]{settings and ', ' + settings}}}"
    return make.project(folder, fleet=FLEET % (gpus, runtime, version, runtime, wanted))


def bundle(folder: Path, settings: str = "", **more: str) -> Bundle:
    made = project(folder, settings, **more)
    plan = made.plan("p")
    (found,) = made.bundles(plan, plan.hosts)
    return found


def ensure(found: Bundle, words: str) -> Ensure:
    (wanted,) = [e for e in found.ensures if words in e.title]
    return wanted


def text(found: Bundle, path: str) -> str:
    (artefact,) = [a for a in found.artefacts if a.path == path]
    return artefact.content.decode()


# the driver


def shell(script: str, tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("version", "settings", "least"),
    [
        ("0.33.0", "", "580.65.06"),
        ("0.11.0", "", "550"),  # Ollama's need counts, too
        ("0.33.0", "driver: {minimum: '590.48'}", "590.48"),
        ("0.33.0", "driver: {minimum: '570'}", "580.65.06"),
    ],
)
def test_the_driver_is_new_enough_for_every_engine(
    tmp_path: Path, version: str, settings: str, least: str
) -> None:
    found = bundle(tmp_path, settings, version=version)
    assert ensure(found, "NVIDIA driver").title == f"NVIDIA driver {least} or newer works"


@pytest.mark.parametrize(
    ("have", "enough"),
    [
        ("580.65.06", True),
        ("580.95.05", True),
        ("590.44.01", True),
        ("580.65.05", False),
        ("570.211.01", False),
        ("", False),
        ("NVIDIA-SMI has failed because it could not talk to the driver.", False),
        ("Failed to initialize NVML: Driver/library version mismatch", False),
    ],
)
def test_versions_are_compared_as_numbers(tmp_path: Path, have: str, enough: bool) -> None:
    tool(tmp_path / "bin", "nvidia-smi", f"echo {have}" if have else "exit 9")
    wanted = ensure(bundle(tmp_path), "NVIDIA driver")
    assert (shell(wanted.test, tmp_path / "bin").returncode == 0) is enough


def test_a_driver_too_old_says_for_what_and_what_to_do(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "nvidia-smi", "echo 570.211.01")
    done = shell(ensure(bundle(tmp_path), "NVIDIA driver").run, tmp_path / "bin")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "the driver is 570.211.01; vLLM 0.33.0 is built with CUDA 13.0\n"
        f"install driver {NEEDED} or newer"
    )


def test_no_driver_says_so(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "nvidia-smi", "exit 9")
    done = shell(ensure(bundle(tmp_path), "NVIDIA driver").run, tmp_path / "bin")
    assert "the driver is not here, or does not work" in done.stderr


def test_packages_are_installed_and_a_reboot_is_asked_for(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    for name in ("apt-get", "apt-mark"):
        tool(tools, name, f'echo "{name} $*" >>{tools}/asked')
    tool(tools, "dpkg-query", "echo 'hi libnvidia-compute-570-server'")
    tool(tools, "modprobe", "exit 1")
    tool(tools, "nvidia-smi", "exit 9")
    found = bundle(tmp_path, "driver: {packages: [nvidia-headless-580-server-open]}")
    done = shell(ensure(found, "NVIDIA driver").run, tools)
    assert done.returncode == 1
    assert "reboot, then provision again" in done.stderr
    asked = (tools / "asked").read_text().splitlines()
    assert asked[0] == "apt-mark unhold libnvidia-compute-570-server"
    assert asked[1].endswith("--no-install-recommends nvidia-headless-580-server-open")
    assert asked[2:] == ["apt-mark hold libnvidia-compute-570-server"]


INSTALLED = """\
ii nvidia-driver-580-server
hi libnvidia-compute-580-server
rc nvidia-driver-550
ii libnvidia-container1
ii nvidia-container-toolkit
ii nginx"""


def test_the_drivers_packages_alone_are_held(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tool(tools, "dpkg-query", f"cat <<'END'\n{INSTALLED}\nEND")
    tool(
        tools,
        "apt-mark",
        f'case $1 in hold) shift; printf "%s\\n" "$@" >>{tools}/held;; '
        f"showhold) cat {tools}/held;; esac",
    )
    (tools / "held").write_text("libnvidia-compute-580-server\n")
    wanted = ensure(bundle(tmp_path), "held back")
    assert shell(wanted.test, tools).returncode != 0
    assert shell(wanted.run, tools).returncode == 0
    assert set((tools / "held").read_text().split()) == {
        "nvidia-driver-580-server",
        "libnvidia-compute-580-server",
    }
    assert shell(wanted.test, tools).returncode == 0


def test_the_fabric_manager_counts_only_where_there_are_switches(tmp_path: Path) -> None:
    wanted, tools, switches = ensure(bundle(tmp_path), "fabric"), tmp_path / "bin", tmp_path / "s"
    test = wanted.test.replace("/proc/driver/nvidia-nvswitch/devices", str(switches))
    tool(tools, "nvidia-smi", "echo 580.95.05")
    tool(tools, "systemctl", "exit 0")
    tool(tools, "nv-fabricmanager", "echo 'Fabric Manager version is : 580.65.06'")
    assert shell(test, tools).returncode == 0, "no switches"
    (switches / "0000:07:00.0").mkdir(parents=True)
    assert shell(test, tools).returncode != 0, "another version than the driver's"
    tool(tools, "nv-fabricmanager", "echo 'Fabric Manager version is : 580.95.05'")
    assert shell(test, tools).returncode == 0
    tool(tools, "systemctl", "exit 3")
    assert shell(test, tools).returncode != 0, "it does not run"


# slices


def test_slices_are_gpus_of_their_own(tmp_path: Path) -> None:
    made = project(tmp_path, gpus=CUT)
    gpus = made.inventory.hosts["gpu-01"].gpus
    assert [(gpu.index, gpu.model, gpu.name) for gpu in gpus] == [
        (0, "H200 MIG 4g.71gb", "0:0"),
        (1, "H200 MIG 3g.71gb", "0:1"),
        (2, "H200", "1"),
    ]
    plan = made.plan("p")
    assert {i.name: i.devices for i in plan.instances()} == {
        "coder-0": ("0:0",),
        "chat-0": ("0:1",),
    }


def test_gpus_json_says_what_to_cut_and_what_containers_ask_for(tmp_path: Path) -> None:
    said = json.loads(text(bundle(tmp_path, gpus=CUT), "/etc/inferfleet/nvidia/gpus.json"))
    assert said == {
        "devices": ["0:0", "0:1", "1"],
        "mig": {"0": ["4g.71gb", "3g.71gb"]},
        "persistence": True,
    }


@pytest.mark.parametrize(
    ("gpus", "runtime", "said"),
    [
        ("[{model: H200 MIG 3g.71gb, count: 2}]", "docker", "say which GPU the slice is of"),
        (CUT, "native", "MIG slices are for containers only"),
    ],
)
def test_slices_that_cannot_be_named_are_refused(
    tmp_path: Path, gpus: str, runtime: str, said: str
) -> None:
    with pytest.raises(InventoryError, match=said):
        _ = project(tmp_path, gpus=gpus, runtime=runtime).inventory


# gpus.py

SMI = """\
cd {state}
echo "$*" >>asked
case "$*" in
  -L) cat gpus;;
  *-cgi*) cat cut >gpus;;
esac"""
CTK = """\
cd {state}
echo "ctk $*" >>asked
case "$*" in 'cdi list') cat names;; esac"""
WHOLE = "GPU 0: NVIDIA H200 (UUID: GPU-0)\nGPU 1: NVIDIA H200 (UUID: GPU-1)\n"
SLICED = """\
GPU 0: NVIDIA H200 (UUID: GPU-0)
  MIG 4g.71gb     Device  0: (UUID: MIG-0)
  MIG 3g.71gb     Device  1: (UUID: MIG-1)
GPU 1: NVIDIA H200 (UUID: GPU-1)
"""
WANTED = {"devices": ["0:0", "1"], "mig": {"0": ["4g.71gb", "3g.71gb"]}, "persistence": True}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """What stand-ins for nvidia-smi and nvidia-ctk tell and write."""
    state = tmp_path / "state"
    state.mkdir()
    for name, script in (("nvidia-smi", SMI), ("nvidia-ctk", CTK)):
        tool(tmp_path / "bin", name, script.format(state=state))
    (state / "gpus").write_text(WHOLE)
    (state / "cut").write_text(SLICED)
    (state / "names").write_text("nvidia.com/gpu=0:0\nnvidia.com/gpu=1\n")
    return state


def gpus(state: Path, verb: str, **config: object) -> subprocess.CompletedProcess[str]:
    (state / "config").write_text(json.dumps(WANTED | config))
    source = PROGRAM.read_text().replace("/var/run/cdi", f"{state}/cdi")
    (state / "gpus.py").write_text(source)
    environment = {**os.environ, "PATH": f"{state.parent}/bin:{os.environ['PATH']}"}
    argv = [sys.executable, "-I", str(state / "gpus.py"), verb, str(state / "config")]
    return subprocess.run(argv, capture_output=True, text=True, env=environment)


def test_slices_are_cut_links_made_and_names_written(state: Path) -> None:
    assert gpus(state, "check").returncode == 1
    done = gpus(state, "prepare")
    assert done.returncode == 0, done.stderr
    asked = (state / "asked").read_text().splitlines()
    assert "-pm 1" in asked
    assert asked.index("-i 0 -mig 1") < asked.index("mig -i 0 -cgi 4g.71gb,3g.71gb -C")
    assert "ctk system create-dev-char-symlinks --create-all" in asked
    assert asked[-1] == f"ctk cdi generate --output={state}/cdi/nvidia.yaml"
    assert gpus(state, "check").returncode == 0


def test_slices_that_are_there_are_never_touched(state: Path) -> None:
    (state / "gpus").write_text(SLICED)
    assert gpus(state, "prepare").returncode == 0
    assert "-cgi" not in (state / "asked").read_text()


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        (["7g.141gb"], "Stop what uses it, then: nvidia-smi mig -i 0 -dci"),
        (["3g.71gb", "4g.71gb"], "write mig: [4g.71gb, 3g.71gb]"),
    ],
)
def test_other_slices_are_a_persons_affair(state: Path, profiles: list[str], said: str) -> None:
    (state / "gpus").write_text(SLICED)
    done = gpus(state, "prepare", mig={"0": profiles})
    assert done.returncode == 1
    assert said in done.stderr
    assert "-cgi" not in (state / "asked").read_text()


def test_a_missing_name_is_found(state: Path) -> None:
    (state / "gpus").write_text(SLICED)
    (state / "names").write_text("nvidia.com/gpu=1\n")
    done = gpus(state, "check")
    assert done.returncode == 1
    assert done.stderr == "no CDI device nvidia.com/gpu=0:0\n"


def test_a_driver_that_does_not_answer_is_told_as_it_says(state: Path) -> None:
    tool(state.parent / "bin", "nvidia-smi", "echo 'Driver/library version mismatch' >&2; exit 18")
    done = gpus(state, "check")
    assert done.returncode == 1
    assert "exit status 18: Driver/library version mismatch" in done.stderr
