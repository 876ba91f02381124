"""Requests and answers of any form: never an error of the gateway's own, never a secret told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from relaykit import KEY, Asked, Engine, Fleet, Leaving, Writer, fleet, plain, quiet, run, until

from inferfleet.gateway import backends
from inferfleet.gateway.fronts import ollama, openai
from inferfleet.gateway.fronts.ollama_shape import Answer, Vectors
from inferfleet.gateway.request import BadRequest

pytestmark = pytest.mark.usefixtures("quiet")
__all__ = ["quiet"]

BACKENDS = ("vllm", "tgi", "ollama", "openai")
OPENAIS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
)
OLLAMAS = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
PAGES = ("/api/show", "/api/pull", "/api/create", "/api/delete", "/api/push", "/api/blobs/x")
PROMPT, SAID, ENGINE_KEY = "marker-of-prompts", "marker-of-answers", "sk-marker-of-engines"
SIMPLE = settings(
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

# JSON

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", "m", "user", "tool", "json", "\0", "\u2028", "data: [DONE]\n\n", "😀"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
functions = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("name", "arguments", "description", "parameters"), values)
)
calls = st.fixed_dictionaries(
    {}, optional={"id": values, "index": values, "type": values, "function": functions | values}
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system", "assistant", "tool", "developer"]) | values,
        "tool_calls": st.lists(calls, max_size=3) | values,
        **dict.fromkeys(("content", "images", "thinking", "name", "tool_name"), values),
    },
)
OPTIONS = ("temperature", "seed", "stop", "num_predict", "top_k", "min_p", "repeat_penalty")
FIELDS = (
    *("stream", "prompt", "input", "format", "think", "keep_alive", "context", "raw", "suffix"),
    *("system", "template", "logprobs", "top_logprobs", "truncate", "dimensions", "images"),
    *("response_format", "top_p", "max_completion_tokens", "prompt_cache_key", "stop", "Model"),
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m") | values,
        "messages": st.lists(messages, max_size=4) | values,
        "tools": st.lists(calls, max_size=2) | values,
        "options": st.fixed_dictionaries({}, optional=dict.fromkeys(OPTIONS, values)) | values,
        **dict.fromkeys(FIELDS, values),
    },
)


def spoil(text: bytes, at: int, with_what: bytes) -> bytes:
    at %= len(text) + 1
    return text[:at] + with_what + text[at + len(with_what) :]


spoilers = st.sampled_from([b"\xff", b"\0", b"\\ud800", b"9" * 5000, b"1e999", b'"', b"[" * 1500])
bodies = st.one_of(
    requests.map(lambda found: json.dumps(found).encode()),
    requests.map(lambda found: json.dumps({**found, "model": "m"}, ensure_ascii=False).encode()),
    st.builds(
        lambda found, at, what: spoil(json.dumps({"model": "m", **found}).encode(), at, what),
        requests,
        st.integers(0, 10_000),
        spoilers,
    ),
    st.binary(max_size=60),
)
DEEP = [b'{"model":"m","x":' + b"[" * n + b"]" * n + b"}" for n in (500, *range(900, 1001, 4))]
DEEP += [b'{"model":"m","model":"m","x":' + b"[" * n + b"]" * n + b"}" for n in range(900, 1001, 4)]
LONG = [b'{"model":"m","Model":"x","x":%s}' % x for x in (b"9" * 5000, b'"\xff"', b'"\x01"')]


def parsed(path: str, body: bytes) -> Any:
    """The request in a body."""
    if path in OLLAMAS:
        return {"chat": ollama.chat, "generate": ollama.generate}.get(path[5:], ollama.embed)(body)
    return openai.Passing(path, body)


def asked(path: str, body: bytes) -> None:
    """All that a request is asked for; BadRequest is the one thing it may raise."""
    try:
        request = parsed(path, body)
    except BadRequest:
        return
    assert isinstance(request.model, str)
    request.model.encode()
    json.loads(request.failed(400, "no", "x"))
    for backend in BACKENDS:
        try:
            call = request.call(backend, "served")
        except BadRequest:
            continue
        sent = json.loads(call.body.decode("utf-8", "replace"), strict=False, parse_int=float)
        assert sent["model"] == "served"
        assert call.path.startswith(("/v1/", "/api/"))


@pytest.mark.parametrize("path", [*OPENAIS[:3], *OLLAMAS])
def test_fronts_take_any_body(path: str) -> None:
    @SIMPLE
    @given(bodies)
    def check(body: bytes) -> None:
        asked(path, body)

    check()


@pytest.mark.parametrize("path", [OPENAIS[0], *OLLAMAS])
def test_fronts_take_any_depth_and_length(path: str) -> None:
    for body in (*DEEP, *LONG):
        asked(path, body)


# answers

choices = st.fixed_dictionaries(
    {},
    optional={
        "delta": messages | values,
        "message": messages | values,
        **dict.fromkeys(("index", "text", "finish_reason", "logprobs"), values),
    },
)
usages = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt_tokens", "completion_tokens"), values)
)
vectors = st.fixed_dictionaries({}, optional={"embedding": values, "index": values})
answers = (
    st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(choices, max_size=3) | values,
            "usage": usages | values,
            "error": values,
            "data": st.lists(vectors, max_size=3) | values,
        },
    )
    | values
)
texts = st.one_of(
    answers.map(lambda found: json.dumps(found).encode()),
    st.builds(
        lambda found, at, what: spoil(json.dumps(found).encode(), at, what),
        answers,
        st.integers(0, 10_000),
        spoilers,
    ),
    st.just(b"[DONE]"),
    st.binary(max_size=30),
)


@pytest.mark.parametrize("generate", [False, True])
def test_shapes_take_any_answer_cut_anywhere(generate: bool) -> None:
    @SIMPLE
    @given(st.lists(texts, max_size=5), st.sampled_from([b"\n\n", b"\r\n\r\n"]), st.integers(1, 40))
    def check(found: list[bytes], end: bytes, size: int) -> None:
        turns = [("user", "x")] if generate else None
        shape = Answer("m", stream=True, generate=generate, turns=turns)
        data = b"".join(b"data: " + one + end for one in found)
        out = [shape.feed(data[at : at + size]) for at in range(0, len(data), size)]
        lines = b"".join((*out, shape.end())).splitlines()
        read = [json.loads(line) for line in lines]
        assert read, "a stream that ended well has a last line"
        assert read[-1].get("done") is True or "error" in read[-1]
        for one in found:
            json.loads(Answer("m", stream=False, generate=generate, turns=turns).whole(one))

    check()


@SIMPLE
@given(texts, st.booleans())
def test_vectors_errors_and_probes_take_any_answer(found: bytes, one: bool) -> None:
    json.loads(Vectors("m", one=one).whole(found))
    message, kind = backends.error_text(found)
    assert message
    assert kind
    assert backends.proves(found) in (True, False)
    for backend in BACKENDS:
        backends.parse_load(backend, found.decode("utf-8", "replace"))


# through a running gateway


@asynccontextmanager
async def watched(
    folder: Path, capfd: pytest.CaptureFixture[str], *behaviours: Any, **more: Any
) -> AsyncIterator[Fleet]:
    """A gateway that must have told no secret when all is over, and kept nothing open."""

    def change(found: dict[str, Any], engines: list[Engine]) -> None:
        key = folder / "engine.key"
        key.write_text(ENGINE_KEY)
        found["pools"]["p"]["key_file"] = str(key)
        if "change" in more:
            more["change"](found, engines)

    rest = {name: value for name, value in more.items() if name != "change"}
    async with fleet(folder, *behaviours, change=change, **rest) as found:
        before = asyncio.all_tasks()
        yield found
        core = found.worker.core
        await until(lambda: not core.live)
        assert not any(one.outstanding for one in core.instances().values())
        assert not any(pool.waiting for pool in core.pools.values())
        connections = found.worker.public.server_state.connections
        own = asyncio.current_task()
        await until(
            lambda: (
                not [
                    t
                    for t in asyncio.all_tasks() - before
                    if t is not own and "run_asgi" in repr(t.get_coro())
                ]
            )
        )
        status = json.dumps(await found.status())
        metrics = (await found.client.get(f"http://127.0.0.1:{found.private}/metrics")).text
        assert len(connections) < 20
    out, err = capfd.readouterr()
    for told in (status, metrics, out, err, found.log.read_text()):
        for secret in (PROMPT, SAID, KEY, ENGINE_KEY):
            assert secret not in told


async def bounded(found: Fleet, path: str, body: bytes, **headers: str) -> httpx.Response:
    """An answer, which must come soon and be no fault of the gateway's."""
    asked = found.client.post(path, content=body, headers=headers)
    answer = await asyncio.wait_for(asked, 8)
    assert answer.status_code != 500, (path, body, answer.content)
    return answer


