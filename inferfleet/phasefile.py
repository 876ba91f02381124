"""A phase as `size` found it, as a file for an inventory: hosts are left to be filled in. Pure."""

from __future__ import annotations

import json
import re

from inferfleet.capacity import GIB, Size, carried

_TEXT = """\
# yaml-language-server: $schema=schema.json
# Made by `inferfleet size`: {gpus} x {gpu} in {hosts} {host},
# {ram} GiB of RAM and {disk} GiB of disk each.
# Copy it into your inventory and give the hosts `groups: [{name}]`{edge}.
groups:
{groups}
models:
  {name}:
    repository: {repository}
    quantization: {quantization}
    context_length: {context}
deployments:
  {name}:
    engine: vllm
    model: {name}
    hosts: [{name}]
    port: 8000
    gpus_per_instance: {tp}
    instances: {instances}
    api_key: !env INFERFLEET_ENGINE_KEY
    options:
      max_model_len: {context}
{options}phases:
  {name}:
    users: {users}
    why: Sized for {users} requests of {context} tokens at once; {carries} are expected to fit.
    hosts: [{where}]
    deployments: [{name}]
    roles:
      balancer:
        hosts: [{balancers}]
        api_keys:
          clients: !env INFERFLEET_CLIENT_KEY
"""


def text(size: Size, repository: str, users: int) -> str:
    """The file: its groups, the model, a packed deployment and the phase behind a balancer.

    On one host the balancer stands beside the engines, on several on hosts of its own group.
    """
    setup, single = size.setup, size.hosts == 1
    name = slug(repository)
    edge = name if single else f"{name}-edge"
    forced = setup.quantization not in ("", setup.model.native) and setup.model.native == "bf16"
    online = forced and setup.quantization == "fp8" and not repository.lower().endswith("fp8")
    return _TEXT.format(
        name=name,
        groups="\n".join(f"  {group}: {{}}" for group in dict.fromkeys((name, edge))),
        gpus=size.gpus,
        gpu=setup.gpu.name,
        hosts=size.hosts,
        host="host" if single else "hosts",
        ram=-(-size.ram // GIB),
        disk=-(-size.disk // GIB),
        edge="" if single else f", the balancers `groups: [{edge}]`",
        repository=json.dumps(repository),
        quantization=setup.quantization or setup.model.native,
        context=size.prediction.context,
        tp=setup.tensor_parallel,
        instances=size.instances,
        options="      quantization: fp8\n" if online else "",
        users=users,
        carries=size.instances * carried(size.prediction),
        where=", ".join(dict.fromkeys((name, edge))),
        balancers=edge,
    )


def slug(repository: str) -> str:
    """A name that groups, deployments and hosts' units may have, of a repository's."""
    short = repository.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9]+", "-", short).strip("-")[:40].strip("-") or "model"
