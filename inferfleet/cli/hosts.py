"""Tasks that reach hosts: plan, doctor, provision, verify, discover, trust."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from inferfleet.cli.command import (
    FINE,
    INTERRUPTED,
    INVENTORY,
    JSON,
    LIMIT,
    PHASE,
    PROBLEMS,
    REHEARSE,
    USAGE,
    agreed,
    command,
    warn,
)
from inferfleet.cli.command import project as open_project
from inferfleet.errors import UsageError

if TYPE_CHECKING:
    from inferfleet.fleet import Fleet


@command(
    phase=PHASE,
    inventory=INVENTORY,
    limit=LIMIT,
    rehearse=REHEARSE,
    detailed_exitcode="2 when changes wait, 0 when none do",
    json=JSON,
)
def plan(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    detailed_exitcode: bool = False,
    json: bool = False,
) -> int:
    """What would change on the hosts, as a diff. Changes nothing."""
    from inferfleet import fleet, report
    from inferfleet.cutover import showing
    from inferfleet.secrets import Tolerant

    project = open_project(inventory)
    wanted = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(wanted, limit)
    warn(project, quiet=json)
    lines, capacity = fleet.expected(project, wanted)
    with fleet.survey(project, wanted, hosts, Tolerant(project.secrets)) as found:
        by_hand = _by_hand(found)
        if json:
            report.as_json({**_differences(found), **capacity, "by_hand": by_hand})
        else:
            found.show(lines=True)
            lines += showing.reminders(by_hand)
            print(*lines, sep="\n", end="\n" if lines else "")
        if found.results or any(host.diff.refused for host in found.surveyed):
            return PROBLEMS
        return USAGE if detailed_exitcode and found.waiting else FINE


def _by_hand(found: Fleet) -> dict[str, Any]:
    """Weights that were set by hand at gateways, by host and model."""
    from inferfleet import cutover

    names = {site.host.name for site in cutover.sites(found.plan, found.plan.hosts)}
    said = {h.name: cutover.by_hand(h.way) for h in found.surveyed if h.name in names}
    return {host: models for host, models in said.items() if models}


def _differences(found: Fleet) -> dict[str, Any]:
    hosts = {host.name: asdict(host.diff) for host in found.surveyed}
    failed = {result.host: result.error for result in found.results}
    refused = any(host.diff.refused for host in found.surveyed)
    return {"ok": not failed and not refused, "hosts": hosts, "failed": failed}


@command(
    phase=PHASE,
    inventory=INVENTORY,
    limit=LIMIT,
    rehearse=REHEARSE,
    json=JSON,
)
def doctor(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Hold the plan against what the hosts really are. Changes nothing."""
    from inferfleet.facts import reporting
    from inferfleet.facts.doctor import diagnose, failing

    project = open_project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(plan, limit)
    findings = diagnose(project, plan, hosts)
    reporting.show(findings, len(hosts), as_json=json)
    return PROBLEMS if failing(findings) else FINE


@command(
    phase=PHASE,
    inventory=INVENTORY,
    limit=LIMIT,
    rehearse=REHEARSE,
    yes="do not ask",
    skip_doctor="push even where the hosts do not fit the plan",
    json=JSON + "; needs --yes",
)
def provision(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    yes: bool = False,
    skip_doctor: bool = False,
    json: bool = False,
) -> int:
    """Bring the hosts to what the inventory says: shows the plan, asks, pushes, sums up."""
    from inferfleet import fleet, report

    if json and not yes:
        raise UsageError("--json cannot ask: add --yes")
    project = open_project(inventory)
    wanted = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(wanted, limit)
    warn(project, quiet=json)
    lines, capacity = fleet.expected(project, wanted)
    ask = None if json or not sys.stdin.isatty() else _password
    with fleet.survey(project, wanted, hosts, project.secrets, ask) as found:
        found.refuse()
        if not skip_doctor:
            found.examine()
        if not json:
            _show(found, lines, diffs=not yes)
        if found.waiting and not (yes or agreed("Make these changes?")):
            print("nothing was changed.")
            return PROBLEMS
        found.push(f"provision {phase}", quiet=json)
    for warning in project.secrets.warnings:
        print(warning, file=sys.stderr)
    if json:
        report.as_json({**_outcome(found), **capacity})
    elif any(result.status != "unchanged" for result in found.results):
        report.show_results(report.console(), found.results)
    if found.interrupted:
        return INTERRUPTED
    return PROBLEMS if any(result.status == "failed" for result in found.results) else FINE


