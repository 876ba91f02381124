"""Ollama: native under a hardened unit, or its image under compose; then its model, on its GPUs.

Variables are those of ollama's envconfig/config.go; OLLAMA_GPU and OLLAMA_NUM_GPU do not exist.
"""

from __future__ import annotations

import hashlib
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
from inferfleet.flags import lint_variables
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Step, sh

KIND = "engine"
BINARY = "/usr/local/bin/ollama"
HOME = "/var/lib/ollama"
PROGRAM = "/opt/inferfleet/ollama/models.py"
STATE = "/var/lib/inferfleet"  # what the applier remembers
DRIVER = "/proc/driver/nvidia/version"
CONTAINER_PORT = 11434
STOP_TIMEOUT = 30  # seconds; Ollama cuts running requests, whatever it is given

_INSTALL = """\
set -e
case $(uname -m) in
  x86_64) machine=amd64 ;;
  aarch64) machine=arm64 ;;
  *) echo "Ollama has no archive for $(uname -m)" >&2; exit 1 ;;
esac
archive=$(mktemp --suffix=.tar.zst)
trap 'rm -f "$archive"' EXIT
curl --fail --location --output "$archive" \\
  {source}/ollama-linux-$machine.tar.zst
{checked}rm -rf /usr/local/lib/ollama
tar --zstd -xf "$archive" -C /usr/local
"""

_ON_GPU = """\
set -e
{prove}
echo "{proven}" > {stamp}
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The program or the image, one unit, and the model of each deployment."""
    yield render.copy(PROGRAM, "models.py", mode=0o755)
    for instance in step.instances:
        yield from (_docker if _in_docker(instance) else _native)(instance, render)
        yield _model(instance)
    for instance in step.instances:
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/api/version", 60)
        yield _made(instance)
        if instance.gpus and instance.options["min_gpu_share"]:
            yield _on_gpu(instance)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What Ollama cannot do, and what it would not read."""
    for instance in step.instances:
        for option, message in (*_limits(instance), *_sources(instance)):
            yield f"{instance.deployment.name}:{option}", message
        options = instance.options
        for finding in lint_variables("ollama", options["version"], options["environment"]):
            if finding.sure:
                yield f"{instance.deployment.name}:environment", finding.message


def _limits(instance: Instance) -> Iterator[tuple[str, str]]:
    """Several processes on one host, keys of its own, arguments."""
    deployment = instance.deployment
    if deployment.instances_per_host > 1 and instance.index == 0:
        said = "one Ollama serves all GPUs of a host: leave instances_per_host at 1"
        yield "instances_per_host", said
    if deployment.api_key:
        yield "api_key", "Ollama checks no keys: put a balancer in front and give it the keys"
    if deployment.extra_args:
        yield "extra_args", "`ollama serve` takes no arguments: use the engine's options"
    if instance.options["kv_cache_type"] != "f16" and not instance.options["flash_attention"]:
        yield "kv_cache_type", "Ollama ignores it without flash_attention: true"


def _sources(instance: Instance) -> Iterator[tuple[str, str]]:
    """What a model is made from."""
    model, changed = instance.deployment.model, instance.options["modelfile"]
    if model.repository.startswith("/") and not model.repository.endswith(".gguf"):
        yield "model", f"{model.repository} is no .gguf file, all that Ollama takes from a path"
    if changed and model.served_name == model.repository:
        yield (
            "modelfile",
            f"would make a model named as the one it is made from, {model.repository}: "
            "give the model another served_name",
        )


def spec(instance: Instance) -> dict[str, Any]:
    """What models.py makes the model from; a Modelfile's FROM, PARAMETER, SYSTEM and TEMPLATE."""
    model = instance.deployment.model
    return {"name": model.served_name, "from": model.repository, **instance.options["modelfile"]}


def variables(instance: Instance) -> dict[str, str]:
    """The server's environment, sorted by name; private: nothing is proxied to ollama.com."""
    options = instance.options
    inside = _in_docker(instance)
    own = {
        "OLLAMA_CONTEXT_LENGTH": str(options["context_length"]),
        "OLLAMA_FLASH_ATTENTION": "1" if options["flash_attention"] else "0",
        "OLLAMA_HOST": f"0.0.0.0:{CONTAINER_PORT}" if inside else instance.endpoint,
        "OLLAMA_KEEP_ALIVE": options["keep_alive"],
        "OLLAMA_KV_CACHE_TYPE": options["kv_cache_type"],
        "OLLAMA_NUM_PARALLEL": str(options["num_parallel"]),
    }
    own |= {} if options["cloud"] else {"OLLAMA_NO_CLOUD": "1"}
    own |= {"OLLAMA_SCHED_SPREAD": "1"} if options["spread"] else {}
    for option in ("max_loaded_models", "max_queue"):
        if option in options:
            own[f"OLLAMA_{option.upper()}"] = str(options[option])
    own |= _devices(instance)
    own |= {} if inside else {"HOME": HOME, "OLLAMA_MODELS": f"{HOME}/models"}
    return dict(sorted((own | dict(options["environment"])).items()))


