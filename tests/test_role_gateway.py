"""The gateway's role: what it is told of pools, models and keys, and what one variable changes."""

import hashlib
import json
import subprocess

import make
import msgspec
import pytest
import readers

from inferfleet import wheel
from inferfleet.gateway.config import Config, load
from inferfleet.gateway.keys import Keys
from inferfleet.secrets import Secrets

BASE = """\
    groups: {gpus: {}, gws: {}, lbs: {}}
    hosts:
      gpu-01: {address: 192.0.2.1, groups: [gpus], gpus: [{model: L40S, count: 4}]}
      gpu-02: {address: 192.0.2.2, groups: [gpus], gpus: [{model: L40S, count: 4}]}
      gw-01: {address: 192.0.2.11, private_address: 198.51.100.11, groups: [gws]}
      lb-01: {address: 192.0.2.21, groups: [lbs]}
    models:
      tag: {repository: qwen2.5-coder:7b, served_name: "qwen2.5-coder:7b", context_length: 16384}
      hub:
        repository: Qwen/Qwen2.5-Coder-7B-Instruct-AWQ
        served_name: qwen2.5-coder
        quantization: awq
        context_length: 32768
    deployments:
      slow:
        {engine: ollama, model: tag, hosts: [gpu-01], port: 11434, options: {context_length: 8192}}
      fast:
        {engine: vllm, model: hub, hosts: [gpu-02], port: 8000, instances_per_host: 2,
         api_key: !env ENGINE_KEY, options: {runtime: native, tool_call_parser: hermes}}
"""
SETTINGS = """\
          models: {qwen2.5-coder: {aliases: ["qwen2.5-coder:7b", coder]}}
          api_keys: {web: !env WEB_KEY}
"""
VALUES = {"WEB_KEY": "sesame-web", "OLD_KEY": "sesame-old", "ENGINE_KEY": "sesame-engine"}


def phase(settings=SETTINGS, before="balancer: {hosts: [lbs], port: 80}", deployments="slow, fast"):
    return f"""\
    phases:
      p:
        users: 1
        why: w
        hosts: [gpus, gws, lbs]
        deployments: [{deployments}]
        roles:
          {before}
          gateway:
            hosts: [gws]
{"".join(f"  {line}" + chr(10) for line in settings.splitlines())}"""


def told(folder, settings=SETTINGS, *, host="gw-01", rehearse=False, **more):
    """Path -> artefact of a host, with the values of secrets."""
    project = make.project(folder, base=BASE, phase=phase(settings, **more))
    plan = project.plan("p", rehearse=rehearse)
    bundles = project.bundles(plan, plan.hosts, Secrets(project.folder, environ=VALUES))
    (found,) = [bundle for bundle in bundles if bundle.host.name == host]
    return {artefact.path: artefact for artefact in found.artefacts}


def config(folder, settings=SETTINGS, **more):
    """The gateway's own reading of its configuration."""
    file = told(folder, settings, **more)["/etc/inferfleet/gateway/config.json"]
    path = folder / "config.json"
    path.write_bytes(file.content)
    return load(path)


def faults(folder, settings, **more):
    with pytest.raises(make.InventoryError) as caught:
        make.load(make.write(folder, base=BASE, phase=phase(settings, **more)), make.Library())
    return [f"{p.path}: {p.message}" for p in caught.value.problems if not p.warning]


# pools and models


def test_the_gateway_reads_what_the_plan_says_of_engines(tmp_path):
    made = config(tmp_path)
    assert (made.listen, made.private) == ("198.51.100.11:8080", "127.0.0.1:9400")
    assert [(name, p.backend, p.model) for name, p in made.pools.items()] == [
        ("slow", "ollama", "qwen2.5-coder:7b"),
        ("fast", "vllm", "qwen2.5-coder"),
    ]
    assert [(i.name, i.url) for i in made.pools["fast"].instances] == [
        ("fast-0@gpu-02", "http://192.0.2.2:8000"),
        ("fast-1@gpu-02", "http://192.0.2.2:8001"),
    ]
    assert made.pools["fast"].key_file == "/etc/inferfleet/gateway/engine-fast.key"
    assert made.pools["slow"].key_file is None


