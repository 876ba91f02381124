"""The gateways of a plan, asked on their own hosts: their private side is reachable only there."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal
from urllib.parse import quote

from inferfleet import gateways, transport
from inferfleet.errors import ApplyError
from inferfleet.model import Host, Plan, Step

PATIENCE = 90.0  # seconds; longer than the program waits for all it asks

Weights = Mapping[str, float]  # pool -> its share


@dataclass(frozen=True, slots=True)
class Site:
    """One gateway: its host, its workers' private addresses, and what the inventory says."""

    host: Host
    workers: tuple[str, ...]
    models: Mapping[str, Mapping[str, Any]]  # as in config.json
    aliases: Mapping[str, str]
    names: Mapping[str, Mapping[str, str]]  # model -> what the inventory calls a pool -> pool

    def only(self, model: str) -> Site:
        """The same with one model alone."""
        return replace(self, models={model: self.models[model]})


@dataclass(frozen=True, slots=True)
class Order:
    """Other weights for a model; None: those of the configuration."""

    model: str
    weights: Weights | None

    def request(self) -> dict[str, Any]:
        """As the program on the host wants it."""
        method: Literal["PUT", "DELETE"] = "DELETE" if self.weights is None else "PUT"
        path = f"/models/{quote(self.model, safe='/')}/weights"
        return {"model": self.model, "method": method, "path": path, "weights": self.weights}


def sites(plan: Plan, hosts: Sequence[Host]) -> list[Site]:
    """The gateways on these hosts, in their order."""
    steps = (step for host in hosts for step in plan.steps.get(host.name, ()))
    return [_site(step, plan) for step in steps if step.role == gateways.ROLE]


def _site(step: Step, plan: Plan) -> Site:
    names: dict[str, dict[str, str]] = {}
    for source in gateways.sources(step, plan):
        names.setdefault(source.model, {}).update({source.said: source.name})
    return Site(
        step.host,
        gateways.gateway(step, plan).private,
        gateways.config(step, plan)["models"],
        gateways.canonical(step.settings),
        names,
    )


def ask(
    site: Site, options: transport.Options, orders: Sequence[Order] = (), *, shadow: bool = True
) -> tuple[dict[str, Any], ...]:
    """What each worker says of itself (/status, with `shadow`), once all have the orders.

    Raises HostError; then some workers may have followed.
    """
    request = {
        "workers": site.workers,
        "orders": [order.request() for order in orders],
        "shadow": shadow,
    }
    program = f"{_source()}\nmain({json.dumps(json.dumps(request))})\n"
    with transport.connect(site.host, options) as way:
        done = way.run("python3 -I -", input=program.encode(), timeout=PATIENCE, become=False)
    return _read(site.host.name, done)


def by_hand(way: transport.Transport) -> dict[str, Weights]:
    """Model -> weights set by hand at a host's gateway, over a connection that is open already."""
    done = way.run(f"cat {gateways.STATE}/weights.json")  # a folder of the gateway's user alone
    try:
        return dict(json.loads(done.stdout))
    except ValueError:  # most often there is no such file
        return {}


@functools.cache
def _source() -> str:
    return resources.files("inferfleet.cutover").joinpath("onhost.py").read_text("utf-8")


def _read(host: str, done: transport.Completed) -> tuple[dict[str, Any], ...]:
    if done.status == 127:
        raise ApplyError(host, "it has no python3; install it (Debian: python3-minimal)")
    try:
        said = json.loads(done.stdout)
    except ValueError:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ApplyError(host, f"its gateway could not be asked: {last}") from None
    if "error" in said:
        raise ApplyError(host, f"its gateway: {said['error']}")
    workers = tuple(said["workers"])
    if any("configured" not in model for w in workers for model in w["models"].values()):
        raise ApplyError(host, "its gateway is older than this command: provision it first")
    return workers
