"""The ASGI application that clients reach: requests for tokens here, everything else in pages.

The paths that carry tokens are looked up in a dictionary and answered without a framework,
whose routing would cost as much as all the rest; see bench/gateway.py.
"""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from inferfleet.gateway.fronts import ollama, openai
from inferfleet.gateway.keys import Key, Keys, bearer
from inferfleet.gateway.log import Record, RequestIds, RequestLog
from inferfleet.gateway.metrics import Refused as RefusedFor
from inferfleet.gateway.relay import Exchange
from inferfleet.gateway.request import BadRequest
from inferfleet.gateway.shadow import Said, listening_in

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from inferfleet.gateway.core import Core
    from inferfleet.gateway.fronts.models import Names
    from inferfleet.gateway.limits import Limits
    from inferfleet.gateway.request import Request
    from inferfleet.gateway.shadow import Shadows
    from inferfleet.gateway.tracing import Tracer


_ASKED = re.compile(rb'"(?:prompt_tokens|input_tokens|prompt_eval_count)"\s*:\s*(\d{1,15})')
_MADE = re.compile(rb'"(?:completion_tokens|output_tokens|eval_count)"\s*:\s*(\d{1,15})')
SESSION = b"x-session-id"  # requests that name the same one go to the same instance
TRACE = frozenset((b"traceparent", b"tracestate"))
LEFT = 499  # nginx's number for a client that did not wait; only the log sees it


@dataclass(frozen=True, slots=True)
class Front:
    """A path of a client's API that carries tokens."""

    parse: Callable[[bytes], Request]
    failed: Callable[[int, str, str], bytes]


Reason = RefusedFor | Literal["request"]

FRONTS = {
    **{
        path: Front(partial(openai.Passing, path), openai.error)
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/embeddings",
            "/v1/responses",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/rerank",
            "/v1/score",
        )
    },
    "/api/chat": Front(ollama.chat, ollama.error),
    "/api/generate": Front(ollama.generate, ollama.error),
    "/api/embed": Front(ollama.embed, ollama.error),
    "/api/embeddings": Front(ollama.embed, ollama.error),
}


class Left(Exception):
    """The client went before its request was whole."""