def draw(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """Examples, the same ones every time."""
    found: list[Any] = []

    @settings(SIMPLE, max_examples=count, derandomize=True, phases=[Phase.generate])
    @given(strategy)
    def keep(one: Any) -> None:
        found.append(one)

    keep()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_request_gets_an_answer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], backend: str
) -> None:
    marked = requests.map(lambda one: {**one, "system": PROMPT, "input": PROMPT, "user": PROMPT})
    found = draw(st.tuples(st.sampled_from((*OPENAIS, *OLLAMAS, *PAGES)), marked | bodies), 150)

    def change(wanted: dict[str, Any], _engines: list[Engine]) -> None:
        wanted["pools"]["p"]["backend"] = backend

    async def body() -> None:
        said = {"choices": [{"message": {"content": SAID}}], "message": {"content": SAID}}
        async with watched(tmp_path, capfd, plain(200, said), change=change) as running:
            for path, one in found:
                content = one if isinstance(one, bytes) else json.dumps(one).encode()
                answer = await bounded(running, path, content)
                if path not in PAGES and answer.status_code != 200:
                    answer.json()

    run(body())


def garbled(pieces: list[bytes]) -> Callable[[Asked, Leaving, Writer], Coroutine[Any, Any, None]]:
    """An engine that says this and ends the connection."""

    async def behave(_asked: Asked, _leaving: Leaving, writer: Writer) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return behave


