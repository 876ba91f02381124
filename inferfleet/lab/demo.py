"""`inferfleet demo`: the main job on three hosts made for it, from pilot to production.

On Debian or Ubuntu, as root, they are real hosts: systemd, sshd, nginx. Elsewhere they are folders
behind an SSH server in this process, and what that leaves out is said.
"""

from __future__ import annotations

import getpass
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from inferfleet import report
from inferfleet.errors import Error
from inferfleet.lab import Lab, fleet, install_requirements, requirements
from inferfleet.lab.folders import FolderHosts
from inferfleet.lab.rehearsal import project as lab_project
from inferfleet.project import Project

NAME = "demo"
HOSTS = 3
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
        inventory = lab_project(lab, fleet.place(NAME))
        _provision(inventory)
        host = lab.hosts["gpu-02"]
        _say("Somebody edits a unit and stops an engine by hand, on gpu-02.")
        host.exec(f"sed -i 's/--token-rate 50/--token-rate 5/' {DRIFT}")
        host.exec("systemctl stop inferfleet-coder-1.service")
        _repair(inventory)
        _say("Prove it: units, ports, keys, real tokens, streams.")
        _inferfleet(inventory, "verify", "--phase", "production", "--rehearse")
        _say("A developer's request, streamed through the balancer's TLS:")
        settings = Project(inventory).inventory.phases["production"].placements[0].settings
        key = Project(inventory).secrets.resolve(settings["api_keys"]["platform"])
        balancer = lab.hosts["lb-01"].address
        _stream(f"https://{balancer}/v1", key, inventory / "secrets" / "tls.crt")


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
        _provision(inventory)
        root = folders.hosts["gpu-02"].root
        _say("Somebody edits a unit by hand, on gpu-02.")
        unit = root / DRIFT.lstrip("/")
        unit.write_text(unit.read_text().replace("--token-rate 50", "--token-rate 5"))
        _repair(inventory)
        _say("The simulator that was pushed to gpu-02, asked directly:")
        _ask_pushed(Project(inventory), root)


def _provision(inventory: Path) -> None:
    _say("Is the inventory right?")
    _inferfleet(inventory, "check")
    _say("The pilot: one server, an engine on loopback, nginx with TLS and keys before it.")
    _inferfleet(inventory, "provision", "--phase", "pilot", "--rehearse", "--yes")
    _say("Production: two servers with two engines each, and a balancer.")
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
            _stream(f"http://{address}/v1", key, None)
        finally:
            engine.terminate()


def _stream(base: str, key: str, authority: Path | None) -> None:
    """Ask for a chat completion and print each token as it comes."""
    url = urlsplit(base)
    if authority:
        trusted = ssl.create_default_context(cafile=str(authority))
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            url.netloc, timeout=30, context=trusted
        )
    else:
        connection = http.client.HTTPConnection(url.netloc, timeout=30)
    body = {
        "model": "qwen2.5-coder",
        "messages": [{"role": "user", "content": "Write a haiku about GPUs."}],
        "max_tokens": 40,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise Error(f"{base} answered {answer.status}: {answer.read()[:300]!r}")
    print("  ", end="")
    for line in answer:
        if line.startswith(b"data: {"):
            delta = json.loads(line[6:])["choices"][0]["delta"]
            print(delta.get("content") or "", end="", flush=True)
    print()
    connection.close()
