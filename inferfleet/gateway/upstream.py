"""An HTTP/1.1 client for one purpose: to ask engines, and to pass their bytes on at once.

llhttp (httptools) parses. General clients cost more than all else on a request's way here
(see bench/gateway.py), and do not tell whether an engine may have seen a request that failed.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

KEEPALIVE = 4.0  # seconds; vLLM closes idle connections after 5, and one used then is reset
MOST_BUFFERED = 1 << 18  # bytes of an answer waiting for the client, until the engine must wait

# A host that is cut off says nothing, and engines are silent for minutes while they read a prompt:
# only the kernel can tell, and the other one answers whatever its engine does. A request that is
# not acknowledged, or a host that does not answer for so long, breaks the connection.
UNREACHABLE = 15  # seconds
WATCHED = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 10),
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 1),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", UNREACHABLE * 1000),  # Linux alone has it
)
OPTIONS = [(at, getattr(socket, name), to) for at, name, to in WATCHED if hasattr(socket, name)]
LONGEST_HEAD = 1 << 16  # bytes until an answer's status and headers must have come
LONGEST = 256 << 20  # bytes of an answer that is held in memory as a whole


class ConnectFailed(OSError):
    """No connection was made: the engine has not seen the request."""


class BrokenOff(OSError):
    """The connection ended before the answer did, or the answer was no HTTP."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests for an instance go; `lines` are request headers that never change."""

    host: str
    port: int
    prefix: str  # of all paths
    lines: bytes
    tls: ssl.SSLContext | None = None


def target(url: str, headers: dict[str, str], tls: ssl.SSLContext | None) -> Target:
    """The target of an instance's URL, http or https."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    lines = [f"Host: {parts.netloc.rpartition('@')[2]}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    text = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    context = (tls or ssl.create_default_context()) if secure else None
    return Target(parts.hostname or "", port, parts.path.rstrip("/"), text, context)


class Answer:
    """What an engine answers. `status` and `headers` (lower case) are there from the start."""

    __slots__ = (
        "_buffered",
        "_connection",
        "_failed",
        "_ready",
        "_waiter",
        "complete",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.complete = False
        self._connection = connection
        self._ready: list[bytes] = []
        self._buffered = 0
        self._failed = False
        self._waiter: asyncio.Future[None] | None = None

    async def some(self) -> bytes:
        """What has come since the last time, or b"" at the end. BrokenOff when it was cut."""
        while not self._ready:
            if self.complete:
                return b""
            if self._failed:
                raise BrokenOff("the connection ended within the answer")
            await self._wait()
        ready = self._ready
        data = ready[0] if len(ready) == 1 else b"".join(ready)
        self._ready = []
        if self._buffered > MOST_BUFFERED and not self.complete:
            self._connection.resume()
        self._buffered = 0
        return data

    async def whole(self, longest: int = LONGEST) -> bytes:
        """All of the body. BrokenOff when it was cut, or does not end within `longest` bytes."""
        parts = []
        while data := await self.some():
            parts.append(data)
            longest -= len(data)
            if longest < 0:
                raise BrokenOff("the answer does not end")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Leave what has not come yet: the engine learns of it at once."""
        if not self.complete:
            self._connection.abort()

    async def begun(self) -> None:
        """Wait for status and headers."""
        while not self.status:
            if self._failed:
                raise BrokenOff("the connection ended before the answer")
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Something has come."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def feed(self, data: bytes) -> None:
        """A part of the body has come."""
        self._ready.append(data)
        self._buffered += len(data)
        if self._buffered > MOST_BUFFERED:
            self._connection.pause()
        self.wake()

    def fail(self) -> None:
        """Nothing more will come."""
        self._failed = True
        self.wake()


