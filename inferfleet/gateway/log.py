"""The request log: one JSON line for each request, without prompts, answers, keys or queries."""

from __future__ import annotations

import logging
import os
import re
import secrets
import select
import stat
import threading
import time
from collections import deque
from contextlib import suppress

import msgspec

_LOG = logging.getLogger("inferfleet.gateway")
_FLUSH_SECONDS = 0.2
_MOST_WAITING = 8192  # lines, about 4 MiB
_LONGEST_NAME = 128  # characters kept of what a client wrote
# what one write of several processes to the same pipe or socket keeps in one piece
_PIPE_BYTES, _OTHER_BYTES = 4096, 32768
_GOOD_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}").fullmatch
_encode = msgspec.json.Encoder().encode


class Record(msgspec.Struct):
    """What became of one request; times are in seconds, None where it never came so far."""

    request_id: str
    method: str
    path: str  # without the query
    time: str = ""  # when it came, RFC 3339; `RequestLog.write` says it from `began`
    key: str = ""  # the key's name
    model: str = ""  # as the client wrote it
    pool: str = ""
    instance: str = ""
    attempts: int = 0
    status: int = 0  # 0: nothing was sent
    error: str = ""  # a code of ours
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    queue_seconds: float | None = None
    first_byte_seconds: float | None = None
    seconds: float = 0.0
    client_left: bool = False


class RequestIds:
    """Makes ids for requests that bring none; each process has its own."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._made = 0

    def take(self, presented: bytes = b"") -> str:
        """The client's id (the value of x-request-id) if it is fit for a log, or a new one."""
        if presented and _GOOD_ID(presented):
            return presented.decode("ascii")
        self._made = (self._made + 1) & 0xFFFFFFFF
        return f"{self._prefix}{self._made:08x}"


class RequestLog:
    """Lines wait in memory and a thread writes them: a full pipe or disk stops the thread, not
    the requests. `dropped` counts the lines that found no place or could not be written."""

    def __init__(self, where: str | None, most_waiting: int = _MOST_WAITING) -> None:
        """`where` is a path, "-" for standard output, or None for no log. Raises OSError.

        A thread does not survive a fork: make the log in the process that writes it.
        """
        self.dropped = 0
        self._path = None if where in (None, "-") else where
        self._most = most_waiting
        self._lines: deque[bytes] = deque()
        self._clock = _Clock()
        self._closing = threading.Event()
        self._reopening = False
        self._torn = self._failing = False
        self._thread: threading.Thread | None = None
        if where is not None:
            self._file = 1 if self._path is None else _open(self._path)
            self._piece = _piece(self._file)
            self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
            self._thread.start()

    def write(self, record: Record, began: float) -> None:
        """Takes one line; `began` is when the request came, seconds since 1970. Never waits."""
        if self._thread is None:
            return
        if len(self._lines) >= self._most:
            self.dropped += 1
            return
        record.time = self._clock.text(began)
        record.model = record.model[:_LONGEST_NAME]
        record.path = record.path[:_LONGEST_NAME]
        record.seconds = round(record.seconds, 6)
        if record.queue_seconds is not None:
            record.queue_seconds = round(record.queue_seconds, 6)
        if record.first_byte_seconds is not None:
            record.first_byte_seconds = round(record.first_byte_seconds, 6)
        self._lines.append(_encode(record) + b"\n")

    def reopen(self) -> None:
        """Goes on in a new file of the same name, for after the old one was moved away."""
        self._reopening = True

    def close(self, timeout: float = 2.0) -> None:
        """Writes what waits; gives up after `timeout` seconds, if nobody reads."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(timeout)
        if not self._thread.is_alive() and self._path is not None:
            os.close(self._file)
        self._thread = None

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._closing.wait(_FLUSH_SECONDS)
            if self._reopening:
                self._reopening = False
                self._reopen()
            while self._lines:
                self._flush(self._batch())

    def _batch(self) -> list[bytes]:
        """The lines that go out in one piece; the first even if it alone is too long."""
        batch = [self._lines.popleft()]
        size = len(batch[0])
        while self._lines and (size := size + len(self._lines[0])) <= self._piece:
            batch.append(self._lines.popleft())
        return batch

    def _flush(self, batch: list[bytes]) -> None:
        # a line that was cut by an error must not swallow the next one
        data = memoryview((b"\n" if self._torn else b"") + b"".join(batch))
        whole = len(data)
        try:
            while data:
                data = data[_put(self._file, data) :]
        except OSError as error:
            self._torn = self._torn or len(data) < whole
            self._fail(len(batch), error)
        else:
            self._torn = self._failing = False

    def _fail(self, lines: int, error: OSError) -> None:
        self.dropped += lines
        if not self._failing:
            _LOG.error("the request log cannot be written: %s", error)
        self._failing = True

    def _reopen(self) -> None:
        if self._path is None:
            return
        try:
            new = _open(self._path)
        except OSError as error:
            _LOG.error("the request log stays in its old file: %s", error)
            return
        old, self._file = self._file, new
        with suppress(OSError):
            os.close(old)


class _Clock:
    """RFC 3339 in UTC to the millisecond; the part that changes once a second is kept."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, moment: float) -> str:
        second = int(moment)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{int((moment - second) * 1000):03d}Z"


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


def _put(file: int, data: memoryview) -> int:
    """Bytes written; waits even where who gave us standard output has made it non-blocking."""
    try:
        return os.write(file, data)
    except BlockingIOError:
        select.select([], [file], [])
        return 0


def _piece(file: int) -> int:
    return _PIPE_BYTES if stat.S_ISFIFO(os.fstat(file).st_mode) else _OTHER_BYTES
