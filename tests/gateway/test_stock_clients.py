"""Clients as people have them, unchanged: OpenAI's and Ollama's packages, LangChain, extensions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from clientkit import KEY as SIMULATORS_KEY
from clientkit import MODEL, Service, service
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from relaykit import (
    ANSWER,
    DONE,
    KEY,
    Asked,
    Fleet,
    Leaving,
    Writer,
    fleet,
    plain,
    quiet,
    reset,
    run,
    stream,
)

pytestmark = pytest.mark.usefixtures("quiet")
__all__ = ["quiet"]

HI = [{"role": "user", "content": "hi"}]
CITY = '{"city": "Bern"}'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": CITY}}
TOKEN = {"token": "hello", "logprob": -0.5, "bytes": [104], "top_logprobs": []}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def chunk(delta: dict[str, Any], **more: Any) -> bytes:
    """An event as vLLM writes it."""
    choice = {"index": 0, "delta": delta, "finish_reason": None, **more}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


def called(at: int, text: str) -> bytes:
    """A piece of a call's arguments."""
    named = {"id": CALL["id"], "type": "function"} if at == 0 else {}
    function = {"name": "weather", "arguments": text} if at == 0 else {"arguments": text}
    return chunk({"tool_calls": [{"index": 0, **named, "function": function}]})


TOOL_STREAM = [
    chunk({"role": "assistant", "content": ""}),
    *(called(at, CITY[at : at + 5]) for at in range(0, len(CITY), 5)),
    chunk({}, finish_reason="tool_calls"),
]
TEXT_STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "hel"}, logprobs={"content": [TOKEN]}),
    chunk({"content": "lo 🙂"}, logprobs={"content": [TOKEN]}),
    chunk({}, finish_reason="stop"),
]
LAST = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
LAST += b'"usage":' + json.dumps(USAGE).encode() + b"}\n\n"


