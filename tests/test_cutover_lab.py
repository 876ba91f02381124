"""From an external provider to our own engines and back, on hosts, under streaming load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleetkit import Fleet, said, until
from gatewaykit import MODEL, Door, load
from labkit import leave_out, require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet.lab import wheels
from inferfleet.model import Result

pytestmark = pytest.mark.lab

LABEL = "cutover"
UNIT = "inferfleet-gateway.service"
STATE = "/var/lib/inferfleet-gateway"
GATEWAYS = ("gw-01", "gw-02")
MODELS = """\
models:
  coder: {repository: /srv/coder, served_name: qwen2.5-coder, context_length: 32768}
  theirs: {repository: /srv/theirs, served_name: theirs-x, context_length: 32768}
"""
# the provider is an engine on a host of its own, asked by the gateways alone
DEPLOYMENTS = """\
deployments:
  coder:
    {engine: simulator, model: coder, hosts: [gpu-02], port: 8000,
     api_key: !file secrets/engine.key, options: {token_rate: 200, max_model_len: 32768}}
  theirs:
    {engine: simulator, model: theirs, hosts: [gpu-01], port: 8000,
     api_key: !file secrets/engine.key, options: {token_rate: 50, max_model_len: 32768}}
"""
PHASE = """\
phases:
  production:
    users: 20
    why: Away from the provider, without a request lost.
    hosts: [gpu-servers, gateways, balancers]
    deployments: [coder, theirs]
    roles:
      balancer:
        hosts: [balancers]
        port: 443
        tls: {{certificate: !file secrets/tls.crt, key: !file secrets/tls.key}}
      gateway:
        hosts: [gateways]
        wheels: {wheels}
        workers: 2
        health: {{interval: 1}}
        api_keys: {{web: !file secrets/web.key}}
        providers:
          old: {{url: "http://{old}:8000", models: {{qwen2.5-coder: theirs-x}},
                key: !file secrets/engine.key}}
        models:
          qwen2.5-coder:
            aliases: [coder-latest]
            context_length: 32768
            pools: {{old: 100, coder: 0}}
            shadow: {{pool: coder, percent: 50}}
"""


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A slow engine that stands for a provider, a fast one of ours, gateways of two workers."""
    require_lab()
    folder = wheels.folder(print)
    if folder is None:
        leave_out("pip cannot fetch the gateway's wheels here")
    take_down_remains(LABEL)
    names = ["gpu-01", "gpu-02", *GATEWAYS, "lb-01"]
    with labs.Lab.boot(names, name=f"{LABEL}-{os.getpid()}") as lab:
        fleet = Fleet(lab, tmp_path_factory.mktemp("cutover"), folder)
        provide(fleet, folder)
        for name, outcome in fleet.push().items():
            assert isinstance(outcome, Result), f"{name}: {outcome}"
        yield fleet


def provide(fleet: Fleet, wheels: Path) -> None:
    """The inventory of somebody who has a provider and tries engines of their own."""
    for path in (fleet.inventory / "phases").iterdir():
        path.unlink()
    old = fleet.hosts["gpu-01"].address
    (fleet.inventory / "models.yml").write_text(MODELS)
    (fleet.inventory / "deployments.yml").write_text(DEPLOYMENTS)
    (fleet.inventory / "phases/production.yml").write_text(PHASE.format(wheels=wheels, old=old))


@pytest.fixture
def fleet(booted: Fleet) -> Fleet:
    booted.run("cutover", "--back")
    return booted


@pytest.fixture
def door(fleet: Fleet) -> Door:
    return Door(fleet.hosts["lb-01"].address, fleet.inventory / "secrets/tls.crt", fleet.key("web"))


def told(fleet: Fleet, *words: str, code: int = 0) -> Any:
    """The task's JSON; of the one model everybody asks for, also by itself."""
    found = fleet.run("cutover", "--json", *words, code=code).json
    return found, found["models"][MODEL]


def in_force(model: Any) -> dict[str, list[Any]]:
    """Of each worker, by gateway."""
    return {name: at["in_force"] for name, at in model["gateways"].items()}


def asked(model: Any) -> dict[str, int]:
    """Requests that each pool answered, at all gateways; none may have failed."""
    found = {"old": 0, "coder": 0}
    for at in model["gateways"].values():
        for pool, counts in at["requests"].items():
            assert counts["failed"] == 0, at
            found[pool] += counts["requests"]
    return found


def everywhere(**weights: float) -> dict[str, list[Any]]:
    return {name: [weights, weights] for name in GATEWAYS}


