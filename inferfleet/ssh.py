"""SSH by paramiko: connections, and commands on them. Reached through `inferfleet.transport`."""

from __future__ import annotations

import base64
import logging
import shlex
import socket
import threading
from contextlib import ExitStack, suppress
from typing import cast

import paramiko

from inferfleet import hostkeys, sshkeys
from inferfleet.errors import TransportError
from inferfleet.hostkeys import HostKey
from inferfleet.model import Host
from inferfleet.session import Piped
from inferfleet.sshconfig import Endpoint, route
from inferfleet.sshwire import Wire, dial
from inferfleet.transport import CHUNK, Base, Options

MISSED = 3  # unanswered keepalives that make a peer lost
AT_ONCE = 8  # logins in progress per server: sshd drops some beyond 10 (MaxStartups)
_gates: dict[tuple[str, int], threading.BoundedSemaphore] = {}
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)  # it logs tracebacks of its own


def connect(host: Host, options: Options) -> SSH:
    """Log in to a host, through its jump hosts; see `inferfleet.transport.connect`."""
    with ExitStack() as undo:
        via = None
        for endpoint in route(host, options):
            via = _login(endpoint, options, via)
            undo.callback(_close, via)
        assert via is not None  # a route ends with the host itself
        return SSH(host, options, endpoint.user, via, undo.pop_all())


def fingerprint(host: Host, options: Options) -> list[HostKey]:
    """The host's keys, one per type; see `inferfleet.transport.fingerprint`."""
    *hops, goal = route(host, options)
    with ExitStack() as undo:
        via = None
        for hop in hops:
            via = _login(hop, options, via)
            undo.callback(_close, via)
        keys = [_key(goal, via, names) for names in hostkeys.ALGORITHMS.values()]
    found = [key for key in keys if key]
    if not found:
        raise goal.error("it shows no host key of a type we know")
    return found


def _key(
    endpoint: Endpoint, via: paramiko.Transport | None, names: tuple[str, ...]
) -> HostKey | None:
    transport = _shake(endpoint, via, names)
    if transport is None:
        return None
    key = transport.get_remote_server_key()
    _close(transport)
    line = f"{endpoint.expected.name} {key.get_name()} {key.get_base64()}"
    return HostKey(key.get_name(), hostkeys.fingerprint_of(key.asbytes()), line)


def _login(
    endpoint: Endpoint, options: Options, via: paramiko.Transport | None
) -> paramiko.Transport:
    """A connection to one server whose host key was checked, and where we are logged in."""
    server = endpoint.address, endpoint.port
    with _gates.setdefault(server, threading.BoundedSemaphore(AT_ONCE)), ExitStack() as undo:
        transport = _trusted(endpoint, via)
        undo.callback(_close, transport)
        transport.auth_timeout = options.auth_timeout
        sshkeys.authenticate(transport, endpoint)
        _keep_alive(transport, options.keepalive)
        undo.pop_all()
        return transport


def _trusted(endpoint: Endpoint, via: paramiko.Transport | None) -> paramiko.Transport:
    """A connection after the key exchange, closed again unless the host key is the right one."""
    offers = [hostkeys.preferred(endpoint.expected.entries)]
    if endpoint.expected.pins:  # a fingerprint does not tell its type: ask for each
        offers += hostkeys.ALGORITHMS.values()
    objections = []
    for names in offers:
        transport = _shake(endpoint, via, names)
        if transport is None:
            continue
        objection = _objection(endpoint, transport.get_remote_server_key())
        if not objection:
            return transport
        _close(transport)
        objections.append(objection)
    raise endpoint.error((objections or ["it shows no host key of a type we know"])[0])


def _objection(endpoint: Endpoint, key: paramiko.PKey) -> str:
    certificate = getattr(key, "public_blob", None)
    text = ""
    if certificate:
        text = f"{certificate.key_type} {base64.b64encode(certificate.key_blob).decode()}"
    return endpoint.expected.objection(key.get_name(), key.asbytes(), text)


