"""Recommending over the whole catalogue is instant: 10,000 predictions a second and more."""

import time

from inferfleet.capacity import CapacityError, Setup, gpu, models, predict


def test_ten_thousand_predictions_a_second() -> None:
    setups = [
        Setup(each, gpu(name), context=4096, sequences=sequences)
        for each in models().values()
        if each.context >= 4096
        for name in ("L40S", "H100", "RTX PRO 6000")
        for sequences in (8, 16, 32, 64, 128, 256)
    ]
    for setup in setups:
        predict(setup)
    best = min(_seconds(setups) for _ in range(5))
    assert len(setups) / best >= 10_000


def _seconds(setups: list[Setup]) -> float:
    began = time.perf_counter()
    for setup in setups:
        predict(setup)
    return time.perf_counter() - began


def test_first_predictions_are_quick_too() -> None:
    """Nothing cached yet: versions and splits that no other test asks for."""
    began, count = time.perf_counter(), 0
    for each in models().values():
        for parallel in (1, 2, 4, 8):
            try:
                predict(Setup(each, gpu("H200"), tensor_parallel=parallel, version="0.27.0"))
            except CapacityError:
                continue
            count += 1
    assert count / (time.perf_counter() - began) >= 2000
