"""One client's request on its way to an instance, and the answer's way back.

Until the client has got its first byte, another instance may be asked; after it, never: what
the client has cannot be taken back, so a stream that breaks ends with an error event.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from inferfleet.gateway import backends
from inferfleet.gateway.pool import Instance, QueueFull, Route, give_back
from inferfleet.gateway.upstream import Answer, BrokenOff, ConnectFailed

if TYPE_CHECKING:
    from starlette.types import Send

    from inferfleet.gateway.core import Core
    from inferfleet.gateway.request import Call, Request

ATTEMPTS = 4  # of which an engine saw the request: one that kills engines must stop somewhere
PAUSE = 0.1  # seconds before instances are asked again that have all failed
BUSY = frozenset({429, 503})
BROKEN = frozenset({500, 502, 504})
FOREVER = float("inf")
LONGEST_EVENT = 1 << 20  # bytes held back while an event is incomplete
LONGEST_ERROR = 1 << 20  # bytes of an answer that is no 200
SHORT, LAST_EVENTS = 256, 4096  # bytes
LINES = b"application/x-ndjson"
STREAMS = (b"text/event-stream", LINES)
NO_BUFFERING = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Retry(Exception):
    """Nothing was sent to the client yet, so another instance may be asked."""

    def __init__(self, why: str, seen: int, answer: tuple[int, bytes, bytes] | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.seen = seen  # how much of ATTEMPTS this was; 0: no engine saw the request
        self.answer = answer  # status, body in the client's format, Retry-After


class Exchange:
    """The state of one request. The sweeper looks at `deadline`; who ends it says why."""

    __slots__ = (
        "attempts",
        "began",
        "broken_off",
        "bytes_out",
        "core",
        "deadline",
        "error",
        "events",
        "finished",
        "first_byte",
        "headers",
        "instance",
        "queued",
        "reason",
        "request",
        "rest",
        "route",
        "send",
        "sent",
        "started",
        "status",
        "tail",
        "task",
        "timeout_reason",
    )

    def __init__(
        self, core: Core, request: Request, route: Route, send: Send, sent: dict[str, str]
    ) -> None:
        """`sent` are headers for the engine, its X-Request-Id among them."""
        self.core, self.request, self.route, self.send = core, request, route, send
        self.sent = sent
        self.headers = [(b"x-request-id", sent["X-Request-Id"].encode())]  # for the client
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self.started = core.time()
        self.deadline = FOREVER
        self.timeout_reason = self.reason = ""  # why it was ended from outside
        self.error = ""  # a code for the log
        self.instance: Instance | None = None
        self.attempts = self.status = self.bytes_out = self.events = 0
        self.began = self.finished = False  # the first byte was sent, the last one
        self.broken_off = False
        self.queued = self.first_byte = 0.0  # seconds
        self.rest = b""  # of an event that has not come whole yet
        self.tail = b""  # what came last: engines tell the usage there

    def expire(self, reason: str) -> None:
        """End the attempt under way; what that means for the client depends on how far it is."""
        if not self.reason and not self.finished and not (reason == "ejected" and self.began):
            self.reason = reason
            self.task.cancel()

    def leave(self, _watch: object = None) -> None:
        """The client is gone: the engine's work for it ends at once."""
        if not self.finished:
            self.reason = "left"
            self.task.cancel()

    async def run(self) -> None:
        """Ask instances until one has answered. Always answers, but to clients that left."""
        try:
            await self._ask()
        except asyncio.CancelledError:
            if self.reason != "drained" or self.began:
                raise
            self.task.uncancel()  # it waited for its turn
            await self.refuse(503, "the gateway is being stopped", self.reason, 1)

    async def _ask(self) -> None:
        tried: list[Instance] = []
        seen = 0
        last = None
        why = ""
        while seen < ATTEMPTS:
            try:
                instance = await self._take(tried)
            except QueueFull:
                self.core.metrics.refused["queue"] += 1
                return await self.refuse(429, "too many requests wait already", "queue_full", 5)
            except TimeoutError:
                break
            try:
                return await self._attempt(instance)
            except Retry as retry:
                last = retry.answer or last
                why = retry.why
                seen += retry.seen
                self.core.retried(why)
            if instance in tried:
                await asyncio.sleep(PAUSE * seen)
            tried.append(instance)
        if last:
            return await self._answer(*last)
        if why == "first_token":
            return await self.refuse(504, "no engine began to answer in time", why)
        return await self.refuse(503, "no engine can answer now", "no_engine", 5)

    async def say(self, body: bytes) -> None:
        """An answer that needs no engine."""
        await self._answer(200, body)

    async def refuse(self, status: int, message: str, code: str, retry_after: int = 0) -> None:
        """An answer of our own."""
        self.error = code
        kind = "rate_limit_error" if status == 429 else "server_error"
        body = self.request.failed(status, message, kind)
        await self._answer(status, body, str(retry_after).encode() if retry_after else b"")

    async def _take(self, tried: list[Instance]) -> Instance:
        since = self.core.time()
        patience = self.core.config.queue.timeout - self.queued
        instance = await self.route.take(self.request.affinity, tried, patience)
        self.queued += self.core.time() - since
        return instance

    async def _attempt(self, instance: Instance) -> None:
        self.instance = instance
        self.attempts += 1
        instance.exchanges.add(self)
        stream = self.request.stream
        self.timeout_reason = "first_token" if stream else "whole"
        self.deadline = self.core.time() + self.core.patience(self.timeout_reason)
        answer = None
        try:
            call = self.request.call(instance.pool.backend, instance.pool.model)
            answer = await self.core.post(instance, call.path, call.body, self.sent)
            if answer.status != 200:
                await self._other(answer, instance, call)
            elif answer.headers.get(b"content-encoding", b"identity") != b"identity":
                raise BrokenOff("compressed, which nobody asked for")
            elif stream:
                await self._stream(answer, instance, call)
            else:
                await self._whole(answer, instance, call)
        except ConnectFailed:
            self._failed(instance, 1)
            raise Retry("connect", 0) from None
        except BrokenOff:
            self._failed(instance, self.core.config.health.failures)
            if not self.began:
                raise Retry("reset", 1) from None
            await self._cut("the engine's answer broke off", "reset")
        except asyncio.CancelledError:
            if self.reason in ("", "left"):
                raise
            self.task.uncancel()
            await self._expired(instance)
        finally:
            self.deadline = FOREVER
            instance.exchanges.discard(self)
            if answer is not None:
                answer.close()  # a no-op when all of it was read
            give_back(instance)

    async def _expired(self, instance: Instance) -> None:
        """The attempt was ended from outside: by the sweeper, an ejection or a drain."""
        reason, self.reason = self.reason, ""
        self.deadline = FOREVER
        if reason in ("first_token", "idle"):
            self._failed(instance, self.core.config.health.failures)
        if self.began:
            await self._cut("the engine fell silent", reason)
        elif reason == "ejected":
            raise Retry(reason, 1)
        elif reason == "first_token":
            raise Retry(reason, ATTEMPTS // 2)
        elif reason == "whole":
            await self.refuse(504, "the engine did not finish in time", reason)
        else:
            await self.refuse(503, "the gateway is being stopped", reason, 1)

    def _failed(self, instance: Instance, allowed: int) -> None:
        if instance.failed(self.core.time(), allowed):
            self.core.ejected(instance, "passive")

    async def _other(self, answer: Answer, instance: Instance, call: Call) -> None:
        """An answer that is no 200: of a busy or broken engine, or about the request."""
        status, body = answer.status, await answer.whole(LONGEST_ERROR)
        message, kind = backends.error_text(body)
        retry_after = answer.headers.get(b"retry-after", b"")
        if status in (401, 403):
            return await self.refuse(502, "the engine refuses the gateway's key", "engine_key")
        if not 400 <= status < 600:
            return await self.refuse(502, f"the engine answers {status}", "engine_status")
        if not call.own_errors or not body.startswith(b"{"):
            body = self.request.failed(status, message, kind)
        if status in BUSY or status in BROKEN:
            if status in (502, 503, 504):
                self._failed(instance, self.core.config.health.failures)
            weight = ATTEMPTS // 2 if status == 500 else 1
            raise Retry(str(status), weight, (status, body, retry_after))
        return await self._answer(status, body, retry_after)

    async def _whole(self, answer: Answer, instance: Instance, call: Call) -> None:
        body = await answer.whole()
        now = self.core.time()
        instance.succeeded(now)
        self.first_byte = now - self.started
        self.tail = body
        kind = answer.headers.get(b"content-type", b"application/json")
        if shape := call.shape:
            body, kind = shape.whole(body), shape.content_type.encode()
        await self._answer(200, body, content_type=kind)

    async def _answer(
        self,
        status: int,
        body: bytes,
        retry_after: bytes = b"",
        content_type: bytes = b"application/json",
    ) -> None:
        headers = [
            (b"content-type", content_type),
            (b"content-length", str(len(body)).encode()),
            *self.headers,
        ]
        if retry_after:
            headers.append((b"retry-after", retry_after))
        self.began, self.finished, self.status = True, True, status
        self.bytes_out += len(body)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def _stream(self, answer: Answer, instance: Instance, call: Call) -> None:
        """Pass the events on as they come. Each chunk costs what stands in this loop."""
        read, send, time = answer.some, self.send, self.core.time
        idle = self.core.config.timeouts.idle
        kind = answer.headers.get(b"content-type", STREAMS[0])
        shape = call.shape
        feed = shape.feed if shape else self._lines if kind.startswith(LINES) else self._events
        data = await read()
        if not data:
            raise Retry("empty", 1)
        now = time()
        self.first_byte = now - self.started
        self.began, self.status, self.timeout_reason = True, 200, "idle"
        given = shape.content_type.encode() if shape else kind
        headers = [(b"content-type", given), *NO_BUFFERING, *self.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while data:
            self.deadline = FOREVER  # a client that is slow to read is no fault of the engine's
            instance.last_byte = now
            self.tail = data if len(data) > SHORT else self.tail[-LAST_EVENTS:] + data
            if out := feed(data):
                self.bytes_out += len(out)
                self.events += 1
                await send({"type": "http.response.body", "body": out, "more_body": True})
            self.deadline = time() + idle
            data = await read()
            now = time()
        if call.end not in self.tail and kind.startswith(STREAMS):
            self._failed(instance, self.core.config.health.failures)
            await self._cut("the engine ended the stream too early", "ended")
            return
        instance.succeeded(now)
        last = shape.end() if shape else self.rest
        self.bytes_out += len(last)
        self.finished = True
        await send({"type": "http.response.body", "body": last})

    def _events(self, data: bytes) -> bytes:
        """The whole events among the bytes, as they came: a cut stream never ends within one."""
        if self.rest:
            data = self.rest + data
            self.rest = b""
        if data.endswith((b"\n\n", b"\r\n\r\n")) or len(data) > LONGEST_EVENT:
            return data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4 if b"\r" in data else 0)
        if end < 2:
            self.rest = data
            return b""
        self.rest = data[end:]
        return data[:end]

    def _lines(self, data: bytes) -> bytes:
        """The same for Ollama's streams, whose events are lines."""
        before, end, rest = (self.rest + data).rpartition(b"\n")
        self.rest = rest
        return before + end

    async def _cut(self, message: str, code: str) -> None:
        """End a stream that cannot go on, so that the client knows."""
        self.error = code
        self.broken_off = True
        self.finished = True
        await self.send({"type": "http.response.body", "body": self.request.cut(message)})
