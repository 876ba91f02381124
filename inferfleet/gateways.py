"""What the gateways of a plan are told: where they listen, and their configuration. Pure.

Pools come from deployments and external providers, models from the names these serve; what the
inventory does not say, the gateway decides (`inferfleet.gateway.config` has the meaning of all).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inferfleet.abilities import Abilities, abilities, common
from inferfleet.model import Deployment, Instance, Plan, Secret, Step, endpoint

ROLE = "gateway"
FOLDER = "/etc/inferfleet/gateway"
STATE = "/var/lib/inferfleet-gateway"
ENGINES = {"llama": "ollama", "vllm": "vllm", "tgi": "tgi"}  # what `backend` says -> engine
_SPEAKS = {"ollama": "ollama", "tgi": "tgi", "vllm": "vllm", "simulator": "vllm"}
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)[bB](?![A-Za-z0-9])")
_COPIED = ("drain_timeout", "max_body_mib", "public_models", "queue", "timeouts", "health")


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway of a plan: where clients or balancers reach it, and where it is scraped."""

    host: str
    public: str
    private: tuple[str, ...]  # one address for each worker
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model can come from: a deployment, or a model of an external provider."""

    name: str  # of the pool
    said: str  # what weights call it: the deployment's or provider's name
    model: str  # the name clients use
    weight: int
    pool: Mapping[str, Any]
    deployment: Deployment | None = None
    can: Abilities | None = None  # None: a provider's, which only the settings know


def gateways(plan: Plan) -> list[Gateway]:
    """Every gateway of the plan, in host order."""
    steps = (step for host in plan.hosts for step in plan.steps.get(host.name, ()))
    return [gateway(step, plan) for step in steps if step.role == ROLE]


def gateway(step: Step, plan: Plan) -> Gateway:
    """Where the gateway of a step listens: on loopback where only its own host asks it."""
    settings, host = step.settings, step.host
    public = _listens(step, plan, "balancer")
    if settings["listen"] == "public":
        public = "0.0.0.0"  # noqa: S104 - on request
    private = _listens(step, plan, "monitoring")
    ports = range(settings["private_port"], settings["private_port"] + settings["workers"])
    return Gateway(
        host.name,
        endpoint(public, settings["port"]),
        tuple(endpoint(private, port) for port in ports),
        settings,
    )


def _listens(step: Step, plan: Plan, asker: str) -> str:
    askers = {host for p in plan.phase.placements if p.role == asker for host in p.hosts}
    return "127.0.0.1" if askers <= {step.host.name} else step.host.private_address


def config(step: Step, plan: Plan) -> dict[str, Any]:
    """The content of config.json."""
    settings, own = step.settings, gateway(step, plan)
    found = sources(step, plan)
    made: dict[str, Any] = {
        "listen": own.public,
        "private": own.private[0],
        "workers": settings["workers"],
        "keys": f"{FOLDER}/keys.json",
        "state": STATE,
        "log": "-",
        **{key: settings[key] for key in _COPIED},
        "pools": {source.name: dict(source.pool) for source in found},
        "models": {name: _model(name, settings, found) for name in models(found)},
    }
    if "tracing" in settings:
        made["tracing"] = dict(settings["tracing"])
    return made


def models(found: list[Source]) -> list[str]:
    """The names clients use, in the phase's order."""
    return list(dict.fromkeys(source.model for source in found))


def canonical(settings: Mapping[str, Any]) -> dict[str, str]:
    """Alias -> model."""
    every = settings["models"].items()
    return {alias: name for name, own in every for alias in own.get("aliases", ())}


def sources(step: Step, plan: Plan) -> list[Source]:
    """All pools: those of deployments first, then those of providers."""
    names = canonical(step.settings)
    deployed = list(_deployed(step, plan, names))
    served = {source.model for source in deployed}
    return [*deployed, *_provided(step, names, served)]


def _deployed(step: Step, plan: Plan, names: Mapping[str, str]) -> Iterator[Source]:
    for name, (role, instances) in plan.deployed().items():
        deployment = instances[0].deployment
        served = deployment.model.served_name
        pool = {
            "backend": _SPEAKS.get(role, "openai"),
            "model": served,
            "max_outstanding": step.settings["max_outstanding"],
            **({"key_file": key_file("engine", name)} if deployment.api_key else {}),
            "instances": [_instance(instance) for instance in instances],
        }
        model, can = names.get(served, served), abilities(role, instances)
        yield Source(name, name, model, len(instances), pool, deployment, can)


