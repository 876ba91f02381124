"""vLLM's options and a release's flags together: what is refused at check, what is rendered."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import make
import pytest
import readers
from make import service, text

from inferfleet.flags import lint_own, tables
from inferfleet.model import Bundle

BASE = """\
    hosts: {gpu-01: {address: 192.0.2.1, gpus: [{model: H200, count: 4}]}}
    models: {coder: {repository: org/coder}}
    phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [chat]}}
"""
EVERYTHING = (
    "max_model_len: 8192, max_num_seqs: 64, max_num_batched_tokens: 4096, "
    "gpu_memory_utilization: 0.9, dtype: bfloat16, kv_cache_dtype: fp8, quantization: awq, "
    "enable_prefix_caching: false, enable_chunked_prefill: true, tool_call_parser: hermes, "
    "reasoning_parser: qwen3, chat_template: /srv/chat.jinja, max_lora_rank: 32, "
    "lora_adapters: {b: /srv/lora/b, a: org/a}, trust_remote_code: true, enforce_eager: true, "
    "expert_parallel: true, sleep_mode: true, offline: true, "
    "speculative_config: {method: ngram, num_speculative_tokens: 4}"
)


def own(options: str = "", more: str = "") -> str:
    return make.chat("vllm", options, more)


def bundle(folder: Path, options: str = "", more: str = "") -> Bundle:
    return make.bundle(folder, base=BASE, own=own(options, more))


CASES = {
    "removed": ("version: 0.33.0", "extra_args: [--swap-space, '4'],", "left with 0.18.0"),
    "not yet": ("version: 0.8.5, sleep_mode: true, max_num_queued_reqs: 9", "", "came with 0.29.0"),
    "value": ("version: 0.10.2, kv_cache_dtype: nvfp4", "", "--kv-cache-dtype is one of"),
    "misspelled": ("", "extra_args: [--max-model-length, '9'],", "did you mean --max-model-len"),
    "port trap": ("environment: {VLLM_PORT: '8000'}", "", "base of vLLM's internal ports"),
    "wrong variable": (
        "environment: {VLLM_MAX_MODEL_LEN: '1'}",
        "",
        "use the option max_model_len",
    ),
    "shape": ("data_parallel: 2, tensor_parallel: 2", "", "parallelism is 4, but gpus_per_inst"),
}


@pytest.mark.parametrize(("options", "more", "said"), CASES.values(), ids=CASES)
def test_refuses(tmp_path: Path, options: str, more: str, said: str) -> None:
    problems = make.problems(make.write(tmp_path, base=BASE, own=own(options, more)))
    assert any(said in problem for problem in problems), problems


def test_sleep_mode_is_refused_where_others_could_reach_it(tmp_path: Path) -> None:
    roles = "roles: {balancer: {hosts: [lb], port: 8443, api_keys: {team: !env TEAM}}}"
    base = BASE.replace("deployments: [chat]}", f"deployments: [chat], {roles}}}")
    base = base.replace("hosts: [gpu-01]", "hosts: [gpu-01, lb]")
    base = base.replace("hosts: {gpu", "hosts: {lb: {address: 192.0.2.9}, gpu")
    written = make.write(tmp_path, base=base, own=own("sleep_mode: true", "api_key: !env KEY,"))
    (problem,) = make.problems(written)
    assert "opens developer endpoints that ask for no key" in problem


def test_warns_where_a_release_cannot_drain_and_renders_no_such_flag(tmp_path: Path) -> None:
    project = make.project(tmp_path, base=BASE, own=own("version: 0.16.0"))
    (warning,) = project.inventory.warnings
    assert "vLLM 0.16.0 cannot drain" in warning.message
    plan = project.plan("p")
    (found,) = project.bundles(plan, plan.hosts)
    assert "--shutdown-timeout" not in service(found)["command"]


def test_every_option_becomes_a_flag(tmp_path: Path) -> None:
    line = " ".join(service(bundle(tmp_path, EVERYTHING))["command"])
    for part in (
        "org/coder --host 0.0.0.0 --port 8000 --served-model-name coder",
        "--tensor-parallel-size 2 --max-model-len 8192",
        "--no-enable-prefix-caching --enable-chunked-prefill",
        "--enable-auto-tool-choice --tool-call-parser hermes",
        "--enable-lora --lora-modules a=org/a b=/srv/lora/b",
        "--enable-expert-parallel --trust-remote-code --enforce-eager --enable-sleep-mode",
        "--shutdown-timeout 120",
    ):
        assert part in line
    argument = line.split("--speculative-config ")[1].split("}")[0] + "}"
    assert json.loads(argument) == {"method": "ngram", "num_speculative_tokens": 4}


@pytest.mark.parametrize("release", tables.table("vllm").releases)
def test_what_is_rendered_without_options_is_known_to_every_release(
    tmp_path: Path, release: str
) -> None:
    command = service(bundle(tmp_path, f"version: {release}"))["command"]
    assert lint_own("vllm", release, command[1:]) == []


def test_what_engines_read_is_mounted_read_only_and_caches_are_local(tmp_path: Path) -> None:
    found = service(bundle(tmp_path, EVERYTHING))
    assert found["volumes"] == [
        "/var/cache/inferfleet/huggingface:/root/.cache/huggingface",
        "/var/cache/inferfleet/vllm:/root/.cache/vllm",
        "/srv/chat.jinja:/srv/chat.jinja:ro",
        "/srv/lora/b:/srv/lora/b:ro",
    ]
    template = "/vllm-workspace/examples/tool_chat_template_hermes.jinja"
    options = f"chat_template: {template}"
    assert len(service(bundle(tmp_path / "image", options))["volumes"]) == 2


@pytest.mark.parametrize(
    "options", ["", "usage_stats: true", "gpu_access: cdi, ipc: host", EVERYTHING]
)
def test_compose_takes_it(tmp_path: Path, options: str) -> None:
    found = bundle(tmp_path, options)
    for name in ("compose.yml", "engine.env"):
        (tmp_path / name).write_text(text(found, name))
    path = tmp_path / "compose.yml"
    subprocess.run([*readers.compose(), "-f", path, "config", "-q"], check=True, timeout=60)
    engine = service(found)
    if "cdi" in options:
        (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "cdi"
        assert device["device_ids"] == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
        assert engine["ipc"] == "host"
        assert "shm_size" not in engine
    else:
        assert engine["deploy"]["resources"]["reservations"]["devices"]


def test_podman_gets_the_same_and_no_secret_on_its_command_line(tmp_path: Path) -> None:
    digest = "registry.example.com/vllm@sha256:" + "0" * 64
    options = f"runtime: podman, image: '{digest}', {EVERYTHING}"
    found = bundle(tmp_path, options, "api_key: !env KEY, gpus: [2, 3],")
    lines = readers.unit(text(found, ".service"))["Service"]
    unit = dict(lines)
    assert unit["EnvironmentFile"] == "/etc/inferfleet/chat-0/engine.env"
    argv = readers.command(unit["ExecStart"])
    options_of_podman, inside = argv[: argv.index(digest)], argv[argv.index(digest) + 1 :]
    assert {"--device=nvidia.com/gpu=2", "--device=nvidia.com/gpu=3"} <= set(options_of_podman)
    assert "--env=VLLM_API_KEY" in options_of_podman
    assert "--publish=127.0.0.1:8000:8000" in options_of_podman
    docker = service(bundle(tmp_path / "docker", EVERYTHING, "gpus: [2, 3],"))["command"]
    assert inside == ["serve", *docker]
    assert int(unit["TimeoutStopSec"]) > 120


def test_an_offline_engine_asks_no_hub_and_statistics_are_off(tmp_path: Path) -> None:
    variables = service(bundle(tmp_path, "offline: true"))["environment"]
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    variables = service(bundle(tmp_path / "other", "usage_stats: true")).get("environment")
    assert variables is None
