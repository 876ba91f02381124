"""The processes of a gateway: start, reload, crash and end, as systemd and operators cause them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import HTTPException, Request
from relaykit import DONE, KEY, Engine, event, run, settings, stream, until

from inferfleet.gateway import supervisor
from inferfleet.gateway.config import Config
from inferfleet.gateway.private import from_here
from inferfleet.gateway.supervisor import GONE, Child, Supervisor

EVENTS = [event(str(number)) for number in range(10)] + [DONE]
PROGRAM = (sys.executable, "-m", "inferfleet.gateway")


@dataclass
class Gateway:
    """A running supervisor with its workers."""

    process: asyncio.subprocess.Process
    config: Path
    state: Path
    port: int
    private: int
    client: httpx.AsyncClient

    @property
    def workers(self) -> list[int]:
        return list(json.loads(self.state.read_text())["workers"])

    def write(self, **changes: Any) -> None:
        found = json.loads(self.config.read_text())
        self.config.write_text(json.dumps({**found, **changes}))

    async def chat(self, stream: bool = False) -> httpx.Response:
        asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        return await self.client.post("/v1/chat/completions", json=asked)

    async def reload(self) -> tuple[int, str]:
        """Exit code and words of the reload that a unit's ExecReload runs."""
        argv = ("--config", str(self.config), "--state-file", str(self.state))
        told = await asyncio.create_subprocess_exec(
            *PROGRAM, *argv, "--reload", str(self.process.pid), stderr=subprocess.PIPE
        )
        _, words = await told.communicate()
        return told.returncode or 0, words.decode()


def free_ports(count: int) -> int:
    """The first of some that follow each other, below those the kernel gives to clients."""
    while True:
        first = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


@contextlib.asynccontextmanager
async def gateway(folder: Path, engine: Engine, **changes: Any) -> AsyncIterator[Gateway]:
    await engine.start()
    port = free_ports(3)
    private = port + 1
    config, state = folder / "config.json", folder / "state.json"
    wanted = settings([engine], folder, listen=f"127.0.0.1:{port}", **changes)
    config.write_text(json.dumps({**wanted, "private": f"127.0.0.1:{private}"}))
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, "--config", str(config), "--state-file", str(state)
    )
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=20,
        limits=httpx.Limits(max_connections=None),
    ) as client:
        try:
            await until(state.exists, 20)
            yield Gateway(process, config, state, port, private, client)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.wait_for(process.wait(), 20)
            await engine.stop()


def test_a_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine(stream(*EVENTS, gap=0.05))) as found:
            before = found.workers
            asked = []
            reloading = None
            for at in range(60):
                asked.append(asyncio.create_task(found.chat(stream=True)))
                if at == 20:
                    found.write(models=renamed(found))
                    reloading = asyncio.create_task(found.reload())
                await asyncio.sleep(0.04)
            assert reloading
            assert await reloading == (0, "")
            answers = await asyncio.gather(*asked)
            assert {answer.content for answer in answers} == {b"".join(EVENTS)}
            assert not set(before) & set(found.workers)
            listed = (await found.client.get("/v1/models")).json()
            assert "another" in [entry["id"] for entry in listed["data"]]
            await until(lambda: not alive(before[0]))

    run(body())


def renamed(found: Gateway) -> Any:
    models = json.loads(found.config.read_text())["models"]
    models["m"]["aliases"] = ["another"]
    return models


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("broken", [{"models": {}}, {"pools": 3}, {"no_such_option": 1}])
def test_a_bad_configuration_changes_nothing(tmp_path: Path, broken: dict[str, Any]) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine()) as found:
            before = found.workers
            found.write(**broken)
            code, words = await found.reload()
            assert code == 1
            assert words.startswith(f"{found.config}: ")
            assert words.count("\n") == 1
            found.process.send_signal(signal.SIGHUP)  # even if somebody insists
            await asyncio.sleep(0.5)
            assert found.workers == before
            assert (await found.chat()).status_code == 200

    run(body())


def test_workers_that_do_not_come_up_leave_the_old_ones(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine()) as found:
            before = found.workers
            found.write(log=str(tmp_path / "no" / "such" / "folder"))
            async with asyncio.timeout(20):
                assert await found.reload() == (
                    1,
                    "new workers did not come up; see the gateway's log\n",
                )
            assert found.workers == before
            assert (await found.chat()).status_code == 200

    run(body())


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine(), workers=2) as found:
            before = found.workers
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            await until(lambda: before[0] not in found.workers and len(found.workers) == 2)
            answers = [await found.chat() for _ in range(10)]
            assert {answer.status_code for answer in answers} == {200}

    run(body())


def test_one_worker_follows_a_dead_one_even_in_a_reload_or_at_the_second_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    async def body() -> None:
        config = msgspec.convert(settings([Engine()], tmp_path, private="127.0.0.1:0"), Config)
        supervised = Supervisor(tmp_path / "config.json", config, None)
        monkeypatch.setattr(supervisor, "PAUSE", 0)

        async def start(slot: int) -> Child | None:
            started.append(slot)
            return None if len(started) == 1 else await dead()

        async def dead() -> Child:
            process = await asyncio.create_subprocess_exec("true")
            await process.wait()
            return Child(0, process)

        monkeypatch.setattr(supervised, "start", start)
        supervised.children = {died := await dead(), await dead()}
        await supervised.attend(died)
        assert started == [], "a reload has put another in its place"
        supervised.children = {died}
        await supervised.attend(died)
        assert started == [0, 0]
        for each in (supervised.public, *supervised.privates):
            each.close()

    run(body())


