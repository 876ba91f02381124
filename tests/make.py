"""Inventories for tests: written from text, and fleets of any size."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from inferfleet.errors import InventoryError
from inferfleet.inventory import load
from inferfleet.model import Bundle
from inferfleet.project import Project
from inferfleet.roles import Library

HOSTS_PER_BALANCER = 50


def write(folder: Path, **files: str) -> Path:
    """An inventory below `folder`, a file for each keyword; returns the inventory's folder."""
    inventory = folder / "inventory"
    for name, text in files.items():
        path = inventory / f"{name}.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return inventory


def project(folder: Path, **files: str) -> Project:
    """A project with the inventory that `write` makes."""
    return Project(write(folder, **files))


def bundle(folder: Path, **files: str) -> Bundle:
    """What the only host of the only phase, `p`, is sent, of the inventory that `write` makes."""
    made = project(folder, **files)
    plan = made.plan("p")
    (found,) = made.bundles(plan, plan.hosts)
    return found


def chat(engine: str, options: str = "", more: str = "") -> str:
    """A file with the deployment `chat` of the model `coder` on two GPUs of gpu-01, port 8000."""
    return f"""\
    deployments:
      chat:
        {{engine: {engine}, model: coder, hosts: [gpu-01], port: 8000, gpus_per_instance: 2, {more}
         options: {{{options}}}}}
"""


def text(bundle: Bundle, ending: str) -> str:
    """The content of the one file whose path ends so."""
    (found,) = [a for a in bundle.artefacts if a.path.endswith(ending)]
    return found.content.decode()


def service(bundle: Bundle) -> dict[str, Any]:
    """What the engine's compose file says of it."""
    found: dict[str, Any] = yaml.safe_load(text(bundle, "compose.yml"))["services"]["engine"]
    return found


def problems(inventory: Path) -> list[str]:
    """What is wrong, each `file:line:column: path: message` with the file's bare name."""
    try:
        load(inventory, Library(inventory.parent))
    except InventoryError as error:
        return [str(problem).removeprefix(_prefix(problem.file)) for problem in error.problems]
    return []


def _prefix(shown: str) -> str:
    return shown.removesuffix(Path(shown).name)


def fleet(folder: Path, count: int, *, cells: int | None = None) -> Path:
    """An inventory of `count` hosts: GPU servers, and a balancer in front of every fifty.

    The servers are split in cells, each a deployment and a phase of its own, as people split a
    fleet that large: no balancer can hold ten thousand engines.
    """
    each = range(cells or max(1, count // HOSTS_PER_BALANCER))
    hosts = [_host(number, len(each)) for number in range(count)]
    groups = "".join(f"  cell-{cell}: {{}}\n  edge-{cell}: {{}}\n" for cell in each)
    return write(
        folder,
        hosts=f"groups:\n  all: {{user: deploy, become: sudo}}\n{groups}hosts:\n{''.join(hosts)}",
        models=_MODELS,
        deployments="deployments:\n" + "".join(map(_deployment, each)),
        phases="phases:\n" + "".join(map(_phase, each)),
    )


_MODELS = """\
models:
  coder:
    repository: example/coder-awq
    revision: 8e8ed243bbe6f9a5aff549a0924562fc719b2b8a
    attention_heads: 40
"""


def _host(number: int, cells: int) -> str:
    """Of the ranges for examples, only that of IPv6 holds ten thousand addresses."""
    cell = number % cells
    edge = number < cells
    group = f"edge-{cell}" if edge else f"cell-{cell}"
    gpus = "" if edge else "    gpus: [{model: L40S, count: 4}]\n"
    return (
        f"  host-{number:05}:\n"
        f"    address: host-{number:05}.example.com\n"
        f"    private_address: 2001:db8::{number + 1:x}\n"
        f"    groups: [{group}]\n"
        f"{gpus}"
        f"    ram_gib: 512\n"
    )


def _deployment(cell: int) -> str:
    return f"""\
  coder-{cell}:
    engine: vllm
    model: coder
    hosts: [cell-{cell}]
    port: 8000
    gpus_per_instance: 2
    instances_per_host: 2
    api_key: !env ENGINE_KEY
    options: {{runtime: docker, max_model_len: 32768}}
"""


def _phase(cell: int) -> str:
    return f"""\
  cell-{cell}:
    users: 100
    why: A part of a large fleet.
    hosts: [cell-{cell}, edge-{cell}]
    deployments: [coder-{cell}]
    roles:
      balancer:
        hosts: [edge-{cell}]
        port: 8443
        api_keys: {{team: !env TEAM_KEY}}
"""
