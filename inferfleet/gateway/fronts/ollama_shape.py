"""Answers of engines that speak OpenAI's format, as Ollama gives them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct

from inferfleet.gateway.backends import error_text
from inferfleet.gateway.fronts.ollama_wire import UNREADABLE, made_id, remember, stamp

LINES = "application/x-ndjson"
WHOLE = "application/json; charset=utf-8"
_encode = msgspec.json.encode
_arguments = msgspec.json.Decoder(dict[str, Raw])


class _Function(Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None  # TGI gives an object in whole answers


class _Call(Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # vLLM's name for it until 0.12, and that of others
    tool_calls: list[_Call] | None = None


class _Choice(Struct):
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Vector(Struct):
    embedding: Raw
    index: int = 0


class _Vectors(Struct):
    data: list[_Vector]
    usage: _Usage | None = None


_chunk = msgspec.json.Decoder(_Chunk).decode
_vectors = msgspec.json.Decoder(_Vectors).decode


def _tokens(choice: _Choice) -> Any:
    """The probabilities of a chat's tokens, which have the same form on both sides."""
    return choice.logprobs.get("content") if isinstance(choice.logprobs, dict) else None


def error_line(message: str) -> bytes:
    """An error within a stream."""
    return _encode({"error": message}) + b"\n"


class Answer:
    """One answer to /api/chat, or with `turns` and `response` to /api/generate."""

    def __init__(
        self,
        model: str,
        *,
        stream: bool,
        generate: bool = False,
        turns: list[tuple[str, str]] | None = None,
        now: Callable[[], int] = time.time_ns,
    ) -> None:
        self.content_type = LINES if stream else WHOLE
        self._model, self._generate, self._now = model, generate, now
        self._head = b'{"model":' + _encode(model) + b',"created_at":"'
        self._open = b'","response":' if generate else b'","message":{"role":"assistant","content":'
        self._close = b',"done":false}\n' if generate else b'},"done":false}\n'
        self._turns = turns  # what was said, where the client may hand it back as `context`
        self._said: list[str] = []
        self._rest = b""  # of an event that has not come whole yet
        self._calls: dict[int, _Gathered] = {}
        self._usage: _Usage | None = None
        self._reason = ""
        self._done = False
        self._began, self._first = now(), 0

    def feed(self, data: bytes) -> bytes:
        """Lines for the events that came whole with these bytes."""
        if self._rest:
            data = self._rest + data
        lines = data.split(b"\n")
        self._rest = lines.pop()
        return b"".join([self._line(line) for line in lines if line])

    def end(self) -> bytes:
        """The last line, unless [DONE] called for it already."""
        rest, self._rest = self._rest, b""
        return self._line(rest) + self._finish()

    def whole(self, body: bytes) -> bytes:
        """The one object that an answer without stream is."""
        try:
            found = _chunk(body)
            choice = (found.choices or [])[0]
        except (*UNREADABLE, IndexError):
            return _encode({"error": "the engine's answer cannot be read"})
        self._usage, self._reason = found.usage, choice.finish_reason or ""
        message = choice.message or _Message(choice.text)
        self._gather(message.tool_calls or [])
        calls, left = self._called()
        text = (message.content or "") + left
        self._said.append(text)
        return _encode(
            self._last(text, message.reasoning or message.reasoning_content, calls, choice)
        )

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:") or self._done:
            return b""  # an empty line, a comment that keeps the connection open, an event's name
        data = line[5:].strip()
        if data == b"[DONE]":
            return self._finish()
        try:
            chunk = _chunk(data)
        except UNREADABLE:
            return self._fail("the engine sent an event that cannot be read")
        if chunk.error is not None:
            return self._fail(error_text(data)[0])
        if chunk.usage is not None:
            self._usage = chunk.usage
        return self._piece(chunk.choices[0]) if chunk.choices else b""

    def _piece(self, choice: _Choice) -> bytes:
        delta = choice.delta or _Message(choice.text)
        text, thought = delta.content, delta.reasoning or delta.reasoning_content
        if delta.tool_calls:
            self._gather(delta.tool_calls)
        if choice.finish_reason:
            self._reason = choice.finish_reason
        if not text and not thought:
            return b""
        return self._told(text or "", thought, choice)

    def _told(self, text: str, thought: str | None, choice: _Choice) -> bytes:
        now = self._now()
        if not self._first:
            self._first = now
        if self._turns is not None:
            self._said.append(text)
        line = self._head + stamp(now).encode() + self._open + _encode(text)
        if thought:
            line += b',"thinking":' + _encode(thought)
        if not (tokens := _tokens(choice)):
            return line + self._close
        brace = b"" if self._generate else b"}"
        return line + brace + b',"logprobs":' + _encode(tokens) + b',"done":false}\n'

    def _gather(self, parts: list[_Call]) -> None:
        """Calls come in pieces, and Ollama's clients expect them whole."""
        for position, part in enumerate(parts):
            index = position if part.index is None else part.index
            self._calls.setdefault(index, _Gathered()).add(part)

    def _called(self) -> tuple[list[dict[str, Any]], str]:
        """The gathered calls, and the text of those whose arguments are no object."""
        calls, left = [], ""
        for position, call in enumerate(self._calls.values()):
            text = "".join(call.arguments) or "{}"
            try:
                _arguments.decode(text)
            except UNREADABLE:
                left += text
                continue
            function = {"index": position, "name": call.name, "arguments": Raw(text.encode())}
            calls.append({"id": call.id or made_id(position), "function": function})
        self._calls = {}
        return calls, left

    def _finish(self) -> bytes:
        if self._done:
            return b""
        self._done = True
        calls, left = self._called()
        out = self._told(left, None, _Choice()) if left else b""
        if calls:
            now = stamp(self._now())
            message = {"role": "assistant", "content": "", "tool_calls": calls}
            body = {"response": "", "tool_calls": calls} if self._generate else {"message": message}
            line = {"model": self._model, "created_at": now, **body, "done": False}
            out += _encode(line) + b"\n"
        return out + _encode(self._last("", None, [], None)) + b"\n"

    def _fail(self, message: str) -> bytes:
        self._done = True
        return error_line(message)

    def _last(
        self,
        text: str,
        thought: str | None,
        calls: list[dict[str, Any]],
        choice: _Choice | None,
    ) -> dict[str, Any]:
        """The object that ends an answer, with its numbers."""
        now = self._now()
        said: dict[str, Any] = {"thinking": thought} if thought else {}
        if calls:
            said["tool_calls"] = calls
        body: dict[str, Any] = (
            {"response": text, **said}
            if self._generate
            else {"message": {"role": "assistant", "content": text, **said}}
        )
        last = {"model": self._model, "created_at": stamp(now), **body}
        if choice and (tokens := _tokens(choice)):
            last["logprobs"] = tokens
        last |= {"done": True, "done_reason": "length" if self._reason == "length" else "stop"}
        if self._turns is not None:
            turns = [*self._turns, ("assistant", "".join(self._said))]
            if context := remember(turns):
                last["context"] = context
        return last | self._numbers(now)

    def _numbers(self, now: int) -> dict[str, int]:
        """Durations in nanoseconds, as seen from here, and the engine's counts."""
        found = {"total_duration": now - self._began, "load_duration": 0}
        usage = self._usage or _Usage()
        if usage.prompt_tokens is not None:
            found["prompt_eval_count"] = usage.prompt_tokens
        if self._first:  # of a whole answer nobody knows when its first token came
            found["prompt_eval_duration"] = self._first - self._began
        if usage.completion_tokens is not None:
            found["eval_count"] = usage.completion_tokens
        # clients divide by it
        found["eval_duration"] = max(1, now - (self._first or self._began))
        return found


