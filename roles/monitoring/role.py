"""Prometheus, told by the plan what there is to scrape, with alerts and a dashboard for engines.

Rules and dashboard use the metric names of the newest vLLM; what older releases call otherwise is
renamed when it is scraped. GPU metrics have dcgm-exporter's names, whoever exports them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from inferfleet import gateways
from inferfleet.builders import VERIFY_UNIT, answers, package, running
from inferfleet.metrics import SILENT, Rename, vllm_renames
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Step, endpoint

KIND = "service"
ORDER = 99
ASKS_ENGINES = True
UNIT = "inferfleet-prometheus.service"
DISTRIBUTION = "prometheus"
FOLDER = "/etc/inferfleet/monitoring"
STATE = "inferfleet-prometheus"
EXPORTERS = {"node_exporter": "hosts", "gpu_exporter": "gpus"}  # role -> job


@dataclass(frozen=True, slots=True)
class Target:
    """One address to scrape, and what is known of it."""

    address: str
    labels: Mapping[str, str]


@dataclass(slots=True)
class Job:
    """Targets that are scraped alike."""

    name: str
    renames: tuple[Rename, ...] = ()
    targets: list[Target] = field(default_factory=list)


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Scrape configuration, rules, dashboard and unit of Prometheus."""
    settings = step.settings
    listen = endpoint(settings["listen"], settings["port"])
    yield _distribution_unit_off()
    yield package(DISTRIBUTION, "promtool")
    yield render(
        f"{FOLDER}/rules.yml",
        "rules.yml.j2",
        validate=("promtool", "check", "rules", "{path}"),
        reloads=(UNIT,),
        alerts=settings["alerts"],
        window=max(120, 4 * settings["scrape_interval"]),
        gpus=_gpus(plan),
    )
    yield render(
        f"{FOLDER}/prometheus.yml",
        "prometheus.yml.j2",
        validate=("promtool", "check", "config", "{path}"),
        reloads=(UNIT,),
        settings=settings,
        phase=plan.phase.name,
        jobs=[*jobs(plan), Job("prometheus", (), [Target(listen, {"host": step.host.name})])],
        timeout=min(10, settings["scrape_interval"]),
    )
    yield render.copy(f"{FOLDER}/dashboard.json", "dashboard.json")
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "prometheus.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet Prometheus",
        state=STATE,
        command=_command(listen, settings["retention_days"]),
    )
    yield running(UNIT)
    yield answers(UNIT, settings["listen"], settings["port"], "/-/ready", 60)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """There is an engine to watch."""
    if not any(plan.instances()):
        yield "hosts", "there is no engine to watch: no deployment of the phase runs anywhere"


def ports(step: Step) -> Iterable[int]:
    """Where Prometheus answers."""
    return [step.settings["port"]]


def jobs(plan: Plan) -> list[Job]:
    """What there is to scrape: a job for each deployment and each kind of exporter; gateways."""
    found: dict[str, Job] = {}
    for step in (step for steps in plan.steps.values() for step in steps):
        for instance in step.instances if step.role not in SILENT else ():
            job = Job(f"engine-{instance.deployment.name}", _renames(step.role, instance))
            found.setdefault(job.name, job).targets.append(_engine(instance))
        if step.role in EXPORTERS:
            job = Job(EXPORTERS[step.role])
            address = endpoint(step.host.private_address, step.settings["port"])
            target = Target(address, {"host": step.host.name})
            found.setdefault(job.name, job).targets.append(target)
    scraped = [target for gateway in gateways.gateways(plan) for target in _gateway(gateway)]
    return [*found.values(), *([Job("gateways", (), scraped)] if scraped else [])]


def _gateway(gateway: gateways.Gateway) -> list[Target]:
    """Each worker counts for itself."""
    return [Target(address, {"host": gateway.host}) for address in gateway.private]


def _engine(instance: Instance) -> Target:
    labels = {"host": instance.host.name, "unit": instance.name}
    labels["deployment"] = instance.deployment.name
    return Target(instance.endpoint, labels)


def _renames(role: str, instance: Instance) -> tuple[Rename, ...]:
    return vllm_renames(instance.options["version"]) if role == "vllm" else ()


def _gpus(plan: Plan) -> list[tuple[str, int]]:
    """The hosts whose GPUs are exported and how many there are: one that is gone is noticed."""
    steps = (step for steps in plan.steps.values() for step in steps)
    hosts = [step.host for step in steps if step.role == "gpu_exporter"]
    return [(host.name, len(host.gpus)) for host in hosts if host.gpus]


def _command(listen: str, retention_days: int) -> list[str]:
    return [
        "/usr/bin/prometheus",
        f"--config.file={FOLDER}/prometheus.yml",
        f"--storage.tsdb.path=/var/lib/{STATE}",
        f"--storage.tsdb.retention.time={retention_days}d",
        f"--web.listen-address={listen}",
    ]


def _distribution_unit_off() -> Ensure:
    """The package would start a unit that listens everywhere; one that is in use already stays."""
    unit = f"{DISTRIBUTION}.service"
    return Ensure(
        f"{unit} does not start with its package",
        test=f"command -v {DISTRIBUTION} >/dev/null || "
        f'[ "$(systemctl is-enabled {unit} 2>/dev/null)" = masked ]',
        run=f"systemctl mask -q {unit}",
        before=True,
    )
