"""Docker, podman, NVIDIA's toolkit: versions, how GPUs get in, and which containers have some."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from inferfleet.facts.onhost.processes import quietly

_TOOLKIT = Path("/etc/nvidia-container-runtime/config.toml")
_CDI = ("/etc/cdi", "/var/run/cdi")


def containers() -> dict[str, Any]:
    """What `ContainerFacts` holds, under `containers`."""
    return {"containers": {**_docker(), **_podman(), **_toolkit()}}


def _docker() -> dict[str, Any]:
    info = _json(quietly("docker", "info", "--format", "{{json .}}"))
    if not info.get("ServerVersion"):
        client = _version(quietly("docker", "--version"))
        return {"docker": "", "docker_client": client}
    return {
        "docker": info["ServerVersion"],
        "docker_client": _version(quietly("docker", "--version")),
        "cgroup_driver": info.get("CgroupDriver", ""),
        "cgroup_version": str(info.get("CgroupVersion", "")),
        "runtimes": sorted(info.get("Runtimes") or ()),
        "default_runtime": info.get("DefaultRuntime", ""),
        "compose": quietly("docker", "compose", "version", "--short").strip(),
        "running": _running(),
    }


def _podman() -> dict[str, Any]:
    return {"podman": _version(quietly("podman", "--version"))}


def _toolkit() -> dict[str, Any]:
    try:
        mode = re.search(r'^\s*mode\s*=\s*"(.*?)"', _TOOLKIT.read_text("utf-8"), re.M)
    except OSError:
        mode = None
    specs = [str(p) for folder in _CDI for p in Path(folder).glob("nvidia*")]
    return {
        "toolkit": _version(quietly("nvidia-ctk", "--version")),
        "toolkit_mode": mode.group(1) if mode else "",
        "cdi_specs": sorted(specs),
        "device_links": Path("/dev/char/195:255").exists(),
    }


def _running() -> list[dict[str, Any]]:
    names = quietly("docker", "ps", "--quiet", "--no-trunc").split()
    found = json.loads(quietly("docker", "inspect", *names) or "[]") if names else []
    return [_container(one) for one in found]


def _container(one: dict[str, Any]) -> dict[str, Any]:
    config, own = one.get("HostConfig") or {}, one.get("Config") or {}
    labels = own.get("Labels") or {}
    return {
        "id": one.get("Id", ""),
        "name": one.get("Name", "").lstrip("/"),
        "image": own.get("Image", ""),
        "project": labels.get("com.docker.compose.project", ""),
        "gpu": _injection(config),
        "ports": _published((one.get("NetworkSettings") or {}).get("Ports") or {}),
    }


def _injection(config: dict[str, Any]) -> str:
    """How GPUs came in: "cdi", "hook" (the legacy prestart hook), "runtime", or "" for none."""
    for request in config.get("DeviceRequests") or ():
        if request.get("Driver") == "cdi":
            return "cdi"
        kinds = [kind for group in request.get("Capabilities") or () for kind in group]
        if request.get("Driver") == "nvidia" or "gpu" in kinds:
            return "hook"
    return "runtime" if config.get("Runtime") == "nvidia" else ""


def _published(ports: dict[str, Any]) -> list[list[Any]]:
    bound = (one for key, each in ports.items() if key.endswith("/tcp") for one in each or ())
    return [[one.get("HostIp", ""), int(one["HostPort"])] for one in bound if one.get("HostPort")]


def _version(text: str) -> str:
    found = re.search(r"\d+\.\d+[\w.+-]*", text)
    return found.group(0).rstrip(".,") if found else ""


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
