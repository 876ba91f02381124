"""vLLM: what every engine proves, and that its KV cache is as large as it must be."""

from collections.abc import Callable

from inferfleet.calibration import Observed
from inferfleet.model import Instance, Inventory
from inferfleet.verify import memory
from inferfleet.verify.proofs import *  # noqa: F403
from inferfleet.verify.proofs import Ask, url


def test_cache_holds_a_full_request(
    ask: Ask,
    instance: Instance,
    inventory: Inventory,
    teach: Callable[[Observed | None], None],
) -> None:
    """its KV cache holds a request of full context, as far as it says"""
    answer = ask(url(instance, "/metrics"))
    assert answer.status == 200, answer.error or answer.text[:500]
    tokens, seen = memory.vllm_observed(instance, inventory, answer.text)
    wanted = instance.options.get("max_model_len") or 0
    assert tokens is None or tokens >= wanted, f"{tokens} tokens of cache, {wanted} of context"
    teach(seen)
