"""Answers: does it fit, what to run on this GPU, and what hardware a number of users needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from inferfleet.capacity.catalogue import models
from inferfleet.capacity.dimensions import CapacityError, Dimensions
from inferfleet.capacity.gpus import GIB, GpuSpec, gpus, slices
from inferfleet.capacity.ollama import OllamaPrediction, predict_ollama
from inferfleet.capacity.predict import Prediction, Setup, predict
from inferfleet.capacity.quantization import quantization
from inferfleet.capacity.remedy import Remedy, remedies, smaller_weights
from inferfleet.capacity.roofline import Bounds, bounds
from inferfleet.capacity.shard import model_bytes

_SLOWEST = 8.0  # tokens a second below which reading along is no longer possible


@dataclass(frozen=True, slots=True)
class Fit:
    """One setup, answered. `parts` are (name, bytes) of one GPU's memory, for a stacked bar;
    `carries` is how many requests of full context run at once on all instances; `enough` whether
    that is at least the users asked for."""

    prediction: Prediction
    instances: int
    carries: int
    enough: bool
    parts: tuple[tuple[str, int], ...]
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A model to run. `score` orders them and is no benchmark: log2 of the geometric mean of
    total and active parameters (billions), 0.8 for each year of release, less what the
    quantization costs. `speed` are bounds with all users at work."""

    model: str
    engine: str
    setup: Setup | None
    instances: int
    carries: int
    score: float
    why: str
    speed: Bounds | None = None
    prediction: Prediction | OllamaPrediction | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """Hardware for a model and its users. Sizes are bytes: `ram` and `disk` of one host, `share`
    what the weights take on a shared disk."""

    setup: Setup
    prediction: Prediction
    instances: int
    gpus: int
    hosts: int
    ram: int
    disk: int
    share: int


def fit(setup: Setup, *, gpus_available: int | None = None, users: int = 1) -> Fit:
    """Whether a setup fits, where the memory goes, and what to change if it does not.

    `gpus_available` GPUs carry as many instances as there is room for (default: one instance).
    """
    prediction = predict(setup)
    each = setup.tensor_parallel * setup.pipeline_parallel
    count = gpus_available or each
    if count < each:
        raise CapacityError(f"an instance takes {each} GPUs, and there are {count}")
    instances = count // each
    fits = prediction.verdict != "does not fit"
    carries = instances * carried(prediction) if fits else 0
    return Fit(
        prediction, instances, carries, carries >= users, parts(prediction), remedies(setup, count)
    )


def carried(prediction: Prediction) -> int:
    """Requests of full context one instance runs at once: what the cache holds, and the engine's
    limit of sequences allows."""
    return min(int(prediction.concurrency), prediction.sequences)


def parts(prediction: Prediction) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of one GPU's memory; they add up to the whole of it unless it is too little."""
    memory = prediction.expected
    named = (
        ("weights", memory.weights),
        ("activation", memory.activation),
        ("NCCL and CUDA", memory.non_torch),
        ("CUDA graphs", memory.graphs_deducted + memory.graphs_beside),
        ("KV cache", max(0, memory.pool)),
    )
    free = prediction.setup.gpu.memory - sum(size for _, size in named)
    return (*named, ("free", max(0, free)))


def recommend(
    gpu: GpuSpec,
    *,
    count: int = 1,
    users: int = 1,
    context: int = 16384,
    task: str = "chat",
    version: str = "",
    candidates: Iterable[Dimensions] | None = None,
) -> tuple[Recommendation, ...]:
    """What to run on `count` GPUs of a host for so many users at once, the best first.

    Every model of the catalogue made for the task is tried in its formats and splits; kept are
    those that fit, carry `users` requests of `context` tokens, and can reach 8 tokens a second.
    When none does, what Ollama can do with the GPU. Raises CapacityError for an unknown task.
    """
    pool = tuple(models().values() if candidates is None else candidates)
    suited = [each for each in pool if task in each.tasks]
    if not suited:
        raise CapacityError(f"no model is made for {task!r}; tasks: chat, code")
    found = [
        best
        for model in suited
        if model.context >= context
        and (best := _best(_setups(model, gpu, count, users, context, version), count, users))
    ]
    if not found:
        return recommend_ollama(suited, gpu_memory=gpu.memory, context=context, users=users)
    return tuple(sorted(found, key=lambda each: (-each.score, each.model)))


def _setups(
    model: Dimensions, gpu: GpuSpec, count: int, users: int, context: int, version: str
) -> Iterator[Setup]:
    formats = [model.native]
    if model.native == "bf16":
        formats += smaller_weights(gpu)
    for name in formats:
        tp = 1
        while tp <= count:
            base = Setup(
                model, gpu, name, context, version=version, tensor_parallel=tp
            )  # fmt: skip
            yield base
            yield replace(base, sequences=max(8, users), batched_tokens=max(2048, users))
            tp *= 2


def _best(setups: Iterator[Setup], count: int, users: int) -> Recommendation | None:
    """The first format that carries the users, and of its splits the fastest."""
    found = [each for setup in setups if (each := _carrying(setup, count, users))]
    return max(found, key=lambda each: (each.score, each.speed.decode if each.speed else 0.0),
               default=None)  # fmt: skip


