"""GPUs of running containers, kept through a daemon-reload.

NVIDIA's hook lets a container at its GPUs behind systemd's back. At a daemon-reload systemd applies
its own list for the container's scope again, and the GPUs are gone until the container is started
anew (NVIDIA/nvidia-container-toolkit#48, #1227). So what is missing on that list is put there
before, and every container that saw its GPUs is asked again afterwards.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from shutil import which
from typing import TYPE_CHECKING, NamedTuple

from inferfleet.applier.commands import TEST_SECONDS, emit, run, tail
from inferfleet.applier.disk import Disk, Failed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCOPES = {"docker": "docker-{}.scope", "podman": "libpod-{}.scope"}
SHOWN = "{{.Id}} {{.Name}} {{.State.Pid}} {{.State.StartedAt}}"
LOOKS = (["nvidia-smi", "-L"], ["sh", "-c", 'for n in /dev/nvidia[0-9]*; do : <"$n" || exit; done'])
NO_COMMAND = (126, 127)
NODES = ("nvidia*", "nvidia-caps/*")


class Container(NamedTuple):
    """A running container with GPUs; `nodes` are their device nodes, as major and minor."""

    tool: str
    id: str
    name: str
    started: str
    nodes: frozenset[tuple[int, int]]

    @property
    def scope(self) -> str:
        return SCOPES[self.tool].format(self.id)


class Guard:
    """What is known of a host's GPU containers since just before it might reload its units."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.seeing: list[Container] | None = None

    def ready(self) -> None:
        """Make a daemon-reload harmless, once; Failed, before anything is done, when it is not."""
        if self.seeing is not None:
            return
        looked = [(container, sees(container)) for container in self.running()]
        for container, seen in looked:
            missing = self.missing(container) if seen is not False else set()
            if missing:
                self.keep(container, missing)
        self.seeing = [container for container, seen in looked if seen]

    def lost(self) -> str:
        """What to say of containers that saw their GPUs, still run, and see them no more."""
        before = self.seeing or []
        now = {(each.id, each.started) for each in self.running()} if before else set()
        lost = [each for each in before if (each.id, each.started) in now and not sees(each)]
        if not lost:
            return ""
        names = ", ".join(each.name for each in lost)
        again = "; ".join(f"{each.tool} restart {each.name}" for each in lost)
        return (
            f"after systemd reloaded its units, these containers have lost their GPUs: {names}. "
            f"Start them anew: {again}. With CDI device names they would have kept them"
        )

    def running(self) -> Iterator[Container]:
        """Containers of Docker and podman with a GPU's device nodes in their /dev."""
        for tool in filter(which, SCOPES):
            ids = hexadecimal(run([tool, "ps", "--quiet", "--no-trunc"], TEST_SECONDS)[1])
            said = run([tool, "inspect", "--format", SHOWN, *ids], TEST_SECONDS)[1] if ids else ""
            for line in said.splitlines():
                if line.split(" ", 1)[0] in ids:
                    own, name, pid, started = line.split(" ", 3)
                    nodes = frozenset(numbers(self.disk.at(f"/proc/{pid}/root/dev")))
                    if nodes:
                        yield Container(tool, own, name.lstrip("/"), started, nodes)

    def missing(self, container: Container) -> set[tuple[int, int]]:
        """Nodes that systemd would deny the container when it applies its list again."""
        wanted = ["-p", "LoadState", "-p", "DevicePolicy", "-p", "DeviceAllow"]
        said = run(["systemctl", "show", *wanted, container.scope], TEST_SECONDS)[1]
        properties = [line.partition("=")[::2] for line in said.splitlines()]
        # no scope: the cgroups are the engine's own; auto without a list: nothing is denied
        if ("LoadState", "loaded") not in properties:
            return set()
        allowed = [value for key, value in properties if key == "DeviceAllow" and value]
        if ("DevicePolicy", "auto") in properties and not allowed:
            return set()
        return {n for n in container.nodes if not any(self.covers(each, *n) for each in allowed)}

    def covers(self, allowed: str, major: int, minor: int) -> bool:
        """Whether one `DeviceAllow=` of systemd.resource-control(5) lets read and write a node."""
        what, _, access = allowed.rpartition(" ")
        if not {"r", "w"} <= set(access):
            return False
        if what.startswith("char-"):
            return any(
                number == major and fnmatch.fnmatch(name, what[len("char-") :])
                for number, name in self.majors()
            )
        if what == f"/dev/char/{major}:{minor}":
            return True
        return (major, minor) in numbers(self.disk.at(what).parent, self.disk.at(what).name)

    def majors(self) -> list[tuple[int, str]]:
        """Numbers and names of the kernel's character devices."""
        text = self.disk.at("/proc/devices").read_text("utf-8").partition("Block devices")[0]
        return [(int(n), name) for n, name in re.findall(r"^ *(\d+) (\S+)$", text, re.MULTILINE)]

    def keep(self, container: Container, nodes: set[tuple[int, int]]) -> None:
        """Put nodes on systemd's list for the container, as long as that runs."""
        title = f"a daemon-reload leaves {container.name} its GPUs"
        emit("ensure", title=title, state="running")
        self.link(nodes)
        allow = [f"DeviceAllow=/dev/char/{major}:{minor} rw" for major, minor in sorted(nodes)]
        argv = ["systemctl", "set-property", "--runtime", container.scope, *allow]
        status, printed = run(argv, TEST_SECONDS)
        failed = status or self.missing(container)
        emit("ensure", title=title, state="failed" if failed else "ok")
        if failed:
            raise Failed(
                f"{container.name} would lose its GPUs: systemd has to reload its units, and "
                f"cannot be told of them first. Stop the container, or start it with CDI device "
                f"names, then provision again.\n{tail(printed)}".rstrip()
            )

    def link(self, nodes: set[tuple[int, int]]) -> None:
        """Links in /dev/char for the nodes, by which systemd before 240 finds them."""
        folder = self.disk.at("/dev")
        (folder / "char").mkdir(exist_ok=True)
        for path in device_files(folder):
            link = folder / "char" / "{}:{}".format(*number(path))
            if number(path) in nodes and not os.path.lexists(link):
                link.symlink_to(f"../{path.relative_to(folder)}")


def sees(container: Container) -> bool | None:
    """Whether its GPUs can be used in a container; None where nothing in there can tell."""
    for look in LOOKS:
        status = run([container.tool, "exec", container.id, *look], TEST_SECONDS)[0]
        if status not in NO_COMMAND:
            return status == 0
    return None


def hexadecimal(text: str) -> list[str]:
    """The lines that are whole ids; warnings may stand between them."""
    return [line for line in text.splitlines() if re.fullmatch("[0-9a-f]{64}", line)]


def device_files(folder: Path, *patterns: str) -> Iterator[Path]:
    """Character devices below a /dev, those of GPUs if not said otherwise."""
    for pattern in patterns or NODES:
        for path in folder.glob(pattern):
            try:
                if stat.S_ISCHR(path.stat().st_mode):
                    yield path
            except OSError:  # its process has ended
                continue


def number(path: Path) -> tuple[int, int]:
    rdev = path.stat().st_rdev
    return os.major(rdev), os.minor(rdev)


def numbers(folder: Path, *patterns: str) -> set[tuple[int, int]]:
    """Major and minor of the character devices below a /dev."""
    return {number(path) for path in device_files(folder, *patterns)}
