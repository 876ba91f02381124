"""The KV cache: bytes a token, how layers share blocks, tokens and requests a pool holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from inferfleet.capacity.engines import Rules
from inferfleet.capacity.shard import Shard, round_up

BLOCK = 16  # tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """How one rank's pool is cut.

    `block_bytes`: one block of `block_tokens` tokens over the layers of one group; `full`,
    `window`, `state`: how many groups of each kind there are. `token_bytes`: one token in every
    attention layer, which is what the pool costs when nothing slides.
    """

    token_bytes: int
    block_bytes: int
    block_tokens: int
    full: int
    window: int
    state: int
    counts_groups: str

    @property
    def groups(self) -> int:
        return self.full + self.window + self.state


def layer_token_bytes(shard: Shard, element: float, padding: int = 1) -> float:
    """Bytes of one token in one attention layer on one GPU.

    2 x max(1, kv_heads / tp) x head_dim x element; MLA: (kv_rank + rope_dim) x element, the same
    on every rank. Source: vllm/v1/kv_cache_interface.py; logged pools agree within 0.02 %.
    """
    model = shard.model
    if model.latent:
        return round_up(model.latent.kv_rank + model.latent.rope_dim, padding) * element
    return 2 * max(1, model.kv_heads // shard.tp) * model.head_dim * element


@lru_cache(maxsize=8192)
def layout(shard: Shard, rule: Rules, element: float) -> Layout:
    """The layout of a shard's cache under a release's rules.

    Layers of several kinds go into groups of one size g, padded: g = the smaller count, or the
    larger when it is less than `merge` times as much; before the hybrid manager all layers count
    as full. Recurrent layers take one block a request, and blocks grow to hold their state.
    Source: _get_kv_cache_groups_uniform_page_size in vllm/v1/core/kv_cache_utils.py.
    """
    per_layer = layer_token_bytes(shard, element, rule.latent_padding)
    full, window, state = shard.full_layers, shard.window_layers, shard.recurrent_layers
    token_bytes = round(per_layer * (full + window))
    if rule.counts_groups == "layers":
        full, window = full + window, 0
    tokens, recurrent = BLOCK, shard.model.recurrent
    if recurrent and state:
        tokens = round_up(-(-recurrent.state_bytes // shard.tp // round(per_layer)), BLOCK)
    size = _group_size([each for each in (full, window, state) if each], rule.merge)
    return Layout(
        token_bytes,
        round(per_layer * tokens) * size,
        tokens,
        -(-full // size),
        -(-window // size),
        -(-state // size),
        rule.counts_groups,
    )


def _group_size(counts: list[int], merge: float) -> int:
    smallest, largest = min(counts), max(counts)
    return largest if largest < smallest * merge else smallest


def request_blocks(cut: Layout, length: int, window: int | None, batched: int) -> int:
    """Blocks that one request of `length` tokens takes of the pool.

    Full groups: ceil(length / block); sliding ones keep the window and the batch in flight:
    ceil(min(window - 1 + batched, length) / block) + 1; recurrent ones one. Source:
    SlidingWindowSpec in vllm/v1/kv_cache_interface.py.
    """
    blocks = cut.full * -(-length // cut.block_tokens) + cut.state
    if cut.window and window:
        kept = min(window - 1 + batched, length)
        blocks += cut.window * (-(-kept // cut.block_tokens) + 1)
    return blocks


def request_bytes(cut: Layout, length: int, window: int | None, batched: int) -> int:
    """Bytes of the pool that one request of `length` tokens takes; what vLLM says is needed."""
    return request_blocks(cut, length, window, batched) * cut.block_bytes


def pool_tokens(
    pool: int, cut: Layout, length: int, window: int | None, batched: int
) -> tuple[int, float]:
    """(KV tokens, maximum concurrency of requests of `length` tokens) of a pool of bytes.

    tokens = floor(pool / block) x 16 with one kind of layer; with several, what the release
    reports: an even share of the groups, or concurrency x length. Source: vLLM kv_cache_utils.
    """
    blocks = max(0, pool) // cut.block_bytes
    concurrency = blocks / request_blocks(cut, length, window, batched)
    if cut.counts_groups == "requests" and cut.groups > 1:
        return int(concurrency * length), concurrency
    return blocks // cut.groups * cut.block_tokens, concurrency


def pool_of(tokens: int, cut: Layout, length: int, window: int | None, batched: int) -> int:
    """Bytes of the pool that an engine reports as so many KV tokens; undoes `pool_tokens`."""
    if cut.counts_groups == "requests" and cut.groups > 1:
        blocks = tokens / length * request_blocks(cut, length, window, batched)
        return round(blocks * cut.block_bytes)
    return tokens // cut.block_tokens * cut.groups * cut.block_bytes
