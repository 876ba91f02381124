"""The way to a host: SSH, or the machine we are on. What the other stages see of it is here.

paramiko is imported when the first SSH connection is made (it costs 86 ms); see `inferfleet.ssh`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

from inferfleet.errors import TransportError
from inferfleet.hostkeys import HostKey, trust
from inferfleet.model import Host
from inferfleet.session import Completed, Piped, complete
from inferfleet.sudo import Sudo

__all__ = [
    "Completed",
    "HostKey",
    "Local",
    "Options",
    "Session",
    "Transport",
    "connect",
    "fingerprint",
    "trust",
]

USER_KNOWN_HOSTS = Path("~/.ssh/known_hosts")
CHUNK = 64 * 1024  # bytes per read


@dataclass(frozen=True, slots=True)
class Options:
    """How to reach hosts. Times are seconds; `~` in paths is the user's home.

    A peer that answers nothing for three `keepalive` intervals counts as lost.
    """

    connect_timeout: float = 10.0  # each for TCP, the key exchange; ssh_config's wins
    auth_timeout: float = 30.0
    keepalive: float = 15.0
    ssh_config: Path = Path("~/.ssh/config")
    known_hosts: tuple[Path, ...] = (USER_KNOWN_HOSTS, Path("/etc/ssh/ssh_known_hosts"))
    become_password: Callable[[Host], str | None] = lambda _host: None


class Session(Protocol):
    """A running command; see `inferfleet.session.Piped` for what each part promises."""

    turns: int

    @property
    def errors(self) -> str: ...

    def send(self, data: bytes) -> None: ...

    def end(self) -> None: ...

    def lines(self, timeout: float | None = None) -> Iterator[bytes]: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...


class Transport(Protocol):
    """An open way to one host, on which commands run under a POSIX shell.

    With `become` they run as root if the host's `become` says how. Every failure that is not the
    command's own is a TransportError.
    """

    host: Host

    def start(self, command: str, *, become: bool = True) -> Session: ...

    def run(
        self,
        command: str,
        *,
        input: bytes = b"",
        timeout: float | None = 60,
        become: bool = True,
    ) -> Completed: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...


class Base:
    """What SSH and Local share: `run` on top of `start`, and closing at the end of a block."""

    def __init__(self, host: Host, options: Options) -> None:
        self.host = host
        self.options = options

    def start(self, command: str, *, become: bool = True) -> Piped:
        raise NotImplementedError

    def close(self) -> None:
        """Close the way; its sessions end with it. May be called twice."""

    def run(
        self,
        command: str,
        *,
        input: bytes = b"",
        timeout: float | None = 60,
        become: bool = True,
    ) -> Completed:
        """Run a command to its end, with all its input; TransportError after `timeout` s."""
        return complete(self.start(command, become=become), input, timeout)

    def sudo(self, user: str) -> Sudo:
        """Sudo for one command, with the password if the host has one."""
        return Sudo(user, self.options.become_password(self.host))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class Local(Base):
    """The machine we are on (`connection: local`); sudo only when we are not root already."""

    def start(self, command: str, *, become: bool = True) -> Piped:
        sudo = None
        if become and self.host.become == "sudo" and os.geteuid() != 0:
            sudo = self.sudo(os.environ.get("USER", ""))
        return Piped(
            self.host.name, _process(self.host, sudo.wrap(command) if sudo else command), sudo
        )


def _process(host: Host, command: str) -> Process:
    try:
        return Process(command)
    except OSError as error:
        raise TransportError(host.name, f"cannot run sh here: {error.strerror}") from None


class Process:
    """A local command as a `Pipe`, in a process group of its own (Ctrl-C is not for it)."""

    def __init__(self, command: str) -> None:
        self._popen = subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._closed = False

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(_stream(self._popen.stdin).fileno(), rest) :]
        except ValueError as error:  # closed by us meanwhile
            raise BrokenPipeError(str(error)) from None

    def end(self) -> None:
        _stream(self._popen.stdin).close()

    def read(self) -> bytes:
        return self._read(_stream(self._popen.stdout))

    def read_errors(self) -> bytes:
        return self._read(_stream(self._popen.stderr))

    def _read(self, stream: IO[bytes]) -> bytes:
        """The next bytes; at the end, or once we are closed, the reader closes its stream."""
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLIN)
        while not (ready := poll.poll(200)) and not self._closed:
            pass
        data = os.read(stream.fileno(), CHUNK) if ready else b""
        if not data:
            stream.close()
        return data

    def status(self, timeout: float | None) -> int | None:
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def lost(self) -> str:
        return ""

    def close(self) -> None:
        """Let the command end by itself for a second, then end it and all its children."""
        self.end()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.status(1) is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._popen.pid, number)
        self.status(1)
        self._closed = True


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # all three are pipes
    return stream


def connect(host: Host, options: Options) -> Transport:
    """Open the way to a host: name, TCP, host key, login. Safe to call from many threads.

    Raises TransportError, beginning with the host's name, for all that can go wrong.
    """
    if host.connection == "local":
        return Local(host, options)
    from inferfleet import ssh

    return ssh.connect(host, options)


def fingerprint(host: Host, options: Options) -> list[HostKey]:
    """The keys a host shows, one per type, without logging in to it; for `trust`.

    Raises TransportError when it cannot be reached (a jump host on the way must be trusted).
    """
    if host.connection == "local":
        return []
    from inferfleet import ssh

    return ssh.fingerprint(host, options)