heads = st.lists(
    st.sampled_from(
        [
            b"content-type: text/event-stream\r\n",
            b"Content-Type: application/x-ndjson\r\n",
            b"content-type: text/html\r\n",
            b"content-type: \r\n",
            b"content-length: 10\r\n",
            b"content-length: 99999\r\n",
            b"transfer-encoding: chunked\r\n",
            b"content-encoding: gzip\r\n",
            b"retry-after: soon\r\n",
            b"retry-after: " + b"9" * 400 + b"\r\n",
            b"connection: close\r\n",
            b"location: http://192.0.2.1/\r\n",
            b": \r\n",
            b"x\r\n",
            b"x: \xff\xfe\r\n",
            b"set-cookie: a=b\r\n",
        ]
    ),
    max_size=4,
)
starts = st.sampled_from(
    [b"HTTP/1.1 %d X\r\n" % code for code in (200, 200, 200, 204, 302, 404, 501, 600)]
    + [b"HTTP/1.1 100 X\r\n\r\nHTTP/1.1 200 X\r\n", b"HTTP/1.0 200\r\n", b"HTTP/9 200 X\r\n", b"\0"]
)
contents = st.lists(
    st.one_of(
        texts.map(lambda one: b"data: " + one + b"\n\n"),
        texts.map(lambda one: b"%x\r\n" % len(one) + one + b"\r\n"),
        st.sampled_from([b"data: [DONE]\r\n\r\n", b"data: [DONE]\n\n", b"0\r\n\r\n", b": x\n\n"]),
        st.just(json.dumps({"choices": [{"delta": {"content": SAID}}]}).encode()),
    ),
    max_size=5,
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/api/generate"])
def test_any_answer_of_an_engine_is_borne(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], path: str
) -> None:
    found = draw(st.tuples(starts, heads, contents, st.booleans()), 40)
    timeouts = {"first_token": 0.3, "idle": 0.3, "whole": 0.3}

    async def body() -> None:
        queue = {"timeout": 0.3}
        async with watched(tmp_path, capfd, plain(), timeouts=timeouts, queue=queue) as running:
            instance = running.worker.core.instances()["e0"]
            for start, head, content, streamed in found:
                pieces = [start, *head, b"\r\n", *content]
                running.engines[0].behaviour = garbled(pieces)
                instance.succeeded(0)
                turn = {"role": "user", "content": PROMPT}
                wanted = {"model": "m", "stream": streamed, "messages": [turn], "prompt": PROMPT}
                if path == "/api/generate":
                    del wanted["messages"]
                answer = await bounded(running, path, json.dumps(wanted).encode())
                assert answer.status_code != 200 or "location" not in answer.headers

    run(body())