class Connection(asyncio.Protocol):
    """One connection to an engine, with at most one request on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, idle: deque[Connection]) -> None:
        self.loop = loop
        self.used = 0  # requests so far
        self.idle_since = 0.0
        self.closed = False
        self.came = 0  # bytes before the status and headers of an answer were whole
        self._idle = idle
        self._transport: asyncio.Transport
        self._parser: httptools.HttpResponseParser
        self._answer: Answer | None = None
        self._headers: dict[bytes, bytes] = {}

    def send(self, *parts: bytes) -> Answer:
        """Send a request; its answer comes."""
        self.used += 1
        self.came = 0
        self._answer = Answer(self)
        self._headers = {}
        self._parser = httptools.HttpResponseParser(self)
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)
        return self._answer

    def abort(self) -> None:
        """End it now."""
        self._answer = None
        self._transport.abort()

    @property
    def closing(self) -> bool:
        """Whether it ends, though it may not have heard yet."""
        return self._transport.is_closing()

    def pause(self) -> None:
        """Let the engine wait."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """Take bytes again."""
        if not self.closed:
            self._transport.resume_reading()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self._transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        for option in OPTIONS:
            raw.setsockopt(*option)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer, or of nothing we asked for."""
        answer = self._answer
        if answer is None:
            self._transport.abort()
            return
        if not answer.status:
            self.came += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.abort()
        if not answer.status and self.came > LONGEST_HEAD:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """It is over; an answer that says no length ends so."""
        self.closed = True
        if self in self._idle:
            self._idle.remove(self)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if answer.status and error is None and unbounded(answer.headers):
            answer.complete = True
            answer.wake()
        else:
            answer.fail()

    # what the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer, or of its trailer."""
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is whole."""
        status = self._parser.get_status_code()
        if self._answer is not None and status >= 200:
            self._answer.headers = self._headers
            self._answer.status = status
            self._answer.wake()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._answer is not None:
            self._answer.feed(body)

    def on_message_complete(self) -> None:
        """The answer is whole; an interim one (1xx) is none."""
        answer = self._answer
        if answer is None or self._parser.get_status_code() < 200:
            self._headers = {}
            return
        self._answer = None
        answer.complete = True
        answer.wake()
        if self._parser.should_keep_alive() and not self._transport.is_closing():
            self.resume()  # whoever gets it next waits for other bytes than these
            self.idle_since = self.loop.time()
            self._idle.append(self)
        else:
            self._transport.close()


class Client:
    """Connections to all engines, kept for as long as engines keep them."""

    def __init__(self, connect_timeout: float) -> None:
        self._timeout = connect_timeout
        self._idle: dict[tuple[str, int, bool], deque[Connection]] = {}
        self._loop = asyncio.get_running_loop()

    async def ask(
        self, method: str, target: Target, path: str, headers: dict[str, str], body: bytes = b""
    ) -> Answer:
        """The answer's status and headers. ConnectFailed or BrokenOff.

        A kept connection may have been closed by the engine just then; the request is sent once
        more on a new one, since an engine that closes an idle connection has not read from it.
        Where no new one can be made, the engine may as well have read it and died of it.
        """
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = (
            f"{method} {target.prefix}{path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n"
        ).encode("latin-1") + target.lines
        parts = (head + b"\r\n" + body,) if len(body) < MOST_BUFFERED else (head + b"\r\n", body)
        idle = self._idle.setdefault((target.host, target.port, target.tls is not None), deque())
        sent = False
        while True:
            connection = self._kept(idle) or await self._connect(target, idle, sent)
            answer = connection.send(*parts)
            sent = True
            try:
                await answer.begun()
            except BrokenOff:
                if connection.used == 1 or connection.came:
                    raise
            except BaseException:
                answer.close()
                raise
            else:
                return answer

    def _kept(self, idle: deque[Connection]) -> Connection | None:
        earliest = self._loop.time() - KEEPALIVE
        while idle:
            connection = idle.pop()
            if connection.idle_since >= earliest and not connection.closing:
                return connection
            connection.abort()
        return None

    def sweep(self) -> None:
        """Close what was kept too long: not all engines close idle connections."""
        earliest = self._loop.time() - KEEPALIVE
        for idle in self._idle.values():
            while idle and idle[0].idle_since < earliest:
                idle.popleft().abort()

    async def _connect(self, target: Target, idle: deque[Connection], sent: bool) -> Connection:
        make: Callable[[], Connection] = lambda: Connection(self._loop, idle)  # noqa: E731
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await self._loop.create_connection(
                    make, target.host, target.port, ssl=target.tls
                )
        except (OSError, TimeoutError) as error:
            raise (BrokenOff if sent else ConnectFailed)(str(error)) from None
        return connection

    def close(self) -> None:
        """End all idle connections."""
        for idle in self._idle.values():
            for connection in tuple(idle):
                connection.abort()


def unbounded(headers: dict[bytes, bytes]) -> bool:
    """Whether the end of the connection is the end of such an answer."""
    return b"content-length" not in headers and b"chunked" not in headers.get(
        b"transfer-encoding", b""
    )
