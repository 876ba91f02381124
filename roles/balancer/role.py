"""nginx as a balancer for language models; why each directive stands there is said in the template.

It runs as a unit of its own beside the distribution's nginx.service, whose sites it leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from inferfleet import gateways
from inferfleet.builders import VERIFY_UNIT, listens, package, running
from inferfleet.model import Artefact, Ensure, Instance, Plan, Render, Secret, Step

KIND = "service"
ORDER = 90
ASKS_ENGINES = True
UNIT = "inferfleet-balancer.service"
FOLDER = "/etc/inferfleet/balancer"
NGINX = "/usr/sbin/nginx"
# nginx -t creates the pid file it is told of: not the running one's
CHECK = (NGINX, "-t", "-q", "-c", "{path}", "-g", "pid /run/inferfleet-balancer-check.pid;")

ERRORS = (  # what nginx answers by itself: status, OpenAI's type of error, words
    (404, "invalid_request_error", "there is nothing here; requests go to /v1/"),
    (413, "invalid_request_error", "the request is larger than the balancer takes"),
    (429, "rate_limit_error", "too many requests of this client are open"),
    (502, "server_error", "no engine answers"),
    (504, "server_error", "the engine did not answer in time"),
)


@dataclass(frozen=True, slots=True)
class Pool:
    """The instances of one deployment, or all gateways."""

    name: str
    paths: tuple[tuple[str, str], ...]  # of clients -> of the servers
    servers: tuple[str, ...]
    key: Secret | None


def artefacts(step: Step, plan: Plan, render: Render) -> Iterator[Artefact | Ensure]:
    """Configuration, client keys, engine keys and certificate, each reloaded without a cut."""
    settings = step.settings
    yield package("nginx-light", "nginx")
    behind = gateways.gateways(plan)
    found = [_before([each.public for each in behind])] if behind else pools(step, plan)
    yield render(
        f"{FOLDER}/nginx.conf",
        "nginx.conf.j2",
        validate=CHECK,
        reloads=(UNIT,),
        pools=found,
        errors=ERRORS,
        settings=settings,
        tls="tls" in settings,
        gateways=bool(behind),
        read_timeout=max(settings["read_timeout"], *map(_patience, behind), 0),
    )
    if not behind:
        yield from _keys(step, found, render)
    if tls := settings.get("tls"):
        yield render.copy(f"{FOLDER}/tls.crt", tls["certificate"], mode=0o600, reloads=(UNIT,))
        yield render.copy(f"{FOLDER}/tls.key", tls["key"], mode=0o600, reloads=(UNIT,))
    yield render(
        f"/etc/systemd/system/{UNIT}",
        "balancer.service.j2",
        validate=VERIFY_UNIT,
        restarts=(UNIT,),
        description="inferfleet balancer (nginx)",
        folder=FOLDER,
        drain_timeout=settings["drain_timeout"],
    )
    yield running(UNIT)
    yield listens(UNIT, settings["port"])


def _patience(gateway: gateways.Gateway) -> int:
    """Seconds until a gateway itself has given up, and says so."""
    waits: float = gateway.settings["timeouts"]["whole"] + gateway.settings["queue"]["timeout"]
    return ceil(waits)


def _keys(step: Step, found: list[Pool], render: Render) -> Iterator[Artefact]:
    """Those of clients, and those of the engines, in files that only root reads."""
    keys = sorted(step.settings["api_keys"].items())
    yield render(
        f"{FOLDER}/clients.conf", "clients.conf.j2", mode=0o600, reloads=(UNIT,), keys=keys
    )
    for pool in found:
        path = f"{FOLDER}/engine-{pool.name}.conf"
        yield render(path, "engine.conf.j2", mode=0o600, reloads=(UNIT,), key=pool.key)


def check(step: Step, plan: Plan) -> Iterator[tuple[str, str]]:
    """There is something to balance, and keys are asked for in one place."""
    if gateways.gateways(plan):
        for option in ("api_keys", "deployments"):
            if option in step.settings:
                yield option, "the phase has gateways, and the balancer passes all on: set it there"
        return
    if "api_keys" not in step.settings:
        yield "hosts", "'api_keys' is missing: without gateways, the balancer asks for keys"
    named = step.settings.get("deployments", ())
    for unknown in [name for name in named if name not in plan.phase.deployments]:
        known = ", ".join(plan.phase.deployments) or "none"
        yield "deployments", f"'{unknown}' is not a deployment of this phase; it has {known}"
    if not _backends(step, plan):
        yield "hosts", "a balancer without backends: no deployment of the phase runs anywhere"


def ports(step: Step) -> Iterable[int]:
    """Where clients come in."""
    return [step.settings["port"]]


def _before(servers: list[str]) -> Pool:
    """All gateways, with OpenAI's API and Ollama's."""
    return Pool("gateways", (("/v1/", "/v1/"), ("/api/", "/api/")), tuple(servers), None)


def pools(step: Step, plan: Plan) -> list[Pool]:
    """A pool for each deployment, in the phase's order.

    nginx cannot see the model in a request's body. So only where all pools serve the same
    model, one of them can have /v1/; otherwise each is reached under its deployment's name.
    """
    backends = _backends(step, plan)
    alone = len(backends) == 1
    return [
        Pool(
            name=name,
            paths=tuple((p, "/v1/") for p in ("/v1/", f"/{name}/v1/") if alone or name in p),
            servers=tuple(instance.endpoint for instance in instances),
            key=instances[0].deployment.api_key,
        )
        for name, instances in backends.items()
    ]


def _backends(step: Step, plan: Plan) -> dict[str, tuple[Instance, ...]]:
    named = step.settings.get("deployments", plan.phase.deployments)
    return {name: every for name, (_, every) in plan.deployed().items() if name in named}
