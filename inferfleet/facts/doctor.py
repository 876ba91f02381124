"""A plan held against what its hosts really are. `examine` is pure; the rest asks the hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from inferfleet import push
from inferfleet.errors import HostError
from inferfleet.facts import gpu_checks, host_checks, weights
from inferfleet.facts.ask import Request, collect, collect_over
from inferfleet.facts.case import Case
from inferfleet.facts.document import Facts
from inferfleet.model import Bundle, Finding, Host, Instance, Plan, Step
from inferfleet.modelpath import ROLE, cached, fetches
from inferfleet.outlook import prediction
from inferfleet.project import Project
from inferfleet.push import Surveyed
from inferfleet.roles import Library

HUB, OLLAMA, DOCKER = "huggingface.co", "registry.ollama.ai", "registry-1.docker.io"
CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    host_checks.rights,
    gpu_checks.present,
    gpu_checks.driver,
    gpu_checks.capability,
    gpu_checks.orphans,
    gpu_checks.memory,
    gpu_checks.fits,
    gpu_checks.health,
    host_checks.ports,
    host_checks.docker,
    host_checks.reload_guard,
    host_checks.disk,
    host_checks.size,
    host_checks.clock,
    host_checks.network,
    host_checks.unseen,
)


def examine(
    plan: Plan,
    facts: Mapping[str, Facts],
    project: Project,
    units: Mapping[str, frozenset[str]],
) -> list[Finding]:
    """All that is wrong with the hosts in `facts`, in the plan's order, errors first.

    `units` are the systemd units that the plan runs, by host: their processes are our own.
    """
    found = []
    for host in plan.hosts:
        if host.name in facts:
            case = _case(plan, host, facts[host.name], project, units.get(host.name, frozenset()))
            own = [finding for check in CHECKS for finding in check(case)]
            for step in case.steps:
                own += project.library.role(step.role).preflight(step, plan, case.facts)
            found += sorted(own, key=lambda finding: finding.severity != "error")
    return found


def _case(plan: Plan, host: Host, facts: Facts, project: Project, units: frozenset[str]) -> Case:
    steps = plan.steps.get(host.name, ())
    ports = tuple(one for step in steps for one in _ports(step, project.library))
    instances = [instance for step in steps for instance in step.instances]
    expected = {i.name: prediction(i, project.inventory) for i in instances}
    predicted = {name: found for name, found in expected.items() if found}
    return Case(host, plan, facts, units, ports, predicted)


def _ports(step: Step, library: Library) -> Iterator[tuple[str, str, int]]:
    for instance in step.instances:
        yield instance.name, instance.listen, instance.port
    if not step.instances:
        for port in library.role(step.role).ports(step):
            yield step.role, "", port


def units_of(bundle: Bundle) -> frozenset[str]:
    """The units a host's bundle restarts or reloads."""
    return frozenset(unit for a in bundle.artefacts for unit in (*a.restarts, *a.reloads))


def request(plan: Plan, host: Host) -> Request:
    """What to ask of a host beyond its facts: models that lie there, places to download from."""
    if plan.rehearsal:
        return Request()
    sizes: dict[str, list[str]] = {}
    reach: dict[str, None] = {}
    for step in plan.steps.get(host.name, ()):
        if step.role == ROLE and fetches(step) and "directory" not in step.settings:
            reach[_endpoint(str(step.settings["endpoint"]))] = None
        for instance in step.instances:
            reach.update(dict.fromkeys(sources(step.role, instance, plan)))
            places = weights.places(step.role, instance, plan)
            sizes.setdefault(instance.deployment.model.repository, []).extend(places)
    return Request(tuple(reach), sizes)


def sources(role: str, instance: Instance, plan: Plan) -> Iterator[str]:
    """`name:port` of everything an instance itself fetches from."""
    options = instance.options
    environment = options.get("environment") or {}
    if options.get("runtime") == "docker":
        yield _registry(str(options.get("image", "")))
    if download := options.get("download"):
        yield _endpoint(str(download))
    downloads = weights.home(role, instance, plan) and not cached(instance, plan)
    if downloads and environment.get("HF_HUB_OFFLINE") != "1":
        hub = OLLAMA if role == "ollama" else environment.get("HF_ENDPOINT", HUB)
        yield _endpoint(str(hub))


def _registry(image: str) -> str:
    first, slash, _ = image.partition("/")
    named = slash and ("." in first or ":" in first or first == "localhost")
    return _endpoint(first if named and first != "docker.io" else DOCKER)


def _endpoint(url: str) -> str:
    """`name:port` of a URL, or of a bare name with or without a port."""
    parts = urlsplit(url if "//" in url else f"https://{url}")
    return f"{parts.hostname}:{parts.port or (80 if parts.scheme == 'http' else 443)}"


# Asking


def diagnose(project: Project, plan: Plan, hosts: Sequence[Host]) -> list[Finding]:
    """Ask each host over a connection of its own; one that cannot be asked is a finding too."""
    options = project.options()
    bundles = {bundle.host.name: bundle for bundle in project.bundles(plan, hosts)}
    units = {name: units_of(bundle) for name, bundle in bundles.items()}
    answers = push.each(hosts, lambda host: collect(host, options, request(plan, host)))
    return _findings(plan, ((h.name, found) for h, found in answers), project, units)


def diagnose_surveyed(project: Project, plan: Plan, surveyed: Iterable[Surveyed]) -> list[Finding]:
    """The same over connections that are open already, of hosts that would change.

    Hosts without python3 are left to the push, which says so, as are those that fall silent.
    """
    asked = [one for one in surveyed if one.diff and one.snapshot.python]
    units = {one.name: units_of(one.bundle) for one in asked}
    answers = push.each(asked, lambda s: collect_over(s.way, request(plan, s.bundle.host)))
    found = _findings(plan, ((s.name, found) for s, found in answers), project, units)
    return [replace(f, severity="warning") if f.check == "connection" else f for f in found]


def _findings(
    plan: Plan,
    answers: Iterable[tuple[str, Facts | HostError]],
    project: Project,
    units: Mapping[str, frozenset[str]],
) -> list[Finding]:
    facts, failed = {}, []
    for name, answer in answers:
        if isinstance(answer, HostError):
            failed.append(_silent(name, answer))
        else:
            facts[name] = answer
    return [*sorted(failed), *examine(plan, facts, project, units)]


def _silent(name: str, error: HostError) -> Finding:
    return Finding(
        name,
        "connection",
        "error",
        error.message,
        "nothing can be said about it, nor done there",
        "make it reachable, or leave it out with --limit",
    )


def failing(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that stop a push."""
    return [finding for finding in findings if finding.severity == "error"]