def _carrying(setup: Setup, count: int, users: int) -> Recommendation | None:
    try:
        prediction = predict(setup)
    except CapacityError:
        return None
    instances = count // setup.tensor_parallel
    carries = instances * carried(prediction)
    if prediction.verdict != "fits" or carries < users:
        return None
    speed = bounds(prediction, -(-users // instances))
    if speed.decode < _SLOWEST:
        return None
    name = setup.quantization
    why = (
        f"{setup.model.params / 1e9:.0f}B parameters in {name}, "
        f"{carries} requests of {prediction.context} tokens at once"
    )
    worth = score(setup.model, name)
    return Recommendation(
        setup.model.name, "vllm", setup, instances, carries, worth, why, speed, prediction
    )


def score(model: Dimensions, weights: str) -> float:
    """A rough order of merit, see Recommendation; only for choosing among what fits."""
    size = math.sqrt(model.params * model.active_params) / 1e9
    year, _, month = (model.released or "2023-01").partition("-")
    age = int(year) - 2023 + (int(month) - 1) / 12
    kept = 0.0 if weights == model.native else quantization(weights).penalty
    return math.log2(size) + 0.8 * age - kept


def recommend_ollama(
    candidates: Iterable[Dimensions],
    *,
    gpu_memory: int = 0,
    ram: int = 0,
    context: int = 4096,
    users: int = 1,
) -> tuple[Recommendation, ...]:
    """What Ollama can run where vLLM cannot: on a small GPU, on the CPU, or on both. Bytes.

    On the CPU only models with at most 9 billion active parameters are kept: larger ones are slower
    than reading.
    """
    found = []
    for model in candidates:
        length = min(context, model.context)
        prediction = predict_ollama(
            model, gpu_memory=gpu_memory, ram=ram, context=length, parallel=users
        )
        slow = prediction.where != "gpu" and model.active_params > 9e9
        if prediction.where == "does not fit" or slow:
            continue
        why = f"q4_k_m, {prediction.total / GIB:.1f} GiB, runs on {prediction.where}"
        worth = score(model, "q4_k_m") - (0 if prediction.where == "gpu" else 1)
        found.append(
            Recommendation(model.name, "ollama", None, 1, users, worth, why, None, prediction)
        )
    return tuple(sorted(found, key=lambda each: (-each.score, each.model)))


def next_larger(gpu: GpuSpec) -> GpuSpec | None:
    """The catalogue's GPU of the same maker with the next more memory and no older design; of a
    MIG slice the next larger slice."""
    wider = [each for each in slices(gpu.name) if each.memory > gpu.memory * 1.2]
    larger = [
        each
        for each in (wider if gpu.mig else gpus().values())
        if each.memory > gpu.memory * 1.2
        and each.vendor == gpu.vendor
        and each.capability >= gpu.capability
        and not each.rough
    ]
    return min(larger, key=lambda each: (each.memory, each.name), default=None)


def size(
    model: Dimensions,
    users: int,
    *,
    context: int | None = None,
    weights: str = "",
    kinds: Iterable[GpuSpec] | None = None,
    gpus_per_host: int = 8,
    version: str = "",
) -> tuple[Size, ...]:
    """Hardware that carries `users` requests of `context` tokens at once, the least memory first.

    One answer for each kind of GPU that can do it. RAM of a host: what its instances' weights take
    while loading and 8 GiB each; disk: weights twice (an update beside the old) and 80 GiB for
    images. Raises CapacityError for fewer than one user.
    """
    if users < 1 or gpus_per_host < 1:
        raise CapacityError("users and GPUs of a host must be at least 1")
    known = gpus().values() if kinds is None else kinds
    found = [
        best
        for gpu in known
        if not gpu.rough
        and (best := _smallest(model, gpu, users, context, weights, gpus_per_host, version))
    ]
    return tuple(sorted(found, key=lambda each: (each.gpus * each.setup.gpu.memory, each.gpus)))


def _smallest(
    model: Dimensions, gpu: GpuSpec, users: int, context: int | None, weights: str,
    per_host: int, version: str,
) -> Size | None:  # fmt: skip
    best: Size | None = None
    tp = 1
    while tp <= per_host:
        setup = Setup(model, gpu, weights, context, tensor_parallel=tp, version=version)
        found = _sized(setup, users, per_host)
        if found and (best is None or found.gpus < best.gpus):
            best = found
        tp *= 2
    return best


def _sized(setup: Setup, users: int, per_host: int) -> Size | None:
    try:
        prediction = predict(setup)
    except CapacityError:
        return None
    if prediction.verdict != "fits" or prediction.concurrency < 1:
        return None
    instances = -(-users // carried(prediction))
    on_host = per_host // setup.tensor_parallel
    hosts = -(-instances // on_host)
    whole = model_bytes(setup.model, quantization(setup.quantization or setup.model.native))
    ram = min(on_host, instances) * 8 * GIB + round(1.1 * whole) + 16 * GIB
    return Size(
        setup, prediction, instances, instances * setup.tensor_parallel, hosts,
        ram, 2 * whole + 80 * GIB, whole,
    )  # fmt: skip
