"""One host of a lab: made, booted, broken on purpose, unmade."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inferfleet.errors import HostError
from inferfleet.lab import machine, network, rootfs

# The cgroup is joined before the fork: once `boot` returns, whatever runs can be found and killed.
# The guest's systemd wants cgroup2 alone at /sys/fs/cgroup, whatever this machine has there.
# nspawn exits with 133 when the guest asked for a reboot.
SUPERVISE = """
echo $$ > "$CGROUP/cgroup.procs" || exit 1
exec setsid --fork unshare --mount --propagation slave sh -c '
    umount --recursive --lazy /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup || exit 1
    while :; do
        systemd-nspawn "$@"
        [ $? = 133 ] || exit
    done
' sh "$@"
"""

MAKE = """
set -eu
mkdir -p "$FOLDER/disk" "$FOLDER/root"
mount -t tmpfs -o "size=$DISK,mode=0755" lab-disk "$FOLDER/disk"
mkdir "$FOLDER/disk/upper" "$FOLDER/disk/work"
layers="lowerdir=$LOWER,upperdir=$FOLDER/disk/upper,workdir=$FOLDER/disk/work"
mount -t overlay -o "$layers" lab-root "$FOLDER/root"
ssh-keygen -q -t ed25519 -N '' -C "$NAME" -f "$FOLDER/root/etc/ssh/ssh_host_ed25519_key"
"""

OPTIONS = (
    "--boot",
    "--quiet",
    "--settings=no",
    "--register=no",
    "--keep-unit",
    "--console=read-only",
    "--resolv-conf=off",
    "--timezone=off",
    "--link-journal=no",
    "--system-call-filter=bpf",  # without these two, IPAddressDeny= is silently not enforced
    "--capability=CAP_BPF,CAP_NET_ADMIN",
)

ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root")


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or folder of this machine that the hosts see at `target`."""

    source: str
    target: str
    read_only: bool = True

    @property
    def option(self) -> str:
        return f"--bind{'-ro' if self.read_only else ''}={self.source}:{self.target}"