# bytes

KEYED = b"Host: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n" + KEYED
GOOD = b'{"model":"m","messages":[]}'
SIZED = CHAT + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD
SMUGGLED = {
    "two lengths": b"Content-Length: 1\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD,
    "same length twice": b"Content-Length: 27\r\nContent-Length: 27\r\n\r\n" + GOOD,
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "not chunked": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked first": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "space before colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "tab of old": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "signed length": b"Content-Length: +27\r\n\r\n" + GOOD,
    "negative length": b"Content-Length: -1\r\n\r\n" + GOOD,
    "huge length": b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + GOOD,
    "hexadecimal length": b"Content-Length: 0x1b\r\n\r\n" + GOOD,
    "bare LF": b"X: a\nContent-Length: 27\r\n\r\n" + GOOD,
    "bare CR": b"X: a\rY: b\r\nContent-Length: 27\r\n\r\n" + GOOD,
    "folded": b"X: a\r\n b\r\nContent-Length: 27\r\n\r\n" + GOOD,
    "NUL": b"X: a\0b\r\nContent-Length: 27\r\n\r\n" + GOOD,
    "negative chunk": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + GOOD + b"\r\n0\r\n\r\n",
    "chunk of LF": b"Transfer-Encoding: chunked\r\n\r\n1b\n" + GOOD + b"\r\n0\r\n\r\n",
    "odd name": b"X\x01Y: a\r\nContent-Length: 27\r\n\r\n" + GOOD,
    "empty name": b": a\r\nContent-Length: 27\r\n\r\n" + GOOD,
}


async def spoken(found: Fleet, data: bytes, *, end: bool = True) -> bytes:
    """What comes back for bytes, once nothing more can follow."""
    reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
    got = b""
    try:
        writer.write(data)
        async with asyncio.timeout(0.4 if end else 3):
            while more := await reader.read(65536):
                got += more
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return got


def test_no_two_readings_of_a_request_reach_an_engine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        async with watched(tmp_path, capfd, plain()) as found:
            for name, rest in SMUGGLED.items():
                got = await spoken(found, CHAT + rest + SIZED)
                assert got.startswith(b"HTTP/1.1 400"), (name, got)
                assert got.count(b"HTTP/1.1") == 1, (name, got)
            assert not found.engines[0].prompts
            good = CHAT + b"Transfer-Encoding: chunked\r\n\r\n"
            good += b"5;x=y\r\n" + GOOD[:5] + b"\r\n16\r\n" + GOOD[5:] + b"\r\n0\r\nX: y\r\n\r\n"
            assert (await spoken(found, good)).startswith(b"HTTP/1.1 200")
            assert [one.body for one in found.engines[0].prompts] == [GOOD]

    run(body())


