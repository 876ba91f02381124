"""What to change so that a setup fits: each lever's smallest change, computed by predicting it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from inferfleet.capacity.dimensions import CapacityError
from inferfleet.capacity.gpus import GpuSpec
from inferfleet.capacity.predict import Prediction, Setup, predict
from inferfleet.capacity.quantization import quantization

HIGHEST_UTILIZATION = 0.95
FEWEST_SEQUENCES = 8
FEWEST_TOKENS = 512
SHORTEST_CONTEXT = 2048
_STEP = 1024  # tokens a shortened context is rounded down to
_FP8_CACHE = (8, 9)  # compute capability with fp8 arithmetic
_Change = tuple[dict[str, Any], dict[str, Any]]  # fields of a setup, the engine's options


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change, or the fewest together, after which the setup fits. `options` are the engine's
    own names with their new values; `text` says it in words."""

    options: tuple[tuple[str, Any], ...]
    prediction: Prediction
    text: str


def remedies(setup: Setup, gpus_available: int = 1) -> tuple[Remedy, ...]:
    """Every single change that makes the setup fit, the least costly first.

    Ordered by what it takes from users: parallel sequences, batch size, memory fraction, KV type,
    context, more GPUs, smaller weights. When no single one does, the fewest together; empty when
    nothing helps or the setup fits as it is.
    """
    if predict(setup).verdict == "fits":
        return ()
    levers = (_sequences, _tokens, _utilization, _kv_dtype, _context)
    found = [remedy for lever in levers if (remedy := lever(setup))]
    found += filter(None, (_parallel(setup, gpus_available), _weights(setup)))
    return tuple(found) or tuple(_together(setup, gpus_available))


def smallest_change(setup: Setup, gpus_available: int = 1) -> Remedy | None:
    """The least costly remedy, or None."""
    return next(iter(remedies(setup, gpus_available)), None)


def smaller_weights(gpu: GpuSpec) -> tuple[str, ...]:
    """Weight formats to try instead of 16 bit, the least loss first; NVFP4 where it is native."""
    names = ("fp8", "nvfp4", "awq") if gpu.capability >= (10, 0) else ("fp8", "awq")
    return tuple(name for name in names if gpu.supports(quantization(name)))


def _try(setup: Setup) -> Prediction | None:
    try:
        prediction = predict(setup)
    except CapacityError:
        return None
    return prediction if prediction.verdict == "fits" else None


def _remedy(
    setup: Setup, fields: dict[str, Any], options: dict[str, Any], text: str
) -> Remedy | None:
    prediction = _try(replace(setup, **fields))
    return None if prediction is None else Remedy(tuple(options.items()), prediction, text)


