"""Doctor: a plan held against facts. Each check finds its fault, and is silent without it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferfleet.facts import (
    Container,
    ContainerFacts,
    Disk,
    Facts,
    GpuFacts,
    GpuProcess,
    Listener,
    MigInstance,
    doctor,
    drivers,
)
from inferfleet.facts.case import span
from inferfleet.facts.gpu_checks import same_model
from inferfleet.model import Finding
from inferfleet.project import Project

GIB = 1 << 30
OPTIONS = {"runtime": "native", "version": "0.32.0", "max_model_len": 8192}
ADDRESS, UNIT = "192.0.2.11", "inferfleet-coder-0.service"

GPU = GpuFacts(
    0,
    "NVIDIA L40S",
    memory_total=46068 << 20,
    memory_free=45500 << 20,
    capability=(8, 9),
    ecc=True,
    ecc_errors=0,
)
HEALTHY = Facts(
    "gpu-01",
    ram_total=512 * GIB,
    disks=(Disk("/", total=4000 * GIB, free=3000 * GIB),),
    driver="580.95.05",
    cuda="13.0",
    gpu_source="nvml",
    gpus=(GPU, replace(GPU, index=1)),
    containers=ContainerFacts(docker="28.3.0", docker_client="28.3.0", cgroup_driver="systemd"),
    listeners=(Listener("0.0.0.0", 22, 1, "sshd"),),
    clock_offset=0.2,
)
# An engine's child whose engine was killed: init has adopted it, no unit knows it.
ORPHAN = GpuProcess(
    4242, 40 * GIB, "VLLM::EngineCor", "VLLM::EngineCore_DP0", "ana", 3 * 86400.0, parent=1
)


@dataclass
class Clinic:
    """A project with one deployment of vLLM on one host, and what doctor says of the host."""

    folder: Path
    options: dict[str, Any]
    roles: dict[str, Any] = field(default_factory=dict)

    def project(self, **deployment: Any) -> Project:
        content = {
            "hosts": {
                "gpu-01": {
                    "address": ADDRESS,
                    "gpus": [{"model": "L40S", "count": 2}],
                    "ram_gib": 512,
                }
            },
            "models": {
                "qwen": {
                    "repository": "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ",
                    "revision": "1ed0a6145da0ce550c628e8e8b678f51e695995d",
                    "quantization": "awq",
                    "attention_heads": 40,
                }
            },
            "deployments": {
                "coder": {
                    "engine": "vllm",
                    "model": "qwen",
                    "hosts": ["gpu-01"],
                    "port": 8000,
                    "options": {**OPTIONS, **self.options},
                    **deployment,
                }
            },
            "phases": {
                "pilot": {
                    "users": 5,
                    "why": "A test.",
                    "hosts": ["gpu-01"],
                    "deployments": ["coder"],
                    "roles": self.roles,
                }
            },
        }
        inventory = self.folder / "inventory"
        inventory.mkdir(exist_ok=True)
        (inventory / "fleet.yml").write_text(yaml.safe_dump(content))
        return Project(inventory)

    def examine(
        self,
        facts: Facts,
        *,
        rehearse: bool = False,
        units: tuple[str, ...] = (),
        **deployment: Any,
    ) -> list[Finding]:
        project = self.project(**deployment)
        plan = project.plan("pilot", rehearse=rehearse)
        owned = {"gpu-01": frozenset(units)}
        return doctor.examine(plan, {"gpu-01": facts}, project, owned)

    def only(self, facts: Facts, check: str, severity: str = "error", **more: Any) -> Finding:
        """The one finding there is, of that kind."""
        (found,) = self.examine(facts, **more)
        assert (found.host, found.check, found.severity) == ("gpu-01", check, severity), found
        assert found.why
        assert found.remedy
        return found


@pytest.fixture
def clinic(tmp_path) -> Clinic:
    return Clinic(tmp_path, {})


def holding(*processes: GpuProcess, free: float = 5 * GIB) -> Facts:
    """The host with processes on its first GPU."""
    first = replace(GPU, memory_free=int(free), processes=processes)
    return replace(HEALTHY, gpus=(first, HEALTHY.gpus[1]))


def test_a_healthy_host_has_nothing(clinic):
    assert clinic.examine(HEALTHY) == []


# Orphans and memory


def test_an_orphaned_engine_process_is_named_with_pid_and_age(clinic):
    found = clinic.examine(holding(ORPHAN))
    assert [f.check for f in found] == ["orphan", "memory"]
    assert "VLLM::EngineCore_DP0 (pid 4242, ana, 3 d) is orphaned" in found[0].what
    assert "40.0 GiB on GPU 0" in found[0].what
    assert found[0].remedy == "kill 4242 (kill -9 if it stays)"
    assert "held by VLLM::EngineCore_DP0 (pid 4242, ana, 3 d): 40.0 GiB" in found[1].what
    assert found[1].remedy.endswith("kill 4242")


def test_an_orphan_stops_even_where_memory_is_left(clinic):
    small = replace(ORPHAN, memory=100 << 20)
    assert clinic.only(holding(small, free=45000 << 20), "orphan")


def test_an_orphan_on_a_gpu_that_nobody_uses_is_a_warning(clinic):
    other = replace(HEALTHY.gpus[1], processes=(ORPHAN,))
    assert clinic.only(replace(HEALTHY, gpus=(GPU, other)), "orphan", "warning")


@pytest.mark.parametrize(
    ("command", "parent", "parent_name", "container", "orphaned"),
    [
        ("VLLM::EngineCore", 1, "systemd", "", True),
        ("VLLM::Worker_TP1", 812, "systemd", "", True),  # adopted by a user's manager
        ("/usr/local/bin/ollama runner --model /x", 1, "systemd", "", True),
        ("VLLM::EngineCore", 900, "vllm", "", False),
        ("/usr/local/bin/ollama runner --model /x", 77, "ollama", "", False),
        ("/opt/bin/vllm serve qwen", 1, "systemd", "", False),  # an engine itself
        ("python3 train.py", 1, "systemd", "", False),
        ("VLLM::EngineCore", 1, "systemd", "4f" * 32, False),  # dies with its container
    ],
)
def test_who_is_orphaned(clinic, command, parent, parent_name, container, orphaned):
    process = GpuProcess(7, GIB, "x", command, "ana", 60, parent, parent_name, container=container)
    checks = {f.check for f in clinic.examine(holding(process, free=45000 << 20))}
    assert ("orphan" in checks) == orphaned


def test_an_orphan_left_in_our_own_unit_is_no_less_one(clinic):
    left = replace(ORPHAN, unit=UNIT)
    assert {f.check for f in clinic.examine(holding(left))} == {"orphan", "memory"}


def test_memory_that_our_own_unit_holds_comes_back(clinic):
    own = GpuProcess(9, 41 * GIB, "VLLM::EngineCor", "VLLM::EngineCore", parent=8, unit=UNIT)
    assert clinic.examine(holding(own, free=4 * GIB)) == []
    elsewhere = replace(own, unit="vllm.service")
    found = clinic.only(holding(elsewhere, free=4 * GIB), "memory")
    assert found.what.startswith("GPU 0 has 4.0 GiB free, coder-0 takes 41.4 GiB; held by ")
    assert "pid 9" in found.what
    assert "vllm.service" in found.what


def test_memory_that_our_own_container_holds_comes_back(clinic):
    ours = Container("4f" * 32, "web-1", project="inferfleet-coder-0")
    own = GpuProcess(9, 41 * GIB, "vllm", parent=8, container=ours.id)
    facts = holding(own, free=4 * GIB)
    assert clinic.only(facts, "memory")
    containers = replace(facts.containers, running=(ours,))
    assert clinic.examine(replace(facts, containers=containers)) == []


@pytest.mark.parametrize(
    ("options", "free", "fits"),
    [
        ({"gpu_memory_utilization": 0.8}, 36 * GIB, True),
        ({"gpu_memory_utilization": 0.8}, 35 * GIB, False),
        ({}, 40.8 * GIB, True),  # 0.92, less what the driver reserves
        ({}, 40 * GIB, False),
        ({"version": "0.16.0"}, 40 * GIB, True),  # 0.90 then
    ],
)
def test_how_much_memory_vllm_takes(clinic, options, free, fits):
    clinic.options |= options
    checks = [f.check for f in clinic.examine(holding(free=free))]
    assert checks == ([] if fits else ["memory"])


def test_memory_that_is_held_may_leave_enough(clinic):
    found = clinic.only(holding(replace(ORPHAN, parent=4000), free=36 * GIB), "memory")
    share = re.search(
        r"gpu_memory_utilization: (0\.\d+), which keeps ([\d,]+) tokens", found.remedy
    )
    assert share is not None
    assert float(share[1]) * GPU.memory_total <= 36 * GIB
    clinic.options |= {"gpu_memory_utilization": float(share[1])}
    assert clinic.examine(holding(replace(ORPHAN, parent=4000), free=36 * GIB)) == []


def test_a_smaller_gpu_than_its_name_says(clinic):
    small = replace(GPU, memory_total=19 * GIB, memory_free=19 * GIB)
    found = clinic.only(replace(HEALTHY, gpus=(small, HEALTHY.gpus[1])), "capacity")
    assert "19.0 GiB" in found.what


# The GPUs themselves


def test_no_gpu_says_why(clinic):
    facts = replace(HEALTHY, gpus=(), driver="", gpu_why="the driver's library is not here")
    assert "the driver's library is not here" in clinic.only(facts, "gpus").what


def test_fewer_gpus_than_used_is_an_error_more_a_warning(clinic):
    one = replace(HEALTHY, gpus=(GPU,))
    clinic.only(one, "gpus", "warning")
    clinic.only(one, "gpus", gpus_per_instance=2)
    three = replace(HEALTHY, gpus=(*HEALTHY.gpus, replace(GPU, index=2)))
    found = clinic.only(three, "gpus", "warning")
    assert found.what == "it has 3 GPUs, the inventory says 2"
    assert "discover --host gpu-01 --write" in found.remedy


def test_another_gpu_than_planned_for(clinic):
    l4 = replace(GPU, name="NVIDIA L4")
    found = clinic.only(replace(HEALTHY, gpus=(l4, HEALTHY.gpus[1])), "gpus")
    assert found.what == "GPU 0 is NVIDIA L4, the inventory says L40S"
    clinic.only(replace(HEALTHY, gpus=(GPU, replace(l4, index=1))), "gpus", "warning")


@pytest.mark.parametrize(
    ("inventory", "found", "same"),
    [
        ("L40S", "NVIDIA L40S", True),
        ("L40", "NVIDIA L40S", False),
        ("A100", "NVIDIA A100-SXM4-80GB", True),
        ("A100 80GB", "NVIDIA A100-SXM4-40GB", False),
        ("RTX 4070", "NVIDIA GeForce RTX 4070", True),
        ("RTX 4070", "NVIDIA GeForce RTX 4070 Ti", False),
        ("H200", "NVIDIA H200", True),
        ("H200 MIG 3g.71gb", "NVIDIA H200 MIG 3g.71gb", True),
        ("H200 3g.71gb", "NVIDIA H200 MIG 3g.71gb", True),
        ("H200 MIG 1g.18gb", "NVIDIA H200 MIG 3g.71gb", False),
        ("H200", "NVIDIA H200 MIG 3g.71gb", False),
    ],
)
def test_names_of_the_same_gpu(inventory, found, same):
    assert same_model(inventory, found) == same


def test_slices_count_in_place_of_their_gpu(clinic):
    pair = (MigInstance("NVIDIA L40S", memory_total=45 * GIB, memory_free=45 * GIB),) * 2
    sliced = replace(GPU, mig=True, mig_instances=pair)
    assert clinic.examine(replace(HEALTHY, gpus=(sliced,))) == []


@pytest.mark.parametrize(
    ("version", "driver", "severity"),
    [
        ("0.32.0", "570.133.07", "error"),
        ("0.32.0", "580.65.06", None),
        ("0.20.0", "575.64.03", "error"),
        ("0.16.0", "575.64.03", None),
        ("0.16.0", "550.127.08", "warning"),
        ("0.16.0", "525.60.13", "warning"),
        ("0.16.0", "520.61.05", "error"),
        ("0.8.5", "550.54.14", None),
    ],
)
def test_a_driver_too_old_for_the_engines_cuda(clinic, version, driver, severity):
    clinic.options["version"] = version
    facts = replace(HEALTHY, driver=driver)
    if severity is None:
        assert clinic.examine(facts) == []
    else:
        found = clinic.only(facts, "driver", severity)
        assert driver in found.what
        assert f"vLLM {version} is built with CUDA" in found.what


def test_what_other_engines_need_of_the_driver():
    assert drivers.needed("ollama", "0.32.0", (8, 9)).oldest == (550,)
    assert drivers.needed("ollama", "0.32.0", (6, 1)).oldest == (570,)
    assert drivers.needed("tgi", "3.3.7").oldest == (525, 60, 13)
    assert drivers.needed("simulator", "") is None


@pytest.mark.parametrize(
    ("options", "capability", "what"),
    [
        ({}, (7, 0), "vLLM 0.32.0 needs compute capability 7.5"),
        ({"dtype": "bfloat16"}, (7, 5), "dtype bfloat16 needs compute capability 8.0"),
        ({"version": "0.8.5"}, (7, 0), "quantization awq needs compute capability 7.5"),
        ({"quantization": "mxfp4"}, (7, 5), "quantization mxfp4 needs compute capability 8.0"),
        ({"dtype": "float16"}, (7, 5), None),
        ({"dtype": "bfloat16"}, (8, 0), None),
    ],
)
def test_compute_capability(clinic, options, capability, what):
    clinic.options |= options
    old = replace(GPU, capability=capability)
    found = clinic.examine(replace(HEALTHY, gpus=(old, replace(old, index=1))))
    said = [f.what for f in found if f.check == "capability"]
    if what is None:
        assert said == []
    else:
        assert what in said[0]
        assert f"NVIDIA L40S has {drivers.shown(capability)}" in said[0]


def test_gpus_that_are_not_well(clinic):
    sick = replace(GPU, ecc_errors=3)
    found = clinic.only(replace(HEALTHY, gpus=(sick, HEALTHY.gpus[1])), "ecc", "warning")
    assert "3 uncorrected memory errors" in found.what
    changing = replace(GPU, mig=False, mig_pending=True)
    clinic.only(replace(HEALTHY, gpus=(changing, HEALTHY.gpus[1])), "mig", "warning")


# Ports


def listening(*listeners: Listener, **containers: Any) -> Facts:
    return replace(
        HEALTHY, listeners=listeners, containers=replace(HEALTHY.containers, **containers)
    )


STRANGER = Listener("0.0.0.0", 8000, 4711, "python3", "python3 app.py", "ana", 7200.0, 1)


def test_a_taken_port_names_who_has_it(clinic):
    found = clinic.only(listening(STRANGER), "port")
    assert found.what == "port 8000 of coder-0 is taken by python3 (pid 4711, ana, 2 h)"
    assert "kill 4711" in found.remedy


def test_a_port_of_our_own_unit_is_ours(clinic):
    assert clinic.examine(listening(replace(STRANGER, unit=UNIT))) == []
    nginx = replace(STRANGER, name="nginx", unit="nginx.service")
    assert clinic.examine(listening(nginx), units=("nginx.service",)) == []
    found = clinic.only(listening(nginx), "port")
    assert "systemctl disable --now nginx.service" in found.remedy


def test_a_port_that_docker_publishes(clinic):
    proxy = replace(STRANGER, name="docker-proxy", unit="docker.service")
    other = Container("a" * 64, "web", ports=(("0.0.0.0", 8000),))
    found = clinic.only(listening(proxy, running=(other,)), "port")
    assert found.what.endswith("is taken by container web")
    assert "docker stop web" in found.remedy
    ours = replace(other, project="inferfleet-coder-0")
    assert clinic.examine(listening(proxy, running=(ours,))) == []


@pytest.mark.parametrize(
    ("address", "clash"),
    [("0.0.0.0", True), ("::", True), ("127.0.0.1", True), ("192.0.2.99", False)],
)
def test_only_a_listener_on_the_same_address_clashes(clinic, address, clash):
    found = clinic.examine(listening(replace(STRANGER, address=address)))
    assert [f.check for f in found] == (["port"] if clash else [])


def test_a_second_listener_on_the_port_is_seen_behind_our_own(clinic):
    own = replace(STRANGER, address="127.0.0.1", unit=UNIT)
    assert clinic.only(listening(own, STRANGER), "port")


# The host


def test_rights(clinic):
    assert "become: sudo" in clinic.only(replace(HEALTHY, uid=1000), "rights").remedy


def test_disk_too_small_for_weights_that_are_not_there_yet(clinic):
    small = replace(HEALTHY, disks=(Disk("/", total=30 * GIB, free=10 * GIB),))
    found = clinic.only(small, "disk")
    assert found.what.startswith("/ has 10.0 GiB free, weights take ")
    there = {"Qwen/Qwen2.5-Coder-32B-Instruct-AWQ": 19 * GIB}
    assert clinic.examine(replace(small, sizes=there)) == []
    elsewhere = (*small.disks, Disk("/var/cache", total=100 * GIB, free=90 * GIB))
    assert clinic.examine(replace(small, disks=elsewhere)) == []


def test_a_full_disk_is_left_to_the_push(clinic):
    full = replace(HEALTHY, disks=(Disk("/", free=1 << 20), Disk("/var/cache", free=90 * GIB)))
    assert "1 MiB free" in clinic.only(full, "disk", "warning").what


def test_less_memory_than_promised(clinic):
    found = clinic.only(replace(HEALTHY, ram_total=256 * GIB), "size", "warning")
    assert found.what == "it has 256 GiB of memory, the inventory says 512"
    assert clinic.examine(replace(HEALTHY, ram_total=503 * GIB)) == []


@pytest.mark.parametrize(
    ("offset", "severity", "said"),
    [(4.0, None, ""), (20.0, "warning", "20 s ahead of"), (-3600.0, "error", "3600 s behind")],
)
def test_clock(clinic, offset, severity, said):
    facts = replace(HEALTHY, clock_offset=offset)
    if severity is None:
        assert clinic.examine(facts) == []
    else:
        assert said in clinic.only(facts, "clock", severity).what


def test_what_cannot_be_reached(clinic):
    reach = {"huggingface.co:443": "its name does not resolve (x)", "192.0.2.1:443": ""}
    found = clinic.only(replace(HEALTHY, reach=reach), "network", "warning")
    assert found.what == "huggingface.co:443 cannot be reached: its name does not resolve (x)"


def test_docker_that_does_not_run(clinic):
    clinic.options["runtime"] = "docker"
    assert clinic.examine(HEALTHY) == []
    stopped = replace(HEALTHY, containers=ContainerFacts(docker_client="28.3.0"))
    assert "systemctl enable --now docker" in clinic.only(stopped, "docker").remedy
    absent = replace(HEALTHY, containers=ContainerFacts())
    assert "not installed" in clinic.only(absent, "docker").what


@pytest.mark.parametrize(
    ("gpu", "more", "risky"),
    [
        ("hook", {}, True),
        ("cdi", {}, False),
        ("", {}, False),
        ("hook", {"cgroup_driver": "cgroupfs"}, False),
        ("hook", {"device_links": True}, True),  # links do not help what the hook injected
        ("runtime", {"toolkit": "1.17.8"}, True),
        ("runtime", {"toolkit": "1.18.0"}, False),
    ],
)
def test_a_daemon_reload_that_would_take_gpus_away(clinic, gpu, more, risky):
    running = (Container("b" * 64, "trainer", gpu=gpu),)
    facts = listening(running=running, **more)
    if risky:
        assert "trainer" in clinic.only(facts, "reload", "warning").what
    else:
        assert clinic.examine(facts) == []


def test_what_could_not_be_looked_at_is_said(clinic):
    found = clinic.only(replace(HEALTHY, problems=("GPUs: OSError: x",)), "facts", "warning")
    assert "GPUs: OSError: x" in found.what


def test_a_rehearsal_leaves_gpus_and_weights_out(clinic):
    bare = replace(
        holding(ORPHAN), gpus=(), driver="", disks=(Disk("/", free=GIB),), ram_total=8 * GIB
    )
    assert clinic.examine(bare, rehearse=True) == []
    taken = replace(bare, listeners=(STRANGER,))
    assert clinic.only(taken, "port", rehearse=True)


def test_a_host_that_is_a_folder_has_no_ports_gpus_or_rights(clinic):
    facts = replace(
        HEALTHY, folder="/tmp/h", uid=1000, gpus=(), listeners=(STRANGER,), ram_total=GIB
    )
    assert clinic.examine(facts, rehearse=True) == []


# Around the checks


PREFLIGHT = """

