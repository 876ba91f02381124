"""One host held against its plan: what every check is given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from inferfleet.capacity import Prediction
from inferfleet.facts.document import Facts, GpuFacts, GpuProcess, Listener, MigInstance
from inferfleet.model import Finding, Host, Instance, Plan, Step

GIB = 1 << 30
OWN = "inferfleet-"  # how our units and Compose projects begin

# Children of an engine: with their parent gone, nothing will ever end them.
_CHILDREN = re.compile(r"VLLM::|EngineCore|ollama(_llama_server| runner)|sglang::|ray::")


@dataclass(frozen=True, slots=True)
class Case:
    """`units` are what the plan runs on the host; `ports` those its steps listen on, by step."""

    host: Host
    plan: Plan
    facts: Facts
    units: frozenset[str] = frozenset()
    ports: tuple[tuple[str, str, int], ...] = ()  # who, address ("" for all), port
    predicted: Mapping[str, Prediction] = field(default_factory=dict)  # by instance

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self.plan.steps.get(self.host.name, ()))

    @property
    def rehearsal(self) -> bool:
        return self.plan.rehearsal

    @property
    def instances(self) -> tuple[Instance, ...]:
        return tuple(i for step in self.steps for i in step.instances)

    def on_gpus(self) -> Iterator[tuple[str, Instance]]:
        """Engines, by role, that run on GPUs here; none in a rehearsal."""
        for step in self.steps:
            for instance in step.instances:
                if instance.gpus and not self.rehearsal and not self.facts.folder:
                    yield step.role, instance

    def error(self, check: str, what: str, why: str, remedy: str) -> Finding:
        return Finding(self.host.name, check, "error", what, why, remedy)

    def warning(self, check: str, what: str, why: str, remedy: str) -> Finding:
        return Finding(self.host.name, check, "warning", what, why, remedy)

    def ours(self, process: GpuProcess | Listener) -> bool:
        """Whether it belongs to what inferfleet runs, and a push will restart or remove it."""
        if isinstance(process, GpuProcess) and orphaned(process):
            return False
        project = self.facts.project_of(process.container)
        return process.unit.startswith(OWN) or process.unit in self.units or project.startswith(OWN)


@dataclass(frozen=True, slots=True)
class Device:
    """What an inventory GPU stands for: a GPU, or a slice of one in MIG mode."""

    gpu: GpuFacts
    slice: MigInstance | None = None

    @property
    def name(self) -> str:
        return self.slice.name if self.slice else self.gpu.name

    @property
    def memory_total(self) -> int | None:
        return (self.slice or self.gpu).memory_total

    @property
    def memory_free(self) -> int | None:
        return (self.slice or self.gpu).memory_free


def devices(facts: Facts) -> list[Device]:
    """What there is to place engines on, in the inventory's order: slices in place of their GPU."""
    found = []
    for gpu in facts.gpus:
        slices = gpu.mig_instances if gpu.mig else ()
        found += [Device(gpu, each) for each in slices] or [Device(gpu)]
    return found


def orphaned(process: GpuProcess) -> bool:
    """Whether it is an engine's child whose engine is gone."""
    child = _CHILDREN.search(f"{process.name} {process.command}")
    adopted = process.parent <= 1 or process.parent_name in ("systemd", "init")
    return bool(child) and adopted and not process.container


def described(process: GpuProcess | Listener) -> str:
    """`python3 (pid 4242, ana, 3 d)`: who it is, in a few words."""
    if not process.pid:
        return "a process that we may not see"
    name = process.name
    if isinstance(process, GpuProcess) and (child := _CHILDREN.search(process.command)):
        name = process.command.split()[0] if child.start() == 0 else process.command[:60]
    parts = [f"pid {process.pid}", process.user, span(process.age)]
    parts.append(process.unit or (process.container and f"container {process.container[:12]}"))
    return f"{name or 'a process'} ({', '.join(part for part in parts if part)})"


def span(seconds: float | None) -> str:
    """An age in its largest unit: `3 d`, `5 h`, `2 min`, `9 s`."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def gib(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / GIB:.1f} GiB"
