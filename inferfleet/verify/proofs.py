"""What every engine that speaks OpenAI's API has to prove; engines' tests import these.

`from inferfleet.verify.proofs import *` in roles/<engine>/test_<engine>.py runs them for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from inferfleet.model import Instance, Plan, Secret
from inferfleet.plan import SIMULATOR
from inferfleet.verify.plugin import Answer

__all__ = [
    "test_answers_with_real_tokens",
    "test_comes_back_after_a_restart",
    "test_listens_only_where_it_should",
    "test_refuses_without_the_key",
    "test_runs_and_starts_at_boot",
    "test_streams_tokens_as_they_are_made",
]

Ask = Callable[..., Answer]
PROMPT = "Write a Python function that adds two numbers."


def url(instance: Instance, path: str) -> str:
    """Where the instance's own host reaches it."""
    return f"http://{instance.endpoint}{path}"


def chat(instance: Instance, **more: Any) -> dict[str, Any]:
    """A small chat request for the model the instance serves."""
    model = instance.deployment.model.served_name
    return {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 32,
        "temperature": 0,
        **more,
    }


def steady(host: Host, unit: str) -> None:
    """The unit runs and starts at boot."""
    shown = host.check_output("systemctl show -p ActiveState,SubState,UnitFileState %s", unit)
    state = dict(line.split("=", 1) for line in shown.splitlines())
    assert state["ActiveState"] == "active", f"{unit} is {state['ActiveState']}"
    assert state["SubState"] == "running", f"{unit} is {state['SubState']}"
    assert state["UnitFileState"] == "enabled", f"{unit} would not start at boot"


def test_runs_and_starts_at_boot(host: Host, instance: Instance) -> None:
    """the unit runs and starts at boot"""
    steady(host, instance.unit)


def test_listens_only_where_it_should(host: Host, instance: Instance) -> None:
    """its port is open on its own address only"""
    sockets = host.check_output("ss -Hltn 'sport = :%s'", str(instance.port)).splitlines()
    addresses = {line.split()[3].rpartition(":")[0] for line in sockets}
    wanted = instance.endpoint.rpartition(":")[0]
    assert addresses == {wanted}, f"it is open on {', '.join(sorted(addresses)) or 'none'}"


def test_answers_with_real_tokens(
    ask: Ask, instance: Instance, engine_key: Secret | None, plan: Plan
) -> None:
    """a chat request brings real tokens"""
    answer = ask(url(instance, "/v1/chat/completions"), key=engine_key, json=chat(instance))
    assert answered(answer, instance, plan)["usage"]["completion_tokens"] > 0


def answered(answer: Answer, instance: Instance, plan: Plan) -> Any:
    """A chat's answer has content, and not the simulator's where an engine should be."""
    assert answer.status == 200, answer.error or answer.text[:500]
    said = answer.json()
    assert said["choices"][0]["message"]["content"].strip(), "the answer is empty"
    if not plan.rehearsal and instance.deployment.engine != SIMULATOR:
        stands_in = str(said.get("system_fingerprint")).startswith(SIMULATOR)
        assert not stands_in, "the simulator of a rehearsal answered: provision without --rehearse"
    return said


def test_refuses_without_the_key(ask: Ask, instance: Instance, engine_key: Secret | None) -> None:
    """without its key, or with another one, it refuses"""
    if engine_key is None:
        assert instance.listen == "127.0.0.1", "it has no key and listens for other hosts"
        return
    for key in (None, "wrong"):
        answer = ask(url(instance, "/v1/chat/completions"), key=key, json=chat(instance))
        assert answer.status == 401, answer.error or answer.text[:500]


def test_streams_tokens_as_they_are_made(
    ask: Ask, instance: Instance, engine_key: Secret | None
) -> None:
    """a stream arrives token by token, and is closed properly"""
    body = chat(instance, stream=True)
    streamed(ask(url(instance, "/v1/chat/completions"), key=engine_key, json=body))


def streamed(answer: Answer) -> None:
    """An answer came as a stream whose events were not held back to its end."""
    assert answer.status == 200, answer.error or answer.text[:500]
    events = answer.events()
    assert len(events) >= 3, f"only {len(events)} events"
    assert answer.lines[-1][1].strip() == "data: [DONE]" or "data: [DONE]" in answer.text
    arrivals = {when for when, _ in events}
    spread = max(arrivals) - min(arrivals)
    assert spread > 0.01, f"all {len(events)} events came at once, after {max(arrivals):.2f} s"


@pytest.mark.disruptive
def test_comes_back_after_a_restart(
    host: Host, ask: Ask, instance: Instance, engine_key: Secret | None, plan: Plan
) -> None:
    """after a restart it serves again"""
    host.check_output("systemctl restart %s", instance.unit)
    timeout = int(instance.options.get("startup_timeout", 60))
    probe = (
        f"for i in $(seq {timeout * 2}); do "
        f"bash -c 'exec 3<>/dev/tcp/{instance.listen}/{instance.port}' 2>/dev/null && exit 0; "
        "sleep 0.5; done; exit 1"
    )
    assert host.run(f"timeout {timeout} sh -c %s", probe).rc == 0, "its port does not open again"
    test_answers_with_real_tokens(ask, instance, engine_key, plan)
