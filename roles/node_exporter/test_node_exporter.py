"""The host's metrics are there for Prometheus, and for nobody outside the private network."""

import re

import pytest
from testinfra.host import Host

from inferfleet.metrics import SILENT
from inferfleet.model import Plan, Step, endpoint
from inferfleet.verify.proofs import Ask, steady

UNIT = "inferfleet-node-exporter.service"


@pytest.fixture
def metrics(ask: Ask, step: Step) -> str:
    """What Prometheus reads."""
    answer = ask(f"http://{endpoint(step.host.private_address, step.settings['port'])}/metrics")
    assert answer.status == 200, answer.error or answer.text[:500]
    return answer.text


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """the unit runs and starts at boot"""
    steady(host, UNIT)


def test_listens_on_the_private_address_alone(host: Host, step: Step) -> None:
    """its port is open on the private address only"""
    sockets = host.check_output("ss -Hltn 'sport = :%s'", str(step.settings["port"])).splitlines()
    assert {x.split()[3].rpartition(":")[0].strip("[]") for x in sockets} == {
        step.host.private_address
    }


def test_tells_how_full_the_disk_is(metrics: str) -> None:
    """it tells how full the host's file systems are"""
    assert re.search(r'^node_filesystem_avail_bytes\{.*mountpoint="/"\} \d', metrics, re.MULTILINE)


def test_tells_when_certificates_expire(metrics: str, step: Step, plan: Plan) -> None:
    """it tells until when the certificate of the host's balancer is valid"""
    here = plan.steps[step.host.name]
    for port in [s.settings["port"] for s in here if s.role == "balancer" and "tls" in s.settings]:
        name = f'inferfleet_certificate_expiry_seconds{{port="{port}"}}'
        found = re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
        assert found, f"nothing is known of the certificate on port {port}"
        assert float(found[1]) > 0, f"no certificate is shown on port {port}"


def test_tells_whether_silent_engines_answer(metrics: str, step: Step, plan: Plan) -> None:
    """it tells of engines without metrics that they answer"""
    for engine in [s for s in plan.steps[step.host.name] if s.role in SILENT]:
        for i in engine.instances:
            name = "inferfleet_engine_answers"
            labels = f'deployment="{i.deployment.name}",unit="{i.name}"'
            assert f"{name}{{{labels}}} 1" in metrics
