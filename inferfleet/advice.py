"""The answers of `fit`, `recommend` and `size`: what was asked in words, and their JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from inferfleet import capacity, hub
from inferfleet.capacity import (
    GIB,
    CapacityError,
    Fit,
    GpuSpec,
    Recommendation,
    Setup,
    Size,
)
from inferfleet.errors import UsageError
from inferfleet.model import Host
from inferfleet.sizing import stored_as

LARGEST = 10**9  # of any count or length that is asked for


@dataclass(frozen=True, slots=True)
class Question:
    """What `fit` asks: words as they were typed, "" where nothing was said."""

    model: str
    gpu: str
    count: str = ""
    context: str = ""
    users: str = ""
    quantization: str = ""
    tensor_parallel: str = ""
    sequences: str = ""
    batched_tokens: str = ""
    kv_dtype: str = ""
    utilization: str = ""
    engine_version: str = ""
    memory: str = ""
    eager: bool = False


def whole(option: str, text: str, default: int) -> int:
    """A count above 0 from the command line. Raises CapacityError naming the rule."""
    return length(option, text) or default


def length(option: str, text: str) -> int | None:
    """The same, None where nothing was said."""
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        raise UsageError(f"--{option} is a whole number, not {text!r}") from None
    if not 1 <= value <= LARGEST:
        raise CapacityError(f"--{option} must be at least 1 and at most {LARGEST}, not {value}")
    return value


def _fraction(option: str, text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        raise UsageError(f"--{option} is a number, not {text!r}") from None


def needed(**words: str) -> None:
    """Raise UsageError for an option that has to be there."""
    for name, value in words.items():
        if not value:
            raise UsageError(f"say --{name.replace('_', '-')}")


def gpu_of(name: str, memory: str = "") -> GpuSpec:
    """The GPU by name, with the memory (GiB, as CUDA reports it) that was measured on it."""
    size = _fraction("memory", memory)
    if size is None:
        return capacity.gpu(name)
    if not 0 < size <= 1 << 20:
        raise CapacityError(f"--memory is GiB of one GPU and must be positive, not {memory}")
    return capacity.gpu(name, int(size * GIB))


def fit(asked: Question) -> Fit:
    """The answer to `fit`. Without --tensor-parallel, the fewest GPUs on which it fits."""
    needed(model=asked.model, gpu=asked.gpu)
    known = hub.find(asked.model)
    count = whole("count", asked.count, 1)
    tp = length("tensor-parallel", asked.tensor_parallel)
    weights = asked.quantization or stored_as(asked.model, known.dimensions)
    measured = known.weights if not asked.quantization else None
    setup = Setup(
        model=known.dimensions,
        gpu=gpu_of(asked.gpu, asked.memory),
        quantization=weights,
        context=length("context", asked.context),
        sequences=length("sequences", asked.sequences),
        batched_tokens=length("batched-tokens", asked.batched_tokens),
        kv_dtype=asked.kv_dtype or "auto",
        utilization=_fraction("utilization", asked.utilization),
        tensor_parallel=tp or 1,
        eager=asked.eager,
        version=asked.engine_version,
        measured_weights=measured if (tp or 1) == 1 else None,
    )
    chosen = setup if tp else _spread(setup, count)
    users = whole("users", asked.users, 1)
    return capacity.fit(chosen, gpus_available=count, users=users)


def _spread(setup: Setup, count: int) -> Setup:
    """The same on the fewest GPUs, 1, 2, 4 ..., on which it fits; on one where it never does."""
    tp, tried = 1, setup
    while tp <= count:
        try:
            if capacity.predict(tried).verdict == "fits":
                return tried
        except CapacityError:
            if tp == 1:
                raise  # what one GPU cannot even start, more cannot
        tp *= 2
        tried = replace(setup, tensor_parallel=tp, measured_weights=None)
    return setup


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer to `recommend`: on which hardware, the best first, and with a larger GPU."""

    where: str
    gpu: GpuSpec | None
    found: tuple[Recommendation, ...]
    larger: GpuSpec | None = None
    gained: Recommendation | None = None


