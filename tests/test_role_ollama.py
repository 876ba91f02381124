"""Ollama: what it renders, how a model gets into it, and that the CPU fallback is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make
import pytest
import readers
import yaml

from inferfleet.model import Artefact, Bundle, Ensure

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "roles" / "ollama" / "models.py"
STAND_IN = Path(__file__).parent / "tools" / "ollama"

BASE = """\
    hosts: {gpu-01: {address: 192.0.2.1, gpus: [{model: L4, count: 2}]}}
    models:
      coder: {repository: "qwen2.5-coder:7b", served_name: coder}
      plain: {repository: "qwen2.5-coder:7b", served_name: "qwen2.5-coder:7b"}
      local: {repository: /srv/models/coder.gguf, served_name: coder}
      weights: {repository: /srv/models/coder, served_name: coder}
    phases: {p: {users: 1, why: w, hosts: [gpu-01], deployments: [chat]}}
"""


def bundle(folder: Path, options: str = "", model: str = "coder", more: str = "") -> Bundle:
    project = make.project(folder, base=BASE, own=own(options, model, more))
    plan = project.plan("p")
    (found,) = project.bundles(plan, plan.hosts)
    return found


def own(options: str, model: str = "coder", more: str = "") -> str:
    return f"""\
    deployments:
      chat:
        {{engine: ollama, model: {model}, hosts: [gpu-01], port: 11434, {more}
         options: {{{options}}}}}
