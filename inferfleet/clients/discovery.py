"""From a plan to what clients need to know of it. Pure: nothing is asked of any host."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from inferfleet.clients import abilities
from inferfleet.clients.access import Access, Endpoint, Served
from inferfleet.errors import Error, UsageError
from inferfleet.model import Instance, Plan, Secret, Step, endpoint
from inferfleet.roles import Library
from inferfleet.yamlbuild import did_you_mean

_PORTS = {"https": 443, "http": 80}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ANY = ("0.0.0.0", "[::]")  # noqa: S104 - what a listener writes, not what we open


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user said: whose key, at which address, under which CA."""

    user: str = ""
    url: str = ""
    ca: str = ""


def access(plan: Plan, library: Library, wanted: Wanted) -> Access:
    """How clients reach a phase. Raises Error where they cannot, and says what to do."""
    front = _placed(plan, "balancer")
    gateways = _placed(plan, "gateway")
    if gateways:
        found = _through_gateway(plan, front, gateways, wanted)
    elif front:
        found = _through_balancer(plan, library, front, wanted)
    else:
        found = _directly(plan, wanted)
    if not any(each.models for each in found.endpoints):
        raise Error(f"phase '{plan.phase.name}' serves no model")
    _printable(found, wanted)
    return replace(found, ca=wanted.ca, notes=(*found.notes, *_cautions(found, wanted)))


def _placed(plan: Plan, role: str) -> list[Step]:
    return [step for host in plan.hosts for step in plan.steps[host.name] if step.role == role]


def _through_gateway(plan: Plan, front: list[Step], gateways: list[Step], wanted: Wanted) -> Access:
    from inferfleet import gateways as told

    step = gateways[0]
    url = _given(wanted) or (_origin(front[0]) if front else _listening(plan, step))
    users = {name: (key, limits.get("models")) for name, key, limits in told.keys(step)}
    user, key, notes = _key(plan, {name: key for name, (key, _) in users.items()}, wanted)
    allowed = users[user][1] if user else None
    models = tuple(_configured(told.config(step, plan)["models"], allowed))
    own = (Endpoint(f"inferfleet-{plan.phase.name}", f"{url}/v1", models),)
    notes += _several(front, wanted)
    return Access(plan.phase.name, own, key, ollama=url, gateway=True, notes=notes)


def _configured(models: Mapping[str, Any], allowed: list[str] | None) -> Iterator[Served]:
    """The models of a gateway's configuration that a key may use."""
    for name, own in models.items():
        if allowed is not None and name not in allowed:
            continue
        if not (tokens := own.get("context_length")):
            raise Error(
                f"models.{name}: nothing says how many tokens its context has; set context_length"
                " among the gateway's models"
            )
        output = min(own.get("max_output") or abilities.share(tokens), max(1, tokens - 1))
        told = {key: bool(own.get(key)) for key in ("tools", "vision", "embeddings")}
        yield Served(name, tokens, output, **told)


def _listening(plan: Plan, step: Step) -> str:
    """The gateway's own address, where no balancer stands before it."""
    from inferfleet import gateways as told

    address, _, port = told.gateway(step, plan).public.rpartition(":")
    if address in _ANY:
        return f"http://{endpoint(step.host.address, int(port))}"
    if address == "127.0.0.1" and step.host.connection != "local":
        raise Error(_unreachable(plan, [step.host.name], int(port), "gateway"))
    return f"http://{address}:{port}"


def _through_balancer(plan: Plan, library: Library, front: list[Step], wanted: Wanted) -> Access:
    step = front[0]
    url = _given(wanted) or _origin(step)
    _, key, notes = _key(plan, step.settings.get("api_keys", {}), wanted)
    served = _served(plan)
    pools = [p for p in library.role("balancer").module.pools(step, plan) if p.name in served]
    name = f"inferfleet-{plan.phase.name}"
    own = tuple(
        Endpoint(
            name if len(pools) == 1 else f"{name}-{pool.name}",
            f"{url}/v1" if len(pools) == 1 else f"{url}/{pool.name}/v1",
            (served[pool.name],),
        )
        for pool in pools
    )
    return Access(plan.phase.name, own, key, notes=notes + _several(front, wanted))


def _directly(plan: Plan, wanted: Wanted) -> Access:
    """Engines on loopback: for the machine they are on, or through a forwarded port."""
    served, first = _served(plan), _first_instances(plan)
    away = [i.host.name for i in first.values() if i.host.connection != "local"]
    given = _given(wanted)
    if away and not given:
        port = next(i.port for i in first.values() if i.host.name in away)
        raise Error(_unreachable(plan, away, port, "engine"))
    if given and len(served) > 1:
        raise UsageError(
            f"--url is one address, and phase '{plan.phase.name}' has an engine for each of"
            f" {', '.join(served)}: put a balancer before them"
        )
    name = f"inferfleet-{plan.phase.name}"
    own = tuple(
        Endpoint(
            name if len(served) == 1 else f"{name}-{deployment}",
            f"{given or f'http://{first[deployment].endpoint}'}/v1",
            (model,),
        )
        for deployment, model in served.items()
    )
    keys = {d.name: d.api_key for i in first.values() if (d := i.deployment).api_key}
    if wanted.user:
        raise UsageError(f"--user: phase '{plan.phase.name}' has no users: it has no balancer")
    key = _variable(next(iter(keys.values())), plan.phase.name) if keys else ""
    return Access(plan.phase.name, own, key, ollama=_ollama(plan, first, given))