def test_a_model_moves_and_comes_back_under_load_and_nobody_notices(fleet, door):
    _, before = told(fleet)
    assert in_force(before) == everywhere(old=100, coder=0)
    with load(door, clients=12, tokens=30) as meanwhile:
        until(lambda: meanwhile.whole > 40, "answers come", 60)
        _, shadowing = told(fleet)
        assert asked(shadowing)["coder"] == asked(before)["coder"]

        _, some = told(fleet, "--model", "coder-latest", "--to", "coder=30,old=70")
        assert in_force(some) == everywhere(old=70, coder=30)
        assert some["overridden"] == list(GATEWAYS)
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 150, "answers come", 60)
        _, later = told(fleet)
        share = asked(later)["coder"] - asked(some)["coder"]
        rest = asked(later)["old"] - asked(some)["old"]
        assert 0.1 < share / (share + rest) < 0.5

        _, whole = told(fleet, "--model", MODEL, "--to", "coder")
        assert in_force(whole) == everywhere(old=0, coder=100)
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 60, "answers come", 60)
        _, later = told(fleet)
        until(lambda: meanwhile.whole > served + 80, "answers come", 60)
        _, last = told(fleet)
        assert asked(last)["old"] == asked(later)["old"]
        assert asked(last)["coder"] > asked(later)["coder"]

        document, home = told(fleet, "--back")
        assert (document["ok"], document["changed"]) == (True, True)
        assert in_force(home) == everywhere(old=100, coder=0)
        served = meanwhile.whole
        until(lambda: meanwhile.whole > served + 40, "answers come", 60)
    assert meanwhile.broken == []


def test_the_shadow_tells_that_answers_are_the_same_and_come_sooner(fleet, door):
    with load(door, clients=8, tokens=30) as meanwhile:
        until(lambda: meanwhile.whole > 60, "answers come", 60)
    assert meanwhile.broken == []
    (report,) = told(fleet)[1]["shadows"]
    assert (report["pool"], report["percent"]) == ("coder", [50])
    assert report["compared"] >= 10
    assert (report["failed"], report["same_end"], report["same_tools"]) == (0, 1.0, 1.0)
    assert report["length_median"] == 1.0
    assert report["seconds"]["copies"]["p95"] < report["seconds"]["clients"]["p95"]


def test_weights_outlive_a_reload_and_a_restart_and_are_warned_of(fleet, door):
    fleet.run("cutover", "--model", MODEL, "--to", "coder=50,old=50")
    said(fleet.hosts["gw-01"], f"systemctl reload {UNIT}")
    said(fleet.hosts["gw-02"], f"systemctl restart {UNIT}")
    ran = fleet.run("cutover", "--model", MODEL)
    assert ran.out.count("coder 50 %, old 50 % (by hand)") == 2
    assert "set by hand at gw-01, gw-02" in ran.out
    assert "--back" in ran.out
    assert {door.chat(1)[0] for _ in range(4)} == {200}
    planned = fleet.run("plan")
    assert planned.out.count("qwen2.5-coder by hand: coder 50 %, old 50 %") == 2
    assert fleet.run("plan", "--json").json["by_hand"]["gw-01"][MODEL] == {"coder": 50, "old": 50}
    ran = fleet.run("cutover", "--back")
    assert "by hand" not in ran.out
    assert fleet.run("cutover", "--back").err == "nothing was changed.\n"


def test_a_gateway_that_cannot_follow_makes_the_others_go_back(fleet, door):
    host = fleet.hosts["gw-02"]
    said(host, f"chmod 555 {STATE}")
    try:
        document, model = told(fleet, "--model", MODEL, "--to", "coder", code=1)
    finally:
        said(host, f"chmod 755 {STATE}")
    assert list(document["failed"]) == ["gw-02"]
    assert document["undone"] == dict.fromkeys(GATEWAYS, "")
    assert in_force(model) == everywhere(old=100, coder=0)
    assert in_force(told(fleet)[1]) == everywhere(old=100, coder=0)


def test_with_a_gateway_down_nothing_moves_but_the_way_back_is_open(fleet, door):
    fleet.run("cutover", "--model", MODEL, "--to", "coder=50,old=50")
    said(fleet.hosts["gw-02"], f"systemctl stop {UNIT}")
    try:
        ran = fleet.run("cutover", "--model", MODEL, "--to", "coder", code=1)
        assert "gw-02: failed" in ran.err
        assert ran.err.endswith("nothing was changed.\n")
        document, model = told(fleet, "--back", code=1)
        assert list(document["failed"]) == ["gw-02"]
        weights = {"old": 100, "coder": 0}
        assert in_force(model) == {"gw-01": [weights, weights]}
    finally:
        said(fleet.hosts["gw-02"], f"systemctl start {UNIT}")
    ran = fleet.run("cutover", "--model", MODEL, code=1)
    assert "the gateways differ: " in ran.out
    assert fleet.run("cutover", "--back").code == 0


def test_a_pool_that_cannot_be_asked_gets_nothing(fleet, door):
    engine = fleet.hosts["gpu-02"]
    said(engine, "systemctl stop inferfleet-coder-0.service")
    try:
        until(lambda: "left_out" in status(fleet) and '"usable":false' in status(fleet), "probes")
        ran = fleet.run("cutover", "--model", MODEL, "--to", "coder=1,old=99", code=1)
        assert "no instance of coder can be asked there" in ran.err
        assert ran.err.endswith("nothing was changed.\n")
    finally:
        said(engine, "systemctl start inferfleet-coder-0.service")


def status(fleet: Fleet) -> str:
    return said(
        fleet.hosts["gw-01"],
        'python3 -c "import urllib.request as u; print(u.urlopen('
        "'http://127.0.0.1:9400/status').read().decode())\"",
    )