def test_deployments_of_one_model_share_it_by_instances(tmp_path):
    (model,) = config(tmp_path).models.values()
    assert model.pools == {"slow": 1, "fast": 2}
    assert model.aliases == ["qwen2.5-coder:7b", "coder"]
    assert (model.context_length, model.tools, model.embeddings) == (8192, True, False)


def test_names_that_are_not_said_to_be_one_stay_two_models(tmp_path):
    models = config(tmp_path, "          api_keys: {web: !env WEB_KEY}\n").models
    assert {name: model.pools for name, model in models.items()} == {
        "qwen2.5-coder:7b": {"slow": 1},
        "qwen2.5-coder": {"fast": 2},
    }
    assert models["qwen2.5-coder"].details == {
        "parameter_size": "7B",
        "quantization_level": "AWQ",
    }


@pytest.mark.parametrize(
    ("backend", "pools", "context"),
    [("llama", {"slow": 1, "fast": 0}, 8192), ("vllm", {"slow": 0, "fast": 2}, 32768)],
)
def test_one_variable_says_which_engine_serves(tmp_path, backend, pools, context):
    (model,) = config(tmp_path, f"{SETTINGS}          backend: {backend}\n").models.values()
    assert (model.pools, model.context_length) == (pools, context)


def test_flipping_it_changes_one_file_that_is_reloaded(tmp_path):
    llama = told(tmp_path / "a", f"{SETTINGS}          backend: llama\n")
    vllm = told(tmp_path / "b", f"{SETTINGS}          backend: vllm\n")
    (changed,) = [path for path, file in vllm.items() if file != llama[path]]
    assert list(llama) == list(vllm)
    assert changed == "/etc/inferfleet/gateway/config.json"
    assert vllm[changed].reloads == ("inferfleet-gateway.service",)
    assert vllm[changed].restarts == ()


def test_without_a_parser_no_tools_are_offered(tmp_path):
    text = BASE.replace(", tool_call_parser: hermes", "")
    project = make.project(tmp_path, base=text, phase=phase())
    plan = project.plan("p")
    bundle = next(b for b in project.bundles(plan, plan.hosts) if b.host.name == "gw-01")
    assert json.loads(make.text(bundle, "config.json"))["models"]["qwen2.5-coder"]["tools"] is False


@pytest.mark.parametrize(
    ("before", "after", "can"),
    [
        ("repository: qwen2.5-coder:7b", "repository: gemma2:9b", (8192, False, False, False)),
        ("options: {context_length: 8192}", "options: {}", (None, True, False, False)),
        ("repository: qwen2.5-coder:7b", "repository: qwen2.5vl:7b", (8192, False, True, False)),
        (
            "repository: qwen2.5-coder:7b",
            "repository: nomic-embed-text",
            (8192, False, False, True),
        ),
    ],
)
def test_a_model_can_what_is_known_of_its_engines(tmp_path, before, after, can):
    assert before in BASE
    own = f"{SETTINGS}          backend: llama\n"
    project = make.project(tmp_path, base=BASE.replace(before, after), phase=phase(own))
    plan = project.plan("p")
    bundle = next(b for b in project.bundles(plan, plan.hosts) if b.host.name == "gw-01")
    model = json.loads(make.text(bundle, "config.json"))["models"]["qwen2.5-coder"]
    keys = ("context_length", "tools", "vision", "embeddings")
    assert tuple(model.get(key) for key in keys) == can
    said = any("nothing says how many tokens" in str(w) for w in project.inventory.warnings)
    assert said == (can[0] is None)


