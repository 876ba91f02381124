"""Clients, balancer, two gateways, engines, on hosts that reach no package index."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleetkit import Fleet, said, units, until
from gatewaykit import MODEL, Door, load
from labkit import leave_out, require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet.errors import HostError
from inferfleet.lab import wheels
from inferfleet.model import Result

pytestmark = pytest.mark.lab

LABEL = "gateways"
UNIT = "inferfleet-gateway.service"
GATEWAYS = ("gw-01", "gw-02")
HOME = "opt/inferfleet/gateway"


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """An engine host, two gateways and a balancer, provisioned once."""
    require_lab()
    folder = wheels.folder(print)
    if folder is None:
        leave_out("pip cannot fetch the gateway's wheels here")
    take_down_remains(LABEL)
    names = ["gpu-01", *GATEWAYS, "lb-01"]
    with labs.Lab.boot(names, name=f"{LABEL}-{os.getpid()}") as lab:
        fleet = Fleet(lab, tmp_path_factory.mktemp("gateways"), folder)
        assert pushed(fleet) == dict.fromkeys(names, "changed")
        yield fleet


@pytest.fixture
def fleet(booted: Fleet) -> Fleet:
    booted.settle()
    return booted


@pytest.fixture
def door(fleet: Fleet) -> Door:
    return Door(fleet.hosts["lb-01"].address, fleet.inventory / "secrets/tls.crt", fleet.key("web"))


def pushed(fleet: Fleet) -> dict[str, str]:
    """How each host fared."""
    outcomes = fleet.push()
    return {name: getattr(r, "status", str(r)) for name, r in outcomes.items()}


def process(fleet: Fleet, name: str) -> str:
    """The supervisor's number."""
    return said(fleet.hosts[name], f"systemctl show -p MainPID --value {UNIT}")


def workers(fleet: Fleet, name: str) -> list[int]:
    """Those that serve now."""
    state = fleet.hosts[name].root / "run/inferfleet-gateway/workers.json"
    if state.exists():
        return json.loads(state.read_text())["workers"]
    told = said(fleet.hosts[name], "cat /run/inferfleet-gateway/workers.json")
    return json.loads(told)["workers"]


def test_all_of_it_is_proven_and_a_second_run_changes_nothing(fleet):
    assert fleet.run("provision", "--yes").out.startswith("No changes: 4 hosts")
    ran = fleet.run("verify", "--json")
    assert ran.json["ok"], ran.out
    proven = {proof["host"] for proof in ran.json["proofs"]}
    assert proven == {"gpu-01", *GATEWAYS, "lb-01"}


def test_tokens_come_through_all_as_they_are_made(door):
    status, lines = door.chat(40)
    assert (status, lines[-1]) == (200, "data: [DONE]")
    assert sum('"content"' in line for line in lines) >= 40


def test_ollamas_clients_are_served_by_the_same_engines(door):
    assert door.ask("/")[:2] == (200, ["Ollama is running"])
    body = {"model": MODEL, "messages": [{"role": "user", "content": "one two three"}]}
    status, lines, _ = door.ask("/api/chat", body)
    assert status == 200
    assert json.loads(lines[-1])["done"] is True
    assert len(lines) > 3


def test_the_key_and_the_prompt_are_in_no_log(fleet, door):
    secret = "a-prompt-of-nobodys-business"
    body = {"model": MODEL, "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    assert door.ask("/v1/chat/completions", body)[0] == 200
    for name in ("lb-01", *GATEWAYS):
        log = said(fleet.hosts[name], "journalctl --sync; journalctl -q --no-pager")
        assert not [word for word in (secret, door.key) if word in log]
    told = [said(fleet.hosts[n], f"journalctl -q -u {UNIT} -o cat --no-pager") for n in GATEWAYS]
    assert '"key":"web"' in "".join(told)


def test_a_changed_configuration_takes_over_and_loses_nothing(fleet, door):
    before = {name: (process(fleet, name), workers(fleet, name)) for name in GATEWAYS}
    fleet.edit(
        "phases/production.yml",
        "        hosts: [gateways]\n",
        "        hosts: [gateways]\n        models: {qwen2.5-coder: {aliases: [coder]}}\n",
    )
    with load(door, clients=10, tokens=60) as meanwhile:
        until(lambda: meanwhile.whole > 20, "answers come")
        assert pushed(fleet) == {
            **dict.fromkeys(GATEWAYS, "changed"),
            **dict.fromkeys(("gpu-01", "lb-01"), "unchanged"),
        }
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 20, "answers come", 60)
    assert meanwhile.broken == []
    assert door.chat(1, model="coder")[0] == 200
    for name in GATEWAYS:
        assert process(fleet, name) == before[name][0]
        assert not set(workers(fleet, name)) & set(before[name][1])


