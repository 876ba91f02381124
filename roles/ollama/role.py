"""Ollama, native: the release under /usr/local, a hardened unit, the model pulled.

Variables are those of ollama's envconfig/config.go; OLLAMA_GPU and OLLAMA_NUM_GPU do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator

from inferfleet.builders import VERIFY_UNIT, answers, package, running, system_user
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Step, sh

KIND = "engine"
ONE_PER_HOST = True
BINARY = "/usr/local/bin/ollama"
HOME = "/var/lib/ollama"

_INSTALL = """\
set -e
case $(uname -m) in
  x86_64) machine=amd64 ;;
  aarch64) machine=arm64 ;;
  *) echo "Ollama has no archive for $(uname -m)" >&2; exit 1 ;;
esac
archive=$(mktemp --suffix=.tar.zst)
trap 'rm -f "$archive"' EXIT
curl --fail --silent --show-error --location --output "$archive" \\
  {source}/ollama-linux-$machine.tar.zst
{checked}rm -rf /usr/local/lib/ollama
tar --zstd -xf "$archive" -C /usr/local
"""


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """The program, one unit, and the model of each deployment."""
    for instance in step.instances:
        options = instance.options
        yield package("curl", "curl")
        yield package("zstd", "zstd")
        yield system_user("ollama")
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
    for instance in step.instances:
        yield running(instance.unit)
        yield answers(instance.unit, instance.listen, instance.port, "/api/version", 60)
        yield _pulled(instance)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """What Ollama cannot do: several processes on one host, and keys of its own."""
    for instance in step.instances:
        deployment = instance.deployment
        if deployment.instances_per_host > 1 and instance.index == 0:
            said = "one Ollama serves all GPUs of a host: leave instances_per_host at 1"
            yield f"{deployment.name}:instances_per_host", said
        if deployment.api_key:
            said = "Ollama checks no keys: put a balancer in front and give it the keys"
            yield f"{deployment.name}:api_key", said
        if deployment.extra_args:
            said = "`ollama serve` takes no arguments: use the engine's options"
            yield f"{deployment.name}:extra_args", said


def variables(instance: Instance) -> dict[str, str]:
    """The server's environment, sorted by name; private: nothing is proxied to ollama.com."""
    options = instance.options
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, instance.gpus)) or "-1",
        "HOME": HOME,
        "OLLAMA_CONTEXT_LENGTH": str(options["context_length"]),
        "OLLAMA_FLASH_ATTENTION": "1" if options["flash_attention"] else "0",
        "OLLAMA_HOST": instance.endpoint,
        "OLLAMA_KEEP_ALIVE": options["keep_alive"],
        "OLLAMA_KV_CACHE_TYPE": options["kv_cache_type"],
        "OLLAMA_MODELS": f"{HOME}/models",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NUM_PARALLEL": str(options["num_parallel"]),
    }


def _installed(version: str, download: str, sha256: str) -> Ensure:
    checked = f'echo "{sha256}  $archive" | sha256sum --check --status\n' if sha256 else ""
    return Ensure(
        f"Ollama {version} is installed",
        test=f"{BINARY} --version 2>/dev/null | grep -qwF {sh(version)}",
        run=_INSTALL.format(source=sh(f"{download}/v{version}"), checked=checked),
        timeout=1800,
        before=True,
    )


def _pulled(instance: Instance) -> Ensure:
    """The model, under the name clients ask for."""
    model = instance.deployment.model
    client = f"OLLAMA_HOST={sh(instance.endpoint)} {BINARY}"
    run = f"{client} pull {sh(model.repository)}"
    if model.served_name != model.repository:
        run += f" && {client} cp {sh(model.repository)} {sh(model.served_name)}"
    return Ensure(
        f"model {model.served_name} is pulled",
        test=f"{client} show {sh(model.served_name)} >/dev/null 2>&1",
        run=run,
        timeout=instance.options["startup_timeout"],
    )