"""


def file(bundle: Bundle, ending: str) -> str:
    (found,) = [a for a in bundle.artefacts if a.path.endswith(ending)]
    return found.content.decode()


def unit_environment(bundle: Bundle) -> dict[str, str]:
    lines = readers.unit(file(bundle, ".service"))["Service"]
    return readers.environment([value for key, value in lines if key == "Environment"])


def test_the_unit_says_only_what_ollama_reads(tmp_path: Path) -> None:
    options = "max_queue: 64, max_loaded_models: 2, spread: true, environment: {HTTPS_PROXY: p}"
    assert unit_environment(bundle(tmp_path, options)) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0",
        "HOME": "/var/lib/ollama",
        "HTTPS_PROXY": "p",
        "OLLAMA_CONTEXT_LENGTH": "0",
        "OLLAMA_FLASH_ATTENTION": "1",
        "OLLAMA_HOST": "127.0.0.1:11434",
        "OLLAMA_KEEP_ALIVE": "30m",
        "OLLAMA_KV_CACHE_TYPE": "f16",
        "OLLAMA_MAX_LOADED_MODELS": "2",
        "OLLAMA_MAX_QUEUE": "64",
        "OLLAMA_MODELS": "/var/lib/ollama/models",
        "OLLAMA_NO_CLOUD": "1",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_SCHED_SPREAD": "1",
    }


def test_the_cloud_is_off_unless_asked_for(tmp_path: Path) -> None:
    assert "OLLAMA_NO_CLOUD" not in unit_environment(bundle(tmp_path, "cloud: true"))


def test_without_gpus_it_sees_none_and_proves_none(tmp_path: Path) -> None:
    found = bundle(tmp_path, more="gpus_per_instance: 0,")
    assert unit_environment(found)["CUDA_VISIBLE_DEVICES"] == "-1"
    assert not [e for e in found.ensures if "GPU" in e.title]


@pytest.mark.parametrize("access", ["device_ids", "cdi"])
def test_compose_takes_what_is_rendered(tmp_path: Path, access: str) -> None:
    found = bundle(tmp_path, f"runtime: docker, gpu_access: {access}", more="gpus: [1],")
    path = tmp_path / "compose.yml"
    path.write_text(file(found, "compose.yml"))
    subprocess.run([*readers.compose(), "-f", path, "config", "-q"], check=True, timeout=60)
    service = yaml.safe_load(path.read_text())["services"]["engine"]
    assert service["image"] == "ollama/ollama:0.32.0"
    assert service["ports"] == ["127.0.0.1:11434:11434"]
    assert service["volumes"] == ["/var/lib/ollama:/root/.ollama"]
    assert service["environment"]["OLLAMA_HOST"] == "0.0.0.0:11434"
    assert "CUDA_VISIBLE_DEVICES" not in service["environment"]
    if access == "cdi":
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["device_ids"]) == ("cdi", ["nvidia.com/gpu=1"])
    else:
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == ["1"]


CASES = {
    "OLLAMA_GPU": ("environment: {OLLAMA_GPU: '0'}", "coder", "", "set gpus_per_instance: 0"),
    "OLLAMA_NUM_GPU": ("environment: {OLLAMA_NUM_GPU: '2'}", "coder", "", "the parameter num_gpu"),
    "host": ("environment: {OLLAMA_HOST: '0.0.0.0'}", "coder", "", "the role says where"),
    "arguments": ("", "coder", "extra_args: [--port, '1'],", "takes no arguments"),
    "key": ("", "coder", "api_key: !env KEY,", "checks no keys"),
    "its own name": ("modelfile: {system: x}", "plain", "", "give the model another served_name"),
    "safetensors": ("", "weights", "", "is no .gguf file"),
    "kv": ("flash_attention: false, kv_cache_type: q8_0", "coder", "", "ignores it without"),
}


@pytest.mark.parametrize(("options", "model", "more", "said"), CASES.values(), ids=CASES)
def test_refuses(tmp_path: Path, options: str, model: str, more: str, said: str) -> None:
    folder = make.write(tmp_path, base=BASE, own=own(options, model, more))
    (problem,) = make.problems(folder)
    assert said in problem


# the model, by the real program and a server that answers like Ollama's


@contextmanager
def server(**environment: str) -> Iterator[str]:
    """The address of a stand-in for Ollama."""
    variables = os.environ | {"OLLAMA_HOST": "127.0.0.1:0"} | environment
    argv = [sys.executable, STAND_IN, "serve"]
    with subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server() as address:
        yield address


def run(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", str(PROGRAM), *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30)


def told(address: str, path: str) -> Any:
    with urllib.request.urlopen(address + path, timeout=5) as answer:
        return json.load(answer)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., Path]:
    def write(**values: object) -> Path:
        path = tmp_path / "model.json"
        path.write_text(json.dumps(values))
        return path

    return write


def test_pulls_a_model_under_its_name_with_progress(url: str, spec: Callable[..., Path]) -> None:
    path = spec(**{"name": "chat", "from": "llama3.2:3b"})
    before = run("has", url, path)
    assert (before.returncode, before.stderr) == (1, "the server has no model chat\n")
    made = run("make", url, path)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert lines[0] == "pulling manifest"
    shares = [100 * n // 40 for n in range(41)]
    assert [line for line in lines if line][1:42] == [
        f"pulling 1a2b: {share} % of 5.0 GiB" for share in shares
    ]
    assert run("has", url, path).returncode == 0
    assert {"chat:latest", "llama3.2:3b"} <= set(told(url, "/made"))


def test_makes_it_anew_when_the_modelfile_changes(url: str, spec: Callable[..., Path]) -> None:
    first = {"name": "tuned", "from": "llama3.2:3b", "parameters": {"num_ctx": 8192}}
    path = spec(**first)
    assert run("make", url, path).returncode == 0
    assert run("has", url, path).returncode == 0
    path = spec(**first, system='Say "yes".', template="{{ .Prompt }}")
    assert "was not made as" in run("has", url, path).stderr
    assert run("make", url, path).returncode == 0
    assert told(url, "/made")["tuned:latest"] == {
        "model": "tuned",
        "from": "llama3.2:3b",
        "parameters": {"num_ctx": 8192},
        "system": 'Say "yes".',
        "template": "{{ .Prompt }}",
    }


def test_uploads_a_gguf_once_and_again_when_it_changes(
    url: str, spec: Callable[..., Path], tmp_path: Path
) -> None:
    weights = tmp_path / "own.gguf"
    weights.write_bytes(b"GGUF" * 1000)
    path = spec(**{"name": "own", "from": str(weights)})
    made = run("make", url, path)
    assert made.returncode == 0, made.stderr
    assert "uploading" in made.stdout
    assert "uploading" not in run("make", url, path).stdout
    (name, digest), *_ = told(url, "/made")["own:latest"]["files"].items()
    assert name == "own.gguf"
    weights.write_bytes(b"GGUF" * 2000)
    assert run("has", url, path).returncode == 1
    assert "uploading" in run("make", url, path).stdout
    assert told(url, "/made")["own:latest"]["files"]["own.gguf"] != digest


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing:1b", "file does not exist"),
        ("cut:1b", "ended before it was done"),
        ("/nowhere/x.gguf", "No such file"),
    ],
)
def test_says_why_a_model_cannot_be_had(
    url: str, spec: Callable[..., Path], source: str, said: str
) -> None:
    path = spec(**{"name": "never", "from": source})
    made = run("make", url, path)
    assert made.returncode == 1
    assert said in made.stderr
    assert run("has", url, path).returncode == 1


def test_a_server_that_is_not_there_is_a_line_not_a_traceback(spec: Callable[..., Path]) -> None:
    found = run("has", "http://127.0.0.1:9", spec(**{"name": "x", "from": "y"}))
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)


@pytest.mark.parametrize(
    ("share", "wanted", "said"),
    [
        ("1", "1", ""),
        ("0.6", "0.5", ""),
        ("0.6", "1", "runs 60% on GPUs: 3.0 of 5.0 GiB"),
        ("0", "1", "runs on the CPU: 0.0 of 5.0 GiB"),
        ("0", "0.1", "runs on the CPU"),
    ],
)
def test_the_fallback_to_the_cpu_is_found(
    share: str, wanted: str, said: str, spec: Callable[..., Path]
) -> None:
    with server(STANDIN_GPU_SHARE=share) as address:
        assert run("make", address, spec(**{"name": "chat", "from": "m:1b"})).returncode == 0
        found = run("on-gpu", address, "chat", wanted)
        assert found.returncode == (1 if said else 0), found.stderr
        assert said in found.stderr


def test_a_model_that_is_not_there_cannot_be_proven(url: str) -> None:
    assert "not found" in run("on-gpu", url, "nothing", "1").stderr


@pytest.mark.parametrize(("share", "loaded"), [("1", True), ("0", True), ("0", False)])
def test_a_loaded_model_is_seen_on_the_cpu(
    share: str, loaded: bool, spec: Callable[..., Path]
) -> None:
    """What is not loaded is no evidence: it comes with the next request."""
    with server(STANDIN_GPU_SHARE=share) as address:
        assert run("make", address, spec(**{"name": "chat", "from": "m:1b"})).returncode == 0
        if loaded:
            run("on-gpu", address, "chat", "0")
        found = run("still", address, "chat", "0.5")
        assert found.returncode == (1 if loaded and share == "0" else 0), found.stderr


def test_provisioning_proves_it_once_for_a_configuration_and_a_driver(tmp_path: Path) -> None:
    """The guarded command, with a stand-in for what asks the server."""
    tools, driver, log = tmp_path / "bin", tmp_path / "version", tmp_path / "log"
    for folder in (tools, tmp_path / "state"):
        folder.mkdir()
    (tools / "python3").write_text(f"#!/bin/sh\necho $3 >>{log}\n[ ! -e {tmp_path}/cpu ]\n")
    (tools / "python3").chmod(0o755)
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}

    def shell(script: str) -> int:
        own = script.replace("/var/lib/inferfleet", str(tmp_path / "state"))
        own = own.replace("/proc/driver/nvidia/version", str(driver))
        return subprocess.run(["sh", "-c", own], env=variables, timeout=10).returncode

    def proof(folder: str, options: str) -> Ensure:
        found = bundle(tmp_path / folder, options).ensures
        return next(each for each in found if "GPUs" in each.title)

    def proves(wanted: Ensure) -> list[str]:
        """What is asked until nothing is left to do, and once more."""
        log.write_text("")
        before = shell(wanted.test)
        assert before == 0 or shell(wanted.run) == 0
        assert shell(wanted.test) == 0
        return log.read_text().split()

    first, other = proof("a", "min_gpu_share: 0.5"), proof("b", "num_parallel: 8")
    assert proves(first) == ["on-gpu", "still"]  # no driver is told as one: a folder, a lab
    driver.write_text("NVRM version: 570.86.15\n")
    assert proves(first) == ["on-gpu", "still"]
    assert proves(first) == ["still", "still"], "a restart or a reboot changes nothing"
    assert proves(other) == ["on-gpu", "still"]
    driver.unlink()  # as after a new kernel without its module
    assert proves(other) == ["on-gpu", "still"]
    (tmp_path / "cpu").touch()
    assert shell(other.test) == 1


def test_what_the_model_is_made_of_is_reviewable(tmp_path: Path) -> None:
    found = bundle(tmp_path, "modelfile: {parameters: {stop: ['<|im_end|>']}, system: \"Größe\"}")
    written = file(found, "model.json")
    assert json.loads(written) == {
        "name": "coder",
        "from": "qwen2.5-coder:7b",
        "parameters": {"stop": ["<|im_end|>"]},
        "system": "Größe",
    }
    assert "Größe" in written
    (program,) = [a for a in found.artefacts if a.path.endswith("models.py")]
    assert isinstance(program, Artefact)
    assert program.mode == 0o755
