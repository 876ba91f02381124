#!/usr/bin/env python3
"""A stand-in engine that speaks vLLM's HTTP surface without a model or a GPU, for rehearsals.

    simulator.py --host 127.0.0.1 --port 8000 --served-model-name NAME [NAME...]

Every answer is made from its prompt, says that it is a rehearsal and arrives at --token-rate.
VLLM_API_KEY, when set, guards the same paths as in vLLM; /health, /metrics, /tokenize,
/invocations and the like stay open, as there. SIGTERM aborts what is in flight, unless
--shutdown-timeout gives it that many seconds to finish; the exit status is 0.

Faults, for one request by the header `x-simulator-fault`, or for all by a loopback peer's
`POST /simulator/faults {"fault": "...", "count": 3}` (count null or left out: until `DELETE`):

    slow-first-token=S  the first token comes S seconds late
    hang                no token ever comes, yet the request counts as running and /health is 200;
                        set for all without a count, it also freezes what is already in flight
    hang-after=N        the same after N tokens; DELETE lets every hanging request go on
    cut-after=N         the connection is closed after N tokens, without an end
    status=503          the request is answered with this status and vLLM's error body
    reset               the connection is reset before any answer

Only inference requests meet faults. Python 3.8+, standard library alone, one file.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import re
import signal
import socket
import struct
import sys
import time
import uuid
import zlib
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from http.client import responses
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # not so at run time: Python 3.8 cannot subscript these
    from collections.abc import Awaitable, Callable, Iterator

    Emit = Callable[[int, str], Awaitable[None]]

VERSION = "0.1.0+simulator"
KEEP_ALIVE = 5.0  # seconds an idle connection stays open, vLLM's default
HEAD_LIMIT, BODY_LIMIT = 64 * 1024, 32 * 1024 * 1024  # bytes
KV_SEQUENCES = 16  # as many sequences of full length the imagined KV cache holds
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
INFERENCE = ("POST /v1/chat/completions", "POST /v1/completions", "POST /invocations")
TOKEN = re.compile(r"\s?\S{1,6}|\s")
FAULT = re.compile(
    r"hang|reset|(slow-first-token|hang-after|cut-after)=\d+(\.\d+)?|status=[45]\d\d"
)
FIRST, BETWEEN = "time_to_first_token_seconds", "inter_token_latency_seconds"
WHOLE = "e2e_request_latency_seconds"
BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Refusal(Exception):
    """An HTTP error answer in vLLM's shape."""

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None) -> None:
        error = {"message": message, "type": kind or phrase(status), "param": param, "code": status}
        self.status, self.body = status, {"error": error}
        super().__init__(message)


def phrase(status: int) -> str:
    return responses.get(status, "Simulated")


def invalid(param: str, why: str) -> NoReturn:
    """Refuse a body as vLLM's request validation does."""
    raise Refusal(400, f"1 validation error:\n  {why}", "Bad Request", f"body{param}")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and after how many tokens or seconds, or with which status."""

    kind: str = ""
    amount: float = 0

    @staticmethod
    def parse(text: str) -> Fault:
        if not FAULT.fullmatch(text):
            raise Refusal(400, f"unknown fault: {text}", "BadRequestError", "fault")
        kind, _, amount = text.partition("=")
        return Fault(kind, float(amount or 0))


@dataclass
class Faults:
    """The fault set for all: the next `left` requests meet it, or every one (None)."""

    fault: Fault = field(default_factory=Fault)
    left: int | None = None
    epoch: int = 0  # counts the DELETEs, each of which lets hanging requests go on

    def take(self) -> Fault:
        """The fault the next request meets."""
        if self.left is None:
            return self.fault
        self.left -= 1
        return self.fault if self.left >= 0 else Fault()

    def frozen(self) -> bool:
        """Whether the whole engine hangs."""
        return self.left is None and self.fault.kind == "hang"


class Histogram:
    """Observations in seconds, as Prometheus counts them."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        for i, bound in enumerate([*map(str, BUCKETS), "+Inf"], 1):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {sum(self.counts[:i])}'
        yield f"{name}_sum{{{labels}}} {self.total}"
        yield f"{name}_count{{{labels}}} {sum(self.counts)}"


