"""Who a process is: name, owner, age, parent, and the unit or container it belongs to."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from pathlib import Path
from typing import Any

PROC = Path("/proc")
ENVIRONMENT = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
_CONTAINER = re.compile(r"(?:docker[-/]|libpod-|crio-|cri-containerd-)([0-9a-f]{64})")


def run(*argv: str, timeout: float = 10) -> str:
    """What a command prints. OSError or SubprocessError when it is missing, fails or hangs."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        timeout=timeout,
        check=True,
    )
    return done.stdout.decode("utf-8", "replace")


def quietly(*argv: str, timeout: float = 10) -> str:
    """What a command prints; empty when it is missing, fails or hangs."""
    try:
        return run(*argv, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def process(pid: int) -> dict[str, Any]:
    """All there is to say about a process; of one that is gone, only its number."""
    folder = PROC / str(pid)
    try:
        uid = folder.stat().st_uid
    except OSError:
        return {"pid": pid}
    stat = _read(folder / "stat").rpartition(")")[2].split()
    parent = int(stat[1]) if len(stat) > 1 else 0
    command = _read(folder / "cmdline").replace("\0", " ").strip()
    unit, container = place(_read(folder / "cgroup"))
    return {
        "pid": pid,
        "name": _read(folder / "comm").strip(),
        "command": command[:300],
        "user": _user(uid),
        "age": _age(stat),
        "parent": parent,
        "parent_name": _read(PROC / str(parent) / "comm").strip() if parent else "",
        "unit": unit,
        "container": container,
    }


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _age(stat: list[str]) -> float | None:
    """Seconds since the process started; field 22 of proc(5)'s stat counts from boot."""
    uptime = _read(PROC / "uptime").split()
    if len(stat) < 20 or not uptime:
        return None
    return max(0.0, round(float(uptime[0]) - int(stat[19]) / os.sysconf("SC_CLK_TCK"), 1))


def place(cgroup: str) -> tuple[str, str]:
    """(systemd service, container id) that a process's /proc/PID/cgroup tells, "" for none."""
    container = _CONTAINER.search(cgroup)
    services = re.findall(r"/([^/\n]+\.service)(?=[/\n]|$)", cgroup)
    own = [name for name in services if not name.startswith("user@")]
    return own[-1] if own else "", container.group(1) if container else ""
