"""What reaches the engine, what reaches the client, and what happens when engines fail."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from relaykit import (
    ANSWER,
    DONE,
    Engine,
    event,
    fleet,
    hang,
    plain,
    reset,
    run,
    stream,
    until,
)

WHOLE = json.dumps(ANSWER).encode()
EVENTS = [event(word) for word in ("one ", "two ", "drei 🙂 ", "four")] + [DONE]


def test_passes_bodies_and_events_untouched(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, stream(*EVENTS)) as found:
            odd = b'{ "model":"m",\n "stream" : true, "messages":[], "x": 1e-7, "n":1.50}'
            answer = await found.client.post("/v1/chat/completions", content=odd)
            assert answer.content == b"".join(EVENTS)
            assert answer.headers["content-type"] == "text/event-stream"
            (asked,) = found.engines[0].prompts
            assert asked.body == odd
            assert asked.path == "/v1/chat/completions"
            assert asked.headers["x-request-id"] == answer.headers["x-request-id"]
            assert "authorization" not in asked.headers

    run(body())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_events_are_the_same_however_the_engine_cuts_them(tmp_path: Path, size: int) -> None:
    whole = b"".join(EVENTS)
    parts = [whole[at : at + size] for at in range(0, len(whole), size)]

    async def body() -> None:
        async with fleet(tmp_path, stream(*parts)) as found:
            answer = await found.chat(stream=True)
            assert answer.content == whole

    run(body())


def test_first_event_does_not_wait_for_the_second(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, stream(*EVENTS[:2], gap=0.3, end="hang")) as found:
            since = time.monotonic()
            asked = {"model": "m", "stream": True, "messages": []}
            async with found.client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                first = await anext(answer.aiter_raw())
            assert first == EVENTS[0]
            assert time.monotonic() - since < 0.25

    run(body())


def test_renames_the_model_for_the_engine_only(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["model"] = "served/name"
        settings["models"]["m"]["aliases"] = ["gpt-4o"]

    async def body() -> None:
        async with fleet(tmp_path, plain(), change=change) as found:
            for asked in ("m", "gpt-4o", "m:fastest", "m:inferfleet"):
                answer = await found.chat(model=asked, metadata={"model": "kept"}, top_k=3)
                assert answer.status_code == 200
                sent = found.engines[0].prompts[-1].json
                assert sent["model"] == "served/name"
                assert sent["metadata"] == {"model": "kept"}
                assert sent["top_k"] == 3

    run(body())


ANYWAY = [reset, plain(503), plain(502), plain(500)]
BROKEN = [(one, False) for one in ANYWAY]
BROKEN += [(one, True) for one in (*ANYWAY, stream(end="cut"), stream())]


@pytest.mark.parametrize(("broken", "streamed"), BROKEN)
def test_asks_another_instance_before_the_first_byte(
    tmp_path: Path, broken: Any, streamed: bool
) -> None:
    async def body() -> None:
        good = stream(*EVENTS) if streamed else plain()
        async with fleet(tmp_path, broken, good) as found:
            for _ in range(6):
                answer = await found.chat(stream=streamed)
                assert answer.status_code == 200
                assert answer.content == (b"".join(EVENTS) if streamed else WHOLE)
            assert found.engines[0].prompts, "the broken one was never asked"

    run(body())


def test_a_killed_engine_costs_no_request(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(wait=0.05), plain(wait=0.05)) as found:
            asked = [asyncio.create_task(found.chat()) for _ in range(20)]
            await until(lambda: found.engines[0].open > 3)
            await found.engines[0].stop()
            assert {a.status_code for a in await asyncio.gather(*asked)} == {200}
            after = [await found.chat() for _ in range(5)]
            assert {a.status_code for a in after} == {200}

    run(body())


def test_requests_wait_for_an_engine_that_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            (engine,) = found.engines
            await engine.stop()
            asked = asyncio.create_task(found.chat())
            await asyncio.sleep(0.2)
            await engine.start()
            assert (await asked).status_code == 200

    run(body())


def test_a_retry_costs_less_than_5_ms(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, reset, plain()) as found:
            times = []
            for _ in range(12):
                found.worker.core.pools["p"].instances[0].succeeded(0)
                before = len(found.engines[0].prompts)
                since = time.perf_counter()
                await found.chat(prompt_cache_key=str(_))
                if len(found.engines[0].prompts) > before:
                    times.append(time.perf_counter() - since)
            direct = []
            found.worker.core.pools["p"].instances[0].draining = True
            for _ in range(12):
                since = time.perf_counter()
                await found.chat()
                direct.append(time.perf_counter() - since)
            assert times
            assert sorted(times)[0] - sorted(direct)[0] < 0.005

    run(body())


def test_a_stream_cut_in_the_middle_ends_with_an_error_event(tmp_path: Path) -> None:
    half = EVENTS[1][:20]

    async def body() -> None:
        cut = stream(EVENTS[0], half, end="cut")
        async with fleet(tmp_path, cut, stream(*EVENTS)) as found:
            found.worker.core.pools["p"].instances[1].draining = True
            answer = await found.chat(stream=True)
            events = [part for part in answer.text.split("\n\n") if part]
            assert events[0] + "\n\n" == EVENTS[0].decode()
            told = json.loads(events[1].removeprefix("data: "))
            assert told["error"]["code"] == "stream_cut"
            assert len(events) == 2, "half an event must not reach the client"
            assert len(found.engines[1].prompts) == 0

    run(body())


def test_a_stream_without_its_end_is_a_cut_one(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, stream(*EVENTS[:2])) as found:
            answer = await found.chat(stream=True)
            assert b'"stream_cut"' in answer.content

    run(body())


def test_silent_engines_are_given_up(tmp_path: Path) -> None:
    timeouts = {"first_token": 0.3, "idle": 0.3, "whole": 0.6}

    async def body() -> None:
        async with fleet(tmp_path, hang, stream(*EVENTS), timeouts=timeouts) as found:
            for key in ("a", "b", "c", "d"):
                answer = await found.chat(stream=True, prompt_cache_key=key)
                assert answer.content == b"".join(EVENTS)
            assert found.engines[0].prompts
            found.engines[1].behaviour = stream(EVENTS[0], end="hang")
            found.worker.core.pools["p"].instances[0].draining = True
            assert b'"stream_cut"' in (await found.chat(stream=True)).content
            found.engines[1].behaviour = hang
            assert (await found.chat()).status_code == 504

    run(body())


@pytest.mark.parametrize(
    ("behaviour", "streamed"),
    [
        (hang, False),
        (hang, True),
        (stream(EVENTS[0], end="hang"), True),
        (plain(wait=5), False),
    ],
)
def test_the_engine_stops_when_the_client_leaves(
    tmp_path: Path, behaviour: Any, streamed: bool
) -> None:
    async def body() -> None:
        async with fleet(tmp_path, behaviour) as found:
            asked = asyncio.create_task(found.chat(stream=streamed))
            await until(lambda: bool(found.engines[0].prompts))
            await asyncio.sleep(0.05)
            asked.cancel()
            left = asyncio.get_running_loop().time()
            await until(lambda: bool(found.engines[0].gone), 2)
            assert found.engines[0].gone[0] - left < 0.05
            await until(lambda: not found.worker.core.live)
            assert found.worker.core.instances()["e0"].outstanding == 0
            await until(lambda: bool(found.logged()))
            assert found.logged()[-1]["client_left"] is True

    run(body())


def test_errors_about_the_request_pass_through_and_are_not_retried(tmp_path: Path) -> None:
    told = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}

    async def body() -> None:
        async with fleet(tmp_path, plain(400, told), plain(400, told)) as found:
            answer = await found.chat()
            assert (answer.status_code, answer.json()) == (400, told)
            assert sum(len(engine.prompts) for engine in found.engines) == 1

    run(body())


def test_a_refused_engine_key_is_no_error_of_the_client(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(401, {"error": "Unauthorized"})) as found:
            answer = await found.chat()
            assert answer.status_code == 502
            assert "gateway's key" in answer.json()["error"]["message"]

    run(body())


def test_busy_everywhere_is_said_with_retry_after(tmp_path: Path) -> None:
    async def body() -> None:
        busy = plain(503, {"error": {"message": "queue is full"}}, retry_after="7")
        async with fleet(tmp_path, busy, busy) as found:
            answer = await found.chat()
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "7"

    run(body())


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["max_outstanding"] = 2
        settings["queue"] = {"length": 3, "timeout": 5}

    async def body() -> None:
        async with fleet(tmp_path, plain(wait=0.2), change=change) as found:
            answers = await asyncio.gather(*(found.chat() for _ in range(8)))
            codes = sorted(answer.status_code for answer in answers)
            assert codes == [200] * 5 + [429] * 3
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert int(refused.headers["retry-after"]) > 0
            assert found.engines[0].most_open == 2
            assert await found.metric('inferfleet_gateway_refused_total{reason="queue"}') == 3

    run(body())


def test_turns_of_one_conversation_meet_the_same_instance(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, *(plain() for _ in range(4))) as found:
            homes = set()
            for user in range(12):
                turns = [{"role": "system", "content": "s" * 5000}]
                for turn in range(4):
                    turns.append({"role": "user", "content": f"question {user} {turn}"})
                    await found.chat(messages=turns)
                    turns.append({"role": "assistant", "content": "answer"})
                where = [
                    sum(f"question {user} 0" in str(a.json) for a in e.prompts)
                    for e in found.engines
                ]
                assert sorted(where) == [0, 0, 0, 4]
                homes.add(where.index(4))
            assert len(homes) >= 3, "conversations are spread"

    run(body())


def test_requests_of_one_session_meet_the_same_instance(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, *(plain() for _ in range(4))) as found:
            for session in range(12):
                for turn in range(3):
                    told = [{"role": "user", "content": f"{session} {turn}"}]
                    await found.chat(messages=told, headers={"X-Session-Id": f"s{session}"})
            for session in range(12):
                where = [
                    sum(f'"{session} ' in a.body.decode() for a in e.prompts) for e in found.engines
                ]
                assert sorted(where) == [0, 0, 0, 3]

    run(body())


def test_a_busy_home_does_not_hold_its_conversations(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(wait=0.1), plain(wait=0.1)) as found:
            await asyncio.gather(*(found.chat() for _ in range(20)))
            counts = sorted(len(engine.prompts) for engine in found.engines)
            assert counts[0] >= 8

    run(body())


def test_keys_are_checked_before_anything_else(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
                answer = await found.chat(headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "invalid_request_error"
            other = await found.chat(headers={"Authorization": "", "x-api-key": "sk-test"})
            assert other.status_code == 200
            assert len(found.engines[0].prompts) == 1

    run(body())


def test_unknown_models_and_bad_bodies_are_explained(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(), max_body_mib=1) as found:
            assert (await found.chat(model="nope")).status_code == 404
            for content in (b"", b"{", b"[]", b'{"messages":[]}', b'{"model":7}', b"\xff\xfe"):
                answer = await found.client.post("/v1/chat/completions", content=content)
                assert answer.status_code == 400, content
            large = await found.client.post("/v1/chat/completions", content=b"x" * (2 << 20))
            assert large.status_code == 413
            assert not found.engines[0].prompts

    run(body())


def test_revoked_keys_are_refused_without_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            assert (await found.chat()).status_code == 200
            (tmp_path / "keys.json").write_text('{"keys": []}')
            for _ in range(40):
                answer = await found.chat()
                if answer.status_code == 401:
                    break
                await asyncio.sleep(0.1)
            assert answer.status_code == 401

    run(body())


def test_the_log_has_numbers_and_no_words(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain()) as found:
            secret = "the-prompt-itself"
            await found.chat(messages=[{"role": "user", "content": secret}])
            await until(lambda: bool(found.logged()))
            (line,) = found.logged()
            assert (line["key"], line["model"], line["instance"]) == ("tester", "m", "e0")
            assert (line["prompt_tokens"], line["completion_tokens"]) == (5, 1)
            text = found.log.read_text()
            assert secret not in text
            assert "hello" not in text
            assert "sk-test" not in text
            counted = (
                'inferfleet_gateway_requests_total{code="200",instance="e0",model="m",pool="p"}'
            )
            assert await found.metric(counted) == 1

    run(body())


def test_a_drained_instance_gets_nothing_new(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(), plain()) as found:
            await found.client.post(f"http://127.0.0.1:{found.private}/instances/e0/drain")
            for _ in range(6):
                await found.chat()
            assert not found.engines[0].prompts
            await found.client.post(f"http://127.0.0.1:{found.private}/instances/e0/undrain")
            await asyncio.gather(*(found.chat() for _ in range(8)))
            assert found.engines[0].prompts

    run(body())


def test_sigterm_lets_streams_end(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, stream(*EVENTS, gap=0.1)) as found:
            asked = asyncio.create_task(found.chat(stream=True))
            await until(lambda: bool(found.engines[0].prompts))
            found.worker.stopping.set()
            assert (await asked).content == b"".join(EVENTS)
            with pytest.raises(httpx.ConnectError):
                await found.chat()

    run(body())


def test_weights_move_all_requests_and_back(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], engines: list[Engine]) -> None:
        old = {"name": "o", "url": f"http://127.0.0.1:{engines[1].port}"}
        settings["pools"]["p"]["instances"] = settings["pools"]["p"]["instances"][:1]
        settings["pools"]["old"] = {"backend": "openai", "model": "gpt", "instances": [old]}
        settings["models"]["m"]["pools"] = {"p": 1, "old": 0}

    async def body() -> None:
        async with fleet(tmp_path, plain(), plain(), change=change) as found:
            weights = f"http://127.0.0.1:{found.private}/models/m/weights"
            await asyncio.gather(*(found.chat() for _ in range(10)))
            assert (len(found.engines[0].prompts), len(found.engines[1].prompts)) == (10, 0)
            answer = await found.client.put(weights, json={"p": 0, "old": 1})
            assert answer.json() == {"p": 0, "old": 1}
            await asyncio.gather(*(found.chat() for _ in range(10)))
            assert len(found.engines[1].prompts) == 10
            assert found.engines[1].prompts[0].json["model"] == "gpt"
            await found.client.delete(weights)
            await found.chat()
            assert len(found.engines[0].prompts) == 11
            for wrong in ('{"x": 1}', '{"p": -1}', '{"p": 0}', '{"p": NaN}', '{"p": Infinity}'):
                answer = await found.client.put(weights, content=wrong)
                assert answer.status_code == 422, wrong
            assert (await found.chat()).status_code == 200

    run(body())


def test_shadowed_requests_are_compared_and_kept_from_the_client(tmp_path: Path) -> None:
    def change(settings: dict[str, Any], engines: list[Engine]) -> None:
        new = {"name": "n", "url": f"http://127.0.0.1:{engines[1].port}"}
        settings["pools"]["p"]["instances"] = settings["pools"]["p"]["instances"][:1]
        settings["pools"]["new"] = {"backend": "vllm", "model": "m2", "instances": [new]}
        settings["models"]["m"]["shadow"] = {"pool": "new", "percent": 100}

    async def body() -> None:
        slower = stream(*EVENTS, first=0.1)
        async with fleet(tmp_path, stream(*EVENTS), slower, change=change) as found:
            for _ in range(5):
                assert (await found.chat(stream=True)).content == b"".join(EVENTS)
            await until(lambda: len(found.worker.shadows.copies["m"].compared) == 5)
            answer = await found.client.get(f"http://127.0.0.1:{found.private}/shadow")
            told = answer.json()["m"]
            assert (told["asked"], told["failed"], told["same_text"]) == (5, 0, 1.0)
            assert told["first_token"]["copies"]["p50"] >= 0.1
            assert told["first_token"]["clients"]["p50"] < 0.1

    run(body())
