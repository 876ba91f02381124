"""Tasks that answer questions of capacity: fit, recommend, size."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context

from inferfleet.cli.command import FINE, INVENTORY, JSON, PROBLEMS, command
from inferfleet.cli.command import project as open_project
from inferfleet.errors import UsageError

_MODEL = "a repository, an Ollama tag, or the path of a folder with its config.json"
_GPU = "the GPU's name, such as L40S"
_CONTEXT = "tokens of one request, prompt and answer (default: the model's limit)"
_USERS = "how many ask at the same time (default: 1)"


@command(
    model=_MODEL,
    gpu=_GPU,
    count="how many of them one host has (default: 1)",
    context=_CONTEXT,
    users=_USERS,
    quantization="how the weights are stored (default: as the repository has them)",
    tensor_parallel="GPUs of an instance (default: the fewest on which it fits)",
    sequences="max-num-seqs (default: the engine's)",
    batched_tokens="max-num-batched-tokens (default: the engine's)",
    kv_dtype="type of the KV cache, such as fp8",
    utilization="gpu-memory-utilization (default: the engine's)",
    engine_version="vLLM's release (default: the newest known)",
    memory="GiB of one GPU as CUDA reports it, in place of the catalogue's",
    eager="without CUDA graphs",
    json=JSON,
)
def fit(
    _: Context,
    model: str = "",
    gpu: str = "",
    count: str = "",
    context: str = "",
    users: str = "",
    quantization: str = "",
    tensor_parallel: str = "",
    sequences: str = "",
    batched_tokens: str = "",
    kv_dtype: str = "",
    utilization: str = "",
    engine_version: str = "",
    memory: str = "",
    eager: bool = False,
    json: bool = False,
) -> int:
    """Does a model fit a GPU, how many requests does it carry, and what to change if not."""
    from inferfleet import advice, charts, report

    asked = advice.Question(
        model, gpu, count, context, users, quantization, tensor_parallel, sequences,
        batched_tokens, kv_dtype, utilization, engine_version, memory, eager,
    )  # fmt: skip
    found, many = advice.fit(asked), advice.whole("users", users, 1)
    if json:
        report.as_json(advice.fit_json(found, many))
    else:
        charts.show_fit(report.console(), found, many)
    return PROBLEMS if found.prediction.verdict == "does not fit" else FINE


@command(
    host="a host of the inventory, in place of --gpu",
    gpu=_GPU,
    count="how many of them one host has (default: 1)",
    users=_USERS,
    context="tokens of one request, prompt and answer (default: 16384)",
    task="what for: code or chat (default: chat)",
    inventory=INVENTORY,
    json=JSON,
)
def recommend(
    _: Context,
    host: str = "",
    gpu: str = "",
    count: str = "",
    users: str = "",
    context: str = "",
    task: str = "chat",
    inventory: str = "inventory",
    json: bool = False,
) -> int:
    """What to run on a GPU or a host, why, and what the next larger GPU would buy."""
    from inferfleet import advice, charts, report

    if bool(host) == bool(gpu):
        raise UsageError("say either --gpu or --host")
    many, length = advice.whole("users", users, 1), advice.whole("context", context, 16384)
    if host:
        machine = open_project(inventory).host(host)
        found = advice.recommend_host(machine, many, length, task)
    else:
        several = advice.whole("count", count, 1)
        found = advice.recommend(advice.gpu_of(gpu), several, many, length, task)
    if json:
        report.as_json(advice.advice_json(found))
    else:
        charts.show_advice(report.console(), found, many)
    return FINE if found.found else PROBLEMS


@command(
    model=_MODEL,
    users=_USERS,
    context=_CONTEXT,
    gpu="only this kind of GPU",
    gpus_per_host="GPUs that one host can have (default: 8)",
    quantization="how the weights are stored (default: as the repository has them)",
    output="write the first answer as a phase for an inventory to this file",
    json=JSON,
)
def size(
    _: Context,
    model: str = "",
    users: str = "",
    context: str = "",
    gpu: str = "",
    gpus_per_host: str = "",
    quantization: str = "",
    output: str = "",
    json: bool = False,
) -> int:
    """What hardware a model and its users need, and a phase file for it."""
    from inferfleet import advice, charts, phasefile, report

    advice.needed(model=model)
    many, length = advice.whole("users", users, 1), advice.length("context", context)
    per_host = advice.whole("gpus-per-host", gpus_per_host, 8)
    found = advice.sizes(model, many, length, gpu, per_host, quantization)
    if output:
        Path(output).write_text(phasefile.text(found[0], model, many), encoding="utf-8")
    if json:
        report.as_json({"ok": True, "users": many, "sizes": advice.sizes_json(found)})
    else:
        charts.show_sizes(report.console(), found, many)
        if output:
            print(f"{output}: written; fill in its hosts, then: inferfleet check")
    return FINE
