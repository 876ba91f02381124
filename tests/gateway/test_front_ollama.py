"""The Ollama front, read by Ollama's own Python client and by OpenAI's types."""

import asyncio
import json
import typing
from contextlib import asynccontextmanager
from itertools import pairwise

import ollama as client
import pytest
from aiohttp import web
from hypothesis import event, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import TypeAdapter

from inferfleet.gateway.fronts import ollama
from inferfleet.gateway.fronts.ollama_shape import Answer
from inferfleet.gateway.fronts.ollama_wire import stamp
from inferfleet.gateway.request import BadRequest

BACKENDS = ("vllm", "tgi", "ollama", "openai")
PATHS = {
    "/api/chat": ollama.chat,
    "/api/generate": ollama.generate,
    "/api/embed": ollama.embed,
    "/api/embeddings": ollama.embed,
}


def sse(*chunks, done=True):
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def piece(delta=None, finish=None, **more):
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **more}]}


def tool(index, id=None, name=None, arguments=""):
    call = {"index": index, "function": {"name": name, "arguments": arguments}}
    return call | ({"id": id, "type": "function"} if id else {})


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}
STREAM = sse(
    piece({"role": "assistant", "content": ""}),
    piece({"reasoning": "hm"}),
    piece({"content": "Grüße "}),
    piece({"content": "🦙\n"}),
    piece({"tool_calls": [tool(0, "a1", "weather", '{"city": "Bern",')]}),
    piece({"tool_calls": [tool(0, arguments='"days": 2}'), tool(1, "a2", "time")]}),
    piece(finish="tool_calls"),
    USAGE,
)


def asked(parse, **fields):
    return parse(json.dumps(fields).encode())


def chat(*messages, **fields):
    said = [{"role": "user", "content": "hi"}] if not messages else list(messages)
    return asked(ollama.chat, **{"model": "m", "messages": said, **fields})


def body(request, backend="vllm"):
    return json.loads(request.call(backend, "real").body)


def lines(shape, *data):
    out = b"".join(shape.feed(one) for one in data) + shape.end()
    return [json.loads(line) for line in out.splitlines()]


@asynccontextmanager
async def gateway(answer, backend="vllm"):
    """An HTTP server that is the front; where an engine would be asked, `answer` is its answer."""
    calls = []

    async def handle(request):
        front = PATHS[request.path](await request.read())
        if front.answer is not None:
            return web.Response(body=front.answer, content_type="application/json")
        call = front.call(backend, "real")
        calls.append((call.path, json.loads(call.body)))
        if not front.stream:
            return web.Response(
                body=call.shape.whole(answer), headers={"Content-Type": call.shape.content_type}
            )
        response = web.StreamResponse(headers={"Content-Type": call.shape.content_type})
        await response.prepare(request)
        for start in range(0, len(answer), 11):
            if out := call.shape.feed(answer[start : start + 11]):
                await response.write(out)
        await response.write(call.shape.end())
        return response

    app = web.Application()
    app.add_routes([web.post(path, handle) for path in PATHS])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        speaker = client.AsyncClient(host=f"http://127.0.0.1:{port}")
        yield speaker, calls
        await speaker.close()
    finally:
        await runner.cleanup()


def run(answer, use, backend="vllm"):
    async def main():
        async with gateway(answer, backend) as (speaker, calls):
            return await use(speaker), calls

    return asyncio.run(main())


