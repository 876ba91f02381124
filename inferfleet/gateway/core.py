"""What all requests of a worker share: pools, the HTTP client to the engines, and the sweeper."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from inferfleet.gateway.config import Config, ConfigError
from inferfleet.gateway.config import Pool as PoolConfig
from inferfleet.gateway.pool import Instance, Pool, Route, everyone
from inferfleet.gateway.upstream import Answer, Client, target

if TYPE_CHECKING:
    from inferfleet.gateway.metrics import Ejected, Metrics
    from inferfleet.gateway.relay import Exchange

LOG = logging.getLogger("inferfleet.gateway")
SWEEP = 0.25  # seconds between looks at deadlines and at breaks that are over


class Core:
    """The state of a worker. Made outside the event loop, opened inside."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.pools = {name: _pool(name, pool, config) for name, pool in config.pools.items()}
        self.routes = {
            name: Route(name, {p: self.pools[p] for p in model.pools}, dict(model.pools))
            for name, model in config.models.items()
        }
        self.live: set[Exchange] = set()
        self.draining = False
        self.targets = {
            instance.name: target(instance.url, _headers(pool), _tls(pool))
            for pool in config.pools.values()
            for instance in pool.instances
        }
        self.time: Callable[[], float]
        self.client: Client
        self._sweeper: asyncio.Task[None]

    async def open(self) -> None:
        """Begin to work in this event loop."""
        loop = asyncio.get_running_loop()
        self.time = loop.time
        self.client = Client(self.config.timeouts.connect)
        self._sweeper = loop.create_task(self._sweep())

    async def close(self) -> None:
        """End what is left and close all connections."""
        self._sweeper.cancel()
        self.client.close()

    async def post(
        self, instance: Instance, path: str, body: bytes, headers: dict[str, str]
    ) -> Answer:
        """Ask an instance; its answer's status and headers are there. ConnectFailed, BrokenOff."""
        return await self.client.ask("POST", self.targets[instance.name], path, headers, body)

    async def get(self, instance: Instance, path: str, timeout: float) -> tuple[int, bytes]:
        """Status and body of a page of the engine. OSError or TimeoutError."""
        async with asyncio.timeout(timeout):
            answer = await self.client.ask("GET", self.targets[instance.name], path, {})
            try:
                return answer.status, await answer.whole()
            finally:
                answer.close()

    def retried(self, why: str) -> None:
        """An attempt failed before the client had anything."""
        self.metrics.retries[why] += 1

    def ejected(self, instance: Instance, why: Ejected) -> None:
        """An instance gets no requests for a while."""
        self.metrics.instance(instance.name).ejections[why] += 1
        LOG.warning("%s: left out (%s)", instance.name, why)

    def patience(self, reason: str) -> float:
        """Seconds an attempt may take: `first_token`, `idle` or `whole`."""
        return float(getattr(self.config.timeouts, reason))

    def instances(self) -> dict[str, Instance]:
        """All instances by name."""
        return {instance.name: instance for instance in everyone(self.pools.values())}

    async def _sweep(self) -> None:
        """End attempts that took too long; let those who wait look again when a break is over.

        One look at all of them now and then costs less than a timer for each chunk.
        """
        while True:
            await asyncio.sleep(SWEEP)
            self._end_late(self.time())
            self.client.sweep()
            self._wake(self.time())

    def _end_late(self, now: float) -> None:
        for exchange in [e for e in self.live if e.deadline < now]:
            exchange.expire(exchange.timeout_reason)

    def _wake(self, now: float) -> None:
        for pool in self.pools.values():
            if pool.waiting:
                for _ in range(sum(i.free(now) for i in pool.instances)):
                    pool.wake()


def _pool(name: str, wanted: PoolConfig, config: Config) -> Pool:
    pool = Pool(name, wanted.backend, wanted.model, wanted.max_outstanding, config.queue.length)
    pool.instances = [Instance(one.name, one.url, pool) for one in wanted.instances]
    return pool


def _headers(pool: PoolConfig) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if pool.key_file:
        try:
            key = Path(pool.key_file).read_text("ascii").strip()
        except OSError as error:
            raise ConfigError(f"{pool.key_file}: {(error.strerror or '').lower()}") from None
        except UnicodeDecodeError:
            key = ""
        if not key.isprintable() or not key:
            raise ConfigError(f"{pool.key_file}: a key is one line of ASCII")
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _tls(pool: PoolConfig) -> ssl.SSLContext | None:
    if not pool.ca_file:
        return None
    try:
        return ssl.create_default_context(cafile=pool.ca_file)
    except OSError as error:
        raise ConfigError(f"{pool.ca_file}: {(error.strerror or str(error)).lower()}") from None
