"""What is measured: each function gives figures by name for one peer in one round.

Times are in milliseconds. `direct` is the engine without a gateway; what a gateway adds is the
difference to it in the same round, which `added` works out.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.peers import KEY
from gateway.processes import Engine, Load, Running, load

SYSTEM = "You answer in one or two plain sentences and never repeat the question that was asked."
QUESTION = (
    "Why does a queue grow without bound when it is full, and what is the first sign of that?"
)
STREAMED = 1280  # milliseconds that a stream lasts: clients begin spread over them
NEVER = math.inf

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Target:
    """Where one peer listens; no process of its own for `direct`."""

    name: str
    port: int
    process: Running | None
    engine: Engine

    def load(self, wanted: Load) -> tuple[dict[str, Any], Figures]:
        """What the load generator found; CPU `used` (s) and `waited` for (% of both)."""
        if self.process is None:
            return load(self.port, KEY, wanted), {"used": 0.0, "waited": 0.0}
        spent, before = self.process.cpu(), self.process.waited()
        found = load(self.port, KEY, wanted)
        used, after = self.process.cpu() - spent, self.process.waited()
        waited = sum(then - before.get(thread, 0.0) for thread, then in after.items())
        return found, {"used": used, "waited": 100 * waited / max(1e-9, used + waited)}


def body(system: str = SYSTEM, question: str = QUESTION, stream: bool = False) -> bytes:
    """A chat completion as clients send it."""
    said = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    asked: dict[str, Any] = {"model": "bench", "messages": said, "max_tokens": 64}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


def bodies(folder: Path) -> dict[str, Path]:
    """The requests that the load generator sends, by name, as files."""
    long = " ".join(f"{QUESTION} {number}" for number in range(2**20 // (len(QUESTION) + 8) + 1))
    texts = {"small": body(), "stream": body(stream=True), "long": body(question=long[: 2**20])}
    for name, text in texts.items():
        (folder / f"{name}.json").write_bytes(text)
    return {name: folder / f"{name}.json" for name in texts}


def requests(target: Target, files: dict[str, Path], seconds: float) -> Figures:
    """Small plain answers: 32 clients, then one."""
    load(target.port, KEY, Load(files["small"], 32, min(1, seconds)))
    many, cpu = target.load(Load(files["small"], 32, seconds))
    one = load(target.port, KEY, Load(files["small"], 1, max(0.5, seconds / 2)))
    return {
        "requests_per_s": many["good"] / many["seconds"],
        "p50_ms": times(many, "whole", "p50"),
        "p99_ms": times(many, "whole", "p99"),
        "p50_alone_ms": times(one, "whole", "p50"),
        "cpu_us_per_request": 1e6 * cpu["used"] / max(1, many["good"]),
        "waited_percent": cpu["waited"],
        "failed": many["failed"] + one["failed"],
    }


def times(found: dict[str, Any], of: str, which: str) -> float:
    """Milliseconds; what never happened took forever."""
    return found[of][which] / 1000 if of in found else NEVER


def streams(target: Target, files: dict[str, Path], seconds: float, count: int) -> Figures:
    """So many streams at once, 64 chunks each, one every 20 ms."""
    found, cpu = target.load(Load(files["stream"], count, seconds, STREAMED))
    return {
        f"{name}_{count}": value
        for name, value in {
            "path_p50_ms": times(found, "path", "p50"),
            "path_p99_ms": times(found, "path", "p99"),
            "first_p50_ms": times(found, "first", "p50"),
            "first_p99_ms": times(found, "first", "p99"),
            "chunk_p50_ms": times(found, "every", "p50"),
            "chunk_p99_ms": times(found, "every", "p99"),
            "cpu_s_per_1000_chunks": 1000 * cpu["used"] / max(1, found["chunks"]),
            "waited_percent": cpu["waited"],
            "streams_failed": found["failed"],
            "streams_changed": found["differing"],
        }.items()
    }


def prompts(target: Target, files: dict[str, Path], seconds: float) -> Figures:
    """Prompts of 1 MiB, 8 clients."""
    found, cpu = target.load(Load(files["long"], 8, seconds))
    return {
        "mb_prompts_per_s": found["good"] / found["seconds"],
        "mb_cpu_ms": 1e3 * cpu["used"] / max(1, found["good"]),
        "waited_percent_mb": cpu["waited"],
        "mb_failed": found["failed"],
    }


def memory(target: Target) -> Figures:
    """MB of its largest process, after the load."""
    if not target.process:
        return {}
    now, most = target.process.memory()
    return {"resident_mb": now, "resident_most_mb": most}


def head(size: int) -> bytes:
    """The request's lines before its body."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {KEY}",
    )
    more = ("Content-Type: application/json", f"Content-Length: {size}")
    return "\r\n".join((*lines, *more, "", "")).encode()


def leave(target: Target, name: str, wait: int, stream: bool, events: int) -> float:
    """Milliseconds from a client's leaving, after so many events, to the engine's noticing it."""
    asked = body(f"[tell {name}] " + (f"[wait {wait}]" if wait else ""), stream=stream)
    with socket.create_connection(("127.0.0.1", target.port), 10) as client:
        client.sendall(head(len(asked)) + asked)
        if target.engine.told("got", name, 10) is None:
            return NEVER
        seen = b""
        while seen.count(b"data: ") < events:
            seen += client.recv(65536)
        time.sleep(0.05)  # it is well under way: what is measured is not how it begins
        left = time.monotonic_ns()
    noticed = target.engine.told("closed", name, 2)
    return NEVER if noticed is None else (noticed - left) / 1e6


def leaving(target: Target, times: int = 5) -> Figures:
    """The slowest of a few, for each moment at which a client can leave."""
    moments = {
        "left_before_first_ms": (2500, True, 0),
        "left_mid_stream_ms": (0, True, 3),
        "left_plain_ms": (2500, False, 0),
    }
    return {
        title: max(leave(target, f"{title}-{target.port}-{n}", *how) for n in range(times))
        for title, how in moments.items()
    }


def retries(port: int, bad: Engine, count: int = 200) -> Figures:
    """What a reset of the first engine costs a request, in the median and at most."""
    plain: list[float] = []
    retried: list[float] = []
    failed = 0
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for number in range(count):
        name = f"{port}-{number}"
        asked = body(f"[tell {name}]", f"{number} {QUESTION}")
        began = time.perf_counter()
        client.request("POST", "/v1/chat/completions", asked, headers)
        answer = client.getresponse()
        answer.read()
        took = 1000 * (time.perf_counter() - began)
        failed += answer.status != 200
        (plain if bad.told("reset", name, 0.002) is None else retried).append(took)
    client.close()
    if not retried or not plain:
        return {"retries": len(retried), "retry_failed": failed}
    usual = statistics.median(plain)
    return {
        "retries": len(retried),
        "retry_failed": failed,
        "retry_ms": statistics.median(retried) - usual,
        "retry_most_ms": max(retried) - usual,
    }


ADDED = {
    "added_ms": "p50_ms",
    "added_alone_ms": "p50_alone_ms",
    **{
        f"added_{kind}_{p}_ms_{count}": f"{kind}_{p}_ms_{count}"
        for kind in ("path", "first", "chunk")
        for p in ("p50", "p99")
        for count in (100, 500)
    },
}


def added(found: Figures, direct: Figures) -> Figures:
    """What it adds to `direct`, for all that both have."""
    return {
        name: max(0.0, found[of] - direct[of])
        for name, of in ADDED.items()
        if of in found and of in direct
    }
