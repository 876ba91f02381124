"""GPU metrics under dcgm-exporter's names: that one in Docker, a small one of ours elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from inferfleet.builders import VERIFY_COMPOSE, VERIFY_UNIT, answers, running
from inferfleet.errors import RenderError
from inferfleet.model import Artefact, Ensure, Plan, Render, Step, endpoint, sh

KIND = "service"
ORDER = 95
REHEARSABLE = False
UNIT = "inferfleet-gpu-exporter.service"
DOCKER_ROLES = ("docker", "tgi")
FOLDER = "/opt/inferfleet/gpu-exporter"
COMPOSE = "/etc/inferfleet/gpu-exporter/compose.yml"
COUNTERS = "/etc/inferfleet/gpu-exporter/counters.csv"


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The exporter's files and unit."""
    yield from _dcgm(step, render) if in_docker(step, plan) else _own(step, render)
    yield running(UNIT)
    # dcgm-exporter looks at every GPU before it answers
    yield answers(UNIT, step.host.private_address, step.settings["port"], "/metrics", 120)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """There are GPUs to watch."""
    if not step.host.gpus:
        yield "hosts", f"{step.host.name} has no GPUs in the inventory: leave it out here"


def ports(step: Step) -> Iterable[int]:
    """Where Prometheus asks."""
    return [step.settings["port"]]


def in_docker(step: Step, plan: Plan) -> bool:
    """Whether it is dcgm-exporter: as said, else where the host's engines run in Docker, too."""
    if "exporter" in step.settings:
        return bool(step.settings["exporter"] == "dcgm")
    here = plan.steps[step.host.name]
    engines = [i.options.get("runtime") for s in here for i in s.instances]
    return "docker" in engines or any(s.role in DOCKER_ROLES for s in here)


def _dcgm(step: Step, render: Render) -> Iterator[Artefact | Ensure]:
    image = step.settings["image"]
    yield Ensure(
        f"image {image} is here",
        test=sh("docker", "image", "inspect", image) + " >/dev/null 2>&1",
        run=sh("docker", "pull", "--quiet", image),
        timeout=1800,
        before=True,
    )
    yield render.copy(COUNTERS, "counters.csv", restarts=(UNIT,))
    yield render(
        COMPOSE,
        "compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(UNIT,),
        image=image,
        counters=COUNTERS,
        published=f"{endpoint(step.host.private_address, step.settings['port'])}:9400",
    )
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "gpu-exporter-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet GPU exporter (dcgm-exporter) in Docker",
        compose=COMPOSE,
    )


def _own(step: Step, render: Render) -> Iterator[Artefact]:
    program = f"{FOLDER}/gpu_exporter.py"
    yield render.copy(program, "gpu_exporter.py", mode=0o755, restarts=(UNIT,))
    yield render.copy(f"{FOLDER}/pynvml.py", str(_binding()), restarts=(UNIT,))
    address, port = step.host.private_address, str(step.settings["port"])
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "gpu-exporter.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet GPU exporter",
        command=["/usr/bin/python3", program, address, port],
    )


def _binding() -> Path:
    """nvidia-ml-py, which is one file and goes along. Raises RenderError when it is not here."""
    found = importlib.util.find_spec("pynvml")
    if found is None or found.origin is None:
        raise RenderError("nvidia-ml-py is not installed here: pip install nvidia-ml-py")
    return Path(found.origin)
