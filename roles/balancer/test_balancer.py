"""What clients meet: keys, tokens, streams, and nothing else of the engines."""

from collections.abc import Callable

import pytest
from testinfra.host import Host

from inferfleet import gateways
from inferfleet.model import Instance, Plan, Secret, Step
from inferfleet.verify.plugin import Answer
from inferfleet.verify.proofs import PROMPT, Ask, answered, chat, steady, streamed

UNIT = "inferfleet-balancer.service"


@pytest.fixture
def base(step: Step) -> str:
    """Where clients come in."""
    scheme = "https" if "tls" in step.settings else "http"
    return f"{scheme}://127.0.0.1:{step.settings['port']}"


@pytest.fixture
def behind(plan: Plan) -> Step | None:
    """One of the gateways it stands before, if it does."""
    steps = (step for steps in plan.steps.values() for step in steps)
    return next((step for step in steps if step.role == gateways.ROLE), None)


@pytest.fixture
def key(step: Step, behind: Step | None) -> Secret:
    """The first client's key; a gateway's without limits, if there is one."""
    if behind:
        return min(gateways.keys(behind), key=lambda entry: len(entry[2]))[1]
    found: Secret = sorted(step.settings["api_keys"].items())[0][1]
    return found


@pytest.fixture
def served(step: Step, behind: Step | None, plan: Plan) -> list[tuple[str, Instance]]:
    """(path before /v1, an instance behind it) for each deployment the balancer serves."""
    named = step.settings.get("deployments", plan.phase.deployments)
    found = {i.deployment.name: i for i in plan.instances() if i.deployment.name in named}
    if behind:
        made = gateways.config(behind, plan)["models"].values()
        models = [model["pools"] for model in made if not model["embeddings"]]
        asked = [next((i for n, i in found.items() if p.get(n)), None) for p in models]
        return [("", instance) for instance in asked if instance]
    paths = [(f"/{name}", instance) for name, instance in found.items()]
    return [*paths, ("", next(iter(found.values())))] if len(found) == 1 else paths


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """the unit runs and starts at boot"""
    steady(host, UNIT)


def test_answers_with_real_tokens(
    ask: Ask, base: str, key: Secret, served: list[tuple[str, Instance]], plan: Plan
) -> None:
    """with a client's key, a chat request brings real tokens from every deployment"""
    for path, instance in served:
        answer = ask(f"{base}{path}/v1/chat/completions", key=key, json=chat(instance))
        answered(answer, instance, plan)


def test_refuses_other_keys(
    ask: Ask,
    base: str,
    key: Secret,
    served: list[tuple[str, Instance]],
    reveal: Callable[[Secret], str],
) -> None:
    """without a key, with a wrong one, or with one in other case, it answers 401"""
    other = reveal(key).swapcase()
    for path, instance in served:
        for wrong in (None, "wrong", other if other != reveal(key) else "wrong"):
            answer = ask(f"{base}{path}/v1/chat/completions", key=wrong, json=chat(instance))
            assert answer.status == 401, answer.error or answer.text[:500]


def test_streams_tokens_as_they_are_made(
    ask: Ask, base: str, key: Secret, served: list[tuple[str, Instance]]
) -> None:
    """a stream arrives token by token, also through TLS"""
    for path, instance in served:
        body = chat(instance, stream=True)
        streamed(ask(f"{base}{path}/v1/chat/completions", key=key, json=body))


def test_hides_what_clients_do_not_need(ask: Ask, base: str, key: Secret) -> None:
    """metrics, documentation and keyless inference of the engines are not reachable"""
    hidden = ("/metrics", "/invocations", "/tokenize", "/docs", "/v1/../metrics", "/%2e/metrics")
    for path in hidden:
        answer: Answer = ask(base + path, key=key)
        assert answer.status in (400, 404), f"{path} answers {answer.status}"
        if answer.status == 404:
            assert answer.json()["error"]["code"] == 404


def test_says_healthy(ask: Ask, base: str) -> None:
    """/health answers without a key while an engine serves"""
    answer = ask(f"{base}/health")
    assert answer.status == 200, answer.error or answer.text[:500]


def test_takes_long_prompts(
    ask: Ask, base: str, key: Secret, served: list[tuple[str, Instance]]
) -> None:
    """a request of 2 MB reaches the engine, which may find it too long itself"""
    path, instance = served[0]
    body = chat(instance, messages=[{"role": "user", "content": PROMPT + "x" * 2_000_000}])
    answer = ask(f"{base}{path}/v1/chat/completions", key=key, json=body)
    assert answer.status in (200, 400), answer.error or answer.text[:500]


def test_ollamas_clients_find_somebody_at_home(ask: Ask, base: str, behind: Step | None) -> None:
    """before gateways, Ollama's clients are greeted; without, there is no such API"""
    assert ask(f"{base}/").status == (200 if behind else 404)
    assert ask(f"{base}/api/tags").status == (401 if behind else 404)


@pytest.mark.disruptive
def test_comes_back_after_a_restart(host: Host, ask: Ask, base: str) -> None:
    """after a restart it serves again"""
    host.check_output("systemctl restart %s", UNIT)
    assert ask(f"{base}/health").status == 200
