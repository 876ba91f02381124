"""Five hosts of the lab: a balancer, two gateways, and two with two simulated engines each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from inferfleet.lab import Lab, LabHost, rehearsal

NAMES = ("gpu-01", "gpu-02", "gw-01", "gw-02", "lb-01")
MODEL = "qwen2.5-coder"
GATEWAY = "inferfleet-gateway.service"
PORTS = (8000, 8001)
PRIVATE = 9400

# A storm is short: what takes minutes in production has to be noticed in seconds here.
QUICK = {
    "timeouts": {"connect": 1, "first_token": 30, "idle": 8, "whole": 60},
    "health": {"interval": 1, "timeout": 3, "failures": 2, "hung_after": 5},
}

TOLD = """
exec 3<>/dev/tcp/127.0.0.1/{port} || exit
printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3
timeout 5 cat <&3
"""
# Engines take faults from loopback alone, and may listen elsewhere.
FAULT = """
import http.client, json, sys
host, port, method, body = sys.argv[1:]
asked = http.client.HTTPConnection(host, int(port), timeout=5, source_address=("127.0.0.1", 0))
asked.request(method, "/simulator/faults", body, {"content-type": "application/json"})
sys.exit(asked.getresponse().status != 200)
"""
USED = """
for pid in $(pgrep -f '[i]nferfleet.gateway.*--worker'); do
    echo $pid $(ls /proc/$pid/fd | wc -l) $(awk '/^VmRSS/ {print $2}' /proc/$pid/status)
done
"""


@dataclass(eq=False)
class Engine:
    """One simulator; `ills` are what it suffers from."""

    host: LabHost
    port: int
    ills: set[str] = field(default_factory=set)

    @property
    def unit(self) -> str:
        return f"inferfleet-coder-{PORTS.index(self.port)}.service"

    @property
    def name(self) -> str:
        return f"coder-{PORTS.index(self.port)}@{self.host.name}"

    def fault(self, name: str) -> None:
        """Have it meet all requests so; an empty name ends that."""
        method, body = ("POST", json.dumps({"fault": name})) if name else ("DELETE", "")
        said(self.host, ["python3", "-c", FAULT, self.host.address, str(self.port), method, body])


@dataclass(frozen=True)
class Used:
    """What a worker has in use."""

    pid: int
    descriptors: int
    resident: int  # MB


@dataclass(eq=False)
class Site:
    """The provisioned lab."""

    lab: Lab
    inventory: Path
    engines: list[Engine] = field(default_factory=list)

    @property
    def gateways(self) -> list[LabHost]:
        return [self.lab.hosts[name] for name in ("gw-01", "gw-02")]

    @property
    def door(self) -> str:
        return f"https://{self.lab.hosts['lb-01'].address}"

    @property
    def certificate(self) -> Path:
        return self.inventory / "secrets/tls.crt"

    @property
    def key(self) -> str:
        return (self.inventory / "secrets/web.key").read_text().strip()


def provisioned(lab: Lab, folder: Path, wheels: Path, settings: dict[str, Any]) -> Site:
    """The production phase on the lab's hosts; `settings` are of the gateways."""
    inventory = rehearsal.project(lab, folder, wheels)
    phase = inventory / "phases/production.yml"
    line = "        hosts: [gateways]\n"
    before, found, after = phase.read_text().partition(line)
    more = "".join(f"        {key}: {json.dumps(value)}\n" for key, value in settings.items())
    phase.write_text(before + found + more + after)
    argv = ["provision", "--phase", "production", "--rehearse", "--yes"]
    command = [sys.executable, "-m", "inferfleet", *argv, "--inventory", str(inventory)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stdout + ran.stderr)
    engines = [Engine(lab.hosts[name], port) for name in ("gpu-01", "gpu-02") for port in PORTS]
    return Site(lab, inventory, engines)


def said(host: LabHost, command: str | list[str]) -> str:
    """What a command on a host prints. Raises RuntimeError with its complaint."""
    ran = host.exec(command)
    if ran.returncode:
        raise RuntimeError(f"{host.name}: {ran.stderr or ran.stdout}")
    return ran.stdout


def told(gateway: LabHost, path: str) -> tuple[int, str]:
    """Status and body of a page of the first worker's private side; 0 when it is not there."""
    ran = gateway.exec(["bash", "-c", TOLD.format(port=PRIVATE, path=path)])
    head, _, body = ran.stdout.partition("\n\n")  # text: \r is gone
    return (int(head.split()[1]), body) if head.startswith("HTTP/") else (0, "")


def well(gateway: LabHost) -> set[str]:
    """The instances that a gateway asks, and holds nothing against."""
    status, body = told(gateway, "/status")
    if status != 200:
        return set()
    states = [each for pool in json.loads(body)["pools"].values() for each in pool]
    return {each["name"] for each in states if each["usable"] and not each["failures"]}


def busy(gateway: LabHost) -> int:
    """Requests under way, by the worker's count and by that of its instances."""
    status, body = told(gateway, "/status")
    if status != 200:
        return -1
    found = json.loads(body)
    states = [each for pool in found["pools"].values() for each in pool]
    return int(found["outstanding"]) + sum(each["outstanding"] for each in states)


def workers(gateway: LabHost) -> list[int]:
    """The pids of those that serve, on their host."""
    text = said(gateway, "cat /run/inferfleet-gateway/workers.json")
    return list(yaml.safe_load(text)["workers"])


def used(gateway: LabHost) -> list[Used]:
    """What the workers use, those that drain too."""
    rows = [line.split() for line in said(gateway, USED).splitlines()]
    return [Used(int(p), int(fd), int(kib) // 1024) for p, fd, kib in rows]


def wait(check: Any, what: str, seconds: float) -> float:
    """Wait for a condition; the seconds it took. Raises TimeoutError."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"in vain for {seconds:g} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - began
