"""The network: who listens where, which names resolve, what can be reached."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from inferfleet.facts.onhost.processes import process

LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp
PATIENCE = 6.0  # seconds for all names and connections together
CONNECT = 4.0


def listeners() -> dict[str, Any]:
    """TCP ports that are listened on, each with the process behind it where it can be seen."""
    found = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            cells = line.split()
            if cells[3] == LISTENING:
                address, port = endpoint(cells[1])
                found[cells[9]] = (address, port)
    owners = _owners(set(found))
    return {
        "listeners": [
            {"address": address, "port": port, **owners.get(inode, {})}
            for inode, (address, port) in sorted(found.items(), key=lambda one: one[1][::-1])
        ]
    }


def endpoint(text: str) -> tuple[str, int]:
    """Address and port from the hexadecimal words, each in host order, of /proc/net/tcp."""
    words, _, port = text.partition(":")
    raw = b"".join(int(words[n : n + 8], 16).to_bytes(4, "little") for n in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address), int(port, 16)


def _owners(inodes: set[str]) -> dict[str, dict[str, Any]]:
    """The process with the lowest number for each socket; those of others only root can see."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, dict[str, Any]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        for link in _links(pid):
            inode = wanted.get(link)
            if inode and inode not in found:
                found[inode] = process(pid)
    return found


def _links(pid: int) -> list[str]:
    links = []
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    except OSError:  # gone, or another user's
        pass
    return links


def reach(wanted: list[str]) -> dict[str, Any]:
    """For each `name:port` why it cannot be reached, or ""; all are tried at the same time."""
    answers: dict[str, str] = {}

    def attempt(target: str) -> None:
        answers[target] = _attempt(target)

    threads = [threading.Thread(target=attempt, args=(one,), daemon=True) for one in wanted]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return {"reach": {one: answers.get(one, "no answer in time") for one in wanted}}


def _attempt(target: str) -> str:
    name, _, port = target.rpartition(":")
    try:
        socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        return f"its name does not resolve ({error.strerror or error})"
    try:
        socket.create_connection((name, int(port)), timeout=CONNECT).close()
    except OSError as error:
        return f"no connection ({error.strerror or error})"
    return ""
