"""Bounds on speed from bandwidth and arithmetic: what cannot be exceeded, never a promise."""

from __future__ import annotations

from dataclasses import dataclass

from inferfleet.capacity.dimensions import CapacityError
from inferfleet.capacity.predict import Prediction
from inferfleet.capacity.quantization import quantization
from inferfleet.capacity.shard import shard


@dataclass(frozen=True, slots=True)
class Bounds:
    """Upper bounds of one instance: `decode` tokens a second of one request while `requests` run,
    `decode_total` of all of them, `prefill` prompt tokens a second; `first_token` is the lower
    bound of the seconds until a prompt's first token."""

    requests: int
    decode: float
    decode_total: float
    prefill: float
    first_token: float


def bounds(prediction: Prediction, requests: int = 1, length: int | None = None) -> Bounds:
    """The roofline of an instance with `requests` requests of `length` tokens (default: context).

    decode step >= (weights read + requests x length x KV bytes a token) / bandwidth, and >=
    2 x active parameters x requests / (tp x pp) / operations a second; with experts a batch reads
    1 - (1 - k / n) ** requests of them. prefill <= operations / (2 x active parameters). Source:
    Williams et al., Roofline (2009). Raises CapacityError when the GPU's figures are unknown.
    """
    setup, tokens = prediction.setup, length or prediction.context
    gpu, model = setup.gpu, setup.model
    if not gpu.bandwidth or not gpu.bf16_flops:
        raise CapacityError(f"{gpu.name}: bandwidth and compute are not in the catalogue")
    weights = quantization(setup.quantization or model.native)
    count = setup.tensor_parallel * setup.pipeline_parallel
    fast = weights.bits == 8 and gpu.fp8_flops
    flops = (gpu.fp8_flops if fast else gpu.bf16_flops) * setup.tensor_parallel
    read = _weights_read(prediction, requests) * setup.pipeline_parallel
    cache = requests * _kept(prediction, tokens) * setup.pipeline_parallel
    memory_step = (read + cache) / gpu.bandwidth
    compute_step = 2 * model.active_params * requests / flops
    step = max(memory_step, compute_step)
    prefill = flops * (count // setup.tensor_parallel) / (2 * model.active_params)
    return Bounds(requests, 1 / step, requests / step, prefill, tokens / (prefill or 1) + step)


def _kept(prediction: Prediction, tokens: int) -> float:
    """Bytes of cache one request of that many tokens reads on each rank."""
    return prediction.needed * min(1.0, tokens / prediction.context)


def _weights_read(prediction: Prediction, requests: int) -> float:
    """Bytes of weights one rank reads in a step of that many requests."""
    setup, moe = prediction.setup, prediction.setup.model.experts
    weights = quantization(setup.quantization or setup.model.native)
    held = shard(setup.model, weights, setup.tensor_parallel, setup.pipeline_parallel)
    if moe is None:
        return held.active_weights
    share = moe.per_token / moe.count
    reached = 1 - (1 - share) ** requests
    routed = held.weight_bytes * setup.model.expert_params / setup.model.params
    return held.active_weights - routed * share + routed * reached
