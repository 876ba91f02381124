"""A storm over a production phase on hosts of the lab, while clients ask for tokens.

    python bench/chaos.py [--seconds 300] [--seed N] [--clients 32] [--defaults] [--json]

A balancer, two gateways and four simulated engines on two hosts. At random, engines are killed,
stopped, hang, answer 503, reset connections or are slow, hosts are cut off, workers of gateways
are killed and gateways reloaded; one healthy engine and one gateway are always spared. Needs root
on Debian or Ubuntu. With --defaults the gateways have their own timeouts, not quick ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from storm import site
from storm.clients import Load, Told
from storm.faults import Storm
from storm.site import GATEWAY, QUICK, Site, Used, said, wait

from inferfleet.lab import Lab, wheels

RECOVERED = 30.0  # seconds after the storm until all is as it was
BREAKS = 2.0  # seconds a killed worker's successor takes, while its port is open
WARM = 6.0  # seconds of load before a worker's use is taken for usual
MORE_MEMORY, MORE_DESCRIPTORS = 25, 8  # MB of malloc's slack; listeners, probes and /status


@dataclass
class Report:
    """How it went; `problems` must be empty."""

    seed: int
    seconds: float
    faults: dict[str, int]
    ends: dict[str, int]
    by_kind: dict[str, dict[str, int]]
    first_byte_seconds: dict[str, float]
    recovered_after: float
    used: dict[str, dict[str, Any]]
    problems: list[str] = field(default_factory=list)


def weather(found: Site, seconds: float, seed: int, clients: int) -> Report:
    """Load and storm for so long; then what is left of it."""
    load = Load(found, random.Random(seed))  # noqa: S311
    storm = Storm(found, random.Random(seed + 1))  # noqa: S311
    before = asyncio.run(_warm(found, clients))
    asyncio.run(_both(load, storm, seconds, clients))
    problems: list[str] = []
    took = _recovered(found, problems)
    after = {gateway.name: site.used(gateway) for gateway in found.gateways}
    problems += [*_judged(load.told, storm), *_leaks(before, after), *_journals(found)]
    return Report(
        seed=seed,
        seconds=seconds,
        faults=dict(storm.happened),
        ends=dict(Counter(told.end for told in load.told)),
        by_kind=_by_kind(load.told),
        first_byte_seconds=_spread([told.first for told in load.told if told.status]),
        recovered_after=round(took, 1),
        used={n: {"before": before[n], "after": [asdict(u) for u in after[n]]} for n in after},
        problems=problems,
    )


async def _warm(found: Site, clients: int) -> dict[str, dict[str, int]]:
    """What each gateway's worker uses after some load without a storm."""
    load = Load(found, random.Random(0))  # noqa: S311
    asking = asyncio.create_task(load.run(clients))
    await asyncio.sleep(WARM)
    load.over = True
    await asking
    if bad := [told.wrong for told in load.told if told.wrong]:
        raise RuntimeError(f"not even without a storm: {bad[0]}")
    await asyncio.to_thread(_idle, found)
    return {
        gateway.name: {k: v for k, v in asdict(site.used(gateway)[0]).items() if k != "pid"}
        for gateway in found.gateways
    }


def _idle(found: Site) -> None:
    """Wait until kept connections are closed on both sides of the gateways: 4 s."""
    for gateway in found.gateways:
        wait(lambda g=gateway: site.busy(g) == 0, f"{gateway.name} has nothing to do", 10)
    time.sleep(6)


async def _both(load: Load, storm: Storm, seconds: float, clients: int) -> None:
    asking = asyncio.create_task(load.run(clients))
    try:
        await storm.run(seconds)
    finally:
        load.over = True
        await asking


def _recovered(found: Site, problems: list[str]) -> float:
    """Seconds until each gateway asks all engines again, with one worker and nothing under way."""
    names = {engine.name for engine in found.engines}
    began = time.monotonic()
    for gateway in found.gateways:
        try:
            left = RECOVERED - (time.monotonic() - began)
            wait(lambda g=gateway: site.well(g) == names, "all engines are asked again", left)
            wait(lambda g=gateway: site.busy(g) == 0, "nothing is under way", 5)
        except TimeoutError as error:
            problems.append(f"{gateway.name}: {error}: {site.told(gateway, '/status')[1]}")
    took = time.monotonic() - began
    _idle(found)
    return took


