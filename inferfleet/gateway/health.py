"""Watching instances: real tokens at a gentle rate, and whether running requests move.

/health of an engine stays 200 while it hangs, so a page that answers proves nothing here.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from inferfleet.gateway import backends

if TYPE_CHECKING:
    from inferfleet.gateway.backends import Load
    from inferfleet.gateway.core import Core
    from inferfleet.gateway.metrics import Ejected
    from inferfleet.gateway.pool import Instance

RETURN = 2.0  # seconds between probes of an instance that is left out
TROUBLE = (OSError, TimeoutError)


class Watch:
    """Looks after one instance for as long as the worker runs."""

    def __init__(self, core: Core, instance: Instance, embeddings: bool) -> None:
        self.core, self.instance, self.embeddings = core, instance, embeddings
        self.rules = core.config.health
        self.failures = 0  # of probes, in a row
        self.load: Load | None = None
        self.moved_at = 0.0  # when its token counter last moved, or it had nothing to do

    async def run(self) -> None:
        """Look now and then; never at the same moment as all other watches."""
        self.moved_at = self.core.time()
        await asyncio.sleep(random.random() * min(1.0, self.rules.interval))  # noqa: S311
        while True:
            await self.look()
            left_out = self.instance.down or self.instance.failures
            interval = min(RETURN, self.rules.interval) if left_out else self.rules.interval
            await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311

    async def look(self) -> None:
        """One look: at its load, and where that proves nothing, a probe with a real token."""
        since = self.core.time()
        instance = self.instance
        moving = await self._moving(since)
        if not instance.down:
            if moving is False:  # perhaps a long prompt: a probe would only wait behind it
                if since - self.moved_at >= self.rules.hung_after:
                    self._eject("hung")
                return
            fresh = since - instance.last_success < self.rules.interval
            if moving or (fresh and not instance.failures):
                self.failures = 0
                return
        if await self._probe():
            self.failures = 0
            self.moved_at = self.core.time()
            instance.succeeded(self.moved_at)
        elif instance.last_byte < since and not await self._moving(self.core.time()):
            self.failures += 1
            if self.failures >= self.rules.failures and not instance.down:
                self._eject("probe")

    def _eject(self, why: Ejected) -> None:
        self.instance.eject(why)
        self.core.ejected(self.instance, why)

    async def _moving(self, now: float) -> bool | None:
        """Whether requests that run make progress; None: none run, or nobody can tell."""
        before, self.load = self.load, await self._read_load()
        if self.instance.last_byte >= self.moved_at and self.instance.outstanding:
            self.moved_at = max(self.moved_at, self.instance.last_byte)
        if self.load is None:
            return None
        if not self.load.running:
            self.moved_at = now
            return None
        if before is None or before.tokens != self.load.tokens:
            self.moved_at = now
            return True if before is not None else None
        return False

    async def _read_load(self) -> Load | None:
        kind = self.instance.pool.backend
        if kind not in backends.METERED:
            return None
        try:
            status, text = await self.core.get(self.instance, "/metrics", self.rules.timeout)
        except TROUBLE:
            return None
        return backends.parse_load(kind, text.decode("utf-8", "replace")) if status == 200 else None

    async def _probe(self) -> bool:
        """Whether it makes a token now."""
        pool = self.instance.pool
        call = backends.probe(pool.backend, pool.model, self.embeddings)
        try:
            async with asyncio.timeout(self.rules.timeout):
                answer = await self.core.post(self.instance, call.path, call.body, {})
                try:
                    return answer.status == 200 and backends.proves(await answer.whole())
                finally:
                    answer.close()
        except TROUBLE:
            return False
