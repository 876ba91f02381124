"""A simulator to put under load, and what one load comes to."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from inferfleet.load import steps
from inferfleet.load.client import Client
from inferfleet.load.outcome import side
from inferfleet.load.statistics import Sample
from inferfleet.load.target import Target
from inferfleet.load.workload import Method, Workload, body

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "roles/simulator/simulator.py"
RATE = 200  # tokens a second: 5 ms each
WORK = Workload(prompt_tokens=64, output_tokens=24, ignore_eos=True, words=64)


class Simulator:
    """A running simulator on a free loopback port."""

    def __init__(self, rate: float = RATE, key: str = "") -> None:
        argv = [sys.executable, str(PROGRAM), "--port", "0", "--served-model-name", "tiny"]
        self.process = subprocess.Popen(
            [*argv, "--token-rate", str(rate)],
            env={**os.environ, "VLLM_API_KEY": key},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.target = Target("simulator", self.url, "tiny", key=key)

    def fault(self, fault: str | None) -> None:
        data = None if fault is None else json.dumps({"fault": fault}).encode()
        asked = urllib.request.Request(
            f"{self.url}/simulator/faults",
            data,
            {"content-type": "application/json"},
            method="POST" if data else "DELETE",
        )
        urllib.request.urlopen(asked, timeout=10).close()

    def finished(self) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = re.findall(
                r"^vllm:request_success_total.* (\S+)$", response.read().decode(), re.M
            )
        return sum(map(float, lines))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def running():
    simulator = Simulator()
    yield simulator
    simulator.stop()


@pytest.fixture
def simulator(running):
    yield running
    running.fault(None)


@pytest.fixture(scope="module")
def slow():
    simulator = Simulator(RATE / 2)
    yield simulator
    simulator.stop()


def measured(*targets, watch=lambda _: None, **method):
    """A run's steps, by target."""
    run = steps.measure(list(targets), Method(WORK, **method), watch)
    return run, [side(each, n, run.rounds) for n, each in enumerate(run.targets)]


def asked(where: Target, *contents: bytes, timeout: float = 10.0) -> list[Sample]:
    """What single requests came to."""

    async def ask():
        client = Client(where, timeout)
        try:
            return [await client.ask(content) for content in contents]
        finally:
            await client.close()

    return asyncio.run(ask())


def request(**more):
    workload = Workload(output_tokens=8, ignore_eos=True)
    return json.dumps(json.loads(body("openai", "tiny", "Hello", workload)) | more).encode()
