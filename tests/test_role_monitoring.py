"""What the monitoring roles write, read by promtool, systemd, compose and bash themselves."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import make
import pytest
import yaml
from monitoringkit import programs

from inferfleet.gateway.metrics import Metrics
from inferfleet.lab import fleet
from inferfleet.metrics import vllm_renames
from inferfleet.model import Artefact
from inferfleet.project import Project

FLEET = """\
    groups: {gpus: {}, edge: {}}
    hosts:
      gpu-01:
        address: 192.0.2.1
        private_address: 198.51.100.1
        groups: [gpus]
        gpus: [{model: L40S, count: 2}]
      gpu-02: {address: 192.0.2.2, groups: [gpus], gpus: [{model: L40S}]}
      lb-01: {address: 192.0.2.3, groups: [edge]}
    models:
      coder: {repository: org/coder}
      small: {repository: "small:7b"}
    deployments:
      coder:
        engine: vllm
        model: coder
        hosts: [gpu-01]
        port: 8000
        instances_per_host: 2
        api_key: !env ENGINE_KEY
        options: {runtime: docker, version: VERSION}
      small: {engine: ollama, model: small, hosts: [gpu-02], port: 11434}
    phases:
      production:
        users: 10
        why: A test.
        hosts: [gpus, edge]
        deployments: [coder, small]
        roles:
          balancer:
            hosts: [edge]
            api_keys: {team: !env CLIENT_KEY}
            tls: {certificate: !file tls.crt, key: !file tls.key}
          node_exporter: {hosts: [gpus, edge]}
          gpu_exporter: {hosts: [gpus]}
          monitoring: {hosts: [edge]SETTINGS}