class Refused(Exception):
    """The request is not let in; `code` is for the log and the metrics."""

    def __init__(self, status: int, message: str, code: Reason, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.retry_after = retry_after


class App:
    """One worker's public side."""

    def __init__(
        self,
        core: Core,
        keys: Keys,
        limits: Limits,
        log: RequestLog,
        names: Names,
        pages: ASGIApp,
        shadows: Shadows,
        tracer: Tracer | None,
    ) -> None:
        self.core, self.keys, self.limits, self.log = core, keys, limits, log
        self.names, self.pages, self.shadows, self.tracer = names, pages, shadows, tracer
        self.ids = RequestIds()
        self.longest = core.config.max_body_mib << 20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        front = FRONTS.get(scope["path"])
        if front is not None and scope["method"] == "POST":
            await Asked(self, front, scope, send).answer(receive)
        else:
            await self.pages(scope, receive, send)


class Asked:
    """One request for tokens, from its headers to its line in the log."""

    __slots__ = (
        "app",
        "began",
        "exchange",
        "front",
        "headers",
        "key",
        "record",
        "said",
        "send",
        "span",
    )

    def __init__(self, app: App, front: Front, scope: Scope, send: Send) -> None:
        self.app, self.front, self.send = app, front, send
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.began = time.time()
        presented = header(self.headers, b"x-request-id")
        self.record = Record(app.ids.take(presented), "POST", scope["path"])
        self.span = app.tracer and app.tracer.begin(header(self.headers, b"traceparent"))
        self.key: Key | None = None
        self.exchange: Exchange | None = None
        self.said: Said | None = None  # the answer, where a copy is to be compared with it

    async def answer(self, receive: Receive) -> None:
        """Check the key, read, admit, relay; whatever happens, log and count it."""
        try:
            exchange = await self._admitted(receive)
            if exchange.request.answer is None:
                await self._relay(exchange, receive)
            else:
                await exchange.say(exchange.request.answer)
        except Refused as refused:
            await self._refuse(refused)
        except BadRequest as error:
            await self._refuse(Refused(error.status, error.message, "request"))
        except Left:
            self.record.client_left, self.record.status = True, LEFT
        finally:
            self._account()

    async def _admitted(self, receive: Receive) -> Exchange:
        """The request on its way, if it may be asked; Refused or Left."""
        app, record = self.app, self.record
        key = app.keys.find(bearer(self.headers), self.began)
        if key is None:
            raise Refused(401, "a valid API key is needed", "key")
        record.key = key.name
        body = await read(receive, self.headers, app.longest)
        record.bytes_in = len(body)
        request = self.front.parse(body)
        record.model = request.model
        name = app.names.resolve(request.model)
        if name is None:
            raise Refused(404, f"The model `{request.model}` does not exist.", "model")
        if not key.allows(name):
            raise Refused(403, f"this key may not use `{request.model}`", "model")
        if refusal := app.limits.admit(key, self.began):
            raise Refused(429, refusal.message, refusal.code, refusal.retry_after)
        self.key = key
        if session := header(self.headers, SESSION):
            request.affinity = zlib.crc32(session)
        send = self.send
        if app.shadows.chosen(name):
            self.said = Said()
            send = listening_in(send, self.said)
        self.exchange = Exchange(app.core, request, app.core.routes[name], send, self._sent())
        return self.exchange

    def _sent(self) -> dict[str, str]:
        """Headers for the engine."""
        sent = {"X-Request-Id": self.record.request_id}
        for name, value in self.headers:
            if name in TRACE:
                sent[name.decode()] = value.decode("latin-1")
        if self.span:
            sent["traceparent"] = self.span.traceparent.decode()
        return sent

    async def _refuse(self, refused: Refused) -> None:
        self.record.error, self.record.status = refused.code, refused.status
        if refused.code != "request":
            self.app.core.metrics.refused[refused.code] += 1
        kind = "rate_limit_error" if refused.status == 429 else "invalid_request_error"
        body = self.front.failed(
            refused.status, refused.message, "server_error" if refused.status >= 500 else kind
        )
        await respond(self.send, refused.status, body, self.record.request_id, refused.retry_after)

    async def _relay(self, exchange: Exchange, receive: Receive) -> None:
        live = self.app.core.live
        watch = asyncio.ensure_future(receive())  # it ends when the client leaves
        watch.add_done_callback(exchange.leave)
        live.add(exchange)
        try:
            await exchange.run()
        except asyncio.CancelledError:
            if exchange.reason != "left":
                raise
            exchange.task.uncancel()
            self.record.client_left = True
        finally:
            watch.remove_done_callback(exchange.leave)
            watch.cancel()
            live.discard(exchange)

    def _account(self) -> None:
        record, exchange = self.record, self.exchange
        record.seconds = time.time() - self.began
        if exchange is not None and self.key is not None:
            self._exchanged(exchange, self.key)
        self.app.log.write(record, self.began)
        if self.span:
            self.span.end(record)

    def _exchanged(self, exchange: Exchange, key: Key) -> None:
        record = self.record
        record.status = LEFT if record.client_left else exchange.status or record.status
        record.error, record.attempts = exchange.error or record.error, exchange.attempts
        record.bytes_out, record.queue_seconds = exchange.bytes_out, exchange.queued
        record.first_byte_seconds = exchange.first_byte or None
        if instance := exchange.instance:
            record.instance, record.pool = instance.name, instance.pool.name
        asked, made = tokens(exchange.tail)
        if exchange.status == 200 and made is None and exchange.request.stream:
            # engines tell the usage of a stream only when asked: an event is a token or more
            made, asked = exchange.events, record.bytes_in // 4
        record.prompt_tokens, record.completion_tokens = asked, made
        self.app.limits.release(key, (asked or 0) + (made or 0), time.time())
        self._count(exchange)
        if self.said and exchange.status == 200 and not exchange.broken_off and not record.error:
            self.said.first_token, self.said.seconds = exchange.first_byte, record.seconds
            self.app.shadows.copy(exchange.route.model, record.pool, exchange.request, self.said)

    def _count(self, exchange: Exchange) -> None:
        record, metrics = self.record, self.app.core.metrics
        series = metrics.of(exchange.route.model, record.pool, record.instance)
        series.codes[exchange.status or (record.status if record.status != LEFT else 0)] += 1
        series.seconds.observe(record.seconds)
        series.cut += exchange.broken_off
        series.client_left += record.client_left
        if exchange.first_byte:
            series.first_token.observe(exchange.first_byte)
        if exchange.events > 1:  # a mean: to count each would cost as much as to pass it on
            streamed = record.seconds - exchange.first_byte
            series.inter_chunk.observe(streamed / (exchange.events - 1))
        model = metrics.model(exchange.route.model)
        model.prompt_tokens += record.prompt_tokens or 0
        model.completion_tokens += record.completion_tokens or 0


def header(headers: list[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    """The value of a header, or nothing."""
    for name, value in headers:
        if name == wanted:
            return value
    return b""


async def read(receive: Receive, headers: list[tuple[bytes, bytes]], longest: int) -> bytes:
    """The whole body. Left, or Refused when it is too large."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and int(value) > longest:
            raise Refused(413, "the request is larger than the gateway takes", "body")
    message = await receive()
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        part: bytes = message["body"]
        if not message.get("more_body"):
            return b"".join((*parts, part)) if parts else part
        size += len(part)
        if size > longest:
            raise Refused(413, "the request is larger than the gateway takes", "body")
        parts.append(part)
        message = await receive()
    raise Left


async def respond(
    send: Send, status: int, body: bytes, request_id: str, retry_after: int = 0
) -> None:
    """A whole answer of our own, in JSON."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    if retry_after:
        headers.append((b"retry-after", str(retry_after).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def tokens(tail: bytes) -> tuple[int | None, int | None]:
    """Prompt and completion tokens that the end of an answer tells, in any of the formats."""
    start = max(tail.rfind(b'"usage"'), tail.rfind(b'"done":true'), 0)
    asked, made = _ASKED.search(tail, start), _MADE.search(tail, start)
    return (int(asked[1]) if asked else None, int(made[1]) if made else None)
