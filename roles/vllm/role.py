"""vLLM: one instance per group of GPUs: compose, podman or native, behind a systemd unit.

Command line and environment: vLLM's own parser of the pinned version reads them in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from inferfleet.builders import (
    VERIFY_COMPOSE,
    VERIFY_UNIT,
    answers,
    image_present,
    package,
    running,
    system_user,
)
from inferfleet.flags import has, lint, lint_own, lint_variables
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Secret, Step, sh
from inferfleet.modelpath import CachedModel, cached

KIND = "engine"
CACHE = "/var/cache/inferfleet"
CONTAINER_PORT = 8000
MARGIN = 15  # seconds between the engine's own stop timeout and systemd's or Docker's

IN_IMAGE = "/vllm-workspace/"  # what comes with the image, such as its chat templates

_VALUES = {  # option -> flag with its value, in the order of the command line
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_queued_reqs": "--max-num-queued-reqs",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "dtype": "--dtype",
    "kv_cache_dtype": "--kv-cache-dtype",
    "quantization": "--quantization",
    "reasoning_parser": "--reasoning-parser",
    "chat_template": "--chat-template",
    "max_lora_rank": "--max-lora-rank",
}
_TOGGLES = {  # option -> flag that also has a --no- form; left out, the engine decides
    "enable_prefix_caching": "enable-prefix-caching",
    "enable_chunked_prefill": "enable-chunked-prefill",
}
_SWITCHES = {  # option -> flag, when it is on
    "expert_parallel": "--enable-expert-parallel",
    "trust_remote_code": "--trust-remote-code",
    "enforce_eager": "--enforce-eager",
    "sleep_mode": "--enable-sleep-mode",
}


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Key file, compose file or virtual environment, and unit of each instance."""
    for instance in step.instances:
        yield _environment(instance, render)
        build = _RUNTIMES[instance.options["runtime"]]
        yield from build(instance, cached(instance, plan), render)
    for instance in step.instances:
        timeout = instance.options["startup_timeout"]
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/health", timeout)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What the engine of this release would refuse, or what would leave it open to others."""
    for instance in step.instances:
        for option, message in (*_shape(instance), *_exposure(instance), *_flags(instance)):
            yield f"{instance.deployment.name}:{option}", message


