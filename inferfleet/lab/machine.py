"""What the lab asks of the machine it runs on, and the few things it does there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from inferfleet.errors import Error

TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "zstd": "zstd",
    "ip": "iproute2",
    "ssh-keygen": "openssh-client",
}
DISTRIBUTIONS = {"debian", "ubuntu"}
KERNEL = (5, 14)  # the first with cgroup.kill
INOTIFY_INSTANCES = 8192  # one host takes about six; the usual limit is 128 for a whole user


def requirements() -> list[str]:
    """Why the lab cannot run here, a sentence each; empty when it can."""
    if sys.platform != "linux":
        return ["the lab needs Linux"]
    reasons = []
    if os.geteuid() != 0:
        reasons.append("the lab needs root")
    elif not _may_mount():
        reasons.append("the lab needs the right to mount, which this container has not")
    if _cgroup2() is None:
        reasons.append("the lab needs cgroup2 mounted, at /sys/fs/cgroup/unified for instance")
    if _distribution() not in DISTRIBUTIONS:
        reasons.append("the lab needs Debian or Ubuntu")
    if _kernel() < KERNEL:
        reasons.append(f"the lab needs Linux {KERNEL[0]}.{KERNEL[1]} or newer")
    if missing := missing_tools():
        reasons.append(f"the lab needs {', '.join(missing)}")
    return reasons


def missing_tools() -> list[str]:
    """The programs that are not installed, in the order of `TOOLS`."""
    return [tool for tool in TOOLS if not shutil.which(tool)]


def install_requirements(say: Callable[[str], None]) -> None:
    """Install the packages that are missing. Raises Error unless root on Debian or Ubuntu."""
    packages = [TOOLS[tool] for tool in missing_tools()]
    if not packages:
        return
    if os.geteuid() != 0 or _distribution() not in DISTRIBUTIONS:
        raise Error(f"install these packages first: {' '.join(packages)}")
    say(f"installing {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command("apt-get", "-q", "update", env=environment)
    command("apt-get", "-q", "-y", "install", *packages, env=environment, lines=True)


def command(
    *argv: str, stdin: str = "", env: dict[str, str] | None = None, lines: bool = False
) -> str:
    """The output of a program of this machine. Raises Error with the end of its stderr.

    With `lines` its output is shown as it comes, and none is returned.
    """
    result = subprocess.run(
        argv,
        input=stdin,
        text=True,
        env=env,
        stdout=None if lines else subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    if result.returncode:
        tail = "\n".join(result.stderr.splitlines()[-8:])
        raise Error(f"{argv[0]} failed with exit status {result.returncode}:\n{tail}")
    return result.stdout or ""


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the file lock `path`, waiting for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mounts_under(folder: Path) -> list[str]:
    """Mount points at or below `folder`, the last mounted first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split(" ")[4] for line in lines]
    return [p for p in reversed(points) if Path(p).is_relative_to(folder)]


def cgroup_root() -> Path:
    """Where cgroup2 is mounted. Raises Error when it is not."""
    if (root := _cgroup2()) is None:
        raise Error("cgroup2 is not mounted")
    return root


def kill_cgroup(cgroup: Path, timeout: float = 10) -> None:
    """Kill all that runs in `cgroup` and below, and remove it; fine when it is not there."""
    if not cgroup.is_dir():
        return
    deadline = time.monotonic() + timeout
    (cgroup / "cgroup.kill").write_text("1")
    while not wait_empty(cgroup, 1):
        if time.monotonic() > deadline:
            raise Error(f"{cgroup} still holds processes {timeout:g} s after they were killed")
        (cgroup / "cgroup.kill").write_text("1")  # one may have been on its way in
    for folder, _, _ in os.walk(cgroup, topdown=False):
        Path(folder).rmdir()


def wait_empty(cgroup: Path, timeout: float) -> bool:
    """Whether no process is left in `cgroup` within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    with (cgroup / "cgroup.events").open() as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
            events.seek(0)
    return True


def raise_inotify_limit() -> None:
    """Let more than some twenty hosts watch files; the limit stays raised until the next boot."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < INOTIFY_INSTANCES:
        limit.write_text(str(INOTIFY_INSTANCES))


def _cgroup2() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split(" ")[4])
    return None


def _may_mount() -> bool:
    argv = ["unshare", "--mount", "true"]
    return subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["ID"]
    except OSError:
        return ""


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))