def _password(hosts: Sequence[str]) -> str:
    """sudo's password for hosts, as somebody types it unseen; "" without an answer."""
    more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
    try:
        return getpass.getpass(f"sudo password for {', '.join(hosts[:3])}{more}: ")
    except EOFError:
        return ""


def _show(found: Fleet, lines: list[str], *, diffs: bool) -> None:
    """The plan before it is carried out; failures are left to the summary that follows."""
    from inferfleet.facts import reporting

    found.show(lines=diffs, failures=False)
    print(*lines, sep="\n", end="\n" if lines else "")
    reporting.show_lines(found.findings, stderr=True)


def _outcome(found: Fleet) -> dict[str, Any]:
    from inferfleet.facts import reporting

    hosts = {result.host: asdict(result) for result in found.results}
    failed = any(result.status == "failed" for result in found.results)
    return {**reporting.contract(found.findings), "ok": not failed, "hosts": hosts}


@command(
    phase=PHASE,
    inventory=INVENTORY,
    limit=LIMIT,
    rehearse=REHEARSE,
    junit="where to write the JUnit report (default: build/verify-<phase>.xml)",
    disruptive="also restart every unit and prove that it comes back; cuts running requests",
    json=JSON,
)
def verify(
    _: Context,
    phase: str = "",
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    junit: str = "",
    disruptive: bool = False,
    json: bool = False,
) -> int:
    """Prove that the hosts do what they should: units, ports, keys, real tokens, streams."""
    from inferfleet import verify as verifying

    project = open_project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    hosts = project.chosen(plan, limit)
    report = Path(junit) if junit else Path("build") / f"verify-{plan.phase.name}.xml"
    return verifying.run(project, plan, hosts, report, disruptive=disruptive, as_json=json)


@command(
    host="which hosts: names, groups, globs, with commas between (default: all)",
    local="this machine; no inventory is needed",
    write="set gpus, ram_gib and disk_gib of each host in the inventory's own file",
    inventory=INVENTORY,
    json=JSON,
)
def discover(
    _: Context,
    host: str = "",
    local: bool = False,
    write: bool = False,
    inventory: str = "inventory",
    json: bool = False,
) -> int:
    """What hosts are: GPUs and what runs on them, memory, disks, software, ports."""
    from inferfleet.facts import reporting

    if local and (host or write):
        raise UsageError("--local is this machine alone, and needs no inventory to look at or edit")
    if local:
        return reporting.discover_local(as_json=json)
    return reporting.discover(open_project(inventory), host, write=write, as_json=json)


@command(
    host="the host, by its inventory name",
    replace="replace a key that is known already, knowingly",
    yes="do not ask: the fingerprint was compared by other means",
    inventory=INVENTORY,
)
def trust(
    _: Context,
    host: str,
    replace: bool = False,
    yes: bool = False,
    inventory: str = "inventory",
) -> int:
    """Show a host's key fingerprint and record it in inventory/known_hosts."""
    from inferfleet import transport
    from inferfleet.yamlbuild import did_you_mean

    project = open_project(inventory)
    hosts = project.inventory.hosts
    if host.startswith("-"):
        raise UsageError("say the host first: inferfleet trust HOST [--replace] [--yes]")
    if host not in hosts:
        raise UsageError(f"there is no host '{host}'{did_you_mean(host, hosts)}")
    keys = transport.fingerprint(hosts[host], project.options())
    for key in keys:
        print(f"{host}: {key.fingerprint} ({key.type})")
    if not yes:
        print("Compare with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on its console.")
    if not yes and not agreed("Record it?"):
        print("nothing was recorded.")
        return PROBLEMS
    path = project.known_hosts
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(transport.trust(known, keys, replace=replace), encoding="utf-8")
    print(f"{path}: {host} is trusted.")
    return FINE