class Metrics:
    """The metrics of vLLM that fleets watch, under vLLM's names."""

    def __init__(self, model: str, max_model_len: int) -> None:
        self.model, self.kv_size = model, max_model_len * KV_SEQUENCES
        self.running = self.waiting = self.kv_held = self.prompted = self.generated = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0}
        self.seconds = {name: Histogram() for name in (FIRST, BETWEEN, WHOLE)}

    def lines(self) -> Iterator[str]:
        """The exposition of `GET /metrics`, line by line."""
        model = self.model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        labels = f'engine="0",model_name="{model}"'
        for kind, name, value in (
            ("gauge", "num_requests_running", self.running),
            ("gauge", "num_requests_waiting", self.waiting),
            ("gauge", "kv_cache_usage_perc", min(1.0, self.kv_held / self.kv_size)),
            ("counter", "prompt_tokens_total", self.prompted),
            ("counter", "generation_tokens_total", self.generated),
            ("counter", "num_preemptions_total", 0),
        ):
            yield f"# TYPE vllm:{name} {kind}\nvllm:{name}{{{labels}}} {value}"
        yield "# TYPE vllm:request_success_total counter"
        for reason, count in self.finished.items():
            yield f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}'
        for name, histogram in self.seconds.items():
            yield f"# TYPE vllm:{name} histogram"
            yield from histogram.lines(f"vllm:{name}", labels)
        cache = f'block_size="16",num_gpu_blocks="{self.kv_size // 16}"'
        cache += f',kv_cache_size_tokens="{self.kv_size}",kv_cache_max_concurrency="{KV_SEQUENCES}"'
        yield f'# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{engine="0",{cache}}} 1'


@dataclass
class Job:
    """One completion: its answer is known beforehand, only its arrival takes time."""

    chat: bool
    head: dict[str, Any]
    asked: int  # prompt tokens
    tokens: list[str]
    finish_reason: str
    stop_reason: str | None

    def usage(self) -> dict[str, int]:
        made = len(self.tokens)
        counts = {"prompt_tokens": self.asked, "completion_tokens": made}
        return {**counts, "total_tokens": self.asked + made}

    def envelope(self, content: dict[str, Any], suffix: str, *, last: bool) -> dict[str, Any]:
        """Content as the one choice of an answer; the last one says why it ends."""
        finish, stop = (self.finish_reason, self.stop_reason) if last else (None, None)
        end = {"logprobs": None, "finish_reason": finish, "stop_reason": stop}
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [{"index": 0, **content, **end}]}

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        text = "".join(self.tokens)
        message = {"message": {"role": "assistant", "content": text, "tool_calls": []}}
        content = message if self.chat else {"text": text}
        return {**self.envelope(content, "", last=True), "usage": self.usage()}

    def chunk(self, text: str, *, last: bool = False, **more: str) -> dict[str, Any]:
        """One event of a stream."""
        content = {"delta": {**more, "content": text}} if self.chat else {"text": text}
        return self.envelope(content, ".chunk", last=last)


def answer_text(model: str, prompt: str) -> str:
    """What the simulator says to a prompt: always the same to the same prompt."""
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:12]
    return (
        f'This is a rehearsal: no model is loaded, and "{model}" is only simulated. '
        f'The prompt {digest} ends with "{" ".join(prompt.split()[-12:])}".'
    )


def prompt_text(body: dict[str, Any], chat: bool) -> str:
    """All text a request puts before the model; tools count, and come first."""
    if chat:
        messages, tools = body.get("messages"), body.get("tools")
        if not isinstance(messages, list):
            invalid(".messages", "Field required: a list of messages")
        first = [json.dumps(tools)] if tools else []
        return "\n".join([*first, *(message_text(i, m) for i, m in enumerate(messages))])
    prompt = body.get("prompt")
    if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
        return " ".join(map(str, prompt))
    if not isinstance(prompt, str):
        invalid(".prompt", "Field required: a string or a list of token ids")
    return prompt


