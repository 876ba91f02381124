"""Uvicorn's reading of requests, with bounds on what strangers may send and how slowly.

A head has neither bound there, and whoever asks shows the key in the head.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

LONGEST_HEAD = 1 << 16  # bytes
MOST_UNREAD = 1 << 20  # bytes of a body that wait until they are asked for
FIRST, HEAD, BODY, UNREAD = 75.0, 20.0, 300.0, 20.0  # seconds; see Protocol.late
# What Java's client adds to its first request. llhttp would take the body for another protocol's.
_UPGRADE = re.compile(rb"\r\nupgrade:[ \t]*h2c[ \t]*(?=\r\n)", re.IGNORECASE)


class Protocol(HttpToolsProtocol):
    """One connection of a client."""

    _open = False  # a request has begun and is not whole
    _head = False  # nor is its head
    _came = 0  # bytes of that head, in further pieces than the first
    _timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It must ask something some day."""
        super().connection_made(transport)
        self._wait(FIRST)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request under way too, where another one has been read behind it."""
        self._stop()
        running = self._running
        super().connection_lost(exc)
        if running is not None and running is not self.cycle and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse; then see whether the rest must be waited for."""
        before = self._head
        if not self._open and data.find(b"h2c", 0, LONGEST_HEAD) >= 0:
            end = data.find(b"\r\n\r\n") + 2
            data = _UPGRADE.sub(b"", data[:end]) + data[end:]
        super().data_received(data)
        if not self._open:
            return
        if self._head and before:
            self._came += len(data)
            if self._came > LONGEST_HEAD:
                self.transport.abort()
        if self._timer is None and not self.transport.is_closing():
            self._wait(HEAD if self._head else BODY)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._stop()
        self._open = self._head = True
        self._came = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._stop()
        self._head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part has come. Uvicorn's own bound of 64 KiB makes a long prompt stop and go."""
        if self.cycle.response_complete:
            return
        self.cycle.body += body
        if len(self.cycle.body) > MOST_UNREAD:
            self.flow.pause_reading()
        self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """All of it has come."""
        self._stop()
        self._open = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """It is answered, perhaps before all of it has come."""
        super().on_response_complete()
        if self._open and not self._head:
            self._stop()
            self._wait(UNREAD)

    def late(self) -> None:
        """No request came in time, or not all of it; or what nobody reads does not end."""
        self._timer = None
        if self._open:
            self.transport.abort()
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _wait(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self.late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
