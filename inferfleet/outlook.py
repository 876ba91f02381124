"""What to expect of the deployments of a plan: do they fit, how many requests they carry. Pure
but for the config.json that a model may name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from inferfleet import calibration, capacity, sizing
from inferfleet.capacity import (
    GIB,
    CapacityError,
    Dimensions,
    GpuSpec,
    OllamaPrediction,
    Prediction,
    Setup,
)
from inferfleet.capacity.quantization import kv_bytes, quantization
from inferfleet.model import Host, Instance, Inventory, Plan

Verdict = Literal["fits", "tight", "does not fit", "impossible", "unknown"]
_NAMES = {  # what the inventory calls vLLM's flags that a remedy sets, where it is not the same
    "vllm": {"tensor-parallel-size": "gpus_per_instance"},
    "tgi": {
        "tensor-parallel-size": "gpus_per_instance",
        "max-model-len": "max_total_tokens",
        "max-num-seqs": "max_concurrent_requests",
        "max-num-batched-tokens": "max_batch_prefill_tokens",
        "gpu-memory-utilization": "cuda_memory_fraction",
        "quantization": "quantize",
    },
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """One instance on one kind of GPU. `impossible`: no engine starts that; `unknown`: the model
    or the GPU is in no catalogue. `requests` of full context run at once, `context` tokens long;
    `spread` is the range of requests; `remedy` the smallest change after which it fits."""

    verdict: Verdict
    reason: str = ""
    remedy: str = ""
    requests: int = 0
    spread: tuple[int, int] = (0, 0)
    context: int = 0
    kv_tokens: int = 0
    rough: str = ""


@dataclass(frozen=True, slots=True)
class Outlook:
    """A deployment of a plan on all its hosts with one kind of GPU and one judgement."""

    deployment: str
    gpu: str  # such as "2 x L40S"; "" on the CPU
    hosts: tuple[str, ...]
    instances: int
    judgement: Judgement

    @property
    def requests(self) -> int:
        """Requests of full context at once, of all instances together."""
        return self.instances * self.judgement.requests


def outlooks(plan: Plan, inventory: Inventory) -> tuple[Outlook, ...]:
    """What to expect of every deployment of a plan, in its order; nothing of a rehearsal's."""
    if plan.rehearsal:
        return ()
    seen: dict[tuple[Any, ...], Judgement] = {}
    found: dict[tuple[str, str, Judgement], list[str]] = {}
    for instance in plan.instances():
        models = _gpus(instance)
        asked = (instance.deployment.name, models, _special(instance, inventory))
        if asked not in seen:
            seen[asked] = judge(instance, inventory)
        key = (instance.deployment.name, _words(models), seen[asked])
        found.setdefault(key, []).append(instance.host.name)
    return tuple(
        Outlook(name, gpu, tuple(dict.fromkeys(hosts)), len(hosts), judgement)
        for (name, gpu, judgement), hosts in found.items()
    )


def _gpus(instance: Instance) -> tuple[str, ...]:
    own = instance.host.gpus
    return tuple(own[index].model for index in instance.gpus if 0 <= index < len(own))


def _words(models: tuple[str, ...]) -> str:
    kinds = dict.fromkeys(models)
    return ", ".join(f"{models.count(kind)} x {kind}" for kind in kinds)


def _special(instance: Instance, inventory: Inventory) -> object:
    """What sets an instance apart from those on like GPUs: options, RAM, calibration."""
    host, engine = instance.host, instance.deployment.engine
    own = host.name if engine in host.variables or inventory.calibration else ""
    return own, host.ram_gib if engine == "ollama" else None


def judge(instance: Instance, inventory: Inventory) -> Judgement:
    """What to expect of one instance; unknown for engines without a model of their memory."""
    folder, engine = Path(inventory.folder), instance.deployment.engine
    models = _gpus(instance)
    if len(models) < len(instance.gpus):
        return Judgement("unknown", "the host has fewer GPUs")
    if len(models) > 1 and any(instance.host.gpus[index].mig for index in instance.gpus):
        return Judgement("unknown", capacity.ONE_SLICE)
    try:
        known = sizing.shape(instance.deployment.model, folder)
        gpu = sizing.smallest_gpu(models) if models else None
        if engine == "ollama":
            return _ollama(instance, inventory)
        setup = _setup(instance, inventory, known, gpu) if gpu else None
        if setup is None:
            return Judgement("unknown", f"nothing is known of {engine}'s memory on its hosts")
        quantization(setup.quantization or setup.model.native)
        kv_bytes(setup.kv_dtype)
    except CapacityError as error:
        return Judgement("unknown", str(error))
    if (instance.deployment.model.attention_heads or 0) % setup.tensor_parallel:
        return Judgement("unknown", "tensor parallelism does not divide its heads")
    try:
        each = judge_setup(setup, len(instance.host.gpus), engine)
        return _times(each, sizing.replicas(instance))
    except CapacityError as error:
        return Judgement("impossible", str(error))


def _times(each: Judgement, replicas: int) -> Judgement:
    """The judgement of an instance that holds so many copies of the model."""
    if replicas == 1:
        return each
    low, high = each.spread
    spread = low * replicas, high * replicas
    return replace(each, requests=each.requests * replicas, spread=spread)


