"""Monitoring on hosts of the lab: packages from apt, real scrapes, a real alert."""

import json
import os
import re
import textwrap

import pytest
import yaml
from fleetkit import Fleet, said, until
from labkit import require_lab, take_down_remains
from monitoringkit import prometheus

from inferfleet import lab as labs

pytestmark = pytest.mark.lab
LABEL = "monitoring"
SOURCES = "deb [trusted=yes] file:/srv/packages ./\n"
ROLES = {
    "node_exporter": {"hosts": ["gpu-servers", "balancers"], "probe_interval": 1},
    "gpu_exporter": {"hosts": ["gpu-servers"]},
    "monitoring": {
        "hosts": ["balancers"],
        "scrape_interval": 1,
        "alerts": {"down_seconds": 1, "certificate_days": 365},
    },
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A GPU server and a balancer with monitoring, provisioned for a rehearsal."""
    require_lab()
    take_down_remains(LABEL)
    packages = labs.Bind(str(prometheus() / "packages"), "/srv/packages")
    names, name = ["gpu-01", "lb-01"], f"{LABEL}-{os.getpid()}"
    with labs.Lab.boot(names, name=name, binds=(packages,)) as lab:
        for host in lab.hosts.values():
            said(host, f"rm -rf /etc/apt/sources.list*; echo '{SOURCES}' > /etc/apt/sources.list")
        fleet = Fleet(lab, tmp_path_factory.mktemp("monitored"))
        path = fleet.inventory / "phases" / "production.yml"
        path.write_text(path.read_text() + textwrap.indent(yaml.safe_dump(ROLES), " " * 6))
        fleet.run("provision", "--yes")
        yield fleet


def ask(fleet, path):
    """Prometheus' answer to an HTTP API request."""
    host = fleet.hosts["lb-01"]
    return json.loads(said(host, f"curl -sfg 'http://127.0.0.1:9090/api/v1/{path}'"))["data"]


def firing(fleet, name):
    """The label sets with which an alert fires."""
    alerts = ask(fleet, "alerts")["alerts"]
    return [
        a["labels"] for a in alerts if a["labels"]["alertname"] == name and a["state"] == "firing"
    ]


def test_what_was_provisioned_is_proven_and_stays(fleet):
    proofs = fleet.run("verify", "--json", "--limit", "lb-01").json["proofs"]
    proven = {proof["proves"] for proof in proofs}
    assert "every engine and every exporter of the plan answers Prometheus" in proven
    assert "it tells until when the certificate of the host's balancer is valid" in proven
    fleet.assert_clean()


def test_packages_brought_no_open_ports(fleet):
    for host in fleet.hosts.values():
        sockets = said(host, "ss -Hltn").splitlines()
        ports = {x.split()[3] for x in sockets if x.split()[3].startswith(("0.0.0.0", "*", "[::]"))}
        assert {x.rpartition(":")[2] for x in ports} <= {"22", "443"}
        units = said(host, "systemctl list-units --no-legend --plain '*prometheus*'")
        assert {x.split()[0] for x in units.splitlines()} <= {"inferfleet-prometheus.service"}


def test_series_of_engines_hosts_and_certificates_are_there(fleet):
    def found(query):
        return ask(fleet, f"query?query={query}")["result"]

    engines = until(lambda: found("vllm:num_requests_running"), "engines are scraped")
    assert {x["metric"]["unit"] for x in engines} == {"coder-0", "coder-1"}
    assert {x["metric"]["deployment"] for x in engines} == {"coder"}
    disks = found('node_filesystem_avail_bytes{mountpoint="/"}')
    assert {x["metric"]["host"] for x in disks} == {"gpu-01", "lb-01"}
    until(lambda: firing(fleet, "CertificateExpires"), "its 30 days are less than 365")
    days = found("(inferfleet_certificate_expiry_seconds-time())/86400")
    assert [x["metric"]["host"] for x in days] == ["lb-01"]
    assert 29 < float(days[0]["value"][1]) < 30


def test_what_the_dashboard_asks_for_is_there(fleet):
    """Whatever a simulator and node_exporter know comes back from every such query."""
    text = said(fleet.hosts["lb-01"], "cat /etc/inferfleet/monitoring/dashboard.json")
    exprs = [t["expr"] for p in json.loads(text)["panels"] for t in p.get("targets", ())]
    for expr in exprs:
        for variable in ("$deployment", "$host"):
            expr = expr.replace(variable, ".+")
        query = expr.replace("$__rate_interval", "10s")
        if re.search(r"DCGM|prefix_cache|ALERTS", query):
            continue  # no GPUs, and not imagined by simulators
        argv = ["curl", "-sfG", "http://127.0.0.1:9090/api/v1/query"]
        argv += ["--data-urlencode", f"query={query}"]

        def answered(argv=argv):
            return json.loads(fleet.hosts["lb-01"].exec(argv).stdout)["data"]["result"]

        until(answered, query)


def test_an_engine_that_is_down_is_told_and_so_is_its_return(fleet):
    until(lambda: not firing(fleet, "EngineDown"), "all engines are up")
    host = fleet.hosts["gpu-01"]
    said(host, "systemctl stop inferfleet-coder-0")
    alert = until(lambda: firing(fleet, "EngineDown"), "the alert fires")
    wanted = {"deployment": "coder", "unit": "coder-0", "host": "gpu-01", "severity": "warning"}
    assert [{k: a[k] for k in wanted} for a in alert] == [wanted]
    assert not firing(fleet, "DeploymentDown")
    said(host, "systemctl stop inferfleet-coder-1")
    assert until(lambda: firing(fleet, "DeploymentDown"), "the other alert fires")
    said(host, "systemctl start inferfleet-coder-0 inferfleet-coder-1")
    until(lambda: not firing(fleet, "EngineDown"), "the alert is over")


def test_a_balancer_without_an_answer_has_no_valid_certificate(fleet):
    host = fleet.hosts["lb-01"]
    said(host, "systemctl stop inferfleet-balancer")
    query = "query?query=inferfleet_certificate_expiry_seconds"
    until(lambda: ask(fleet, query)["result"][0]["value"][1] == "0", "the probe writes 0")
    said(host, "systemctl start inferfleet-balancer")
    until(lambda: ask(fleet, query)["result"][0]["value"][1] != "0", "it is there again")


def test_a_changed_rule_is_reloaded_without_a_restart(fleet):
    before = fleet.units()["lb-01"]
    fleet.edit("phases/production.yml", "certificate_days: 365", "certificate_days: 7")
    fleet.run("provision", "--yes")
    assert fleet.units()["lb-01"] == before
    until(lambda: not firing(fleet, "CertificateExpires"), "30 days are more than 7")


def test_nothing_of_it_runs_once_it_is_not_wanted(fleet):
    fleet.restore()
    fleet.run("provision", "--yes")
    assert set(fleet.units()["lb-01"]) == {"inferfleet-balancer.service"}
    for host in fleet.hosts.values():
        said(host, "! ss -Hltn | grep -E ':(9090|9100) '")
        assert said(host, "systemctl --failed --no-legend") == ""