def _judged(told: list[Told], storm: Storm) -> list[str]:
    """Answers that no client may get, and what happened before the first of them."""
    found = []
    for each in told:
        why = each.wrong
        if each.end == "broken" and not _met(each, storm.kills):
            why = "broken off in silence, and no worker was killed"
        if why:
            found.append((each.began + each.seconds, f"{each.kind}: {why} ({each.seconds:.1f} s)"))
    if not found:
        return []
    first = min(found)[0]
    before = [(at, what) for at, what in storm.diary if first - 20 < at < first + 1]
    return [f"{at - first:+.1f} s: {what}" for at, what in sorted(before) + sorted(found)]


def _met(told: Told, kills: list[tuple[float, str]]) -> set[str]:
    """The gateways whose worker was killed while this client waited."""
    end = told.began + told.seconds
    return {name for at, name in kills if told.began - BREAKS <= at <= end}


def _leaks(before: dict[str, dict[str, int]], after: dict[str, list[Used]]) -> list[str]:
    """Workers that use more than they did."""
    found = []
    for name, now in after.items():
        if len(now) != 1:
            found.append(f"{name}: {len(now)} workers are left")
        for used in now:
            memory, descriptors = before[name]["resident"], before[name]["descriptors"]
            if used.resident > memory + MORE_MEMORY:
                found.append(f"{name}: {used.resident} MB, and {memory} MB before")
            if used.descriptors > descriptors + MORE_DESCRIPTORS:
                found.append(f"{name}: {used.descriptors} descriptors, and {descriptors} before")
    return found


def _journals(found: Site) -> list[str]:
    """What gateways complain about that nobody foresaw."""
    problems = []
    for gateway in found.gateways:
        text = said(gateway, f"journalctl --sync; journalctl -q -u {GATEWAY} -o cat --no-pager")
        if at := text.find("Traceback") + 1:
            problems.append(f"{gateway.name}: {text[max(0, at - 300) : at + 3000]}")
    return problems


def _by_kind(told: list[Told]) -> dict[str, dict[str, int]]:
    return {
        kind: dict(Counter(each.end for each in told if each.kind == kind))
        for kind in sorted({each.kind for each in told})
    }


def _spread(values: list[float]) -> dict[str, float]:
    found = sorted(values) or [0.0]
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(found[min(int(share * len(found)), len(found) - 1)], 2)
        for name, share in at.items()
    }


def main() -> int:
    """Boot, storm, report; 1 when a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of the storm")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--clients", type=int, default=32, help="at once")
    parser.add_argument("--defaults", action="store_true", help="the gateways' own timeouts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    folder = wheels.folder(lambda text: print(text, file=sys.stderr))
    if folder is None:
        return 2
    with tempfile.TemporaryDirectory() as work, Lab.boot(site.NAMES, name="chaos") as lab:
        settings = {} if options.defaults else QUICK
        found = site.provisioned(lab, Path(work) / "project", folder, settings)
        report = weather(found, options.seconds, options.seed, options.clients)
    print(json.dumps(asdict(report), indent=2) if options.json else shown(report))
    return 1 if report.problems else 0


def shown(report: Report) -> str:
    """The report for people."""
    lines = [
        f"{report.seconds:g} s of storm, seed {report.seed}, {sum(report.ends.values())} requests"
    ]
    lines += [f"  {count:5}  {name}" for name, count in sorted(report.faults.items())]
    lines += [f"answers: {report.ends}, of which"]
    lines += [f"  {kind}: {ends}" for kind, ends in report.by_kind.items()]
    lines += [f"seconds until the first byte: {report.first_byte_seconds}"]
    lines += [f"all as before {report.recovered_after} s after the storm"]
    lines += [f"  {name}: {use}" for name, use in report.used.items()]
    lines += [f"PROBLEM {problem}" for problem in report.problems[:20]]
    return "\n".join([*lines, f"{len(report.problems)} lines of problems"])


if __name__ == "__main__":
    raise SystemExit(main())
