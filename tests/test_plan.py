"""Which role runs where, with which GPUs and ports, and who listens for whom."""

import make
import pytest

HOSTS = """\
    groups: {gpus: {}, edge: {}}
    hosts:
      gpu-01:
        address: 192.0.2.1
        private_address: 192.0.2.101
        groups: [gpus]
        gpus: [{model: A, count: 4}]
      gpu-02: {address: 192.0.2.2, groups: [gpus], gpus: [{model: A, count: 4}]}
      lb-01: {address: 192.0.2.3, groups: [edge]}
    models: {coder: {repository: org/coder}}
    deployments:
      coder:
        engine: vllm
        model: coder
        hosts: [gpus]
        port: 8000
        gpus_per_instance: 2
        instances_per_host: 2
        api_key: !env K
        options: {max_model_len: 1000, dtype: auto}
"""
PHASE = """\
    phases:
      p:
        users: 1
        why: w
        hosts: [gpus, edge]
        deployments: [coder]
        roles: {{balancer: {{hosts: [{where}], api_keys: {{x: !env K}}}}}}
"""


@pytest.fixture
def planned(tmp_path):
    def plan(where="edge", *, own="{}", **options):
        project = make.project(tmp_path, hosts=HOSTS, phase=PHASE.format(where=where), own=own)
        return project.plan("p", **options)

    return plan


def test_instances_share_out_ports_and_gpus(planned):
    assert [(i.host.name, i.name, i.port, i.gpus) for i in planned().instances()] == [
        ("gpu-01", "coder-0", 8000, (0, 1)),
        ("gpu-01", "coder-1", 8001, (2, 3)),
        ("gpu-02", "coder-0", 8000, (0, 1)),
        ("gpu-02", "coder-1", 8001, (2, 3)),
    ]


@pytest.mark.parametrize(
    ("where", "listen"),
    [
        ("edge", {"192.0.2.101", "192.0.2.2"}),
        ("gpu-01", {"127.0.0.1", "192.0.2.2"}),
        ("gpus, edge", {"192.0.2.101", "192.0.2.2"}),
    ],
)
def test_an_engine_listens_on_loopback_only_when_its_own_host_alone_asks(planned, where, listen):
    assert {instance.listen for instance in planned(where).instances()} == listen


def test_engines_come_before_what_asks_them(planned):
    plan = planned("gpu-01")
    assert [step.role for step in plan.steps["gpu-01"]] == ["vllm", "balancer"]
    assert plan.steps["lb-01"] == ()
    assert [host.name for host in plan.hosts] == ["gpu-01", "gpu-02", "lb-01"]


def test_a_rehearsal_swaps_the_engine_and_keeps_everything_else(planned):
    real, rehearsal = planned(), planned(rehearse=True)
    assert {s.role for steps in rehearsal.steps.values() for s in steps} == {
        "simulator",
        "balancer",
    }
    for one, other in zip(real.instances(), rehearsal.instances(), strict=True):
        assert (one.name, one.unit, one.port, one.listen) == (
            other.name,
            other.unit,
            other.port,
            other.listen,
        )
    options = next(rehearsal.instances()).options
    assert options == {"max_model_len": 1000, "token_rate": 50, "shutdown_timeout": 30}


def test_variables_win_over_options_and_options_over_defaults(planned):
    own = """\
        groups: {big: {variables: {vllm: {max_model_len: 2000}}}}
        hosts:
          gpu-03:
            address: 192.0.2.4
            groups: [gpus, big]
            gpus: [{model: A, count: 4}]
            variables: {vllm: {dtype: float16}, simulator: {token_rate: 5}}
    """
    options = {i.host.name: i.options for i in planned(own=own).instances()}
    chosen = {h: (o["max_model_len"], o["dtype"], o["runtime"]) for h, o in options.items()}
    assert chosen["gpu-01"] == (1000, "auto", "docker")
    assert chosen["gpu-03"] == (2000, "float16", "docker")


def test_a_hosts_variables_reach_its_services(planned):
    own = (
        "hosts: {lb-02: {address: 192.0.2.5, groups: [edge], variables: {balancer: {port: 8443}}}}"
    )
    plan = planned(own=own)
    ports = {h: s.settings["port"] for h, steps in plan.steps.items() for s in steps if s.settings}
    assert ports == {"lb-01": 443, "lb-02": 8443}
