"""MIG slices: their memory, their share of bandwidth and arithmetic, and what cannot span them."""

from __future__ import annotations

import pytest

from inferfleet.capacity import (
    GIB,
    CapacityError,
    Setup,
    bounds,
    gpu,
    model,
    next_larger,
    predict,
    recommend,
    size,
    slices,
)
from inferfleet.capacity.engines import batch_defaults, rules

LLAMA = model("Llama-3.1-8B-Instruct")


@pytest.mark.parametrize(
    ("name", "gib", "sms", "parts"),
    [  # as nvidia-smi mig -lgip prints them, with the fractions of NVIDIA's guide
        ("A100-SXM4-40GB MIG 1g.5gb", 4.75, 14 / 108, 1 / 8),
        ("A100-SXM4-40GB MIG 1g.10gb", 9.62, 14 / 108, 2 / 8),
        ("A100-SXM4-40GB MIG 3g.20gb", 19.5, 42 / 108, 4 / 8),
        ("NVIDIA A100-SXM4-80GB MIG 2g.20gb", 19.5, 28 / 108, 2 / 8),
        ("A100 MIG 7g.80gb", 79.0, 98 / 108, 1),
        ("H100 80GB HBM3 MIG 1g.10gb+me", 9.75, 16 / 132, 1 / 8),
        ("NVIDIA H100 PCIe MIG 2g.20gb", 19.62, 30 / 114, 2 / 8),
        ("H200 MIG 1g.35gb", 32.25, 26 / 132, 2 / 8),
        ("NVIDIA H200 MIG 3g.71gb", 69.5, 60 / 132, 4 / 8),
        ("h200 mig 4g.71gb", 69.5, 64 / 132, 4 / 8),
        ("RTX PRO 6000 Blackwell Server Edition MIG 2g.48gb+gfx", 47.38, 0.5, 2 / 4),
        ("RTX PRO 6000 MIG 1g.24gb+me.all", 23.12, 46 / 188, 1 / 4),
        ("RTX PRO 6000 MIG 1g.24gb-me", 23.12, 46 / 188, 1 / 4),
        ("A30 MIG 2g.12gb", 11.69, 0.5, 2 / 4),
    ],
)
def test_a_slice_has_its_memory_its_sms_and_its_part_of_the_bandwidth(name, gib, sms, parts):
    found, whole = gpu(name), gpu(name.lower().partition(" mig ")[0])
    assert found.memory == found.driver_bytes == round(gib * GIB)
    assert found.bf16_flops == pytest.approx(whole.bf16_flops * sms)
    assert found.fp8_flops == pytest.approx(whole.fp8_flops * sms)
    assert found.bandwidth == pytest.approx(whole.bandwidth * parts)
    assert found.capability == whole.capability
    assert found.name.startswith(f"{whole.name} MIG ")


def test_the_whole_of_a_gpu_is_never_less_than_its_slices() -> None:
    hopper = ("H100", "H100 PCIe", "H100 NVL", "H200")
    for name in ("A30", "A100 40GB", "A100 80GB", *hopper, "RTX PRO 6000"):
        cut = slices(name)
        assert cut == tuple(sorted(cut, key=lambda each: each.bf16_flops))
        for each in cut:
            assert each.memory <= gpu(name).memory * 1.01
            label = float(each.mig.partition(".")[2].removesuffix("gb"))
            assert 0.88 < each.memory / (label * 1e9) < 1.09, each.name  # its name is roughly true


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("H200 MIG 3g.40gb", r"no MIG profile '3g.40gb' of H200; it has 1g.18gb, .*, 7g.141gb"),
        ("L40S MIG 1g.6gb", "no MIG slices of L40S are in the catalogue"),
        ("H300 MIG 1g.6gb", "unknown GPU 'H300'; did you mean"),
    ],
)
def test_a_slice_that_is_in_no_table_is_said_to_be_so(name: str, said: str) -> None:
    with pytest.raises(CapacityError, match=said):
        gpu(name)


def test_what_fits_a_slice_is_counted_on_its_own_memory() -> None:
    """69.5 GiB x 0.92 is the budget; 1 GPU of it shares nothing with its neighbour."""
    found = predict(Setup(LLAMA, gpu("H200 MIG 3g.71gb"), context=16384, version="0.30.0"))
    assert found.expected.budget == int(69.5 * GIB * 0.92)
    assert found.verdict == "fits"
    small = predict(Setup(LLAMA, gpu("H200 MIG 1g.18gb"), context=16384, version="0.30.0"))
    assert (small.verdict, small.reason) == (
        "does not fit",
        "the weights alone are more than the budget",
    )


def test_an_engine_takes_the_smallest_batches_on_any_slice() -> None:
    """79 GiB would make it 8192 and 1024, but a container may not read that of its GPU."""
    rule = rules("0.30.0", "V1")
    assert batch_defaults(rule, gpu("H100"), 16384, "serve") == (8192, 1024)
    assert batch_defaults(rule, gpu("H100 MIG 7g.80gb"), 16384, "serve") == (2048, 256)


@pytest.mark.parametrize("split", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}])
def test_an_instance_takes_one_slice(split: dict[str, int]) -> None:
    with pytest.raises(CapacityError, match=r"H200 MIG 3g\.71gb: an instance takes one MIG slice"):
        predict(Setup(LLAMA, gpu("H200 MIG 3g.71gb"), **split))


def test_speed_is_bounded_by_the_slices_own_bandwidth() -> None:
    setup = Setup(LLAMA, gpu("H200"), context=16384)
    half = Setup(LLAMA, gpu("H200 MIG 3g.71gb"), context=16384)
    whole, cut = bounds(predict(setup)), bounds(predict(half))
    assert whole.decode == pytest.approx(2 * cut.decode)
    assert cut.prefill == pytest.approx(whole.prefill * 60 / 132)


def test_recommend_and_size_count_slices_and_never_split_over_them() -> None:
    found = recommend(gpu("H200 MIG 2g.35gb"), count=3, users=3, context=8192)
    assert found
    assert {each.setup.tensor_parallel for each in found if each.setup} == {1}
    assert {each.instances for each in found} == {3}
    (sized,) = size(LLAMA, 200, context=8192, kinds=[gpu("H200 MIG 2g.35gb")], gpus_per_host=3)
    assert (sized.gpus, sized.setup.tensor_parallel) == (sized.instances, 1)
    assert sized.hosts == -(-sized.gpus // 3)
    assert size(model("Qwen2.5-72B-Instruct"), 1, kinds=[gpu("H200 MIG 1g.18gb")]) == ()


def test_the_next_larger_of_a_slice_is_a_slice() -> None:
    larger = next_larger(gpu("H200 MIG 2g.35gb"))
    assert larger is not None
    assert larger.name == "H200 MIG 3g.71gb"
    assert next_larger(gpu("H200 MIG 7g.141gb")) is None
