"""The main job on real hosts: from nothing to proven, again, one change at a time, and back."""

from __future__ import annotations

import http.client
import json
import os
import pty
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from xml.etree import ElementTree

import pytest
from fleetkit import TOOL, Fleet, Watch, said, tree, units, until

from inferfleet.model import Result

pytestmark = pytest.mark.lab

CODER = ["inferfleet-coder-0.service", "inferfleet-coder-1.service"]
BALANCER = "inferfleet-balancer.service"


@pytest.fixture
def fleet(booted_fleet) -> Iterator[Fleet]:
    booted_fleet.restore()
    return booted_fleet


@pytest.fixture
def production(fleet) -> Fleet:
    fleet.settle()
    return fleet


@pytest.fixture(scope="module")
def from_nothing(booted_fleet):
    """What production is on hosts where nothing was before: the run, and the trees."""
    booted_fleet.restore()
    booted_fleet.wipe()
    planned = booted_fleet.run("plan", "--json", "--detailed-exitcode", code=2)
    ran = booted_fleet.run("provision", "--yes", "--json")
    return planned.json, ran.json, booted_fleet.trees()


# From nothing


def test_production_from_nothing_does_what_the_plan_said(from_nothing):
    planned, ran, trees = from_nothing
    assert set(planned["hosts"]) == set(ran["hosts"]) == {"gpu-01", "gpu-02", "lb-01"}
    for name, result in ran["hosts"].items():
        diff = planned["hosts"][name]
        assert {c["kind"] for c in diff["changes"]} == {"create", "ensure"}
        assert (result["status"], result["round_trips"]) == ("changed", 2)
        assert result["restarts"] == len(diff["restarts"])
        files = {c["subject"] for c in diff["changes"] if c["kind"] == "create"}
        assert files <= trees[name].keys()


def test_production_is_proven(from_nothing, production):
    with Watch() as watch:
        ran = production.run("verify", "--json", "--junit", "report.xml")
    assert any(b"read -r word size" in line for line in watch.seen)
    assert not [s for s in production.secrets if any(s.encode() in line for line in watch.seen)]
    proofs = ran.json["proofs"]
    assert ran.json["ok"]
    assert {proof["host"] for proof in proofs} == set(production.hosts)
    report = ElementTree.parse(production.folder / "report.xml").getroot()
    assert len(list(report.iter("testcase"))) == len(proofs)
    assert not list(report.iter("failure"))
    assert "a stream arrives token by token, also through TLS" in {p["proves"] for p in proofs}


def test_a_host_moves_from_pilot_to_production_and_keeps_nothing(from_nothing, fleet):
    fleet.wipe("gpu-01")
    host = fleet.hosts["gpu-01"]
    ran = fleet.run("provision", "--yes", phase="pilot")
    assert ran.line("gpu-01").split()[1] == "changed"
    assert sorted(units(host)) == [BALANCER, "inferfleet-coder-pilot-0.service"]
    proven = fleet.run("verify", phase="pilot")
    assert "0 failed" in proven.out
    assert (fleet.folder / "build/verify-pilot.xml").is_file()

    planned = fleet.run("plan")
    assert "leaves phase pilot" in planned.out
    assert f"stops {BALANCER}, inferfleet-coder-pilot-0.service" in planned.out
    fleet.run("provision", "--yes")
    assert tree(host) == from_nothing[2]["gpu-01"]
    assert sorted(units(host)) == CODER
    shown = "systemctl show -p LoadState --value inferfleet-balancer inferfleet-coder-pilot-0"
    assert said(host, shown).split() == ["not-found"] * 2
    assert said(host, "systemctl --failed --no-legend") == ""


# Again


def test_a_second_run_changes_nothing_in_one_round_trip(production):
    before = production.trees(), production.units()
    ran = production.run("provision", "--yes")
    assert ran.out.startswith("No changes: ")
    assert production.run("plan", "--detailed-exitcode").out == ran.out
    results = production.run("provision", "--yes", "--json").json["hosts"].values()
    assert {(r["status"], r["round_trips"]) for r in results} == {("unchanged", 1)}
    assert (production.trees(), production.units()) == before


