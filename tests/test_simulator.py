"""The simulator engine, as a client, a balancer and a supervisor see it."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Response = http.client.HTTPResponse
PROGRAM = Path(__file__).parent.parent / "roles/simulator/simulator.py"
CHAT = "/v1/chat/completions"


class Simulator:
    """A running simulator on a free loopback port."""

    def __init__(self, *arguments: str, key: str = "") -> None:
        argv = [sys.executable, str(PROGRAM), "--port", "0", "--served-model-name", "tiny", "small"]
        self.process = subprocess.Popen(
            [*argv, *arguments],
            env={**os.environ, "VLLM_API_KEY": key},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """An answer as it arrives; closing it closes its connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        fixed = {"content-type": "application/json", "connection": "close"}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, {**fixed, **names})
            return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with self.open(method, path, body, **headers) as response:
            text = response.read().decode()
            kind = response.headers["content-type"]
        return response.status, json.loads(text) if kind == "application/json" else text

    def chat(self, prompt: str, **more: Any) -> dict[str, Any]:
        status, answer = self.ask("POST", CHAT, chat(prompt, **more))
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1]
        return sum(float(v) for v in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.M))

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(10)


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": prompt}], **more}


def events(response: Response) -> Iterator[Any]:
    """The events of a stream as they arrive; the end of the stream is None."""
    while line := response.readline():
        if line.strip():
            assert line.startswith(b"data: ")
            data = line[6:].strip()
            yield None if data == b"[DONE]" else json.loads(data)


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def start() -> Iterator[Callable[..., Simulator]]:
    running: list[Simulator] = []

    def begin(*arguments: str, key: str = "") -> Simulator:
        running.append(Simulator(*arguments, key=key))
        return running[-1]

    yield begin
    for simulator in running:
        simulator.process.kill()
        simulator.process.communicate()


@pytest.fixture(scope="module")
def fast() -> Iterator[Simulator]:
    """One quick simulator that no test alters for the others."""
    simulator = Simulator("--token-rate", "2000", "--max-model-len", "100")
    yield simulator
    assert simulator.stop() == 0
    simulator.process.communicate()


@pytest.fixture(scope="module")
def source() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulator", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulator"] = module
    spec.loader.exec_module(module)
    return module


