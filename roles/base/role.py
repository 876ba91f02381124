"""What is below everything else on a host: users, folders, kernel settings, limits, the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inferfleet.builders import packages, system_user
from inferfleet.model import Artefact, Ensure, Finding, Plan, Render, Step, sh

KIND = "service"
ORDER = 10  # before drivers, Docker and engines
REHEARSABLE = False  # kernel and clock belong to the machine that a rehearsal runs on
SYSCTL = "/etc/sysctl.d/60-inferfleet.conf"
LIMITS = "/etc/systemd/system/inferfleet-.service.d/50-limits.conf"  # all units of that prefix
OLDEST_PYTHON = (3, 8)
CHRONY = "chrony.service"
TIMESYNCD = "systemd-timesyncd.service"
SERVERS = {
    "systemd-timesyncd": ("/etc/systemd/timesyncd.conf.d/50-inferfleet.conf", TIMESYNCD),
    "chrony": ("/etc/chrony/sources.d/inferfleet.sources", CHRONY),
}

_KEPT = (
    "for unit in systemd-timesyncd chrony chronyd ntp ntpsec ntpd openntpd; do "
    "! systemctl is-active -q $unit || exit 0; done; exit 1"
)
_INSTALLED = """\
set -e
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  set -- apt-get install -y --no-install-recommends {debian}
  "$@" || {{ apt-get update && "$@"; }}
else
  dnf install -y chrony
fi
for unit in {units}; do
  ! systemctl cat $unit >/dev/null 2>&1 || exec systemctl enable -q --now $unit
done
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Packages, users and folders first; then files, and what makes them hold."""
    settings = step.settings
    for name in settings["packages"]:
        yield packages(f"package {name} is installed", _has(name), [name])
    for name in settings["users"]:
        yield system_user(name)
    for path, wanted in sorted(settings["directories"].items()):
        yield _directory(path, wanted.get("owner", "root"), wanted.get("mode", "0755"))
    yield render(
        LIMITS,
        "limits.conf.j2",
        open_files=settings["open_files"],
        locked_memory=settings["locked_memory"],
    )
    if settings["sysctl"]:
        yield render(SYSCTL, "sysctl.conf.j2", settings=sorted(settings["sysctl"].items()))
        yield _applied(settings["sysctl"])
    yield from _clock(step, render)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Servers belong to a service that can be told of them."""
    if step.settings["time_servers"] and step.settings["time_service"] not in SERVERS:
        named = " or ".join(SERVERS)
        yield "time_servers", f"say which service is to ask them: time_service: {named}"


def preflight(step: Step, plan: Plan, facts: Any) -> Iterator[Finding]:
    """The host is one that our roles know how to treat."""
    if facts.folder:
        return
    host = step.host.name
    version = tuple(int(n) for n in facts.python.split(".")[:2] if n.isdigit())
    if version and version < OLDEST_PYTHON:
        yield Finding(
            host,
            "python",
            "error",
            f"its python3 is {facts.python}",
            "changes are made by a program that needs 3.8 or newer",
            "install a newer python3",
        )
    if facts.machine and facts.machine not in ("x86_64", "aarch64"):
        yield Finding(
            host,
            "machine",
            "warning",
            f"its processor is {facts.machine}",
            "engines are published for x86_64 and aarch64",
            "build the engine yourself, or use another host",
        )
    root = facts.disk_of("/")
    if root and root.free < step.settings["free_gib"] * 2**30:
        yield Finding(
            host,
            "disk",
            "error",
            f"/ has {root.free / 2**30:.1f} GiB free, {step.settings['free_gib']:g} are wanted",
            "packages and images would fill it, and half-installed ones are hard to mend",
            "make room there, or lower the role's free_gib",
        )


def _has(name: str) -> str:
    asked = sh("dpkg-query", "-W", "-f", "${Status}", name)
    return (
        f"{asked} 2>/dev/null | grep -q 'ok installed' || {sh('rpm', '-q', name)} >/dev/null 2>&1"
    )


def _directory(path: str, owner: str, mode: str) -> Ensure:
    wanted = f"{owner} {int(mode, 8):o} directory"
    return Ensure(
        f"{path} belongs to {owner}, with mode {mode}",
        test=f"[ \"$(stat -c '%U %a %F' {sh(path)} 2>/dev/null)\" = {sh(wanted)} ]",
        run=sh("install", "-d", "-m", mode, "-o", owner, path),
        before=True,
    )


def _applied(settings: dict[str, Any]) -> Ensure:
    """Settings hold now; those a container may not write are its machine's affair."""
    tests = []
    for name, value in sorted(settings.items()):
        path = "/proc/sys/" + name.replace(".", "/")
        shown = f"$(tr -s '[:space:]' ' ' <{sh(path)})"
        tests.append(f'{{ [ ! -w {sh(path)} ] || [ "{shown}" = {sh(f"{value} ")} ]; }}')
    return Ensure("kernel settings hold", " && ".join(tests), f"sysctl -q -p {SYSCTL} || :", 30)


def _clock(step: Step, render: Render) -> Iterator[Artefact | Ensure]:
    """A service keeps the clock; a container has that of its machine."""
    service, servers = step.settings["time_service"], step.settings["time_servers"]
    if service == "none":
        return
    debian = "chrony" if service == "chrony" else "systemd-timesyncd"
    units = {"any": "systemd-timesyncd chronyd", "chrony": "chrony chronyd"}.get(service, service)
    kept = _KEPT if service == "any" else f"systemctl is-active -q {units}"
    if servers:
        path, unit = SERVERS[service]
        yield render(path, f"{service}.j2", restarts=(unit,), servers=servers)
    yield Ensure(
        "a time service runs" if service == "any" else f"{service} keeps the clock",
        test=f"systemd-detect-virt -q --container || ( {kept} )",
        run=_INSTALLED.format(debian=debian, units=units),
        timeout=600,
    )
