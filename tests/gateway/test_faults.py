"""Faults of engines and clients that cost others nothing, and their limits."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from relaykit import (
    DONE,
    KEY,
    Asked,
    Engine,
    Fleet,
    Leaving,
    Writer,
    event,
    fleet,
    hang,
    plain,
    quiet,
    run,
    stream,
    until,
)

from inferfleet.gateway import protocol
from inferfleet.gateway.upstream import MOST_BUFFERED, Client, target

pytestmark = pytest.mark.usefixtures("quiet")
EVENTS = [event(word) for word in ("one ", "two")] + [DONE]
LINES = [b'{"message":{"content":"%d"},"done":false}\n' % n for n in range(3)]
LAST = b'{"message":{"content":""},"done":true}\n'


__all__ = ["quiet"]


def two_pools(settings: dict[str, Any], engines: list[Engine]) -> None:
    """The second engine in a pool of its own, which gets nothing while the first one serves."""
    instances = settings["pools"]["p"]["instances"]
    settings["pools"]["p"]["instances"] = instances[:1]
    settings["pools"]["q"] = {**settings["pools"]["p"], "instances": instances[1:]}
    settings["pools"]["q"]["max_outstanding"] = 1
    settings["models"]["m"]["pools"] = {"p": 1, "q": 1e-9}


def ollama(settings: dict[str, Any], _engines: list[Engine]) -> None:
    settings["pools"]["p"]["backend"] = "ollama"


def idle(found: Fleet) -> bool:
    """Whether nothing is under way any more."""
    core = found.worker.core
    return not core.live and not any(one.outstanding for one in core.instances().values())


def raw(*pieces: bytes) -> Any:
    """An engine that writes these bytes."""

    async def behave(_asked: Asked, _leaving: Leaving, writer: Writer) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return behave


# streams of lines


def test_ollamas_lines_are_passed_on_as_they_come(tmp_path: Path) -> None:
    async def body() -> None:
        slow = stream(*LINES, end="hang", kind="lines")
        async with fleet(tmp_path, slow, change=ollama) as found:
            asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            async with found.client.stream("POST", "/api/chat", json=asked) as answer:
                got = b""
                async for data in answer.aiter_raw():
                    got += data
                    if got == b"".join(LINES):
                        break

    run(asyncio.wait_for(body(), 5))


def test_a_cut_stream_of_lines_ends_with_a_whole_line(tmp_path: Path) -> None:
    async def body() -> None:
        cut = stream(LINES[0], LINES[1][:9], end="cut", kind="lines")
        async with fleet(tmp_path, cut, change=ollama) as found:
            asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            answer = await found.client.post("/api/chat", json=asked)
            first, last = answer.content.splitlines(keepends=True)
            assert first == LINES[0]
            assert "broke off" in json.loads(last)["error"]
            found.engines[0].behaviour = stream(*LINES, LAST, kind="lines")
            answer = await found.client.post("/api/chat", json=asked)
            assert answer.content == b"".join((*LINES, LAST))

    run(body())


# queues


def test_who_waits_before_a_dead_pool_gets_a_place_in_the_living_one(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(), plain(wait=0.1), change=two_pools) as found:
            found.worker.core.instances()["e0"].draining = True
            answers = await asyncio.wait_for(asyncio.gather(*(found.chat() for _ in range(6))), 5)
            assert Counter(one.status_code for one in answers) == {200: 6}
            assert not any(pool.waiting for pool in found.worker.core.pools.values())

    run(body())


def test_a_request_waits_no_longer_than_the_queues_timeout_in_all(tmp_path: Path) -> None:
    async def body() -> None:
        queue = {"length": 9, "timeout": 2.5}
        async with fleet(tmp_path, plain(), queue=queue) as found:
            await found.engines[0].stop()
            answer = await asyncio.wait_for(found.chat(), 4)
            assert answer.status_code == 503

    run(body())


def test_a_drain_tells_those_who_wait(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["max_outstanding"] = 1
        settings["drain_timeout"] = 0.2

    async def body() -> None:
        async with fleet(tmp_path, hang, change=change) as found:
            asked = [asyncio.create_task(found.chat()) for _ in range(3)]
            await until(lambda: len(found.worker.core.live) == 3)
            found.worker.stopping.set()
            answers = await asyncio.gather(*asked)
            assert [one.status_code for one in answers] == [503] * 3
            assert all("being stopped" in one.text for one in answers)

    run(body())


# engines


def test_a_request_that_kills_engines_does_not_kill_all(tmp_path: Path) -> None:
    """Each dies of it on a connection that was in use before, and is gone when asked again."""

    def lethal(own: list[Engine]) -> Any:
        async def behave(asked: Asked, leaving: Leaving, writer: Writer) -> None:
            if b"poison" in asked.body:
                await own[0].stop()
                writer.transport.abort()
            else:
                await plain()(asked, leaving, writer)

        return behave

    async def body() -> None:
        owns: list[list[Engine]] = [[] for _ in range(7)]
        async with fleet(tmp_path, *map(lethal, owns)) as found:
            for own, engine in zip(owns, found.engines, strict=True):
                own.append(engine)
            await asyncio.gather(*(found.chat() for _ in range(28)))
            answer = await found.chat(messages=[{"role": "user", "content": "poison"}])
            assert answer.status_code == 503
            died = [e for e in found.engines if any(b"poison" in a.body for a in e.seen)]
            assert len(died) <= 4
            assert (await found.chat()).status_code == 200

    run(body())


def test_a_connection_is_not_handed_on_while_it_is_paused(tmp_path: Path) -> None:
    """A large answer that nobody has fetched must not stop who gets the connection next."""
    length = b"content-length: %d\r\n\r\n" % (MOST_BUFFERED + 100)

    async def body() -> None:
        rest = asyncio.Event()

        async def large(_asked: Asked, _leaving: Leaving, writer: Writer) -> None:
            writer.write(b"HTTP/1.1 200 X\r\n" + length + b"x" * (MOST_BUFFERED - 100))
            await rest.wait()
            writer.write(b"x" * 200)

        engine = Engine(large)
        await engine.start()
        client = Client(3)
        where = target(f"http://127.0.0.1:{engine.port}", {}, None)
        first = await client.ask("POST", where, "/", {})
        await asyncio.sleep(0.1)  # what came first is waiting for its reader
        rest.set()
        await until(lambda: first.complete)
        engine.behaviour = plain()
        for _ in range(2):
            async with asyncio.timeout(2):
                assert await (await client.ask("POST", where, "/", {})).whole()
        client.close()
        await engine.stop()

    run(body())


def test_a_client_that_does_not_read_is_no_fault_of_the_engine(tmp_path: Path) -> None:
    large = event("x" * 500_000)
    timeouts = {"idle": 0.3, "first_token": 5}

    async def body() -> None:
        async with fleet(tmp_path, stream(*[large] * 30, DONE), timeouts=timeouts) as found:
            asked = b'{"model":"m","stream":true,"messages":[]}'
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port, limit=1024)
            writer.write(request(asked))
            await reader.read(1)
            writer.transport.pause_reading()
            await asyncio.sleep(1.2)
            engine = found.worker.core.instances()["e0"]
            assert (engine.failures, len(found.worker.core.live)) == (0, 1)
            writer.transport.abort()
            await until(lambda: idle(found))

    run(body())


def request(body: bytes, path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A request as bytes."""
    lines = {"Host": "x", "Authorization": f"Bearer {KEY}", "Content-Length": str(len(body))}
    text = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **headers}.items())
    return f"POST {path} HTTP/1.1\r\n{text}\r\n".encode() + body


