"""What a schema cannot say: ports, GPUs, parallelism, places. Pure; touches no host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from inferfleet import addresses, capacity, outlook, plan, sizing
from inferfleet.capacity import CapacityError
from inferfleet.model import Deployment, Host, Inventory, Phase, Plan
from inferfleet.roles import Library
from inferfleet.schema import Fault

_OWN = {field.name for field in fields(Deployment)}  # the others are its engine's options


def check(inventory: Inventory, library: Library) -> Iterator[Fault]:
    """Every fault of an inventory whose entries each fit the schema."""
    yield from addresses.check(inventory)
    yield from _heads(inventory)
    yield from _shapes(inventory)
    for phase in inventory.phases.values():
        yield from _local(inventory, phase)
        homeless = list(_places(inventory, phase))
        yield from homeless
        if homeless:
            continue  # what would follow has its cause there
        yield from _gpus(inventory, phase)
        yield from _packed(inventory, phase, library)
        built = plan.build(inventory, phase, library)
        yield from _slices(built)
        yield from addresses.listening(built)
        yield from _ports(built, library)
        yield from _roles(built, library)
        yield from _memory(built, inventory)


def _heads(inventory: Inventory) -> Iterator[Fault]:
    for deployment in inventory.deployments.values():
        ways = deployment.options.get("tensor_parallel")
        if not isinstance(ways, int):
            pipelines = deployment.options.get("pipeline_parallel", 1)
            ways = deployment.gpus_per_instance // max(1, int(pipelines))
            key: tuple[str, ...] = ("gpus_per_instance",)
        else:
            key = ("options", "tensor_parallel")
        heads = deployment.model.attention_heads
        if heads and ways > 1 and heads % ways:
            fitting = [str(n) for n in range(1, min(heads, 64) + 1) if heads % n == 0]
            said = (
                f"{ways}-way tensor parallelism does not divide the {heads} attention heads of "
                f"{deployment.model.name}; {', '.join(fitting)} do"
            )
            yield Fault(("deployments", deployment.name, *key), said)


def _shapes(inventory: Inventory) -> Iterator[Fault]:
    """Dimensions given by hand, and config.json files, that tell nothing."""
    for model in inventory.models.values():
        for key in ("dimensions", "config"):
            if getattr(model, key) is not None:
                try:
                    sizing.shape(model, Path(inventory.folder))
                except CapacityError as error:
                    yield Fault(("models", model.name, key), str(error))


def _local(inventory: Inventory, phase: Phase) -> Iterator[Fault]:
    local = [n for n in phase.hosts if inventory.hosts[n].connection == "local"]
    if local and len(phase.hosts) > 1:
        said = f"'{local[0]}' is this machine; other hosts cannot reach what listens on loopback"
        yield Fault(("phases", phase.name, "hosts"), said)


def _places(inventory: Inventory, phase: Phase) -> Iterator[Fault]:
    here = ("phases", phase.name)
    if not phase.hosts:
        yield Fault((*here, "hosts"), "names no host: no host is in these groups yet")
        return
    yield from _empty(phase)
    yield from _elsewhere(inventory, phase)


def _elsewhere(inventory: Inventory, phase: Phase) -> Iterator[Fault]:
    """Deployments on none of the phase's hosts; those with the same hosts in one fault."""
    alike: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
    for index, name in enumerate(phase.deployments):
        deployment = inventory.deployments.get(name)
        if deployment and not set(deployment.hosts) & set(phase.hosts):
            alike[deployment.hosts].append((index, name))
    for hosts, ((index, name), *others) in alike.items():
        also = "".join(f", nor does '{other}'" for _, other in others)
        said = f"'{name}' runs on none of the phase's hosts{also}; its own are "
        said += ", ".join(hosts[:5]) or "none"
        yield Fault(("phases", phase.name, "deployments", index), said)


def _empty(phase: Phase) -> Iterator[Fault]:
    """Roles without a host, all in one fault: they name the same group as a rule."""
    first, *others = [each.role for each in phase.placements if not each.hosts] or [""]
    if first:
        also = f", nor do those of {', '.join(others)}" if others else ""
        said = f"names no host of the phase{also}"
        yield Fault(("phases", phase.name, "roles", first, "hosts"), said)


def _gpus(inventory: Inventory, phase: Phase) -> Iterator[Fault]:
    for name, deployments in plan.deployments_by_host(inventory, phase).items():
        yield from _claims(inventory.hosts[name], deployments, phase)


def _packed(inventory: Inventory, phase: Phase, library: Library) -> Iterator[Fault]:
    """Deployments that ask for more instances than their hosts have room for."""
    layout = plan.layout(inventory, phase, library)
    for name in phase.deployments:
        deployment = inventory.deployments.get(name)
        if deployment is None or deployment.instances is None:
            continue
        here = ("deployments", name, "instances")
        if not deployment.gpus_per_instance:
            said = "instances are packed on GPUs: for the CPU, say instances_per_host"
            yield Fault(here, said, at_key=True)
        elif missing := layout.unplaced.get(name, 0):
            each = deployment.gpus_per_instance
            said = (
                f"{deployment.instances} instances of {each} GPU{'s' if each > 1 else ''}: "
                f"{deployment.instances - missing} fit on the free GPUs of its hosts "
                f"(phase {phase.name})"
            )
            yield Fault(here, said)


