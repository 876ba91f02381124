"""What happens to hosts, at random; one healthy engine and one gateway are always spared."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from inferfleet.lab import LabHost
from storm import site
from storm.site import GATEWAY, Engine, Site, said, wait

FAULTS = ("hang", "status=503", "reset", "slow-first-token=3")
LASTS = (2.0, 12.0)  # seconds
PAUSE = (0.3, 2.5)
SPARED = 10.0  # seconds until another engine is spared


@contextmanager
def killed(engine: Engine) -> Iterator[None]:
    """kill -9; its unit starts it again, however often."""
    said(engine.host, f"systemctl reset-failed; systemctl kill -s KILL {engine.unit}")
    yield
    wait(lambda: _active(engine), f"{engine.name} is up again", 30)


@contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """SIGSTOP: its connections stand and its kernel answers, but it does not."""
    said(engine.host, f"systemctl kill -s STOP {engine.unit}")
    yield
    said(engine.host, f"systemctl kill -s CONT {engine.unit}")


def faulty(name: str) -> Callable[[Engine], contextlib.AbstractContextManager[None]]:
    """A fault that the simulator plays."""

    @contextmanager
    def played(engine: Engine) -> Iterator[None]:
        engine.fault(name)
        yield
        engine.fault("")

    return played


def _active(engine: Engine) -> bool:
    return engine.host.exec(f"systemctl is-active {engine.unit}").returncode == 0


ILLS = {"kill -9": killed, "SIGSTOP": stopped, **{name: faulty(name) for name in FAULTS}}


@dataclass
class Storm:
    """Faults: `happened` counts them, `kills` has when a worker of which gateway died."""

    site: Site
    rng: random.Random
    happened: Counter[str] = field(default_factory=Counter)
    diary: list[tuple[float, str]] = field(default_factory=list)  # of time.monotonic
    kills: list[tuple[float, str]] = field(default_factory=list)
    troubled: LabHost | None = None  # the gateway that suffers now

    def __post_init__(self) -> None:
        self.spared = self.rng.choice(self.site.engines)
        self._tasks: list[asyncio.Task[None]] = []
        self._left: list[str] = []  # faults that have their turn before any comes again

    async def run(self, seconds: float) -> None:
        """Storm for so long, then let all recover."""
        end = time.monotonic() + seconds
        spared_at = time.monotonic()
        while time.monotonic() < end:
            if time.monotonic() - spared_at > SPARED and await self._spare_another():
                spared_at = time.monotonic()
            self._strike()
            await asyncio.sleep(self.rng.uniform(*PAUSE))
        await asyncio.gather(*self._tasks)

    async def _spare_another(self) -> bool:
        """Choose another engine to spare, one that all gateways hold for well."""
        found = await asyncio.gather(*(asyncio.to_thread(site.well, g) for g in self.site.gateways))
        fit = [e for e in self.site.engines if not e.ills and all(e.name in well for well in found)]
        others = [engine for engine in fit if engine is not self.spared]
        if others:
            self.spared = self.rng.choice(others)
        return bool(others)

    def _strike(self) -> None:
        chosen = self.rng.random()
        if chosen < 0.15:
            return self._strike_gateway()
        if chosen < 0.3:
            return self._strike_host()
        sound = [e for e in self.site.engines if not e.ills and e is not self.spared]
        if sound:
            self._left = self._left or self.rng.sample(list(ILLS), len(ILLS))
            name = self._left.pop()
            engine = self.rng.choice(sound)
            self._afflict([engine], name, ILLS[name](engine))
        return None

    def _strike_host(self) -> None:
        """Pull the cable of the host that has not the spared engine, whatever else it has."""
        host = next(e.host for e in self.site.engines if e.host.name != self.spared.host.name)
        engines = [e for e in self.site.engines if e.host.name == host.name]
        if not any("partition" in engine.ills for engine in engines):
            self._afflict(engines, "partition", _cut_off(host))

    def _strike_gateway(self) -> None:
        if self.troubled:
            return
        self.troubled = self.rng.choice(self.site.gateways)
        kill = self.rng.random() < 0.5
        self._begin(self._replace(self.troubled, kill=kill))

    def _note(self, name: str, where: str) -> None:
        self.happened[name] += 1
        self.diary.append((time.monotonic(), f"{name}: {where}"))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    def _afflict(
        self, engines: list[Engine], name: str, fault: contextlib.AbstractContextManager[None]
    ) -> None:
        for engine in engines:
            engine.ills.add(name)
        self._begin(self._suffer(engines, name, fault))

    async def _suffer(
        self, engines: list[Engine], name: str, fault: contextlib.AbstractContextManager[None]
    ) -> None:
        seconds = self.rng.uniform(*LASTS)
        await asyncio.to_thread(fault.__enter__)
        self._note(name, ", ".join(engine.name for engine in engines))
        await asyncio.sleep(seconds)
        await asyncio.to_thread(fault.__exit__, None, None, None)
        self.diary.append((time.monotonic(), f"{name} is over"))
        for engine in engines:
            engine.ills.remove(name)

    async def _replace(self, gateway: LabHost, *, kill: bool) -> None:
        """Kill a gateway's worker, or reload it; wait until others serve."""
        before = await asyncio.to_thread(site.workers, gateway)
        self._note("gateway worker kill -9" if kill else "gateway reload", gateway.name)
        if kill:
            self.kills.append((time.monotonic(), gateway.name))
            await asyncio.to_thread(said, gateway, f"kill -9 {before[0]}")
        else:
            await asyncio.to_thread(said, gateway, f"systemctl reload {GATEWAY}")
        await asyncio.to_thread(wait, lambda: _replaced(gateway, before), "another worker", 60)
        await asyncio.sleep(3)  # the balancer leaves one alone for 2 s that broke off
        self.troubled = None


def _replaced(gateway: LabHost, before: list[int]) -> bool:
    return site.workers(gateway) != before and site.told(gateway, "/ready")[0] == 200


@contextmanager
def _cut_off(host: LabHost) -> Iterator[None]:
    host.partition()
    yield
    host.heal()