def preflight(step, plan, facts):
    from inferfleet.model import Finding
    yield Finding(step.host.name, "own", "error", f"driver {facts.driver}", "why", "do")
"""


def test_a_role_adds_findings_of_its_own_after_errors_come_warnings(tmp_path):
    source = Path(__file__).parents[1] / "roles/vllm"
    copy = tmp_path / "roles/vllm"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "role.py").open("a") as file:
        file.write(PREFLIGHT)
    found = Clinic(tmp_path, {}).examine(replace(HEALTHY, clock_offset=10.0))
    assert [(f.check, f.severity) for f in found] == [("own", "error"), ("clock", "warning")]
    assert found[0].what == "driver 580.95.05"


@pytest.mark.parametrize(
    ("options", "reach"),
    [
        ({}, ("huggingface.co:443",)),
        (
            {"environment": {"HF_ENDPOINT": "http://hub.example.com:8080"}},
            ("hub.example.com:8080",),
        ),
        ({"environment": {"HF_HUB_OFFLINE": "1"}}, ()),
        ({"runtime": "docker"}, ("registry-1.docker.io:443", "huggingface.co:443")),
        (
            {"runtime": "docker", "image": "images.example.com:5000/vllm:1"},
            ("images.example.com:5000", "huggingface.co:443"),
        ),
    ],
)
def test_what_is_asked_beyond_the_facts(clinic, options, reach):
    clinic.options |= options
    project = clinic.project()
    plan = project.plan("pilot")
    asked = doctor.request(plan, plan.hosts[0])
    assert asked.reach == reach
    assert any(
        path.endswith("hub/models--Qwen--Qwen2.5-Coder-32B-Instruct-AWQ")
        for path in asked.sizes["Qwen/Qwen2.5-Coder-32B-Instruct-AWQ"]
    )
    rehearsal = project.plan("pilot", rehearse=True)
    assert doctor.request(rehearsal, rehearsal.hosts[0]).reach == ()


@pytest.mark.parametrize(
    ("settings", "reach", "place"),
    [
        ({}, ("huggingface.co:443",), "/srv/inferfleet/models/qwen@1ed0a614"),
        ({"endpoint": "http://hub.example.com"}, ("hub.example.com:80",), "/srv/inferfleet/"),
        ({"directory": "/mnt/stick"}, (), "/srv/inferfleet/models/qwen@1ed0a614"),
        ({"staging": "/nvme"}, ("huggingface.co:443",), "/nvme/qwen@1ed0a614"),
        ({"writer": "gpu-01", "share": "nas.example.com:/m"}, ("huggingface.co:443",), ""),
    ],
)
def test_weights_in_the_model_cache_are_looked_for_there(clinic, settings, reach, place):
    clinic.roles = {"model_cache": {"hosts": ["gpu-01"], **settings}}
    project = clinic.project()
    plan = project.plan("pilot")
    asked = doctor.request(plan, plan.hosts[0])
    assert asked.reach == reach
    (places,) = asked.sizes.values()
    assert [found for found in places if found.startswith(place)] == places
    assert bool(places) == bool(place)
    small = replace(HEALTHY, disks=(Disk("/", total=30 * GIB, free=10 * GIB),))
    checks = [f.check for f in clinic.examine(small)]
    assert checks == (["disk"] if place else [])  # a share's disk is not this host's


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, ""), (9.4, "9 s"), (130, "2 min"), (7200, "2 h"), (3e5, "3 d")]
)
def test_ages(seconds, said):
    assert span(seconds) == said


# The task


@pytest.fixture
def run(clinic) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The task on a fleet of one host, this machine."""
    clinic.project()
    path = clinic.folder / "inventory/fleet.yml"
    content = yaml.safe_load(path.read_text())
    content["hosts"]["gpu-01"] = {"connection": "local", "gpus": [{"model": "L40S", "count": 2}]}
    content["models"]["qwen"]["repository"] = "/srv/models/qwen"
    path.write_text(yaml.safe_dump(content))

    def ran(*words: str, code: int) -> subprocess.CompletedProcess[str]:
        tool = Path(sys.executable).with_name("inferfleet")
        argv = [tool, "doctor", *words, "--inventory", str(path.parent)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return ran


def test_the_contract_for_programs(run):
    document = json.loads(run("--phase", "pilot", "--json", code=1).stdout)
    assert not document["ok"]
    assert {"host", "check", "severity", "what", "why", "remedy"} == document["failures"][0].keys()
    assert document["failures"][0]["check"] == "gpus"
    assert {f["severity"] for f in document["failures"]} == {"error"}
    assert {f["severity"] for f in document["warnings"]} <= {"warning"}


def test_one_line_for_each_finding_and_a_sum(run):
    lines = run("--phase", "pilot", code=1).stdout.splitlines()
    assert lines[0].startswith("gpu-01: error: no GPU is visible: ")
    assert lines[-1].startswith("1 host: 1 error, ")


def test_a_rehearsal_of_it_is_fine_and_wrong_usage_is_not(run):
    assert json.loads(run("--phase", "pilot", "--rehearse", "--json", code=0).stdout)["ok"]
    assert "there is no phase 'pilo'" in run("--phase", "pilo", code=2).stderr
