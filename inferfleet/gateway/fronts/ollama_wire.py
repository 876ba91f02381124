"""Requests as Ollama's clients write them, and what both directions of a translation share.

Field names are those of ollama/ollama, api/types.go. Null stands for a field left out, as in Go.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from inferfleet.gateway.request import BadRequest

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NULL = Raw(b"null")
_LEVELS = ("low", "medium", "high", "max")
_NOTHING = ("0", "0s", "0m", "0h")
_OURS = -1
_LONGEST_MEMORY = 8192  # bytes; it is meant for short exchanges, and 4 bytes of JSON carry one


class Function(Struct):
    """A function that was called; `arguments` is an object, not text as in OpenAI's format."""

    name: str
    arguments: Raw = _NULL


class ToolCall(Struct):
    """A call in a message of the assistant."""

    function: Function
    id: str | None = None


class Message(Struct):
    """One message. `images` are base64; `tool_name` tells whose result a tool's message is."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Options(Struct):
    """Those options that mean something to other engines. Whole numbers may come as 1.0."""

    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | str | None = None
    seed: float | None = None
    num_predict: float | None = None
    top_k: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None


class Asked(Struct, kw_only=True):
    """What chat and generate have in common."""

    model: str | None = None
    stream: bool | None = None
    format: Raw = _NULL
    options: Options | None = None
    think: bool | str | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Chat(Asked):
    """The body of /api/chat."""

    messages: list[Message] | None = None
    tools: list[Raw] | None = None


class Generate(Asked):
    """The body of /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class Embed(Struct):
    """The body of /api/embed, or with `prompt` that of the older /api/embeddings."""

    model: str | None = None
    input: str | list[str] | None = None
    prompt: str | UnsetType | None = UNSET
    truncate: bool | None = None
    dimensions: int | None = None


Found = TypeVar("Found", Chat, Generate, Embed)
chat_decoder = msgspec.json.Decoder(Chat)
generate_decoder = msgspec.json.Decoder(Generate)
embed_decoder = msgspec.json.Decoder(Embed)


def decoded(decoder: msgspec.json.Decoder[Found], body: bytes) -> Found:
    """A request's body; BadRequest for whatever is no such body."""
    if not body:
        raise BadRequest("missing request body")
    try:
        if not body.isascii():
            str(body, "utf-8")  # else what is passed on unread would be checked by nobody
        found = decoder.decode(body)
    except UNREADABLE as error:
        raise BadRequest(str(error)) from None
    if not found.model:
        raise BadRequest("model is required", "model")
    check_think(getattr(found, "think", None))
    return found


def check_think(think: bool | str | None) -> None:
    """BadRequest for a word that is no level of thinking."""
    if isinstance(think, str) and think not in _LEVELS:
        words = ", ".join(f'"{level}"' for level in _LEVELS)
        raise BadRequest(f'invalid think value: "{think}" (must be true, false, {words})', "think")


def unloads(keep_alive: float | str | None) -> bool:
    """Whether an empty request with it asks to free the model's memory."""
    return keep_alive is not None and (keep_alive == 0 or keep_alive in _NOTHING)


def made_id(number: int) -> str:
    """An id for a call that has none: nine letters and digits, which Mistral's templates demand."""
    return f"call{number:05d}"


def stamp(now: int) -> str:
    """A moment in nanoseconds since the epoch, as RFC 3339."""
    seconds, rest = divmod(now, 1_000_000_000)
    return f"{_second(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def remember(turns: list[tuple[str, str]]) -> list[int] | None:
    """A conversation as the numbers of `context`; None where it is too long to carry along.

    Ollama gives its tokens there, which no other engine could read back, and clients only hand
    it back. So here it is bytes, behind a number that is no token.
    """
    data = msgspec.json.encode(turns)
    return [_OURS, *data] if len(data) <= _LONGEST_MEMORY else None


def recall(context: list[int] | None) -> list[tuple[str, str]]:
    """The conversation in a `context` that `remember` made; BadRequest for any other."""
    if not context:
        return []
    try:
        if context[0] != _OURS:
            raise ValueError
        return msgspec.json.decode(bytes(context[1:]), type=list[tuple[str, str]])
    except (*UNREADABLE, ValueError):
        raise BadRequest("context: another engine made it; begin anew", "context") from None