def _too_few(deployments: list[Deployment], phase: Phase) -> Iterator[Fault]:
    for deployment in deployments:
        each, count = deployment.gpus_per_instance, deployment.instances_per_host
        if deployment.gpus is not None and len(deployment.gpus) < each * count:
            named = f"{len(deployment.gpus)} GPU{'s' if len(deployment.gpus) != 1 else ''}"
            said = f"names {named}; {count} x {each} are needed (phase {phase.name})"
            yield Fault(("deployments", deployment.name, "gpus"), said)


def _claims(host: Host, deployments: list[Deployment], phase: Phase) -> Iterator[Fault]:
    owner: dict[int, str] = {}
    yield from _too_few(deployments, phase)
    for claim in plan.claims(deployments):
        here = ("deployments", claim.deployment)
        if -1 in claim.gpus:
            continue
        if beyond := [gpu for gpu in claim.gpus if gpu >= len(host.gpus)]:
            said = (
                f"instance {claim.instance} wants GPU {beyond[0]} of {host.name}, which has "
                f"{len(host.gpus) or 'none'} (phase {phase.name})"
            )
            yield Fault((*here, "gpus_per_instance"), said)
        for gpu in claim.gpus:
            first = owner.setdefault(gpu, claim.deployment)
            if first != claim.deployment:
                said = f"GPU {gpu} of {host.name} is claimed by '{first}' too (phase {phase.name})"
                yield Fault((*here, "gpus"), said)


def _slices(built: Plan) -> Iterator[Fault]:
    """Instances over several MIG slices, one fault for each deployment."""
    told = set()
    for instance in built.instances():
        own, name = instance.host.gpus, instance.deployment.name
        cut = [own[n].model for n in instance.gpus if 0 <= n < len(own) and own[n].mig]
        if cut and len(instance.gpus) > 1 and name not in told:
            told.add(name)
            said = (
                f"{len(instance.gpus)} GPUs for each instance, and {instance.host.name} has "
                f"{cut[0]} for them (phase {built.phase.name}): {capacity.ONE_SLICE}. Take "
                "gpus_per_instance: 1 with a larger slice or a smaller model, or whole GPUs"
            )
            yield Fault(("deployments", name, "gpus_per_instance"), said)


def _ports(built: Plan, library: Library) -> Iterator[Fault]:
    for host in built.hosts:
        listeners: dict[int, list[tuple[str, ...]]] = defaultdict(list)
        if host.connection == "ssh":
            listeners[host.port or addresses.SSH].append(("sshd",))
        for step in built.steps[host.name]:
            if step.instances:
                for instance in step.instances:
                    listeners[instance.port].append(("deployments", instance.deployment.name))
            else:
                for port in library.role(step.role).ports(step):
                    listeners[port].append(("phases", built.phase.name, "roles", step.role))
        for port, who in listeners.items():
            for keys in who[1:]:
                said = f"port {port} of {host.name} is taken by '{who[0][-1]}'"
                yield Fault((*keys, "port"), f"{said} (phase {built.phase.name})")
            if port > 65535:
                yield Fault((*who[0], "port"), f"{port} is past the last port, 65535")


def _roles(built: Plan, library: Library) -> Iterator[Fault]:
    for steps in built.steps.values():
        for step in steps:
            role = library.role(step.role)
            for option, message in role.check(step, built):
                yield Fault(_keys(built, step.instances, step.role, option), message)
            for option, message in role.warnings(step, built):
                keys = _keys(built, step.instances, step.role, option)
                yield Fault(keys, message, warning=True)


def _memory(built: Plan, inventory: Inventory) -> Iterator[Fault]:
    """Deployments that the GPUs of their hosts have no room for, or hardly."""
    for found in outlook.outlooks(built, inventory):
        each = found.judgement
        if each.verdict in ("fits", "unknown"):
            continue
        deployment = inventory.deployments[found.deployment]
        others = f" and {len(found.hosts) - 1} more" if len(found.hosts) > 1 else ""
        said = f"{each.verdict} on {found.gpu or 'the CPU'} of {found.hosts[0]}{others}"
        said += f" (phase {built.phase.name}): {each.reason}"
        said += f". Smallest change: {each.remedy}" if each.remedy else ""
        mild = each.verdict == "tight" or deployment.if_too_large == "warn"
        yield Fault(("deployments", found.deployment), said, at_key=True, warning=mild)


def _keys(built: Plan, instances: tuple[object, ...], role: str, option: str) -> tuple[str, ...]:
    """Where an option of a step stands: `NAME:option` is a deployment's, else the phase's."""
    name, separator, own = option.partition(":")
    if instances and separator and own in _OWN:
        return ("deployments", name, own)
    if instances and separator:
        return ("deployments", name, "options", own)
    return ("phases", built.phase.name, "roles", role, option)