def _devices(instance: Instance) -> dict[str, str]:
    """Only its own GPUs, counted as nvidia-smi counts them; a container sees no others anyway."""
    if not instance.gpus:
        return {"CUDA_VISIBLE_DEVICES": "-1"}
    if _in_docker(instance):
        return {}
    visible = ",".join(map(str, instance.gpus))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def _in_docker(instance: Instance) -> bool:
    return bool(instance.options["runtime"] == "docker")


def _native(instance: Instance, render: Render) -> Iterator[Artefact | Ensure]:
    options = instance.options
    yield package("curl", "curl")
    yield package("zstd", "zstd")
    yield system_user("ollama")
    yield Ensure(
        "groups video and render exist",  # not so on hosts without udev, and the unit names both
        test="getent group video render >/dev/null",
        run="groupadd --system --force video && groupadd --system --force render",
        before=True,
    )
    yield _installed(options["version"], options["download"], options.get("sha256", ""))
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "ollama.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"Ollama {instance.name}",
        binary=BINARY,
        variables=variables(instance),
    )


def _docker(instance: Instance, render: Render) -> Iterator[Artefact | Ensure]:
    options, compose = instance.options, f"/etc/inferfleet/{instance.name}/compose.yml"
    image = options.get("image", f"ollama/ollama:{options['version']}")
    yield image_present(image)
    yield render(
        compose,
        "ollama-compose.yml.j2",
        validate=VERIFY_COMPOSE,
        restarts=(instance.unit,),
        project=f"inferfleet-{instance.name}",
        image=image,
        arguments=["serve"],
        variables=variables(instance),
        published=f"{instance.endpoint}:{CONTAINER_PORT}",
        gpus=instance.devices,
        cdi=options["gpu_access"] == "cdi",
        home=HOME,
        stop_timeout=STOP_TIMEOUT,
    )
    yield render(
        f"/etc/systemd/system/{instance.unit}",
        "ollama-docker.service.j2",
        validate=VERIFY_UNIT,
        restarts=(instance.unit,),
        description=f"Ollama {instance.name} in Docker",
        compose=compose,
        model_cache=None,
        stop_timeout=STOP_TIMEOUT,
    )


def _installed(version: str, download: str, sha256: str) -> Ensure:
    checked = f'echo "{sha256}  $archive" | sha256sum --check --status\n' if sha256 else ""
    return Ensure(
        f"Ollama {version} is installed",
        test=f"{BINARY} --version 2>/dev/null | grep -qwF {sh(version)}",
        run=_INSTALL.format(source=sh(f"{download}/v{version}"), checked=checked),
        timeout=1800,
        before=True,
    )


def _spec_path(instance: Instance) -> str:
    return f"/etc/inferfleet/{instance.name}/model.json"


def _model(instance: Instance) -> Artefact:
    text = json.dumps(spec(instance), indent=1, sort_keys=True, ensure_ascii=False)
    return Artefact(_spec_path(instance), f"{text}\n".encode())


def _asking(command: str, instance: Instance, *words: str) -> str:
    return sh("python3", "-I", PROGRAM, command, f"http://{instance.endpoint}", *words)


def _made(instance: Instance) -> Ensure:
    """The model, under the name clients ask for."""
    return Ensure(
        f"model {instance.deployment.model.served_name} is there as wanted",
        test=_asking("has", instance, _spec_path(instance)) + " 2>/dev/null",
        run=_asking("make", instance, _spec_path(instance)),
        timeout=instance.options["startup_timeout"],
    )


def _on_gpu(instance: Instance) -> Ensure:
    """Without its GPUs, Ollama falls back to the CPU and says nothing.

    Proven once for what decides it, the configuration and the driver; a restart or a reboot changes
    neither. A model that lies on the CPU now is seen whenever somebody looks.
    """
    name, share = instance.deployment.model.served_name, str(instance.options["min_gpu_share"])
    stamp = sh(f"{STATE}/{instance.name}.on-gpu")
    proven = f"{_decisive(instance)} $(cksum 2>/dev/null <{DRIVER})"
    still = _asking("still", instance, name, share)
    return Ensure(
        f"model {name} sits on its GPUs",
        test=f'[ "$(cat {stamp} 2>/dev/null)" = "{proven}" ] && {still} >/dev/null 2>&1',
        run=_ON_GPU.format(
            prove=_asking("on-gpu", instance, name, share), proven=proven, stamp=stamp
        ),
        timeout=900,
    )


def _decisive(instance: Instance) -> str:
    """A digest of what decides whether the model finds room on its GPUs."""
    options = instance.options
    own = [options.get(key) for key in ("min_gpu_share", "version", "image", "runtime")]
    whole = [*own, spec(instance), variables(instance), instance.devices]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]
