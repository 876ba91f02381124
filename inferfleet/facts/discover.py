"""What a host is, for people: a table, and the inventory entry that says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inferfleet.capacity import CapacityError, gpu
from inferfleet.facts import editing, weights
from inferfleet.facts.case import GIB, described, devices, gib, orphaned
from inferfleet.facts.document import Facts, GpuFacts
from inferfleet.facts.gpu_checks import same_model
from inferfleet.model import Host

_YES = {True: "on", False: "off", None: "-"}


def entry(facts: Facts) -> dict[str, str]:
    """The keys of an inventory entry that facts can tell, each a line of YAML."""
    found = {}
    if facts.gpus:
        kinds = [(_short(gpu.name), _slices(gpu)) for gpu in facts.gpus]
        counted = ((kind, len(list(same))) for kind, same in groupby(kinds))
        found["gpus"] = "[" + ", ".join(_one(*kind, count) for kind, count in counted) + "]"
    if facts.ram_total:
        found["ram_gib"] = str(facts.ram_total // GIB)
    if disk := facts.disk_of(weights.CACHE):
        found["disk_gib"] = str(disk.total // GIB)
    return found


def _slices(gpu: GpuFacts) -> tuple[str, ...]:
    """Profiles of its MIG slices, such as "3g.71gb"; none when it is whole."""
    return tuple(one.name.partition(" MIG ")[2] for one in gpu.mig_instances) if gpu.mig else ()


def _one(name: str, mig: tuple[str, ...], count: int) -> str:
    quoted = name if re.fullmatch(r"[A-Za-z][A-Za-z0-9 ._-]*", name) else f'"{name}"'
    words = [f"model: {quoted}"]
    if mig:
        words.append(f"mig: [{', '.join(mig)}]")
    if count > 1:
        words.append(f"count: {count}")
    return "{" + ", ".join(words) + "}"


def _short(name: str) -> str:
    """The name people use: the catalogue's, else the driver's without its maker."""
    try:
        return gpu(name).name
    except CapacityError:
        return re.sub(r"^NVIDIA |GeForce |[^\w .-]", "", name).strip()


def differing(host: Host, facts: Facts) -> dict[str, str]:
    """What of `entry` the inventory says otherwise; a GPU by another name is no difference."""
    found = entry(facts)
    known = [one.model for one in host.gpus]
    names = [device.name for device in devices(facts)]
    if len(known) == len(names) and all(map(same_model, known, names)):
        found.pop("gpus", None)
    for key, said in (("ram_gib", host.ram_gib), ("disk_gib", host.disk_gib)):
        if said is not None and key in found and float(found[key]) == said:
            del found[key]
    return found


def write(folder: Path, host: Host, facts: Facts) -> tuple[Path, dict[str, str]]:
    """Bring the host's entry up to date: the file, and what was set. Raises Error."""
    path, values = editing.defining(folder, host.name), differing(host, facts)
    if values:
        text = path.read_text(encoding="utf-8")
        path.write_text(editing.updated(text, host.name, values), encoding="utf-8")
    return path, values


# For people


def show(out: Console, facts: Facts) -> None:
    """The host, its GPUs with what runs on them, its containers, disks and ports."""
    out.print(f"[bold]{facts.host}[/]")
    for line in _lines(facts):
        out.print(f"  {escape(line)}")
    if facts.gpus:
        out.print(_table(facts))
    for one in facts.gpus:
        for process in one.processes:
            held = f", {gib(process.memory)}" if process.memory else ""
            note = " - orphaned" if orphaned(process) else ""
            out.print(f"  GPU {one.index}: {escape(described(process))}{held}{note}")
    out.print("  as an inventory entry:")
    for key, value in entry(facts).items():
        out.print(f"    {escape(f'{key}: {value}')}")


def _lines(facts: Facts) -> Iterator[str]:
    yield f"{facts.os}, Linux {facts.kernel}, {facts.machine}, Python {facts.python}"
    yield f"{facts.cpus} CPUs ({facts.cpu or 'unknown'}), {gib(facts.ram_total)} memory"
    yield from (
        f"{d.mount}: {gib(d.free)} of {gib(d.total)} free ({d.kind})"
        for d in facts.disks
        if d.total >= GIB
    )
    yield _software(facts)
    if facts.listeners:
        yield "listens: " + ", ".join(f"{one.port} {one.name}".strip() for one in facts.listeners)
    if abs(facts.clock_offset or 0) >= 1:
        yield f"its clock is off by {facts.clock_offset:+.0f} s"
    yield from (f"could not be looked at: {problem}" for problem in facts.problems)
    if facts.driver:
        yield f"driver {facts.driver}, CUDA {facts.cuda or '-'} (by {facts.gpu_source})"
    elif not facts.gpus:
        yield f"no GPUs: {facts.gpu_why}"


def _software(facts: Facts) -> str:
    found = facts.containers
    cgroup = f" (cgroup driver {found.cgroup_driver})" if found.cgroup_driver else ""
    parts = {
        f"Docker{cgroup}": found.docker,
        "Compose": found.compose,
        "podman": found.podman,
        "NVIDIA toolkit": found.toolkit,
        "CDI": ", ".join(found.cdi_specs),
    }
    said = [f"{name} {version}" for name, version in parts.items() if version]
    return ", ".join(said) or "no containers: neither Docker nor podman runs"


def _table(facts: Facts) -> Table:
    table = Table(box=None, pad_edge=True, padding=(0, 1))
    for heading in ("GPU", "name", "memory", "free", "CC", "MIG", "ECC", "NVLinks", "UUID"):
        table.add_column(heading, no_wrap=True)
    for one in facts.gpus:
        table.add_row(*_row(one))
        for slice_ in one.mig_instances:
            sizes = [gib(n) if n is not None else "-" for n in _sizes(slice_)]
            table.add_row("", slice_.name, *sizes, "", "", "", "", slice_.uuid)
    return table


def _sizes(one: object) -> tuple[int | None, int | None]:
    return getattr(one, "memory_total", None), getattr(one, "memory_free", None)


def _row(one: GpuFacts) -> list[str]:
    sizes = [gib(size) if size is not None else "-" for size in _sizes(one)]
    capability = ".".join(map(str, one.capability)) or "-"
    flags = [_YES[one.mig], _YES[one.ecc], str(one.nvlinks)]
    return [str(one.index), escape(one.name), *sizes, capability, *flags, one.uuid]
