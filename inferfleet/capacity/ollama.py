"""Ollama: GGUF weights and a KV cache of context x parallel, on a GPU, on the CPU or on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inferfleet.capacity.dimensions import CapacityError, Dimensions
from inferfleet.capacity.gpus import GIB, MIB
from inferfleet.capacity.quantization import kv_bytes, quantization
from inferfleet.capacity.shard import model_bytes

_BATCH = 512  # tokens of a prompt that are computed at once
Where = Literal["gpu", "gpu and cpu", "cpu", "does not fit"]


@dataclass(frozen=True, slots=True)
class OllamaPrediction:
    """An estimate (±15 %), in bytes: `weights` of the GGUF file, `cache` of all parallel requests,
    `work` for computing, `gpu_layers` of `layers` that find room on the GPU."""

    where: Where
    weights: int
    cache: int
    work: int
    total: int
    layers: int
    gpu_layers: int
    context: int
    rough: str = "an estimate: GGUF files of one type differ by a few percent"


def default_context(gpu_memory: int) -> int:
    """OLLAMA_CONTEXT_LENGTH by GPU memory (bytes): below 24 GiB 4k, below 48 32k, else 256k.
    Source: ollama envconfig and server defaults."""
    if gpu_memory < 23 * GIB:  # a "24 GB" card reports a little less
        return 4096
    return 32768 if gpu_memory < 47 * GIB else 262144


def predict_ollama(
    model: Dimensions,
    *,
    weights: str = "q4_k_m",
    gpu_memory: int = 0,
    ram: int = 0,
    context: int | None = None,
    parallel: int = 1,
    kv_dtype: str = "f16",
    flash_attention: bool = True,
) -> OllamaPrediction:
    """Predict where a model runs and what it takes; memory and sizes in bytes, context in tokens.

    weights = parameters x bits of the type / 8; cache = 2 x layers x kv_heads x head_dim x bytes x
    context x parallel (windowed layers keep their window and a batch); work = vocab x 512 x 4 B,
    without flash attention also heads x 512 x context x 4 B. Layers that find no room on the GPU
    run on the CPU. Raises CapacityError for nonsense. Source: ollama docs/faq.mdx, llama.cpp.
    """
    if gpu_memory < 0 or ram < 0 or parallel < 1:
        raise CapacityError("memory must not be negative, and parallel at least 1")
    length = min(context or default_context(gpu_memory), model.context)
    if context and context > model.context:
        raise CapacityError(f"{model.name}: {context} is past its {model.context} tokens")
    size = model_bytes(model, quantization(weights))
    cache = _cache(model, length, parallel, kv_bytes(kv_dtype))
    work = 4 * _BATCH * model.vocab + 300 * MIB
    if not flash_attention:
        work += 4 * _BATCH * model.heads * length
    total = size + cache + work
    layers = _gpu_layers(model, size + cache, work, gpu_memory)
    where = _where(layers, model.layers, total, gpu_memory, ram)
    return OllamaPrediction(where, size, cache, work, total, model.layers, layers, length)


def _cache(model: Dimensions, length: int, parallel: int, element: float) -> int:
    if model.latent:
        token = (model.latent.kv_rank + model.latent.rope_dim) * element
    else:
        token = 2 * model.kv_heads * model.head_dim * element
    kept = min(length * parallel, (model.window or 0) * parallel + _BATCH)
    return round(token * (model.full_layers * length * parallel + model.window_layers * kept))


def _gpu_layers(model: Dimensions, spread: int, work: int, gpu_memory: int) -> int:
    room = gpu_memory - work - GIB // 2  # the CUDA context and a little air
    return max(0, min(model.layers, int(room * model.layers / spread)))


def _where(layers: int, wanted: int, total: int, gpu_memory: int, ram: int) -> Where:
    if layers == wanted:
        return "gpu"
    on_gpu = gpu_memory if layers else 0
    if total > on_gpu + ram * 0.9:
        return "does not fit"
    return "gpu and cpu" if layers else "cpu"