def answer(head: bytes, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (head, len(body)) + body


ODD = {
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "redirect": answer(b"307 X\r\nlocation: http://192.0.2.1/"),
    "unknown status": answer(b"999 X"),
    "created": answer(b"201 X"),
    "gzip": answer(b"200 X\r\ncontent-type: application/json\r\ncontent-encoding: gzip"),
    "not modified": b"HTTP/1.1 304 X\r\n\r\n",
    "no HTTP": b"SSH-2.0-x\r\n",
    "endless head": b"HTTP/1.1 200 X\r\n" + b"x: " + b"y" * 300_000,
    "many headers": b"HTTP/1.1 200 X\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
    "endless interim": b"HTTP/1.1 100 X\r\n\r\n" * 10_000,
    "switching": b"HTTP/1.1 101 X\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 X\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "length and chunks": answer(b"200 X\r\ntransfer-encoding: chunked"),
    "bad chunk": b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "control characters": b"HTTP/1.1 200 X\r\ncontent-type: a\x01b\r\ncontent-length: 2\r\n\r\n{}",
    "folded header": b"HTTP/1.1 200 X\r\ncontent-type: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("odd", ODD)
def test_answers_that_are_none_are_told_as_faults_of_the_engine(
    tmp_path: Path, odd: str, streamed: bool
) -> None:
    async def body() -> None:
        async with fleet(tmp_path, raw(ODD[odd]), queue={"timeout": 1}) as found:
            asked = found.chat(stream=streamed)
            answer = await asyncio.wait_for(asked, 9)
            assert answer.status_code in (502, 503), answer.content
            assert answer.json()["error"]["type"] == "server_error"
            await until(lambda: idle(found))

    run(body())


def test_a_page_instead_of_an_error_is_not_passed_on(tmp_path: Path) -> None:
    page = b"<html>not found</html>"

    async def body() -> None:
        async with fleet(tmp_path, raw(answer(b"404 X\r\ncontent-type: text/html", page))) as found:
            got = await found.chat()
            assert got.status_code == 404
            assert got.json()["error"]["message"] == "the engine gave no reason"

    run(body())


def test_the_log_tells_no_error_of_a_request_that_another_engine_answered(tmp_path: Path) -> None:
    async def body() -> None:
        timeouts = {"first_token": 0.3}
        async with fleet(tmp_path, hang, stream(*EVENTS), timeouts=timeouts) as found:
            while not found.engines[0].prompts:
                assert (await found.chat(stream=True)).status_code == 200
            await until(lambda: any(line["attempts"] == 2 for line in found.logged()))
            assert {line["error"] for line in found.logged()} == {""}

    run(body())


def test_a_copys_answer_of_any_form_is_compared_or_counted_as_failed(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], engines: list[Engine]) -> None:
        two_pools(settings, engines)
        settings["models"]["m"]["pools"] = {"p": 1}
        settings["models"]["m"]["shadow"] = {"pool": "q", "percent": 100}

    async def body() -> None:
        odd = [{"choices": {"a": 1}}, {"choices": [1]}, {"choices": [{"delta": 3}]}, [], 7]
        odd.append({"choices": [{"message": {"content": 4, "tool_calls": [1, {"index": []}]}}]})
        async with fleet(tmp_path, plain(), plain(), change=change) as found:
            for body in odd:
                found.engines[1].behaviour = plain(200, body)
                assert (await found.chat()).status_code == 200
                await until(lambda: not found.worker.shadows.running)
            copies = found.worker.shadows.copies["m"]
            assert copies.asked == copies.failed + len(copies.compared) == len(odd)

    run(body())


# what strangers and Java send


async def said(found: Fleet, *pieces: bytes, seconds: float = 5) -> bytes:
    """What comes back for these bytes until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
    try:
        async with asyncio.timeout(seconds):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def test_javas_offer_of_another_protocol_does_not_cost_the_body(tmp_path: Path) -> None:
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAE"}

    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            first = request(b'{"model":"m","messages":[]}', **offer)
            end = first.index(b"\r\n\r\n") + 4
            last = request(b'{"model":"m","prompt":"h2c"}', Connection="close")
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
            writer.write(first[:end])
            await asyncio.sleep(0.05)
            writer.write(first[end:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.write(last)
            assert (await reader.read()).count(b"HTTP/1.1 200") == 1
            writer.close()
            assert [asked.body for asked in found.engines[0].prompts] == [
                first[end:],
                last.partition(b"\r\n\r\n")[2],
            ]

    run(body())


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * 60_000,
        b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 60_000,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 9_000,
    ],
)
def test_a_head_without_end_is_not_kept(tmp_path: Path, endless: bytes) -> None:
    more = endless[-24_000:]

    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            assert b"200" not in await said(found, endless, *[more] * 400)
            assert not found.worker.public.server_state.connections

    run(body())


def test_requests_that_trickle_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST", "HEAD", "BODY", "UNREAD"):
        monkeypatch.setattr(protocol, name, 0.3)
    good = request(b'{"model":"m","messages":[]}')
    trickles = [
        b"",
        good[:20],
        good[:-5],
        request(b"", Authorization="x", **{"Content-Length": "99"}),
    ]

    async def body() -> None:
        async with fleet(tmp_path, plain(wait=0.8)) as found:
            for trickle in trickles:
                await said(found, trickle, seconds=2)
            assert not found.engines[0].prompts
            whole = await said(found, request(b'{"model":"m"}', Connection="close"), seconds=2)
            assert b"200 OK" in whole, "an answer may take its time"

    run(body())


def test_the_engine_stops_for_a_client_that_leaves_with_more_to_ask(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, hang) as found:
            _, writer = await asyncio.open_connection("127.0.0.1", found.port)
            writer.write(request(b'{"model":"m"}') * 3)
            await until(lambda: bool(found.engines[0].prompts))
            writer.close()
            await until(lambda: idle(found), 2)
            await until(lambda: bool(found.engines[0].gone), 2)

    run(body())


def test_a_client_that_leaves_within_a_small_request_is_no_error(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            short = request(b"{", "/api/show", **{"Content-Length": "100"})
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)
            writer.write(short)
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()

    run(body())


@pytest.mark.parametrize("path", ["/health/", "/v1/models/x/", "//192.0.2.1/v1/models"])
def test_nobody_is_sent_elsewhere(tmp_path: Path, path: str) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            answer = await found.client.get(found.url + path, headers={"Host": "example.com"})
            assert answer.status_code == 404
            assert "location" not in answer.headers

    run(body())


# one model for the gateway, another one for the engine


@pytest.mark.parametrize("backend", ["vllm", "tgi", "ollama", "openai"])
@pytest.mark.parametrize(
    "asked",
    [
        b'{"model":"m","Model":"other","messages":[]}',
        b'{"MODEL":"other","model":"m","messages":[]}',
        b'{"model":"other","model":"m","messages":[]}',
        b'{"model":"m","\\u004dodel":"other","messages":[]}',
        b'{"m\\u006Fdel":"other","model":"m","messages":[]}',
    ],
)
def test_engines_are_asked_for_the_model_that_was_checked(
    tmp_path: Path, backend: str, asked: bytes
) -> None:
    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["backend"] = backend

    def last(pairs: list[tuple[str, Any]]) -> Any:
        """Objects as Go reads them."""
        return {name.lower() if backend == "ollama" else name: value for name, value in pairs}

    async def body() -> None:
        async with fleet(tmp_path, plain(), change=change) as found:
            for path in ("/v1/chat/completions", "/api/chat"):
                whole = asked.replace(b"[]", b'[{"role":"user","content":"hi"}]')
                whole = whole.replace(b'"messages"', b'"stream":false,"messages"')
                answer = await found.client.post(path, content=whole)
                assert answer.status_code == 200, answer.content
                sent = found.engines[0].prompts[-1].body
                assert json.loads(sent, object_pairs_hook=last)["model"] == "m"

    run(body())
