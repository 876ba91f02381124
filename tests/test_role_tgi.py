"""TGI: its command line, its compose file, what is refused, and what is warned of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import make
import pytest
import readers
from make import service, text

from inferfleet.model import Bundle

BASE = """\
    hosts: {gpu-01: {address: 192.0.2.1, gpus: [{model: L40S, count: 4}]}}
    models: {coder: {repository: org/coder, revision: 0123456789abcdef0123456789abcdef01234567}}
    phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [chat]}}
"""


def own(options: str = "", more: str = "") -> str:
    return make.chat("tgi", options, more)


def bundle(folder: Path, options: str = "", more: str = "") -> Bundle:
    return make.bundle(folder, base=BASE, own=own(options, more))


def test_the_launcher_is_told_all_that_has_to_match(tmp_path: Path) -> None:
    options = "quantize: awq, max_input_tokens: 8000, max_total_tokens: 8192, shutdown_timeout: 40"
    found = bundle(tmp_path, options, "extra_args: [--disable-custom-kernels],")
    assert service(found)["command"] == [
        *("--model-id", "org/coder", "--revision", "0123456789abcdef0123456789abcdef01234567"),
        *("--hostname", "0.0.0.0", "--port", "8080", "--num-shard", "2"),
        *("--quantize", "awq", "--max-input-tokens", "8000", "--max-total-tokens", "8192"),
        *("--usage-stats", "off", "--graceful-termination-timeout", "40"),
        "--disable-custom-kernels",
    ]


def test_compose_takes_it_and_waits_longer_than_the_launcher(tmp_path: Path) -> None:
    found = bundle(tmp_path, "shutdown_timeout: 40", "api_key: !env KEY, gpus: [2, 3],")
    for name in ("compose.yml", "engine.env"):
        (tmp_path / name).write_text(text(found, name))
    path = tmp_path / "compose.yml"
    subprocess.run([*readers.compose(), "-f", path, "config", "-q"], check=True, timeout=60)
    engine = service(found)
    assert engine["image"] == "ghcr.io/huggingface/text-generation-inference:3.3.7"
    assert engine["stop_grace_period"] == "55s"
    (device,) = engine["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["2", "3"]
    unit = dict(readers.unit(text(found, ".service"))["Service"])
    assert unit["TimeoutStopSec"] == "70"


def test_the_key_is_in_its_own_file_alone(tmp_path: Path) -> None:
    found = bundle(tmp_path, more="api_key: !env KEY,")
    (secret,) = [a for a in found.artefacts if a.secret]
    assert (secret.path, secret.mode) == ("/etc/inferfleet/chat-0/engine.env", 0o600)
    assert secret.content.decode().startswith("API_KEY=")
    assert "API_KEY" not in text(found, "compose.yml")


def test_says_at_check_that_it_is_in_maintenance_mode_and_goes_on(tmp_path: Path) -> None:
    project = make.project(tmp_path, base=BASE, own=own())
    (warning,) = project.inventory.warnings
    assert "deployments.chat.engine" in str(warning)
    assert "maintenance mode" in warning.message


CASES = {
    "the guides' flag": ("", "extra_args: [--messages-api-enabled],", "the chat API is always on"),
    "vLLM's flag": (
        "",
        "extra_args: [--max-model-len, '8192'],",
        "use the option max_total_tokens",
    ),
    "ours": ("", "extra_args: [--port, '1'],", "use the deployment's port"),
    "both": ("quantize: awq, dtype: float16", "", "either dtype or quantize"),
    "exl2": ("quantize: exl2", "", "cannot be spread"),
    "no room": ("max_input_tokens: 4096, max_total_tokens: 4096", "", "no room for an answer"),
    "key in clear": ("environment: {HF_TOKEN: x}", "", "use hf_token"),
}


@pytest.mark.parametrize(("options", "more", "said"), CASES.values(), ids=CASES)
def test_refuses(tmp_path: Path, options: str, more: str, said: str) -> None:
    problems = make.problems(make.write(tmp_path, base=BASE, own=own(options, more)))
    assert any(said in problem for problem in problems), problems
