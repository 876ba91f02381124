"""Where clients come into a phase: at its balancers, its gateways, or its engines. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from inferfleet import gateways
from inferfleet.errors import Error, UsageError
from inferfleet.model import Instance, Plan, Secret, Step, endpoint
from inferfleet.roles import Library
from inferfleet.yamlbuild import did_you_mean

_PORTS = {"https": 443, "http": 80}
_ANY = ("0.0.0.0", "[::]")  # noqa: S104 - what a listener writes, not what we open


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before a phase's engines: its balancers, or else its gateways.

    `paths` has the deployments that clients reach, each with the path its API is under (`/v1`);
    behind a gateway that is the same for all, and the request's model decides.
    """

    steps: tuple[Step, ...]  # the first one's address is told
    gateway: Step | None
    keys: Mapping[str, Secret]  # of clients, by name
    paths: Mapping[str, str]

    @property
    def step(self) -> Step:
        return self.steps[0]

    @property
    def tls(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.step.settings.get("tls")
        return found

    @property
    def server_name(self) -> str:
        """The name it is called by, and its certificate is for; "": none."""
        name: str = self.step.settings.get("server_name", "_")
        return "" if name == "_" else name


def front(plan: Plan, library: Library) -> Front | None:
    """Balancers, else gateways; None where the engines are asked themselves."""
    balancers, behind = _placed(plan, "balancer"), _placed(plan, gateways.ROLE)
    if behind:
        keys = {name: key for name, key, _ in gateways.keys(behind[0])}
        paths = dict.fromkeys(plan.deployed(), "/v1")
        return Front(tuple(balancers or behind), behind[0], keys, paths)
    if not balancers:
        return None
    first = balancers[0]
    pools = library.role("balancer").module.pools(first, plan)
    paths = {pool.name: pool.paths[0][0].rstrip("/") for pool in pools}
    return Front(tuple(balancers), None, first.settings.get("api_keys", {}), paths)


def _placed(plan: Plan, role: str) -> list[Step]:
    return [step for host in plan.hosts for step in plan.steps[host.name] if step.role == role]


def origin(found: Front, plan: Plan, *, named: bool) -> str:
    """Its URL without a path, by its server's name if it has one and `named`, else by address.

    Raises Error where it listens for its own host alone, and that is not this machine.
    """
    step = found.step
    if found.gateway is step:
        return _listening(step, plan)
    host = found.server_name if named and found.server_name else step.host.address
    scheme, port = "https" if found.tls else "http", step.settings["port"]
    if port == _PORTS[scheme]:
        return f"{scheme}://[{host}]" if ":" in host else f"{scheme}://{host}"
    return f"{scheme}://{endpoint(host, port)}"


def _listening(step: Step, plan: Plan) -> str:
    """A gateway's own address, where no balancer stands before it."""
    address, _, port = gateways.gateway(step, plan).public.rpartition(":")
    if address in _ANY:
        return f"http://{endpoint(step.host.address, int(port))}"
    if address == "127.0.0.1" and step.host.connection != "local":
        raise _unreachable(plan, [step.host.name], int(port), "gateway")
    return f"http://{address}:{port}"


def engines(plan: Plan, *, elsewhere: bool = False) -> dict[str, tuple[str, Instance]]:
    """Role and first instance of each deployment, where clients ask the engines themselves.

    Raises Error where these listen for their own host alone, and that is not this machine; not
    when the user reaches them `elsewhere`, through a port that was forwarded.
    """
    found = {name: (role, every[0]) for name, (role, every) in plan.deployed().items()}
    away = [i for _, i in found.values() if _on_loopback(i) and i.host.connection != "local"]
    if away and not elsewhere:
        hosts = list(dict.fromkeys(instance.host.name for instance in away))
        raise _unreachable(plan, hosts, away[0].port, "engine")
    return found


def _on_loopback(instance: Instance) -> bool:
    return instance.listen in ("127.0.0.1", "::1")


def _unreachable(plan: Plan, hosts: list[str], port: int, what: str) -> Error:
    return Error(
        f"phase '{plan.phase.name}': the {what} listens on loopback of {', '.join(hosts)}, where no"
        f" client comes; put a balancer before it, or forward its port (ssh -N -L"
        f" {port}:127.0.0.1:{port} {hosts[0]}) and say --url http://127.0.0.1:{port}"
    )


def user(name: str, known: Collection[str] | None, plan: Plan) -> None:
    """Raises UsageError for a user that the phase does not have; None: it has no users at all."""
    if not name or name in (known or ()):
        return
    phase = plan.phase.name
    if known is None:
        raise UsageError(f"--user: phase '{phase}' has no users: its engines are asked directly")
    has = f"it has {', '.join(sorted(known)) or 'none'}"
    raise UsageError(
        f"--user: phase '{phase}' has no user '{name}'{did_you_mean(name, known)}; {has}"
    )


def base(url: str) -> str:
    """An address the user said, without /v1. Raises UsageError where it is none."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in _PORTS and parts.hostname and (parts.port or 1)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise UsageError(f"--url is http://HOST[:PORT] or https://HOST[:PORT], not '{url}'")
    if parts.username or parts.password:
        raise UsageError("--url: an address is shown and logged, so no password belongs into it")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
