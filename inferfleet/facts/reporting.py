"""What `doctor` and `discover` print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from inferfleet import inventory, push, report
from inferfleet.errors import Error, HostError, UsageError
from inferfleet.facts import discover as discovery
from inferfleet.facts.ask import collect
from inferfleet.facts.doctor import failing
from inferfleet.facts.document import Facts
from inferfleet.model import Finding, Host
from inferfleet.project import Project
from inferfleet.transport import Options

_COLOURS = {"error": "bold red", "warning": "yellow"}


def show(findings: Sequence[Finding], hosts: int, *, as_json: bool) -> None:
    """One line per finding and a sum, or the contract: `{"ok", "failures", "warnings"}`."""
    if as_json:
        report.as_json(contract(findings))
        return
    show_lines(findings, stderr=False)
    errors = len(failing(findings))
    warnings = len(findings) - errors
    said = f"{report.counted(errors, 'error')}, {report.counted(warnings, 'warning')}"
    print(f"{report.counted(hosts, 'host')}: {said if findings else 'nothing found'}.")


def contract(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for programs; `ok` is whether a push would go on."""
    failures = failing(findings)
    warnings = [asdict(one) for one in findings if one not in failures]
    return {"ok": not failures, "failures": list(map(asdict, failures)), "warnings": warnings}


def show_lines(findings: Sequence[Finding], *, stderr: bool) -> None:
    """One line per finding."""
    out = report.console(stderr=stderr)
    for one in findings:
        style = _COLOURS[one.severity]
        out.print(f"[bold]{one.host}[/]: [{style}]{one.severity}[/]: {escape(str(one))}")


def discover_local(*, as_json: bool) -> int:
    """The machine we are on, as whom we are."""
    return _shown({"local": _asked(Host("local", "127.0.0.1", connection="local"))}, as_json)


def _asked(host: Host) -> Facts | HostError:
    try:
        return collect(host, Options())
    except HostError as error:
        return error


def discover(project: Project, pattern: str, *, write: bool, as_json: bool) -> int:
    """The inventory's hosts that `pattern` names, or all; 1 when one could not be asked."""
    hosts = _chosen(project, pattern)
    options = project.options()
    answers = {
        host.name: answer for host, answer in push.each(hosts, lambda host: collect(host, options))
    }
    ordered = {host.name: answers[host.name] for host in hosts}
    code = _shown(ordered, as_json)
    return (_write(project, hosts, ordered, quiet=as_json) or code) if write else code


def _chosen(project: Project, pattern: str) -> list[Host]:
    known = project.inventory.hosts
    if not pattern:
        return list(known.values())
    patterns = [part.strip() for part in pattern.split(",") if part.strip()]
    names, empty = inventory.select(patterns, known, project.inventory.groups)
    if empty or not names:
        from inferfleet.yamlbuild import did_you_mean

        missing = (empty or patterns)[0]
        raise UsageError(f"there is no host '{missing}'{did_you_mean(missing, known)}")
    return [known[name] for name in names]


def _shown(answers: dict[str, Facts | HostError], as_json: bool) -> int:
    failed = {name: str(one) for name, one in answers.items() if isinstance(one, HostError)}
    found = {name: one for name, one in answers.items() if isinstance(one, Facts)}
    if as_json:
        hosts = {name: {**asdict(f), "entry": discovery.entry(f)} for name, f in found.items()}
        report.as_json({"ok": not failed, "hosts": hosts, "failed": failed})
    else:
        for facts in found.values():
            discovery.show(report.console(), facts)
        for error in failed.values():
            report.console(stderr=True).print(escape(error))
    return 1 if failed else 0


def _write(
    project: Project, hosts: Sequence[Host], answers: dict[str, Facts | HostError], *, quiet: bool
) -> int:
    out, code = report.console(stderr=quiet), 0
    for host in hosts:
        facts = answers[host.name]
        if not isinstance(facts, Facts):
            continue
        try:
            path, values = discovery.write(project.folder, host, facts)
        except Error as error:
            out.print(escape(str(error)))
            code = 1
            continue
        said = ", ".join(f"{key}: {value}" for key, value in values.items())
        out.print(escape(f"{path}: {host.name}: {said or 'right as it is'}"))
    return code
