"""The gateway's configuration: one JSON file, read whole and checked before anything listens."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from inferfleet.gateway.request import Backend

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]


class ConfigError(Exception):
    """What is wrong in which file; one line for the operator."""


class Instance(Struct, frozen=True, forbid_unknown_fields=True):
    """One engine process: `url` without /v1, such as http://192.0.2.11:8000."""

    name: Text
    url: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+(/[^?#\s]*)?$")]


class Pool(Struct, frozen=True, forbid_unknown_fields=True):
    """Instances that answer alike. `model` is the name they know it by."""

    backend: Backend
    model: Text
    instances: Annotated[list[Instance], Meta(min_length=1)]
    provider: Text = "inferfleet"
    max_outstanding: Positive = 256  # requests one instance is given at a time
    key_file: str | None = None
    ca_file: str | None = None


class Shadow(Struct, frozen=True, forbid_unknown_fields=True):
    """A share of a model's requests is asked of this pool too; nobody waits for its answers."""

    pool: Text
    percent: Annotated[float, Meta(gt=0, le=100)]


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """A name clients ask for. `pools` maps names of pools to their weights."""

    pools: Annotated[dict[str, Share], Meta(min_length=1)]
    aliases: list[str] = []
    shadow: Shadow | None = None
    context_length: Positive | None = None  # tokens
    max_output: Positive | None = None
    tools: bool = False
    vision: bool = False
    embeddings: bool = False
    details: dict[str, Any] = {}


class Queue(Struct, frozen=True, forbid_unknown_fields=True):
    """Where requests wait for a place at an instance; beyond it they get 429."""

    length: Annotated[int, Meta(ge=0)] = 256
    timeout: Seconds = 30


class Timeouts(Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds; `first_token` until a stream begins, `idle` between its bytes, `whole` otherwise."""

    connect: Seconds = 3
    first_token: Seconds = 300
    idle: Seconds = 120
    whole: Seconds = 900


class Health(Struct, frozen=True, forbid_unknown_fields=True):
    """How instances are watched; seconds, and failures in a row until one is left out."""

    interval: Seconds = 10
    timeout: Seconds = 20
    failures: Positive = 3
    hung_after: Seconds = 60


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    listen: Text
    pools: Annotated[dict[str, Pool], Meta(min_length=1)]
    models: Annotated[dict[str, Model], Meta(min_length=1)]
    keys: str | None = None
    private: str = "127.0.0.1:9400"
    workers: Positive = 1
    state: str | None = None
    log: str | None = "-"
    drain_timeout: Seconds = 300
    max_body_mib: Positive = 32
    public_models: bool = False
    queue: Queue = Queue()
    timeouts: Timeouts = Timeouts()
    health: Health = Health()
    tracing: dict[str, Any] | None = None


def load(path: Path) -> Config:
    """The configuration in a file, or a ConfigError that names file and place."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Config)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    for problem in problems(found):
        raise ConfigError(f"{path}: {problem}")
    return found


def problems(config: Config) -> list[str]:
    """What a look at each value alone does not show."""
    found = []
    names: dict[str, str] = {}
    for name, model in config.models.items():
        unknown = [p for p in (*model.pools, *shadowed(model)) if p not in config.pools]
        found += [f"models.{name}: there is no pool '{pool}'" for pool in unknown]
        if not any(model.pools.values()):
            found.append(f"models.{name}.pools: one weight at least must be above 0")
        for said in (name, *model.aliases):
            if said in names:
                found.append(f"models.{name}: '{said}' is also a name of '{names[said]}'")
            names[said] = name
    for name, pool in config.pools.items():
        found += [f"pools.{name}: {wrong}" for one in pool.instances if (wrong := unfit(one.url))]
    try:
        host, _ = address(config.listen)
        address(config.private)
    except ValueError as error:
        return [*found, str(error)]
    if config.keys is None and not loopback(host):
        found.append(
            f"keys: without keys it may only listen on loopback, not on {config.listen}; "
            "name a keys file, or listen on 127.0.0.1"
        )
    return found


def unfit(url: str) -> str:
    """What is wrong with an instance's URL beyond its form, or nothing."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        return "a URL shows what it holds; the engine's key belongs into key_file"
    try:
        return "" if parts.hostname and parts.port != 0 else f"'{url}' names no host and port"
    except ValueError:
        return f"'{url}' has no port from 1 to 65535"


def shadowed(model: Model) -> list[str]:
    """The pool that a model's requests are copied to, if any."""
    return [model.shadow.pool] if model.shadow else []


def address(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`; ValueError otherwise."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"'{text}' is no address: host:port, with an IPv6 host in brackets")
    return host.removeprefix("[").removesuffix("]"), int(port)


def loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