def message_text(index: int, message: Any) -> str:
    """A message's text, whether it is given as a string, in parts or not at all."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        invalid(f".messages.{index}.role", "Field required: a message is an object with a role")
    content = message.get("content") or ""
    if isinstance(content, list):
        content = " ".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    if not isinstance(content, str):
        invalid(f".messages.{index}.content", "Input should be a string or a list of parts")
    return content


def token_limit(body: dict[str, Any], chat: bool, prompt_tokens: int, context: int) -> int:
    """How many tokens may be generated, refusing what does not fit the context."""
    limit = body.get("max_completion_tokens") if chat else None
    limit = body.get("max_tokens", None if chat else 16) if limit is None else limit
    wanted = 1 if limit is None else limit
    if not isinstance(wanted, int) or wanted < 1:
        why = f"max_tokens must be at least 1, got {limit}."
        raise Refusal(400, why, "BadRequestError", "max_tokens")
    if prompt_tokens + wanted > context:
        why = (
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{wanted} output tokens and your prompt contains at least {prompt_tokens} input "
            f"tokens, for a total of at least {prompt_tokens + wanted} tokens. Please reduce the "
            "length of the input prompt or the number of requested output tokens. "
            f"(parameter=input_tokens, value={prompt_tokens})"
        )
        raise Refusal(400, why, "BadRequestError", "input_tokens")
    return context - prompt_tokens if limit is None else wanted


def shorten(text: str, limit: int, stop: Any) -> tuple[list[str], str, str | None]:
    """The tokens of `text` up to a stop string or the limit, with finish and stop reason."""
    tokens = TOKEN.findall(text)
    kept = "".join(tokens[:limit])
    stops = stop if isinstance(stop, list) else [stop]
    found = [(kept.index(s), s) for s in stops if isinstance(s, str) and s and s in kept]
    if found:
        end, string = min(found)
        return TOKEN.findall(kept[:end]), "stop", string
    return tokens[:limit], "length" if len(tokens) > limit else "stop", None


@dataclass
class Request:
    """What a client asked; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    modern: bool  # HTTP/1.1: the connection may stay, and chunks are understood

    def value(self) -> dict[str, Any]:
        """The body's JSON object."""
        if "json" not in self.headers.get("content-type", ""):
            invalid("", "Unsupported Media Type: Only 'application/json' is allowed")
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            invalid("", f"JSON decode error: {error}")
        return value if isinstance(value, dict) else invalid("", "Input should be an object")


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    """The next request of a connection. Raises Refusal, EOFError or OSError."""
    try:
        idle = asyncio.get_event_loop().call_later(KEEP_ALIVE, writer.close)
        head = await reader.readuntil(b"\r\n\r\n")
        idle.cancel()
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, target, version = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await read_body(reader, headers)
    except (ValueError, asyncio.LimitOverrunError):
        raise Refusal(400, "Invalid HTTP request received.") from None
    return Request(method, target.partition("?")[0], headers, body, version == "HTTP/1.1")


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """A body of the given length, or in chunks. Raises ValueError when it is too large."""
    if "transfer-encoding" not in headers:
        length = int(headers.get("content-length", 0))
        return await reader.readexactly(length if length <= BODY_LIMIT else -1)
    body, size = bytearray(), 1
    while size:
        size = int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16)
        chunk = await reader.readexactly(size + 2 if len(body) + size <= BODY_LIMIT else -1)
        body += chunk[:size]
    return bytes(body)


