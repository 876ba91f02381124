"""A real vLLM on one host, the balancer on another, and the stock OpenAI client before both.

The tests go on from each other, in order: they share what the first one provisioned.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import openai
import pytest
from enginekit import BALANCER, ENGINE, MODEL, UNIT, Fleet, fleet

pytestmark = [pytest.mark.lab, pytest.mark.engine]
__all__ = ["fleet"]

HIDDEN = ("/metrics", "/docs", "/ping", "/version", "/load", "/tokenize", "/invocations")
LONG = 300  # tokens, some seconds of them
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]


@pytest.fixture(scope="module")
def provisioned(fleet: Fleet) -> Fleet:
    """Everything provisioned from nothing, up to the engine's first answer."""
    said = fleet.said("provision", "--yes")
    assert {name: host["status"] for name, host in said["hosts"].items()} == {
        ENGINE: "changed",
        BALANCER: "changed",
    }
    return fleet


def until(check: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def stream(fleet: Fleet, tokens: int) -> list[tuple[float, str]]:
    """(when, text) of each chunk of a chat completion with text."""
    with fleet.client() as client:
        chunks = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=tokens, temperature=0, stream=True
        )
        found = [(time.monotonic(), c.choices[0].delta.content) for c in chunks if c.choices]
    return [(when, text) for when, text in found if text]


def test_verify_proves_every_claim(provisioned: Fleet) -> None:
    said = provisioned.said("verify")
    proofs = {(proof["host"], proof["proves"]): proof["passed"] for proof in said["proofs"]}
    assert proofs[ENGINE, "tiny-0: a chat request brings real tokens"]
    assert proofs[
        BALANCER, "with a client's key, a chat request brings real tokens from every deployment"
    ]
    assert all(proofs.values())


def test_stock_client_gets_chunks_as_they_are_made(provisioned: Fleet) -> None:
    chunks = stream(provisioned, tokens=64)
    assert len(chunks) > 10
    assert "".join(text for _, text in chunks).strip()
    spread = chunks[-1][0] - chunks[0][0]
    assert spread > 0.05, f"{len(chunks)} chunks within {spread:.3f} s: they were held back"


def test_stock_client_is_refused_with_a_wrong_key(provisioned: Fleet) -> None:
    with provisioned.client("wrong") as client, pytest.raises(openai.AuthenticationError) as told:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    assert "valid API key" in told.value.message


def test_stock_client_is_refused_without_a_key(provisioned: Fleet) -> None:
    no_key = {"Authorization": openai.Omit()}
    with provisioned.client() as client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=1, extra_headers=no_key
        )


def test_engines_key_is_no_clients_key(provisioned: Fleet) -> None:
    key = (provisioned.inventory / "secrets/engine.key").read_text().strip()
    with provisioned.client(key) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize("path", HIDDEN)
def test_balancer_hides_what_the_engine_serves_without_key(provisioned: Fleet, path: str) -> None:
    engine = provisioned.lab.hosts[ENGINE].address
    assert status(provisioned, f"http://{engine}:8000{path}") != 404, "the engine has no such path"
    assert status(provisioned, provisioned.base + path) == 404


def test_balancer_hides_inference_without_a_key(provisioned: Fleet) -> None:
    engine = f"http://{provisioned.lab.hosts[ENGINE].address}:8000"
    body = json.dumps({"model": MODEL, "messages": MESSAGES, "max_tokens": 1}).encode()
    assert status(provisioned, f"{engine}/invocations", body) == 200, "vLLM closed that door"
    assert status(provisioned, f"{provisioned.base}/invocations", body) == 404


def status(fleet: Fleet, url: str, body: bytes | None = None) -> int:
    """The HTTP status that a request without a key brings; a POST where it has a body."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    trust = fleet.trust() if url.startswith("https") else None
    try:
        with urllib.request.urlopen(request, context=trust, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_second_provision_finds_nothing_to_do(provisioned: Fleet) -> None:
    hosts = provisioned.said("provision", "--yes")["hosts"]
    assert {name: (host["status"], host["round_trips"]) for name, host in hosts.items()} == {
        ENGINE: ("unchanged", 1),
        BALANCER: ("unchanged", 1),
    }


def test_an_engine_whose_core_is_killed_comes_back(provisioned: Fleet) -> None:
    before = restarts(provisioned)
    provisioned.on_engine("kill -9 $(pgrep -f ^VLLM::EngineCore)")
    until(lambda: restarts(provisioned) > before, 30, "it is not started again")
    health = f"{provisioned.base}/health"
    until(lambda: status(provisioned, health) == 200, 180, "it does not serve again")
    assert stream(provisioned, tokens=8)
    assert provisioned.said("verify", "--limit", ENGINE)["ok"]


def restarts(fleet: Fleet) -> int:
    return int(fleet.on_engine(f"systemctl show -p NRestarts --value {UNIT}"))


def test_a_stopped_engine_lets_its_streams_end(provisioned: Fleet) -> None:
    with provisioned.client() as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=LONG, temperature=0, stream=True
        )
        next(answer)
        provisioned.on_engine(f"systemctl stop --no-block {UNIT}")
        until(lambda: state(provisioned) == "deactivating", 5, "it does not stop")
        stopping = time.monotonic()
        chunks = [chunk.choices[0] for chunk in answer]
    assert time.monotonic() - stopping > 0.3, "the stream was over before the stop"
    assert chunks[-1].finish_reason == "length"
    until(lambda: state(provisioned) == "inactive", 30, "it does not end after its last stream")


def state(fleet: Fleet) -> str:
    return fleet.on_engine(f"systemctl show -p ActiveState --value {UNIT}")
