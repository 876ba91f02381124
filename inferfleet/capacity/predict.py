"""The prediction: where a GPU's memory goes, how many tokens and requests are left, does it fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from inferfleet.capacity import engines, kvcache, overhead
from inferfleet.capacity.dimensions import CapacityError, Dimensions
from inferfleet.capacity.gpus import GIB, GpuSpec
from inferfleet.capacity.quantization import kv_bytes, quantization
from inferfleet.capacity.shard import Shard, shard

Verdict = Literal["fits", "tight", "does not fit"]
ROUGH = 0.15  # how far an estimate outside the known ground may be off
ONE_SLICE = (  # source: NVIDIA's MIG user guide, application considerations
    "an instance takes one MIG slice: CUDA shows a process no second one, and slices have neither "
    "NVLink nor peer access"
)


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on GPUs of one kind, as an engine would be started. None: the engine's default.

    `context` is max_model_len in tokens; `version` the vLLM release; `usage` whether it is served
    or used in a script, which changes defaults; `measured_weights` bytes on one GPU as a log or a
    safetensors index told them; `correction` bytes to add to what everything but weights and
    cache takes, learned on this host; `free` bytes that the GPU has free before the start.
    """

    model: Dimensions
    gpu: GpuSpec
    quantization: str = ""
    context: int | None = None
    sequences: int | None = None
    batched_tokens: int | None = None
    kv_dtype: str = "auto"
    utilization: float | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    eager: bool = False
    version: str = ""
    generation: engines.Generation | None = None
    runner: engines.Runner = "v1"
    usage: engines.Usage = "serve"
    measured_weights: int | None = None
    correction: int = 0
    free: int | None = None
    lora: bool = False
    stretched: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Where one GPU's memory goes, in bytes: budget = weights + activation + non_torch +
    graphs_deducted + pool. `graphs_beside` comes on top of the budget. `activation` is the larger
    of `token_peak` and `sampler_peak`. `pool` is negative when the weights alone are too much."""

    budget: int
    weights: int
    token_peak: int
    sampler_peak: int
    non_torch: int
    graphs_deducted: int
    graphs_beside: int
    pool: int

    @property
    def activation(self) -> int:
        return max(self.token_peak, self.sampler_peak)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect of a setup. Bytes are on one GPU; tokens and requests of the instance.

    `needed` is what the pool must have for one request of full context; `margin` what is held
    back before it is said to fit; `concurrency` how many such requests run at once. The three
    memories are the range; `rough` says why it is only an estimate (±15 %), "" if it is not.
    """

    setup: Setup
    verdict: Verdict
    reason: str
    expected: Memory
    pessimistic: Memory
    optimistic: Memory
    context: int
    sequences: int
    batched_tokens: int
    cache: kvcache.Layout
    kv_token_bytes: int
    kv_tokens: int
    kv_tokens_range: tuple[int, int]
    concurrency: float
    needed: int
    margin: int
    rough: str


def predict(setup: Setup) -> Prediction:
    """Predict memory, KV tokens, concurrency and fit of one instance.

    pool = memory x utilization - weights - max(token peak, sampler peak) - non-torch - graphs
    where the release deducts them. It fits when the pool holds one request of full context and
    max(0.5 GiB, 1 % of memory) more (1 GiB with several GPUs, and the spread of the weights).
    Raises CapacityError naming the rule for a setup that no engine would start. Source: vLLM
    v1/worker/gpu_worker.py determine_available_memory, worker/worker.py before; margins from 45
    published start-up logs (tests/capacity).
    """
    fixed = _fixed(setup.model, setup.quantization, setup.tensor_parallel, setup.pipeline_parallel)
    generation, rule = _rules(setup, fixed)
    _check(setup, fixed)
    context = setup.context or setup.model.context
    batched, sequences = _batch(setup, rule, context)
    window = setup.model.window
    cut = kvcache.layout(fixed, rule, kv_bytes(setup.kv_dtype))
    expected, worst, best = _memories(setup, fixed, rule, sequences, batched)
    tokens, concurrency = kvcache.pool_tokens(expected.pool, cut, context, window, batched)
    low, _ = kvcache.pool_tokens(worst.pool, cut, context, window, batched)
    high, _ = kvcache.pool_tokens(best.pool, cut, context, window, batched)
    needed = kvcache.request_bytes(cut, context, window, batched)
    rough = _rough(setup, fixed, generation)
    margin = _margin(setup, expected, fixed, bool(rough))
    verdict, reason = _judge(setup, expected, needed, margin)
    return Prediction(
        setup, verdict, reason, expected, worst, best, context, sequences, batched,
        cut, cut.token_bytes, tokens, (low, high), concurrency, needed, margin, rough,
    )  # fmt: skip


