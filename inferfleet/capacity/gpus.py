"""The GPU catalogue: memory as the driver reports it, capability, bandwidth and compute."""

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


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """One kind of GPU.

    `memory` is bytes as CUDA reports them (less than the label), `driver_memory` as nvidia-smi
    does; `bandwidth` bytes a second; `bf16_flops` dense operations a second, and `fp8_flops`
    where it has them. `peers` is how GPUs of one host talk: "nvlink" or "pcie".
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
    """The GPU of that name, as people or nvidia-smi write it.

    `memory` (bytes, as CUDA reports it) replaces the catalogue's. Raises CapacityError with a
    near name when there is none.
    """
    found = _index().get(_key(name))
    if found is None:
        near = get_close_matches(_key(name), list(_index()), 1)
        hint = f"; did you mean {_index()[near[0]].name}?" if near else ""
        raise CapacityError(f"unknown GPU {name!r}{hint}")
    return found if memory is None else with_memory(found, memory)


def with_memory(spec: GpuSpec, memory: int) -> GpuSpec:
    """The same GPU with the memory (bytes) measured on it; a slice of one is told by its size."""
    whole = abs(memory - spec.memory) <= spec.memory // 12
    return replace(spec, memory=memory, driver_memory=spec.driver_memory if whole else memory)