def test_a_key_is_let_in_and_taken_away_without_a_reload(fleet, door):
    before = {name: (units(fleet.hosts[name]), workers(fleet, name)) for name in GATEWAYS}
    added = fleet.inventory / "secrets/added.key"
    added.write_text("5f0e" * 12)
    added.chmod(0o600)
    assert door.ask("/v1/models", key="5f0e" * 12)[0] == 401
    line = "          web: !file secrets/web.key\n"
    fleet.edit("phases/production.yml", line, f"{line}          added: !file secrets/added.key\n")
    outcomes = fleet.push()
    assert {outcomes[n].changes for n in GATEWAYS} == {1}
    assert {outcomes[n].restarts for n in GATEWAYS} == {0}
    until(lambda: {door.ask("/v1/models", key="5f0e" * 12)[0] for _ in range(6)} == {200}, "let in")
    fleet.edit("phases/production.yml", f"{line}          added: !file secrets/added.key\n", line)
    fleet.push()
    until(
        lambda: {door.ask("/v1/models", key="5f0e" * 12)[0] for _ in range(6)} == {401}, "refused"
    )
    assert door.ask("/v1/models")[0] == 200
    assert {n: (units(fleet.hosts[n]), workers(fleet, n)) for n in GATEWAYS} == before


def test_a_gateway_that_is_stopped_ends_its_streams_and_the_other_goes_on(fleet, door):
    host = fleet.hosts["gw-01"]
    with load(door, clients=10, tokens=100) as meanwhile:
        until(lambda: meanwhile.whole > 20, "answers come")
        said(host, f"systemctl stop {UNIT}")
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 20, "answers come", 60)
        said(host, f"systemctl start {UNIT}")
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 20, "answers come", 60)
    assert meanwhile.broken == []


def test_new_requests_do_not_wait_for_a_gateway_that_drains(fleet, door):
    host = fleet.hosts["gw-01"]
    long = [threading.Thread(target=door.chat, args=(400,)) for _ in range(4)]
    for stream in long:
        stream.start()
    until(lambda: said(host, "ss -Htn state established sport = :8080"), "a stream of gw-01")
    said(host, f"systemctl stop --no-block {UNIT}")
    until(lambda: not said(host, "ss -Hltn sport = :8080"), "its port is closed")
    assert said(host, "ss -Htn state established sport = :8080"), "its streams go on"
    for _ in range(6):
        began = time.monotonic()
        assert door.chat(1)[0] == 200
        assert time.monotonic() - began < 3
    for stream in long:
        stream.join(30)


def test_a_failing_install_leaves_the_gateways_serving(fleet, door, tmp_path):
    before = {name: workers(fleet, name) for name in GATEWAYS}
    current = {n: said(fleet.hosts[n], f"readlink /{HOME}/current") for n in GATEWAYS}
    (phase,) = (fleet.inventory / "phases").glob("production.yml")
    line = next(x for x in phase.read_text().splitlines() if "wheels:" in x)
    folder = tmp_path / "wheels"
    shutil.copytree(line.split()[1], folder)
    (broken,) = folder.glob("uvloop-*.whl")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    fleet.edit("phases/production.yml", line, f"        wheels: {folder}")
    outcomes = fleet.push()
    for name in GATEWAYS:
        assert isinstance(outcomes[name], HostError)
        assert "inferfleet-gateway-setup.service failed" in str(outcomes[name])
    assert {n: said(fleet.hosts[n], f"readlink /{HOME}/current") for n in GATEWAYS} == current
    assert {door.chat(1)[0] for _ in range(4)} == {200}
    assert {name: workers(fleet, name) for name in GATEWAYS} == before

    broken.write_bytes(whole)
    (folder / "unused-1.0-py3-none-any.whl").write_bytes(Path(broken).read_bytes())
    with load(door, clients=6, tokens=60) as meanwhile:
        until(lambda: meanwhile.whole > 10, "answers come")
        assert all(isinstance(outcome, Result) for outcome in fleet.push().values())
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 10, "answers come", 60)
    assert meanwhile.broken == []
    for name in GATEWAYS:
        assert said(fleet.hosts[name], f"readlink /{HOME}/current") != current[name]
        assert not set(workers(fleet, name)) & set(before[name])
        left = said(fleet.hosts[name], f"ls /{HOME}").split()
        assert len([each for each in left if len(each) == 16]) == 2  # this one and the last
    fleet.assert_clean()
