"""One running command: its two output streams, and its input; sudo may stand in front of it.

`Piped` works over anything with three streams and an exit status (`Pipe`), so that an SSH channel
and a local process behave alike. Both outputs are read by threads: neither can block the other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from inferfleet.errors import PasswordError, TransportError
from inferfleet.sudo import Sudo

KEPT_ERRORS = 64 * 1024  # bytes of stderr
SUDO_PATIENCE = 60.0  # seconds for sudo to say yes or no; PAM may ask a directory server


class Pipe(Protocol):
    """The raw ends of one running command. Reads block, and give b"" at the end."""

    def write(self, data: bytes) -> None:
        """Write all of it; OSError when nobody reads any more."""

    def end(self) -> None: ...

    def read(self) -> bytes: ...

    def read_errors(self) -> bytes: ...

    def status(self, timeout: float | None) -> int | None:
        """The exit status (negative: killed by a signal), or None after `timeout` seconds."""

    def lost(self) -> str:
        """Why the way to the command broke, or ""."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended."""

    status: int
    stdout: bytes
    stderr: str


class Piped:
    """A running command over a `Pipe`.

    `turns` counts how often output was waited for after something was sent: round trips.
    Every method raises TransportError when the connection breaks or sudo refuses.
    """

    def __init__(self, host: str, pipe: Pipe, sudo: Sudo | None = None) -> None:
        self.turns = 0
        self._host, self._pipe, self._sudo = host, pipe, sudo
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._buffer, self._searched, self._over = bytearray(), 0, False
        self._tail = bytearray()
        self._unanswered = False
        self._output = threading.Thread(target=self._pump_output, name="stdout", daemon=True)
        self._complaints = threading.Thread(target=self._pump_errors, name="stderr", daemon=True)
        self._output.start()
        self._complaints.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _pump_output(self) -> None:
        while data := self._pipe.read():
            self._chunks.put(data)
        self._chunks.put(b"")

    def _pump_errors(self) -> None:
        while data := self._pipe.read_errors():
            self._tail += self._sudo.hear(data, self._answer) if self._sudo else data
            del self._tail[:-KEPT_ERRORS]
            if self._sudo and self._sudo.refusal:
                self._pipe.close()
        if self._sudo:
            self._sudo.over()

    def _answer(self, data: bytes) -> None:
        try:
            self._pipe.write(data)
        except OSError:
            return  # sudo went away; the end of its stderr says why

    @property
    def errors(self) -> str:
        """The last 64 KiB of what came on stderr."""
        return self._tail.decode(errors="replace")

    def send(self, data: bytes) -> None:
        """Write to the command's stdin; blocks while it does not read."""
        self._unanswered = True
        self._admission()
        try:
            self._pipe.write(data)
        except OSError:
            raise self._failure("the command ended before it had read everything") from None

    def end(self) -> None:
        """Close the command's stdin."""
        self._admission()
        try:
            self._pipe.end()
        except OSError:
            return  # it is closed already; whoever reads or waits learns why

    def lines(self, timeout: float | None = None) -> Iterator[bytes]:
        """stdout, line by line as it arrives, without the newline.

        TransportError when a line takes longer than `timeout` seconds.
        """
        while (line := self._line(timeout)) is not None:
            yield line

    def rest(self, timeout: float | None = None) -> bytes:
        """All of stdout that was not read yet; TransportError after `timeout` seconds."""
        deadline = _after(timeout)
        while self._more(deadline, timeout):
            pass
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def wait(self, timeout: float | None = None) -> int:
        """The exit status (negative: a signal ended it); TransportError after `timeout` s."""
        self._turn()
        status = self._pipe.status(timeout)
        if status is None:
            raise TransportError(self._host, f"a command did not end within {timeout:g} s")
        self._settle()
        self._check()
        return status

    def close(self) -> None:
        """Let go of the command; a local one is terminated. Never raises TransportError."""
        self._pipe.close()
        self._output.join(5)
        self._complaints.join(5)

    def _turn(self) -> None:
        self.turns += self._unanswered
        self._unanswered = False

    def _line(self, timeout: float | None) -> bytes | None:
        self._turn()
        deadline = _after(timeout)
        while (stop := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if not self._more(deadline, timeout):
                break
        self._searched = 0
        if stop < 0 and not self._buffer:
            return None
        cut = stop if stop >= 0 else len(self._buffer)
        line = bytes(self._buffer[:cut])
        del self._buffer[: cut + 1]
        return line

    def _more(self, deadline: float, timeout: float | None) -> bool:
        """Wait for more stdout; False at its end."""
        self._turn()
        if not self._over:
            left = None if timeout is None else max(0.0, deadline - time.monotonic())
            try:
                data = self._chunks.get(timeout=left)
            except queue.Empty:
                why = f"a command did not answer within {timeout:g} s"
                raise TransportError(self._host, why) from None
            self._buffer += data
            self._over = not data
        if self._over:
            self._check()
        return not self._over

    def _admission(self) -> None:
        """Hold input back until sudo, if it may ask for a password, runs the command."""
        if self._sudo is None:
            return
        if self._sudo.asks and not self._sudo.decided.wait(SUDO_PATIENCE):
            raise TransportError(self._host, f"sudo did not answer within {SUDO_PATIENCE:g} s")
        if self._sudo.refusal:
            raise self._failure("")

    def _settle(self) -> None:
        """After the command's end, give the last of stderr a moment to arrive."""
        self._complaints.join(1)

    def _check(self) -> None:
        """Raise if the end was not the command's own."""
        if self._sudo:
            self._sudo.decided.wait(5)
        if self._pipe.lost() or (self._sudo and self._sudo.refusal):
            raise self._failure("")

    def _failure(self, otherwise: str) -> TransportError:
        self._settle()
        if self._sudo and self._sudo.refusal and not self._pipe.lost():
            kind = PasswordError if self._sudo.lacks_password else TransportError
            return kind(self._host, self._sudo.refusal)
        if lost := self._pipe.lost():
            return TransportError(self._host, f"connection lost: {lost}")
        return TransportError(self._host, "\n".join([otherwise, *self.errors.splitlines()[-5:]]))


def _after(timeout: float | None) -> float:
    return time.monotonic() + (timeout or 0.0)


def complete(session: Piped, data: bytes, timeout: float | None) -> Completed:
    """Give the command its whole input and collect all it says; TransportError on time-out."""
    writer = threading.Thread(target=_feed, args=(session, data), name="stdin", daemon=True)
    writer.start()
    started = time.monotonic()
    try:
        stdout = session.rest(timeout)
        left = None if timeout is None else max(0.1, timeout - (time.monotonic() - started))
        status = session.wait(left)
        return Completed(status, stdout, session.errors)
    finally:
        session.close()
        writer.join(5)


def _feed(session: Piped, data: bytes) -> None:
    try:
        if data:
            session.send(data)
        session.end()
    except TransportError:
        return  # a command need not read its input; whoever reads its output learns the rest
