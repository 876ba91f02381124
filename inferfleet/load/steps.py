"""Many requests at once: step after step, and where there are two targets, in turns.

Each client asks again as soon as it is answered (a closed loop), so `concurrency` requests are
always open. A round has a warm-up of one short answer for each client, which is left out.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import uvloop

from inferfleet.load.client import Client
from inferfleet.load.statistics import Round
from inferfleet.load.target import Target
from inferfleet.load.workload import Method, Prompts, Workload

_WARM = 2  # tokens of a warm-up's answer
_TICK = 0.05  # seconds between looks at our own lateness
_PATIENCE = (0.05, 1.0)  # seconds a client waits after a failure, doubled each time up to the last


@dataclass(slots=True)
class Run:
    """What was measured; `interrupted` when the user ended it before its time."""

    targets: tuple[Target, ...]
    method: Method
    rounds: list[Round] = field(default_factory=list)
    interrupted: bool = False


Watch = Callable[[Round | None], None]  # is shown the round that runs, several times a second


def measure(targets: Sequence[Target], method: Method, watch: Watch) -> Run:
    """All rounds. Ctrl-C ends it with what there is. Raises Error when a target does not answer."""
    _allow_files(max(method.concurrency))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(targets, method, watch))


async def _measure(targets: Sequence[Target], method: Method, watch: Watch) -> Run:
    run = Run(tuple(targets), method)
    clients = [Client(target, method.timeout) for target in targets]
    try:
        await _prepare(run, clients)
        await _all(run, clients, watch)
    except asyncio.CancelledError:
        if not any(measured.samples for measured in run.rounds):
            raise
        run.interrupted = True
    finally:
        for client in clients:
            await client.close()
    return run


async def _prepare(run: Run, clients: Sequence[Client]) -> None:
    """Every target answers, and the prompts have their length by the first one's count."""
    for client in clients:
        await client.named()
    run.targets = tuple(client.target for client in clients)
    fitted = await _fitted(clients[0], run.method.workload)
    prompts = Prompts(fitted, _name())
    for client in clients:
        await client.probe(prompts, fitted)
    run.method = replace(run.method, workload=fitted)


async def _fitted(client: Client, wanted: Workload) -> Workload:
    """Two short prompts tell how many tokens a word has; a long one might not fit yet."""
    counts = []
    for part in (wanted.part(4), wanted.part(8)):
        sample = await client.probe(Prompts(part, _name()), part)
        counts.append((part.words, sample.prompt_tokens))
    return wanted.calibrated(*counts)


async def _all(run: Run, clients: Sequence[Client], watch: Watch) -> None:
    """Step by step; within a step A, B, A, B. A target that answers nothing more is left alone."""
    prompts = Prompts(run.method.workload, _name())
    silent: set[int] = set()
    for concurrency, _ in itertools.product(run.method.concurrency, range(run.method.repeats)):
        for number, client in enumerate(clients):
            if number in silent:
                continue
            measured = Round(number, concurrency)
            run.rounds.append(measured)
            await _Load(client, prompts, run.method, measured, watch).run()
            if not measured.answered:
                silent.add(number)


@dataclass(slots=True)
class _Load:
    """One round as it runs."""

    client: Client
    prompts: Prompts
    method: Method
    measured: Round
    watch: Watch

    async def run(self) -> None:
        await self._warm()
        measured, cpu = self.measured, time.process_time()
        watcher = asyncio.create_task(self._watch())
        measured.begun = time.perf_counter()
        try:
            await self._ask_all()
            measured.whole = True
        finally:
            watcher.cancel()
            ended = time.perf_counter()
            by_time = measured.whole and not self.method.requests
            measured.until = measured.begun + self.method.seconds if by_time else ended
            measured.cpu = (time.process_time() - cpu) / max(ended - measured.begun, 1e-9)
            self.watch(None)

    async def _warm(self) -> None:
        """Connections are opened and a shared beginning is cached before the clock starts."""
        bodies = [
            self.client.body(self.prompts, self.method.workload, _WARM)
            for _ in range(self.measured.concurrency)
        ]
        await asyncio.gather(*map(self.client.ask, bodies))

    async def _ask_all(self) -> None:
        turns = self._turns()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.measured.concurrency):
                group.create_task(self._ask(turns))

    def _turns(self) -> Iterator[None]:
        """As many as may begin, shared by all clients."""
        if self.method.requests:
            yield from itertools.repeat(None, self.method.requests)
            return
        end = self.measured.begun + self.method.seconds
        while time.perf_counter() < end:
            yield None

    async def _ask(self, turns: Iterator[None]) -> None:
        failures = 0
        for _ in turns:
            sample = await self.client.ask(self.client.body(self.prompts, self.method.workload))
            self.measured.samples.append(sample)
            failures = failures + 1 if sample.error else 0
            if failures:  # one that refuses at once is not hammered
                await asyncio.sleep(self._pause(failures))

    def _pause(self, failures: int) -> float:
        first, most = _PATIENCE
        wanted = min(most, first * 2.0 ** min(failures - 1, 10))
        if self.method.requests:
            return wanted
        left = self.measured.begun + self.method.seconds - time.perf_counter()
        return float(max(0.0, min(wanted, left)))

    async def _watch(self) -> None:
        """How late our own timers come says whether we could keep up."""
        for tick in itertools.count():
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            self.measured.lags.append(time.perf_counter() - due)
            if not tick % 10:
                self.watch(self.measured)


def _allow_files(count: int) -> None:
    """Every connection is an open file, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _name() -> str:
    """Sets the prompts of this run apart from those of others, which a cache may still hold."""
    return secrets.token_hex(4)
