"""What check and plan say of a deployment's memory, and what running engines teach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import make
import pytest
import yaml

from inferfleet import calibration, capacity, outlook, outlook_lines, sizing
from inferfleet.capacity import GIB, CapacityError
from inferfleet.errors import InventoryError
from inferfleet.model import Instance
from inferfleet.project import Project
from inferfleet.verify import memory

CODER_32B = {"repository": "Qwen/Qwen2.5-Coder-32B-Instruct"}
LLAMA_8B = {"repository": "meta-llama/Llama-3.1-8B-Instruct"}


def fleet(folder: Path, *, gpus="L40S", model=None, own=None, more=None, **options) -> Project:
    """A project with one vLLM deployment, one host and one phase of ten users."""
    deployment = {
        "engine": "vllm", "model": "m", "hosts": ["h"], "port": 8000, "options": options,
        **(own or {}),
    }  # fmt: skip
    whole = {
        "hosts": {"h": {"address": "192.0.2.1", "gpus": [{"model": gpus, "count": 2}]}},
        "models": {"m": model or LLAMA_8B},
        "deployments": {"d": deployment},
        "phases": {"p": {"users": 10, "why": "w", "hosts": ["h"], "deployments": ["d"]}},
        **(more or {}),
    }
    return make.project(folder, fleet=yaml.safe_dump(whole, sort_keys=False))


def refused(project: Project) -> str:
    """The one problem of an inventory."""
    with pytest.raises(InventoryError) as caught:
        _ = project.inventory
    (problem,) = caught.value.problems
    return str(problem)


def judged(project: Project) -> outlook.Judgement:
    (found,) = outlook.outlooks(project.plan("p"), project.inventory)
    return found.judgement


def instance(project: Project) -> Instance:
    return next(iter(project.plan("p").instances()))


def test_what_does_not_fit_is_refused_at_its_deployment(tmp_path: Path) -> None:
    said = refused(fleet(tmp_path, model=CODER_32B, max_model_len=16384))
    assert "deployments.d: does not fit on 1 x L40S of h (phase p): the weights alone" in said
    assert said.endswith("Smallest change: spread it over 2 GPUs (gpus_per_instance: 2)")
    changed = {"own": {"gpus_per_instance": 2}, "max_model_len": 16384}
    assert judged(fleet(tmp_path / "b", model=CODER_32B, **changed)).verdict == "fits"


def test_a_change_names_options_that_the_inventory_knows(tmp_path: Path) -> None:
    """The smallest change is computed; followed to the letter, the warning is gone."""
    asked = {"max_model_len": 60000, "gpu_memory_utilization": 0.9}
    found = judged(fleet(tmp_path, gpus="RTX 4090", own={"if_too_large": "warn"}, **asked))
    assert found.verdict in ("tight", "does not fit")
    options = dict(yaml.safe_load("{" + found.remedy.rpartition("(")[2].rstrip(")") + "}"))
    assert options
    changed = fleet(tmp_path / "b", gpus="RTX 4090", **{**asked, **options})
    assert judged(changed).verdict == "fits"


def tight(folder: Path) -> Project:
    """A context with which the pool holds one request and hardly more."""
    setup = sizing.setup(
        instance(fleet(folder / "x", gpus="RTX 4090", max_model_len=4096)),
        sizing.Shape(capacity.model(LLAMA_8B["repository"])),
        capacity.gpu("RTX 4090"),
    )
    tokens = capacity.predict(setup).kv_tokens // 1024 * 1024
    assert capacity.predict(replace(setup, context=tokens)).verdict == "tight"
    return fleet(folder, gpus="RTX 4090", max_model_len=tokens)


def test_what_hardly_fits_is_a_warning_and_stops_nothing(tmp_path: Path) -> None:
    (warning,) = tight(tmp_path).inventory.warnings
    assert warning.warning
    assert "deployments.d: warning: tight on 1 x RTX 4090 of h (phase p)" in str(warning)


def test_whoever_knows_better_may_only_be_warned(tmp_path: Path) -> None:
    (warning,) = fleet(tmp_path, model=CODER_32B, own={"if_too_large": "warn"}).inventory.warnings
    assert "does not fit" in warning.message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model": {"repository": "example/unheard-of"}}, "is not in the model catalogue"),
        ({"gpus": "Example 9000"}, "unknown GPU 'Example 9000'"),
        ({"model": {"repository": "/srv/models/own"}}, "'own' is not in the model catalogue"),
        ({"quantization": "compressed-tensors"}, "unknown quantization 'compressed-tensors'"),
        ({"own": {"gpus_per_instance": 0}}, "nothing is known of vllm's memory"),
    ],
)
def test_what_is_not_known_is_said_in_plan_and_is_no_error(tmp_path, settings, reason) -> None:
    project = fleet(tmp_path, **settings)
    assert project.inventory.warnings == ()
    (found,) = outlook.outlooks(project.plan("p"), project.inventory)
    assert found.judgement.verdict == "unknown"
    assert reason in outlook_lines.line(found, 10)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"max_model_len": 200_000}, "past the model's limit of 131072 tokens"),
        ({"gpus": "T4", "model": {"repository": "openai/gpt-oss-20b"}}, "needs compute capability"),
        ({"max_num_seqs": 512, "max_num_batched_tokens": 256}, "must be at least max_num_seqs"),
    ],
)
def test_what_no_engine_starts_is_refused_with_its_rule(tmp_path, settings, rule) -> None:
    said = refused(fleet(tmp_path, **settings))
    assert "impossible on 1 x" in said
    assert rule in said


def test_a_context_that_was_stretched_knowingly_is_not_refused(tmp_path: Path) -> None:
    model = {**LLAMA_8B, "context_length": 200_000}
    assert (
        judged(fleet(tmp_path, gpus="B200", model=model, max_model_len=200_000)).verdict == "fits"
    )


def test_extra_arguments_win_over_options(tmp_path: Path) -> None:
    words = ["--max-model-len=4k", "--max_num_seqs", "16", "--enforce-eager", "--disable-log-stats"]
    project = fleet(tmp_path, own={"extra_args": words}, max_model_len=9000)
    setup = sizing.setup(
        instance(project),
        sizing.Shape(capacity.model(LLAMA_8B["repository"])),
        capacity.gpu("L40S"),
    )
    assert (setup.context, setup.sequences, setup.eager) == (4000, 16, True)


def test_rehearsals_say_nothing_of_memory(tmp_path: Path) -> None:
    project = fleet(tmp_path)
    assert outlook.outlooks(project.plan("p", rehearse=True), project.inventory) == ()


def test_plan_says_requests_next_to_users(tmp_path: Path) -> None:
    project = fleet(tmp_path, own={"instances_per_host": 2}, max_model_len=8192)
    (found,) = outlook.outlooks(project.plan("p"), project.inventory)
    each = found.judgement
    assert found.requests == 2 * each.requests
    assert each.spread[0] <= each.requests <= each.spread[1]
    said = outlook_lines.line(found, 10)
    assert f"carry {found.requests} requests of 8192 tokens at once" in said
    assert said.endswith("the phase is for 10 users")


# Models that are in no catalogue

SHAPE = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "vocab": 128256,
         "intermediate": 14336, "context": 131072}  # fmt: skip
CONFIG = {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
          "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 14336,
          "max_position_embeddings": 131072, "torch_dtype": "bfloat16"}  # fmt: skip


def test_dimensions_by_hand_are_as_good_as_the_catalogues(tmp_path: Path) -> None:
    own = fleet(tmp_path / "a", model={"repository": "example/own", "dimensions": SHAPE})
    known = fleet(tmp_path / "b")
    assert abs(judged(own).kv_tokens / judged(known).kv_tokens - 1) < 0.01


def test_dimensions_come_from_a_config(tmp_path: Path) -> None:
    model = {"repository": "example/own", "config": "shapes/own/config.json"}
    project = fleet(tmp_path, model=model, max_model_len=8192)
    shapes = tmp_path / "inventory" / "shapes" / "own"
    shapes.mkdir(parents=True)
    (shapes / "config.json").write_text(json.dumps(CONFIG))
    assert judged(project).verdict == "fits"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"config": "nowhere.json"}, "models.m.config: "),
        ({"dimensions": {**SHAPE, "kv_heads": 5}}, "32 heads cannot share 5 KV heads"),
        ({"dimensions": {**SHAPE, "layer": 1}}, "models.m.dimensions.layer: unknown key"),
    ],
)
def test_dimensions_that_tell_nothing_are_a_problem(tmp_path, model, said) -> None:
    assert said in refused(fleet(tmp_path, model={"repository": "example/own", **model}))


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("qwen2.5-coder:7b", "Qwen/Qwen2.5-Coder-7B-Instruct"),
        ("qwen2.5-coder:32b-instruct-q8_0", "Qwen/Qwen2.5-Coder-32B-Instruct"),
        ("llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gpt-oss:20b", "openai/gpt-oss-20b"),
    ],
)
def test_ollama_tags_are_found_in_the_catalogue(tag: str, name: str) -> None:
    assert sizing.by_tag(tag).name == name


@pytest.mark.parametrize("tag", ["nothing:7b", "qwen2.5-coder:7", ":", "llama3.1:latest"])
def test_other_tags_are_not_guessed(tag: str) -> None:
    with pytest.raises(CapacityError):
        sizing.by_tag(tag)


# Ollama


def ollama(folder: Path, *, gpu="RTX 4070", ram=16, tag="qwen2.5-coder:7b", **options) -> Project:
    host = {"address": "192.0.2.1", "ram_gib": ram, "gpus": [{"model": gpu}] if gpu else []}
    own = {"engine": "ollama", "gpus_per_instance": 1 if gpu else 0}
    return fleet(
        folder, model={"repository": tag}, own=own, more={"hosts": {"h": host}}, **options
    )  # fmt: skip


def test_ollama_on_the_gpu_on_both_and_nowhere(tmp_path: Path) -> None:
    assert judged(ollama(tmp_path / "a", context_length=8192)).verdict == "fits"
    (warning,) = ollama(tmp_path / "b", tag="qwen2.5-coder:32b", ram=64).inventory.warnings
    assert "of 64 layers find room on the GPU" in warning.message
    assert "does not fit" in refused(ollama(tmp_path / "c", tag="llama3.3:70b"))
    assert judged(ollama(tmp_path / "d", gpu="", context_length=8192)).verdict == "fits"


# What running engines teach

METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="NUMBER"} 1.0
"""


