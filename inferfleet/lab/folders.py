"""Hosts that are folders: an SSH server of our own for each, where there is no root for real ones.

A command runs as `sh -c COMMAND`, as the user who runs this, in the host's own folder, whose path
it finds in INFERFLEET_ROOT. What sshd would refuse a key with `restrict`, this refuses, too:
terminals, login shells, subsystems, forwarding. Everything listens on loopback alone.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import paramiko.common
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

ADDRESS = "127.0.0.1"
Run = Callable[[paramiko.Channel, bytes, threading.Event], None]
GRACE = 2.0  # seconds; a process that left its group may keep a pipe open for ever
BLOCK = 64 * 1024  # bytes moved at a time
GONE = (OSError, EOFError, paramiko.SSHException)  # how paramiko says that a peer has left
_log = logging.getLogger(__name__)
_log.addHandler(logging.NullHandler())  # a client that leaves early is no news


@dataclass(frozen=True, slots=True)
class FolderHost:
    """One such host. `fingerprint` is its host key's, as `ssh-keygen -l` prints it."""

    name: str
    address: str
    port: int
    fingerprint: str
    root: Path
    known_hosts: str  # its line for a known_hosts file


class FolderHosts:
    """A context in which each name is a host: a folder under `base` and an SSH server.

    Keys and folders stay in `base`, so a later run finds the same hosts on other ports. `key` is
    the path of the one private key that may log in, as any user. Leaving the context kills what
    the hosts still run. `environment` is added to that of every command.
    """

    def __init__(
        self, base: Path, names: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        base = base.absolute()  # commands run elsewhere
        self.key = base / "client_key"
        self.hosts: dict[str, FolderHost] = {}
        self._base, self._names = base, tuple(names)
        self._environment = dict(environment or {})
        self._commands = _Commands()
        self._connections: list[tuple[socket.socket, paramiko.Transport]] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._base.mkdir(parents=True, exist_ok=True)
        self._client = _key(self.key)
        with ExitStack() as opening:
            selector = opening.enter_context(selectors.DefaultSelector())
            for name in self._names:
                opening.callback(self._listen(name, selector).close)
            self._wake, woken = socket.socketpair()
            opening.enter_context(self._wake)
            opening.enter_context(woken)
            selector.register(woken, selectors.EVENT_READ)
            self._open = opening.pop_all()
        self._thread = threading.Thread(target=self._accept, args=(selector,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._wake.send(b"!")
        self._thread.join()
        for connection, _ in self._connections:
            with suppress(OSError):  # wakes its thread, which would look up only every 0.1 s
                connection.shutdown(socket.SHUT_RDWR)
        for _, transport in self._connections:
            transport.close()
        self._commands.stop()
        self._open.close()

    def _listen(self, name: str, selector: selectors.BaseSelector) -> socket.socket:
        """Make the host `name` and listen for it."""
        folder = self._base / name
        for part in ("root", "home"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        own = _key(folder / "host_key")
        listener = socket.create_server((ADDRESS, 0), backlog=128)
        port = listener.getsockname()[1]
        line = f"[{ADDRESS}]:{port} {own.get_name()} {own.get_base64()}\n"
        host = FolderHost(name, ADDRESS, port, own.fingerprint, folder / "root", line)
        self.hosts[name] = host

        def run(channel: paramiko.Channel, command: bytes, answered: threading.Event) -> None:
            shell = _Shell(command, host.root, self._variables(host))
            self._commands.start(channel, shell, answered)

        def welcome() -> None:
            connection, _ = listener.accept()
            self._welcome(connection, own, _Door(self._client, run))

        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, welcome)
        return listener

    def _variables(self, host: FolderHost) -> dict[str, str]:
        """The environment of a command: as after a login, nothing of our own but PATH."""
        return {
            "HOME": str(host.root.parent / "home"),
            "INFERFLEET_ROOT": str(host.root),
            "LANG": "C.UTF-8",
            "PATH": os.environ.get("PATH", os.defpath),
            "SHELL": "/bin/sh",
            **self._environment,
        }

    def _accept(self, selector: selectors.BaseSelector) -> None:
        """Welcome clients until woken by the one registration that has no welcome."""
        while True:
            for ready, _ in selector.select():
                if ready.data is None:
                    return
                with suppress(OSError):  # the client may have left already
                    ready.data()

    def _welcome(self, connection: socket.socket, key: paramiko.PKey, door: _Door) -> None:
        """Speak SSH to a client, on a thread of its own."""
        self._connections = [(c, t) for c, t in self._connections if t.is_active()]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport = _Transport(connection)
        transport.door = door
        transport.set_log_channel(_log.name)
        transport.add_server_key(key)
        transport.start_server(event=threading.Event(), server=door)
        self._connections.append((connection, transport))


class _Door(paramiko.ServerInterface):
    """What a client may do: log in with the one key, and run commands. All else is refused."""

    def __init__(self, key: paramiko.PKey, run: Run) -> None:
        self._key, self._run = key, run
        self.answered = threading.Event()

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:  # noqa: ARG002
        return paramiko.common.AUTH_SUCCESSFUL if key == self._key else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        prohibited = paramiko.common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        return paramiko.common.OPEN_SUCCEEDED if kind == "session" else prohibited

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if b"\0" in command:
            return False
        self.answered = threading.Event()
        self._run(channel, command, self.answered)
        return True


class _Transport(paramiko.Transport):
    """One connection, which knows when it has answered a request.

    A quick command could otherwise end, and close its channel, before the client has heard that
    it began; paramiko offers no later moment than the one in which the answer is decided.
    """

    door: _Door

    def _send_user_message(self, data: paramiko.Message) -> None:
        super()._send_user_message(data)  # type: ignore[misc]
        if threading.current_thread() is self:
            self.door.answered.set()


@dataclass(frozen=True, slots=True)
class _Shell:
    """A command of a host, ready to run."""

    command: bytes
    folder: Path
    variables: dict[str, str]

    def start(self) -> subprocess.Popen[bytes]:
        """The process, leading a group of its own."""
        return subprocess.Popen(
            ["sh", "-c", self.command],
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )


class _Commands:
    """The commands that run now, each with a thread, and how they are all stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopping = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._threads: set[threading.Thread] = set()

    def start(self, channel: paramiko.Channel, shell: _Shell, answered: threading.Event) -> None:
        """Run a command on a thread of its own; its channel carries all it reads and prints."""
        arguments = (channel, shell, answered)
        thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def stop(self) -> None:
        """Kill every process group that still runs, and see its thread end."""
        with self._lock:
            self._stopping = True
            for process in self._processes:
                _kill(process)
            threads = tuple(self._threads)
        for thread in threads:
            thread.join(GRACE)

    def _run(self, channel: paramiko.Channel, shell: _Shell, answered: threading.Event) -> None:
        answered.wait(GRACE)  # for ever it would be where the client wanted no answer
        try:
            process = shell.start()
            self._watch(process)
            _join(channel, process)
            self._forget(process)
            status = process.wait()
            with suppress(*GONE):
                channel.send_exit_status(status if status >= 0 else 128 - status)
        finally:
            with suppress(*GONE):
                channel.close()
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._processes.add(process)
            if self._stopping:
                _kill(process)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end without reaping: until forgotten, the group's number is its own."""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._processes.discard(process)


def _join(channel: paramiko.Channel, process: subprocess.Popen[bytes]) -> None:
    """Carry what goes in and out until the process has closed its output."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    feeding = threading.Thread(target=_feed, args=(channel, process.stdin), daemon=True)
    errors = threading.Thread(
        target=_drain, args=(process.stderr, channel.sendall_stderr), daemon=True
    )
    feeding.start()
    errors.start()
    _drain(process.stdout, channel.sendall)
    errors.join()


def _feed(channel: paramiko.Channel, pipe: IO[bytes]) -> None:
    """All that the client sends, then EOF; what nobody reads is thrown away, as sshd does."""
    with suppress(BrokenPipeError), pipe:
        while data := channel.recv(BLOCK):
            pipe.write(data)
            pipe.flush()
    while channel.recv(BLOCK):
        pass


def _drain(pipe: IO[bytes], send: Callable[[bytes], object]) -> None:
    """All that the process prints; without a client, it meets a closed pipe, as under sshd."""
    with pipe, suppress(*GONE):
        while data := os.read(pipe.fileno(), BLOCK):
            send(data)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _key(path: Path) -> paramiko.PKey:
    """The key at `path`, made if there is none yet."""
    if not path.exists():
        text = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
    return paramiko.Ed25519Key(filename=str(path))