"""
MONITORING = "/etc/inferfleet/monitoring"
UNITS = "/etc/systemd/system"


def bundles(folder, version="0.32.0", settings="", rehearse=False, text=FLEET):
    text = text.replace("VERSION", version).replace("SETTINGS", settings)
    project = make.project(folder, fleet=text)
    plan = project.plan("production", rehearse=rehearse)
    return {b.host.name: b for b in project.bundles(plan, plan.hosts)}


def files(bundle):
    return {a.path: a.content.decode() for a in bundle.artefacts}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    return bundles(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def scraped(rendered):
    return yaml.safe_load(files(rendered["lb-01"])[f"{MONITORING}/prometheus.yml"])


def targets(config):
    return {
        job["job_name"]: {t: s["labels"] for s in job["static_configs"] for t in s["targets"]}
        for job in config["scrape_configs"]
    }


# What is scraped


def test_everything_of_the_plan_is_scraped_on_its_private_address(scraped):
    assert targets(scraped) == {
        "engine-coder": {
            f"198.51.100.1:{8000 + n}": {
                "host": "gpu-01",
                "unit": f"coder-{n}",
                "deployment": "coder",
            }
            for n in (0, 1)
        },
        "hosts": {
            "198.51.100.1:9100": {"host": "gpu-01"},
            "192.0.2.2:9100": {"host": "gpu-02"},
            "192.0.2.3:9100": {"host": "lb-01"},
        },
        "gpus": {"198.51.100.1:9400": {"host": "gpu-01"}, "192.0.2.2:9400": {"host": "gpu-02"}},
        "prometheus": {"127.0.0.1:9090": {"host": "lb-01"}},
    }


def test_ipv6_addresses_stand_in_brackets_wherever_a_port_follows(tmp_path):
    fleet_of_six = FLEET.replace("198.51.100.1", "2001:db8::11")
    for number in (2, 3):
        fleet_of_six = fleet_of_six.replace(
            f"{{address: 192.0.2.{number},",
            f"{{address: 192.0.2.{number}, private_address: '2001:db8::1{number}',",
        )
    found = bundles(tmp_path, settings=", listen: '::1'", text=fleet_of_six)
    monitoring = files(found["lb-01"])
    scraped = targets(yaml.safe_load(monitoring[f"{MONITORING}/prometheus.yml"]))
    assert {address for job in scraped.values() for address in job} == {
        *("[2001:db8::11]:8000", "[2001:db8::11]:8001", "[::1]:9090"),
        *(f"[2001:db8::1{n}]:{port}" for n, port in ((1, 9100), (2, 9100), (3, 9100))),
        *("[2001:db8::11]:9400", "[2001:db8::12]:9400"),
    }
    units = {name: files(bundle) for name, bundle in found.items()}
    assert "--web.listen-address=[::1]:9090" in monitoring[f"{UNITS}/inferfleet-prometheus.service"]
    exporter = units["gpu-02"][f"{UNITS}/inferfleet-node-exporter.service"]
    assert "--web.listen-address=[2001:db8::12]:9100" in exporter
    compose = yaml.safe_load(units["gpu-01"]["/etc/inferfleet/gpu-exporter/compose.yml"])
    assert compose["services"]["exporter"]["ports"] == ["[2001:db8::11]:9400:9400"]


def test_a_rehearsal_scrapes_simulators_and_no_gpus(tmp_path):
    rehearsed = bundles(tmp_path, rehearse=True)
    text = files(rehearsed["lb-01"])[f"{MONITORING}/prometheus.yml"]
    assert "metric_relabel_configs" not in text
    found = targets(yaml.safe_load(text))
    assert set(found) == {"engine-coder", "engine-small", "hosts", "prometheus"}
    assert not [p for p in files(rehearsed["gpu-01"]) if "gpu-exporter" in p]


def test_nothing_listens_but_on_private_addresses(rendered):
    listening = {
        "lb-01": {"--web.listen-address=127.0.0.1:9090", "--web.listen-address=192.0.2.3:9100"},
        "gpu-01": {"--web.listen-address=198.51.100.1:9100"},
    }
    for name, wanted in listening.items():
        text = "\n".join(files(rendered[name]).values())
        assert set(re.findall(r"--web\.listen-address=[\d.:]+", text)) == wanted
    compose = files(rendered["gpu-01"])["/etc/inferfleet/gpu-exporter/compose.yml"]
    service = yaml.safe_load(compose)["services"]["exporter"]
    assert service["ports"] == ["198.51.100.1:9400:9400"]


# Metric names by release


@pytest.mark.parametrize(
    ("version", "renamed"),
    [
        ("0.8.5", ["kv_cache_usage_perc", "prefix_cache_", "inter_token_latency_seconds"]),
        ("0.9.2", ["inter_token_latency_seconds"]),
        ("0.10.1.1", ["inter_token_latency_seconds"]),
        ("0.10.2", []),
        ("0.33.0", []),
    ],
)
def test_older_names_are_renamed_where_the_release_has_no_other(version, renamed):
    assert [r.new.removeprefix("vllm:").split("$")[0] for r in vllm_renames(version)] == renamed


def test_an_old_release_is_scraped_under_the_newest_names(tmp_path):
    text = files(bundles(tmp_path, version="0.8.5")["lb-01"])[f"{MONITORING}/prometheus.yml"]
    job = yaml.safe_load(text)["scrape_configs"][0]

    def relabelled(name):
        for rule in job["metric_relabel_configs"]:
            assert (rule["source_labels"], rule["target_label"]) == (["__name__"], "__name__")
            if found := re.fullmatch(rule["regex"], name):
                return found.expand(re.sub(r"\$\{(\d)\}", r"\\g<\1>", rule["replacement"]))
        return name

    assert [relabelled(f"vllm:{name}") for name in OLD_NAMES] == [f"vllm:{n}" for n in NEW_NAMES]


OLD_NAMES = (
    "gpu_cache_usage_perc",
    "gpu_prefix_cache_hits_total",
    "time_per_output_token_seconds_bucket",
    "time_to_first_token_seconds_bucket",
)
NEW_NAMES = (
    "kv_cache_usage_perc",
    "prefix_cache_hits_total",
    "inter_token_latency_seconds_bucket",
    "time_to_first_token_seconds_bucket",
)


# Read by who will read it


def promtool(*argv, cwd=None):
    tool = str(programs() / "promtool")
    return subprocess.run([tool, *argv], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def monitoring(tmp_path_factory, rendered):
    """The monitoring host's folder, with alertmanagers and the newest names."""
    folder = tmp_path_factory.mktemp("monitoring")
    for path, text in files(rendered["lb-01"]).items():
        if path.startswith(MONITORING):
            (folder / Path(path).name).write_text(text)
    return folder


