"""What a host is, as it told: frozen dataclasses. Sizes are bytes, ages and offsets seconds.

Everything has a value for "not known" (None, "" or empty): a part that a host could not tell is
missing, never wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU. `unit` is its systemd service, "" for none."""

    pid: int
    memory: int | None = None
    name: str = ""
    command: str = ""
    user: str = ""
    age: float | None = None
    parent: int = 0
    parent_name: str = ""
    unit: str = ""
    container: str = ""  # a container's id


@dataclass(frozen=True, slots=True)
class MigInstance:
    """A slice of a GPU in MIG mode."""

    name: str = ""
    uuid: str = ""
    memory_total: int | None = None
    memory_free: int | None = None
    memory_used: int | None = None


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU; `index` counts in PCI order. None: this GPU or driver has no such thing."""

    index: int
    name: str = ""
    uuid: str = ""
    pci: str = ""
    memory_total: int | None = None
    memory_free: int | None = None
    memory_used: int | None = None
    capability: tuple[int, ...] = ()  # compute capability: (9, 0)
    mig: bool | None = None
    mig_pending: bool = False  # the mode changes with the next reset
    mig_instances: tuple[MigInstance, ...] = field(default=(), metadata={"of": MigInstance})
    ecc: bool | None = None
    ecc_errors: int | None = None  # uncorrected ones since the driver was loaded
    persistence: bool | None = None
    nvlinks: int = 0  # active ones
    processes: tuple[GpuProcess, ...] = field(default=(), metadata={"of": GpuProcess})


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system; `free` is what a program may still write."""

    mount: str
    device: str = ""
    kind: str = ""
    total: int = 0
    free: int = 0
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port that is listened on; `pid` 0 where the process cannot be seen."""

    address: str
    port: int
    pid: int = 0
    name: str = ""
    command: str = ""
    user: str = ""
    age: float | None = None
    parent: int = 0
    parent_name: str = ""
    unit: str = ""
    container: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """A running container. `gpu`: how GPUs came in: "cdi", "hook", "runtime", or "" for none."""

    id: str
    name: str = ""
    image: str = ""
    project: str = ""  # of Docker Compose
    gpu: str = ""
    ports: tuple[tuple[str, int], ...] = ()  # published: address, port


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """Docker, podman and NVIDIA's toolkit; an empty version: it is not there."""

    docker: str = ""  # the engine that runs
    docker_client: str = ""
    compose: str = ""
    cgroup_driver: str = ""
    cgroup_version: str = ""
    runtimes: tuple[str, ...] = ()
    default_runtime: str = ""
    podman: str = ""
    toolkit: str = ""
    toolkit_mode: str = ""
    cdi_specs: tuple[str, ...] = ()
    device_links: bool = False  # /dev/char/195:*, which runc 1.1.3 to 1.1.6 needs
    running: tuple[Container, ...] = field(default=(), metadata={"of": Container})


@dataclass(frozen=True, slots=True)
class Facts:
    """One host. `problems` are the parts that could not be looked at."""

    host: str
    os: str = ""
    kernel: str = ""
    machine: str = ""
    python: str = ""
    cpu: str = ""
    cpus: int = 0
    uid: int = 0  # whom we are there, with sudo if the inventory says so
    sudo: bool = False  # whether root is to be had without a password
    folder: str = ""  # the root of a host that is only a folder
    ram_total: int = 0
    ram_available: int = 0
    disks: tuple[Disk, ...] = field(default=(), metadata={"of": Disk})
    gpu_source: str = ""  # "nvml", "nvidia-smi" or ""
    gpu_why: str = ""  # why there are no GPUs
    driver: str = ""
    cuda: str = ""  # the newest CUDA the driver runs
    gpus: tuple[GpuFacts, ...] = field(default=(), metadata={"of": GpuFacts})
    containers: ContainerFacts = field(default=ContainerFacts(), metadata={"of": ContainerFacts})
    listeners: tuple[Listener, ...] = field(default=(), metadata={"of": Listener})
    synchronized: bool | None = None  # whether something keeps the clock
    clock_offset: float | None = None  # host minus controller
    sizes: Mapping[str, int] = field(default_factory=dict)  # see Request
    reach: Mapping[str, str] = field(default_factory=dict)  # name:port -> why not, or ""
    problems: tuple[str, ...] = ()

    def disk_of(self, path: str) -> Disk | None:
        """The file system that `path` lies on, or would."""
        fitting = (d for d in self.disks if f"{path}/".startswith(d.mount.rstrip("/") + "/"))
        return max(fitting, key=lambda disk: len(disk.mount), default=None)

    def project_of(self, container: str) -> str:
        """The Compose project of a container's id, or ""."""
        return next((c.project for c in self.containers.running if c.id == container), "")


def parse(data: Mapping[str, Any]) -> Facts:
    """Facts from a host's answer; unknown keys are let pass. TypeError or ValueError if odd."""
    return _built(Facts, data)


def _built(kind: type[T], data: Mapping[str, Any]) -> T:
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: _value(known[k].metadata, v) for k, v in data.items() if k in known})


def _value(metadata: Mapping[str, Any], value: Any) -> Any:
    if kind := metadata.get("of"):
        many = isinstance(value, list)
        return tuple(_built(kind, each) for each in value) if many else _built(kind, value)
    return _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
