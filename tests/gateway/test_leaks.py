"""Thousands of requests that end in every way there is: nothing of them may be left.

Every client that stays gets an answer that is whole, cut with an event that says so, or an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from relaykit import (
    DONE,
    KEY,
    Asked,
    Behaviour,
    Engine,
    Fleet,
    Leaving,
    Writer,
    event,
    fleet,
    hang,
    plain,
    reset,
    stream,
    until,
)

from inferfleet.gateway import pool, relay, upstream
from inferfleet.gateway.relay import Exchange
from inferfleet.gateway.upstream import Answer, Connection

EVENTS = [event(f"word {number} ") for number in range(6)]
LARGE = event("x" * 150_000)
ERROR = {"error": {"message": "no", "type": "server_error"}}
FATES: dict[str, tuple[Behaviour, Behaviour]] = {  # plain, streamed
    "answered": (plain(), stream(*EVENTS, DONE)),
    "large": (plain(body={"text": "x" * 300_000}), stream(LARGE, LARGE, DONE)),
    "slow": (plain(wait=0.02), stream(*EVENTS, DONE, first=0.02, gap=0.002)),
    "refused": (plain(400, ERROR), plain(400, ERROR)),
    "busy": (plain(503, ERROR), plain(503, ERROR)),
    "broken": (plain(500, ERROR), plain(500, ERROR)),
    "reset": (reset, reset),
    "hangs": (hang, hang),
    "cut": (stream(*EVENTS, end="cut"), stream(*EVENTS[:3], EVENTS[3][:9], end="cut")),
    "empty": (stream(end="cut"), stream()),
    "early": (plain(), stream(*EVENTS[:2])),
    "silent": (stream(*EVENTS, end="hang"), stream(*EVENTS[:2], end="hang")),
}
NOTHING = ("live", "exchanges", "answers", "connections", "waiting", "outstanding", "running")
PATIENT = {"connect": 1, "first_token": 0.2, "idle": 0.2, "whole": 0.2}


@dataclass(frozen=True)
class Wish:
    """What a client asks, what its attempts meet in turn, and after how many bytes it leaves."""

    streamed: bool
    fates: tuple[str, ...]
    leaves: int | None = None
    reads: bool = True


WISHES = st.builds(
    Wish,
    streamed=st.booleans(),
    fates=st.lists(st.sampled_from(sorted(FATES)), min_size=1, max_size=5).map(tuple),
    leaves=st.none() | st.none() | st.sampled_from([0, 1, 400]),
    reads=st.sampled_from([True, True, True, False]),
)


@dataclass
class Fated:
    """An engine's behaviour that a request brings along, for each of its attempts."""

    met: Counter[str] = field(default_factory=Counter)

    async def __call__(self, asked: Asked, leaving: Leaving, writer: Writer) -> None:
        body = asked.json
        fates = body.get("fates", ["answered"])  # a probe has none
        number = asked.headers.get("x-request-id", "")
        fate = fates[min(self.met[number], len(fates) - 1)]
        self.met[number] += 1
        await FATES[fate][body.get("stream", False)](asked, leaving, writer)


@dataclass
class House:
    """One gateway for all examples, so that what each leaves behind adds up."""

    runner: asyncio.Runner
    fleet: Fleet
    fated: Fated
    start: dict[str, int]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["max_outstanding"] = 4
        settings["queue"] = {"length": 12, "timeout": 0.5}
        settings["timeouts"] = PATIENT
        gone = {"name": "gone", "url": "http://127.0.0.1:9"}
        settings["pools"]["p"]["instances"].append(gone)

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(pool, "FIRST_BREAK", 0.01)
        patch.setattr(pool, "LONGEST_BREAK", 0.02)
        patch.setattr(relay, "PAUSE", 0.01)
        patch.setattr(upstream, "KEEPALIVE", 0.1)
        patch.setattr(logging.getLogger("inferfleet.gateway"), "disabled", True)  # pytest keeps all
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        fated = Fated()
        folder = tmp_path_factory.mktemp("leaks")
        running = fleet(folder, fated, fated, fated, change=change)
        found = runner.run(running.__aenter__())
        stack.callback(lambda: runner.run(running.__aexit__(None, None, None)))
        house = House(runner, found, fated, {})
        runner.run(storm(house, [Wish(False, ("answered",))]))
        runner.run(until(lambda: not left(found)["connections"]))
        house.start = runner.run(counted(found))
        assert not any(house.start[what] for what in NOTHING)
        yield house


