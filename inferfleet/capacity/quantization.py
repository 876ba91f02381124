"""Weight formats: bytes a parameter, what they add, and which GPUs have kernels for them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from inferfleet.capacity.dimensions import CapacityError


@dataclass(frozen=True, slots=True)
class Quantization:
    """A weight format of the linear layers; embeddings and head stay in 16 bit.

    `linear` is bytes a parameter with its scales, `packing` what loading adds on top (a
    workspace, repacked zeros; a factor), `spread` how far logged loads lie from the formula
    (a fraction), `capability` the lowest compute capability with a kernel.
    """

    name: str
    linear: float
    capability: tuple[int, int]
    packing: float = 1.0
    spread: float = 0.004
    plain: float = 2.0  # bytes a parameter of what is not quantized
    bits: int = 16  # of the multiplication, for the compute bound
    kind: str = "safetensors"
    penalty: float = 0.0  # how much quality it costs, in the units of Recommendation.score


def _gguf(name: str, bits: float, *, spread: float, penalty: float) -> Quantization:
    size = bits / 8
    return Quantization(
        name, size, (5, 0), 1.005, spread, size, kind="gguf", penalty=penalty
    )  # fmt: skip


_GROUP_OF_128 = 0.5 + 2.5 / 128  # 4 bit, with a 16 bit scale and a 4 bit zero every 128
_FORMATS = (
    Quantization("bf16", 2.0, (7, 0)),
    Quantization("fp32", 4.0, (7, 0), plain=4.0, bits=32),
    Quantization("fp8", 1.0, (7, 5), spread=0.015, bits=8, penalty=0.05),
    Quantization("int8", 1.0, (7, 5), spread=0.015, bits=8, penalty=0.1),
    Quantization("gptq-int8", 1.0 + 2.5 / 128, (6, 0), 1.01, 0.015, penalty=0.1),
    Quantization("awq", _GROUP_OF_128, (7, 5), 1.02, 0.015, penalty=0.35),
    Quantization("gptq", _GROUP_OF_128, (6, 0), 1.01, 0.015, penalty=0.35),
    Quantization("bnb-4bit", 0.5 + 1 / 64 + 4 / 16384, (7, 0), 1.005, 0.02, penalty=0.45),
    Quantization("nvfp4", 0.5 + 1 / 16, (7, 5), spread=0.015, penalty=0.25),
    Quantization("mxfp4", 0.5 + 1 / 32, (8, 0), spread=0.01, penalty=0.25),
    _gguf("q4_k_m", 4.85, spread=0.04, penalty=0.35),
    _gguf("q5_k_m", 5.7, spread=0.04, penalty=0.2),
    _gguf("q6_k", 6.5625, spread=0.03, penalty=0.1),
    _gguf("q8_0", 8.5, spread=0.02, penalty=0.06),
    _gguf("f16", 16, spread=0.01, penalty=0.0),
)  # fmt: skip
_ALIASES = {
    "none": "bf16", "": "bf16", "auto": "bf16", "fp16": "bf16", "float16": "bf16", "half": "bf16",
    "bfloat16": "bf16", "float32": "fp32", "awq_marlin": "awq", "auto_awq": "awq", "int4": "awq",
    "w4a16": "gptq", "gptq-int4": "gptq", "gptq_marlin": "gptq", "auto_gptq": "gptq",
    "fp8_w8a8": "fp8", "fp8-block": "fp8", "modelopt": "fp8", "modelopt_fp8": "fp8",
    "w8a8": "int8", "w8a8-int8": "int8", "int8-w8a8": "int8", "gptq-8bit": "gptq-int8",
    "bitsandbytes": "bnb-4bit", "bnb": "bnb-4bit", "bnb4": "bnb-4bit", "modelopt_fp4": "nvfp4",
    "fp4": "nvfp4", "gpt_oss_mxfp4": "mxfp4", "q4_0": "q4_k_m", "q4": "q4_k_m", "q8": "q8_0",
}  # fmt: skip
FORMATS = {each.name: each for each in _FORMATS}
KV_BYTES = {
    "auto": 2.0, "bf16": 2.0, "bfloat16": 2.0, "fp16": 2.0, "float16": 2.0, "f16": 2.0,
    "fp32": 4.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "int8_per_token_head": 1.0,
    "nvfp4": 0.5625, "q8_0": 8.5 / 8, "q4_0": 4.5 / 8,
}  # fmt: skip


def quantization(name: str) -> Quantization:
    """The format of that name, or of one of its usual other names.

    Bytes a parameter: bf16 2; fp8, int8 1; int4 with groups of 128 0.5195; NVFP4 0.5625; MXFP4
    0.53125; GGUF types as llama.cpp documents them. Raises CapacityError for any other.
    Source: checkpoint formats; packing from logged loads (vLLM "Model loading took").
    """
    key = name.strip().lower().removeprefix("gguf-").removeprefix("gguf:")
    found = FORMATS.get(_ALIASES.get(key, key))
    if found is None:
        near = get_close_matches(key, [*FORMATS, *_ALIASES], 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FORMATS)}"
        raise CapacityError(f"unknown quantization {name!r}{hint}")
    return found


def kv_bytes(name: str) -> float:
    """Bytes of one element of the KV cache. Raises CapacityError for an unknown type."""
    try:
        return KV_BYTES[name.lower()]
    except KeyError:
        known = ", ".join(KV_BYTES)
        raise CapacityError(f"unknown KV cache type {name!r}; known: {known}") from None
