"""testinfra over our own transport: same connection, same host keys, same sudo."""

from __future__ import annotations

from typing import Any

from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host

from inferfleet.transport import Transport


class Backend(BaseBackend):
    """What testinfra's modules run their commands on."""

    NAME = "inferfleet"

    def __init__(self, way: Transport) -> None:
        super().__init__(way.host.name)
        self.way = way

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        line = self.get_command(command, *args)
        done = self.way.run(line, timeout=120)
        return self.result(
            done.status, self.encode(line), done.stdout, done.stderr.encode(errors="replace")
        )


def host(way: Transport) -> Host:
    """testinfra's host for an open transport."""
    return Host(Backend(way))
