"""The GPU catalogue: memory as the driver reports it, capability, bandwidth and compute.

A MIG slice is a GPU of its own, named as its driver does: `H200 MIG 3g.71gb`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

import yaml

from inferfleet.capacity.dimensions import CapacityError
from inferfleet.capacity.quantization import FORMATS, Quantization

GIB = 1 << 30
MIB = 1 << 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SLICE = re.compile(r"(.+?)\s+MIG\s+(\S+)", re.IGNORECASE)
_ENGINES = re.compile(r"[+-](me|me\.all|gfx)$")  # of a profile's name


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of GPU.

    `memory` is bytes as CUDA reports them (less than the label), `driver_memory` as nvidia-smi
    does; `bandwidth` bytes a second; `bf16_flops` dense operations a second, and `fp8_flops`
    where it has them. `peers` is how GPUs of one host talk: "nvlink", "pcie", or "none" as MIG
    slices do, of which `mig` is the profile.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    driver_memory: int = 0
    bandwidth: float = 0.0
    bf16_flops: float = 0.0
    fp8_flops: float = 0.0
    peers: str = "pcie"
    vendor: str = "nvidia"
    rough: str = ""
    aliases: tuple[str, ...] = ()
    source: str = ""
    mig: str = ""

    @property
    def driver_bytes(self) -> int:
        """Memory as the driver reports it, which is what engine defaults look at."""
        return max(self.driver_memory, self.memory)

    @property
    def has_bf16(self) -> bool:
        """vLLM: bfloat16 needs compute capability 8.0."""
        return self.capability >= (8, 0)

    @property
    def quantizations(self) -> tuple[str, ...]:
        """Weight formats an engine has kernels for on this GPU."""
        return tuple(name for name, each in FORMATS.items() if self.supports(each))

    def supports(self, weights: Quantization) -> bool:
        """Whether a kernel exists (for fp8 and nvfp4 maybe a weight-only one)."""
        return self.vendor == "nvidia" and self.capability >= weights.capability


def read_data(name: str) -> Any:
    """A YAML file of this package, parsed."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=_LOADER)  # noqa: S506  a safe loader, the C one where there is


@cache
def gpus() -> dict[str, GpuSpec]:
    """The catalogue by name."""
    return {name: _spec(name, row) for name, row in read_data("gpus.yaml").items()}


def _spec(name: str, row: dict[str, Any]) -> GpuSpec:
    major, minor = str(row["capability"]).split(".")
    return GpuSpec(
        name=name,
        memory=round(row["cuda_gib"] * GIB),
        capability=(int(major), int(minor)),
        driver_memory=round(row.get("driver_mib", 0) * MIB),
        bandwidth=row.get("gb_per_s", 0) * 1e9,
        bf16_flops=row.get("bf16_tflops", 0) * 1e12,
        fp8_flops=row.get("fp8_tflops", 0) * 1e12,
        peers=row.get("peers", "pcie"),
        vendor=row.get("vendor", "nvidia"),
        rough=row.get("rough", ""),
        aliases=tuple(row.get("aliases", ())),
        source=row.get("source", ""),
    )


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|graphics|[^a-z0-9]", "", name.lower())


@cache
def _index() -> dict[str, GpuSpec]:
    named = {_key(alias): spec for spec in gpus().values() for alias in spec.aliases}
    return named | {_key(name): spec for name, spec in gpus().items()}


def gpu(name: str, memory: int | None = None) -> GpuSpec:
    """The GPU of that name, or the MIG slice, as people or nvidia-smi write it.

    `memory` (bytes, as CUDA reports it) replaces the catalogue's. Raises CapacityError with a
    near name when there is none.
    """
    cut = _SLICE.fullmatch(name)
    found = _slice(_whole(cut[1]), cut[2]) if cut else _whole(name)
    return found if memory is None else with_memory(found, memory)


def _whole(name: str) -> GpuSpec:
    found = _index().get(_key(name))
    if found is None:
        near = get_close_matches(_key(name), list(_index()), 1)
        hint = f"; did you mean {_index()[near[0]].name}?" if near else ""
        raise CapacityError(f"unknown GPU {name!r}{hint}")
    return found


@cache
def _cuts() -> dict[str, dict[str, Any]]:
    return dict(read_data("slices.yaml"))


@cache
def _slice(whole: GpuSpec, profile: str) -> GpuSpec:
    """A slice: its own memory, bandwidth by its parts of the memory, arithmetic by its SMs."""
    table = _cuts().get(whole.name)
    if table is None:
        raise CapacityError(f"no MIG slices of {whole.name} are in the catalogue")
    row = table["slices"].get(_ENGINES.sub("", profile.lower()))
    if row is None:
        known = ", ".join(table["slices"])
        raise CapacityError(f"no MIG profile {profile!r} of {whole.name}; it has {known}")
    memory, share = round(row[0] * GIB), row[1] / table["sms"]
    return replace(
        whole,
        name=f"{whole.name} MIG {profile.lower()}",
        memory=memory,
        driver_memory=memory,
        bandwidth=whole.bandwidth * row[2] / table["parts"],
        bf16_flops=whole.bf16_flops * share,
        fp8_flops=whole.fp8_flops * share,
        peers="none",
        aliases=(),
        source="nvidia-smi mig -lgip; NVIDIA's MIG user guide",
        mig=profile.lower(),
    )


def slices(name: str) -> tuple[GpuSpec, ...]:
    """The MIG slices that a GPU, or the GPU that a slice is of, can be cut into; () for none."""
    whole = _whole(name.partition(" MIG ")[0])
    profiles = _cuts().get(whole.name, {"slices": ()})["slices"]
    return tuple(_slice(whole, profile) for profile in profiles)


def with_memory(spec: GpuSpec, memory: int) -> GpuSpec:
    """The same GPU with the memory (bytes) measured on it; a slice of one is told by its size."""
    whole = abs(memory - spec.memory) <= spec.memory // 12
    return replace(spec, memory=memory, driver_memory=spec.driver_memory if whole else memory)
