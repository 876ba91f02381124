"""The formulas one by one, engine defaults by release, the catalogue, and nonsense."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from inferfleet.capacity import (
    GIB,
    CapacityError,
    Setup,
    correction,
    from_config,
    from_folder,
    gpu,
    gpus,
    model,
    models,
    predict,
    quantization,
    with_memory,
)
from inferfleet.capacity.engines import batch_defaults, parse_release, rules
from inferfleet.capacity.overhead import captured_sizes, sampler_peak, token_peak
from inferfleet.capacity.shard import rotary_bytes, shard
from inferfleet.errors import Error

BF16 = quantization("bf16")


@pytest.mark.parametrize(
    ("name", "tp", "tokens", "gib"),
    [
        ("Qwen3-235B-A22B-Instruct-2507", 4, 262144, 11.75),
        ("granite-3.3-8b-instruct", 1, 32768, 5.00),
        ("Qwen3-4B", 1, 40960, 5.62),
        ("Qwen2.5-7B-Instruct", 1, 32768, 1.75),
    ],
)
def test_what_vllm_says_one_request_needs(name: str, tp: int, tokens: int, gib: float) -> None:
    """ "X GiB KV cache is needed", as logged, to the digit."""
    setup = Setup(model(name), gpu("H100"), context=tokens, tensor_parallel=tp, version="0.11.0")
    assert int(predict(setup).needed / GIB * 100) / 100 == gib


@pytest.mark.parametrize(
    ("name", "tp", "expected"),
    [
        ("Llama-3.1-8B-Instruct", 1, 131072),
        ("Llama-3.1-8B-Instruct", 8, 16384),
        ("Qwen2.5-7B-Instruct", 4, 14336),
        ("DeepSeek-V3", 1, 61 * 576 * 2),
        ("DeepSeek-V3", 8, 61 * 576 * 2),
        ("gpt-oss-20b", 1, 49152),
    ],
)
def test_kv_bytes_of_a_token(name: str, tp: int, expected: int) -> None:
    setup = Setup(model(name), gpu("H200"), context=4096, tensor_parallel=tp, version="0.11.0")
    assert predict(setup).kv_token_bytes == expected


def test_kv_heads_are_copied_once_there_are_more_gpus() -> None:
    """Four KV heads on eight GPUs: each keeps one whole head."""
    qwen = model("Qwen3-30B-A3B")
    four = predict(Setup(qwen, gpu("H100"), tensor_parallel=4)).kv_token_bytes
    assert predict(Setup(qwen, gpu("H100"), tensor_parallel=8)).kv_token_bytes == four


def test_latent_cache_was_padded_in_0_7() -> None:
    padded = Setup(model("DeepSeek-V3"), gpu("H200"), tensor_parallel=8, version="0.7.2")
    assert predict(padded).kv_token_bytes == 61 * 640 * 2
    assert predict(replace(padded, version="0.8.5")).kv_token_bytes == 61 * 576 * 2


def test_fp8_cache_halves_a_token() -> None:
    setup = Setup(model("Qwen3-8B"), gpu("L40S"), context=8192)
    half = predict(replace(setup, kv_dtype="fp8"))
    assert half.kv_token_bytes * 2 == predict(setup).kv_token_bytes


def test_sliding_layers_only_keep_their_window() -> None:
    """gpt-oss-20b: 12 full layers of 131072 tokens are 3.0 GiB; 12 sliding ones add a batch."""
    setup = Setup(model("gpt-oss-20b"), gpu("H100"), version="0.11.0", batched_tokens=2048)
    assert 3.0 * GIB < predict(setup).needed < 3.1 * GIB
    every_layer = predict(replace(setup, version="0.8.5")).needed
    assert every_layer == 6 * GIB


@pytest.mark.parametrize(("version", "layers"), [("0.8.5", 62), ("0.11.0", 70), ("0.10.2", 70)])
def test_reported_tokens_charge_padded_groups(version: str, layers: int) -> None:
    """gemma-3-27b: 10 full and 52 sliding layers become seven groups of ten."""
    setup = Setup(model("gemma-3-27b-it"), gpu("H100"), "fp8", 8192, version=version)
    prediction = predict(setup)
    per_layer = 2 * 16 * 128 * 2
    assert prediction.kv_tokens == pytest.approx(
        prediction.expected.pool / (layers * per_layer), rel=1e-3
    )


def test_tokens_are_concurrency_times_length_since_0_22() -> None:
    setup = Setup(model("gpt-oss-20b"), gpu("H100"), version="0.22.0")
    prediction = predict(setup)
    assert prediction.kv_tokens == int(prediction.concurrency * prediction.context)


def test_rotary_table_explains_what_loading_logs() -> None:
    """Llama-3.1-8B logged 14.9888 GiB: the parameters and the table of 131072 positions."""
    llama = model("Llama-3.1-8B-Instruct")
    assert rotary_bytes(llama) == 131072 * 128 * 2
    assert shard(llama, BF16).weight_bytes / GIB == pytest.approx(14.9888, abs=0.001)


@pytest.mark.parametrize(("name", "logged"), [("gpt-oss-120b", 65.9651), ("gpt-oss-20b", 13.72)])
def test_mxfp4_is_padded_for_its_kernel(name: str, logged: float) -> None:
    held = shard(model(name), quantization("mxfp4")).weight_bytes / GIB
    assert held == pytest.approx(logged, rel=0.01)


@pytest.mark.parametrize(("tokens", "logged"), [(20000, 2.07), (29000, 2.99)])
def test_token_peak_as_logged(tokens: int, logged: float) -> None:
    held = shard(model("Llama-3.1-8B-Instruct"), BF16)
    assert token_peak(held, tokens) / GIB == pytest.approx(logged, abs=0.02)


@pytest.mark.parametrize(
    ("name", "sequences", "logged"),
    [
        ("Llama-3.1-8B-Instruct", 256, 1.19),
        ("Phi-4-mini-instruct", 256, 1.83),
        ("phi-4", 320, 1.16),
        ("Llama-3.1-8B-Instruct", 160, 0.74),
        ("Qwen3-Next-80B-A3B-Instruct", 1024, 5.58),
    ],
)
def test_sampler_peak_as_logged(name: str, sequences: int, logged: float) -> None:
    rule = rules("0.11.0", "V1")
    peak = sampler_peak(shard(model(name), BF16), rule, sequences, 8192)
    assert peak / GIB == pytest.approx(logged, abs=0.03)


@pytest.mark.parametrize(
    ("version", "generation", "name", "context", "usage", "expected"),
    [
        ("0.6.3", "V0", "A100 80GB", 8192, "serve", (8192, 256)),
        ("0.6.3", "V0", "A100 80GB", 131072, "serve", (512, 256)),
        ("0.7.2", "V0", "A100 80GB", 131072, "serve", (2048, 256)),
        ("0.8.5", "V1", "A100 80GB", 8192, "serve", (8192, 1024)),
        ("0.9.2", "V1", "A100 80GB", 8192, "serve", (2048, 256)),
        ("0.11.0", "V1", "H100", 8192, "serve", (8192, 1024)),
        ("0.11.0", "V1", "H100", 8192, "offline", (16384, 1024)),
        ("0.11.0", "V1", "L40S", 8192, "serve", (2048, 256)),
        ("0.26.0", "V1", "B200", 8192, "serve", (8192, 1024)),
        ("0.33.0", "V1", "B200", 8192, "serve", (16384, 1024)),
        ("0.33.0", "V1", "GB10", 8192, "serve", (2048, 256)),
    ],
)
def test_batch_defaults(
    version: str, generation: str, name: str, context: int, usage: str, expected: tuple[int, int]
) -> None:
    rule = rules(version, generation)  # type: ignore[arg-type]
    assert batch_defaults(rule, gpu(name), context, usage) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "utilization", "sampler", "deducted"),
    [
        ("0.8.5", 0.9, 9.66, False),
        ("0.16.0", 0.9, 9.66, False),
        ("0.17.0", 0.9, 7.25, False),
        ("0.19.0", 0.9, 7.25, False),
        ("0.20.0", 0.92, 7.25, True),
        ("0.33.0", 0.92, 7.25, True),
        ("0.2x", 0.9, 7.25, None),
    ],
)
def test_rules_by_release(
    version: str, utilization: float, sampler: float, deducted: bool | None
) -> None:
    rule = rules(version, "V1")
    assert (rule.utilization, rule.sampler, rule.graphs_deducted) == (
        utilization,
        sampler,
        deducted,
    )


@pytest.mark.parametrize(
    ("text", "number", "exact"),
    [
        ("0.11.0", (0, 11, 0), True),
        ("v0.6.6.post1", (0, 6, 6), True),
        ("0.10.x", (0, 10, 0), True),
        ("0.2x (2026)", (0, 20, 0), False),
        ("0.18-0.19", (0, 18, 0), False),
    ],
)
def test_versions_as_people_write_them(
    text: str, number: tuple[int, int, int], exact: bool
) -> None:
    release = parse_release(text)
    assert (release.number, release.exact) == (number, exact)


def test_captured_sizes() -> None:
    assert captured_sizes(256, 1) == 51  # 1, 2, 4, 8..248 by 8, 256..512 by 16
    assert captured_sizes(256, 2) == 86
    assert captured_sizes(8, 2) == 5 + 4


@pytest.mark.parametrize("each", models().values(), ids=lambda each: each.name)
def test_catalogue_dimensions_give_the_published_size(each: object) -> None:
    """Within 1 % of the published parameters, vision towers apart; every entry has a source."""
    assert each.source  # type: ignore[attr-defined]
    apart = each.extra_params if "vision" in each.rough else 0  # type: ignore[attr-defined]
    billions = each.params / 1e9  # type: ignore[attr-defined]
    published = each.params_billion  # type: ignore[attr-defined]
    close = (billions, (each.params - apart) / 1e9)  # type: ignore[attr-defined]
    assert any(value == pytest.approx(published, rel=0.01) for value in close)


def test_catalogue_is_large_enough() -> None:
    assert len(models()) >= 64
    assert {"code", "chat"} <= {task for each in models().values() for task in each.tasks}
    assert all(each.source and each.memory for each in gpus().values())


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("l40s", "L40S"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
    ],
)
def test_gpus_as_nvidia_smi_names_them(written: str, name: str) -> None:
    assert gpu(written).name == name


def test_model_from_its_own_folder(tmp_path: Path) -> None:
    """What the catalogue says of Qwen3-8B, read from a config.json and a safetensors index."""
    config = {
        "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "intermediate_size": 12288, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = {"metadata": {"total_size": 16381470720}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read, weights = from_folder(tmp_path)
    assert weights == 16381470720
    assert abs(read.params - model("Qwen3-8B").params) < 20_000
    setup = Setup(read, gpu("L40S"), context=8192, measured_weights=weights)
    assert predict(setup).verdict == "fits"


def test_experts_windows_and_latent_attention_from_a_config() -> None:
    moe = from_config("x", {
        "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 512, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    })  # fmt: skip
    assert moe.experts is not None
    assert moe.experts.count == 8
    assert (moe.window, moe.window_layers, moe.kv_heads, moe.head_dim) == (16, 2, 4, 16)


def test_config_without_a_field_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(CapacityError, match=r"config\.json lacks num_attention_heads"):
        from_folder(tmp_path)
    with pytest.raises(CapacityError, match=r"config\.json cannot be read"):
        from_folder(tmp_path / "nowhere")


LLAMA = Setup(model("Llama-3.1-8B-Instruct"), gpu("L40S"), context=8192)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"tensor_parallel": 3}, "must divide its 32 attention heads"),
        ({"tensor_parallel": 0}, "at least 1"),
        ({"pipeline_parallel": 33}, "33 pipeline stages for 32 layers"),
        ({"context": 131073}, "past the model's limit of 131072"),
        ({"context": 0}, "context must be at least 1"),
        ({"sequences": -1}, "sequences must be at least 1"),
        ({"sequences": 64, "batched_tokens": 32}, "must be at least max_num_seqs"),
        ({"utilization": 1.5}, "at most 1"),
        ({"utilization": 0.0}, "above 0"),
        ({"quantization": "awk"}, "did you mean awq"),
        ({"kv_dtype": "fp3"}, "unknown KV cache type"),
        ({"gpu": with_memory(gpu("L40S"), -1)}, "must be positive"),
        ({"gpu": gpu("V100 32GB"), "quantization": "awq"}, r"needs compute capability 7\.5"),
        ({"gpu": gpu("T4"), "quantization": "mxfp4"}, r"needs compute capability 8\.0"),
        ({"version": "latest"}, "names no engine version"),
    ],
)
def test_nonsense_names_the_rule(change: dict[str, object], rule: str) -> None:
    with pytest.raises(CapacityError, match=rule) as caught:
        predict(replace(LLAMA, **change))  # type: ignore[arg-type]
    assert isinstance(caught.value, Error)
    assert isinstance(caught.value, ValueError)


def test_unknown_names_come_with_a_near_one() -> None:
    with pytest.raises(CapacityError, match="did you mean RTX 4090"):
        gpu("RTX 4091")
    with pytest.raises(CapacityError, match=r"did you mean Qwen/Qwen3-8B"):
        model("Qwen3-8C")


def test_memory_adds_up() -> None:
    for version in ("0.7.2", "0.11.0", "0.33.0"):
        prediction = predict(replace(LLAMA, version=version))
        for memory in (prediction.expected, prediction.pessimistic, prediction.optimistic):
            used = memory.weights + memory.activation + memory.non_torch + memory.graphs_deducted
            assert used + memory.pool == memory.budget
        pools = [prediction.pessimistic.pool, prediction.expected.pool, prediction.optimistic.pool]
        assert pools == sorted(pools)


def test_less_free_memory_than_the_budget_is_refused() -> None:
    """vLLM stops at once when less is free than it asks for."""
    prediction = predict(replace(LLAMA, free=20 * GIB))
    assert prediction.verdict == "does not fit"
    assert "free" in prediction.reason


def test_graphs_beside_a_full_budget_are_tight() -> None:
    full = replace(LLAMA, utilization=1.0, version="0.11.0")
    assert predict(full).verdict == "tight"
    assert predict(replace(full, eager=True)).verdict == "fits"


def test_what_an_engine_reports_corrects_the_next_prediction() -> None:
    for name, version in (("Llama-3.1-8B-Instruct", "0.11.0"), ("gpt-oss-20b", "0.33.0")):
        setup = replace(LLAMA, model=model(name), version=version)
        before = predict(setup)
        reported = before.kv_tokens - 8000
        learned = replace(setup, correction=correction(before, reported))
        assert predict(learned).kv_tokens == pytest.approx(reported, abs=32)


def test_rough_ground_is_said_to_be_rough() -> None:
    vision = predict(Setup(model("Qwen2.5-VL-7B-Instruct"), gpu("L40S"), context=8192))
    unified = predict(Setup(model("Qwen3-8B"), gpu("GB10"), context=8192))
    lora = predict(replace(LLAMA, lora=True))
    assert "vision" in vision.rough
    assert "unified" in unified.rough
    assert "LoRA" in lora.rough
    assert lora.margin > predict(LLAMA).margin
    assert predict(LLAMA).rough == ""


def test_gated_delta_layers_from_a_config() -> None:
    """Qwen3-Next's own figures; its attention block grows to 544 tokens, as vLLM logs."""
    read = from_config("next", {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 151936,
        "intermediate_size": 5120, "max_position_embeddings": 262144, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "full_attention_interval": 4,
        "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25,
    })  # fmt: skip
    assert read.recurrent is not None
    assert (read.recurrent.layers, read.full_layers, read.rotary_dim) == (36, 12, 64)
    assert read.params == pytest.approx(model("Qwen3-Next-80B-A3B-Instruct").params, rel=0.003)
    prediction = predict(Setup(read, gpu("H200"), "fp8", 32768, version="0.11.0"))
    assert prediction.cache.block_tokens == 544
    assert prediction.rough


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "bf16"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 8}, "gptq-int8"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_quantization_of_a_checkpoint(how: dict[str, object], name: str) -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 512, "quantization_config": how,
    }  # fmt: skip
    assert from_config("x", config).native == name


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 4096),
        ({"type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "llama3", "factor": 8.0}, 4096),
    ],
)
def test_rope_scaling_lengthens_the_context(
    scaling: dict[str, object] | None, context: int
) -> None:
    config = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 4096, "rope_scaling": scaling,
    }  # fmt: skip
    assert from_config("x", config).context == context


def test_a_strange_config_is_refused_in_words() -> None:
    with pytest.raises(CapacityError, match="strange value"):
        from_config("x", {"num_hidden_layers": "many", "num_attention_heads": 4})


def test_splitting_shares_the_weights() -> None:
    """Two GPUs hold at least half each, and not much more; every pipeline stage too."""
    llama = model("Llama-3.3-70B-Instruct")
    whole = shard(llama, BF16).weight_bytes
    for tp, pp in ((2, 1), (8, 1), (1, 2), (4, 2)):
        part = shard(llama, BF16, tp, pp).weight_bytes * tp * pp
        assert whole <= part * 1.001
        assert part <= whole * 1.03


def test_a_stretched_context_must_be_asked_for() -> None:
    stretched = replace(LLAMA, context=200_000, stretched=True)
    assert predict(stretched).context == 200_000
