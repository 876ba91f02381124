"""From the inventory's words to the capacity module's: which model on which GPU, with what options.

Everything here is pure but `dimensions`, which reads the config.json that a model names. What is
in no catalogue raises CapacityError; the caller says so instead of guessing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from inferfleet import capacity
from inferfleet.capacity import CapacityError, Dimensions, Experts, GpuSpec, Setup
from inferfleet.model import Instance, Model

_FORMATS = (  # endings of quantized copies' names
    ("-awq", "awq"),
    ("-gptq-int4", "gptq"),
    ("-gptq-int8", "gptq-int8"),
    ("-fp8", "fp8"),
    ("-fp8-dynamic", "fp8"),
    ("-nvfp4", "nvfp4"),
)
_FIELDS = {  # vLLM's options that are fields of a setup
    "version": "version",
    "max_model_len": "context",
    "max_num_seqs": "sequences",
    "max_num_batched_tokens": "batched_tokens",
    "kv_cache_dtype": "kv_dtype",
    "gpu_memory_utilization": "utilization",
    "enforce_eager": "eager",
}
_NUMBERS = {"max_model_len": int, "max_num_seqs": int, "max_num_batched_tokens": int,
            "gpu_memory_utilization": float}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's dimensions, and the bytes of all its weights where its files tell them."""

    dimensions: Dimensions
    weights: int | None = None


def shape(model: Model, folder: Path) -> Shape:
    """What decides a model's memory: by hand, from its config.json, or from the catalogue.

    `folder` is the inventory's. Raises CapacityError when none of them tells.
    """
    if model.dimensions is not None:
        return Shape(by_hand(model.name, model.dimensions))
    if model.config is not None:
        return from_path(folder / model.config)
    if ":" in model.repository:
        return Shape(by_tag(model.repository))
    name = model.repository.rpartition("/")[2] if model.repository[0] == "/" else model.repository
    return Shape(capacity.model(name))


