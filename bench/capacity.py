"""How fast the planner predicts, recommends and places: `python bench/capacity.py`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from inferfleet.capacity import (
    CapacityError,
    Request,
    Setup,
    Site,
    gpu,
    gpus,
    models,
    place,
    predict,
    recommend,
)


def setups() -> list[Setup]:
    """Every model of the catalogue on every GPU, with several options, where that makes sense."""
    found = []
    for each in models().values():
        for spec in gpus().values():
            for context in (4096, 16384):
                for sequences in (None, 64):
                    setup = Setup(each, spec, context=context, sequences=sequences)
                    try:
                        predict(setup)
                    except CapacityError:
                        continue
                    found.append(setup)
    return found


def timed(work: Callable[[], object], rounds: int = 3) -> float:
    """The best of a few rounds, in seconds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    asked = setups()
    seconds = timed(lambda: [predict(setup) for setup in asked])
    print(f"predict: {len(asked)} setups, {len(asked) / seconds:,.0f} a second")
    seconds = timed(lambda: recommend(gpu("H100"), count=8, users=32, task="code"))
    print(f"recommend: {len(models())} models on 8 GPUs, {seconds * 1000:.0f} ms")
    rng = random.Random(7)  # noqa: S311  a fleet, not a secret
    halves = ((0, 1, 2, 3), (4, 5, 6, 7))
    sites = [Site(f"gpu-{number:03}", halves) for number in range(500)]
    requests = [Request(f"model-{n:02}", 20, rng.choice([1, 1, 2, 4, 8])) for n in range(50)]
    seconds = timed(lambda: place(sites, requests))
    print(f"place: 1000 instances on 500 hosts, {seconds * 1000:.0f} ms")
    before = place(sites, requests).spots
    seconds = timed(lambda: place(sites[1:], requests, before))
    print(f"place again after losing a host: {seconds * 1000:.0f} ms")


if __name__ == "__main__":
    main()
