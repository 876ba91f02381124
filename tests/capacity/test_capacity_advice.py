"""Remedies, recommendations, sizing, Ollama and the bounds on speed."""

from dataclasses import replace

import pytest

from inferfleet.capacity import (
    GIB,
    CapacityError,
    Setup,
    bounds,
    fit,
    gpu,
    gpus,
    model,
    models,
    next_larger,
    parts,
    predict,
    predict_ollama,
    recommend,
    recommend_ollama,
    remedies,
    size,
    smallest_change,
)

CODER = Setup(model("Qwen2.5-Coder-7B-Instruct"), gpu("RTX 4090"), context=16384)
TIGHT = [
    Setup(model("gpt-oss-120b"), gpu("H100"), version="0.11.0", utilization=0.95),
    Setup(model("Llama-3.1-8B-Instruct"), gpu("RTX 4090"), version="0.11.0"),
    Setup(model("Llama-3.3-70B-Instruct"), gpu("L40S"), context=8192),
    Setup(model("Qwen3-Coder-30B-A3B-Instruct"), gpu("RTX 4090"), context=32768),
    Setup(model("Qwen2.5-7B-Instruct"), gpu("T4")),
    Setup(model("gemma-3-27b-it"), gpu("A100 80GB")),
]


@pytest.mark.parametrize("setup", TIGHT, ids=lambda setup: setup.model.name)
def test_every_remedy_really_fits(setup: Setup) -> None:
    assert predict(setup).verdict != "fits"
    found = remedies(setup, gpus_available=8)
    assert found
    for remedy in found:
        assert predict(remedy.prediction.setup).verdict == "fits"
        assert remedy.text
        assert remedy.options


def test_a_remedy_is_the_smallest_change() -> None:
    """One step less of the same lever, and it does not fit any more."""
    llama = TIGHT[1]
    context = next(each for each in remedies(llama) if "max-model-len" in dict(each.options))
    tokens = dict(context.options)["max-model-len"]
    assert predict(replace(llama, context=tokens + 1024)).verdict != "fits"
    gpt = replace(TIGHT[0], context=65536)
    sequences = dict(remedies(gpt)[0].options)["max-num-seqs"]
    assert predict(replace(gpt, sequences=sequences)).verdict == "fits"
    assert predict(replace(gpt, sequences=sequences + 8)).verdict != "fits"


def test_gpt_oss_on_one_h100_wants_fewer_sequences() -> None:
    """The known case: not the context but 1024 sequences of sampling are too much."""
    change = smallest_change(replace(TIGHT[0], context=65536))
    assert change is not None
    assert [name for name, _ in change.options] == ["max-num-seqs"]


def test_more_gpus_are_only_offered_when_there_are_any() -> None:
    llama = TIGHT[2]
    alone = [dict(each.options) for each in remedies(llama, gpus_available=1)]
    assert not any("tensor-parallel-size" in options for options in alone)
    four = [dict(each.options) for each in remedies(llama, gpus_available=8)]
    assert {"tensor-parallel-size": 4} in four


def test_nothing_to_change_when_it_fits_or_never_will() -> None:
    assert remedies(CODER) == ()
    assert remedies(Setup(model("Llama-3.1-405B-Instruct"), gpu("T4"), context=4096)) == ()


def test_fit_counts_users_over_all_instances() -> None:
    one = fit(CODER, users=4)
    four = fit(CODER, gpus_available=4, users=4)
    assert four.instances == 4
    assert four.carries == 4 * one.carries
    assert four.enough
    with pytest.raises(CapacityError, match="an instance takes 2 GPUs"):
        fit(replace(CODER, tensor_parallel=2), gpus_available=1)


def test_parts_fill_the_gpu() -> None:
    prediction = predict(CODER)
    assert sum(size for _, size in parts(prediction)) == prediction.setup.gpu.memory


@pytest.mark.parametrize("name", ["RTX 4060", "RTX 4090", "L40S", "H100", "B200"])
@pytest.mark.parametrize("task", ["code", "chat"])
def test_recommended_models_fit_and_carry_the_users(name: str, task: str) -> None:
    found = recommend(gpu(name), users=2, context=8192, task=task)
    assert found
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    for each in found:
        assert task in model(each.model).tasks
        assert each.carries >= 2
        if each.setup is not None:
            assert predict(each.setup).verdict == "fits"
            assert gpu(name).capability >= (7, 5)


def test_a_larger_gpu_buys_a_better_model() -> None:
    small = recommend(gpu("RTX 4090"), users=4, task="code")
    larger = next_larger(gpu("RTX 4090"))
    assert larger is not None
    assert larger.memory > gpu("RTX 4090").memory
    assert recommend(gpu("H100"), users=4, task="code")[0].score > small[0].score


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(CapacityError, match="no model is made for 'poetry'"):
        recommend(gpu("L40S"), task="poetry")


