"""Where an engine finds its model when the phase has a model cache, and what it waits for. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from inferfleet.model import Instance, Model, Plan, Step

ROLE = "model_cache"
PROGRAM = "/opt/inferfleet/model_cache/models.py"
FETCH_UNIT = "inferfleet-models.service"
STAGE_UNIT = "inferfleet-staging.service"
OWN_STORES = ("ollama",)  # engines that keep models in a store of their own
# as long as ten starts of a unit last longer than its start limit's 600 s: it never gives up
WAIT = 60  # seconds

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache: its folder on the host, and the unit that makes it be there.

    `local` is False where the folder lies on a mounted share. There RequiresMountsFor= would
    be wrong: an engine whose mount failed once at boot would never be started again.
    """

    folder: str
    unit: str
    local: bool

    @property
    def check(self) -> tuple[str, ...]:
        """The command that fails unless the model is complete, for ExecStartPre=."""
        return ("/usr/bin/python3", "-I", PROGRAM, "check", "--wait", str(WAIT), self.folder)


def cached(instance: Instance, plan: Plan) -> CachedModel | None:
    """Where the instance's model is cached; None when its host has no cache, or no use for it."""
    step = step_of(plan, instance.host.name)
    if step is None or not wants(instance):
        return None
    staging, name = step.settings.get("staging"), folder_name(instance.deployment.model)
    if staging:
        return CachedModel(f"{staging}/{name}", STAGE_UNIT, local=True)
    path = step.settings["path"]
    if mounts(step):
        return CachedModel(f"{path}/{name}", f"{escaped(path)}.automount", local=False)
    return CachedModel(f"{path}/{name}", FETCH_UNIT, local=True)


def step_of(plan: Plan, host: str) -> Step | None:
    """The host's step of the model cache."""
    return next((step for step in plan.steps.get(host, ()) if step.role == ROLE), None)


def wants(instance: Instance) -> bool:
    """Whether an engine's model comes from a Hugging Face repository."""
    deployment = instance.deployment
    is_repository = _REPOSITORY.fullmatch(deployment.model.repository) is not None
    return is_repository and deployment.engine not in OWN_STORES


def models(instances: Iterable[Instance]) -> tuple[Model, ...]:
    """The models to be cached for these instances, each once, sorted by folder."""
    found = {folder_name(i.deployment.model): i.deployment.model for i in instances if wants(i)}
    return tuple(found[name] for name in sorted(found))


def folder_name(model: Model) -> str:
    """NAME@REVISION: two revisions of a model never share a folder."""
    return f"{model.name}@{model.revision}"


def fetches(step: Step) -> bool:
    """Whether the step's host fetches from the source itself."""
    return bool(step.settings.get("writer", step.host.name) == step.host.name)


def mounts(step: Step) -> bool:
    """Whether the step's host mounts a share at the cache's path."""
    return not fetches(step) or "share" in step.settings


def escaped(path: str) -> str:
    """A path as a unit's name begins with it (systemd-escape --path)."""
    text = path.strip("/").replace("/", "\0")
    odd = re.sub(r"[^A-Za-z0-9:_.\0]|^\.", lambda c: f"\\x{ord(c[0]):02x}", text)
    return odd.replace("\0", "-")
