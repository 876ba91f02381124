"""What a running engine says of its memory, next to what was predicted. Pure."""

from __future__ import annotations

import re
from typing import Any

from inferfleet import calibration, capacity, outlook
from inferfleet.calibration import Observed
from inferfleet.capacity import CapacityError, Prediction
from inferfleet.model import Instance, Inventory

TRUSTED = 0.15  # of a GPU's memory; more than that is no error of the prediction but another cause
_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def cache_tokens(metrics: str, groups: int = 1) -> int | None:
    """KV tokens of a vLLM from its metrics; None where it does not say.

    kv_cache_size_tokens where the release has it, else num_gpu_blocks shared out over the kinds of
    layers x block_size. Source: vllm:cache_config_info, vllm/v1/metrics/loggers.py.
    """
    found = _INFO.search(metrics)
    labels = dict(_LABEL.findall(found[1])) if found else {}
    if (whole := labels.get("kv_cache_size_tokens", "")).isdigit():
        return int(whole)
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    if not (blocks.isdigit() and size.isdigit()):
        return None
    return int(blocks) // groups * int(size)


def vllm_observed(
    instance: Instance, inventory: Inventory, metrics: str
) -> tuple[int | None, Observed | None]:
    """(KV tokens, what they teach): None for what is not known, or too far off to be believed."""
    found = outlook.prediction(instance, inventory)
    tokens = cache_tokens(metrics, found.cache.groups if found else 1)
    if found is None or not tokens:
        return tokens, None
    return tokens, _learned(instance, found, tokens)


def _learned(instance: Instance, found: Prediction, tokens: int) -> Observed | None:
    gpu = found.setup.gpu
    extra = capacity.correction(found, tokens)
    if abs(extra) > TRUSTED * gpu.memory:
        return None
    return Observed(calibration.key(instance, gpu.name), tokens, found.kv_tokens, extra)


def ollama_observed(
    instance: Instance, inventory: Inventory, loaded: dict[str, Any]
) -> Observed | None:
    """What an entry of Ollama's /api/ps teaches; None where nothing was predicted."""
    try:
        found = outlook.ollama_of(instance, inventory)
    except CapacityError:
        return None
    extra = int(loaded["size"]) - found.prediction.total
    if abs(extra) > TRUSTED * (found.memory or found.prediction.total):
        return None
    key = calibration.key(instance, found.gpu.name if found.gpu else "CPU")
    return Observed(key, int(loaded["size"]), found.prediction.total, extra)