class _Gathered:
    """One call, as far as it has come."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self) -> None:
        self.id, self.name = "", ""
        self.arguments: list[str] = []

    def add(self, part: _Call) -> None:
        self.id = self.id or part.id or ""
        if function := part.function:
            self.name = self.name or function.name or ""
            given = function.arguments
            if given is not None:
                self.arguments.append(given if isinstance(given, str) else _encode(given).decode())


class Vectors:
    """One answer to /api/embed, or to the older /api/embeddings, which takes one text."""

    content_type = WHOLE

    def __init__(self, model: str, *, one: bool, now: Callable[[], int] = time.time_ns) -> None:
        self._model, self._one, self._now, self._began = model, one, now, now()

    def feed(self, data: bytes) -> bytes:
        """Vectors are never streamed."""
        return data

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def whole(self, body: bytes) -> bytes:
        """The vectors, copied unread."""
        try:
            found = _vectors(body)
        except UNREADABLE:
            return _encode({"error": "the engine's answer cannot be read"})
        vectors = [one.embedding for one in sorted(found.data, key=lambda one: one.index)]
        if self._one:
            return _encode({"embedding": vectors[0] if vectors else []})
        answer: dict[str, Any] = {"model": self._model, "embeddings": vectors}
        answer |= {"total_duration": self._now() - self._began, "load_duration": 0}
        if found.usage and found.usage.prompt_tokens is not None:
            answer["prompt_eval_count"] = found.usage.prompt_tokens
        return _encode(answer)