def test_the_number_of_files_costs_no_round_trips(production):
    production.edit("deployments.yml", "instances_per_host: 2", "instances_per_host: 4")
    production.edit("deployments.yml", "gpus_per_instance: 2", "gpus_per_instance: 1")
    outcomes = production.push()
    trips = {name: (r.changes, r.round_trips) for name, r in outcomes.items()}
    assert trips == {"gpu-01": (8, 2), "gpu-02": (8, 2), "lb-01": (1, 2)}


# One change


def test_one_variable_changes_one_file_and_restarts_one_unit(production):
    production.edit("deployments.yml", "instances_per_host: 2", "instances_per_host: 1")
    production.push()
    trees, running = production.trees(), production.units()
    production.set_host("gpu-02", variables={"simulator": {"token_rate": 80}})
    planned = production.run("plan", "--json").json["hosts"]
    unit = f"/etc/systemd/system/{CODER[0]}"
    assert [c["subject"] for c in planned["gpu-02"]["changes"]] == [unit]
    ran = production.run("provision", "--yes", "--json").json["hosts"]
    assert {name: (r["changes"], r["restarts"]) for name, r in ran.items()} == {
        "gpu-01": (0, 0),
        "gpu-02": (1, 1),
        "lb-01": (0, 0),
    }
    after, restarted = production.trees(), production.units()
    assert {p for p in after["gpu-02"] if after["gpu-02"][p] != trees["gpu-02"][p]} == {unit}
    assert running["gpu-02"].pop(CODER[0]) != restarted["gpu-02"].pop(CODER[0])
    trees["gpu-02"] = after["gpu-02"]
    assert (after, restarted) == (trees, running)


