"""From a phase to steps: which role runs on which host, with which GPUs and ports. Pure.

A deployment with `instances_per_host` is counted out on each of its hosts; one with `instances` is
packed over all of them, on the GPUs that the former leave free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferfleet import packed
from inferfleet.capacity import Layout
from inferfleet.model import Deployment, Host, Instance, Inventory, Phase, Plan, Step
from inferfleet.roles import Library
from inferfleet.schema import with_defaults

SIMULATOR = "simulator"


@dataclass(frozen=True, slots=True)
class GpuClaim:
    """The GPU indexes one instance of a deployment gets on a host."""

    deployment: str
    instance: int
    gpus: tuple[int, ...]


def claims(deployments: Iterable[Deployment]) -> Iterator[GpuClaim]:
    """Give each instance its GPUs, in order: named ones first come, else the next free.

    Never fails: what the host lacks is counted past its end and reported by the checks.
    Deployments that are packed over their hosts are left out.
    """
    wanted = [deployment for deployment in deployments if deployment.instances is None]
    named = {gpu for d in wanted for gpu in d.gpus or ()}
    free = (gpu for gpu in range(10**6) if gpu not in named)
    for deployment in wanted:
        own = iter(deployment.gpus or ())
        for index in range(deployment.instances_per_host):
            source = own if deployment.gpus is not None else free
            taken = [next(source, -1) for _ in range(deployment.gpus_per_instance)]
            yield GpuClaim(deployment.name, index, tuple(taken))


def deployments_by_host(inventory: Inventory, phase: Phase) -> Mapping[str, list[Deployment]]:
    """The phase's deployments on each of its hosts, in the phase's order."""
    found: dict[str, list[Deployment]] = {name: [] for name in phase.hosts}
    known = [inventory.deployments[n] for n in phase.deployments if n in inventory.deployments]
    for deployment in known:
        for host in deployment.hosts:
            if host in found:
                found[host].append(deployment)
    return found


def layout(inventory: Inventory, phase: Phase, library: Library) -> Layout:
    """Where the phase's packed instances go, and how many of each deployment find no place."""
    deployed = deployments_by_host(inventory, phase)
    counted = {host: claims(deployments) for host, deployments in deployed.items()}
    taken = {host: {gpu for each in found for gpu in each.gpus} for host, found in counted.items()}
    engines = {each.engine for found in deployed.values() for each in found}
    single = {name for name in engines if library.role(name).one_per_host}
    return packed.layout(inventory, phase, taken, single)


def claims_by_host(
    inventory: Inventory, phase: Phase, library: Library
) -> Mapping[str, Sequence[GpuClaim]]:
    """Every instance of the phase with its GPUs, on each of its hosts, in the phase's order."""
    deployed = deployments_by_host(inventory, phase)
    counted = {host: list(claims(deployments)) for host, deployments in deployed.items()}
    for (host, name), spots in packed.by_host(layout(inventory, phase, library)).items():
        counted[host] += [GpuClaim(name, index, gpus) for index, gpus in enumerate(spots)]
    order = {name: index for index, name in enumerate(phase.deployments)}
    return {host: sorted(found, key=lambda c: order[c.deployment])
            for host, found in counted.items()}  # fmt: skip


def build(inventory: Inventory, phase: Phase, library: Library, *, rehearse: bool = False) -> Plan:
    """The plan of a phase; with `rehearse`, the simulator stands in for every engine."""
    askers = {
        host for p in phase.placements if library.role(p.role).asks_engines for host in p.hosts
    }
    claimed = claims_by_host(inventory, phase, library)
    builder = _Builder(
        phase, library, rehearse, frozenset(askers), inventory.deployments, claimed
    )  # fmt: skip
    hosts = tuple(inventory.hosts[name] for name in phase.hosts)
    steps = {h.name: tuple(builder.steps(h)) for h in hosts}
    return Plan(phase, hosts, steps, rehearse, inventory.folder)


@dataclass(frozen=True, slots=True)
class _Builder:
    phase: Phase
    library: Library
    rehearse: bool
    askers: frozenset[str]  # hosts with a role that talks to engines
    deployments: Mapping[str, Deployment]
    claimed: Mapping[str, Sequence[GpuClaim]]  # by host

    def steps(self, host: Host) -> Sequence[Step]:
        steps = [*self._engines(host), *self._services(host)]
        return sorted(steps, key=lambda step: (self.library.role(step.role).order, step.role))

    def _engines(self, host: Host) -> Iterator[Step]:
        by_role: dict[str, list[Instance]] = {}
        for role, instance in self._instances(host):
            by_role.setdefault(role, []).append(instance)
        for role, instances in by_role.items():
            yield Step(host, role, tuple(instances))

    def _instances(self, host: Host) -> Iterator[tuple[str, Instance]]:
        listen = "127.0.0.1" if self.askers <= {host.name} else host.private_address
        for claim in self.claimed[host.name]:
            deployment = self.deployments[claim.deployment]
            role = SIMULATOR if self.rehearse else deployment.engine
            yield (
                role,
                Instance(
                    deployment=deployment,
                    host=host,
                    index=claim.instance,
                    port=deployment.port + claim.instance,
                    gpus=claim.gpus,
                    listen=listen,
                    options=self._options(role, deployment, host),
                ),
            )

    def _options(self, role: str, deployment: Deployment, host: Host) -> Mapping[str, Any]:
        schema = self.library.role(role).schema
        if role != deployment.engine:  # a rehearsal keeps what both engines understand
            known = schema.get("properties", {})
            given = {k: v for k, v in deployment.options.items() if k in known}
        else:
            given = dict(deployment.options)
        return with_defaults(schema, given | host.variables.get(role, {}))

    def _services(self, host: Host) -> Iterator[Step]:
        for placement in self.phase.placements:
            role = self.library.role(placement.role)
            if host.name in placement.hosts and (role.rehearsable or not self.rehearse):
                own = dict(placement.settings) | host.variables.get(placement.role, {})
                yield Step(host, placement.role, settings=with_defaults(role.schema, own))