def _setup(
    instance: Instance, inventory: Inventory, known: sizing.Shape, gpu: GpuSpec
) -> Setup | None:
    engine = instance.deployment.engine
    if engine == "vllm":
        learned = corrected(instance, inventory.calibration, gpu)
        return sizing.setup(instance, known, gpu, learned)
    return sizing.tgi_setup(instance, known, gpu) if engine == "tgi" else None


def corrected(instance: Instance, learned: Mapping[str, int], gpu: GpuSpec | None) -> int:
    """Bytes that an earlier run of this very instance taught."""
    return learned.get(calibration.key(instance, gpu.name if gpu else "CPU"), 0) if learned else 0


@lru_cache(maxsize=4096)
def judge_setup(setup: Setup, gpus: int = 1, engine: str = "vllm") -> Judgement:
    """The judgement of a setup on a host of so many GPUs. Raises CapacityError for nonsense."""
    found = capacity.predict(setup)
    remedy = ""
    if found.verdict != "fits":
        remedy = remedied(setup, gpus, engine)
    length, (low, high) = found.context, found.kv_tokens_range
    share = found.concurrency / found.kv_tokens if found.kv_tokens else 0.0

    def at_once(tokens: int) -> int:
        return min(int(tokens * share), found.sequences)

    fits = found.verdict != "does not fit"
    return Judgement(
        found.verdict,
        found.reason,
        remedy,
        requests=capacity.carried(found) if fits else 0,
        spread=(at_once(low), at_once(high)) if fits else (0, 0),
        context=length,
        kv_tokens=max(0, found.kv_tokens),
        rough=found.rough,
    )


def remedied(setup: Setup, gpus: int, engine: str = "vllm") -> str:
    """The smallest change after which a setup fits, in words and the engine's options."""
    change = capacity.smallest_change(setup, gpus)
    if change is None:
        return "no change of options makes it fit: a smaller model, or GPUs with more memory"
    own = {name: _NAMES[engine].get(name, name.replace("-", "_")) for name, _ in change.options}
    options = ", ".join(f"{own[name]}: {value}" for name, value in change.options)
    text = change.text.partition("together: ")
    return f"{text[0] or 'several changes together'} ({options})"


def ollama(
    model: Dimensions, weights: str, options: Mapping[str, Any], memory: int, ram: int
) -> OllamaPrediction:
    """Ollama's prediction with a deployment's options. Raises CapacityError for nonsense."""
    length = int(options.get("context_length") or 0)
    return capacity.predict_ollama(
        model,
        weights=weights,
        gpu_memory=max(0, memory),
        ram=ram,
        context=min(length, model.context) or None,  # it shortens what is too long by itself
        parallel=int(options.get("num_parallel") or 1),
        kv_dtype=str(options.get("kv_cache_type") or "f16"),
        flash_attention=bool(options.get("flash_attention", True)),
    )


@dataclass(frozen=True, slots=True)
class Local:
    """An Ollama on a host: its prediction, its GPUs' memory and the host's RAM in bytes."""

    prediction: OllamaPrediction
    gpu: GpuSpec | None
    memory: int
    ram: int | None
    learned: int  # bytes by which earlier runs corrected it


def ollama_of(instance: Instance, inventory: Inventory) -> Local:
    """What to expect of an Ollama instance. Raises CapacityError where nothing is known."""
    model, models = instance.deployment.model, _gpus(instance)
    known = sizing.shape(model, Path(inventory.folder)).dimensions
    gpu = sizing.smallest_gpu(models) if models else None
    memory = sum(capacity.gpu(name).memory for name in models)
    learned = corrected(instance, inventory.calibration, gpu)
    ram = memory_of(instance.host)
    enough = ram if ram is not None else 1 << 62
    weights = sizing.gguf(model, known)
    found = ollama(known, weights, instance.options, memory - learned, enough)
    return Local(found, gpu, memory, ram, learned)


def _ollama(instance: Instance, inventory: Inventory) -> Judgement:
    local = ollama_of(instance, inventory)
    found, parallel = local.prediction, int(instance.options.get("num_parallel") or 1)
    if found.where == "does not fit":
        size = f"{(found.total + local.learned) / GIB:.1f} GiB"
        said = f"it takes {size}, and the host has {local.memory / GIB:.1f} GiB on GPUs and "
        said += f"{(local.ram or 0) / GIB:.0f} GiB of RAM"
        return Judgement("does not fit", said, "a shorter context_length, or a smaller model")
    carries = Judgement(
        "fits", "", "", parallel, (parallel, parallel), found.context, rough=found.rough
    )  # fmt: skip
    if local.gpu is None or found.where == "gpu":
        return carries
    said = f"only {found.gpu_layers} of {found.layers} layers find room on the GPU"
    said += "; the rest runs on the CPU, many times slower"
    change = "a shorter context_length, fewer num_parallel, or kv_cache_type: q8_0"
    return replace(carries, verdict="tight", reason=said, remedy=change)


def memory_of(host: Host) -> int | None:
    """A host's RAM in bytes, where the inventory tells it."""
    return None if host.ram_gib is None else int(host.ram_gib * GIB)


def prediction(instance: Instance, inventory: Inventory) -> Prediction | None:
    """The prediction of a vLLM instance, where its model and GPU are known."""
    models = _gpus(instance)
    if instance.deployment.engine != "vllm" or not models:
        return None
    try:
        known = sizing.shape(instance.deployment.model, Path(inventory.folder))
        gpu = sizing.smallest_gpu(models)
        setup = _setup(instance, inventory, known, gpu)
        return capacity.predict(setup) if setup else None
    except CapacityError:
        return None