def correction(prediction: Prediction, kv_tokens: int) -> int:
    """What a running engine teaches: bytes to give as `Setup.correction` next time on its host.

    kv_tokens is what it reports (vllm:cache_config_info); the result is what it took besides
    weights and cache beyond the prediction, negative if less. Raises CapacityError below 1.
    """
    if kv_tokens < 1:
        raise CapacityError(f"an engine that runs has KV tokens, not {kv_tokens}")
    window, batched = prediction.setup.model.window, prediction.batched_tokens
    pool = kvcache.pool_of(kv_tokens, prediction.cache, prediction.context, window, batched)
    return prediction.setup.correction + prediction.expected.pool - pool


@lru_cache(maxsize=8192)
def _fixed(model: Dimensions, weights: str, tp: int, pp: int) -> Shard:
    _check_parallel(model, tp, pp)
    return shard(model, quantization(weights or model.native), tp, pp)


def _check_parallel(model: Dimensions, tp: int, pp: int) -> None:
    if tp < 1 or pp < 1:
        raise CapacityError(f"tensor and pipeline parallelism are at least 1, not {tp} and {pp}")
    if model.heads % tp:
        raise CapacityError(
            f"{model.name}: tensor parallel size {tp} must divide its {model.heads} attention heads"
        )
    if model.latent is None and model.kv_heads % tp and tp % model.kv_heads:
        raise CapacityError(
            f"{model.name}: tensor parallel size {tp} and {model.kv_heads} KV heads: one must "
            "divide the other"
        )
    if pp > model.layers:
        raise CapacityError(f"{model.name}: {pp} pipeline stages for {model.layers} layers")


def _rules(setup: Setup, fixed: Shard) -> tuple[engines.Generation, engines.Rules]:
    generation = setup.generation
    if generation is None:
        release = engines.parse_release(setup.version)
        generation = engines.default_generation(release, setup.gpu, fixed.weights.kind)
    return generation, engines.rules(setup.version, generation, setup.runner)


def _check(setup: Setup, fixed: Shard) -> None:
    gpu, utilization = setup.gpu, setup.utilization
    if gpu.memory <= 0:
        raise CapacityError(f"{gpu.name}: GPU memory must be positive, not {gpu.memory} bytes")
    if utilization is not None and not 0 < utilization <= 1:
        raise CapacityError(f"memory utilization must be above 0 and at most 1, not {utilization}")
    if gpu.mig and setup.tensor_parallel * setup.pipeline_parallel > 1:
        raise CapacityError(f"{gpu.name}: {ONE_SLICE}")
    if gpu.vendor == "nvidia" and gpu.capability < fixed.weights.capability:
        need = "{}.{}".format(*fixed.weights.capability)
        have = "{}.{}".format(*gpu.capability)
        raise CapacityError(
            f"{fixed.weights.name} needs compute capability {need}; {gpu.name} has {have}"
        )
    for name, value in (
        ("context", setup.context),
        ("sequences", setup.sequences),
        ("batched tokens", setup.batched_tokens),
    ):
        if value is not None and value < 1:
            raise CapacityError(f"{name} must be at least 1, not {value}")
    if setup.context and setup.context > setup.model.context and not setup.stretched:
        raise CapacityError(
            f"{setup.model.name}: a context of {setup.context} is past the model's limit of "
            f"{setup.model.context} tokens"
        )


