"""A gateway in this process, engines whose every answer a test decides, and clients for both."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvloop

from inferfleet.gateway.config import Config, problems
from inferfleet.gateway.worker import Worker

KEY = "sk-test"
Writer = asyncio.StreamWriter


@dataclass
class Asked:
    """One request as an engine saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_prompt(self) -> bool:
        """Whether a client asked it, not a probe."""
        return self.method == "POST" and b'"max_tokens":1,' not in self.body


class Leaving:
    """What a behaviour may wait for: the client gives up."""

    def __init__(self, watch: asyncio.Task[None]) -> None:
        self.watch = watch

    async def wait(self) -> None:
        await asyncio.wait([self.watch])


Behaviour = Callable[[Asked, Leaving, Writer], Awaitable[None]]


def event(text: str) -> bytes:
    """One chunk as vLLM writes it."""
    delta = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps({"id": "c", "object": "x", **delta}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "model": "served",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
}


def plain(status: int = 200, body: Any = ANSWER, wait: float = 0.0, **headers: str) -> Behaviour:
    """A whole answer."""

    async def behave(_asked: Asked, _leaving: Leaving, writer: Writer) -> None:
        await asyncio.sleep(wait)
        data = json.dumps(body).encode()
        lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in headers.items())
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{lines}"
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    return behave


def stream(
    *parts: bytes, gap: float = 0.0, first: float = 0.0, end: str = "whole", kind: str = "sse"
) -> Behaviour:
    """Parts of a stream, then a proper end, a reset ("cut") or silence ("hang")."""

    async def behave(_asked: Asked, leaving: Leaving, writer: Writer) -> None:
        await asyncio.sleep(first)
        mime = "text/event-stream" if kind == "sse" else "application/x-ndjson"
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {mime}\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        for part in parts:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
            await asyncio.sleep(gap)
        if end == "whole":
            writer.write(b"0\r\n\r\n")
        elif end == "cut":
            writer.transport.abort()
        else:
            await leaving.wait()

    return behave


async def reset(_asked: Asked, _leaving: Leaving, writer: Writer) -> None:
    """End the connection as a killed process does."""
    writer.transport.abort()


async def hang(_asked: Asked, leaving: Leaving, _writer: Writer) -> None:
    """Never answer."""
    await leaving.wait()


@dataclass
class Engine:
    """Answers as `behaviour` says; `gone` has the times at which clients left in the middle."""

    behaviour: Behaviour = field(default_factory=plain)
    metrics: str = ""
    seen: list[Asked] = field(default_factory=list)
    gone: list[float] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def prompts(self) -> list[Asked]:
        """What it was asked, without probes and pages."""
        return [asked for asked in self.seen if asked.is_prompt]

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and break those that stand, as a killed engine does."""
        if self._server:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                asked = await _read(reader)
                self.seen.append(asked)
                await self._answer(asked, reader, writer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader, writer: Writer) -> None:
        if asked.path == "/metrics":
            text = self.metrics.encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
            return
        watch = asyncio.create_task(self._watch(reader))
        counted = asked.is_prompt
        self.open += counted
        self.most_open = max(self.most_open, self.open)
        try:
            await self.behaviour(asked, Leaving(watch), writer)
        finally:
            self.open -= counted
            watch.cancel()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        while not reader.at_eof() and not reader.exception():
            await asyncio.sleep(0.002)
        self.gone.append(asyncio.get_running_loop().time())


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, body)


@dataclass
class Fleet:
    """A running gateway before its engines."""

    engines: list[Engine]
    worker: Worker
    port: int
    private: int
    client: httpx.AsyncClient
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def chat(self, stream: bool = False, **more: Any) -> httpx.Response:
        """One chat completion, read whole."""
        headers = more.pop("headers", {})
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
        if stream:
            body["stream"] = True
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def status(self) -> Any:
        answer = await self.client.get(f"http://127.0.0.1:{self.private}/status")
        return answer.json()

    async def metric(self, line: str) -> float:
        """The value of the series whose name and labels are `line`."""
        answer = await self.client.get(f"http://127.0.0.1:{self.private}/metrics")
        found = [text for text in answer.text.splitlines() if text.startswith(line + " ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def logged(self) -> list[dict[str, Any]]:
        """The lines of the request log that were written so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def settings(engines: list[Engine], folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration with one pool before all engines; `changes` replace its parts."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    keys = folder / "keys.json"
    if not keys.exists():
        keys.write_text(json.dumps({"keys": [{"name": "tester", "sha256": digest}]}))
        keys.chmod(0o600)
    instances = [
        {"name": f"e{at}", "url": f"http://127.0.0.1:{engine.port}"}
        for at, engine in enumerate(engines)
    ]
    pools = {"p": {"backend": "vllm", "model": "m", "instances": instances}}
    models = {"m": {"pools": {"p": 1}, "context_length": 32768, "tools": True}}
    defaults = {"pools": pools, "models": models, "keys": str(keys), "log": str(folder / "log")}
    health = {"interval": 60}  # tests that want probes say so
    return {"listen": "127.0.0.1:0", "health": health, **defaults, **changes}


@contextlib.asynccontextmanager
async def fleet(
    folder: Path,
    *behaviours: Behaviour,
    change: Callable[[dict[str, Any], list[Engine]], None] | None = None,
    **changes: Any,
) -> AsyncIterator[Fleet]:
    """A gateway with an engine for each behaviour; `change` edits the configuration."""
    engines = [Engine(behaviour) for behaviour in behaviours]
    for engine in engines:
        await engine.start()
    wanted = settings(engines, folder, **changes)
    if change:
        change(wanted, engines)
    config = msgspec.convert(wanted, Config)
    assert not problems(config)
    worker = Worker(config, 0)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [one.getsockname()[1] for one in sockets]
    mine, its = os.pipe()
    running = asyncio.create_task(worker.run(*sockets, its))
    with os.fdopen(mine, "rb") as pipe:
        await asyncio.get_running_loop().run_in_executor(None, pipe.read, 1)
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{ports[0]}",
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=20,
            limits=httpx.Limits(max_connections=None),
        ) as client:
            yield Fleet(engines, worker, ports[0], ports[1], client, folder / "log")
    finally:
        worker.stopping.set()
        await asyncio.wait_for(running, 5)
        for engine in engines:
            await engine.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine in the loop that the gateway uses."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 40))


async def until(happened: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.005)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Fails a test in which a task or the server ended by an exception that nobody expected."""
    yield caplog
    gc.collect()  # a task tells of its exception when it is thrown away
    bad = [one for one in caplog.get_records("call") if one.name in ("asyncio", "uvicorn.error")]
    assert not [one.getMessage() for one in bad if one.levelname == "ERROR"]
