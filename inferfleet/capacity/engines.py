"""What a vLLM release does by default, and how it counts memory: rules by version, from source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from inferfleet.capacity.dimensions import CapacityError
from inferfleet.capacity.gpus import GIB, GpuSpec

Generation = Literal["V0", "V1"]
Runner = Literal["v1", "v2"]
Usage = Literal["serve", "offline"]
NEWEST = (0, 33)


@dataclass(frozen=True, slots=True)
class Release:
    """A version: `number` is (major, minor, patch); `exact` is false for "0.2x" and the like."""

    number: tuple[int, int, int]
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Rules:
    """How a release budgets GPU memory. Sizes are bytes.

    `sampler`: the sampler's peak in units of 4 bytes a logit; 0: it is not profiled.
    `all_logits`: every batched token's logits are computed while profiling.
    `driver_context`: what it counts of the CUDA context, which later releases leave out.
    `graphs_deducted`: its estimate of CUDA graphs comes off the pool; None: depends on the build.
    `counts_groups`: how KV tokens of a model with several kinds of layers are reported: "layers"
    (all kept in full), "groups" (pool shared out evenly), "requests" (concurrency x length).
    `merge`: kinds of layers whose counts differ by less than this factor are padded to one size.
    """

    release: Release
    generation: Generation
    runner: Runner
    utilization: float
    sampler: float
    all_logits: bool
    driver_context: int
    graphs_deducted: bool | None
    graph_modes: int
    counts_groups: Literal["layers", "groups", "requests"]
    merge: float
    latent_padding: int = 1  # elements the latent vector is padded to a multiple of


def parse_release(version: str) -> Release:
    """The release that a text such as "0.11.0", "v0.6.6.post1" or "0.2x (2026)" names.

    "0.2x" is read as 0.20, not exact; "" is the newest one known. Raises CapacityError when
    there is no version in it.
    """
    if not version.strip():
        return Release((*NEWEST, 0))
    found = re.search(r"(\d+)\.(\d*)(x?)(?:\.(\d+))?", version)
    if not found or not (found[2] or found[3]):
        raise CapacityError(f"{version!r} names no engine version; write it as 0.11.0")
    minor = int(found[2] or 0) * (10 if found[3] else 1)
    exact = not found[3] and "-" not in version[: found.end() + 1]
    return Release((int(found[1]), minor, int(found[4] or 0)), exact)


def default_generation(release: Release, gpu: GpuSpec, weights: str) -> Generation:
    """V0 before 0.8; V1 after, except on pre-Ampere GPUs before 0.11 (vLLM arg_utils)."""
    if release.number < (0, 8):
        return "V0"
    old = release.number < (0, 11)
    return "V0" if old and (gpu.capability < (8, 0) or weights == "gguf") else "V1"


@lru_cache(maxsize=4096)
def rules(version: str, generation: Generation, runner: Runner = "v1") -> Rules:
    """The rules of a vLLM version, each read in the source of its wheels.

    - utilization: 0.90, since 0.20 0.92 (config/cache.py);
    - sampler: torch.sort in V0 and V1 up to 0.16 (9.66 x 4 B a logit), a Triton kernel since 0.17
      (7.25; v1/sample/ops/topk_topp_sampler.py); not profiled in V1 before 0.8, where instead the
      logits of all tokens are; the v2 runner skips top-k and top-p while profiling (1.75) until
      0.33 warms them up too;
    - the CUDA context (about 0.45 GiB) is counted by V1 before 0.9.1 (total - free in
      v1/worker/gpu_worker.py) and by V0 in 0.6.4 (worker/worker.py);
    - graphs: deducted since 0.20 (VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS), by the v2 runner only
      since 0.33;
    - groups: the hybrid KV cache manager since 0.9.2 (v1/core/kv_cache_utils.py); tokens are
      concurrency x length since 0.22; merge 1.25 since 0.12, 1.5 since 0.18;
    - latent vectors padded to 128 (576 -> 640) in 0.7.1 to 0.7.3.
    """
    release = parse_release(version)
    number = release.number
    v1 = generation == "V1"
    return Rules(
        release=release,
        generation=generation,
        runner=runner,
        utilization=0.92 if number >= (0, 20) and release.exact else 0.9,
        sampler=_sampler(number, generation, runner),
        all_logits=v1 and number < (0, 8),
        driver_context=_driver_context(number, generation),
        graphs_deducted=_deducts(release, generation, runner),
        graph_modes=2 if number >= (0, 11) else 1,
        counts_groups=_counting(number, generation),
        merge=1.5 if number >= (0, 18) else 1.25 if number >= (0, 12) else 1.0,
        latent_padding=128 if (0, 7, 1) <= number <= (0, 7, 3) else 1,
    )


def _sampler(number: tuple[int, int, int], generation: Generation, runner: Runner) -> float:
    if generation == "V1" and number < (0, 8):
        return 0.0
    if runner == "v2" and number < (0, 33):
        return 1.75
    return 7.25 if number >= (0, 17) else 9.66


def _driver_context(number: tuple[int, int, int], generation: Generation) -> int:
    counted = number < (0, 9, 1) if generation == "V1" else (0, 6, 4) <= number < (0, 6, 5)
    return GIB * 45 // 100 if counted else 0


def _deducts(release: Release, generation: Generation, runner: Runner) -> bool | None:
    if generation == "V0" or release.number < (0, 20):
        return False
    if runner == "v2" and release.number < (0, 33):
        return False
    return True if release.exact else None


def _counting(
    number: tuple[int, int, int], generation: Generation
) -> Literal["layers", "groups", "requests"]:
    if generation == "V0" or number < (0, 9, 2):
        return "layers"
    return "groups" if number < (0, 22) else "requests"


def batch_defaults(
    rule: Rules, gpu: GpuSpec, context: int, usage: Usage, *, windowed: bool = False
) -> tuple[int, int]:
    """Default (max_num_batched_tokens, max_num_seqs) of a release on a GPU.

    V0: 256 sequences; max(2048, context) tokens, or when the context is over 32768 (chunked
    prefill, not with sliding windows) 512, since 0.6.5 2048. V1: 2048 and 256 serving (8192
    offline); with 70 GiB or more, except A100 since 0.9 and GB10, 8192 (16384) and 1024; since
    0.28 16384 with 160 GiB or more. Before 0.8.5 H100 and H200 were told by name, and before 0.8.4
    all had 1024 sequences. A MIG slice gets the smallest, however large: a container may not ask
    NVML for its GPU's memory. Source: vllm/engine/arg_utils.py, vllm/config.py by version.
    """
    number, offline = rule.release.number, usage == "offline"
    if rule.generation == "V0":
        if context > 32768 and not windowed:
            return (2048 if number >= (0, 6, 5) else 512), 256
        return max(2048, context), 256
    sequences, tokens = _v1_defaults(number, gpu)
    return (max(2 * tokens, 8192) if offline and tokens < 16384 else tokens), sequences


def _v1_defaults(number: tuple[int, int, int], gpu: GpuSpec) -> tuple[int, int]:
    """(sequences, batched tokens) that V1 serves with."""
    if number < (0, 8, 5):
        hopper = gpu.name.startswith(("H100", "H200")) and number >= (0, 7)
        return (1024 if hopper or number < (0, 8, 4) else 256), (8192 if hopper else 2048)
    if gpu.mig:
        return 256, 2048
    a100 = gpu.name.startswith("A100") and number >= (0, 9)
    if gpu.driver_bytes >= 160 * GIB and number >= (0, 28):
        return 1024, 16384
    if gpu.driver_bytes >= 70 * GIB and not a100 and gpu.capability != (12, 1):
        return 1024, 8192
    return 256, 2048