def by_hand(name: str, given: Mapping[str, Any]) -> Dimensions:
    """Dimensions as an inventory's model gives them. Raises CapacityError where they contradict."""
    own = {"head_dim": given["hidden"] // given["heads"], **given, "name": name}
    if "experts" in own:
        own["experts"] = Experts(**own["experts"])
    if own["heads"] % own["kv_heads"]:
        said = f"{own['heads']} heads cannot share {own['kv_heads']} KV heads evenly"
        raise CapacityError(f"{name}: {said}")
    if own.get("window_layers", 0) > own["layers"]:
        raise CapacityError(f"{name}: more sliding layers than layers")
    return Dimensions(**own, source="the inventory")


@lru_cache(maxsize=256)
def from_path(path: Path) -> Shape:
    """A config.json, or the folder of a downloaded model. Raises CapacityError."""
    if path.is_dir():
        return Shape(*capacity.from_folder(path))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CapacityError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CapacityError(f"{path}: is not an object")
    return Shape(capacity.from_config(path.parent.name, config))


@lru_cache(maxsize=256)
def by_tag(tag: str) -> Dimensions:
    """The catalogue's model for an Ollama tag such as qwen2.5-coder:7b. Raises CapacityError."""
    family, _, variant = tag.rpartition("/")[2].partition(":")
    wanted = _plain(family + variant.partition("-")[0])
    found = [
        each
        for name, each in capacity.models().items()
        if re.match(rf"(meta)?{re.escape(wanted)}(?![0-9])", _plain(name.rpartition("/")[2]))
    ]
    if not _SIZE.fullmatch(variant.partition("-")[0]) or not found:
        raise CapacityError(f"'{tag}' is no tag of a model in the catalogue")
    return min(found, key=lambda each: len(each.name))


_SIZE = re.compile(r"[a-z]?[0-9.x]+[bm]")  # 7b, 8x7b, 0.5b, e4b


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def stored(model: Model, dimensions: Dimensions) -> str:
    """How the published weights are stored: as the inventory says, else as its name does."""
    return model.quantization or stored_as(model.repository, dimensions)


def stored_as(repository: str, dimensions: Dimensions) -> str:
    """How a repository's weights are stored, by the ending of its name."""
    name = repository.lower()
    return next((kind for ending, kind in _FORMATS if name.endswith(ending)), dimensions.native)


def gguf(model: Model, dimensions: Dimensions) -> str:
    """The type of an Ollama model's file; the tag names it where it is not the usual one."""
    if model.quantization:
        return model.quantization
    if found := re.search(r"(q[4568](?:_k_m|_k|_0)|f16)$", model.repository.lower()):
        return found[1]
    return "mxfp4" if dimensions.native == "mxfp4" else "q4_k_m"


def smallest_gpu(names: Sequence[str]) -> GpuSpec:
    """The GPU with the least memory of those an instance spans. Raises CapacityError."""
    return min((capacity.gpu(name) for name in names), key=lambda spec: spec.memory)


def setup(instance: Instance, known: Shape, gpu: GpuSpec, correction: int = 0) -> Setup:
    """A vLLM instance as `capacity.predict` wants it; arguments in `extra_args` win, as there.

    `correction` is what an earlier run on this host taught, in bytes.
    """
    model, options = instance.deployment.model, dict(instance.options)
    options |= dict(_given(instance.deployment.extra_args))
    pipelines = int(options.get("pipeline_parallel") or 1)
    ranks = pipelines * replicas(instance)
    tensors = int(options.get("tensor_parallel") or max(1, len(instance.gpus) // ranks))
    alone = pipelines * tensors == 1
    return Setup(
        model=_shape_with(known.dimensions, options),
        gpu=gpu,
        quantization=_loaded(model, known.dimensions, options),
        tensor_parallel=tensors,
        pipeline_parallel=pipelines,
        measured_weights=known.weights if alone and "quantization" not in options else None,
        correction=correction,
        lora=bool(options.get("enable_lora") or options.get("lora_adapters")),
        stretched=_stretched(model, options),
        **{field: options[name] for name, field in _FIELDS.items() if options.get(name)},
    )


def replicas(instance: Instance) -> int:
    """Copies of the model inside one vLLM instance (data parallelism)."""
    return int(instance.options.get("data_parallel") or 1)


def _shape_with(model: Dimensions, options: Mapping[str, Any]) -> Dimensions:
    """The model, said to be an estimate where options bring memory that is not counted.

    Raises CapacityError where nothing can be said.
    """
    if options.get("expert_parallel") and int(options.get("data_parallel") or 1) > 1:
        raise CapacityError("experts spread over data parallel ranks are not predicted")
    if "model" not in (options.get("speculative_config") or {}):
        return model
    reasons = filter(None, (model.rough, "the draft model is not counted"))
    return replace(model, rough="; ".join(reasons))


_TGI_FIELDS = {
    "max_total_tokens": "context",
    "max_batch_prefill_tokens": "batched_tokens",
    "max_concurrent_requests": "sequences",
    "cuda_memory_fraction": "utilization",
}
_TGI_ROUGH = "TGI's memory is predicted as vLLM's"
_TGI_CACHE = {"fp8_e4m3fn": "fp8", "fp8_e5m2": "fp8"}
_TGI_SHORTEST = 4096  # tokens; by default TGI allows as much context as the memory holds
_TGI_SHARE = 0.9  # of what is free, which its warm-up keeps below by default


def tgi_setup(instance: Instance, known: Shape, gpu: GpuSpec) -> Setup:
    """A TGI instance; only an estimate, as its memory is predicted as vLLM's."""
    model, options = instance.deployment.model, instance.options
    own = {field: options[name] for name, field in _TGI_FIELDS.items() if options.get(name)}
    own.setdefault("context", min(_TGI_SHORTEST, known.dimensions.context))
    batched = max(own.get("batched_tokens", 0), own.get("sequences", 0))
    return Setup(
        model=replace(known.dimensions, rough=_TGI_ROUGH),
        gpu=gpu,
        quantization=options.get("quantize") or stored(model, known.dimensions),
        tensor_parallel=max(1, len(instance.gpus)),
        kv_dtype=_TGI_CACHE.get(str(options.get("kv_cache_dtype")), "auto"),
        stretched=True,
        **{"utilization": _TGI_SHARE} | own | ({"batched_tokens": batched} if batched else {}),
    )


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Options among extra arguments that decide memory: `--flag value`, `--flag=value`."""
    aliases = {"tensor_parallel_size": "tensor_parallel", "pipeline_parallel_size":
               "pipeline_parallel", "tp": "tensor_parallel", "pp": "pipeline_parallel"}  # fmt: skip
    words = [*arguments, ""]
    for word, following in pairwise(words):
        flag, separator, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        name = aliases.get(name, name)
        if not word.startswith("-"):
            continue
        if name in ("enforce_eager", "enable_lora", "hf_overrides", "rope_scaling"):
            yield name, True
        elif name in _NUMBERS:
            if (number := _number(value if separator else following)) is not None:
                yield name, _NUMBERS[name](number)
        elif name in ("tensor_parallel", "pipeline_parallel", "quantization", "kv_cache_dtype"):
            yield name, value if separator else following


def _number(text: str) -> float | None:
    """8192, 0.9, or 32k and 32K as vLLM reads them."""
    found = re.fullmatch(r"([0-9.]+)([kmKM]?)", text)
    if not found or found[1].count(".") > 1:
        return None
    return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "K": 1024, "M": 1 << 20}[found[2]]


def _loaded(model: Model, dimensions: Dimensions, options: Mapping[str, Any]) -> str:
    """The format in memory: a 16 bit checkpoint may be quantized while it is loaded."""
    published = stored(model, dimensions)
    forced = options.get("quantization")
    if forced and capacity.quantization(published).name == "bf16":
        return str(forced)
    wide = options.get("dtype") == "float32"
    return "fp32" if wide and capacity.quantization(published).name == "bf16" else published


def _stretched(model: Model, options: Mapping[str, Any]) -> bool:
    """Whether the context may go past what the checkpoint says, because somebody said so."""
    asked = options.get("max_model_len") or 0
    environment = options.get("environment") or {}
    return (
        (model.context_length or 0) >= asked > 0
        or bool(options.get("hf_overrides") or options.get("rope_scaling"))
        or environment.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    )
