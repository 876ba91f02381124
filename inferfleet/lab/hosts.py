"""A lab: real hosts on this machine, each with systemd as PID 1, sshd and an address of its own.

    with Lab.boot(["alpha", "beta"]) as lab:
        lab.hosts["alpha"].exec("systemctl is-active ssh")

A host is systemd-nspawn over an overlay: the shared root file system below, a tmpfs of its own
above, which outlives the host's power but not the lab. All of a lab lies under
`/run/inferfleet/lab/NAME`, so that another process can open it, or take it down when the one that
booted it is gone. Processes are found, and killed, by the cgroup they were started in.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from inferfleet.errors import Error
from inferfleet.lab import machine, network, rootfs
from inferfleet.lab.host import Bind, LabHost

BASE = Path("/run/inferfleet/lab")
LOCK = BASE / ".lock"
NAME = re.compile(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?")


class NoLabError(Error):
    """There is no lab of that name; it was never booted, or taken down."""


@dataclass(frozen=True, slots=True)
class Lab:
    """Some hosts on one bridge. `number` is their subnet's, `disk` the size of each host's disk."""

    name: str
    number: int
    names: tuple[str, ...]
    disk: str
    binds: tuple[Bind, ...]

    @classmethod
    def boot(
        cls,
        names: Sequence[str],
        *,
        name: str = "lab",
        binds: Iterable[Bind] = (),
        disk: str = "1G",
        timeout: float = 60,
        say: rootfs.Say = print,
    ) -> Lab:
        """Boot the hosts `names` and wait until they are ready; a lab of that name goes first.

        `disk` is a size as mount(8) takes it for a tmpfs. Raises Error when the lab cannot run
        here, HostError when a host is not ready `timeout` seconds after it was switched on;
        nothing is left behind then.
        """
        if reasons := machine.requirements():
            raise Error("; ".join(reasons))
        check_names(name, names)
        take_down(name)
        lower = rootfs.tree(say)
        lab = cls._claim(name, tuple(names), disk, tuple(binds))
        try:
            lab._start(lower)
            lab.wait_ready(timeout)
        except BaseException:  # also when interrupted: half a lab is of no use to anyone
            lab.down()
            raise
        say(f"lab {name}: {len(names)} hosts ready")
        return lab

    @classmethod
    def open(cls, name: str = "lab") -> Lab:
        """The running lab `name`. Raises NoLabError when there is none."""
        check_names(name)
        try:
            state = json.loads((BASE / name / "lab.json").read_text())
        except FileNotFoundError:
            raise NoLabError(f"no lab named {name} is running") from None
        binds = tuple(Bind(**bind) for bind in state.pop("binds"))
        return cls(**{**state, "names": tuple(state["names"])}, binds=binds)

    @classmethod
    def _claim(cls, name: str, names: tuple[str, ...], disk: str, binds: tuple[Bind, ...]) -> Lab:
        """Write down, before anything is made, what there will be to take down."""
        with machine.exclusive(LOCK):
            number = network.free_subnet(_claimed())
            lab = cls(name, number, names, disk, binds)
            lab.folder.mkdir(mode=0o700)
            partial = lab.folder / "partial.json"
            partial.write_text(json.dumps(asdict(lab)))
            partial.rename(lab.folder / "lab.json")
        return lab

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def folder(self) -> Path:
        return BASE / self.name

    @property
    def cgroup(self) -> Path:
        return machine.cgroup_root() / f"inferfleet-{self.name}"

    @property
    def gateway(self) -> str:
        """This machine's address as the hosts see it."""
        return network.gateway(self.number)

    @property
    def ssh_key(self) -> Path:
        """The private key that every user of every host lets in."""
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`: the hosts by name, with key, host keys and root as the user."""
        return self.folder / "ssh_config"

    @property
    def hosts(self) -> Mapping[str, LabHost]:
        """The hosts by name, in boot order."""
        return {
            name: LabHost(
                name=name,
                lab=self.name,
                number=self.number,
                index=index,
                folder=self.folder / "hosts" / name,
                cgroup=self.cgroup / name,
                disk=self.disk,
                binds=self.binds,
            )
            for index, name in enumerate(self.names)
        }

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until sshd answers and systemd has started everything, on all hosts."""
        self._each(lambda host: host.wait_ready(timeout))

    def down(self) -> None:
        """Take it down, whatever of it is there; nothing of it is left."""
        with machine.exclusive(LOCK):
            if self.name not in running():
                return
            machine.kill_cgroup(self.cgroup)
            for host in self.hosts.values():
                host.unmake()
            network.remove_bridge(self.number)
            shutil.rmtree(self.folder)

    def _start(self, lower: Path) -> None:
        machine.raise_inotify_limit()
        machine.command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.ssh_key))
        network.add_bridge(self.number, self.name)
        etc_hosts = self._etc_hosts()
        login = self.ssh_key.with_suffix(".pub").read_text()
        self._each(lambda host: host.make(lower, etc_hosts, login))
        self._each(LabHost.boot)
        self.known_hosts.write_text("".join(h.known_host for h in self.hosts.values()))
        self.ssh_config.write_text("\n".join(map(self._ssh_section, self.hosts.values())))

    def _each(self, act: Callable[[LabHost], None]) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(act, self.hosts.values()))

    def _etc_hosts(self) -> str:
        lines = ["127.0.0.1 localhost", f"{self.gateway} controller"]
        lines += [f"{host.address} {host.name}" for host in self.hosts.values()]
        return "\n".join(lines) + "\n"

    def _ssh_section(self, host: LabHost) -> str:
        return (
            f"Host {host.name}\n"
            f"  HostName {host.address}\n"
            f"  User root\n"
            f"  IdentityFile {self.ssh_key}\n"
            f"  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.known_hosts}\n"
            f"  StrictHostKeyChecking yes\n"
        )


def running() -> list[str]:
    """The names of all labs that were booted and not taken down."""
    return sorted(path.parent.name for path in BASE.glob("*/lab.json"))


def take_down(name: str) -> bool:
    """Take the lab `name` down, whole or half; False when there was none."""
    try:
        Lab.open(name).down()
    except NoLabError:
        shutil.rmtree(BASE / name, ignore_errors=True)  # cut short before its claim was written
        return False
    return True


def _claimed() -> set[int]:
    claims = set()
    for name in running():
        with contextlib.suppress(NoLabError):  # taken down since it was listed
            claims.add(Lab.open(name).number)
    return claims


def check_names(lab: str, names: Sequence[str] = ()) -> None:
    """Raise Error for a name that can be no host's and no folder's, or too many of them."""
    if wrong := [name for name in (lab, *names) if not NAME.fullmatch(name)]:
        raise Error(f"not a host name: {', '.join(wrong)} (a-z, 0-9 and -, at most 30 characters)")
    if len(set(names)) < len(names) or len(names) > network.MOST:
        raise Error(f"host names must differ, and be {network.MOST} at most")


def describe(lab: Lab) -> str:
    """How to reach the hosts by hand, a line each."""
    width = max(map(len, lab.names), default=0)
    lines = [
        f"{host.name:<{width}}  {host.address:<15}  ssh -F {lab.ssh_config} {host.name}"
        for host in lab.hosts.values()
    ]
    users = ", ".join(rootfs.USERS)
    lines.append(f"users: {users} (asked's sudo wants the password {rootfs.PASSWORD!r})")
    lines.append(f"this machine, as the hosts see it: {lab.gateway}")
    return "\n".join(lines)
