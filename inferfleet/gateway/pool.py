"""Instances, pools of them, and who gets the next request.

Nothing here waits for the network: an instance is told what happened and knows whether it may
be asked. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferfleet.gateway.relay import Exchange
    from inferfleet.gateway.request import Backend

FIRST_BREAK, LONGEST_BREAK = 1.0, 30.0  # seconds an instance is left alone after failures
HOPELESS = 3.0  # seconds a request waits where probes say that nobody lives
SLACK = 2  # requests that the instance which knows a prefix may have more than the least busy


Place = asyncio.Future[None]  # of one that waits, in the queues of all pools it may be sent to


class QueueFull(Exception):
    """So many wait already that one more would wait in vain."""


class Instance:
    """One engine process as seen from here."""

    __slots__ = (
        "asked_again_at",
        "down",
        "draining",
        "exchanges",
        "failures",
        "last_byte",
        "last_success",
        "name",
        "outstanding",
        "pause",
        "pool",
        "salt",
        "url",
    )

    def __init__(self, name: str, url: str, pool: Pool) -> None:
        self.name, self.url, self.pool = name, url.rstrip("/"), pool
        self.salt = zlib.crc32(name.encode())
        self.outstanding = 0
        self.exchanges: set[Exchange] = set()
        self.failures = 0  # in a row
        self.pause = FIRST_BREAK
        self.asked_again_at = 0.0  # the circuit: open until then
        self.down = ""  # why it is left out until a probe succeeds: "probe", "hung"
        self.draining = False
        self.last_byte = self.last_success = 0.0

    def usable(self, now: float) -> bool:
        """Whether it may be asked at all."""
        return not self.down and not self.draining and now >= self.asked_again_at

    def free(self, now: float) -> bool:
        """Whether it may be asked and has a place."""
        return self.outstanding < self.pool.max_outstanding and self.usable(now)

    def succeeded(self, now: float) -> None:
        """It made tokens: whatever was counted against it is over."""
        self.last_success = self.last_byte = now
        if self.failures or self.down:
            self.failures, self.pause, self.asked_again_at, self.down = 0, FIRST_BREAK, 0.0, ""
            self.pool.wake()

    def failed(self, now: float, allowed: int) -> bool:
        """One more failure; True when it is left alone from now on, for ever longer breaks."""
        self.failures += 1
        if self.failures < allowed or now < self.asked_again_at:
            return False
        self.asked_again_at = now + self.pause
        self.pause = min(self.pause * 2, LONGEST_BREAK)
        return True

    def eject(self, why: str) -> None:
        """Leave it out until a probe succeeds; requests that have got nothing yet go elsewhere."""
        self.down = why
        for exchange in tuple(self.exchanges):
            exchange.expire("ejected")


class Pool:
    """Instances that answer alike, and the queue before them."""

    def __init__(
        self, name: str, backend: Backend, model: str, max_outstanding: int, queue: int
    ) -> None:
        self.name, self.backend, self.model = name, backend, model
        self.max_outstanding, self.length = max_outstanding, queue
        self.instances: list[Instance] = []
        self.waiting: deque[Place] = deque()

    def pick(self, affinity: int, now: float, tried: Collection[Instance]) -> Instance | None:
        """The free instance with the fewest open requests, or the one that knows the prefix.

        Rendezvous hashing: each prefix prefers one instance, the same one at every gateway, and
        losing an instance moves its prefixes only.
        """
        found = None
        for instance in self.instances:
            if (
                (found is None or instance.outstanding < found.outstanding)
                and instance.free(now)
                and instance not in tried
            ):
                found = instance
        if not affinity or found is None or len(self.instances) == 1:
            return found
        bound = found.outstanding + SLACK + found.outstanding // 4
        best = -1
        preferred = found
        for instance in self.instances:
            score = mixed(affinity ^ instance.salt)
            if score > best and instance not in tried and instance.usable(now):
                best, preferred = score, instance
        fits = preferred.outstanding <= bound and preferred.outstanding < self.max_outstanding
        return preferred if fits else found

    def wake(self) -> None:
        """Let the one that has waited longest look again."""
        while self.waiting:
            place = self.waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def hopeless(self) -> bool:
        """Whether every instance is known to be down, so that waiting is no use."""
        return all(instance.down or instance.draining for instance in self.instances)


class Route:
    """A model's pools by weight."""

    def __init__(self, model: str, pools: dict[str, Pool], weights: dict[str, float]) -> None:
        self.model, self.pools = model, pools
        self.weights: dict[str, float] = {}
        self.active: list[Pool] = []
        self.weigh(weights)

    def weigh(self, weights: dict[str, float]) -> None:
        """From now on, requests go to the pools by these weights."""
        self.weights = weights
        self.active = [self.pools[name] for name, weight in weights.items() if weight > 0]

    def queued(self) -> int:
        """How many requests wait before its pools, each counted once."""
        return len({place for pool in self.active for place in pool.waiting})

    def order(self) -> list[Pool]:
        """The pools to ask: one drawn by weight first, then the others by weight."""
        if len(self.active) == 1:
            return self.active
        draws = {pool: random.random() ** (1 / self.weights[pool.name]) for pool in self.active}  # noqa: S311
        return sorted(self.active, key=draws.__getitem__, reverse=True)

    async def take(self, affinity: int, tried: Collection[Instance], timeout: float) -> Instance:
        """A place at an instance, counted at once. QueueFull, or TimeoutError.

        `tried` are asked again only where no other can be: a reset may have been chance, and an
        engine that restarts comes back under requests that wait.
        """
        loop = asyncio.get_running_loop()
        pools = self.order()
        overtakes = pools[0].waiting and not tried
        if not overtakes and (found := free(pools, affinity, loop.time(), tried)):
            return found
        end = loop.time() + timeout
        while True:
            left = end - loop.time()
            hopeless = all(pool.hopeless() for pool in pools)
            await turn(pools, min(left, HOPELESS) if hopeless else left)
            if found := free(pools, affinity, loop.time(), tried):
                return found


async def turn(pools: Sequence[Pool], timeout: float) -> None:
    """Wait until a place in any pool may have become free; QueueFull or TimeoutError."""
    if len(pools[0].waiting) >= pools[0].length:
        raise QueueFull
    place = asyncio.get_running_loop().create_future()
    for pool in pools:
        pool.waiting.append(place)
    try:
        async with asyncio.timeout(timeout):
            await place
    except BaseException:
        if place.done() and not place.cancelled():
            for pool in pools:
                pool.wake()  # the turn was ours and we cannot use it
        raise
    finally:
        for pool in pools:
            if place in pool.waiting:
                pool.waiting.remove(place)


def free(
    pools: Collection[Pool], affinity: int, now: float, tried: Collection[Instance]
) -> Instance | None:
    """The place to take, in the first pool that has one; untried instances come first."""
    for avoided in (tried, ()) if tried else ((),):
        for pool in pools:
            if found := pool.pick(affinity, now, avoided):
                found.outstanding += 1
                return found
    return None


def give_back(instance: Instance) -> None:
    """The request is over: its place goes to the next."""
    instance.outstanding -= 1
    if instance.pool.waiting:
        instance.pool.wake()


def mixed(number: int) -> int:
    """A 32-bit number in which every bit depends on all of `number`'s (murmur3's finaliser)."""
    number = ((number ^ number >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ number >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ number >> 16


def everyone(pools: Collection[Pool]) -> Iterator[Instance]:
    """All instances of all pools."""
    for pool in pools:
        yield from pool.instances