def warnings(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What works, and not as one would think."""
    for instance in step.instances:
        name, version = instance.deployment.name, instance.options["version"]
        if not has("vllm", version, "--shutdown-timeout"):
            said = f"vLLM {version} cannot drain: stopping it cuts running requests"
            yield f"{name}:shutdown_timeout", said
        for finding in lint("vllm", version, instance.deployment.extra_args):
            if not finding.sure:
                yield f"{name}:extra_args", finding.message


def _shape(instance: Instance) -> Iterator[tuple[str, str]]:
    options, gpus = instance.options, instance.deployment.gpus_per_instance
    product = tensor_parallel(instance) * options["pipeline_parallel"] * options["data_parallel"]
    if product != max(1, gpus):
        yield (
            "tensor_parallel",
            f"tensor x pipeline x data parallelism is {product}, but gpus_per_instance is {gpus}",
        )


def _exposure(instance: Instance) -> Iterator[tuple[str, str]]:
    if instance.listen == "127.0.0.1":
        return
    if instance.deployment.api_key is None:
        yield "api_key", "listens for other hosts without a key: add `api_key: !env NAME`"
    if instance.options["sleep_mode"]:
        yield (
            "sleep_mode",
            "opens developer endpoints that ask for no key, and this engine listens for other "
            "hosts: only where balancer and engine share a host",
        )


def _flags(instance: Instance) -> Iterator[tuple[str, str]]:
    """Options and arguments that the release does not know."""
    version = instance.options["version"]
    for option, line in line_of(instance):
        for finding in lint_own("vllm", version, line):
            yield option, finding.message
    for finding in lint("vllm", version, instance.deployment.extra_args):
        if finding.sure:
            yield "extra_args", finding.message
    for finding in lint_variables("vllm", version, instance.options["environment"]):
        if finding.sure:
            yield "environment", finding.message


def tensor_parallel(instance: Instance) -> int:
    """GPUs that share each layer; what is left of the instance's GPUs by default."""
    options, gpus = instance.options, max(1, instance.deployment.gpus_per_instance)
    given: int | None = options.get("tensor_parallel")
    return given or max(1, gpus // (options["pipeline_parallel"] * options["data_parallel"]))


def arguments(instance: Instance, host: str, port: int, folder: str = "") -> list[str]:
    """What follows `vllm serve`: the model first, everything explicit that has to match.

    `folder` is where the model lies when it is cached; else the engine fetches it itself.
    """
    model = instance.deployment.model
    line = [folder or model.repository, "--host", host, "--port", str(port)]
    line += ["--served-model-name", model.served_name]
    if model.revision and not line[0].startswith("/"):
        line += ["--revision", model.revision]
    line += [argument for _, part in line_of(instance) for argument in part]
    return [*line, *instance.deployment.extra_args]


def line_of(instance: Instance) -> Iterator[tuple[str, list[str]]]:
    """What each option adds to the command line: (option, arguments)."""
    options = instance.options
    yield "tensor_parallel", ["--tensor-parallel-size", str(tensor_parallel(instance))]
    for option in ("pipeline_parallel", "data_parallel"):
        if options[option] > 1:
            yield option, [f"--{option.replace('_', '-')}-size", str(options[option])]
    for option, flag in _VALUES.items():
        if option in options:
            yield option, [flag, str(options[option])]
    for option, name in _TOGGLES.items():
        if option in options:
            yield option, [f"--{name}" if options[option] else f"--no-{name}"]
    if parser := options.get("tool_call_parser"):
        yield "tool_call_parser", ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    if adapters := options["lora_adapters"]:
        modules = [f"{name}={path}" for name, path in sorted(adapters.items())]
        yield "lora_adapters", ["--enable-lora", "--lora-modules", *modules]
    if given := options.get("speculative_config"):
        yield "speculative_config", ["--speculative-config", json.dumps(given, sort_keys=True)]
    for option, flag in _SWITCHES.items():
        if options[option]:
            yield option, [flag]
    if has("vllm", options["version"], "--shutdown-timeout"):
        yield "shutdown_timeout", ["--shutdown-timeout", str(options["shutdown_timeout"])]


def secrets(instance: Instance) -> list[tuple[str, Secret]]:
    """Variables that hold secrets: never on a command line, only in the 0600 key file."""
    token = instance.options.get("hf_token")
    found = [("VLLM_API_KEY", instance.deployment.api_key), ("HF_TOKEN", token)]
    return [(name, secret) for name, secret in found if secret is not None]


def variables(instance: Instance, *, offline: bool = False) -> dict[str, str]:
    """The engine's other environment variables, sorted by name; `offline` asks no hub."""
    options = instance.options
    own = {} if options["usage_stats"] else {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    own |= {"HF_HUB_OFFLINE": "1"} if offline or options["offline"] else {}
    own |= {"VLLM_SERVER_DEV_MODE": "1"} if options["sleep_mode"] else {}
    return dict(sorted((own | dict(options["environment"])).items()))


def _environment(instance: Instance, render: Render) -> Artefact:
    return render(
        f"/etc/inferfleet/{instance.name}/engine.env",
        "engine.env.j2",
        mode=0o600,
        restarts=(instance.unit,),
        secrets=secrets(instance),
    )


def _container(instance: Instance, model_cache: CachedModel | None) -> dict[str, Any]:
    """What compose files and podman's units both are made of."""
    options, model = instance.options, instance.deployment.model
    folder = model_cache.folder if model_cache else ""
    read = [folder or model.repository, options.get("chat_template", "")]
    read += options["lora_adapters"].values()
    return {
        "image": options.get("image", f"docker.io/vllm/vllm-openai:v{options['version']}"),
        "arguments": arguments(instance, "0.0.0.0", CONTAINER_PORT, folder),  # noqa: S104 - inside
        "variables": variables(instance, offline=bool(folder)),
        "published": f"{instance.endpoint}:{CONTAINER_PORT}",
        "gpus": instance.devices,
        "cache": CACHE,
        "mounted": [p for p in dict.fromkeys(read) if p.startswith("/") and IN_IMAGE not in p],
        "ipc": options["ipc"],
        "shm_size": options["shm_size"],
        "stop_timeout": options["shutdown_timeout"] + MARGIN,
        "model_cache": model_cache,
    }


def _docker(
    instance: Instance, model_cache: CachedModel | None, render: Render
) -> Iterator[Artefact | Ensure]:
    options, parts = instance.options, _container(instance, model_cache)
    parts["image"] = parts["image"].removeprefix("docker.io/")  # how Docker itself calls it
    compose = f"/etc/inferfleet/{instance.name}/compose.yml"
    yield image_present(parts["image"])
    yield render(
        compose,
        "compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(instance.unit,),
        project=f"inferfleet-{instance.name}",
        cdi=options["gpu_access"] == "cdi",
        start_period=options["startup_timeout"],
        **parts,
    )
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "vllm-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=_description(instance, " in Docker"),
        compose=compose,
        **parts,
    )


def _podman(
    instance: Instance, model_cache: CachedModel | None, render: Render
) -> Iterator[Artefact | Ensure]:
    parts = _container(instance, model_cache)
    yield package("podman", "podman")
    yield image_present(parts["image"], "podman")
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "vllm-podman.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=_description(instance, " in Podman"),
        container=f"inferfleet-{instance.name}",
        environment=f"/etc/inferfleet/{instance.name}/engine.env",
        command=_podman_run(instance, parts),
        **parts,
    )


def _podman_run(instance: Instance, parts: dict[str, Any]) -> list[str]:
    """The command of podman's unit; keys come from systemd's environment, by name alone."""
    line = ["/usr/bin/podman", "run", "--rm", "--replace", "--name", f"inferfleet-{instance.name}"]
    line += ["--cgroups=split", "--log-driver=passthrough", "--security-opt=no-new-privileges"]
    line += [f"--device=nvidia.com/gpu={gpu}" for gpu in parts["gpus"]]
    line += ["--ipc=host"] if parts["ipc"] == "host" else [f"--shm-size={parts['shm_size']}"]
    line += [f"--env={name}" for name, _ in secrets(instance)]
    line += [f"--env={name}={value}" for name, value in parts["variables"].items()]
    line += [f"--volume={CACHE}/{one}:/root/.cache/{one}" for one in ("huggingface", "vllm")]
    line += [f"--volume={path}:{path}:ro" for path in parts["mounted"]]
    line += [f"--publish={parts['published']}", "--entrypoint=vllm", parts["image"], "serve"]
    return [*line, *parts["arguments"]]


def _description(instance: Instance, where: str = "") -> str:
    return f"vLLM {instance.name} ({instance.deployment.model.served_name}){where}"


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
        description=_description(instance),
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


_RUNTIMES = {"docker": _docker, "podman": _podman, "native": _native}