class Stream(threading.Thread):
    """A chat streamed through the balancer, with the time at which each event came."""

    def __init__(self, fleet: Fleet, key: str, tokens: int, **headers: str) -> None:
        super().__init__(daemon=True)
        certificate = fleet.inventory / "secrets/tls.crt"
        self._connection = http.client.HTTPSConnection(
            fleet.hosts["lb-01"].address,
            timeout=20,
            context=ssl.create_default_context(cafile=str(certificate)),
        )
        prompt = "token-" * tokens  # it is said back, in six characters a token
        body = {
            "model": "qwen2.5-coder",
            "stream": True,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
        self._request = (
            json.dumps(body),
            {
                "Authorization": f"Bearer {key}",
                "Content-Type": "application/json",
                **headers,
            },
        )
        self.status = 0
        self.events: list[tuple[float, str]] = []

    def run(self) -> None:
        body, headers = self._request
        self._connection.request("POST", "/v1/chat/completions", body, headers)
        answer = self._connection.getresponse()
        self.status = answer.status
        for line in answer:
            if line.strip():
                self.events.append((time.monotonic(), line.decode().strip()))
        self._connection.close()


def test_a_new_client_is_let_in_without_cutting_a_stream(production):
    host = production.hosts["lb-01"]
    before = units(host)
    stream = Stream(production, production.key("web"), tokens=180)
    stream.start()
    until(lambda: len(stream.events) > 2, "tokens arrive")
    added = production.inventory / "secrets/added.key"
    added.write_text("5f0e" * 12)
    added.chmod(0o600)
    refused = Stream(production, "5f0e" * 12, tokens=1)
    refused.run()
    web = "          web: !file secrets/web.key\n"
    production.edit(
        "phases/production.yml", web, f"{web}          added: !file secrets/added.key\n"
    )
    outcome = production.push()["lb-01"]
    reloaded = time.monotonic()
    assert (outcome.changes, outcome.restarts) == (1, 1)

    def let_in() -> bool:
        newcomer = Stream(production, "5f0e" * 12, tokens=1)
        newcomer.run()
        return newcomer.status == 200

    until(let_in, "nginx takes the new key")
    assert refused.status == 401
    stream.join(20)
    assert stream.events[-1][0] > reloaded
    assert stream.events[-1][1] == "data: [DONE]"
    assert sum('"content"' in event for _, event in stream.events) >= 180
    assert units(host) == before


def test_engines_that_are_busy_are_not_taken_for_dead(production):
    busy = {"x-simulator-fault": "status=503"}
    for _ in range(8):  # as often as would eject both engines of a host, if it counted
        refused = Stream(production, production.key("web"), tokens=1, **busy)
        refused.run()
        assert refused.status == 503
    served = Stream(production, production.key("web"), tokens=1)
    served.run()
    assert served.status == 200


# Less


def with_extra(fleet: Fleet) -> None:
    """A second, smaller deployment on one of the hosts."""
    fleet.edit("deployments.yml", "instances_per_host: 2", "instances_per_host: 1")
    path = fleet.inventory / "deployments.yml"
    extra = "  extra:\n    engine: vllm\n    model: qwen2.5-coder-7b\n    hosts: [gpu-02]\n"
    key = "    api_key: !file secrets/engine.key\n"
    path.write_text(path.read_text().rstrip() + f"\n{extra}    port: 8010\n{key}")
    fleet.edit("phases/production.yml", "deployments: [coder]", "deployments: [coder, extra]")


def test_a_removed_deployment_is_stopped_and_gone(production):
    production.edit("deployments.yml", "instances_per_host: 2", "instances_per_host: 1")
    production.push()
    trees, running = production.trees(), production.units()
    production.restore()
    with_extra(production)
    production.push()
    host = production.hosts["gpu-02"]
    assert "inferfleet-extra-0.service" in units(host)
    assert "/etc/inferfleet/extra-0/engine.env" in tree(host)

    production.edit("phases/production.yml", "deployments: [coder, extra]", "deployments: [coder]")
    planned = production.run("plan")
    assert "  - /etc/systemd/system/inferfleet-extra-0.service" in planned.out
    assert "  stops inferfleet-extra-0.service" in planned.out
    production.run("provision", "--yes")
    assert production.trees() == trees
    assert {h: sorted(u) for h, u in production.units().items()} == {
        h: sorted(u) for h, u in running.items()
    }
    state = "systemctl show -p LoadState --value inferfleet-extra-0; ss -Hltn sport = :8010"
    assert said(host, state) == "not-found"


def test_a_host_with_nothing_left_to_do_loses_all(production):
    production.edit(
        "deployments.yml",
        "model: qwen2.5-coder-32b\n    hosts: [gpu-servers]",
        "model: qwen2.5-coder-32b\n    hosts: [gpu-01]",
    )
    ran = production.run("provision", "--yes", "--json").json["hosts"]
    assert ran["gpu-02"]["status"] == "changed"
    host = production.hosts["gpu-02"]
    assert (tree(host), units(host)) == ({}, {})
    assert said(host, "systemctl list-unit-files --no-legend 'inferfleet-*' || true") == ""
    again = production.run("provision", "--yes", "--json").json["hosts"]
    assert {r["status"] for r in again.values()} == {"unchanged"}


# Drift

ENGINE = "/etc/inferfleet/coder-0/engine.env"
PROGRAM = "/opt/inferfleet/simulator/simulator.py"
UNIT = f"/etc/systemd/system/{CODER[0]}"
NGINX = "/etc/inferfleet/balancer/nginx.conf"
CLIENTS = "/etc/inferfleet/balancer/clients.conf"
DRIFT = [
    ("gpu-01", f"sed -i 's/token-rate 50/token-rate 51/' {UNIT}", f"~ {UNIT}  (content)"),
    ("gpu-01", f"chmod 644 {ENGINE}", f"~ {ENGINE}  (mode 0644 -> 0600)"),
    ("gpu-01", f"systemctl stop {CODER[1]}", f"! {CODER[1]} is enabled and running"),
    ("gpu-02", f"rm {ENGINE}", f"+ {ENGINE}"),
    ("gpu-02", f"systemctl disable {CODER[1]}", f"! {CODER[1]} is enabled and running"),
    (
        "gpu-02",
        f"mv {PROGRAM} /root/moved.py && ln -s /root/moved.py {PROGRAM}",
        f"~ {PROGRAM}  (replaces a symlink)",
    ),
    ("lb-01", f"chown daemon {NGINX}", f"~ {NGINX}  (owner daemon -> root)"),
    ("lb-01", f"echo '# hand-made-key' >> {CLIENTS}", f"~ {CLIENTS}  (content)"),
]


def test_drift_by_hand_is_shown_and_repaired(production):
    wanted = production.trees()
    for host, command, _ in DRIFT:
        said(production.hosts[host], command)
    drifted = production.trees(), production.units()
    planned = production.run("plan", "--detailed-exitcode", code=2)
    assert (production.trees(), production.units()) == drifted
    lines = [line.strip() for line in planned.out.splitlines()]
    for _, _, shown in DRIFT:
        assert shown in lines
    shown = [(line[0], rate) for line in lines for rate in ("50", "51") if f"-rate {rate}" in line]
    assert shown == [("-", "51"), ("+", "50")]
    assert "(holds secrets: not shown)" in planned.out
    assert "hand-made-key" not in planned.out
    as_json = production.run("plan", "--json").json["hosts"]
    for host, diff in as_json.items():
        subjects = {change["subject"] for change in diff["changes"]}
        assert {shown.split("  (")[0][2:] for h, _, shown in DRIFT if h == host} <= subjects

    production.run("provision", "--yes")
    assert production.trees() == wanted
    assert {host: sorted(running) for host, running in production.units().items()} == {
        "gpu-01": CODER,
        "gpu-02": CODER,
        "lb-01": [BALANCER],
    }
    production.assert_clean()


def test_results_in_this_process_say_the_same(production):
    outcomes = production.push()
    assert all(isinstance(outcome, Result) for outcome in outcomes.values())
    assert {(r.status, r.round_trips) for r in outcomes.values()} == {("unchanged", 1)}


# A password for sudo that the inventory lacks


def at_a_terminal(fleet: Fleet, typed: bytes, *words: str) -> tuple[int, str]:
    """The tool, run by somebody who answers a question for a password: exit code, and all shown."""
    ours, terminal = pty.openpty()
    argv = [str(TOOL), *words, "--inventory", str(fleet.inventory), "--phase", "production"]
    with subprocess.Popen(
        ["setsid", "--ctty", "--wait", *argv, "--rehearse"],
        cwd=fleet.folder,
        env={**os.environ, "HOME": str(fleet.folder / "home")},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # so the end of a terminal is told
            while data := os.read(ours, 1 << 16):
                shown += data
                if data.rstrip().endswith(b"sudo password for gpu-01, lb-01:"):
                    os.write(ours, typed + b"\n")
    os.close(ours)
    return process.returncode, shown.decode()


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [(b"lab", 0, "No changes: 3 hosts"), (b"wrong", 1, "sudo refused the password of asked")],
)
def test_somebody_at_a_terminal_is_asked_for_sudos_password_once(production, typed, code, said):
    for host in ("gpu-01", "lb-01"):
        production.set_host(host, user="asked")
    ended, shown = at_a_terminal(production, typed, "provision", "--yes")
    assert (ended, shown.count("sudo password")) == (code, 1), shown
    assert said in shown
    assert typed.decode() not in shown.split("lb-01: ")[1].splitlines()[0], "it is not echoed"


def test_nobody_is_asked_for_json(production):
    production.set_host("gpu-01", user="asked")
    ended, shown = at_a_terminal(production, b"lab", "provision", "--yes", "--json")
    assert (ended, "sudo password" in shown) == (1, False)
    assert "set become_password" in json.loads(shown)["hosts"]["gpu-01"]["error"]