def test_without_a_gpu_ollama_runs_what_fits_in_memory() -> None:
    found = recommend_ollama(models().values(), ram=16 * GIB, context=8192)
    assert found
    assert all(each.engine == "ollama" for each in found)
    assert all(model(each.model).active_params <= 9e9 for each in found)
    assert not recommend_ollama(models().values(), ram=GIB // 4)


@pytest.mark.parametrize("users", [1, 50, 400])
def test_size_carries_the_users(users: int) -> None:
    coder = model("Qwen3-Coder-30B-A3B-Instruct")
    found = size(coder, users, context=32768)
    assert {"H100 80GB", "H200", "L40S"} <= {each.setup.gpu.name for each in found}
    for each in found:
        per = min(int(each.prediction.concurrency), each.prediction.sequences)
        assert each.instances * per >= users
        assert (each.instances - 1) * per < users
        assert each.gpus == each.instances * each.setup.tensor_parallel
        assert each.hosts * 8 >= each.gpus
        assert each.share >= 2 * coder.params * 0.99
        assert each.disk > each.share
    memory = [each.gpus * each.setup.gpu.memory for each in found]
    assert memory == sorted(memory)


def test_more_users_never_need_less() -> None:
    llama = model("Llama-3.3-70B-Instruct")
    needed = [
        size(llama, users, context=8192, kinds=[gpu("H100")])[0].gpus for users in (1, 40, 90)
    ]
    assert needed == sorted(needed)


def test_size_of_nothing_is_refused() -> None:
    with pytest.raises(CapacityError, match="at least 1"):
        size(model("Qwen3-8B"), 0)


@pytest.mark.parametrize(
    ("name", "billions_of_bytes"),
    [("Qwen2.5-Coder-7B-Instruct", 4.68), ("Llama-3.1-8B-Instruct", 4.92), ("phi-4", 9.05)],
)
def test_gguf_sizes(name: str, billions_of_bytes: float) -> None:
    """Q4_K_M files as published, within 5 %."""
    weights = predict_ollama(model(name), gpu_memory=24 * GIB).weights
    assert weights / 1e9 == pytest.approx(billions_of_bytes, rel=0.05)


def test_ollama_spills_to_the_cpu_and_then_gives_up() -> None:
    coder = model("Qwen2.5-Coder-32B-Instruct")
    whole = predict_ollama(coder, gpu_memory=48 * GIB, context=8192)
    part = predict_ollama(coder, gpu_memory=8 * GIB, ram=32 * GIB, context=8192)
    assert (whole.where, whole.gpu_layers) == ("gpu", 64)
    assert part.where == "gpu and cpu"
    assert 0 < part.gpu_layers < 64
    assert predict_ollama(coder, ram=64 * GIB, context=8192).where == "cpu"
    assert predict_ollama(coder, gpu_memory=8 * GIB, ram=8 * GIB).where == "does not fit"


def test_ollama_cache_grows_with_context_times_parallel() -> None:
    llama = model("Llama-3.1-8B-Instruct")
    one = predict_ollama(llama, gpu_memory=24 * GIB, context=8192)
    four = predict_ollama(llama, gpu_memory=24 * GIB, context=8192, parallel=4)
    assert one.cache == 8192 * 131072
    assert four.cache == 4 * one.cache
    quantized = predict_ollama(llama, gpu_memory=24 * GIB, context=8192, kv_dtype="q8_0")
    assert quantized.cache * 16 == one.cache * 8.5
    with pytest.raises(CapacityError, match="past its 131072"):
        predict_ollama(llama, context=1_000_000)


@pytest.mark.parametrize(
    ("memory", "context"), [(8 * GIB, 4096), (24 * GIB, 32768), (80 * GIB, 131072)]
)
def test_ollama_default_context_follows_memory(memory: int, context: int) -> None:
    found = predict_ollama(model("Llama-3.1-8B-Instruct"), gpu_memory=memory)
    assert found.context == context


def test_decode_is_bound_by_reading_the_weights() -> None:
    """15 GiB of 16 bit weights at 3.35 TB/s: no more than about 220 tokens a second."""
    prediction = predict(Setup(model("Llama-3.1-8B-Instruct"), gpu("H100"), context=8192))
    one = bounds(prediction, 1, 1)
    assert one.decode == pytest.approx(
        3.35e12 / (2 * model("Llama-3.1-8B-Instruct").active_params), rel=0.02
    )
    many = bounds(prediction, 32, 1)
    assert many.decode_total > 20 * one.decode_total
    assert bounds(prediction, 32, 8192).decode < many.decode


def test_a_batch_reads_more_experts() -> None:
    prediction = predict(Setup(model("Qwen3-30B-A3B"), gpu("H100"), context=8192))
    one, many = bounds(prediction, 1, 1), bounds(prediction, 64, 1)
    dense_like = 3.35e12 / (2 * model("Qwen3-30B-A3B").params)
    assert one.decode > 5 * dense_like
    assert many.decode < 1.3 * dense_like


def test_unknown_hardware_has_no_bounds() -> None:
    blank = replace(gpu("L40S"), bandwidth=0.0)
    with pytest.raises(CapacityError, match="not in the catalogue"):
        bounds(predict(Setup(model("Qwen3-8B"), blank, context=8192)))


def test_every_gpu_answers_for_every_model() -> None:
    """No pair raises anything but a rule, and a verdict is always one of the three."""
    for spec in gpus().values():
        for each in models().values():
            try:
                prediction = predict(Setup(each, spec, context=min(4096, each.context)))
            except CapacityError:
                continue
            assert prediction.verdict in ("fits", "tight", "does not fit")
            assert prediction.kv_tokens >= 0
