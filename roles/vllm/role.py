"""vLLM: one instance per group of GPUs, under compose or native, behind a systemd unit.

Command line and environment: vLLM's own parser of the pinned version reads them in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from inferfleet.builders import VERIFY_COMPOSE, VERIFY_UNIT, answers, running, system_user
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Secret, Step, sh
from inferfleet.modelpath import CachedModel, cached

KIND = "engine"
CACHE = "/var/cache/inferfleet"
CONTAINER_PORT = 8000
MARGIN = 15  # seconds between the engine's own stop timeout and systemd's or Docker's

_FLAGS = {  # option -> flag, in the order of the command line
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "dtype": "--dtype",
    "kv_cache_dtype": "--kv-cache-dtype",
    "quantization": "--quantization",
    "reasoning_parser": "--reasoning-parser",
}


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Key file, compose file or virtual environment, and unit of each instance."""
    for instance in step.instances:
        yield _environment(instance, render)
        if instance.options["runtime"] == "docker":
            yield from _docker(instance, cached(instance, plan), render)
        else:
            yield from _native(instance, cached(instance, plan), render)
    for instance in step.instances:
        timeout = instance.options["startup_timeout"]
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/health", timeout)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """GPUs and parallelism agree; nothing listens for others without a key."""
    for instance in step.instances:
        deployment, options = instance.deployment, instance.options
        product = tensor_parallel(instance) * options["pipeline_parallel"]
        if product != max(1, deployment.gpus_per_instance):
            yield (
                f"{deployment.name}:tensor_parallel",
                f"tensor x pipeline parallelism is {product}, but gpus_per_instance is "
                f"{deployment.gpus_per_instance}",
            )
        if instance.listen != "127.0.0.1" and deployment.api_key is None:
            yield (
                f"{deployment.name}:api_key",
                "listens for other hosts without a key: add `api_key: !env NAME`",
            )


def tensor_parallel(instance: Instance) -> int:
    """GPUs that share each layer; what is left of the instance's GPUs by default."""
    gpus = max(1, instance.deployment.gpus_per_instance)
    given: int | None = instance.options.get("tensor_parallel")
    return given or max(1, gpus // int(instance.options["pipeline_parallel"]))


def arguments(instance: Instance, host: str, port: int, folder: str = "") -> list[str]:
    """What follows `vllm serve`: the model first, everything explicit that has to match.

    `folder` is where the model lies when it is cached; else the engine fetches it itself.
    """
    options, model = instance.options, instance.deployment.model
    line = [folder or model.repository, "--host", host, "--port", str(port)]
    line += ["--served-model-name", model.served_name]
    if model.revision and not line[0].startswith("/"):
        line += ["--revision", model.revision]
    line += ["--tensor-parallel-size", str(tensor_parallel(instance))]
    if options["pipeline_parallel"] > 1:
        line += ["--pipeline-parallel-size", str(options["pipeline_parallel"])]
    for option, flag in _FLAGS.items():
        if option in options:
            line += [flag, str(options[option])]
    line += _switches(options)
    return [*line, *instance.deployment.extra_args]


def _switches(options: Any) -> list[str]:
    line = []
    if "enable_prefix_caching" in options:
        negation = "" if options["enable_prefix_caching"] else "no-"
        line.append(f"--{negation}enable-prefix-caching")
    if "tool_call_parser" in options:
        line += ["--enable-auto-tool-choice", "--tool-call-parser", options["tool_call_parser"]]
    if options["trust_remote_code"]:
        line.append("--trust-remote-code")
    if options["enforce_eager"]:
        line.append("--enforce-eager")
    if _release(options["version"]) >= (0, 20):  # older ones know no such flag, and abort at once
        line += ["--shutdown-timeout", str(options["shutdown_timeout"])]
    return line


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def secrets(instance: Instance) -> list[tuple[str, Secret]]:
    """Variables that hold secrets: never on a command line, only in the 0600 key file."""
    token = instance.options.get("hf_token")
    found = [("VLLM_API_KEY", instance.deployment.api_key), ("HF_TOKEN", token)]
    return [(name, secret) for name, secret in found if secret is not None]


def variables(instance: Instance, *, offline: bool = False) -> dict[str, str]:
    """The engine's other environment variables, sorted by name; `offline` asks no hub."""
    own = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    own |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    return dict(sorted((own | dict(instance.options["environment"])).items()))


def _environment(instance: Instance, render: Render) -> Artefact:
    return render(
        f"/etc/inferfleet/{instance.name}/engine.env",
        "engine.env.j2",
        mode=0o600,
        restarts=(instance.unit,),
        secrets=secrets(instance),
    )


def _docker(
    instance: Instance, model_cache: CachedModel | None, render: Render
) -> Iterator[Artefact | Ensure]:
    folder = model_cache.folder if model_cache else ""
    options, model = instance.options, instance.deployment.model
    compose = f"/etc/inferfleet/{instance.name}/compose.yml"
    image = options.get("image", f"vllm/vllm-openai:v{options['version']}")
    stop_timeout = options["shutdown_timeout"] + MARGIN
    yield Ensure(
        f"image {image} is here",
        test=sh("docker", "image", "inspect", image) + " >/dev/null 2>&1",
        run=sh("docker", "pull", "--quiet", image),
        timeout=3600,
        before=True,
    )
    yield render(
        compose,
        "compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(instance.unit,),
        project=f"inferfleet-{instance.name}",
        image=image,
        arguments=arguments(instance, "0.0.0.0", CONTAINER_PORT, folder),  # noqa: S104 - inside
        variables=variables(instance, offline=bool(folder)),
        published=f"{instance.listen}:{instance.port}:{CONTAINER_PORT}",
        gpus=instance.gpus,
        cache=CACHE,
        mounted=folder or (model.repository if model.repository.startswith("/") else ""),
        shm_size=options["shm_size"],
        start_period=options["startup_timeout"],
        stop_timeout=stop_timeout,
    )
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "vllm-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"vLLM {instance.name} ({model.served_name}) in Docker",
        compose=compose,
        model_cache=model_cache,
        cache=CACHE,
        stop_timeout=stop_timeout,
    )