def test_the_ollama_package_streams_a_chat_with_tools():
    def weather(city: str, days: int) -> str:
        """The weather.

        Args:
            city: where
            days: how far ahead
        """

    async def use(speaker):
        said = [{"role": "user", "content": "How is it in Bern?"}]
        parts = await speaker.chat("m", said, tools=[weather], stream=True, think=True)
        return [part async for part in parts]

    parts, [(path, sent)] = run(STREAM, use)
    assert path == "/v1/chat/completions"
    assert sent["tools"][0]["function"]["parameters"]["required"] == ["city", "days"]
    assert sent["chat_template_kwargs"]["enable_thinking"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert [part.message.thinking for part in parts if part.message.thinking] == ["hm"]
    assert "".join(part.message.content for part in parts) == "Grüße 🦙\n"
    calls = [call.function for part in parts for call in part.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", {"city": "Bern", "days": 2}),
        ("time", {}),
    ]
    last = parts[-1]
    assert (last.done, last.done_reason, last.model) == (True, "stop", "m")
    assert (last.prompt_eval_count, last.eval_count) == (7, 3)
    assert last.total_duration == last.prompt_eval_duration + last.eval_duration > 0
    assert not any(part.done for part in parts[:-1])


def test_the_ollama_package_gets_a_whole_chat():
    function = {"name": "weather", "arguments": '{"city": "Bern"}'}
    call = {"id": "x", "type": "function", "function": function}
    message = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "hm",
        "tool_calls": [call],
    }
    answer = {
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }

    async def use(speaker):
        return await speaker.chat("m", [{"role": "user", "content": "?"}], options={"num_ctx": 9})

    found, [(_, sent)] = run(json.dumps(answer).encode(), use)
    assert sent == {"model": "real", "messages": [{"role": "user", "content": "?"}]}
    assert found.message.thinking == "hm"
    assert found.message.tool_calls[0].function.arguments == {"city": "Bern"}
    assert (found.message.content, found.done_reason, found.eval_count) == ("", "length", 3)


