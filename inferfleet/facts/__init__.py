"""What hosts really are: asked of them, shown, written to the inventory, held against a plan.

onhost/   runs on the host and answers with one JSON document
ask       sends it over a connection and reads the answer
document  the answer as frozen dataclasses: `Facts`
discover  a table, an inventory entry; `editing` writes it into the inventory's own file
doctor    a plan held against facts: findings, each with what, why and what to do
"""

from inferfleet.facts.ask import Request, collect, collect_over
from inferfleet.facts.document import (
    Container,
    ContainerFacts,
    Disk,
    Facts,
    GpuFacts,
    GpuProcess,
    Listener,
    MigInstance,
    parse,
)

__all__ = [
    "Container",
    "ContainerFacts",
    "Disk",
    "Facts",
    "GpuFacts",
    "GpuProcess",
    "Listener",
    "MigInstance",
    "Request",
    "collect",
    "collect_over",
    "parse",
]
