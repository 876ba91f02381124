"""What fronts, relay and backends say to each other.

A front parses a client's body into a `Request`; for the backend that was chosen, the request
makes a `Call`; where the client speaks another format than the backend, the call's `Shape`
turns the answer. OpenAI's format is the one in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Backend = Literal["vllm", "tgi", "ollama", "openai"]


class BadRequest(Exception):
    """The client's mistake; `param` is the field it is in, `status` 4xx."""

    def __init__(self, message: str, param: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status


class Shape(Protocol):
    """Turns one answer of a backend into the client's format; holds the state of one answer."""

    content_type: str

    def feed(self, data: bytes) -> bytes:
        """What the client gets for these bytes of a stream, cut anywhere; may be nothing yet."""
        ...

    def end(self) -> bytes:
        """What is left to send when the backend's stream has ended well."""
        ...

    def whole(self, body: bytes) -> bytes:
        """The client's form of a whole answer (status 200)."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to a backend: POST `path` (below the instance's URL) with `body`."""

    path: str
    body: bytes
    shape: Shape | None = None  # None: the answer's bytes pass through untouched
    end: bytes = b""  # what stands in the last event of a stream that is whole; empty: nothing
    own_errors: bool = False  # the backend's errors have the client's format already


class Request(Protocol):
    """One parsed request of a client."""

    model: str  # as the client wrote it
    stream: bool
    affinity: int  # equal for requests that share their beginning; 0: no preference
    answer: bytes | None  # set: what to answer, in JSON, without asking a backend

    def call(self, backend: Backend, model: str) -> Call:
        """The call for this kind of backend, which knows the model by that name.

        BadRequest where this kind cannot do what is asked.
        """
        ...

    def failed(self, status: int, message: str, kind: str) -> bytes:
        """The body of an error, as this client reads errors; `kind` is OpenAI's error type."""
        ...

    def cut(self, message: str) -> bytes:
        """The event that ends a stream cut in the middle, as this client reads streams."""
        ...
