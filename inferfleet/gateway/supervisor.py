"""The parent of the workers: holds the listening sockets, so that no reload refuses a client.

SIGHUP starts new workers from the files as they are now, and once these are ready lets the old
ones drain; when the new ones fail, the old ones stay. SIGTERM drains and ends. Workers that die
are started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path

from inferfleet.gateway.config import Config, ConfigError, address, load

LOG = logging.getLogger("inferfleet.gateway")
BACKLOG = 4096
# Clients that are cut off, or read nothing for so long, are gone. On Linux, connections inherit it.
UNREACHABLE = 120  # seconds
WATCHED = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 60),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 20),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", UNREACHABLE * 1000),
)
GONE = [(at, getattr(socket, name), to) for at, name, to in WATCHED if hasattr(socket, name)]
START = 60.0  # seconds a worker may take until it is ready
PAUSE = 1.0  # seconds before a worker that died is started again


@dataclass(eq=False)
class Child:
    """A worker process. Two of the same slot live while a reload lets the old one drain."""

    slot: int
    process: asyncio.subprocess.Process
    retired: bool = False
    ready: bool = False  # before, it would die of the signals that it will be told by


class Supervisor:
    """All workers of one gateway."""

    def __init__(self, path: Path, config: Config, state: Path | None) -> None:
        self.path, self.config, self.state = path, config, state
        self.public = listening(config.listen)
        self.privates: list[socket.socket] = []
        self.bind(config)
        self.children: set[Child] = set()
        self.generation = self.failures = 0
        self.drained = False
        self.stopping = asyncio.Event()
        self.changes = asyncio.Lock()
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Until SIGTERM; 1 when the first workers do not come up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stopping.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.keep(self.reload()))
        loop.add_signal_handler(signal.SIGUSR1, lambda: self.tell(signal.SIGUSR1))
        loop.add_signal_handler(signal.SIGUSR2, self.drain)
        async with self.changes:
            came_up = await self.replace()
        if not came_up:
            await self.retire(set(self.children))
            return 1
        notify("READY=1")
        await self.stopping.wait()
        notify("STOPPING=1")
        self.public.close()  # else the kernel goes on to take connections for nobody
        await self.retire(set(self.children))
        return 0

    async def reload(self) -> None:
        """New workers for old ones, if the configuration is good and they come up."""
        async with self.changes:
            notify("RELOADING=1")
            try:
                config = load(self.path)
                self.bind(config)
                if self.drained:
                    self.public, self.drained = listening(config.listen), False
            except ConfigError as error:
                LOG.error("%s; the configuration from before stays in force", error)
            else:
                if (config.listen, config.private) != (self.config.listen, self.config.private):
                    LOG.error("another address needs a restart; the old ones stay in use")
                self.config = config
                await self.replace()
            notify("READY=1")

    async def replace(self) -> bool:
        """Start a new set of workers; when all are ready, let the old ones drain."""
        old = set(self.children)
        started = await asyncio.gather(*(self.start(n) for n in range(self.config.workers)))
        new = {child for child in started if child}
        if len(new) < self.config.workers:
            LOG.error("new workers did not come up; the old ones go on")
            self.failures += 1
            self.publish()
            await self.retire(new)
            return False
        self.generation += 1
        self.keep(self.retire(old))
        self.publish()
        return True

    async def start(self, slot: int) -> Child | None:
        """One worker, ready to serve; None when it died or was too slow."""
        mine, its = os.pipe()
        public, private = self.public.fileno(), self.privates[slot].fileno()
        argv = [interpreter(), "-m", "inferfleet.gateway", "--config", str(self.path), "--worker"]
        argv += [f"{slot},{public},{private},{its}"]
        inherited = (public, private, its)
        try:
            process = await asyncio.create_subprocess_exec(*argv, pass_fds=inherited)
        except OSError as error:
            LOG.error("no worker can be started: %s", error)
            os.close(mine)
            return None
        finally:
            os.close(its)
        child = Child(slot, process)
        self.children.add(child)
        child.ready = ready = await first_byte(mine)
        if ready and self.drained:
            process.send_signal(signal.SIGUSR2)
        if not ready:
            child.retired = True
            if process.returncode is None:
                process.kill()  # it was given a minute, and nobody asks it yet
        self.keep(self.attend(child))
        return child if ready else None

    def bind(self, config: Config) -> None:
        """A private socket for each worker, on ports that follow each other; ConfigError."""
        host, port = address(config.private)
        for slot in range(len(self.privates), config.workers):
            number = port + slot if port else 0
            text = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
            self.privates.append(listening(text))

    async def attend(self, child: Child) -> None:
        """Start another when it dies by itself, until one comes up."""
        code = await child.process.wait()
        self.children.discard(child)
        if child.retired or self.drained or self.stopping.is_set():
            return
        LOG.error("worker %d ended by itself (%d); starting another", child.process.pid, code)
        while True:
            await asyncio.sleep(PAUSE)
            async with self.changes:
                if not self.lacks(child.slot) or await self.start(child.slot):
                    break
        self.publish()

    def lacks(self, slot: int) -> bool:
        """Whether a worker is wanted there; a reload may have started it meanwhile."""
        wanted = slot < self.config.workers and not self.drained and not self.stopping.is_set()
        return wanted and not any(c.slot == slot and not c.retired for c in self.children)

    async def retired(self, children: set[Child]) -> None:
        """Wait until workers that were told to drain have ended."""
        await asyncio.gather(*(child.process.wait() for child in children))

    def retire(self, children: set[Child]) -> Coroutine[None, None, None]:
        """Tell workers to drain, now; what comes back waits until they have ended."""
        for child in children:
            child.retired = True
            if child.process.returncode is None:
                child.process.terminate()
        return self.retired(children)

    def drain(self) -> None:
        """Close the port; what is under way ends. A reload opens it again."""
        self.drained = True
        self.public.close()
        self.tell(signal.SIGUSR2)

    def tell(self, number: signal.Signals) -> None:
        """Pass a signal on to all workers: reopen logs, or take no new connections."""
        for child in [one for one in self.children if one.ready]:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)

    def keep(self, work: Coroutine[None, None, None]) -> None:
        """Run it beside; a task that nobody holds may vanish."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def publish(self) -> None:
        """Say for `--reload` which generation of workers serves."""
        if self.state:
            pids = [child.process.pid for child in self.children if not child.retired]
            new = self.state.with_suffix(".new")
            told = {"generation": self.generation, "failures": self.failures, "workers": pids}
            new.write_text(json.dumps(told))
            new.replace(self.state)


def interpreter() -> str:
    """This Python where it lies now: a link to the environment may point elsewhere tomorrow."""
    found = Path(sys.executable)
    return str(found.parent.resolve() / found.name)


def listening(text: str) -> socket.socket:
    """A bound, listening socket; ConfigError when the address cannot be had."""
    host, port = address(text)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in GONE:
        found.setsockopt(*option)
    try:
        found.bind((host, port))
    except OSError as error:
        raise ConfigError(f"{text}: {(error.strerror or str(error)).lower()}") from None
    found.listen(BACKLOG)
    found.setblocking(False)
    return found


async def first_byte(pipe: int) -> bool:
    """Whether the other end says ready before it ends or time is over."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb")
    )
    try:
        async with asyncio.timeout(START):
            return bool(await reader.read(1))
    except TimeoutError:
        return False
    finally:
        transport.close()


def notify(text: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told:
        try:
            told.connect("\0" + where[1:] if where.startswith("@") else where)
            told.send(text.encode())
        except OSError as error:
            LOG.warning("systemd cannot be told '%s': %s", text, error)