def test_a_hosts_own_variables_count(tmp_path):
    text = BASE.replace(
        "groups: [gpus], gpus:", "groups: [gpus], variables: {vllm: {max_model_len: 2048}}, gpus:"
    )
    project = make.project(tmp_path, base=text, phase=phase())
    plan = project.plan("p")
    bundle = next(b for b in project.bundles(plan, plan.hosts) if b.host.name == "gw-01")
    model = json.loads(make.text(bundle, "config.json"))["models"]["qwen2.5-coder"]
    assert model["context_length"] == 2048


def test_a_rehearsal_speaks_to_the_simulator_as_to_vllm(tmp_path):
    made = config(tmp_path, rehearse=True)
    assert {pool.backend for pool in made.pools.values()} == {"vllm"}


OLD = """\
          providers:
            old:
              url: https://api.example.com/
              models: {coder: gpt-x, other: gpt-y}
              key: !env OLD_KEY
"""


def test_an_external_provider_is_asked_only_where_it_is_named(tmp_path):
    made = config(tmp_path, SETTINGS + OLD)
    assert made.models["qwen2.5-coder"].pools == {"slow": 1, "fast": 2, "old/coder": 0}
    assert made.models["other"].pools == {"old/other": 1}
    pool = made.pools["old/coder"]
    assert (pool.backend, pool.model, pool.provider) == ("openai", "gpt-x", "old")
    assert [i.url for i in pool.instances] == ["https://api.example.com"]
    assert pool.key_file == "/etc/inferfleet/gateway/provider-old.key"


def test_weights_and_a_shadow_name_deployments_and_providers(tmp_path):
    more = "aliases: [coder, 'qwen2.5-coder:7b'], pools: {fast: 90, old: 10}"
    own = f"{{qwen2.5-coder: {{{more}, shadow: {{pool: slow, percent: 5}}, max_output: 4096}}}}"
    settings = f"          models: {own}\n          api_keys: {{web: !env WEB_KEY}}\n{OLD}"
    model = config(tmp_path, settings).models["qwen2.5-coder"]
    assert model.pools == {"slow": 0, "fast": 90, "old/coder": 10}
    assert (model.shadow.pool, model.shadow.percent, model.max_output) == ("slow", 5, 4096)


def test_every_setting_of_the_schema_reaches_the_gateway(tmp_path):
    own = """\
          port: 8088
          workers: 2
          public_models: true
          max_outstanding: 7
          max_body_mib: 9
          drain_timeout: 11
          queue: {length: 1, timeout: 2.5}
          timeouts: {connect: 1, first_token: 2, idle: 3, whole: 4}
          health: {interval: 5, timeout: 6, failures: 7, hung_after: 8}
          tracing: {endpoint: "http://192.0.2.9:4318/v1/traces"}
    """
    made = config(tmp_path, f"{SETTINGS}{own}")
    assert (made.listen, made.workers, made.public_models) == ("198.51.100.11:8088", 2, True)
    assert (made.pools["fast"].max_outstanding, made.max_body_mib, made.drain_timeout) == (7, 9, 11)
    assert msgspec.structs.astuple(made.queue) == (1, 2.5)
    assert msgspec.structs.astuple(made.timeouts) == (1, 2, 3, 4)
    assert msgspec.structs.astuple(made.health) == (5, 6, 7, 8)
    assert made.tracing == {"endpoint": "http://192.0.2.9:4318/v1/traces", "sample": 1}


def test_defaults_are_the_gateways_own(tmp_path):
    made, default = config(tmp_path), Config(listen="x:1", pools={}, models={})
    for key in ("queue", "timeouts", "health", "drain_timeout", "max_body_mib", "public_models"):
        assert getattr(made, key) == getattr(default, key), key


# keys


LIMITS = """\
          api_keys:
            web:
              key: !env WEB_KEY
              models: [coder]
              requests_per_minute: 60
              concurrency: 2
              tokens_per_day: 1000
              expires: 2027-01-01
            old: !env OLD_KEY
          models: {qwen2.5-coder: {aliases: [coder, "qwen2.5-coder:7b"]}}
"""


