"""The tasks fit, recommend and size, run as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import make
import pytest
import yaml
from invoke.context import Context
from invoke.exceptions import Exit

from inferfleet import charts, cli, hub
from inferfleet.capacity import GIB, CapacityError
from inferfleet.project import Project
from inferfleet.render import Renderer
from inferfleet.secrets import Masked

TOOL = Path(sys.executable).with_name("inferfleet")
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)


def run(*words: str, code: int = 0) -> str:
    """What a task prints; it is called as the command line calls it, in this process."""
    name, options, left = words[0], {}, list(words[1:])
    while left:
        option, separator, value = left.pop(0).removeprefix("--").partition("=")
        if option != "json":
            value = value if separator else left.pop(0)
        options[option.replace("-", "_")] = value if option != "json" else True
    ended = 0
    with redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as errors:
        try:
            getattr(cli, name)(Context(), **options)
        except Exit as how:
            ended = how.code
    assert ended == code, said.getvalue() + errors.getvalue()
    return said.getvalue() + errors.getvalue()


def answer(*words: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run(*words, "--json", code=code))


def test_the_command_line_takes_the_options() -> None:
    done = subprocess.run(
        [TOOL, *FIT, "--context", "32768", "--kv-dtype=fp8", "--eager"],
        text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert "32768 tokens of context" in done.stdout


FIT = ("fit", "--model", "Qwen2.5-Coder-32B-Instruct-AWQ", "--gpu", "L40S")


def test_fit_adds_up_and_says_what_is_carried() -> None:
    found = answer(*FIT, "--count", "4", "--context", "32768", "--users", "20")
    assert found["ok"]
    assert found["quantization"] == "awq"
    assert abs(sum(found["memory"].values()) - found["gpu_memory"]) < GIB // 1000
    assert found["requests"] == 4 * int(found["concurrency"])
    assert found["enough"] is (found["requests"] >= 20)
    low, high = found["kv_tokens_range"]
    assert low <= found["kv_tokens"] <= high


def test_fit_in_words_has_the_bar_and_bounds() -> None:
    said = run(*FIT, "--context", "32768")
    (bar,) = [line for line in said.splitlines() if line.startswith("[")]
    assert len(bar.partition("]")[0]) == charts.WIDTH + 1
    assert "No faster than (a bound, not a promise)" in said
    assert "█ weights" in said


def test_fit_uses_the_fewest_gpus_that_do() -> None:
    words = ("fit", "--model", "Llama-3.3-70B-Instruct", "--gpu", "H100", "--context", "8192")
    assert answer(*words, "--count", "8")["tensor_parallel"] == 4
    assert answer(*words, "--count", "8")["instances"] == 2
    assert answer(*words, "--count", "8", "--tensor-parallel", "8")["instances"] == 1


def test_what_does_not_fit_ends_with_1_and_a_remedy_that_fits() -> None:
    words = ("fit", "--model", "Llama-3.1-8B-Instruct", "--gpu", "RTX 4090")
    found = answer(*words, code=1)
    assert found["verdict"] == "does not fit"
    options = found["remedies"][0]["options"]
    names = {"max-model-len": "context", "max-num-seqs": "sequences", "kv-cache-dtype": "kv-dtype",
             "max-num-batched-tokens": "batched-tokens", "gpu-memory-utilization": "utilization",
             "quantization": "quantization"}  # fmt: skip
    changed = [word for name, value in options.items() for word in (f"--{names[name]}", str(value))]
    assert answer(*words, *changed)["verdict"] == "fits"


@pytest.mark.parametrize(
    ("words", "code", "rule"),
    [
        (["--memory=-4"], 1, "must be positive"),
        (["--tensor-parallel", "3", "--count", "3"], 1, "must divide its 40 attention heads"),
        (["--context", "99999999"], 1, "past the model's limit"),
        (["--context=-1"], 1, "--context must be at least 1"),
        (["--count", "0"], 1, "--count must be at least 1"),
        (["--users", "many"], 2, "--users is a whole number, not 'many'"),
        (["--memory", "nan"], 1, "must be positive"),
        (["--utilization", "1.5"], 1, "must be above 0 and at most 1"),
        (["--quantization", "q3"], 1, "unknown quantization 'q3'"),
        (["--kv-dtype", "int1"], 1, "unknown KV cache type 'int1'"),
        (["--engine-version", "newest"], 1, "names no engine version"),
        (["--tensor-parallel", "4", "--count", "2"], 1, "takes 4 GPUs, and there are 2"),
    ],
)
def test_nonsense_is_one_line_that_names_the_rule(words, code, rule) -> None:
    said = run(*FIT, *words, code=code)
    assert rule in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "rule"),
    [
        (["fit", "--gpu", "L40S"], 2, "say --model"),
        (["fit", "--model", "Qwen3-8B"], 2, "say --gpu"),
        (["fit", "--model", "Qwen3-8B", "--gpu", "L40Z"], 1, "unknown GPU 'L40Z'; did you mean"),
        (["fit", "--model", "Qwen3-8C", "--gpu", "L40S"], 1, "did you mean Qwen/Qwen3-8B?"),
        (["fit", "--model", "x/y", "--gpu", "L4"], 1, f"{NOWHERE} cannot be reached"),
        (["fit", "--model", "./none", "--gpu", "L4"], 1, "cannot be read"),
        (["fit", "--model", "gpt-oss-20b", "--gpu", "T4"], 1, "needs compute capability"),
        (["recommend"], 2, "either --gpu or --host"),
        (["recommend", "--gpu", "L4", "--task", "art"], 1, "no model is made for 'art'"),
        (["size", "--model", "Qwen3-8B", "--users", "0"], 1, "--users must be at least 1"),
        (["size", "--model", "Llama-3.3-70B-Instruct", "--gpu", "T4", "--gpus-per-host", "1"], 1,
         "fits on no host of up to 1 x T4"),
    ],
)  # fmt: skip
def test_other_nonsense(words, code, rule) -> None:
    said = run(*words, code=code)
    assert rule in said
    assert len(said.splitlines()) == 1


def test_recommend_orders_what_carries_the_users() -> None:
    found = answer("recommend", "--gpu", "L40S", "--count", "2", "--users", "8", "--task", "code")
    assert len(found["recommendations"]) > 3
    for each in found["recommendations"]:
        assert each["requests"] >= 8
        assert each["bounds"]["decode_tokens_per_second_at_most"] >= 8
    assert found["next_larger"]["gpu"]
    said = run("recommend", "--gpu", "L40S", "--users", "8")
    assert "no faster than (a bound, not a promise)" in said
    assert "The next larger GPU" in said


def test_what_is_recommended_fits() -> None:
    """The same question asked of fit has the same answer."""
    best = answer("recommend", "--gpu", "H100", "--users", "8")["recommendations"][0]
    options = {"max_model_len": "context", "max_num_seqs": "sequences",
               "max_num_batched_tokens": "batched-tokens"}  # fmt: skip
    words = [w for k, v in best["options"].items() if k in options for w in
             (f"--{options[k]}", str(v))]  # fmt: skip
    quantization = ("--quantization", best["quantization"]) if best["quantization"] else ()
    found = answer("fit", "--model", best["model"], "--gpu", "H100", *words, *quantization)
    assert (found["verdict"], found["requests"]) == ("fits", best["requests"])


def hosts(folder: Path) -> Path:
    gpus = [{"model": "L4"}, {"model": "L40S", "count": 2}]
    machines = {
        "gpu": {"address": "192.0.2.1", "gpus": gpus},
        "cpu": {"address": "192.0.2.2", "ram_gib": 32},
        "bare": {"address": "192.0.2.3"},
    }
    return make.write(folder, hosts=yaml.safe_dump({"hosts": machines}))


def test_recommend_for_a_host_of_the_inventory(tmp_path: Path) -> None:
    where = ("--inventory", str(hosts(tmp_path)))
    assert answer("recommend", "--host", "gpu", *where)["where"] == "gpu, 2 x L40S"
    on_cpu = answer("recommend", "--host", "cpu", "--task", "code", *where)["recommendations"]
    assert {each["engine"] for each in on_cpu} == {"ollama"}
    assert "does not say its ram_gib" in run("recommend", "--host", "bare", *where, code=1)
    assert "did you mean gpu?" in run("recommend", "--host", "gqu", *where, code=2)


@pytest.mark.parametrize("users", [4, 400])
def test_a_sized_phase_checks_and_renders(tmp_path: Path, users: int) -> None:
    """The file of `size`, with hosts filled in, is an inventory; it carries the users it says."""
    file = tmp_path / "inventory" / "sized.yml"
    file.parent.mkdir()
    words = ("size", "--model", "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ", "--context", "16384")
    found = answer(*words, "--users", str(users), "--gpu", "L40S", "--output", str(file))
    (size,) = found["sizes"]
    assert size["requests"] >= users
    made = yaml.load(file.read_text(), Loader=_Loose)
    ((phase, entry),) = made["phases"].items()
    machines = {
        f"h{n}": {"address": f"192.0.2.{n + 1}", "groups": [phase], "gpus": [
            {"model": "L40S", "count": 8}]}
        for n in range(size["hosts"])
    }  # fmt: skip
    for edge in set(entry["hosts"]) - {phase}:
        machines["edge"] = {"address": "192.0.2.200", "groups": [edge]}
    make.write(tmp_path, hosts=yaml.safe_dump({"hosts": machines}))
    project = Project(file.parent)
    plan = project.plan(phase)
    assert len(list(plan.instances())) == size["instances"]
    assert project.inventory.warnings == ()
    renderer = Renderer(project.library, Masked())
    assert all(renderer.bundle(plan, host).artefacts for host in plan.hosts)


class _Loose(yaml.SafeLoader):
    """Reads references to secrets as their names."""


_Loose.add_constructor("!env", lambda loader, part: loader.construct_scalar(part))


# Models of a repository

CONFIG = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 14336,
          "max_position_embeddings": 131072}  # fmt: skip


class _Hub(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {
        "/example/own/resolve/main/config.json": json.dumps(CONFIG).encode(),
        "/example/own/resolve/main/model.safetensors.index.json": json.dumps(
            {"metadata": {"total_size": 16_060_522_496}}
        ).encode(),
        "/example/small/resolve/main/config.json": json.dumps(CONFIG).encode(),
        "/example/broken/resolve/main/config.json": b"<html>",
    }
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Authorization", ""))
        found = self.files.get(self.path)
        closed = self.path.startswith("/example/closed/")
        self.send_response(403 if closed else 200 if found else 404)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address
        server.shutdown()
        thread.join()


def test_a_model_is_read_from_its_repository(endpoint: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "t0k3n")
    _Hub.asked.clear()
    found = hub.find("example/own")
    assert (found.dimensions.layers, found.weights) == (32, 16_060_522_496)
    assert hub.find("example/small").weights is None
    assert set(_Hub.asked) == {"Bearer t0k3n"}


@pytest.mark.parametrize(
    ("name", "why"),
    [("example/none", "has none"), ("example/closed", "HF_TOKEN"), ("example/broken", "JSON")],
)
def test_a_repository_that_tells_nothing_is_said(endpoint: str, name: str, why: str) -> None:
    with pytest.raises(CapacityError, match=why):
        hub.find(name)


def test_a_model_is_read_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for where in (tmp_path, tmp_path / "config.json"):
        assert hub.find(str(where)).dimensions.kv_heads == 8


# What check and plan print


def served(folder: Path, **options: Any) -> tuple[str, str]:
    """An inventory with an 8B model on a host that nobody answers for, as an option."""
    host = {"address": "127.0.0.1", "port": 9, "gpus": [{"model": "L4", "count": 2}]}
    deployment = {"engine": "vllm", "model": "m", "hosts": ["h"], "port": 8000,
                  "instances": 2, "options": options}  # fmt: skip
    whole = {
        "hosts": {"h": host},
        "models": {"m": {"repository": "meta-llama/Llama-3.1-8B-Instruct"}},
        "deployments": {"d": deployment},
        "phases": {"p": {"users": 7, "why": "w", "hosts": ["h"], "deployments": ["d"]}},
    }
    return "--inventory", str(make.write(folder, fleet=yaml.safe_dump(whole, sort_keys=False)))


def test_check_warns_and_is_fine(tmp_path: Path) -> None:
    tight = answer("fit", "--model", "Llama-3.1-8B-Instruct", "--gpu", "L4", "--context", "4096",
                   "--engine-version", "0.32.0")["kv_tokens"]  # fmt: skip
    where = served(tmp_path, max_model_len=tight // 1024 * 1024)
    said = run("check", *where)
    assert "fine (1 hosts" in said
    assert "deployments.d: warning: tight on 1 x L4 of h" in said
    (problem,) = answer("check", *where)["problems"]
    assert problem["warning"] is True


def test_plan_says_what_is_carried_and_where_it_was_placed(tmp_path: Path) -> None:
    where = served(tmp_path, max_model_len=8192)
    said = run("plan", *where, "--phase", "p", code=1)
    assert "d placed: h GPUs 0 | 1" in said
    assert "d: 2 instances on 1 x L4, expected to carry" in said
    assert "the phase is for 7 users" in said
    (found,) = answer("plan", *where, "--phase", "p", code=1)["capacity"]
    assert (found["verdict"], found["users"], found["instances"]) == ("fits", 7, 2)


def test_render_writes_the_placement_to_its_index(tmp_path: Path) -> None:
    where = served(tmp_path, max_model_len=8192)
    run("render", *where, "--phase", "p", "--output", str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [(i["name"], i["port"], i["gpus"]) for i in index["hosts"]["h"]["instances"]] == [
        ("d-0", 8000, [0]),
        ("d-1", 8001, [1]),
    ]
