"""What balancers and clients meet: every model, both APIs, keys, streams; and a quiet reload."""

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from inferfleet import gateways
from inferfleet.model import Plan, Secret, Step
from inferfleet.verify.proofs import PROMPT, Ask, steady, streamed

UNIT = "inferfleet-gateway.service"


@pytest.fixture
def gateway(step: Step, plan: Plan) -> gateways.Gateway:
    """Where it listens."""
    return gateways.gateway(step, plan)


@pytest.fixture
def base(gateway: gateways.Gateway) -> str:
    """Where its own host reaches it."""
    return "http://" + gateway.public.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture
def key(step: Step) -> Secret:
    """A client's key, without limits if there is one."""
    return min(gateways.keys(step), key=lambda entry: len(entry[2]))[1]


@pytest.fixture
def models(step: Step, plan: Plan) -> list[str]:
    """What clients may ask for text."""
    made = gateways.config(step, plan)["models"]
    return [name for name, model in made.items() if not model["embeddings"]]


def chat(model: str, **more: Any) -> dict[str, Any]:
    """A small chat request."""
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": model, "messages": messages, "max_tokens": 32, "temperature": 0, **more}


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """the unit runs and starts at boot"""
    steady(host, UNIT)


def test_runs_from_the_environment_of_its_wheels(host: Host, step: Step) -> None:
    """it runs from the environment that its wheels make"""
    done = host.run("sh /opt/inferfleet/gateway/install.sh --check")
    assert done.rc == 0, done.stderr


def test_reaches_every_engine(ask: Ask, gateway: gateways.Gateway, plan: Plan) -> None:
    """it finds every engine of the plan fit to be asked"""
    for address in gateway.private:
        answer = ask(f"http://{address}/status")
        assert answer.status == 200, answer.error or answer.text[:500]
        pools = answer.json()["pools"].values()
        left_out = {i["name"]: i["left_out"] for pool in pools for i in pool if not i["usable"]}
        assert not left_out


def test_answers_with_real_tokens(ask: Ask, base: str, key: Secret, models: list[str]) -> None:
    """a chat request brings real tokens from every model"""
    for model in models:
        answer = ask(f"{base}/v1/chat/completions", key=key, json=chat(model))
        assert answer.status == 200, answer.error or answer.text[:500]
        assert answer.json()["choices"][0]["message"]["content"].strip(), "the answer is empty"


def test_streams_tokens_as_they_are_made(
    ask: Ask, base: str, key: Secret, models: list[str]
) -> None:
    """a stream arrives token by token"""
    for model in models:
        streamed(ask(f"{base}/v1/chat/completions", key=key, json=chat(model, stream=True)))


def test_speaks_ollamas_api(ask: Ask, base: str, key: Secret, models: list[str]) -> None:
    """a client of Ollama's API gets tokens from every model, whatever engine serves it"""
    for model in models:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
        more = {"stream": False, "options": {"num_predict": 32}}
        answer = ask(f"{base}/api/chat", key=key, json=body | more)
        assert answer.status == 200, answer.error or answer.text[:500]
        assert answer.json()["message"]["content"].strip(), "the answer is empty"


def test_refuses_other_keys(
    ask: Ask, base: str, key: Secret, models: list[str], reveal: Callable[[Secret], str]
) -> None:
    """without a key, with a wrong one, or with one in other case, it answers 401"""
    other = reveal(key).swapcase()
    for wrong in (None, "wrong", other if other != reveal(key) else "wrong"):
        for path in ("/v1/chat/completions", "/api/chat"):
            answer = ask(base + path, key=wrong, json=chat(models[0]))
            assert answer.status == 401, answer.error or answer.text[:500]


def test_hides_its_private_side(ask: Ask, base: str, key: Secret) -> None:
    """metrics, state and orders are not where clients are"""
    for path in ("/metrics", "/status", "/shadow", "/drain", "/docs", "/openapi.json"):
        answer = ask(base + path, key=key)
        assert answer.status in (404, 405), f"{path} answers {answer.status}"


@pytest.mark.disruptive
def test_reloads_without_a_pause(host: Host, ask: Ask, base: str) -> None:
    """a reload succeeds, and it serves afterwards"""
    host.check_output("systemctl reload %s", UNIT)
    assert ask(f"{base}/health").status == 200
