"""Who is left out, who is not, and how they come back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from relaykit import (
    ANSWER,
    DONE,
    Asked,
    Engine,
    Leaving,
    Writer,
    event,
    fleet,
    hang,
    plain,
    reset,
    run,
    stream,
    until,
)

QUICK = {"interval": 0.2, "timeout": 0.3, "failures": 2, "hung_after": 0.6}


def page(running: int, tokens: int) -> str:
    """What vLLM's /metrics says of its load."""
    return (
        f'vllm:num_requests_running{{model_name="m"}} {running}.0\n'
        f'vllm:num_requests_waiting{{model_name="m"}} 0.0\n'
        f'vllm:generation_tokens_total{{model_name="m"}} {tokens}.0\n'
    )


def test_an_idle_engine_that_makes_no_token_is_left_out_and_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, hang, plain(), health=QUICK) as found:
            sick = found.worker.core.instances()["e0"]
            await until(lambda: sick.down == "probe")
            for _ in range(6):
                assert (await found.chat()).status_code == 200
            assert not found.engines[0].prompts
            assert await found.metric('inferfleet_gateway_instance_up{instance="e0"}') == 0
            found.engines[0].behaviour = plain()
            await until(lambda: not sick.down)
            ejections = 'inferfleet_gateway_ejections_total{instance="e0",reason="probe"}'
            assert await found.metric(ejections) == 1

    run(body())


def test_a_hung_engine_is_left_out_and_its_waiting_requests_go_elsewhere(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, hang, plain(), health=QUICK) as found:
            found.engines[0].metrics = page(running=3, tokens=500)
            sick = found.worker.core.instances()["e0"]
            found.worker.core.instances()["e1"].draining = True
            asked = asyncio.create_task(found.chat())
            await until(lambda: bool(found.engines[0].prompts))
            found.worker.core.instances()["e1"].draining = False
            assert (await asked).status_code == 200
            assert sick.down == "hung"
            assert found.engines[1].prompts

    run(body())


def test_a_busy_engine_is_not_left_out(tmp_path: Path) -> None:
    """Its probe waits behind long prompts and its streams are silent, but tokens move."""

    async def body() -> None:
        async with fleet(tmp_path, hang, health=QUICK) as found:
            (engine,) = found.engines
            busy = found.worker.core.instances()["e0"]
            for tokens in range(20):
                engine.metrics = page(running=200, tokens=tokens)
                await asyncio.sleep(0.1)
                assert not busy.down
            engine.metrics = page(running=200, tokens=20)
            await until(lambda: busy.down == "hung")

    run(body())


def test_a_stream_that_flows_proves_an_engine_without_metrics(tmp_path: Path) -> None:
    async def answer(asked: Asked, leaving: Leaving, writer: Writer) -> None:
        if b'"stream":true' in asked.body:
            parts = [event(str(number)) for number in range(30)]
            await stream(*parts, DONE, gap=0.1)(asked, leaving, writer)
        else:
            await hang(asked, leaving, writer)  # a probe waits in the engine's queue

    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        settings["pools"]["p"]["backend"] = "openai"

    async def body() -> None:
        async with fleet(tmp_path, answer, health=QUICK, change=change) as found:
            asked = asyncio.create_task(found.chat(stream=True))
            streaming = found.worker.core.instances()["e0"]
            while not asked.done():
                assert streaming.down == ""
                await asyncio.sleep(0.05)
            assert (await asked).content.endswith(DONE)
            await until(lambda: streaming.down == "probe")

    run(body())


def test_probes_are_gentle(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, plain(), health={**QUICK, "interval": 0.5}) as found:
            (engine,) = found.engines
            for _ in range(20):
                await found.chat()
                await asyncio.sleep(0.05)
            probes = [a for a in engine.seen if a.method == "POST" and a not in engine.prompts]
            assert len(probes) <= 1, "traffic is proof enough"
            await asyncio.sleep(1.2)
            probes = [a for a in engine.seen if a.method == "POST" and a not in engine.prompts]
            assert 1 <= len(probes) <= 4
            assert probes[0].json["max_tokens"] == 1

    run(body())


def test_an_answer_without_tokens_proves_nothing(tmp_path: Path) -> None:
    empty = {**ANSWER, "choices": [], "usage": None}

    async def body() -> None:
        async with fleet(tmp_path, plain(200, empty), health=QUICK) as found:
            await until(lambda: found.worker.core.instances()["e0"].down == "probe")

    run(body())


def test_failures_in_a_row_open_the_circuit_for_ever_longer(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, reset, plain(), health={"interval": 60}) as found:
            broken = found.worker.core.instances()["e0"]
            for key in range(40):
                assert (await found.chat(prompt_cache_key=str(key))).status_code == 200
            assert (
                len(found.engines[0].prompts) <= 3 * 2
            )  # each may be sent twice: kept connections
            assert not broken.usable(found.worker.core.time())
            status = await found.status()
            assert status["pools"]["p"][0]["left_out"] == "failures"
            assert 0 < status["pools"]["p"][0]["again_in_seconds"] <= 1

    run(body())


def test_health_of_the_gateway_follows_its_engines(tmp_path: Path) -> None:
    async def body() -> None:
        async with fleet(tmp_path, hang, health=QUICK) as found:
            assert (await found.client.get("/health")).status_code == 200
            sick = found.worker.core.instances()["e0"]
            await until(lambda: bool(sick.down))
            assert (await found.client.get("/health")).status_code == 503
            answer = await found.chat()
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == 503

    run(body())
