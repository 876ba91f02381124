"""Flags by release: what guides, issues and old scripts write, and what is said about it."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest
from enginekit import engine
from tools import vllm_cpu

from inferfleet import flags
from inferfleet.flags import advice, tables

__all__ = ["engine"]

WILD = [  # engine, release, arguments from guides and issues, what has to be said
    ("vllm", "0.33.0", "--swap-space 4", "left with 0.18.0; leave it out"),
    ("vllm", "0.32.0", "--disable-log-requests", "requests are not logged unless"),
    ("vllm", "0.32.0", "--device cuda", "left with 0.10.0; leave it out"),
    ("vllm", "0.32.0", "--task embed", "left with 0.13.0; write --runner pooling"),
    ("vllm", "0.12.0", "--guided-decoding-backend xgrammar", "write --structured-outputs-config"),
    ("vllm", "0.20.0", "--rope-scaling {}", "write --hf-overrides"),
    ("vllm", "0.16.0", "--max-seq-len-to-capture 8192", "write --max-cudagraph-capture-size"),
    ("vllm", "0.10.2", "--enable-reasoning --reasoning-parser qwen3", "reasoning_parser alone"),
    ("vllm", "0.10.2", "--num-scheduler-steps 8", "left with 0.10.1; it belonged to the old"),
    ("vllm", "0.9.2", "--speculative-model x --num-speculative-tokens 5", "--speculative-config"),
    ("vllm", "0.8.5", "--worker-use-ray", "write --distributed-executor-backend ray"),
    ("vllm", "0.29.0", "--calculate-kv-scales", "left with 0.28.0; use a checkpoint"),
    ("vllm", "0.20.0", "--disable-frontend-multiprocessing", "left with 0.19.0"),
    ("vllm", "0.16.0", "--shutdown-timeout=60", "not for here: use the option shutdown_timeout"),
    ("vllm", "0.28.0", "--sse-keep-alive-interval 15", "it came with 0.29.0"),
    ("vllm", "0.20.0", "--max-num-queued-reqs 100", "it came with 0.29.0"),
    ("vllm", "0.32.0", "--model Qwen/Qwen3-8B", "comes from the deployment's `model`"),
    ("vllm", "0.32.0", "--config=/etc/vllm.yaml", "hides them from this check"),
    ("vllm", "0.32.0", "--api-key sk-1234", "shows it to all who can list processes"),
    ("vllm", "0.32.0", "--enable-prefix-caching true", "write --no-enable-prefix-caching"),
    ("vllm", "0.32.0", "--gpu-memory-utilisation 0.9", "did you mean --gpu-memory-utilization?"),
    ("vllm", "0.32.0", "--max_model_length 8192", "did you mean --max-model-len"),
    ("vllm", "0.32.0", "--max-num-seqs", "needs a value"),
    ("vllm", "0.32.0", "--max-num-seqs 8 16", "takes one value, but '16'"),
    ("vllm", "0.32.0", "--dtype fp16", "is one of auto, bfloat16, float, float16"),
    ("vllm", "0.10.0", "--kv-cache-dtype nvfp4", "is one of auto, fp8, fp8_e4m3"),
    ("vllm", "0.32.0", "--no-enforce-eager 1", "takes no value"),
    ("vllm", "0.32.0", "serve --enforce-eager", "is there already"),
    ("vllm", "0.32.0", "Qwen/Qwen3-8B", "the model comes from the deployment"),
    ("vllm", "0.32.0", "--gpus all", "tensor_parallel"),
    ("vllm", "0.32.0", "--n-gpu-layers 99", "llama.cpp"),
    ("tgi", "3.3.7", "--messages-api-enabled", "the chat API is always on"),
    ("tgi", "3.3.7", "--quantize gptq-marlin", "is one of awq, bitsandbytes"),
    ("tgi", "3.3.5", "--max-modl-id x", "judged by 3.3.7"),
    ("tgi", "3.3.7", "--num-shard 2", "gpus_per_instance says it"),
    ("tgi", "3.3.7", "--gpu-memory-utilization 0.9", "cuda_memory_fraction"),
]

WILD_VARIABLES = [
    ("ollama", "OLLAMA_GPU", "has never read it; for the CPU alone set gpus_per_instance: 0"),
    ("ollama", "OLLAMA_NUM_GPU", "the parameter num_gpu"),
    ("ollama", "OLLAMA_LLM_BACKEND", "make a vllm deployment"),
    ("ollama", "OLLAMA_VLLM_HOST", "make a vllm deployment"),
    ("ollama", "OLLAMA_MAX_QUEU", "did you mean OLLAMA_MAX_QUEUE?"),
    ("ollama", "OLLAMA_HOST", "the role says where it listens"),
    ("vllm", "VLLM_PORT", "internal ports"),
    ("vllm", "VLLM_MODEL_PATH", "reads no such variable"),
    ("vllm", "VLLM_GPU_MEMORY_UTILIZATION", "use the option gpu_memory_utilization"),
    ("vllm", "VLLM_USE_V1", "left with 0.11.1; there is only one engine"),
    ("vllm", "VLLM_ATTENTION_BACKEND", "left with 0.15.0; write --attention-backend"),
    ("vllm", "VLLM_LOGING_LEVEL", "did you mean VLLM_LOGGING_LEVEL?"),
    ("vllm", "HF_TOKEN", "use hf_token"),
    ("tgi", "API_KEY", "use api_key"),
]

FINE = [
    ("vllm", "0.8.5", "--swap-space 4 --device cuda --disable-log-requests"),
    ("vllm", "0.32.0", "-q awq --no-enable-prefix-caching --max-model-len -1 -O3 -cc.mode 3"),
    ("vllm", "0.32.0", "--max_num_seqs=64 --lora-modules a=/a b=/b --enable-lora"),
    ("vllm", "0.32.0", "--speculative-config.method ngram --compilation-config {}"),
    ("vllm", "0.32.0", "--middleware a --middleware b"),
    ("vllm", "0.33.0", "--disable-log-requests --disable-prefix-caching"),
    ("vllm", "0.17.5", "--swap-space 4"),  # 0.17.1 has it, 0.18.0 does not: it may
    ("tgi", "3.3.7", "--quantize awq --max-total-tokens 8192 --disable-custom-kernels"),
]


@pytest.mark.parametrize(("name", "release", "line", "said"), WILD)
def test_says_what_is_wrong_and_what_to_do(name: str, release: str, line: str, said: str) -> None:
    found = flags.lint(name, release, line.split())
    assert found, "nothing was found"
    assert any(said in finding.message for finding in found), [f.message for f in found]
    assert all(finding.sure for finding in found)


@pytest.mark.parametrize(("name", "variable", "said"), WILD_VARIABLES)
def test_says_which_variables_are_not_read(name: str, variable: str, said: str) -> None:
    release = "3.3.7" if name == "tgi" else "0.32.0"
    (found,) = flags.lint_variables(name, release, [variable])
    assert found.argument == variable
    assert said in found.message


@pytest.mark.parametrize(("name", "release", "line"), FINE)
def test_finds_nothing_wrong_in_what_works(name: str, release: str, line: str) -> None:
    assert flags.lint(name, release, line.split()) == []


def test_leaves_other_programs_variables_alone() -> None:
    names = ["NCCL_DEBUG", "HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE"]
    assert flags.lint_variables("vllm", "0.32.0", names) == []
    assert flags.lint_variables("ollama", "0.32.0", ["OLLAMA_DEBUG", "HTTPS_PROXY"]) == []


def test_is_not_sure_about_releases_it_has_not_seen() -> None:
    (unknown,) = flags.lint("vllm", "1.4.0", ["--quantum"])
    assert not unknown.sure
    assert "judged by 0.33.0" in unknown.message
    (gone,) = flags.lint("vllm", "1.4.0", ["--swap-space", "4"])
    assert gone.sure


def test_says_which_releases_judged_one_in_between() -> None:
    (found,) = flags.lint("vllm", "0.8.5.post1", ["--quantum"])
    assert found.sure
    assert "judged by 0.8.5 and 0.9.0" in found.message


def test_a_role_may_say_only_what_both_neighbours_know() -> None:
    assert flags.has("vllm", "0.18.0", "--shutdown-timeout")
    assert not flags.has("vllm", "0.17.1", "--shutdown-timeout")
    assert not flags.has("vllm", "0.17.5", "--shutdown-timeout")


def test_knows_at_least_ten_releases_and_each_has_its_flags() -> None:
    known = tables.table("vllm")
    wanted = {"0.8.5", "0.9.2", "0.10.2", "0.11.2", "0.12.0", "0.14.1", "0.16.0", "0.18.0"}
    assert wanted | {"0.20.0", "0.22.0", "0.25.0", "0.29.0", "0.31.0", "0.32.0", "0.33.0"} <= set(
        known.releases
    )
    assert list(known.releases) == sorted(known.releases, key=tables.release)
    for index in range(len(known.releases)):
        count = sum(any(s.first <= index <= s.last for s in own) for own in known.flags.values())
        assert count > 140, known.releases[index]


@pytest.mark.parametrize("name", ["vllm", "tgi", "ollama"])
def test_advises_only_what_the_newest_release_has(name: str) -> None:
    known = tables.table(name)
    newest = len(known.releases) - 1
    texts = [*advice.INSTEAD[name].values(), *advice.VARIABLES[name].values()]
    for text in texts:
        for flag in re.findall(r"write (--?[a-z0-9-]+)", text):
            assert any(span.last == newest for span in known.flags.get(flag, ())), text


@pytest.mark.parametrize("name", ["vllm", "tgi"])
def test_every_flag_that_left_has_advice_or_is_not_worth_any(name: str) -> None:
    known = tables.table(name)
    gone = {n for n, own in known.flags.items() if own[-1].last < len(known.releases) - 2}
    unadvised = {n for n in gone if n.startswith("--")} - set(advice.INSTEAD[name])
    assert len(unadvised) < 15, sorted(unadvised)


PARSER = """
import json
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
serve = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers(dest="x"))
print("\\n" + json.dumps([
    [a.option_strings, a.nargs, hasattr(a, "format_usage") and any(
        o.startswith("--no-") for o in a.option_strings),
     None if a.choices is None else [str(c) for c in a.choices if c is not None]]
    for a in serve._actions if a.option_strings]))
"""


@pytest.mark.engine
def test_agrees_with_the_parser_of_the_installed_engine(engine: vllm_cpu.Engine) -> None:
    """Every option of it is known, with what it takes; and no other is."""
    argv = [str(engine.python), "-c", PARSER]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    actions: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    known, seen = tables.table("vllm"), set()
    for names, nargs, negatable, choices in actions:
        for name in names:
            if negatable and name not in known.flags:
                name = "--" + name.removeprefix("--no-")
            span = known.span(known.flags.get(name, ()), vllm_cpu.VERSION)
            assert span, name
            assert span.kind == _kind(nargs, negatable), name
            assert not span.values or set(choices or ()) <= set(span.values), name
            seen.add(name)
    index = known.near(vllm_cpu.VERSION)[0]
    assert {
        n for n, own in known.flags.items() if any(s.first <= index <= s.last for s in own)
    } == seen


def _kind(nargs: object, negatable: bool) -> str:
    if negatable:
        return "toggle"
    return {"0": "switch", "?": "maybe", "+": "list", "*": "list"}.get(str(nargs), "value")
