"""A stand-in engine, run by the same kind of unit as the real ones: rehearse without GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from inferfleet.builders import VERIFY_UNIT, answers, running
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Step

KIND = "engine"
PROGRAM = "/opt/inferfleet/simulator/simulator.py"


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The program once, and a unit with its key file for each instance."""
    units = tuple(instance.unit for instance in step.instances)
    yield render.copy(PROGRAM, "simulator.py", mode=0o755, restarts=units)
    for instance in step.instances:
        yield from _instance(instance, render)
    for instance in step.instances:
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/health", 30)


def _instance(instance: Instance, render: Render) -> Iterator[Artefact]:
    environment = f"/etc/inferfleet/{instance.name}/engine.env"
    key = instance.deployment.api_key
    yield render(
        environment,
        "engine.env.j2",
        mode=0o600,
        restarts=(instance.unit,),
        secrets=[("VLLM_API_KEY", key)] if key else [],
    )
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "simulator.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"inferfleet simulator {instance.name} (rehearsal)",
        environment=environment,
        arguments=arguments(instance),
        stop_timeout=instance.options["shutdown_timeout"] + 5,
    )


def arguments(instance: Instance) -> list[str]:
    """The simulator's command line."""
    options = instance.options
    return [
        *("/usr/bin/python3", PROGRAM),
        *("--host", instance.listen),
        *("--port", str(instance.port)),
        *("--served-model-name", instance.deployment.model.served_name),
        *("--max-model-len", str(options["max_model_len"])),
        *("--token-rate", str(options["token_rate"])),
        *("--shutdown-timeout", str(options["shutdown_timeout"])),
    ]
