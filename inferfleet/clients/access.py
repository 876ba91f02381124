"""How clients reach a phase: addresses, models, and the name of the variable with the key."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it. Sizes are tokens; prompt and answer share the context."""

    name: str  # what clients ask for
    context: int
    output: int  # longest answer
    tools: bool = False
    vision: bool = False
    embeddings: bool = False  # it makes these, and no text

    @property
    def input(self) -> int:
        """The longest prompt that leaves room for the longest answer."""
        return self.context - self.output


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Models under one base URL of OpenAI's API, which ends in /v1."""

    name: str  # lower-case letters, digits and dashes: what clients list it as
    base: str
    models: tuple[Served, ...]


@dataclass(frozen=True, slots=True)
class Access:
    """What every client's configuration is made from."""

    phase: str
    endpoints: tuple[Endpoint, ...]
    key: str = ""  # the variable that holds the key on the client's machine; "": none is asked for
    ca: str = ""  # path of the CA's file on the client's machine; "": a public certificate
    ollama: str = ""  # base URL of Ollama's own API, without /api; "": there is none
    gateway: bool = False
    notes: tuple[str, ...] = ()

    def chats(self) -> tuple[tuple[Endpoint, Served], ...]:
        """Every model that writes text, with where it is."""
        return tuple((e, m) for e in self.endpoints for m in e.models if not m.embeddings)

    def embedders(self) -> tuple[tuple[Endpoint, Served], ...]:
        """Every model that makes embeddings."""
        return tuple((e, m) for e in self.endpoints for m in e.models if m.embeddings)

    def without_tools(self) -> tuple[str, ...]:
        """The names of models that write text and cannot be offered tools."""
        return tuple(dict.fromkeys(m.name for _, m in self.chats() if not m.tools))

    @property
    def clear(self) -> bool:
        """Whether keys and code travel unencrypted."""
        return any(_clear(endpoint.base) for endpoint in self.endpoints)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What one client is given: text, where it belongs, and what to know beside it."""

    text: str
    place: str  # where the client looks for it
    notes: tuple[str, ...] = ()
    merge: str = ""  # how it joins a file that is there already; see `inferfleet.clients.writing`


def _clear(url: str) -> bool:
    parts = urlsplit(url)
    loopback = parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")
    return parts.scheme == "http" and not loopback
