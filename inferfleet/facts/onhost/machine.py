"""The machine: processor, memory, file systems, clock, rights, what is stored where."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from inferfleet.facts.onhost.processes import quietly

_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "overlay", "tmpfs"}
_SHARES = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "fuse.glusterfs"}
_TIME_ERROR = 5
_NOT_FOR_DATA = ("/proc", "/sys", "/dev", "/run", "/snap", "/boot", "/var/lib/docker/overlay2")


def system() -> dict[str, Any]:
    """Operating system, kernel, processor, python3 and its rights."""
    release = dict(re.findall(r'^([A-Z_]+)="?(.*?)"?$', _read("/etc/os-release"), re.M))
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.M)
    return {
        "os": release.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu": model.group(1) if model else "",
        "cpus": len(os.sched_getaffinity(0)),
        "uid": os.geteuid(),
        "sudo": os.geteuid() == 0 or bool(quietly("sudo", "-n", "sh", "-c", "echo yes")),
        "folder": os.environ.get("INFERFLEET_ROOT", ""),
    }


def memory() -> dict[str, Any]:
    """RAM in bytes; `ram_available` is what can be had without swapping."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M))
    return {
        "ram_total": int(found["MemTotal"]) << 10,
        "ram_available": int(found.get("MemAvailable", 0)) << 10,
    }


def disks() -> dict[str, Any]:
    """File systems that may hold data, in bytes; `free` is what a program may still write."""
    found = {}
    for line in _read("/proc/self/mounts").splitlines():
        device, mount, kind = line.split()[:3]
        mount = mount.replace("\\040", " ")
        if kind in _DISKS | _SHARES and not mount.startswith(_NOT_FOR_DATA):
            found[mount] = (device, kind)
    if not any(mount == "/" for mount in found):
        found["/"] = ("", "")
    return {"disks": [one for m, (d, k) in found.items() if (one := _disk(m, d, k))]}


def _disk(mount: str, device: str, kind: str) -> dict[str, Any] | None:
    try:
        stat = os.statvfs(mount)
    except OSError:  # a share whose server is gone
        return None
    return {
        "mount": mount,
        "device": device,
        "kind": kind,
        "total": stat.f_blocks * stat.f_frsize,
        "free": stat.f_bavail * stat.f_frsize,
        "read_only": bool(stat.f_flag & os.ST_RDONLY),
    }


def clock() -> dict[str, Any]:
    """Whether anything keeps the clock, as adjtimex(2) tells when it is asked to change nothing."""
    import ctypes

    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return {"synchronized": None if state < 0 else state != _TIME_ERROR}


def sizes(wanted: dict[str, list[str]]) -> dict[str, Any]:
    """Bytes that lie below each name's paths."""
    return {"sizes": {name: sum(map(_below, paths)) for name, paths in wanted.items()}}


def _below(folder: str) -> int:
    seen = set()
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(here, name))
            except OSError:  # it went away meanwhile
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_blocks * 512
    return total


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
