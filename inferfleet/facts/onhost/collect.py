"""One request in, one JSON document out; a part that fails leaves the others as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from inferfleet.facts.onhost import containers, gpus, machine, network

MARK = "inferfleet facts 1 "
FAILURES = (
    ImportError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    subprocess.SubprocessError,
)


def main() -> None:
    """Answer the request that is the next line of standard input."""
    request = json.loads(sys.stdin.buffer.readline())
    answer = collect(request)
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


def collect(request: dict[str, Any]) -> dict[str, Any]:
    """Everything about this host. `request`: `reach` (list of name:port), `sizes` (name: paths)."""
    answer: dict[str, Any] = {"host": os.uname().nodename, "problems": []}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "system": machine.system,
        "memory": machine.memory,
        "disks": machine.disks,
        "clock": machine.clock,
        "GPUs": gpus.gpus,
        "containers": containers.containers,
        "listening ports": network.listeners,
        "stored models": lambda: machine.sizes(request.get("sizes", {})),
        "network": lambda: network.reach(request.get("reach", [])),
    }
    for name, part in parts.items():
        try:
            answer.update(part())
        except FAILURES as error:
            answer["problems"].append(f"{name}: {type(error).__name__}: {error}")
    answer["time"] = time.time()  # last: the controller compares it on arrival
    return answer
