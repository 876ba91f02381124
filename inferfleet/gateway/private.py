"""The private address of a worker: numbers for Prometheus, state and orders for operators."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from inferfleet.gateway.config import loopback
from inferfleet.gateway.pool import everyone

if TYPE_CHECKING:
    from inferfleet.gateway.core import Core
    from inferfleet.gateway.pool import Instance
    from inferfleet.gateway.worker import Worker


def private(worker: Worker) -> FastAPI:
    """Its pages; /docs describes them."""
    app = FastAPI(title="inferfleet gateway, private side")
    core, began = worker.core, time.time()
    orders = [Depends(from_here)]

    @app.get("/metrics")
    async def metrics() -> Response:
        """Everything counted, for Prometheus."""
        observe(core)
        return Response(core.metrics.expose(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        """The worker lives."""
        return {"ok": True}

    @app.get("/ready")
    async def ready(response: Response) -> dict[str, bool]:
        """Clients can be served: some instance can be asked, and it is not draining."""
        able = can_serve(core)
        response.status_code = 200 if able else 503
        return {"ok": able}

    @app.get("/status")
    async def status() -> Response:
        """Pools, instances, weights and the use of keys in this worker."""
        state = {"began": began, **told(worker)}
        return Response(msgspec.json.encode(state), media_type="application/json")

    @app.post("/drain", dependencies=orders)
    async def drain() -> dict[str, int]:
        """Let the whole gateway take no new connections; says what is under way in this worker.

        A closed port is what balancers understand: they go on to the next gateway. A reload
        opens it again.
        """
        worker.drain()
        return {"outstanding": len(core.live)}

    @app.post("/instances/{name}/drain", dependencies=orders)
    async def drain_instance(name: str) -> dict[str, int]:
        """Give an instance no new requests; says how many it still has."""
        return set_draining(core, name, True)

    @app.post("/instances/{name}/undrain", dependencies=orders)
    async def undrain_instance(name: str) -> dict[str, int]:
        """Give an instance requests again."""
        return set_draining(core, name, False)

    @app.get("/shadow")
    async def shadow(samples: bool = False) -> Response:
        """How the answers of shadowed pools compare with those that clients got."""
        return Response(worker.shadows.report(samples), media_type="application/json")

    @app.put("/models/{name:path}/weights", dependencies=orders)
    async def weigh(name: str, weights: Annotated[dict[str, float], Body()]) -> dict[str, float]:
        """Send a model's requests to its pools by these weights, until a restart or DELETE."""
        return set_weights(worker, name, weights)

    @app.delete("/models/{name:path}/weights", dependencies=orders)
    async def unweigh(name: str) -> dict[str, float]:
        """Go back to the weights of the configuration."""
        return set_weights(worker, name, None)

    return app


def from_here(request: Request) -> None:
    """Orders are taken from the gateway's own host alone: this side has no keys."""
    client, server = request.scope["client"], request.scope["server"]
    if not client or not server or (client[0] != server[0] and not loopback(client[0])):
        raise HTTPException(403, "orders are taken from the gateway's own host alone")


def can_serve(core: Core) -> bool:
    """Whether new requests have a chance."""
    now = core.time()
    return not core.draining and any(i.usable(now) for i in everyone(core.pools.values()))


def observe(core: Core) -> None:
    """Bring what is a state, not a count, into the metrics."""
    now = core.time()
    for instance in everyone(core.pools.values()):
        series = core.metrics.instance(instance.name)
        series.outstanding, series.up = instance.outstanding, instance.usable(now)
    for name, route in core.routes.items():
        core.metrics.model(name).queued = route.queued()


def told(worker: Worker) -> dict[str, Any]:
    """The state in JSON's terms."""
    core = worker.core
    now = core.time()
    return {
        "draining": core.draining,
        "outstanding": len(core.live),
        "keys": worker.limits.usage(time.time()),
        "keys_problem": worker.keys.problem,
        "models": {
            name: {
                "weights": route.weights,
                "configured": worker.config.models[name].pools,
                "requests": core.metrics.by_pool(name),
                "queued": route.queued(),
            }
            for name, route in core.routes.items()
        },
        "pools": {
            name: [state(instance, now) for instance in pool.instances]
            for name, pool in core.pools.items()
        },
    }


def state(instance: Instance, now: float) -> dict[str, Any]:
    """One instance, for people."""
    broken = max(0.0, instance.asked_again_at - now)
    why = instance.down or ("draining" if instance.draining else "failures" if broken else "")
    return {
        "name": instance.name,
        "url": instance.url,
        "usable": instance.usable(now),
        "left_out": why,
        "again_in_seconds": round(broken, 1),
        "outstanding": instance.outstanding,
        "failures": instance.failures,
    }


def set_draining(core: Core, name: str, draining: bool) -> dict[str, int]:
    """Begin or end the drain of an instance."""
    found = core.instances().get(name)
    if found is None:
        raise HTTPException(404, f"there is no instance '{name}'")
    found.draining = draining
    found.pool.wake()
    return {"outstanding": found.outstanding}


def set_weights(worker: Worker, name: str, weights: dict[str, float] | None) -> dict[str, float]:
    """Other weights, or with None the configured ones again."""
    route = worker.core.routes.get(name)
    if route is None:
        raise HTTPException(404, f"there is no model '{name}'")
    worker.follow_weights()  # what another worker was told of other models is not to be lost
    wanted = dict(worker.config.models[name].pools) if weights is None else weights
    if unknown := [pool for pool in wanted if pool not in route.pools]:
        known = ", ".join(route.pools)
        raise HTTPException(422, f"'{unknown[0]}' is no pool of '{name}'; it has {known}")
    sound = all(0 <= weight < math.inf for weight in wanted.values())  # NaN is not
    if not sound or not any(wanted.values()):
        raise HTTPException(422, "weights are 0 or more, and one at least is more")
    before = route.weights
    route.weigh(wanted)
    try:
        worker.keep_weights()
    except OSError as error:  # weights that only this worker has, and until it ends, are no use
        route.weigh(before)
        raise HTTPException(500, f"{worker.weights}: {(error.strerror or '').lower()}") from None
    return wanted
