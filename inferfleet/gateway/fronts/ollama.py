"""Ollama's API: over Ollama its own paths and bytes, over any other engine OpenAI's format.

Names are looked up by `models.Names`, which knows Ollama's ways with `:latest` and with case.
What has no counterpart elsewhere is left out (num_ctx, mirostat, keep_alive) or, where leaving
it out would change what is asked (template, images of a raw prompt), refused.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

import msgspec

from inferfleet.gateway.fronts import ollama_openai as translate
from inferfleet.gateway.fronts import ollama_wire as wire
from inferfleet.gateway.fronts.ollama_shape import Answer, Vectors, error_line
from inferfleet.gateway.fronts.openai import renamed, unmistakable
from inferfleet.gateway.request import Backend, BadRequest, Call

_HASHED = 4096  # characters of a text that tell conversations apart
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(body: bytes) -> Chat:
    """A request to /api/chat. BadRequest."""
    return Chat(wire.decoded(wire.chat_decoder, body), body)


def generate(body: bytes) -> Generate:
    """A request to /api/generate. BadRequest."""
    return Generate(wire.decoded(wire.generate_decoder, body), body)


def embed(body: bytes) -> Embed:
    """A request to /api/embed, or with `prompt` to the older /api/embeddings. BadRequest."""
    return Embed(wire.decoded(wire.embed_decoder, body), body)


def error(_status: int, message: str, _kind: str) -> bytes:
    """The body of an error as Ollama's clients read it."""
    return msgspec.json.encode({"error": message})


class _Asked:
    """What the requests have in common."""

    __slots__ = ("affinity", "answer", "body", "model", "stream")
    native = ""

    def __init__(self, model: str | None, stream: bool, body: bytes) -> None:
        self.model, self.stream, self.body = model or "", stream, body
        self.affinity = 0
        self.answer: bytes | None = None  # set: what to answer without asking an engine

    def call(self, backend: Backend, model: str) -> Call:
        """The call for this kind of backend. BadRequest where it cannot do what is asked."""
        try:
            if backend != "ollama":
                return self.translated(backend, model)
            body = unmistakable(self.body)
            body = body if model == self.model else renamed(body, model)
        except (*wire.UNREADABLE, ValueError) as error:  # in a part that was not looked at before
            raise BadRequest(str(error)) from None
        end = b'"done":true' if self.stream else b""
        return Call(self.native, body, end=end, own_errors=True)

    def translated(self, backend: Backend, model: str) -> Call:
        """The call in OpenAI's format."""
        raise NotImplementedError

    def failed(self, status: int, message: str, kind: str) -> bytes:
        """The body of an error."""
        return error(status, message, kind)

    def cut(self, message: str) -> bytes:
        """The line that ends a stream cut in the middle."""
        return error_line(message)


class Chat(_Asked):
    """One request to /api/chat."""

    __slots__ = ("asked",)
    native = "/api/chat"

    def __init__(self, asked: wire.Chat, body: bytes) -> None:
        super().__init__(asked.model, asked.stream is not False, body)
        self.asked = asked
        if not asked.messages:
            told = {"message": {"role": "assistant", "content": ""}}
            self.answer = _without_engine(self.model, told, asked.keep_alive)
            return
        texts = []
        for message in asked.messages[:3]:
            texts.append(message.content or "")
            if message.role == "user":
                break
        self.affinity = _affinity(*texts)

    def translated(self, backend: Backend, model: str) -> Call:
        """A chat, whose answer is turned back."""
        shape = Answer(self.model, stream=self.stream)
        end = b"[DONE]" if self.stream else b""
        return Call(_CHAT, translate.chat(self.asked, backend, model), shape, end=end)


class Generate(_Asked):
    """One request to /api/generate."""

    __slots__ = ("asked",)
    native = "/api/generate"

    def __init__(self, asked: wire.Generate, body: bytes) -> None:
        super().__init__(asked.model, asked.stream is not False, body)
        self.asked = asked
        if not (asked.prompt or asked.suffix or asked.images):
            self.answer = _without_engine(self.model, {"response": ""}, asked.keep_alive)
        self.affinity = _affinity(asked.system or "", asked.prompt or "")

    def translated(self, backend: Backend, model: str) -> Call:
        """A chat with one message; with `raw` or `suffix` a completion."""
        asked, end = self.asked, b"[DONE]" if self.stream else b""
        if asked.template:
            message = "template: this engine uses its model's own; send a rendered prompt with raw"
            raise BadRequest(message, "template")
        if asked.raw or asked.suffix:
            shape = Answer(self.model, stream=self.stream, generate=True)
            body = translate.completion(asked, backend, model)
            return Call(_COMPLETIONS, body, shape, end=end)
        turns = [*translate.turns(asked), ("user", asked.prompt or "")]
        shape = Answer(self.model, stream=self.stream, generate=True, turns=turns)
        return Call(_CHAT, translate.prompted(asked, backend, model), shape, end=end)


class Embed(_Asked):
    """One request for embeddings."""

    __slots__ = ("asked", "old")

    def __init__(self, asked: wire.Embed, body: bytes) -> None:
        super().__init__(asked.model, False, body)
        self.asked, self.old = asked, asked.prompt is not msgspec.UNSET and asked.input is None
        if not asked.input and not (self.old and asked.prompt):
            # the path is not known here, so both of its forms
            empty = {"model": self.model, "embeddings": [], "embedding": []}
            self.answer = msgspec.json.encode(empty)

    @property
    def native(self) -> str:  # type: ignore[override]
        """Ollama's path for this form."""
        return "/api/embeddings" if self.old else "/api/embed"

    def translated(self, backend: Backend, model: str) -> Call:
        """The same texts; the vectors come back in Ollama's form."""
        body = translate.embeddings(self.asked, backend, model)
        return Call("/v1/embeddings", body, Vectors(self.model, one=self.old))


def _without_engine(model: str, told: dict[str, Any], keep_alive: float | str | None) -> bytes:
    """The answer to an empty request, which asks to load or unload; here all stay loaded."""
    reason = "unload" if wire.unloads(keep_alive) else "load"
    created = wire.stamp(time.time_ns())
    return msgspec.json.encode(
        {"model": model, "created_at": created, **told, "done": True, "done_reason": reason}
    )


def _affinity(*texts: str) -> int:
    """Equal for the turns of one conversation: its system prompt and first question."""
    found = 1
    for text in texts:
        found = zlib.crc32(text[:_HASHED].encode("utf-8", "replace"), found)
    return found