def _batch(setup: Setup, rule: engines.Rules, context: int) -> tuple[int, int]:
    windowed = setup.model.window is not None
    default = engines.batch_defaults(rule, setup.gpu, context, setup.usage, windowed=windowed)
    batched = setup.batched_tokens or default[0]
    sequences = setup.sequences or min(default[1], batched)
    if batched < sequences:
        raise CapacityError(
            f"max_num_batched_tokens ({batched}) must be at least max_num_seqs ({sequences})"
        )
    return batched, sequences


def _memories(
    setup: Setup, fixed: Shard, rule: engines.Rules, sequences: int, batched: int
) -> tuple[Memory, Memory, Memory]:
    """(expected, pessimistic, optimistic): graphs deducted and the larger sampler, or neither."""
    utilization = setup.utilization if setup.utilization is not None else rule.utilization
    budget = int(setup.gpu.memory * utilization)
    weights = setup.measured_weights or fixed.weight_bytes
    tokens = overhead.token_peak(fixed, batched)
    sampler = overhead.sampler_peak(fixed, rule, sequences, batched)
    torch = overhead.non_torch(rule, setup.tensor_parallel, setup.gpu.peers) + setup.correction
    torch += overhead.sampler_state(fixed, rule, sequences)
    graph = 0 if setup.eager else overhead.graphs(fixed, rule, sequences)
    spread = 0 if setup.measured_weights else round(weights * fixed.weights.spread)

    def memory(weights: int, sampler: int, torch: int, deducted: int) -> Memory:
        pool = budget - weights - max(tokens, sampler) - torch - deducted
        beside = graph - deducted
        return Memory(budget, weights, tokens, sampler, torch, deducted, beside, pool)

    worst_sampler = round(sampler * max(1.0, 9.66 / (rule.sampler or 9.66)))
    best_sampler = round(sampler * min(1.0, 7.25 / (rule.sampler or 7.25)))
    return (
        memory(weights, sampler, torch, graph if rule.graphs_deducted else 0),
        memory(weights + spread, worst_sampler, torch + torch // 2, graph),
        memory(weights - spread, best_sampler, torch - torch // 2, 0),
    )


def _rough(setup: Setup, fixed: Shard, generation: engines.Generation) -> str:
    reasons = [setup.model.rough, setup.gpu.rough]
    if setup.lora:
        reasons.append("LoRA adapters are not counted")
    if fixed.recurrent_layers:
        reasons.append("layers with a recurrent state")
    if fixed.model.latent and generation == "V0":
        reasons.append("early releases unpacked latent attention")
    if setup.version and engines.parse_release(setup.version).number < (0, 4):
        reasons.append("releases before 0.4 counted otherwise")
    return "; ".join(filter(None, reasons))


def _margin(setup: Setup, memory: Memory, fixed: Shard, rough: bool) -> int:
    several = setup.tensor_parallel * setup.pipeline_parallel > 1
    margin = max(GIB if several else GIB // 2, setup.gpu.memory // 100)
    if setup.measured_weights is None:
        margin = max(margin, round(memory.weights * fixed.weights.spread) + GIB // 4)
    if rough:
        margin += round(ROUGH * (memory.budget - max(0, memory.pool)))
    return margin


def _judge(setup: Setup, memory: Memory, needed: int, margin: int) -> tuple[Verdict, str]:
    if setup.free is not None and setup.free < memory.budget:
        return "does not fit", "less memory is free than the engine asks for at its start"
    spare = memory.pool - needed
    if spare < -margin:
        return "does not fit", _why_not(memory)
    if spare < margin:
        return "tight", f"within {margin / GIB:.1f} GiB, the margin of the prediction"
    if memory.budget + memory.graphs_beside > setup.gpu.memory:
        return "tight", "CUDA graphs come on top of the budget and may not find room"
    return "fits", ""


def _why_not(memory: Memory) -> str:
    if memory.weights > memory.budget:
        return "the weights alone are more than the budget"
    if memory.pool < 0:
        larger = "the sampler" if memory.sampler_peak > memory.token_peak else "activations"
        return f"the weights and {larger} leave nothing for the KV cache"
    return "the KV cache is too small for one request of full context"
