"""The byte stream under an SSH connection: TCP, a ProxyCommand, or a channel of a jump host."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress

import paramiko

from inferfleet.sshconfig import Endpoint


class Wire:
    """A socket for paramiko that acknowledges at once and notices when the peer falls silent.

    `inner` is a socket or a channel of a jump host; `command` the ProxyCommand behind it.
    """

    def __init__(
        self,
        inner: socket.socket | paramiko.Channel,
        command: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.patience = 0.0  # seconds of silence that end the connection; 0: any
        self.silent = False
        self._inner, self._command = inner, command
        self._heard = time.monotonic()
        self._closed = False  # paramiko looks at this name
        self._tcp = inner if isinstance(inner, socket.socket) and command is None else None
        if self._tcp:
            self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, size: int) -> bytes:
        try:
            data = self._inner.recv(size)
        except TimeoutError:
            if self.patience and time.monotonic() - self._heard > self.patience:
                self.silent = True
                return b""
            raise
        self._heard = time.monotonic()
        if self._tcp and hasattr(socket, "TCP_QUICKACK"):  # Linux; it wears off with every packet
            self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def send(self, data: bytes) -> int:
        return self._inner.send(data)

    def settimeout(self, seconds: float | None) -> None:
        self._inner.settimeout(seconds)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._inner.shutdown(socket.SHUT_RDWR)  # wakes paramiko's thread at once
        self._inner.close()
        if self._command:
            self._command.terminate()
            self._command.wait()


def dial(endpoint: Endpoint, via: paramiko.Transport | None) -> Wire:
    """Connect to a server, directly or as ssh_config says; TransportError when it cannot be."""
    if via is not None:
        return _through(endpoint, via)
    if endpoint.proxy:
        return _command(endpoint.proxy)
    place = f"{endpoint.address} port {endpoint.port}"
    try:
        return Wire(socket.create_connection((endpoint.address, endpoint.port), endpoint.timeout))
    except (socket.gaierror, UnicodeError):
        raise endpoint.error(f"its address {endpoint.address!r} does not resolve") from None
    except TimeoutError:
        raise endpoint.error(f"{place} did not answer within {endpoint.timeout:g} s") from None
    except ConnectionRefusedError:
        raise endpoint.error(f"{place} refused the connection; does sshd run there?") from None
    except OSError as error:
        raise endpoint.error(f"no way to {place}: {error.strerror or error}") from None


def _through(endpoint: Endpoint, via: paramiko.Transport) -> Wire:
    place = endpoint.address, endpoint.port
    try:
        return Wire(
            via.open_channel("direct-tcpip", place, ("127.0.0.1", 0), timeout=endpoint.timeout)
        )
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = error.args[-1] if error.args else "the connection to it broke"
        raise endpoint.error(
            f"its jump host cannot reach {endpoint.address} port {endpoint.port}: {reason}"
        ) from None


def _command(command: str) -> Wire:
    """A ProxyCommand's standard input and output as the connection."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Wire(ours, process)
