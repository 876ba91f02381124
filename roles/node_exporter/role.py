"""The host's own metrics: node_exporter on the private address, and what it cannot see itself.

A timer asks for what has no exporter: until when the certificate that clients get is valid, and
whether engines without metrics answer. node_exporter shows it with the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from inferfleet.builders import VERIFY_UNIT, answers, package, running, system_user
from inferfleet.metrics import SILENT
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Step, endpoint

KIND = "service"
ORDER = 95
UNIT = "inferfleet-node-exporter.service"
TIMER = "inferfleet-probes.timer"
PROBES = "/opt/inferfleet/node-exporter/probes"
FOLDER = "/run/inferfleet-probes"  # where the probes write, and node_exporter reads
DISTRIBUTION = "prometheus-node-exporter"
# its own list with file systems in memory, and without overlay, which is a diskless host's root
NO_DISKS = (
    "autofs|binfmt_misc|bpf|cgroup2?|configfs|debugfs|devpts|devtmpfs|fusectl|hugetlbfs|iso9660|"
    "mqueue|nsfs|proc|procfs|pstore|ramfs|rpc_pipefs|securityfs|selinuxfs|squashfs|sysfs|tmpfs|"
    "tracefs"
)


@dataclass(frozen=True, slots=True)
class Probes:
    """What the timer asks for on one host."""

    tls_ports: tuple[int, ...]
    engines: tuple[tuple[Instance, str], ...]  # with the path that answers 200


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The exporter's unit; where there is something to probe, the probes with their timer."""
    port, address = step.settings["port"], step.host.private_address
    wanted = probes(step, plan)
    yield _distribution_unit_off()
    yield package(DISTRIBUTION, DISTRIBUTION)
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "node-exporter.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet node_exporter",
        command=_command(endpoint(address, port), wanted),
    )
    if wanted.tls_ports or wanted.engines:
        yield from _probes(wanted, step, render)
    yield running(UNIT)
    yield answers(UNIT, address, port, "/metrics", 30)


def ports(step: Step) -> Iterable[int]:
    """Where Prometheus asks."""
    return [step.settings["port"]]


def probes(step: Step, plan: Plan) -> Probes:
    """What runs on the step's host and cannot be asked for metrics."""
    here = plan.steps[step.host.name]
    tls = [s.settings["port"] for s in here if s.role == "balancer" and "tls" in s.settings]
    silent = [(i, SILENT[s.role]) for s in here if s.role in SILENT for i in s.instances]
    return Probes(tuple(tls), tuple(silent))


def _command(listen: str, wanted: Probes) -> list[str]:
    line = [f"/usr/bin/{DISTRIBUTION}", f"--web.listen-address={listen}"]
    line.append(f"--collector.filesystem.fs-types-exclude=^({NO_DISKS})$")
    if wanted.tls_ports or wanted.engines:
        line.append(f"--collector.textfile.directory={FOLDER}")
    return line


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


def _probes(wanted: Probes, step: Step, render: Render) -> Iterator[Artefact | Ensure]:
    if wanted.tls_ports:
        yield package("openssl", "openssl")
    yield system_user("inferfleet")
    yield render(PROBES, "probes.j2", mode=0o755, restarts=(TIMER,), probes=wanted)
    yield render(
        "/etc/systemd/system/inferfleet-probes.service",
        "probes.service.j2",
        restarts=(TIMER,),
        program=PROBES,
        folder=FOLDER,
    )
    yield render(
        f"/etc/systemd/system/{TIMER}",
        "probes.timer.j2",
        validate=VERIFY_UNIT,
        restarts=(TIMER,),
        seconds=step.settings["probe_interval"],
    )
    yield running(TIMER)