def test_the_cache_is_read_from_metrics() -> None:
    assert memory.cache_tokens(METRICS.replace("NUMBER", "1000")) == 16000
    assert memory.cache_tokens(METRICS.replace("NUMBER", "1001"), groups=2) == 8000
    newer = METRICS.replace('block_size="16"', 'block_size="16",kv_cache_size_tokens="777"')
    assert memory.cache_tokens(newer) == 777
    assert memory.cache_tokens(METRICS.replace("NUMBER", "None")) is None
    assert memory.cache_tokens("") is None


def test_a_calibrated_prediction_is_what_the_engine_reported(tmp_path: Path) -> None:
    project = fleet(tmp_path, max_model_len=8192)
    before = judged(project).kv_tokens
    reported = before - 4000 - before % 16
    metrics = METRICS.replace("NUMBER", str(reported // 16))
    tokens, seen = memory.vllm_observed(instance(project), project.inventory, metrics)
    assert tokens == reported // 16 * 16
    assert seen is not None
    assert seen.key == f"h/L40S/m/vllm {instance(project).options['version']}"
    assert calibration.record(project.folder, [seen]) == 1
    assert calibration.record(project.folder, [seen]) == 0
    again = Project(project.folder)
    assert abs(judged(again).kv_tokens - tokens) <= 16
    assert memory.vllm_observed(instance(again), again.inventory, metrics)[1] is not None
    other = fleet(tmp_path, max_model_len=8192, version="0.11.0")
    assert abs(judged(other).kv_tokens - before) > 0  # another release is not corrected by it
    assert outlook.corrected(instance(other), other.inventory.calibration,
                             capacity.gpu("L40S")) == 0  # fmt: skip


def test_what_is_too_far_off_teaches_nothing(tmp_path: Path) -> None:
    project = fleet(tmp_path, max_model_len=8192)
    metrics = METRICS.replace("NUMBER", "1000")
    tokens, seen = memory.vllm_observed(instance(project), project.inventory, metrics)
    assert (tokens, seen) == (16000, None)


def test_ollama_teaches_too(tmp_path: Path) -> None:
    project = ollama(tmp_path, context_length=8192)
    expected = outlook.ollama_of(instance(project), project.inventory).prediction.total
    loaded = {"name": "m", "size": expected + GIB // 2, "size_vram": expected}
    seen = memory.ollama_observed(instance(project), project.inventory, loaded)
    assert seen is not None
    assert seen.correction == GIB // 2
    calibration.record(project.folder, [seen])
    again = Project(project.folder)
    assert outlook.ollama_of(instance(again), again.inventory).learned == GIB // 2


def test_the_most_that_was_seen_counts(tmp_path: Path) -> None:
    seen = [calibration.Observed("k", 1, 1, extra) for extra in (5, 9, -3)]
    calibration.record(tmp_path, seen)
    assert calibration.load(tmp_path) == {"k": 9}


@pytest.mark.parametrize("text", ["{", "[]", '{"k": {}}', '{"k": {"correction": "much"}}'])
def test_a_broken_calibration_is_a_problem(tmp_path: Path, text: str) -> None:
    project = fleet(tmp_path)
    (project.folder / calibration.FILE).write_text(text)
    assert "calibration.json: is not what verify wrote" in refused(project)


def cut(folder: Path, *profiles: str, **settings) -> Project:
    """The same on one H200 that is cut into slices."""
    project = fleet(folder, **settings)
    path = Path(project.folder) / "fleet.yml"
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole["hosts"]["h"]["gpus"] = [{"model": "H200", "mig": list(profiles)}]
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return Project(project.folder)


def test_slices_are_predicted_one_by_one(tmp_path: Path) -> None:
    own = {"instances_per_host": 2}
    project = cut(tmp_path, "3g.71gb", "3g.71gb", own=own, max_model_len=16384)
    (found,) = outlook.outlooks(project.plan("p"), project.inventory)
    assert (found.gpu, found.instances) == ("1 x H200 MIG 3g.71gb", 2)
    alone = capacity.Setup(
        capacity.model(LLAMA_8B["repository"]),
        capacity.gpu("H200 MIG 3g.71gb"),
        context=16384,
        version=instance(project).options["version"],
    )
    assert found.judgement.verdict == "fits"
    assert found.judgement.requests == capacity.carried(capacity.predict(alone))


def test_what_is_too_large_for_a_slice_is_refused_without_splitting_it(tmp_path: Path) -> None:
    said = refused(cut(tmp_path, "1g.18gb", "1g.18gb", max_model_len=8192))
    assert "does not fit on 1 x H200 MIG 1g.18gb of h (phase p): the weights alone" in said
    assert said.endswith("Smallest change: use fp8 weights (quantization: fp8)")


@pytest.mark.parametrize("own", [{}, {"engine": "ollama"}, {"instances": 1}])
def test_an_instance_over_two_slices_is_refused_with_a_remedy(tmp_path: Path, own) -> None:
    asked = {"gpus_per_instance": 2, **own}
    said = refused(cut(tmp_path, "3g.71gb", "3g.71gb", own=asked))
    assert "deployments.d.gpus_per_instance: 2 GPUs for each instance, and h has H200 MIG" in said
    assert "gpus_per_instance: 1 with a larger slice or a smaller model, or whole GPUs" in said


def test_a_profile_that_is_in_no_table_is_not_predicted(tmp_path: Path) -> None:
    project = cut(tmp_path, "2g.70gb")
    assert "no MIG profile '2g.70gb' of H200; it has 1g.18gb" in judged(project).reason