def recommend(gpu: GpuSpec, count: int, users: int, context: int, task: str) -> Advice:
    """What to run on GPUs of one kind. Raises CapacityError for an unknown task."""
    found = capacity.recommend(gpu, count=count, users=users, context=context, task=task)
    larger, gained = capacity.next_larger(gpu), None
    if larger:
        several = max(1, count * gpu.memory // larger.memory) if gpu.mig else count
        more = capacity.recommend(larger, count=several, users=users, context=context, task=task)
        gained = next(iter(more), None)
    return Advice(f"{count} x {gpu.name}", gpu, found, larger, gained)


def recommend_host(host: Host, users: int, context: int, task: str) -> Advice:
    """What to run on a host of the inventory: on its GPUs of the largest kind, or on its CPU."""
    kinds = [capacity.gpu(gpu.model) for gpu in host.gpus]
    if kinds:
        largest = max(kinds, key=lambda spec: (kinds.count(spec) * spec.memory, spec.name))
        found = recommend(largest, kinds.count(largest), users, context, task)
        return replace(found, where=f"{host.name}, {found.where}")
    if not host.ram_gib:
        raise CapacityError(f"{host.name} has no GPU, and the inventory does not say its ram_gib")
    ram = int(host.ram_gib * GIB)
    suited = [each for each in capacity.models().values() if task in each.tasks]
    if not suited:
        raise CapacityError(f"no model is made for {task!r}; tasks: chat, code")
    best = capacity.recommend_ollama(suited, ram=ram, context=context, users=users)
    return Advice(f"{host.name}, CPU, {host.ram_gib:.0f} GiB of RAM", None, best)


def sizes(
    model: str, users: int, context: int | None, gpu: str, per_host: int, quantization: str
) -> tuple[Size, ...]:
    """Hardware for a model and its users, the least memory first. Raises CapacityError."""
    known = hub.find(model)
    kinds = [capacity.gpu(gpu)] if gpu else None
    found = capacity.size(
        known.dimensions,
        users,
        context=context,
        weights=quantization or stored_as(model, known.dimensions),
        kinds=kinds,
        gpus_per_host=per_host,
    )
    if not found:
        where = f"up to {per_host} x {gpu}" if gpu else f"up to {per_host} GPUs of any kind known"
        asked = f"{context} tokens" if context else "its full context"
        raise CapacityError(f"{known.dimensions.name} with {asked} fits on no host of {where}")
    return found


def fit_json(found: Fit, users: int) -> dict[str, Any]:
    """The answer to `fit` for programs; sizes are bytes of one GPU."""
    each = found.prediction
    return {
        "ok": each.verdict != "does not fit", "model": each.setup.model.name,
        "gpu": each.setup.gpu.name, "tensor_parallel": each.setup.tensor_parallel,
        "quantization": each.setup.quantization or each.setup.model.native,
        "verdict": each.verdict, "reason": each.reason, "rough": each.rough,
        "memory": dict(found.parts), "gpu_memory": each.setup.gpu.memory,
        "context": each.context, "sequences": each.sequences,
        "batched_tokens": each.batched_tokens, "kv_token_bytes": each.kv_token_bytes,
        "kv_tokens": each.kv_tokens, "kv_tokens_range": list(each.kv_tokens_range),
        "concurrency": round(each.concurrency, 2), "instances": found.instances,
        "requests": found.carries, "users": users, "enough": found.enough,
        "remedies": [{"text": r.text, "options": dict(r.options)} for r in found.remedies],
    }  # fmt: skip


def advice_json(found: Advice) -> dict[str, Any]:
    """The answer to `recommend` for programs."""
    larger = found.larger.name if found.larger else None
    gained = found.gained.model if found.gained else None
    ranked = [_recommended(each) for each in found.found]
    return {
        "ok": bool(ranked), "where": found.where, "recommendations": ranked,
        "next_larger": {"gpu": larger, "model": gained} if larger else None,
    }  # fmt: skip


def _recommended(each: Recommendation) -> dict[str, Any]:
    speed = each.speed
    return {
        "model": each.model, "engine": each.engine, "options": options_of(each.setup),
        "quantization": each.setup.quantization if each.setup else "q4_k_m",
        "instances": each.instances, "requests": each.carries, "why": each.why,
        "bounds": None if speed is None else {
            "decode_tokens_per_second_at_most": round(speed.decode, 1),
            "decode_total_tokens_per_second_at_most": round(speed.decode_total, 1),
            "prefill_tokens_per_second_at_most": round(speed.prefill),
            "first_token_seconds_at_least": round(speed.first_token, 3),
        },
    }  # fmt: skip


def options_of(setup: Setup | None) -> dict[str, Any]:
    """A setup as a deployment says it; what is the engine's default is left out.

    fp8 can be made while loading; other smaller formats are repositories of their own.
    """
    if setup is None:
        return {}
    smaller = setup.quantization not in ("", setup.model.native)
    split = setup.tensor_parallel
    asked = {
        "gpus_per_instance": split if split > 1 else None,
        "quantization": "fp8" if smaller and setup.quantization == "fp8" else None,
        "max_model_len": setup.context,
        "max_num_seqs": setup.sequences,
        "max_num_batched_tokens": setup.batched_tokens,
    }
    return {name: value for name, value in asked.items() if value is not None}


def sizes_json(found: Iterable[Size]) -> list[dict[str, Any]]:
    """The answer to `size` for programs; sizes are bytes."""
    return [
        {
            "gpu": each.setup.gpu.name, "gpus": each.gpus, "hosts": each.hosts,
            "instances": each.instances, "gpus_per_instance": each.setup.tensor_parallel,
            "requests": each.instances * capacity.carried(each.prediction),
            "context": each.prediction.context, "ram_of_a_host": each.ram,
            "disk_of_a_host": each.disk, "weights_on_the_share": each.share,
        }
        for each in found
    ]  # fmt: skip