def test_sigterm_lets_streams_end_and_then_ends(tmp_path: Path) -> None:
    async def body() -> None:
        engine = Engine(stream(*EVENTS, gap=0.1))
        async with gateway(tmp_path, engine) as found:
            asked = asyncio.create_task(found.chat(stream=True))
            await until(lambda: bool(engine.prompts))
            found.process.terminate()
            assert (await asked).content == b"".join(EVENTS)
            assert await found.process.wait() == 0

    run(body())


def test_a_stream_longer_than_the_drain_ends_with_an_error_event(tmp_path: Path) -> None:
    async def body() -> None:
        engine = Engine(stream(EVENTS[0], end="hang"))
        async with gateway(tmp_path, engine, drain_timeout=0.5) as found:
            asked = asyncio.create_task(found.chat(stream=True))
            await until(lambda: bool(engine.prompts))
            await asyncio.sleep(0.2)
            found.process.terminate()
            assert b'"stream_cut"' in (await asked).content
            assert await found.process.wait() == 0

    run(body())


def test_a_drained_gateway_closes_its_port_until_it_is_reloaded(tmp_path: Path) -> None:
    async def body() -> None:
        engine = Engine(stream(*EVENTS, gap=0.05))
        async with gateway(tmp_path, engine, workers=2) as found:
            private = f"http://127.0.0.1:{found.private}"
            asked = [asyncio.create_task(found.chat(stream=True)) for _ in range(6)]
            await until(lambda: len(engine.prompts) == 6)
            await found.client.post(f"{private}/drain")
            await until(lambda: refuses(found.port))
            answers = await asyncio.gather(*asked)
            assert {answer.content for answer in answers} == {b"".join(EVENTS)}
            status = (await found.client.get(f"{private}/status")).json()
            assert (status["draining"], status["outstanding"]) == (True, 0)
            assert (await found.reload())[0] == 0
            assert (await found.chat(stream=True)).status_code == 200

    run(body())


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def test_orders_from_other_hosts_are_refused() -> None:
    scope = {"client": ("192.0.2.7", 5000), "server": ("192.0.2.8", 9400)}
    with pytest.raises(HTTPException, match="403"):
        from_here(Request({"type": "http", **scope}))
    from_here(Request({"type": "http", **scope, "client": ("192.0.2.8", 5000)}))
    from_here(Request({"type": "http", **scope, "client": ("127.0.0.1", 5000)}))


def test_workers_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine()) as found:
            (worker,) = found.workers
            found.process.kill()
            await found.process.wait()
            await until(lambda: not alive(worker))

    run(body())


def test_tokens_of_the_day_and_weights_outlive_a_reload(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "state").mkdir()
        async with gateway(tmp_path, Engine(), state=str(tmp_path / "state")) as found:
            private = f"http://127.0.0.1:{found.private}"
            await found.chat()
            weights = {"p": 7.0}
            await found.client.put(f"{private}/models/m/weights", json=weights)
            assert (await found.reload())[0] == 0
            async with httpx.AsyncClient() as fresh:
                status = (await fresh.get(f"{private}/status")).json()
            assert status["models"]["m"]["weights"] == weights

    run(body())


def test_what_is_wrong_at_the_start_is_said_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "config.json"
    cases = {
        "{": "truncated",
        "[]": "Expected `object`",
        json.dumps(open_to_all()): "without keys",
        json.dumps({**open_to_all(), "listen": "nowhere"}): "is no address",
        json.dumps({**open_to_all(), "keys": "/no/such"}): "/no/such: ",
        json.dumps(open_to_all("http://me:secret@192.0.2.1:80")): "belongs into key_file",
        json.dumps(open_to_all("http://192.0.2.1:99999")): "from 1 to 65535",
    }
    for text, expected in cases.items():
        bad.write_text(text)
        told = subprocess.run(
            [*PROGRAM, "--config", str(bad)], capture_output=True, text=True, timeout=20
        )
        assert told.returncode == 1
        assert expected in told.stderr
        assert told.stderr.count("\n") == 1, told.stderr


def open_to_all(url: str = "http://127.0.0.1:1") -> dict[str, Any]:
    instance = {"name": "e", "url": url}
    pools = {"p": {"backend": "vllm", "model": "m", "instances": [instance]}}
    return {"listen": "0.0.0.0:0", "pools": pools, "models": {"m": {"pools": {"p": 1}}}}


def test_an_address_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = tmp_path / "config.json"
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config.write_text(json.dumps({**open_to_all(), "listen": address}))
        told = subprocess.run(
            [*PROGRAM, "--config", str(config)], capture_output=True, text=True, timeout=20
        )
    assert told.returncode == 1
    assert told.stderr == f"{address}: address already in use\n"


def test_a_log_moved_away_during_a_reload_does_not_cost_the_new_workers(tmp_path: Path) -> None:
    async def body() -> None:
        async with gateway(tmp_path, Engine(stream(*EVENTS))) as found:
            before = found.workers
            reloading = asyncio.create_task(found.reload())
            while not reloading.done():
                found.process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(0.02)
            assert await reloading == (0, "")
            assert not set(before) & set(found.workers)

    run(body())


def test_a_client_that_is_cut_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads here, as if the network were gone: unsent bytes end the connection."""
    wanted = [(at, name, 400 if name == socket.TCP_USER_TIMEOUT else to) for at, name, to in GONE]
    monkeypatch.setattr(supervisor, "GONE", wanted)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        with supervisor.listening("127.0.0.1:0") as found, socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, found.getsockname())
            accepted, _ = await loop.sock_accept(found)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            with accepted, pytest.raises((TimeoutError, ConnectionError)):
                await loop.sock_sendall(accepted, b"x" * 50_000_000)

    run(asyncio.wait_for(body(), 20))
