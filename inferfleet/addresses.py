"""What is wrong with hosts' addresses: where SSH finds them, where engines listen. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from inferfleet.model import Host, Inventory, Plan
from inferfleet.schema import Fault

SSH = 22


def check(inventory: Inventory) -> Iterator[Fault]:
    """Two hosts at one place, and addresses that stand for every interface of a host."""
    reached: dict[tuple[str, int], str] = {}
    private: dict[str, str] = {}
    for host in inventory.hosts.values():
        yield from _everywhere(host)
        first = reached.setdefault((_canonical(host.address), host.port or SSH), host.name)
        if first != host.name:
            yield _shared(host, "address", first)
        if host.private_address != host.address and not _has(host.private_address, "is_loopback"):
            first = private.setdefault(_canonical(host.private_address), host.name)
            if first != host.name:
                yield _shared(host, "private_address", first)


def listening(built: Plan) -> Iterator[Fault]:
    """Hosts whose engines listen for others, at a name: Docker and systemd want an address."""
    for host in built.hosts:
        listens = {i.listen for step in built.steps[host.name] for i in step.instances}
        for name in sorted(listens):
            if _ip(name) is None:
                said = f"engines listen on '{name}', which is no IP address: add private_address"
                yield Fault(("hosts", host.name, "private_address"), said)


def _everywhere(host: Host) -> Iterator[Fault]:
    for key in ("address", "private_address"):
        value = getattr(host, key)
        if _has(value, "is_unspecified") and (key == "address" or value != host.address):
            said = f"{value} stands for every interface; name one address of the host"
            yield Fault(("hosts", host.name, key), said)


def _shared(host: Host, key: str, first: str) -> Fault:
    said = f"has the {key} of '{first}', {getattr(host, key)}: two hosts cannot share one"
    return Fault(("hosts", host.name, key), said)


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(address)
    except ValueError:
        return None


def _has(address: str, what: str) -> bool:
    return bool(getattr(_ip(address), what, False))


def _canonical(address: str) -> str:
    """One spelling for each address: `::1` has several, and names know no case."""
    return str(_ip(address) or address.lower())
