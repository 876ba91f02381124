"""Everything the plan holds is watched, and nobody outside can look."""

import time

import pytest
from testinfra.host import Host

from inferfleet.metrics import SILENT
from inferfleet.model import Plan, Step, endpoint
from inferfleet.verify.proofs import Ask, steady

UNIT = "inferfleet-prometheus.service"


@pytest.fixture
def base(step: Step) -> str:
    """Where Prometheus answers."""
    return f"http://{endpoint(step.settings['listen'], step.settings['port'])}"


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """the unit runs and starts at boot"""
    steady(host, UNIT)


def test_listens_only_where_it_should(host: Host, step: Step) -> None:
    """its port is open on the address of its settings only"""
    sockets = host.check_output("ss -Hltn 'sport = :%s'", str(step.settings["port"])).splitlines()
    assert {x.split()[3].rpartition(":")[0].strip("[]") for x in sockets} == {
        step.settings["listen"]
    }


def test_reaches_all_of_the_plan(ask: Ask, base: str, step: Step, plan: Plan) -> None:
    """every engine and every exporter of the plan answers Prometheus"""
    wanted = {i.name + "@" + i.host.name for i in _engines(plan)}
    deadline = time.monotonic() + 3 * step.settings["scrape_interval"] + 5
    while True:
        targets = ask(f"{base}/api/v1/targets?state=active").json()["data"]["activeTargets"]
        down = {t["scrapeUrl"]: t["lastError"] for t in targets if t["health"] != "up"}
        if not down or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert not down, f"not reached: {down}"
    labels = [t["labels"] for t in targets]
    assert {x["unit"] + "@" + x["host"] for x in labels if "deployment" in x} == wanted


def test_has_its_alerts(ask: Ask, base: str) -> None:
    """all alert rules are loaded and can be evaluated"""
    groups = ask(f"{base}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {"EngineDown", "EngineHung", "CertificateExpires"} <= {rule["name"] for rule in rules}
    assert not {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")}


def _engines(plan: Plan):
    steps = [step for steps in plan.steps.values() for step in steps if step.role not in SILENT]
    return [instance for step in steps for instance in step.instances]
