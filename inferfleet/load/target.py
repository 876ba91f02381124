"""What load goes to: a phase's own address with its certificate and a client's key, or any URL."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inferfleet.errors import UsageError
from inferfleet.load.workload import Api
from inferfleet.model import Instance, Plan, Secret, Step
from inferfleet.project import Project
from inferfleet.secrets import Secrets
from inferfleet.yamlbuild import did_you_mean

_FRONTS = ("balancer", "gateway")  # roles that clients come to, the outermost first


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
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url is http://HOST[:PORT] or https://HOST[:PORT], not '{url}'")
    if parts.username or parts.password:
        raise UsageError("a URL with a password ends up in logs: use --key env:NAME")
    base = url.rstrip("/").removesuffix("/v1")
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

    Raises UsageError where that cannot be told or reached from here, and SecretError.
    """
    fronts = [step for role in _FRONTS for step in _steps(plan, role)]
    gateways = _steps(plan, "gateway")
    if gateways:  # it knows every model, and takes other names for them, too
        name = model or _served(plan, "")[0].deployment.model.served_name
        return _front(project, plan, fronts[0], "", name, user, ca)
    instances = _served(plan, model)
    first = instances[0].deployment
    if fronts:
        prefix = _prefix(plan, fronts[0], first.name)
        return _front(project, plan, fronts[0], prefix, first.model.served_name, user, ca)
    return _engine(project, plan, instances[0], user)


def _steps(plan: Plan, role: str) -> list[Step]:
    return [step for steps in plan.steps.values() for step in steps if step.role == role]


def _served(plan: Plan, model: str) -> list[Instance]:
    """The instances of the phase that serve the model, or all where there is but one model."""
    found: dict[str, list[Instance]] = {}
    for instance in plan.instances():
        found.setdefault(instance.deployment.model.served_name, []).append(instance)
    models = ", ".join(found)
    if not found:
        raise UsageError(f"phase {plan.phase.name} serves no model")
    if model and model not in found:
        meant = did_you_mean(model, found)
        raise UsageError(f"phase {plan.phase.name} has no model '{model}'{meant}; it has {models}")
    if not model and len(found) > 1:
        raise UsageError(f"which model? Say --model; phase {plan.phase.name} has {models}")
    return found[model or models]


def _front(
    project: Project, plan: Plan, step: Step, prefix: str, model: str, user: str, ca: str
) -> Target:
    tls, own = step.settings.get("tls"), step.settings.get("server_name", "_")
    address = f"{_bracketed(step.host.address)}:{step.settings['port']}"
    name, key = _key(_users(plan), user, plan.phase.name)
    pinned = _text(project, tls["certificate"]) if tls and not ca else ""
    return Target(
        name=plan.phase.name,
        url=f"{'https' if tls else 'http'}://{address}{prefix}",
        model=model,
        user=name,
        key=_text(project, key).strip() if key else "",
        pinned=pinned,
        ca=ca,
        server_name="" if own == "_" else own,
    )


def _prefix(plan: Plan, step: Step, deployment: str) -> str:
    """nginx cannot see the model: of several deployments, each has a path of its own."""
    every = {instance.deployment.name for instance in plan.instances()}
    served = every & set(step.settings.get("deployments", every))
    return "" if len(served) == 1 else f"/{deployment}"


def _users(plan: Plan) -> dict[str, Any]:
    """Clients' keys by name; a gateway holds them where there is one, some with limits."""
    found: dict[str, Any] = {}
    for step in _steps(plan, "gateway") or _steps(plan, "balancer"):
        found |= step.settings.get("api_keys") or {}
    return {name: e["key"] if isinstance(e, dict) else e for name, e in found.items()}


def _key(users: dict[str, Any], user: str, phase: str) -> tuple[str, Any]:
    """The user's key, or the first one's. Raises UsageError for one who is not there."""
    if user and user not in users:
        known = ", ".join(sorted(users)) or "none"
        meant = did_you_mean(user, users)
        raise UsageError(f"phase {phase} has no user '{user}'{meant}; it has {known}")
    name = user or min(users, default="")
    return name, users.get(name)


def _engine(project: Project, plan: Plan, first: Instance, user: str) -> Target:
    here, loopback = first.host.connection == "local", first.listen in ("127.0.0.1", "::1")
    if loopback and not here:
        raise UsageError(
            f"{first.name} listens on {first.host.name}'s loopback only: "
            f"ssh -L {first.port}:127.0.0.1:{first.port} {first.host.name}, "
            f"then --url http://127.0.0.1:{first.port}"
        )
    if user:
        raise UsageError(f"phase {plan.phase.name} has no users: its engines are asked directly")
    roles = {i.name: s.role for host in plan.steps.values() for s in host for i in s.instances}
    key = first.deployment.api_key
    return Target(
        name=plan.phase.name,
        url=f"http://{first.endpoint}",
        model=first.deployment.model.served_name,
        api="ollama" if roles[first.name] == "ollama" else "openai",
        user="the engine's key" if key else "",
        key=_text(project, key).strip() if key else "",
    )


def _text(project: Project, value: Secret | str) -> str:
    return project.secrets.resolve(value) if isinstance(value, Secret) else value


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
