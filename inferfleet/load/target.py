"""What load goes to: a phase's own address with its certificate and a client's key, or any URL."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from inferfleet import gateways, reach
from inferfleet.errors import UsageError
from inferfleet.load.workload import Api
from inferfleet.model import Instance, Plan, Secret
from inferfleet.project import Project
from inferfleet.secrets import Secrets
from inferfleet.yamlbuild import did_you_mean


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint. `url` has no path of an API; `model` may be empty: the endpoint is asked.

    With `pinned` (PEM) the server must show that certificate; otherwise `ca` (a path), or the
    system's authorities, and `server_name`, if given, decide.
    """

    name: str
    url: str
    model: str = ""
    api: Api = "openai"
    user: str = ""  # whose key it is
    key: str = field(default="", repr=False)
    pinned: str = field(default="", repr=False)
    ca: str = ""
    server_name: str = ""

    @property
    def where(self) -> str:
        """Its name with its address, for a message."""
        return self.url if self.name == self.url else f"{self.name} ({self.url})"


def of_url(url: str, model: str, api: Api, key: str, ca: str) -> Target:
    """Any endpoint; `key` is a reference, such as `env:NAME`. Raises UsageError, SecretError."""
    base = reach.base(url)
    return Target(base, base, model, api, user=key, key=_resolved(key), ca=ca)


def _resolved(reference: str) -> str:
    if not reference:
        return ""
    kind, _, rest = reference.partition(":")
    if kind not in ("env", "file", "cmd") or not rest:
        raise UsageError("--key is env:NAME, file:PATH or cmd:COMMAND, never the key itself")
    return Secrets(Path.cwd()).resolve(Secret(kind, rest))  # type: ignore[arg-type]


def of_phase(project: Project, plan: Plan, model: str, user: str, ca: str) -> Target:
    """Where the phase's clients come in: its balancer, its gateway, or its only engine.

    Raises UsageError where that cannot be told, Error where it is not reached from here, and
    SecretError.
    """
    front = reach.front(plan, project.library)
    if front is None:
        reach.user(user, None, plan)
        found = {i.deployment.model.served_name: (r, i) for r, i in reach.engines(plan).values()}
        return _engine(project, plan.phase.name, *found[_chosen(plan, model, found)])
    if front.gateway:  # it takes other names for its models, too
        known = gateways.models(gateways.sources(front.gateway, plan))
        return _front(project, plan, front, "", model or _chosen(plan, "", known), user, ca)
    engines = {name: every[0] for name, (_, every) in plan.deployed().items()}
    served = {engines[name].deployment.model.served_name: name for name in front.paths}
    chosen = _chosen(plan, model, served)
    prefix = front.paths[served[chosen]].removesuffix("/v1")
    return _front(project, plan, front, prefix, chosen, user, ca)


def _chosen(plan: Plan, model: str, known: Collection[str]) -> str:
    """The model of that name, or the only one there is."""
    models = ", ".join(known)
    if not known:
        raise UsageError(f"phase {plan.phase.name} serves no model")
    if model and model not in known:
        meant = did_you_mean(model, known)
        raise UsageError(f"phase {plan.phase.name} has no model '{model}'{meant}; it has {models}")
    if not model and len(known) > 1:
        raise UsageError(f"which model? Say --model; phase {plan.phase.name} has {models}")
    return model or models


def _front(
    project: Project,
    plan: Plan,
    front: reach.Front,
    prefix: str,
    model: str,
    user: str,
    ca: str,
) -> Target:
    """The load goes to an address; the server's name is for its certificate alone."""
    reach.user(user, front.keys, plan)
    name = user or min(front.keys, default="")
    return Target(
        name=plan.phase.name,
        url=reach.origin(front, plan, named=False) + prefix,
        model=model,
        user=name,
        key=_text(project, front.keys[name]).strip() if name else "",
        pinned=_text(project, front.tls["certificate"]) if front.tls and not ca else "",
        ca=ca,
        server_name=front.server_name,
    )


def _engine(project: Project, phase: str, role: str, first: Instance) -> Target:
    key = first.deployment.api_key
    return Target(
        name=phase,
        url=f"http://{first.endpoint}",
        model=first.deployment.model.served_name,
        api="ollama" if role == "ollama" else "openai",
        user="the engine's key" if key else "",
        key=_text(project, key).strip() if key else "",
    )


def _text(project: Project, value: Secret | str) -> str:
    return project.secrets.resolve(value) if isinstance(value, Secret) else value