def test_promtool_accepts_configuration_and_rules(monitoring):
    for what, name in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        done = promtool("check", what, name, cwd=monitoring)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_promtool_accepts_every_setting(tmp_path):
    own = ', alertmanagers: ["192.0.2.9:9093"], scrape_interval: 1, alerts: {queue: 0}'
    found = files(bundles(tmp_path, "0.8.5", own)["lb-01"])
    for name in ("prometheus.yml", "rules.yml"):
        (tmp_path / name).write_text(found[f"{MONITORING}/{name}"])
    done = promtool("check", "config", "prometheus.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout


def test_alerts_fire_when_they_should_and_only_then(monitoring):
    shutil.copy(Path(__file__).with_name("monitoring_rules.yml"), monitoring / "cases.yml")
    done = promtool("test", "rules", "cases.yml", cwd=monitoring)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case(monitoring):
    rules = yaml.safe_load((monitoring / "rules.yml").read_text())
    names = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    cases = yaml.safe_load(Path(__file__).with_name("monitoring_rules.yml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    assert {c["alertname"] for c in checks if c.get("exp_alerts")} == names
    assert {c["alertname"] for c in checks if not c.get("exp_alerts")} == names


@pytest.mark.parametrize("host", ["gpu-01", "gpu-02", "lb-01"])
def test_systemd_accepts_the_units(tmp_path, rendered, host):
    wanted = {
        a.path: a
        for part, of in rendered[host].parts
        for a in of
        if part in ROLES and isinstance(a, Artefact)
    }
    units = [p for p in wanted if p.startswith(UNITS)]
    for path in units:
        text = wanted[path].content.decode()
        text = re.sub(
            r"^(Exec\w+=-?)[^\n\\]+", r"\1/bin/true", text, flags=re.M
        )  # they are not here
        text = text.replace("\\\n    --", " --").replace("docker.service", "multi-user.target")
        (tmp_path / Path(path).name).write_text(text)
    for path in units:
        argv = ["systemd-analyze", "verify", "--man=no", tmp_path / Path(path).name]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), path


ROLES = ("monitoring", "node_exporter", "gpu_exporter")


def test_packages_come_without_the_distributions_open_ports(rendered):
    """What keeps the distribution's unit down comes before the package that would start it."""
    for host, names in {"lb-01": ["prometheus", "prometheus-node-exporter"]}.items():
        before = [e for e in rendered[host].ensures if e.before]
        titles = [e.title for e in before]
        for name in names:
            off = titles.index(f"{name}.service does not start with its package")
            assert off < titles.index(f"package {name} is installed")


# The dashboard


@pytest.fixture(scope="module")
def queries():
    source = Path(__file__).parents[1] / "roles/monitoring/dashboard.json"
    panels = json.loads(source.read_text())["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    return [t["expr"] for p in panels for t in p.get("targets", ())]


def test_promtool_parses_every_query_of_the_dashboard(tmp_path, queries):
    values = {"$deployment": ".+", "$host": ".+", "$__rate_interval": "1m"}
    rules = []
    for number, query in enumerate(queries):
        for variable, value in values.items():
            query = query.replace(variable, value)
        rules.append({"record": f"query:{number}", "expr": query})
    assert len(rules) > 20
    text = yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]})
    (tmp_path / "queries.yml").write_text(text)
    done = promtool("check", "rules", "queries.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


METRIC = re.compile(r"\b(?:vllm|deployment|DCGM_FI_DEV|node|inferfleet|tgi)[:_]\w+(?::\w+)?")
# beside what simulators expose: vLLM's that they do not imagine, TGI's, and node_exporter's
KNOWN = {
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "tgi_queue_size",
    "node_filesystem_avail_bytes",
    "node_filesystem_size_bytes",
    "node_memory_MemAvailable_bytes",
    "node_textfile_mtime_seconds",
}


def test_every_metric_that_is_asked_for_is_exported(monitoring, queries):
    root = Path(__file__).parents[1] / "roles"
    rules = yaml.safe_load((monitoring / "rules.yml").read_text())
    all_rules = [rule for group in rules["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in all_rules if "record" in rule}
    asked = set(METRIC.findall(" ".join([*queries, *(rule["expr"] for rule in all_rules)])))
    simulator = (root / "simulator/simulator.py").read_text()
    counters = (root / "gpu_exporter/counters.csv").read_text()
    own = (root / "gpu_exporter/gpu_exporter.py").read_text()
    probes = (root / "node_exporter/templates/probes.j2").read_text()
    gateway = Metrics(["coder"]).expose().decode()
    for metric in asked - KNOWN - recorded:
        base = re.sub(r"_(bucket|sum|count)$", "", metric)
        if metric.startswith("vllm:"):
            assert f'"{base.removeprefix("vllm:")}"' in simulator or base in simulator, metric
        elif metric.startswith("DCGM_FI_DEV_"):
            assert f"{metric}," in counters, metric
            assert f'"{metric.removeprefix("DCGM_FI_DEV_")}"' in own, metric
        elif metric.startswith("inferfleet_gateway_"):
            assert f"# HELP {metric} " in gateway, metric
        else:
            assert metric in probes, metric


# What has no exporter


def test_probes_are_where_there_is_something_to_probe(rendered):
    path = "/opt/inferfleet/node-exporter/probes"
    assert path not in files(rendered["gpu-01"])
    assert "  expires 443\n" in files(rendered["lb-01"])[path]
    assert (
        "  answers small small-0 192.0.2.2 11434 /api/version\n" in files(rendered["gpu-02"])[path]
    )


def test_gpu_exporters_suit_the_engines(rendered):
    """NVIDIA's where engines run in Docker, ours with its binding elsewhere."""
    unit = f"{UNITS}/inferfleet-gpu-exporter.service"
    dcgm, own = files(rendered["gpu-01"]), files(rendered["gpu-02"])
    assert "docker compose" in dcgm[unit]
    assert "/opt/inferfleet/gpu-exporter/pynvml.py" not in dcgm
    assert "gpu_exporter.py 192.0.2.2 9400" in own[unit]
    assert "PrivateDevices" not in own[unit]
    assert "def nvmlInit()" in own["/opt/inferfleet/gpu-exporter/pynvml.py"]
    assert not [e for e in rendered["gpu-02"].ensures if "dcgm" in e.title]


def test_mistakes_are_told(tmp_path):
    text = FLEET.replace("VERSION", "0.32.0").replace("SETTINGS", ", alerts: {que: 3}")
    text = text.replace("gpu_exporter: {hosts: [gpus]}", "gpu_exporter: {hosts: [gpus, edge]}")
    told = make.problems(make.write(tmp_path, fleet=text))
    assert any("unknown key (did you mean queue?)" in said for said in told)
    text = text.replace(", alerts: {que: 3}", "")
    told = make.problems(make.write(tmp_path, fleet=text))
    assert any("lb-01 has no GPUs in the inventory" in said for said in told)


def test_hosts_that_reach_no_packages_are_not_asked_to_install_any(tmp_path):
    host = fleet.Made("gpu-01", "192.0.2.3", 22, "deploy", "sudo", ())
    inventory = fleet.make(tmp_path / "project", [host], tmp_path / "key")
    production = Project(inventory).inventory.phases["production"]
    assert [placement.role for placement in production.placements] == ["balancer"]
