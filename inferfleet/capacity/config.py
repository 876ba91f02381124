"""A model's dimensions from its config.json, as Hugging Face transformers writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferfleet.capacity.dimensions import CapacityError, Dimensions, Experts, Latent, Recurrent

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_topk")
_PACKED = {  # compressed-tensors' names
    "float-quantized": "fp8",
    "naive-quantized": "fp8",
    "int-quantized": "int8",
    "pack-quantized": "gptq",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}


def from_config(name: str, config: Mapping[str, Any]) -> Dimensions:
    """The dimensions that a model's config.json tells; `text_config` is looked into.

    Knows experts, latent attention, sliding windows, gated delta layers, rope scaling and how the
    checkpoint is quantized. Raises CapacityError naming the field that is missing. Source of the
    field names: Hugging Face transformers configuration classes.
    """
    text = dict(config.get("text_config") or config)
    text.setdefault("quantization_config", config.get("quantization_config"))
    try:
        return _from_text(name, text, vision="vision_config" in config)
    except KeyError as error:
        raise CapacityError(f"{name}: config.json lacks {error.args[0]}") from None
    except (TypeError, ValueError) as error:
        raise CapacityError(f"{name}: config.json has a strange value: {error}") from None


def _from_text(name: str, text: Mapping[str, Any], *, vision: bool) -> Dimensions:
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    hidden = int(text["hidden_size"])
    head_dim = int(text.get("head_dim") or hidden // heads)
    window, window_layers = _window(text, layers)
    rope = text.get("rope_parameters") or {}
    partial = float(text.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1)
    return Dimensions(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab=int(text["vocab_size"]),
        intermediate=int(text.get("intermediate_size") or text["moe_intermediate_size"]),
        context=_context(text),
        tied=bool(text.get("tie_word_embeddings", False)),
        experts=_experts(text),
        latent=_latent(text),
        recurrent=_recurrent(text, layers, hidden),
        window=window,
        window_layers=window_layers,
        rotary_dim=None if partial == 1 else round(head_dim * partial),
        native=_native(text.get("quantization_config") or {}),
        rough=_rough(text, vision=vision),
        source="config.json",
    )


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key)), None)


def _experts(config: Mapping[str, Any]) -> Experts | None:
    count = _first(config, _COUNTS)
    if count is None:
        return None
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    shared = config.get("shared_expert_intermediate_size")
    if shared is None:
        shared = width * int(config.get("n_shared_experts") or 0)
    dense = int(config.get("first_k_dense_replace") or 0)
    return Experts(count, _first(config, _PER_TOKEN) or 1, width, int(shared), dense)


def _latent(config: Mapping[str, Any]) -> Latent | None:
    if not config.get("kv_lora_rank"):
        return None
    return Latent(
        int(config["kv_lora_rank"]),
        int(config["qk_rope_head_dim"]),
        int(config.get("q_lora_rank") or 0),
        int(config["qk_nope_head_dim"]),
        int(config["v_head_dim"]),
    )


def _recurrent(config: Mapping[str, Any], layers: int, hidden: int) -> Recurrent | None:
    """Gated delta layers: a state of value heads x key width x value width and a convolution."""
    if not config.get("linear_num_value_heads"):
        return None
    values, keys = int(config["linear_num_value_heads"]), int(config["linear_num_key_heads"])
    value, key = int(config["linear_value_head_dim"]), int(config["linear_key_head_dim"])
    mixed = 2 * keys * key + values * value
    kernel = int(config.get("linear_conv_kernel_dim") or 4)
    if kinds := config.get("layer_types"):
        count = sum(kind == "linear_attention" for kind in kinds)
    else:
        count = layers - layers // int(config.get("full_attention_interval") or 4)
    state = 2 * (values * key * value + (kernel - 1) * mixed)
    params = hidden * (mixed + 2 * values * value + 2 * values) + kernel * mixed
    return Recurrent(count, state, params)


def _window(config: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    window = int(config.get("sliding_window") or 0)
    if not 0 < window < _context(config) or config.get("use_sliding_window") is False:
        return None, 0
    if kinds := config.get("layer_types"):
        return window, sum(kind == "sliding_attention" for kind in kinds)
    if pattern := config.get("sliding_window_pattern"):
        return window, layers - layers // int(pattern)
    alternating = str(config.get("model_type", "")).startswith(("gemma2", "gpt_oss"))
    return window, layers // 2 if alternating else layers


def _context(config: Mapping[str, Any]) -> int:
    """max_position_embeddings x the factor of linear or dynamic scaling, or what yarn scales."""
    limit = int(config["max_position_embeddings"])
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    factor = float(scaling.get("factor") or 1)
    if kind in ("linear", "dynamic"):
        return round(limit * factor)
    if kind in ("yarn", "deepseek_yarn") and scaling.get("original_max_position_embeddings"):
        return round(int(scaling["original_max_position_embeddings"]) * factor)
    return limit


def _native(how: Mapping[str, Any]) -> str:
    """The catalogue's name for a checkpoint's quantization_config."""
    method = str(how.get("quant_method") or "").lower()
    if method == "gptq" and int(how.get("bits") or 4) == 8:
        return "gptq-int8"
    if method == "compressed-tensors":
        return _PACKED.get(str(how.get("format")), "fp8")
    if method == "modelopt":
        return "nvfp4" if "NVFP4" in str(how.get("quant_algo", "")).upper() else "fp8"
    return method if method in ("fp8", "awq", "gptq", "mxfp4", "bitsandbytes") else "bf16"


def _rough(config: Mapping[str, Any], *, vision: bool) -> str:
    known = {"full_attention", "sliding_attention", "linear_attention"}
    strange = set(config.get("layer_types") or ()) - known
    if strange:
        return f"layers of an unknown kind count as attention: {', '.join(sorted(strange))}"
    return "its vision tower is not counted" if vision else ""
