"""Real sshd processes on loopback addresses, run as whoever runs the tests."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from inferfleet.model import Host
from inferfleet.transport import Options

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
MISSING = "needs sshd (openssh-server) and ssh-keygen"
AVAILABLE = bool(SSHD and shutil.which("ssh-keygen"))


def keygen(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A new key pair at `path` and `path`.pub."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
    return path


def public(path: Path) -> str:
    """ "type base64" of a key pair."""
    return " ".join(Path(f"{path}.pub").read_text().split()[:2])


def fingerprint(path: Path) -> str:
    """What ssh-keygen says of a key, the judge of our own arithmetic."""
    command = ["ssh-keygen", "-lf", f"{path}.pub"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


def until(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Wait for a condition; fail with `what` when it does not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"in vain for {timeout} s: {what}"
        time.sleep(0.005)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


@dataclass
class Sshd:
    """A running sshd; `log` is what it says at VERBOSE."""

    address: str
    port: int
    log_file: Path
    host_keys: tuple[Path, ...]
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def known_line(self) -> str:
        return f"[{self.address}]:{self.port} {public(self.host_keys[0])}\n"

    def sessions(self) -> list[int]:
        """Process ids of the logged-in sessions, children first."""
        return [pid for child in children(self.process.pid) for pid in [*children(child), child]]

    def cut(self) -> None:
        """Kill the logged-in sessions: their connections end without a word."""
        for pid in self.sessions():
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(
    folder: Path, address: str, host_keys: tuple[Path, ...], authorized: Path, *extra: str
) -> Sshd:
    """Start sshd at an address; `extra` are further lines of its configuration."""
    port = free_port(address)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    lines = [
        *extra,
        f"ListenAddress {address}:{port}",
        *(f"HostKey {key}" for key in host_keys),
        f"AuthorizedKeysFile {authorized}",
        "StrictModes no",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "PermitRootLogin prohibit-password",
        "MaxStartups 200",
        "LogLevel VERBOSE",
        "PidFile none",
        "PrintMotd no",
        f"SetEnv HOME={folder} PATH={folder}/bin:/usr/bin:/bin",  # no profile of the developer's
    ]
    config = folder / f"sshd_config-{address}-{port}"
    config.write_text("\n".join(lines) + "\n")
    log = config.with_suffix(config.suffix + ".log")
    assert SSHD
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
        )
    server = Sshd(address, port, log, host_keys, process)
    until(lambda: "Server listening" in server.log or process.poll() is not None, "sshd is up")
    assert process.poll() is None, server.log
    return server


@dataclass
class Field:
    """A folder with a login key, and the sshds started with it."""

    folder: Path
    stack: ExitStack
    count: int = 0
    config: str = ""
    servers: list[Sshd] = field(default_factory=list)

    @property
    def key(self) -> Path:
        return self.folder / "login"

    @property
    def authorized(self) -> Path:
        return self.folder / "authorized_keys"

    @property
    def known(self) -> Path:
        return self.folder / "known_hosts"

    def host_key(self, kind: str = "ed25519") -> Path:
        self.count += 1
        return keygen(self.folder / f"host-{self.count}-{kind}", kind)

    def sshd(self, *extra: str, keys: tuple[Path, ...] = (), known: bool = True) -> Sshd:
        """Start one more; its key goes into the known_hosts unless `known` is False."""
        address = f"127.0.7.{len(self.servers) + 1}"
        server = start(self.folder, address, keys or (self.host_key(),), self.authorized, *extra)
        self.stack.callback(server.stop)
        self.servers.append(server)
        if known:
            with self.known.open("a") as file:
                file.write(server.known_line)
        return server

    def host(self, server: Sshd, **changes: object) -> Host:
        values: dict[str, object] = {
            "name": "gpu-01",
            "address": server.address,
            "port": server.port,
            "user": getpass.getuser(),
            "key": str(self.key),
        }
        return Host(**{**values, **changes})  # type: ignore[arg-type]

    def options(self, **changes: object) -> Options:
        config = self.folder / "ssh_config"
        config.write_text(self.config)
        values: dict[str, object] = {"ssh_config": config, "known_hosts": (self.known,)}
        return Options(**{**values, **changes})  # type: ignore[arg-type]


@contextmanager
def open_field(folder: Path) -> Iterator[Field]:
    with ExitStack() as stack:
        ground = Field(folder, stack)
        keygen(ground.key)
        ground.authorized.write_text(public(ground.key) + "\n")
        ground.known.write_text("")
        yield ground


def auth_attempts(server: Sshd) -> list[str]:
    """What the log holds of anyone having tried to log in."""
    signs = r"userauth|Accepted|Failed|Invalid user|authenticating user|Postponed"
    return [line for line in server.log.splitlines() if re.search(signs, line)]
