"""What ssh_config and the inventory say about the way to a host: pure, no connection is made."""

from __future__ import annotations

import os
import re
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import paramiko

from inferfleet import hostkeys, whoami
from inferfleet.errors import TransportError
from inferfleet.model import Host
from inferfleet.transport import USER_KNOWN_HOSTS, Options

MAX_HOPS = 8
DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One SSH server on the way: the host itself, or a jump host.

    `title` begins what is said about it ("" for the host itself). `named` tells that the user
    chose the identities; otherwise they are ssh's defaults, of which any may be missing.
    """

    host: str
    title: str
    address: str
    port: int
    user: str
    timeout: float
    identities: tuple[Path, ...]
    certificates: tuple[Path, ...]
    named: bool
    only: bool  # do not try the agent's other keys
    proxy: str  # a command that is the connection, or ""
    expected: hostkeys.Expected

    def error(self, message: str) -> TransportError:
        """TransportError about this server."""
        return TransportError(self.host, self.title + message)


def route(host: Host, options: Options) -> tuple[Endpoint, ...]:
    """The servers to log in to, one through the other; the host itself is the last.

    Raises TransportError for a broken ssh_config or a loop of jump hosts.
    """
    try:
        return tuple(_route(host, options, host, MAX_HOPS))
    except (paramiko.ConfigParseError, paramiko.CouldNotCanonicalize, ValueError) as error:
        raise TransportError(host.name, f"{options.ssh_config}: {error}") from None


def _route(host: Host, options: Options, goal: Host, depth: int) -> Iterator[Endpoint]:
    if depth < 0:
        raise TransportError(goal.name, f"more than {MAX_HOPS} jump hosts; does ProxyJump loop?")
    settings = _settings(host, options)
    jumps = str(settings.get("proxyjump", "none"))
    hops = [] if jumps.lower() == "none" else [_hop(jump.strip()) for jump in jumps.split(",")]
    for position, hop in enumerate(hops):
        if position == 0:
            yield from _route(hop, options, goal, depth - 1)
        else:  # the later hops are reached through the first ones, whatever ssh_config says
            yield _endpoint(hop, options, goal, _settings(hop, options))
    yield _endpoint(host, options, goal, settings)


def _hop(text: str) -> Host:
    """A jump host as ProxyJump writes it: [user@]host[:port], or ssh://..."""
    found = re.fullmatch(
        r"(?:ssh://)?(?:(?P<user>.+)@)?(?:\[(?P<v6>.+)\]|(?P<name>[^:]+))(?::(?P<port>\d+))?/?",
        text,
    )
    if found is None:
        raise ValueError(f"cannot read ProxyJump {text!r}")
    address = found["v6"] or found["name"]
    port = int(found["port"]) if found["port"] else None
    return Host(name=address, address=address, user=found["user"], port=port)


def _settings(host: Host, options: Options) -> dict[str, str | list[str]]:
    """ssh_config for a host's address, then what it says for the host's inventory name alone."""
    if not whoami.user():  # paramiko asks for it, as ssh does
        raise TransportError(host.name, f"uid {os.getuid()} has no name here: set LOGNAME")
    config = _config(options.ssh_config.expanduser(), host)
    found: dict[str, str | list[str]] = {**config.lookup(host.address)}
    if host.name != host.address:
        general = config.lookup("")
        named = config.lookup(host.name)
        for key in named.keys() - {"hostname", "proxycommand"}:
            if found.get(key) == general.get(key):
                found[key] = named[key]
    return found


def _config(path: Path, host: Host) -> paramiko.SSHConfig:
    """ssh_config below the inventory's own values, which win as whatever comes first does."""
    head = [f"Port {host.port}"] if host.port else []
    head += [f"User {host.user}"] if host.user else []
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    with _LOCK:
        return _parse(path, stamp, "\n".join(head))


@lru_cache(maxsize=64)
def _parse(path: Path, stamp: int, head: str) -> paramiko.SSHConfig:
    lines = _included(path, 0) if stamp else ()
    return paramiko.SSHConfig.from_text("\n".join([head, *lines]))


def _included(path: Path, depth: int) -> Iterator[str]:
    """The lines of an ssh_config with its Includes in place, which paramiko does not know."""
    if depth > 16:
        raise ValueError(f"{path}: too many nested Includes")
    block = "Host *"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        word, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if word.lower() in ("host", "match"):
            block = line
        if word.lower() != "include":
            yield line
            continue
        for pattern in shlex.split(rest):
            absolute = Path("~/.ssh").expanduser() / Path(pattern).expanduser()
            for file in sorted(Path("/").glob(str(absolute.relative_to("/")))):
                yield from _included(file, depth + 1)
        yield block


def _endpoint(
    host: Host, options: Options, goal: Host, settings: dict[str, str | list[str]]
) -> Endpoint:
    def one(key: str, default: str = "") -> str:
        return str(settings.get(key) or default)

    address = one("hostname", host.address)
    port = int(one("port", "22"))
    user = one("user") or whoami.user()
    key = [host.key] if host.key else list(settings.get("identityfile", []))
    alias = one("hostkeyalias")
    name = alias.lower() or hostkeys.known_name(address, port)
    entries = hostkeys.find(_known_hosts(one("userknownhostsfile"), options), name)
    remedy = f"inferfleet trust {goal.name}" if host is goal else f"ssh {host.address}"
    certificate = one("certificatefile")
    proxy = one("proxycommand")
    if proxy and not all(re.fullmatch(r"[\w.:%@+][\w.:%@+-]*", word) for word in (address, user)):
        raise ValueError(f"{user}@{address} has characters that a ProxyCommand must not see")
    return Endpoint(
        host=goal.name,
        title="" if host is goal else f"jump host {host.address}: ",
        address=address,
        port=port,
        user=user,
        timeout=float(one("connecttimeout", str(options.connect_timeout))),
        identities=_paths(*(key or DEFAULT_IDENTITIES)),
        certificates=_paths(certificate) if certificate else (),
        named=bool(key),
        only=bool(host.key) or one("identitiesonly").lower() == "yes",
        proxy=proxy,
        expected=hostkeys.Expected(alias or address, name, entries, host.host_keys, remedy),
    )


def _paths(*texts: str) -> tuple[Path, ...]:
    return tuple(Path(os.path.expandvars(text)).expanduser() for text in texts)


def _known_hosts(configured: str, options: Options) -> tuple[Path, ...]:
    """The caller's files; UserKnownHostsFile stands in for the user's own."""
    if not configured:
        return tuple(path.expanduser() for path in options.known_hosts)
    others = [path for path in options.known_hosts if path != USER_KNOWN_HOSTS]
    return (*_paths(*shlex.split(configured)), *others)