def test_the_gateway_finds_keys_by_digests_and_their_limits(tmp_path):
    file = told(tmp_path, LIMITS)["/etc/inferfleet/gateway/keys.json"]
    assert (file.mode, file.owner, file.group) == (0o640, "root", "inferfleet-gateway")
    assert (file.restarts, file.reloads, file.secret) == ((), (), True)
    assert b"sesame" not in file.content
    assert hashlib.sha256(b"sesame-web").hexdigest().encode() in file.content
    path = tmp_path / "keys.json"
    path.write_bytes(file.content)
    path.chmod(0o640)
    found = Keys(path).find(b"sesame-web", 0)
    assert (found.name, found.models) == ("web", {"qwen2.5-coder"})
    assert (found.requests_per_minute, found.concurrency, found.tokens_per_day) == (60, 2, 1000)
    assert Keys(path).find(b"sesame-web", 1.9e9) is None
    assert Keys(path).find(b"sesame-old", 1.9e9).models is None


def test_keys_of_engines_are_for_the_gateway_alone(tmp_path):
    file = told(tmp_path)["/etc/inferfleet/gateway/engine-fast.key"]
    assert (file.content, file.mode, file.group) == (
        b"sesame-engine\n",
        0o640,
        "inferfleet-gateway",
    )


def test_a_key_written_in_clear_is_refused_and_not_shown(tmp_path):
    for own in ("{web: sesame}", "{web: {key: sesame}}"):
        (said,) = faults(tmp_path, f"          api_keys: {own}\n")
        assert "a secret written in clear" in said
        assert "sesame" not in said


# wheels and where it runs


def test_wheels_are_pushed_as_they_lie_in_a_folder_of_the_inventory(tmp_path):
    folder = tmp_path / "inventory/wheels"
    folder.mkdir(parents=True)
    for name in map(wheel.name, wheel.wanted()):
        (folder / f"{name.replace('-', '_')}-1-py3-none-any.whl").write_text(name)
    (folder / wheel.FILE).write_text("an older one")
    files = told(tmp_path, f"{SETTINGS}          wheels: wheels\n")
    home = "/opt/inferfleet/gateway"
    wheels = {path for path in files if path.endswith(".whl")}
    assert len(wheels) == len(wheel.wanted()) + 1
    assert files[f"{home}/wheels/{wheel.FILE}"].content == wheel.gateway()
    assert files[f"{home}/wheels/pip-1-py3-none-any.whl"].content == b"pip"
    assert {files[path].restarts for path in wheels} == {("inferfleet-gateway-setup.service",)}
    assert b"--no-index" in files[f"{home}/install.sh"].content


def test_a_script_that_sh_reads(tmp_path):
    for more in ("", "          index_url: https://pypi.example.com/simple\n"):
        script = told(tmp_path, SETTINGS + more)["/opt/inferfleet/gateway/install.sh"].content
        subprocess.run(["sh", "-n"], input=script, check=True)
    assert b"--index-url https://pypi.example.com/simple" in script


def test_docker_reads_the_compose_file(tmp_path):
    files = told(tmp_path, f"{SETTINGS}          runtime: docker\n")
    path = tmp_path / "compose.yml"
    path.write_bytes(files["/etc/inferfleet/gateway/compose.yml"].content)
    argv = [*readers.compose(), "-f", str(path), "--profile", "setup", "config"]
    read = subprocess.run([*argv, "--format", "json"], check=True, capture_output=True, timeout=120)
    services = json.loads(read.stdout)["services"]
    assert services["gateway"]["image"] == "library/python:3.12-slim"
    assert services["gateway"]["user"] == "65534:65534"
    assert services["gateway"]["read_only"] is True
    assert services["gateway"]["command"][1:3] == ["-m", "inferfleet.gateway"]
    assert {volume["read_only"] for volume in services["gateway"]["volumes"][:2]} == {True}
    assert [volume["target"] for volume in services["setup"]["volumes"]] == [
        "/opt/inferfleet/gateway"
    ]


