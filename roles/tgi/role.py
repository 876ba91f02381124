"""Text Generation Inference: one instance per group of GPUs, under compose.

It is in maintenance mode; the lint warns of that, and its flags are judged by the launcher's.
"""

from __future__ import annotations

from collections.abc import Iterator

from inferfleet.builders import VERIFY_COMPOSE, VERIFY_UNIT, answers, image_present, running
from inferfleet.flags import lint, lint_variables
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Secret, Step
from inferfleet.modelpath import CachedModel, cached

KIND = "engine"
CACHE = "/var/cache/inferfleet"
CONTAINER_PORT = 8080
MARGIN = 15  # seconds between the launcher's own stop timeout and Docker's or systemd's

_FLAGS = {  # option -> flag, in the order of the command line
    "quantize": "--quantize",
    "dtype": "--dtype",
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_input_tokens": "--max-input-tokens",
    "max_total_tokens": "--max-total-tokens",
    "max_batch_prefill_tokens": "--max-batch-prefill-tokens",
    "max_batch_total_tokens": "--max-batch-total-tokens",
    "max_concurrent_requests": "--max-concurrent-requests",
    "cuda_memory_fraction": "--cuda-memory-fraction",
    "lora_adapters": "--lora-adapters",
}


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Key file, compose file and unit of each instance."""
    for instance in step.instances:
        yield from _instance(instance, cached(instance, plan), render)
    for instance in step.instances:
        timeout = instance.options["startup_timeout"]
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/health", timeout)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What the launcher would refuse, and engines that others reach without a key."""
    for instance in step.instances:
        for option, message in _problems(instance):
            yield f"{instance.deployment.name}:{option}", message


def warnings(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """Its maintenance mode, at each deployment once."""
    for name in dict.fromkeys(instance.deployment.name for instance in step.instances):
        yield (
            f"{name}:engine",
            "TGI is in maintenance mode since December 2025: only small fixes; its own authors "
            "recommend vLLM, SGLang or llama.cpp",
        )


def _problems(instance: Instance) -> Iterator[tuple[str, str]]:
    deployment, options = instance.deployment, instance.options
    if instance.listen != "127.0.0.1" and deployment.api_key is None:
        yield "api_key", "listens for other hosts without a key: add `api_key: !env NAME`"
    if "quantize" in options and "dtype" in options:
        yield "dtype", "the launcher takes either dtype or quantize, not both"
    if options.get("quantize") == "exl2" and deployment.gpus_per_instance > 1:
        yield "quantize", "exl2 cannot be spread over GPUs: set gpus_per_instance: 1"
    longest, total = options.get("max_input_tokens", 0), options.get("max_total_tokens")
    if total is not None and longest >= total:
        yield "max_input_tokens", f"leaves no room for an answer within max_total_tokens, {total}"
    for finding in lint("tgi", options["version"], deployment.extra_args):
        yield "extra_args", finding.message
    for finding in lint_variables("tgi", options["version"], options["environment"]):
        yield "environment", finding.message


def arguments(instance: Instance, folder: str = "") -> list[str]:
    """What follows the launcher; `folder` is where a cached model lies."""
    options, model = instance.options, instance.deployment.model
    line = ["--model-id", folder or model.repository]
    if model.revision and not line[1].startswith("/"):
        line += ["--revision", model.revision]
    line += ["--hostname", "0.0.0.0", "--port", str(CONTAINER_PORT)]  # noqa: S104 - inside
    line += ["--num-shard", str(max(1, instance.deployment.gpus_per_instance))]
    for option, flag in _FLAGS.items():
        if option in options:
            value = options[option]
            line += [flag, ",".join(value) if isinstance(value, list) else str(value)]
    if options["trust_remote_code"]:
        line.append("--trust-remote-code")
    line += ["--usage-stats", "on" if options["usage_stats"] else "off"]
    line += ["--graceful-termination-timeout", str(options["shutdown_timeout"])]
    return [*line, *instance.deployment.extra_args]


def secrets(instance: Instance) -> list[tuple[str, Secret]]:
    """Variables that hold secrets: never on a command line, only in the 0600 key file."""
    token = instance.options.get("hf_token")
    found = [("API_KEY", instance.deployment.api_key), ("HF_TOKEN", token)]
    return [(name, secret) for name, secret in found if secret is not None]


def variables(instance: Instance, *, offline: bool = False) -> dict[str, str]:
    """The launcher's other environment variables, sorted by name; `offline` asks no hub."""
    own = {"HF_HUB_OFFLINE": "1"} if offline else {}
    return dict(sorted((own | dict(instance.options["environment"])).items()))


def _instance(
    instance: Instance, model_cache: CachedModel | None, render: Render
) -> Iterator[Artefact | Ensure]:
    options, model = instance.options, instance.deployment.model
    folder = model_cache.folder if model_cache else ""
    path = f"/etc/inferfleet/{instance.name}"
    official = f"ghcr.io/huggingface/text-generation-inference:{options['version']}"
    image, stop_timeout = options.get("image", official), options["shutdown_timeout"] + MARGIN
    yield image_present(image)
    yield render(
        f"{path}/engine.env",
        "engine.env.j2",
        mode=0o600,
        restarts=(instance.unit,),
        secrets=secrets(instance),
    )
    yield render(
        f"{path}/compose.yml",
        "tgi-compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(instance.unit,),
        project=f"inferfleet-{instance.name}",
        image=image,
        arguments=arguments(instance, folder),
        variables=variables(instance, offline=bool(folder)),
        published=f"{instance.endpoint}:{CONTAINER_PORT}",
        port=CONTAINER_PORT,
        gpus=instance.devices,
        cdi=options["gpu_access"] == "cdi",
        cache=f"{CACHE}/huggingface",
        mounted=folder or (model.repository if model.repository.startswith("/") else ""),
        shm_size=options["shm_size"],
        start_period=options["startup_timeout"],
        stop_timeout=stop_timeout,
    )
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "tgi.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"TGI {instance.name} ({model.served_name}) in Docker",
        compose=f"{path}/compose.yml",
        model_cache=model_cache,
        stop_timeout=stop_timeout,
    )