def test_what_clients_write_makes_no_header_of_an_engines_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "a\r\nX-Evil: 1\r\n\r\nPOST /x HTTP/1.1\r\n"

    async def body() -> None:
        async with watched(tmp_path, capfd, plain()) as found:
            for name in (b"x-request-id", b"traceparent", b"tracestate"):
                for value in (
                    b"a\x0b",
                    b"a\tb",
                    b"\xff\xfe",
                    b"a" * 9000,
                    b"",
                    b"a;b=c,d",
                    b"\x80",
                ):
                    line = name + b": " + value + b"\r\n"
                    sized = CHAT + line + b"Connection: close\r\n"
                    sized += b"Content-Length: 27\r\n\r\n" + GOOD
                    assert (await spoken(found, sized))[9:12] in (b"200", b"400")
            for path in ("/v1/chat/completions", "/api/chat"):
                for name in (evil, "m" * 100_000, "m\0", "../../m", "m\n"):
                    wanted = {"model": name, "messages": [{"role": evil, "content": evil}]}
                    answer = await bounded(found, path, json.dumps(wanted).encode())
                    assert answer.status_code == 404
            for one in found.engines[0].prompts:
                assert one.path == "/v1/chat/completions"
                known = {"x-request-id", "content-length", "host", "content-type", "authorization"}
                assert set(one.headers) <= known | {"traceparent", "tracestate"}
                assert len(one.headers["x-request-id"]) <= 128
            await until(lambda: len(found.logged()) > 20)
            assert max(len(line["model"]) for line in found.logged()) <= 128

    run(body())


def test_any_bytes_are_answered_or_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = st.sampled_from(
        [
            b"GET /%s HTTP/1.1\r\n" % path
            for path in (b"", b"v1/models/%00%ff", b"..%2f..%2fetc", b"?" * 99, b"%", b"a" * 9000)
        ]
        + [b"POST /api/show HTTP/1.1\r\n", b"HEAD / HTTP/1.1\r\n", b"POST /v1/models HTTP/1.1\r\n"]
        + [
            b"OPTIONS * HTTP/1.1\r\n",
            b"CONNECT a:1 HTTP/1.1\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
        + [b"GET http://[/ HTTP/1.1\r\n", b"BREW / HTTP/1.1\r\n", b"GET / HTTP/0.9\r\n", CHAT]
    )
    headers = st.sampled_from(
        [
            *(b"Host: [\r\n", b"Host: \r\n", b"Expect: 100-continue\r\n", KEYED, b"\r\n"),
            *(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Upgrade: websocket\r\n"),
            *(b"Content-Length: 27\r\n", b"Transfer-Encoding: chunked\r\n", b"X: " + b"y" * 70_000),
            *(b"Authorization: Bearer " + b"z" * 600 + b"\r\n", b"Authorization: \xff\r\n"),
        ]
    )
    some = st.builds(
        lambda line, more, rest: line + b"".join(more) + b"\r\n" + rest,
        lines,
        st.lists(headers, max_size=4),
        st.sampled_from([b"", GOOD, SIZED, b"0\r\n\r\n", b"\0" * 99]),
    )
    found = draw(some | st.binary(max_size=80), 120)

    async def body() -> None:
        async with watched(tmp_path, capfd, plain()) as running:
            for at in range(0, len(found), 20):
                asked = [spoken(running, data) for data in found[at : at + 20]]
                for data, got in zip(found[at:], await asyncio.gather(*asked), strict=False):
                    assert b"HTTP/1.1 500" not in got, (data, got)
            assert (await bounded(running, "/v1/chat/completions", GOOD)).status_code == 200

    run(body())
