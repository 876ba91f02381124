"""Real hosts on one machine, for tests and for rehearsals by hand; see `inferfleet.lab.hosts`."""

from __future__ import annotations

from inferfleet.lab.host import Bind, LabHost
from inferfleet.lab.hosts import Lab, NoLabError, describe, running, take_down
from inferfleet.lab.machine import install_requirements, requirements

__all__ = [
    "Bind",
    "Lab",
    "LabHost",
    "NoLabError",
    "describe",
    "install_requirements",
    "requirements",
    "running",
    "take_down",
]
