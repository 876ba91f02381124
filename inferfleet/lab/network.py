"""A lab's network: a bridge with an address of this machine, and for each host a cable to it.

Subnets are /24s of 198.18.0.0/16, set aside for measuring network devices (RFC 2544), so that they
meet nobody's real network. Nothing is routed or translated: hosts reach one another and the bridge.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from pathlib import Path

from inferfleet.errors import Error
from inferfleet.lab.machine import command

FIRST = 10  # the last byte of the first host's address; the bridge has 1
MOST = 240  # hosts of one lab
DISABLED, FORWARDING = 0, 3  # states of a bridge's port, as linux/if_bridge.h counts them


def bridge(number: int) -> str:
    """The bridge of subnet `number`; short, as interface names have 15 characters at most."""
    return f"iflab{number}"


def cable(number: int, index: int) -> str:
    """This machine's end of the cable to host `index` of subnet `number`."""
    return f"iflab{number}h{index}"


def gateway(number: int) -> str:
    """This machine's address in subnet `number`."""
    return f"198.18.{number}.1"


def address(number: int, index: int) -> str:
    """The address of host `index` in subnet `number`."""
    return f"198.18.{number}.{FIRST + index}"


def free_subnet(claimed: Collection[int]) -> int:
    """A subnet that no lab claims and no interface or route of this machine touches."""
    routes = json.loads(command("ip", "-json", "-4", "route", "show", "table", "all"))
    taken = [_network(r["dst"]) for r in routes if r["dst"] != "default"]
    for number in range(256):
        subnet = ipaddress.ip_network(f"198.18.{number}.0/24")
        if number not in claimed and not any(subnet.overlaps(net) for net in taken):
            return number
    raise Error("all of 198.18.0.0/16 is taken; take a lab down first (inferfleet lab --down)")


def _network(destination: str) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(destination, strict=False)


def add_bridge(number: int, lab: str) -> None:
    """Make the bridge of subnet `number` and give it this machine's address."""
    name = bridge(number)
    batch = f"""
        link add {name} type bridge mcast_snooping 0
        link set {name} alias inferfleet-{lab}
        addr add {gateway(number)}/24 dev {name}
        link set {name} up
    """
    command("ip", "-batch", "-", stdin=batch)


def add_cable(number: int, index: int, namespace: str) -> None:
    """Make host `index`'s network namespace and the cable from its eth0 to the bridge."""
    name = cable(number, index)
    outside = f"""
        netns add {namespace}
        link add {name} type veth peer name eth0 netns {namespace}
        link set {name} alias {namespace}
        link set {name} master {bridge(number)} up
    """
    inside = f"""
        addr add {address(number, index)}/24 dev eth0
        link set lo up
        link set eth0 up
    """
    command("ip", "-batch", "-", stdin=outside)
    command("ip", "-netns", namespace, "-batch", "-", stdin=inside)


def plug(number: int, index: int) -> None:
    """Put the cable back into the bridge; fine when it is in."""
    name = cable(number, index)
    # A port whose cable has only just been made comes up by itself, and cannot be told to before.
    if Path(f"/sys/class/net/{name}/operstate").read_text() == "up\n":
        _set_port(name, FORWARDING)


def unplug(number: int, index: int) -> None:
    """Pull the cable out of the bridge: what is sent either way is lost, and no end is told."""
    _set_port(cable(number, index), DISABLED)


def _set_port(name: str, state: int) -> None:
    # Not "down": both ends would notice, and the kernel takes a second to bring a link up again.
    command("bridge", "link", "set", "dev", name, "state", str(state))


def remove_cable(number: int, index: int, namespace: str) -> None:
    """Undo `add_cable`, whatever of it is there."""
    _remove_link(cable(number, index))
    if Path("/run/netns", namespace).exists():
        command("ip", "netns", "delete", namespace)


def remove_bridge(number: int) -> None:
    """Undo `add_bridge`, whatever of it is there."""
    _remove_link(bridge(number))


def _remove_link(name: str) -> None:
    if Path("/sys/class/net", name).exists():
        command("ip", "link", "delete", name)