def test_the_file_is_python_3_8_of_the_standard_library() -> None:
    tree = ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in imports if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def test_an_answer_tells_whose_it_is(fast: Simulator) -> None:
    first, again, other = (fast.chat(p) for p in ("what is rain", "what is rain", "what is snow"))
    text = first["choices"][0]["message"]["content"]
    assert text == again["choices"][0]["message"]["content"]
    assert text != other["choices"][0]["message"]["content"]
    assert "rehearsal" in text
    assert text.endswith('ends with "what is rain".')
    assert first["choices"][0]["finish_reason"] == "stop"
    assert first["system_fingerprint"] == f"simulator-127.0.0.1:{fast.port}"
    usage = first["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert first["id"] != again["id"]


def test_it_lists_its_models_as_vllm_does(fast: Simulator) -> None:
    status, models = fast.ask("GET", "/v1/models")
    assert (status, models["object"]) == (200, "list")
    assert [m["id"] for m in models["data"]] == ["tiny", "small"]
    assert set(models["data"][0]) == {
        *("id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission")
    }
    assert models["data"][0]["max_model_len"] == 100
    assert models["data"][0]["owned_by"] == "simulator"


@pytest.mark.parametrize(
    ("body", "status", "kind", "param"),
    [
        (chat("hi", model="huge"), 404, "NotFoundError", "model"),
        (b"{", 400, "Bad Request", "body"),
        (b"[" * 100_000, 400, "Bad Request", "body"),
        (b"[]", 400, "Bad Request", "body"),
        ({"model": "tiny"}, 400, "Bad Request", "body.messages"),
        ({"messages": ["hi"]}, 400, "Bad Request", "body.messages.0.role"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            *(400, "Bad Request", "body.messages.0.content"),
        ),
        (chat("word " * 100), 400, "BadRequestError", "input_tokens"),
        (chat("hi", max_tokens=100), 400, "BadRequestError", "input_tokens"),
        (chat("hi", max_tokens=0), 400, "BadRequestError", "max_tokens"),
        (chat("hi", n=2), 400, "BadRequestError", "n"),
    ],
)
def test_it_refuses_in_vllms_words(
    fast: Simulator, body: Any, status: int, kind: str, param: str
) -> None:
    got, answer = fast.ask("POST", CHAT, body)
    error = answer["error"]
    assert (got, error["type"], error["param"], error["code"]) == (status, kind, param, status)


def test_a_prompt_too_long_is_told_the_numbers(fast: Simulator) -> None:
    _, answer = fast.ask("POST", CHAT, chat("word" + " word" * 199, max_tokens=7))
    assert re.match(
        r"This model's maximum context length is 100 tokens\. However, you requested 7 output "
        r"tokens and your prompt contains at least 200 input tokens, .* at least 207 tokens\.",
        answer["error"]["message"],
    )


def test_tools_count_as_prompt(fast: Simulator) -> None:
    tools = [{"type": "function", "function": {"name": "look_" + "x" * 1000}}]
    assert fast.ask("POST", CHAT, chat("hi", tools=tools))[0] == 400
    plain = fast.chat("hi")["usage"]["prompt_tokens"]
    with_tool = fast.chat("hi", tools=[{"type": "function"}], tool_choice="auto")
    assert with_tool["usage"]["prompt_tokens"] > plain
    assert with_tool["choices"][0]["message"]["tool_calls"] == []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_ends_an_answer(fast: Simulator, name: str) -> None:
    answer = fast.chat("hi", **{name: 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "This is a"


def test_ignore_eos_fills_the_limit(fast: Simulator) -> None:
    assert fast.chat("hi", max_tokens=90, ignore_eos=True)["usage"]["completion_tokens"] == 90


@pytest.mark.parametrize("stop", ["hearsal", ["no such text", "hearsal", "model is"]])
def test_the_earliest_stop_string_ends_an_answer(fast: Simulator, stop: Any) -> None:
    choice = fast.chat("hi", stop=stop)["choices"][0]
    assert choice["message"]["content"] == "This is a re"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "hearsal")


def test_completions_take_text_and_token_ids(fast: Simulator) -> None:
    for prompt in ("once upon a time", [101, 102, 103]):
        status, answer = fast.ask("POST", "/v1/completions", {"model": "small", "prompt": prompt})
        assert status == 200
        assert answer["object"] == "text_completion"
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["text"].startswith("This is a rehearsal")
    assert fast.ask("POST", "/v1/completions", {"prompt": None})[0] == 400


def test_parts_of_a_message_are_text(fast: Simulator) -> None:
    parts = [{"type": "text", "text": "what"}, {"type": "image_url"}, {"type": "text", "text": "x"}]
    answer = fast.chat("", messages=[{"role": "user", "content": parts}, {"role": "assistant"}])
    assert '"what x"' in answer["choices"][0]["message"]["content"]


def test_a_stream_has_the_same_words(fast: Simulator) -> None:
    whole = fast.chat("tell me")
    body = chat("tell me", stream=True, stream_options={"include_usage": True})
    with fast.open("POST", CHAT, body, x_request_id="req-7") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        role, *tokens, final, usage, done = events(response)
    deltas = [e["choices"][0]["delta"] for e in (role, *tokens, final)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d["content"] for d in deltas) == whole["choices"][0]["message"]["content"]
    assert {e["choices"][0]["finish_reason"] for e in (role, *tokens)} == {None}
    assert final["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert len(tokens) == whole["usage"]["completion_tokens"]
    assert {e["id"] for e in (role, *tokens, final, usage)} == {"chatcmpl-req-7"}
    assert {e["object"] for e in (role, *tokens, final, usage)} == {"chat.completion.chunk"}
    assert done is None


def test_tokens_arrive_as_they_are_made(start: Callable[..., Simulator]) -> None:
    simulator = start("--token-rate", "25")
    begun = time.monotonic()
    with simulator.open("POST", CHAT, chat("hi", stream=True, max_tokens=10)) as response:
        times = [time.monotonic() - begun for _ in events(response)]
    assert times[0] < times[-1] / 2, "the first event waited for others"
    assert 0.38 < times[-1] < 2
    assert max(b - a for a, b in itertools.pairwise(times)) < 0.2


def test_the_official_client_understands_it(fast: Simulator) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{fast.port}/v1", api_key="none") as client:
        assert [m.id for m in client.models.list()] == ["tiny", "small"]
        stream = client.chat.completions.create(**chat("hello", stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text.endswith('"hello".')
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="huge", prompt="x")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        *(("GET", path, None) for path in ("/health", "/ping", "/version", "/load", "/metrics")),
        ("POST", "/tokenize", {"prompt": "a b c"}),
        ("POST", "/invocations", chat("hi")),
    ],
)
def test_some_paths_are_open_although_there_is_a_key(
    locked: Simulator, method: str, path: str, body: Any
) -> None:
    assert locked.ask(method, path, body)[0] == 200


@pytest.fixture(scope="module")
def locked() -> Iterator[Simulator]:
    simulator = Simulator("--token-rate", "2000", key="correct")
    yield simulator
    assert simulator.stop(signal.SIGINT) == 0
    simulator.process.communicate()


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Basic correct", "Bearer", "Bearer \xe4"])
@pytest.mark.parametrize("path", ["/v1/models", CHAT, "/v1/none", "/v2/models", "/inference/x"])
def test_the_key_guards_what_it_guards_in_vllm(locked: Simulator, path: str, header: str) -> None:
    assert locked.ask("GET", path, authorization=header) == (401, {"error": "Unauthorized"})


def test_the_key_opens(locked: Simulator) -> None:
    assert locked.ask("GET", "/v1/models", authorization="Bearer correct")[0] == 200
    assert locked.ask("OPTIONS", "/v1/models")[0] == 405
    assert locked.ask("GET", "/v1/none", authorization="Bearer correct")[0] == 404


def test_tokenize_counts_as_usage_does(fast: Simulator) -> None:
    messages = chat("extraordinary weather, isn't it")["messages"]
    _, answer = fast.ask("POST", "/tokenize", {"messages": messages})
    usage = fast.chat("extraordinary weather, isn't it")["usage"]
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"]


def raw(port: int, *parts: bytes) -> bytes:
    """What a connection answers to bytes, until it ends."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        for part in parts:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_http_1_0_gets_no_chunks_and_an_end(fast: Simulator) -> None:
    body = json.dumps(chat("hi", stream=True, max_tokens=2)).encode()
    head = f"POST {CHAT} HTTP/1.0\r\ncontent-type: application/json\r\n"
    answer = raw(fast.port, f"{head}content-length: {len(body)}\r\n\r\n".encode(), body)
    headers, _, text = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in headers
    assert b"chunked" not in headers
    assert text.startswith(b"data: {")
    assert text.endswith(b"data: [DONE]\n\n")


def test_a_body_may_come_in_chunks_and_be_expected(fast: Simulator) -> None:
    body = json.dumps(chat("chunky")).encode()
    head = f"POST {CHAT} HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    more = b"transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n"
    chunks = b"5\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    answer = raw(fast.port, head.encode() + more, chunks)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert b'\\"chunky\\"' in answer


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_ended(fast: Simulator, request_: bytes) -> None:
    assert raw(fast.port, request_).startswith(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_connection_serves_many_requests(fast: Simulator) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", fast.port, timeout=10)
    body = json.dumps(chat("hi", stream=True))
    connection.connect()
    kept = connection.sock
    for _ in range(3):
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        assert connection.sock is kept
    connection.close()


def test_an_idle_connection_ends(source: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.KEEP_ALIVE == 5
    monkeypatch.setattr(source, "KEEP_ALIVE", 0.05)

    async def idle() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with pytest.raises(EOFError):
                await source.read_request(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        got = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        server.close()
        return got

    assert asyncio.run(idle()) == b""


def test_metrics_count_under_vllms_names(start: Callable[..., Simulator]) -> None:
    simulator = start("--token-rate", "2000")
    usage = simulator.chat("one")["usage"]
    cut = simulator.chat("two", max_tokens=2)["usage"]
    text = simulator.ask("GET", "/metrics")[1]
    labels = 'engine="0",model_name="tiny"'
    made = usage["completion_tokens"] + 2
    asked = usage["prompt_tokens"] + cut["prompt_tokens"]
    for line in (
        f"vllm:num_requests_running{{{labels}}} 0",
        f"vllm:num_requests_waiting{{{labels}}} 0",
        f"vllm:kv_cache_usage_perc{{{labels}}} 0.0",
        f"vllm:prompt_tokens_total{{{labels}}} {asked}",
        f"vllm:generation_tokens_total{{{labels}}} {made}",
        f'vllm:request_success_total{{{labels},finished_reason="stop"}} 1',
        f'vllm:request_success_total{{{labels},finished_reason="length"}} 1',
        f'vllm:request_success_total{{{labels},finished_reason="abort"}} 0',
        f'vllm:time_to_first_token_seconds_bucket{{{labels},le="+Inf"}} 2',
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 2",
        f"vllm:inter_token_latency_seconds_count{{{labels}}} {made - 2}",
        f"vllm:e2e_request_latency_seconds_count{{{labels}}} 2",
    ):
        assert line in text.splitlines()
    assert re.search(r'^vllm:cache_config_info{.*kv_cache_size_tokens="\d+".*} 1$', text, re.M)
    assert text.endswith("\n")


def test_histograms_are_cumulative(source: ModuleType) -> None:
    histogram = source.Histogram()
    for seconds in (0.005, 0.01, 0.3, 9999):
        histogram.observe(seconds)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("h", "a"))
    assert lines['h_bucket{a,le="0.01"}'] == "2"
    assert lines['h_bucket{a,le="0.2"}'] == "2"
    assert lines['h_bucket{a,le="0.5"}'] == "3"
    assert lines['h_bucket{a,le="640.0"}'] == "3"
    assert lines['h_bucket{a,le="+Inf"}'] == lines["h_count{a}"] == "4"


def test_a_label_is_escaped(source: ModuleType) -> None:
    text = "\n".join(source.Metrics('a"b\\c', 10).lines())
    assert r'model_name="a\"b\\c"' in text


def test_requests_beyond_the_limit_wait(start: Callable[..., Simulator]) -> None:
    simulator = start("--max-num-seqs", "1")
    hung = simulator.open("POST", CHAT, chat("a", stream=True), x_simulator_fault="hang")
    queued = simulator.open("POST", CHAT, chat("b", stream=True, max_tokens=1))
    assert eventually(lambda: simulator.metric("num_requests_waiting") == 1)
    assert simulator.metric("num_requests_running") == 1
    assert simulator.metric("kv_cache_usage_perc") > 0
    hung.close()
    assert list(events(queued))[-1] is None


def test_a_client_that_leaves_stops_its_request(start: Callable[..., Simulator]) -> None:
    simulator = start()
    for stream in (True, False):
        body = json.dumps(chat("hi", stream=stream, ignore_eos=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", simulator.port)) as connection:
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert eventually(lambda: simulator.metric("num_requests_running") == 1)
        assert eventually(lambda: simulator.metric("num_requests_running") == 0)
    success = simulator.ask("GET", "/metrics")[1]
    assert 'finished_reason="abort"} 2' in success


def test_fault_slow_first_token(fast: Simulator) -> None:
    begun = time.monotonic()
    body = chat("hi", stream=True)
    with fast.open("POST", CHAT, body, x_simulator_fault="slow-first-token=0.4") as response:
        assert time.monotonic() - begun < 0.3, "the headers are sent at once"
        first = next(events(response))
        assert first["choices"][0]["delta"]["role"] == "assistant"
    assert 0.4 <= time.monotonic() - begun < 1


def test_fault_status(fast: Simulator) -> None:
    status, answer = fast.ask("POST", CHAT, chat("hi"), x_simulator_fault="status=503")
    assert (status, answer["error"]["code"]) == (503, 503)
    assert answer["error"]["type"] == "Service Unavailable"


@pytest.mark.parametrize("fault", ["hnag", "status=200", "status", "cut-after=-1", "reset=1"])
def test_an_unknown_fault_is_refused(fast: Simulator, fault: str) -> None:
    assert fast.ask("POST", CHAT, chat("hi"), x_simulator_fault=fault)[0] == 400
    assert fast.ask("POST", "/simulator/faults", {"fault": fault})[0] == 400
    assert fast.ask("GET", "/simulator/faults")[1]["fault"]["kind"] == ""


def test_fault_cut_after(fast: Simulator) -> None:
    body = chat("hi", stream=True)
    response = fast.open("POST", CHAT, body, x_simulator_fault="cut-after=3")
    with response, pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert caught.value.partial.count(b"data: {") == 4  # the role and three tokens
    assert b"DONE" not in caught.value.partial
    with pytest.raises(http.client.RemoteDisconnected):
        fast.ask("POST", CHAT, chat("hi"), x_simulator_fault="cut-after=3")


def test_fault_reset(fast: Simulator) -> None:
    with pytest.raises(ConnectionResetError, match="reset by peer"):
        fast.ask("POST", CHAT, chat("hi"), x_simulator_fault="reset")


def test_a_counted_fault_meets_so_many_requests(start: Callable[..., Simulator]) -> None:
    simulator = start("--token-rate", "2000")
    fault = {"fault": "status=500", "count": 2}
    assert simulator.ask("POST", "/simulator/faults", fault)[1]["left"] == 2
    got = [simulator.ask("POST", CHAT, chat("hi"))[0] for _ in range(4)]
    assert got == [500, 500, 200, 200]


def test_a_hanging_engine_looks_alive(start: Callable[..., Simulator]) -> None:
    simulator = start("--token-rate", "200")
    flowing = simulator.open("POST", CHAT, chat("a", stream=True, max_tokens=300, ignore_eos=True))
    stream = events(flowing)
    next(stream)
    assert simulator.ask("POST", "/simulator/faults", {"fault": "hang"})[0] == 200
    hung = simulator.open("POST", CHAT, chat("b", stream=True))
    assert eventually(lambda: simulator.metric("num_requests_running") == 2)
    frozen = simulator.metric("generation_tokens_total")
    time.sleep(0.1)  # twenty tokens' time, in which nothing may come
    assert simulator.metric("generation_tokens_total") == frozen
    assert simulator.metric("num_requests_running") == 2
    assert simulator.ask("GET", "/health") == (200, "")
    assert simulator.ask("DELETE", "/simulator/faults")[1]["fault"]["kind"] == ""
    assert list(stream)[-1] is None
    assert list(events(hung))[-1] is None


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.7", False),
        ("::ffff:192.0.2.7", False),
        ("fe80::1%eth0", False),
    ],
)
def test_faults_are_set_from_loopback_alone(source: ModuleType, peer: str, allowed: bool) -> None:
    request = source.Request("DELETE", "/simulator/faults", {}, b"", True)
    writer = SimpleNamespace(get_extra_info=lambda name: (peer, 1234))
    engine = SimpleNamespace(faults=source.Faults())
    client = SimpleNamespace(writer=writer)
    if allowed:
        assert source.Engine.command(engine, client, request)["epoch"] == 1
    else:
        with pytest.raises(source.Refusal, match="loopback"):
            source.Engine.command(engine, client, request)


def test_sigterm_aborts_at_once(start: Callable[..., Simulator]) -> None:
    simulator = start()
    response = simulator.open("POST", CHAT, chat("hi", stream=True, ignore_eos=True))
    next(events(response))
    begun = time.monotonic()
    assert simulator.stop() == 0
    assert time.monotonic() - begun < 1
    assert None not in list(events(response))


def test_sigterm_may_drain(start: Callable[..., Simulator]) -> None:
    simulator = start("--shutdown-timeout", "10", "--token-rate", "50")
    idle = http.client.HTTPConnection("127.0.0.1", simulator.port, timeout=10)
    idle.request("GET", "/health")
    idle.getresponse().read()
    response = simulator.open("POST", CHAT, chat("hi", stream=True, max_tokens=20))
    stream = events(response)
    next(stream)
    simulator.process.terminate()
    assert idle.sock.recv(1) == b"", "an idle connection does not hold it up"
    idle.close()
    assert list(stream)[-1] is None
    assert simulator.process.wait(5) == 0


def test_draining_has_an_end(start: Callable[..., Simulator]) -> None:
    simulator = start("--shutdown-timeout", "0.3")
    hung = simulator.open("POST", CHAT, chat("hi", stream=True), x_simulator_fault="hang")
    begun = time.monotonic()
    assert simulator.stop() == 0
    assert 0.25 < time.monotonic() - begun < 2
    with pytest.raises(http.client.IncompleteRead):
        hung.read()


def test_a_port_in_use_is_one_line(fast: Simulator) -> None:
    argv = [sys.executable, str(PROGRAM), "--port", str(fast.port), "--served-model-name", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "address already in use" in done.stderr


def test_a_hundred_streams_at_once(start: Callable[..., Simulator]) -> None:
    simulator = start("--token-rate", "50")

    async def stream(index: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        body = json.dumps(chat(f"stream {index}", stream=True, max_tokens=50, ignore_eos=True))
        head = f"POST {CHAT} HTTP/1.1\r\nconnection: close\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.read()
        writer.close()
        return answer

    async def everyone() -> list[bytes]:
        return await asyncio.gather(*map(stream, range(100)))

    begun = time.monotonic()
    answers = asyncio.run(everyone())
    took = time.monotonic() - begun
    assert all(a.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for a in answers)
    assert {a.count(b'"content": "') for a in answers} == {52}
    assert simulator.metric("generation_tokens_total") == 5000
    assert 1 <= took < 4
