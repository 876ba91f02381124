"""A worker process: one event loop that serves clients, and operators on a private address."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from inferfleet.gateway.app import App
from inferfleet.gateway.config import Config, load
from inferfleet.gateway.core import Core
from inferfleet.gateway.fronts.models import Names
from inferfleet.gateway.health import Watch
from inferfleet.gateway.keys import Keys
from inferfleet.gateway.limits import Limits
from inferfleet.gateway.log import RequestLog
from inferfleet.gateway.metrics import Metrics
from inferfleet.gateway.pages import pages, served
from inferfleet.gateway.private import private
from inferfleet.gateway.protocol import Protocol
from inferfleet.gateway.shadow import Shadows
from inferfleet.gateway.tracing import Tracer

LOG = logging.getLogger("inferfleet.gateway")
REFRESH = 1.0  # seconds between looks at the keys file
SAVE = 5.0  # seconds between writes of the day's tokens
KEEPALIVE = 75  # seconds; longer than balancers keep idle connections
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Server(uvicorn.Server):
    """Uvicorn without its signal handlers: the worker has its own, for two servers at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Worker:
    """Everything one worker has; `run` returns when it has drained."""

    def __init__(self, config: Config, slot: int) -> None:
        self.config = config
        self.log = RequestLog(config.log)
        metrics = Metrics(config.models, lambda: self.log.dropped)
        self.core = Core(config, metrics)
        self.keys = Keys(Path(config.keys) if config.keys else None)
        self.limits = Limits(config.workers)
        self.state = Path(config.state) if config.state else None
        self.tokens = self.state / f"tokens-{slot}.json" if self.state else None
        self.weights = self.state / "weights.json" if self.state else None
        self.weighed_at = 0
        models = served(config)
        names = Names(models)
        self.shadows = Shadows(self.core, config)
        self.tracer = Tracer(**config.tracing) if config.tracing else None
        self.app = App(
            self.core,
            self.keys,
            self.limits,
            self.log,
            names,
            pages(self, models, names),
            self.shadows,
            self.tracer,
        )
        self.public = server(self.app)
        self.private = server(private(self))
        self.stopping = asyncio.Event()
        self.parent = 0  # the supervisor to tell of orders that concern all workers

    async def run(self, public: socket.socket, private: socket.socket, ready: int | None) -> None:
        """Serve on these sockets until told to stop, then let requests end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGUSR1, self.log.reopen)
        loop.add_signal_handler(signal.SIGUSR2, self.leave)
        await self.core.open()
        if self.tokens:
            self.limits.load(self.tokens, time.time())
        servers = [
            loop.create_task(self.public.serve(sockets=[public])),
            loop.create_task(self.private.serve(sockets=[private])),
        ]
        tasks = [loop.create_task(self._tend()), *self._watches(loop)]
        await self._started()
        spare()
        if ready is not None:
            os.write(ready, b"1")
            os.close(ready)
        stop = loop.create_task(self.stopping.wait())
        await asyncio.wait([stop, *servers], return_when=asyncio.FIRST_COMPLETED)
        await self._drain(servers)
        for task in tasks:
            task.cancel()
        await self.core.close()
        self._save()
        self.log.close()
        if self.tracer:
            self.tracer.close()

    def drain(self) -> None:
        """Let all workers take no new connections."""
        self.leave()
        if self.parent:
            os.kill(self.parent, signal.SIGUSR2)

    def leave(self) -> None:
        """Take no new connections; requests under way end, and the private side stays."""
        self.core.draining = True
        for listener in self.public.servers:
            listener.close()
        for connection in tuple(self.public.server_state.connections):
            connection.shutdown()

    async def _started(self) -> None:
        while not (self.public.started and self.private.started):
            await asyncio.sleep(0.01)

    async def _drain(self, servers: list[asyncio.Task[None]]) -> None:
        """No new connections; what came on the others may end, up to the configured time."""
        self.public.should_exit = self.private.should_exit = True
        _, left = await asyncio.wait(servers, timeout=self.config.drain_timeout)
        for exchange in tuple(self.core.live):
            exchange.expire("drained")
        if left:
            await asyncio.wait(left, timeout=1)

    def _watches(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[None]]:
        embedding = {p for m in self.config.models.values() if m.embeddings for p in m.pools}
        return [
            loop.create_task(Watch(self.core, instance, instance.pool.name in embedding).run())
            for instance in self.core.instances().values()
        ]

    def keep_weights(self) -> None:
        """Write down weights that are not the configured ones, for all workers of this host."""
        if self.weights:
            set_by_hand = {
                name: route.weights
                for name, route in self.core.routes.items()
                if route.weights != self.config.models[name].pools
            }
            replace(self.weights, msgspec.json.encode(set_by_hand))
            self.weighed_at = modified(self.weights)

    def follow_weights(self) -> None:
        """Take over weights that were set by hand, here before a restart or by another worker."""
        if not self.weights or (now := modified(self.weights)) == self.weighed_at:
            return
        self.weighed_at = now
        try:
            found = msgspec.json.decode(self.weights.read_bytes(), type=dict[str, dict[str, float]])
        except (OSError, msgspec.DecodeError) as error:
            LOG.error("%s: %s; the weights stay as they are", self.weights, error)
            return
        for name, route in self.core.routes.items():
            weights = found.get(name, self.config.models[name].pools)
            if weights.keys() <= route.pools.keys():
                route.weigh(dict(weights))
        if any(found.get(name) == model.pools for name, model in self.config.models.items()):
            self.keep_weights()  # the configuration says the same by now, and decides from here on

    async def _tend(self) -> None:
        """Keys and weights that changed, tokens to write down."""
        saved = 0.0
        while True:
            self.follow_weights()
            await asyncio.sleep(REFRESH)
            self.keys.refresh()
            if (now := self.core.time()) - saved >= SAVE:
                saved = now
                self._save()

    def _save(self) -> None:
        if self.tokens:
            try:
                self.limits.save(self.tokens, time.time())
            except OSError as error:
                LOG.error("%s: %s", self.tokens, (error.strerror or str(error)).lower())


def modified(path: Path) -> int:
    """When a file changed last, in ns; 0 when there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def replace(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all."""
    new = path.with_suffix(f".{os.getpid()}")
    new.write_bytes(content)
    new.replace(path)


def server(app: Any) -> Server:
    """Uvicorn with all it does by itself switched off."""
    return Server(
        uvicorn.Config(
            app,
            loop="none",
            http=Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEPALIVE,
        )
    )


def spare() -> None:
    """Collect rarely: what lives until now lives on, and requests leave few cycles behind."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def keep_memory() -> None:
    """Let malloc reuse the memory of large bodies instead of mapping it anew for each."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return
    mallopt(M_MMAP_THRESHOLD, 64 << 20)
    mallopt(M_TRIM_THRESHOLD, 32 << 20)


def end_with_parent() -> None:
    """Drain when the supervisor is killed, instead of serving for ever unknown to anybody."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(path: str, slot: int, public: int, private: int, ready: int | None) -> None:
    """The worker in this process, on inherited sockets."""
    import uvloop

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # strangers' mistakes fill no log
    keep_memory()
    end_with_parent()
    worker = Worker(load(Path(path)), slot)
    worker.parent = os.getppid()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(worker.run(socket.socket(fileno=public), socket.socket(fileno=private), ready))