class Client:
    """One HTTP connection: writes answers, and notices when the peer has gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.busy = self.last = False  # in a request; the connection ends after it
        self.chunks = True

    def gone(self) -> bool:
        return self.reader.at_eof() or self.writer.transport.is_closing()

    async def pause(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait so long, or until a condition. Raises ConnectionResetError when the peer leaves."""
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            await asyncio.sleep(max(0.0, min(left, 0.1)))
            if self.gone():
                raise ConnectionResetError
            if left <= 0.1 or until():
                return

    def reply(self, status: int, value: Any) -> None:
        """Answer at once: text as it is, anything else as JSON."""
        text = isinstance(value, str)
        body = (value if text else json.dumps(value)).encode()
        kind = "text/plain; version=0.0.4; charset=utf-8" if text else "application/json"
        self._head(status, kind, f"content-length: {len(body)}")
        self.writer.write(body)

    def begin(self) -> None:
        """Begin a stream of server-sent events."""
        more = ["transfer-encoding: chunked"] if self.chunks else []
        self._head(200, "text/event-stream; charset=utf-8", *more)

    def _head(self, status: int, kind: str, *more: str) -> None:
        lines = [f"HTTP/1.1 {status} {phrase(status)}", "server: simulator"]
        lines += [f"content-type: {kind}", *more, *["connection: close"] * self.last]
        self.writer.write("\r\n".join([*lines, "", ""]).encode())

    async def event(self, value: Any) -> None:
        """Send one event, now."""
        data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunks else data)
        await self.writer.drain()

    def end(self) -> None:
        """End the stream as a whole one."""
        self.writer.write(b"0\r\n\r\n" if self.chunks else b"")

    def reset(self) -> NoReturn:
        """Send a TCP reset instead of an answer."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        raise ConnectionResetError


class Engine:
    """The whole server: its connections, its metrics and its faults."""

    def __init__(self, options: argparse.Namespace, key: str) -> None:
        self.options, self.key, self.models = options, key, options.served_model_name
        self.metrics = Metrics(self.models[0], options.max_model_len)
        self.faults = Faults()
        self.slots = asyncio.Semaphore(options.max_num_seqs)
        self.clients: dict[Client, Any] = {}  # each with the task that serves it
        self.fingerprint = ""  # the address, once it is bound: who answered
        self.started = int(time.time())
        self.routes: dict[str, Callable[[Request], Any]] = {
            "GET /health": lambda _: "",
            "GET /ping": lambda _: "",
            "POST /ping": lambda _: "",
            "GET /version": lambda _: {"version": VERSION},
            "GET /load": lambda _: {"server_load": self.metrics.running + self.metrics.waiting},
            "GET /metrics": lambda _: "\n".join([*self.metrics.lines(), ""]),
            "GET /v1/models": lambda _: {"object": "list", "data": [*map(self.card, self.models)]},
            "POST /tokenize": self.tokenize,
        }

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end; the peer's leaving and our shutdown are ends, too."""
        client = Client(reader, writer)
        self.clients[client] = asyncio.current_task()
        try:
            while not client.last:
                await self.exchange(client)
        except (OSError, EOFError, asyncio.CancelledError):
            client.last = True
        finally:
            del self.clients[client]
            writer.close()

    async def exchange(self, client: Client) -> None:
        """One request and its answer."""
        try:
            request = await read_request(client.reader, client.writer)
        except Refusal as refusal:
            client.last = True
            client.reply(refusal.status, refusal.body)
            return
        client.busy, client.chunks = True, request.modern
        client.last |= not request.modern or request.headers.get("connection", "") == "close"
        try:
            await self.answer(client, request)
        except Refusal as refusal:
            client.reply(refusal.status, refusal.body)
        await client.writer.drain()
        client.busy = False

    async def answer(self, client: Client, request: Request) -> None:
        """Route one request."""
        route = f"{request.method} {request.path}"
        if request.path.startswith(GUARDED) and not self.authorised(request):
            client.reply(401, {"error": "Unauthorized"})
        elif route in INFERENCE:
            await self.infer(client, request)
        elif route in self.routes:
            client.reply(200, self.routes[route](request))
        elif request.path == "/simulator/faults":
            client.reply(200, self.command(client, request))
        else:
            known = any(r.endswith(f" {request.path}") for r in (*self.routes, *INFERENCE))
            status = 405 if known else 404
            client.reply(status, {"detail": phrase(status)})

    def authorised(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.encode(), self.key.encode())
        return not self.key or request.method == "OPTIONS" or (scheme.lower() == "bearer" and same)

    def command(self, client: Client, request: Request) -> dict[str, Any]:
        """Set, show or clear the fault for all."""
        peer = ipaddress.ip_address(client.writer.get_extra_info("peername")[0].partition("%")[0])
        if not (getattr(peer, "ipv4_mapped", None) or peer).is_loopback:
            raise Refusal(403, "faults are set from a loopback address")
        if request.method == "DELETE":
            self.faults = Faults(epoch=self.faults.epoch + 1)
        elif request.method == "POST":
            body = request.value()
            left = body.get("count")
            if left is not None and not isinstance(left, int):
                invalid(".count", "Input should be a number of requests, or null")
            self.faults = Faults(Fault.parse(str(body.get("fault"))), left, self.faults.epoch)
        return asdict(self.faults)

    def card(self, model: str) -> dict[str, Any]:
        """One model as vLLM lists it."""
        who = {"object": "model", "created": self.started, "owned_by": "simulator"}
        length = {"parent": None, "max_model_len": self.options.max_model_len, "permission": []}
        return {"id": model, **who, "root": model, **length}

    def tokenize(self, request: Request) -> dict[str, Any]:
        body = request.value()
        words = TOKEN.findall(prompt_text(body, "messages" in body))
        length = {"count": len(words), "max_model_len": self.options.max_model_len}
        return {**length, "tokens": [zlib.crc32(word.encode("utf-8", "replace")) for word in words]}

    def plan(self, body: dict[str, Any], chat: bool, name: str) -> Job:
        """The answer to a request. Raises Refusal where vLLM refuses."""
        model = body.get("model") or self.models[0]
        if model not in self.models:
            raise Refusal(404, f"The model `{model}` does not exist.", "NotFoundError", "model")
        if body.get("n") not in (None, 1):
            raise Refusal(400, "the simulator makes one answer (n=1)", "BadRequestError", "n")
        prompt = prompt_text(body, chat)
        asked = len(TOKEN.findall(prompt))
        limit = token_limit(body, chat, asked, self.options.max_model_len)
        text = answer_text(model, prompt)
        if body.get("ignore_eos"):
            text = f"{text} " * (limit // 10 + 1)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{name or uuid.uuid4().hex}"
        head = {"id": name, "object": "", "created": int(time.time()), "model": model}
        head["system_fingerprint"] = self.fingerprint
        return Job(chat, head, asked, *shorten(text, limit, body.get("stop")))

    async def infer(self, client: Client, request: Request) -> None:
        """Answer a completion, chat or not, at once or as a stream."""
        body, header = request.value(), request.headers.get("x-simulator-fault")
        fault = Fault.parse(header) if header else self.faults.take()
        if fault.kind == "reset":
            client.reset()
        if fault.kind == "status":
            raise Refusal(int(fault.amount), "the simulator was told to fail")
        chat = request.path.endswith("chat/completions") or "messages" in body
        job = self.plan(body, chat, request.headers.get("x-request-id", ""))
        if not body.get("stream"):
            await self.generate(client, job, fault, nothing)
            client.reply(200, job.whole())
            return
        client.begin()

        async def emit(index: int, token: str) -> None:
            if chat and not index:
                await client.event(job.chunk("", role="assistant"))
            await client.event(job.chunk(token))

        await self.generate(client, job, fault, emit)
        await client.event(job.chunk("", last=True))
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            await client.event({**job.chunk(""), "choices": [], "usage": job.usage()})
        await client.event("[DONE]")
        client.end()

    async def generate(self, client: Client, job: Job, fault: Fault, emit: Emit) -> None:
        """Give every token to `emit` when its time has come, and count."""
        metrics, begun, reason = self.metrics, time.monotonic(), "abort"
        metrics.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            metrics.waiting -= 1
        metrics.running += 1
        metrics.prompted += job.asked
        metrics.kv_held += job.asked + len(job.tokens)
        try:
            last = due = begun
            for index, token in enumerate(job.tokens):
                due = max(due + 1 / self.options.token_rate, last)
                await client.pause(due - time.monotonic())
                await self.suffer(client, fault, index)
                now = time.monotonic()
                metrics.seconds[BETWEEN if index else FIRST].observe(now - last)
                last = now
                metrics.generated += 1
                await emit(index, token)
            reason = job.finish_reason
        finally:
            self.slots.release()
            metrics.running -= 1
            metrics.kv_held -= job.asked + len(job.tokens)
            metrics.finished[reason] += 1
            metrics.seconds[WHOLE].observe(time.monotonic() - begun)

    async def suffer(self, client: Client, fault: Fault, index: int) -> None:
        """What a fault does before the token number `index`."""
        if fault.kind == "slow-first-token" and not index:
            await client.pause(fault.amount)
        if fault.kind == "cut-after" and index == fault.amount:
            raise ConnectionAbortedError
        if self.faults.frozen() or (fault.kind.startswith("hang") and index == fault.amount):
            epoch = self.faults.epoch
            await client.pause(float("inf"), until=lambda: self.faults.epoch != epoch)

    async def stop(self) -> None:
        """Let requests in flight end for as long as they may, then cut them off."""
        for client, task in self.clients.items():
            client.last = True
            if not client.busy:
                task.cancel()
        for patience in (self.options.shutdown_timeout, None):
            if self.clients:
                await asyncio.wait(list(self.clients.values()), timeout=patience)
            for task in self.clients.values():
                task.cancel()


async def nothing(_index: int, _token: str) -> None:
    """Emit nothing yet: the answer goes out as a whole."""


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    engine, stop = Engine(options, os.environ.get("VLLM_API_KEY", "")), asyncio.Event()
    address = (options.host, options.port)
    server = await asyncio.start_server(engine.connected, *address, limit=HEAD_LIMIT, backlog=1024)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_event_loop().add_signal_handler(number, stop.set)
    port = server.sockets[0].getsockname()[1]
    engine.fingerprint = f"simulator-{options.host}:{port}"
    print(f"simulator: a rehearsal of {engine.models[0]} on {options.host}:{port}", flush=True)
    await stop.wait()
    server.close()
    await engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="A stand-in engine for rehearsals, without GPUs.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, as printed")
    parser.add_argument("--served-model-name", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--max-model-len", type=int, default=32768, help="tokens")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="the others wait")
    parser.add_argument("--token-rate", type=float, default=50.0, help="per second and request")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds")
    options = parser.parse_args()
    if options.token_rate <= 0:
        parser.error("--token-rate must be above 0")
    try:
        asyncio.run(serve(options))
    except OSError as error:
        print(f"simulator: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
