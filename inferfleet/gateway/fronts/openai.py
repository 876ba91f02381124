"""OpenAI's format: what most clients speak and every engine answers, so bytes pass untouched."""

from __future__ import annotations

import json
import re
import zlib

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from inferfleet.gateway.backends import adapt
from inferfleet.gateway.request import Backend, BadRequest, Call

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
ADAPTED: frozenset[Backend] = frozenset({"tgi", "ollama"})  # refuse some of OpenAI's fields
_NO_JSON = "the body is no JSON document"
_HASHED = 4096  # bytes of a message that tell conversations apart
_NEAR = 64  # bytes at the ends of a message in which its role stands
_USER = re.compile(rb'"role"\s*:\s*"user"')  # within a text, its quotes would be escaped
_SPELLINGS = (b'"model"', b"\\u004", b"\\u006")  # with the escapes of its letters
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')


class _Body(Struct):
    """What a gateway must know of any request; the engine checks the rest."""

    model: str
    stream: bool | None = False
    messages: list[Raw] | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    prompt_cache_key: str | None = None


class _Bare(Struct):
    model: str
    stream: bool | None = False


_body = msgspec.json.Decoder(_Body).decode
_bare = msgspec.json.Decoder(_Bare).decode
_anything = msgspec.json.Decoder().decode
_fields = msgspec.json.Decoder(dict[str, Raw]).decode


class Passing:
    """A request whose body goes to the engine as it came, but for the model's name."""

    __slots__ = ("affinity", "body", "model", "path", "stream")
    answer: bytes | None = None

    def __init__(self, path: str, body: bytes) -> None:
        self.path, self.body = path, body
        try:
            found: _Body | _Bare = _body(body)
            self.affinity = _affinity(found)  # type: ignore[arg-type]
        except UNREADABLE:
            found, self.affinity = _unlike_chat(body), 0
        self.model, self.stream = found.model, bool(found.stream)

    def call(self, backend: Backend, model: str) -> Call:
        """The same bytes; only a model that the engine knows by another name is renamed."""
        try:
            body = self._body(backend, model)
        except (*UNREADABLE, ValueError):  # in a part that was not looked at before
            raise BadRequest(_NO_JSON) from None
        end = b"[DONE]" if self.path.endswith("completions") else b""
        return Call(self.path, body, end=end, own_errors=backend in ("vllm", "openai"))

    def _body(self, backend: Backend, model: str) -> bytes:
        body = self.body if backend in ("vllm", "tgi") else unmistakable(self.body)
        body = body if model == self.model else renamed(body, model)
        if backend not in ADAPTED:
            return body
        wanted = _anything(body)
        changed = adapt(backend, wanted)
        return body if changed is wanted else msgspec.json.encode(changed)

    def failed(self, status: int, message: str, kind: str) -> bytes:
        """An error as OpenAI's clients read it."""
        return error(status, message, kind)

    def cut(self, message: str) -> bytes:
        """An error event; no [DONE] follows, since it was not done."""
        return b"data: " + error(502, message, "server_error", "stream_cut") + b"\n\n"


def error(status: int, message: str, kind: str, code: str | int | None = None) -> bytes:
    """The body of an error in OpenAI's shape."""
    told = {"message": message, "type": kind, "param": None, "code": code or status}
    return msgspec.json.encode({"error": told})


def renamed(body: bytes, model: str) -> bytes:
    """The body with another model; all else stays as the client wrote it."""
    name = b'"model":' + msgspec.json.encode(model)
    found = _MODEL.findall(body)
    if len(found) == 1:
        changed = body.replace(found[0], name, 1)
        if _bare(changed).model == model:  # else a nested one was it, and ours is spelled oddly
            return changed
    return msgspec.json.encode({**_anything(body), "model": model})


def unmistakable(body: bytes) -> bytes:
    """The body with one model only, the one that was checked: the last, as here, where many are.

    Go's reader, and so Ollama, takes `Model` for `model`; others may take the first of two.
    """
    text = body.lower()
    if sum(map(text.count, _SPELLINGS)) < 2 or _named(body).count("model") < 2:
        return body
    fields = _fields(body)
    return msgspec.json.encode(
        {
            name: value
            for name, value in fields.items()
            if name == "model" or name.lower() != "model"
        }
    )


def _named(body: bytes) -> list[str]:
    """The names of all fields, in lower case and as often as they are there."""
    found: list[tuple[str, object]] = json.loads(body, object_pairs_hook=list)
    return [name.lower() for name, _ in found]


def _unlike_chat(body: bytes) -> _Bare:
    """Model and stream of a body whose other fields are for the engine to refuse."""
    try:
        return _bare(body)
    except msgspec.ValidationError as problem:
        param = "stream" if str(problem).endswith("`$.stream`") else "model"
        raise BadRequest(f"{problem}", param) from None
    except UNREADABLE:
        raise BadRequest(_NO_JSON) from None


def _said_by_user(message: memoryview) -> bool:
    """Whether its role, which clients write first or last, is user; without reading it all."""
    return bool(_USER.search(message[:_NEAR]) or _USER.search(message[-_NEAR:]))


def _affinity(body: _Body) -> int:
    """Equal for the turns of one conversation: its system prompt and first question."""
    if body.prompt_cache_key:
        return zlib.crc32(body.prompt_cache_key.encode())
    if body.messages is UNSET:
        return 0 if body.prompt is UNSET else zlib.crc32(memoryview(body.prompt)[:_HASHED])
    found = 1
    for message in body.messages[:3]:
        found = zlib.crc32(memoryview(message)[:_HASHED], found)
        if _said_by_user(memoryview(message)):
            break
    return found