def _native(
    instance: Instance, model_cache: CachedModel | None, render: Render
) -> Iterator[Artefact | Ensure]:
    folder = model_cache.folder if model_cache else ""
    options = instance.options
    venv = options.get("venv", f"/opt/inferfleet/vllm-{options['version']}")
    yield system_user("inferfleet")
    if "venv" not in options:
        yield _installed(venv, options["version"])
    line = arguments(instance, instance.listen, instance.port, folder)
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "vllm-native.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"vLLM {instance.name} ({instance.deployment.model.served_name})",
        command=[f"{venv}/bin/vllm", "serve", *line],
        model_cache=model_cache,
        environment=f"/etc/inferfleet/{instance.name}/engine.env",
        variables=_devices(instance) | variables(instance, offline=bool(folder)),
        cache=CACHE,
        search_path=f"{venv}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        stop_timeout=options["shutdown_timeout"] + MARGIN,
    )


def _devices(instance: Instance) -> dict[str, str]:
    """Only its own GPUs, counted as nvidia-smi counts them; none at all without GPUs."""
    visible = ",".join(map(str, instance.gpus))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def _installed(venv: str, version: str) -> Ensure:
    """A fresh environment beside the old one, so that a running engine keeps its own."""
    python = f"{venv}/bin/python"
    return Ensure(
        f"vLLM {version} is installed in {venv}",
        test=f"{sh(python, '-m', 'pip', 'show', '-q', 'vllm')} && [ -x {sh(venv)}/bin/vllm ]",
        run=f"{sh('python3', '-m', 'venv', '--clear', venv)} && "
        + sh(python, "-m", "pip", "install", "--quiet", f"vllm=={version}"),
        timeout=3600,
        before=True,
    )