def test_it_listens_where_its_balancers_reach_it(tmp_path):
    own = "balancer: {hosts: [gws], port: 80}"
    assert config(tmp_path, before=own).listen == "127.0.0.1:8080"
    public = config(tmp_path, f"{SETTINGS}          listen: public\n")
    assert public.listen == "0.0.0.0:8080"
    watched = "balancer: {hosts: [lbs], port: 80}\n          monitoring: {hosts: [lbs]}"
    assert config(tmp_path, before=watched).private == "198.51.100.11:9400"


# the balancer before it


def test_the_balancer_passes_all_on_to_every_gateway(tmp_path):
    files = told(tmp_path, host="lb-01")
    text = files["/etc/inferfleet/balancer/nginx.conf"].content.decode()
    assert [path for path in files if path.endswith(".conf")] == [
        "/etc/inferfleet/balancer/nginx.conf"
    ]
    assert "server 198.51.100.11:8080 " in text
    assert "Authorization" not in text
    assert "proxy_next_upstream error timeout non_idempotent;" in text
    assert "proxy_read_timeout 930s;" in text
    locations = [line.split()[1:-1] for line in text.splitlines() if " location " in line]
    assert [path for path in locations if not path[0].startswith("@")] == [
        *(["/v1/"], ["/api/"], ["=", "/health"], ["=", "/"], ["/"])
    ]


# what is wrong


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("models: {qwen: {vision: true}}", "nobody serves 'qwen'; served here: qwen2.5-coder:7b"),
        (
            "models: {qwen2.5-coder: {pools: {slow: 1}}}",
            "'slow' does not serve 'qwen2.5-coder'; fast does",
        ),
        (
            "models: {qwen2.5-coder: {shadow: {pool: slow, percent: 5}}}",
            "'slow' does not serve 'qwen2.5-coder'; fast does",
        ),
        ("models: {qwen2.5-coder: {pools: {fast: 0}}}", "every pool of 'qwen2.5-coder' has weight"),
        (
            "models: {qwen2.5-coder: {aliases: [x]}, 'qwen2.5-coder:7b': {aliases: [x]}}",
            "'x' of 'qwen2.5-coder:7b' is also a name of 'qwen2.5-coder'",
        ),
        ("wheels: nowhere", "nowhere lacks wheels of fastapi, "),
        ("port: 9400", "port 9400 of gw-01 is taken by 'gateway'"),
    ],
)
def test_what_means_nothing_is_said(tmp_path, settings, said):
    own = f"          api_keys: {{web: !env WEB_KEY}}\n          {settings}\n"
    assert [fault for fault in faults(tmp_path, own) if said in fault]


def test_a_key_for_a_model_that_nobody_serves_is_said(tmp_path):
    own = "          api_keys: {web: {key: !env WEB_KEY, models: [gpt]}}\n"
    (said,) = faults(tmp_path, own)
    assert "'web' may use 'gpt', which nobody serves" in said


def test_keys_are_asked_for_in_one_place(tmp_path):
    before = "balancer: {hosts: [lbs], port: 80, api_keys: {web: !env WEB_KEY}}"
    (said,) = faults(tmp_path, SETTINGS, before=before)
    assert said.startswith("phases.p.roles.balancer.api_keys: the phase has gateways")


def test_what_works_and_not_as_one_thinks_is_a_warning(tmp_path):
    def warned(settings, **more):
        folder = make.write(tmp_path, base=BASE, phase=phase(settings, **more))
        return [
            w.message for w in make.load(folder, make.Library()).warnings if "fits" not in w.message
        ]

    alone = "base: {hosts: [lbs]}"
    assert any("only its own host reaches it" in w for w in warned(SETTINGS, before=alone))
    assert any("in clear" in w for w in warned(f"{SETTINGS}          listen: public\n"))
    tgi = warned(f"{SETTINGS}          backend: tgi\n")
    assert any("tgi does not serve 'qwen2.5-coder': ollama, vllm does" in w for w in tgi)
