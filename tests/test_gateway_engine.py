"""A real vLLM behind the gateway: OpenAI's API and Ollama's, long prompts, clients that leave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from langchain_openai import ChatOpenAI
from relaykit import KEY, Engine, Fleet, fleet, plain, quiet, run
from tools import vllm_cpu

from inferfleet.gateway.backends import parse_load

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("quiet")]
__all__ = ["quiet"]

CONTEXT, PATIENCE = 1024, 240  # tokens; seconds
ENGINE_KEY = "key-of-the-engine"
HI = [{"role": "user", "content": "Write a function that adds two numbers."}]
FEW = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a vLLM that serves `tiny`, with a key."""
    made = vllm_cpu.ensure()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    argv = [str(made.venv / "bin/vllm"), "serve", str(made.model), "--served-model-name", "tiny"]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(CONTEXT)]
    argv += ["--max-num-seqs", "8", "--enforce-eager"]
    own = {
        "HF_HUB_OFFLINE": "1",
        "LD_LIBRARY_PATH": str(made.libraries),
        "VLLM_API_KEY": ENGINE_KEY,
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=os.environ | own, stdout=out, stderr=out, cwd="/")
    try:
        _until_healthy(port, process, log)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    pytest.fail(log.read_text(errors="replace")[-3000:])


def before(engine: int, folder: Path, work: Callable[[Fleet], Any]) -> None:
    """Run a client, which may block, against a gateway before the engine."""
    key = folder / "engine.key"
    key.write_text(ENGINE_KEY)

    def change(settings: dict[str, Any], _engines: list[Engine]) -> None:
        instances = [{"name": "real", "url": f"http://127.0.0.1:{engine}"}]
        real = {"backend": "vllm", "model": "tiny", "instances": instances, "key_file": str(key)}
        settings["pools"] = {"real": real}
        settings["models"] = {"m": {"pools": {"real": 1}, "context_length": CONTEXT}}

    async def body() -> None:
        async with fleet(folder, plain(), change=change) as found:
            if asyncio.iscoroutinefunction(work):
                await work(found)
            else:
                await asyncio.to_thread(work, found)

    run(body())


def client(found: Fleet) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{found.url}/v1", api_key=KEY, max_retries=0)


def ollamas(found: Fleet) -> ollama.Client:
    return ollama.Client(host=found.url, headers={"Authorization": f"Bearer {KEY}"})


def test_openais_client_gets_vllms_answers(engine: int, tmp_path: Path) -> None:
    def work(found: Fleet) -> None:
        with client(found) as one:
            told = one.chat.completions.create(model="m", messages=HI, logprobs=True, **FEW)
            text = told.choices[0].message.content
            assert text
            assert told.usage.completion_tokens == 12
            assert len(told.choices[0].logprobs.content) == 12
            parts = list(
                one.chat.completions.create(
                    model="m",
                    messages=HI,
                    stream=True,
                    stream_options={"include_usage": True},
                    **FEW,
                )
            )
            streamed = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
            assert streamed == text
            assert parts[-1].usage.completion_tokens == 12
            assert one.completions.create(model="m", prompt="def", **FEW).choices[0].text
        with httpx.Client() as own:
            url = f"{found.url}/v1"
            chain = ChatOpenAI(base_url=url, api_key=KEY, model="m", http_client=own, **FEW)
            assert chain.invoke(HI[0]["content"]).content == text

    before(engine, tmp_path, work)


def test_ollamas_client_gets_vllms_answers(engine: int, tmp_path: Path) -> None:
    few = {"num_predict": 12, "temperature": 0}

    def work(found: Fleet) -> None:
        with ollamas(found) as one:
            whole = one.chat(model="m", messages=HI, options=few)
            assert whole.eval_count == 12
            assert whole.done_reason == "length"
            lines = list(one.chat(model="m", messages=HI, options=few, stream=True))
            assert "".join(line.message.content or "" for line in lines) == whole.message.content
            assert len(lines) > 3
            assert (lines[-1].done, lines[-1].eval_count) == (True, 12)
            assert lines[-1].prompt_eval_count == whole.prompt_eval_count > 0
            first = one.generate(model="m", prompt="hello", options=few)
            again = one.generate(model="m", prompt="on", options=few, context=first.context)
            assert again.prompt_eval_count > first.prompt_eval_count
            assert one.generate(model="m", prompt="def", raw=True, options=few).response
            assert [each.model for each in one.list().models] == ["m:latest"]
            assert one.show("m").modelinfo["unknown.context_length"] == CONTEXT

    before(engine, tmp_path, work)


def test_a_prompt_that_is_too_long_is_told_clearly(engine: int, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "one two three " * 1000}]

    def work(found: Fleet) -> None:
        with client(found) as one:
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError, match=f"{CONTEXT}") as told:
                    one.chat.completions.create(model="m", messages=long, stream=stream)
                assert "maximum" in told.value.message
        with ollamas(found) as two:
            with pytest.raises(ollama.ResponseError, match=f"maximum.*{CONTEXT}") as told:
                two.chat(model="m", messages=long)
            assert told.value.status_code == 400
        assert found.worker.core.instances()["real"].failures == 0

    before(engine, tmp_path, work)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_vllm_stops_within_a_second_when_the_client_leaves(
    engine: int, tmp_path: Path, path: str, stream: bool
) -> None:
    body = {"model": "m", "messages": HI, "stream": stream}
    body |= {"max_tokens": 900, "options": {"num_predict": 900}}

    async def running(own: httpx.AsyncClient) -> int:
        page = await own.get(f"http://127.0.0.1:{engine}/metrics")
        load = parse_load("vllm", page.text)
        assert load is not None
        return load.running

    async def until(check: Callable[[], Awaitable[bool]], seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while not await check():
                await asyncio.sleep(0.02)

    async def work(found: Fleet) -> None:
        async with httpx.AsyncClient() as own:

            async def busy() -> bool:
                return await running(own) > 0

            async def free() -> bool:
                return await running(own) == 0

            await until(free, 10)
            asked = asyncio.create_task(found.client.post(path, content=json.dumps(body)))
            await until(busy, 10)
            asked.cancel()
            await until(free, 1)
            assert found.worker.core.instances()["real"].failures == 0

    before(engine, tmp_path, work)