def _largest(low: int, high: int, good: Callable[[int], bool]) -> int | None:
    """The largest value in [low, high) that is good, when all smaller ones are too."""
    if low >= high or not good(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _sequences(setup: Setup) -> Remedy | None:
    now = predict(setup).sequences
    step = 8 if now > 2 * FEWEST_SEQUENCES else 1
    value = _largest(
        1, -(-now // step), lambda n: _try(replace(setup, sequences=n * step)) is not None
    )
    if value is None:
        return None
    return _remedy(
        setup,
        {"sequences": value * step},
        {"max-num-seqs": value * step},
        f"run at most {value * step} sequences at once instead of {now}",
    )


def _tokens(setup: Setup) -> Remedy | None:
    before = predict(setup)
    floor = max(FEWEST_TOKENS, before.sequences)
    low, high = -(-floor // 128), -(-before.batched_tokens // 128)

    def good(n: int) -> bool:
        return _try(replace(setup, sequences=before.sequences, batched_tokens=n * 128)) is not None

    value = _largest(low, high, good)
    if value is None:
        return None
    return _remedy(
        setup,
        {"batched_tokens": value * 128, "sequences": before.sequences},
        {"max-num-batched-tokens": value * 128},
        f"batch {value * 128} tokens at once instead of {before.batched_tokens}",
    )


def _utilization(setup: Setup) -> Remedy | None:
    now = round(predict(setup).expected.budget / setup.gpu.memory, 2)
    for hundredths in range(round(now * 100) + 1, round(HIGHEST_UTILIZATION * 100) + 1):
        value = hundredths / 100
        text = f"give the engine {value:.2f} of the memory instead of {now:.2f}"
        options = {"gpu-memory-utilization": value}
        if remedy := _remedy(setup, {"utilization": value}, options, text):
            return remedy
    return None


def _kv_dtype(setup: Setup) -> Remedy | None:
    if setup.kv_dtype == "fp8" or setup.gpu.capability < _FP8_CACHE:
        return None
    text = "keep the KV cache in fp8, half the bytes a token"
    return _remedy(setup, {"kv_dtype": "fp8"}, {"kv-cache-dtype": "fp8"}, text)


def _context(setup: Setup) -> Remedy | None:
    now = predict(setup).context
    low, high = SHORTEST_CONTEXT // _STEP, -(-now // _STEP)
    value = _largest(low, high, lambda n: _try(replace(setup, context=n * _STEP)) is not None)
    if value is None:
        return None
    tokens = value * _STEP
    text = f"allow {tokens} tokens of context instead of {now}"
    return _remedy(setup, {"context": tokens}, {"max-model-len": tokens}, text)


def _parallel(setup: Setup, available: int) -> Remedy | None:
    tp = setup.tensor_parallel * 2
    while tp * setup.pipeline_parallel <= available:
        text = f"spread it over {tp} GPUs"
        if remedy := _remedy(setup, {"tensor_parallel": tp}, {"tensor-parallel-size": tp}, text):
            return remedy
        tp *= 2
    return None


def _weights(setup: Setup) -> Remedy | None:
    now = quantization(setup.quantization or setup.model.native)
    for name in smaller_weights(setup.gpu):
        smaller = quantization(name)
        if smaller.linear >= now.linear:
            continue
        fields = {"quantization": name, "measured_weights": None}
        if remedy := _remedy(setup, fields, {"quantization": name}, f"use {name} weights"):
            return remedy
    return None


def _together(setup: Setup, available: int) -> Iterator[Remedy]:
    """The fewest changes that do it together, keeping half the context if that is possible."""
    wanted = setup.context or setup.model.context
    for least in (wanted // 2, SHORTEST_CONTEXT):
        for count in (1, 2, 3, 4):
            for changes in combinations(_changes(setup, available), count):
                if remedy := _combined(setup, changes, least):
                    yield remedy
                    return


def _combined(setup: Setup, changes: tuple[_Change, ...], least: int) -> Remedy | None:
    fields = {key: value for change in changes for key, value in change[0].items()}
    options = {key: value for change in changes for key, value in change[1].items()}
    if len(fields) < sum(len(change[0]) for change in changes):
        return None  # two of them set the same thing
    relaxed = replace(setup, **fields)
    try:
        remedy = _remedy(relaxed, {}, {}, "") or _context(relaxed)
    except CapacityError:
        return None
    if remedy is None or remedy.prediction.context < least:
        return None
    merged = tuple({**options, **dict(remedy.options)}.items())
    words = ", ".join(f"{name} {value}" for name, value in merged)
    return Remedy(merged, remedy.prediction, f"together: {words}")


def _changes(setup: Setup, available: int) -> list[_Change]:
    found: list[_Change] = [
        (
            {"sequences": 32, "batched_tokens": 2048},
            {"max-num-seqs": 32, "max-num-batched-tokens": 2048},
        ),
        ({"utilization": HIGHEST_UTILIZATION}, {"gpu-memory-utilization": HIGHEST_UTILIZATION}),
    ]
    if setup.gpu.capability >= _FP8_CACHE:
        found.append(({"kv_dtype": "fp8"}, {"kv-cache-dtype": "fp8"}))
    now = quantization(setup.quantization or setup.model.native).linear
    for name in smaller_weights(setup.gpu):
        if quantization(name).linear < now:
            found.append(({"quantization": name, "measured_weights": None}, {"quantization": name}))
    tp = setup.tensor_parallel * 2
    while tp * setup.pipeline_parallel <= available:
        found.append(({"tensor_parallel": tp}, {"tensor-parallel-size": tp}))
        tp *= 2
    return found
