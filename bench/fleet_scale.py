"""How long an inventory of 100, 1,000 and 10,000 hosts takes: load and check, plan, render.

    python bench/fleet_scale.py [HOSTS ...]

Seconds of this process's CPU; nothing is sent anywhere.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import make

from inferfleet import checks, plan, tree
from inferfleet.project import Project

STAGES = ("load", "check", "plan", "render", "write")


def stages(folder: Path, hosts: int) -> dict[str, float]:
    """CPU seconds of each stage. `load` parses and validates; it holds a run of `check` too."""
    project = Project(make.fleet(folder, hosts))
    took: dict[str, float] = {}

    def measured(stage: str, work: Callable[[], Any]) -> Any:
        began = process_time()
        result = work()
        took[stage] = process_time() - began
        return result

    inventory = measured("load", lambda: project.inventory)
    faults = measured("check", lambda: list(checks.check(inventory, project.library)))
    if faults:
        raise SystemExit(f"the fleet made for this is wrong: {faults[0]}")
    took["load"] -= took["check"]
    phases = inventory.phases.values()
    plans = measured("plan", lambda: [plan.build(inventory, p, project.library) for p in phases])
    bundles = measured("render", lambda: [project.bundles(p, p.hosts) for p in plans])
    out = folder / "build"
    measured("write", lambda: [tree.write(out / str(n), b) for n, b in enumerate(bundles)])
    return took


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [100, 1_000, 10_000]
    print(f"{'hosts':>7}" + "".join(f"{stage:>9}" for stage in (*STAGES, "all")))
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            took = stages(Path(folder), count)
        seconds = [*(took[stage] for stage in STAGES), sum(took.values())]
        print(f"{count:>7,}" + "".join(f"{second:>8.2f}s" for second in seconds), flush=True)


if __name__ == "__main__":
    main()
