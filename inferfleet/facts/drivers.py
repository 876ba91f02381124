"""Which NVIDIA driver an engine's release needs. Pure tables, each with its source.

CUDA: docs.nvidia.com/deploy/cuda-compatibility, minor version compatibility: within a major CUDA
release everything runs, with a limited feature set, on the first driver of that release.
vLLM: the CUDA runtime that the torch it pins depends on (package metadata): 0.8.5 torch 2.6 and
12.4, 0.10 torch 2.7 and 12.6, 0.11 to 0.19 torch 2.8 to 2.10 and 12.8, since 0.20 torch 2.11 and
13.0. TGI 3: CUDA 12.4 images. Ollama: docs/gpu.mdx of 0.33.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]

# CUDA -> the oldest driver that runs it at all, by major release
_OLDEST: dict[int, Version] = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
# CUDA -> the driver it came with, below which its features are limited
_FULL: dict[Version, Version] = {
    (12, 4): (550, 54, 14),
    (12, 6): (560, 28, 3),
    (12, 8): (570, 26),
    (13, 0): (580, 65, 6),
}
_VLLM: tuple[tuple[Version, Version], ...] = (  # from this release on, this CUDA
    ((0, 20), (13, 0)),
    ((0, 11), (12, 8)),
    ((0, 9), (12, 6)),
    ((0, 0), (12, 4)),
)
OLD_GPUS = (6, 2)  # up to this compute capability, Ollama wants more of the driver


@dataclass(frozen=True, slots=True)
class Need:
    """`oldest` is the first driver with which it runs at all; `full` with all of its features."""

    oldest: Version
    full: Version
    because: str  # "vLLM 0.33.0 is built with CUDA 13.0"


def number(text: str) -> Version:
    """The numbers a version begins with: "580.65.06" gives (580, 65, 6)."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


def needed(engine: str, version: str, capability: Version = ()) -> Need | None:
    """What an engine's release needs of the driver; None where nothing is known."""
    if engine == "vllm" and number(version):
        cuda = next(cuda for since, cuda in _VLLM if number(version) >= since)
        return _cuda(f"vLLM {version}", cuda)
    if engine == "tgi":
        return _cuda("Text Generation Inference", (12, 4))
    if engine == "ollama":
        old = capability and capability <= OLD_GPUS
        oldest = (570,) if old else (550,)
        return Need(oldest, oldest, f"Ollama wants {oldest[0]} or newer on this GPU")
    return None


def _cuda(what: str, cuda: Version) -> Need:
    said = f"{what} is built with CUDA {shown(cuda)}"
    return Need(_OLDEST[cuda[0]], _FULL[cuda], said)


def shown(version: Version) -> str:
    """As people write it. Drivers pad their third number, but nobody minds."""
    return ".".join(map(str, version))
