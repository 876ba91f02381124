"""Ollama's requests as OpenAI's, for the engines that know only those."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from inferfleet.gateway.backends import adapt
from inferfleet.gateway.fronts.ollama_wire import (
    Asked,
    Chat,
    Embed,
    Generate,
    Message,
    Options,
    ToolCall,
    made_id,
    recall,
)
from inferfleet.gateway.request import Backend, BadRequest

_SAME = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop")
_SIGNATURES = (("iVBOR", "png"), ("/9j/", "jpeg"), ("R0lGOD", "gif"), ("UklGR", "webp"))


def chat(asked: Chat, backend: Backend, model: str) -> bytes:
    """The body for /v1/chat/completions. BadRequest where `format` is none."""
    body = common(asked, backend, model, completion=False)
    body["messages"] = messages(asked.messages or [], backend)
    if asked.tools:
        body["tools"] = asked.tools
    return msgspec.json.encode(adapt(backend, body))


def prompted(asked: Generate, backend: Backend, model: str) -> bytes:
    """The body for /v1/chat/completions of a generate whose prompt the engine's template wraps."""
    body = common(asked, backend, model, completion=False)
    question = Message("user", asked.prompt, images=asked.images)
    body["messages"] = [
        *({"role": role, "content": text} for role, text in turns(asked)),
        {"role": "user", "content": content(question)},
    ]
    return msgspec.json.encode(adapt(backend, body))


def turns(asked: Generate) -> list[tuple[str, str]]:
    """Roles and texts before the prompt: what `context` tells, under the system's message."""
    told = recall(asked.context)
    if asked.system:
        return [("system", asked.system), *(turn for turn in told if turn[0] != "system")]
    return told


def completion(asked: Generate, backend: Backend, model: str) -> bytes:
    """The body for /v1/completions: a prompt as it is, or the text before and after a gap."""
    if asked.images:
        raise BadRequest("images: this engine takes them only without raw and suffix", "images")
    if asked.raw and (asked.system or asked.context):
        raise BadRequest("raw mode does not support template, system, or context", "raw")
    # null: as long as it gets; left out it would be 16 tokens
    body = {"max_tokens": None, **common(asked, backend, model, completion=True)}
    body["prompt"] = asked.prompt or ""
    if asked.suffix and not asked.raw:
        body["suffix"] = asked.suffix
    return msgspec.json.encode(adapt(backend, body))


def embeddings(asked: Embed, backend: Backend, model: str) -> bytes:
    """The body for /v1/embeddings."""
    text = asked.prompt if isinstance(asked.prompt, str) else asked.input
    body: dict[str, Any] = {"model": model, "input": text, "encoding_format": "float"}
    if asked.dimensions:
        body["dimensions"] = asked.dimensions
    if backend == "vllm" and asked.truncate is not False:
        body["truncate_prompt_tokens"] = -1  # to what fits, as Ollama does unless told not to
    return msgspec.json.encode(body)


def common(asked: Asked, backend: Backend, model: str, *, completion: bool) -> dict[str, Any]:
    """The fields that are the same for a chat and a completion."""
    body: dict[str, Any] = {"model": model}
    if asked.stream is not False:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    if asked.options:
        body.update(sampling(asked.options, backend, completion=completion))
    if not completion or backend == "vllm":
        body.update(response_format(asked.format))
    if not completion:
        body.update(thinking(asked.think, backend))
        if asked.logprobs:
            body["logprobs"] = True
            if asked.top_logprobs:
                body["top_logprobs"] = asked.top_logprobs
    return body


def sampling(options: Options, backend: Backend, *, completion: bool) -> dict[str, Any]:
    """The options under OpenAI's names; external providers refuse names they do not know."""
    found = {name: value for name in _SAME if (value := getattr(options, name)) is not None}
    if options.num_predict is not None and options.num_predict > 0:  # -1 and -2: no limit
        found["max_tokens"] = int(options.num_predict)
    if options.seed is not None and options.seed >= 0:  # -1: another one each time
        found["seed"] = int(options.seed)
    if options.repeat_penalty is not None and (
        backend == "vllm" or (backend == "tgi" and completion)
    ):
        found["repetition_penalty"] = options.repeat_penalty
    if backend == "vllm":
        if options.min_p is not None:
            found["min_p"] = options.min_p
        if options.top_k is not None:
            found["top_k"] = int(options.top_k) if options.top_k > 0 else -1
    return found


def response_format(wanted: Raw) -> dict[str, Any]:
    """`format`: nothing, "json", or a schema. BadRequest for anything else."""
    text = bytes(wanted)
    if text in (b"null", b'""'):
        return {}
    if text == b'"json"':
        return {"response_format": {"type": "json_object"}}
    if text[:1] == b"{":
        schema = {"name": "answer", "schema": wanted}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    raise BadRequest('invalid format; expected "json" or a JSON schema', "format")


def thinking(think: bool | str | None, backend: Backend) -> dict[str, Any]:
    """Templates of different models have different names for the switch and ignore the others."""
    found: dict[str, Any] = {}
    if think is None or backend == "tgi":
        return found
    if isinstance(think, str):
        found["reasoning_effort"] = think
    if backend == "vllm":
        switch = bool(think)
        found["chat_template_kwargs"] = {"enable_thinking": switch, "thinking": switch}
    return found


def messages(found: list[Message], backend: Backend) -> list[dict[str, Any]]:
    """The messages, where calls and their results are bound by ids that Ollama need not have."""
    out: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []  # calls without a result: id, name
    number = 0
    for message in found:
        one: dict[str, Any] = {"role": message.role, "content": content(message)}
        if message.thinking and backend == "vllm":
            one["reasoning"] = one["reasoning_content"] = message.thinking  # new name, old name
        if message.tool_calls:
            one["tool_calls"] = made = [
                called(call, number + position) for position, call in enumerate(message.tool_calls)
            ]
            number += len(made)
            waiting = [(call["id"], call["function"]["name"]) for call in made]
        if message.role == "tool":
            one["tool_call_id"] = message.tool_call_id or answered(waiting, message.tool_name)
        out.append(one)
    return out


def called(call: ToolCall, number: int) -> dict[str, Any]:
    """A call as OpenAI's format has it: arguments are text."""
    arguments = bytes(call.function.arguments).decode("utf-8", "replace")
    if arguments[:1] == '"':
        arguments = msgspec.json.decode(arguments)  # a client that sends text already
    elif arguments == "null":
        arguments = "{}"
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or made_id(number), "type": "function", "function": function}


def answered(waiting: list[tuple[str, str]], name: str | None) -> str:
    """The id of the call that a result belongs to: by name, else in order."""
    if not waiting:
        return made_id(0)
    position = next((i for i, call in enumerate(waiting) if call[1] == name), 0)
    return waiting.pop(position)[0]


def content(message: Message) -> str | list[dict[str, Any]]:
    """Text, or parts where there are images."""
    if not message.images:
        return message.content or ""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in message.images
    ]
    return [{"type": "text", "text": message.content}, *parts] if message.content else parts


def data_url(image: str) -> str:
    """A base64 image as a URL; its type is read from its first bytes."""
    if image.startswith("data:"):
        return image
    kind = next((kind for start, kind in _SIGNATURES if image.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{image}"
