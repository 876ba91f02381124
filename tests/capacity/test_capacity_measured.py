"""The planner against what engines logged: the numbers it must reach, and the table of them."""

from collections import defaultdict
from statistics import median

import pytest
from corpus import Measured, corpus

from inferfleet.capacity.gpus import GIB

COUNTED = [each for each in corpus() if each.counted]
POOLS = [(each, each.pool) for each in COUNTED if each.pool is not None]
LARGE = [(each, pool) for each, pool in POOLS if pool >= 4]
SMALL = [(each, pool) for each, pool in POOLS if pool < 4]


def error(each: Measured, pool: float) -> float:
    return each.prediction.expected.pool / GIB - pool


def row(each: Measured) -> str:
    prediction, logged = each.prediction, each.log
    pool, weights = each.pool, logged.get("weights_gib")
    mine = prediction.expected
    off = "" if not pool else f"{(mine.pool / GIB - pool) / abs(pool):+7.1%}"
    return (
        f"{each.name:34} weights {weights or 0:6.2f} {mine.weights / GIB:6.2f}"
        f"  pool {pool or 0:7.2f} {mine.pool / GIB:7.2f} {off:>8}"
        f"  {prediction.verdict:12} {logged['outcome']:8} {logged.get('held_out', '')}"
    )


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The table itself: GiB logged and predicted, then the verdict beside what happened."""
    with capsys.disabled():
        print("\n" + "\n".join(map(row, corpus())))
    assert len(COUNTED) >= 25
    assert all(each.source for each in corpus())


def test_pool_error_where_there_are_four_gib() -> None:
    """Median error at most 2 %, and 90 % of the start-ups within 10 %."""
    errors = [abs(error(each, pool)) / pool for each, pool in LARGE]
    assert median(errors) <= 0.02
    assert sum(each <= 0.10 for each in errors) >= 0.9 * len(errors)


def test_pool_error_below_four_gib() -> None:
    """At most half a GiB off in 85 % of the start-ups."""
    near = sum(abs(error(each, pool)) <= 0.5 for each, pool in SMALL)
    assert near >= 0.85 * len(SMALL)


def test_never_says_fits_when_it_did_not() -> None:
    """Held-out start-ups count here too: there the answer must be tight, or no."""
    refused = [each for each in corpus() if each.log["outcome"] == "refused"]
    assert len(refused) >= 5
    assert [each.name for each in refused if each.prediction.verdict == "fits"] == []


def test_seldom_says_no_when_it_did_fit() -> None:
    started = [each for each in corpus() if each.log["outcome"] == "started"]
    wrong = [each.name for each in started if each.prediction.verdict == "does not fit"]
    assert len(wrong) <= 0.1 * len(started)


@pytest.mark.parametrize("each", COUNTED, ids=lambda each: each.name)
def test_weights_without_a_download(each: Measured) -> None:
    """Within 2 %, AWQ and GPTQ 3 %, of what loading the model logged."""
    if "weights_gib" not in each.log or each.name == "v0-qwen25-05b-arch-4090":
        pytest.skip("not logged, or a part of the model only")
    allowed = 0.03 if each.setup.quantization.startswith(("awq", "gptq")) else 0.02
    logged = each.log["weights_gib"]
    assert each.prediction.expected.weights / GIB == pytest.approx(logged, rel=allowed)


@pytest.mark.parametrize(
    "each", [each for each in COUNTED if {"kv_gib", "kv_tokens"} <= each.log.keys()],
    ids=lambda each: each.name,
)  # fmt: skip
def test_bytes_of_a_token(each: Measured) -> None:
    """Logged GiB and logged tokens give the formula's bytes a token, but for rounding."""
    logged = each.log["kv_gib"] * GIB / each.log["kv_tokens"]
    rounding = 0.005 / each.log["kv_gib"] + 0.001
    assert each.prediction.kv_token_bytes == pytest.approx(logged, rel=rounding)


def test_logged_pools_lie_in_the_range() -> None:
    """Pessimistic to optimistic holds nearly all that was logged, half a GiB either way."""
    inside = [
        each.prediction.pessimistic.pool / GIB - 0.5
        <= pool
        <= each.prediction.optimistic.pool / GIB + 0.5
        for each, pool in POOLS
    ]
    assert sum(inside) >= 0.9 * len(inside)


def sort_factors() -> dict[str, list[float]]:
    """The sampler's factor that each logged activation peak implies, by where it was published."""
    factors = defaultdict(list)
    for each in COUNTED:
        mine = each.prediction.expected
        odd = "vision" in each.setup.model.rough or each.name == "v0-qwen25-05b-arch-4090"
        if "activation_gib" not in each.log or mine.sampler_peak <= mine.token_peak or odd:
            continue
        if each.setup.generation == "V0" and each.setup.sequences:
            unit = 4 * each.prediction.sequences * each.setup.model.vocab / GIB
            factors[each.source].append(each.log["activation_gib"] / unit)
    return factors


def test_the_sampler_factor_does_not_hang_on_one_source() -> None:
    """Leaving out any one source, the others still say 9.66 within 2 %."""
    factors = sort_factors()
    assert len(factors) >= 5
    for left_out in factors:
        rest = [
            value for source, values in factors.items() if source != left_out for value in values
        ]
        assert median(rest) == pytest.approx(9.66, rel=0.02)


def test_leaving_a_source_out_keeps_the_error_low() -> None:
    """No single source carries the result: the median stays under 2 % without any of them."""
    for left_out in {each.source for each, _ in LARGE}:
        errors = [abs(error(each, pool)) / pool for each, pool in LARGE if each.source != left_out]
        assert median(errors) <= 0.02