async def engine(asked: Asked, leaving: Leaving, writer: Writer) -> None:
    """Answers as vLLM does: with a call where there are tools, else with a greeting."""
    wanted = asked.json
    if asked.path == "/v1/embeddings":
        texts = [wanted["input"]] if isinstance(wanted["input"], str) else wanted["input"]
        data = [
            {"object": "embedding", "index": i, "embedding": [0.5, i]} for i, _ in enumerate(texts)
        ]
        made = {"object": "list", "model": "m", "data": data, "usage": USAGE}
        return await plain(200, made)(asked, leaving, writer)
    results = any(one["role"] == "tool" for one in wanted.get("messages", []))
    tools = "tools" in wanted and not results
    if wanted.get("stream"):
        usage = [LAST] if (wanted.get("stream_options") or {}).get("include_usage") else []
        parts = TOOL_STREAM if tools else TEXT_STREAM
        return await stream(*parts, *usage, DONE)(asked, leaving, writer)
    message: dict[str, Any] = {"role": "assistant", "content": "hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    if tools:
        message |= {"content": None, "tool_calls": [CALL]}
        choice["finish_reason"] = "tool_calls"
    if wanted.get("logprobs"):
        choice["logprobs"] = {"content": [TOKEN]}
    return await plain(200, {**ANSWER, "created": 1, "choices": [choice]})(asked, leaving, writer)


def served(
    folder: Path, work: Callable[[Fleet], Any], behaviour: Any = engine, **more: Any
) -> None:
    """Run a client, which may block, against a gateway before such an engine."""

    async def body() -> None:
        async with fleet(folder, behaviour, **more) as found:
            if asyncio.iscoroutinefunction(work):
                await work(found)
            else:
                await asyncio.to_thread(work, found)

    run(body())


def client(found: Fleet, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{found.url}/v1", api_key=KEY, **{"max_retries": 0, **more})


# OpenAI's package


def test_openai_answers_streams_and_lists(tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        with client(found) as one:
            told = one.chat.completions.create(model="m", messages=HI, logprobs=True)
            assert told.choices[0].message.content == "hello"
            assert told.choices[0].logprobs.content[0].logprob == -0.5
            assert told.usage.total_tokens == 6
            options = {"include_usage": True}
            parts = list(
                one.chat.completions.create(
                    model="m", messages=HI, stream=True, logprobs=True, stream_options=options
                )
            )
            text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
            assert text == "hello 🙂"
            assert parts[-1].usage.completion_tokens == 2
            made = one.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
            assert [each.embedding for each in made.data] == [[0.5, 0], [0.5, 1]]
            assert [each.id for each in one.models.list()] == ["m"]
            assert one.models.retrieve("m").id == "m"

    served(tmp_path, work)


def test_openai_gets_calls_whole_and_in_pieces(tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        with client(found) as one:
            ask = {"model": "m", "messages": HI, "tools": [TOOL]}
            told = one.chat.completions.create(**ask)
            (call,) = told.choices[0].message.tool_calls
            assert (call.function.name, call.function.arguments) == ("weather", CITY)
            with one.chat.completions.stream(**ask) as events:
                final = events.get_final_completion()
            (call,) = final.choices[0].message.tool_calls
            assert call.function.arguments == CITY

    served(tmp_path, work)


def test_openais_asynchronous_client_streams_and_leaves(tmp_path: Path) -> None:
    async def work(found: Fleet) -> None:
        async with openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key=KEY) as one:
            parts = await one.chat.completions.create(model="m", messages=HI, stream=True)
            text = [p.choices[0].delta.content async for p in parts if p.choices]
            assert "".join(filter(None, text)) == "hello 🙂"
            found.engines[0].behaviour = stream(*TEXT_STREAM[:2], end="hang")
            parts = await one.chat.completions.create(model="m", messages=HI, stream=True)
            await anext(aiter(parts))
            await parts.close()
            async with asyncio.timeout(2):
                while not found.engines[0].gone:
                    await asyncio.sleep(0.005)

    served(tmp_path, work)


def vllms(status: int, message: str) -> Any:
    told = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return plain(status, {"error": told})


@pytest.mark.parametrize(
    ("behaviour", "ask", "kind", "says"),
    [
        (vllms(400, "maximum context length is 8 tokens"), {}, openai.BadRequestError, "context"),
        (engine, {"model": "no"}, openai.NotFoundError, "does not exist"),
        (engine, {"extra_headers": {"Authorization": "Bearer x"}}, openai.AuthenticationError, ""),
        (plain(401, {"error": "no"}), {}, openai.InternalServerError, "gateway's key"),
        (vllms(422, "bad"), {}, openai.UnprocessableEntityError, "bad"),
        (reset, {}, openai.InternalServerError, "no engine"),
    ],
)
def test_openais_client_raises_what_it_raises_for_openai(
    tmp_path: Path, behaviour: Any, ask: dict[str, Any], kind: type[Exception], says: str
) -> None:
    def work(found: Fleet) -> None:
        with client(found) as one, pytest.raises(kind) as told:
            one.chat.completions.create(**{"model": "m", "messages": HI, **ask})
        assert says in str(told.value)
        assert told.value.request_id == told.value.response.headers["x-request-id"]

    served(tmp_path, work, behaviour, queue={"timeout": 0.5})


def test_openais_client_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    limits = {"requests_per_minute": 60, "concurrency": 1}

    async def work(found: Fleet) -> None:
        keys = json.loads((tmp_path / "keys.json").read_text())
        keys["keys"][0] |= limits
        (tmp_path / "keys.json").write_text(json.dumps(keys))
        found.worker.keys.refresh()
        found.engines[0].behaviour = plain(wait=0.4)
        async with openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key=KEY) as one:
            ask = [one.chat.completions.create(model="m", messages=HI) for _ in range(2)]
            told = await asyncio.gather(*ask)
            assert [each.choices[0].message.content for each in told] == ["hello"] * 2
            once = one.with_options(max_retries=0)
            both = [once.chat.completions.create(model="m", messages=HI) for _ in range(2)]
            good, bad = sorted(
                await asyncio.gather(*both, return_exceptions=True),
                key=lambda each: isinstance(each, Exception),
            )
            assert good.choices
            assert isinstance(bad, openai.RateLimitError)
            assert bad.response.headers["retry-after"] == "1"

    served(tmp_path, work)


def test_openais_client_raises_when_a_stream_is_cut(tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        with client(found) as one, pytest.raises(openai.APIError) as told:
            list(one.chat.completions.create(model="m", messages=HI, stream=True))
        assert "broke off" in str(told.value)

    served(tmp_path, work, stream(*TEXT_STREAM[:2], end="cut"))


# LangChain


def test_langchain_invokes_streams_and_calls(tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        with httpx.Client() as own:
            speak(ChatOpenAI(base_url=f"{found.url}/v1", api_key=KEY, model="m", http_client=own))

    def speak(model: ChatOpenAI) -> None:
        assert model.invoke("hi").content == "hello"
        whole = AIMessageChunk(content="")
        for part in model.stream("hi"):
            whole = whole + part
        assert whole.content == "hello 🙂"
        bound = model.bind_tools([TOOL])
        question = HumanMessage("What is the weather in Bern?")
        told = bound.invoke([question])
        (call,) = told.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Bern"})
        result = ToolMessage("sunny", tool_call_id=call["id"])
        assert bound.invoke([question, told, result]).content == "hello"
        gathered = None
        for part in bound.stream([question]):
            gathered = part if gathered is None else gathered + part
        assert gathered.tool_calls[0]["args"] == {"city": "Bern"}

    served(tmp_path, work)


# Ollama's package


def test_ollamas_package_over_another_engine(tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with ollama.Client(host=found.url, headers=headers) as one:
            speak(one, found)

    def speak(one: ollama.Client, found: Fleet) -> None:
        assert one.chat(model="m", messages=HI).message.content == "hello"
        parts = list(one.chat(model="m", messages=HI, stream=True))
        assert "".join(part.message.content or "" for part in parts) == "hello 🙂"
        assert (parts[-1].done, parts[-1].eval_count) == (True, 2)
        told = one.chat(model="m", messages=HI, tools=[TOOL])
        assert told.message.tool_calls[0].function.arguments == {"city": "Bern"}
        (call,) = [
            call
            for part in one.chat(model="m", messages=HI, tools=[TOOL], stream=True)
            for call in part.message.tool_calls or ()
        ]
        assert call.function.arguments == {"city": "Bern"}
        assert one.generate(model="m", prompt="hi").response == "hello"
        made = one.embed(model="m", input=["a", "b"])
        assert [list(each) for each in made.embeddings] == [[0.5, 0], [0.5, 1]]
        assert one.list().models[0].model == "m:latest"
        assert "tools" in one.show("m").capabilities
        assert one.ps().models[0].model == "m:latest"
        with pytest.raises(ollama.ResponseError) as missing:
            one.chat(model="no", messages=HI)
        assert missing.value.status_code == 404
        found.engines[0].behaviour = stream(*TEXT_STREAM[:2], end="cut")
        with pytest.raises(ollama.ResponseError, match="broke off"):
            list(one.chat(model="m", messages=HI, stream=True))

    served(tmp_path, work)


# extensions of an editor, by the rules they read answers by


def huggingface(listed: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Hugging Face's extension 0.1.0: what it offers, with the longest prompt and tools or none."""
    found: dict[str, tuple[int, bool]] = {}
    for model in listed["data"]:
        providers = model.get("providers") or []
        able = [one for one in providers if one.get("supports_tools") is True]
        lengths = [one.get("context_length") or 128_000 for one in able]
        for suffix in ("cheapest", "fastest") if able else ():
            found[f"{model['id']}:{suffix}"] = (max(1, min(lengths) - 16_000), True)
        for one, length in zip(able, lengths, strict=True):
            found[f"{model['id']}:{one['provider']}"] = (max(1, length - 16_000), True)
        if providers and not able:
            length = providers[0].get("context_length") or 128_000
            found[model["id"]] = (max(1, length - 16_000), False)
    return found


def huggingface_stream(lines: Iterator[str]) -> tuple[str, str]:
    """Text and reason of the end, as its reader of streams takes them."""
    text = reason = ""
    for line in lines:
        if not line.startswith("data: "):
            continue
        if line[6:] == "[DONE]":
            break
        choice = json.loads(line[6:])["choices"][0]
        text += choice["delta"].get("content") or ""
        reason = choice.get("finish_reason") or reason
    return text, reason


@pytest.mark.parametrize("tools", [True, False])
def test_huggingfaces_extension_offers_and_uses_every_model(tmp_path: Path, tools: bool) -> None:
    def change(settings: dict[str, Any], _engines: Any) -> None:
        settings["models"] = {
            "org/small": {"pools": {"p": 1}, "context_length": 8192, "tools": tools},
            "m": {"pools": {"p": 1}, "context_length": 131_072, "tools": tools},
        }

    def work(found: Fleet) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=f"{found.url}/v1", headers=headers) as one:
            offered = huggingface(one.get("/models").json())
            expected = [
                f"{name}:{suffix}"
                for name in ("org/small", "m")
                for suffix in ("cheapest", "fastest", "inferfleet")
            ]
            assert sorted(offered) == sorted(expected if tools else ["org/small", "m"])
            for name, (longest, can) in offered.items():
                true = 8192 if "small" in name else 131_072
                assert math.isclose(longest, true / 2) or longest == true - 16_000
                assert can is tools
                ask = {"model": name, "messages": HI, "stream": True, "max_tokens": 4096}
                with one.stream("POST", "/chat/completions", json=ask) as answer:
                    assert answer.status_code == 200
                    assert huggingface_stream(answer.iter_lines()) == ("hello 🙂", "stop")
                assert found.engines[0].prompts[-1].json["model"] == "m"

    served(tmp_path, work, change=change)


@pytest.mark.parametrize("public", [True, False])
def test_the_fork_reads_the_list_without_a_key_where_it_may(tmp_path: Path, public: bool) -> None:
    def work(found: Fleet) -> None:
        answer = httpx.get(f"{found.url}/v1/models")
        assert answer.status_code == (200 if public else 401)
        if public:
            (model,) = answer.json()["data"]
            assert (model["id"], model["max_model_len"]) == ("m", 32768)
        asked = httpx.post(f"{found.url}/v1/chat/completions", json={"model": "m", "messages": HI})
        assert asked.status_code == 401

    served(tmp_path, work, public_models=public)


# the simulator, which keeps vLLM's rules


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def test_the_simulator_answers_all_of_them(rehearsal: Service) -> None:
    with openai.OpenAI(base_url=f"{rehearsal.clear}/v1", api_key=SIMULATORS_KEY) as one:
        parts = list(one.chat.completions.create(model=MODEL, messages=HI, stream=True))
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            one.chat.completions.create(model=MODEL, messages=HI, max_tokens=10**6)
    with httpx.Client() as own:
        url = f"{rehearsal.clear}/v1"
        model = ChatOpenAI(base_url=url, api_key=SIMULATORS_KEY, model=MODEL, http_client=own)
        assert model.invoke("hi").content == text
    headers = {"Authorization": f"Bearer {SIMULATORS_KEY}"}
    with ollama.Client(host=rehearsal.clear, headers=headers) as two:
        lines = list(two.chat(model=MODEL, messages=HI, stream=True))
    assert "".join(line.message.content or "" for line in lines) == text
    assert lines[-1].prompt_eval_count > 0