def test_a_result_of_a_tool_finds_its_call():
    def call(name):
        return {"function": {"name": name, "arguments": {"a": 1}}}

    request = chat(
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call("f"), call("g")]},
        {"role": "tool", "tool_name": "g", "content": "G"},
        {"role": "tool", "content": "F"},
        {"role": "assistant", "tool_calls": [call("f")]},
        {"role": "tool", "tool_name": "f", "content": "F2"},
        {"role": "tool", "tool_call_id": "own", "content": "?"},
    )
    said = body(request)["messages"]
    ids = [one["id"] for message in said for one in message.get("tool_calls", ())]
    assert len(set(ids)) == 3
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    results = [message["tool_call_id"] for message in said if message["role"] == "tool"]
    assert results == [ids[1], ids[0], ids[2], "own"]
    assert said[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_the_ollama_package_generates_and_carries_the_context_on():
    answer = sse(piece({"content": "Bern"}), piece(finish="stop"), USAGE)

    async def use(speaker):
        first = [
            part async for part in await speaker.generate("m", "Capital?", system="s", stream=True)
        ]
        await anext(
            aiter(await speaker.generate("m", "Sure?", context=first[-1].context, stream=True))
        )
        return first

    first, calls = run(answer, use)
    assert [part.response for part in first] == ["Bern", ""]
    assert [path for path, _ in calls] == ["/v1/chat/completions"] * 2
    assert [(m["role"], m["content"]) for m in calls[1][1]["messages"]] == [
        ("system", "s"),
        ("user", "Capital?"),
        ("assistant", "Bern"),
        ("user", "Sure?"),
    ]


def test_raw_prompts_and_gaps_are_completions():
    answer = sse({"choices": [{"text": "42", "finish_reason": "stop"}]}, USAGE)

    async def use(speaker):
        parts = await speaker.generate("m", "1+1=", raw=True, stream=True)
        return [part async for part in parts]

    parts, [(path, sent)] = run(answer, use)
    assert (path, sent["prompt"], sent["max_tokens"]) == ("/v1/completions", "1+1=", None)
    assert [part.response for part in parts] == ["42", ""]
    assert parts[-1].context is None
    gap = asked(ollama.generate, model="m", prompt="def f(", suffix="return", system="s")
    assert gap.call("tgi", "real").path == "/v1/completions"
    assert body(gap, "tgi")["suffix"] == "return"


def test_the_ollama_package_embeds():
    data = [{"index": 1, "embedding": [3, 4.5]}, {"index": 0, "embedding": [1, 2]}]
    answer = {"data": data, "usage": {"prompt_tokens": 5, "total_tokens": 5}}

    async def use(speaker):
        return await speaker.embed("m", ["a", "b"], dimensions=2), await speaker.embeddings(
            "m", "a"
        )

    (new, old), calls = run(json.dumps(answer).encode(), use)
    assert list(new.embeddings) == [[1, 2], [3, 4.5]]
    assert new.prompt_eval_count == 5
    assert list(old.embedding) == [1, 2]
    assert calls[0][0] == "/v1/embeddings"
    assert calls[0][1]["input"] == ["a", "b"]
    assert calls[0][1]["dimensions"] == 2
    assert calls[1][1]["input"] == "a"
    assert asked(ollama.embed, model="m", prompt="a").call("ollama", "m").path == "/api/embeddings"
    assert asked(ollama.embed, model="m", input="a").call("ollama", "m").path == "/api/embed"


def test_empty_requests_load_and_unload_without_an_engine():
    async def use(speaker):
        return (
            await speaker.chat("m", []),
            await speaker.generate("m", ""),
            await speaker.generate("m", "", keep_alive=0),
            await speaker.chat("m", [], keep_alive="0s"),
            await speaker.embed("m", []),
        )

    found, calls = run(b"", use)
    assert calls == []
    assert [one.done_reason for one in found[:4]] == ["load", "load", "unload", "unload"]
    assert found[4].embeddings == []


def test_an_error_of_the_engine_reaches_the_ollama_package():
    answer = sse(piece({"content": "a"}), {"error": {"message": "CUDA is gone", "type": "x"}})

    async def use(speaker):
        parts = await speaker.chat("m", [{"role": "user", "content": "?"}], stream=True)
        with pytest.raises(client.ResponseError, match="CUDA is gone"):
            [part async for part in parts]

    run(answer, use)
    assert json.loads(chat().cut("gone")) == {"error": "gone"}
    assert chat().cut("gone").endswith(b"\n")
    assert json.loads(chat().failed(503, "busy", "server_error")) == {"error": "busy"}


def test_over_ollama_bytes_pass_untouched_or_with_the_model_renamed():
    said = b'"messages": [{"role": "user", "content": "\xc3\xa9"}]'
    sent = b'{"model": "m", "x": {"model": 1.0}, ' + said + b"}"
    request = ollama.chat(sent)
    same = request.call("ollama", "m")
    assert (same.path, same.body, same.shape, same.own_errors) == ("/api/chat", sent, None, True)
    assert same.end == b'"done":true'
    assert json.loads(request.call("ollama", "n").body) == json.loads(sent) | {"model": "n"}


OPTIONS = {
    "temperature": 0,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 1.0,
    "stop": ["a"],
    "num_predict": 5,
    "repeat_penalty": 1.1,
    "num_ctx": 4096,
    "mirostat": 1,
}
COMMON = {"temperature": 0.0, "top_p": 0.9, "seed": 1, "stop": ["a"], "max_tokens": 5}


@pytest.mark.parametrize(
    ("backend", "own"),
    [
        ("vllm", {"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1}),
        ("tgi", {}),
        ("openai", {}),
    ],
)
def test_options_go_where_they_are_known(backend, own):
    found = body(chat(options=OPTIONS, stream=False), backend)
    assert {k: v for k, v in found.items() if k not in ("model", "messages")} == COMMON | own


def test_options_that_mean_no_limit_are_left_out():
    for number in (-1, -2, 0):
        found = body(chat(options={"num_predict": number, "seed": -1, "top_k": 0}))
        assert "max_tokens" not in found
        assert "seed" not in found
        assert found["top_k"] == -1


@pytest.mark.parametrize(
    ("think", "backend", "expected"),
    [
        (True, "vllm", {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
        (False, "vllm", {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
        (
            "low",
            "vllm",
            {
                "reasoning_effort": "low",
                "chat_template_kwargs": {"enable_thinking": True, "thinking": True},
            },
        ),
        ("high", "openai", {"reasoning_effort": "high"}),
        (True, "openai", {}),
        (None, "vllm", {}),
        ("low", "tgi", {}),
    ],
)
def test_thinking(think, backend, expected):
    found = body(chat(think=think), backend)
    keys = ("reasoning_effort", "chat_template_kwargs")
    assert {key: found[key] for key in keys if key in found} == expected


def test_formats():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert body(chat(format="json"))["response_format"] == {"type": "json_object"}
    found = body(chat(format=schema))["response_format"]
    assert found["json_schema"]["schema"] == schema
    assert body(chat(format=schema), "tgi")["response_format"] == {
        "type": "json_object",
        "value": schema,
    }
    assert "response_format" not in body(chat(format=""))


def test_images_become_urls_with_their_own_type():
    images = ["iVBORw0KGgoAAAA", "/9j/4AAQ", "UklGRgAA", "data:image/gif;base64,R0lGOD"]
    parts = body(chat({"role": "user", "content": "?", "images": images}))["messages"][0]["content"]
    assert parts[0] == {"type": "text", "text": "?"}
    kinds = [part["image_url"]["url"].split(";")[0] for part in parts[1:]]
    assert kinds == ["data:image/png", "data:image/jpeg", "data:image/webp", "data:image/gif"]


PARTS = {
    "options": OPTIONS,
    "format": {"type": "object"},
    "think": "low",
    "logprobs": True,
    "top_logprobs": 2,
}


@pytest.mark.parametrize(
    ("request_", "params"),
    [
        (
            chat(
                {"role": "system", "content": "s"},
                {"role": "user", "content": "?", "images": ["iVBORw0K"]},
                {
                    "role": "assistant",
                    "thinking": "t",
                    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
                },
                {"role": "tool", "tool_name": "f", "content": "1"},
                tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
                **PARTS,
            ),
            chat_create_params.CompletionCreateParamsStreaming,
        ),
        (
            asked(ollama.generate, model="m", prompt="?", system="s", **PARTS),
            chat_create_params.CompletionCreateParamsStreaming,
        ),
        (
            asked(ollama.generate, model="m", prompt="?", raw=True, **PARTS),
            completion_create_params.CompletionCreateParamsStreaming,
        ),
        (
            asked(ollama.embed, model="m", input=["a"], dimensions=3),
            embedding_create_params.EmbeddingCreateParams,
        ),
    ],
)
def test_an_external_provider_gets_only_what_openai_has(request_, params):
    sent = body(request_, "openai")
    assert set(sent) <= set(typing.get_type_hints(params))
    TypeAdapter(params).validate_python(sent)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (ollama.chat, b"", "missing request body"),
        (ollama.chat, b"{", "truncated"),
        (ollama.chat, b'{"messages": []}', "model is required"),
        (ollama.chat, b'{"model": null}', "model is required"),
        (ollama.chat, b'{"model": "m", "messages": [{"content": 1}]}', "content"),
        (ollama.chat, b'{"model": "m", "think": "very"}', "think"),
        (ollama.chat, b'{"model": "m", "options": {"top_k": "x"}}', "top_k"),
        (ollama.chat, b'{"model": "\xff"}', "utf-8"),
        (ollama.chat, b'{"x": ' + b"[" * 100000, "recursion"),
        (ollama.generate, b'{"model": "m", "prompt": []}', "prompt"),
        (ollama.embed, b'{"model": "m", "input": [1]}', "input"),
    ],
)
def test_what_is_wrong_is_told(parse, text, message):
    with pytest.raises(BadRequest, match=message):
        parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"template": "{{ .Prompt }}"},
        {"raw": True, "images": ["iVBORw0K"]},
        {"raw": True, "system": "s"},
        {"context": [1, 2, 3]},
        {"format": 3},
    ],
)
def test_what_only_ollama_can_do_is_refused_over_others(fields):
    request = asked(ollama.generate, model="m", prompt="?", **fields)
    assert request.call("ollama", "m").path == "/api/generate"
    with pytest.raises(BadRequest):
        request.call("vllm", "m")


def test_streams_that_end_otherwise():
    def shape():
        return Answer("m", stream=True)

    windows = STREAM.replace(b"\n", b"\r\n")
    contents = [line["message"]["content"] for line in lines(shape(), windows)]
    assert contents == [line["message"]["content"] for line in lines(shape(), STREAM)]
    comments = b": keep-alive\n\nevent: x\n" + sse(piece({"content": "a"}), done=False)
    [first, last] = lines(shape(), comments)
    assert first["message"]["content"] == "a"
    assert last["done"] is True
    assert "eval_count" not in last
    assert "prompt_eval_count" not in last
    [error] = lines(shape(), b"data: {oops\n\n", sse(piece({"content": "late"})))
    assert "error" in error
    [only] = lines(shape(), b"data: [DONE]")
    assert only["done"] is True


def test_a_call_without_whole_arguments_is_not_lost():
    stream = sse(piece({"tool_calls": [tool(0, "a", "f", '{"a": ')]}), piece(finish="length"))
    [text, last] = lines(Answer("m", stream=True), stream)
    assert text["message"]["content"] == '{"a": '
    assert last["done_reason"] == "length"


def test_logprobs_are_passed_on():
    content = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
    stream = sse(piece({"content": "a"}, logprobs={"content": content}))
    [first, _] = lines(Answer("m", stream=True), stream)
    assert first["logprobs"] == content
    assert client.ChatResponse(**first).logprobs[0].logprob == -0.5
    [first, _] = lines(Answer("m", stream=True, generate=True), stream)
    assert (first["response"], first["logprobs"]) == ("a", content)


def test_moments_are_written_to_the_nanosecond():
    assert stamp(1_700_000_000_000_000_042) == "2023-11-14T22:13:20.000000042Z"


def test_turns_of_a_conversation_share_their_affinity():
    first = {"role": "user", "content": "a"}
    other = chat({"role": "user", "content": "b"})
    longer = chat(first, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"})
    assert chat(first).affinity == longer.affinity != other.affinity


@given(st.lists(st.integers(0, len(STREAM)), max_size=40), st.booleans())
def test_however_a_stream_is_cut_the_output_is_the_same(cuts, generate):
    def out(*data):
        turns = [] if generate else None
        shape = Answer("m", stream=True, generate=generate, turns=turns, now=lambda: 5_000_000_000)
        return b"".join(shape.feed(one) for one in data) + shape.end()

    edges = [0, *sorted(cuts), len(STREAM)]
    assert out(*(STREAM[a:b] for a, b in pairwise(edges))) == out(STREAM)


WORDS = (
    "model messages role content images tool_calls function name arguments tool_name tools format "
    "options think stream prompt suffix system template context raw input temperature stop seed "
    "num_predict keep_alive choices delta message text finish_reason usage error index "
    "prompt_tokens embedding data logprobs detail"
)
FIELDS = st.sampled_from(WORDS.split())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(
    SCALARS | st.sampled_from(["m", "user", "tool", "json", "0s", "low"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=6),
    max_leaves=25,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"])},
    optional={
        "content": st.text(),
        "thinking": st.text(),
        "images": st.lists(st.text(), max_size=2),
        "tool_name": st.sampled_from("fg"),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": st.text(), "arguments": JSON})}
            ),
            max_size=3,
        ),
    },
)
REQUEST = st.fixed_dictionaries(
    {"model": st.just("m")},
    optional={
        "messages": st.lists(MESSAGE, max_size=5),
        "prompt": st.text(),
        "suffix": st.text(),
        "raw": st.booleans(),
        "context": st.lists(st.integers(-2, 300), max_size=5),
        "format": JSON,
        "input": st.text() | st.lists(st.text()),
        "options": st.dictionaries(st.sampled_from(list(OPTIONS)), st.floats(-1e9, 1e9)),
        "tools": st.lists(JSON, max_size=2),
    },
)


@settings(deadline=None)
@given(JSON | REQUEST, st.sampled_from([ollama.chat, ollama.generate, ollama.embed]))
def test_no_request_breaks_the_front(found, parse):
    try:
        request = parse(json.dumps(found).encode())
        for backend in BACKENDS:
            json.loads(request.call(backend, "real").body)
    except BadRequest:
        event("refused")


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from([ollama.chat, ollama.embed]))
def test_no_bytes_break_the_front(found, parse):
    with pytest.raises(BadRequest):
        parse(found)


@settings(deadline=None)
@given(st.lists(JSON, max_size=4), st.booleans(), st.booleans())
def test_no_answer_breaks_the_shape(events, generate, whole):
    shape = Answer("m", stream=not whole, generate=generate, turns=[])
    out = shape.whole(json.dumps(events[:1]).encode()) if whole else None
    for line in (out,) if whole else (shape.feed(sse(*events)) + shape.end()).splitlines():
        json.loads(line)