def _instance(instance: Instance) -> dict[str, str]:
    name = f"{instance.name}@{instance.host.name}"
    return {"name": name, "url": f"http://{instance.endpoint}"}


def _provided(step: Step, names: Mapping[str, str], served: set[str]) -> Iterator[Source]:
    for provider, own in step.settings["providers"].items():
        for model, theirs in own["models"].items():
            name = provider if len(own["models"]) == 1 else f"{provider}/{model}"
            pool = {
                "backend": own.get("backend", "openai"),
                "model": theirs,
                "provider": provider,
                "max_outstanding": step.settings["max_outstanding"],
                **({"key_file": key_file("provider", provider)} if "key" in own else {}),
                **({"ca_file": ca_file(provider)} if "ca" in own else {}),
                "instances": [{"name": name, "url": own["url"].rstrip("/")}],
            }
            # nothing leaves the house unasked: where we serve a model, its weight is 0
            called = names.get(model, model)
            yield Source(name, provider, called, int(called not in served), pool)


def key_file(kind: str, name: str) -> str:
    """Where the key lies that a pool's engines ask for."""
    return f"{FOLDER}/{kind}-{name}.key"


def ca_file(provider: str) -> str:
    """Where a provider's certificate authority lies."""
    return f"{FOLDER}/provider-{provider}.ca.crt"


def keys(step: Step) -> list[tuple[str, Secret, dict[str, Any]]]:
    """Name, key and limits of each client, by name."""
    found, names = [], canonical(step.settings)
    for name, own in sorted(step.settings["api_keys"].items()):
        limits = {} if isinstance(own, Secret) else {k: v for k, v in own.items() if k != "key"}
        if "models" in limits:
            limits["models"] = [names.get(model, model) for model in limits["models"]]
        found.append((name, own if isinstance(own, Secret) else own["key"], limits))
    return found


def _model(name: str, settings: Mapping[str, Any], found: list[Source]) -> dict[str, Any]:
    own = settings["models"].get(name, {})
    mine = [source for source in found if source.model == name]
    weights = weighed(mine, own, settings.get("backend"))
    serving = asked(name, settings, found)
    made: dict[str, Any] = {"aliases": list(own.get("aliases", ())), "pools": weights}
    if shadow := own.get("shadow"):
        pools = {source.said: source.name for source in mine}
        made["shadow"] = {"pool": pools[shadow["pool"]], "percent": shadow["percent"]}
    made |= _told(can(serving))
    said = ("context_length", "max_output", "tools", "vision", "embeddings")
    made |= {key: own[key] for key in said if key in own}
    deployments = [source.deployment for source in serving if source.deployment]
    details = {**(_details(deployments[0]) if deployments else {}), **own.get("details", {})}
    return {**made, "details": details} if details else made


def asked(name: str, settings: Mapping[str, Any], found: list[Source]) -> list[Source]:
    """Where the inventory sends requests for a model."""
    own, mine = settings["models"].get(name, {}), [s for s in found if s.model == name]
    weights = weighed(mine, own, settings.get("backend"))
    return [source for source in mine if weights[source.name]]


def can(serving: list[Source]) -> Abilities:
    """What the engines have in common; of providers nothing is known."""
    return common([source.can for source in serving if source.can])


def _told(can: Abilities) -> dict[str, Any]:
    context = {"context_length": can.context} if can.context else {}
    flags = {"tools": can.tools, "vision": can.vision, "embeddings": can.embeddings}
    return {**context, **flags}


def weighed(mine: list[Source], own: Mapping[str, Any], backend: str | None) -> dict[str, float]:
    """The share of each pool: as the model says; else by instances, of one backend if it has any.

    A pool that gets nothing stays known: its weight can be changed while the gateway runs.
    """
    if given := own.get("pools"):
        return {source.name: given.get(source.said, 0) for source in mine}
    chosen = [s for s in mine if s.deployment and s.deployment.engine == ENGINES.get(backend or "")]
    return {s.name: s.weight if s in chosen or not chosen else 0 for s in mine}


def _details(deployment: Deployment) -> dict[str, str]:
    """What Ollama's clients are told of a model; from its name and the catalogue."""
    model = deployment.model
    size = _SIZE.search(model.repository)
    return {
        **({"parameter_size": f"{size[1]}B"} if size else {}),
        **({"quantization_level": model.quantization.upper()} if model.quantization else {}),
    }
