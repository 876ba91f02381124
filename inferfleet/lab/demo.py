"""`inferfleet demo`: the main job on three hosts made for it, from pilot to production.

On Debian or Ubuntu, as root, they are real hosts: systemd, sshd, nginx. Elsewhere they are folders
behind an SSH server in this process, and what that leaves out is said.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inferfleet import reach, report
from inferfleet.errors import Error
from inferfleet.lab import Lab, asking, fleet, install_requirements, requirements, wheels
from inferfleet.lab.folders import FolderHosts
from inferfleet.lab.rehearsal import project as lab_project
from inferfleet.project import Project

NAME = "demo"
HOSTS = 3
USER = "platform"  # of the example's production
DRIFT = "/etc/systemd/system/inferfleet-coder-0.service"


def run(*, keep: bool) -> int:
    """Show the main job; 0 when every step did what it says."""
    began = time.monotonic()
    if os.geteuid() == 0:
        install_requirements(print)
    missing = requirements()
    if missing:
        _say(f"Real hosts cannot run here: {'; '.join(missing)}.")
        _say("The hosts are folders instead. Left out: units that run, nginx, verify's proofs.")
        _in_folders()
    else:
        _on_real_hosts(keep=keep)
    _say(f"Done in {time.monotonic() - began:.0f} s.")
    return 0


def _on_real_hosts(*, keep: bool) -> None:
    with _lab(keep=keep) as lab:
        found = wheels.folder(print)
        inventory = lab_project(lab, fleet.place(NAME), found)
        _provision(inventory, "a gateway and a balancer" if found else "a balancer")
        host = lab.hosts["gpu-02"]
        _say("Somebody edits a unit and stops an engine by hand, on gpu-02.")
        host.exec(f"sed -i 's/--token-rate 50/--token-rate 5/' {DRIFT}")
        host.exec("systemctl stop inferfleet-coder-1.service")
        _repair(inventory)
        _say("Prove it: units, ports, keys, real tokens, streams.")
        _inferfleet(inventory, "verify", "--phase", "production", "--rehearse")
        _ask(Project(inventory), inventory / "secrets" / "tls.crt")


def _ask(project: Project, authority: Path) -> None:
    """As developers do, at the one address of production."""
    plan = project.plan("production", rehearse=True)
    front = reach.front(plan, project.library)
    assert front is not None  # production has a balancer
    url, key = reach.origin(front, plan, named=False), project.secrets.resolve(front.keys[USER])
    _say(f"A developer's request, streamed through the balancer's TLS ({url}/v1):")
    asking.openai(f"{url}{next(iter(front.paths.values()))}", key, authority)
    if front.gateway:
        _say("A program made for Ollama, at the same address, over the same engines (/api/chat):")
        asking.ollama(url, key, authority)


@contextmanager
def _lab(*, keep: bool) -> Iterator[Lab]:
    _say(f"{HOSTS} hosts boot on this machine (the first time, their system is made first).")
    lab = Lab.boot(fleet.names(HOSTS), name=NAME)
    try:
        yield lab
    finally:
        if keep:
            _say(f"The hosts stay up; `inferfleet lab --down --name {NAME}` ends them.")
        else:
            lab.down()


def _in_folders() -> None:
    folder = fleet.place(NAME)
    base = folder.with_name(f"{NAME}-hosts")
    shutil.rmtree(base, ignore_errors=True)
    with FolderHosts(base, fleet.names(HOSTS)) as folders:
        made = [
            fleet.Made(h.name, h.address, h.port, getpass.getuser(), "none", (h.fingerprint,))
            for h in folders.hosts.values()
        ]
        inventory = fleet.make(folder, made, folders.key)
        _provision(inventory, "a balancer")
        root = folders.hosts["gpu-02"].root
        _say("Somebody edits a unit by hand, on gpu-02.")
        unit = root / DRIFT.lstrip("/")
        unit.write_text(unit.read_text().replace("--token-rate 50", "--token-rate 5"))
        _repair(inventory)
        _say("The simulator that was pushed to gpu-02, asked directly:")
        _ask_pushed(Project(inventory), root)


def _provision(inventory: Path, before: str) -> None:
    _say("Is the inventory right?")
    _inferfleet(inventory, "check")
    _say("The pilot: one server, an engine on loopback, nginx with TLS and keys before it.")
    _inferfleet(inventory, "provision", "--phase", "pilot", "--rehearse", "--yes")
    _say(f"Production: two servers with two engines each, and {before} before them.")
    _inferfleet(inventory, "provision", "--phase", "production", "--rehearse", "--yes")
    _say("Once more: nothing to do.")
    _inferfleet(inventory, "provision", "--phase", "production", "--rehearse", "--yes")


def _repair(inventory: Path) -> None:
    _say("The plan shows it.")
    arguments = ("plan", "--phase", "production", "--rehearse", "--detailed-exitcode")
    _inferfleet(inventory, *arguments, expected=2)
    _say("Provisioning repairs it.")
    _inferfleet(inventory, "provision", "--phase", "production", "--rehearse", "--yes")


def _say(text: str) -> None:
    report.console().print(f"\n[bold]{text}[/]")


def _inferfleet(inventory: Path, *arguments: str, expected: int = 0) -> None:
    """Run the command as a user would, and show it."""
    line = [*arguments, "--inventory", str(inventory)]
    report.console().print(f"[dim]$ inferfleet {' '.join(line)}[/]")
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "inferfleet", *line], check=False).returncode
    if code != expected:
        raise Error(f"inferfleet {arguments[0]} ended with {code}, not {expected}")


def _ask_pushed(project: Project, root: Path) -> None:
    """Run the pushed program as its unit would, and ask it."""
    plan = project.plan("production", rehearse=True)
    instance = next(i for i in plan.instances() if i.host.name == "gpu-02")
    assert instance.deployment.api_key is not None  # the example gives every engine one
    key = project.secrets.resolve(instance.deployment.api_key)
    program = project.library.role("simulator").module.PROGRAM
    served = instance.deployment.model.served_name
    argv = [sys.executable, str(root / program.lstrip("/")), "--port", "0"]
    with subprocess.Popen(
        [*argv, "--served-model-name", served],
        env={"VLLM_API_KEY": key, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as engine:
        assert engine.stdout is not None
        try:
            address = engine.stdout.readline().split()[-1]
            asking.openai(f"http://{address}/v1", key, None)
        finally:
            engine.terminate()