@dataclass(frozen=True, slots=True)
class LabHost:
    """One host. `index` counts within its lab, `number` is its lab's subnet, `disk` a size."""

    name: str
    lab: str
    number: int
    index: int
    folder: Path
    cgroup: Path
    disk: str
    binds: tuple[Bind, ...] = ()

    @property
    def address(self) -> str:
        return network.address(self.number, self.index)

    @property
    def root(self) -> Path:
        """Its root file system seen from outside, to read and to alter; /run, /proc, /dev apart."""
        return self.folder / "root"

    @property
    def console(self) -> Path:
        """What it printed on its console since it was made."""
        return self.folder / "console"

    @property
    def namespace(self) -> str:
        """Its network namespace, as ip-netns(8) names it."""
        return f"inferfleet-{self.lab}-{self.name}"

    @property
    def host_key(self) -> str:
        """Its public host key: type and base64."""
        text = (self.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
        return " ".join(text.split()[:2])

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """The SHA-256 fingerprints of its host keys, as ssh-keygen -l shows them."""
        digest = hashlib.sha256(base64.b64decode(self.host_key.split()[1])).digest()
        return (f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}",)

    @property
    def known_host(self) -> str:
        """Its line for a known_hosts file."""
        return f"{self.name},{self.address} {self.host_key}\n"

    @property
    def pid(self) -> int | None:
        """The process, as this machine counts, of its PID 1; None while it has none."""
        try:
            pids = (self.cgroup / "payload/init.scope/cgroup.procs").read_text().split()
        except OSError:
            return None
        return int(pids[0]) if pids else None

    # Power

    def boot(self) -> None:
        """Switch it on, with what its disk holds; returns at once, see `wait_ready`."""
        if self.pid is not None:
            raise HostError(self.name, "it is switched on already")
        network.plug(self.number, self.index)
        self.cgroup.mkdir(parents=True, exist_ok=True)
        argv = ["sh", "-c", SUPERVISE, "sh", *self._nspawn_options()]
        environment = {**os.environ, "CGROUP": str(self.cgroup), "SYSTEMD_NSPAWN_TMPFS_TMP": "0"}
        with self.console.open("ab") as console:
            subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                check=True,
            )

    def wait_ready(self, timeout: float = 60) -> None:
        """Wait until sshd answers and systemd has started everything, failed units included."""
        deadline = time.monotonic() + timeout
        self._until(self._answers_ssh, deadline, "sshd does not answer")
        self._until(lambda: self._is_up(deadline), deadline, "systemd does not come up")

    def reboot(self, timeout: float = 60) -> None:
        """Have it reboot in good order, and wait until it is ready again."""
        deadline = time.monotonic() + timeout
        before = self.pid
        self.exec("systemctl reboot")
        self._until(lambda: self.pid not in (None, before), deadline, "it does not reboot")
        self.wait_ready(deadline - time.monotonic())

    def stop(self, timeout: float = 20) -> None:
        """Shut it down in good order; its power is cut when that takes longer than `timeout`."""
        if self.pid is not None:
            self.exec("systemctl --no-block poweroff")
            machine.wait_empty(self.cgroup, timeout)
        machine.kill_cgroup(self.cgroup)

    def power_cut(self) -> None:
        """Kill everything at once; peers hear nothing of it. `boot` switches it on again.

        All that was written stays, synced or not: a tmpfs has no page cache to lose.
        """
        self.partition()
        machine.kill_cgroup(self.cgroup)

    # Faults

    def partition(self) -> None:
        """Pull its network cable: what is sent to it and from it is lost, silently."""
        network.unplug(self.number, self.index)

    def heal(self) -> None:
        """Put its network cable back in."""
        network.plug(self.number, self.index)

    def fill_disk(self, leave: int = 0) -> None:
        """Leave `leave` bytes of its disk free, in whole pages; `free_disk` undoes it."""
        for _ in range(9):  # a disk cannot be less than what is on it, and the host may be writing
            disk = os.statvfs(self._disk)
            used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            if self._resize_disk(str(used + leave)):
                return
        raise HostError(self.name, "its disk cannot be filled: it is written to all the time")

    def free_disk(self) -> None:
        """Give it back the disk it was made with."""
        if not self._resize_disk(self.disk):
            raise HostError(self.name, f"its disk cannot have {self.disk} again")

    # Looking inside

    def exec(
        self, command: str | Sequence[str], *, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run an argv, or a shell script, as root inside, with no need of ssh or network.

        Raises HostError when the host is off; an exit status of the command is yours to judge.
        """
        pid = self.pid
        if pid is None:
            raise HostError(self.name, "it is switched off")
        inside = ["sh", "-c", command] if isinstance(command, str) else [*command]
        # Within the host's own cgroup, so that what it leaves running ends with the host.
        join = 'echo $$ > "$0/supervisor/cgroup.procs" && exec "$@"'
        enter = ["nsenter", f"--target={pid}", "--all", "--root", "--wd", "env", "-i", *ENVIRONMENT]
        return subprocess.run(
            ["sh", "-c", join, str(self.cgroup), *enter, *inside],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    # For the lab

    def make(self, lower: Path, etc_hosts: str, login: str) -> None:
        """Make its disk, its keys and its network; `login` is the public key to let in."""
        self.folder.mkdir(parents=True)
        wanted = {
            "FOLDER": f"{self.folder}",
            "LOWER": f"{lower}",
            "DISK": self.disk,
            "NAME": self.name,
        }
        machine.command("sh", "-c", MAKE, env={**os.environ, **wanted})
        (self.root / "etc/hosts").write_text(etc_hosts)
        (self.root / "etc/hostname").write_text(f"{self.name}\n")
        for user in rootfs.USERS:
            self._authorise(user, login)
        network.add_cable(self.number, self.index, self.namespace)

    def unmake(self) -> None:
        """Undo `make`, whatever of it is there; the host's processes are gone already."""
        for point in machine.mounts_under(self.folder):
            machine.command("umount", "--lazy", point)  # though somebody may be looking at it
        network.remove_cable(self.number, self.index, self.namespace)
        shutil.rmtree(Path("/run/systemd/nspawn/propagate", self._machine), ignore_errors=True)

    @property
    def _machine(self) -> str:
        return f"{self.lab}-{self.name}"

    @property
    def _disk(self) -> Path:
        return self.folder / "disk"

    def _resize_disk(self, size: str) -> bool:
        argv = ["mount", "-o", f"remount,size={size}", str(self._disk)]
        return subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def _authorise(self, user: str, login: str) -> None:
        home = self.root / ("root" if user == "root" else f"home/{user}")
        owner = home.stat()
        keys = home / ".ssh" / "authorized_keys"
        keys.parent.mkdir(mode=0o700, exist_ok=True)
        keys.write_text(login)
        for path in (keys.parent, keys):
            os.chown(path, owner.st_uid, owner.st_gid)

    def _nspawn_options(self) -> list[str]:
        return [
            f"--directory={self.root}",
            f"--machine={self._machine}",
            f"--hostname={self.name}",
            f"--network-namespace-path=/run/netns/{self.namespace}",
            *OPTIONS,
            *(bind.option for bind in self.binds),
        ]

    def _answers_ssh(self) -> bool:
        try:
            with socket.create_connection((self.address, 22), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _is_up(self, deadline: float) -> bool:
        left = max(1.0, deadline - time.monotonic())
        try:
            answer = self.exec("systemctl is-system-running --wait", timeout=left).stdout.strip()
        except (HostError, subprocess.TimeoutExpired):
            return False
        return answer in ("running", "degraded")

    def _until(self, check: Callable[[], bool], deadline: float, complaint: str) -> None:
        while not check():
            if time.monotonic() > deadline:
                tail = "\n".join(self.console.read_text(errors="replace").splitlines()[-8:])
                raise HostError(self.name, f"{complaint}; the last it printed:\n{tail}")
            time.sleep(0.01)