def _shake(
    endpoint: Endpoint, via: paramiko.Transport | None, names: tuple[str, ...]
) -> paramiko.Transport | None:
    """Dial and exchange keys, no more; None when the server has no host key of these types."""
    transport = paramiko.Transport(cast(socket.socket, dial(endpoint, via)))
    transport.banner_timeout = transport.handshake_timeout = endpoint.timeout + 5  # ours is first
    transport.get_security_options().key_types = names
    done = threading.Event()
    transport.start_client(event=done)
    in_time = done.wait(endpoint.timeout)
    if transport.is_active() and transport.initial_kex_done:
        return transport
    error = transport.get_exception()
    _close(transport)
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer) and "host key" in str(error):
        return None
    raise endpoint.error(_why_not(endpoint, error, in_time))


def _why_not(endpoint: Endpoint, error: Exception | None, in_time: bool) -> str:
    place = f"{endpoint.address} port {endpoint.port}"
    if not in_time:
        return f"{place} did not finish the key exchange within {endpoint.timeout:g} s"
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return f"{place} has no algorithm in common with us: {error}"
    return (
        f"{place} ended the connection before the key exchange was over "
        "(not an SSH server, or one too busy or set to refuse us)"
    )


def _keep_alive(transport: paramiko.Transport, interval: float) -> None:
    """Ask for a sign of life when it is quiet; paramiko's own keepalive wants no answer."""

    def ask() -> None:
        message = paramiko.Message()
        message.add_byte(b"\x50")  # SSH_MSG_GLOBAL_REQUEST
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        transport._send_user_message(message)  # type: ignore[attr-defined]

    cast(Wire, transport.sock).patience = MISSED * interval
    transport.packetizer.set_keepalive(interval, ask)


def _close(transport: paramiko.Transport) -> None:
    """Close a connection, and leave no thread behind."""
    transport.close()
    transport.join(2)
    transport.packetizer.complete_handshake()  # stops the timer it may just have started


class SSH(Base):
    """A logged-in connection; each command has a channel of its own on it."""

    def __init__(
        self,
        host: Host,
        options: Options,
        user: str,
        transport: paramiko.Transport,
        open_: ExitStack,
    ) -> None:
        super().__init__(host, options)
        self._user, self._transport, self._open = user, transport, open_

    def start(self, command: str, *, become: bool = True) -> Piped:
        sudo = self.sudo(self._user) if become and self.host.become == "sudo" else None
        line = sudo.wrap(command) if sudo else shlex.join(["sh", "-c", command])
        try:
            channel = self._transport.open_session(timeout=self.options.auth_timeout)
            channel.exec_command(line)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise self._refused(error) from None
        return Piped(self.host.name, ChannelPipe(channel, self._transport), sudo)

    def _refused(self, error: Exception) -> TransportError:
        if not self._transport.is_active():
            return TransportError(self.host.name, f"connection lost: {_reason(self._transport)}")
        return TransportError(self.host.name, f"it does not let us run a command: {error}")

    def close(self) -> None:
        self._open.close()


def _reason(transport: paramiko.Transport) -> str:
    wire = cast(Wire, transport.sock)
    if wire.silent:
        return f"no sign of life for {wire.patience:g} s"
    return "the other side ended it"


class ChannelPipe:
    """A channel as a `inferfleet.session.Pipe`."""

    def __init__(self, channel: paramiko.Channel, transport: paramiko.Transport) -> None:
        self._channel, self._transport = channel, transport
        self._closed = False

    def write(self, data: bytes) -> None:
        try:
            self._channel.sendall(data)
        except (paramiko.SSHException, EOFError) as error:
            raise BrokenPipeError(str(error)) from None

    def end(self) -> None:
        try:
            self._channel.shutdown_write()
        except (paramiko.SSHException, EOFError) as error:
            raise BrokenPipeError(str(error)) from None

    def read(self) -> bytes:
        return self._channel.recv(CHUNK)

    def read_errors(self) -> bytes:
        return self._channel.recv_stderr(CHUNK)

    def status(self, timeout: float | None) -> int | None:
        return self._channel.exit_status if self._channel.status_event.wait(timeout) else None

    def lost(self) -> str:
        channel = self._channel
        if self._closed or not channel.closed or channel.exit_status != -1:
            return ""
        self._transport.join(0.5)  # it closes its channels just before it says that it is over
        return "" if self._transport.is_active() else _reason(self._transport)

    def close(self) -> None:
        self._closed = True
        with suppress(paramiko.SSHException, EOFError, OSError):
            self._channel.close()
