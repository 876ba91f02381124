"""From a plan to what clients need to know of it. Pure: nothing is asked of any host."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inferfleet import gateways, reach
from inferfleet.abilities import abilities, context_option, longest_answer, share
from inferfleet.clients.access import Access, Endpoint, Served
from inferfleet.errors import Error, UsageError
from inferfleet.model import Instance, Plan, Secret, Step
from inferfleet.roles import Library

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user said: whose key, at which address, under which CA."""

    user: str = ""
    url: str = ""
    ca: str = ""


def access(plan: Plan, library: Library, wanted: Wanted) -> Access:
    """How clients reach a phase. Raises Error where they cannot, and says what to do."""
    front = reach.front(plan, library)
    if front is None:
        found = _directly(plan, wanted)
    elif front.gateway:
        found = _through_gateway(plan, front, front.gateway, wanted)
    else:
        found = _through_balancer(plan, front, wanted)
    if not any(each.models for each in found.endpoints):
        raise Error(f"phase '{plan.phase.name}' serves no model")
    _printable(found, wanted)
    return replace(found, ca=wanted.ca, notes=(*found.notes, *_cautions(found, wanted)))


def _address(plan: Plan, front: reach.Front, wanted: Wanted) -> str:
    return reach.base(wanted.url) if wanted.url else reach.origin(front, plan, named=True)


def _through_gateway(plan: Plan, front: reach.Front, step: Step, wanted: Wanted) -> Access:
    url = _address(plan, front, wanted)
    user, key, notes = _key(plan, front.keys, wanted)
    limits = {name: own for name, _, own in gateways.keys(step)}
    allowed = limits[user].get("models") if user else None
    models = tuple(_configured(gateways.config(step, plan)["models"], allowed))
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
        output = min(own.get("max_output") or share(tokens), max(1, tokens - 1))
        told = {key: bool(own.get(key)) for key in ("tools", "vision", "embeddings")}
        yield Served(name, tokens, output, **told)


def _through_balancer(plan: Plan, front: reach.Front, wanted: Wanted) -> Access:
    url = _address(plan, front, wanted)
    _, key, notes = _key(plan, front.keys, wanted)
    served = _served(plan, front.paths)
    own = tuple(
        Endpoint(_called(plan, name, served), f"{url}{front.paths[name]}", (model,))
        for name, model in served.items()
    )
    return Access(plan.phase.name, own, key, notes=notes + _several(front, wanted))


def _called(plan: Plan, deployment: str, served: Mapping[str, Served]) -> str:
    name = f"inferfleet-{plan.phase.name}"
    return name if len(served) == 1 else f"{name}-{deployment}"


def _directly(plan: Plan, wanted: Wanted) -> Access:
    """Engines on loopback: for the machine they are on, or through a forwarded port."""
    given = reach.base(wanted.url) if wanted.url else ""
    reach.user(wanted.user, None, plan)
    first = reach.engines(plan, elsewhere=bool(given))
    served = _served(plan, first)
    if given and len(served) > 1:
        raise UsageError(
            f"--url is one address, and phase '{plan.phase.name}' has an engine for each of"
            f" {', '.join(served)}: put a balancer before them"
        )
    urls = {name: given or f"http://{i.endpoint}" for name, (_, i) in first.items()}
    own = tuple(
        Endpoint(_called(plan, name, served), f"{urls[name]}/v1", (model,))
        for name, model in served.items()
    )
    keys = [i.deployment.api_key for _, i in first.values() if i.deployment.api_key]
    key = _variable(keys[0], plan.phase.name) if keys else ""
    ollama = [urls[name] for name, (role, _) in first.items() if role == "ollama"]
    return Access(plan.phase.name, own, key, ollama=ollama[0] if ollama else "")


def _served(plan: Plan, reached: Container[str]) -> dict[str, Served]:
    """What each deployment that is reached serves, in the phase's order."""
    every = plan.deployed().items()
    return {name: _model(*own) for name, own in every if name in reached}


def _model(role: str, instances: Sequence[Instance]) -> Served:
    deployment, can = instances[0].deployment, abilities(role, instances)
    if not can.context:
        raise Error(
            f"deployments.{deployment.name}: nothing says how many tokens its context has; set"
            f" {context_option(role)} among its options"
        )
    return Served(
        deployment.model.served_name,
        can.context,
        min(longest_answer(role, can.context, instances), max(1, can.context - 1)),
        tools=can.tools,
        vision=can.vision,
        embeddings=can.embeddings,
    )


def _key(
    plan: Plan, keys: Mapping[str, Secret], wanted: Wanted
) -> tuple[str, str, tuple[str, ...]]:
    """Whose key (or "") and the variable it is in, by what the inventory calls it."""
    reach.user(wanted.user, keys, plan)
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


def _several(front: reach.Front, wanted: Wanted) -> tuple[str, ...]:
    """What to know where the address is one host's."""
    if front.step is front.gateway or wanted.url or front.server_name:
        return ()
    notes = []
    if len(front.steps) > 1:
        every = ", ".join(each.host.address for each in front.steps)
        notes.append(
            f"{len(front.steps)} balancers ({every}) and no server_name: this is the first one's"
        )
    if front.tls:
        address = front.step.host.address
        notes.append(f"the certificate must be valid for {address}, or set server_name")
    return tuple(notes)


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