def _ollama(plan: Plan, first: Mapping[str, Instance], given: str) -> str:
    """Where Ollama's own API is; where there are several, the first."""
    roles = {i.name: s.role for steps in plan.steps.values() for s in steps for i in s.instances}
    found = [i for i in first.values() if roles[i.name] == "ollama"]
    return (given or f"http://{found[0].endpoint}") if found else ""


def _first_instances(plan: Plan) -> dict[str, Instance]:
    found: dict[str, Instance] = {}
    for instance in plan.instances():
        found.setdefault(instance.deployment.name, instance)
    return {name: found[name] for name in plan.phase.deployments if name in found}


def _served(plan: Plan) -> dict[str, Served]:
    """What each deployment serves, in the phase's order."""
    by_name: dict[str, tuple[str, list[Instance]]] = {}
    for steps in plan.steps.values():
        for step in steps:
            for instance in step.instances:
                entry = by_name.setdefault(instance.deployment.name, (step.role, []))
                entry[1].append(instance)
    known = [name for name in plan.phase.deployments if name in by_name]
    return {name: _model(*by_name[name]) for name in known}


def _model(role: str, instances: list[Instance]) -> Served:
    deployment = instances[0].deployment
    tokens = abilities.context(role, instances)
    return Served(
        deployment.model.served_name,
        tokens,
        min(abilities.longest_answer(role, tokens, instances), max(1, tokens - 1)),
        tools=abilities.tools(role, deployment),
        vision=abilities.vision(deployment),
        embeddings=abilities.embeddings(deployment),
    )


def _given(wanted: Wanted) -> str:
    """The address the user said, without /v1. Raises UsageError where it is none."""
    if not wanted.url:
        return ""
    parts = urlsplit(wanted.url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"--url {wanted.url}: must be like https://llm.example.com")
    if parts.username or parts.password:
        raise UsageError("--url: no user or password belongs into an address that is shown")
    return wanted.url.rstrip("/").removesuffix("/v1").rstrip("/")


def _origin(step: Step) -> str:
    """Where clients come to a balancer."""
    settings = step.settings
    named = settings.get("server_name", "_")
    host = step.host.address if named == "_" else named
    scheme = "https" if settings.get("tls") else "http"
    if settings["port"] == _PORTS[scheme]:
        return f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}"
    return f"{scheme}://{endpoint(host, settings['port'])}"


def _key(
    plan: Plan, keys: Mapping[str, Secret], wanted: Wanted
) -> tuple[str, str, tuple[str, ...]]:
    """Whose key (or "") and the variable it is in, by what the inventory calls it."""
    if wanted.user and wanted.user not in keys:
        known = ", ".join(keys) or "none"
        near = did_you_mean(wanted.user, keys)
        raise UsageError(
            f"--user: there is no user '{wanted.user}'{near}; those of phase '{plan.phase.name}':"
            f" {known}"
        )
    if not keys:
        return "", "", ()
    user = wanted.user or (next(iter(keys)) if len(keys) == 1 else "")
    if user:
        return user, _variable(keys[user], user), ()
    note = f"whose key? Users are {', '.join(keys)}: --user NAME takes the inventory's variable"
    return "", "INFERFLEET_KEY", (note,)


def _variable(secret: Secret, name: str) -> str:
    if secret.kind == "env" and _VARIABLE.fullmatch(secret.reference):
        return secret.reference
    return f"INFERFLEET_{re.sub(r'[^A-Z0-9]', '_', name.upper())}_KEY"


def _several(front: list[Step], wanted: Wanted) -> tuple[str, ...]:
    """What to know where the address is one host's."""
    if not front or wanted.url or front[0].settings.get("server_name", "_") != "_":
        return ()
    step = front[0]
    notes = []
    if len(front) > 1:
        every = ", ".join(each.host.address for each in front)
        notes.append(
            f"{len(front)} balancers ({every}) and no server_name: this is the first one's"
        )
    if step.settings.get("tls"):
        notes.append(f"the certificate must be valid for {step.host.address}, or set server_name")
    return tuple(notes)


def _unreachable(plan: Plan, hosts: list[str], port: int, what: str) -> str:
    return (
        f"phase '{plan.phase.name}': the {what} listens on loopback of {', '.join(hosts)}, where no"
        f" client comes; put a balancer before it, or forward its port (ssh -N -L"
        f" {port}:127.0.0.1:{port} {hosts[0]}) and say --url http://127.0.0.1:{port}"
    )


def _cautions(found: Access, wanted: Wanted) -> Iterator[str]:
    if found.clear:
        yield "keys and code travel in clear: give the balancer `tls`"
    if wanted.ca and not any(each.base.startswith("https") for each in found.endpoints):
        yield "--ca has no use here: the address has no TLS"


def _printable(found: Access, wanted: Wanted) -> None:
    """Names end up in comments, too, where no quoting keeps a line break from ending them."""
    names = [model.name for each in found.endpoints for model in each.models]
    for text in (*names, wanted.url, wanted.ca):
        if not text.isprintable():
            raise Error(f"{text!r} has characters that no client's file can take")
