"""What to expect of a plan, for people and for programs: a line each, or JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inferfleet.model import Plan
from inferfleet.outlook import Outlook
from inferfleet.report import counted


def line(found: Outlook, users: int) -> str:
    """One line for people: what fits, how many requests at once, next to the phase's users."""
    where = f" on {found.gpu}" if found.gpu else " on the CPU"
    each = found.judgement
    head = f"{found.deployment}: {counted(found.instances, 'instance')}{where}"
    if each.verdict == "unknown":
        return f"{head}; memory not predicted: {each.reason}"
    if each.verdict in ("does not fit", "impossible"):
        return f"{head}: {each.verdict}: {each.reason}"
    low, high = (found.instances * bound for bound in each.spread)
    around = f" (between {low} and {high})" if low != high else ""
    said = (
        f"{head}, expected to carry {counted(found.requests, 'request')} "
        f"of {each.context} tokens at once{around}; the phase is for {counted(users, 'user')}"
    )
    return said + (f"; {each.verdict}: {each.reason}" if each.reason else "")


def details(found: Outlook, users: int) -> dict[str, Any]:
    """The same for programs."""
    each = found.judgement
    return {
        "deployment": found.deployment, "gpu": found.gpu, "hosts": list(found.hosts),
        "instances": found.instances, "verdict": each.verdict, "reason": each.reason,
        "remedy": each.remedy, "requests": found.requests, "context": each.context,
        "requests_per_instance": each.requests, "range_per_instance": list(each.spread),
        "kv_tokens": each.kv_tokens, "rough": each.rough, "users": users,
    }  # fmt: skip


def placed(plan: Plan) -> Iterator[str]:
    """Where the planner put the deployments whose instances it packs, a line each."""
    where: dict[str, dict[str, list[str]]] = {}
    for instance in plan.instances():
        if instance.deployment.instances is not None:
            hosts = where.setdefault(instance.deployment.name, {})
            gpus = ",".join(map(str, instance.gpus))
            hosts.setdefault(instance.host.name, []).append(gpus)
    for name, hosts in where.items():
        said = "; ".join(f"{host} GPUs {' | '.join(groups)}" for host, groups in hosts.items())
        yield f"{name} placed: {said}"