async def storm(house: House, wishes: list[Wish]) -> list[bytes | None]:
    """All wishes at once; the answers of those that stayed."""
    found = await asyncio.gather(*(granted(house.fleet, wish) for wish in wishes))
    house.fated.met.clear()
    for engine in house.fleet.engines:
        engine.seen.clear()
        engine.gone.clear()
    return found


async def granted(found: Fleet, wish: Wish) -> bytes | None:
    """The bytes that came until the gateway had said all; None for those that did not stay."""
    reader, writer = await asyncio.open_connection("127.0.0.1", found.port, limit=1 << 20)
    asked = {"model": "m", "messages": [], "stream": wish.streamed, "fates": wish.fates}
    body = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        if wish.leaves is not None:
            await reader.read(wish.leaves)
            writer.transport.abort()
            return None
        if not wish.reads:  # a client that stalls, with the buffers in between full or not
            writer.transport.pause_reading()
            await asyncio.sleep(0.05)
            writer.transport.resume_reading()
        async with asyncio.timeout(15):
            return await reader.read(-1)
    finally:
        writer.close()


def left(found: Fleet) -> dict[str, int]:
    """What there is of everything that a request or a probe needs."""
    gc.collect()  # a connection and its parser know each other
    core = found.worker.core
    return {
        "live": len(core.live),
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "exchanges": alive(Exchange),
        "answers": alive(Answer),
        "connections": alive(Connection),
        "waiting": sum(len(pool.waiting) for pool in core.pools.values()),
        "outstanding": sum(i.outstanding for i in core.instances().values()),
        "held": sum(len(i.exchanges) for i in core.instances().values()),
        "running": sum(use["running"] for use in found.worker.limits.usage(0).values()),
        "kept by clients": len(found.worker.public.server_state.connections),
        "open at engines": sum(engine.open for engine in found.engines),
    }


async def counted(found: Fleet) -> dict[str, int]:
    return left(found)


async def still(found: Fleet, wanted: dict[str, int]) -> dict[str, int]:
    """What is left when it is as `wanted`, or 5 s later."""
    loop = asyncio.get_running_loop()
    end = loop.time() + 5
    while (now := left(found)) != wanted and loop.time() < end:
        await asyncio.sleep(0.02)
    return now


def alive(kind: type) -> int:
    return sum(isinstance(each, kind) for each in gc.get_objects())


def judged(answer: bytes) -> str:
    """How an answer ended; fails for one that ended in silence."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    if b"chunked" not in head:
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert len(body) == length
        assert (status == 200) != (b'"error"' in body)
        return str(status)
    assert body.endswith(b"0\r\n\r\n"), "the stream ended in silence"
    return "whole" if b"[DONE]" in body else "cut" if b'"stream_cut"' in body else "wrong"


@settings(
    max_examples=80,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # what leaks never shrinks
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(WISHES, min_size=1, max_size=40))
def test_nothing_is_left_of_requests_however_they_end(house: House, wishes: list[Wish]) -> None:
    answers = house.runner.run(storm(house, wishes))
    ends = Counter(judged(answer) for answer in answers if answer is not None)
    assert not ends["wrong"]
    assert set(ends) <= {"200", "400", "429", "500", "503", "504", "whole", "cut"}
    assert house.runner.run(still(house.fleet, house.start)) == house.start


def test_thousands_of_requests_leave_no_memory_behind(house: House) -> None:
    wishes = [Wish(at % 2 == 0, ("answered",)) for at in range(12)]
    wishes += [Wish(True, ("reset", "cut")), Wish(False, ("reset",)), Wish(True, ("slow",), 1)]

    def after(rounds: int) -> int:
        for _ in range(rounds):
            house.runner.run(storm(house, wishes))
        house.runner.run(still(house.fleet, house.start))
        return len(gc.get_objects())

    before = after(20)
    assert after(150) - before < 200  # of 2,250 requests: one object of every tenth would show
