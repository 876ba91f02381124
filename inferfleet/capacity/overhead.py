"""What a GPU holds besides weights and cache: activations, sampler, NCCL, CUDA graphs. Bytes."""

from __future__ import annotations

from functools import lru_cache

from inferfleet.capacity.engines import Rules
from inferfleet.capacity.gpus import GIB, MIB
from inferfleet.capacity.shard import Shard

_PEERS = {  # GiB a rank, by tensor parallel size: NCCL and all-reduce buffers
    "none": {1: 0.07},
    "pcie": {1: 0.07, 2: 0.3, 4: 0.4, 8: 0.8},
    "nvlink": {1: 0.07, 2: 0.8, 4: 1.0, 8: 2.0},
}
_GRAPH = MIB // 5  # one layer in one captured size


def token_peak(shard: Shard, batched_tokens: int) -> int:
    """Activation of the profiling run: batched tokens x bytes a token (see Shard)."""
    return batched_tokens * shard.token_peak


def sampler_peak(shard: Shard, rule: Rules, sequences: int, batched_tokens: int) -> int:
    """Logits and what sorting them takes: k x sequences x vocab x 4 B.

    k is the release's (9.66 or 7.25; see engines.rules); V1 before 0.8 computed 16 bit logits of
    every batched token instead. Logged: Llama-3.1-8B 256 sequences 1.19 GiB (formula 1.18).
    """
    model = shard.model
    if rule.all_logits:
        return batched_tokens * (2 * model.vocab + 6 * model.hidden)
    return round(rule.sampler * 4 * min(sequences, batched_tokens) * model.vocab)


def sampler_state(shard: Shard, rule: Rules, sequences: int) -> int:
    """What the v2 runner keeps: 4 B for each sequence and word (penalty counts)."""
    return 4 * sequences * shard.model.vocab if rule.runner == "v2" else 0


@lru_cache(maxsize=256)
def non_torch(rule: Rules, tp: int, peers: str) -> int:
    """NCCL, kernels' own buffers and, in some releases, the CUDA context, on each GPU.

    One GPU 0.07 GiB (logged 0.01 to 0.12); several 0.3 to 0.8 over PCIe (logged 0.25, 0.09) and
    0.8 to 2.0 over NVLink (logged 0.25 to 1.4 with two, 0.95 with four). Source: "non-torch
    memory" of published logs.
    """
    gib: float = next((gib for size, gib in _PEERS[peers].items() if size >= tp), 2.0)
    return int(gib * GIB) + rule.driver_context


@lru_cache(maxsize=1024)
def captured_sizes(sequences: int, modes: int) -> int:
    """How many batch sizes CUDA graphs are captured for.

    1, 2, 4, every 8th to 256, every 16th to min(2 x sequences, 512); a second time up to the
    sequences in releases that capture full graphs too. Source: vllm/config (capture sizes).
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    largest = min(2 * sequences, 512)
    pieces = len([size for size in sizes if size <= largest])
    full = len([size for size in sizes if size <= min(sequences, largest)])
    return pieces if modes == 1 else pieces + full


def graphs(shard: Shard, rule: Rules, sequences: int) -> int:
    """CUDA graphs: layers x captured sizes x 0.2 MiB, twice that with experts.

    Logged: 28 layers, 256 sequences 0.48 and 0.53 GiB (formula 0.47); 24 layers 0.37 and 0.40
    (0.40); V1 before 0.10 took four times as much; V0 captured the model whole, 0.2 to 0.6.
    """
    if rule.generation == "V0":
        return shard.layers * 10 * MIB
    old = 4 if rule.release.number < (0, 10) else 1
    wide = 2 if shard.model.experts else 1
    return shard.layers * captured_sizes(sequences, rule.graph_modes) * _GRAPH * old * wide
